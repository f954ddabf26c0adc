"""The pairs (block of tokens, class) that a filtered gradient keeps, listed on the device.

The forward leaves ``column_mass`` [blocks, V], where a kept pair is marked KEPT. Here that becomes,
without the host knowing how many there are,

    columns[slot]          the class of each pair. Slots go block by block, and within a block by
                           class. A block's slots begin at a multiple of SLOTS.
    cell_start[b, t]       first slot of block b whose class is in cell t (CELL classes) or later

              classes ->     cell 0   cell 1   cell 2
    block 0   slots  0..     0 1 2    3        4 5 6  padding
    block 1   slots  SLOTS.. ..

Classes kept by at least half of the blocks are *popular*: they are few and have most of the pairs.
They are listed too, with their slot in every block.

Each program reads CHUNK classes of a block once, and owns what it writes. Prefix sums are
PyTorch's. Bytes: 3 times ``column_mass``, and 4 a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.kernels.kept_rows import KeptRows
from crosscut.kernels.launch import kernel

CELL = 64
"""Classes of a cell."""

CHUNK_CELLS = 32

MOST_POPULAR = 2**14


class KeptPairs(NamedTuple):
    """The lists; see the module. Entries past the last are undefined unless said otherwise."""

    columns: Tensor  # [slots] int32; 0 in the padding
    cell_start: Tensor  # [blocks, cells + 1] int32
    tail: Tensor  # [blocks] float32, sum of the column masses of the pairs not kept
    popular: Tensor  # [MOST_POPULAR] int32
    popular_count: Tensor  # [1] int32
    popular_rank: Tensor  # [V] int32, -1 for others
    popular_slot: Tensor  # [blocks, MOST_POPULAR] int32, -1 where not kept
    fits: Tensor  # [] bool, whether there are slots enough


@kernel
def keep_labels_kernel(
    column_mass_ptr, labels_ptr, rows_ptr, num_rows_ptr, num_classes, BLOCK_N: tl.constexpr
):
    """Program b marks the labels of its block."""
    num_rows = tl.load(num_rows_ptr)
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(rows_ptr + places, mask=places < num_rows, other=0)
    labels = tl.load(labels_ptr + rows, mask=places < num_rows, other=-1)
    known = (labels >= 0) & (labels < num_classes)
    mass = column_mass_ptr + tl.program_id(0).to(tl.int64) * num_classes + labels
    tl.store(mass, tl.full((BLOCK_N,), -1.0, tl.float32), mask=known)  # KEPT


def keep_labels(column_mass: Tensor, labels: Tensor, kept: KeptRows, block_n: int) -> None:
    """Mark the label of every row that takes part as kept by its block of ``block_n``."""
    keep_labels_kernel[(len(column_mass),)](
        column_mass, labels, kept.rows, kept.count, column_mass.shape[1], BLOCK_N=block_n
    )


@triton.jit
def load_masses(column_mass_ptr, num_classes, CELL: tl.constexpr, CELLS: tl.constexpr):
    """This program's chunk of a block's masses and its classes, [CELLS, CELL]."""
    classes = (tl.program_id(1) * CELLS + tl.arange(0, CELLS))[:, None] * CELL
    classes += tl.arange(0, CELL)[None, :]
    row = column_mass_ptr + tl.program_id(0).to(tl.int64) * num_classes
    return tl.load(row + classes, mask=classes < num_classes, other=0.0).to(tl.float32), classes


@kernel
def count_pairs_kernel(
    column_mass_ptr, count_ptr, tail_ptr, num_classes, cells, CELL: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    mass, _classes = load_masses(column_mass_ptr, num_classes, CELL, CELLS)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    count = tl.sum((mass < 0).to(tl.int32), 1)
    tl.store(count_ptr + tl.program_id(0) * cells + cell, count, mask=cell < cells)
    tail = tl.sum(tl.sum(tl.maximum(mass, 0.0), 1), 0)
    tl.store(tail_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tail)


@kernel
def count_blocks_kernel(column_mass_ptr, count_ptr, num_blocks, num_classes, BLOCK_V: tl.constexpr):
    """By how many blocks each class is kept; program i owns BLOCK_V classes."""
    classes = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    count = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(0, num_blocks, 32):
        block = start + tl.arange(0, 32)
        place = column_mass_ptr + block.to(tl.int64)[:, None] * num_classes + classes[None, :]
        inside = (block < num_blocks)[:, None] & (classes < num_classes)[None, :]
        count += tl.sum((tl.load(place, mask=inside, other=0.0) < 0).to(tl.int32), 0)
    tl.store(count_ptr + classes, count, mask=classes < num_classes)


@kernel
def list_pairs_kernel(
    column_mass_ptr, cell_start_ptr, popular_rank_ptr, columns_ptr, popular_slot_ptr,
    num_classes, cells, num_slots, most_popular, CELL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    mass, classes = load_masses(column_mass_ptr, num_classes, CELL, CELLS)
    block = tl.program_id(0)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    first = tl.load(cell_start_ptr + block * (cells + 1) + cell, mask=cell < cells, other=0)
    kept = (mass < 0).to(tl.int32)
    slot = first[:, None] + tl.cumsum(kept, 1) - 1
    listed = (kept > 0) & (slot < num_slots)
    tl.store(columns_ptr + slot, classes, mask=listed)
    rank = tl.load(popular_rank_ptr + classes, mask=listed, other=-1)
    tl.store(popular_slot_ptr + block * most_popular + rank, slot, mask=listed & (rank >= 0))


def kept_pairs(
    column_mass: Tensor, num_blocks: Tensor, *, num_slots: int, block_slots: int
) -> KeptPairs:
    """List the pairs marked KEPT in ``column_mass`` [blocks, V].

    Args:
        column_mass: zeros, or any mass not kept, in the blocks past ``num_blocks``.
        num_blocks: [] int32, how many blocks have tokens.
        num_slots: room for pairs and padding.
        block_slots: what a block's slots are a multiple of.
    """
    blocks, num_classes = column_mass.shape
    cells = triton.cdiv(num_classes, CELL)
    chunks = triton.cdiv(cells, CHUNK_CELLS)

    def new(*shape: int, value: int = 0) -> Tensor:
        return torch.full(shape, value, dtype=torch.int32, device=column_mass.device)

    count, kept_by = new(blocks, cells), new(num_classes)
    tail = torch.empty(blocks, chunks, dtype=torch.float32, device=column_mass.device)
    grid, sizes = (blocks, chunks), {"CELL": CELL, "CELLS": CHUNK_CELLS}
    count_pairs_kernel[grid](column_mass, count, tail, num_classes, cells, **sizes)
    count_blocks_kernel[(triton.cdiv(num_classes, 128),)](
        column_mass, kept_by, blocks, num_classes, BLOCK_V=128
    )

    cell_end = count.cumsum(1, dtype=torch.int32)
    padded = (cell_end[:, -1] + (block_slots - 1)) // block_slots * block_slots
    block_end = padded.cumsum(0, dtype=torch.int32)
    cell_start = new(blocks, cells + 1)
    cell_start[:, 1:] = cell_end
    cell_start += (block_end - padded)[:, None]

    is_popular = (kept_by * 2 >= num_blocks) & (kept_by > 0)
    rank = is_popular.cumsum(0, dtype=torch.int32) - 1
    is_popular &= rank < MOST_POPULAR
    popular = new(MOST_POPULAR + 1)
    index = torch.where(is_popular, rank, MOST_POPULAR).long()
    classes = torch.arange(num_classes, dtype=torch.int32, device=column_mass.device)
    popular.scatter_(0, index, classes)
    rank = torch.where(is_popular, rank, -1)

    columns, popular_slot = new(num_slots), new(blocks, MOST_POPULAR, value=-1)
    list_pairs_kernel[grid](
        column_mass, cell_start, rank, columns, popular_slot,
        num_classes, cells, num_slots, MOST_POPULAR, **sizes,
    )  # fmt: skip
    return KeptPairs(
        columns=columns,
        cell_start=cell_start,
        tail=tail.sum(1),
        popular=popular,
        popular_count=is_popular.sum(dtype=torch.int32).reshape(1),
        popular_rank=rank,
        popular_slot=popular_slot,
        fits=block_end[-1] <= num_slots,
    )
