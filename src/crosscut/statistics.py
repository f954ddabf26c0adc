"""Per-token statistics, and the losses that are arithmetic on them.

Everything here is plain PyTorch on [N] vectors. Adding a loss means adding a few lines here; the
kernels know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscut.options import LossOptions
from crosscut.tokens import IGNORED


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """What a linear head's softmax says of each token, in the shape of the targets.

    Float32 (float64 for float64 inputs), differentiable, and 0 where the target is ignored, unless
    said otherwise.

    Attributes:
        lse: log-sum-exp of the token's logits, in nats.
        target_logit: logit of the token's target.
        log_prob: log-probability of the target, in nats, at most 0. Not ``target_logit - lse`` but
            from the mass of the other classes, so that it keeps its digits where the model is sure.
        entropy: of the softmax, ``-sum_v p_v log p_v`` in nats; None unless asked for.
        argmax: the class of the highest logit, int64, -1 where the target is ignored; None unless
            ranks were asked for.
        target_rank: number of classes ahead of the target, int64, the number of all classes where
            it is ignored; None unless ranks were asked for. Classes are sorted by descending
            logit, equal ones by index: below k where the target is among the top k.
    """

    lse: Tensor
    target_logit: Tensor
    log_prob: Tensor
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    target_rank: Tensor | None = None

    @property
    def correct(self) -> Tensor | None:
        """Whether the target is the argmax, bool; None unless ranks were asked for."""
        return None if self.target_rank is None else self.target_rank == 0


def cross_entropy(
    statistics: TokenStatistics,
    mean_log_prob: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """The loss of each token [N], with class weights, label smoothing and z-loss.

    With ``w`` the class weights (1 if None), ``s`` the smoothing and V the number of classes:
    ``(1 - s) * w_y * -log_prob + s / V * sum_v w_v * (lse - z_v) + z_loss * lse**2``, the first
    two terms as in :class:`torch.nn.CrossEntropyLoss`.

    Args:
        statistics: [N] vectors.
        mean_log_prob: [N], ``1 / V * sum_v w_v * (z_v - lse)``; needed where ``label_smoothing`` is
            not 0.
        labels: [N], a class or ``IGNORED``.
        weight: [V] class weights, or None.
        options: the loss's options.
    """
    smoothing = options.label_smoothing
    loss = -statistics.log_prob
    if weight is not None:
        loss = loss * weight[labels.clamp_min(0)]
    if mean_log_prob is not None:
        loss = (1 - smoothing) * loss - smoothing * mean_log_prob
    if options.z_loss:
        loss = loss + options.z_loss * statistics.lse**2
    return loss


def total_weight(labels: Tensor, weight: Tensor | None, token_weight: Tensor | None) -> Tensor:
    """What a mean is taken over: the tokens kept, by their class and token weights [V], [N]."""
    kept = labels != IGNORED
    if weight is not None:
        kept = torch.where(kept, weight[labels.clamp_min(0)], 0)
    if token_weight is not None:
        kept = kept * token_weight
    return kept.sum()


def mean(losses: Tensor, divisor: Tensor | float) -> Tensor:
    """Sum of the losses [N] over the divisor; where that is 0, NaN, with a gradient of 0."""
    total = losses.sum()
    if not isinstance(divisor, Tensor):
        return total / divisor
    empty = divisor == 0
    return torch.where(empty, torch.nan, total / torch.where(empty, 1, divisor))
