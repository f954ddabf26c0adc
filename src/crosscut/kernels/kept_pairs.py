"""The pairs (block of tokens, class) that a filtered gradient keeps, listed on the device.

The forward leaves ``column_mass`` [blocks, V]: of each pair the mass, KEPT at the labels. A pair is
kept where it reaches a threshold, the highest of THRESHOLDS that leaves no more to the tail than is
allowed. Here the kept pairs become, without the host knowing how many there are,

    columns[slot]          the class of each pair. Slots go block by block, and within a block by
                           class. A block's slots begin at a multiple of SLOTS.
    cell_start[b, t]       first slot of block b whose class is in cell t (CELL classes) or later

              classes ->     cell 0   cell 1   cell 2
    block 0   slots  0..     0 1 2    3        4 5 6  padding
    block 1   slots  SLOTS.. ..

Classes kept by at least half of the blocks are *popular*: they are few and have most of the pairs.
They are listed too, with their slot in every block. What is not kept is the tail, whose masses are
left side by side. Popular classes from ``late_from`` on are *late*: there is less room for them.

**When not.** Where the tail is too heavy at any threshold, or the pairs are more than there is room
for, nothing is to be made of them, and ``num_rows`` says so to whoever comes next.

**Who owns what.** Four launches. In the first a program owns every so many classes, in all blocks,
and sums the tail of each threshold. In the second one owns two cells, in all blocks, and counts. In
the third one owns a block, and sums the counts before each of its cells; another ranks popular
classes. In the fourth one owns LIST_CELLS cells of a block, and lists. Only whole numbers are added
by atomics. Bytes: four times ``column_mass``, and 4 a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.kernels.flags import FLAG_CLASSES, count_flags
from crosscut.kernels.launch import kernel
from crosscut.kernels.scratch import Scratch

CELL = 64
"""Classes of a cell."""

COUNT_CELLS, LIST_CELLS = 2, 32
SURVEY_CLASSES, SURVEYORS = 128, 256

THRESHOLDS = (1.0, 0.5, 0.25, 0.125)
"""Of ``column_mass``: from which mass on a pair may be kept. Each half of the one before."""


class KeptPairs(NamedTuple):
    """The lists; see the module. Entries past the last are undefined unless said otherwise.

    All are scratch but for ``column_mass``, ``popular``, ``popular_rank`` and single numbers.
    """

    columns: Tensor  # [slots] int32; 0 in the padding
    cell_start: Tensor  # [blocks, cells + 1] int32
    column_mass: Tensor  # [blocks, V], 0 in place of pairs that are kept, and of no tokens
    tail: Tensor  # [blocks] float32, sums of ``column_mass``
    threshold: Tensor  # [1] float32; 0 where the tail is too heavy at any
    popular: Tensor  # [most_popular] int32
    popular_count: Tensor  # [2] int32: how many, and how many are not late
    popular_rank: Tensor  # [V] int32, -1 for others
    popular_slot: Tensor  # [blocks, len(popular)] int32, -1 where not kept; of popular classes
    num_rows: Tensor  # [1] int32, the rows that take part; -1 if the pairs are of no use
    exact_rows: Tensor  # [1] int32, the same the other way round


@triton.jit
def is_kept(mass, threshold):
    """Whether a pair is; a NaN is."""
    return (mass < threshold) == 0


@kernel
def survey_kernel(
    column_mass_ptr, num_rows_ptr, tails_ptr, num_blocks, num_classes, BLOCK_N: tl.constexpr,
    CLASSES: tl.constexpr, THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """Program i owns every num_programs(0)-th tile of classes: [thresholds, programs] tails."""
    blocks = tl.cdiv(tl.load(num_rows_ptr), BLOCK_N)
    program, programs = tl.program_id(0), tl.num_programs(0)
    level = tl.arange(0, len(THRESHOLDS))
    tails = tl.zeros((len(THRESHOLDS),), tl.float32)
    for first in range(program * CLASSES, num_classes, programs * CLASSES):
        classes = first + tl.arange(0, CLASSES)
        for start in range(0, num_blocks, 32):
            block = start + tl.arange(0, 32)
            place = column_mass_ptr + block.to(tl.int64)[:, None] * num_classes + classes[None, :]
            inside = (block < blocks)[:, None] & (classes < num_classes)[None, :]
            mass = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # [32, CLASSES]
            for i in tl.static_range(len(THRESHOLDS)):
                tail = tl.sum(tl.where(is_kept(mass, THRESHOLDS[i]), 0.0, mass))
                tails += tl.where(level == i, tail, 0.0)
    tl.store(tails_ptr + level * programs + program, tails)


@triton.jit
def choose_threshold(
    tails_ptr, surveyors, most_tail, SURVEYORS: tl.constexpr, THRESHOLDS: tl.constexpr
):
    """The highest threshold that leaves at most ``most_tail``; 0 if none does."""
    surveyor = tl.arange(0, SURVEYORS)
    threshold = 0.0
    for i in tl.static_range(len(THRESHOLDS)):
        place = tails_ptr + i * surveyors + surveyor
        tail = tl.sum(tl.load(place, mask=surveyor < surveyors, other=0.0), 0)
        threshold = tl.where((threshold == 0) & (tail <= most_tail), THRESHOLDS[i], threshold)
    return threshold


@kernel
def count_pairs_kernel(
    column_mass_ptr, num_rows_ptr, tails_ptr, threshold_ptr, count_ptr, block_count_ptr, tail_ptr,
    is_popular_ptr, num_blocks, num_classes, cells, surveyors, most_tail, BLOCK_N: tl.constexpr,
    CELL: tl.constexpr, CELLS: tl.constexpr, SURVEYORS: tl.constexpr, THRESHOLDS: tl.constexpr,
):  # fmt: skip
    num_rows = tl.load(num_rows_ptr)
    threshold = choose_threshold(tails_ptr, surveyors, most_tail * num_rows, SURVEYORS, THRESHOLDS)
    if tl.program_id(0) == 0:
        tl.store(threshold_ptr, threshold)
    blocks = tl.cdiv(num_rows, BLOCK_N)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    classes = tl.program_id(0) * CELLS * CELL + tl.arange(0, CELLS * CELL)
    kept_by = tl.zeros((CELLS * CELL,), tl.int32)
    for start in range(0, num_blocks, 32):
        block = start + tl.arange(0, 32)
        place = column_mass_ptr + block.to(tl.int64)[:, None] * num_classes + classes[None, :]
        inside = (block < blocks)[:, None] & (classes < num_classes)[None, :]
        mass = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # [32, CELLS * CELL]
        kept = tl.where(threshold > 0, (is_kept(mass, threshold) & inside).to(tl.int32), 0)
        kept_by += tl.sum(kept, 0)
        place = count_ptr + block[:, None] * cells + cell[None, :]
        inside = (block < num_blocks)[:, None] & (cell < cells)[None, :]
        tl.store(place, tl.sum(kept.reshape(32, CELLS, CELL), 2), mask=inside)
        tl.atomic_add(block_count_ptr + block, tl.sum(kept, 1), mask=block < blocks)
        place = tail_ptr + block * tl.num_programs(0) + tl.program_id(0)
        tl.store(place, tl.sum(tl.where(kept > 0, 0.0, mass), 1), mask=block < num_blocks)
    popular = (kept_by * 2 >= blocks) & (kept_by > 0)
    tl.store(is_popular_ptr + classes, popular.to(tl.int8), mask=classes < num_classes)


@kernel
def place_pairs_kernel(
    count_ptr, block_count_ptr, chunk_tail_ptr, is_popular_ptr, cell_start_ptr, tail_ptr,
    popular_ptr, popular_count_ptr, popular_rank_ptr, num_blocks, num_classes, cells, chunks,
    most_popular, late_from, most_late, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b owns block b; those past the blocks own BLOCK classes each."""
    program = tl.program_id(0)
    if program < num_blocks:
        slot = 0
        for start in range(0, program, 128):
            block = start + tl.arange(0, 128)
            pairs = tl.load(block_count_ptr + block, mask=block < program, other=0)
            slot += tl.sum(tl.cdiv(pairs, SLOTS) * SLOTS, 0)
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
    else:
        first = (program - num_blocks) * BLOCK
        before = count_flags(is_popular_ptr, 0, first, num_classes, BLOCK)
        early = tl.minimum(
            count_flags(is_popular_ptr, 0, late_from, late_from, BLOCK), most_popular
        )
        most = tl.minimum(early + most_late, most_popular)
        classes = first + tl.arange(0, BLOCK)
        inside = classes < num_classes
        popular = tl.load(is_popular_ptr + classes, mask=inside, other=0).to(tl.int32)
        rank = before + tl.cumsum(popular, 0) - popular
        listed = (popular > 0) & (rank < most)
        tl.store(popular_ptr + rank, classes, mask=listed)
        tl.store(popular_rank_ptr + classes, tl.where(listed, rank, -1), mask=inside)
        if first + BLOCK >= num_classes:
            tl.store(popular_count_ptr, tl.minimum(before + tl.sum(popular, 0), most))
            tl.store(popular_count_ptr + 1, early)


