"""Linear log-sum-exp: Algorithm 2 of the paper (arXiv:2411.09009).

    lse[n] = log sum_v exp z[n, v]          z = softcap(logit_scale * H C^T + bias)

and what else is asked for:

    logit_sum[n] = sum_v logit_weight[v] z[n, v]
    entropy[n]   = -sum_v p log p        p = exp(z - lse)
    rank[n]      = number of classes ahead of the token's own, and the best class but that

Logits are made tile by tile in registers, reduced to a running (max, sum) per token, and dropped.
The token's own class, its target, is left out of all sums over classes but ``logit_sum``; it joins
when the parts of a token are combined (:mod:`.partial_statistics`).

**Who owns what.** As many programs as run at once. Token tiles are worked on in groups whose hidden
states fit in the L2 cache. Of P programs and G tiles in a group, P // G work on each tile: each on
a slice of the vocabulary of W class tiles. The programs left over share a last, narrower slice, W
being such that all finish together. With P = 14, G = 4:

                     classes ->
    token tile 0     0000000000  4444444444  88888888888  CC
    token tile 1     1111111111  5555555555  99999999999  CC    13 programs of equal work in 3
    token tile 2     2222222222  6666666666  AAAAAAAAAAA  DD    wide slices and 2 in the last
    token tile 3     3333333333  7777777777  BBBBBBBBBBB  DD
                     slice 0     slice 1     slice 2      slice 3

All programs of a slice walk it in step, so a tile of C comes from memory once per group, and
everything else from L2.

**Result.** A program stores one part, (max, sum) and what else is asked for, per token and slice,
with plain stores. A second kernel combines a token's parts in order. No atomics: reruns are bitwise
equal.

**Cost.** 2NVD flop. C is read once per group of tokens, H once. Workspace: 8 bytes per token and
slice, and there are few slices when there are many tokens: at most 1 KiB for each program and
group. An entropy adds 4 bytes, ranks 12.

**Column masses.** The same exponentials, summed over a tile's tokens instead of its classes, are
the mass of a column in that tile of tokens: of the softmax that the other classes have among
themselves, ``exp(z - others)``, as a token's gradient is as large as the mass of its others. Their
log-sum-exp is not known yet: the mass is taken relative to the larger of its running value and a
lower bound given before (``reference``), and is rather too large. Where asked for, the masses are
stored, SELECTED in place of those of the tokens' own classes. With a softcap every exponential
counts times its slope, ``1 - (z / softcap)^2``, as in the gradient.

**Ranks.** A class is ahead of the token's own where its logit is higher than the target logit, or
equal and its index lower. The target logit is the given one, that of the indexed matmul.

**Numerics.** Sums, maxima and exponentials in float32. A class of -inf adds nothing; a NaN reaches
the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs, tiles_in_group
from crosscut.kernels.logits_tile import (
    LOG2_E,
    NEGLIGIBLE,
    Head,
    column_part,
    dot_tile,
    load_rows,
    logits_at,
    product_tile,
    slope_of,
)
from crosscut.kernels.partial_statistics import LinearLse, Own, PartialStatistics, combine
from crosscut.kernels.valid_rows import ValidRows

MORE_GROUPS = tl.constexpr(3)  # group counts tried, from the fewest that fit in L2


class Wanted(NamedTuple):
    """What a sweep is to find beside the log-sum-exp."""

    logit_weight: Tensor | None = None  # [V] float32
    entropy: bool = False
    ranks: bool = False
    class_ids: Tensor | None = None  # [V], which classes those of the head are; all, if None


class Columns(NamedTuple):
    """Column masses to be stored.

    For each tile of BLOCK_N valid rows ``sum_n slope exp(z - others) / unit``, or SELECTED for the
    rows' own classes.
    """

    mass: Tensor  # [token tiles, V], any float dtype, contiguous
    reference: Tensor  # [N] float32, a lower bound of ``others``
    unit: float


@triton.jit
def slices_of(token_tiles, class_tiles, programs, most_tiles):
    """How token tiles are grouped and the vocabulary is cut.

    Returns the tiles in a group, the number of wide slices, their width in tiles, and whether
    there is a last, narrower slice.
    """
    fewest = tl.maximum(tl.cdiv(token_tiles, most_tiles), 1)
    best_group, best_wide, best_width, best_time = 1, programs, class_tiles, 2147483647
    for groups in range(fewest, fewest + MORE_GROUPS):
        group = tl.maximum(tl.cdiv(token_tiles, groups), 1)
        wide = programs // group
        left = programs - wide * group
        if left > 0:  # each of them takes `each` token tiles of the last slice
            each = tl.cdiv(group, left)
            width = tl.cdiv(each * class_tiles, wide * each + 1)
        else:
            width = tl.cdiv(class_tiles, wide)
        time = tl.cdiv(token_tiles, group) * width
        if time < best_time:
            best_group, best_wide, best_width, best_time = group, wide, width, time
    return best_group, best_wide, best_width, programs > best_wide * best_group


@triton.jit
def share_of(program, programs, token_tiles, class_tiles, most_tiles):
    """A program's class tiles and its token tiles in each group.

    Returns the tiles in a group, the program's slice, of how many, its first class tile and that
    after its last, and its first token tile in a group and that after its last.
    """
    group, wide, width, has_last = slices_of(token_tiles, class_tiles, programs, most_tiles)
    if program < wide * group:
        my_slice, first, each = program // group, program % group, 1
    else:
        each = tl.cdiv(group, programs - wide * group)
        my_slice, first = wide, (program - wide * group) * each
    first_tile = tl.minimum(my_slice * width, class_tiles)
    last_tile = class_tiles if my_slice == wide else tl.minimum(first_tile + width, class_tiles)
    last = tl.minimum(first + each, group)
    return group, my_slice, wide + has_last, first_tile, last_tile, first, last


@triton.jit
def first_own(own, first_class):
    """The first class from ``first_class`` on that is a token's own."""
    return tl.min(tl.where(own >= first_class, own, 2147483647), 0)


