"""Statistics of a token from those of parts of the vocabulary.

A sweep over part of the vocabulary (:mod:`.linear_lse`) leaves, for each token and without the
token's own class,

    highest    max z                                total    sum exp(z - highest)
    logit_sum  sum logit_weight z, own class too    sloped   sum slope exp(z - highest)
    weighted   sum exp(z - highest) (z - highest)   rank     classes ahead of the own one
    best_logit, best_class    the highest logit, and the first class that has it

Parts are combined in order: two of them have the higher maximum, relative to which the sums of both
are rescaled. When a maximum moves up by d, ``weighted`` becomes ``(weighted - d total) exp(-d)``.

**The token's own class** joins in the end, with the logit of the indexed matmul. With ``others``
the log-sum-exp of the rest,

    log_prob[n] = -log(1 + exp(others[n] - own_logit[n]))

has its digits where the model is sure, and is never positive.

**Entropy.** That of the others is ``log total - weighted / total``. With p the probability of the
token's own class, the entropy of all is ``-p log p - (1 - p) log (1 - p) + (1 - p) entropy of the
others``, a sum of positive numbers.

**Who owns what.** Program i owns BLOCK_N tokens. No atomics: reruns are bitwise equal.

**Cost.** Each part is read once.

**Numerics.** Sums over classes in float32; what is made of them per token in float64. A class of
-inf adds nothing; a NaN reaches the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.kernels.logits_tile import NEGLIGIBLE
from crosscut.kernels.valid_rows import ValidRows

SELECTED = tl.constexpr(float("inf"))  # mass of a column that is selected anyway


class PartialStatistics(NamedTuple):
    """Statistics of each token and part of the vocabulary; None for what is not wanted.

    There may be any number of parts. Part i of the valid row in place r is at ``r * count + i``.
    Float32 unless said otherwise.
    """

    count: Tensor  # [1] int32, the parts of a token
    highest: Tensor
    total: Tensor
    logit_sum: Tensor | None
    sloped: Tensor | None
    weighted: Tensor | None
    rank: Tensor | None  # int32
    best_logit: Tensor | None  # with rank
    best_class: Tensor | None  # int32, with rank


class Own(NamedTuple):
    """Each token's own class, which sums over classes leave out."""

    classes: Tensor  # [N] int64
    logit: Tensor  # [N] float32, of the indexed matmul


class LinearLse(NamedTuple):
    """Statistics per token, float32 unless said otherwise; 0 at rows that are not valid."""

    others: Tensor  # [N], log-sum-exp of all classes but the own one
    lse: Tensor  # [N]
    lse_compensation: Tensor  # [N], what lse lost where it was rounded
    log_prob: Tensor  # [N], of the own class
    rest: Tensor | None = None  # [N], ``sum_v slope p`` but for the own class; with column masses
    logit_sum: Tensor | None = None  # [N]
    entropy: Tensor | None = None  # [N]
    rank: Tensor | None = None  # [N] int32, of the own class
    best_class: Tensor | None = None  # [N] int32, the first of all but the own one


@triton.jit
def combined_parts(parts, place, valid, BLOCK_N: tl.constexpr):
    """The parts of some tokens, combined in order: PartialStatistics' fields but the count."""
    highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    logit_sum = tl.zeros((BLOCK_N,), tl.float32)
    sloped = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int32)
    best_logit = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_class = tl.zeros((BLOCK_N,), tl.int32)
    count = tl.load(parts.count)
    first = place * count
    for index in range(count):
        part_highest = tl.load(parts.highest + first + index, mask=valid, other=0.0)
        part_total = tl.load(parts.total + first + index, mask=valid, other=0.0)
        higher = tl.maximum(highest, part_highest)
        reference = tl.where(higher == -float("inf"), 0.0, higher)
        old, new = tl.exp(highest - reference), tl.exp(part_highest - reference)
        if parts.weighted is not None:
            part_weighted = tl.load(parts.weighted + first + index, mask=valid, other=0.0)
            weighted += total * tl.maximum(highest - reference, NEGLIGIBLE)
            part_weighted += part_total * tl.maximum(part_highest - reference, NEGLIGIBLE)
            weighted = weighted * old + part_weighted * new
        total = total * old + part_total * new
        highest = higher
        if parts.logit_sum is not None:
            logit_sum += tl.load(parts.logit_sum + first + index, mask=valid, other=0.0)
        if parts.sloped is not None:
            part_sloped = tl.load(parts.sloped + first + index, mask=valid, other=0.0)
            sloped = sloped * old + part_sloped * new
        if parts.rank is not None:
            rank += tl.load(parts.rank + first + index, mask=valid, other=0)
            part_best = tl.load(parts.best_logit + first + index, mask=valid, other=0.0)
            part_class = tl.load(parts.best_class + first + index, mask=valid, other=0)
            best_class = tl.where(part_best > best_logit, part_class, best_class)
            best_logit = tl.maximum(best_logit, part_best)
    return highest, total, logit_sum, sloped, weighted, rank, best_logit, best_class


