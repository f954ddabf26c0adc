"""The products of Algorithm 3 over selected pairs: dH, and the hot classes' rows of dC.

With ``dz`` [slots, BLOCK_N] as :mod:`.pair_gradient` stores it, of hot classes ``dz``
[hot, N],

    dH[n]   = scale * (sum_r dz[r, n] head[r] + sum_slot dz[slot, n] C[columns[slot]]  +  x[n] u[b])
    dC[v]   = scale * sum_n dz[r, n] H[n]                     n in block b, v the r-th hot class

the last term of dH being the tail's: ``x`` [N] what stands for it by token, ``u[b] = sum_v
column_mass[b, v] C[v]`` by block. A hot class has no tail. ``head`` is :func:`gather_hot_head`'s.

                head, C[columns] [slots of b, D]                H  [N, D]
                +-----+-----+                                  +-----+-----+
                |     |#####|  STEP x BLOCK_D                  |     |#####|  STEP x BLOCK_D
                +-----+-----+                                  +-----+-----+
    dz^T        dH [block b, D]                 dz             dC [hot, D]
    +-----+     +-----+-----+                   +-----+-----+  +-----+-----+
    |#####| --> |     |     |                   |#####|     |->|     |     |
    +-----+     +-----+-----+                   +-----+-----+  +-----+-----+

**Who owns what.** One program a multiprocessor; program i of P owns tiles i, i + P, ... of the
result: of dH the same D_GROUP tiles of dimensions for all blocks, then the next. What runs at once
gathers from few columns of C, and dz comes from memory once a group. Every row of dH, and every
hot row of dC, is written once. Those of deferred classes, whose memory is still lent (see
:mod:`crosscut.device.workspace`), are written beside it, and :func:`deferred_rows` brings each to
its place. Sums are in one order.

**Cost.** 2 flop a (pair, token, dimension).
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs
from crosscut.kernels.logits_tile import column_part, dot_tile
from crosscut.kernels.move_rows import move_to
from crosscut.kernels.selected_pairs import SelectedPairs
from crosscut.kernels.softmax_gradient import Tokens

D_GROUP = tl.constexpr(4)
"""Tiles of dimensions that are worked on at a time."""


@kernel
def gather_hot_head_kernel(
    hot_ptr, hot_count_ptr, classifier_ptr, out_ptr, hidden_size, stride_v, stride_d,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program i owns every num_programs(0)-th ROWS rows."""
    count = tl.cdiv(tl.load(hot_count_ptr), SLOTS) * SLOTS
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        classes = tl.load(hot_ptr + rows).to(tl.int64)
        move_to(
            out_ptr, rows.to(tl.int64), count, classifier_ptr, classes, None, hidden_size,
            stride_v, stride_d, BLOCK_D,
        )  # fmt: skip


def gather_hot_head(
    out: Tensor, classifier: Tensor, pairs: SelectedPairs, *, block_slots: int
) -> None:
    """Fill ``out`` [len(hot), D] with rows of ``classifier`` [V, D], those of hot classes.

    And zeros up to a multiple of ``block_slots`` rows; anything beyond.
    """
    gather_hot_head_kernel[(8 * num_programs(out.device),)](
        pairs.hot, pairs.hot_count, classifier, out, out.shape[1], *classifier.stride(),
        SLOTS=block_slots, ROWS=8, BLOCK_D=256,
    )  # fmt: skip


