"""The column filter and the rank-one correction of what it leaves out.

Heads here have many classes that no token wants, so that columns really are dropped. With the
identity as hidden states the classifier's gradient is the gradient of the logits itself, and each
entry of it can be looked at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from support import reference
from support.heads import UNWANTED, WANTED, sparse_head, sparsity
from support.judging import (
    Head,
    assert_as_accurate_as_pytorch,
    error,
    make_head,
    outcome,
    pairs,
    truth,
)
from torch import Tensor

import crosscut
from crosscut.backends.column_filter import DROP_BELOW

EXACT = 1e-12
"""Relative rounding error of sums in float64, generously."""


def identity_head(tokens: int, num_classes: int = 6000, *, unwanted: float = UNWANTED) -> Head:
    """Hidden states are the identity: dC is the transpose of the gradient of the logits."""
    source = sparse_head(tokens, 24, num_classes, unwanted=unwanted)
    return Head(
        input=torch.eye(tokens, dtype=torch.float64),
        linear_weight=source.linear_weight @ source.input.t(),
        target=source.target,
        linear_bias=source.linear_bias,
    )


class Softmax(NamedTuple):
    """What the filter did to the softmax of a head of identity: all [N, V]."""

    true: Tensor
    used: Tensor  # by the filtered backward
    tail: Tensor  # bool: replaced by the rank-one matrix


def filtered_softmax(head: Head, *, softcap: float | None = None) -> Softmax:
    """The softmax that the filtered backward uses, read off its gradient of ``sum lse``.

    With a softcap it is multiplied by the softcap's slope, as what is dropped is.
    """

    def lse(*tensors: Tensor, **keywords: Any) -> Tensor:
        return crosscut.token_statistics(*tensors, softcap=softcap, **keywords).lse.sum()

    used = outcome(lse, head, policy="filtered").d_weight.t()
    z = reference.logits(head.input, head.linear_weight, head.linear_bias, softcap=softcap)
    true = z.softmax(-1) * (1 if softcap is None else 1 - (z / softcap) ** 2)
    changed = (used / true - 1).abs() > 1e-6
    tail = changed.any(0).expand_as(changed)
    return Softmax(true, used, tail)


class TestWhatIsDropped:
    """Whole columns of a block of tokens, all of them negligible."""

    @pytest.mark.parametrize("tokens", [256, 300])
    def test_tail_is_what_sparsity_says(self, tokens):
        head = identity_head(tokens)
        softmax, said = filtered_softmax(head), sparsity(head)
        assert said.kept < 0.5
        assert said.tail > 1e-5
        assert softmax.tail.double().mean().item() == pytest.approx(1 - said.kept, abs=1e-3)
        mass = torch.where(softmax.tail, softmax.true, 0).sum() / tokens
        assert mass.item() == pytest.approx(said.tail, rel=1e-6)

    def test_only_columns_of_little_mass(self):
        softmax = filtered_softmax(identity_head(256))
        mean = softmax.true.mean(0)
        dropped = softmax.tail[0]
        assert mean[dropped].max() < DROP_BELOW
        assert (~dropped[mean > DROP_BELOW]).all()
        assert dropped[mean < 0.9 * DROP_BELOW].all()  # the running lse is nearly the final one

    @pytest.mark.parametrize("num_classes", [2000, 6000])
    def test_every_wanted_class_and_label_is_kept(self, num_classes):
        head = identity_head(256, num_classes)
        rare = replace(head, target=torch.arange(256) + 1000)  # labels with a tiny softmax
        assert sparsity(rare).kept < 0.5
        softmax = filtered_softmax(rare)
        assert not softmax.tail[:, 1000:1256].any()
        true = truth(rare, reduction="sum")
        found = outcome(crosscut.linear_cross_entropy, rare, reduction="sum", policy="filtered")
        onehot = (1000 + torch.arange(256), torch.arange(256))
        assert error(found.d_weight[onehot], true.d_weight[onehot]) < EXACT

    def test_kept_entries_are_exact(self):
        softmax = filtered_softmax(identity_head(256))
        kept = ~softmax.tail
        assert error(softmax.used[kept], softmax.true[kept]) < EXACT

    @pytest.mark.parametrize("num_classes", [3000, 6000, 20_000])
    def test_mass_of_the_tail_is_bounded(self, num_classes):
        said = sparsity(sparse_head(64, num_classes=num_classes))
        assert 1e-5 < said.tail < num_classes * DROP_BELOW

    def test_no_column_of_a_flat_softmax(self):
        head = make_head((200, 8, 5000))
        flat = replace(head, input=head.input * 0.01)
        assert sparsity(flat) == crosscut.GradientSparsity(kept=1.0, tail=0.0)
        exact = outcome(crosscut.linear_cross_entropy, flat, policy="exact")
        filtered = outcome(crosscut.linear_cross_entropy, flat, policy="filtered")
        for ours, theirs in zip(filtered[:3], exact[:3], strict=True):
            assert error(ours, theirs) < EXACT

    def test_all_is_kept_where_half_would_be(self):
        """3500 of 6000 classes are wanted: gathering them would save nothing."""
        head = sparse_head(100)
        bias = torch.full((6000,), -20.0, dtype=torch.float64)
        bias[:3500] = 0
        assert sparsity(replace(head, linear_bias=bias)) == crosscut.GradientSparsity(
            kept=1.0, tail=0.0
        )
        bias[1000:] = -20.0
        assert sparsity(replace(head, linear_bias=bias)).kept < 0.3

    @pytest.mark.parametrize(
        ("dtype", "policy", "filters"),
        [
            (torch.bfloat16, "auto", True),
            (torch.float16, "auto", True),
            (torch.float32, "auto", False),
            (torch.float64, "auto", False),
            (torch.float32, "filtered", True),
            (torch.float64, "filtered", True),
            (torch.bfloat16, "exact", False),
            (torch.float32, "exact", False),
        ],
    )
    def test_which_policy_filters(self, dtype, policy, filters):
        said = sparsity(sparse_head(100, dtype=dtype), policy=policy)
        if filters:
            assert said.kept < 0.5
            assert said.tail > 0
        else:
            assert said == crosscut.GradientSparsity(kept=1.0, tail=0.0)


class TestCorrection:
    """The rank-one matrix has the row and the column sums of what it replaces."""

    @pytest.mark.parametrize("softcap", [None, 12.0, 30.0])
    def test_row_and_column_sums(self, softcap):
        softmax = filtered_softmax(identity_head(256), softcap=softcap)
        assert 0.3 < softmax.tail.double().mean() < 1
        true, used = (torch.where(softmax.tail, p, 0) for p in (softmax.true, softmax.used))
        assert true.sum() > 3e-3
        assert error(used.sum(1), true.sum(1)) < 1e-9
        # Column masses are taken under the running log-sum-exp, and rescaled to the row sums of
        # a block of classes: good to the spread of what the tokens' running sums had missed.
        assert error(used.sum(0), true.sum(0)) < 1e-3

    def test_sums_where_the_mass_comes_last(self):
        """Masses seen before most of the softmax is known are scaled down to what they became."""
        head = identity_head(256, 8000)
        assert head.linear_bias is not None
        bias = head.linear_bias - 2
        bias[:50] = 0  # labels, known from the start
        bias[50:WANTED], bias[7000:7100] = -5, 4  # as much as e**4 times that, known at the end
        late = replace(head, linear_bias=bias, target=head.target % 50)
        softmax = filtered_softmax(late)
        first = softmax.tail[0].clone()
        first[4096:] = False
        assert first.sum() > 2000
        true, used = softmax.true[:, first], softmax.used[:, first]
        assert true.sum() > 1e-6
        assert error(used.sum(0), true.sum(0)) < 0.1
        assert error(softmax.used.sum(1), softmax.true.sum(1)) < EXACT

    def test_is_of_rank_one(self):
        softmax = filtered_softmax(identity_head(256))
        used = softmax.used[:, softmax.tail[0]]
        singular = torch.linalg.svdvals(used)
        assert singular[0] > 0
        assert singular[1] < 1e-9 * singular[0]

    def test_bias_gradient_loses_nothing(self):
        """It is made of column sums alone; without them it would be 0 at every dropped class."""
        head = sparse_head(300)
        found = outcome(crosscut.linear_cross_entropy, head, policy="filtered", reduction="sum")
        true = truth(head, reduction="sum")
        assert found.d_bias is not None
        assert true.d_bias is not None
        assert found.d_bias.sum().abs() < 1e-9  # softmax minus onehot: 0 in total
        unwanted = slice(WANTED, None)
        assert error(found.d_bias[unwanted], true.d_bias[unwanted]) < 1e-3
        assert error(found.d_bias, true.d_bias) < 1e-6

    @pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"logit_scale": 0.8}], ids=str)
    def test_better_than_dropping(self, options):
        head = sparse_head(300)
        shared = {"reduction": "sum", **options}
        found = outcome(crosscut.linear_cross_entropy, head, policy="filtered", **shared)
        true = truth(head, **shared)
        dropped = self.tail_dropped(head, **options)
        for ours, without, exact in zip(found[1:3], dropped, true[1:3], strict=True):
            assert 0 < 3 * error(ours, exact) < error(without, exact)

    @staticmethod
    def tail_dropped(head: Head, **options: Any) -> tuple[Tensor, Tensor]:
        """dH and dC of the summed loss where the softmax of a dropped column counts as 0."""
        hidden, weight = head.input, head.linear_weight.clone().requires_grad_()
        hidden = hidden.clone().requires_grad_()
        z = reference.logits(hidden, weight, head.linear_bias, **options)
        p = z.detach().softmax(-1)
        dz = p - torch.nn.functional.one_hot(head.target, p.shape[1])
        dz[:, p.mean(0) < DROP_BELOW] = 0
        z.backward(dz)
        assert hidden.grad is not None
        assert weight.grad is not None
        return hidden.grad, weight.grad

    def test_total_of_the_hidden_gradient(self):
        """A classifier with a column of ones sees the row sums: they are exact."""
        head = sparse_head(200)
        weight = head.linear_weight.clone()
        weight[:, 0] = 1.0
        head = replace(head, linear_weight=weight)
        assert sparsity(head).kept < 0.5
        found = outcome(crosscut.linear_cross_entropy, head, policy="filtered", reduction="none")
        assert found.d_input[:, 0].abs().max() < 1e-12  # sum_v (p - onehot) = 0
        true = truth(head, reduction="none")
        assert true.d_input[:, 0].abs().max() < 1e-12

    def test_per_token_cotangents(self):
        """The tail of a token is weighted by the token's own cotangent."""
        head = sparse_head(300)
        own = head.input - head.input.mean(0)
        weights = 10 * own[:, 0]  # what the tokens do not share: an average of them would be 0
        weights[::7] = 0

        def loss(fn):
            def weighted(*tensors: Tensor, **keywords: Any) -> Tensor:
                return (fn(*tensors, reduction="none", **keywords) * weights).sum()

            return weighted

        found = outcome(loss(crosscut.linear_cross_entropy), head, policy="filtered")
        true = outcome(loss(reference.linear_cross_entropy), head)
        unwanted = slice(WANTED, None)  # a dropped class has no other gradient
        assert error(found.d_weight[unwanted], true.d_weight[unwanted]) < 0.5
        assert error(found.d_weight, true.d_weight) < 1e-5
        assert error(found.d_input, true.d_input) < 1e-4
        assert (found.d_input[::7] == 0).all()

    def test_cotangents_of_both_statistics(self):
        head = sparse_head(100)

        def ours(*tensors: Tensor, **keywords: Any) -> Tensor:
            found = crosscut.token_statistics(*tensors, policy="filtered", **keywords)
            return (0.3 * found.lse + 0.7 * found.target_logit).sum()

        def theirs(*tensors: Tensor, **keywords: Any) -> Tensor:
            z = reference.logits(tensors[0], tensors[1], keywords["linear_bias"])
            return (0.3 * z.logsumexp(-1) + 0.7 * z.gather(-1, tensors[2][:, None])[:, 0]).sum()

        for _, value, exact in pairs(outcome(ours, head), outcome(theirs, head)):
            assert error(value, exact) < 1e-4

    @pytest.mark.parametrize(
        "options",
        [
            {"label_smoothing": 0.1},
            {"z_loss": 1e-2},
            {"label_smoothing": 0.2, "weight": True},
        ],
        ids=str,
    )
    def test_with_other_losses(self, options):
        head = sparse_head((3, 70))
        if options.get("weight"):
            gen = torch.Generator().manual_seed(5)
            options = options | {"weight": torch.rand(6000, generator=gen, dtype=torch.float64)}
        found = outcome(crosscut.linear_cross_entropy, head, policy="filtered", **options)
        true = truth(head, **options)
        assert error(found.loss, true.loss) < EXACT
        for _, ours, exact in pairs(found, true):
            assert error(ours, exact) < 1e-4

    def test_softcap_with_label_smoothing_is_exact(self):
        """A weighted sum of softcapped logits has a gradient everywhere: nothing is dropped."""
        head = sparse_head(100)
        options = {"softcap": 20.0, "label_smoothing": 0.1}
        found = outcome(crosscut.linear_cross_entropy, head, policy="filtered", **options)
        true = truth(head, **options)
        for _, ours, exact in pairs(found, true):
            assert error(ours, exact) < EXACT


