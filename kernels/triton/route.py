"""Routes "gemm" and "triton": the Triton kernels, in the order that a pass launches them.

Both keep u = c (m * x) A^T for backward, route "gemm" as [x | u]. Masks are drawn again from the
seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.call import Call, Shape, is_uniform, rank_offsets
from fastlora.kernels.triton import tuning
from fastlora.kernels.triton.backward import outer
from fastlora.kernels.triton.forward import down, fused
from fastlora.kernels.triton.grouped import Plan, make_pieces


class Kernels:
    """Routes "gemm" (`vendor`) and "triton".

    In route "gemm", K is extended where every term covers all rows; otherwise the frozen GEMM
    stays as it is and a kernel adds the terms.
    """

    def __init__(self, vendor: bool) -> None:
        self.vendor = vendor

    def saved_shape(self, call: Call, rows: int) -> tuple[int, ...]:
        """u, or [x | u]."""
        extend = self.vendor and is_uniform(call.shapes, call.ranges, rows)
        return rows, rank_offsets(call.shapes)[-1] + call.weight.shape[1] * extend

    def forward(self, x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """y [M, N], and u or [x | u]."""
        (M, K), seed = x.shape, call.seed
        plan, blocks = _plan(call, x)
        saved = x.new_empty(self.saved_shape(call, M))
        extend = saved.shape[1] > plan.pieces.ranks
        A, packed, B = _factors(call, plan, x.dtype, extend, changed=True)
        if extend:
            down(x, A, saved[:, K:], plan, seed, blocks.down, copy=saved[:, :K])
            return F.linear(saved, packed, bias), saved
        down(x, A, saved, plan, seed, blocks.down)
        if self.vendor:
            y = F.linear(x, call.weight, bias)
            fused(None, None, None, saved, B.T, y, plan, seed, blocks.fused)
        else:
            y = x.new_empty(M, call.weight.shape[0])
            fused(x, call.weight, bias, saved, B.T, y, plan, seed, blocks.fused)
        return y, saved

    def backward(
        self, grad: Tensor, x: Any, saved: Tensor, call: Call, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx [M, K] where needed, and each dA, then each dB."""
        M, K = grad.shape[0], call.weight.shape[1]
        (plan, blocks), seed = _plan(call, grad), call.seed
        R, shapes = plan.pieces.ranks, call.shapes
        uniform = is_uniform(shapes, call.ranges, M)
        extend = self.vendor and uniform
        A, packed, B = _factors(call, plan, grad.dtype, extend, changed=call.hooked)
        x, u = (saved[:, :K], saved[:, K:]) if extend else (x, saved)
        dx = grad.new_empty(M, K) if need_dx else None
        base = None  # where there is one, `outer` adds the terms to it
        if extend and need_dx:
            base, v = (grad @ packed).split([K, R], 1)
        else:
            v = grad.new_empty(M, R)
            down(grad, B.T, v, plan, None, blocks.down, in_block=True)
            if need_dx and self.vendor:
                base = dx = grad @ call.weight
            elif dx is not None:
                w = call.weight.T
                fused(grad, w, None, v, A, dx, plan, seed, blocks.fused, backward=True)
        dA = outer(x, v, plan, seed, blocks.outer, factor=A, base=base, dx=dx)
        if uniform:
            return dx, _parts(dA, _mm_fp32(grad.T, u), shapes)
        widest = max(s.width for s in shapes)
        dB = outer(grad, u, plan, None, blocks.outer, width=widest).T
        return dx, _parts(dA, dB, [s._replace(column=0) for s in shapes])


def _parts(A: Tensor, B: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Each term's part of A [R, K], then each term's of B [N, R]."""
    As, Bs = [], []
    for s, first in zip(shapes, rank_offsets(shapes), strict=False):
        ranks = slice(first, first + s.rank)
        As.append(A[ranks])
        Bs.append(B[s.column : s.column + s.width, ranks])
    return As + Bs


def _plan(call: Call, x: Tensor) -> tuple[Plan, tuning.Config]:
    plan = Plan(make_pieces(call.shapes, x.device), call.ranges, x.shape[0], call.keep)
    return plan, tuning.config(tuning.capability(x.device), x.dtype, x.shape[0])


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b with an fp32 result of half-precision inputs."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _factors(
    call: Call, plan: Plan, dtype: torch.dtype, extend: bool, changed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All terms' A [R, K], [W0 | B] [N, K + R] and B [N, R] in the compute type.

    Without `extend`, the second is only B. See `_parts` for which rows and columns are whose. Where
    the weight's owner keeps the buffers, the factors are copied into them in each forward pass
    (`changed`): nothing need watch who changes them. Two sets of factors never share a buffer, so
    that neither another adapter's pass nor another thread's comes between a pass and its backward.
    """
    tensors = (*call.A, *call.B)
    places = tuple((f.data_ptr(), f.shape, f.stride()) for f in tensors)
    made: list[bool] = []

    def make() -> tuple[Tensor, Tensor, Tensor]:
        made.append(True)
        (N, K), R = call.weight.shape, plan.pieces.ranks
        packed = call.weight.new_empty(N, K * extend + R, dtype=dtype)
        packed[:, K * extend :] = 0
        if extend:
            packed[:, :K] = call.weight
        A, B = packed.new_zeros(R, K), packed[:, K * extend :]
        # Filled before another thread can find it.
        torch._foreach_copy_(_parts(A, B, call.shapes), tensors)
        return A, packed, B

    columns = tuple(s.column for s in call.shapes)
    # Buffers made in inference mode could not be written to outside of it.
    with torch.inference_mode(False), torch.no_grad():
        A, packed, B = call.form((places, columns, dtype, extend), make)
        if changed and not made:
            torch._foreach_copy_(_parts(A, B, call.shapes), tensors)
    return A, packed, B
