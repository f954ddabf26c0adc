"""Every backend computes the same loss and the same gradients, as accurately as PyTorch does.

A new backend runs this suite by being listed in ``crosscut.backends.NAMES``. The column filter's
own properties are in ``test_filter``; here no column is rare enough to be dropped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import reference
from support.heads import skip_if_not_served
from support.judging import (
    Head,
    assert_as_accurate_as_pytorch,
    cotangents,
    error,
    outcome,
    rounding,
    truth,
)
from support.judging import judge as judge_any
from torch import Tensor

import crosscut
from crosscut.options import POLICIES

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PAPER_POLICIES = [policy for policy in POLICIES if policy.startswith("cce")]

# (N or batch shape, D, V). A block is 1024 tokens x 4096 classes.
SMALL_SHAPES = [
    (1, 1, 1),
    (6, 7, 2),
    (5, 3, 1),
    (1, 16, 4097),
    (17, 33, 257),
    ((3, 0, 2), 4, 5),
    ((2, 3, 5), 8, 131),
    ((), 9, 31),
]
LARGE_SHAPES = [(130, 5, 8195), (1025, 31, 4099), (3000, 2, 7)]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "label_smoothing": {"label_smoothing": 0.1},
    "label_smoothing=1": {"label_smoothing": 1.0},
    "weight": {"weight": True},
    "weight, smoothing": {"weight": True, "label_smoothing": 0.2},
    "softcap": {"softcap": 3.0},
    "softcap, smoothing": {"softcap": 3.0, "label_smoothing": 0.3},
    "logit_scale": {"logit_scale": 0.25},
    "negative logit_scale": {"logit_scale": -1.5, "softcap": 5.0},
    "logit_scale=0": {"logit_scale": 0.0},
    "shift=1": {"shift": 1},
    "shift=2, none": {"shift": 2, "reduction": "none"},
    "z_loss": {"z_loss": 1e-2},
    "everything": {
        "weight": True,
        "label_smoothing": 0.1,
        "softcap": 4.0,
        "logit_scale": 0.7,
        "shift": 1,
        "z_loss": 1e-2,
        "reduction": "none",
    },
}


BIASED = [
    OPTIONS[name]
    for name in ("label_smoothing", "softcap", "softcap, smoothing", "logit_scale=0", "everything")
]
BARE = [OPTIONS[name] for name in ("plain", "negative logit_scale")]
"""What differs on a device, some of it with a bias; the rest is arithmetic on tokens, the same for
every backend."""


def shape_differs(dtype: torch.dtype, shape: Any, policy: str) -> bool:
    """Of a single class, token or program there is more in ``test_confident_tokens``."""
    edges = [(1, 1, 1), (6, 7, 2), (1, 16, 4097), (17, 33, 257), ((3, 0, 2), 4, 5)]
    if (dtype, policy) == (torch.float32, "auto"):
        return shape == (17, 33, 257)
    return (dtype, policy) == (torch.bfloat16, "auto") and shape in edges


def options_differ(dtype: torch.dtype, given: Any, options: Any, policy: str) -> bool:
    """All in bfloat16; of other dtypes and policies whose kernels differ, the least or the most."""
    if (dtype, policy) == (torch.bfloat16, "auto"):
        return options in (BIASED if "bias" in given else BARE)
    most = "bias" in given and options == OPTIONS["everything"]
    if (dtype, policy) in ((torch.float32, "auto"), (torch.bfloat16, "exact")):
        return most or ("bias" not in given and options == OPTIONS["plain"])
    return (dtype, policy) in ((torch.float16, "auto"), (torch.bfloat16, "filtered")) and most


def paper_options_differ(options: Any, policy: str) -> bool:
    if policy == "cce_kahan":
        return options in [OPTIONS["softcap, smoothing"], OPTIONS["everything"]]
    return options == OPTIONS["plain"]


def judge(backend: str, head: Head, *, factor: float = 2.0, **options: Any) -> None:
    """Compare with PyTorch, if the backend serves such a call at all."""
    if options.get("weight"):
        options["weight"] = head.class_weight
    policy = options.get("policy", "auto")
    skip_if_not_served(backend, head, policy)
    if (backend, policy, head.input.dtype) == ("triton", "filtered", torch.float16):
        pytest.skip("a filter at bfloat16 grade, not at that of float16")
    options |= {"backend": backend}
    assert_as_accurate_as_pytorch(head, factor=factor, **options)


def head_of(input: Tensor, weight: Tensor, target: Tensor, dtype: torch.dtype, device: str) -> Head:
    """A head from its parts."""
    return Head(input.to(device, dtype), weight.to(device, dtype).contiguous(), target.to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestLoss:
    """``linear_cross_entropy``: loss, dtypes, shapes and all gradients."""

    @pytest.mark.interpreted(when=shape_differs)
    @pytest.mark.parametrize("policy", ["auto", "filtered", "exact"])
    @pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
    def test_small_shapes(self, backend, make, dtype, shape, policy):
        judge(backend, make(shape, dtype), policy=policy, reduction="sum")

    @pytest.mark.parametrize("policy", ["filtered", "exact"])
    @pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
    def test_shapes_across_blocks(self, backend, make, dtype, shape, policy):
        head = make(shape, dtype, bias=True, ignored=0.2)
        judge(backend, head, policy=policy)

    @pytest.mark.interpreted(when=options_differ)
    @pytest.mark.parametrize("policy", ["auto", "filtered", "exact"])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("given", [{"ignored": 0.3}, {"bias": True}], ids="".join)
    def test_options(self, backend, make, dtype, given, options, policy):
        judge(backend, make(((3, 11), 17, 201), dtype, **given), policy=policy, **options)

    @pytest.mark.parametrize("policy", ["filtered", "exact"])
    @pytest.mark.parametrize("options", ["everything", "weight, smoothing", "softcap"])
    def test_options_across_blocks(self, backend, make, dtype, options, policy):
        head = make(((3, 350), 15, 4100), dtype, bias=True, ignored=0.2)
        judge(backend, head, policy=policy, **OPTIONS[options])


@pytest.mark.interpreted(when=lambda softcap: softcap == 3)
@pytest.mark.parametrize("softcap", [None, 3.0, 30.0], ids=str)
def test_smoothing_counts_every_class_once(backend, make, softcap):
    """The loss is float32 for bfloat16 inputs too, and judged as such."""
    head = make((24, 16, 400), torch.bfloat16)
    options = {"label_smoothing": 1.0, "softcap": softcap, "reduction": "none"}
    true = truth(head, **options).loss
    theirs = outcome(reference.linear_cross_entropy, head, **options).loss
    found = outcome(crosscut.linear_cross_entropy, head, backend=backend, **options).loss
    assert error(found, true) <= 2 * error(theirs, true) + rounding(torch.float32)


class TestLabels:
    """Which targets count."""

    @pytest.mark.interpreted(when=lambda dtype: dtype == torch.int32)
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
    def test_integer_dtypes(self, backend, make, dtype):
        head = make((9, 4, 20), ignored=0.3)
        judge(backend, replace(head, target=head.target.to(dtype)), ignore_index=-100)

    @pytest.mark.interpreted(when=lambda ignore_index: ignore_index == 3)
    @pytest.mark.parametrize("ignore_index", [-100, -1, -7, 0, 3, 19, 1000])
    def test_ignore_index(self, backend, make, ignore_index):
        head = make((40, 4, 20))
        target = head.target.clone()
        target[::3] = ignore_index
        judge(backend, replace(head, target=target), ignore_index=ignore_index, reduction="none")

    def test_an_ignored_row_costs_nothing_and_gets_exactly_zero(self, backend, make):
        head = make((40, 4, 20), torch.float32, bias=True, ignored=0.5)
        ignored = head.target == -100
        assert 0 < ignored.sum() < 40
        found = outcome(crosscut.linear_cross_entropy, head, backend=backend, reduction="none")
        assert (found.loss[ignored] == 0).all()
        assert (found.d_input[ignored] == 0).all()
        kept = ~ignored
        alone = replace(head, input=head.input[kept], target=head.target[kept])
        judge(backend, alone, reduction="mean")
        torch.testing.assert_close(
            outcome(crosscut.linear_cross_entropy, head, backend=backend).loss,
            outcome(crosscut.linear_cross_entropy, alone, backend=backend).loss,
        )

    @pytest.mark.interpreted(when=lambda shift: shift == 5)  # no token is left
    @pytest.mark.parametrize("shift", [1, 4, 5, 6])
    def test_shift_up_to_and_past_the_sequence(self, backend, make, shift):
        head = make(((3, 5), 4, 20))
        judge(backend, head, shift=shift, reduction="none")

    @pytest.mark.interpreted(when=lambda: False)  # done before a backend sees it
    def test_shift_equals_slicing(self, backend, make):
        head = make(((3, 50), 4, 20), torch.float32, ignored=0.2)
        sliced = replace(head, input=head.input[:, :-2], target=head.target[:, 2:])
        shifted = outcome(crosscut.linear_cross_entropy, head, shift=2, backend=backend)
        by_hand = outcome(crosscut.linear_cross_entropy, sliced, backend=backend)
        torch.testing.assert_close(shifted.loss, by_hand.loss)
        torch.testing.assert_close(shifted.d_input[:, :-2], by_hand.d_input)
        assert (shifted.d_input[:, -2:] == 0).all()

    def test_all_classes_are_labels(self, backend, make):
        head = make((1500, 6, 1300), torch.float32)
        target = torch.arange(1500, device=head.target.device) % 1300
        judge(backend, replace(head, target=target), policy="filtered")


class TestTokenStatistics:
    """``token_statistics``: lse and target logit, and the gradient of each."""

    @pytest.mark.parametrize("policy", ["filtered", "exact"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "options",
        [{}, {"softcap": 3.0}, {"logit_scale": 0.3, "softcap": 2.0}],
        ids=["plain", "softcap", "scale, softcap"],
    )
    def test_values_and_gradients(self, backend, make, dtype, options, policy):
        head = make(((2, 30), 7, 4111), dtype, bias=True, ignored=0.2)
        skip_if_not_served(backend, head, policy)

        def theirs(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
            z = reference.logits(input, weight, linear_bias, **options)
            at_target = target.clamp_min(0)[..., None]
            lse, logit, log_prob = (
                z.logsumexp(-1),
                z.gather(-1, at_target)[..., 0],
                z.log_softmax(-1).gather(-1, at_target)[..., 0],
            )
            return torch.where(target != -100, torch.stack([lse, logit, log_prob]), 0)

        def ours(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
            found = crosscut.token_statistics(
                input, weight, target, linear_bias=linear_bias,
                policy=policy, backend=backend, **options,
            )  # fmt: skip
            assert (found.log_prob <= 0).all()
            return torch.stack([found.lse, found.target_logit, found.log_prob])

        judge_any(ours, theirs, head)
        assert (outcome(ours, head).loss[:, head.target == -100] == 0).all()

    @pytest.mark.interpreted(when=lambda which: which != "log_prob")  # of all other tests
    @pytest.mark.parametrize("which", ["lse", "target_logit", "log_prob"])
    def test_gradient_of_one_alone(self, backend, make, which):
        head = make((20, 5, 30), bias=True)

        def ours(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
            found = crosscut.token_statistics(
                input, weight, target, linear_bias=linear_bias, backend=backend
            )
            return getattr(found, which)

        def theirs(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
            z = reference.logits(input, weight, linear_bias)
            if which == "lse":
                return z.logsumexp(-1)
            z = z.log_softmax(-1) if which == "log_prob" else z
            return z.gather(-1, target[:, None])[:, 0]

        judge_any(ours, theirs, head)

    @pytest.mark.interpreted(when=lambda: False)  # as any shift
    def test_shift_puts_a_statistic_where_its_target_stands(self, backend, make):
        head = make(((2, 6), 4, 9))
        found = crosscut.token_statistics(
            head.input, head.linear_weight, head.target, shift=2, backend=backend
        )
        z = reference.logits(head.input.double(), head.linear_weight.double())[:, :-2]
        assert error(found.lse[:, 2:], z.logsumexp(-1)) <= rounding(head.input.dtype)
        logit = z.gather(-1, head.target[:, 2:, None])[..., 0]
        assert error(found.target_logit[:, 2:], logit) <= rounding(head.input.dtype)
        assert (found.lse[:, :2] == 0).all()
        assert (found.target_logit[:, :2] == 0).all()


@pytest.mark.parametrize("policy", PAPER_POLICIES)
class TestPaperPolicies:
    """Algorithm 3 of the paper with its tile filter, for comparison and reproduction."""

    @pytest.mark.interpreted(when=paper_options_differ)
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_exact_where_no_tile_is_dead(self, backend, make, options, policy):
        """With few classes every tile has an entry of 2**-12."""
        judge(backend, make(((3, 11), 17, 201), bias=True, ignored=0.3), policy=policy, **options)

    @pytest.mark.interpreted(
        when=lambda dtype, policy: (
            (dtype, policy) in ((torch.bfloat16, "cce"), (torch.float16, "cce_kahan"))
        )
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision(self, backend, make, dtype, policy):
        judge(backend, make((33, 17, 201), dtype, bias=True), policy=policy)

    def test_across_blocks(self, backend, make, policy):
        head = make((1100, 15, 4500), bias=True, ignored=0.2)
        sharp = replace(head, input=4 * head.input)  # of every 128 x 128 a softmax above 2**-12
        judge(backend, sharp, policy=policy, reduction="sum")

    @pytest.mark.interpreted(when=lambda policy: policy in ("cce", "cce_kahan_full_c"))
    def test_tiles_below_epsilon_are_dropped(self, backend, device, widest, policy):
        """With the identity as hidden states, dC is the transpose of the logits' gradient.

        What is dropped is therefore bounded entry by entry, and known tile by tile: 128 tokens by
        128 classes in the order of their mean logits, where no |softmax - onehot| is 2**-12.
        """
        tokens, classes = 300, 1000
        gen = torch.Generator().manual_seed(0)
        ramp = torch.linspace(3, -9, classes, dtype=torch.float64)
        z = torch.randn(tokens, classes, generator=gen, dtype=torch.float64)
        z += ramp[torch.randperm(classes, generator=gen)]
        head = head_of(torch.eye(tokens), z.t(), z.argmax(1), widest, device)
        options = {"reduction": "none"}
        found = outcome(
            crosscut.linear_cross_entropy, head, policy=policy, backend=backend, **options
        )
        theirs = outcome(reference.linear_cross_entropy, head, **options).d_weight.t()
        true = truth(head, **options).d_weight.t()

        difference = true / cotangents(found.loss.double())[:, None]  # softmax - onehot
        alive = torch.zeros(tokens, classes, dtype=torch.bool, device=device)
        order = z.mean(0).argsort(descending=True)
        for some in torch.arange(tokens).split(128):
            for tile in order.split(128):
                alive[some[:, None], tile] = difference[some[:, None], tile].abs().max() >= 2**-12
        assert 0.2 < alive.double().mean() < 0.8
        assert (difference.abs() >= 2**-12)[alive].double().mean() > 0.1
        if policy == "cce_kahan_full_c":
            alive.fill_(True)
        expected, theirs = torch.where(alive, true, 0), torch.where(alive, theirs, 0)
        allowed = 2 * error(theirs, expected) + rounding(widest)
        assert error(found.d_weight.t(), expected) <= allowed
        assert ((found.d_weight.t() == 0) == ~alive).all()

    @pytest.mark.interpreted(when=lambda policy: policy in ("cce", "cce_kahan_full_e"))
    def test_full_e_does_not_filter_the_hidden_gradient(self, backend, device, widest, policy):
        """With the identity as classifier, dH is the gradient of the logits."""
        classes = 512
        gen = torch.Generator().manual_seed(0)
        z = torch.randn(200, classes, generator=gen, dtype=torch.float64)
        z[:, :100] += 14
        head = head_of(z, torch.eye(classes), z.argmax(1), widest, device)
        options = {"reduction": "none"}
        found = outcome(
            crosscut.linear_cross_entropy, head, policy=policy, backend=backend, **options
        )
        theirs = outcome(reference.linear_cross_entropy, head, **options)
        true = truth(head, **options)
        dropped = (found.d_input == 0) & (true.d_input != 0)
        if policy == "cce_kahan_full_e":
            allowed = 2 * error(theirs.d_input, true.d_input) + rounding(widest)
            assert error(found.d_input, true.d_input) <= allowed
        else:
            assert dropped.double().mean() > 0.3
            given = cotangents(found.loss)[:, None]
            assert (found.d_input - true.d_input).div(given).abs().max() < 2**-12

    def test_kahan_accumulates_wider(self, backend, make, policy):
        """In bfloat16 plain cce rounds after every block; the others once."""
        head = make((60, 9, 41_000), torch.bfloat16)
        sharp = replace(head, input=3 * head.input)
        true = truth(sharp, reduction="sum")
        options = {"reduction": "sum", "backend": backend}
        plain, this = (
            outcome(crosscut.linear_cross_entropy, sharp, policy=name, **options)
            for name in ("cce", policy)
        )
        if policy == "cce":
            assert torch.equal(plain.d_input, this.d_input)
        else:
            assert error(this.d_input, true.d_input) < error(plain.d_input, true.d_input)
