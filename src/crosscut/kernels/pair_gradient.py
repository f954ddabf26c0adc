"""Gradient of the logits of the selected pairs, and what of the softmax they leave.

For each selected pair (block of BLOCK_N tokens b, class v), see :mod:`.selected_pairs`, and each
hot class in all blocks, its BLOCK_N logits are made again, and

    dz[slot, n] = factor[n] p[n, v] slope[n, v]        or d_own[n] slope[n, v] at its own class

(see :mod:`.gather_tokens`) is stored in the dtype of H, side by side. Rows of C of hot classes lie
side by side, and TMA loads them; those of the other pairs are gathered. That is all that dH needs
of the selected pairs. dC is made of the hot classes' pairs, whole, and of the single *nonzeros* of
the others: the elements with

    |dz| > nonzero threshold |factor| rest        and every own class's,

where ``rest`` is the mass of all classes but the token's own, as large as its gradient, and
``threshold`` that of the block's selected pairs: the flatter the softmax, the smaller what counts.

**Who owns what.** A tile is SLOTS slots of one block. One program per multiprocessor. First the hot
classes, all tiles of a block before the next block's. Then the first tile of every block, the
second of every block, and so on: what runs at once gathers its rows of C from one region of the
vocabulary, and finds them in the L2 cache.

**The rest.** What is left out has row sums and column sums too; they are what stands for it. Here
the selected softmax ``slope p``, but for the tokens' own classes, is summed, tile by tile: over a
tile's slots, for each token, of all pairs (``selected_mass``) and of the nonzeros that dC has
(``nonzero_mass``); over a pair's tokens, of all elements but the nonzeros, relative to the token's
``rest`` (into ``column_mass``, in place of 0).

**Cost.** 2 flop per (pair, token, dimension), and 2 bytes written per (pair, token).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs
from crosscut.device.workspace import Workspace
from crosscut.kernels.logits_tile import (
    LOG2_E,
    Head,
    class_product_tile,
    column_part,
    logits_of,
    slope_of,
)
from crosscut.kernels.selected_pairs import SelectedPairs, Shape
from crosscut.kernels.softmax_gradient import Tokens

TAIL_D = 128
"""Dimensions of a program that sums over a block's tokens."""


class PairGradient(NamedTuple):
    """dz of the selected pairs, and sums of their softmax by tile of slots. Float32 but for dz.

    All lie in a workspace. Of hot classes, where all of a pair counts as nonzero, there are ``dz``
    and the two masses, which are equal.
    """

    dz: Tensor  # [slots, BLOCK_N]
    num_nonzeros: Tensor  # [slots] int32
    selected_mass: Tensor  # [slot tiles, BLOCK_N]
    nonzero_mass: Tensor  # [slot tiles, BLOCK_N]
    rest: Tensor  # [slots], mass of a pair but for its nonzeros


@triton.jit
def nonzero_size(vectors, valid, nonzero):
    """What an element of dz must exceed to be a nonzero of dC, given pointers to vectors."""
    factor = tl.load(vectors + 1, mask=valid, other=0.0)
    return nonzero * tl.abs(factor) * tl.load(vectors + 5, mask=valid, other=0.0)


@triton.jit
def is_nonzero_of(dz, size, is_own):
    """Whether an element of dz, as stored, is a nonzero of dC."""
    negligible = tl.abs(dz) <= size  # a NaN is not
    return (negligible == 0) | is_own


@triton.jit
def pair_products(
    HOT: tl.constexpr,
    hidden_ptr,
    hidden_desc,
    classifier_ptr,
    hot_head_ptr,
    hot_head_desc,
    lists,  # (columns_ptr, hot_ptr) at the tile's first
    first_rank,
    first_row,
    sizes,  # (hidden_size, stride_v, stride_d)
    TILE: tl.constexpr,
):
    """The classes [SLOTS] of a tile, and their products with the tokens [SLOTS, BLOCK_N]."""
    columns_ptr, hot_ptr = lists
    hidden_size, stride_v, stride_d = sizes
    in_tile = tl.arange(0, TILE[1])
    if HOT:
        classes = tl.load(hot_ptr + in_tile)
        product = class_product_tile(
            hidden_ptr, hidden_desc, hot_head_ptr, hot_head_desc, first_row, first_rank + in_tile,
            first_rank, hidden_size, hidden_size, 1, TILE,
        )  # fmt: skip
    else:
        classes = tl.load(columns_ptr + in_tile)
        product = class_product_tile(
            hidden_ptr, hidden_desc, classifier_ptr, None, first_row, classes, 0,
            hidden_size, stride_v, stride_d, TILE,
        )  # fmt: skip
    return classes, product


