"""PyTorch itself as a contender: the same values from full logits, in the problem's own dtypes.

It breaks no limit, or the limits are wrong.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from support import reference
from torch import Tensor

from fuzz.dense import policy_loss
from fuzz.problem import HEADS, LOSS_CALLS, Problem
from fuzz.rounding import Arithmetic


def value(problem: Problem, given: dict[str, Tensor]) -> Tensor:
    """What :meth:`Problem.statements` computes, from tensors [B, T, ...]."""
    if problem.autocast:
        given = {k: v.to(problem.autocast) if k in HEADS else v for k, v in given.items()}
    option = problem.option
    kept = problem.kept
    hidden = torch.where(kept[..., None], given["input"], 0)
    head = {"softcap": option("softcap"), "logit_scale": option("logit_scale", 1.0)}
    weight, bias = given["linear_weight"], given.get("linear_bias")
    losses = ("linear_cross_entropy", "LinearCrossEntropy", "defer_logits")
    if problem.program in losses and not option("gathered"):
        return _cross_entropy(problem, given | {"input": hidden})
    z = reference.logits(hidden, weight, bias, **head)
    if problem.program == "linear_kl_div":
        return _kl_div(problem, given, z)
    z = z / option("temperature", 1.0)
    target = problem.target
    assert target is not None
    log_p = z.log_softmax(-1)
    if problem.program == "linear_topk_kl_div":
        return _topk_kl_div(problem, given, log_p)
    counted = problem.value_kept
    log_prob = _at_targets(problem, log_p)
    if problem.program == "token_statistics":
        found = [_shifted(problem, z.logsumexp(-1)), _at_targets(problem, z), log_prob]
        if option("entropy"):
            possible = log_p > -math.inf
            safe = torch.where(possible, log_p, 0)
            found.append(_shifted(problem, -torch.where(possible, safe.exp() * safe, 0).sum(-1)))
        return torch.stack([torch.where(counted, x, 0) for x in found])
    log_prob = torch.where(counted, log_prob, 0)
    if problem.program not in LOSS_CALLS:
        return log_prob
    return policy_loss(problem.program.removeprefix("losses."), log_prob, given, _AsItIs())


def ranks(problem: Problem, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Predicted class and rank of the target, equal logits sorted by index."""
    option, kept = problem.option, problem.value_kept
    z = reference.logits(
        given["input"], given["linear_weight"], given.get("linear_bias"),
        softcap=option("softcap"), logit_scale=option("logit_scale", 1.0),
    )  # fmt: skip
    z = _shifted(problem, z / option("temperature", 1.0))
    target = torch.where(kept, given["target"], 0).long()[..., None]
    own, index = z.gather(-1, target), torch.arange(z.shape[-1])
    rank = ((z > own) | ((z == own) & (index < target))).sum(-1)
    first = torch.where(z == z.amax(-1, keepdim=True), index, z.shape[-1]).amin(-1)
    return {
        "argmax": torch.where(kept, first, -1),
        "target_rank": torch.where(kept, rank, z.shape[-1]),
    }


class _AsItIs(Arithmetic):
    """Arithmetic as PyTorch does it."""

    def __init__(self) -> None:
        pass

    def wide(self, values: Tensor) -> Tensor:
        return values

    def exp(self, values: Tensor) -> Tensor:
        return values.exp()

    def sigmoid(self, values: Tensor) -> Tensor:
        return values.sigmoid()

    def sum(self, values: Tensor, axis: int = -1) -> Tensor:
        return values.sum(axis)


def _shifted(problem: Problem, values: Tensor) -> Tensor:
    """[B, T, ...], what is said of a target where it stands."""
    shift = min(problem.option("shift", 0), values.shape[1])
    rest = (0, 0) * (values.dim() - 2)
    return F.pad(values[:, : values.shape[1] - shift], (*rest, shift, 0))


