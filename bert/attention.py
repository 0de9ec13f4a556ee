"""Attention on a CPU: a few passes over short sequences, where PyTorch's own takes many.

Softmax(q k^T / sqrt(d) + mask) v (Vaswani et al. 2017, equation 1) of packed tokens, forward and
backward. On short sentences PyTorch's kernel is mostly overhead: 7.5 ms forward where this takes
2.6 (104 of 11 tokens, two cores); long ones without dropout are its ground. Shapes as in model.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from fastlora.bert.model import Layout

LONG = 100  # tokens from which PyTorch's kernel is the faster one, without dropout
_VECTOR = 16  # rows shorter than a vector are slow in PyTorch's softmax


def cpu_attention(qkv: Tensor, keep: Tensor | None, layout: Layout, heads: int) -> Tensor:
    """[T, 3H] -> [T, H]; `keep` [B, h, S, S], the scaled dropout mask, is overwritten."""
    return _CpuAttention.apply(qkv, keep, layout, heads)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, keep: Tensor | None, layout: Layout, heads: int) -> Tensor:
        packed = _split(qkv, layout, heads, 3)
        q, k, v = packed
        scores = (q @ k.mT).mul_(q.shape[-1] ** -0.5)  # [B, h, S, S]
        if layout.mask is not None:
            least = torch.finfo(scores.dtype).min / 2  # halved, so that no sum overflows
            scores.add_(layout.mask.logical_not().to(scores.dtype) * least)
        probabilities = _softmax(scores)
        dropped = probabilities if keep is None else keep.mul_(probabilities)
        ctx.layout = layout
        ctx.save_for_backward(packed, probabilities, dropped)
        return _join((dropped @ v).unsqueeze(0), layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, probabilities, dropped = ctx.saved_tensors
        q, k, v = packed
        (grad,) = _split(grad, ctx.layout, q.shape[1], 1)
        if ctx.layout.mask is not None:
            grad.mul_(ctx.layout.mask.mT)  # what stands at padding is another token's
        d_packed = torch.empty_like(packed)
        torch.matmul(dropped.mT, grad, out=d_packed[2])
        d = (grad @ v.mT).mul_(dropped)
        d.addcmul_(probabilities, d.sum(-1, keepdim=True), value=-1).mul_(q.shape[-1] ** -0.5)
        torch.matmul(d, k, out=d_packed[0])
        torch.matmul(d.mT, q, out=d_packed[1])
        return _join(d_packed, ctx.layout), None, None, None


def _split(tokens: Tensor, layout: Layout, heads: int, parts: int) -> Tensor:
    """[T, parts * H] -> [parts, B, h, S, d], any token at padding, in one copy."""
    pieces, key = parts * heads, ("split", parts, heads)
    if key not in layout.derived:
        source = _places(layout.source, layout).view(layout.batch, 1, layout.length)
        piece = torch.arange(pieces).view(parts, 1, heads, 1)
        layout.derived[key] = source * pieces + piece
    return F.embedding(layout.derived[key], tokens.reshape(len(tokens) * pieces, -1))


def _join(parts: Tensor, layout: Layout) -> Tensor:
    """[parts, B, h, S, d] -> [T, parts * H], the inverse."""
    count, B, heads, S, width = parts.shape
    key = "join", count, heads
    if key not in layout.derived:
        index = _places(layout.index, layout)
        first = index + index // S * (heads - 1) * S
        piece = torch.arange(count)[:, None] * B * heads * S + torch.arange(heads) * S
        layout.derived[key] = first[:, None] + piece.flatten()
    return F.embedding(layout.derived[key], parts.view(-1, width)).view(-1, count * heads * width)


def _places(places: Tensor | None, layout: Layout) -> Tensor:
    """`places`, or all of them where nothing is padded."""
    return torch.arange(layout.batch * layout.length) if places is None else places


def _softmax(scores: Tensor) -> Tensor:
    if scores.shape[-1] >= _VECTOR:
        return scores.softmax(-1)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))
