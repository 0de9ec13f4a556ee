"""The operation in plain PyTorch: the ground truth that every fused route is compared with.

    y = x W0^T + b + c (m * x) A^T B^T      c = scale / (1 - p)

for one projection (Hu et al. 2021, equation 3, with dropout on the branch's input). Everything
here is differentiable by autograd and works in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.kernels.dropout import keep_mask, keep_scale


class Term(NamedTuple):
    """One adapter's low-rank update of a block of the output.

    It reads rows [start, stop) of x (leading dimensions flattened) and adds to those rows of y,
    columns [column, column + N). The mask's rows count from `start`, so that an adapter trains
    the same alone or in company.
    """

    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scale: float  # alpha / r (or alpha / sqrt(r), rsLoRA)
    dropout_p: float = 0.0  # probability to drop an element of the branch's input
    stream: int = 0  # 32 bits that separate the masks of terms that share a seed
    start: int = 0
    stop: int | None = None
    column: int = 0

    @property
    def c(self) -> float:
        """The factor of u B^T: scale / (1 - p)."""
        return self.scale * keep_scale(self.dropout_p)


def lora_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Sequence[Term],
    seed: Tensor | None = None,
    mask: Callable[..., Tensor] = keep_mask,
) -> Tensor:
    """x [..., K], weight [N, K], bias [N] or None; returns y [..., N].

    `mask` is `keep_mask`, or `philox_keep` to have a GPU's masks on any device.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias)
    for term in terms:
        branch = rows[term.start : term.stop]
        if term.dropout_p > 0:
            keep = mask(seed, term.stream, *branch.shape, term.dropout_p)
            branch = branch * keep
        delta = term.c * (branch @ term.lora_A.T @ term.lora_B.T)
        placed = torch.zeros_like(y)
        placed[term.start : term.stop, term.column : term.column + delta.shape[1]] = delta
        y = y + placed
    return y.reshape(*x.shape[:-1], weight.shape[0])