@triton.jit
def weighted_sum(z, logit_weight_ptr, classes, num_classes):
    """``sum_v logit_weight[v] z[v]`` of each token, [BLOCK_N]."""
    inside = classes < num_classes
    weight = tl.load(logit_weight_ptr + classes, mask=inside, other=0.0)
    return tl.sum(tl.where(inside[None, :], weight[None, :] * z, 0.0), 1)


@triton.jit
def leave_out_own(z, own, next_own, class_ids_ptr, first_class, num_classes, PART: tl.constexpr):
    """-inf in place of the tokens' own classes, and of what is past the last class.

    Returns the logits [BLOCK_N, PART], and the first own class past these.
    """
    classes = first_class + tl.arange(0, PART)
    if class_ids_ptr is not None:
        ids = tl.load(class_ids_ptr + classes, mask=classes < num_classes, other=-1)
        counts = (classes < num_classes)[None, :] & (ids[None, :] != own[:, None])
        z = tl.where(counts, z, -float("inf"))
    elif tl.minimum(next_own, num_classes) < first_class + PART:  # few parts of tiles
        counts = (classes < num_classes)[None, :] & (classes[None, :] != own[:, None])
        z = tl.where(counts, z, -float("inf"))
        next_own = first_own(own, first_class + PART)
    return z, next_own


@triton.jit
def add_to_ranks(z, classes, num_classes, own, target_logit, rank, best_logit, best_class):
    """More logits of each token to its rank, highest logit, and first class that has it."""
    before = classes[None, :] < own[:, None]
    ahead = tl.where(before, z >= target_logit[:, None], z > target_logit[:, None])
    rank += tl.sum(ahead.to(tl.int32), 1)
    best = tl.max(z, 1)
    place = tl.min(tl.where(z == best[:, None], classes[None, :], num_classes), 1)
    best_class = tl.where(best > best_logit, place, best_class)
    return rank, tl.maximum(best_logit, best), best_class


