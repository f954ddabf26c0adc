"""A sweep in 8 bits, and what has mass made again in 16.

The log-sum-exp of a token is a sum of a few large terms and very many small ones. Of the small ones
only the sum counts, in which roundings average out: their logits are products of e4m3 operands, at
twice the rate. The pairs (block of tokens, class) that :mod:`.selected_pairs` lists have the large
terms. Their logits are made in both precisions, and with ``others8`` the log-sum-exp of the sweep

    others = others8 + log(1 + sum_selected exp(z16 - others8) - exp(z8 - others8))

The difference is taken term by term. Nothing cancels: the terms that are not selected are never
subtracted from anything.

**Rounding.** A row of H or of C gets one scale, its largest magnitude over 448. Before that a row
``m``, near the mean of all rows, is taken from each, and what is taken is added to the logit again:

    h . c  =  (h - m_h) . (c - m_c)  +  h . m_c  +  m_h . (c - m_c)
              e4m3                      per token   per class          both float32

Any two vectors ``m`` give the same logits; near the means what is left, and its rounding, is
smallest. The sweep has logits in units of ln 2, less the token's part.

**No running maximum.** Exponentials are taken relative to ``reference``, a lower bound of the
log-sum-exp near it. A total overflows where the bound is 88 off, and says so: it is inf.

**Who owns what.** As in :mod:`.linear_lse`, launch by launch: a launch sweeps a range of classes,
as many as the workspace has rows for.

**Numerics.** Products in e4m3. Hopper's tensor cores sum them to about 13 bits. All the rest is
float32, and float64 per token in the end.

**Cost.** 2NVD flop in 8 bits, 2 flop in each precision per selected (pair, token, dimension). Of C,
2VD bytes are read and VD written to round it.
"""

# pyright: reportIndexIssue=none
# (kernels are launched by subscript, which Triton's types do not show)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs, tiles_in_group
from crosscut.kernels.linear_lse import first_own, most_parts, share_of, slices_of
from crosscut.kernels.logits_tile import LOG2_E, column_part, dot_tile
from crosscut.kernels.partial_statistics import SELECTED
from crosscut.kernels.selected_pairs import SelectedPairs

