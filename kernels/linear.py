"""A linear layer whose frozen weight the fused products take."""

from __future__ import annotations

from torch import Tensor, nn

from fastlora.kernels.ops import lora_grouped
from fastlora.kernels.packed import Packed


class Linear(nn.Linear):
    """`nn.Linear` that is faster on a CPU while its weight is frozen."""

    # Set by an owner who knows when the weight changes.
    packed: Packed | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return lora_grouped(input, self.weight, self.bias, (), packed=self.packed)
