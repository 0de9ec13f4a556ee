"""Attention on a CPU: a few passes over short sequences, where PyTorch's own takes many.

Softmax(q k^T / sqrt(d) + mask) v (Vaswani et al. 2017, equation 1) of packed tokens, forward and
backward. On short sentences PyTorch's kernel is mostly overhead: 7.5 ms forward where this takes
2.6 (104 of 11 tokens, two cores); long ones without dropout are its ground. Shapes as in model.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from fastlora.bert.model import Layout

LONG = 100  # tokens from which PyTorch's kernel is the faster one, without dropout
_VECTOR = 16  # rows shorter than a vector are slow in PyTorch's softmax


def cpu_attention(qkv: Tensor, keep: Tensor | None, layout: Layout, heads: int) -> Tensor:
    """[T, 3H] -> [T, H]; `keep` [B, h, S, S] is the probabilities' scaled dropout mask."""
    return _CpuAttention.apply(qkv, keep, layout, heads)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, keep: Tensor | None, layout: Layout, heads: int) -> Tensor:
        packed = _split(layout.gather(qkv), layout, heads, 3)
        q, k, v = packed
        scores = (q @ k.mT).mul_(q.shape[-1] ** -0.5)  # [B, h, S, S]
        if layout.mask is not None:
            least = torch.finfo(scores.dtype).min / 2  # halved, so that no sum overflows
            scores.add_(layout.mask.logical_not() * least)
        probabilities = _softmax(scores)
        dropped = probabilities if keep is None else probabilities * keep
        ctx.layout = layout
        ctx.save_for_backward(packed, probabilities, keep)
        return layout.unpad(_join((dropped @ v).unsqueeze(0)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, probabilities, keep = ctx.saved_tensors
        q, k, v = packed
        (grad,) = _split(ctx.layout.pad(grad), ctx.layout, q.shape[1], 1)
        dropped = probabilities if keep is None else probabilities * keep
        d_packed = torch.empty_like(packed)
        torch.matmul(dropped.mT, grad, out=d_packed[2])
        d = grad @ v.mT
        if keep is not None:
            d.mul_(keep)
        d.mul_(probabilities)
        d.addcmul_(probabilities, d.sum(-1, keepdim=True), value=-1).mul_(q.shape[-1] ** -0.5)
        torch.matmul(d, k, out=d_packed[0])
        torch.matmul(d.mT, q, out=d_packed[1])
        return ctx.layout.unpad(_join(d_packed)), None, None, None


def _split(square: Tensor, layout: Layout, heads: int, parts: int) -> Tensor:
    """[B * S, parts * H] -> [parts, B, h, S, d] in one copy."""
    square = square.view(layout.batch, layout.length, parts, heads, -1)
    return square.permute(2, 0, 3, 1, 4).contiguous()


def _join(parts: Tensor) -> Tensor:
    """[parts, B, h, S, d] -> [B, S, parts * H]."""
    return parts.permute(1, 3, 0, 2, 4).flatten(2)


def _softmax(scores: Tensor) -> Tensor:
    if scores.shape[-1] >= _VECTOR:
        return scores.softmax(-1)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))
