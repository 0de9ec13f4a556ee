"""Frozen linear layers on a CPU: oneDNN's GEMM on weights packed once.

PyTorch's own GEMM packs the weight at every call. A frozen weight can be packed for good, once as
it is for the forward pass and once transposed for dx: 191 to 209 GFLOP/s where `F.linear` has 145
to 178 and `grad @ weight` 125 to 185 (two AVX-512 cores, MiniLM's shapes, fp32; bf16: 410 to 440).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_BATCH_HINT = 1024  # rows that oneDNN chooses its layout for; others are as fast

# By place in memory and shape: the storage (held weakly: once it has expired, its place may be
# another's), the version of the weight, and its packed copy.
_packed: dict[tuple, tuple[StorageWeakRef, int, Tensor]] = {}


def _count_version(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let a step count as a change of the parameters: PyTorch's fused optimisers count none."""
    groups = optimizer.param_groups
    torch.autograd.graph.increment_version([p for group in groups for p in group["params"]])


# It is how packed copies, here and in routes.py, know that they are old.
register_optimizer_step_post_hook(_count_version)


def is_packable(x: Tensor, weight: Tensor) -> bool:
    """Whether this product can run on a packed copy of `weight`."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and weight.is_contiguous()
        and not weight.requires_grad
        and not weight.is_inference()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b without autograd: [..., K], [N, K], [N] -> [..., N]."""
    if not is_packable(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, _pack(weight, False), bias, "none", [], "")


def frozen_dx(grad: Tensor, weight: Tensor) -> Tensor:
    """G W without autograd: [..., N], [N, K] -> [..., K]."""
    if not is_packable(grad, weight):
        return grad @ weight
    return torch.ops.mkldnn._linear_pointwise(grad, _pack(weight, True), None, "none", [], "")


def _pack(weight: Tensor, transposed: bool) -> Tensor:
    key = (weight.data_ptr(), weight.shape, transposed)
    found = _packed.get(key)
    if found is None or found[1] != weight._version or found[0].expired():
        for old in [old for old, (owner, _, _) in _packed.items() if owner.expired()]:
            del _packed[old]
        source = weight.detach().T.contiguous() if transposed else weight.detach()
        packed = torch.ops.mkldnn._reorder_linear_weight(source, _BATCH_HINT)
        owner = StorageWeakRef(weight.untyped_storage())
        found = _packed[key] = (owner, weight._version, packed)
    return found[2]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return frozen_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return frozen_dx(grad, *ctx.saved_tensors), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, on the packed weight where it is frozen."""
    if torch.is_autocast_enabled(x.device.type) or not is_packable(x, weight):
        return F.linear(x, weight, bias)
    return _FrozenLinear.apply(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` that is faster on a CPU while its weight is frozen."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(input, self.weight, self.bias)
