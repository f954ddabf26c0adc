"""Log-probabilities of one or several targets, the entropy, and ranks: values and gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support import reference
from support.heads import RealHead, skip_if_not_served, sparse_head
from support.judging import Head, cotangents, error, judge, make_head, outcome, pairs, rounding
from support.memory import TOKENS, head_of, most, peak
from support.reference import entropy_of, reference_entropy, reference_log_probs, shifted
from torch import Tensor

import crosscut

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale, softcap, temperature": {"logit_scale": 0.5, "softcap": 6.0, "temperature": 0.7},
    "temperature": {"temperature": 2.5},
    "shift": {"shift": 1},
}


def entropy(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    found = crosscut.token_statistics(input, weight, target, entropy=True, **options).entropy
    assert found is not None
    return found


def several_targets(head: Head, count: int) -> Head:
    """Random targets ``[..., count]``: a fifth ignored, one token without any, some twice."""
    gen = torch.Generator().manual_seed(1)
    shape = (*head.target.shape, count)
    target = torch.randint(len(head.linear_weight), shape, generator=gen)
    target[torch.rand(shape, generator=gen) < 0.2] = -100
    target[0, 0] = -100
    target[1, 1] = target[1, 1, :1]
    return replace(head, target=target.to(head.target.device))


@pytest.mark.interpreted(
    when=lambda dtype, options: (
        (dtype == torch.float32 and options == HEADS["plain"])
        or (dtype == torch.bfloat16 and options == HEADS["scale, softcap, temperature"])
    )
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
class TestAgainstTheReference:
    """Every backend, as accurately as PyTorch."""

    def test_log_probs(self, backend, make, dtype, options):
        head = make(((3, 11), 17, 201), dtype, bias=True, ignored=0.2)
        skip_if_not_served(backend, head, "auto")
        judge(
            partial(crosscut.linear_log_probs, backend=backend),
            reference_log_probs,
            head,
            **options,
        )

    def test_entropy(self, backend, make, dtype, options):
        shape = ((3, 11), 17, 201) if backend == "triton" else ((3, 50), 32, 1000)
        head = make(shape, dtype, bias=True, ignored=0.2)
        skip_if_not_served(backend, head, "auto")
        judge(partial(entropy, backend=backend), reference_entropy, head, **options)

    def test_several_targets(self, backend, make, dtype, options):
        head = make(((3, 11), 17, 201), dtype, bias=True)
        skip_if_not_served(backend, head, "auto")
        head = several_targets(head, 4)
        judge(
            partial(crosscut.linear_log_probs, backend=backend),
            reference_log_probs,
            head,
            **options,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["auto", "exact", "cce"])
class TestLowPrecisionPolicies:
    """Without a bias and an ignored token here and there: what a language model's head is."""

    @pytest.mark.interpreted(
        when=lambda dtype, policy, softcap: (
            dtype == torch.bfloat16 and (softcap is None) == (policy == "cce")
        )
    )
    @pytest.mark.parametrize("softcap", [None, 20.0], ids=str)
    def test_log_prob_and_entropy(self, backend, make, dtype, policy, softcap):
        def theirs(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
            entropy = reference_entropy(input, weight, target, **options)
            return reference_log_probs(input, weight, target, **options) + entropy

        def ours(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
            found = crosscut.token_statistics(
                input, weight, target, entropy=True, ranks=True, **options
            )
            assert found.entropy is not None
            return found.log_prob + found.entropy

        head = make(((2, 20), 40, 190), dtype, ignored=0.2)
        judge(partial(ours, backend=backend, policy=policy), theirs, head, softcap=softcap)

    @pytest.mark.interpreted(
        when=lambda dtype, policy: (policy == "auto") == (dtype == torch.float16)
    )
    def test_several_targets(self, backend, make, dtype, policy):
        if policy.startswith("cce"):
            pytest.skip("serves one target per token")
        head = several_targets(make(((2, 20), 40, 190), dtype), 3)
        log_probs = partial(crosscut.linear_log_probs, backend=backend, policy=policy)
        judge(log_probs, reference_log_probs, head)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["auto", "filtered", "exact", "cce_kahan_full_c"])
class TestPoliciesAcrossBlocks:
    """Entropy and several targets where columns are dropped."""

    def test_entropy(self, dtype, policy):
        """Its gradient is whole also where the loss's would be filtered."""
        head = sparse_head((2, 150), dtype=dtype, ignored=0.1)
        judge(partial(entropy, policy=policy), reference_entropy, head)

    def test_several_targets(self, dtype, policy):
        if policy.startswith("cce"):
            pytest.skip("serves one target per token")
        head = several_targets(sparse_head((2, 150), dtype=dtype), 3)
        if policy == "exact":
            judge(partial(crosscut.linear_log_probs, policy=policy), reference_log_probs, head)
            return
        # The filter's error is that of the plain loss: no worse for more targets.
        found = outcome(crosscut.linear_log_probs, head, policy=policy)
        true = outcome(reference_log_probs, head.double())
        single = replace(head, target=head.target[..., 0])
        plain = outcome(crosscut.linear_log_probs, single, policy=policy)
        exact = outcome(reference_log_probs, single.double())
        for (name, value, truth), (_, other, its) in zip(
            pairs(found, true), pairs(plain, exact), strict=True
        ):
            assert error(value, truth) <= 2 * error(other, its) + rounding(value.dtype), name


def test_an_entropy_that_is_only_looked_at_keeps_the_filter():
    head = sparse_head((1, 300), dtype=torch.bfloat16)

    def loss(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        return crosscut.token_statistics(input, weight, target, entropy=True, **options).log_prob

    plain = outcome(crosscut.linear_log_probs, head, policy="filtered")
    for name, value, same in pairs(outcome(loss, head, policy="filtered"), plain):
        assert torch.equal(value, same), name
    whole = outcome(crosscut.linear_log_probs, head, policy="exact")
    assert not torch.equal(plain.d_weight, whole.d_weight)


def test_all_statistics_at_once():
    """The cotangents of lse, target logit and entropy come together in one backward."""
    head = make_head((40, 9, 300), bias=True, ignored=0.2)

    def mix(z: Tensor, target: Tensor) -> Tensor:
        log_prob = z.log_softmax(-1).gather(-1, target.clamp_min(0)[:, None])[:, 0]
        loss = log_prob.exp() + 0.3 * entropy_of(z) ** 2 - 0.1 * z.logsumexp(-1)
        return torch.where(target != -100, loss, 0)

    def theirs(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
        return mix(reference.logits(input, weight, linear_bias), target)

    def ours(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
        found = crosscut.token_statistics(
            input, weight, target, linear_bias=linear_bias, entropy=True, ranks=True
        )
        assert found.entropy is not None
        loss = found.log_prob.exp() + 0.3 * found.entropy**2 - 0.1 * found.lse
        return torch.where(target != -100, loss, 0)

    for name, value, exact in pairs(outcome(ours, head), outcome(theirs, head)):
        assert error(value, exact) <= rounding(torch.float64), name


class TestSeveralTargets:
    """What the single target and its repetitions must say."""

    def test_one_of_several_is_the_single_one(self):
        head = make_head(((2, 20), 6, 50), bias=True, ignored=0.3)
        one = outcome(crosscut.linear_log_probs, head, policy="exact")
        given = cotangents(one.loss)
        several = replace(head, target=head.target[..., None])
        leaves = hidden, classifier = (
            head.input.clone().requires_grad_(),
            head.linear_weight.clone().requires_grad_(),
        )
        found = crosscut.linear_log_probs(
            hidden, classifier, several.target, linear_bias=head.linear_bias, policy="exact"
        )
        assert torch.equal(found[..., 0], one.loss)
        found.backward(given[..., None])
        for leaf, expected in zip(leaves, (one.d_input, one.d_weight), strict=True):
            assert leaf.grad is not None
            assert error(leaf.grad, expected) <= rounding(torch.float64)

    def test_all_classes_are_a_softmax(self):
        head = make_head(((2, 5), 6, 30))
        every = torch.arange(30).expand(2, 5, 30)
        found = crosscut.linear_log_probs(head.input, head.linear_weight, every)
        assert error(found.exp().sum(-1), torch.ones(2, 5)) <= rounding(torch.float64)

    def test_of_a_single_token(self):
        head = make_head(((), 6, 30))
        found = crosscut.linear_log_probs(
            head.input, head.linear_weight, torch.tensor([3, -100, 7])
        )
        z = reference.logits(head.input, head.linear_weight).log_softmax(-1)
        assert error(found, z[[3, 0, 7]] * torch.tensor([1, 0, 1])) <= rounding(torch.float64)


@pytest.mark.parametrize(
    "which",
    [
        crosscut.linear_log_probs,
        entropy,
    ],
    ids=["log_probs", "entropy"],
)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 1.7}], ids=str)
def test_gradcheck(which, options):
    head = make_head((6, 3, 7), bias=True, ignored=0.2)

    def loss(hidden: Tensor, classifier: Tensor, bias: Tensor) -> Tensor:
        return which(hidden, classifier, head.target, linear_bias=bias, **options)

    leaves = [head.input, head.linear_weight, head.linear_bias]
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in leaves])


