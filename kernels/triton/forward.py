"""Forward kernels: the down-projection u, and a GEMM with the low-rank terms folded in.

Both walk tables (see `grouped.py`): a tile is up to BLOCK_M rows of one segment and the pieces
that apply there, one a slot; a piece is at most 64 ranks of one term.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.triton import tuning
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
def lora_down(
    x_ptr, a_ptr, u_ptr, copy_ptr, seed_ptr, tiles_ptr, pieces_ptr, scales_ptr,
    K,
    stride_xm, stride_ar, stride_ak, stride_um,
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
            x = load_tile(x_ptr, row64, stride_xm, first + k, 1, live, k < depth)
            # Slots of one tile run side by side, so x comes from DRAM once.
            if HAS_COPY and slot == 0:
                inside = live[:, None] & (k < depth)[None, :]
                tl.store(copy_ptr + row64[:, None] * stride_um + k[None, :], x, mask=inside)
            a = tl.load(
                a_ptr + (offset + rank)[None, :] * stride_ar + (first + k)[:, None] * stride_ak,
                mask=(rank < ranks)[None, :] & (k < depth)[:, None],
                other=0.0,
            )  # [BLOCK_K, BLOCK_R]
            if HAS_DROPOUT:
                keep = keep_mask(seed, stream, mask_row, k0, threshold, BLOCK_K, x.dtype)
                x = x * keep
            acc = tl.dot(x, a, acc, input_precision="ieee")
        if not IN_BLOCK:
            acc *= tl.load(scales_ptr + piece)
        tl.store(
            u_ptr + row64[:, None] * stride_um + (offset + rank)[None, :],
            acc.to(u_ptr.dtype.element_ty),
            mask=live[:, None] & (rank < ranks)[None, :],
        )


def down(
    x: Tensor,
    factor: Tensor,
    u: Tensor,
    plan: Plan,
    seed: Tensor | None,
    blocks: tuning.Blocks,
    *,
    copy: Tensor | None = None,
    in_block: bool = False,
) -> None:
    """Launch `lora_down`: x [M, K], factor [R, K] (or B^T [R, N] with `in_block`), u [M, R].

    `copy` is the left part [M, K] of the buffer whose right part u is.
    """
    tiles, slots = plan.tiles(blocks.m)
    pieces = plan.pieces
    tuning.launch(
        lora_down,
        (slots, len(tiles)),
        dict(
            x_ptr=x, a_ptr=factor, u_ptr=u, copy_ptr=copy, seed_ptr=seed, tiles_ptr=tiles,
            pieces_ptr=pieces.table, scales_ptr=pieces.scales, K=x.shape[1],
            stride_xm=x.stride(0), stride_ar=factor.stride(0), stride_ak=factor.stride(1),
            stride_um=u.stride(0),
        ),
        dict(
            SLOTS=slots, BLOCK_M=blocks.m, BLOCK_K=blocks.k, BLOCK_R=pieces.block_r,
            HAS_DROPOUT=pieces.has_dropout and not in_block, HAS_COPY=copy is not None,
            IN_BLOCK=in_block, ALIGN=pieces.align,
        ),
        blocks,
    )  # fmt: skip


@triton.jit
def lora_fused(
    x_ptr, w_ptr, b_ptr, u_ptr, f_ptr, y_ptr, seed_ptr, tiles_ptr, pieces_ptr, scales_ptr,
    N, K,
    stride_xm, stride_wn, stride_wk, stride_um, stride_fr, stride_fn, stride_ym,
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
    y_ptrs = y_ptr + row64[:, None] * stride_ym + n[None, :]
    inside = live[:, None] & (n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BASE:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, row64, stride_xm, k, 1, live, k < K)  # [BLOCK_M, BLOCK_K]
            w = tl.load(
                w_ptr + n[None, :] * stride_wn + k[:, None] * stride_wk,
                mask=(n < N)[None, :] & (k < K)[:, None],
                other=0.0,
            )  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(x, w, acc, input_precision="ieee")
    else:
        acc += tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32)
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
                u = load_tile(u_ptr, row64, stride_um, place, 1, live, known)
                f = load_tile(f_ptr, place, stride_fr, n, stride_fn, known, n < N)
                if BACKWARD:
                    term = tl.dot(u, f, input_precision="ieee") * tl.load(scales_ptr + piece)
                    if HAS_DROPOUT:
                        mask_row = row - tl.load(tile_ptr + 3 + 2 * slot)
                        keep = keep_mask(seed, stream, mask_row, n0, threshold, BLOCK_N, tl.float32)
                        term *= keep
                    acc += term
                else:
                    acc = tl.dot(u, f, acc, input_precision="ieee")
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)


def fused(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    u: Tensor,
    factor: Tensor,
    y: Tensor,
    plan: Plan,
    seed: Tensor | None,
    blocks: tuning.Blocks,
    *,
    backward: bool = False,
) -> None:
    """Launch `lora_fused`; without x and weight, the terms are added to y.

    x [M, K], weight [N, K], u [M, R], factor [R, N], y [M, N]; in backward the caller names g, W^T,
    v, A and dx by these.
    """
    tiles, slots = plan.tiles(blocks.m)
    pieces = plan.pieces
    tuning.launch(
        lora_fused,
        (triton.cdiv(y.shape[1], blocks.n), len(tiles)),
        dict(
            x_ptr=x, w_ptr=weight, b_ptr=bias, u_ptr=u, f_ptr=factor, y_ptr=y, seed_ptr=seed,
            tiles_ptr=tiles, pieces_ptr=pieces.table, scales_ptr=pieces.scales, N=y.shape[1],
            K=0 if x is None else x.shape[1], stride_xm=0 if x is None else x.stride(0),
            stride_wn=0 if weight is None else weight.stride(0),
            stride_wk=0 if weight is None else weight.stride(1), stride_um=u.stride(0),
            stride_fr=factor.stride(0), stride_fn=factor.stride(1), stride_ym=y.stride(0),
        ),
        dict(
            SLOTS=slots, BLOCK_M=blocks.m, BLOCK_N=blocks.n, BLOCK_K=blocks.k,
            BLOCK_R=pieces.block_r, HAS_BASE=x is not None, HAS_BIAS=bias is not None,
            HAS_DROPOUT=pieces.has_dropout and backward, BACKWARD=backward, ALIGN=pieces.align,
        ),
        blocks,
    )  # fmt: skip
