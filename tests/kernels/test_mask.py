"""The mask's implementations agree bit for bit, whatever the tiles."""

import pytest
import torch
from oracle import DEVICE, SEED

from fastlora.kernels.call import threshold
from fastlora.kernels.dropout import philox_keep

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
import triton.language as tl  # noqa: E402

from fastlora.kernels.triton.kernels import drop_tile, keep_bits  # noqa: E402


@triton.jit
def store_mask(
    out_ptr, seed_ptr, stream, cut, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_K
    k = column + tl.arange(0, BLOCK_K)
    seed = tl.load(seed_ptr)
    stream = stream + tl.zeros((), tl.int32)
    cut = cut + tl.zeros((), tl.int32)
    bits = keep_bits(seed, stream, row, column, cut, BLOCK_K)
    keep = drop_tile(tl.full((BLOCK_M, BLOCK_K), 1.0, tl.float32), bits)
    tl.store(out_ptr + row[:, None] * K + k[None, :], keep, mask=(row < M)[:, None] & (k < K))


PROBABILITIES = [0.1, 0.5, 0.999]
TILES = [(16, 16), (32, 64), (64, 32), (8, 128)]
STREAMS = [0, 5, 2**31 - 1, -7]


# Every pair of two of the three, not every three: no two of them meet in the code.
@pytest.mark.parametrize(
    ("p", "tile", "stream"),
    [
        (PROBABILITIES[(i + j) % 3], tile, stream)
        for i, tile in enumerate(TILES)
        for j, stream in enumerate(STREAMS)
    ],
)
def test_triton_and_pytorch_agree(p, tile, stream):
    M, K = 2 * tile[0] - 3, 2 * tile[1] - 5  # two tiles each way, the second in part
    out = torch.full((M, K), float("nan"), device=DEVICE)
    grid = (triton.cdiv(M, tile[0]), triton.cdiv(K, tile[1]))
    store_mask[grid](out, SEED, stream, threshold(p), M, K, *tile)
    assert torch.equal(out, philox_keep(SEED, stream, M, K, p).float())
