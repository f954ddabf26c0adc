"""The two products of Algorithm 3 of the paper (arXiv:2411.09009), over all tiles or live ones.

With ``dz`` [R, chunk] the gradient of a chunk of logits,

    dC[chunk] = scale * dz^T H         of [chunk, D], complete: sums over all tokens
    dH       += dz C[chunk]            of [R, D], float32 or the dtype of the inputs

both written as ``out = L B``, L being ``dz`` or its transpose:

                         B  [K, D]
                       +-----+-----+
                       |     |#####|  BLOCK_K x BLOCK_D
                       +-----+-----+
    L [M, K]           out [M, D]
    +-----+-----+      +-----+-----+
    |#####|     |  --> |     | out |  BLOCK_M x BLOCK_D
    +-----+-----+      +-----+-----+

**Which steps.** All of K; or, given lists of live tiles (the paper's gradient filter), for each
TILE rows of L only the listed TILE columns.

**Who owns what.** One program per multiprocessor; program i of P owns tiles i, i + P, ... of
``out``, column tiles first: what runs at once shares few rows of L and all of B. Nobody else writes
a tile, and sums are in one order: reruns are bitwise equal.

**Cost.** 2MKD flop, less what is not listed. No workspace.

**Numerics.** Operands in their own dtype, sums in float32. Tokens past the last one are zeros in L.
A dH that is summed chunk by chunk may be two numbers of two bytes: its rounded value, and its
compensation, COMPENSATION_SCALE times what rounding left. Together they have 16 bits and more, in
no more memory than float32, and in the end the rounded value is complete in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs
from crosscut.kernels.logits_tile import column_part, dot_tile

TILE = 128
"""Tokens, and classes, of a tile of the filter."""

LIVE_TILE = tl.constexpr(TILE)

COMPENSATION_SCALE = tl.constexpr(2.0**11)
"""What rounding leaves is stored times this: as it is, it may be too small for float16."""


class LiveTiles(NamedTuple):
    """For each TILE rows of L, which TILE columns of it are not zero."""

    count: Tensor  # [M tiles] int32
    columns: Tensor  # [M tiles, K tiles] int32; of row i the first ``count[i]`` count


@kernel
def live_tiles_kernel(
    alive_ptr, count_ptr, columns_ptr, num_columns, stride_m, stride_k, BLOCK: tl.constexpr
):
    """Program i lists the live tiles of row i."""
    row = tl.program_id(0)
    count = 0
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place = alive_ptr + row * stride_m + column * stride_k
        alive = tl.load(place, mask=column < num_columns, other=0).to(tl.int32)
        index = count + tl.cumsum(alive, 0) - 1
        tl.store(columns_ptr + row * num_columns + index, column, mask=alive > 0)
        count += tl.sum(alive, 0)
    tl.store(count_ptr + row, count)


def live_tiles(alive: Tensor) -> LiveTiles:
    """The lists for ``alive`` [M tiles, K tiles] int8, 0 or 1."""
    rows, columns = alive.shape
    live = LiveTiles(
        torch.empty(rows, dtype=torch.int32, device=alive.device),
        torch.empty(rows, columns, dtype=torch.int32, device=alive.device),
    )
    live_tiles_kernel[(rows,)](alive, *live, columns, *alive.stride(), BLOCK=128, num_warps=1)
    return live


@kernel
def tile_matmul_kernel(
    left_ptr,
    left_desc,
    right_ptr,
    right_desc,
    live,  # LiveTiles, or None for all
    num_rows_ptr,
    scale_ptr,
    out_rows_ptr,
    row_sum_ptr,
    out_ptr,
    compensation_ptr,
    begin,
    num_classes,
    hidden_size,
    most_live,
    stride_left,
    stride_right,
    stride_right_d,
    OF_CLASSES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    OVERWRITE_FIRST: tl.constexpr,
    TILES: tl.constexpr,
):
    BLOCK_M: tl.constexpr = TILES[0]
    BLOCK_D: tl.constexpr = TILES[1]
    BLOCK_K: tl.constexpr = TILES[2]
    PRECISION: tl.constexpr = TILES[3]
    tl.static_assert(live is None or BLOCK_K == LIVE_TILE)
    num_rows = tl.load(num_rows_ptr)
    if OF_CLASSES:
        m_size, k_size = num_classes, num_rows
    else:
        m_size, k_size = num_rows, num_classes
    d_tiles = tl.cdiv(hidden_size, BLOCK_D)
    tiles = tl.where(num_rows < 0, 0, tl.cdiv(m_size, BLOCK_M) * d_tiles)

    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_m = index // d_tiles * BLOCK_M
        first_d = index % d_tiles * BLOCK_D
        m = first_m + tl.arange(0, BLOCK_M)
        d = first_d + tl.arange(0, BLOCK_D)
        if live is None:
            steps = tl.cdiv(k_size, BLOCK_K)
        else:
            live_columns = live.columns + first_m // LIVE_TILE * most_live
            steps = tl.load(live.count + first_m // LIVE_TILE)

        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for step in range(0, steps):
            first_k = step * BLOCK_K
            if live is not None:
                first_k = tl.load(live_columns + step) * BLOCK_K
            k = first_k + tl.arange(0, BLOCK_K)
            # [BLOCK_M, BLOCK_K]
            if left_desc is not None:
                if OF_CLASSES:
                    left = left_desc.load([first_k, first_m]).T
                else:
                    left = left_desc.load([first_m, first_k])
            else:
                inside = (m < m_size)[:, None] & (k < k_size)[None, :]
                if OF_CLASSES:
                    place = k.to(tl.int64)[None, :] * stride_left + m[:, None]
                else:
                    place = m.to(tl.int64)[:, None] * stride_left + k[None, :]
                left = tl.load(left_ptr + place, mask=inside, other=0.0)
            if row_sum_ptr is not None:
                row_sum += tl.sum(left.to(tl.float32), 1)
            # [BLOCK_K, BLOCK_D]
            if right_desc is not None:
                right = right_desc.load([begin + first_k, first_d])
            else:
                inside = (k < k_size)[:, None] & (d < hidden_size)[None, :]
                place = (begin + k).to(tl.int64)[:, None] * stride_right
                place += d.to(tl.int64)[None, :] * stride_right_d
                right = tl.load(right_ptr + place, mask=inside, other=0.0)
            total = dot_tile(left, right, total, PRECISION)

        if row_sum_ptr is not None:
            tl.store(row_sum_ptr + m, row_sum, mask=(m < m_size) & (first_d == 0))
        rows = m.to(tl.int64)
        if out_rows_ptr is not None:
            rows = tl.load(out_rows_ptr + m, mask=m < m_size, other=0).to(tl.int64)
        for part in tl.static_range(4):
            d = first_d + part * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
            value = column_part(total, part, 4, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D / 4]
            if scale_ptr is not None:
                value *= tl.load(scale_ptr)
            place = rows[:, None] * hidden_size + d[None, :]
            inside = (m < m_size)[:, None] & (d < hidden_size)[None, :]
            if ACCUMULATE:
                before = inside
                if OVERWRITE_FIRST:
                    before &= begin > 0
                if compensation_ptr is not None:
                    left_over = tl.load(compensation_ptr + place, mask=before, other=0.0)
                    value += left_over.to(tl.float32) * (1 / COMPENSATION_SCALE)
                value += tl.load(out_ptr + place, mask=before, other=0.0).to(tl.float32)
            rounded = value.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + place, rounded, mask=inside)
            if compensation_ptr is not None:
                left_over = (value - rounded.to(tl.float32)) * COMPENSATION_SCALE
                left_over = left_over.to(compensation_ptr.dtype.element_ty)
                tl.store(compensation_ptr + place, left_over, mask=inside)


def _launch(
    dz: Tensor,
    right: Tensor,
    num_rows: Tensor,
    live: LiveTiles | None,
    out: Tensor,
    tiles: Tiles,
    to_classes: tuple[Tensor, Tensor | None] | None,
) -> None:
    """Of dC ``to_classes`` is ``scale`` and ``out_rows``, of dH None."""
    of_classes = to_classes is not None
    scale, out_rows = to_classes or (None, None)
    left_block = (tiles.block_d, tiles.block_n) if of_classes else (tiles.block_n, tiles.block_d)
    tile_matmul_kernel[(num_programs(dz.device),)](
        dz,
        descriptor(dz, left_block, tiles),
        right,
        descriptor(right, (tiles.block_d, tiles.block_v), tiles),
        live,
        num_rows,
        scale,
        out_rows,
        None,
        out,
        None,
        0,
        dz.shape[1],
        right.shape[1],
        0 if live is None else live.columns.shape[1],
        dz.stride(0),
        *right.stride(),
        OF_CLASSES=of_classes,
        ACCUMULATE=not of_classes,
        OVERWRITE_FIRST=False,
        TILES=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def d_classifier_of_chunk(
    out: Tensor,
    dz: Tensor,
    hidden: Tensor,
    num_rows: Tensor,
    live: LiveTiles | None,
    tiles: Tiles,
    *,
    scale: Tensor,
    out_rows: Tensor | None,
) -> None:
    """``out[out_rows] = scale * dz[:R]^T hidden[:R]``, complete.

    Args:
        out: [V, D], contiguous.
        dz: [N, chunk], contiguous rows; zeros from R up to the end of R's tile of TILE.
        hidden: [N, D], finite in the same rows.
        num_rows: R, [1] int32; nothing is done where it is negative.
        live: of TILE classes, the TILEs of tokens; None for all.
        tiles: BLOCK_N classes x BLOCK_V dimensions, in steps of BLOCK_D tokens; of TILE where
            there is ``live``.
        scale: [1] float32.
        out_rows: [chunk] int64, or None for the first ``chunk`` rows in order.
    """
    _launch(dz, hidden, num_rows, live, out, tiles, (scale, out_rows))


def add_d_hidden_of_chunk(
    out: Tensor,
    dz: Tensor,
    classifier: Tensor,
    num_rows: Tensor,
    live: LiveTiles | None,
    tiles: Tiles,
) -> None:
    """``out[:R] += dz[:R] classifier``, rounded to the dtype of ``out``.

    Args:
        out: [N, D], contiguous.
        dz: [N, chunk], contiguous rows.
        classifier: [chunk, D].
        num_rows: R, [1] int32; nothing is done where it is negative.
        live: of TILE tokens, the TILEs of classes; None for all.
        tiles: BLOCK_N tokens x BLOCK_V dimensions, in steps of BLOCK_D classes; of TILE where
            there is ``live``.
    """
    _launch(dz, classifier, num_rows, live, out, tiles, None)
