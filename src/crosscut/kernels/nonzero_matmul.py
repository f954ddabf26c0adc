"""The rows of dC of all classes that are not hot, from single nonzeros of dz.

Most elements of a selected pair are too small to matter alone. A *nonzero* (see
:mod:`.pair_gradient`) is one that matters; all others are taken for 0, and their sums stand for
them:

    dC[v] = scale * (sum_nonzeros dz[n, v] H[n]  +  sum_b column_mass[b, v] w[b])

**Nonzeros** are listed cell by cell (CELL classes), within a cell by block, slot and token:

    place[i]    token * CELL + class within the cell          value[i]    dz

    dz [slots, BLOCK_N]   . x . .          nonzeros of cell 0:  (1, v0) (3, v0) (2, v1) ..
                          . . x .  ..      nonzeros of cell 1:  ..

**Who owns what.** Program i owns tile i of dC, a cell x BLOCK_D dimensions, all dimensions of a
cell first. The work is waiting for rows, so there are many small programs. Nonzeros become a matrix
product, STEP at a time:

                            H[tokens]  [STEP, BLOCK_D]
    one value per column    +-----+
    +-----+                 |#####|
    | x x | [CELL, STEP]    +-----+      rows gathered from the L2 cache
    +-----+

Every row is written once, in one order of sums.

**Cost.** A row of H read per nonzero (from L2), dC written once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel, like_or
from crosscut.device.tiles import Tiles
from crosscut.device.workspace import Workspace
from crosscut.kernels.logits_tile import dot_tile
from crosscut.kernels.pair_gradient import PairGradient, is_nonzero_of, nonzero_size
from crosscut.kernels.selected_pairs import CELL, SelectedPairs, Shape
from crosscut.kernels.softmax_gradient import Tokens

COUNT_CELLS, LIST_SLOTS = 32, 8


class Nonzeros(NamedTuple):
    """The lists; see the module."""

    end: Tensor  # [cells * blocks] int32, nonzeros up to the end of each (cell, block)
    place: Tensor  # [most] int32
    value: Tensor  # [most], the dtype of H
    num_rows: Tensor  # [1] int32, as of the pairs; -1 too where not all of them fit
    rows_left: Tensor  # [1] int32, how many rows dC is to have otherwise; -1 if none


@kernel
def count_nonzeros_kernel(
    num_rows_ptr, num_nonzeros_ptr, cell_start_ptr, before_ptr, count_ptr, num_blocks, cells,
    CELL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Program (b, i) owns CELLS cells of block b."""
    if tl.load(num_rows_ptr) >= 0:
        block = tl.program_id(0)
        cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
        start = cell_start_ptr + block * (cells + 1) + cell
        first = tl.load(start, mask=cell < cells, other=0)
        end = tl.load(start + 1, mask=cell < cells, other=0)
        slots = first[:, None] + tl.arange(0, CELL)[None, :]  # [CELLS, CELL]
        inside = slots < end[:, None]
        count = tl.load(num_nonzeros_ptr + slots, mask=inside, other=0)
        tl.store(before_ptr + slots, tl.cumsum(count, 1) - count, mask=inside)
        tl.store(count_ptr + cell * num_blocks + block, tl.sum(count, 1), mask=cell < cells)


