"""The pairs (block of tokens, class) that a filtered gradient computes, listed on the device.

The forward leaves ``column_mass`` [blocks, V]: of each pair the mass, SELECTED at the tokens' own
classes. A pair is selected where it reaches the threshold of its block: that of the first level
which leaves no more to the block's tail than its budget, or 0, which selects all of the block,
where none does. Of a block whose tokens have no gradient nothing but own classes is selected.

**The budget** of a block of n tokens, with ``w = |factor| rest`` the size of a token's gradient,

    sum_v mass[b, v] over the tail  <=  most_tail * (mean |lse|) * (sum_n w)^2 / sum_n w^2

What rounding does to a low-precision softmax grows with the size of the logits, and so does what
may be left out. The last factor is the number of tokens that have the gradient: n where all w are
equal, 1 where one token has all of it, and may have all of the tail too. The mean is weighted by w.

Classes selected in at least half of the blocks are *hot*: few, and with most of the pairs. They are
selected in every block, and are a small head of their own. ``hot`` lists them, in ascending order.
The other selected pairs become, without the host knowing how many there are,

    columns[slot]          the class of each pair. Slots go block by block, and within a block by
                           class. A block's slots begin at a multiple of SLOTS.
    cell_start[b, t]       first slot of block b whose class is in cell t (CELL classes) or later

                   classes ->   cell 0   cell 1   cell 2
    hot, in all blocks          slots  0..                       padding
    block 0                     0 1 2    3        4 5 6          padding
    block 1                     ..

The first slots are those of hot classes, of the r-th in block b ``r * blocks + b``: their dz is a
matrix [hot, tokens]. All other pairs are the tail, whose masses are left side by side. Hot classes
from ``deferred_from`` on are *deferred*: there is less memory for them. Those for which there is
none are treated as any other class.

**When not.** Where there are more pairs than slots, nothing is to be made of these lists, and
``num_rows`` says so to whoever comes next. ``swept_rows`` then says whether the same pairs are to
be computed in another way, or ``exact_rows`` that all pairs are: where more than a share
``most_swept`` of them is selected.

**Who owns what.** Six launches. In the first a program owns a range of classes, and sums the tails
that each threshold leaves in each block. In the second one owns a block, and chooses its threshold.
In the third one owns a range of classes, in all blocks, and finds the hot ones. In the fourth one
owns two cells, in all blocks, ranks its hot classes, and counts the other pairs. In the fifth one
owns a block, and sums the counts before each of its cells. In the sixth one owns LIST_CELLS cells
of a block, and lists. Only whole numbers are added by atomics. Bytes: five times
``column_mass``, and 4 a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.workspace import Workspace
from crosscut.kernels.softmax_gradient import Tokens

CELL = 64
"""Classes of a cell."""

COUNT_CELLS, LIST_CELLS = 2, 32
PLACE_CELLS = 8192
SURVEY_CLASSES, SURVEYORS = 128, 512

LEVELS = 16
"""Thresholds that a block can have. Level i selects a pair from a mass of 2**(-i / 2) on."""

ANY_MASS = tl.constexpr(3e38)
"""A threshold that only own classes reach."""


Shape = tuple[tuple[int, ...], torch.dtype]
"""Of a region in a workspace."""


class SelectedPairs(NamedTuple):
    """The lists; see the module. What is past the last one is undefined unless said otherwise."""

    columns: Tensor  # [slots] int32; 0 in the padding, undefined in slots of hot classes
    cell_start: Tensor  # [blocks, cells + 1] int32
    column_mass: Tensor  # [blocks, V], 0 at selected pairs, and in blocks without tokens
    tail: Tensor  # [blocks] float32, sums of ``column_mass``
    threshold: Tensor  # [2, blocks] float32: of pairs, and that of a level, for nonzeros
    hot: Tensor  # [most_hot and padding] int32; -1 in the padding
    hot_count: Tensor  # [2] int32: how many, and how many are not deferred
    hot_rank: Tensor  # [V] int32, -1 for others
    num_rows: Tensor  # [1] int32, the valid rows; -1 if the pairs are of no use
    swept_rows: Tensor  # [1] int32, the valid rows if the pairs are for :mod:`.pair_sweep`, else -1
    exact_rows: Tensor  # [1] int32, the valid rows if all pairs are to be computed, else -1


@triton.jit
def is_selected(mass, threshold):
    """Whether a pair is; a NaN is."""
    return (mass < threshold) == 0


@triton.jit
def threshold_of(level):
    return tl.exp2(level.to(tl.float32) * -0.5)


@kernel
def survey_kernel(
    column_mass_ptr, num_rows_ptr, tails_ptr, num_blocks, num_classes, range_classes,
    BLOCK_N: tl.constexpr, CLASSES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Program i owns a range of classes: the tails [blocks, levels, programs] they have."""
    ROWS: tl.constexpr = 4
    blocks = tl.cdiv(tl.load(num_rows_ptr), BLOCK_N)
    program, programs = tl.program_id(0), tl.num_programs(0)
    level = tl.arange(0, LEVELS)
    threshold = threshold_of(level)[None, :, None]
    end = tl.minimum((program + 1) * range_classes, num_classes)
    for start in range(0, num_blocks, ROWS):
        block = start + tl.arange(0, ROWS)
        rows = column_mass_ptr + block.to(tl.int64)[:, None] * num_classes
        # By place in a tile. Sums over a tile cross threads: they come in the end.
        tail = tl.zeros((ROWS, LEVELS, CLASSES), tl.float32)
        for first in range(program * range_classes, end, CLASSES):
            classes = first + tl.arange(0, CLASSES)
            inside = (block < blocks)[:, None] & (classes < end)[None, :]
            mass = tl.load(rows + classes[None, :], mask=inside, other=0.0).to(tl.float32)
            mass = mass[:, None, :]
            tail += tl.where(is_selected(mass, threshold), 0.0, mass)
        place = (block[:, None] * LEVELS + level[None, :]) * programs + program
        tl.store(tails_ptr + place, tl.sum(tail, 2), mask=(block < num_blocks)[:, None])


