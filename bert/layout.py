"""Where the real tokens of a padded batch lie.

A padded batch [B, S] is computed as its T real tokens [T, H] (Zeng et al. 2022, "Boosting
distributed training performance of the unpadded BERT model"). B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the T real tokens of a padded batch lie; tensors are None when nothing is padded."""

    batch: int  # B
    length: int  # S
    # int64 [T], their positions in the flattened [B * S]; the real ones in order, then padding that
    # is computed like them but that no token attends to.
    index: Tensor | None = None
    mask: Tensor | None = None  # bool [B, 1, 1, S], True at real keys
    derived: dict[tuple, Tensor] = field(default_factory=dict, compare=False)  # shared by layers

    @cached_property
    def computed(self) -> Tensor:
        """Which positions are computed: bool [B, S]; only for a layout that has an index."""
        assert self.index is not None
        flat = self.index.new_zeros(self.batch * self.length, dtype=torch.bool)
        return flat.index_fill_(0, self.index, True).view(self.batch, self.length)

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
