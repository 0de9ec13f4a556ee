"""Route "gemm": the order in which a pass launches kernels and vendor GEMMs.

Forward keeps u = c (m * x) A^T for backward. If every term covers all rows, K is extended: one
GEMM computes y = [x | u] [W0 | B]^T, and one g [W0 | B] = [g W0 | v]. Otherwise the GEMMs read W0
alone, and kernels add the terms to y and compute v.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.call import Call, Term
from fastlora.kernels.triton.grouped import Plan, fits_one_gemm, rank_offsets
from fastlora.kernels.triton.kernels import add, down, outer


def saved_shape(call: Call, rows: int) -> tuple[int, ...]:
    """[x | u], or u alone as one row."""
    (_, K), R = call.weight.shape, rank_offsets(call.terms)[-1]
    return (rows, K + R) if fits_one_gemm(call.terms, rows) else (rows * R,)


def forward(x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """y [M, N], and u or [x | u]."""
    M, K = x.shape
    plan = Plan(call, x)
    saved = x.new_empty(saved_shape(call, M))
    extend = saved.dim() == 2
    A, packed, B = _factors(call, x.dtype, extend)
    if extend:
        down(plan, x, A, saved[:, K:], copy=saved[:, :K])
        return F.linear(saved, packed, bias), saved
    u = saved.view(M, -1)
    down(plan, x, A, u)
    return add(plan, u, B, F.linear(x, call.weight, bias), in_block=True), saved


def backward(
    grad: Tensor, x: Any, saved: Tensor, call: Call, need_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """dx [M, K] where needed, and dA, dB of each term."""
    (M, _), (_, K), plan = grad.shape, call.weight.shape, Plan(call, grad)
    extend = saved.dim() == 2
    A, packed, B = _factors(call, grad.dtype, extend)
    x, u = (saved[:, :K], saved[:, K:]) if extend else (x, saved.view(M, -1))
    base: Tensor | None  # g W0
    if extend and need_dx:
        base, v = (grad @ packed).tensor_split([K], 1)
    else:
        v = torch.empty_like(u)
        down(plan, grad, B.T, v, in_block=True)
        base = grad @ call.weight if need_dx else None
    dx = None if base is None else add(plan, v, A.T, base)
    dA = outer(plan, x, v)
    if fits_one_gemm(call.terms, M):
        half = grad.is_cuda and grad.dtype != torch.float32
        mm = partial(torch.mm, out_dtype=torch.float32) if half else torch.mm
        g, u = (grad, u) if half else (grad.float(), u.float())
        places = _places(call.terms)
        dB = [mm(g[:, columns].T, u[:, ranks]) for ranks, columns in places]  # reads these only
    else:
        widths = [len(term.lora_B) for term in call.terms]
        sums = outer(plan, grad, u, span=max(widths))
        dB = [part[:, :width].T for part, width in zip(sums, widths, strict=True)]
    return dx, [part for pair in zip(dA, dB, strict=True) for part in pair]


def _parts(A: Tensor, B: Tensor, terms: Sequence[Term]) -> list[Tensor]:
    """Each term's part of A [R, K] and of B [N, R]."""
    return [part for ranks, columns in _places(terms) for part in (A[ranks], B[columns, ranks])]


def _places(terms: Sequence[Term]) -> Iterator[tuple[slice, slice]]:
    """Each term's ranks among all R, and its columns of y."""
    for term, first in zip(terms, rank_offsets(terms), strict=False):
        width, rank = term.lora_B.shape
        yield slice(first, first + rank), slice(term.column, term.column + width)


def _factors(call: Call, dtype: torch.dtype, extend: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All terms' A [R, K], [W0 | B] [N, K + R] and B [N, R] in the compute type.

    Without `extend`, the second is B. If the weight's owner keeps the buffers, each forward pass
    copies the factors into them. Each set of factors has its own, so no other pass overwrites it.
    """
    tensors, columns = call.factors, tuple(term.column for term in call.terms)

    def make() -> tuple[Tensor, Tensor, Tensor]:
        (N, K), R = call.weight.shape, rank_offsets(call.terms)[-1]
        packed = call.weight.new_empty(N, K * extend + R, dtype=dtype)
        packed[:, K * extend :] = 0
        if extend:
            packed[:, :K] = call.weight
        A, B = packed.new_zeros(R, K), packed[:, K * extend :]
        torch._foreach_copy_(_parts(A, B, call.terms), tensors)  # before another thread finds them
        return A, packed, B

    places = tuple((f.data_ptr(), f.shape, f.stride()) for f in tensors)
    A, packed, B = call.copies.get((places, columns, dtype, extend), make)
    if call.changed and call.copies.kept is not None:
        torch._foreach_copy_(_parts(A, B, call.terms), tensors)
    return A, packed, B
