"""The pairs (block of tokens, class) that a filtered gradient keeps, listed on the device.

The forward leaves ``column_mass`` [blocks, V]: of each pair the mass, KEPT at the labels. A pair is
kept where it reaches a threshold, the highest of THRESHOLDS that leaves no more to the tail than is
allowed.

Classes kept by at least half of the blocks are *popular*: few, and with most of the pairs. They are
kept by every block, and are a small head of their own. ``popular`` lists them, in ascending order.
The other kept pairs become, without the host knowing how many there are,

    columns[slot]          the class of each pair. Slots go block by block, and within a block by
                           class. A block's slots begin at a multiple of SLOTS.
    cell_start[b, t]       first slot of block b whose class is in cell t (CELL classes) or later

                   classes ->   cell 0   cell 1   cell 2
    popular, in all blocks      slots  0..                       padding
    block 0                     0 1 2    3        4 5 6          padding
    block 1                     ..

The first slots are those of popular classes, of the r-th in block b ``r * blocks + b``: their dz is
a matrix [popular, tokens]. What is neither kept nor popular is the tail, whose masses are left side
by side. Popular classes from ``late_from`` on are *late*: there is less room for them. Those for
which there is none are as any other class.

**When not.** Where the tail is too heavy at any threshold, or the pairs are more than there is room
for, nothing is to be made of them, and ``num_rows`` says so to whoever comes next.

**Who owns what.** Four launches. In the first a program owns a range of classes, in all blocks,
sums the tail of each threshold, and finds the classes popular under it. In the second one owns two
cells, in all blocks, ranks its popular classes, and counts the other pairs. In the third one owns a
block, and sums the counts before each of its cells. In the fourth one owns LIST_CELLS cells of a
block, and lists. Only whole numbers are added by atomics. Bytes: four times ``column_mass``, and 4
a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.kernels.launch import kernel
from crosscut.kernels.scratch import Scratch

CELL = 64
"""Classes of a cell."""

COUNT_CELLS, LIST_CELLS = 2, 32
PLACE_CELLS = 8192
SURVEY_CLASSES, SURVEYORS = 128, 512

THRESHOLDS = (1.0, 0.5, 0.25, 0.125)
"""Of ``column_mass``: from which mass on a pair may be kept. Each half of the one before."""


class KeptPairs(NamedTuple):
    """The lists; see the module. Entries past the last are undefined unless said otherwise.

    All are scratch but for ``column_mass``, ``popular``, ``popular_rank`` and single numbers.
    """

    columns: Tensor  # [slots] int32; 0 in the padding, undefined in slots of popular classes
    cell_start: Tensor  # [blocks, cells + 1] int32
    column_mass: Tensor  # [blocks, V], 0 in place of pairs that are kept, and of no tokens
    tail: Tensor  # [blocks] float32, sums of ``column_mass``
    threshold: Tensor  # [1] float32; 0 where the tail is too heavy at any
    popular: Tensor  # [most_popular and padding] int32; -1 in the padding
    popular_count: Tensor  # [2] int32: how many, and how many are not late
    popular_rank: Tensor  # [V] int32, -1 for others
    num_rows: Tensor  # [1] int32, the rows that take part; -1 if the pairs are of no use
    exact_rows: Tensor  # [1] int32, the same the other way round


@triton.jit
def is_kept(mass, threshold):
    """Whether a pair is; a NaN is."""
    return (mass < threshold) == 0


@kernel
def survey_kernel(
    column_mass_ptr, num_rows_ptr, tails_ptr, popular_ptr, is_popular_ptr, num_blocks, num_classes,
    range_classes, BLOCK_N: tl.constexpr, CLASSES: tl.constexpr, THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """Program i owns a range of classes: [thresholds, programs] tails, and numbers of popular ones.

    Bit i of ``is_popular`` [V] int8 is for threshold i.
    """
    LEVELS: tl.constexpr = len(THRESHOLDS)
    ROWS: tl.constexpr = 16
    tl.static_assert(LEVELS == 4)  # a byte each of ``counts``
    blocks = tl.cdiv(tl.load(num_rows_ptr), BLOCK_N)
    program, programs = tl.program_id(0), tl.num_programs(0)
    level = tl.arange(0, LEVELS)
    # By place in a tile. Sums over a tile cross threads: they come in the end.
    whole = tl.zeros((ROWS, CLASSES), tl.float32)
    half = tl.zeros((ROWS, CLASSES), tl.float32)
    quarter = tl.zeros((ROWS, CLASSES), tl.float32)
    eighth = tl.zeros((ROWS, CLASSES), tl.float32)
    popular = tl.zeros((LEVELS, CLASSES), tl.int32)
    end = tl.minimum((program + 1) * range_classes, num_classes)
    for first in range(program * range_classes, end, CLASSES):
        classes = first + tl.arange(0, CLASSES)
        kept_by = tl.zeros((LEVELS, CLASSES), tl.int32)
        for group in range(0, num_blocks, 255 * ROWS):  # as many as a byte can count
            counts = tl.zeros((ROWS, CLASSES), tl.int32)
            for start in range(group, tl.minimum(group + 255 * ROWS, num_blocks), ROWS):
                block = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
                inside = (block < blocks) & (classes < num_classes)[None, :]
                place = column_mass_ptr + block * num_classes + classes[None, :]
                mass = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # [ROWS, CLASSES]
                for i in tl.static_range(LEVELS):
                    counts += tl.where(is_kept(mass, THRESHOLDS[i]) & inside, 1 << (8 * i), 0)
                whole += tl.where(is_kept(mass, THRESHOLDS[0]), 0.0, mass)
                half += tl.where(is_kept(mass, THRESHOLDS[1]), 0.0, mass)
                quarter += tl.where(is_kept(mass, THRESHOLDS[2]), 0.0, mass)
                eighth += tl.where(is_kept(mass, THRESHOLDS[3]), 0.0, mass)
            for i in tl.static_range(LEVELS):
                by = tl.sum((counts >> (8 * i)) & 255, 0)
                kept_by += tl.where((level == i)[:, None], by[None, :], 0)
        is_popular = ((kept_by * 2 >= blocks) & (kept_by > 0)).to(tl.int32)
        popular += is_popular
        bits = tl.sum(is_popular << level[:, None], 0)
        tl.store(is_popular_ptr + classes, bits.to(tl.int8), mask=classes < num_classes)
    tl.store(tails_ptr + program, tl.sum(whole))
    tl.store(tails_ptr + programs + program, tl.sum(half))
    tl.store(tails_ptr + 2 * programs + program, tl.sum(quarter))
    tl.store(tails_ptr + 3 * programs + program, tl.sum(eighth))
    tl.store(popular_ptr + level * programs + program, tl.sum(popular, 1))


@triton.jit
def choose_threshold(
    tails_ptr, surveyors, most_tail, SURVEYORS: tl.constexpr, THRESHOLDS: tl.constexpr
):
    """The highest threshold that leaves at most ``most_tail``, and which it is; 0 if none does."""
    surveyor = tl.arange(0, SURVEYORS)
    threshold, level = 0.0, 0
    for i in tl.static_range(len(THRESHOLDS)):
        place = tails_ptr + i * surveyors + surveyor
        tail = tl.sum(tl.load(place, mask=surveyor < surveyors, other=0.0), 0)
        chosen = (threshold == 0) & (tail <= most_tail)
        threshold = tl.where(chosen, THRESHOLDS[i], threshold)
        level = tl.where(chosen, i, level)
    return threshold, level


@triton.jit
def popular_before(
    popular_ptr, is_popular_ptr, end, surveyors, range_classes, level, SURVEYORS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many classes before ``end`` are popular at a threshold."""
    surveyor = tl.arange(0, SURVEYORS)
    ranges = end // range_classes
    popular = tl.load(popular_ptr + level * surveyors + surveyor, mask=surveyor < ranges, other=0)
    count = tl.sum(popular, 0)
    for start in range(ranges * range_classes, end, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        bits = tl.load(is_popular_ptr + classes, mask=classes < end, other=0).to(tl.int32)
        count += tl.sum(bits >> level & 1, 0)
    return count


@kernel
def count_pairs_kernel(
    column_mass_ptr, num_rows_ptr, tails_ptr, range_popular_ptr, is_popular_ptr, threshold_ptr,
    count_ptr, block_count_ptr, tail_ptr, popular_ptr, popular_count_ptr, popular_rank_ptr,
    num_blocks, num_classes, cells, surveyors, range_classes, most_tail, most_popular, late_from,
    most_late, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
    SURVEYORS: tl.constexpr, SURVEY_CLASSES: tl.constexpr, THRESHOLDS: tl.constexpr,
):  # fmt: skip
    num_rows = tl.load(num_rows_ptr)
    threshold, level = choose_threshold(
        tails_ptr, surveyors, most_tail * num_rows, SURVEYORS, THRESHOLDS
    )
    first_class = tl.program_id(0) * CELLS * CELL
    classes = first_class + tl.arange(0, CELLS * CELL)
    early = popular_before(
        range_popular_ptr, is_popular_ptr, late_from, surveyors, range_classes, level, SURVEYORS,
        SURVEY_CLASSES,
    )  # fmt: skip
    early = tl.minimum(early, most_popular)
    most = tl.minimum(early + most_late, most_popular)
    most = tl.where(threshold > 0, most, 0)
    before = popular_before(
        range_popular_ptr, is_popular_ptr, first_class, surveyors, range_classes, level, SURVEYORS,
        SURVEY_CLASSES,
    )  # fmt: skip
    bits = tl.load(is_popular_ptr + classes, mask=classes < num_classes, other=0).to(tl.int32)
    popular = bits >> level & 1
    rank = before + tl.cumsum(popular, 0) - popular
    popular = (popular > 0) & (rank < most)
    tl.store(popular_ptr + rank, classes, mask=popular)
    tl.store(popular_rank_ptr + classes, tl.where(popular, rank, -1), mask=classes < num_classes)
    if tl.program_id(0) == 0:
        tl.store(threshold_ptr, threshold)
        popular_count = popular_before(
            range_popular_ptr, is_popular_ptr, num_classes, surveyors, range_classes, level,
            SURVEYORS, SURVEY_CLASSES,
        )  # fmt: skip
        popular_count = tl.minimum(popular_count, most)
        tl.store(popular_count_ptr, popular_count)
        tl.store(popular_count_ptr + 1, tl.minimum(early, popular_count))
        padding = popular_count + tl.arange(0, SLOTS)
        in_padding = padding < tl.cdiv(popular_count, SLOTS) * SLOTS
        tl.store(popular_ptr + padding, tl.full((SLOTS,), -1, tl.int32), mask=in_padding)

    blocks = tl.cdiv(num_rows, BLOCK_N)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    listed = (classes < num_classes) & (popular == 0)
    for start in range(0, num_blocks, 32):
        block = start + tl.arange(0, 32)
        place = column_mass_ptr + block.to(tl.int64)[:, None] * num_classes + classes[None, :]
        inside = (block < blocks)[:, None] & listed[None, :]
        mass = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # [32, CELLS * CELL]
        kept = tl.where(threshold > 0, (is_kept(mass, threshold) & inside).to(tl.int32), 0)
        place = count_ptr + block[:, None] * cells + cell[None, :]
        inside = (block < num_blocks)[:, None] & (cell < cells)[None, :]
        tl.store(place, tl.sum(kept.reshape(32, CELLS, CELL), 2), mask=inside)
        tl.atomic_add(block_count_ptr + block, tl.sum(kept, 1), mask=block < blocks)
        place = tail_ptr + block * tl.num_programs(0) + tl.program_id(0)
        tl.store(place, tl.sum(tl.where(kept > 0, 0.0, mass), 1), mask=block < num_blocks)


@triton.jit
def slots_before(block_count_ptr, popular_count_ptr, block, num_blocks, SLOTS: tl.constexpr):
    """Where the slots of a block begin: after those of popular classes, and of blocks before it."""
    slots = tl.cdiv(tl.load(popular_count_ptr), SLOTS) * SLOTS * num_blocks
    for start in range(0, block, 128):
        blocks = start + tl.arange(0, 128)
        pairs = tl.load(block_count_ptr + blocks, mask=blocks < block, other=0)
        slots += tl.sum(tl.cdiv(pairs, SLOTS) * SLOTS, 0)
    return slots


@kernel
def place_pairs_kernel(
    count_ptr, block_count_ptr, popular_count_ptr, chunk_tail_ptr, cell_start_ptr, tail_ptr, cells,
    chunks, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b owns block b."""
    program = tl.program_id(0)
    slot = slots_before(block_count_ptr, popular_count_ptr, program, tl.num_programs(0), SLOTS)
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
    column_mass_ptr, num_rows_ptr, threshold_ptr, block_count_ptr, popular_count_ptr,
    cell_start_ptr, popular_rank_ptr, columns_ptr, tail_mass_ptr, filtered_rows_ptr, exact_rows_ptr,
    num_blocks, num_classes, cells, num_slots,
    BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Program (b, i) owns CELLS cells of block b; program (b, 0) its padding too."""
    block = tl.program_id(0)
    num_rows = tl.load(num_rows_ptr)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    classes = cell[:, None] * CELL + tl.arange(0, CELL)[None, :]
    inside = (classes < num_classes) & (block * BLOCK_N < num_rows)
    rank = tl.load(popular_rank_ptr + classes, mask=classes < num_classes, other=0)
    inside &= rank < 0
    place = block.to(tl.int64) * num_classes + classes
    mass = tl.load(column_mass_ptr + place, mask=inside, other=0.0)  # [CELLS, CELL]
    threshold = tl.load(threshold_ptr)
    kept = is_kept(mass.to(tl.float32), threshold) & inside
    tl.store(tail_mass_ptr + place, tl.where(kept, 0.0, mass), mask=classes < num_classes)
    kept = tl.where(threshold > 0, kept.to(tl.int32), 0)
    cell_start_ptr += block * (cells + 1)
    first = tl.load(cell_start_ptr + cell, mask=cell < cells, other=0)
    slot = first[:, None] + tl.cumsum(kept, 1) - 1
    tl.store(columns_ptr + slot, classes, mask=(kept > 0) & (slot < num_slots))
    if tl.program_id(1) == 0:
        end = tl.load(cell_start_ptr + cells)
        padding = end + tl.arange(0, SLOTS)
        in_padding = (padding < tl.cdiv(end, SLOTS) * SLOTS) & (padding < num_slots)
        tl.store(columns_ptr + padding, tl.zeros((SLOTS,), tl.int32), mask=in_padding)
        if block == 0:
            slots = slots_before(block_count_ptr, popular_count_ptr, num_blocks, num_blocks, SLOTS)
            filters = (slots <= num_slots) & (threshold > 0)
            tl.store(filtered_rows_ptr, tl.where(filters, num_rows, -1))
            tl.store(exact_rows_ptr, tl.where(filters, -1, num_rows))


def kept_pairs(
    column_mass: Tensor,
    num_rows: Tensor,
    tail_mass: Tensor,
    scratch: Scratch,
    *,
    block_n: int,
    num_slots: int,
    block_slots: int,
    most_tail: float,
    most_popular: int,
    late_from: int,
    most_late: int,
) -> KeptPairs:
    """List the pairs of ``column_mass`` [blocks, V] that are to be kept.

    Args:
        column_mass: by block of tokens, KEPT at the labels; what is in the blocks past the last
            token is not looked at.
        num_rows: [1] int32, how many rows take part.
        tail_mass: [blocks, V], gets the masses of what is not kept.
        scratch: where lists go.
        block_n: tokens of a block.
        num_slots: room for pairs, those of popular classes too, and padding.
        block_slots: what a block's slots are a multiple of; a power of two.
        most_tail: the most tail that a row may have on average, in the unit of ``column_mass``.
        most_popular: room for popular classes.
        late_from: the class from which on popular classes are late.
        most_late: room for those.
    """
    blocks, num_classes = column_mass.shape
    cells = triton.cdiv(num_classes, CELL)
    chunks = triton.cdiv(cells, COUNT_CELLS)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return scratch.new(*shape, dtype=dtype)

    def lasting(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=column_mass.device)

    pairs = KeptPairs(
        column_mass=tail_mass,
        columns=new(num_slots),
        cell_start=new(blocks, cells + 1),
        tail=new(blocks, dtype=torch.float32),
        popular=lasting(triton.cdiv(most_popular, block_slots) * block_slots),
        popular_rank=lasting(num_classes),
        popular_count=lasting(2),
        threshold=lasting(1, dtype=torch.float32),
        num_rows=lasting(1),
        exact_rows=lasting(1),
    )
    count, block_count = new(blocks, cells), new(blocks).zero_()
    chunk_tail = new(blocks, chunks, dtype=torch.float32)
    is_popular = new(num_classes, dtype=torch.int8)
    range_classes = triton.cdiv(num_classes, SURVEYORS * SURVEY_CLASSES) * SURVEY_CLASSES
    surveyors = triton.cdiv(num_classes, range_classes)
    tails = new(len(THRESHOLDS), surveyors, dtype=torch.float32)
    range_popular = new(len(THRESHOLDS), surveyors)
    survey_kernel[(surveyors,)](
        column_mass, num_rows, tails, range_popular, is_popular, blocks, num_classes, range_classes,
        BLOCK_N=block_n, CLASSES=SURVEY_CLASSES, THRESHOLDS=THRESHOLDS,
    )  # fmt: skip
    count_pairs_kernel[(chunks,)](
        column_mass, num_rows, tails, range_popular, is_popular, pairs.threshold, count,
        block_count, chunk_tail, pairs.popular, pairs.popular_count, pairs.popular_rank,
        blocks, num_classes, cells, surveyors, range_classes, most_tail, most_popular, late_from,
        most_late, BLOCK_N=block_n, SLOTS=block_slots, CELL=CELL, CELLS=COUNT_CELLS,
        SURVEYORS=SURVEYORS, SURVEY_CLASSES=SURVEY_CLASSES, THRESHOLDS=THRESHOLDS,
    )  # fmt: skip
    place_pairs_kernel[(blocks,)](
        count, block_count, pairs.popular_count, chunk_tail, pairs.cell_start, pairs.tail, cells,
        chunks, SLOTS=block_slots, BLOCK=PLACE_CELLS, num_warps=8,
    )  # fmt: skip
    list_pairs_kernel[(blocks, triton.cdiv(cells, LIST_CELLS))](
        column_mass, num_rows, pairs.threshold, block_count, pairs.popular_count, pairs.cell_start,
        pairs.popular_rank, pairs.columns, pairs.column_mass, pairs.num_rows, pairs.exact_rows,
        blocks, num_classes, cells, num_slots,
        BLOCK_N=block_n, SLOTS=block_slots, CELL=CELL, CELLS=LIST_CELLS,
    )  # fmt: skip
    return pairs