@triton.jit
def add_to_sums(z, unit, highest, total, weighted, ENTROPY: tl.constexpr, FOLD: tl.constexpr):
    """More logits of each token, ``unit * z``, to its ``highest``, ``total`` and ``weighted``.

    Returns the three, their exponentials ``p = exp(unit * z - reference)``, ``reference``, which is
    ``highest``, or 0 where there is none yet, and what other sums of p must be multiplied by.
    """
    higher = tl.maximum(highest, tl.max(z, 1) * unit)
    reference = tl.where(higher == -float("inf"), 0.0, higher)
    rescale = tl.exp2((highest - reference) * LOG2_E)
    if FOLD:
        p = tl.exp2(z * (unit * LOG2_E) - (reference * LOG2_E)[:, None])
    else:
        p = tl.exp2((z - reference[:, None]) * LOG2_E)
    if ENTROPY:
        weighted += total * tl.maximum(highest - reference, NEGLIGIBLE)
        more = p * tl.maximum(z * unit - reference[:, None], NEGLIGIBLE)
        weighted = weighted * rescale + tl.sum(more, 1)
    total = total * rescale + tl.sum(p, 1)
    return higher, total, weighted, p, reference, rescale


@triton.jit
def store_masses(columns, p, reference, total, classes, num_classes):
    """The masses of some columns in a tile of tokens, from ``p = exp(z - reference)``.

    ``columns.mass`` points to the tile's row; ``columns.reference`` [BLOCK_N] is inf for no token.
    """
    bound = tl.exp2((columns.reference - reference) * LOG2_E)  # on the lse, as total is
    # No class yet: no mass, and no number were it divided by 0.
    share = 1 / (tl.maximum(tl.maximum(bound, total), 1e-30) * columns.unit)
    mass = tl.sum(p * share[:, None], 0)
    mass = mass.to(columns.mass.dtype.element_ty)
    tl.store(columns.mass + classes, mass, mask=classes < num_classes)


