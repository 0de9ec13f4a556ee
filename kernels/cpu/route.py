"""Route "reference": PyTorch's own products, term by term."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.kernels.call import Call, Shape
from fastlora.kernels.cpu.product import product
from fastlora.kernels.dropout import LANES, keep_mask


class Reference:
    """What runs on a CPU, and wherever no Triton kernel does."""

    @staticmethod
    def saved_shape(call: Call, rows: int) -> tuple[int, ...]:
        """All terms' u, one after the other."""
        terms = zip(call.shapes, call.ranges, strict=True)
        return (sum((stop - start) * s.rank for s, (start, stop) in terms),)

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """y [M, N], and the terms' u."""
        y = product(x, bias, call)
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
        grad: Tensor, x: Tensor | None, saved: Tensor, call: Call, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx [M, K] where needed, and each dA, then each dB. Without terms, x may be None."""
        dx = product(grad, None, call, transposed=True) if need_dx else None
        dA, dB = [], []
        terms = zip(call.shapes, call.ranges, call.A, call.B, _us(call, saved), strict=True)
        for s, (start, stop), A, B, u in terms:
            assert x is not None
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


def _us(call: Call, saved: Tensor) -> list[Tensor]:
    """Each term's u [M_t, r] in the flat buffer."""
    terms = zip(call.shapes, call.ranges, strict=True)
    sizes = [(stop - start, s.rank) for s, (start, stop) in terms]
    parts = saved.split([m * r for m, r in sizes]) if sizes else []
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def _keep(x: Tensor, shape: Shape, seed: Tensor | None) -> Tensor | None:
    """The term's mask of its rows of x, as numbers; None without dropout."""
    if not shape.threshold:
        return None
    assert seed is not None
    return keep_mask(seed, shape.stream, len(x), x.shape[1], shape.threshold / LANES, x.dtype)
