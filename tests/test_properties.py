"""What must hold for any head: symmetries, additivity, determinism."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.judging import Head, error, make_head, outcome, pairs
from torch import Tensor

import crosscut

EXACT = 1e-12
"""Relative rounding error of sums in float64, generously."""

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
POLICIES = st.sampled_from(["auto", "filtered", "exact"])


@st.composite
def heads(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES) -> Head:
    """Small heads; half of them with so negative a bias on some classes that columns drop out."""
    num_classes = draw(st.integers(1, 300))
    head = make_head(
        (draw(st.integers(1, 40)), draw(st.integers(1, 12)), num_classes),
        draw(dtypes),
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 2**20)),
    )
    if head.linear_bias is not None and draw(st.booleans()):
        head.linear_bias[num_classes // 4 :] -= draw(st.sampled_from([10, 25]))
    return head


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a loss; the reduction is the test's."""
    return {
        "softcap": draw(st.sampled_from([None, 5.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 0.01])),
        "policy": draw(POLICIES),
    }


FLOAT64 = heads(st.just(torch.float64))


def exact(options: dict[str, Any]) -> dict[str, Any]:
    """The same options with the exact gradient."""
    return options | {"policy": "exact"}


def permutation(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


@given(FLOAT64, options(), st.integers(0, 99))
def test_permuting_tokens_permutes_their_losses(head, options, seed):
    order = permutation(len(head.target), seed)
    permuted = replace(head, input=head.input[order], target=head.target[order])
    one = outcome(crosscut.linear_cross_entropy, head, reduction="sum", **options)
    other = outcome(crosscut.linear_cross_entropy, permuted, reduction="sum", **options)
    assert error(other.loss, one.loss) < EXACT
    assert error(other.d_input, one.d_input[order]) < EXACT
    assert error(other.d_weight, one.d_weight) < EXACT


@given(FLOAT64, options(), st.integers(0, 99))
def test_permuting_the_vocabulary_permutes_its_gradient(head, options, seed):
    order = permutation(len(head.linear_weight), seed)
    target = torch.where(head.target == -100, -100, order.argsort()[head.target.clamp_min(0)])
    bias = None if head.linear_bias is None else head.linear_bias[order]
    permuted = Head(head.input, head.linear_weight[order], target, bias)
    one = outcome(crosscut.linear_cross_entropy, head, reduction="none", **exact(options))
    other = outcome(crosscut.linear_cross_entropy, permuted, reduction="none", **exact(options))
    assert error(other.loss, one.loss) < EXACT
    assert error(other.d_input, one.d_input) < EXACT
    assert error(other.d_weight, one.d_weight[order]) < EXACT
    if one.d_bias is not None and other.d_bias is not None:
        assert error(other.d_bias, one.d_bias[order]) < EXACT


@given(FLOAT64, options(), st.floats(0, 1))
def test_splitting_a_batch_adds_under_sum(head, options, where):
    middle = round(where * len(head.target))
    parts = [
        outcome(
            crosscut.linear_cross_entropy,
            replace(head, input=head.input[part], target=head.target[part]),
            reduction="sum",
            **exact(options),
        )
        for part in (slice(0, middle), slice(middle, None))
    ]
    whole = outcome(crosscut.linear_cross_entropy, head, reduction="sum", **exact(options))
    assert (parts[0].loss + parts[1].loss - whole.loss).abs() < EXACT * (1 + whole.loss.abs())
    assert error(torch.cat([part.d_input for part in parts]), whole.d_input) < EXACT
    assert error(parts[0].d_weight + parts[1].d_weight, whole.d_weight) < EXACT


@given(heads(), options(), st.sampled_from(["mean", "sum", "none"]))
def test_ignored_rows_are_zero_and_unseen(head, options, reduction):
    ignored = torch.zeros(len(head.target), dtype=torch.bool)
    ignored[::2] = True
    target = torch.where(ignored, -100, head.target)
    noisy = head.input.clone()
    noisy[ignored] = 1e4
    one, other = (
        outcome(
            crosscut.linear_cross_entropy,
            replace(head, input=hidden, target=target),
            reduction=reduction,
            **options,
        )
        for hidden in (head.input, noisy)
    )
    assert (one.d_input[ignored] == 0).all()
    if reduction == "none":
        assert (one.loss[ignored] == 0).all()
    for _, value, same in pairs(one, other):
        assert torch.equal(value.nan_to_num(), same.nan_to_num())


@given(FLOAT64, st.floats(-30, 30), POLICIES)
def test_a_constant_on_all_logits_moves_lse_and_target_alone(head, constant, policy):
    zero = head.linear_weight.new_zeros(len(head.linear_weight))
    bias = zero if head.linear_bias is None else head.linear_bias
    kept = head.target != -100

    def statistics(bias: Tensor) -> crosscut.TokenStatistics:
        return crosscut.token_statistics(
            head.input, head.linear_weight, head.target, linear_bias=bias, policy=policy
        )

    one, other = statistics(bias), statistics(bias + constant)
    assert ((other.lse - one.lse - constant)[kept].abs() < 1e-10).all()
    assert ((other.target_logit - one.target_logit - constant)[kept].abs() < 1e-10).all()
    assert ((other.log_prob - one.log_prob).abs() < 1e-10).all()
    gradients = [
        outcome(crosscut.linear_cross_entropy, replace(head, linear_bias=b), reduction="sum")
        for b in (bias, bias + constant)
    ]
    for _, a, b in pairs(*gradients):
        assert (a - b).norm() <= 1e-9 * (1 + a.norm())


@given(heads(), options(), st.sampled_from(["mean", "sum", "none"]))
def test_same_call_same_bits(head, options, reduction):
    one, other = (
        outcome(crosscut.linear_cross_entropy, head, reduction=reduction, **options)
        for _ in range(2)
    )
    for _, a, b in pairs(one, other):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@given(heads(), POLICIES)
def test_loss_is_not_negative(head, policy):
    """Up to the rounding of lse and target logit, which may agree to the last bit."""
    found = outcome(crosscut.linear_cross_entropy, head, reduction="none", policy=policy)
    lse = crosscut.token_statistics(
        head.input, head.linear_weight, head.target, linear_bias=head.linear_bias
    ).lse
    slack = 4 * torch.finfo(head.input.dtype).eps * (1 + lse.abs())
    assert (found.loss >= -slack).all()


@given(FLOAT64, options())
def test_gradient_of_the_logits_sums_to_zero(head, options):
    """A constant on all logits does not change the loss, without z-loss and softcap."""
    options = options | {"z_loss": 0.0, "softcap": None}
    bias = head.linear_weight.new_zeros(len(head.linear_weight))
    head = head if head.linear_bias is not None else replace(head, linear_bias=bias)
    found = outcome(crosscut.linear_cross_entropy, head, reduction="none", **options)
    assert found.d_bias is not None
    assert found.d_bias.sum().abs() < 1e-10 * (1 + len(head.target))


@given(FLOAT64, st.sampled_from([0.0, 0.1]))
def test_statistics_do_not_depend_on_the_policy(head, smoothing):
    losses = [
        outcome(
            crosscut.linear_cross_entropy,
            head,
            reduction="none",
            policy=policy,
            label_smoothing=smoothing,
        ).loss
        for policy in ("auto", "filtered", "exact", "cce", "cce_kahan")
    ]
    for loss in losses[1:]:
        assert error(loss, losses[0]) < EXACT
