"""The LoRA operation with a hand-written backward: the one entry the modules call.

Saved for backward are x, each term's u = (m * x) A^T and the mask's seed; neither the mask nor
the dropped x, and never a gradient of W0 or b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlora.kernels.dropout import draw_seed
from fastlora.kernels.reference import Term


class _LoRAFunction(torch.autograd.Function):
    """Route "reference": [M, K] x [N, K] -> [M, N] with PyTorch's own GEMMs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        terms: tuple[Term, ...],
        *factors: Tensor,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        us = []
        for term, A, B in zip(terms, factors[0::2], factors[1::2], strict=True):
            branch, _ = _dropped(x, term)
            u = branch @ A.to(x.dtype).T  # [M_t, r]
            block = y[term.start : term.stop, term.column : term.column + B.shape[0]]
            block.addmm_(u, B.to(x.dtype).T, alpha=term.c)
            us.append(u)
        ctx.terms = terms
        ctx.save_for_backward(x, weight, *factors, *us)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        count = len(ctx.terms)
        factors, us = saved[: 2 * count], saved[2 * count :]
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        gradients = []
        for i, term in enumerate(ctx.terms):
            A, B = factors[2 * i], factors[2 * i + 1]
            g = grad[term.start : term.stop, term.column : term.column + B.shape[0]]
            v = (g @ B.to(x.dtype)).mul_(term.c)  # [M_t, r]
            branch, mask = _dropped(x, term)
            gradients.append((v.T @ branch).to(A.dtype))
            gradients.append((g.T @ us[i]).mul_(term.c).to(B.dtype))
            if dx is not None:
                _add_branch(dx[term.start : term.stop], v, A.to(x.dtype), mask)
        return dx, None, None, None, *gradients


def _dropped(x: Tensor, term: Term) -> tuple[Tensor, Tensor | None]:
    branch = x[term.start : term.stop]
    mask = term.mask(*branch.shape)
    return (branch if mask is None else branch * mask), mask


def _add_branch(dx: Tensor, v: Tensor, A: Tensor, mask: Tensor | None) -> None:
    """dx += m * (v A), in place."""
    if mask is None:
        dx.addmm_(v, A)
    else:
        dx.add_((v @ A).mul_(mask))


def lora_grouped(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """A frozen projection plus any number of low-rank terms on blocks of its output.

    Args:
        x: [..., K] in any layout, floating point.
        weight: [N, K], frozen, in x's dtype (cast under autocast).
        bias: [N] or None, frozen.
        terms: the adapters; factors may be fp32 masters of a half-precision x. Terms may overlap
            (they add up) and may be empty.

    Returns:
        [..., N] in x's dtype. Gradients flow to x and to every lora_A and lora_B.

    Raises:
        ValueError: when a shape does not fit.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, terms)
    rows = x.reshape(-1, x.shape[-1])
    factors = [factor for term in terms for factor in (term.lora_A, term.lora_B)]
    with torch.autocast(device, enabled=False):
        y = _LoRAFunction.apply(rows, weight, bias, tuple(terms), *factors)
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W0^T + b + scale / (1 - p) (m * x) A^T B^T for one projection and one adapter.

    Shapes as in `lora_grouped`; lora_A [r, K], lora_B [N, r]. Without `seed` the mask's seed is
    drawn from torch's generator.
    """
    if dropout_p > 0 and seed is None:
        seed = draw_seed(x.device)
    return lora_grouped(x, weight, bias, [Term(lora_A, lora_B, scale, dropout_p, seed)])


def _check(x: Tensor, weight: Tensor, terms: Sequence[Term]) -> None:
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features (expected {weight.shape[1]}, weight's)")
    for term in terms:
        A, B = term.lora_A, term.lora_B
        if A.shape[1] != weight.shape[1] or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)} "
                f"(expected [r, {weight.shape[1]}] and [N, r])"
            )
        if term.column + B.shape[0] > weight.shape[0]:
            raise ValueError(
                f"lora_B's rows reach column {term.column + B.shape[0]} of the output "
                f"(expected at most {weight.shape[0]})"
            )


def route() -> tuple[str, str]:
    """The route that `lora_grouped` takes, and why."""
    return "reference", "PyTorch's own GEMMs on every device"
