"""Linear log-sum-exp: Algorithm 2 of the paper (arXiv:2411.09009).

    lse[n] = log sum_v exp z[n, v]          z = softcap(logit_scale * H C^T + bias)

and what else is asked for:

    logit_sum[n] = sum_v logit_weight[v] z[n, v]
    entropy[n]   = -sum_v p log p        p = exp(z - lse)
    rank[n]      = number of classes ahead of the token's own, and the best class but that

Logits are made tile by tile in registers, reduced to a running (max, sum) per token, and dropped.

**The token's own class**, its target, is left out of all sums over classes but ``logit_sum``. It
joins in the end, with the logit of the indexed matmul: with ``others`` the log-sum-exp of the rest,

    log_prob[n] = -log(1 + exp(others[n] - own_logit[n]))

has its digits where the model is sure, and is never positive.

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

All programs of a slice walk it in step, so a tile of C comes from memory once for the group, and
everything else from L2.

**Result.** A program stores one (max, sum) a (token, slice), with plain stores. A second kernel
combines a token's slices in order. No atomics: reruns are bitwise equal.

**Cost.** 2NVD flop. C is read once a group of tokens, H once. Workspace: 8 bytes a (token, slice),
and there are few slices when there are many tokens: at most 1 KiB for each program and group. An
entropy adds 4 bytes, ranks 12.

**Column masses.** The same exponentials, summed over a tile's tokens instead of its classes, are
the mass of a column in that tile of tokens: of the softmax that the other classes have among
themselves, ``exp(z - others)``, as a token's gradient is as large as the mass of its others. Their
log-sum-exp is not known yet: the mass is taken relative to the larger of its running value and a
lower bound given before (``reference``), and is rather too large. Where asked for, the masses are
stored, SELECTED in place of those of the tokens' own classes. With a softcap every exponential
counts times its slope, ``1 - (z / softcap)^2``, as in the gradient.

**Entropy.** ``W = sum exp(z - max) (z - max)`` runs along with ``S = sum exp(z - max)``, and in the
end the entropy of the others is ``log S - W / S``. When the maximum moves up by d, ``W`` becomes
``(W - d S) exp(-d)``. With p the probability of the token's own class, the entropy of all is
``-p log p - (1 - p) log (1 - p) + (1 - p) entropy of the others``, a sum of positive numbers.

**Ranks.** A class is ahead of the token's own where its logit is higher than the target logit, or
equal and its index lower. The target logit is the given one, that of the indexed matmul.

**Numerics.** Sums, maxima and exponentials in float32; what is made of them per token in float64. A
column of -inf adds nothing; a NaN reaches the result.
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
    logits_of,
    product_tile,
    slope_of,
)
from crosscut.kernels.valid_rows import ValidRows

SELECTED = tl.constexpr(float("inf"))  # mass of a column that is selected anyway
MORE_GROUPS = tl.constexpr(3)  # group counts tried, from the fewest that fit in L2


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
def sweep_slice(
    hidden_ptr,
    hidden_desc,
    classifier_ptr,
    classifier_desc,
    bias_ptr,
    logit_weight_ptr,
    column_mass_ptr,  # of the token tile
    rows,  # [BLOCK_N]
    first_row,
    reference,  # [BLOCK_N], for column masses; inf for no token
    own,  # [BLOCK_N], the tokens' own classes
    target_logit,  # [BLOCK_N], theirs, for ranks
    class_ids_ptr,  # [num_classes], or None where classes are their places
    first_tile,
    last_tile,
    num_classes,
    hidden_size,
    stride_v,
    stride_d,
    logit_scale,
    softcap,
    mass_unit,
    ENTROPY: tl.constexpr,
    FOLD: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums over some class tiles but for the tokens' own classes, [BLOCK_N] each.

    ``max z``, ``sum exp(z - max)``, ``sum logit_weight z`` (of all classes), ``sum slope exp(z -
    max)``, ``sum exp(z - max) (z - max)``, the number of classes ahead of the own one, and the
    highest logit and the first class that has it.
    """
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    # Of the whole product, halves or quarters: for which of them there are registers, was tried.
    ALONE: tl.constexpr = target_logit is None and not (ENTROPY and column_mass_ptr is not None)
    FEW: tl.constexpr = ENTROPY and bias_ptr is None and logit_weight_ptr is None
    PARTS: tl.constexpr = 2 if ALONE and (FOLD or FEW) else 4
    PART: tl.constexpr = BLOCK_V // PARTS
    SLOPED: tl.constexpr = column_mass_ptr is not None and softcap is not None
    unit = logit_scale if FOLD else 1.0  # of z
    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)  # of exp(z - highest)
    logit_sum = tl.zeros((BLOCK_N,), tl.float32)
    sloped_total = tl.zeros((BLOCK_N,), tl.float32)
    weighted_total = tl.zeros((BLOCK_N,), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int32)
    best_logit = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_class = tl.zeros((BLOCK_N,), tl.int32)
    # One loop over the steps of all tiles, where TMA loads both: while a tile is summed up, the
    # next is being loaded. Where much is summed, registers do not allow that.
    LEAN: tl.constexpr = target_logit is None and logit_weight_ptr is None
    FUSED: tl.constexpr = LEAN and not GATHER and classifier_desc is not None
    steps = tl.cdiv(hidden_size, BLOCK_D)
    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    tile, step = first_tile - 1, steps - 1
    next_own = first_own(own, first_tile * BLOCK_V)  # few tiles have a class to be left out
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
                hidden_ptr, hidden_desc, classifier_ptr, classifier_desc, rows, first_row,
                tile * BLOCK_V, num_classes, hidden_size, stride_v, stride_d, GATHER, TILE,
            )  # fmt: skip
        if step == steps - 1:
            for part in tl.static_range(PARTS):
                first_class = tile * BLOCK_V + part * PART
                classes = first_class + tl.arange(0, PART)
                z = column_part(product, part, PARTS, BLOCK_N, BLOCK_V)  # [BLOCK_N, PART]
                if not FOLD:
                    bias = None
                    if bias_ptr is not None:
                        bias = tl.load(bias_ptr + classes, mask=classes < num_classes, other=0.0)
                        bias = bias.to(tl.float32)[None, :]
                    z = logits_of(z, bias, logit_scale, softcap)
                    if logit_weight_ptr is not None:
                        inside = classes < num_classes
                        weight = tl.load(logit_weight_ptr + classes, mask=inside, other=0.0)
                        weighted = tl.where(inside[None, :], weight[None, :] * z, 0.0)
                        logit_sum += tl.sum(weighted, 1)
                if SLOPED:
                    slope = slope_of(z, softcap)
                if class_ids_ptr is not None:
                    ids = tl.load(class_ids_ptr + classes, mask=classes < num_classes, other=-1)
                    counts = (classes < num_classes)[None, :] & (ids[None, :] != own[:, None])
                    z = tl.where(counts, z, -float("inf"))
                elif tl.minimum(next_own, num_classes) < first_class + PART:
                    counts = (classes < num_classes)[None, :] & (classes[None, :] != own[:, None])
                    z = tl.where(counts, z, -float("inf"))
                    next_own = first_own(own, first_class + PART)
                if target_logit is not None:
                    before = classes[None, :] < own[:, None]
                    ahead = tl.where(before, z >= target_logit[:, None], z > target_logit[:, None])
                    rank += tl.sum(ahead.to(tl.int32), 1)
                    best = tl.max(z, 1)
                    first = tl.where(z == best[:, None], classes[None, :], num_classes)
                    place = tl.min(first, 1)
                    best_class = tl.where(best > best_logit, place, best_class)
                    best_logit = tl.maximum(best_logit, best)
                higher = tl.maximum(highest, tl.max(z, 1) * unit)
                highest_or_0 = tl.where(higher == -float("inf"), 0.0, higher)
                rescale = tl.exp2((highest - highest_or_0) * LOG2_E)
                if FOLD:
                    p = tl.exp2(z * (unit * LOG2_E) - (highest_or_0 * LOG2_E)[:, None])
                else:
                    p = tl.exp2((z - highest_or_0[:, None]) * LOG2_E)
                if ENTROPY:
                    weighted_total += total * tl.maximum(highest - highest_or_0, NEGLIGIBLE)
                    weighted = p * tl.maximum(z * unit - highest_or_0[:, None], NEGLIGIBLE)
                    weighted_total = weighted_total * rescale + tl.sum(weighted, 1)
                total = total * rescale + tl.sum(p, 1)
                highest = higher
                if column_mass_ptr is not None:
                    if SLOPED:
                        p *= slope
                        sloped_total = sloped_total * rescale + tl.sum(p, 1)
                    bound = tl.exp2((reference - highest_or_0) * LOG2_E)  # on the lse, as total is
                    # No class yet: no mass, and no number were it divided by 0.
                    share = 1 / (tl.maximum(tl.maximum(bound, total), 1e-30) * mass_unit)
                    mass = tl.sum(p * share[:, None], 0)
                    mass = mass.to(column_mass_ptr.dtype.element_ty)
                    tl.store(column_mass_ptr + classes, mass, mask=classes < num_classes)
            product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    ranked = rank, best_logit, best_class
    return highest, total, logit_sum, sloped_total, weighted_total, ranked