LARGEST = tl.constexpr(448.0)
"""Of e4m3."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

ROUND_ROWS, ROUND_D = 8, 256
"""Rows of a program that rounds, and dimensions at a time."""


class Rounded(NamedTuple):
    """Rows in 8 bits."""

    rows: Tensor  # [R, D] float8_e4m3fn
    scale: Tensor  # [R] float32
    shift: Tensor  # [R] float32, what each row adds to a logit


@triton.jit
def to_e4m3(x):
    """``x`` in 8 bits, rounded to the nearest."""
    if INTERPRETED:  # where the carry into the exponent is lost
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + (1 << 19)) & -(1 << 20)).to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


@kernel
def round_rows_kernel(
    matrix_ptr,
    index_ptr,
    center_ptr,  # [D], what is taken from each row
    partner_ptr,  # [D], what is taken from each row of the other operand
    rounded_ptr,
    scale_ptr,
    shift_ptr,
    num_rows,
    hidden_size,
    stride_row,
    stride_d,
    CENTER_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program i owns ROWS rows. Rows of index -1 become zeros."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    source = rows
    if index_ptr is not None:
        source = tl.load(index_ptr + rows, mask=inside, other=-1)
    known = inside & (source >= 0)
    matrix_rows = matrix_ptr + source.to(tl.int64)[:, None] * stride_row
    largest = tl.zeros((ROWS, BLOCK_D), tl.float32)  # by place: sums cross threads in the end
    shift = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(0, hidden_size, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = known[:, None] & (d < hidden_size)[None, :]
        place = matrix_rows + d.to(tl.int64)[None, :] * stride_d
        x = tl.load(place, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        center = tl.load(center_ptr + d, mask=d < hidden_size, other=0.0)[None, :]
        partner = tl.load(partner_ptr + d, mask=d < hidden_size, other=0.0)[None, :]
        centered = tl.where(mask, x - center, 0.0)
        shift += (centered if CENTER_FIRST else x) * partner
        largest = tl.maximum(largest, tl.abs(centered))
    highest = tl.max(largest, 1)
    tl.store(scale_ptr + rows, highest * (1 / LARGEST), mask=inside)
    tl.store(shift_ptr + rows, tl.sum(shift, 1), mask=inside)
    inverse = tl.where(highest > 0, LARGEST / highest, 0.0)
    rounded_rows = rounded_ptr + rows.to(tl.int64)[:, None] * hidden_size
    for first in range(0, hidden_size, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = known[:, None] & (d < hidden_size)[None, :]
        place = matrix_rows + d.to(tl.int64)[None, :] * stride_d
        x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        center = tl.load(center_ptr + d, mask=d < hidden_size, other=0.0)[None, :]
        rounded = to_e4m3(tl.where(mask, x - center, 0.0) * inverse[:, None])
        mask = inside[:, None] & (d < hidden_size)[None, :]
        tl.store(rounded_rows + d[None, :], rounded, mask=mask)


def round_rows(
    out: Rounded,
    matrix: Tensor,
    center: Tensor,
    partner: Tensor,
    *,
    index: Tensor | None = None,
    center_first: bool,
) -> Rounded:
    """Fill ``out`` with rows of ``matrix`` [.., D] in 8 bits; return it.

    Args:
        out: what to fill, contiguous.
        matrix: the rows.
        center: [D] float32, what is taken from each row before it is rounded.
        partner: [D] float32; a row's shift is its product with it.
        index: [R], which rows; -1 for a row of zeros. The first R if None.
        center_first: whether that is of the row after the center was taken from it.
    """
    round_rows_kernel[(triton.cdiv(len(out.rows), ROUND_ROWS),)](
        matrix, index, center, partner, *out, len(out.rows), matrix.shape[1], *matrix.stride(),
        CENTER_FIRST=center_first, ROWS=ROUND_ROWS, BLOCK_D=ROUND_D, num_warps=4,
    )  # fmt: skip
    return out


def new_rounded(num_rows: int, hidden_size: int, device: torch.device) -> Rounded:
    """Room for rows in 8 bits."""
    return Rounded(
        torch.empty(num_rows, hidden_size, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
        torch.empty(num_rows, dtype=torch.float32, device=device),
    )


@triton.jit
def dot_rounded(left, right, total, PRECISION: tl.constexpr):
    """``total + left right`` of e4m3 operands; ``"upcast"`` for the interpreter."""
    if PRECISION == "upcast":
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, total)


@kernel
def eight_bit_sweep_kernel(
    hidden_desc,  # [N, D], rows that take part
    classifier_desc,  # [num_classes, D]
    hidden_scale_ptr,  # [N], of logits in units of ln 2
    start_ptr,  # [N], reference less shift, in units of ln 2
    classifier_scale_ptr,  # [num_classes]
    classifier_shift_ptr,
    own_ptr,  # [N], by its place among these classes
    num_rows_ptr,
    slice_total_ptr,
    column_mass_ptr,  # from the first of these classes on
    first_class,
    num_classes,
    mass_stride,
    hidden_size,
    logit_scale,
    mass_unit,
    most_tiles,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    PART: tl.constexpr = BLOCK_V // PARTS
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_rows = tl.load(num_rows_ptr)
    token_tiles, class_tiles = tl.cdiv(num_rows, BLOCK_N), tl.cdiv(num_classes, BLOCK_V)
    group, my_slice, slices, first_tile, last_tile, first, last = share_of(
        program, programs, token_tiles, class_tiles, most_tiles
    )
    steps = tl.cdiv(hidden_size, BLOCK_D)
    for first_in_group in range(0, token_tiles, group):
        end = tl.minimum(first_in_group + last, token_tiles)
        for token_tile in range(first_in_group + first, end):
            rows = token_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            valid = rows < num_rows
            own = tl.load(own_ptr + rows, mask=valid, other=-1).to(tl.int32) - first_class
            scale = tl.load(hidden_scale_ptr + rows, mask=valid, other=0.0)
            scale *= logit_scale * LOG2_E
            start = tl.load(start_ptr + rows, mask=valid, other=float("inf"))
            masses = column_mass_ptr
            if column_mass_ptr is not None:
                masses += token_tile * tl.cast(mass_stride, tl.int64)
            total = tl.zeros((BLOCK_N,), tl.float32)
            product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            tile, step = first_tile - 1, steps - 1
            next_own = first_own(own, first_tile * BLOCK_V)
            for _ in tl.range(0, (last_tile - first_tile) * steps, disable_licm=True):
                step = tl.where(step == steps - 1, 0, step + 1)
                if step == 0:
                    tile += 1
                h = hidden_desc.load([token_tile * BLOCK_N, step * BLOCK_D])
                c = classifier_desc.load([tile * BLOCK_V, step * BLOCK_D]).T
                product = dot_rounded(h, c, product, PRECISION)
                if step == steps - 1:
                    for part in tl.static_range(PARTS):
                        first_of_part = tile * BLOCK_V + part * PART
                        classes = first_of_part + tl.arange(0, PART)
                        known = classes < num_classes
                        by_class = tl.load(classifier_scale_ptr + classes, mask=known, other=0.0)
                        z = product
                        if PARTS > 1:
                            z = column_part(product, part, PARTS, BLOCK_N, BLOCK_V)
                        z = z * by_class[None, :]  # [BLOCK_N, PART]
                        if classifier_shift_ptr is not None:
                            by_class = tl.load(
                                classifier_shift_ptr + classes, mask=known, other=0.0
                            )
                            by_class *= logit_scale * LOG2_E
                            p = tl.exp2((z * scale[:, None] - start[:, None]) + by_class[None, :])
                        else:
                            p = tl.exp2(z * scale[:, None] - start[:, None])
                        if tl.minimum(next_own, num_classes) < first_of_part + PART:
                            counts = known[None, :] & (classes[None, :] != own[:, None])
                            p = tl.where(counts, p, 0.0)
                            next_own = first_own(own, first_of_part + PART)
                        total += tl.sum(p, 1)
                        if column_mass_ptr is not None:
                            share = 1 / (tl.maximum(total, 1.0) * mass_unit)
                            mass = tl.sum(p * share[:, None], 0)
                            mass = mass.to(column_mass_ptr.dtype.element_ty)
                            tl.store(masses + classes, mass, mask=known)
                    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            tl.store(slice_total_ptr + rows * slices + my_slice, total, mask=valid)


@kernel
def add_slices_kernel(
    slice_total_ptr,  # of each launch, one after the other
    start_ptr,
    hidden_shift_ptr,
    own_ptr,
    num_rows_ptr,
    others_ptr,
    column_mass_ptr,
    num_classes,
    launch_classes,
    launch_slots,
    logit_scale,
    programs,
    most_tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program b owns block b: its ``others8``, and SELECTED at its own classes."""
    num_rows = tl.load(num_rows_ptr)
    token_tiles = tl.cdiv(num_rows, BLOCK_N)
    block = tl.program_id(0)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < num_rows
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first_class in range(0, num_classes, launch_classes):
        classes = tl.minimum(launch_classes, num_classes - first_class)
        class_tiles = tl.cdiv(classes, BLOCK_V)
        _group, wide, _width, has_last = slices_of(token_tiles, class_tiles, programs, most_tiles)
        slices = wide + has_last
        place = first_class // launch_classes * launch_slots + rows * slices
        for index in range(slices):
            total += tl.load(slice_total_ptr + place + index, mask=valid, other=0.0)
    start = tl.load(start_ptr + rows, mask=valid, other=0.0).to(tl.float64)
    shift = tl.load(hidden_shift_ptr + rows, mask=valid, other=0.0) * logit_scale
    others = start / LOG2_E + shift.to(tl.float64) + tl.log(total.to(tl.float64))
    tl.store(others_ptr + rows, others.to(tl.float32), mask=valid)
    if column_mass_ptr is not None:
        own = tl.load(own_ptr + rows, mask=valid, other=-1)
        known = (own >= 0) & (own < num_classes)
        mass = column_mass_ptr + block.to(tl.int64) * num_classes + own
        tl.store(mass, tl.full((BLOCK_N,), SELECTED, tl.float32), mask=known)