@triton.jit
def store_gradient(
    HOT: tl.constexpr,
    product,  # [SLOTS, BLOCK_N]
    classes,
    slots,
    valid_slots,  # [SLOTS] each
    slot_tile,
    first_row,
    tokens,  # (num_rows, own_ptr, vectors_ptr)
    logits,  # (logit_scale, softcap)
    out,  # PairGradient
    nonzero,
    PARTS: tl.constexpr,
):
    """Store dz of a tile and the sums over its slots.

    Returns the nonzeros of each slot, and its mass that is in none of them, over the tokens' rest.
    """
    SLOTS: tl.constexpr = product.shape[0]
    BLOCK_N: tl.constexpr = product.shape[1]
    num_rows, own_ptr, vectors_ptr = tokens
    logit_scale, softcap = logits
    count = tl.zeros((SLOTS,), tl.int32)
    rest = tl.zeros((SLOTS,), tl.float32)
    for part in tl.static_range(PARTS):
        token = first_row + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        valid = token < num_rows
        vectors = vectors_ptr + token * 6
        lse = tl.load(vectors, mask=valid, other=0.0)
        factor = tl.load(vectors + 1, mask=valid, other=0.0)[None, :]
        d_own = tl.load(vectors + 2, mask=valid, other=0.0)[None, :]
        own = tl.load(own_ptr + token, mask=valid, other=-1)
        z = product  # [SLOTS, BLOCK_N / PARTS]
        if PARTS > 1:
            z = column_part(product, part, PARTS, SLOTS, BLOCK_N)
        z = logits_of(z, None, logit_scale, softcap)
        p = tl.exp2((z - lse[None, :]) * LOG2_E)
        inside = valid[None, :] & valid_slots[:, None]
        is_own = (classes[:, None] == own[None, :]) & inside
        p = tl.where(inside & (is_own == 0), p, 0.0)
        at_own = tl.where(is_own, d_own, 0.0)
        if softcap is not None:
            slope = slope_of(z, softcap)
            at_own *= slope
            p *= slope
        dz = (factor * p + at_own).to(out.dz.dtype.element_ty)
        in_block = part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        place = slots.to(tl.int64)[:, None] * BLOCK_N + in_block[None, :]
        tl.store(out.dz + place, dz)

        sums = slot_tile * BLOCK_N + in_block
        selected = tl.sum(p, 0)
        tl.store(out.selected_mass + sums, selected)
        if HOT:
            tl.store(out.nonzero_mass + sums, selected)
        else:
            size = nonzero_size(vectors, valid, nonzero)[None, :]
            is_nonzero = is_nonzero_of(dz.to(tl.float32), size, is_own)
            count += tl.sum(is_nonzero.to(tl.int32), 1)
            others = tl.load(vectors + 5, mask=valid, other=0.0)
            share = tl.where(others > 0, 1 / others, 0.0)[None, :]
            rest += tl.sum(tl.where(is_nonzero, 0.0, p * share), 1)
            tl.store(out.nonzero_mass + sums, tl.sum(tl.where(is_nonzero, p, 0.0), 0))
    return count, rest


