"""Forward kernels: the down-projection u, and a GEMM with the low-rank terms folded in.

Both walk tables (see `grouped.py`): a tile is up to BLOCK_M rows of one segment and the pieces
that apply there, one a slot; a piece is at most 64 ranks of one term.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.triton.grouped import Plan
from fastlora.kernels.triton.mask import keep_mask


@triton.jit
def load_piece(pieces_ptr, piece, ALIGN: tl.constexpr):
    """Offset and number of its ranks, first column and width of its block, stream, threshold.

    The hints let loads be vectors: without them each element is an instruction.
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
    """The elements at [rows, columns], zeros where either is not live."""
    ptrs = ptr + rows[:, None] * stride_rows + columns[None, :] * stride_columns
    return tl.load(ptrs, mask=live_rows[:, None] & live_columns[None, :], other=0.0)


@triton.jit
def store_tile(ptr, rows, stride_rows, columns, stride_columns, live_rows, live_columns, values):
    """Write the elements at [rows, columns] that are live, in the memory's type."""
    ptrs = ptr + rows[:, None] * stride_rows + columns[None, :] * stride_columns
    inside = live_rows[:, None] & live_columns[None, :]
    tl.store(ptrs, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def lora_down(
    x_ptr, a_ptr, u_ptr, copy_ptr, seed_ptr, tiles_ptr, pieces_ptr, scales_ptr,
    K,
    stride_x0, stride_x1, stride_a0, stride_a1, stride_u0, stride_u1,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_COPY: tl.constexpr, IN_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """u [M, R] = c (m * x) A^T, tile by slot; with HAS_COPY slot 0 also copies x beside u.

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
            # Slots of one tile run side by side, so x comes from DRAM once.
            if HAS_COPY and slot == 0:
                store_tile(copy_ptr, row64, stride_u0, k, stride_u1, live, k < depth, x)
            place, known = offset + rank, rank < ranks
            a = load_tile(a_ptr, first + k, stride_a1, place, stride_a0, k < depth, known)
            if HAS_DROPOUT:
                keep = keep_mask(seed, stream, mask_row, k0, threshold, BLOCK_K, x.dtype)
                x = x * keep
            acc = tl.dot(x, a, acc, input_precision="ieee")
        if not IN_BLOCK:
            acc *= tl.load(scales_ptr + piece)
        store_tile(u_ptr, row64, stride_u0, offset + rank, stride_u1, live, rank < ranks, acc)


def down(
    plan: Plan, x: Tensor, A: Tensor, u: Tensor, copy: Tensor | None = None, in_block: bool = False
) -> None:
    """Launch `lora_down`: x [M, K], A [R, K] (or B^T [R, N] with `in_block`), u [M, R].

    `copy` is the left part [M, K] of the buffer whose right part u is.
    """
    blocks = plan.blocks.down
    plan.launch(
        lora_down, blocks, blocks.m, None, not in_block,
        dict(x=x, a=A, u=u), dict(copy_ptr=copy, K=x.shape[1]),
        HAS_COPY=copy is not None, IN_BLOCK=in_block,
    )  # fmt: skip


@triton.jit
def lora_fused(
    x_ptr, w_ptr, b_ptr, u_ptr, f_ptr, y_ptr, seed_ptr, tiles_ptr, pieces_ptr, scales_ptr,
    N, K,
    stride_x0, stride_x1, stride_w0, stride_w1, stride_u0, stride_u1, stride_f0, stride_f1,
    stride_y0, stride_y1,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, BACKWARD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x W^T + b + u B^T, or dx [M, K] = g W + c m * (v A) with BACKWARD.

    Without HAS_BASE, y holds the frozen part already and gets the terms added.
    """
    tile_ptr = tiles_ptr + tl.program_id(1) * (2 + 2 * SLOTS)
    n0 = tl.program_id(0) * BLOCK_N
    row = tl.load(tile_ptr) + tl.arange(0, BLOCK_M)
    live = row < tl.load(tile_ptr + 1)
    n = n0 + tl.arange(0, BLOCK_N)
    row64 = row.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BASE:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, row64, stride_x0, k, stride_x1, live, k < K)
            w = load_tile(w_ptr, k, stride_w1, n, stride_w0, k < K, n < N)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(x, w, acc, input_precision="ieee")
    else:
        acc += load_tile(y_ptr, row64, stride_y0, n, stride_y1, live, n < N).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    rank = tl.arange(0, BLOCK_R)
    for slot in range(SLOTS):
        piece = tl.load(tile_ptr + 2 + 2 * slot)
        if piece >= 0:
            offset, ranks, column, width, stream, threshold = load_piece(pieces_ptr, piece, ALIGN)
            # Forward terms reach their own block of columns only.
            if BACKWARD or (column < n0 + BLOCK_N and column + width > n0):
                place, known = offset + rank, rank < ranks
                u = load_tile(u_ptr, row64, stride_u0, place, stride_u1, live, known)
                f = load_tile(f_ptr, place, stride_f0, n, stride_f1, known, n < N)
                if BACKWARD:
                    term = tl.dot(u, f, input_precision="ieee") * tl.load(scales_ptr + piece)
                    if HAS_DROPOUT:
                        mask_row = row - tl.load(tile_ptr + 3 + 2 * slot)
                        keep = keep_mask(seed, stream, mask_row, n0, threshold, BLOCK_N, tl.float32)
                        term *= keep
                    acc += term
                else:
                    acc = tl.dot(u, f, acc, input_precision="ieee")
    store_tile(y_ptr, row64, stride_y0, n, stride_y1, live, n < N, acc)


def fused(
    plan: Plan, x: Any, bias: Any, u: Tensor, factor: Tensor, y: Tensor, backward: bool = False
) -> None:
    """Launch `lora_fused`; where x is None, the terms are added to y.

    x [M, K], bias [N] or None, u [M, R], factor [R, N], y [M, N]; in backward the caller names g,
    v, A and dx by these, without a bias.
    """
    blocks, W = plan.blocks.fused, plan.call.weight
    weight = None if x is None else W.T if backward else W
    plan.launch(
        lora_fused, blocks, blocks.m, triton.cdiv(y.shape[1], blocks.n), backward,
        dict(x=x, w=weight, u=u, f=factor, y=y),
        dict(b_ptr=bias, N=y.shape[1], K=0 if x is None else x.shape[1]),
        BLOCK_N=blocks.n, HAS_BASE=x is not None, HAS_BIAS=bias is not None, BACKWARD=backward,
    )  # fmt: skip
