"""Algorithms 1 and 2 of the paper (arXiv:2411.09009), and what the column filter decides on."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscut.backends.column_filter import mass_unit
from crosscut.backends.protocol import HeadProblem, Statistics, own_labels
from crosscut.device.launch import like_or
from crosscut.device.tiles import Kernel, choose_tiles
from crosscut.kernels.flags import flagged_first
from crosscut.kernels.indexed_matmul import indexed_matmul
from crosscut.kernels.linear_lse import Columns, LinearLse, Own, Wanted, linear_lse
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.move_rows import move_rows
from crosscut.kernels.valid_rows import valid_rows_of

MOST_PROBES = 2048
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
    if labels.is_cuda:  # as PyTorch does it there: a deferred error, of the device
        torch._assert_async((labels < num_classes).all())
    head = Head(hidden, problem.classifier, bias, options.logit_scale, options.softcap)
    kept = valid_rows_of(labels)
    num_probes = min(MOST_PROBES, num_classes // 16) if len(like.column_mass) else 0
    flags = None
    if num_probes:
        flags = torch.zeros(num_classes, dtype=torch.int8, device=labels.device)
    target_logit = indexed_matmul(head, labels, flags)
    own = _own(labels, target_logit)
    wanted = Wanted(weight, problem.entropy, problem.ranks)
    if not len(like.column_mass):
        much = weight is not None or problem.ranks
        tiles = choose_tiles(Kernel.WEIGHTED_LSE if much else Kernel.LSE, hidden)
        found = linear_lse(head, kept, own, tiles, wanted)
        return _filled(like, found, labels, own, target_logit)

    if flags is not None:
        probes = flagged_first(flags, num_probes)
        some = move_rows(hidden.new_empty(num_probes, hidden.shape[1]), problem.classifier, probes)
        tiles = choose_tiles(Kernel.LSE, hidden)
        probe_head = head._replace(classifier=some)
        reference = linear_lse(probe_head, kept, own, tiles, Wanted(class_ids=probes)).others
    else:
        reference = like_or(target_logit, lambda: torch.full_like(target_logit, -torch.inf))
    least = problem.ranks or (problem.entropy and options.softcap is not None)
    tiles = choose_tiles(Kernel.WEIGHTED_LSE if least else Kernel.MASS_LSE, hidden)
    columns = Columns(like.column_mass.zero_(), reference, mass_unit(num_classes))
    found = linear_lse(head, kept, own, tiles, wanted, columns)
    return _filled(like, found, labels, own, target_logit)


def _own(labels: Tensor, target_logit: Tensor) -> Own:
    """Each token's own class, and its logit."""
    if labels.dim() == 1:
        return Own(labels, target_logit)
    if labels.is_meta:  # as in like_or
        return Own(labels[:, 0].contiguous(), target_logit[:, 0].contiguous())
    own = own_labels(labels, target_logit)
    logit = torch.where(labels == own[:, None], target_logit, -torch.inf).amax(1)
    return Own(own, torch.where(own < 0, 0, logit))


def _filled(
    like: Statistics, found: LinearLse, labels: Tensor, own: Own, target_logit: Tensor
) -> Statistics:
    """The statistics, with what a sweep has found."""
    log_prob = found.log_prob
    if labels.dim() > 1:
        log_prob = like_or(target_logit, lambda: _log_probs(found, labels, own, target_logit))
    vectors = {
        "lse": found.lse,
        "target_logit": target_logit,
        "log_prob": log_prob,
        "logit_sum": found.logit_sum,
        "entropy": found.entropy,
        "lse_low": found.lse_low,
        "tail_mass": found.rest,
    }
    like = like._replace(**{name: value for name, value in vectors.items() if value is not None})
    if found.rank is None or found.best_class is None:
        return like
    rank, best = found.rank.long(), found.best_class.long()
    argmax = like_or(best, lambda: torch.where(rank == 0, labels.clamp_min(0), best))
    return like._replace(argmax=argmax, target_rank=rank)


def _log_probs(found: LinearLse, labels: Tensor, own: Own, target_logit: Tensor) -> Tensor:
    """Of several targets a token, [N, K]. None but the own one has most of the softmax."""
    of_others = (target_logit - found.lse[:, None]) - found.lse_low[:, None]
    log_prob = torch.where(labels == own.classes[:, None], found.log_prob[:, None], of_others)
    return torch.where(labels >= 0, log_prob, 0)
