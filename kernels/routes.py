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

from fastlora.kernels import tuning
from fastlora.kernels.dropout import LANES, keep_mask
from fastlora.kernels.frozen import frozen_dx, frozen_linear
from fastlora.kernels.grouped import Plan, Shape, is_uniform, make_plan, rank_offsets


class Call(NamedTuple):
    """One call's inputs besides x: A [r, K] and B [N_t, r] a term, fp32 or in x's type."""

    weight: Tensor  # [N, K]
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    seed: Tensor | None
    shapes: tuple[Shape, ...]
    ranges: tuple[tuple[int, int], ...]  # of rows, per term


class Buffers(NamedTuple):
    """Shapes of what a route saves for backward, and of the buffers its gradients lie in."""

    saved: tuple[int, ...]
    dA: tuple[int, ...]
    dB: tuple[int, ...]


class Factors(NamedTuple):
    """All terms' factors in the compute type; see `Pieces` for which columns are whose."""

    A: Tensor  # [R, K]
    B: Tensor  # [N, R], each term's rows its block of the output
    extended: Tensor  # [N, K + R] = [W0 | B]; only B without the extension


class Reference:
    """Route "reference"; the terms' u, dA and dB lie one after the other in flat buffers."""

    @staticmethod
    def shapes(call: Call, rows: int) -> Buffers:
        """The sizes of its buffers."""
        K, spans = call.weight.shape[1], zip(call.shapes, call.ranges, strict=True)
        return Buffers(
            (sum(s.rank * (stop - start) for s, (start, stop) in spans),),
            (sum(s.rank for s in call.shapes) * K,),
            (sum(s.rank * s.width for s in call.shapes),),
        )

    @staticmethod
    def split(dA: Tensor, dB: Tensor, call: Call, rows: int) -> list[Tensor]:
        """The gradient of each A, then of each B."""
        return [*_cut(dA, [t.shape for t in call.A]), *_cut(dB, [t.shape for t in call.B])]

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """y [M, N], and the terms' u."""
        y = frozen_linear(x, call.weight, bias)
        saved = x.new_empty(Reference.shapes(call, len(x)).saved)
        us = _us(call, saved)
        for s, (start, stop), A, B, u in zip(
            call.shapes, call.ranges, call.A, call.B, us, strict=True
        ):
            branch = x[start:stop]
            keep = _keep(branch, s, call.seed)
            branch = branch if keep is None else keep.mul_(branch)
            torch.addmm(u, branch, A.to(x.dtype).T, beta=0, alpha=s.scale, out=u)
            y[start:stop, s.column : s.column + s.width].addmm_(u, B.to(x.dtype).T)
        return y, saved

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, saved: Tensor, call: Call, need_dx: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """dx [M, K] where needed, and the buffers of all dA and all dB."""
        dx = frozen_dx(grad, call.weight) if need_dx else None
        buffers = Reference.shapes(call, len(x))
        flat_A, flat_B = x.new_empty(buffers.dA), x.new_empty(buffers.dB)
        gradients = Reference.split(flat_A, flat_B, call, len(x))
        us = _us(call, saved)
        for i, (s, (start, stop)) in enumerate(zip(call.shapes, call.ranges, strict=True)):
            g = grad[start:stop, s.column : s.column + s.width]
            v = (g @ call.B[i].to(x.dtype)).mul_(s.scale)  # [M_t, r]
            branch = x[start:stop]
            keep = _keep(branch, s, call.seed)
            branch = branch if keep is None else branch * keep
            torch.mm(v.T, branch, out=gradients[i])
            torch.mm(g.T, us[i], out=gradients[len(us) + i])
            if dx is None:
                continue
            A = call.A[i].to(x.dtype)
            if keep is None:
                dx[start:stop].addmm_(v, A)
            else:
                dx[start:stop].addcmul_(v @ A, keep)
        return dx, flat_A, flat_B