class TestBlocksOfTokens:
    """Each block of tokens decides for itself."""

    def test_several_blocks(self):
        """Two populations of 1024 tokens want different classes; a third, ragged, both."""
        head = sparse_head(2400, hidden_size=12, num_classes=4500)
        hidden = torch.zeros(2400, 13, dtype=torch.float64)
        hidden[:, :12] = head.input
        hidden[:1024, 12], hidden[1024:2048, 12] = 1.0, -1.0
        weight = torch.zeros(4500, 13, dtype=torch.float64)
        weight[:, :12] = head.linear_weight
        weight[:100, 12], weight[100:200, 12] = 12.0, -12.0
        target = torch.randint(100, (2400,), generator=torch.Generator().manual_seed(3))
        target[1024:2048] += 100
        head = replace(head, input=hidden, linear_weight=weight, target=target)

        found = outcome(crosscut.linear_cross_entropy, head, policy="filtered", reduction="none")
        true = truth(head, reduction="none")
        assert error(found.loss, true.loss) < EXACT
        for _, ours, exact in pairs(found, true):
            assert error(ours, exact) < 1e-4
        parts = [slice(0, 1024), slice(1024, 2048), slice(2048, 2400)]
        alone = [
            sparsity(replace(head, input=head.input[part], target=head.target[part]))
            for part in parts
        ]
        said, shares = sparsity(head), [1024 / 2400, 1024 / 2400, 352 / 2400]
        kept = sum(share * x.kept for share, x in zip(shares, alone, strict=True))
        tail = sum(share * x.tail for share, x in zip(shares, alone, strict=True))
        # The labels of the batch are kept by all of its blocks, and these blocks share few.
        assert kept <= said.kept <= kept + 200 / 4500 < 0.1
        assert 0 < said.tail == pytest.approx(tail, rel=0.2)

    def test_a_flat_block_beside_a_sparse_one(self):
        """The flat block keeps all; the sparse one is filtered none the less."""
        sparse = sparse_head(2048, hidden_size=10, num_classes=4200)
        assert sparse.linear_bias is not None
        # the bias becomes a weight, so that a token can switch it off
        weight = torch.cat([sparse.linear_weight, sparse.linear_bias[:, None]], 1)
        switch = torch.ones(2048, 1, dtype=torch.float64)
        switch[:1024] = 0
        hidden = torch.cat([sparse.input, switch], 1)
        head = Head(hidden, weight, sparse.target)
        said = sparsity(head)
        assert 0.5 < said.kept < 0.7
        assert said.tail > 0
        found = outcome(crosscut.linear_cross_entropy, head, policy="filtered", reduction="none")
        true = truth(head, reduction="none")
        for ours, exact in zip(found[:3], true[:3], strict=True):
            assert error(ours, exact) < 1e-4
        assert error(found.d_input[:1024], true.d_input[:1024]) < EXACT
        assert error(found.d_input[1024:], true.d_input[1024:]) > EXACT

    def test_ignored_rows_take_no_part(self):
        """A row that is ignored neither keeps a column nor shares in the tail."""
        head = sparse_head(1500, hidden_size=9, num_classes=4200, ignored=0.4)
        kept = head.target != -100
        hidden = head.input.clone()
        hidden[~kept] *= -30  # these would want other classes
        head = replace(head, input=hidden)
        alone = replace(head, input=head.input[kept], target=head.target[kept])
        said, expected = sparsity(head), sparsity(alone)
        assert said.kept == expected.kept
        assert said.tail == pytest.approx(
            expected.tail, rel=1e-6
        )  # a sum of float32, in some order
        options = {"policy": "filtered", "reduction": "sum"}
        found = outcome(crosscut.linear_cross_entropy, head, **options)
        expected = outcome(crosscut.linear_cross_entropy, alone, **options)
        assert (found.d_input[~kept] == 0).all()
        torch.testing.assert_close(found.d_input[kept], expected.d_input)
        torch.testing.assert_close(found.d_weight, expected.d_weight)
        torch.testing.assert_close(found.d_bias, expected.d_bias)


