"""The three routes of the operation: the same inputs and gradients, different kernels.

    reference   PyTorch's own GEMMs; on a CPU, on packed frozen weights
    gemm        one vendor GEMM with extended K: [x | u] [W0 | B]^T, and back: g [W0 | B] = [dx | v]
    triton      one GEMM in Triton with the low-rank terms in it

All keep for backward what `forward` returns beside y: u = c (m * x) A^T, and in route gemm
[x | u]. Masks are drawn again from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.kernels import grouped, tuning
from fastlora.kernels.dropout import LANES, keep_mask
from fastlora.kernels.frozen import frozen_dx, frozen_linear
from fastlora.kernels.grouped import Plan, Ranges, Shape, is_uniform, make_pieces, rank_offsets


class Call(NamedTuple):
    """One call's inputs besides x: A [r, K] and B [N_t, r] a term, fp32 or in x's type."""

    weight: Tensor  # [N, K]
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    seed: Tensor | None
    shapes: tuple[Shape, ...]
    ranges: Ranges


class Reference:
    """Route "reference"."""

    @staticmethod
    def saved_shape(call: Call, rows: int) -> tuple[int, ...]:
        """All terms' u, one after the other."""
        terms = zip(call.shapes, call.ranges, strict=True)
        return (sum((stop - start) * s.rank for s, (start, stop) in terms),)

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """y [M, N], and the terms' u."""
        y = frozen_linear(x, call.weight, bias)
        saved = x.new_empty(Reference.saved_shape(call, len(x)))
        terms = zip(call.shapes, call.ranges, call.A, call.B, _us(call, saved), strict=True)
        for s, (start, stop), A, B, u in terms:
            branch = x[start:stop]
            keep = _keep(branch, s, call.seed)
            branch = branch if keep is None else keep.mul_(branch)
            torch.addmm(u, branch, A.to(x.dtype).T, beta=0, alpha=s.scale, out=u)
            y[start:stop, s.column : s.column + s.width].addmm_(u, B.to(x.dtype).T)
        return y, saved

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, saved: Tensor, call: Call, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx [M, K] where needed, and each dA, then each dB."""
        dx = frozen_dx(grad, call.weight) if need_dx else None
        dA, dB = [], []
        terms = zip(call.shapes, call.ranges, call.A, call.B, _us(call, saved), strict=True)
        for s, (start, stop), A, B, u in terms:
            g = grad[start:stop, s.column : s.column + s.width]
            v = torch.addmm(u, g, B.to(x.dtype), beta=0, alpha=s.scale)  # [M_t, r]
            branch = x[start:stop]
            keep = _keep(branch, s, call.seed)
            if dx is not None:
                part, A = dx[start:stop], A.to(x.dtype)
                part.addmm_(v, A) if keep is None else part.addcmul_(v @ A, keep)
            dA.append(v.T @ (branch if keep is None else keep.mul_(branch)))
            dB.append((u.T @ g).T)
        return dx, dA + dB


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
        from fastlora.kernels.forward import down, fused

        (M, K), seed = x.shape, call.seed
        plan, blocks = _plan(call, x)
        saved = x.new_empty(self.saved_shape(call, M))
        extend = saved.shape[1] > plan.pieces.ranks
        A, packed, B = _factors(call, plan, x.dtype, extend, refresh=True)
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
        from fastlora.kernels.backward import outer
        from fastlora.kernels.forward import down, fused

        M, K = grad.shape[0], call.weight.shape[1]
        (plan, blocks), seed = _plan(call, grad), call.seed
        R, shapes = plan.pieces.ranks, call.shapes
        uniform = is_uniform(shapes, call.ranges, M)
        extend = self.vendor and uniform
        A, packed, B = _factors(call, plan, grad.dtype, extend, refresh=False)
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


ROUTES: dict[str, Any] = {
    "reference": Reference,
    "gemm": Kernels(vendor=True),
    "triton": Kernels(vendor=False),
}


def _us(call: Call, saved: Tensor) -> list[Tensor]:
    """Each term's u [M_t, r] in the flat buffer of route "reference"."""
    terms = zip(call.shapes, call.ranges, strict=True)
    sizes = [(stop - start, s.rank) for s, (start, stop) in terms]
    parts = saved.split([m * r for m, r in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def _keep(x: Tensor, shape: Shape, seed: Any) -> Tensor | None:
    """The term's mask of its rows of x, as numbers; None without dropout."""
    if not shape.threshold:
        return None
    return keep_mask(seed, shape.stream, len(x), x.shape[1], shape.threshold / LANES, x.dtype)


def _parts(A: Tensor, B: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Each term's part of A [R, K], then each term's of B [N, R]."""
    As, Bs = [], []
    for s, first in zip(shapes, rank_offsets(shapes), strict=False):
        ranks = slice(first, first + s.rank)
        As.append(A[ranks])
        Bs.append(B[s.column : s.column + s.width, ranks])
    return As + Bs


def _plan(call: Call, x: Tensor) -> tuple[Plan, tuning.Config]:
    plan = Plan(make_pieces(call.shapes, x.device), call.ranges, x.shape[0])
    return plan, tuning.config(tuning.capability(x.device), x.dtype, x.shape[0])


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b with an fp32 result of half-precision inputs."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# By place in memory, as in frozen.py: versions when they were packed, and the factors.
_packed: dict[tuple, list] = {}


def _factors(
    call: Call, plan: Plan, dtype: torch.dtype, extend: bool, refresh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All terms' A [R, K], [W0 | B] [N, K + R] and B [N, R] in the compute type.

    They are copied again when a factor changed (after a step of the optimiser), and with `refresh`
    into every graph that is captured. A write through `.data` counts no version: it goes unseen.
    Without `extend`, the second is only B. See `_parts` for which rows and columns are whose.
    """
    tensors = (call.weight, *call.A, *call.B)
    owners = [StorageWeakRef(t.untyped_storage()) for t in tensors]
    offsets = (t.storage_offset() for t in tensors)
    places = tuple((s.rank, s.width, s.column) for s in call.shapes)
    key = (*(owner.cdata for owner in owners), *offsets, places, dtype, extend)
    entry = _packed.get(key)
    # An inference tensor counts no versions.
    base, *versions = (-1 if t.is_inference() else t._version for t in tensors)
    if entry is None or entry[1] != base:
        for old in [k for k, e in _packed.items() if any(owner.expired() for owner in e[0])]:
            del _packed[old]
        (N, K), R = call.weight.shape, plan.pieces.ranks
        # Made in inference mode, they could not be refreshed outside of it.
        with torch.inference_mode(False):
            packed = call.weight.new_zeros(N, K * extend + R, dtype=dtype)
            factors = packed.new_zeros(R, K), packed, packed[:, K * extend :]
        if extend:
            packed[:, :K] = call.weight
        entry = _packed[key] = [owners, base, None, factors]
    A, packed, B = entry[3]
    # A replayed graph must refresh: its optimiser steps leave versions as they are.
    if entry[2] != versions or (refresh and grouped.capturing()):
        torch._foreach_copy_(_parts(A, B, call.shapes), tensors[1:])
        entry[2] = versions
    return A, packed, B