@triton.jit
def sweep_slice(
    hidden_ptr,
    hidden_desc,
    head,  # HeadArguments
    classifier_desc,
    logit_weight_ptr,
    class_ids_ptr,  # [num_classes], or None where classes are their places
    columns,  # Columns of the token tile, see store_masses; or None
    rows,  # [BLOCK_N]
    first_row,
    own,  # [BLOCK_N], the tokens' own classes
    target_logit,  # [BLOCK_N], theirs, for ranks; or None
    first_tile,
    last_tile,
    num_classes,
    ENTROPY: tl.constexpr,
    FOLD: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """PartialStatistics' fields, but the count, over some class tiles; [BLOCK_N] each."""
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    # Of the whole product, halves or quarters: for which of them there are registers, was tried.
    ALONE: tl.constexpr = target_logit is None and not (ENTROPY and columns is not None)
    FEW: tl.constexpr = ENTROPY and head.bias is None and logit_weight_ptr is None
    PARTS: tl.constexpr = 2 if ALONE and (FOLD or FEW) else 4
    PART: tl.constexpr = BLOCK_V // PARTS
    SLOPED: tl.constexpr = columns is not None and head.softcap is not None
    unit = head.logit_scale if FOLD else 1.0  # of z
    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    logit_sum = tl.zeros((BLOCK_N,), tl.float32)
    sloped = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int32)
    best_logit = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_class = tl.zeros((BLOCK_N,), tl.int32)
    # One loop over the steps of all tiles, where TMA loads both: while a tile is summed up, the
    # next is being loaded. Where much is summed, registers do not allow that.
    LEAN: tl.constexpr = target_logit is None and logit_weight_ptr is None
    FUSED: tl.constexpr = LEAN and not GATHER and classifier_desc is not None
    steps = tl.cdiv(head.hidden_size, BLOCK_D)
    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    tile, step = first_tile - 1, steps - 1
    next_own = first_own(own, first_tile * BLOCK_V)
    rounds = (last_tile - first_tile) * (steps if FUSED else 1)
    for _ in tl.range(0, rounds, disable_licm=True):  # frees registers
        if FUSED and hidden_desc is not None and classifier_desc is not None:
            step = tl.where(step == steps - 1, 0, step + 1)
            if step == 0:
                tile += 1
            h = hidden_desc.load([first_row, step * BLOCK_D])
            c = classifier_desc.load([tile * BLOCK_V, step * BLOCK_D]).T
            product = dot_tile(h, c, product, PRECISION)
        else:
            tile += 1
            product = product_tile(
                hidden_ptr, hidden_desc, head, classifier_desc, rows, first_row, tile * BLOCK_V,
                num_classes, GATHER, TILE,
            )  # fmt: skip
        if step == steps - 1:
            for part in tl.static_range(PARTS):
                first_class = tile * BLOCK_V + part * PART
                classes = first_class + tl.arange(0, PART)
                z = column_part(product, part, PARTS, BLOCK_N, BLOCK_V)  # [BLOCK_N, PART]
                if not FOLD:
                    z = logits_at(z, head, classes, num_classes)
                    if logit_weight_ptr is not None:
                        logit_sum += weighted_sum(z, logit_weight_ptr, classes, num_classes)
                if SLOPED:
                    slope = slope_of(z, head.softcap)
                z, next_own = leave_out_own(
                    z, own, next_own, class_ids_ptr, first_class, num_classes, PART
                )
                if target_logit is not None:
                    rank, best_logit, best_class = add_to_ranks(
                        z, classes, num_classes, own, target_logit, rank, best_logit, best_class
                    )
                highest, total, weighted, p, reference, rescale = add_to_sums(
                    z, unit, highest, total, weighted, ENTROPY, FOLD
                )
                if columns is not None:
                    if SLOPED:
                        p *= slope
                        sloped = sloped * rescale + tl.sum(p, 1)
                    store_masses(columns, p, reference, total, classes, num_classes)
            product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    return highest, total, logit_sum, sloped, weighted, rank, best_logit, best_class


