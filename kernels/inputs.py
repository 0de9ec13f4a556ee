"""Which tensors the fused operation accepts."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_ordinary(x: Tensor) -> bool:
    """Whether the fused operation accepts x: plain floats that nothing transforms or traces."""
    return (
        type(x) in PLAIN_TYPES
        and x.device.type in ("cpu", "cuda")
        and x.dtype in _DTYPES
        and x.layout == torch.strided
        and not x.is_nested
        and not torch.compiler.is_compiling()
        and x.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )
