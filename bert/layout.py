"""Where a batch's real tokens lie: end to end for all of the encoder but attention.

Attention needs rows of one length. Rows of similar length share a square, so that little of it is
padding. Shapes at line ends: B rows of the batch, S its longest row, T real tokens, C cells of all
squares, b rows and s length of one square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Square:
    """Some rows of a batch, each padded to the longest of them, in the cells from `start` on."""

    start: int
    rows: int  # b
    length: int  # s
    mask: Tensor | None  # bool [b, 1, 1, s], True at real tokens; None when all are

    @property
    def cells(self) -> slice:
        """Its b * s cells."""
        return slice(self.start, self.start + self.rows * self.length)


@dataclass(frozen=True)
class Layout:
    """A batch's real tokens and the cells of attention's squares, which hold them and padding.

    `index` and `source` are None when the tokens in their order are the cells.
    """

    lengths: Tensor  # int64 [B], real tokens of each row
    positions: Tensor  # int64 [T], each token's place in its row
    squares: tuple[Square, ...]
    index: Tensor | None  # int64 [T], the cell of each token
    source: Tensor | None  # int64 [C], the token in each cell, any at padding

    @classmethod
    def of(cls, real: Tensor, groups: Sequence[Any] = (slice(None),)) -> Layout:
        """From a bool [B, S] mask and the indices of each square's rows, by default all of them."""
        token = real.flatten().cumsum(0).sub_(1).clamp_(min=0).view(real.shape)
        squares: list[Square] = []
        sources, filled = [], []
        for rows in groups:
            own = real[rows]
            if len(groups) > 1:
                own = own[:, : int(own.sum(1).max())]
            mask = None if own.all() else own[:, None, None, :]
            start = squares[-1].cells.stop if squares else 0
            squares.append(Square(start, len(own), own.shape[1], mask))
            sources.append(token[rows][:, : own.shape[1]].flatten())
            filled.append(own.flatten())
        lengths = real.sum(1)
        positions = torch.arange(real.shape[1], device=real.device).expand_as(real)[real]
        if len(squares) == 1 and squares[0].mask is None:
            return cls(lengths, positions, tuple(squares), None, None)
        source, cells = torch.cat(sources), torch.cat(filled).nonzero().squeeze(1)
        index = torch.empty_like(positions).index_copy_(0, source[cells], cells)
        return cls(lengths, positions, tuple(squares), index, source)

    @property
    def cells(self) -> int:
        """C, real tokens and padding."""
        return self.squares[-1].cells.stop

    def to(self, device: torch.device | str) -> Layout:
        """Copy the tensors to a device, without waiting for the copy where that is possible."""

        def move(tensor: Tensor | None) -> Any:
            return tensor if tensor is None else tensor.to(device, non_blocking=True)

        squares = tuple(replace(square, mask=move(square.mask)) for square in self.squares)
        tensors = map(move, (self.index, self.source))
        return Layout(move(self.lengths), move(self.positions), squares, *tensors)

    def gather(self, tokens: Tensor) -> Tensor:
        """[T, W] -> [C, W], any token at padding: for a reader that masks it."""
        return tokens if self.source is None else tokens.index_select(0, self.source)

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, W] -> [C, W], zeros at padding."""
        if self.index is None:
            return tokens
        return tokens.new_zeros(self.cells, tokens.shape[1]).index_copy(0, self.index, tokens)

    def unpad(self, cells: Tensor) -> Tensor:
        """[C, W] -> [T, W]."""
        return cells if self.index is None else _Unpad.apply(cells, self.index)


class _Unpad(torch.autograd.Function):
    """`index_select` of distinct rows: backward is a copy, where PyTorch's adds row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        ctx.save_for_backward(index)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index, grad), None


def similar_rows(lengths: np.ndarray) -> list[np.ndarray]:
    """Up to three groups of rows [B] whose squares have the fewest cells in all."""
    order = np.argsort(-lengths, kind="stable")
    ordered, rows = lengths[order], len(lengths)
    starts = np.flatnonzero(np.diff(ordered, prepend=0))  # the first row of each length
    i, j = starts[:, None], starts[None, :]
    cells = i * ordered[0] + (j - i) * ordered[i] + (rows - j) * ordered[j]
    best = np.unravel_index(np.where(i <= j, cells, cells.max() + 1).argmin(), cells.shape)
    return [group for group in np.split(order, starts[list(best)]) if len(group)]