@kernel
def pair_gradient_kernel(
    tokens,  # Tokens, of 6 vectors
    hidden_desc,
    classifier_ptr,
    hot_head_ptr,
    hot_head_desc,
    pairs,  # SelectedPairs
    out,  # PairGradient
    num_blocks,
    cells,
    num_classes,
    hidden_size,
    stride_v,
    stride_d,
    logit_scale,
    softcap,
    mass_unit,
    nonzero,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    SLOTS: tl.constexpr = TILE[1]
    PARTS: tl.constexpr = 4 if SLOTS == 256 else 1  # a whole tile of 256 does not fit in registers
    num_rows = tl.load(tokens.num_rows)
    blocks = tl.cdiv(tl.maximum(num_rows, 0), BLOCK_N)
    num_hot = tl.load(pairs.hot_count)
    hot_tiles = tl.cdiv(num_hot, SLOTS)
    most_tiles = 0
    for block in range(blocks):
        start = pairs.cell_start + block * (cells + 1)
        num_pairs = tl.load(start + cells) - tl.load(start)
        most_tiles = tl.maximum(most_tiles, tl.cdiv(num_pairs, SLOTS))

    programs = tl.num_programs(0)
    for HOT in tl.static_range(1, -1, -1):
        tiles = (hot_tiles if HOT else most_tiles) * blocks
        first_index = tl.program_id(0)
        if not HOT:  # who had fewer of the hot ones goes first
            first_index = (first_index + programs - hot_tiles * blocks % programs) % programs
        for index in range(first_index, tiles, programs):
            if HOT:
                block = index // hot_tiles
                first_rank = index % hot_tiles * SLOTS
                rank = first_rank + tl.arange(0, SLOTS)
                valid_slots = rank < num_hot
                slots = rank * num_blocks + block
                slot_tile = index % hot_tiles * num_blocks + block
                some = True
                first_slot = 0
            else:
                block = index % blocks
                start = pairs.cell_start + block * (cells + 1)
                first_slot = tl.load(start) + index // blocks * SLOTS
                end_slot = tl.load(start + cells)
                slots = first_slot + tl.arange(0, SLOTS)  # [SLOTS]
                valid_slots = slots < end_slot
                slot_tile = first_slot // SLOTS
                some = first_slot < end_slot
                first_rank = 0
            if some:
                lists = pairs.columns + first_slot, pairs.hot + first_rank
                classes, product = pair_products(
                    HOT, tokens.hidden, hidden_desc, classifier_ptr, hot_head_ptr, hot_head_desc,
                    lists, first_rank, block * BLOCK_N, (hidden_size, stride_v, stride_d), TILE,
                )  # fmt: skip
                of_block = nonzero * tl.load(pairs.threshold + num_blocks + block)
                count, rest = store_gradient(
                    HOT, product, classes, slots, valid_slots, slot_tile, block * BLOCK_N,
                    (num_rows, tokens.own, tokens.vectors), (logit_scale, softcap), out, of_block,
                    PARTS,
                )  # fmt: skip
                if not HOT:
                    tl.store(out.num_nonzeros + slots, count)
                    rest /= mass_unit
                    tl.store(out.rest + slots, rest)
                    mass = pairs.column_mass + block * tl.cast(num_classes, tl.int64) + classes
                    rest = rest.to(pairs.column_mass.dtype.element_ty)
                    tl.store(mass, rest, mask=valid_slots)


def gradient_shapes(num_slots: int, dtype: torch.dtype, tiles: Tiles) -> dict[str, Shape]:
    """What :func:`pair_gradient` fills in a workspace, by name."""
    slot_tiles = num_slots // tiles.block_v
    return {
        "dz": ((num_slots, tiles.block_n), dtype),
        "num_nonzeros": ((num_slots,), torch.int32),
        "selected_mass": ((slot_tiles, tiles.block_n), torch.float32),
        "nonzero_mass": ((slot_tiles, tiles.block_n), torch.float32),
        "rest": ((num_slots,), torch.float32),
    }


def pair_gradient(
    head: Head,
    tokens: Tokens,
    pairs: SelectedPairs,
    workspace: Workspace,
    tiles: Tiles,
    *,
    mass_unit: float,
    nonzero: float,
) -> PairGradient:
    """Dz of every selected pair, and the sums of what is left. Nothing if ``tokens.num_rows < 0``.

    Args:
        head: the head, without a bias; of its hidden states those in ``tokens`` are used.
        tokens: the valid ones, side by side, up to a multiple of BLOCK_N.
        pairs: lists with a multiple of BLOCK_V slots per block; ``pairs.column_mass`` gets the rest
            of each pair whose class is not hot.
        workspace: with the regions of :func:`gradient_shapes`, and ``hot_head``: rows of
            ``head.classifier`` of hot classes, side by side, zeros in the padding.
        tiles: BLOCK_N tokens x BLOCK_V slots, in steps of BLOCK_D dimensions.
        mass_unit: unit of ``column_mass`` and ``rest``.
        nonzero: see the module.
    """
    found = PairGradient(*(workspace[name] for name in PairGradient._fields))
    hot_head = workspace["hot_head"]
    pair_gradient_kernel[(num_programs(pairs.columns.device),)](
        tokens,
        descriptor(tokens.hidden, (tiles.block_n, tiles.block_d), tiles),
        head.classifier,
        hot_head,
        descriptor(hot_head, (tiles.block_v, tiles.block_d), tiles),
        pairs,
        found,
        len(pairs.column_mass),
        pairs.cell_start.shape[1] - 1,
        len(head.classifier),
        head.hidden.shape[1],
        *head.classifier.stride(),
        head.logit_scale,
        head.softcap,
        mass_unit,
        nonzero,
        TILE=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return found


@kernel
def tail_kernel(
    num_rows_ptr,
    hidden_ptr,
    vectors_ptr,
    mass_ptr,
    rows_ptr,
    cell_start_ptr,
    hot_count_ptr,
    tail_ptr,
    selected_mass_ptr,
    nonzero_mass_ptr,
    rest_ptr,
    by_token_ptr,
    by_block_ptr,
    cells,
    hidden_size,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (b, i) owns the tokens of block b in BLOCK_D dimensions; (b, 0) what has none too."""
    block = tl.program_id(0)
    num_rows = tl.load(num_rows_ptr)
    in_block = tl.arange(0, BLOCK_N)
    tokens = block * BLOCK_N + in_block
    start = tl.load(cell_start_ptr + block * (cells + 1))
    pairs = tl.load(cell_start_ptr + block * (cells + 1) + cells) - start
    if block * BLOCK_N >= num_rows:
        pairs = 0
    selected = tl.zeros((BLOCK_N,), tl.float32)
    entered = tl.zeros((BLOCK_N,), tl.float32)
    rest = 0.0
    hot_tiles = tl.where(num_rows < 0, 0, tl.cdiv(tl.load(hot_count_ptr), SLOTS))
    for index in range(hot_tiles):
        mass = tl.load(
            selected_mass_ptr + (index * tl.num_programs(0) + block) * BLOCK_N + in_block
        )
        selected += mass
        entered += mass
    for tile in range(start // SLOTS, start // SLOTS + tl.cdiv(pairs, SLOTS)):
        selected += tl.load(selected_mass_ptr + tile * BLOCK_N + in_block)
        entered += tl.load(nonzero_mass_ptr + tile * BLOCK_N + in_block)
        rest += tl.sum(tl.load(rest_ptr + tile * SLOTS + tl.arange(0, SLOTS)), 0)
    tail = tl.load(tail_ptr + block)
    valid = tokens < num_rows
    factor = tl.load(vectors_ptr + tokens * 6 + 1, mask=valid, other=0.0)
    rows = tl.load(rows_ptr + tokens, mask=valid, other=0)
    mass = tl.load(mass_ptr + rows, mask=valid, other=0.0)
    # Where nothing is left there is nothing to stand for.
    if tl.program_id(1) == 0:
        left = factor * tl.maximum(mass - selected, 0.0) / tl.where(tail > 0, tail, float("inf"))
        tl.store(by_token_ptr + tokens, tl.where(valid, left, 0.0))
    tail += rest
    left = factor * tl.maximum(mass - entered, 0.0) / tl.where(tail > 0, tail, float("inf"))
    left = tl.where(valid, left, 0.0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = hidden_ptr + tokens.to(tl.int64)[:, None] * hidden_size + d[None, :]
    h = tl.load(place, mask=(d < hidden_size)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(left[:, None] * h, 0)
    place = by_block_ptr + block * hidden_size + d
    tl.store(place, total.to(by_block_ptr.dtype.element_ty), mask=d < hidden_size)


def tail_of_tokens(
    tokens: Tokens,
    masses: tuple[Tensor, Tensor],
    pairs: SelectedPairs,
    gradient: PairGradient,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """What stands for the tail, ``x[n] * column_mass[b, v]``, of dH by token and of dC by block.

    ``x`` is ``factor`` times the token's mass that is in no selected pair, or in no nonzero, over
    the sum of the column masses that go with it; ``masses`` are that of all classes but the own
    one, [N] float32, with the rows [N] int32 of the tokens in it.

    Returns:
        ``x`` for dH, [blocks * BLOCK_N] float32, 0 past the last token; and ``sum_n x[n] H[n]`` for
        dC, [blocks, D] bfloat16, whose range it needs.
    """
    blocks, cells = len(pairs.tail), pairs.cell_start.shape[1] - 1
    hidden_size = tokens.hidden.shape[1]
    by_token = torch.empty(blocks * tiles.block_n, dtype=torch.float32, device=pairs.tail.device)
    by_block = tokens.hidden.new_empty(blocks, hidden_size, dtype=torch.bfloat16)
    tail_kernel[(blocks, triton.cdiv(hidden_size, TAIL_D))](
        tokens.num_rows, tokens.hidden, tokens.vectors, *masses,
        pairs.cell_start, pairs.hot_count, pairs.tail,
        gradient.selected_mass, gradient.nonzero_mass, gradient.rest,
        by_token, by_block, cells, hidden_size,
        BLOCK_N=tiles.block_n, SLOTS=tiles.block_v, BLOCK_D=TAIL_D,
    )  # fmt: skip
    return by_token, by_block
