"""Route "reference": PyTorch's own products, term by term.

On a CPU, oneDNN's GEMM takes 0.78 to 0.97 of the time of `F.linear`, and on a weight packed in
oneDNN's blocks up to 6% less again (two AVX-512 cores, MiniLM's and BERT-base's projections).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.call import Call, Term, threshold
from fastlora.kernels.dropout import keep_mask

_BATCH_HINT = 1024  # batch size that oneDNN packs for; other batch sizes are as fast


def saved_shape(call: Call, rows: int) -> tuple[int, ...]:
    """The shape of the saved buffer: the u of all terms, flattened and concatenated."""
    return (sum((t.rows[1] - t.rows[0]) * t.lora_A.shape[0] for t in call.terms),)


def forward(x: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """y [M, N], and the terms' u."""
    y = product(x, bias, call)
    saved = x.new_empty(saved_shape(call, len(x)))
    for t, u, branch, block, keep in _terms(call, saved, x, y):
        branch = branch if keep is None else keep.mul_(branch)
        torch.addmm(u, branch, t.lora_A.to(x.dtype).T, beta=0, alpha=t.c, out=u)
        block.addmm_(u, t.lora_B.to(x.dtype).T)
    return y, saved


def backward(
    grad: Tensor, x: Tensor | None, saved: Tensor, call: Call, need_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """dx [M, K] where needed, and dA, dB of each term. Without terms, x may be None."""
    dx = product(grad, None, call, transposed=True) if need_dx else None
    gradients = []
    for t, u, branch, g, keep in _terms(call, saved, x, grad):
        v = torch.addmm(u, g, t.lora_B.to(g.dtype), beta=0, alpha=t.c)  # [M_t, r]
        if dx is not None:
            part, A = dx[t.start : t.stop], t.lora_A.to(g.dtype)
            part.addmm_(v, A) if keep is None else part.addcmul_(v @ A, keep)
        dA = v.T @ (branch if keep is None else keep.mul_(branch))
        gradients += [dA, (u.T @ g).T]
    return dx, gradients


def _terms(
    call: Call, saved: Tensor, x: Tensor | None, y: Tensor
) -> Iterator[tuple[Term, Tensor, Tensor, Tensor, Tensor | None]]:
    """Each term, its u [M_t, r] in the buffer, rows of x, block of y (or g), and mask or None."""
    for t in call.terms:
        assert x is not None
        rows, rank = t.rows[1] - t.rows[0], t.lora_A.shape[0]
        u, saved = saved[: rows * rank].view(rows, rank), saved[rows * rank :]
        branch, keep = x[t.start : t.stop], None
        if threshold(t.dropout_p):
            assert call.seed is not None
            keep = keep_mask(call.seed, t.stream, rows, x.shape[1], t.dropout_p, x.dtype)
        yield t, u, branch, y[t.start : t.stop, t.column : t.column + len(t.lora_B)], keep


def product(x: Tensor, bias: Any, call: Call, transposed: bool = False, gelu: str = "") -> Tensor:
    """x W^T + b [M, N], or `gelu` ("none", "tanh") of it; `transposed`: x W [M, K]. No autograd."""
    weight = call.weight.T if transposed else call.weight
    if not (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and call.weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    ):
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate=gelu) if gelu else y
    onednn = torch.ops.mkldnn
    if call.copies.kept is not None:
        weight = call.copies.get(
            (x.dtype, transposed),
            lambda: onednn._reorder_linear_weight(weight.detach().contiguous(), _BATCH_HINT),
        )
    return onednn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], gelu)
