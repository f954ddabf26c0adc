"""The divergence of a student's softmax from its teacher's, and its gradient; no stored logits.

With z and t the logits of student and teacher, p and q their softmax, and the mixture
``m = b q + (1 - b) p`` of shares b and 1 - b (both come from the host, because float32 loses digits
in 1 - b), one sweep over both heads finds their log-sum-exps and

    gap[n] = sum_v q (t - z)      forward divergence:  KL(q|p) = gap - lse_t + lse_z
             sum_v p (z - t)      reverse divergence:  KL(p|q) = gap - lse_z + lse_t

with both logits relative to their own maximum, in the gap and in the log-sum-exps: a softmax does
not change with a constant that is added to all of its logits.

A mixture needs both log-sum-exps first, and a second sweep. The gradient of the logits z, with
``center`` the mean under p of the log ratio beside p, is

    forward    p - q                     reverse   p (log p - log q - center)
    mixture    (1 - b) p (log p - log m) - p center

times the divergence's cotangent; a hard loss, of the logits ``temperature * z``, adds that of a
cross-entropy. It is stored by chunks of classes, as in :mod:`.softmax_gradient`.

**Who owns what.** In a sweep a program owns a token tile and a slice of the vocabulary, as in
:mod:`.linear_lse`, and has the products of both heads in registers at once. In the gradient it owns
tiles as in :mod:`.softmax_gradient`. Tokens are the valid ones, side by side, then zeros.
Stores are plain, and slices are combined in order: reruns are bitwise equal.

**Cost.** 2NV(D + E) flop per sweep, and as much for the gradient, D and E being both hidden sizes.
Workspace: 28 bytes per token and slice.

**Numerics.** float32 until the store; the log-sum-exps are combined in float64, and kept in
float32. So p and q are known to 1e-6, and their difference less well where they are nearly equal.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs, tiles_in_group
from crosscut.kernels.linear_lse import most_parts, share_of
from crosscut.kernels.logits_tile import LOG2_E, Head, column_part, logits_at, product_tile
from crosscut.kernels.valid_rows import ValidRows

PARTS = tl.constexpr(4)  # of a tile's classes, one after the other: registers are short


@triton.jit
def logits_part(product, head, classes, num_classes, part: tl.constexpr, TILE: tl.constexpr):
    """Logits [BLOCK_N, BLOCK_V / PARTS] of one part of a product; any value past the end."""
    z = column_part(product, part, PARTS, TILE[0], TILE[1])
    return logits_at(z, head, classes, num_classes)


@triton.jit
def or_0(highest):
    """What logits are taken relative to: their maximum, 0 where there is none yet."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def add_to_lse(z, highest, total):
    """More logits of some tokens to their ``max z`` and ``sum exp(z - max)``.

    Returns both, ``exp(z - max)``, and what sums of such must be multiplied by.
    """
    higher = tl.maximum(highest, tl.max(z, 1))
    reference = or_0(higher)
    rescale = tl.exp2((highest - reference) * LOG2_E)
    p = tl.exp2((z - reference[:, None]) * LOG2_E)
    return higher, total * rescale + tl.sum(p, 1), p, rescale


@triton.jit
def log_mixture(log_p, log_q, log_share_p, log_share_q):
    """``log(share_p p + share_q q)``."""
    a, b = log_p + log_share_p, log_q + log_share_q
    return tl.maximum(a, b) + tl.log(1 + tl.exp2(-tl.abs(a - b) * LOG2_E))


@triton.jit
def times_log_ratio(p, log_p, log_q):
    """``p (log p - log q)``, 0 where p is."""
    return tl.where(p == 0, 0.0, p * (log_p - log_q))


