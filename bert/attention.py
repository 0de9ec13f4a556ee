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

from fastlora.bert.layout import Groups, Layout

USE_CPU_KERNEL = True  # False: a CPU computes as a GPU does
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
    own = USE_CPU_KERNEL and qkv.is_cpu and len(qkv) > 0 and not torch.compiler.is_compiling()
    if own and bias is None and (p or layout.length < LONG):
        return _CpuAttention.apply(qkv, dropout, Groups.of(layout, heads), scale)
    q, k, v = layout.pad(qkv).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, S, d]
    mask, least = layout.mask, torch.finfo(q.dtype).min / 2
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, least)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
    return layout.unpad(context.transpose(1, 2).flatten(2))


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, dropout: Any, groups: Groups, scale: float | None) -> Tensor:
        packed, saved = groups.take(qkv, 3), []
        context = torch.empty_like(packed[:1])
        ctx.groups, ctx.scale = groups, packed.shape[2] ** -0.5 if scale is None else scale
        least = torch.finfo(qkv.dtype).min / 2  # halved, so that no sum overflows
        for masked, q, k, v, out in groups.each(*packed, *context):
            scores = torch.baddbmm(masked.to(q.dtype).mul_(least), q, k.mT, alpha=ctx.scale)
            probabilities = _softmax(scores)
            dropped = dropout(probabilities)  # all that backward needs of the mask
            torch.bmm(dropped, v, out=out)
            saved += [probabilities, dropped]
        ctx.save_for_backward(packed, *saved)
        return groups.give(context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # once_differentiable would not always notice
            raise RuntimeError(
                "attention on packed tokens cannot be differentiated twice (expected no "
                "create_graph; accelerate(model, real_tokens=False) keeps the model's attention)"
            )
        packed, *saved = ctx.saved_tensors
        d_packed, grads = torch.empty_like(packed), ctx.groups.take(grad, 1)
        for _, q, k, v, dq, dk, dv, g in ctx.groups.each(*packed, *d_packed, *grads):
            probabilities, dropped, *saved = saved
            torch.bmm(dropped.mT, g, out=dv)
            d = torch.bmm(g, v.mT).mul_(dropped)
            d.addcmul_(probabilities, d.sum(-1, keepdim=True), value=-1)
            torch.baddbmm(dq, d, k, beta=0, alpha=ctx.scale, out=dq)
            torch.baddbmm(dk, d.mT, q, beta=0, alpha=ctx.scale, out=dk)
        return ctx.groups.give(d_packed), None, None, None


def _softmax(scores: Tensor) -> Tensor:
    if scores.shape[-1] >= _VECTOR:
        return scores.softmax(-1)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))