@kernel
def combine_kernel(
    parts,  # PartialStatistics
    valid_rows,  # ValidRows
    own,  # Own
    found,  # LinearLse, to be filled
    column_mass_ptr,  # where the columns of own classes are to be SELECTED, or None
    num_tokens,
    num_classes,
    BLOCK_N: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < num_tokens
    place = tl.load(valid_rows.place + tokens, mask=inside, other=-1)
    valid = place >= 0
    highest, total, logit_sum, sloped, weighted, rank, _best_logit, best_class = combined_parts(
        parts, place, valid, BLOCK_N
    )

    # In float64: a float32 kernel's logarithm is rough, and every gradient has its error.
    log_total = tl.log(total.to(tl.float64))
    others = highest.to(tl.float64) + log_total
    own_logit = tl.load(own.logit + tokens, mask=valid, other=0.0).to(tl.float64)
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
    tl.store(found.others + tokens, tl.where(valid, others, 0.0).to(tl.float32), mask=inside)
    tl.store(found.lse + tokens, high, mask=inside)
    tl.store(found.lse_compensation + tokens, low.to(tl.float32), mask=inside)
    tl.store(found.log_prob + tokens, tl.where(valid, log_prob, 0.0).to(tl.float32), mask=inside)
    if found.logit_sum is not None:
        tl.store(found.logit_sum + tokens, tl.where(valid, logit_sum, 0.0), mask=inside)
    if found.rest is not None:
        mass = rest.to(tl.float32)
        if parts.sloped is not None:
            mass *= tl.where(total > 0, sloped / total, 0.0)
        tl.store(found.rest + tokens, tl.where(valid, mass, 0.0), mask=inside)
    if found.entropy is not None:
        of_others = log_total - (weighted / total).to(tl.float64)
        of_others = tl.where(of_others < 0, 0.0, of_others)  # a NaN stays one
        of_rest = tl.where(rest > 0, rest * (of_others - log_rest), 0.0)  # 0 log 0 is 0
        p = tl.exp(log_prob)
        entropy = tl.where(p > 0, of_rest - p * log_prob, of_rest).to(tl.float32)
        tl.store(found.entropy + tokens, tl.where(valid, entropy, 0.0), mask=inside)
    if found.rank is not None:
        tl.store(found.rank + tokens, tl.where(valid, rank, 0), mask=inside)
        tl.store(found.best_class + tokens, tl.where(valid, best_class, 0), mask=inside)
    if column_mass_ptr is not None:
        own_class = tl.load(own.classes + tokens, mask=valid, other=-1)
        known = (own_class >= 0) & (own_class < num_classes)
        mass = column_mass_ptr + (place // BLOCK_N).to(tl.int64) * num_classes + own_class
        tl.store(mass, tl.full((BLOCK_N,), SELECTED, tl.float32), mask=known)


def combine(
    parts: PartialStatistics,
    valid_rows: ValidRows,
    own: Own,
    column_mass: Tensor | None = None,
    *,
    block_n: int,
) -> LinearLse:
    """The statistics of each token.

    Args:
        parts: those of parts of the vocabulary, which together have every class once.
        valid_rows: the valid rows; [N].
        own: each token's own class.
        column_mass: [tiles of BLOCK_N valid rows, V], contiguous, gets SELECTED at the own classes
            of a tile's rows; or None.
        block_n: BLOCK_N, the tokens of a program.
    """
    num_tokens = len(valid_rows.place)

    def new(dtype: torch.dtype = torch.float32) -> Tensor:
        return own.logit.new_empty(num_tokens, dtype=dtype)

    ranks = parts.rank is not None
    found = LinearLse(
        others=new(),
        lse=new(),
        lse_compensation=new(),
        log_prob=new(),
        rest=None if column_mass is None else new(),
        logit_sum=None if parts.logit_sum is None else new(),
        entropy=None if parts.weighted is None else new(),
        rank=new(torch.int32) if ranks else None,
        best_class=new(torch.int32) if ranks else None,
    )
    combine_kernel[(triton.cdiv(num_tokens, block_n),)](
        parts, valid_rows, own, found, column_mass, num_tokens,
        0 if column_mass is None else column_mass.shape[1], BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return found


@kernel
def join_kernel(parts, valid_rows, out, first_class, BLOCK_N: tl.constexpr):
    """Program i owns BLOCK_N places; ``out`` has one part."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = place < tl.load(valid_rows.count)
    joined = combined_parts(parts, place, valid, BLOCK_N)
    for field in tl.static_range(7):
        if out[field + 1] is not None:  # after the count
            tl.store(out[field + 1] + place, joined[field], mask=valid)
    if out.best_class is not None:
        tl.store(out.best_class + place, joined[7] + first_class, mask=valid)
    tl.store(out.count, 1)


def joined(
    parts: PartialStatistics, valid_rows: ValidRows, first_class: int = 0
) -> PartialStatistics:
    """The parts of each token, combined to one: what a vocabulary shard tells the others.

    Args:
        parts: those of consecutive classes, in order.
        valid_rows: the valid rows; [N].
        first_class: of the shard, in the vocabulary; ``best_class`` is one of those from then on.
    """
    num_tokens = len(valid_rows.place)
    out = PartialStatistics(
        parts.count.new_empty(1),
        *(None if field is None else field.new_empty(num_tokens) for field in parts[1:]),
    )
    join_kernel[(triton.cdiv(num_tokens, 128),)](parts, valid_rows, out, first_class, BLOCK_N=128)
    return out


def beside(shards: Sequence[PartialStatistics]) -> PartialStatistics:
    """Statistics of several shards, one part each, as parts of each token, in order."""
    fields = zip(*(shard[1:] for shard in shards), strict=True)
    return PartialStatistics(
        torch.full_like(shards[0].count, len(shards)),
        *(None if of_all[0] is None else torch.stack(of_all, 1).flatten() for of_all in fields),
    )
