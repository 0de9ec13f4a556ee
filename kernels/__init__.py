"""The fused LoRA operations on tensors: Triton kernels, a PyTorch reference, and the routes."""

if __name__ != "fastlora.kernels":
    raise ImportError("import fastlora.kernels instead (run 'pytest', not 'python -m pytest')")

from fastlora.kernels.call import Packed, Term, is_ordinary
from fastlora.kernels.dropout import MOST, Dropout, draw_seed, drop, keep_mask
from fastlora.kernels.ops import Linear, add_terms, linear_gelu, lora_grouped, lora_linear
from fastlora.kernels.routes import Route, forced_route, route
