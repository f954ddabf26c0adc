"""What distillation needs of heads, as PyTorch custom operators.

``crosscut::divergence`` and ``crosscut::divergence_backward`` of a student and its teacher;
``crosscut::rest`` and ``crosscut::rest_backward`` of a student whose teacher is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosscut.backends import choose, choose_for_distillation
from crosscut.backends.blocks.distillation import compute_rest, compute_rest_gradients
from crosscut.backends.protocol import (
    DistillationProblem,
    DivergenceCotangents,
    Divergences,
    HeadProblem,
    Needs,
)
from crosscut.custom_operator import custom_operator
from crosscut.options import HeadOptions


def divergences(problem: DistillationProblem) -> Divergences:
    """The statistics of a student and its teacher, differentiable in the student's inputs."""
    student, teacher = problem.student, problem.teacher
    return Divergences(
        *_divergence(
            student.hidden,
            student.classifier,
            student.bias,
            student.labels,
            teacher.hidden,
            teacher.classifier,
            teacher.bias,
            [_softcap(student), student.options.logit_scale],
            [_softcap(teacher), teacher.options.logit_scale],
            problem.divergence,
            problem.beta,
            problem.temperature,
            student.options.backend,
        )
    )


@custom_operator("crosscut::divergence")
def _divergence(
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor,
    teacher_classifier: Tensor,
    teacher_bias: Tensor | None,
    student_options: list[float],
    teacher_options: list[float],
    divergence: str,
    beta: float,
    temperature: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(
        (hidden, classifier, bias),
        labels,
        (teacher_hidden, teacher_classifier, teacher_bias),
        (student_options, teacher_options),
        (divergence, beta, temperature, backend),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return choose_for_distillation(problem).divergences(problem)


@torch.library.register_fake("crosscut::divergence")
def _(
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor,
    teacher_classifier: Tensor,
    teacher_bias: Tensor | None,
    student_options: list[float],
    teacher_options: list[float],
    divergence: str,
    beta: float,
    temperature: float | None,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    num_tokens = hidden.shape[0]
    hard = 0 if temperature is None else num_tokens
    sizes = (num_tokens, hard, hard, num_tokens, num_tokens, num_tokens)
    return tuple(hidden.new_empty(size, dtype=dtype) for size in sizes)


@custom_operator("crosscut::divergence_backward")
def _divergence_backward(
    d_divergence: Tensor,
    d_hard_lse: Tensor | None,
    d_target_logit: Tensor | None,
    found: list[Tensor],
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor,
    teacher_classifier: Tensor,
    teacher_bias: Tensor | None,
    student_options: list[float],
    teacher_options: list[float],
    divergence: str,
    beta: float,
    temperature: float | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(
        (hidden, classifier, bias),
        labels,
        (teacher_hidden, teacher_classifier, teacher_bias),
        (student_options, teacher_options),
        (divergence, beta, temperature, backend),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = choose_for_distillation(problem).student_gradients(
            problem,
            Divergences(*found),
            DivergenceCotangents(d_divergence, d_hard_lse, d_target_logit),
            Needs(*needs),
        )
    d_hidden, d_classifier, d_bias = (
        hidden.new_empty(0) if grad is None else grad for grad in gradients
    )
    return d_hidden, d_classifier, d_bias


@torch.library.register_fake("crosscut::divergence_backward")
def _(
    d_divergence: Tensor,
    d_hard_lse: Tensor | None,
    d_target_logit: Tensor | None,
    found: list[Tensor],
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor,
    teacher_classifier: Tensor,
    teacher_bias: Tensor | None,
    student_options: list[float],
    teacher_options: list[float],
    divergence: str,
    beta: float,
    temperature: float | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return _gradients_like((hidden, classifier, bias), needs)


def _gradients_like(
    inputs: tuple[Tensor, Tensor, Tensor | None], needs: list[bool]
) -> tuple[Tensor, ...]:
    hidden = inputs[0]
    return tuple(
        hidden.new_empty(0) if value is None or not need else value.new_empty(value.shape)
        for value, need in zip(inputs, needs, strict=True)
    )


def _problem(
    student: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor | None],
    options: tuple[list[float], list[float]],
    asked: tuple[str, float, float | None, str],
) -> DistillationProblem:
    divergence, beta, temperature, backend = asked
    (softcap, scale), (teacher_softcap, teacher_scale) = options
    return DistillationProblem(
        student=_head(student, labels, softcap or None, scale, backend),
        teacher=_head(teacher, labels, teacher_softcap or None, teacher_scale, backend),
        divergence=divergence,
        beta=beta,
        temperature=temperature,
    )


def _head(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    backend: str = "blocks",
) -> HeadProblem:
    hidden, classifier, bias = tensors
    return HeadProblem(
        hidden=hidden,
        classifier=classifier,
        bias=bias,
        labels=labels,
        logit_weight=None,
        options=HeadOptions(softcap=softcap, logit_scale=logit_scale, backend=backend),
    )


def _softcap(problem: HeadProblem) -> float:
    """0 for none: a list in a schema holds no None."""
    return problem.options.softcap or 0.0


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.options = inputs[7:]
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_divergence, d_hard_lse, d_target_logit, *_) -> tuple[Tensor | None, ...]:
    tensors, found = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
    needs = list(ctx.needs_input_grad[:3])
    d_divergence = torch.zeros_like(found[0]) if d_divergence is None else d_divergence
    hard = (None, None)
    *_options, temperature, _backend = ctx.options
    if temperature is not None:
        hard = tuple(
            torch.zeros_like(found[1]) if grad is None else grad
            for grad in (d_hard_lse, d_target_logit)
        )
    arguments: Any = (d_divergence, *hard, found, *tensors, *ctx.options, needs)
    gradients = _divergence_backward(*arguments)
    wanted = [grad if need else None for grad, need in zip(gradients, needs, strict=True)]
    return (*wanted, *[None] * 10)


def _no_double_backward(ctx, *_) -> None:
    raise RuntimeError(
        "crosscut has no double backward: the gradients of linear_kl_div and linear_topk_kl_div "
        "cannot be differentiated again (create_graph=True)"
    )


torch.library.register_autograd("crosscut::divergence", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("crosscut::divergence_backward", _no_double_backward)


class Rest(NamedTuple):
    """What all classes come to that are no label of a token, and its labels alone."""

    lse: Tensor  # [N], of the logits of the former; 0 at rows that take no part
    target_logit: Tensor  # [N, K]


def rest(problem: HeadProblem) -> Rest:
    """Both, for labels [N, K], differentiable in hidden, classifier and bias.

    Raises:
        ValueError: ``problem.options.backend`` names another than the one that has it.
    """
    options = problem.options
    if options.backend not in ("auto", "blocks"):
        raise ValueError(
            f"backend={options.backend!r} cannot serve this call: {options.backend}: "
            "has no kernel for tail=True"
        )
    choose(replace(problem, options=replace(options, backend="blocks")))  # or raise
    lse, target_logit, _ = _rest(
        problem.hidden,
        problem.classifier,
        problem.bias,
        problem.labels,
        options.softcap,
        options.logit_scale,
    )
    return Rest(lse, target_logit)


@custom_operator("crosscut::rest")
def _rest(
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _head((hidden, classifier, bias), labels, softcap, logit_scale)
    with torch.autocast(hidden.device.type, enabled=False):
        return compute_rest(problem)


@torch.library.register_fake("crosscut::rest")
def _(
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    lse = hidden.new_empty(hidden.shape[0], dtype=dtype)
    return lse, hidden.new_empty(labels.shape, dtype=dtype), torch.empty_like(lse)


@custom_operator("crosscut::rest_backward")
def _rest_backward(
    d_lse: Tensor,
    d_target_logit: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _head((hidden, classifier, bias), labels, softcap, logit_scale)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = compute_rest_gradients(
            problem, (lse, lse_low), (d_lse, d_target_logit), Needs(*needs)
        )
    d_hidden, d_classifier, d_bias = (
        hidden.new_empty(0) if grad is None else grad for grad in gradients
    )
    return d_hidden, d_classifier, d_bias


@torch.library.register_fake("crosscut::rest_backward")
def _(
    d_lse: Tensor,
    d_target_logit: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return _gradients_like((hidden, classifier, bias), needs)


def _save_rest(ctx, inputs, output) -> None:
    *tensors, ctx.softcap, ctx.logit_scale = inputs
    lse, _, lse_low = output
    ctx.save_for_backward(*tensors, lse, lse_low)
    ctx.mark_non_differentiable(lse_low)


def _backward_of_rest(ctx, d_lse: Tensor, d_target_logit: Tensor, _) -> tuple[Tensor | None, ...]:
    *tensors, lse, lse_low = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    options: Any = (ctx.softcap, ctx.logit_scale, needs)
    gradients = _rest_backward(d_lse, d_target_logit, lse, lse_low, *tensors, *options)
    wanted = [grad if need else None for grad, need in zip(gradients, needs, strict=True)]
    return (*wanted, None, None, None)


torch.library.register_autograd("crosscut::rest", _backward_of_rest, setup_context=_save_rest)
torch.library.register_autograd("crosscut::rest_backward", _no_double_backward)
