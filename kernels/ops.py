"""The public functions of the LoRA operation; they decide whether a call can run fused.

A call runs fused if all of its tensors are plain ones on one CPU or GPU and the weight is frozen.
Else the reference runs, in differentiable operations: without rows, with a trainable weight, tensor
subclasses, the meta device, export, `torch.func`, forward-mode derivatives, and dispatch modes.
"""

import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastlora.kernels import reference
from fastlora.kernels.autograd import run
from fastlora.kernels.call import PLAIN_TYPES, Call, Copies, Packed, Term, is_ordinary
from fastlora.kernels.cpu import route as cpu_route
from fastlora.kernels.dropout import draw_seed
from fastlora.kernels.routes import forced, route
from fastlora.kernels.selfcheck import is_capturing
from fastlora.kernels.triton import tuning

# Multiply-adds on a CPU below which plain PyTorch computes, unless the environment names a route.
MIN_FUSED_WORK = 0 if os.environ.get("FASTLORA_ROUTE") else 40_000_000


def lora_grouped(
    x: Tensor,  # [..., K] in any layout, floating point
    weight: Tensor,  # [N, K] in x's dtype (cast under autocast)
    bias: Tensor | None,  # [N]
    terms: Sequence[Term],  # may overlap (they add up) and may be empty
    seed: Tensor | None = None,  # int64 [] of all masks; None draws one from torch's generator
    packed: Packed | None = None,  # packed copies, from an owner who knows when the weight changes
) -> Tensor:
    """A linear projection plus any number of low-rank terms on blocks of its output.

    Returns [..., N] in x's dtype. Gradients flow to x, bias and every lora_A and lora_B, which may
    be fp32 masters of a half-precision x, and to the weight if it is trainable. Raises ValueError
    when a shape does not fit, and otherwise as `torch.nn.functional.linear`.
    """
    _check(x, weight, terms)
    if is_small(x, weight.shape[0]):
        return reference.add_terms(nn.functional.linear(x, weight, bias), x, terms, seed)
    if torch.compiler.is_compiling():
        # On a CPU, torch.compile fuses the reference well, but cannot draw a mask from a seed.
        fusable = len(terms) > 0 and (x.is_cuda or seed is not None)
        fusable &= not torch.compiler.is_exporting()
    else:
        others = (weight, bias, seed, *(factor for term in terms for factor in term[:2]))
        fusable = (
            is_ordinary(x)
            and all(t is None or (type(t) in PLAIN_TYPES and t.device == x.device) for t in others)
            and _compute_dtype(weight) == _compute_dtype(x)
            and (packed is not None or not is_capturing(x.device))  # what a graph reads is kept
        )
    name = ""
    if fusable and not weight.requires_grad:
        name = route(x.device, dtype := _compute_dtype(x)).name
    if not name or (name != "reference" and not (terms and dtype in tuning.DTYPE_NAMES)):
        return add_terms(nn.functional.linear(x, weight, bias), x, terms, seed)
    copies = copies_of(x, packed, weight)
    if weight.dtype != dtype:
        weight = copies.get(dtype, partial(weight.to, dtype))
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1 or rows.stride(0) == 0:
        rows = rows.contiguous()
    if seed is None and any(term.dropout_p > 0 for term in terms):
        seed = draw_seed(x.device)
    ends = [slice(term.start, term.stop).indices(len(rows))[:2] for term in terms]
    placed = [t._replace(start=a, stop=max(a, b)) for t, (a, b) in zip(terms, ends, strict=True)]
    bias = None if bias is None else bias.to(dtype)
    y = run(rows, bias, Call(weight, placed, seed, copies, name))
    return y.view(*x.shape[:-1], weight.shape[0])


def add_terms(y: Tensor, x: Tensor, terms: Sequence[Term], seed: Tensor | None = None) -> Tensor:
    """y [..., N] plus the low-rank terms of x [..., K], as a new tensor, in plain PyTorch."""
    if seed is None and any(term.dropout_p > 0 for term in terms) and is_ordinary(x):
        seed = draw_seed(x.device)  # so that the masks are those of the fused operation
    return reference.add_terms(y, x, terms, seed)


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
    """`lora_grouped` with one adapter on all of y: lora_A [r, K], lora_B [N, r]."""
    return lora_grouped(x, weight, bias, [Term(lora_A, lora_B, scale, dropout_p)], seed)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, packed: Packed | None = None
) -> Tensor:
    """gelu(x W^T + b) [..., N]; without gradients on a CPU, oneDNN's product applies GELU."""
    usual = is_ordinary(x) and is_ordinary(weight) and weight.dtype == x.dtype == _compute_dtype(x)
    if torch.is_grad_enabled() or is_small(x, len(weight)) or not usual:
        y = lora_grouped(x, weight, bias, (), packed=packed)
        return nn.functional.gelu(y, approximate=approximate)
    call = Call(weight, (), None, copies_of(x, packed, weight))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return cpu_route.product(rows, bias, call, gelu=approximate).view(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """`nn.Linear` that is faster on a CPU while its weight is frozen."""

    packed: Packed | None = None  # copies, set by an owner who knows when the weight changes

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if is_small(input, self.out_features):
            return super().forward(input)
        return lora_grouped(input, self.weight, self.bias, (), None, self.packed_for(input))

    def packed_for(self, input: Tensor) -> Packed | None:
        """The packed copies that a product with this input uses."""
        return self.packed


def _check(x: Tensor, weight: Tensor, terms: Sequence[Term]) -> None:
    N, K = weight.shape
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features (expected {K}, weight's)")
    for term in terms:
        A, B = term.lora_A.shape, term.lora_B.shape
        if A[1] != K or A[0] != B[1]:
            raise ValueError(f"lora_A is {[*A]}, lora_B {[*B]} (expected [r, {K}] and [N, r])")
        if (end := term.column + B[0]) > N:
            raise ValueError(f"lora_B's rows reach column {end} of y (expected at most {N})")


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: x's, or autocast's unless x is fp64."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_small(x: Tensor, out_features: int) -> bool:
    """Whether the product is so small that plain PyTorch is faster."""
    # While torch.compile traces, a look at the number of rows would limit it.
    small = not torch.compiler.is_compiling() and x.numel() * out_features < MIN_FUSED_WORK
    return small and x.is_cpu and not forced.get()


def copies_of(x: Tensor, packed: Packed | None, *tensors: Tensor) -> Copies:
    """The packed copies of these tensors that a call with this x may use."""
    if packed is None or torch.compiler.is_compiling():
        return Copies()
    return Copies(packed.copies(*tensors), packed.graph if is_capturing(x.device) else None)
