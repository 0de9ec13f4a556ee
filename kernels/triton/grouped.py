"""Tables that tell the kernels which rows and columns each low-rank term covers.

Terms may cover any ranges of rows. The rows are cut into segments in which the same terms apply,
and one launch computes all of them. `Pieces` depend on the layer, tiles of rows on the batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels.call import Call, Term, threshold
from fastlora.kernels.triton import tuning

RANK_BLOCK = 64  # a term of higher rank is split, so that a tile fits in registers


def padded(rank: int) -> int:
    """Columns of a term in u, v and the packed factors: its rank, up to a multiple of 8."""
    return (rank + 7) // 8 * 8


def rank_offsets(terms: Sequence[Term]) -> list[int]:
    """First column of each term in u, v and the packed factors, and their width R."""
    return [0, *accumulate(padded(term.lora_A.shape[0]) for term in terms)]


def fits_one_gemm(terms: Sequence[Term], rows: int) -> bool:
    """Whether every term covers all rows and no two terms overlap in columns."""
    whole = all(term.rows == (0, rows) for term in terms)
    blocks = sorted((term.column, term.column + term.lora_B.shape[0]) for term in terms)
    return whole and all(a[1] <= b[0] for a, b in pairwise(blocks))


@lru_cache(maxsize=1024)
class Pieces:
    """The terms of a layer as a table on a device; a piece is up to RANK_BLOCK ranks of one term.

    `shapes` has for each term: rank, first column and width of its block, stream, threshold, c.
    """

    def __init__(self, shapes: tuple[tuple[Any, ...], ...], device: torch.device) -> None:
        table, scales, terms, offset = [], [], [], 0
        for term, (rank, column, width, stream, drop, scale) in enumerate(shapes):
            stream = (stream + 2**31) % 2**32 - 2**31  # unsigned, but the table is int32
            for first in range(0, padded(rank), RANK_BLOCK):
                size = min(RANK_BLOCK, padded(rank) - first)
                table.append((offset + first, size, column, width, stream, drop))
                scales.append(scale)
                terms.append(term)
            offset += padded(rank)
        self.terms = tuple(terms)  # the term of each piece
        # [P, 6]; see `load_piece`.
        self.table = torch.tensor(table, dtype=torch.int32, device=device)
        self.scales = torch.tensor(scales, dtype=torch.float32, device=device)  # [P], each one's c
        self.has_dropout = any(row[5] for row in table)
        # A number that divides the first column and the width of every block.
        self.align = 1 if any(row[2] % 16 or row[3] % 16 for row in table) else 16
        # Ranks of a kernel's tile: a power of two that tensor cores take.
        self.block_r = max(16, 1 << max(row[1] - 1 for row in table).bit_length())


class Plan:
    """The tables and block sizes with which the kernels compute one call."""

    def __init__(self, call: Call, x: Tensor) -> None:
        shapes = (
            (len(t.lora_A), t.column, len(t.lora_B), t.stream, threshold(t.dropout_p), t.c)
            for t in call.terms
        )
        self.call = call
        self.pieces = Pieces(tuple(shapes), x.device)
        self.ranges = (*(term.rows for term in call.terms), (0, len(x)))  # each term's, and all
        self.blocks = tuning.config(tuning.capability(x.device), x.dtype, len(x))
        self.draws = dict(seed_ptr=call.seed, scales_ptr=self.pieces.scales)

    def tiles(self, size: int) -> tuple[Tensor, Tensor, int]:
        """int32 [tiles, 2 + 2 * slots]: first row, end, and in each slot a piece and its first row.

        A tile has up to `size` rows of one segment; an unused slot holds -1. Also returns fp32
        [P, tiles * slots], 1 where a slot holds the piece, and `slots`, the most pieces of a row.
        """
        found = _tiles(self.ranges, self.pieces.terms, size, self.pieces.table.device)
        if (graph := self.call.copies.graph) is not None:  # its tables must outlive the caches
            graph.append((self.pieces, found))
        return found

    def chunk(self, columns: int) -> int:
        """Rows of a partial sum, so that the GPU computes all those of `columns` blocks at once."""
        rows, m = self.ranges[-1][1], self.blocks.outer.m
        work = columns * sum(b - a for a, b in (self.ranges[term] for term in self.pieces.terms))
        chunks = max(1, tuning.programs(self.pieces.table.device) * rows // max(1, work))
        return m * max(1, -(-rows // (chunks * m)))

    def launch(
        self,
        kernel: Any,
        blocks: tuning.Blocks,
        size: int,  # rows of a tile
        programs: int,  # for each tile
        matrices: dict[str, Tensor | None],  # x is passed as x_ptr, stride_x0 and stride_x1
        others: dict[str, Any],
        **constants: Any,
    ) -> None:
        """Run a kernel on the tiles, with the tables that all kernels take."""
        (tiles, _, slots), pieces = self.tiles(size), self.pieces
        arguments = dict(tiles_ptr=tiles, pieces_ptr=pieces.table, **others)
        for name, matrix in matrices.items():
            strides = (0, 0) if matrix is None else matrix.stride()
            arguments[f"{name}_ptr"] = matrix
            arguments[f"stride_{name}0"], arguments[f"stride_{name}1"] = strides
        constants |= dict(SLOTS=slots, BLOCK_M=blocks.m, BLOCK_R=pieces.block_r)
        constants["ALIGN"] = pieces.align
        tuning.launch(kernel, (programs, len(tiles)), arguments, constants, blocks)


@lru_cache(maxsize=1024)
def _tiles(
    ranges: tuple[tuple[int, int], ...], terms: tuple[int, ...], size: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    cuts = sorted({row for ends in ranges for row in ends})
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
    owners = tiles[:, 2::2].reshape(1, -1) == torch.arange(len(terms), device="cpu")[:, None]
    # Without waiting, because every new batch needs them.
    found = [table.to(device, non_blocking=True) for table in (tiles, owners.float())]
    return found[0], found[1], slots
