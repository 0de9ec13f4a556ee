"""What one call of the operation is, as the routes see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastlora.kernels.dropout import keep_scale
from fastlora.kernels.packed import Forms


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

    @property
    def rows(self) -> tuple[int, int]:
        """First row and end of a term that has an end."""
        assert self.stop is not None
        return self.start, self.stop


class Call(NamedTuple):
    """One call's inputs besides x. Each term has an end; its factors are fp32 or in x's type."""

    weight: Tensor  # [N, K]
    terms: Sequence[Term]
    seed: Tensor | None
    forms: Forms = Forms()  # the packed forms of the weight
    # Whether the factors may be others than the pass before packed: not in backward, unless
    # somebody's hooks gave them back.
    changed: bool = True

    @property
    def factors(self) -> list[Tensor]:
        """A and B of the first term, A and B of the next."""
        return [factor for term in self.terms for factor in term[:2]]
