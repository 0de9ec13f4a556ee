"""The fused LoRA operations: Triton kernels, their plain PyTorch reference, and the routes.

Installs as ``fastlora.kernels``. It works on tensors only and knows neither models nor files.
"""

from fastlora.kernels.call import Packed, Term, is_ordinary
from fastlora.kernels.dropout import MOST, Dropout, draw_seed, drop, keep_mask
from fastlora.kernels.ops import (
    Linear,
    add_terms,
    copies_of,
    is_small,
    lora_grouped,
    lora_linear,
    lora_qkv,
)
from fastlora.kernels.routes import Route, forced_route, route