class EightBitTokens(NamedTuple):
    """The tokens that take part, side by side."""

    num_rows: Tensor  # [1] int32
    hidden: Rounded  # [N, D]
    own: Tensor  # [N] int64
    start: Tensor  # [N] float32: a lower bound of ``others`` less ``shift``, in units of ln 2


def launch_slots(tokens: EightBitTokens, tiles: Tiles) -> int:
    """Floats that a launch writes at most."""
    programs = tiles.programs * num_programs(tokens.own.device)
    most_tiles = tiles_in_group(tokens.hidden.rows, tiles)
    return most_parts(len(tokens.own), programs, most_tiles, tiles)


def sweep_classes(
    tokens: EightBitTokens,
    classifier: Rounded,
    slice_total: Tensor,
    column_mass: Tensor | None,
    tiles: Tiles,
    *,
    first_class: int,
    logit_scale: float = 1.0,
    mass_unit: float = 1.0,
    shifted: bool = True,
    parts: int = 1,
) -> None:
    """Totals of some consecutive classes.

    Args:
        tokens: the tokens.
        classifier: the classes' rows.
        slice_total: [launch_slots] float32, gets totals by token and slice.
        column_mass: [blocks, V], whose columns of these classes get their masses, or None.
        tiles: BLOCK_N tokens x BLOCK_V classes, in steps of BLOCK_D dimensions.
        first_class: which they are, as ``tokens.own`` counts.
        logit_scale: of all logits.
        mass_unit: what masses are counted in.
        shifted: whether ``classifier.shift`` is not zero.
        parts: pieces of a tile that are summed one after the other.
    """
    programs = tiles.programs * num_programs(tokens.own.device)
    hidden_size = classifier.rows.shape[1]
    eight_bit_sweep_kernel[(programs,)](
        descriptor(tokens.hidden.rows, (tiles.block_n, tiles.block_d), tiles),
        descriptor(classifier.rows, (tiles.block_v, tiles.block_d), tiles),
        tokens.hidden.scale,
        tokens.start,
        classifier.scale,
        classifier.shift if shifted else None,
        tokens.own,
        tokens.num_rows,
        slice_total,
        None if column_mass is None else column_mass[:, first_class:],
        first_class,
        len(classifier.rows),
        0 if column_mass is None else column_mass.stride(0),
        hidden_size,
        logit_scale,
        mass_unit,
        tiles_in_group(tokens.hidden.rows, tiles),
        PARTS=parts,
        TILE=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def add_slices(
    tokens: EightBitTokens,
    slice_total: Tensor,
    column_mass: Tensor | None,
    tiles: Tiles,
    *,
    num_classes: int,
    launch_classes: int,
    logit_scale: float = 1.0,
) -> Tensor:
    """``others8`` [N] float32 of all launches; SELECTED in ``column_mass`` at own classes."""
    others = torch.empty_like(tokens.start)
    slots = launch_slots(tokens, tiles)
    add_slices_kernel[(triton.cdiv(len(tokens.own), tiles.block_n),)](
        slice_total, tokens.start, tokens.hidden.shift, tokens.own, tokens.num_rows, others,
        column_mass, num_classes, launch_classes, slots, logit_scale,
        tiles.programs * num_programs(tokens.own.device),
        tiles_in_group(tokens.hidden.rows, tiles),
        BLOCK_N=tiles.block_n, BLOCK_V=tiles.block_v, num_warps=4,
    )  # fmt: skip
    return others


@kernel
def compare_pairs_kernel(
    num_rows_ptr,
    hidden_desc,  # [N, D], rows that take part
    rounded_desc,  # the same in e4m3
    hidden_scale_ptr,
    hidden_shift_ptr,
    others_ptr,
    own_ptr,
    classifier_ptr,
    hot_head_desc,  # [hot, D]
    classifier_scale_ptr,
    classifier_shift_ptr,
    center_ptr,
    columns_ptr,
    cell_start_ptr,
    hot_ptr,
    hot_count_ptr,
    difference_ptr,
    square_ptr,
    mass_ptr,
    num_blocks,
    cells,
    hidden_size,
    stride_v,
    stride_d,
    logit_scale,
    TILE: tl.constexpr,
):
    """Sums over tiles of SLOTS slots, for each token; who owns what is as in the gradient's."""
    BLOCK_N: tl.constexpr = TILE[0]
    SLOTS: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    PARTS: tl.constexpr = 4
    num_rows = tl.load(num_rows_ptr)
    blocks = tl.cdiv(tl.maximum(num_rows, 0), BLOCK_N)
    num_hot = tl.load(hot_count_ptr)
    hot_tiles = tl.cdiv(num_hot, SLOTS)
    most_tiles = 0
    for block in range(blocks):
        start = cell_start_ptr + block * (cells + 1)
        pairs = tl.load(start + cells) - tl.load(start)
        most_tiles = tl.maximum(most_tiles, tl.cdiv(pairs, SLOTS))
    offsets = tl.arange(0, BLOCK_D)
    programs = tl.num_programs(0)
    for HOT in tl.static_range(1, -1, -1):
        tiles = (hot_tiles if HOT else most_tiles) * blocks
        first_index = tl.program_id(0)
        if not HOT:
            first_index = (first_index + programs - hot_tiles * blocks % programs) % programs
        for index in range(first_index, tiles, programs):
            if HOT:
                block = index // hot_tiles
                first_rank = index % hot_tiles * SLOTS
                slots = first_rank + tl.arange(0, SLOTS)
                valid_slots = slots < num_hot
                classes = tl.load(hot_ptr + slots, mask=valid_slots, other=0)
                slot_tile = index % hot_tiles * num_blocks + block
                some = True
            else:
                block = index % blocks
                first_rank = 0
                start = cell_start_ptr + block * (cells + 1)
                first_slot = tl.load(start) + index // blocks * SLOTS
                end_slot = tl.load(start + cells)
                slots = first_slot + tl.arange(0, SLOTS)
                valid_slots = slots < end_slot
                classes = tl.load(columns_ptr + slots, mask=valid_slots, other=0)
                slot_tile = first_slot // SLOTS
                some = first_slot < end_slot
            if some:
                by_class = tl.load(classifier_scale_ptr + classes)  # [SLOTS]
                inverse = tl.where(by_class > 0, 1 / by_class, 0.0)
                classifier_rows = classifier_ptr + classes.to(tl.int64)[:, None] * stride_v
                product = tl.zeros((SLOTS, BLOCK_N), tl.float32)
                rounded_product = tl.zeros((SLOTS, BLOCK_N), tl.float32)
                for first_d in range(0, hidden_size, BLOCK_D):
                    inside = offsets < hidden_size - first_d
                    if HOT:
                        c = hot_head_desc.load([first_rank, first_d])
                    else:
                        d = (first_d + offsets).to(tl.int64)[None, :] * stride_d
                        c = tl.load(classifier_rows + d, mask=inside[None, :], other=0.0)
                    h = hidden_desc.load([block * BLOCK_N, first_d])
                    product = dot_tile(c, h.T, product, PRECISION)
                    center = tl.load(center_ptr + first_d + offsets, mask=inside, other=0.0)
                    c8 = (c.to(tl.float32) - center[None, :]) * inverse[:, None]
                    c8 = to_e4m3(tl.where(inside[None, :], c8, 0.0))
                    h8 = rounded_desc.load([block * BLOCK_N, first_d])
                    rounded_product = dot_rounded(c8, h8.T, rounded_product, PRECISION)

                by_class *= logit_scale
                if classifier_shift_ptr is not None:
                    class_shift = tl.load(classifier_shift_ptr + classes) * logit_scale
                for part in tl.static_range(PARTS):
                    in_block = part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
                    tokens = block * BLOCK_N + in_block
                    valid = tokens < num_rows
                    own = tl.load(own_ptr + tokens, mask=valid, other=-1)
                    others = tl.load(others_ptr + tokens, mask=valid, other=float("inf"))
                    shift = tl.load(hidden_shift_ptr + tokens, mask=valid, other=0.0)
                    scale = tl.load(hidden_scale_ptr + tokens, mask=valid, other=0.0)
                    z16, z8 = product, rounded_product
                    if PARTS > 1:
                        z16 = column_part(product, part, PARTS, SLOTS, BLOCK_N)
                        z8 = column_part(rounded_product, part, PARTS, SLOTS, BLOCK_N)
                    z16 = z16 * logit_scale - others[None, :]  # [SLOTS, BLOCK_N / PARTS]
                    z8 = z8 * by_class[:, None] * scale[None, :]
                    z8 += (shift * logit_scale - others)[None, :]
                    if classifier_shift_ptr is not None:
                        z8 += class_shift[:, None]
                    counts = valid_slots[:, None] & (classes[:, None] != own[None, :])
                    counts &= valid[None, :]
                    p16 = tl.where(counts, tl.exp2(z16 * LOG2_E), 0.0)
                    p8 = tl.where(counts, tl.exp2(z8 * LOG2_E), 0.0)
                    off = tl.where(counts, z8 - z16, 0.0)
                    place = slot_tile * BLOCK_N + in_block
                    tl.store(difference_ptr + place, tl.sum(p16 - p8, 0))
                    tl.store(square_ptr + place, tl.sum(p16 * off * off, 0))
                    tl.store(mass_ptr + place, tl.sum(p16, 0))


@kernel
def correct_kernel(
    num_rows_ptr,
    rows_ptr,
    cell_start_ptr,
    hot_count_ptr,
    difference_ptr,
    square_ptr,
    mass_ptr,
    others8_ptr,
    own_logit_ptr,
    others_ptr,
    lse_ptr,
    lse_compensation_ptr,
    log_prob_ptr,
    rest_ptr,
    spread_ptr,
    selected_ptr,
    cells,
    num_blocks,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program b owns block b."""
    block = tl.program_id(0)
    num_rows = tl.load(num_rows_ptr)
    in_block = tl.arange(0, BLOCK_N)
    places = block * BLOCK_N + in_block
    valid = places < num_rows
    start = tl.load(cell_start_ptr + block * (cells + 1))
    end = tl.load(cell_start_ptr + block * (cells + 1) + cells)
    difference = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    hot_tiles = tl.cdiv(tl.load(hot_count_ptr), SLOTS)
    tiles = hot_tiles + tl.cdiv(end - start, SLOTS)
    for first in range(0, tiles, TILES):
        index = first + tl.arange(0, TILES)
        of_pairs = start // SLOTS + index - hot_tiles
        tile = tl.where(index < hot_tiles, index * num_blocks + block, of_pairs)
        place = tile[:, None] * BLOCK_N + in_block[None, :]
        inside = (index < tiles)[:, None] & valid[None, :]
        difference += tl.sum(tl.load(difference_ptr + place, mask=inside, other=0.0), 0)
        square += tl.sum(tl.load(square_ptr + place, mask=inside, other=0.0), 0)
        mass += tl.sum(tl.load(mass_ptr + place, mask=inside, other=0.0), 0)
    ratio = 1 + difference.to(tl.float64)
    rows = tl.load(rows_ptr + places, mask=valid, other=0)
    others = tl.load(others8_ptr + places, mask=valid, other=0.0).to(tl.float64) + tl.log(ratio)
    own_logit = tl.load(own_logit_ptr + rows, mask=valid, other=0.0).to(tl.float64)
    odds = others - own_logit
    e = tl.exp(-tl.abs(odds))
    log1p = tl.where(e < 1e-5, e - e * e * 0.5, tl.log(1 + e))
    log_prob = -(tl.maximum(odds, 0.0) + log1p)
    lse = tl.maximum(others, own_logit) + log1p
    high = lse.to(tl.float32)
    tl.store(others_ptr + rows, others.to(tl.float32), mask=valid)
    tl.store(lse_ptr + rows, high, mask=valid)
    tl.store(lse_compensation_ptr + rows, (lse - high.to(tl.float64)).to(tl.float32), mask=valid)
    tl.store(log_prob_ptr + rows, log_prob.to(tl.float32), mask=valid)
    rest = tl.where(odds > 0, 1.0, e) / (1 + e)
    tl.store(rest_ptr + rows, rest.to(tl.float32), mask=valid)
    share = mass / ratio.to(tl.float32)
    tl.store(selected_ptr + rows, share, mask=valid)
    spread = tl.where(mass > 0, square / mass, 0.0)
    tl.store(spread_ptr + rows, tl.sqrt(spread), mask=valid)


class Corrected(NamedTuple):
    """Statistics of the tokens that take part, [N] float32 by row; undefined at other rows."""

    others: Tensor
    lse: Tensor
    lse_compensation: Tensor
    log_prob: Tensor
    rest: Tensor
    spread: Tensor  # root mean square of z8 - z16 over the selected softmax
    selected: Tensor  # share of the others' softmax that is selected


class Comparison(NamedTuple):
    """What both precisions are given."""

    hidden: Tensor  # [N, D] in 16 bits, the rows that take part side by side
    classifier: Tensor  # [V, D] in 16 bits
    hot_head: Tensor  # rows of hot classes, side by side
    scale: Tensor  # [V] float32, of the rounded rows
    shift: Tensor | None  # [V] float32
    center: Tensor  # [D] float32


def correct(
    tokens: EightBitTokens,
    others8: Tensor,
    own_logit: Tensor,
    rows: Tensor,
    pairs: SelectedPairs,
    given: Comparison,
    tiles: Tiles,
    *,
    logit_scale: float = 1.0,
) -> Corrected:
    """The statistics, with the selected pairs in 16 bits.

    Args:
        tokens: the tokens.
        others8: [N], what the sweep found.
        own_logit: [N] by row, the own classes' logits.
        rows: [N] int32, the tokens' rows.
        pairs: the selected pairs; a block's slots are a multiple of ``tiles.block_v``.
        given: the operands.
        tiles: BLOCK_N tokens x BLOCK_V slots, in steps of BLOCK_D dimensions.
        logit_scale: of all logits.
    """
    slot_tiles = len(pairs.columns) // tiles.block_v
    sums = [
        torch.empty(slot_tiles, tiles.block_n, dtype=torch.float32, device=rows.device)
        for _ in range(3)
    ]
    blocks, cells = len(pairs.cell_start), pairs.cell_start.shape[1] - 1
    block = tiles.block_n, tiles.block_d
    compare_pairs_kernel[(tiles.programs * num_programs(rows.device),)](
        tokens.num_rows, descriptor(given.hidden, block, tiles),
        descriptor(tokens.hidden.rows, block, tiles), tokens.hidden.scale, tokens.hidden.shift,
        others8, tokens.own, given.classifier,
        descriptor(given.hot_head, (tiles.block_v, tiles.block_d), tiles),
        given.scale, given.shift, given.center,
        pairs.columns, pairs.cell_start, pairs.hot, pairs.hot_count, *sums,
        blocks, cells, given.hidden.shape[1], *given.classifier.stride(), logit_scale,
        TILE=tiles.constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    found = Corrected(*(torch.empty_like(own_logit) for _ in Corrected._fields))
    correct_kernel[(blocks,)](
        tokens.num_rows, rows, pairs.cell_start, pairs.hot_count, *sums, others8, own_logit,
        *found, cells, blocks, BLOCK_N=tiles.block_n, SLOTS=tiles.block_v, TILES=32, num_warps=8,
    )  # fmt: skip
    return found
