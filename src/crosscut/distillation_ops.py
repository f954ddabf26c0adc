"""What distillation needs of heads, as PyTorch custom operators.

``crosscut::divergence`` of a student and its teacher; ``crosscut::rest`` of a student whose teacher
is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from crosscut.backends import choose, choose_for_distillation
from crosscut.backends.blocks.distillation import compute_rest, compute_rest_gradients
from crosscut.backends.protocol import (
    DistillationProblem,
    DivergenceCotangents,
    Divergences,
    Gradients,
    HeadProblem,
    Needs,
)
from crosscut.custom_operator import DifferentiableOperator


def _divergences(problem: DistillationProblem) -> Divergences:
    return choose_for_distillation(problem).divergences(problem)


def _divergences_like(problem: DistillationProblem) -> Divergences:
    per_token = problem.student.labels.shape
    hard = 0 if problem.temperature is None else per_token
    shapes = (per_token, hard, hard, per_token, per_token, (2, *per_token), per_token)
    dtype = problem.student.statistics_dtype
    new = problem.student.hidden.new_empty
    return Divergences(*(new(shape, dtype=dtype) for shape in shapes))


def _student_gradients(
    problem: DistillationProblem,
    found: Divergences,
    cotangents: DivergenceCotangents,
    needs: Needs,
) -> Gradients:
    d_divergence, d_hard_loss = _zeros_for_none(cotangents, found)
    hard = None if problem.temperature is None else d_hard_loss
    given = DivergenceCotangents(d_divergence, hard)
    return choose_for_distillation(problem).student_gradients(problem, found, given, needs)


divergences = DifferentiableOperator(
    "crosscut::divergence",
    DistillationProblem,
    Divergences,
    DivergenceCotangents,
    forward=_divergences,
    like=_divergences_like,
    backward=_student_gradients,
    whose="linear_kl_div and linear_topk_kl_div",
)
"""The statistics of a student and its teacher, differentiable in the student's inputs."""


class Rest(NamedTuple):
    """What all classes come to that are no label of a token, and its labels alone.

    Less the highest logit of the token's labels, so that differences keep their digits; 0 at rows
    that are not valid.
    """

    lse: Tensor  # [N], of the logits of the former
    target_logit: Tensor  # [N, K]
    whole_lse: Tensor  # [2, N], lse itself, and what it lost where it was rounded: for the backward


class RestCotangents(NamedTuple):
    """Gradients of both; None: it has none."""

    lse: Tensor | None
    target_logit: Tensor | None


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
    problem = replace(problem, options=replace(options, backend="blocks"))
    choose(problem)  # or raise
    return _rest(problem)


def _rest_like(problem: HeadProblem) -> Rest:
    labels, dtype = problem.labels, problem.statistics_dtype
    shapes = labels.shape[:1], labels.shape, (2, len(labels))
    return Rest(*(problem.hidden.new_empty(shape, dtype=dtype) for shape in shapes))


def _rest_gradients(
    problem: HeadProblem, found: Rest, cotangents: RestCotangents, needs: Needs
) -> Gradients:
    d_lse, d_target_logit = _zeros_for_none(cotangents, found)
    return compute_rest_gradients(problem, found.whole_lse, (d_lse, d_target_logit), needs)


_rest = DifferentiableOperator(
    "crosscut::rest",
    HeadProblem,
    Rest,
    RestCotangents,
    forward=lambda problem: Rest(*compute_rest(problem)),
    like=_rest_like,
    backward=_rest_gradients,
    whose="linear_kl_div and linear_topk_kl_div",
)


def _zeros_for_none(cotangents: Iterable[Tensor | None], found: Iterable[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(value) if grad is None else grad
        for grad, value in zip(cotangents, found, strict=False)
    ]
