"""The head's statistics as PyTorch custom operators: schema, shapes for tracing, autograd.

Two operators, ``crosscut::token_statistics`` and ``crosscut::token_statistics_backward``. Options
travel as records everywhere else; only here are they flattened to what a schema can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscut.backends import choose
from crosscut.backends.protocol import (
    DIFFERENTIABLE,
    Cotangents,
    HeadProblem,
    Needs,
    Statistics,
)
from crosscut.custom_operator import custom_operator
from crosscut.options import HeadOptions


def token_statistics(problem: HeadProblem, *, for_backward: bool) -> Statistics:
    """The statistics of a head's softmax, differentiable in hidden, classifier and bias."""
    options = problem.options
    return Statistics(
        *_token_statistics(
            problem.hidden,
            problem.classifier,
            problem.bias,
            problem.labels,
            problem.logit_weight,
            options.softcap,
            options.logit_scale,
            options.policy,
            options.backend,
            problem.entropy,
            problem.ranks,
            for_backward,
        )
    )


@custom_operator("crosscut::token_statistics")
def _token_statistics(
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    policy: str,
    backend: str,
    entropy: bool,
    ranks: bool,
    for_backward: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # as Statistics
    tensors = (hidden, classifier, bias, labels, logit_weight)
    problem = _problem(tensors, softcap, logit_scale, policy, backend, entropy, ranks)
    with torch.autocast(hidden.device.type, enabled=False):
        return choose(problem).forward(problem, for_backward=for_backward)


@torch.library.register_fake("crosscut::token_statistics")
def _(
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    policy: str,
    backend: str,
    entropy: bool,
    ranks: bool,
    for_backward: bool,
) -> tuple[Tensor, ...]:
    tensors = (hidden, classifier, bias, labels, logit_weight)
    problem = _problem(tensors, softcap, logit_scale, policy, backend, entropy, ranks)
    return choose(problem).forward_like(problem, for_backward=for_backward)


@custom_operator("crosscut::token_statistics_backward")
def _token_statistics_backward(
    d_lse: Tensor | None,
    d_target_logit: Tensor | None,
    d_log_prob: Tensor | None,
    d_logit_sum: Tensor | None,
    d_entropy: Tensor | None,
    statistics: list[Tensor],
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    policy: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (hidden, classifier, bias, labels, logit_weight)
    found = Statistics(*statistics)
    made = len(found.entropy) > 0, len(found.argmax) > 0  # the same problem, the same backend
    problem = _problem(tensors, softcap, logit_scale, policy, backend, *made)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = choose(problem).backward(
            problem,
            found,
            Cotangents(d_lse, d_target_logit, d_log_prob, d_logit_sum, d_entropy),
            Needs(*needs),
        )
    d_hidden, d_classifier, d_bias = (
        hidden.new_empty(0) if grad is None else grad for grad in gradients
    )
    return d_hidden, d_classifier, d_bias


@torch.library.register_fake("crosscut::token_statistics_backward")
def _(
    d_lse: Tensor | None,
    d_target_logit: Tensor | None,
    d_log_prob: Tensor | None,
    d_logit_sum: Tensor | None,
    d_entropy: Tensor | None,
    statistics: list[Tensor],
    hidden: Tensor,
    classifier: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_weight: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    policy: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    wanted = zip((hidden, classifier, bias), needs, strict=True)
    return tuple(
        hidden.new_empty(0) if value is None or not need else value.new_empty(value.shape)
        for value, need in wanted
    )


def _problem(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    softcap: float | None,
    logit_scale: float,
    policy: str,
    backend: str,
    entropy: bool,
    ranks: bool,
) -> HeadProblem:
    hidden, classifier, bias, labels, logit_weight = tensors
    options = HeadOptions(
        softcap=softcap,
        logit_scale=logit_scale,
        policy=policy,  # pyright: ignore[reportArgumentType]
        backend=backend,
    )
    return HeadProblem(
        hidden=hidden,
        classifier=classifier,
        bias=bias,
        labels=labels,
        logit_weight=logit_weight,
        options=options,
        entropy=entropy,
        ranks=ranks,
    )


def _save_for_backward(ctx, inputs, output) -> None:
    hidden, classifier, bias, labels, logit_weight, *options, ctx.entropy, _, _ = inputs
    ctx.options = options
    ctx.save_for_backward(hidden, classifier, bias, labels, logit_weight, *output)
    ctx.mark_non_differentiable(*output[DIFFERENTIABLE:])
    ctx.set_materialize_grads(False)


def _backward(ctx, *cotangents) -> tuple[Tensor | None, ...]:
    hidden, classifier, bias, labels, logit_weight, *statistics = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    given = Cotangents(*cotangents[:DIFFERENTIABLE])
    if logit_weight is None:
        given = given._replace(logit_sum=None)
    if not ctx.entropy:
        given = given._replace(entropy=None)
    inputs = (hidden, classifier, bias, labels, logit_weight)
    arguments = (*given, statistics, *inputs, *ctx.options, needs)
    gradients = _token_statistics_backward(*arguments)  # pyright: ignore[reportCallIssue]
    wanted = [grad if need else None for grad, need in zip(gradients, needs, strict=True)]
    return (*wanted, *[None] * 9)


def _no_double_backward(ctx, *_) -> None:
    raise RuntimeError(
        "crosscut has no double backward: the gradients of token_statistics and "
        "linear_cross_entropy cannot be differentiated again (create_graph=True)"
    )


torch.library.register_autograd(
    "crosscut::token_statistics", _backward, setup_context=_save_for_backward
)
torch.library.register_autograd("crosscut::token_statistics_backward", _no_double_backward)
