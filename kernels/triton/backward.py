"""Backward kernels: dA (or dB) as partial sums over chunks of rows, dx in the same pass, the sum.

Two stages and no atomics, so that a gradient is the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.triton import tuning
from fastlora.kernels.triton.forward import load_piece, load_tile, store_tile
from fastlora.kernels.triton.grouped import Plan
from fastlora.kernels.triton.mask import keep_mask


@triton.jit
def lora_outer(
    x_ptr, v_ptr, a_ptr, b_ptr, dx_ptr, partial_ptr, seed_ptr, tiles_ptr, pieces_ptr, scales_ptr,
    K,
    stride_x0, stride_x1, stride_v0, stride_v1, stride_a0, stride_a1, stride_b0, stride_b1,
    stride_dx0, stride_dx1,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_DX: tl.constexpr, IN_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """partial [chunk, slot, BLOCK_R, K] = c v^T (m * x); dx [M, K] = base + c m * (v A).

    With IN_BLOCK, x is the output's gradient and v is u: partial = u^T g over the piece's columns.
    """
    chunk = tl.program_id(1)
    chunk_ptr = tiles_ptr + chunk * (2 + 2 * SLOTS)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    start, stop = tl.load(chunk_ptr), tl.load(chunk_ptr + 1)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    for slot in range(SLOTS):
        piece = tl.load(chunk_ptr + 2 + 2 * slot)
        if piece >= 0:
            origin = tl.load(chunk_ptr + 3 + 2 * slot)
            offset, ranks, column, width, stream, threshold = load_piece(pieces_ptr, piece, ALIGN)
            column0, depth, scale = 0, K, tl.load(scales_ptr + piece)
            if IN_BLOCK:
                column0, depth, scale = column, width, 1.0
            acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
            if HAS_DX:
                a = load_tile(a_ptr, offset + rank, stride_a0, k, stride_a1, rank < ranks, k < K)
            for first in range(start, stop, BLOCK_M):
                row = first + tl.arange(0, BLOCK_M)
                live = row < stop
                row64 = row.to(tl.int64)
                x = load_tile(x_ptr, row64, stride_x0, column0 + k, stride_x1, live, k < depth)
                v = load_tile(v_ptr, row64, stride_v0, offset + rank, stride_v1, live, rank < ranks)
                if HAS_DROPOUT:
                    # One draw serves dA and dx.
                    keep = keep_mask(seed, stream, row - origin, k0, threshold, BLOCK_K, x.dtype)
                    x = x * keep
                acc = tl.dot(tl.trans(v), x, acc, input_precision="ieee")
                if HAS_DX:
                    branch = tl.dot(v, a, input_precision="ieee") * scale
                    if HAS_DROPOUT:
                        branch *= keep.to(tl.float32)
                    if slot == 0:
                        part = load_tile(b_ptr, row64, stride_b0, k, stride_b1, live, k < K)
                    else:
                        part = load_tile(dx_ptr, row64, stride_dx0, k, stride_dx1, live, k < K)
                    branch += part.to(tl.float32)
                    store_tile(dx_ptr, row64, stride_dx0, k, stride_dx1, live, k < K, branch)
            partial_row = (chunk * SLOTS + slot).to(tl.int64) * BLOCK_R + rank
            tl.store(
                partial_ptr + partial_row[:, None] * K + k[None, :],
                acc * scale,
                mask=(k < K)[None, :],
            )
        # The next slot reads the dx that other threads of this program wrote.
        tl.debug_barrier()


@triton.jit
def lora_reduce(
    partial_ptr, d_ptr, tiles_ptr, pieces_ptr,
    PARTIALS, K,
    SLOTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d [R, K] = sum of the partials of each piece: a row of d, BLOCK_C partials at a time."""
    piece, rank = tl.program_id(0) // BLOCK_R, tl.program_id(0) % BLOCK_R
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for first in range(0, PARTIALS, BLOCK_C):
        i = first + tl.arange(0, BLOCK_C)
        entry = tiles_ptr + (i // SLOTS) * (2 + 2 * SLOTS) + 2 + 2 * (i % SLOTS)
        mine = tl.load(entry, mask=i < PARTIALS, other=-1) == piece
        acc += load_tile(partial_ptr, i.to(tl.int64) * BLOCK_R + rank, K, k, 1, mine, k < K)
    offset, ranks = tl.load(pieces_ptr + piece * 6), tl.load(pieces_ptr + piece * 6 + 1)
    if rank < ranks:
        d_row = (offset + rank).to(tl.int64) * K
        tl.store(d_ptr + d_row + k, tl.sum(acc, 0), mask=k < K)


def outer(
    plan: Plan,
    x: Tensor,
    v: Tensor,
    A: Any = None,
    base: Any = None,
    dx: Any = None,
    width: int = 0,
) -> Tensor:
    """dA [R, K] fp32 from x [M, K] and v [M, R] (two launches).

    With `base` [M, K], also dx = base + c m * (v A); it may be dx itself, and must be where rows
    have no term. A [R, K].

    With `width`, the widest block: dB^T [R, width] from the output's gradient and u instead.
    """
    pieces, blocks, K = plan.pieces, plan.blocks.outer, width or x.shape[1]
    chunks, slots = plan.tiles(blocks.chunk)
    partial = x.new_empty(len(chunks), slots, pieces.block_r, K, dtype=torch.float32)
    plan.launch(
        lora_outer, blocks, blocks.chunk, triton.cdiv(K, blocks.k), not width,
        dict(x=x, v=v, a=A, b=base, dx=dx), dict(partial_ptr=partial, K=K),
        HAS_DX=base is not None, IN_BLOCK=width > 0,
    )  # fmt: skip
    d = x.new_empty(pieces.ranks, K, dtype=torch.float32)
    tables = dict(tiles_ptr=chunks, pieces_ptr=pieces.table)
    tuning.launch(
        lora_reduce,
        # Pieces first: only a grid's first axis goes beyond 65,535.
        (len(pieces.terms) * pieces.block_r, triton.cdiv(K, blocks.k)),
        dict(partial_ptr=partial, d_ptr=d, PARTIALS=len(chunks) * slots, K=K, **tables),
        dict(SLOTS=slots, BLOCK_C=32, BLOCK_K=blocks.k, BLOCK_R=pieces.block_r),
        blocks,
    )
    return d
