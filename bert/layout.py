"""Where the real tokens of a padded batch lie.

A padded batch [B, S] is computed as its T real tokens [T, H] (Zeng et al. 2022, "Boosting
distributed training performance of the unpadded BERT model"). B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_MANY = 1 << 18  # scores from which groups save more time than their additional calls take


@dataclass(frozen=True)
class Layout:
    """Where the T real tokens of a padded batch lie; tensors are None when nothing is padded."""

    batch: int  # B
    length: int  # S
    # int64 [T], their positions in the flattened [B * S]; the real ones in order, then padding that
    # is computed like them but that no token attends to.
    index: Tensor | None = None
    mask: Tensor | None = None  # bool [B, 1, 1, S], True at real keys
    derived: dict[tuple, Any] = field(default_factory=dict, compare=False)  # shared by layers

    @classmethod
    def of(
        cls,
        attention_mask: Tensor | None,  # [B, S] of 1 and 0, or booleans; None: all are real
        shape: torch.Size,
        tokens: int = 0,
        first: bool = False,
    ) -> Layout:
        """The layout of a padded batch.

        With fewer real tokens than `tokens`, padding from rows with real tokens is computed, too,
        up to that number; with `first`, so is each row's first position, because heads read it.
        """
        batch, length = shape
        if attention_mask is None:
            return cls(batch, length)
        real = attention_mask.bool()
        index = real.flatten().nonzero().squeeze(1)
        if len(index) == real.numel():
            return cls(batch, length)
        if first:
            index = torch.cat((index, (~real[:, 0]).nonzero()[:, 0] * length))
        if missing := max(0, tokens - len(index)):
            spare = real.any(1, keepdim=True).logical_and(real.logical_not())
            spare[:, : int(first)] = False  # those are computed already
            index = torch.cat((index, spare.flatten().nonzero()[:missing, 0]))
        return cls(batch, length, index, real[:, None, None, :])

    def to(self, device: torch.device | str) -> Layout:
        """Copy it to a device, without waiting for the copy where that is possible."""
        new = [t if t is None else t.to(device, non_blocking=True) for t in (self.index, self.mask)]
        return Layout(self.batch, self.length, new[0], new[1])

    def pad(self, tokens: Tensor) -> Tensor:
        """[T, C] -> [B, S, C], zeros at padding."""
        if self.index is not None:
            square = tokens.new_zeros(self.batch * self.length, tokens.shape[1])
            tokens = square.index_copy(0, self.index, tokens)
        return tokens.view(self.batch, self.length, tokens.shape[1])

    def unpad(self, square: Tensor) -> Tensor:
        """[B, S, C] -> [T, C]."""
        rows = square.flatten(0, 1)
        return rows if self.index is None else _Unpad.apply(rows, self.index)


@dataclass(frozen=True)
class Groups:
    """Sequences in groups of similar lengths, so that attention computes few empty cells.

    A group is b sequences of at most s tokens each. A cell is what one head [d] has at one of these
    b s places; there are N cells in all groups, and those without a token hold zeros.
    """

    tokens: int  # T
    masked: list[Tensor]  # bool [b heads, 1, s] of each group, True at padding
    empty: Tensor  # int64, the cells without a token
    row_of_cell: dict[int, Tensor]  # by parts: int64 [parts N], into rows [T parts heads, d]
    cell_of_row: dict[int, Tensor]  # by parts: int64 [T parts heads], the inverse

    @classmethod
    def of(cls, layout: Layout, heads: int) -> Groups:
        """The groups of a layout, made once for all layers: by halving the longest length."""
        if (key := ("groups", heads)) in layout.derived:
            return layout.derived[key]
        tokens = layout.batch * layout.length if layout.index is None else len(layout.index)
        token = layout.pad(torch.arange(1, tokens + 1, device="cpu")[:, None]).squeeze(2) - 1
        real = token.ge(0) if layout.mask is None else layout.mask[:, 0, 0]
        places = token.lt(0).argsort(stable=True, dim=1)  # those with a token come first
        token, real = token.gather(1, places), real.gather(1, places)
        counts = token.ge(0).sum(1)
        several = layout.batch * layout.length**2 * heads > _MANY
        bucket = (counts.max() / counts.clamp(min=1)).log2().floor().mul(several)
        numbers, masked, found = torch.arange(heads + 3, device="cpu")[:, None], [], []
        for number in bucket.unique():
            rows = bucket.eq(number).nonzero()[:, 0]
            length = max(1, int(counts[rows].max()))
            masked.append(real[rows, None, :length].logical_not().repeat_interleave(heads, 0))
            found.append((token[rows, None, :length] * heads + numbers[:heads]).flatten())
        source = torch.cat(found)  # the row of [T heads, d] in each cell; negative: none
        full, empty = source.ge(0).nonzero()[:, 0], source.lt(0).nonzero()[:, 0]
        cell = torch.empty_like(full).index_copy_(0, source[full], full).view(-1, 1, heads)
        token, head = (source // heads).clamp(min=0), source % heads
        row_of_cell = {n: ((token * n + numbers[:n]) * heads + head).flatten() for n in (1, 3)}
        cell_of_row = {n: (cell + numbers[:n] * len(source)).flatten() for n in (1, 3)}
        layout.derived[key] = cls(tokens, masked, empty, row_of_cell, cell_of_row)
        return layout.derived[key]

    def take(self, tokens: Tensor, parts: int) -> Tensor:
        """[T, parts H] -> the cells [parts, N, d]."""
        rows = tokens.reshape(self.cell_of_row[parts].numel(), -1)
        cells = rows.index_select(0, self.row_of_cell[parts]).view(parts, -1, rows.shape[1])
        return cells.index_fill_(1, self.empty, 0) if len(self.empty) else cells

    def give(self, cells: Tensor) -> Tensor:
        """[parts, N, d] -> [T, parts H], the inverse."""
        rows = cells.flatten(0, 1).index_select(0, self.cell_of_row[len(cells)])
        return rows.view(self.tokens, -1)

    def each(self, *cells: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield of each group: `masked`, and its part of each [N, d] as a view [b heads, s, d]."""
        sizes = [masked.numel() for masked in self.masked]
        for group in zip(self.masked, *(t.split(sizes) for t in cells), strict=True):
            yield group[0], *(t.view(*group[0].shape[::2], -1) for t in group[1:])


class _Unpad(torch.autograd.Function):
    """`index_select` of distinct rows, whose backward is a copy; PyTorch's adds row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.rows = len(rows)
        ctx.save_for_backward(index)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index, grad), None
