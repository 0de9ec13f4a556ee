"""Which rows and columns each low-rank term touches, as tables that the kernels walk.

Terms may cover any ranges of rows, empty and overlapping ones too. The rows are cut into segments
in which the same terms apply, and one launch does all of them. What a layer fixes (`Pieces`) and
what a batch fixes (tiles of rows) are cached apart: layers share the one, batches the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

RANK_BLOCK = 64  # a term of higher rank is several pieces, so that a tile stays in registers


class Shape(NamedTuple):
    """The part of a `Term` that is no tensor and the same in every batch."""

    rank: int
    width: int  # columns of the output that it adds to
    column: int  # the first of them
    scale: float  # c = scale / (1 - p)
    threshold: int
    stream: int


class Piece(NamedTuple):
    """Up to RANK_BLOCK ranks of a term: a row of the kernels' table, in this order."""

    offset: int  # its first column in u, v and the packed factors
    ranks: int
    column: int
    width: int
    stream: int
    threshold: int


def rank_offsets(shapes: Sequence[Shape]) -> list[int]:
    """First column of each term in u, v and the packed factors, and their width R.

    A rank is rounded up to a multiple of 8, which keeps rows aligned for tensor cores; the columns
    added hold zeros.
    """
    return [0, *accumulate((shape.rank + 7) // 8 * 8 for shape in shapes)]


def is_uniform(shapes: Sequence[Shape], ranges: Sequence[tuple[int, int]], rows: int) -> bool:
    """Whether every term covers all rows, and no two of them the same columns."""
    if any(start != 0 or stop != rows for start, stop in ranges):
        return False
    blocks = sorted((s.column, s.column + s.width) for s in shapes)
    return all(a[1] <= b[0] for a, b in pairwise(blocks))


class Pieces:
    """The terms of a layer in pieces, on a device.

    Attributes:
        ranks: R, the width of u and v.
        table: int32 [P, 6], a `Piece` a row.
        scales: fp32 [P], the c of each piece.
        terms: the term of each piece.
        block_r: ranks of a kernel's tile, a power of two that tensor cores take.
        align: 16 when it divides all blocks' columns and widths, else 1.
    """

    def __init__(self, shapes: tuple[Shape, ...], device: torch.device) -> None:
        *offsets, self.ranks = rank_offsets(shapes)
        rows, scales, terms = [], [], []
        for term, (shape, offset) in enumerate(zip(shapes, offsets, strict=True)):
            ranks = (shape.rank + 7) // 8 * 8
            # Streams have 32 bits and no sign; the table has signed ones.
            stream = (shape.stream + 2**31) % 2**32 - 2**31
            for first in range(0, ranks, RANK_BLOCK):
                size = min(RANK_BLOCK, ranks - first)
                block = (shape.column, shape.width, stream, shape.threshold)
                rows.append(Piece(offset + first, size, *block))
                scales.append(shape.scale)
                terms.append(term)
        self.terms = tuple(terms)
        odd = any(s.column % 16 or s.width % 16 for s in shapes)
        self.align = 1 if odd else 16
        self.table = torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 6)
        self.scales = torch.tensor(scales, dtype=torch.float32, device=device)
        self.block_r = max(
            16, 1 << max((piece.ranks - 1 for piece in rows), default=0).bit_length()
        )


@dataclass(frozen=True)
class Plan:
    """What one call of the operation does: the layer's pieces on the batch's rows."""

    pieces: Pieces
    ranges: tuple[tuple[int, int], ...]  # of each term: first row, end
    rows: int
    has_dropout: bool
    uniform: bool

    @property
    def slots(self) -> int:
        """The most pieces that apply to any row."""
        return _slots(self.ranges, self.pieces.terms, self.rows)

    def tiles(self, size: int) -> Tensor:
        """int32 [tiles, 2 + 2 * slots]: first row, end, then a piece and its first row a slot.

        A tile has up to `size` rows of one segment; a slot without a piece holds -1.
        """
        device = self.pieces.table.device
        return _tiles(self.ranges, self.pieces.terms, self.rows, size, device)


def make_plan(
    shapes: tuple[Shape, ...], ranges: tuple[tuple[int, int], ...], rows: int, device: torch.device
) -> Plan:
    """The plan of a call on `rows` rows; its tables are made once."""
    has_dropout = any(shape.threshold for shape in shapes)
    uniform = is_uniform(shapes, ranges, rows)
    return Plan(_pieces(shapes, device), ranges, rows, has_dropout, uniform)


@lru_cache(maxsize=1024)
def _pieces(shapes: tuple[Shape, ...], device: torch.device) -> Pieces:
    return Pieces(shapes, device)


@lru_cache(maxsize=1024)
def _segments(
    ranges: tuple[tuple[int, int], ...], terms: tuple[int, ...], rows: int
) -> list[tuple[int, int, list[int]]]:
    """(first row, end, pieces that apply) of each stretch of rows with the same pieces."""
    cuts = sorted({0, rows, *(row for ends in ranges for row in ends)})
    return [
        (a, b, [p for p, t in enumerate(terms) if ranges[t][0] <= a and b <= ranges[t][1]])
        for a, b in pairwise(cuts)
    ] or [(0, 0, [])]


@lru_cache(maxsize=1024)
def _slots(ranges: tuple[tuple[int, int], ...], terms: tuple[int, ...], rows: int) -> int:
    return max(1, *(len(used) for *_, used in _segments(ranges, terms, rows)))


@lru_cache(maxsize=1024)
def _tiles(
    ranges: tuple[tuple[int, int], ...],
    terms: tuple[int, ...],
    rows: int,
    size: int,
    device: torch.device,
) -> Tensor:
    slots, table = _slots(ranges, terms, rows), []
    for start, stop, used in _segments(ranges, terms, rows):
        entries = [value for p in used for value in (p, ranges[terms[p]][0])]
        entries += [-1, 0] * (slots - len(used))
        table += [(a, min(stop, a + size), *entries) for a in range(start, stop, size)]
    return torch.tensor(table, dtype=torch.int32, device=device).view(-1, 2 + 2 * slots)
