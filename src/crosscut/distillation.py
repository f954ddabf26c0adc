"""Distillation: a student's head against its teacher's, or against a teacher's stored top k."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscut import distillation_ops, statistics, tokens
from crosscut.arguments import (
    at_temperature,
    checked_normalizer,
    flat_token_weight,
    head_problem,
)
from crosscut.backends.protocol import DistillationProblem
from crosscut.functional import linear_log_probs
from crosscut.options import (
    DistillationOptions,
    Divergence,
    GradientPolicy,
    HeadOptions,
    Reduction,
)
from crosscut.statistics import TokenStatistics


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Divergence of a student's softmax from its teacher's, without the logits of either.

    ``(1 - hard_weight) * divergence + hard_weight * cross_entropy`` a token. The divergence is that
    of both softmaxes at ``temperature``; the cross-entropy, of the student against ``target``, is
    at temperature 1. Multiply by ``temperature**2`` where the gradient is to keep its size
    (arXiv:1503.02531, section 2). The teacher gets no gradient. Every entry of the softmax counts:
    there is no filter.

    Args:
        input: the student's hidden states ``[..., D]`` of any float dtype.
        linear_weight: the student's head ``[V, D]``, of the same dtype.
        teacher_input: the teacher's hidden states ``[..., E]`` of any float dtype.
        teacher_weight: the teacher's head ``[V, E]``, of the same dtype as ``teacher_input``.
        target: classes in ``[0, V)`` or ``ignore_index``, integer ``[...]``: which tokens count,
            and the targets of the hard loss. None: all count.
        linear_bias: the student's bias ``[V]``.
        teacher_bias: the teacher's bias ``[V]``.
        divergence: ``"forward"``, ``"reverse"`` or ``"js"``; see :data:`crosscut.Divergence`.
        beta: the teacher's share of the mixture of ``"js"``, between 0 and 1.
        temperature: divides both logits in the divergence; positive.
        hard_weight: share of the cross-entropy, in [0, 1]; needs ``target``.
        token_weight: as in :func:`crosscut.linear_cross_entropy`.
        reduction: ``"mean"`` over the tokens that count, ``"sum"``, or ``"none"`` for ``[...]``.
        normalizer: as in :func:`crosscut.linear_cross_entropy`.
        ignore_index: a token with this target takes no part and costs no time.
        shift: as in :func:`crosscut.linear_cross_entropy`; needs ``target``.
        softcap: of the student's logits.
        logit_scale: of the student's logits.
        teacher_softcap: of the teacher's logits.
        teacher_logit_scale: of the teacher's logits.
        backend: ``"auto"`` finds one that serves the call: on a GPU, kernels that make both logits
            at once, where both heads are bfloat16 or both float32; else plain PyTorch, by blocks.
            Or the name of one that must serve it.

    Returns:
        Nats, float32 (float64 for a float64 student): a scalar, or ``[...]``.

    Raises:
        ValueError: a shape, a device or an option does not fit.
        TypeError: a dtype or the type of an option does not fit.
        IndexError: a target is out of range (checked on the CPU).

    Note:
        Gradients come in the inputs' dtypes. Differentiating them again raises RuntimeError.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    options = DistillationOptions(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        hard_weight=hard_weight,
        reduction=reduction,
    )
    labels = target
    if labels is None:
        if hard_weight or shift:
            raise ValueError(f"hard_weight={hard_weight} and shift={shift} need a target, got None")
        labels = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device)
    student = head_problem(
        (input, linear_weight, labels, linear_bias),
        HeadOptions(softcap=softcap, logit_scale=logit_scale, backend=backend),
        ignore_index,
        shift,
    )
    _check_teacher(teacher_input, teacher_weight, input, linear_weight)
    teacher = head_problem(
        (teacher_input.detach(), teacher_weight.detach(), labels, _detached(teacher_bias)),
        HeadOptions(softcap=teacher_softcap, logit_scale=teacher_logit_scale),
        ignore_index,
        shift,
    )
    if token_weight is not None:
        token_weight = flat_token_weight(token_weight, labels, student, shift)
    if normalizer is not None:
        normalizer = checked_normalizer(normalizer, reduction, student.statistics_dtype)
    found = distillation_ops.divergences(
        DistillationProblem(
            student=at_temperature(student, temperature),
            teacher=at_temperature(teacher, temperature),
            divergence=options.divergence,
            beta=options.beta,
            temperature=options.temperature if options.hard_weight else None,
        )
    )
    loss = found.divergence
    if hard_weight:
        hard = TokenStatistics(lse=found.hard_lse, target_logit=found.target_logit)
        loss = (1 - hard_weight) * loss - hard_weight * hard.log_prob
    if token_weight is not None:
        loss = loss * token_weight
    if reduction == "none":
        return tokens.unflatten(loss, labels.shape, shift=shift)
    if reduction == "mean" and normalizer is None:
        normalizer = statistics.total_weight(student.labels, None, token_weight)
    return loss.sum() if normalizer is None else loss.sum() / normalizer


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_index: Tensor,
    teacher_prob: Tensor,
    *,
    linear_bias: Tensor | None = None,
    tail: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> Tensor:
    """KL divergence of a student's softmax from a teacher's k most likely classes a token.

    ``sum_k q_k (log q_k - log p_k)``, with p the student's softmax: the form in which a teacher's
    softmax is stored. Built on :func:`crosscut.linear_log_probs`, whose backward may leave out the
    columns that do not matter.

    Args:
        input: the student's hidden states ``[..., D]``.
        linear_weight: the student's head ``[V, D]``, of the same dtype.
        teacher_index: classes in ``[0, V)``, each at most once a token, or ``ignore_index``,
            integer ``[..., K]``.
        teacher_prob: their probabilities under the teacher, in [0, 1], ``[..., K]``; what stands at
            an ignored class is not looked at.
        linear_bias: the student's bias ``[V]``.
        tail: also compare what is left to all other classes together, 1 less the sum of the
            probabilities. Without it, probabilities that do not sum to 1 are taken as they are, and
            the result may be negative.
        temperature: divides the student's logits; positive. The probabilities are given at it.
        ignore_index: a class that takes no part. A token of which all are ignored has a loss of 0.
        softcap: of the student's logits.
        logit_scale: of the student's logits.
        policy: as in :func:`crosscut.linear_cross_entropy`.
        backend: as in :func:`crosscut.linear_cross_entropy`.

    Returns:
        Nats, float32 (float64 for float64 inputs), one a token: ``[...]``.

    Raises:
        ValueError: a shape, a device or an option does not fit.
        TypeError: a dtype or the type of an option does not fit.
        IndexError: a class is out of range (on the CPU).
    """
    if teacher_index.dim() != input.dim():
        raise ValueError(
            f"teacher_index must have shape [{', '.join(map(str, input.shape[:-1]))}, K], "
            f"got {list(teacher_index.shape)}"
        )
    if teacher_prob.shape != teacher_index.shape:
        raise ValueError(
            f"teacher_prob must have teacher_index's shape, {list(teacher_index.shape)}, "
            f"got {list(teacher_prob.shape)}"
        )
    if not teacher_prob.is_floating_point():
        raise TypeError(f"teacher_prob must have a floating-point dtype, got {teacher_prob.dtype}")
    log_p = linear_log_probs(
        input, linear_weight, teacher_index, linear_bias=linear_bias, temperature=temperature,
        ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale, policy=policy,
        backend=backend,
    )  # fmt: skip
    kept = teacher_index != ignore_index
    q = torch.where(kept, teacher_prob.detach().to(log_p), 0)
    loss = (torch.special.xlogy(q, q) - q * log_p).sum(-1)
    if not tail:
        return loss
    rest = (1 - q.sum(-1)).clamp_min(0)
    covered = log_p.masked_fill(~kept, -torch.inf).logsumexp(-1)
    # Never quite all of the softmax, or the logarithm of what is left would be that of a rounding.
    covered = covered.clamp_max(-torch.finfo(covered.dtype).eps)
    left = torch.log(-torch.expm1(covered))
    loss = loss + torch.special.xlogy(rest, rest) - rest * left
    return torch.where(kept.any(-1), loss, 0)


def _check_teacher(
    teacher_input: Tensor, teacher_weight: Tensor, input: Tensor, linear_weight: Tensor
) -> None:
    for name, value in (("teacher_input", teacher_input), ("teacher_weight", teacher_weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if value.device != input.device:
            raise ValueError(
                f"{name} is on {value.device}, input is on {input.device}: "
                "all must be on one device"
            )
    if teacher_input.shape[:-1] != input.shape[:-1]:
        raise ValueError(
            f"teacher_input must have input's shape but for its last dimension, "
            f"{list(input.shape[:-1])}, got {list(teacher_input.shape[:-1])}"
        )
    if teacher_weight.shape[:1] != linear_weight.shape[:1]:
        raise ValueError(
            f"teacher_weight must have linear_weight's {len(linear_weight)} classes, "
            f"got shape {list(teacher_weight.shape)}"
        )
    if teacher_weight.dim() != 2 or teacher_weight.shape[1] != teacher_input.shape[-1]:
        raise ValueError(
            f"teacher_weight must have shape [V, {teacher_input.shape[-1]}] for a teacher_input "
            f"of that hidden size, got {list(teacher_weight.shape)}"
        )
    if teacher_weight.dtype != teacher_input.dtype:
        raise TypeError(
            f"teacher_weight has dtype {teacher_weight.dtype}, teacher_input has "
            f"{teacher_input.dtype}: cast one of them"
        )


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
