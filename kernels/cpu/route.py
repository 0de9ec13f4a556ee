"""Route "reference": PyTorch's own products, term by term."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.kernels.call import Call, Term
from fastlora.kernels.cpu.product import product
from fastlora.kernels.dropout import keep_mask, threshold


class Reference:
    """What runs on a CPU, and wherever no Triton kernel does."""

    @staticmethod
    def saved_shape(call: Call, rows: int) -> tuple[int, ...]:
        """All terms' u, one after the other."""
        return (sum(rows * rank for rows, rank in _sizes(call)),)

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """y [M, N], and the terms' u."""
        y = product(x, bias, call)
        saved = x.new_empty(Reference.saved_shape(call, len(x)))
        for t, u in zip(call.terms, _us(call, saved), strict=True):
            branch = x[t.start : t.stop]
            keep = _keep(branch, t, call.seed)
            branch = branch if keep is None else keep.mul_(branch)
            torch.addmm(u, branch, t.lora_A.to(x.dtype).T, beta=0, alpha=t.c, out=u)
            block = y[t.start : t.stop, t.column : t.column + len(t.lora_B)]
            block.addmm_(u, t.lora_B.to(x.dtype).T)
        return y, saved

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor | None, saved: Tensor, call: Call, need_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx [M, K] where needed, and dA, dB of each term. Without terms, x may be None."""
        dx = product(grad, None, call, transposed=True) if need_dx else None
        gradients = []
        for t, u in zip(call.terms, _us(call, saved), strict=True):
            assert x is not None
            g = grad[t.start : t.stop, t.column : t.column + len(t.lora_B)]
            v = torch.addmm(u, g, t.lora_B.to(x.dtype), beta=0, alpha=t.c)  # [M_t, r]
            branch = x[t.start : t.stop]
            keep = _keep(branch, t, call.seed)
            if dx is not None:
                part, A = dx[t.start : t.stop], t.lora_A.to(x.dtype)
                part.addmm_(v, A) if keep is None else part.addcmul_(v @ A, keep)
            dA = v.T @ (branch if keep is None else keep.mul_(branch))
            gradients += [dA, (u.T @ g).T]
        return dx, gradients


def _sizes(call: Call) -> list[tuple[int, int]]:
    """Rows and ranks of each term's u."""
    return [(t.rows[1] - t.rows[0], t.lora_A.shape[0]) for t in call.terms]


def _us(call: Call, saved: Tensor) -> list[Tensor]:
    """Each term's u [M_t, r] in the flat buffer."""
    sizes = _sizes(call)
    parts = saved.split([m * r for m, r in sizes]) if sizes else []
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def _keep(x: Tensor, term: Term, seed: Tensor | None) -> Tensor | None:
    """The term's mask of its rows of x, as numbers; None without dropout."""
    if not threshold(term.dropout_p):
        return None
    assert seed is not None
    return keep_mask(seed, term.stream, len(x), x.shape[1], term.dropout_p, x.dtype)