@triton.jit
def add_to_gap(z, t, highest, total, teacher_highest, teacher_total, gap, KIND: tl.constexpr):
    """More logits of both heads to the ``max`` and ``sum exp`` of each, and to their gap."""
    moved, teacher_moved = or_0(highest), or_0(teacher_highest)
    before, teacher_before = total, teacher_total
    highest, total, p, rescale = add_to_lse(z, highest, total)
    teacher_highest, teacher_total, q, teacher_rescale = add_to_lse(
        t, teacher_highest, teacher_total
    )
    reference, teacher_reference = or_0(highest), or_0(teacher_highest)
    moved = reference - moved
    teacher_moved = teacher_reference - teacher_moved
    z -= reference[:, None]
    t -= teacher_reference[:, None]
    if KIND == "forward":
        gap -= teacher_before * (teacher_moved - moved)
        gap = gap * teacher_rescale + tl.sum(times_log_ratio(q, t, z), 1)
    elif KIND == "reverse":
        gap -= before * (moved - teacher_moved)
        gap = gap * rescale + tl.sum(times_log_ratio(p, z, t), 1)
    return highest, total, teacher_highest, teacher_total, gap


@triton.jit
def add_to_mixture(log_p, log_q, log_share_p, log_share_q, total, gap):
    """More classes to ``sum p (log p - log m)`` and ``sum q (log q - log m)``."""
    log_m = log_mixture(log_p, log_q, log_share_p, log_share_q)
    p, q = tl.exp2(log_p * LOG2_E), tl.exp2(log_q * LOG2_E)
    total += tl.sum(times_log_ratio(p, log_p, log_m), 1)
    gap += tl.sum(times_log_ratio(q, log_q, log_m), 1)
    return total, gap