@kernel
def linear_lse_kernel(
    hidden_ptr,
    hidden_desc,
    classifier_ptr,
    classifier_desc,
    bias_ptr,
    logit_weight_ptr,
    num_rows_ptr,
    rows_ptr,
    reference_ptr,
    own_ptr,
    target_logit_ptr,
    class_ids_ptr,
    slice_highest_ptr,
    slice_total_ptr,
    slice_sum_ptr,
    slice_sloped_ptr,
    slice_weighted_ptr,
    slice_ranks,  # (rank, best_logit, best_class) pointers, or None
    column_mass_ptr,
    num_classes,
    hidden_size,
    stride_v,
    stride_d,
    logit_scale,
    softcap,
    mass_unit,
    most_tiles,
    FOLD: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    program, programs = tl.program_id(0), tl.num_programs(0)
    num_rows = tl.load(num_rows_ptr)
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
                rows, valid, first_row, no_gap = load_rows(rows_ptr, tile, num_rows, BLOCK_N)
                masses, reference, target_logit = None, None, None
                own = tl.load(own_ptr + rows).to(tl.int32)
                if column_mass_ptr is not None:
                    masses = column_mass_ptr + tile * tl.cast(num_classes, tl.int64)
                    reference = tl.load(reference_ptr + rows, mask=valid, other=float("inf"))
                if target_logit_ptr is not None:
                    target_logit = tl.load(target_logit_ptr + rows)
                mine = True
                if hidden_desc is not None:
                    mine = no_gap == (not GATHER)
                highest, total, logit_sum, sloped_total, weighted_total, ranked = sweep_slice(
                    hidden_ptr, hidden_desc, classifier_ptr, classifier_desc, bias_ptr,
                    logit_weight_ptr, masses, rows, first_row, reference, own, target_logit,
                    class_ids_ptr, first_tile, tl.where(mine, last_tile, first_tile), num_classes,
                    hidden_size, stride_v, stride_d, logit_scale, softcap, mass_unit,
                    slice_weighted_ptr is not None, FOLD, GATHER, TILE,
                )  # fmt: skip
                valid &= mine
                place = (tile * BLOCK_N + tl.arange(0, BLOCK_N)) * slices + my_slice
                tl.store(slice_highest_ptr + place, highest, mask=valid)
                tl.store(slice_total_ptr + place, total, mask=valid)
                if slice_sum_ptr is not None:
                    tl.store(slice_sum_ptr + place, logit_sum, mask=valid)
                if slice_sloped_ptr is not None:
                    tl.store(slice_sloped_ptr + place, sloped_total, mask=valid)
                if slice_weighted_ptr is not None:
                    tl.store(slice_weighted_ptr + place, weighted_total, mask=valid)
                if slice_ranks is not None:
                    for i in tl.static_range(3):
                        tl.store(slice_ranks[i] + place, ranked[i], mask=valid)


@kernel
def combine_slices_kernel(
    slice_highest_ptr,
    slice_total_ptr,
    slice_sum_ptr,
    slice_sloped_ptr,
    slice_weighted_ptr,
    slice_ranks,
    num_rows_ptr,
    place_ptr,
    own_ptr,
    own_logit_ptr,
    others_ptr,
    lse_ptr,
    lse_low_ptr,
    log_prob_ptr,
    rest_ptr,
    logit_sum_ptr,
    entropy_ptr,
    ranks,  # (rank, best_class) pointers, or None
    column_mass_ptr,  # where the columns of own classes are to be SELECTED
    num_tokens,
    num_classes,
    programs,
    most_tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program BLOCK_N tokens; slices in order. [R, slices] in, [N] out."""
    token_tiles = tl.cdiv(tl.load(num_rows_ptr), BLOCK_N)
    class_tiles = tl.cdiv(num_classes, BLOCK_V)
    _group, wide, _width, has_last = slices_of(token_tiles, class_tiles, programs, most_tiles)
    slices = wide + has_last
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < num_tokens
    place = tl.load(place_ptr + tokens, mask=inside, other=-1)
    valid = place >= 0
    first = place * slices
    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    logit_sum = tl.zeros((BLOCK_N,), tl.float32)
    sloped = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int32)
    best_logit = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_class = tl.zeros((BLOCK_N,), tl.int32)
    for index in range(slices):
        slice_highest = tl.load(slice_highest_ptr + first + index, mask=valid, other=0.0)
        slice_total = tl.load(slice_total_ptr + first + index, mask=valid, other=0.0)
        higher = tl.maximum(highest, slice_highest)
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        old, new = tl.exp(highest - reference), tl.exp(slice_highest - reference)
        if slice_weighted_ptr is not None:
            slice_weighted = tl.load(slice_weighted_ptr + first + index, mask=valid, other=0.0)
            weighted += total * tl.maximum(highest - reference, NEGLIGIBLE)
            slice_weighted += slice_total * tl.maximum(slice_highest - reference, NEGLIGIBLE)
            weighted = weighted * old + slice_weighted * new
        total = total * old + slice_total * new
        highest = higher
        if slice_sum_ptr is not None:
            logit_sum += tl.load(slice_sum_ptr + first + index, mask=valid, other=0.0)
        if slice_sloped_ptr is not None:
            slice_sloped = tl.load(slice_sloped_ptr + first + index, mask=valid, other=0.0)
            sloped = sloped * old + slice_sloped * new
        if slice_ranks is not None:
            rank += tl.load(slice_ranks[0] + first + index, mask=valid, other=0)
            slice_best = tl.load(slice_ranks[1] + first + index, mask=valid, other=0.0)
            slice_class = tl.load(slice_ranks[2] + first + index, mask=valid, other=0)
            best_class = tl.where(slice_best > best_logit, slice_class, best_class)
            best_logit = tl.maximum(best_logit, slice_best)

    # In float64: a float32 kernel's logarithm is rough, and every gradient has its error.
    log_total = tl.log(total.to(tl.float64))
    others = highest.to(tl.float64) + log_total
    own_logit = tl.load(own_logit_ptr + tokens, mask=valid, other=0.0).to(tl.float64)
    odds = others - own_logit  # the logarithm of them, against the own class
    e = tl.exp(-tl.abs(odds))
    log1p = tl.where(e < 1e-5, e - e * e * 0.5, tl.log(1 + e))
    finite = tl.maximum(others, own_logit)
    finite -= finite  # 0; of infinite logits, as in PyTorch, comes a NaN
    log_prob = finite - (tl.maximum(odds, 0.0) + log1p)
    log_rest = -(tl.maximum(-odds, 0.0) + log1p)
    rest = tl.where(odds > 0, 1.0, e) / (1 + e)  # 1 - p
    lse = tl.where(valid, tl.maximum(others, own_logit) + log1p, 0.0)
    high = lse.to(tl.float32)
    low = tl.where(tl.abs(high) < float("inf"), lse - high.to(tl.float64), 0.0)
    tl.store(others_ptr + tokens, tl.where(valid, others, 0.0).to(tl.float32), mask=inside)
    tl.store(lse_ptr + tokens, high, mask=inside)
    tl.store(lse_low_ptr + tokens, low.to(tl.float32), mask=inside)
    tl.store(log_prob_ptr + tokens, tl.where(valid, log_prob, 0.0).to(tl.float32), mask=inside)
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + tokens, tl.where(valid, logit_sum, 0.0), mask=inside)
    if rest_ptr is not None:
        mass = rest.to(tl.float32)
        if slice_sloped_ptr is not None:
            mass *= tl.where(total > 0, sloped / total, 0.0)
        tl.store(rest_ptr + tokens, tl.where(valid, mass, 0.0), mask=inside)
    if entropy_ptr is not None:
        of_others = log_total - (weighted / total).to(tl.float64)
        of_others = tl.where(of_others < 0, 0.0, of_others)  # a NaN stays one
        of_rest = tl.where(rest > 0, rest * (of_others - log_rest), 0.0)  # 0 log 0 is 0
        p = tl.exp(log_prob)
        entropy = tl.where(p > 0, of_rest - p * log_prob, of_rest).to(tl.float32)
        tl.store(entropy_ptr + tokens, tl.where(valid, entropy, 0.0), mask=inside)
    if ranks is not None:
        tl.store(ranks[0] + tokens, tl.where(valid, rank, 0), mask=inside)
        tl.store(ranks[1] + tokens, tl.where(valid, best_class, 0), mask=inside)
    if column_mass_ptr is not None:
        own = tl.load(own_ptr + tokens, mask=valid, other=-1)
        known = (own >= 0) & (own < num_classes)
        mass = column_mass_ptr + (place // BLOCK_N).to(tl.int64) * num_classes + own
        kept = tl.full((BLOCK_N,), SELECTED, tl.float32)
        tl.store(mass, kept, mask=known)


class Own(NamedTuple):
    """Each token's own class, which sums over classes leave out."""

    classes: Tensor  # [N] int64
    logit: Tensor  # [N] float32, of the indexed matmul


class Wanted(NamedTuple):
    """What a sweep is to find beside the log-sum-exp."""

    logit_weight: Tensor | None = None  # [V] float32
    entropy: bool = False
    ranks: bool = False
    class_ids: Tensor | None = None  # [V], which classes those of the head are; all, if None


class LinearLse(NamedTuple):
    """What a sweep finds, float32 unless said otherwise; 0 at rows left out."""

    others: Tensor  # [N], log-sum-exp of all classes but the own one
    lse: Tensor  # [N]
    lse_low: Tensor  # [N], what lse lost where it was rounded
    log_prob: Tensor  # [N], of the own class
    rest: Tensor | None = None  # [N], ``sum_v slope p`` but for the own class; with column masses
    logit_sum: Tensor | None = None  # [N]
    entropy: Tensor | None = None  # [N]
    rank: Tensor | None = None  # [N] int32, of the own class
    best_class: Tensor | None = None  # [N] int32, the first of all but the own one


class Columns(NamedTuple):
    """Column masses to be stored.

    For each tile of BLOCK_N valid rows ``sum_n slope exp(z - others) / unit``, or SELECTED for the
    rows' own classes.
    """

    mass: Tensor  # [token tiles, V], any float dtype, contiguous
    reference: Tensor  # [N] float32, a lower bound of ``others``
    unit: float


def linear_lse(
    head: Head,
    kept: ValidRows,
    own: Own,
    tiles: Tiles,
    wanted: Wanted | None = None,
    columns: Columns | None = None,
) -> LinearLse:
    """``lse`` and what is ``wanted``; fills ``columns.mass``.

    Args:
        head: the head, with contiguous hidden states.
        kept: the rows that take part.
        own: each token's own class.
        tiles: BLOCK_N tokens x BLOCK_V classes, in steps of BLOCK_D dimensions.
        wanted: what else to find; nothing if None.
        columns: where to store column masses, or None.
    """
    logit_weight, entropy, ranks, class_ids = wanted or Wanted()
    hidden, classifier = head.hidden, head.classifier
    num_tokens, num_classes = len(hidden), len(classifier)
    programs = tiles.programs * num_programs(hidden.device)
    most_tiles = tiles_in_group(hidden, tiles)
    token_tiles = triton.cdiv(num_tokens, tiles.block_n)
    most_groups = min(triton.cdiv(token_tiles, most_tiles) + MORE_GROUPS.value, token_tiles)
    slots = tiles.block_n * (most_groups * programs + token_tiles)  # for any number of rows

    def new(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=hidden.device)

    # The scale is multiplied into the exponent, which rounds a little more.
    fold = hidden.dtype != torch.float32 and head.bias is None and head.softcap is None
    fold &= head.logit_scale > 0 and logit_weight is None and not ranks
    column_mass, reference, mass_unit = columns or (None, None, 1.0)
    sloped = column_mass is not None and head.softcap is not None
    slice_highest, slice_total = new(slots), new(slots)
    slice_sum = None if logit_weight is None else new(slots)
    slice_sloped = new(slots) if sloped else None
    slice_weighted = new(slots) if entropy else None
    slice_ranks = None
    if ranks:
        slice_ranks = new(slots, torch.int32), new(slots), new(slots, torch.int32)
    linear_lse_kernel[(programs,)](
        hidden,
        descriptor(hidden, (tiles.block_n, tiles.block_d), tiles),
        classifier,
        descriptor(classifier, (tiles.block_v, tiles.block_d), tiles),
        head.bias,
        logit_weight,
        kept.count,
        kept.rows,
        reference,
        own.classes,
        own.logit if ranks else None,
        class_ids,
        slice_highest,
        slice_total,
        slice_sum,
        slice_sloped,
        slice_weighted,
        slice_ranks,
        column_mass,
        num_classes,
        hidden.shape[1],
        *classifier.stride(),
        head.logit_scale,
        head.softcap,
        mass_unit,
        most_tiles,
        FOLD=fold,
        TILE=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    found = LinearLse(
        others=new(num_tokens),
        lse=new(num_tokens),
        lse_low=new(num_tokens),
        log_prob=new(num_tokens),
        rest=None if column_mass is None else new(num_tokens),
        logit_sum=None if logit_weight is None else new(num_tokens),
        entropy=new(num_tokens) if entropy else None,
        rank=new(num_tokens, torch.int32) if ranks else None,
        best_class=new(num_tokens, torch.int32) if ranks else None,
    )
    *vectors, rank, best_class = found
    combine_slices_kernel[(token_tiles,)](
        slice_highest, slice_total, slice_sum, slice_sloped, slice_weighted, slice_ranks,
        kept.count, kept.place, *own, *vectors, (rank, best_class) if ranks else None,
        column_mass, num_tokens, num_classes, programs, most_tiles,
        BLOCK_N=tiles.block_n, BLOCK_V=tiles.block_v, num_warps=4,
    )  # fmt: skip
    return found