@kernel
def list_pairs_kernel(
    column_mass_ptr, num_rows_ptr, threshold_ptr, block_count_ptr, cell_start_ptr, popular_rank_ptr,
    columns_ptr, popular_slot_ptr, tail_mass_ptr, filtered_rows_ptr, exact_rows_ptr,
    num_blocks, num_classes, cells, num_slots, most_popular,
    BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Program (b, i) owns CELLS cells of block b; program (b, 0) its padding too."""
    block = tl.program_id(0)
    num_rows = tl.load(num_rows_ptr)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    classes = cell[:, None] * CELL + tl.arange(0, CELL)[None, :]
    inside = (classes < num_classes) & (block * BLOCK_N < num_rows)
    place = block.to(tl.int64) * num_classes + classes
    mass = tl.load(column_mass_ptr + place, mask=inside, other=0.0)  # [CELLS, CELL]
    threshold = tl.load(threshold_ptr)
    kept = is_kept(mass.to(tl.float32), threshold) & inside
    tl.store(tail_mass_ptr + place, tl.where(kept, 0.0, mass), mask=classes < num_classes)
    kept = tl.where(threshold > 0, kept.to(tl.int32), 0)
    cell_start_ptr += block * (cells + 1)
    first = tl.load(cell_start_ptr + cell, mask=cell < cells, other=0)
    slot = first[:, None] + tl.cumsum(kept, 1) - 1
    listed = (kept > 0) & (slot < num_slots)
    tl.store(columns_ptr + slot, classes, mask=listed)
    rank = tl.load(popular_rank_ptr + classes, mask=classes < num_classes, other=-1)
    place = popular_slot_ptr + block * most_popular + rank
    tl.store(place, tl.where(listed, slot, -1), mask=rank >= 0)
    if tl.program_id(1) == 0:
        end = tl.load(cell_start_ptr + cells)
        padding = end + tl.arange(0, SLOTS)
        in_padding = (padding < tl.cdiv(end, SLOTS) * SLOTS) & (padding < num_slots)
        tl.store(columns_ptr + padding, tl.zeros((SLOTS,), tl.int32), mask=in_padding)
        if block == 0:
            slots = 0
            for start in range(0, num_blocks, 128):
                blocks = start + tl.arange(0, 128)
                pairs = tl.load(block_count_ptr + blocks, mask=blocks < num_blocks, other=0)
                slots += tl.sum(tl.cdiv(pairs, SLOTS) * SLOTS, 0)
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
        num_slots: room for pairs and padding.
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
        popular=lasting(most_popular),
        popular_slot=new(blocks, most_popular),
        popular_rank=lasting(num_classes),
        popular_count=lasting(2),
        threshold=lasting(1, dtype=torch.float32),
        num_rows=lasting(1),
        exact_rows=lasting(1),
    )
    count, block_count = new(blocks, cells), new(blocks).zero_()
    chunk_tail = new(blocks, chunks, dtype=torch.float32)
    is_popular = new(num_classes, dtype=torch.int8)
    surveyors = min(SURVEYORS, triton.cdiv(num_classes, SURVEY_CLASSES))
    tails = new(len(THRESHOLDS), surveyors, dtype=torch.float32)
    survey_kernel[(surveyors,)](
        column_mass, num_rows, tails, blocks, num_classes, BLOCK_N=block_n,
        CLASSES=SURVEY_CLASSES, THRESHOLDS=THRESHOLDS,
    )  # fmt: skip
    count_pairs_kernel[(chunks,)](
        column_mass, num_rows, tails, pairs.threshold, count, block_count, chunk_tail, is_popular,
        blocks, num_classes, cells, surveyors, most_tail, BLOCK_N=block_n, CELL=CELL,
        CELLS=COUNT_CELLS, SURVEYORS=SURVEYORS, THRESHOLDS=THRESHOLDS,
    )  # fmt: skip
    place_pairs_kernel[(blocks + triton.cdiv(num_classes, FLAG_CLASSES),)](
        count, block_count, chunk_tail, is_popular, pairs.cell_start, pairs.tail,
        pairs.popular, pairs.popular_count, pairs.popular_rank, blocks, num_classes, cells, chunks,
        most_popular, late_from, most_late, SLOTS=block_slots, BLOCK=FLAG_CLASSES,
        num_warps=8,
    )  # fmt: skip
    list_pairs_kernel[(blocks, triton.cdiv(cells, LIST_CELLS))](
        column_mass, num_rows, pairs.threshold, block_count, pairs.cell_start, pairs.popular_rank,
        pairs.columns, pairs.popular_slot, pairs.column_mass, pairs.num_rows, pairs.exact_rows,
        blocks, num_classes, cells, num_slots, most_popular,
        BLOCK_N=block_n, SLOTS=block_slots, CELL=CELL, CELLS=LIST_CELLS,
    )  # fmt: skip
    return pairs
