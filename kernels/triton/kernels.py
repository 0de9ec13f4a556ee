"""The kernels and the functions that launch them.

    lora_down     the down-projection u, or v
    lora_add      the terms, added to the frozen part of the output, or of dx
    lora_outer    dA, or dB, as partial sums over chunks of rows

A GEMM adds these up, without atomics: gradients are reproducible bit for bit. However many terms
there are, a kernel moves each large matrix once; it draws the mask again, which is cheaper.
All kernels read tables (see `grouped.py`). A tile is up to BLOCK_M rows of one segment, with one
slot for each piece that applies there; a piece is at most 64 ranks of one term.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.triton.grouped import Plan


@triton.jit
def load_piece(pieces_ptr, piece, ALIGN: tl.constexpr):
    """First column and number of its ranks, first column and width of its block, stream, threshold.

    The alignment hints make loads vectorised.
    """
    base = pieces_ptr + piece * 6
    return (
        tl.multiple_of(tl.load(base), 8),
        tl.multiple_of(tl.load(base + 1), 8),
        tl.multiple_of(tl.load(base + 2), ALIGN),
        tl.multiple_of(tl.load(base + 3), ALIGN),
        tl.load(base + 4),
        tl.load(base + 5),
    )


@triton.jit
def load_tile(ptr, rows, stride_rows, columns, stride_columns, live_rows, live_columns):
    """The elements at [rows, columns]; zeros where the row or the column is not live."""
    ptrs = ptr + rows[:, None] * stride_rows + columns[None, :] * stride_columns
    return tl.load(ptrs, mask=live_rows[:, None] & live_columns[None, :], other=0.0)


@triton.jit
def store_tile(ptr, rows, stride_rows, columns, stride_columns, live_rows, live_columns, values):
    """Write the live elements at [rows, columns], in the pointer's element type."""
    ptrs = ptr + rows[:, None] * stride_rows + columns[None, :] * stride_columns
    inside = live_rows[:, None] & live_columns[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def keep_bits(seed, stream, row, column, threshold, BLOCK_K: tl.constexpr):
    """The mask of rows `row` [BLOCK_M] and columns [column, column + BLOCK_K), as bits.

    int32 [BLOCK_M, BLOCK_K // 8]: bit j is set where column j of eight is kept; column and BLOCK_K
    are multiples of 8. One Philox call gives eight 16-bit lanes: about 9 instructions an element.
    """
    group = column // 8 + tl.arange(0, BLOCK_K // 8)
    c0 = (group[None, :] + row[:, None] * 0).to(tl.uint32)
    c1 = (group[None, :] * 0 + row[:, None]).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + stream.to(tl.uint32), zero, n_rounds=7)
    low, high = threshold.to(tl.uint32), threshold.to(tl.uint32) << 16
    # To compare its high half, a word needs no shift.
    first = ((w0 & 0xFFFF) >= low).to(tl.int32) | ((w0 >= high).to(tl.int32) << 1)
    first |= (((w1 & 0xFFFF) >= low).to(tl.int32) << 2) | ((w1 >= high).to(tl.int32) << 3)
    second = (((w2 & 0xFFFF) >= low).to(tl.int32) << 4) | ((w2 >= high).to(tl.int32) << 5)
    second |= (((w3 & 0xFFFF) >= low).to(tl.int32) << 6) | ((w3 >= high).to(tl.int32) << 7)
    # The compiler looks through everything but a sum over a first axis: without it, Philox runs
    # again for each layout in which the mask is used. With it, the bits move between layouts.
    return tl.sum(tl.permute(tl.join(first, second), (2, 0, 1)), 0)


@triton.jit
def drop_tile(values, bits):
    """The values [BLOCK_M, BLOCK_K] whose bit of `keep_bits` is set, zeros elsewhere."""
    lanes = bits[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]
    return tl.where(tl.reshape(lanes, values.shape) != 0, values, 0.0)


