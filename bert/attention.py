"""Attention within each sequence; queries, keys and values come as packed tokens [T, 3H].

Softmax(q k^T / sqrt(d) + mask) v (Vaswani et al. 2017, equation 1). On a CPU, short sequences take
a few passes of our own: PyTorch's forward is mostly overhead there, and takes 7.5 ms where ours
takes 2.6 (104 sequences of 11 tokens, two cores). Shapes as in model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.bert.layout import Layout

LONG = 100  # tokens from which PyTorch's kernel is the faster one, without dropout
_VECTOR = 16  # rows shorter than a vector are slow in PyTorch's softmax


def attention(
    qkv: Tensor,  # [T, 3H]
    layout: Layout,
    heads: int,
    dropout: Callable[[Tensor], Tensor],  # drops and scales the probabilities, at rate p
    p: float,
    scale: float | None = None,  # of the scores; None: 1 / sqrt(d)
    bias: Tensor | None = None,  # [1 or B, heads, S, S], added to the scores
) -> Tensor:
    """The context [T, H] of every token, from the tokens of its own sequence."""
    # torch.compile handles PyTorch's attention, and that also accepts an input without tokens.
    use_cpu_kernel = not torch.compiler.is_compiling() and qkv.device.type == "cpu" and len(qkv) > 0
    if use_cpu_kernel and bias is None and (p or layout.length < LONG):
        return _CpuAttention.apply(qkv, dropout, layout, heads, scale)
    q, k, v = layout.pad(qkv).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, S, d]
    mask = layout.mask
    if bias is not None:
        mask = bias.to(q.dtype)
        if layout.mask is not None:
            mask = mask.masked_fill(~layout.mask, torch.finfo(q.dtype).min / 2)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
    return layout.unpad(context.transpose(1, 2).flatten(2))


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, dropout: Any, layout: Layout, heads: int, scale: float | None
    ) -> Tensor:
        packed = _split(qkv, layout, heads, 3)
        q, k, v = packed.unbind()
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        additive_mask = q.new_zeros(len(q), 1, layout.length)  # what is added to scores
        if layout.mask is not None:
            least = torch.finfo(q.dtype).min / 2  # halved, so that no sum overflows
            additive_mask.unflatten(0, (-1, heads)).masked_fill_(layout.mask.logical_not(), least)
        probabilities = _softmax(torch.baddbmm(additive_mask, q, k.mT, alpha=scale))  # [B h, S, S]
        dropped = dropout(probabilities)  # all that backward needs of the mask
        ctx.layout, ctx.heads, ctx.scale = layout, heads, scale
        ctx.save_for_backward(packed, probabilities, dropped)
        return _join(torch.bmm(dropped, v).unsqueeze(0), layout, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # once_differentiable would not always notice
            raise RuntimeError(
                "attention on packed tokens cannot be differentiated twice (expected no "
                "create_graph; accelerate(model, real_tokens=False) keeps the model's attention)"
            )
        packed, probabilities, dropped = ctx.saved_tensors
        q, k, v = packed.unbind()
        grad = _split(grad, ctx.layout, ctx.heads, 1)[0]
        if ctx.layout.mask is not None:  # cells without a token hold a copy of another token
            computed = ctx.layout.computed[:, None, :, None]
            grad.unflatten(0, (-1, ctx.heads)).mul_(computed)
        d_packed = torch.empty_like(packed)
        dq, dk, dv = d_packed.unbind()
        torch.bmm(dropped.mT, grad, out=dv)
        d = torch.bmm(grad, v.mT).mul_(dropped)
        d.addcmul_(probabilities, d.sum(-1, keepdim=True), value=-1)
        torch.baddbmm(dq, d, k, beta=0, alpha=ctx.scale, out=dq)
        torch.baddbmm(dk, d.mT, q, beta=0, alpha=ctx.scale, out=dk)
        return _join(d_packed, ctx.layout, ctx.heads), None, None, None, None


def _split(tokens: Tensor, layout: Layout, heads: int, parts: int) -> Tensor:
    """[T, parts * H] -> [parts, B h, S, d]; a cell without a token repeats one before it."""
    key, count = ("split", parts, heads), len(tokens) * parts * heads
    if key not in layout.derived:
        indices = torch.arange(count, device=tokens.device).view(-1, parts, heads)
        if layout.mask is not None and layout.index is not None:
            # Mostly a token of the same row, because another row's token may be NaN.
            rank = layout.computed.flatten().cumsum(0).sub_(1).clamp_(min=0)
            indices = indices[layout.index.argsort()[rank]]
        square = indices.view(layout.batch, layout.length, parts, heads)
        layout.derived[key] = square.permute(2, 0, 3, 1).flatten()
    rows = tokens.reshape(count, -1).index_select(0, layout.derived[key])
    return rows.view(parts, layout.batch * heads, layout.length, -1)


def _join(split: Tensor, layout: Layout, heads: int) -> Tensor:
    """[parts, B h, S, d] -> [T, parts * H], the inverse."""
    (parts, *_, width), key = split.shape, ("join", len(split), heads)
    if key not in layout.derived:
        indices = torch.arange(split.numel() // width, device=split.device)
        indices = indices.view(parts, -1, heads, layout.length)
        layout.derived[key] = layout.unpad(indices.permute(1, 3, 0, 2).flatten(2)).flatten()
    rows = split.view(-1, width).index_select(0, layout.derived[key])
    return rows.view(-1, parts * heads * width)


def _softmax(scores: Tensor) -> Tensor:
    if scores.shape[-1] >= _VECTOR:
        return scores.softmax(-1)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))