def _at_targets(problem: Problem, values: Tensor) -> Tensor:
    """[B, T, V] at the targets; 0 where they are ignored."""
    target = problem.target
    assert target is not None
    several = target if target.dim() == 3 else target[..., None]
    counted = several != problem.option("ignore_index", -100)
    index = torch.where(counted, several, 0).long()
    found = torch.where(counted, _shifted(problem, values).gather(-1, index), 0)
    return found if target.dim() == 3 else found[..., 0]


def _cross_entropy(problem: Problem, given: dict[str, Tensor]) -> Tensor:
    options = dict(problem.options)
    for name in ("policy", "normalizer"):
        options.pop(name, None)
    reduction = options.pop("reduction", "mean")
    token_weight = given.get("token_weight")

    def losses(reduction: str) -> Tensor:
        return reference.linear_cross_entropy(
            given["input"], given["linear_weight"], given["target"],
            linear_bias=given.get("linear_bias"), weight=given.get("weight"),
            reduction=reduction, **options,
        )  # fmt: skip

    if token_weight is None and "normalizer" not in problem.options:
        return losses(reduction)
    share = problem.value_kept.to(torch.promote_types(problem.low, torch.float32))
    loss = losses("none")
    if "weight" in given:
        index = torch.where(problem.value_kept, given["target"], 0).long()
        share = share * given["weight"].to(share)[index]
    if token_weight is not None:
        token_weight = torch.where(problem.value_kept, token_weight, 0).to(share)
        loss, share = loss * token_weight, share * token_weight
    return _reduced(problem, loss, share.sum())


def _reduced(problem: Problem, loss: Tensor, share: Tensor) -> Tensor:
    reduction = problem.option("reduction", "mean")
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / problem.option("normalizer", share)


def _kl_div(problem: Problem, given: dict[str, Tensor], z: Tensor) -> Tensor:
    option = problem.option
    hidden = torch.where(problem.kept[..., None], given["teacher_input"], 0)
    t = reference.logits(
        hidden, given["teacher_weight"], given.get("teacher_bias"),
        softcap=option("teacher_softcap"), logit_scale=option("teacher_logit_scale", 1.0),
    )  # fmt: skip
    temperature, beta = option("temperature", 1.0), option("beta", 0.5)
    log_p = (z / temperature).log_softmax(-1)
    log_q = (t / temperature).log_softmax(-1).to(log_p)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        possible = of > -math.inf
        of, to = torch.where(possible, of, 0), torch.where(possible, to, 0)
        return torch.where(possible, of.exp() * (of - to), 0).sum(-1)

    kind = option("divergence", "forward")
    if kind == "forward":
        loss = kl(log_q, log_p)
    elif kind == "reverse":
        loss = kl(log_p, log_q)
    else:
        log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        loss = beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    loss = _shifted(problem, loss)
    if option("hard_weight"):
        hard = -_at_targets(problem, z.log_softmax(-1))
        loss = (1 - option("hard_weight")) * loss + option("hard_weight") * hard
    counted = problem.value_kept
    loss, share = torch.where(counted, loss, 0), counted.to(loss)
    if "token_weight" in given:
        token_weight = torch.where(counted, given["token_weight"], 0).to(share)
        loss, share = loss * token_weight, share * token_weight
    return _reduced(problem, loss, share.sum())


def _topk_kl_div(problem: Problem, given: dict[str, Tensor], log_p: Tensor) -> Tensor:
    index = given["teacher_index"]
    counted = index != problem.option("ignore_index", -100)
    q = torch.where(counted, given["teacher_prob"], 0).to(log_p)
    at = _at_targets(problem, log_p)
    loss = (torch.xlogy(q, q) - torch.where(q > 0, q * at, 0)).sum(-1)
    if not problem.option("tail"):
        return loss
    named = F.one_hot(torch.where(counted, index, 0).long(), log_p.shape[-1])
    named = (named * counted[..., None]).sum(-2) > 0
    left = log_p.masked_fill(named, -math.inf).logsumexp(-1)
    rest = (1 - q.sum(-1)).clamp_min(0)
    loss = loss + torch.xlogy(rest, rest) - rest * left
    return torch.where(counted.any(-1), loss, 0)
