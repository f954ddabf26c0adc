"""The gradient of the selected pairs, however many there are, by chunks of the vocabulary.

For where the selected pairs (block of tokens, class) of :mod:`.selected_pairs` do not fit the
capacity for their lists, or dC has too many nonzeros. What is computed is the same, and so is what
stands for the rest (:mod:`.pair_gradient`):

    dz[v, n]  = gradient of a selected pair's logits; 0 for pairs that are not selected
    dH[n]     = scale * (sum_v dz[v, n] C[v] + x[n] u[b])
    dC[v]     = scale * (sum_n dz[v, n] H[n] + sum_b column_mass[b, v] w[b])

with ``x[n] u[b]`` the tail of dH, as in :mod:`.pair_matmul`. That of dC has to be known before the
first chunk is written, when nobody knows yet how much of each token's mass is selected. There each
token of a block has an equal share of its mass in the tail: ``w[b]`` is the mean over the block's
tokens of their gradient's size times H[n]. The sums over tokens, which dC wants, are right all the
same.

**Live tiles.** Within each SEGMENT classes are sorted by how many blocks select them, most first. A
tile is RANKS consecutive classes in that order and a block of tokens; it is live where any of its
pairs is selected. Classes that are alike in this share their tiles, so that few tiles are live.
Only those are computed, whole, and what of them is not selected is made 0.

            classes, sorted ->             blocks of tile 0: 0 1 2 3
    block 0   #### ####  ..   ..           blocks of tile 1: 0 3
    block 1   ####  ..   ..   ..           blocks of tile 2: 2
    block 2   ####  ..  ####  ..
    block 3   #### ####  ..   ..           tiles of block 0: 0 1

**Who owns what.** In the first launch a program owns a segment. In the others, as in
:mod:`.exact_sweep`, one program per multiprocessor owns every P-th tile of what is made, and all of
them wait for each other between two phases: first the lists of the launch's chunks; then of each
chunk ``dz``, several live tiles of a block at a time, and the two products. Everything is written
by one program, dH once per chunk, and sums are in one order: reruns are bitwise equal.

**Cost.** 6 flop per dimension of each (token, class) in live tiles. Workspace: as the exact sweep,
the masses of a chunk's tail, and lists of 9 bytes per (block, tile) and 4 per class.

**Numerics.** As in :mod:`.tile_matmul`: dH is two numbers until its last chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel, real_device
from crosscut.device.tiles import Tiles, descriptor, num_programs
from crosscut.kernels.exact_sweep import wait_for_all
from crosscut.kernels.logits_tile import (
    LOG2_E,
    Head,
    class_product_tile,
    column_part,
    dot_tile,
    logits_of,
    slope_of,
)
from crosscut.kernels.selected_pairs import is_selected
from crosscut.kernels.softmax_gradient import Tokens
from crosscut.kernels.tile_matmul import COMPENSATION_SCALE

SUM_D = tl.constexpr(128)
"""Dimensions of a program that sums over a block's tokens."""

MASS_BLOCKS = tl.constexpr(16)
"""Blocks of tokens of a step."""

LIST_TILES = tl.constexpr(256)


class SelectedMasses(NamedTuple):
    """What says which pairs are selected."""

    column_mass: Tensor  # [blocks, V]
    num_classes: int
    threshold: Tensor  # [blocks]
    hot_rank: Tensor  # [V] int32; from 0 on: selected in every block


class SortedClasses(NamedTuple):
    """The classes, sorted by how many blocks select them in each segment; and the live tiles."""

    order: Tensor  # [V and padding] int32, class by rank
    num_live: Tensor  # [tiles] int32
    live_blocks: Tensor  # [tiles, blocks] int32, ascending; of a tile the first ``num_live`` count
    live: Tensor  # [blocks, tiles] int8
    tiles: int


