"""The dropout mask: one definition from a seed, and a cheap generator for the CPU.

A mask is a pure function of (seed, stream, row, column), so backward draws it again instead of
storing it. On a GPU it is Philox4x32 with 7 rounds, eight 16-bit lanes a call; `philox_keep` is
that definition in PyTorch. On a CPU, Philox in tensor operations costs more than the layer it
drops, so `keep_mask` cuts the 64-bit words of NumPy's SFC64 into 16-bit lanes of the same
resolution, from the same seed.
"""

import numpy as np
import torch
from torch import Tensor, nn

LANES = 1 << 16
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The lanes in [0, 65536) that drop: p rounded to the mask's resolution of 2^-16."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout is {p} (expected 0 <= p < 1)")
    return min(round(p * LANES), LANES - 1)


def keep_scale(p: float) -> float:
    """The factor 1 / (1 - p) of kept values, with p as the mask really drops it."""
    return LANES / (LANES - threshold(p))


def draw_seed(device: torch.device) -> Tensor:
    """A fresh mask seed: int64 [] on `device`, governed by `torch.manual_seed`."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def keep_mask(
    seed: Tensor,
    stream: int,
    rows: int,
    columns: int,
    p: float,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """Keep mask [rows, columns] on the seed's device.

    Args:
        seed: int64 scalar tensor.
        stream: which projection of which layer; masks of different streams are independent.
        rows, columns: the shape; a mask of fewer rows is the head of a longer one.
        p: probability to drop.
        dtype: bool, or a floating type to multiply with (1 keeps, 0 drops).
    """
    if seed.device.type != "cpu":
        return philox_keep(seed, stream, rows, columns, p).to(dtype)
    bits = np.random.SFC64([int(seed), stream]).random_raw((rows * columns + 3) // 4)
    lanes = torch.from_numpy(bits.view(np.int16)[: rows * columns]).view(rows, columns)
    # torch compares signed lanes only: shift the threshold instead of the data.
    # Written in its final type at once: a product with booleans costs ten times one with floats.
    keep = torch.empty(rows, columns, dtype=dtype)
    return torch.ge(lanes, threshold(p) - LANES // 2, out=keep)


def philox_keep(seed: Tensor, stream: int, rows: int, columns: int, p: float) -> Tensor:
    """The specification: Philox4x32-7 with counter (column // 8, row, stream, 0).

    Lane j = column % 8 is half j % 2 (low first) of word j // 2; it keeps when it is at least
    `threshold(p)`. Returns a boolean [rows, columns] on the seed's device.
    """
    groups = (columns + 7) // 8
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    c0 = torch.arange(groups, device=seed.device).expand(rows, groups)
    c1 = torch.arange(rows, device=seed.device)[:, None].expand(rows, groups)
    c2, c3 = torch.full_like(c0, stream & _LOW), torch.zeros_like(c0)
    for _ in range(7):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _W0) & _LOW, (key1 + _W1) & _LOW
    words = torch.stack((c0, c1, c2, c3), -1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), -1).reshape(rows, groups * 8)
    return lanes[:, :columns] >= threshold(p)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 product held in int64, without overflowing it."""
    low = (a & 0xFFFF) * constant
    mid = (a >> 16) * constant + (low >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


class Dropout(nn.Dropout):
    """`nn.Dropout` whose mask costs about 1 ns an element on a CPU instead of 8.

    Other devices use PyTorch's own kernel, which is fast there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input` (any shape, floating) with probability p while training."""
        if not self.training or self.p == 0 or input.device.type != "cpu" or not input.numel():
            return super().forward(input)
        columns = input.shape[-1]
        rows = input.numel() // columns
        keep = keep_mask(draw_seed(input.device), 0, rows, columns, self.p, input.dtype)
        return input * keep.mul_(keep_scale(self.p)).view(input.shape)
