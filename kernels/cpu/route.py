"""Route "reference": PyTorch's own products, term by term.

`F.linear` goes through PyTorch's BLAS. On a CPU oneDNN's GEMM takes 0.78 to 0.97 of its time on a
weight as it lies in memory, and mostly up to 6% less on one that is packed in its blocks (two
AVX-512 cores, 128 to 4,096 rows, MiniLM's and BERT-base's projections, fp32 and bf16).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.call import Call, Term
from fastlora.kernels.dropout import keep_mask, threshold

_BATCH_HINT = 1024  # rows that oneDNN chooses its blocks for; others are as fast


class Reference:
    """What runs on a CPU, and wherever no Triton kernel does."""

    @staticmethod
    def saved_shape(call: Call, rows: int) -> tuple[int, ...]:
        """All terms' u, one after the other."""
        return (sum((t.rows[1] - t.rows[0]) * t.lora_A.shape[0] for t in call.terms),)

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """y [M, N], and the terms' u."""
        y = _product(x, bias, call)
        saved = x.new_empty(Reference.saved_shape(call, len(x)))
        for t, u in _terms(call, saved):
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
        dx = _product(grad, None, call, transposed=True) if need_dx else None
        gradients = []
        for t, u in _terms(call, saved):
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


def _terms(call: Call, saved: Tensor) -> Iterator[tuple[Term, Tensor]]:
    """Each term and its u [M_t, r] in the flat buffer."""
    for term in call.terms:
        rows, rank = term.rows[1] - term.rows[0], term.lora_A.shape[0]
        yield term, saved[: rows * rank].view(rows, rank)
        saved = saved[rows * rank :]


def _keep(x: Tensor, term: Term, seed: Tensor | None) -> Tensor | None:
    """The term's mask of its rows of x, as numbers; None without dropout."""
    if not threshold(term.dropout_p):
        return None
    assert seed is not None
    return keep_mask(seed, term.stream, len(x), x.shape[1], term.dropout_p, x.dtype)


def _product(x: Tensor, bias: Tensor | None, call: Call, *, transposed: bool = False) -> Tensor:
    """x W^T + b [M, N] of x [M, K]; with `transposed` x W [M, K] of x [M, N]. No autograd."""
    weight = call.weight.T if transposed else call.weight
    if not _in_onednn(x, call.weight):
        return F.linear(x, weight, bias)
    if call.forms.kept is not None:
        weight = call.forms.get((x.dtype, transposed), lambda: _blocks(weight))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _blocks(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _BATCH_HINT)


def _in_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
