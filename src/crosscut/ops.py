"""The head's statistics as a PyTorch custom operator."""

from __future__ import annotations

from dataclasses import dataclass

from crosscut.backends import choose
from crosscut.backends.protocol import Cotangents, Gradients, HeadProblem, Needs, Statistics
from crosscut.custom_operator import DifferentiableOperator


def token_statistics(problem: HeadProblem, *, for_backward: bool) -> Statistics:
    """The statistics of a head's softmax, differentiable in hidden, classifier and bias."""
    return _token_statistics(_Call(for_backward=for_backward, problem=problem))


@dataclass(frozen=True, kw_only=True)
class _Call:
    for_backward: bool
    problem: HeadProblem


def _forward(call: _Call) -> Statistics:
    return choose(call.problem).forward(call.problem, for_backward=call.for_backward)


def _like(call: _Call) -> Statistics:
    return choose(call.problem).forward_like(call.problem, for_backward=call.for_backward)


def _backward(call: _Call, found: Statistics, cotangents: Cotangents, needs: Needs) -> Gradients:
    if len(call.problem.classifier) == 1:  # whose log-probability is 0, whatever its logit
        cotangents = cotangents._replace(logit_sum=None)
    return choose(call.problem).backward(call.problem, found, cotangents, needs)


_token_statistics = DifferentiableOperator(
    "crosscut::token_statistics",
    _Call,
    Statistics,
    Cotangents,
    forward=_forward,
    like=_like,
    backward=_backward,
    whose="token_statistics and linear_cross_entropy",
)