class Tail(NamedTuple):
    """What stands for the pairs that are not selected."""

    mass: Tensor  # [N] float32, by place in the call: of all classes but the token's own
    unit: float  # of column masses
    sum: Tensor  # [blocks] float32, of the masses of a block's pairs that are not selected
    row: Tensor | None  # [blocks, D] float32, ``u``; None if dH is not wanted
    selected: Tensor  # [N] float32: where what is selected in the chunks so far is summed


class SweepOutputs(NamedTuple):
    """What a sweep fills; None for what is not wanted."""

    rows: Tensor  # [N] int32, of dH: where the valid tokens have theirs
    num_hidden_rows: Tensor  # [1] int32; negative where dH is not to be touched
    d_hidden: Tensor | None  # [N, D], contiguous
    compensation: Tensor | None  # [N, D], what d_hidden lacks, if that is not float32
    d_classifier: Tensor | None  # [V, D], contiguous


class _Lists(NamedTuple):
    """Of a launch's own."""

    num_tiles: Tensor  # [blocks, chunks of the launch] int32: live ones
    tiles: Tensor  # [blocks, tiles] int32: of each chunk, from its first tile on
    in_chunk: Tensor  # [tiles of a chunk, N] float32, of some tiles of the chunk
    tail_row: Tensor  # [blocks, D] bfloat16, ``w``
    tail_mass: Tensor  # [blocks, classes of a chunk], masses of what is not selected


@triton.jit
def is_hot(masses, classes, inside):
    """Whether classes are."""
    return tl.load(masses.hot_rank + classes, mask=inside, other=-1) >= 0


@triton.jit
def selected_in(masses, block, classes, hot, inside):
    """Whether pairs are selected, of any shape of ``block`` and ``classes``; and their masses."""
    place = block.to(tl.int64) * masses.num_classes + classes
    mass = tl.load(masses.column_mass + place, mask=inside, other=0.0)
    selected = is_selected(mass.to(tl.float32), tl.load(masses.threshold + block))
    return (selected | hot) & inside, mass