@kernel
def list_nonzeros_kernel(
    all_rows_ptr,
    num_rows_ptr,
    own_ptr,
    vectors_ptr,
    dz_ptr,
    columns_ptr,
    cell_start_ptr,
    threshold_ptr,
    before_ptr,  # [slots], nonzeros in earlier slots of the cell
    end_ptr,
    place_ptr,
    value_ptr,
    listed_rows_ptr,
    rows_left_ptr,
    unlisted_rows_ptr,
    num_blocks,
    cells,
    most_nonzeros,
    nonzero,
    CELL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program (i, b) owns every num_programs(0)-th tile of block b's slots."""
    block = tl.program_id(1)
    num_rows = tl.load(num_rows_ptr)
    first = tl.load(cell_start_ptr + block * (cells + 1))
    end = tl.load(cell_start_ptr + block * (cells + 1) + cells)
    if block * BLOCK_N >= num_rows:
        end = first
    nonzero *= tl.load(threshold_ptr + num_blocks + block)
    tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.load(own_ptr + tokens, mask=tokens < num_rows, other=-1)
    size = nonzero_size(vectors_ptr + tokens * 6, tokens < num_rows, nonzero)
    stride = tl.num_programs(0) * SLOTS
    for slot in range(first + tl.program_id(0) * SLOTS, end, stride):
        slots = slot + tl.arange(0, SLOTS)
        classes = tl.load(columns_ptr + slots)
        mine = slots < end
        block_dz = dz_ptr + tl.cast(slot, tl.int64) * BLOCK_N
        place = tl.arange(0, SLOTS)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        dz = tl.load(block_dz + place)  # [SLOTS, BLOCK_N]
        is_own = classes[:, None] == own[None, :]
        is_nonzero = is_nonzero_of(dz.to(tl.float32), size[None, :], is_own)
        is_nonzero &= mine[:, None]
        index = classes // CELL * num_blocks + block
        index = tl.load(end_ptr + index - 1, mask=index > 0, other=0)
        index += tl.load(before_ptr + slots, mask=mine, other=0)
        index = index[:, None] + tl.cumsum(is_nonzero.to(tl.int32), 1) - 1
        listed = is_nonzero & (index < most_nonzeros)
        tl.store(place_ptr + index, tokens[None, :] * CELL + (classes % CELL)[:, None], mask=listed)
        tl.store(value_ptr + index, dz, mask=listed)
    if (tl.program_id(0) == 0) & (block == 0):
        fits = (num_rows >= 0) & (tl.load(end_ptr + cells * num_blocks - 1) <= most_nonzeros)
        tl.store(listed_rows_ptr, tl.where(fits, num_rows, -1))
        left = tl.where(num_rows >= 0, tl.load(all_rows_ptr), tl.load(unlisted_rows_ptr))
        tl.store(rows_left_ptr, tl.where(fits, -1, left))


def nonzero_shapes(blocks: int, num_classes: int, num_slots: int) -> dict[str, Shape]:
    """What :func:`list_nonzeros` needs of a workspace, by name."""
    cells = triton.cdiv(num_classes, CELL)
    return {
        "nonzeros_before": ((num_slots,), torch.int32),
        "nonzero_count": ((cells * blocks,), torch.int32),
    }


def list_nonzeros(
    all_rows: Tensor,
    tokens: Tokens,
    pairs: SelectedPairs,
    gradient: PairGradient,
    workspace: Workspace,
    unlisted_rows: Tensor,
    *,
    most: int,
    nonzero: float,
) -> Nonzeros:
    """List the nonzeros of classes that are not hot.

    Args:
        all_rows: [1] int32, how many rows are valid, whatever ``tokens.num_rows`` says.
        tokens: the valid ones.
        pairs: the lists of pairs.
        gradient: of the pairs.
        workspace: with the regions of :func:`nonzero_shapes`.
        unlisted_rows: [1] int32, how many rows are left for others if the pairs are not listed.
        most: capacity for nonzeros.
        nonzero: as in ``gradient``.
    """
    blocks, cells = len(pairs.tail), pairs.cell_start.shape[1] - 1

    def new(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=pairs.columns.device)

    before, count = workspace["nonzeros_before"], workspace["nonzero_count"]
    count_nonzeros_kernel[(blocks, triton.cdiv(cells, COUNT_CELLS))](
        tokens.num_rows, gradient.num_nonzeros, pairs.cell_start, before, count, blocks, cells,
        CELL=CELL, CELLS=COUNT_CELLS,
    )  # fmt: skip
    found = Nonzeros(
        end=like_or(count, lambda: count.cumsum(0, dtype=torch.int32)),
        place=new(most),
        value=new(most, gradient.dz.dtype),
        num_rows=new(1),
        rows_left=new(1),
    )
    list_nonzeros_kernel[(64, blocks)](
        all_rows, tokens.num_rows, tokens.own, tokens.vectors, gradient.dz, pairs.columns,
        pairs.cell_start, pairs.threshold, before, found.end, found.place, found.value,
        found.num_rows, found.rows_left, unlisted_rows, blocks, cells, most, nonzero,
        CELL=CELL, BLOCK_N=gradient.dz.shape[1], SLOTS=LIST_SLOTS, num_warps=4,
    )  # fmt: skip
    return found


@kernel
def d_classifier_of_nonzeros_kernel(
    num_rows_ptr,
    hidden_ptr,
    end_ptr,
    place_ptr,
    value_ptr,
    hot_rank_ptr,
    column_mass_ptr,  # [blocks, columns], of the last classes
    tail_row_ptr,  # [blocks, D]
    scale_ptr,
    out_ptr,
    num_blocks,
    first_class,
    last_class,
    num_classes,
    mass_columns,
    hidden_size,
    TILE: tl.constexpr,
):
    CELL: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    STEP: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    num_rows = tl.load(num_rows_ptr)
    if num_rows >= 0:
        d_tiles = tl.cdiv(hidden_size, BLOCK_D)
        index = tl.program_id(0)
        cell = first_class // CELL + index // d_tiles
        in_cell = tl.arange(0, CELL)
        classes = cell * CELL + in_cell
        d = index % d_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        d_inside = (d < hidden_size)[None, :]
        total = tl.zeros((CELL, BLOCK_D), tl.float32)
        column = classes - (num_classes - mass_columns)
        for first in range(0, num_blocks, STEP):
            block = first + tl.arange(0, STEP)
            place = column_mass_ptr + block.to(tl.int64)[:, None] * mass_columns + column[None, :]
            inside = (block < num_blocks)[:, None] & (classes < last_class)[None, :]
            mass = tl.load(place, mask=inside, other=0.0)  # [STEP, CELL]
            place = tail_row_ptr + block[:, None] * hidden_size + d[None, :]
            inside = (block < num_blocks)[:, None] & d_inside
            row = tl.load(place, mask=inside, other=0.0)  # [STEP, BLOCK_D]
            total = dot_tile(mass.T, row, total, PRECISION)

        start = tl.load(end_ptr + cell * num_blocks - 1, mask=cell > 0, other=0)
        end = tl.load(end_ptr + (cell + 1) * num_blocks - 1)
        for first in range(start, end, STEP):
            nonzero = first + tl.arange(0, STEP)
            place = tl.load(place_ptr + nonzero, mask=nonzero < end, other=0)
            value = tl.load(value_ptr + nonzero, mask=nonzero < end, other=0.0)
            is_mine = (place % CELL)[None, :] == in_cell[:, None]
            dz = tl.where(is_mine, value[None, :], 0.0).to(value.dtype)  # [CELL, STEP]
            row = hidden_ptr + (place // CELL).to(tl.int64)[:, None] * hidden_size + d[None, :]
            h = tl.load(row, mask=d_inside, other=0.0)  # [STEP, BLOCK_D]
            total = dot_tile(dz, h, total, PRECISION)

        inside = classes < last_class
        hot = tl.load(hot_rank_ptr + classes, mask=inside, other=0) >= 0
        mask = (inside & (hot == 0))[:, None] & d_inside
        out = out_ptr + classes.to(tl.int64)[:, None] * hidden_size + d[None, :]
        total *= tl.load(scale_ptr)
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


def d_classifier_of_nonzeros(
    out: Tensor,
    classes: range,
    tokens: Tokens,
    nonzeros: Nonzeros,
    pairs: SelectedPairs,
    tail: tuple[Tensor, Tensor],
    scale: Tensor,
    tiles: Tiles,
) -> None:
    """Fill the rows of ``out`` [V, D] of classes not hot. Nothing if ``tokens.num_rows < 0``.

    Args:
        out: [V, D], contiguous.
        classes: whose rows; they begin at a multiple of CELL.
        tokens: the valid ones.
        nonzeros: the lists.
        pairs: which classes are hot.
        tail: column masses of these classes and all that follow, [blocks, their number], and rows
            ``w`` [blocks, D], both bfloat16.
        scale: [1] float32.
        tiles: BLOCK_N = CELL classes x BLOCK_V dimensions, in steps of BLOCK_D nonzeros.
    """
    cells, d_tiles = triton.cdiv(len(classes), CELL), triton.cdiv(out.shape[1], tiles.block_v)
    d_classifier_of_nonzeros_kernel[(cells * d_tiles,)](
        tokens.num_rows,
        tokens.hidden,
        nonzeros.end,
        nonzeros.place,
        nonzeros.value,
        pairs.hot_rank,
        *tail,
        scale,
        out,
        len(tail[0]),
        classes.start,
        classes.stop,
        len(out),
        tail[0].shape[1],
        out.shape[1],
        TILE=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
