"""The fused LoRA operations: Triton kernels, their plain PyTorch reference, and the routes.

Installs as ``fastlora.kernels``. It works on tensors only and knows neither models nor files.
"""

if __name__ != "fastlora.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is the package 'fastlora.kernels': "
        "use 'from fastlora.kernels...' and keep the repository root off sys.path "
        "(run 'pytest', not 'python -m pytest')"
    )

from fastlora.kernels.call import Packed, Term
from fastlora.kernels.dropout import MOST, Dropout, draw_seed, drop, keep_mask
from fastlora.kernels.inputs import is_ordinary
from fastlora.kernels.ops import (
    Linear,
    add_terms,
    is_small,
    lora_grouped,
    lora_linear,
    lora_qkv,
    lora_together,
)
from fastlora.kernels.routes import Route, forced_route, route
