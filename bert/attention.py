"""Attention on a CPU: a few passes over short sequences, where PyTorch's own takes many.

Softmax(q k^T / sqrt(d) + mask) v (Vaswani et al. 2017, equation 1) of packed tokens, forward and
backward. On short sentences PyTorch's kernel is mostly overhead: 7.5 ms forward where this takes
2.6 (104 of 11 tokens, two cores); long ones without dropout are its ground. Shapes as in layout.py,
h heads and d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora.bert.layout import Layout, Square

LONG = 100  # tokens from which PyTorch's kernel is the faster one, without dropout
_VECTOR = 16  # rows shorter than a vector are slow in PyTorch's softmax


def cpu_attention(qkv: Tensor, keeps: list[Tensor | None], layout: Layout, heads: int) -> Tensor:
    """[T, 3H] -> [T, H]; a square's keep [b, h, s, s] is the probabilities' scaled dropout mask."""
    return _CpuAttention.apply(qkv, layout, heads, *keeps)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, heads: int, *keeps: Tensor | None) -> Tensor:
        cells = layout.gather(qkv)
        context = cells.new_empty(len(cells), cells.shape[1] // 3)
        ctx.layout, saved = layout, []
        for square, keep in zip(layout.squares, keeps, strict=True):
            packed = _square(cells, square, heads, 3).contiguous()
            q, k, v = packed
            scores = (q @ k.mT).mul_(q.shape[-1] ** -0.5)  # [b, h, s, s]
            if square.mask is not None:
                least = torch.finfo(scores.dtype).min / 2  # halved, so that no sum overflows
                scores.add_(square.mask.logical_not() * least)
            probabilities = _softmax(scores)
            dropped = probabilities if keep is None else probabilities * keep
            _square(context, square, heads, 1).copy_(dropped @ v)
            saved += [packed, probabilities, keep]
        ctx.save_for_backward(*saved)
        return layout.unpad(context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.layout.pad(grad)
        d_qkv, saved = grad.new_empty(len(grad), 3 * grad.shape[1]), ctx.saved_tensors
        for i, square in enumerate(ctx.layout.squares):
            packed, probabilities, keep = saved[3 * i : 3 * i + 3]
            q, k, v = packed
            (own,) = _square(grad, square, q.shape[1], 1).contiguous()
            dropped = probabilities if keep is None else probabilities * keep
            d_packed = torch.empty_like(packed)
            torch.matmul(dropped.mT, own, out=d_packed[2])
            d = own @ v.mT
            if keep is not None:
                d.mul_(keep)
            d.mul_(probabilities)
            d.addcmul_(probabilities, d.sum(-1, keepdim=True), value=-1).mul_(q.shape[-1] ** -0.5)
            torch.matmul(d, k, out=d_packed[0])
            torch.matmul(d.mT, q, out=d_packed[1])
            _square(d_qkv, square, q.shape[1], 3).copy_(d_packed)
        return ctx.layout.unpad(d_qkv), None, None, *(None for _ in ctx.layout.squares)


def _square(cells: Tensor, square: Square, heads: int, parts: int) -> Tensor:
    """A square of [C, parts * H], seen as [parts, b, h, s, d]."""
    own = cells[square.cells].view(square.rows, square.length, parts, heads, -1)
    return own.permute(2, 0, 3, 1, 4)


def _softmax(scores: Tensor) -> Tensor:
    if scores.shape[-1] >= _VECTOR:
        return scores.softmax(-1)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))