def test_gradcheck_of_several_targets():
    head = several_targets(make_head(((2, 3), 3, 7), bias=True), 3)

    def loss(hidden: Tensor, classifier: Tensor, bias: Tensor) -> Tensor:
        return crosscut.linear_log_probs(hidden, classifier, head.target, linear_bias=bias)

    leaves = [head.input, head.linear_weight, head.linear_bias]
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in leaves])


class TestEntropy:
    """What is known of it without a reference."""

    def test_flat_and_peaked(self):
        weight = torch.zeros(1000, 4, dtype=torch.float64)
        input, target = torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
        flat = entropy(input, weight, target)
        assert error(flat, torch.full((3,), 1000.0, dtype=torch.float64).log()) < 1e-14
        weight[7] = 300
        assert (entropy(input, weight, target) == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_classes_that_cannot_be(self, backend, make, dtype):
        """A bias of -inf takes a class out of the softmax: whole blocks of them, here."""
        classes = 1500 if backend == "triton" else 9000
        first, last = classes // 2, classes - 200
        head = make((6, 5, classes), dtype, bias=True)
        skip_if_not_served(backend, head, "auto")
        assert head.linear_bias is not None
        bias = head.linear_bias.clone()
        bias[:first] = bias[last:] = -torch.inf
        head = replace(head, linear_bias=bias, target=head.target % (last - first) + first)
        part = slice(first, last)
        alone = Head(
            head.input, head.linear_weight[part], head.target - first, bias[part].contiguous()
        )
        found, expected = (outcome(entropy, some, backend=backend) for some in (head, alone))
        assert error(found.loss, expected.loss) <= rounding(dtype)
        assert error(found.d_input, expected.d_input) <= 4 * rounding(dtype)
        assert error(found.d_weight[part], expected.d_weight) <= 4 * rounding(dtype)
        assert (found.d_weight[:first] == 0).all()

    def test_small_cotangents_in_float16(self, backend, make):
        """Gradients of logits of 2**-25, below float16's range, of hidden states around 2**9."""
        head = make((40, 24, 200), torch.float16)
        head = replace(head, input=2**9 * head.input, linear_weight=head.linear_weight / 2**9)

        def loss(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
            return 2.0**-18 * entropy(input, weight, target, **options).sum()

        found = outcome(loss, head, backend=backend).d_weight
        true = outcome(loss, head.double()).d_weight
        assert error(found, true) <= 4 * rounding(torch.float16)


class TestRanks:
    """argmax, target_rank and correct."""

    @staticmethod
    def expected(head: Head, **options: Any) -> tuple[Tensor, Tensor]:
        """The order of a stable sort."""
        z = reference.logits(head.input, head.linear_weight, head.linear_bias, **options)
        order = torch.sort(z, dim=-1, descending=True, stable=True).indices
        rank = (order == head.target[..., None]).double().argmax(-1)
        kept = head.target != -100
        return torch.where(kept, order[..., 0], -1), torch.where(kept, rank, z.shape[-1])

    @pytest.mark.parametrize("policy", ["auto", "filtered"])
    @pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=str)
    def test_across_blocks(self, options, policy):
        head = make_head(((2, 700), 8, 9000), bias=True, ignored=0.2)
        top = reference.logits(head.input, head.linear_weight, head.linear_bias).topk(3).indices
        likely = torch.where(head.target == -100, -100, top[..., 1])
        likely[:, ::3] = torch.where(head.target == -100, -100, top[..., 0])[:, ::3]
        head = replace(head, target=torch.where(torch.arange(700) % 5 < 4, likely, head.target))
        found = crosscut.token_statistics(
            head.input, head.linear_weight, head.target, linear_bias=head.linear_bias,
            ranks=True, policy=policy, **options,
        )  # fmt: skip
        argmax, rank = self.expected(head, **options)
        assert found.argmax is not None
        assert found.target_rank is not None
        assert torch.equal(found.argmax, argmax)
        assert torch.equal(found.target_rank, rank)
        assert found.correct is not None
        assert torch.equal(found.correct, (argmax == head.target) & (head.target != -100))
        assert 0 < found.correct.sum() < 1400

    @pytest.mark.interpreted(when=lambda options: "softcap" in options)
    @pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"shift": 1}], ids=str)
    def test_every_backend(self, backend, make, options):
        """Some targets are the best class, some the second; a third of the tokens are ignored."""
        head = make(((3, 11), 17, 201), torch.float32, bias=True, ignored=0.3)
        shift = options.get("shift", 0)
        z = reference.logits(head.input, head.linear_weight, head.linear_bias)
        top = shifted(z.topk(2).indices, shift)
        first = torch.arange(11, device=top.device) % 3 == 0
        second = torch.arange(11, device=top.device) % 3 == 1
        target = torch.where(first, top[..., 0], torch.where(second, top[..., 1], head.target))
        head = replace(head, target=torch.where(head.target == -100, -100, target))
        found = crosscut.token_statistics(
            head.input, head.linear_weight, head.target, linear_bias=head.linear_bias,
            entropy=True, ranks=True, backend=backend, **options,
        )  # fmt: skip
        part = replace(
            head, input=head.input[:, : 11 - shift], target=head.target[:, shift:]
        ).double()
        softcap = options.get("softcap")
        argmax, rank = self.expected(part, softcap=softcap)
        assert found.argmax is not None
        assert found.target_rank is not None
        assert torch.equal(found.argmax[:, shift:], argmax)
        assert torch.equal(found.target_rank[:, shift:], rank)
        assert {0, 1} < set(rank[part.target != -100].tolist())
        assert (found.argmax[:, :shift] == -1).all()
        assert (found.target_rank[:, :shift] == 201).all()

    @pytest.mark.interpreted(when=lambda dtype: dtype == torch.bfloat16)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_ties_go_to_the_first_class(self, backend, device, dtype):
        """A head of zeros predicts class 0 everywhere; it does not get everything right."""
        weight = torch.zeros(2000, 4, dtype=dtype, device=device)
        target = torch.tensor([0, 1, 1999, 17], device=device)
        head = Head(torch.ones(4, 4, dtype=dtype, device=device), weight, target)
        skip_if_not_served(backend, head, "auto")
        found = crosscut.token_statistics(head.input, weight, target, ranks=True, backend=backend)
        assert found.argmax is not None
        assert found.argmax.tolist() == [0, 0, 0, 0]
        assert found.target_rank is not None
        assert torch.equal(found.target_rank, target)

    def test_a_single_class(self, backend, device):
        ones = torch.ones(2, 3, device=device)
        target = torch.tensor([0, -100], device=device)
        found = crosscut.token_statistics(
            ones, ones[:1], target, ranks=True, entropy=True, backend=backend
        )
        assert found.argmax is not None
        assert found.target_rank is not None
        assert found.entropy is not None
        assert found.argmax.tolist() == [0, -1]
        assert found.target_rank.tolist() == [0, 1]
        assert found.entropy.tolist() == [0, 0]

    def test_shift(self):
        head = make_head(((2, 6), 4, 9))
        found = crosscut.token_statistics(
            head.input, head.linear_weight, head.target, shift=2, ranks=True
        )
        sliced = replace(head, input=head.input[:, :-2], target=head.target[:, 2:])
        argmax, rank = self.expected(sliced)
        assert found.argmax is not None
        assert found.target_rank is not None
        assert torch.equal(found.argmax[:, 2:], argmax)
        assert torch.equal(found.target_rank[:, 2:], rank)
        assert (found.argmax[:, :2] == -1).all()
        assert (found.target_rank[:, :2] == 9).all()

    def test_low_precision_is_no_worse_than_pytorch(self):
        head = make_head((500, 32, 2000), torch.bfloat16)
        true, _ = self.expected(head.double())
        theirs, _ = self.expected(head)
        found = crosscut.token_statistics(
            head.input, head.linear_weight, head.target, ranks=True
        ).argmax
        assert found is not None
        assert (found != true).sum() <= 2 * (theirs != true).sum()
        assert (found == true).double().mean() > 0.9

    def test_not_differentiable(self):
        head = make_head((4, 3, 5))
        found = crosscut.token_statistics(
            head.input.requires_grad_(), head.linear_weight, head.target, ranks=True
        )
        assert found.argmax is not None
        assert found.target_rank is not None
        assert not found.argmax.requires_grad
        assert not found.target_rank.requires_grad
        assert found.entropy is None