@kernel
def divergence_kernel(
    num_rows_ptr,
    hidden_ptr,
    hidden_desc,
    head,  # HeadArguments
    classifier_desc,
    teacher_hidden_ptr,
    teacher_hidden_desc,
    teacher_head,  # HeadArguments
    teacher_classifier_desc,
    lse_ptr,  # [N] by place, for a mixture
    teacher_lse_ptr,
    sums_ptr,  # [7, num_slots]
    num_slots,
    num_classes,
    temperature,
    log_share_p,
    log_share_q,
    most_tiles,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    num_rows = tl.load(num_rows_ptr)
    token_tiles, class_tiles = tl.cdiv(num_rows, BLOCK_N), tl.cdiv(num_classes, BLOCK_V)
    group, my_slice, slices, first_tile, last_tile, first, last = share_of(
        tl.program_id(0), tl.num_programs(0), token_tiles, class_tiles, most_tiles
    )
    for start in range(0, token_tiles, group):
        end = tl.minimum(start + last, token_tiles)
        for tile in range(start + first, end):
            rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            lse, teacher_lse = None, None
            if KIND == "mixture":
                lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
                teacher_lse = tl.load(teacher_lse_ptr + rows, mask=rows < num_rows, other=0.0)
                teacher_lse = teacher_lse[:, None]
            highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
            total = tl.zeros((BLOCK_N,), tl.float32)
            teacher_highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
            teacher_total = tl.zeros((BLOCK_N,), tl.float32)
            gap = tl.zeros((BLOCK_N,), tl.float32)
            hard_highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
            hard_total = tl.zeros((BLOCK_N,), tl.float32)
            for class_tile in tl.range(first_tile, last_tile, disable_licm=True):
                first_class = class_tile * BLOCK_V
                product = product_tile(
                    hidden_ptr, hidden_desc, head, classifier_desc, rows.to(tl.int64),
                    tile * BLOCK_N, first_class, num_classes, False, TILE,
                )  # fmt: skip
                teacher_product = product_tile(
                    teacher_hidden_ptr, teacher_hidden_desc, teacher_head, teacher_classifier_desc,
                    rows.to(tl.int64), tile * BLOCK_N, first_class, num_classes, False, TILE,
                )  # fmt: skip
                for part in tl.static_range(PARTS):
                    classes = first_class + part * (BLOCK_V // PARTS)
                    classes += tl.arange(0, BLOCK_V // PARTS)
                    inside = (classes < num_classes)[None, :]
                    z = logits_part(product, head, classes, num_classes, part, TILE)
                    t = logits_part(teacher_product, teacher_head, classes, num_classes, part, TILE)
                    z = tl.where(inside, z, -float("inf"))
                    t = tl.where(inside, t, -float("inf"))
                    if HARD:
                        hard_highest, hard_total, _p, _rescale = add_to_lse(
                            z * temperature, hard_highest, hard_total
                        )
                    if KIND == "mixture":
                        total, gap = add_to_mixture(
                            z - lse, t - teacher_lse, log_share_p, log_share_q, total, gap
                        )
                    else:
                        highest, total, teacher_highest, teacher_total, gap = add_to_gap(
                            z, t, highest, total, teacher_highest, teacher_total, gap, KIND
                        )
            place = sums_ptr + rows * slices + my_slice
            mask = rows < num_rows
            tl.store(place, highest, mask=mask)
            tl.store(place + num_slots, total, mask=mask)
            tl.store(place + 2 * num_slots, teacher_highest, mask=mask)
            tl.store(place + 3 * num_slots, teacher_total, mask=mask)
            tl.store(place + 4 * num_slots, gap, mask=mask)
            if HARD:
                tl.store(place + 5 * num_slots, hard_highest, mask=mask)
                tl.store(place + 6 * num_slots, hard_total, mask=mask)


@triton.jit
def add_slice(highest, total, place, num_slots, valid):
    """The ``max`` and ``sum`` of a slice to those of the slices before it.

    Returns both, what sums beside the old and beside the new must be multiplied by, and how far
    their references are from the new one.
    """
    slice_highest = tl.load(place, mask=valid, other=0.0)
    slice_total = tl.load(place + num_slots, mask=valid, other=0.0)
    higher = tl.maximum(highest, slice_highest)
    reference = or_0(higher)
    old, new = tl.exp(highest - reference), tl.exp(slice_highest - reference)
    moved = reference - or_0(highest), reference - or_0(slice_highest)
    return higher, total * old + slice_total * new, (old, new), moved


@kernel
def combine_divergence_kernel(
    sums_ptr,
    num_rows_ptr,
    place_ptr,
    divergence_ptr,
    lse_ptr,
    teacher_lse_ptr,
    center_ptr,
    hard_lse_ptr,
    num_slots,
    num_tokens,
    num_classes,
    programs,
    share_p,
    share_q,
    most_tiles,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program i owns BLOCK_N tokens; slices in order. 0 at tokens that are not valid."""
    token_tiles = tl.cdiv(tl.load(num_rows_ptr), BLOCK_N)
    class_tiles = tl.cdiv(num_classes, BLOCK_V)
    _group, _slice, slices, _first_tile, _last_tile, _first, _last = share_of(
        0, programs, token_tiles, class_tiles, most_tiles
    )
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < num_tokens
    row = tl.load(place_ptr + tokens, mask=inside, other=-1)
    valid = row >= 0
    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    teacher_highest, teacher_total = highest, total
    hard_highest, hard_total = highest, total
    gap = tl.zeros((BLOCK_N,), tl.float32)
    for index in range(slices):
        place = sums_ptr + row * slices + index
        slice_gap = tl.load(place + 4 * num_slots, mask=valid, other=0.0)
        if KIND == "mixture":
            total += tl.load(place + num_slots, mask=valid, other=0.0)
            gap += slice_gap
        else:
            before, teacher_before = total, teacher_total
            highest, total, scales, moved = add_slice(highest, total, place, num_slots, valid)
            teacher_highest, teacher_total, teacher_scales, teacher_moved = add_slice(
                teacher_highest, teacher_total, place + 2 * num_slots, num_slots, valid
            )
            if KIND == "forward":
                slice_total = tl.load(place + 3 * num_slots, mask=valid, other=0.0)
                gap -= teacher_before * (teacher_moved[0] - moved[0])
                slice_gap -= slice_total * (teacher_moved[1] - moved[1])
                gap = gap * teacher_scales[0] + slice_gap * teacher_scales[1]
            elif KIND == "reverse":
                slice_total = tl.load(place + num_slots, mask=valid, other=0.0)
                gap -= before * (moved[0] - teacher_moved[0])
                slice_gap -= slice_total * (moved[1] - teacher_moved[1])
                gap = gap * scales[0] + slice_gap * scales[1]
            if hard_lse_ptr is not None:
                hard_highest, hard_total, _scales, _moved = add_slice(
                    hard_highest, hard_total, place + 5 * num_slots, num_slots, valid
                )

    if KIND == "mixture":
        center = tl.where(valid, share_p * total, 0.0)
        tl.store(center_ptr + tokens, center, mask=inside)
        divergence = tl.where(valid, share_q * gap + center, 0.0)
        tl.store(divergence_ptr + tokens, divergence, mask=inside)
    else:
        total = tl.where(valid, total, 1.0)
        teacher_total = tl.where(valid, teacher_total, 1.0)
        log_total = tl.log(total.to(tl.float64))
        teacher_log_total = tl.log(teacher_total.to(tl.float64))
        lse = tl.where(valid, highest.to(tl.float64) + log_total, 0.0)
        teacher_lse = tl.where(valid, teacher_highest.to(tl.float64) + teacher_log_total, 0.0)
        tl.store(lse_ptr + tokens, lse.to(tl.float32), mask=inside)
        tl.store(teacher_lse_ptr + tokens, teacher_lse.to(tl.float32), mask=inside)
        if hard_lse_ptr is not None:
            hard_total = tl.where(valid, hard_total, 1.0)
            hard_lse = hard_highest.to(tl.float64) + tl.log(hard_total.to(tl.float64))
            hard_lse = tl.where(valid, hard_lse, 0.0)
            tl.store(hard_lse_ptr + tokens, hard_lse.to(tl.float32), mask=inside)
        center = tl.zeros((BLOCK_N,), tl.float32)
        if KIND == "forward":
            divergence = gap / teacher_total - (teacher_log_total - log_total).to(tl.float32)
        else:
            divergence = gap / total - (log_total - teacher_log_total).to(tl.float32)
            center = tl.where(valid, divergence, 0.0)
        if KIND == "forward" or KIND == "reverse":
            divergence = tl.where(valid, divergence, 0.0)
            tl.store(divergence_ptr + tokens, divergence, mask=inside)
            tl.store(center_ptr + tokens, center, mask=inside)


@triton.jit
def gradient_of(
    log_p, log_q, center_ptr, taken, share_p, log_share_p, log_share_q, KIND: tl.constexpr
):
    """The gradient of the divergence by the logits z; ``center_ptr`` is [BLOCK_N, 1]."""
    p = tl.exp2(log_p * LOG2_E)
    if KIND == "forward":
        return p - tl.exp2(log_q * LOG2_E)
    else:
        center = tl.load(center_ptr, mask=taken, other=0.0)
        if KIND == "reverse":
            return times_log_ratio(p, log_p, log_q) - p * center
        else:
            log_m = log_mixture(log_p, log_q, log_share_p, log_share_q)
            return share_p * times_log_ratio(p, log_p, log_m) - p * center


@kernel
def divergence_gradient_kernel(
    tokens,  # PairTokens
    hidden_ptr,
    hidden_desc,
    head,  # HeadArguments
    classifier_desc,
    teacher_hidden_ptr,
    teacher_hidden_desc,
    teacher_head,  # HeadArguments
    teacher_classifier_desc,
    dz_ptr,
    num_tokens,
    first_label,
    num_columns,
    stride_dz,
    temperature,
    share_p,
    log_share_p,
    log_share_q,
    most_tiles,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    num_rows = tl.load(tokens.num_rows)
    token_tiles = tl.cdiv(num_rows, BLOCK_N)
    class_tiles = tl.cdiv(num_columns, BLOCK_V)
    groups = tl.cdiv(token_tiles, most_tiles)
    group = tl.cdiv(token_tiles, tl.maximum(groups, 1))

    for index in range(tl.program_id(0), token_tiles * class_tiles, tl.num_programs(0)):
        start = index // (group * class_tiles) * group
        in_group = index - start * class_tiles
        height = tl.minimum(group, token_tiles - start)
        first_class = in_group // height * BLOCK_V
        tile = start + in_group % height
        places = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        product = product_tile(
            hidden_ptr, hidden_desc, head, classifier_desc, places.to(tl.int64), tile * BLOCK_N,
            first_class, num_columns, False, TILE,
        )  # fmt: skip
        teacher_product = product_tile(
            teacher_hidden_ptr, teacher_hidden_desc, teacher_head, teacher_classifier_desc,
            places.to(tl.int64), tile * BLOCK_N, first_class, num_columns, False, TILE,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            classes = first_class + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
            vectors = tokens.vectors + places[:, None] * 7
            taken = (places < num_rows)[:, None]
            z = logits_part(product, head, classes, num_columns, part, TILE)
            t = logits_part(teacher_product, teacher_head, classes, num_columns, part, TILE)
            log_p = z - tl.load(vectors, mask=taken, other=0.0)
            log_q = t - tl.load(vectors + 1, mask=taken, other=0.0)
            dz = gradient_of(
                log_p, log_q, vectors + 2, taken, share_p, log_share_p, log_share_q, KIND
            )
            dz *= tl.load(vectors + 3, mask=taken, other=0.0)
            if HARD:
                hard = temperature * z - tl.load(vectors + 4, mask=taken, other=0.0)
                hard = tl.exp2(hard * LOG2_E) * tl.load(vectors + 5, mask=taken, other=0.0)
                label = tl.load(tokens.labels + places, mask=places < num_rows, other=-1)
                is_target = classes[None, :] == (label - first_label)[:, None]
                hard += tl.where(is_target, tl.load(vectors + 6, mask=taken, other=0.0), 0.0)
                dz += temperature * hard
            if head.softcap is not None:
                capped = z / head.softcap
                dz *= 1 - capped * capped
            place = dz_ptr + places.to(tl.int64)[:, None] * stride_dz + classes[None, :]
            dz = tl.where(taken & (classes < num_columns)[None, :], dz, 0.0)
            mask = (places < num_tokens)[:, None] & (classes < stride_dz)[None, :]
            tl.store(place, dz.to(dz_ptr.dtype.element_ty), mask=mask)


class Pair(NamedTuple):
    """Student and teacher, and how their distance is measured.

    Hidden states are those of the valid tokens, side by side, then zeros.
    """

    student: Head
    teacher: Head
    divergence: str
    beta: float
    temperature: float | None  # that of the divergence, where there is a hard loss


class PairTokens(NamedTuple):
    """The valid tokens, side by side."""

    num_rows: Tensor  # R, [1] int32
    labels: Tensor  # [N] int64
    vectors: Tensor  # [N, 7] float32: both log-sum-exps, center, cotangent of the divergence;
    # log-sum-exp of the hard loss, its cotangent, and that of the target logit


class Divergence(NamedTuple):
    """[N] float32 each, 0 at tokens that are not valid."""

    divergence: Tensor
    lse: Tensor
    teacher_lse: Tensor
    center: Tensor
    hard_lse: Tensor | None


def _arguments(pair: Pair, classes: slice, tiles: Tiles) -> list[object]:
    """What a kernel takes of both heads, for some classes."""
    found: list[object] = []
    for whole in (pair.student, pair.teacher):
        bias = None if whole.bias is None else whole.bias[classes]
        head = whole._replace(classifier=whole.classifier[classes], bias=bias)
        found += [
            head.hidden,
            descriptor(head.hidden, (tiles.block_n, tiles.block_d), tiles),
            head.arguments,
            descriptor(head.classifier, (tiles.block_v, tiles.block_d), tiles),
        ]
    return found


def _log_shares(beta: float) -> tuple[float, float]:
    """Logarithms of the student's and of the teacher's share."""
    return math.log1p(-beta), math.log(beta)


def _group_tiles(pair: Pair, tiles: Tiles) -> int:
    """Most token tiles worked on at a time: the hidden states of both must stay in the cache."""
    both = torch.empty(
        0, pair.student.hidden.shape[1] + pair.teacher.hidden.shape[1],
        dtype=pair.student.hidden.dtype, device=pair.student.hidden.device,
    )  # fmt: skip
    return tiles_in_group(both, tiles)


def divergence(pair: Pair, valid_rows: ValidRows, tiles: Tiles) -> Divergence:
    """Divergence, log-sum-exps and center of each token.

    Args:
        pair: both heads; hidden states [multiple of BLOCK_N, D], contiguous.
        valid_rows: the valid rows; [N].
        tiles: BLOCK_N tokens x BLOCK_V classes, in steps of BLOCK_D dimensions.
    """
    num_tokens, device = len(valid_rows.rows), valid_rows.rows.device
    programs, most_tiles = num_programs(device), _group_tiles(pair, tiles)
    num_slots = most_parts(num_tokens, programs, most_tiles, tiles)
    hard = pair.temperature is not None

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    found = Divergence(
        divergence=new(num_tokens), lse=new(num_tokens), teacher_lse=new(num_tokens),
        center=new(num_tokens), hard_lse=new(num_tokens) if hard else None,
    )  # fmt: skip
    sums, num_classes = new(7, num_slots), len(pair.student.classifier)
    heads = _arguments(pair, slice(None), tiles)

    def sweep(kind: str, lses: tuple[Tensor | None, Tensor | None], hard: bool) -> None:
        divergence_kernel[(programs,)](
            valid_rows.count, *heads, *lses, sums, num_slots, num_classes,
            pair.temperature or 1.0, *_log_shares(pair.beta), most_tiles,
            KIND=kind, HARD=hard, TILE=tiles.constants,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        combine_divergence_kernel[(triton.cdiv(num_tokens, tiles.block_n),)](
            sums, valid_rows.count, valid_rows.place, *found[:4], found.hard_lse if hard else None,
            num_slots, num_tokens, num_classes, programs, 1 - pair.beta, pair.beta, most_tiles,
            KIND=kind, BLOCK_N=tiles.block_n, BLOCK_V=tiles.block_v, num_warps=4,
        )  # fmt: skip

    sweep(pair.divergence, (None, None), hard)
    if pair.divergence == "js":
        rows = valid_rows.rows.clamp_min(0).long()
        sweep("mixture", (found.lse[rows], found.teacher_lse[rows]), False)
    return found


def divergence_gradient(
    dz: Tensor, pair: Pair, classes: slice, tokens: PairTokens, tiles: Tiles
) -> None:
    """Fill the first R rows of ``dz`` [N, chunk], and those of R's tile with zeros.

    Args:
        dz: contiguous rows, in the dtype of the hidden states.
        pair: both heads.
        classes: which of them the chunk is.
        tokens: the valid ones.
        tiles: BLOCK_N tokens x BLOCK_V classes, in steps of BLOCK_D dimensions.
    """
    divergence_gradient_kernel[(num_programs(dz.device),)](
        tokens, *_arguments(pair, classes, tiles), dz, len(dz), classes.start,
        len(pair.student.classifier[classes]), dz.stride(0),
        pair.temperature or 1.0, 1 - pair.beta, *_log_shares(pair.beta), _group_tiles(pair, tiles),
        KIND=pair.divergence, HARD=pair.temperature is not None, TILE=tiles.constants,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
