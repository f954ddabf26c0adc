"""Preference and policy losses: the formula on full logits, gradients, trl's own functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.judging import Head, judge, make_head
from support.reference import entropy_of, reference_log_probs, tempered
from torch import Tensor

import crosscut
from crosscut import losses

BATCH, LENGTH = 6, 9
"""Sequences: the first half preferred, the other half not."""


def sequences(dtype: torch.dtype = torch.float64) -> Head:
    return make_head(((BATCH, LENGTH), 12, 80), dtype, ignored=0.2)


def constant(head: Head) -> Tensor:
    """The log-probabilities of a head, float64."""
    wide = head.double()
    return reference_log_probs(wide.input, wide.linear_weight, head.target)


def fixed(*shape: int, like: Tensor, seed: int = 5) -> Tensor:
    """What comes from elsewhere: a reference's log-probabilities, advantages."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(like)


# Each loss twice, by crosscut and as its paper writes it, from four [B, T]: the log-probabilities
# and the entropy of a batch, its mask of tokens kept, and constants near the log-probabilities.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def halves(values: Tensor, mask: Tensor, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    total = values.sum(-1) / mask.sum(-1) if mean else values.sum(-1)
    return total[: BATCH // 2], total[BATCH // 2 :]


def references(base: Tensor, mask: Tensor, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    """Of a reference model that is a little off."""
    return halves(base + 0.3 * fixed(BATCH, LENGTH, like=base) * mask, mask, mean=mean)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def dpo(smoothing: float) -> tuple[Loss, Loss]:
    def ours(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        return losses.dpo(
            *halves(log_prob, mask), *references(base, mask), beta=0.3,
            label_smoothing=smoothing,
        )  # fmt: skip

    def theirs(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        (chosen, rejected), (old, older) = halves(log_prob, mask), references(base, mask)
        h = sigmoid(0.3 * ((chosen - old) - (rejected - older)))
        return -(1 - smoothing) * h.log() - smoothing * (1 - h).log()

    return ours, theirs


def ipo() -> tuple[Loss, Loss]:
    def ours(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        return losses.ipo(
            *halves(log_prob, mask, mean=True), *references(base, mask, mean=True), beta=0.2
        )

    def theirs(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        chosen, rejected = halves(log_prob, mask, mean=True)
        old, older = references(base, mask, mean=True)
        return (chosen - rejected - old + older - 1 / (2 * 0.2)) ** 2

    return ours, theirs


def cpo() -> tuple[Loss, Loss]:
    def ours(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        return losses.cpo(*halves(log_prob, mask), beta=0.2, nll_weight=0.7)

    def theirs(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        chosen, rejected = halves(log_prob, mask)
        return -sigmoid(0.2 * chosen - 0.2 * rejected).log() - 0.7 * chosen

    return ours, theirs


def simpo() -> tuple[Loss, Loss]:
    def ours(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        return losses.simpo(*halves(log_prob, mask, mean=True), beta=2.5, gamma=1.4)

    def theirs(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        chosen, rejected = halves(log_prob, mask, mean=True)
        return -sigmoid(2.5 * chosen - 2.5 * rejected - 1.4).log()

    return ours, theirs


def orpo() -> tuple[Loss, Loss]:
    def ours(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        return losses.orpo(*halves(log_prob, mask, mean=True), beta=0.4)

    def theirs(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        chosen, rejected = (x.exp() for x in halves(log_prob, mask, mean=True))
        ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
        return -chosen.log() - 0.4 * sigmoid(ratio.log()).log()

    return ours, theirs


def kto(kl: float) -> tuple[Loss, Loss]:
    desirable = torch.arange(BATCH) % 3 > 0

    def ours(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        reference = torch.cat(references(base, mask))
        return losses.kto(
            log_prob.sum(-1), reference, desirable.to(log_prob.device), kl, beta=0.3,
            desirable_weight=1.3, undesirable_weight=0.6,
        )  # fmt: skip

    def theirs(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        ratio = log_prob.sum(-1) - torch.cat(references(base, mask))
        point = max(kl, 0)
        good, bad = sigmoid(0.3 * (ratio - point)), sigmoid(0.3 * (point - ratio))
        where = desirable.to(log_prob.device)
        return torch.where(where, 1.3 * (1 - good), 0.6 * (1 - bad))

    return ours, theirs


def surrogate(**options: float) -> tuple[Loss, Loss]:
    low, high = options.get("clip_low", 0.2), options.get("clip_high", 0.2)
    kl, bonus = options.get("kl_weight", 0.0), options.get("entropy_weight", 0.0)

    def others(base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        old = base + 0.3 * fixed(BATCH, LENGTH, like=base, seed=6)
        reference = base + 0.5 * fixed(BATCH, LENGTH, like=base, seed=7)
        return old, reference, fixed(BATCH, 1, like=base, seed=8)

    def ours(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        old, reference, advantage = others(base)
        loss = losses.clipped_surrogate(
            log_prob, old, advantage, reference_log_prob=reference, entropy=entropy, **options
        )
        return (loss * mask).sum(-1) / mask.sum(-1)

    def theirs(log_prob: Tensor, entropy: Tensor, mask: Tensor, base: Tensor) -> Tensor:
        old, reference, advantage = others(base)
        ratio = log_prob.exp() / old.exp()
        bounded = torch.where(ratio > 1 + high, 1 + high, ratio)
        bounded = torch.where(ratio < 1 - low, 1 - low, bounded)
        objective = torch.where(
            ratio * advantage < bounded * advantage, ratio * advantage, bounded * advantage
        )
        k3 = reference.exp() / log_prob.exp() - (reference.exp() / log_prob.exp()).log() - 1
        loss = -objective + kl * k3 - bonus * entropy
        return (loss * mask).sum(-1) / mask.sum(-1)

    return ours, theirs


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "dpo": dpo(0.0),
    "dpo, smoothed": dpo(0.15),
    "ipo": ipo(),
    "cpo": cpo(),
    "simpo": simpo(),
    "orpo": orpo(),
    "kto": kto(0.4),
    "kto, negative kl": kto(-0.4),
    "ppo": surrogate(),
    "grpo": surrogate(kl_weight=0.04),
    "everything": surrogate(clip_low=0.1, clip_high=0.3, kl_weight=0.1, entropy_weight=0.02),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("both", LOSSES.values(), ids=LOSSES)
def test_as_on_full_logits(dtype, both):
    """Losses and their gradients in hidden states and head, as near the truth as PyTorch's."""
    our_loss, their_loss = both

    def ours(input: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Tensor:
        found = crosscut.token_statistics(input, weight, target, entropy=True)
        assert found.entropy is not None
        kept = target != -100
        log_prob = found.log_prob
        return our_loss(log_prob, found.entropy, kept.to(log_prob), base.to(log_prob))

    def theirs(input: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Tensor:
        log_prob = reference_log_probs(input, weight, target)
        kept = target != -100
        entropy = torch.where(kept, entropy_of(tempered(input, weight, None)), 0)
        return their_loss(log_prob, entropy, kept.to(log_prob), base.to(log_prob))

    head = sequences(dtype)
    base = constant(head)
    judge(ours, theirs, head)


@pytest.mark.parametrize("both", LOSSES.values(), ids=LOSSES)
def test_gradcheck(both):
    """Through the head."""
    loss, _ = both
    head = sequences()
    base, kept = constant(head), head.target != -100

    def run(hidden: Tensor, classifier: Tensor) -> Tensor:
        found = crosscut.token_statistics(hidden, classifier, head.target, entropy=True)
        assert found.entropy is not None
        return loss(found.log_prob, found.entropy, kept.to(base), base)

    leaves = head.input.requires_grad_(), head.linear_weight.requires_grad_()
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


class TestKnownValues:
    """What needs no formula."""

    def test_no_preference_yet_costs_log_two(self):
        same = -torch.rand(4, dtype=torch.float64) - 1
        zero = torch.full((4,), math.log(2), dtype=torch.float64)
        torch.testing.assert_close(losses.dpo(same, same, same, same), zero)
        torch.testing.assert_close(losses.cpo(same, same, nll_weight=0), zero)
        torch.testing.assert_close(losses.simpo(same, same, gamma=0), zero)
        torch.testing.assert_close(losses.orpo(same, same), -same + 0.1 * zero)

    def test_on_policy_gradient_is_reinforce(self):
        log_prob = (-torch.rand(3, 5, dtype=torch.float64)).requires_grad_()
        advantage = torch.randn(3, 5, dtype=torch.float64)
        losses.clipped_surrogate(log_prob, log_prob.detach(), advantage).sum().backward()
        assert log_prob.grad is not None
        torch.testing.assert_close(log_prob.grad, -advantage)

    def test_beyond_the_clip_there_is_no_gradient(self):
        log_prob = torch.tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()
        advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
        losses.clipped_surrogate(log_prob, torch.zeros(4), advantage).sum().backward()
        assert log_prob.grad is not None
        assert (log_prob.grad[:2] == 0).all()
        assert (log_prob.grad[2:] != 0).all()

    def test_a_ratio_that_overflows(self):
        """No gain is no loss, and beyond the clip there is no gradient; a harm is without bound."""
        log_prob = torch.tensor([0.0, 0.0, 0.0, -90.0]).requires_grad_()
        old = torch.tensor([-200.0, -200.0, -200.0, -10.0])
        advantage = torch.tensor([0.0, 2.0, -1.0, 0.0])
        loss = losses.clipped_surrogate(log_prob, old, advantage, clip_high=0.3)
        assert loss.tolist() == [0, pytest.approx(-2.6), math.inf, 0]
        (grad,) = torch.autograd.grad(loss.sum(), log_prob)
        assert grad.tolist() == [0, 0, math.inf, 0]

    def test_kl_penalty_is_unbiased_and_not_negative(self):
        policy = torch.randn(50, dtype=torch.float64).log_softmax(0)
        reference = torch.randn(50, dtype=torch.float64).log_softmax(0)
        penalty = losses.kl_penalty(policy, reference)
        assert (penalty >= 0).all()
        expected = (policy.exp() * (policy - reference)).sum()
        torch.testing.assert_close((policy.exp() * penalty).sum(), expected)

    def test_extreme_margins_stay_finite(self):
        far = torch.tensor([-2000.0, -1e-6], requires_grad=True)
        near = torch.tensor([-1e-6, -2000.0], requires_grad=True)
        for loss in (
            losses.dpo(far, near, near.detach(), far.detach()),
            losses.cpo(far, near),
            losses.simpo(far, near),
            losses.orpo(far, near),
        ):
            loss.sum().backward()
            assert loss.isfinite().all()
            for leaf in (far, near):
                assert leaf.grad is not None
                assert leaf.grad.isfinite().all()


class TestAgainstTrl:
    """trl's own functions, where it has them as functions."""

    @pytest.fixture
    def pair(self) -> tuple[Tensor, Tensor]:
        return -3 * torch.rand(8) - 0.01, -3 * torch.rand(8) - 0.01

    @staticmethod
    def trainer(name: str) -> Any:
        module = pytest.importorskip(f"trl.experimental.{name}", exc_type=ImportError)
        return getattr(module, f"{name.upper()}Trainer")

    def settings(self, **options: Any) -> Any:
        return SimpleNamespace(
            **({"alpha": 0.0, "label_smoothing": 0.0} | options),
            accelerator=SimpleNamespace(device="cpu"),
        )

    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_cpo(self, pair, smoothing):
        settings = self.settings(beta=0.3, loss_type="sigmoid", label_smoothing=smoothing)
        theirs, *_ = self.trainer("cpo").cpo_loss(settings, *pair)
        ours = losses.cpo(*pair, beta=0.3, label_smoothing=smoothing, nll_weight=0)
        torch.testing.assert_close(ours, theirs)

    def test_simpo(self, pair):
        settings = self.settings(beta=2.0, loss_type="simpo", simpo_gamma=0.5)
        theirs, *_ = self.trainer("cpo").cpo_loss(settings, *pair)
        torch.testing.assert_close(losses.simpo(*pair, beta=2.0, gamma=0.5), theirs)

    def test_ipo(self, pair):
        """Without a reference, as trl has it beside CPO."""
        settings = self.settings(beta=0.3, loss_type="ipo")
        theirs, *_ = self.trainer("cpo").cpo_loss(settings, *pair)
        zeros = torch.zeros(8)
        torch.testing.assert_close(losses.ipo(pair[0], pair[1], zeros, zeros, beta=0.3), theirs)

    def test_orpo(self, pair):
        theirs, *_ = self.trainer("orpo").odds_ratio_loss(self.settings(beta=0.3), *pair)
        torch.testing.assert_close(losses.orpo(*pair, beta=0.3), -pair[0] - theirs)


GOOD = torch.tensor([-1.0, -2.0])
NUMBER: Any = 1.0


ADVANTAGE = (
    "advantage must have log_prob's shape, [2], with 1 for a dimension along which it is one"
)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: losses.dpo(GOOD, GOOD[:1], GOOD, GOOD), ValueError,
         "rejected must have chosen's shape, [2], got [1]"),
        (lambda: losses.ipo(GOOD, GOOD, GOOD, NUMBER), TypeError,
         "reference_rejected must be a Tensor, got float"),
        (lambda: losses.cpo(GOOD, GOOD.long()), TypeError,
         "rejected must have a floating-point dtype, got torch.int64"),
        (lambda: losses.orpo(GOOD, GOOD, beta=0), ValueError,
         "beta must be a positive finite number, got 0"),
        (lambda: losses.dpo(GOOD, GOOD, GOOD, GOOD, label_smoothing=1.5), ValueError,
         "label_smoothing must be in [0, 1], got 1.5"),
        (lambda: losses.simpo(GOOD, GOOD, gamma=float("nan")), ValueError,
         "gamma must be a finite number, got nan"),
        (lambda: losses.kto(GOOD, GOOD, GOOD, 0.0), TypeError,
         "desirable must be a bool Tensor, got torch.float32"),
        (lambda: losses.kto(GOOD, GOOD, GOOD[:1] > 0, 0.0), ValueError,
         "desirable must have log_prob's shape, [2], got [1]"),
        (lambda: losses.kto(GOOD, GOOD, GOOD > 0, GOOD), ValueError,
         "kl must be a number or a tensor of one, got shape [2]"),
        (lambda: losses.clipped_surrogate(GOOD, GOOD, torch.ones(3)), ValueError,
         f"{ADVANTAGE}, got [3]"),
        (lambda: losses.clipped_surrogate(GOOD, GOOD, torch.ones(2, 2)), ValueError,
         f"{ADVANTAGE}, got [2, 2]"),
        (lambda: losses.clipped_surrogate(GOOD, GOOD, torch.tensor(1.0)), ValueError,
         f"{ADVANTAGE}, got []"),
        # One per sequence, which would be taken for one per token.
        (lambda: losses.clipped_surrogate(GOOD.expand(2, 2), GOOD.expand(2, 2), GOOD), ValueError,
         f"{ADVANTAGE.replace('[2]', '[2, 2]')}, got [2]"),
        (lambda: losses.clipped_surrogate(GOOD, GOOD, NUMBER), TypeError,
         "advantage must be a Tensor, got float"),
        (lambda: losses.clipped_surrogate(GOOD, GOOD, GOOD, clip_low=1.1), ValueError,
         "clip_low must be in [0, 1], got 1.1"),
        (lambda: losses.clipped_surrogate(GOOD, GOOD, GOOD, clip_high=-0.1), ValueError,
         "clip_high must be a finite number >= 0, got -0.1"),
        (lambda: losses.clipped_surrogate(GOOD, GOOD, GOOD, kl_weight=0.1), ValueError,
         "kl_weight=0.1 needs reference_log_prob"),
        (lambda: losses.clipped_surrogate(GOOD, GOOD, GOOD, entropy_weight=0.1), ValueError,
         "entropy_weight=0.1 needs entropy"),
    ],
)  # fmt: skip
def test_errors(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_public_names_are_documented():
    for name in losses.__all__:
        doc = getattr(losses, name).__doc__
        assert "Returns:" in doc
        assert "arXiv" in doc or "Schulman" in doc
    assert losses.__all__ == sorted(losses.__all__)