class TestAsUsed:
    """``auto`` in low precision, where the filter is at work by default."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "options",
        [{}, {"softcap": 30.0}, {"label_smoothing": 0.1}, {"reduction": "none"}],
        ids=str,
    )
    def test_as_accurate_as_pytorch(self, dtype, options):
        head = sparse_head((2, 600), dtype=dtype, ignored=0.1)
        assert sparsity(head, policy="auto").kept < 0.5
        assert_as_accurate_as_pytorch(head, **options)

    def test_softcap_is_part_of_the_filter(self):
        """The slope of a softcap is in the gradient, so in the masses: saturated logits have none.

        All unwanted classes sit at the softcap's far end here, where its slope is 2e-4.
        """
        head = sparse_head(200)
        options = {"softcap": 2.5}
        found = outcome(crosscut.linear_cross_entropy, head, policy="filtered", **options)
        true = truth(head, **options)
        for _, ours, exact in pairs(found, true):
            assert error(ours, exact) < 1e-3

    def test_same_call_same_bits(self):
        head = sparse_head(1300, dtype=torch.bfloat16)
        assert sparsity(head) == sparsity(head)
        first, second = (outcome(crosscut.linear_cross_entropy, head) for _ in range(2))
        for _, one, other in pairs(first, second):
            assert torch.equal(one, other)

    def test_sparsity_of_the_paper_policies_is_not_known_ahead(self):
        head = sparse_head(10, num_classes=50 + WANTED)
        message = "policy must be 'auto', 'filtered' or 'exact' here, got 'cce'"
        with pytest.raises(ValueError, match=f"^{message}$"):
            sparsity(head, policy="cce")

    def test_sparsity_of_nothing(self):
        head = sparse_head(20)
        empty = replace(head, target=torch.full_like(head.target, -100))
        assert sparsity(empty) == crosscut.GradientSparsity(kept=1.0, tail=0.0)
