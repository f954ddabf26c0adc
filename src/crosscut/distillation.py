"""Distillation: a student's head against its teacher's, or against a teacher's stored top k."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crosscut import backends, distillation_ops, ops, statistics, tokens
from crosscut.arguments import (
    Names,
    at_temperature,
    check_tensors,
    checked_normalizer,
    flat_token_weight,
    head_problem,
    number_of_scale,
    out_of_range,
    readable,
    wants_gradient,
)
from crosscut.backends import Explanation
from crosscut.backends.protocol import DistillationProblem, HeadProblem
from crosscut.functional import log_probs_of
from crosscut.options import (
    DistillationOptions,
    Divergence,
    GradientPolicy,
    HeadOptions,
    Reduction,
    check_finite,
    check_flag,
    check_softcap,
)


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
    logit_scale: Tensor | float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: Tensor | float = 1.0,
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
        ignore_index: a token with this target takes no part and costs no time. Without ``target``
            it is not looked at.
        shift: as in :func:`crosscut.linear_cross_entropy`; needs ``target``.
        softcap: of the student's logits.
        logit_scale: of the student's logits; as in :func:`crosscut.linear_cross_entropy`.
        teacher_softcap: of the teacher's logits.
        teacher_logit_scale: of the teacher's logits.
        backend: ``"auto"`` finds one that serves the call: on a GPU, kernels that make both logits
            at once, where both heads are bfloat16 or both float32; else plain PyTorch, by blocks.
            Or the name of one that must serve it. See :func:`crosscut.explain_kl_div`.

    Returns:
        Nats, float32 (float64 for a float64 student): a scalar, or ``[...]``.

    Raises:
        ValueError: a shape, a device or an option does not fit.
        TypeError: a dtype or the type of an option does not fit.
        IndexError: a target is out of range, on the CPU; see :func:`linear_cross_entropy`.

    Note:
        Gradients come in the inputs' dtypes. Differentiating them again raises RuntimeError.
    """
    options = DistillationOptions(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        hard_weight=hard_weight,
        reduction=reduction,
    )
    hard_weight = options.hard_weight
    call = _distillation_call(
        (input, linear_weight, linear_bias, softcap, logit_scale),
        (teacher_input, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale),
        target,
        options,
        (token_weight, normalizer),
        ignore_index,
        shift,
        backend,
    )
    student, labels = call.problem.student, call.labels
    try:
        found = distillation_ops.divergences(call.problem)
    except IndexError:
        raise out_of_range(student, labels, call.ignore_index, shift) from None
    loss = found.divergence
    if hard_weight:
        loss = (1 - hard_weight) * loss + hard_weight * found.hard_loss
    if call.token_weight is not None:
        loss = loss * call.token_weight
    if reduction == "none":
        return tokens.unflatten(loss, labels.shape, shift=shift)
    if reduction == "sum":
        return loss.sum()
    divisor = call.normalizer
    if divisor is None:
        divisor = statistics.total_weight(student.labels, None, call.token_weight)
    return statistics.mean(loss, divisor)