@kernel
def d_hidden_of_pairs_kernel(
    num_rows_ptr,
    rows_ptr,
    dz_ptr,
    dz_desc,  # [slots, BLOCK_N]
    hot_dz_desc,  # [hot, blocks * BLOCK_N]
    head_ptr,
    head_desc,
    classifier_ptr,
    columns_ptr,
    cell_start_ptr,
    hot_count_ptr,
    tail_ptr,  # [N]
    tail_row_ptr,  # [blocks, D]
    scale_ptr,
    out_ptr,
    num_blocks,
    cells,
    hidden_size,
    stride_v,
    stride_d,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    STEP: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    num_rows = tl.load(num_rows_ptr)
    blocks = tl.cdiv(tl.maximum(num_rows, 0), BLOCK_N)
    d_tiles = tl.cdiv(hidden_size, BLOCK_D)
    num_hot = tl.load(hot_count_ptr)
    in_block = tl.arange(0, BLOCK_N)
    for index in range(tl.program_id(0), blocks * d_tiles, tl.num_programs(0)):
        group = index // (blocks * D_GROUP) * D_GROUP
        width = tl.minimum(d_tiles - group, D_GROUP)
        block = (index - group * blocks) // width
        first_d = (group + (index - group * blocks) % width) * BLOCK_D
        d = first_d + tl.arange(0, BLOCK_D)
        d_inside = (d < hidden_size)[None, :]
        start = tl.load(cell_start_ptr + block * (cells + 1))
        end = tl.load(cell_start_ptr + block * (cells + 1) + cells)
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for first in range(0, num_hot, STEP):
            rank = (first + tl.arange(0, STEP)).to(tl.int64)[:, None]
            if hot_dz_desc is not None:
                dz = hot_dz_desc.load([first, block * BLOCK_N])
            else:
                dz = tl.load(dz_ptr + (rank * num_blocks + block) * BLOCK_N + in_block[None, :])
            if head_desc is not None:
                c = head_desc.load([first, first_d])
            else:
                place = head_ptr + rank * hidden_size + d[None, :]
                c = tl.load(place, mask=d_inside, other=0.0)  # [STEP, BLOCK_D]
            total = dot_tile(dz.T, c, total, PRECISION)
        classifier_columns = classifier_ptr + d.to(tl.int64)[None, :] * stride_d
        for slot in range(start, end, STEP):
            slots = slot + tl.arange(0, STEP)
            if dz_desc is not None:
                dz = dz_desc.load([slot, 0])
            else:
                dz = tl.load(dz_ptr + slots.to(tl.int64)[:, None] * BLOCK_N + in_block[None, :])
            classes = tl.load(columns_ptr + slots).to(tl.int64)
            place = classifier_columns + classes[:, None] * stride_v
            c = tl.load(place, mask=d_inside, other=0.0)  # [STEP, BLOCK_D]
            total = dot_tile(dz.T, c, total, PRECISION)

        tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = tokens < num_rows
        rows = tl.load(rows_ptr + tokens, mask=valid, other=0).to(tl.int64)
        tail = tl.load(tail_ptr + tokens)
        for part in tl.static_range(4):
            d = first_d + part * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
            d_inside = d < hidden_size
            value = column_part(total, part, 4, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D / 4]
            tail_row = tl.load(tail_row_ptr + block * hidden_size + d, mask=d_inside, other=0.0)
            value = (value + tail[:, None] * tail_row[None, :]) * tl.load(scale_ptr)
            place = out_ptr + rows[:, None] * hidden_size + d[None, :]
            inside = valid[:, None] & d_inside[None, :]
            tl.store(place, value.to(out_ptr.dtype.element_ty), mask=inside)


def d_hidden_of_pairs(
    out: Tensor,
    valid: tuple[Tokens, Tensor],
    dz: Tensor,
    heads: tuple[Tensor, Tensor],
    pairs: SelectedPairs,
    tail: tuple[Tensor, Tensor],
    scale: Tensor,
    tiles: Tiles,
) -> None:
    """Fill the valid rows of ``out`` [N, D]. Nothing if ``num_rows`` is negative.

    Args:
        out: [N, D], contiguous.
        valid: the valid tokens, and their positions [N] int32.
        dz: [slots, BLOCK_N], zeros in the padding.
        heads: C [V, D], and its rows of hot classes, of :func:`gather_hot_head`.
        pairs: the lists; a block's slots are a multiple of BLOCK_D (the step).
        tail: [N] float32 by token and [blocks, D] float32 by block.
        scale: [1] float32.
        tiles: BLOCK_N tokens x BLOCK_V dimensions, in steps of BLOCK_D slots.
    """
    (tokens, rows), (classifier, hot_head) = valid, heads
    d_hidden_of_pairs_kernel[(num_programs(out.device),)](
        tokens.num_rows,
        rows,
        dz,
        descriptor(dz, (tiles.block_d, tiles.block_n), tiles),
        descriptor(hot_dz(dz, pairs), (tiles.block_d, tiles.block_n), tiles),
        hot_head,
        descriptor(hot_head, (tiles.block_d, tiles.block_v), tiles),
        classifier,
        pairs.columns,
        pairs.cell_start,
        pairs.hot_count,
        *tail,
        scale,
        out,
        len(pairs.tail),
        pairs.cell_start.shape[1] - 1,
        out.shape[1],
        *classifier.stride(),
        TILE=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def hot_dz(dz: Tensor, pairs: SelectedPairs) -> Tensor:
    """That of hot classes, of ``dz`` [slots, BLOCK_N]: [hot and more, blocks * BLOCK_N]."""
    blocks = len(pairs.tail)
    return dz[: len(dz) // blocks * blocks].view(-1, blocks * dz.shape[1])


@kernel
def d_classifier_of_hot_kernel(
    num_rows_ptr,
    hidden_ptr,
    hidden_desc,
    dz_ptr,  # [hot, tokens]
    dz_desc,
    hot_ptr,
    hot_count_ptr,
    scale_ptr,
    out_ptr,
    deferred_ptr,
    num_blocks,
    hidden_size,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_V: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    STEP: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    num_rows = tl.load(num_rows_ptr)
    tokens = tl.cdiv(tl.maximum(num_rows, 0), BLOCK_N) * BLOCK_N
    d_tiles = tl.cdiv(hidden_size, BLOCK_D)
    count = tl.load(hot_count_ptr)
    tiles = tl.where(num_rows < 0, 0, tl.cdiv(count, BLOCK_V) * d_tiles)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_rank = index // d_tiles * BLOCK_V
        rank = first_rank + tl.arange(0, BLOCK_V)
        first_d = index % d_tiles * BLOCK_D
        d = first_d + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
        for first in range(0, tokens, STEP):
            token = first + tl.arange(0, STEP)
            if dz_desc is not None:
                dz = dz_desc.load([first_rank, first])
            else:
                row = rank.to(tl.int64)[:, None] * num_blocks * BLOCK_N
                dz = tl.load(
                    dz_ptr + row + token[None, :], mask=(rank < count)[:, None], other=0.0
                )  # [BLOCK_V, STEP]
            if hidden_desc is not None:
                h = hidden_desc.load([first, first_d])
            else:
                place = hidden_ptr + token.to(tl.int64)[:, None] * hidden_size + d[None, :]
                h = tl.load(place, mask=(d < hidden_size)[None, :], other=0.0)
            total = dot_tile(dz, h, total, PRECISION)

        classes = tl.load(hot_ptr + rank, mask=rank < count, other=0).to(tl.int64)
        for part in tl.static_range(4):
            d = first_d + part * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
            value = column_part(total, part, 4, BLOCK_V, BLOCK_D) * tl.load(scale_ptr)
            value = value.to(out_ptr.dtype.element_ty)
            inside = (rank < count)[:, None] & (d < hidden_size)[None, :]
            place = classes[:, None] * hidden_size + d[None, :]
            if deferred_ptr is None:
                tl.store(out_ptr + place, value, mask=inside)
            else:
                deferred = rank - tl.load(hot_count_ptr + 1)
                tl.store(out_ptr + place, value, mask=inside & (deferred < 0)[:, None])
                place = deferred[:, None] * hidden_size + d[None, :]
                tl.store(deferred_ptr + place, value, mask=inside & (deferred >= 0)[:, None])


@kernel
def deferred_rows_kernel(
    num_rows_ptr, hot_ptr, hot_count_ptr, deferred_ptr, out_ptr, hidden_size,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program i owns deferred rows i, i + P, ..."""
    early = tl.load(hot_count_ptr + 1)
    deferred = tl.where(tl.load(num_rows_ptr) < 0, 0, tl.load(hot_count_ptr) - early)
    for row in range(tl.program_id(0), deferred, tl.num_programs(0)):
        target = tl.load(hot_ptr + early + row).to(tl.int64) * hidden_size
        for first in range(0, hidden_size, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            value = tl.load(deferred_ptr + row * hidden_size + d, mask=d < hidden_size)
            tl.store(out_ptr + target + d, value, mask=d < hidden_size)


def deferred_rows(out: Tensor, deferred: Tensor, tokens: Tokens, pairs: SelectedPairs) -> None:
    """Put the rows of ``deferred`` in their places in ``out``; see :func:`d_classifier_of_hot`."""
    deferred_rows_kernel[(num_programs(out.device),)](
        tokens.num_rows, pairs.hot, pairs.hot_count, deferred, out, out.shape[1], BLOCK_D=1024
    )


def d_classifier_of_hot(
    out: Tensor,
    deferred: Tensor | None,
    tokens: Tokens,
    dz: Tensor,
    pairs: SelectedPairs,
    scale: Tensor,
    tiles: Tiles,
) -> None:
    """Fill the rows of ``out`` [V, D] of hot classes. Nothing if ``tokens.num_rows < 0``.

    Args:
        out: [V, D], contiguous.
        deferred: [most_deferred, D], gets the rows of deferred classes in place of ``out``; None if
            there are none.
        tokens: the valid ones, zeros up to a multiple of BLOCK_N.
        dz: [slots, BLOCK_N].
        pairs: the lists.
        scale: [1] float32.
        tiles: BLOCK_N classes x BLOCK_V dimensions, in steps of BLOCK_D tokens.
    """
    matrix = hot_dz(dz, pairs)
    d_classifier_of_hot_kernel[(num_programs(out.device),)](
        tokens.num_rows,
        tokens.hidden,
        descriptor(tokens.hidden, (tiles.block_d, tiles.block_v), tiles),
        matrix,
        descriptor(matrix, (tiles.block_n, tiles.block_d), tiles),
        pairs.hot,
        pairs.hot_count,
        scale,
        out,
        deferred,
        len(pairs.tail),
        out.shape[1],
        BLOCK_N=dz.shape[1],
        TILE=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
