"""The dropout mask in Triton; `dropout.philox_keep` is its twin in PyTorch."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, stream, row, column, threshold, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """Ones and zeros of rows `row` [BLOCK_M], columns [column, column + BLOCK_K), multiples of 8.

    One Philox call gives eight 16-bit lanes, so a mask costs about 9 instructions an element
    where one call an element (`tl.rand`) costs 57. Its bits depend on no tile size.
    """
    group = column // 8 + tl.arange(0, BLOCK_K // 8)
    c0 = (group[None, :] + row[:, None] * 0).to(tl.uint32)
    c1 = (group[None, :] * 0 + row[:, None]).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + stream.to(tl.uint32), zero, n_rounds=7)
    low, high = threshold.to(tl.uint32), threshold.to(tl.uint32) << 16
    # A word is its high half's lane, as far as comparing goes: no shift. As numbers: booleans
    # move between layouts a byte at a time.
    first = tl.join(
        tl.join(((w0 & 0xFFFF) >= low).to(DTYPE), (w0 >= high).to(DTYPE)),
        tl.join(((w1 & 0xFFFF) >= low).to(DTYPE), (w1 >= high).to(DTYPE)),
    )
    second = tl.join(
        tl.join(((w2 & 0xFFFF) >= low).to(DTYPE), (w2 >= high).to(DTYPE)),
        tl.join(((w3 & 0xFFFF) >= low).to(DTYPE), (w3 >= high).to(DTYPE)),
    )
    # Dimensions [row, group, half, word % 2, word // 2] -> lanes in the order of columns.
    lanes = tl.join(tl.permute(first, (0, 1, 3, 2)), tl.permute(second, (0, 1, 3, 2)))
    return tl.reshape(tl.permute(lanes, (0, 1, 4, 2, 3)), (row.shape[0], BLOCK_K))