def explain_kl_div(
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
    logit_scale: Tensor | float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: Tensor | float = 1.0,
    backend: str = "auto",
) -> Explanation:
    """Which backend would run this call of :func:`linear_kl_div`, and why not the others.

    Arguments and errors are those of :func:`linear_kl_div`. No class is read, and tensors on the
    ``meta`` device will do, as in :func:`crosscut.explain`.
    """
    call = _distillation_call(
        (input, linear_weight, linear_bias, softcap, logit_scale),
        (teacher_input, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale),
        target,
        DistillationOptions(
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            hard_weight=hard_weight,
            reduction=reduction,
        ),
        (token_weight, normalizer),
        ignore_index,
        shift,
        backend,
    )
    return backends.explain_distillation(call.problem)


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
    logit_scale: Tensor | float = 1.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> Tensor:
    """KL divergence of a student's softmax from a teacher's k most likely classes a token.

    ``sum_k q_k (log q_k - log p_k)``, with p the student's softmax: the form in which a teacher's
    softmax is stored. Built on :func:`crosscut.linear_log_probs`, whose backward may leave out the
    columns that do not matter. With ``tail`` it takes a sweep of its own, where all columns count.

    Args:
        input: the student's hidden states ``[..., D]``.
        linear_weight: the student's head ``[V, D]``, of the same dtype.
        teacher_index: classes in ``[0, V)``, each at most once a token, or ``ignore_index``,
            integer ``[..., K]``.
        teacher_prob: their probabilities (not their logarithms) under the teacher, in [0, 1],
            ``[..., K]``; what stands at an ignored class is not looked at.
        linear_bias: the student's bias ``[V]``.
        tail: also compare what is left to all other classes together, 1 less the sum of the
            probabilities. Without it, probabilities that do not sum to 1 are taken as they are, and
            the result may be negative. Computed in plain PyTorch, by blocks, on a GPU too.
        temperature: divides the student's logits; positive. The probabilities are given at it.
        ignore_index: a class that takes no part. A token of which all are ignored has a loss of 0.
        softcap: of the student's logits.
        logit_scale: of the student's logits; as in :func:`crosscut.linear_cross_entropy`.
        policy: as in :func:`crosscut.linear_cross_entropy`.
        backend: as in :func:`crosscut.linear_cross_entropy`.

    Returns:
        Nats, float32 (float64 for float64 inputs), one a token: ``[...]``.

    Raises:
        ValueError: a shape, a device or an option does not fit; a probability is none, or a class
            comes twice (both checked on the CPU, unless compiled).
        TypeError: a dtype or the type of an option does not fit.
        IndexError: a class is out of range, on the CPU; see :func:`linear_cross_entropy`.
    """
    given = {"input": input, "linear_weight": linear_weight}
    check_tensors(given | {"teacher_index": teacher_index, "teacher_prob": teacher_prob})
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
    scale = number_of_scale(logit_scale)
    problem = head_problem(
        (input, linear_weight, teacher_index, linear_bias),
        HeadOptions(softcap=softcap, logit_scale=scale, policy=policy, backend=backend),
        ignore_index,
        shift=0,
        scale=logit_scale,
        several=True,
        names=Names(target="teacher_index"),
    )
    problem = at_temperature(problem, temperature)
    kept = problem.labels >= 0
    q = torch.where(kept, teacher_prob.detach().reshape(kept.shape), 0).to(problem.statistics_dtype)
    if readable(q):
        _check_top_k(q, problem.labels, teacher_index.shape)
    try:
        if check_flag("tail", tail):
            found = distillation_ops.rest(problem)
            loss = _with_tail(q, found.lse, found.target_logit, kept)
        else:
            found = ops.token_statistics(problem, for_backward=wants_gradient(problem))
            log_p = log_probs_of(problem, found)
            loss = _relative_entropy(q, log_p).sum(-1)
    except IndexError:
        raise out_of_range(problem, teacher_index, ignore_index, 0, "teacher_index") from None
    return tokens.unflatten(loss, input.shape[:-1], shift=0)


def _with_tail(q: Tensor, rest: Tensor, logits: Tensor, kept: Tensor) -> Tensor:
    """The divergence of each token [N] where all classes but its k count as one.

    What is left to them is not ``1 - p``, which a sure student leaves no digit of, but their own
    mass: they are one more logit, their log-sum-exp.

    Args:
        q: the teacher's probabilities [N, K], 0 where not kept.
        rest: log-sum-exp of the logits of all other classes [N], less the highest of the k.
        logits: of the k [N, K], less the highest.
        kept: which of the k count [N, K].
    """
    counts = kept.any(-1)
    logits = torch.where(kept, logits, -torch.inf)
    rest = torch.where(counts, rest, 0)
    log_p = torch.cat([logits, rest[:, None]], -1).log_softmax(-1)
    q = torch.cat([q, (1 - q.sum(-1, keepdim=True)).clamp_min(0)], -1)
    return torch.where(counts, _relative_entropy(q, log_p).sum(-1), 0)


def _relative_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    """``q (log q - log p)``, 0 where q is."""
    return torch.special.xlogy(q, q) - torch.where(q > 0, q * log_p, 0)


