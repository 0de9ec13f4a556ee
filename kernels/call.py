"""What one call of the operation is, as the routes see it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

from torch import Tensor

from fastlora.kernels.packed import form

Ranges = tuple[tuple[int, int], ...]  # of rows, per term: first, end
T = TypeVar("T")


class Shape(NamedTuple):
    """The part of a `Term` that is no tensor and the same in every batch."""

    rank: int
    width: int  # columns of the output that it adds to
    column: int  # the first of them
    scale: float  # c = scale / (1 - p)
    threshold: int
    stream: int


class Call(NamedTuple):
    """One call's inputs besides x: A [r, K] and B [N_t, r] a term, fp32 or in x's type."""

    weight: Tensor  # [N, K]
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    seed: Tensor | None
    shapes: tuple[Shape, ...]
    ranges: Ranges
    forms: dict | None = None  # the packed forms of the weight, where its owner holds some
    # While a CUDA graph is captured, it takes what the graph will read.
    keep: Callable[..., None] | None = None
    # In backward, whether somebody's hooks gave the factors back: perhaps as other tensors.
    hooked: bool = False

    def form(self, key: Hashable, make: Callable[[], T]) -> T:
        """A packed form of the weight: made for this call, or kept by the weight's owner."""
        found = form(self.forms, key, make)
        if self.keep is not None:
            self.keep(found)
        return found


def padded(rank: int) -> int:
    """Columns of a term in u, v and packed factors: zeros up to multiples of 8 align its rows."""
    return (rank + 7) // 8 * 8


def rank_offsets(shapes: Sequence[Shape]) -> list[int]:
    """First column of each term in u, v and the packed factors, and their width R."""
    return [0, *accumulate(padded(shape.rank) for shape in shapes)]


def is_uniform(shapes: Sequence[Shape], ranges: Ranges, rows: int) -> bool:
    """Whether every term covers all rows, and no two of them the same columns."""
    if any(start != 0 or stop != rows for start, stop in ranges):
        return False
    blocks = sorted((s.column, s.column + s.width) for s in shapes)
    return all(a[1] <= b[0] for a, b in pairwise(blocks))
