"""Algorithms 1 and 2 of the paper (arXiv:2411.09009), and what the column filter decides on.

In stages: a probe of what is known before all classes are swept, a sweep over them, which leaves
statistics of parts of the vocabulary, and their combination. Each takes what those before it
returned, so that one can be replaced alone: a sweep in another precision, or of a shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosscut.backends.column_filter import block_tokens, mass_unit
from crosscut.backends.protocol import HeadProblem, Statistics, own_labels
from crosscut.device.launch import like_or
from crosscut.device.tiles import Kernel, choose_tiles
from crosscut.kernels.flags import flagged_first
from crosscut.kernels.indexed_matmul import indexed_matmul
from crosscut.kernels.linear_lse import Columns, Wanted, linear_lse, sweep_classes
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.move_rows import move_rows
from crosscut.kernels.partial_statistics import LinearLse, Own, PartialStatistics, combine
from crosscut.kernels.valid_rows import ValidRows, valid_rows_of

MOST_PROBES = 2048
"""Probe classes: the labels of the batch come first, which have most of the softmax."""


class Probe(NamedTuple):
    """What is known of the tokens before the sweep."""

    rows: ValidRows
    target_logit: Tensor  # of the shape of the labels
    own: Tensor  # [N] int64, place of each token's own class, which sums over classes leave out
    own_logit: Tensor  # [N]
    lower_bound: Tensor | None  # [N], of the log-sum-exp of the others; None if nobody asked


def probe(problem: HeadProblem, *, bound: bool) -> Probe:
    """Target logits and, with ``bound``, the log-sum-exp of the probe classes as lower bound."""
    labels, num_classes = problem.places.contiguous(), len(problem.classifier)
    if labels.is_cuda:  # as PyTorch does it there: a late error, of the device
        torch._assert_async((problem.labels < problem.total_classes).all())
    head = _head(problem)
    rows = valid_rows_of(problem.labels)
    num_probes = min(MOST_PROBES, num_classes // 16) if bound else 0
    flags = None
    if num_probes:
        flags = torch.zeros(num_classes, dtype=torch.int8, device=labels.device)
    target_logit = indexed_matmul(head, labels, flags)
    own = _own(problem, labels, target_logit)
    lower_bound = None
    if flags is not None:
        classes = flagged_first(flags, num_probes)
        some = move_rows(
            head.hidden.new_empty(num_probes, head.hidden.shape[1]), head.classifier, classes
        )
        tiles, wanted = choose_tiles(Kernel.LSE, head.hidden), Wanted(class_ids=classes)
        lower_bound = linear_lse(head._replace(classifier=some), rows, own, tiles, wanted).others
    elif bound:
        lower_bound = like_or(target_logit, lambda: torch.full_like(target_logit, -torch.inf))
    return Probe(rows, target_logit, *own, lower_bound)


def sweep(problem: HeadProblem, probed: Probe, column_mass: Tensor | None) -> PartialStatistics:
    """Statistics of parts of the vocabulary.

    Fills ``column_mass`` [blocks, V], if it is given, but for SELECTED pairs.
    """
    weight = None if problem.logit_weight is None else problem.logit_weight.contiguous()
    columns = None
    if column_mass is None or probed.lower_bound is None:
        much = weight is not None or problem.ranks
        kernel = Kernel.WEIGHTED_LSE if much else Kernel.LSE
    else:
        softcap = problem.options.softcap is not None
        much = problem.ranks or (problem.entropy and softcap)
        kernel = Kernel.WEIGHTED_LSE if much else Kernel.MASS_LSE
        unit = mass_unit(len(problem.classifier))
        columns = Columns(column_mass.zero_(), probed.lower_bound, unit)
    tiles = choose_tiles(kernel, problem.hidden)
    wanted = Wanted(weight, problem.entropy, problem.ranks)
    own = Own(probed.own, probed.own_logit)
    return sweep_classes(_head(problem), probed.rows, own, tiles, wanted, columns)


def compute_statistics(problem: HeadProblem, like: Statistics) -> Statistics:
    """The statistics, shaped as ``like``, whose column masses get filled where they have rows."""
    column_mass = like.saved.column_mass if len(like.saved.column_mass) else None
    probed = probe(problem, bound=column_mass is not None)
    parts = sweep(problem, probed, column_mass)
    own = Own(probed.own, probed.own_logit)
    found = combine(parts, probed.rows, own, column_mass, block_n=block_tokens(problem))
    logit_sum, weight = found.logit_sum, problem.logit_weight
    if logit_sum is not None and weight is not None:
        of_logits, lse, low = logit_sum, found.lse, found.lse_compensation
        logit_sum = like_or(of_logits, lambda: _less(of_logits, weight.sum(), lse, low))
    return _filled(like, found._replace(logit_sum=logit_sum), problem, probed)


def _less(logit_sum: Tensor, total: Tensor, lse: Tensor, low: Tensor) -> Tensor:
    """``sum_v w[v] (z[n, v] - lse[n])`` of ``sum_v w[v] z[n, v]`` and ``sum_v w[v]``."""
    return logit_sum - total * lse - total * low


def _head(problem: HeadProblem) -> Head:
    bias, options = problem.bias, problem.options
    return Head(
        problem.hidden.contiguous(),
        problem.classifier,
        None if bias is None else bias.contiguous(),
        options.logit_scale,
        options.softcap,
    )


def _own(problem: HeadProblem, places: Tensor, target_logit: Tensor) -> Own:
    """The place of each token's own class, and its logit."""
    labels = problem.labels
    if labels.dim() == 1:
        return Own(places, target_logit)
    if labels.is_meta:  # as in like_or
        return Own(places[:, 0].contiguous(), target_logit[:, 0].contiguous())
    own = own_labels(labels, target_logit)
    logit = torch.where(labels == own[:, None], target_logit, -torch.inf).amax(1)
    return Own(own - problem.shard.start, torch.where(own < 0, 0, logit))


def _filled(like: Statistics, found: LinearLse, problem: HeadProblem, probed: Probe) -> Statistics:
    """The statistics, with what a sweep has found."""
    log_prob = found.log_prob
    if problem.labels.dim() > 1:
        log_prob = like_or(probed.target_logit, lambda: _log_probs(found, problem, probed))
    vectors = {
        "lse": found.lse,
        "target_logit": probed.target_logit,
        "log_prob": log_prob,
        "logit_sum": found.logit_sum,
        "entropy": found.entropy,
    }
    saved = like.saved._replace(lse_compensation=found.lse_compensation)
    like = like._replace(
        saved=saved if found.rest is None else saved._replace(tail_mass=found.rest)
    )
    like = like._replace(**{name: value for name, value in vectors.items() if value is not None})
    if found.rank is None or found.best_class is None:
        return like
    rank, best = found.rank.long(), found.best_class.long()
    labels, start = problem.labels, problem.shard.start
    argmax = like_or(best, lambda: torch.where(rank == 0, labels.clamp_min(0), best + start))
    return like._replace(argmax=argmax, target_rank=rank)


def _log_probs(found: LinearLse, problem: HeadProblem, probed: Probe) -> Tensor:
    """Of several targets per token, [N, K]. None but the own one has most of the softmax."""
    of_others = (probed.target_logit - found.lse[:, None]) - found.lse_compensation[:, None]
    is_own = problem.places == probed.own[:, None]
    log_prob = torch.where(is_own, found.log_prob[:, None], of_others)
    return torch.where(problem.labels >= 0, log_prob, 0)