def _check_top_k(q: Tensor, labels: Tensor, shape: torch.Size) -> None:
    """Raise for what is no probability, or a class that a token has twice."""

    def place(wrong: Tensor) -> list[int]:
        return wrong.reshape(shape).nonzero()[0].tolist()

    wrong = ~((q >= 0) & (q <= 1))
    if wrong.any():
        at = place(wrong)
        raise ValueError(
            f"teacher_prob must be in [0, 1], got {q.reshape(shape)[tuple(at)].item():g} at {at}"
        )
    ordered, order = labels.sort(-1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if again.any():
        at = place(torch.zeros_like(labels, dtype=torch.bool).scatter(-1, order[:, 1:], again))
        raise ValueError(
            "teacher_index must have a class at most once a token, got "
            f"{labels.reshape(shape)[tuple(at)].item()} again at {at}"
        )


@dataclass(frozen=True, kw_only=True)
class _DistillationCall:
    """A call of :func:`linear_kl_div`, checked.

    Attributes:
        problem: whose divergences the loss is made of.
        labels: the targets, in the shape of the batch.
        ignore_index: among them.
        token_weight: weight of each row [N] in the dtype of the statistics, or None.
        normalizer: what a mean is over, if not the rows that count.
    """

    problem: DistillationProblem
    labels: Tensor
    ignore_index: int
    token_weight: Tensor | None
    normalizer: Tensor | float | None


_Head = tuple[Tensor, Tensor, Tensor | None, float | None, Tensor | float]
"""Hidden states, weight, bias, softcap and scale."""


def _distillation_call(
    student: _Head,
    teacher: _Head,
    target: Tensor | None,
    options: DistillationOptions,
    weights: tuple[Tensor | None, Tensor | float | None],
    ignore_index: int,
    shift: int,
    backend: str,
) -> _DistillationCall:
    """The arguments of :func:`linear_kl_div`, checked; ``weights`` are token's and normalizer."""
    hidden, classifier, bias, softcap, scale = student
    check_tensors({"input": hidden, "linear_weight": classifier})
    labels = target
    if labels is None:
        if options.hard_weight or shift:
            raise ValueError(
                f"hard_weight={options.hard_weight} and shift={shift} need a target, got None"
            )
        labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        ignore_index = -1  # all count
    of_student = head_problem(
        (hidden, classifier, labels, bias),
        HeadOptions(softcap=softcap, logit_scale=number_of_scale(scale), backend=backend),
        ignore_index,
        shift,
        scale=scale,
    )
    of_teacher = _teacher_problem(teacher, of_student, labels, ignore_index, shift)
    token_weight, normalizer = weights
    if token_weight is not None:
        token_weight = flat_token_weight(token_weight, labels, of_student, shift)
    if normalizer is not None:
        normalizer = checked_normalizer(normalizer, options.reduction, of_student.statistics_dtype)
    problem = DistillationProblem(
        student=at_temperature(of_student, options.temperature),
        teacher=at_temperature(of_teacher, options.temperature),
        divergence=options.divergence,
        beta=options.beta,
        temperature=options.temperature if options.hard_weight else None,
    )
    return _DistillationCall(
        problem=problem,
        labels=labels,
        ignore_index=ignore_index,
        token_weight=token_weight,
        normalizer=normalizer,
    )


def _teacher_problem(
    head: _Head,
    student: HeadProblem,
    labels: Tensor,
    ignore_index: int,
    shift: int,
) -> HeadProblem:
    """The teacher's head, without a gradient, checked to be one of the student's tokens."""
    hidden, classifier, bias, softcap, scale = head
    given = {"teacher_input": hidden, "teacher_weight": classifier}
    check_tensors({"input": student.hidden} | given)
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            "teacher_input must have input's shape but for its last dimension, "
            f"{list(labels.shape)}, got {list(hidden.shape[:-1])}"
        )
    teacher = head_problem(
        (hidden, classifier, labels, bias),
        HeadOptions(
            softcap=check_softcap("teacher_softcap", softcap),
            logit_scale=check_finite("teacher_logit_scale", number_of_scale(scale)),
            backend=student.options.backend,
        ),
        ignore_index,
        shift,
        scale=scale,
        names=Names(
            "teacher_input", "teacher_weight", "target", "teacher_bias", "teacher_logit_scale"
        ),
    )
    if len(teacher.classifier) != len(student.classifier):
        raise ValueError(
            f"teacher_weight must have linear_weight's {len(student.classifier)} classes, "
            f"got shape {list(classifier.shape)}"
        )
    return replace(
        teacher,
        hidden=teacher.hidden.detach(),
        classifier=teacher.classifier.detach(),
        bias=None if teacher.bias is None else teacher.bias.detach(),
        labels=student.labels,
    )
