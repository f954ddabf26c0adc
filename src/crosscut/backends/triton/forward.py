"""Algorithms 1 and 2 of the paper (arXiv:2411.09009), and the column filter's marks."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscut.backends.protocol import HeadProblem, Statistics
from crosscut.backends.triton.column_filter import block_tokens, drop_below
from crosscut.kernels.flags import labels_first
from crosscut.kernels.indexed_matmul import indexed_matmul
from crosscut.kernels.kept_pairs import keep_labels
from crosscut.kernels.kept_rows import kept_tokens
from crosscut.kernels.linear_lse import LinearLse, Wanted, linear_lse
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
    target_logit = indexed_matmul(head, labels)
    wanted = Wanted(weight, problem.entropy, (labels, target_logit) if problem.ranks else None)
    if not len(like.column_mass):
        much = weight is not None or problem.ranks
        tiles = choose_tiles(Kernel.WEIGHTED_LSE if much else Kernel.LSE, hidden)
        found = linear_lse(head, kept, tiles, wanted)
        return _filled(like._replace(target_logit=target_logit), found, labels)

    tiles = choose_tiles(Kernel.LSE, hidden)
    reference = target_logit
    num_scouts = min(MOST_SCOUTS, num_classes // 16)
    if num_scouts:
        scouts = labels_first(labels, num_classes, num_scouts)
        some = move_rows(hidden.new_empty(len(scouts), hidden.shape[1]), problem.classifier, scouts)
        reference = torch.maximum(
            reference, linear_lse(head._replace(classifier=some), kept, tiles).lse
        )
    column_mass = like.column_mass.zero_()
    least = problem.ranks or (problem.entropy and options.softcap is not None)
    tiles = choose_tiles(Kernel.WEIGHTED_LSE if least else Kernel.MASS_LSE, hidden)
    found = linear_lse(
        head, kept, tiles, wanted,
        column_mass=column_mass, reference=reference, drop_below=drop_below(num_classes),
    )  # fmt: skip
    keep_labels(column_mass, labels, kept, block_tokens(problem))
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
    argmax = torch.where(rank == 0, labels.clamp_min(0), best)
    return like._replace(argmax=argmax, target_rank=rank)
