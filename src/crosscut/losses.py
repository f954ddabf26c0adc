"""Losses of preferences and of policies, as arithmetic on log-probabilities.

Each takes log-probabilities as :func:`crosscut.linear_log_probs` gives them, differentiable, and
returns one loss an example, for the caller to add up. A sequence's log-probability is the sum of
its tokens', which are 0 where the target is ignored:

>>> log_prob = crosscut.linear_log_probs(hidden, head.weight, labels, shift=1).sum(-1)  # [B]
>>> chosen, rejected = log_prob.chunk(2)

What is said of an argument is said of its every element. Errors: ValueError for shapes and
options that do not fit, TypeError for types that do not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.options import check_between, check_finite, check_positive

__all__ = ["clipped_surrogate", "cpo", "dpo", "ipo", "kl_penalty", "kto", "orpo", "simpo"]


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al., arXiv:2305.18290, equation 7).

    ``-log sigmoid(beta * margin)`` with ``margin = (chosen - reference_chosen) - (rejected -
    reference_rejected)``, for pairs that are the right way round with probability
    ``1 - label_smoothing`` (conservative DPO).

    Args:
        chosen: log-probability of the preferred answer under the policy, ``[B]``.
        rejected: of the other answer, ``[B]``.
        reference_chosen: of the preferred answer under the reference, ``[B]``.
        reference_rejected: of the other one, ``[B]``.
        beta: how dear it is to leave the reference; positive.
        label_smoothing: probability that a preference is wrong, in [0, 1].

    Returns:
        ``[B]``.
    """
    _check_shapes(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    beta = check_positive("beta", beta)
    label_smoothing = check_between("label_smoothing", label_smoothing, 0, 1)
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return _preference(beta * margin, label_smoothing)


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Identity preference optimisation (Azar et al., arXiv:2310.12036, equation 17).

    ``(margin - 1 / (2 * beta))**2``, with the margin of :func:`dpo`. The authors' own results are
    of log-probabilities averaged over the tokens of an answer, so give these.

    Args:
        chosen: mean log-probability of the preferred answer under the policy, ``[B]``.
        rejected: of the other answer, ``[B]``.
        reference_chosen: of the preferred answer under the reference, ``[B]``.
        reference_rejected: of the other one, ``[B]``.
        beta: the paper's tau; positive.

    Returns:
        ``[B]``.
    """
    _check_shapes(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    beta = check_positive("beta", beta)
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return (margin - 1 / (2 * beta)) ** 2


def cpo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Tensor:
    """Contrastive preference optimisation (Xu et al., arXiv:2401.08417, equation 6).

    ``-log sigmoid(beta * (chosen - rejected)) - nll_weight * chosen``: DPO without a reference,
    and the likelihood of the preferred answer.

    Args:
        chosen: log-probability of the preferred answer under the policy, ``[B]``.
        rejected: of the other answer, ``[B]``.
        beta: steepness; positive.
        label_smoothing: probability that a preference is wrong, in [0, 1].
        nll_weight: of the likelihood; finite.

    Returns:
        ``[B]``.
    """
    _check_shapes(chosen=chosen, rejected=rejected)
    beta = check_positive("beta", beta)
    label_smoothing = check_between("label_smoothing", label_smoothing, 0, 1)
    nll_weight = check_finite("nll_weight", nll_weight)
    return _preference(beta * (chosen - rejected), label_smoothing) - nll_weight * chosen


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Simple preference optimisation (Meng et al., arXiv:2405.14734, equation 6).

    ``-log sigmoid(beta * (chosen - rejected) - gamma)``.

    Args:
        chosen: mean log-probability of the preferred answer's tokens, ``[B]``.
        rejected: of the other answer's, ``[B]``.
        beta: steepness; positive.
        gamma: the margin aimed at, in the same units as ``beta * chosen``; finite.

    Returns:
        ``[B]``.
    """
    _check_shapes(chosen=chosen, rejected=rejected)
    beta = check_positive("beta", beta)
    gamma = check_finite("gamma", gamma)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """Odds-ratio preference optimisation (Hong et al., arXiv:2403.07691, equations 6 and 7).

    ``-chosen - beta * log sigmoid(log odds(chosen) - log odds(rejected))`` with
    ``odds(x) = exp(x) / (1 - exp(x))``: the likelihood of the preferred answer, and its odds.

    Args:
        chosen: mean log-probability of the preferred answer's tokens, below 0, ``[B]``.
        rejected: of the other answer's, below 0, ``[B]``.
        beta: weight of the odds ratio, the paper's lambda; positive.

    Returns:
        ``[B]``.
    """
    _check_shapes(chosen=chosen, rejected=rejected)
    beta = check_positive("beta", beta)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - beta * F.logsigmoid(log_odds_ratio)


def kto(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al., arXiv:2402.01306, equations 7 and 8).

    ``desirable_weight * (1 - sigmoid(beta * (ratio - kl)))`` for a desirable answer,
    ``undesirable_weight * (1 - sigmoid(beta * (kl - ratio)))`` for another, with
    ``ratio = log_prob - reference_log_prob``.

    Args:
        log_prob: of each answer under the policy, ``[B]``.
        reference_log_prob: under the reference, ``[B]``.
        desirable: which answers are good, bool ``[B]``.
        kl: the reference point, a number: an estimate of the policy's divergence from the
            reference, in the paper the mean ratio of mismatched answers. No gradient flows into
            it, and a negative one counts as 0.
        beta: risk aversion; positive.
        desirable_weight: finite.
        undesirable_weight: finite.

    Returns:
        ``[B]``.
    """
    _check_shapes(log_prob=log_prob, reference_log_prob=reference_log_prob)
    if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
        kind = desirable.dtype if isinstance(desirable, Tensor) else type(desirable).__name__
        raise TypeError(f"desirable must be a bool Tensor, got {kind}")
    if desirable.shape != log_prob.shape:
        raise ValueError(
            f"desirable must have log_prob's shape, {list(log_prob.shape)}, "
            f"got {list(desirable.shape)}"
        )
    beta = check_positive("beta", beta)
    desirable_weight = check_finite("desirable_weight", desirable_weight)
    undesirable_weight = check_finite("undesirable_weight", undesirable_weight)
    point = torch.as_tensor(kl, dtype=log_prob.dtype, device=log_prob.device).detach()
    if point.numel() != 1:
        raise ValueError(f"kl must be a number or a tensor of one, got shape {list(point.shape)}")
    gain = beta * (log_prob - reference_log_prob - point.reshape(()).clamp_min(0))
    return torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-gain),  # 1 - sigmoid(x), where sigmoid(x) is near 1
        undesirable_weight * torch.sigmoid(gain),
    )


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_log_prob: Tensor | None = None,
    kl_weight: float = 0.0,
    entropy: Tensor | None = None,
    entropy_weight: float = 0.0,
) -> Tensor:
    """The clipped policy loss of PPO (arXiv:1707.06347, equation 7) and GRPO (arXiv:2402.03300).

    ``-min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)
    + kl_weight * kl_penalty - entropy_weight * entropy`` a token, with
    ``ratio = exp(log_prob - old_log_prob)``. With ``old_log_prob = log_prob.detach()`` its gradient
    is that of REINFORCE. Take no notice of ignored tokens when adding up: their loss is not 0.

    Args:
        log_prob: of each token under the policy, ``[..., T]``.
        old_log_prob: under the policy that made them, ``[..., T]``; no gradient flows into it.
        advantage: ``[..., T]``, or 1 in place of a dimension: ``[..., 1]`` for one per sequence.
        clip_low: how far the ratio may fall below 1 and still count, in [0, 1].
        clip_high: how far it may rise above, at least 0; more than ``clip_low`` in DAPO
            (arXiv:2503.14476, section 3.1).
        reference_log_prob: under the reference, ``[..., T]``; needed with ``kl_weight``.
        kl_weight: of :func:`kl_penalty`; finite.
        entropy: of the policy's softmax, ``[..., T]``, as ``token_statistics(..., entropy=True)``
            gives it; needed with ``entropy_weight``.
        entropy_weight: of the entropy bonus; finite.

    Returns:
        ``[..., T]``.
    """
    _check_shapes(log_prob=log_prob, old_log_prob=old_log_prob)
    if not isinstance(advantage, Tensor):
        raise TypeError(f"advantage must be a Tensor, got {type(advantage).__name__}")
    dims = zip(advantage.shape, log_prob.shape, strict=False)
    if advantage.dim() != log_prob.dim() or any(a not in (1, b) for a, b in dims):
        raise ValueError(
            f"advantage must have log_prob's shape, {list(log_prob.shape)}, with 1 for a dimension "
            f"along which it is one, got {list(advantage.shape)}"
        )
    clip_low = check_between("clip_low", clip_low, 0, 1)
    clip_high = check_between("clip_high", clip_high, 0, float("inf"))
    log_ratio = log_prob - old_log_prob.detach()
    # Where a higher ratio adds nothing, it must not overflow: its gradient would be 0 * inf.
    most = math.log(torch.finfo(log_ratio.dtype).max) - 1
    log_ratio = torch.where(advantage < 0, log_ratio, log_ratio.clamp_max(most))
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    kl_weight = check_finite("kl_weight", kl_weight)
    entropy_weight = check_finite("entropy_weight", entropy_weight)
    for name, weight, of, value in (
        ("kl_weight", kl_weight, "reference_log_prob", reference_log_prob),
        ("entropy_weight", entropy_weight, "entropy", entropy),
    ):
        if weight and value is None:
            raise ValueError(f"{name}={weight} needs {of}")
    if kl_weight and reference_log_prob is not None:
        loss = loss + kl_weight * kl_penalty(log_prob, reference_log_prob)
    if entropy_weight and entropy is not None:
        _check_shapes(log_prob=log_prob, entropy=entropy)
        loss = loss - entropy_weight * entropy
    return loss


def kl_penalty(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """An unbiased, non-negative estimate of KL(policy || reference) from one token of the policy.

    ``exp(d) - d - 1`` with ``d = reference_log_prob - log_prob``: "k3" of Schulman's "Approximating
    KL divergence", GRPO's equation 4 (arXiv:2402.03300).

    Args:
        log_prob: of each token under the policy, ``[...]``.
        reference_log_prob: under the reference, ``[...]``.

    Returns:
        ``[...]``.
    """
    _check_shapes(log_prob=log_prob, reference_log_prob=reference_log_prob)
    difference = reference_log_prob - log_prob
    return difference.expm1() - difference


def _preference(scaled_margin: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of a preference that is wrong with probability ``label_smoothing``."""
    loss = -F.logsigmoid(scaled_margin)
    if label_smoothing:
        wrong = -F.logsigmoid(-scaled_margin)
        loss = (1 - label_smoothing) * loss + label_smoothing * wrong
    return loss


def _log_odds(log_prob: Tensor) -> Tensor:
    """``log(p / (1 - p))``."""
    return log_prob - torch.log(-torch.expm1(log_prob))


def _check_shapes(**named: Tensor) -> None:
    """Raise unless all are floating-point tensors of the first one's shape."""
    first, like = next(iter(named.items()))
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
        if value.shape != like.shape:
            raise ValueError(
                f"{name} must have {first}'s shape, {list(like.shape)}, got {list(value.shape)}"
            )
