"""The divergence of a student's head from its teacher's as PyTorch custom operators.

``crosscut::divergence`` and ``crosscut::divergence_backward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscut.backends import choose_for_distillation
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
    wanted = zip((hidden, classifier, bias), needs, strict=True)
    return tuple(
        hidden.new_empty(0) if value is None or not need else value.new_empty(value.shape)
        for value, need in wanted
    )


def _problem(
    student: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor | None],
    options: tuple[list[float], list[float]],
    asked: tuple[str, float, float | None, str],
) -> DistillationProblem:
    divergence, beta, temperature, backend = asked
    heads = []
    for (hidden, classifier, bias), (softcap, logit_scale) in zip(
        (student, teacher), options, strict=True
    ):
        head_options = HeadOptions(
            softcap=softcap or None, logit_scale=logit_scale, backend=backend
        )
        heads.append(
            HeadProblem(
                hidden=hidden,
                classifier=classifier,
                bias=bias,
                labels=labels,
                logit_weight=None,
                options=head_options,
            )
        )
    return DistillationProblem(
        student=heads[0],
        teacher=heads[1],
        divergence=divergence,
        beta=beta,
        temperature=temperature,
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
        "crosscut has no double backward: the gradients of linear_kl_div cannot be differentiated "
        "again (create_graph=True)"
    )


torch.library.register_autograd("crosscut::divergence", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("crosscut::divergence_backward", _no_double_backward)
