"""Algorithms 1 and 2 of the paper (arXiv:2411.09009), and what the column filter decides on."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscut.backends.protocol import HeadProblem, Statistics
from crosscut.backends.triton.column_filter import mass_unit
from crosscut.kernels.flags import flagged_first
from crosscut.kernels.indexed_matmul import indexed_matmul
from crosscut.kernels.kept_rows import kept_tokens
from crosscut.kernels.launch import like_or
from crosscut.kernels.linear_lse import Columns, LinearLse, Wanted, linear_lse
from crosscut.kernels.move_rows import move_rows
from crosscut.kernels.tiles import Head, Kernel, choose_tiles

MOST_SCOUTS = 2048
"""Classes whose log-sum-exp is taken before the sweep: a lower bound of the whole one, near it. The
labels of the batch come first, which have most of the softmax."""


def compute_statistics(problem: HeadProblem, like: Statistics) -> Statistics:
    """The statistics, shaped as ``like``; ``like.column_mass`` gets filled where it has rows."""
    hidden, labels = problem.hidden.contiguous(), problem.labels.contiguous()
    num_classes, options = len(problem.classifier), problem.options
    bias, weight = (
        None if vector is None else vector.contiguous()
        for vector in (problem.bias, problem.logit_weight)
    )
    if labels.is_cuda:  # as PyTorch does it there: a late error, of the device
        torch._assert_async((labels < num_classes).all())
    head = Head(hidden, problem.classifier, bias, options.logit_scale, options.softcap)
    kept = kept_tokens(labels)
    num_scouts = min(MOST_SCOUTS, num_classes // 16) if len(like.column_mass) else 0
    flags = None
    if num_scouts:
        flags = torch.zeros(num_classes, dtype=torch.int8, device=labels.device)
    target_logit = indexed_matmul(head, labels, flags)
    wanted = Wanted(weight, problem.entropy, (labels, target_logit) if problem.ranks else None)
    if not len(like.column_mass):
        much = weight is not None or problem.ranks
        tiles = choose_tiles(Kernel.WEIGHTED_LSE if much else Kernel.LSE, hidden)
        found = linear_lse(head, kept, tiles, wanted)
        return _filled(like._replace(target_logit=target_logit), found, labels)

    reference = target_logit
    if flags is not None:
        scouts = flagged_first(flags, num_scouts)
        some = move_rows(hidden.new_empty(num_scouts, hidden.shape[1]), problem.classifier, scouts)
        tiles = choose_tiles(Kernel.LSE, hidden)
        scouted = linear_lse(head._replace(classifier=some), kept, tiles)
        reference = like_or(scouted.lse, lambda: torch.maximum(target_logit, scouted.lse))
    least = problem.ranks or (problem.entropy and options.softcap is not None)
    tiles = choose_tiles(Kernel.WEIGHTED_LSE if least else Kernel.MASS_LSE, hidden)
    columns = Columns(like.column_mass.zero_(), labels, reference, mass_unit(num_classes))
    found = linear_lse(head, kept, tiles, wanted, columns)
    return _filled(like._replace(target_logit=target_logit), found, labels)


def _filled(like: Statistics, found: LinearLse, labels: Tensor) -> Statistics:
    """The statistics, with what a sweep has found."""
    vectors = {
        "lse": found.lse,
        "logit_sum": found.logit_sum,
        "entropy": found.entropy,
        "tail_mass": found.slope_mean,
    }
    like = like._replace(**{name: value for name, value in vectors.items() if value is not None})
    if found.rank is None or found.best_class is None:
        return like
    rank, best = found.rank.long(), found.best_class.long()
    argmax = like_or(best, lambda: torch.where(rank == 0, labels.clamp_min(0), best))
    return like._replace(argmax=argmax, target_rank=rank)
