"""The valid tokens of a call, side by side, with what their cotangents come to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from crosscut.backends.protocol import (
    Cotangents,
    HeadProblem,
    RowCotangents,
    Statistics,
    own_labels,
    own_log_prob,
    row_cotangents,
)
from crosscut.device.launch import like_or
from crosscut.kernels.gather_tokens import PerToken, gather_tokens
from crosscut.kernels.softmax_gradient import Tokens
from crosscut.kernels.valid_rows import ValidRows, valid_rows_of


class ValidTokens(NamedTuple):
    """The valid tokens, side by side, and how their gradients are to be scaled."""

    rows: ValidRows
    tokens: Tokens
    loss_scale: Tensor | None  # [], the power of two that cotangents are multiplied by, if not 1
    scale: Tensor  # [1], what a product of scaled gradients is multiplied by

    def limited_to(self, num_rows: Tensor) -> ValidTokens:
        """The first ``num_rows`` [1] of them; where it is negative, nothing is to be done."""
        return self._replace(tokens=self.tokens._replace(num_rows=num_rows))


def side_by_side(
    problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, *, multiple: int
) -> ValidTokens:
    """The valid tokens, then zeros up to a multiple of so many tokens."""
    rows = valid_rows_of(problem.labels)
    labels, log_prob = problem.places.contiguous(), statistics.log_prob
    d_lse, d_target, d_log_prob = cotangents.lse, cotangents.target_logit, cotangents.log_prob
    d_sum, d_entropy = cotangents.logit_sum, cotangents.entropy
    targets = d_targets = loss_scale = None
    # What a kernel does of a token with one target, PyTorch does of those with more; and of
    # float16, whose range wants to know what comes of it.
    combined = labels.dim() > 1 or problem.hidden.dtype == torch.float16
    if combined and labels.is_meta:  # as in like_or
        if labels.dim() > 1:
            targets, d_targets = labels, log_prob
            labels, log_prob = labels[:, 0].contiguous(), log_prob[:, 0].contiguous()
        d_lse, d_target, d_log_prob = statistics.lse, statistics.lse, None
        loss_scale = log_prob.new_empty(()) if problem.hidden.dtype == torch.float16 else None
    elif combined:
        of_rows = row_cotangents(problem, statistics, cotangents)
        own = own_labels(problem.labels, statistics.target_logit)
        log_prob = own_log_prob(problem.labels, own, log_prob).contiguous()
        if problem.hidden.dtype == torch.float16:
            loss_scale = _loss_scale(problem, of_rows, log_prob, cotangents)
        d_lse, d_target, d_log_prob = of_rows.factor, of_rows.d_own, None
        if labels.dim() > 1:
            positions = rows.rows.clamp_min(0).long()
            targets, d_targets = labels[positions], of_rows.d_targets
            d_targets = d_targets[positions].float() if d_targets is not None else None
            if d_targets is not None and loss_scale is not None:
                d_targets *= loss_scale
            labels = own - problem.shard.start
    # One kernel, whichever statistics have a gradient.
    zeros = statistics.lse.new_zeros(1).expand(len(statistics.lse))
    d_lse, d_target, d_log_prob = (
        zeros if given is None else given for given in (d_lse, d_target, d_log_prob)
    )
    weight = problem.logit_weight
    if not combined and d_sum is not None and weight is not None:  # which has a log-sum-exp in it
        of_lse, of_sum = d_lse, d_sum
        d_lse = like_or(statistics.lse, lambda: of_lse - of_sum * weight.sum())
    of_tokens = PerToken(
        own=labels,
        lse=statistics.lse,
        lse_compensation=statistics.saved.lse_compensation,
        log_prob=log_prob,
        entropy=None if d_entropy is None else statistics.entropy,
        d_lse=d_lse,
        d_target=d_target,
        d_log_prob=d_log_prob,
        d_sum=d_sum,
        d_entropy=d_entropy,
    )
    tokens = gather_tokens(
        problem.hidden, of_tokens, rows, loss_scale, combined=combined, multiple=multiple
    )
    tokens = tokens._replace(targets=targets, d_targets=d_targets)
    scale = torch.full(
        (1,), problem.options.logit_scale, dtype=torch.float32, device=problem.hidden.device
    )
    if loss_scale is not None:
        unscaled = scale
        scale = like_or(unscaled, lambda: unscaled / loss_scale)
    return ValidTokens(rows, tokens, loss_scale, scale)


def _loss_scale(
    problem: HeadProblem, of_rows: RowCotangents, log_prob: Tensor, cotangents: Cotangents
) -> Tensor:
    """float16 has too little range for the gradients of logits: what to multiply them by.

    The largest there may be is brought near 2**14, and what comes of them is divided by the same
    power. Rows that are not valid have no say, whatever is in them.
    """
    largest = of_rows.factor.abs() * -log_prob.expm1()
    if cotangents.entropy is not None:  # -p log p is at most 1 / e
        largest = largest + cotangents.entropy.abs() / math.e
    largest = torch.maximum(largest, of_rows.d_own.abs())
    if of_rows.d_targets is not None:
        largest = largest + of_rows.d_targets.abs().sum(1)
    if problem.logit_weight is not None and cotangents.logit_sum is not None:
        largest = largest + cotangents.logit_sum.abs() * problem.logit_weight.abs().max()
    largest = torch.where(problem.valid, largest, 0).amax()
    return torch.exp2(14 - largest.clamp(2.0**-100, 2.0**100).log2().ceil()).float()