@triton.jit
def lora_down(
    x_ptr, a_ptr, u_ptr, copy_ptr, seed_ptr, tiles_ptr, pieces_ptr, scales_ptr,
    K,
    stride_x0, stride_x1, stride_a0, stride_a1, stride_u0, stride_u1,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_COPY: tl.constexpr, IN_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """u [M, R] = c (m * x) A^T, a program for each tile and slot; HAS_COPY: slot 0 copies x, too.

    With IN_BLOCK, x is the output's gradient and A is B^T: u = g B over the piece's own columns.
    """
    slot = tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(1) * (2 + 2 * SLOTS)
    piece = tl.load(tile_ptr + 2 + 2 * slot)
    if piece >= 0:
        row = tl.load(tile_ptr) + tl.arange(0, BLOCK_M)
        live = row < tl.load(tile_ptr + 1)
        mask_row = row - tl.load(tile_ptr + 3 + 2 * slot)
        offset, ranks, column, width, stream, threshold = load_piece(pieces_ptr, piece, ALIGN)
        rank = tl.arange(0, BLOCK_R)
        first, depth = 0, K
        if IN_BLOCK:
            first, depth = column, width
        if HAS_DROPOUT:
            seed = tl.load(seed_ptr)
        row64 = row.to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(0, depth, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, row64, stride_x0, first + k, stride_x1, live, k < depth)
            # The programs of one tile run at the same time, so x is read from DRAM once.
            if HAS_COPY and slot == 0:
                store_tile(copy_ptr, row64, stride_u0, k, stride_u1, live, k < depth, x)
            place, known = offset + rank, rank < ranks
            a = load_tile(a_ptr, first + k, stride_a1, place, stride_a0, k < depth, known)
            if HAS_DROPOUT:
                x = drop_tile(x, keep_bits(seed, stream, mask_row, k0, threshold, BLOCK_K))
            acc = tl.dot(x, a, acc, input_precision="ieee")
        if not IN_BLOCK:
            acc *= tl.load(scales_ptr + piece)
        store_tile(u_ptr, row64, stride_u0, offset + rank, stride_u1, live, rank < ranks, acc)


def down(
    plan: Plan, x: Tensor, A: Tensor, u: Tensor, copy: Tensor | None = None, in_block: bool = False
) -> None:
    """Launch `lora_down`: x [M, K], A [R, K] (or B^T [R, N] with `in_block`), u [M, R].

    `copy` [M, K] and u are the left and right part of one buffer.
    """
    blocks = plan.blocks.down
    plan.launch(
        lora_down, blocks, blocks.m, plan.tiles(blocks.m)[2],
        dict(x=x, a=A, u=u), dict(copy_ptr=copy, K=x.shape[1], **plan.draws),
        BLOCK_K=blocks.k, HAS_COPY=copy is not None, IN_BLOCK=in_block,
        HAS_DROPOUT=plan.pieces.has_dropout and not in_block,
    )  # fmt: skip


@triton.jit
def lora_add(
    u_ptr, b_ptr, base_ptr, y_ptr, seed_ptr, tiles_ptr, pieces_ptr, scales_ptr,
    N,
    stride_u0, stride_u1, stride_b0, stride_b1, stride_base0, stride_base1, stride_y0, stride_y1,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, IN_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """y [M, N] = base + c m * (u B^T), a program for each tile and block of columns.

    With IN_BLOCK, y = base + u B^T: each term adds to its own columns only, and u contains c.
    """
    tile_ptr = tiles_ptr + tl.program_id(1) * (2 + 2 * SLOTS)
    n0 = tl.program_id(0) * BLOCK_N
    row = tl.load(tile_ptr) + tl.arange(0, BLOCK_M)
    live = row < tl.load(tile_ptr + 1)
    n = n0 + tl.arange(0, BLOCK_N)
    row64 = row.to(tl.int64)
    rank = tl.arange(0, BLOCK_R)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = load_tile(base_ptr, row64, stride_base0, n, stride_base1, live, n < N).to(tl.float32)
    for slot in range(SLOTS):
        piece = tl.load(tile_ptr + 2 + 2 * slot)
        if piece >= 0:
            offset, ranks, column, width, stream, threshold = load_piece(pieces_ptr, piece, ALIGN)
            first, end = 0, N
            if IN_BLOCK:
                first, end = column, column + width
            if first < n0 + BLOCK_N and end > n0:
                place, known = offset + rank, rank < ranks
                u = load_tile(u_ptr, row64, stride_u0, place, stride_u1, live, known)
                b = load_tile(b_ptr, place, stride_b1, n, stride_b0, known, n < N)
                branch = tl.dot(u, b, input_precision="ieee")
                if not IN_BLOCK:
                    branch *= tl.load(scales_ptr + piece)
                if HAS_DROPOUT:
                    mask_row = row - tl.load(tile_ptr + 3 + 2 * slot)
                    bits = keep_bits(seed, stream, mask_row, n0, threshold, BLOCK_N)
                    branch = drop_tile(branch, bits)
                acc += branch
    store_tile(y_ptr, row64, stride_y0, n, stride_y1, live, n < N, acc)


def add(plan: Plan, u: Tensor, B: Tensor, base: Tensor, in_block: bool = False) -> Tensor:
    """Launch `lora_add`: u [M, R], B [N, R], base [M, N]. Returns y, in base if contiguous."""
    blocks, (M, N) = plan.blocks.add, base.shape
    y = base if base.is_contiguous() else base.new_empty(M, N)
    plan.launch(
        lora_add, blocks, blocks.m, triton.cdiv(N, blocks.n),
        dict(u=u, b=B, base=base, y=y), dict(N=N, **plan.draws),
        BLOCK_N=blocks.n, IN_BLOCK=in_block,
        HAS_DROPOUT=plan.pieces.has_dropout and not in_block,
    )  # fmt: skip
    return y


@triton.jit
def lora_outer(
    x_ptr, v_ptr, partial_ptr, seed_ptr, tiles_ptr, pieces_ptr, scales_ptr,
    K,
    stride_x0, stride_x1, stride_v0, stride_v1,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, IN_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """partial [chunk, slot, BLOCK_R, K] = c v^T (m * x), a program for each part of it.

    With IN_BLOCK, x is the output's gradient and v is u: partial = u^T g over the piece's columns.
    """
    # The programs of one chunk run at the same time, so x is read from DRAM once.
    slot, chunk = tl.program_id(0) % SLOTS, tl.program_id(1)
    chunk_ptr = tiles_ptr + chunk * (2 + 2 * SLOTS)
    k0 = tl.program_id(0) // SLOTS * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    piece = tl.load(chunk_ptr + 2 + 2 * slot)
    if piece >= 0:
        start, stop = tl.load(chunk_ptr), tl.load(chunk_ptr + 1)
        origin = tl.load(chunk_ptr + 3 + 2 * slot)
        offset, ranks, column, width, stream, threshold = load_piece(pieces_ptr, piece, ALIGN)
        first, depth, scale = 0, K, tl.load(scales_ptr + piece)
        if IN_BLOCK:
            first, depth, scale = column, width, 1.0
        if HAS_DROPOUT:
            seed = tl.load(seed_ptr)
        for row0 in range(start, stop, BLOCK_M):
            row = row0 + tl.arange(0, BLOCK_M)
            live = row < stop
            row64 = row.to(tl.int64)
            x = load_tile(x_ptr, row64, stride_x0, first + k, stride_x1, live, k < depth)
            v = load_tile(v_ptr, row64, stride_v0, offset + rank, stride_v1, live, rank < ranks)
            if HAS_DROPOUT:
                x = drop_tile(x, keep_bits(seed, stream, row - origin, k0, threshold, BLOCK_K))
            acc = tl.dot(tl.trans(v), x, acc, input_precision="ieee")
        acc *= scale
    partial_row = (chunk * SLOTS + slot).to(tl.int64) * BLOCK_R + rank
    store_tile(partial_ptr, partial_row, K, k, 1, rank >= 0, k < K, acc)


def outer(plan: Plan, x: Tensor, v: Tensor, span: int = 0) -> list[Tensor]:
    """Each term's dA [r, K] fp32 from x [M, K] and v [M, R]: `lora_outer`, and a GEMM that sums up.

    With `span`, the width of the widest block, computes dB^T [r, span] from x = the output's
    gradient and v = u instead.
    """
    pieces, blocks, K = plan.pieces, plan.blocks.outer, span or x.shape[1]
    columns = triton.cdiv(K, blocks.k)
    chunk = plan.chunk(columns)
    _, owners, slots = plan.tiles(chunk)
    partial = owners.new_empty(owners.shape[1], pieces.block_r * K)
    plan.launch(
        lora_outer, blocks, chunk, columns * slots,
        dict(x=x, v=v), dict(partial_ptr=partial, K=K, **plan.draws),
        BLOCK_K=blocks.k, IN_BLOCK=span > 0, HAS_DROPOUT=pieces.has_dropout and not span,
    )  # fmt: skip
    sums = (owners @ partial).view(-1, K)  # [P * block_r, K]
    first = [pieces.terms.index(term) * pieces.block_r for term in range(len(plan.call.terms))]
    return [sums[i : i + len(t.lora_A)] for i, t in zip(first, plan.call.terms, strict=True)]
