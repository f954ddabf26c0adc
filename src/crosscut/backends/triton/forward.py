"""Algorithms 1 and 2 of the paper (arXiv:2411.09009), and the column filter's marks."""

from __future__ import annotations

import torch

from crosscut.backends.protocol import HeadProblem, Statistics
from crosscut.backends.triton.column_filter import block_tokens, drop_below
from crosscut.kernels.flags import labels_first
from crosscut.kernels.indexed_matmul import indexed_matmul
from crosscut.kernels.kept_pairs import keep_labels
from crosscut.kernels.kept_rows import kept_rows
from crosscut.kernels.linear_lse import linear_lse
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
    kept = kept_rows(labels)
    target_logit = indexed_matmul(head, labels)
    if not len(like.column_mass):
        tiles = choose_tiles(Kernel.LSE if weight is None else Kernel.WEIGHTED_LSE, hidden)
        found = linear_lse(head, kept, tiles, logit_weight=weight)
        logit_sum = like.logit_sum if found.logit_sum is None else found.logit_sum
        return like._replace(lse=found.lse, target_logit=target_logit, logit_sum=logit_sum)

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
    tiles = choose_tiles(Kernel.MASS_LSE, hidden)
    found = linear_lse(
        head, kept, tiles,
        column_mass=column_mass, reference=reference, drop_below=drop_below(num_classes),
    )  # fmt: skip
    keep_labels(column_mass, labels, kept, block_tokens(problem))
    slope_mean = like.tail_mass if found.slope_mean is None else found.slope_mean
    return like._replace(lse=found.lse, target_logit=target_logit, tail_mass=slope_mean)