@kernel
def choose_thresholds_kernel(
    num_rows_ptr, vectors_ptr, tails_ptr, threshold_ptr, surveyors, most_tail,
    VECTORS: tl.constexpr, BLOCK_N: tl.constexpr, SURVEYORS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Program b owns block b."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mine = tokens < tl.load(num_rows_ptr)
    lse = tl.load(vectors_ptr + tokens * VECTORS, mask=mine, other=0.0)
    factor = tl.load(vectors_ptr + tokens * VECTORS + 1, mask=mine, other=0.0)
    rest = tl.load(vectors_ptr + tokens * VECTORS + 5, mask=mine, other=0.0)
    has_say = tl.max((factor != 0).to(tl.int32), 0) > 0
    size = tl.abs(factor) * rest
    largest = tl.max(size, 0)  # squares of what is left of it neither overflow nor vanish
    size = tl.where(largest > 0, size / largest, 0.0)
    squares = tl.sum(size * size, 0)
    budget = most_tail * tl.sum(size * tl.abs(lse), 0) * tl.sum(size, 0)
    budget = tl.where(squares > 0, budget / squares, 0.0)
    level, surveyor = tl.arange(0, LEVELS), tl.arange(0, SURVEYORS)
    place = tails_ptr + (block * LEVELS + level)[:, None] * surveyors + surveyor[None, :]
    tail = tl.sum(tl.load(place, mask=(surveyor < surveyors)[None, :], other=0.0), 1)  # [LEVELS]
    fits = tail <= budget
    lowest = tl.min(tl.where(fits, level, LEVELS), 0)
    threshold = tl.where(lowest < LEVELS, threshold_of(lowest), 0.0)
    tl.store(threshold_ptr + block, tl.where(has_say, threshold, ANY_MASS))
    tl.store(threshold_ptr + num_blocks + block, threshold_of(tl.minimum(lowest, LEVELS - 1)))


@kernel
def hot_kernel(
    column_mass_ptr, num_rows_ptr, threshold_ptr, hot_ptr, is_hot_ptr, num_blocks,
    num_classes, range_classes, BLOCK_N: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Program i owns a range of classes: which are hot, [V] int8, and how many."""
    ROWS: tl.constexpr = 16
    blocks = tl.cdiv(tl.load(num_rows_ptr), BLOCK_N)
    program = tl.program_id(0)
    hot = tl.zeros((CLASSES,), tl.int32)
    end = tl.minimum((program + 1) * range_classes, num_classes)
    for first in range(program * range_classes, end, CLASSES):
        classes = first + tl.arange(0, CLASSES)
        selected_by = tl.zeros((ROWS, CLASSES), tl.int32)
        for start in range(0, num_blocks, ROWS):
            block = start + tl.arange(0, ROWS)
            inside = (block < blocks)[:, None] & (classes < num_classes)[None, :]
            place = block.to(tl.int64)[:, None] * num_classes + classes[None, :]
            mass = tl.load(column_mass_ptr + place, mask=inside, other=0.0).to(tl.float32)
            threshold = tl.load(threshold_ptr + block, mask=block < num_blocks, other=0.0)
            selected_by += (is_selected(mass, threshold[:, None]) & inside).to(tl.int32)
        by = tl.sum(selected_by, 0)
        is_hot = (by * 2 >= blocks) & (by > 0)
        tl.store(is_hot_ptr + classes, is_hot.to(tl.int8), mask=classes < num_classes)
        hot += is_hot.to(tl.int32)
    tl.store(hot_ptr + program, tl.sum(hot, 0))


@triton.jit
def hot_before(
    hot_ptr, is_hot_ptr, end, surveyors, range_classes, SURVEYORS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many classes before ``end`` are hot."""
    surveyor = tl.arange(0, SURVEYORS)
    ranges = end // range_classes
    count = tl.sum(tl.load(hot_ptr + surveyor, mask=surveyor < ranges, other=0), 0)
    for start in range(ranges * range_classes, end, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        flags = tl.load(is_hot_ptr + classes, mask=classes < end, other=0)
        count += tl.sum(flags.to(tl.int32), 0)
    return count


@kernel
def count_pairs_kernel(
    column_mass_ptr, num_rows_ptr, threshold_ptr, range_hot_ptr, is_hot_ptr, count_ptr,
    block_count_ptr, tail_ptr, hot_lists, num_blocks, num_classes, cells, surveyors,
    range_classes, most_hot, deferred_from, most_deferred,
    BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
    SURVEYORS: tl.constexpr, SURVEY_CLASSES: tl.constexpr,
):  # fmt: skip
    hot_ptr, hot_count_ptr, hot_rank_ptr = hot_lists
    num_rows = tl.load(num_rows_ptr)
    first_class = tl.program_id(0) * CELLS * CELL
    classes = first_class + tl.arange(0, CELLS * CELL)
    early = hot_before(
        range_hot_ptr, is_hot_ptr, deferred_from, surveyors, range_classes, SURVEYORS,
        SURVEY_CLASSES,
    )  # fmt: skip
    early = tl.minimum(early, most_hot)
    most = tl.minimum(early + most_deferred, most_hot)
    before = hot_before(
        range_hot_ptr, is_hot_ptr, first_class, surveyors, range_classes, SURVEYORS,
        SURVEY_CLASSES,
    )  # fmt: skip
    flags = tl.load(is_hot_ptr + classes, mask=classes < num_classes, other=0)
    hot = flags.to(tl.int32)
    rank = before + tl.cumsum(hot, 0) - hot
    hot = (hot > 0) & (rank < most)
    tl.store(hot_ptr + rank, classes, mask=hot)
    tl.store(hot_rank_ptr + classes, tl.where(hot, rank, -1), mask=classes < num_classes)
    if tl.program_id(0) == 0:
        hot_count = hot_before(
            range_hot_ptr, is_hot_ptr, num_classes, surveyors, range_classes, SURVEYORS,
            SURVEY_CLASSES,
        )  # fmt: skip
        hot_count = tl.minimum(hot_count, most)
        tl.store(hot_count_ptr, hot_count)
        tl.store(hot_count_ptr + 1, tl.minimum(early, hot_count))
        padding = hot_count + tl.arange(0, SLOTS)
        in_padding = padding < tl.cdiv(hot_count, SLOTS) * SLOTS
        tl.store(hot_ptr + padding, tl.full((SLOTS,), -1, tl.int32), mask=in_padding)

    blocks = tl.cdiv(num_rows, BLOCK_N)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    listed = (classes < num_classes) & (hot == 0)
    for start in range(0, num_blocks, 32):
        block = start + tl.arange(0, 32)
        place = column_mass_ptr + block.to(tl.int64)[:, None] * num_classes + classes[None, :]
        inside = (block < blocks)[:, None] & listed[None, :]
        mass = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # [32, CELLS * CELL]
        threshold = tl.load(threshold_ptr + block, mask=block < num_blocks, other=0.0)
        selected = (is_selected(mass, threshold[:, None]) & inside).to(tl.int32)
        place = count_ptr + block[:, None] * cells + cell[None, :]
        inside = (block < num_blocks)[:, None] & (cell < cells)[None, :]
        tl.store(place, tl.sum(selected.reshape(32, CELLS, CELL), 2), mask=inside)
        tl.atomic_add(block_count_ptr + block, tl.sum(selected, 1), mask=block < blocks)
        place = tail_ptr + block * tl.num_programs(0) + tl.program_id(0)
        tl.store(place, tl.sum(tl.where(selected > 0, 0.0, mass), 1), mask=block < num_blocks)


@triton.jit
def slots_before(block_count_ptr, hot_count_ptr, block, num_blocks, SLOTS: tl.constexpr):
    """Where the slots of a block begin: after those of hot classes, and of blocks before it."""
    slots = tl.cdiv(tl.load(hot_count_ptr), SLOTS) * SLOTS * num_blocks
    for start in range(0, block, 128):
        blocks = start + tl.arange(0, 128)
        pairs = tl.load(block_count_ptr + blocks, mask=blocks < block, other=0)
        slots += tl.sum(tl.cdiv(pairs, SLOTS) * SLOTS, 0)
    return slots


@kernel
def place_pairs_kernel(
    count_ptr, block_count_ptr, hot_count_ptr, chunk_tail_ptr, cell_start_ptr, tail_ptr, cells,
    chunks, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b owns block b."""
    program = tl.program_id(0)
    slot = slots_before(block_count_ptr, hot_count_ptr, program, tl.num_programs(0), SLOTS)
    cell_start_ptr += program * (cells + 1)
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        count = tl.load(count_ptr + program * cells + cell, mask=cell < cells, other=0)
        before = slot + tl.cumsum(count, 0) - count
        tl.store(cell_start_ptr + cell, before, mask=cell < cells)
        slot += tl.sum(count, 0)
    tl.store(cell_start_ptr + cells, slot)
    tail = 0.0
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        part = chunk_tail_ptr + program * chunks + chunk
        tail += tl.sum(tl.load(part, mask=chunk < chunks, other=0.0), 0)
    tl.store(tail_ptr + program, tail)


@kernel
def list_pairs_kernel(
    column_mass_ptr, num_rows_ptr, threshold_ptr, block_count_ptr, hot_count_ptr,
    cell_start_ptr, hot_rank_ptr, columns_ptr, tail_mass_ptr, decided, num_blocks, num_classes,
    cells, num_slots, most_swept,
    BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Program (b, i) owns CELLS cells of block b; program (b, 0) its padding too."""
    block = tl.program_id(0)
    num_rows = tl.load(num_rows_ptr)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    classes = cell[:, None] * CELL + tl.arange(0, CELL)[None, :]
    inside = (classes < num_classes) & (block * BLOCK_N < num_rows)
    rank = tl.load(hot_rank_ptr + classes, mask=classes < num_classes, other=0)
    inside &= rank < 0
    place = block.to(tl.int64) * num_classes + classes
    mass = tl.load(column_mass_ptr + place, mask=inside, other=0.0)  # [CELLS, CELL]
    selected = is_selected(mass.to(tl.float32), tl.load(threshold_ptr + block)) & inside
    tl.store(tail_mass_ptr + place, tl.where(selected, 0.0, mass), mask=classes < num_classes)
    selected = selected.to(tl.int32)
    cell_start_ptr += block * (cells + 1)
    first = tl.load(cell_start_ptr + cell, mask=cell < cells, other=0)
    slot = first[:, None] + tl.cumsum(selected, 1) - 1
    tl.store(columns_ptr + slot, classes, mask=(selected > 0) & (slot < num_slots))
    if tl.program_id(1) == 0:
        end = tl.load(cell_start_ptr + cells)
        padding = end + tl.arange(0, SLOTS)
        in_padding = (padding < tl.cdiv(end, SLOTS) * SLOTS) & (padding < num_slots)
        tl.store(columns_ptr + padding, tl.zeros((SLOTS,), tl.int32), mask=in_padding)
        if block == 0:
            slots = slots_before(block_count_ptr, hot_count_ptr, num_blocks, num_blocks, SLOTS)
            listed = slots <= num_slots
            blocks = tl.cdiv(num_rows, BLOCK_N)
            pairs = tl.load(hot_count_ptr) * blocks
            for start in range(0, blocks, 128):
                index = start + tl.arange(0, 128)
                pairs += tl.sum(tl.load(block_count_ptr + index, mask=index < blocks, other=0), 0)
            few = pairs <= most_swept * blocks.to(tl.float32) * num_classes
            listed_rows_ptr, swept_rows_ptr, exact_rows_ptr = decided
            tl.store(listed_rows_ptr, tl.where(listed, num_rows, -1))
            tl.store(swept_rows_ptr, tl.where((listed == 0) & few, num_rows, -1))
            tl.store(exact_rows_ptr, tl.where(listed | few, -1, num_rows))


def list_shapes(blocks: int, num_classes: int, num_slots: int) -> dict[str, Shape]:
    """What :func:`select_pairs` fills in a workspace, by name: lists, and what they are made of.

    Args:
        blocks: of tokens.
        num_classes: V.
        num_slots: capacity for pairs, those of hot classes too, and padding.
    """
    cells = triton.cdiv(num_classes, CELL)
    surveyors = triton.cdiv(num_classes, _range_classes(num_classes))
    return {
        "columns": ((num_slots,), torch.int32),
        "cell_start": ((blocks, cells + 1), torch.int32),
        "count": ((blocks, cells), torch.int32),
        "block_count": ((blocks,), torch.int32),
        "chunk_tail": ((blocks, triton.cdiv(cells, COUNT_CELLS)), torch.float32),
        "is_hot": ((num_classes,), torch.int8),
        "tails": ((blocks, LEVELS, surveyors), torch.float32),
        "range_hot": ((surveyors,), torch.int32),
    }


def _range_classes(num_classes: int) -> int:
    """Classes of a program that surveys them."""
    return triton.cdiv(num_classes, SURVEYORS * SURVEY_CLASSES) * SURVEY_CLASSES


class Limits(NamedTuple):
    """Of what is selected."""

    most_tail: float  # what a block's budget is made of; see the module
    most_hot: int  # capacity for hot classes
    deferred_from: int  # the class from which on hot classes are deferred
    most_deferred: int  # capacity for those
    most_swept: float = 0.0  # share of the pairs up to which they are swept if not listed


def select_pairs(
    column_mass: Tensor,
    tokens: Tokens,
    workspace: Workspace,
    limits: Limits,
    *,
    block_n: int,
    block_slots: int,
) -> SelectedPairs:
    """List the pairs of ``column_mass`` [blocks, V] that are selected.

    Args:
        column_mass: by block of tokens, SELECTED at the labels; what is in the blocks past the last
            token is not looked at.
        tokens: the valid ones.
        workspace: with the regions of :func:`list_shapes`, and ``tail_mass`` [blocks, V], which
            gets the masses of what is not selected.
        limits: of what is selected.
        block_n: tokens of a block.
        block_slots: what a block's slots are a multiple of; a power of two.
    """
    blocks, num_classes = column_mass.shape
    num_rows = tokens.num_rows
    cells = triton.cdiv(num_classes, CELL)
    range_classes = _range_classes(num_classes)
    surveyors = triton.cdiv(num_classes, range_classes)
    most_tail, *most_hot, most_swept = limits

    def lasting(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=column_mass.device)

    pairs = SelectedPairs(
        column_mass=workspace["tail_mass"],
        columns=workspace["columns"],
        cell_start=workspace["cell_start"],
        tail=lasting(blocks, dtype=torch.float32),
        hot=lasting(triton.cdiv(limits.most_hot, block_slots) * block_slots),
        hot_rank=lasting(num_classes),
        hot_count=lasting(2),
        threshold=lasting(2, blocks, dtype=torch.float32),
        num_rows=lasting(1),
        swept_rows=lasting(1),
        exact_rows=lasting(1),
    )
    count, block_count = workspace["count"], workspace["block_count"].zero_()
    chunk_tail, is_hot = workspace["chunk_tail"], workspace["is_hot"]
    tails, range_hot = workspace["tails"], workspace["range_hot"]
    survey_kernel[(surveyors,)](
        column_mass, num_rows, tails, blocks, num_classes, range_classes,
        BLOCK_N=block_n, CLASSES=SURVEY_CLASSES, LEVELS=LEVELS,
    )  # fmt: skip
    choose_thresholds_kernel[(blocks,)](
        num_rows, tokens.vectors, tails, pairs.threshold, surveyors, most_tail,
        VECTORS=tokens.vectors.shape[1], BLOCK_N=block_n, SURVEYORS=SURVEYORS, LEVELS=LEVELS,
    )  # fmt: skip
    hot_kernel[(surveyors,)](
        column_mass, num_rows, pairs.threshold, range_hot, is_hot, blocks, num_classes,
        range_classes, BLOCK_N=block_n, CLASSES=SURVEY_CLASSES,
    )  # fmt: skip
    count_pairs_kernel[(chunk_tail.shape[1],)](
        column_mass, num_rows, pairs.threshold, range_hot, is_hot, count, block_count, chunk_tail,
        (pairs.hot, pairs.hot_count, pairs.hot_rank), blocks, num_classes, cells, surveyors,
        range_classes, *most_hot,
        BLOCK_N=block_n, SLOTS=block_slots, CELL=CELL, CELLS=COUNT_CELLS, SURVEYORS=SURVEYORS,
        SURVEY_CLASSES=SURVEY_CLASSES,
    )  # fmt: skip
    place_pairs_kernel[(blocks,)](
        count, block_count, pairs.hot_count, chunk_tail, pairs.cell_start, pairs.tail, cells,
        chunk_tail.shape[1], SLOTS=block_slots, BLOCK=PLACE_CELLS, num_warps=8,
    )  # fmt: skip
    list_pairs_kernel[(blocks, triton.cdiv(cells, LIST_CELLS))](
        column_mass, num_rows, pairs.threshold, block_count, pairs.hot_count, pairs.cell_start,
        pairs.hot_rank, pairs.columns, pairs.column_mass,
        (pairs.num_rows, pairs.swept_rows, pairs.exact_rows), blocks, num_classes, cells,
        len(pairs.columns), most_swept,
        BLOCK_N=block_n, SLOTS=block_slots, CELL=CELL, CELLS=LIST_CELLS,
    )  # fmt: skip
    return pairs
