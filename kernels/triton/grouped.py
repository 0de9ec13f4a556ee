"""Which rows and columns each low-rank term touches, as tables that the kernels walk.

Terms may cover any ranges of rows, empty and overlapping ones too. The rows are cut into segments
in which the same terms apply, and one launch does all of them. What a layer fixes (`Pieces`) and
what a batch fixes (tiles of rows) are cached apart: layers share the one, batches the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.kernels.call import Ranges, Shape, padded, rank_offsets

RANK_BLOCK = 64  # a term of higher rank is several pieces, so that a tile stays in registers


class Pieces:
    """The terms of a layer, up to RANK_BLOCK ranks of one term a piece, on a device."""

    def __init__(self, shapes: tuple[Shape, ...], device: torch.device) -> None:
        *offsets, self.ranks = rank_offsets(shapes)  # R, the width of u and v
        table, scales, terms = [], [], []
        for term, (shape, offset) in enumerate(zip(shapes, offsets, strict=True)):
            # Streams have 32 bits and no sign; the table has signed ones.
            stream = (shape.stream + 2**31) % 2**32 - 2**31
            for first in range(0, padded(shape.rank), RANK_BLOCK):
                size = min(RANK_BLOCK, padded(shape.rank) - first)
                block = (shape.column, shape.width, stream, shape.threshold)
                table.append((offset + first, size, *block))
                scales.append(shape.scale)
                terms.append(term)
        self.terms = tuple(terms)  # the term of each piece
        # [P, 6], a row a piece: its first column in u, v and the packed factors, its ranks, the
        # first column and the width of its block, its stream and threshold.
        self.table = torch.tensor(table, dtype=torch.int32, device=device)
        self.scales = torch.tensor(scales, dtype=torch.float32, device=device)  # [P], each one's c
        self.has_dropout = any(shape.threshold for shape in shapes)
        # What divides the columns and widths of all blocks.
        self.align = 1 if any(s.column % 16 or s.width % 16 for s in shapes) else 16
        # Ranks of a kernel's tile: a power of two that tensor cores take.
        self.block_r = max(16, 1 << max(size - 1 for _, size, *_ in table).bit_length())


class Plan(NamedTuple):
    """What one call of the operation does: the layer's pieces on the batch's rows."""

    pieces: Pieces
    ranges: Ranges
    rows: int
    # Takes the tables that a captured CUDA graph reads, which must outlive the caches' entries.
    keep: Callable[..., None] | None = None

    def tiles(self, size: int) -> tuple[Tensor, int]:
        """int32 [tiles, 2 + 2 * slots]: first row, end, then a piece and its first row a slot.

        A tile has up to `size` rows of one segment; a slot without a piece holds -1. Slots, the
        second result, are the most pieces that apply to any row.
        """
        device = self.pieces.table.device
        found = _tiles(self.ranges, self.pieces.terms, self.rows, size, device)
        if self.keep is not None:
            self.keep(self.pieces, found[0])
        return found


make_pieces = lru_cache(maxsize=1024)(Pieces)


@lru_cache(maxsize=1024)
def _tiles(
    ranges: Ranges, terms: tuple[int, ...], rows: int, size: int, device: torch.device
) -> tuple[Tensor, int]:
    cuts = sorted({0, rows, *(row for ends in ranges for row in ends)})
    segments = [
        (a, b, [p for p, t in enumerate(terms) if ranges[t][0] <= a and b <= ranges[t][1]])
        for a, b in pairwise(cuts)
    ]
    slots, table = max([1, *(len(used) for *_, used in segments)]), []
    for start, stop, used in segments:
        entries = [value for p in used for value in (p, ranges[terms[p]][0])]
        entries += [-1, 0] * (slots - len(used))
        table += [(a, min(stop, a + size), *entries) for a in range(start, stop, size)]
    tiles = torch.tensor(table, dtype=torch.int32, device="cpu").view(-1, 2 + 2 * slots)
    return tiles.to(device, non_blocking=True), slots  # no waiting, for each batch has its own
