"""Products with a frozen weight on a CPU: oneDNN's GEMM, called as it is.

`F.linear` and `@` go through PyTorch's BLAS. oneDNN takes 0.85 to 0.95 of their time on a weight as
it lies in memory, and 1 to 4% less on one that is packed in its blocks (two AVX-512 cores, 128 to
4,096 rows of 384 and 768 features, fp32 and bf16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.call import Call

_BATCH_HINT = 1024  # rows that oneDNN chooses its blocks for; others are as fast


def product(x: Tensor, bias: Tensor | None, call: Call, *, transposed: bool = False) -> Tensor:
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