@kernel
def sort_classes_kernel(
    num_rows_ptr,
    masses,  # SelectedMasses
    out,  # SortedClasses
    num_blocks,
    BLOCK_N: tl.constexpr,
    SEGMENT: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Program i owns segment i."""
    TILES: tl.constexpr = SEGMENT // RANKS
    num_rows = tl.load(num_rows_ptr)
    if num_rows >= 0:
        blocks = tl.cdiv(num_rows, BLOCK_N)
        first = tl.program_id(0) * SEGMENT
        classes = first + tl.arange(0, SEGMENT)
        inside = classes < masses.num_classes
        hot = is_hot(masses, classes, inside)
        count = tl.zeros((SEGMENT,), tl.int32)
        for block in range(blocks):
            of_block = tl.full((1,), block, tl.int32)
            selected, _ = selected_in(masses, of_block, classes, hot, inside)
            count += selected.to(tl.int32)
        count = tl.where(inside, count, -1)  # what is no class comes last
        place = out.order + first - 1
        for by in range(blocks, -2, -1):
            mine = (count == by).to(tl.int32)
            tl.store(place + tl.cumsum(mine, 0), classes, mask=mine > 0)
            place += tl.sum(mine, 0)
        tl.debug_barrier()

        rank = first + tl.arange(0, TILES)[:, None] * RANKS + tl.arange(0, RANKS)[None, :]
        order = tl.load(out.order + rank)  # [TILES, RANKS]
        inside = order < masses.num_classes
        hot = is_hot(masses, order, inside)
        tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
        num_live = tl.zeros((TILES,), tl.int32)
        for block in range(blocks):
            of_block = tl.full((1, 1), block, tl.int32)
            selected, _ = selected_in(masses, of_block, order, hot, inside)
            live = tl.max(selected.to(tl.int32), 1)  # [TILES]
            tl.store(out.live + block * out.tiles + tile, live.to(tl.int8))
            tl.store(out.live_blocks + tile * num_blocks + num_live, block, mask=live > 0)
            num_live += live
        tl.store(out.num_live + tile, num_live)


def segment_classes(device: torch.device) -> int:
    """Classes that are sorted together: few in the interpreter, so that small heads have many."""
    return 2048 if real_device(device).type == "cuda" else 128


def sort_classes(num_rows: Tensor, masses: SelectedMasses, tiles: tuple[int, int]) -> SortedClasses:
    """Sort the classes, and list the live tiles. Nothing if ``num_rows`` [1] is negative.

    Args:
        num_rows: how many tokens are valid.
        masses: which pairs are selected.
        tiles: tokens of a block, and classes of a tile.
    """
    device, segment = masses.column_mass.device, segment_classes(masses.column_mass.device)
    num_blocks, num_classes = masses.column_mass.shape
    segments = triton.cdiv(num_classes, segment)
    num_tiles = segments * segment // tiles[1]

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    found = SortedClasses(
        order=new(segments * segment),
        num_live=new(num_tiles),
        live_blocks=new(num_tiles, num_blocks),
        live=new(num_blocks, num_tiles, dtype=torch.int8),
        tiles=num_tiles,
    )
    sort_classes_kernel[(segments,)](
        num_rows, masses, found, num_blocks,
        BLOCK_N=tiles[0], SEGMENT=segment, RANKS=tiles[1], num_warps=8,
    )  # fmt: skip
    return found


@triton.jit
def list_tiles(num_blocks, classes, ordered, lists, chunks, RANKS: tl.constexpr):
    """Of each block and each chunk of ``classes`` (first, last, width): the live tiles."""
    first_class, last_class, width = classes
    for index in range(tl.program_id(0), num_blocks * chunks, tl.num_programs(0)):
        block, chunk = index // chunks, index % chunks
        first = (first_class + chunk * width) // RANKS
        end = tl.cdiv(tl.minimum(first_class + (chunk + 1) * width, last_class), RANKS)
        count = 0
        for start in range(first, end, LIST_TILES):
            tile = start + tl.arange(0, LIST_TILES)
            live = tl.load(ordered.live + block * ordered.tiles + tile, mask=tile < end, other=0)
            live = live.to(tl.int32)
            place = block * ordered.tiles + first + count + tl.cumsum(live, 0) - 1
            tl.store(lists.tiles + place, tile, mask=live > 0)
            count += tl.sum(live, 0)
        tl.store(lists.num_tiles + index, count)


@triton.jit
def sum_tokens(tokens, num_blocks, rows_ptr, tail, out_ptr, hidden_size, BLOCK_N: tl.constexpr):
    """``w`` of each block: the sum of its hidden states, each times its share of the tail."""
    num_rows = tl.load(tokens.num_rows)
    d_tiles = tl.cdiv(hidden_size, SUM_D)
    for index in range(tl.program_id(0), num_blocks * d_tiles, tl.num_programs(0)):
        block = index // d_tiles
        token = block * BLOCK_N + tl.arange(0, BLOCK_N)
        d = index % d_tiles * SUM_D + tl.arange(0, SUM_D)
        valid = token < num_rows
        factor = tl.load(tokens.vectors + token * 6 + 1, mask=valid, other=0.0)
        rows = tl.load(rows_ptr + token, mask=valid, other=0)
        mass = tl.load(tail.mass + rows, mask=valid, other=0.0)
        number = tl.minimum(num_rows - block * BLOCK_N, BLOCK_N)
        share = factor * mass * (tail.unit / number)
        place = tokens.hidden + token.to(tl.int64)[:, None] * hidden_size + d[None, :]
        h = tl.load(place, mask=(d < hidden_size)[None, :], other=0.0).to(tl.float32)
        total = tl.sum(share[:, None] * h, 0)
        tl.store(out_ptr + block * hidden_size + d, total.to(tl.bfloat16), mask=d < hidden_size)


@triton.jit
def store_dz(
    product,  # [SLOTS, BLOCK_N]
    classes,  # -1 where a pair is not selected
    rows,  # of dz, -1 where there is none; [SLOTS] each
    first_row,
    tokens,
    head,
    dz_ptr,
    dz_tokens,
    selected_mass_ptr,
    PARTS: tl.constexpr,
):
    """Store dz of a tile, and the selected softmax of each token, but for its own class."""
    SLOTS: tl.constexpr = product.shape[0]
    BLOCK_N: tl.constexpr = product.shape[1]
    num_rows = tl.load(tokens.num_rows)
    for part in tl.static_range(PARTS):
        in_block = part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        token = first_row + in_block
        valid = token < num_rows
        vectors = tokens.vectors + token * 6
        lse = tl.load(vectors, mask=valid, other=0.0)[None, :]
        factor = tl.load(vectors + 1, mask=valid, other=0.0)[None, :]
        d_own = tl.load(vectors + 2, mask=valid, other=0.0)[None, :]
        own = tl.load(tokens.own + token, mask=valid, other=-1)
        z = product  # [SLOTS, BLOCK_N / PARTS]
        if PARTS > 1:
            z = column_part(product, part, PARTS, SLOTS, BLOCK_N)
        z = logits_of(z, None, head.logit_scale, head.softcap)
        p = tl.exp2((z - lse) * LOG2_E)
        inside = valid[None, :] & (classes >= 0)[:, None]
        is_own = (classes[:, None] == own[None, :]) & inside
        p = tl.where(inside & (is_own == 0), p, 0.0)
        at_own = tl.where(is_own, d_own, 0.0)
        if head.softcap is not None:
            slope = slope_of(z, head.softcap)
            at_own *= slope
            p *= slope
        place = dz_ptr + rows.to(tl.int64)[:, None] * dz_tokens + token[None, :]
        value = (factor * p + at_own).to(dz_ptr.dtype.element_ty)
        tl.store(place, value, mask=(rows >= 0)[:, None])
        tl.store(selected_mass_ptr + token, tl.sum(p, 0))


@triton.jit
def live_gradient(
    tokens, hidden_desc, head, masses, ordered, lists, dz_ptr, chunk, chunks, begin, end,
    dz_tokens, RANKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Dz of the live tiles of a chunk; a tile here is BLOCK_V / RANKS of them, of one block."""
    BLOCK_N: tl.constexpr = TILE[0]
    SLOTS: tl.constexpr = TILE[1]
    AT_ONCE: tl.constexpr = SLOTS // RANKS
    PARTS: tl.constexpr = 4 if SLOTS == 256 else 1  # a whole tile of 256 does not fit in registers
    tl.static_assert(SLOTS % RANKS == 0)
    blocks = tl.cdiv(tl.load(tokens.num_rows), BLOCK_N)
    most = 0
    for start in range(0, blocks, LIST_TILES):
        block = start + tl.arange(0, LIST_TILES)
        count = tl.load(lists.num_tiles + block * chunks + chunk, mask=block < blocks, other=0)
        most = tl.maximum(most, tl.max(count, 0))
    for index in range(tl.program_id(0), tl.cdiv(most, AT_ONCE) * blocks, tl.num_programs(0)):
        block, step = index % blocks, index // blocks
        count = tl.load(lists.num_tiles + block * chunks + chunk)
        if step * AT_ONCE < count:
            slot = tl.arange(0, SLOTS)
            entry = step * AT_ONCE + slot // RANKS
            listed = entry < count
            tile = block * ordered.tiles + begin // RANKS + entry
            tile = tl.load(lists.tiles + tile, mask=listed, other=0)
            rank = tile * RANKS + slot % RANKS
            inside = listed & (rank < end)
            classes = tl.load(ordered.order + rank, mask=inside, other=0)
            product = class_product_tile(
                tokens.hidden, hidden_desc, head.classifier, None, block * BLOCK_N, classes, 0,
                head.hidden_size, head.stride_v, head.stride_d, TILE,
            )  # fmt: skip
            hot = is_hot(masses, classes, inside)
            of_block = tl.full((1,), block, tl.int32)
            selected, _ = selected_in(masses, of_block, classes, hot, inside)
            store_dz(
                product, tl.where(selected, classes, -1), tl.where(listed, rank - begin, -1),
                block * BLOCK_N, tokens, head, dz_ptr, dz_tokens,
                lists.in_chunk + step * tl.cast(dz_tokens, tl.int64), PARTS,
            )  # fmt: skip


@triton.jit
def tail_masses(num_blocks, masses, order_ptr, out_ptr, begin, end, width, RANKS: tl.constexpr):
    """Of the blocks and the classes of a chunk the masses that are not selected, side by side."""
    steps = tl.cdiv(num_blocks, MASS_BLOCKS)
    for index in range(tl.program_id(0), steps * tl.cdiv(end - begin, RANKS), tl.num_programs(0)):
        block = (index % steps * MASS_BLOCKS + tl.arange(0, MASS_BLOCKS))[:, None]
        rank = begin + index // steps * RANKS + tl.arange(0, RANKS)
        classes = tl.load(order_ptr + rank, mask=rank < end, other=0)
        hot = is_hot(masses, classes, rank < end)[None, :]
        of_block = tl.minimum(block, num_blocks - 1)
        inside = (block < num_blocks) & (rank < end)[None, :]
        selected, mass = selected_in(masses, of_block, classes[None, :], hot, inside)
        place = out_ptr + block * width + (rank - begin)[None, :]
        tl.store(place, tl.where(selected, 0.0, mass), mask=block < num_blocks)


@triton.jit
def d_classifier_of_live(
    tokens, hidden_desc, head, ordered, lists, dz, out_ptr, scale_ptr, num_blocks, width, begin,
    end, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The rows of dC of a chunk: RANKS classes x BLOCK_D dimensions each."""
    RANKS: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    STEP: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    IN_BLOCK: tl.constexpr = BLOCK_N // STEP
    dz_ptr, dz_desc, dz_tokens = dz
    hidden_size = head.hidden_size
    blocks = tl.cdiv(tl.load(tokens.num_rows), BLOCK_N)
    d_tiles = tl.cdiv(hidden_size, BLOCK_D)
    for index in range(tl.program_id(0), tl.cdiv(end - begin, RANKS) * d_tiles, tl.num_programs(0)):
        first_rank = begin + index // d_tiles * RANKS
        rank = first_rank + tl.arange(0, RANKS)
        first_d = index % d_tiles * BLOCK_D
        d = first_d + tl.arange(0, BLOCK_D)
        d_inside = (d < hidden_size)[None, :]
        classes = tl.load(ordered.order + rank, mask=rank < end, other=0)
        total = tl.zeros((RANKS, BLOCK_D), tl.float32)
        for first in tl.range(0, blocks, MASS_BLOCKS, num_stages=1):
            block = (first + tl.arange(0, MASS_BLOCKS))[:, None]
            place = lists.tail_mass + block * width + (rank - begin)[None, :]
            mass = tl.load(place, mask=block < blocks, other=0.0)  # [MASS_BLOCKS, RANKS]
            place = lists.tail_row + block * hidden_size + d[None, :]
            row = tl.load(place, mask=(block < blocks) & d_inside, other=0.0)
            total = dot_tile(mass.T, row, total, PRECISION)

        live_blocks = ordered.live_blocks + first_rank // RANKS * num_blocks
        for step in range(tl.load(ordered.num_live + first_rank // RANKS) * IN_BLOCK):
            first = tl.load(live_blocks + step // IN_BLOCK) * BLOCK_N + step % IN_BLOCK * STEP
            token = first + tl.arange(0, STEP)
            if dz_desc is not None:
                gradient = dz_desc.load([first_rank - begin, first])
            else:
                place = dz_ptr + (rank - begin).to(tl.int64)[:, None] * dz_tokens
                gradient = tl.load(place + token[None, :])  # [RANKS, STEP]
            if hidden_desc is not None:
                h = hidden_desc.load([first, first_d])
            else:
                place = tokens.hidden + token.to(tl.int64)[:, None] * hidden_size + d[None, :]
                h = tl.load(place, mask=d_inside, other=0.0)  # [STEP, BLOCK_D]
            total = dot_tile(gradient, h, total, PRECISION)

        for part in tl.static_range(4):
            d = first_d + part * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
            value = column_part(total, part, 4, RANKS, BLOCK_D) * tl.load(scale_ptr)
            place = out_ptr + classes.to(tl.int64)[:, None] * hidden_size + d[None, :]
            inside = (rank < end)[:, None] & (d < hidden_size)[None, :]
            tl.store(place, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tail_share(
    tokens, rows_ptr, lists, tail, count, token, begin, last, dz_tokens, AT_ONCE: tl.constexpr
):
    """The selected mass of some tokens [BLOCK_N] in all chunks so far.

    And, if the chunk is the last one, the gradient of the mass that is not selected; else 0.
    """
    valid = token < tl.load(tokens.num_rows)
    selected = tl.load(tail.selected + token, mask=valid & (begin > 0), other=0.0)
    for step in range(tl.cdiv(count, AT_ONCE)):
        selected += tl.load(lists.in_chunk + step * tl.cast(dz_tokens, tl.int64) + token)
    factor = tl.load(tokens.vectors + token * 6 + 1, mask=valid & last, other=0.0)
    rows = tl.load(rows_ptr + token, mask=valid & last, other=0)
    mass = tl.load(tail.mass + rows, mask=valid & last, other=0.0)
    return selected, factor * tl.maximum(mass - selected, 0.0)


@triton.jit
def add_d_hidden_of_live(
    tokens, head, ordered, lists, tail, dz, out, scale_ptr, chunk, chunks, begin, end,
    last, BLOCK_N: tl.constexpr, AT_ONCE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to dH: BLOCK_N tokens x BLOCK_D dimensions; with the last one the tail."""
    RANKS: tl.constexpr = TILE[0]
    BLOCK_D: tl.constexpr = TILE[1]
    STEP: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    IN_TILE: tl.constexpr = RANKS // STEP
    dz_ptr, dz_desc, dz_tokens = dz
    hidden_size = head.hidden_size
    num_rows = tl.load(tokens.num_rows)
    d_tiles = tl.cdiv(hidden_size, BLOCK_D)
    items = tl.where(tl.load(out.num_hidden_rows) < 0, 0, tl.cdiv(num_rows, BLOCK_N) * d_tiles)
    for index in range(tl.program_id(0), items, tl.num_programs(0)):
        block = index // d_tiles
        first_d = index % d_tiles * BLOCK_D
        d = first_d + tl.arange(0, BLOCK_D)
        d_inside = (d < hidden_size)[None, :]
        token = block * BLOCK_N + tl.arange(0, BLOCK_N)
        count = tl.load(lists.num_tiles + block * chunks + chunk)
        tiles = lists.tiles + block * ordered.tiles + begin // RANKS
        valid = token < num_rows
        selected, share = tail_share(
            tokens, out.rows, lists, tail, count, token, begin, last, dz_tokens, AT_ONCE
        )
        sum_of_tail = tl.load(tail.sum + block)  # where nothing is left nothing stands for it
        share /= tl.where(sum_of_tail > 0, sum_of_tail, float("inf"))
        keeps = (first_d == 0) & (last == 0)
        tl.store(tail.selected + token, selected, mask=valid & keeps)
        classifier_columns = head.classifier + d.to(tl.int64)[None, :] * head.stride_d
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for step in range(count * IN_TILE):
            first = tl.load(tiles + step // IN_TILE) * RANKS + step % IN_TILE * STEP
            rank = first + tl.arange(0, STEP)
            if dz_desc is not None:
                gradient = dz_desc.load([first - begin, block * BLOCK_N])
            else:
                place = dz_ptr + (rank - begin).to(tl.int64)[:, None] * dz_tokens
                gradient = tl.load(place + token[None, :])  # [STEP, BLOCK_N]
            classes = tl.load(ordered.order + rank, mask=rank < end, other=0).to(tl.int64)
            place = classifier_columns + classes[:, None] * head.stride_v
            c = tl.load(place, mask=d_inside, other=0.0)  # [STEP, BLOCK_D]
            total = dot_tile(gradient.T, c, total, PRECISION)

        rows = tl.load(out.rows + token, mask=valid, other=0).to(tl.int64)
        for part in tl.static_range(4):
            d = first_d + part * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
            inside = valid[:, None] & (d < hidden_size)[None, :]
            value = column_part(total, part, 4, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D / 4]
            row = tl.load(tail.row + block * hidden_size + d, mask=d < hidden_size, other=0.0)
            value = (value + share[:, None] * row[None, :]) * tl.load(scale_ptr)
            place = rows[:, None] * hidden_size + d[None, :]
            before = inside & (begin > 0)
            if out.compensation is not None:
                left_over = tl.load(out.compensation + place, mask=before, other=0.0)
                value += left_over.to(tl.float32) * (1 / COMPENSATION_SCALE)
            value += tl.load(out.d_hidden + place, mask=before, other=0.0).to(tl.float32)
            rounded = value.to(out.d_hidden.dtype.element_ty)
            tl.store(out.d_hidden + place, rounded, mask=inside)
            if out.compensation is not None:
                left_over = (value - rounded.to(tl.float32)) * COMPENSATION_SCALE
                left_over = left_over.to(out.compensation.dtype.element_ty)
                tl.store(out.compensation + place, left_over, mask=inside)


@kernel
def pair_sweep_kernel(
    tokens,  # Tokens
    hidden_desc,
    hidden_right_desc,
    head,  # HeadArguments
    masses,  # SelectedMasses
    ordered,  # SortedClasses
    lists,  # _Lists
    tail,  # Tail
    out,  # SweepOutputs
    dz_ptr,
    dz_of_ranks_desc,
    dz_of_tokens_desc,
    scale_ptr,
    arrived_ptr,
    last_phase,
    first_class,
    last_class,
    width,
    num_blocks,
    dz_tokens,
    GRADIENT: tl.constexpr,
    MATMUL: tl.constexpr,
    FENCE: tl.constexpr,
    FIRST_PHASE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = GRADIENT[0]
    RANKS: tl.constexpr = MATMUL[0]
    AT_ONCE: tl.constexpr = GRADIENT[1] // RANKS
    num_rows = tl.load(tokens.num_rows)
    blocks = tl.cdiv(tl.maximum(num_rows, 0), BLOCK_N)
    chunks = tl.cdiv(last_class - first_class, width)
    stop = tl.where(num_rows < 0, FIRST_PHASE, last_phase)
    FIRST_OF_CHUNKS: tl.constexpr = FIRST_PHASE if FIRST_PHASE > 0 else 1
    if FIRST_PHASE == 0:  # not in the loop: what it needs would stay in registers
        classes = first_class, last_class, width
        list_tiles(blocks, classes, ordered, lists, chunks, RANKS)
        if out.d_classifier is not None:
            sum_tokens(tokens, blocks, out.rows, tail, lists.tail_row, head.hidden_size, BLOCK_N)
        if stop > 1:
            wait_for_all(arrived_ptr, tl.num_programs(0), FENCE)
    for phase in range(FIRST_OF_CHUNKS, stop):
        chunk = (phase - 1) // 2
        begin = first_class + chunk * width
        end = tl.minimum(begin + width, last_class)
        if phase % 2 == 1:
            live_gradient(
                tokens, hidden_desc, head, masses, ordered, lists, dz_ptr, chunk, chunks,
                begin, end, dz_tokens, RANKS, GRADIENT,
            )  # fmt: skip
            if out.d_classifier is not None:
                tail_masses(
                    blocks, masses, ordered.order, lists.tail_mass, begin, end, width, RANKS
                )
        else:
            if out.d_hidden is not None:
                add_d_hidden_of_live(
                    tokens, head, ordered, lists, tail, (dz_ptr, dz_of_tokens_desc, dz_tokens),
                    out, scale_ptr, chunk, chunks, begin, end,
                    end == masses.num_classes, BLOCK_N, AT_ONCE, MATMUL,
                )  # fmt: skip
            if out.d_classifier is not None:
                d_classifier_of_live(
                    tokens, hidden_right_desc, head, ordered, lists,
                    (dz_ptr, dz_of_ranks_desc, dz_tokens), out.d_classifier, scale_ptr,
                    num_blocks, width, begin, end, BLOCK_N, MATMUL,
                )  # fmt: skip
        if phase + 1 < stop:
            wait_for_all(arrived_ptr, (phase + 1 - FIRST_PHASE) * tl.num_programs(0), FENCE)


def pair_sweep(
    head: Head,
    tokens: Tokens,
    selection: tuple[SelectedMasses, SortedClasses],
    tail: Tail,
    out: SweepOutputs,
    chunks: tuple[Tensor, range],
    scale: Tensor,
    tiles: tuple[Tiles, Tiles],
) -> None:
    """The gradient of some classes. Nothing if ``tokens.num_rows < 0``.

    Args:
        head: the head, without a bias; of its hidden states those in ``tokens`` are used.
        tokens: the valid ones; finite up to a multiple of BLOCK_N.
        selection: which pairs are selected, and of :func:`sort_classes`.
        tail: what stands for the others.
        out: what to fill. dH is added to what is there, unless the classes begin at 0.
        chunks: workspace ``dz`` [multiple of BLOCK_N >= N, chunk], chunk a multiple of RANKS, of
            anything; and the classes, from a multiple of SEGMENT on and up to one, or to the last.
            If ``dz`` lies in rows of dC, they are those of other classes.
        scale: [1] float32.
        tiles: of the gradient, BLOCK_N tokens x BLOCK_V classes, in steps of BLOCK_D dimensions;
            and of the products, BLOCK_N rows (= RANKS, and tokens of a block) x BLOCK_V
            dimensions, in steps of BLOCK_D.
    """
    (gradient, matmul), (dz, classes) = tiles, chunks
    masses, ordered = selection
    dz_tokens, width = dz.shape
    dz = dz.view(width, dz_tokens)
    blocks, hidden_size = len(masses.column_mass), head.hidden.shape[1]
    num_chunks = triton.cdiv(len(classes), width)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=dz.device)

    lists = _Lists(
        num_tiles=new(blocks, num_chunks),
        tiles=new(blocks, ordered.tiles),
        in_chunk=new(triton.cdiv(width, gradient.block_v), dz_tokens, dtype=torch.float32),
        tail_row=new(blocks, hidden_size, dtype=torch.bfloat16),
        tail_mass=new(blocks, width, dtype=torch.bfloat16),
    )
    phases = 1 + 2 * num_chunks
    # The interpreter runs program after program, and so has to phase after phase.
    together = gradient.precision != "upcast"
    for first in range(0, phases, phases if together else 1):
        pair_sweep_kernel[(num_programs(dz.device),)](
            tokens,
            descriptor(tokens.hidden, (gradient.block_n, gradient.block_d), gradient),
            descriptor(tokens.hidden, (matmul.block_d, matmul.block_v), matmul),
            head.arguments,
            masses,
            ordered,
            lists,
            tail,
            out,
            dz,
            descriptor(dz, (matmul.block_n, matmul.block_d), matmul),
            descriptor(dz, (matmul.block_d, matmul.block_n), matmul),
            scale,
            torch.zeros(1, dtype=torch.int32, device=dz.device),
            phases if together else first + 1,
            classes.start,
            classes.stop,
            width,
            blocks,
            dz_tokens,
            GRADIENT=gradient.constants,
            MATMUL=matmul.constants,
            FENCE=matmul.descriptors and together,
            FIRST_PHASE=first,
            num_warps=gradient.num_warps,
            num_stages=gradient.num_stages,
            launch_cooperative_grid=together,
        )  # fmt: skip