class Kernels:
    """Routes "gemm" (`vendor`) and "triton".

    In route "gemm", K is extended where every term covers all rows; otherwise the frozen GEMM
    stays as it is and a kernel adds the terms.
    """

    def __init__(self, vendor: bool) -> None:
        self.vendor = vendor

    def shapes(self, call: Call, rows: int) -> Buffers:
        """The sizes of its buffers."""
        (N, K), R = call.weight.shape, rank_offsets(call.shapes)[-1]
        if is_uniform(call.shapes, call.ranges, rows):
            return Buffers((rows, R + K * self.vendor), (R, K), (N, R))
        return Buffers((rows, R), (R, K), (R, max(s.width for s in call.shapes)))

    def split(self, dA: Tensor, dB: Tensor, call: Call, rows: int) -> list[Tensor]:
        """The gradient of each A, then of each B."""
        uniform = is_uniform(call.shapes, call.ranges, rows)
        As, Bs = [], []
        for shape, first in zip(call.shapes, rank_offsets(call.shapes), strict=False):
            ranks = slice(first, first + shape.rank)
            block = slice(shape.column, shape.column + shape.width)
            As.append(dA[ranks])
            Bs.append(dB[block, ranks] if uniform else dB[ranks, : shape.width].T)
        return As + Bs

    def forward(self, x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """y [M, N], and u or [x | u]."""
        from fastlora.kernels.forward import down, fused

        M, K = x.shape
        plan, blocks = _plan(call, M), _blocks(x)
        extend = self.vendor and plan.uniform
        factors = _factors(call, plan, x.dtype, extend)
        saved = x.new_empty(self.shapes(call, M).saved)
        if extend:
            kept, u = saved[:, :K], saved[:, K:]
            down(x, factors.A, u, plan, call.seed, blocks.down, copy=kept)
            return F.linear(saved, factors.extended, bias), saved
        down(x, factors.A, saved, plan, call.seed, blocks.down)
        last = (saved, factors.B.T)
        if self.vendor:
            y = F.linear(x, call.weight, bias)
            fused(None, None, None, *last, y, plan, call.seed, blocks.fused)
        else:
            y = x.new_empty(M, call.weight.shape[0])
            fused(x, call.weight, bias, *last, y, plan, call.seed, blocks.fused)
        return y, saved

    def backward(
        self, grad: Tensor, x: Any, saved: Tensor, call: Call, need_dx: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """dx [M, K] where needed, and the buffers of all dA and all dB."""
        from fastlora.kernels.backward import outer
        from fastlora.kernels.forward import down, fused

        M, K = grad.shape[0], call.weight.shape[1]
        plan, blocks = _plan(call, M), _blocks(grad)
        extend = self.vendor and plan.uniform
        factors = _factors(call, plan, grad.dtype, extend)
        x, u = (saved[:, :K], saved[:, K:]) if extend else (x, saved)
        dx = grad.new_empty(M, K) if need_dx else None
        base = None  # where there is one, `outer` adds the terms to it
        if extend and need_dx:
            base, v = (grad @ factors.extended).split([K, plan.pieces.ranks], 1)
        else:
            v = grad.new_empty(M, plan.pieces.ranks)
            down(grad, factors.B.T, v, plan, None, blocks.down, in_block=True)
            if need_dx and self.vendor:
                base = dx = grad @ call.weight
            elif dx is not None:
                last = (v, factors.A, dx, plan, call.seed, blocks.fused)
                fused(grad, call.weight.T, None, *last, backward=True)
        d = outer(x, v, plan, call.seed, blocks.outer, factor=factors.A, base=base, dx=dx)
        return dx, d, _dB(grad, u, call, plan, blocks.outer)


ROUTES: dict[str, Any] = {
    "reference": Reference,
    "gemm": Kernels(vendor=True),
    "triton": Kernels(vendor=False),
}


def _us(call: Call, saved: Tensor) -> list[Tensor]:
    """Each term's u [M_t, r] in the flat buffer of route "reference"."""
    spans = zip(call.shapes, call.ranges, strict=True)
    return _cut(saved, [(stop - start, s.rank) for s, (start, stop) in spans])


def _keep(x: Tensor, shape: Shape, seed: Any) -> Tensor | None:
    """The term's mask of its rows of x, as numbers; None without dropout."""
    if not shape.threshold:
        return None
    return keep_mask(seed, shape.stream, *x.shape, shape.threshold / LANES, x.dtype)


def _cut(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Matrices [a, b] that lie one after the other in a flat buffer."""
    parts = flat.split([a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _plan(call: Call, rows: int) -> Plan:
    return make_plan(call.shapes, call.ranges, rows, call.weight.device)


def _blocks(x: Tensor) -> tuning.Config:
    return tuning.config(tuning.capability(x.device), x.dtype, x.shape[0])


def _dB(grad: Tensor, u: Tensor, call: Call, plan: Plan, blocks: tuning.Blocks) -> Tensor:
    """dB = g^T u: one skinny GEMM [N, R], or dB^T [R, widest] by a kernel where rows differ."""
    if plan.uniform:
        return _mm_fp32(grad.T, u)
    from fastlora.kernels.backward import outer

    return outer(grad, u, plan, None, blocks, width=max(s.width for s in call.shapes))


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b with an fp32 result of half-precision inputs."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# By place in memory, as in frozen.py: versions when they were packed, and the factors.
_packed: dict[tuple, list] = {}


def _factors(call: Call, plan: Plan, dtype: torch.dtype, extend: bool) -> Factors:
    """The packed factors, refreshed when a factor changed (after a step of the optimiser)."""
    sources = [*call.A, *call.B]
    owners = [StorageWeakRef(t.untyped_storage()) for t in (call.weight, *sources)]
    places = (
        (o.cdata, t.storage_offset()) for o, t in zip(owners, (call.weight, *sources), strict=True)
    )
    key = (*places, call.shapes, dtype, extend)
    entry = _packed.get(key)
    base, versions = call.weight._version, [t._version for t in sources]
    if entry is None or entry[1] != base:
        for old in [k for k, e in _packed.items() if any(owner.expired() for owner in e[0])]:
            del _packed[old]
        entry = _packed[key] = [owners, base, None, _empty_factors(call, plan, dtype, extend)]
    # A replayed graph must refresh: its optimiser steps leave versions as they are.
    capturing = call.weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if entry[2] != versions or capturing:
        torch._foreach_copy_(_views(entry[3], call), sources)
        entry[2] = versions
    return entry[3]


def _empty_factors(call: Call, plan: Plan, dtype: torch.dtype, extend: bool) -> Factors:
    N, K = call.weight.shape
    K = K if extend else 0
    extended = call.weight.new_zeros(N, K + plan.pieces.ranks, dtype=dtype)
    if extend:
        extended[:, :K] = call.weight
    A = extended.new_zeros(plan.pieces.ranks, call.weight.shape[1])
    return Factors(A, extended[:, K:], extended)


def _views(factors: Factors, call: Call) -> list[Tensor]:
    """Where each A and then each B lies in the packed factors."""
    A, B = [], []
    for shape, first in zip(call.shapes, rank_offsets(call.shapes), strict=False):
        ranks = slice(first, first + shape.rank)
        A.append(factors.A[ranks])
        B.append(factors.B[shape.column : shape.column + shape.width, ranks])
    return A + B