@kernel
def linear_lse_kernel(
    hidden_ptr,
    hidden_desc,
    head,  # HeadArguments
    classifier_desc,
    logit_weight_ptr,
    class_ids_ptr,
    valid_rows,  # ValidRows
    own,  # Own
    columns,  # Columns, or None
    parts,  # PartialStatistics, to be filled: a part per slice
    num_classes,
    most_tiles,
    FOLD: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_rows = tl.load(valid_rows.count)
    token_tiles, class_tiles = tl.cdiv(num_rows, BLOCK_N), tl.cdiv(num_classes, BLOCK_V)
    group, my_slice, slices, first_tile, last_tile, first, last = share_of(
        program, programs, token_tiles, class_tiles, most_tiles
    )

    # First the tiles that TMA loads, then those with a gap: in two passes, for under a condition
    # the assembler makes matrix products wait for each other.
    for GATHER in tl.static_range(hidden_desc is None, 2):
        for start in range(0, token_tiles, group):
            end = tl.minimum(start + last, token_tiles)
            for tile in range(start + first, end):
                rows, valid, first_row, no_gap = load_rows(valid_rows.rows, tile, num_rows, BLOCK_N)
                of_tile, target_logit = None, None
                own_classes = tl.load(own.classes + rows).to(tl.int32)
                if columns is not None:
                    of_tile = Columns(
                        mass=columns.mass + tile * tl.cast(num_classes, tl.int64),
                        reference=tl.load(columns.reference + rows, mask=valid, other=float("inf")),
                        unit=columns.unit,
                    )
                if parts.rank is not None:
                    target_logit = tl.load(own.logit + rows)
                mine = True
                if hidden_desc is not None:
                    mine = no_gap == (not GATHER)
                found = sweep_slice(
                    hidden_ptr, hidden_desc, head, classifier_desc, logit_weight_ptr,
                    class_ids_ptr, of_tile, rows, first_row, own_classes, target_logit, first_tile,
                    tl.where(mine, last_tile, first_tile), num_classes,
                    parts.weighted is not None, FOLD, GATHER, TILE,
                )  # fmt: skip
                valid &= mine
                place = (tile * BLOCK_N + tl.arange(0, BLOCK_N)) * slices + my_slice
                for field in tl.static_range(8):
                    if parts[field + 1] is not None:  # after the count
                        tl.store(parts[field + 1] + place, found[field], mask=valid)
    tl.store(parts.count, slices, mask=program == 0)


def most_parts(num_tokens: int, programs: int, most_tiles: int, tiles: Tiles) -> int:
    """Of all tokens together, a part per slice, for any number of valid rows."""
    token_tiles = triton.cdiv(num_tokens, tiles.block_n)
    most_groups = min(triton.cdiv(token_tiles, most_tiles) + MORE_GROUPS.value, token_tiles)
    return tiles.block_n * (most_groups * programs + token_tiles)


def sweep_classes(
    head: Head,
    valid_rows: ValidRows,
    own: Own,
    tiles: Tiles,
    wanted: Wanted,
    columns: Columns | None,
) -> PartialStatistics:
    """A part per slice of the vocabulary; as :func:`linear_lse`, but for SELECTED masses."""
    logit_weight, entropy, ranks, class_ids = wanted
    hidden, classifier = head.hidden, head.classifier
    programs = tiles.programs * num_programs(hidden.device)
    most_tiles = tiles_in_group(hidden, tiles)
    slots = most_parts(len(hidden), programs, most_tiles, tiles)

    def new(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=hidden.device)

    # The scale is multiplied into the exponent, which rounds a little more.
    fold = hidden.dtype != torch.float32 and head.bias is None and head.softcap is None
    fold &= head.logit_scale > 0 and logit_weight is None and not ranks
    parts = PartialStatistics(
        count=new(1, torch.int32),
        highest=new(slots),
        total=new(slots),
        logit_sum=None if logit_weight is None else new(slots),
        sloped=new(slots) if columns is not None and head.softcap is not None else None,
        weighted=new(slots) if entropy else None,
        rank=new(slots, torch.int32) if ranks else None,
        best_logit=new(slots) if ranks else None,
        best_class=new(slots, torch.int32) if ranks else None,
    )
    linear_lse_kernel[(programs,)](
        hidden,
        descriptor(hidden, (tiles.block_n, tiles.block_d), tiles),
        head.arguments,
        descriptor(classifier, (tiles.block_v, tiles.block_d), tiles),
        logit_weight,
        class_ids,
        valid_rows,
        own,
        columns,
        parts,
        len(classifier),
        most_tiles,
        FOLD=fold,
        TILE=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return parts


def linear_lse(
    head: Head,
    valid_rows: ValidRows,
    own: Own,
    tiles: Tiles,
    wanted: Wanted | None = None,
    columns: Columns | None = None,
) -> LinearLse:
    """``lse`` and what is ``wanted``; fills ``columns.mass``.

    Args:
        head: the head, with contiguous hidden states.
        valid_rows: the valid rows.
        own: each token's own class.
        tiles: BLOCK_N tokens x BLOCK_V classes, in steps of BLOCK_D dimensions.
        wanted: what else to find; nothing if None.
        columns: where to store column masses, or None.
    """
    parts = sweep_classes(head, valid_rows, own, tiles, wanted or Wanted(), columns)
    column_mass = None if columns is None else columns.mass
    return combine(parts, valid_rows, own, column_mass, block_n=tiles.block_n)