class TestMemory:
    """That of the plain loss."""

    def test_entropy_and_ranks(self):
        def everything(
            input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor
        ) -> Tensor:
            found = crosscut.token_statistics(
                input, weight, target, entropy=True, ranks=True, linear_bias=linear_bias
            )
            assert found.entropy is not None
            return (found.log_prob - found.entropy).mean()

        head = head_of(TOKENS // 2, torch.bfloat16)
        assert 0 < peak(head, backward=True, loss_fn=everything) <= most(17.9)

    def test_several_targets(self):
        head = head_of(TOKENS // 2, torch.float32)
        others = 17 * torch.arange(4)
        target = (head.target[:, None].clamp_min(0) + others) % len(head.linear_weight)

        def several(input: Tensor, weight: Tensor, _: Tensor, linear_bias: Tensor) -> Tensor:
            return crosscut.linear_log_probs(input, weight, target, linear_bias=linear_bias).mean()

        assert 0 < peak(head, backward=True, loss_fn=several) <= most(8.3)


def test_no_grad_is_the_forward_alone():
    head = make_head((20, 5, 30), torch.bfloat16)
    leaf = head.input.requires_grad_()
    with torch.no_grad():
        found = crosscut.linear_log_probs(leaf, head.linear_weight, head.target)
    assert not found.requires_grad
    assert torch.equal(found, crosscut.linear_log_probs(leaf, head.linear_weight, head.target))


@pytest.mark.parametrize("function", [crosscut.linear_log_probs, crosscut.token_statistics])
@pytest.mark.parametrize(
    ("temperature", "kind"),
    [(0.0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), ("1", TypeError)],
)
def test_temperature_is_checked(function, temperature, kind):
    head = make_head((4, 3, 5))
    with pytest.raises(kind, match="temperature must be a positive finite number, got"):
        function(head.input, head.linear_weight, head.target, temperature=temperature)


@pytest.mark.parametrize("shape", [(4, 0), (5, 2), (4, 2, 2)], ids=str)
def test_shape_of_several_targets_is_checked(shape):
    head = make_head((4, 3, 5))
    with pytest.raises(ValueError, match=r"target must have .*\[4\]"):
        crosscut.linear_log_probs(
            head.input, head.linear_weight, torch.zeros(shape, dtype=torch.int64)
        )


def test_the_papers_policies_serve_one_target():
    head = several_targets(make_head(((2, 3), 3, 7)), 2)
    with pytest.raises(ValueError, match="serves one target per token under policy 'cce'"):
        crosscut.linear_log_probs(head.input, head.linear_weight, head.target, policy="cce")


@pytest.mark.real
def test_real_head(real_head: RealHead):
    """Log-probability, entropy and their gradients, on the logits of real text, in bfloat16."""
    hidden, labels = real_head.window(0, 64)
    head = Head(hidden, real_head.classifier, labels)

    def both(z: Tensor, target: Tensor) -> Tensor:
        log_p = z.log_softmax(-1)
        log_prob = log_p.gather(-1, target[:, None])[:, 0]
        return log_prob + 0.1 * -(log_p.exp() * log_p).sum(-1)

    def theirs(input: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Tensor:
        return both(
            (input @ weight.t()).to(torch.promote_types(input.dtype, torch.float32)), target
        )

    def ours(input: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Tensor:
        found = crosscut.token_statistics(input, weight, target, entropy=True)
        assert found.entropy is not None
        return found.log_prob + 0.1 * found.entropy

    wide = replace(head, input=hidden.float(), linear_weight=real_head.classifier.float())
    true = outcome(theirs, wide)
    expected, found = outcome(theirs, head), outcome(ours, head)
    their_errors = [error(value, exact) for _, value, exact in pairs(expected, true)]
    for (name, value, exact), their_error in zip(pairs(found, true), their_errors, strict=True):
        print(f"{name}: crosscut {error(value, exact):.2e}, PyTorch {their_error:.2e}")
        assert error(value, exact) <= their_error, name


def test_ranks_of_equal_logits_in_low_precision(place):
    """Whole numbers are exact in every dtype: equal logits are sorted by class, always."""
    backend, device = place
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randint(-4, 5, (rows, 8), generator=generator).to(device, torch.bfloat16)
        for rows in (40, 300)
    )
    target = torch.randint(300, (40,), generator=generator).to(device)
    found = crosscut.token_statistics(hidden, weight, target, ranks=True, backend=backend)
    logits = hidden.double() @ weight.double().t()
    at_target = logits.gather(1, target[:, None])
    before = torch.arange(300, device=device) < target[:, None]
    ahead = (logits > at_target) | ((logits == at_target) & before)
    assert torch.equal(found.target_rank, ahead.sum(1))
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(found.argmax, first)
