"""How losses of tokens are added up: token weights and the normalizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from support import reference
from support.judging import Head, error, judge, make_head, outcome, rounding
from torch import Tensor

import crosscut


def weights_of(head: Head) -> Tensor:
    """Of both signs; NaN where the target is ignored, as it is not to be looked at."""
    gen = torch.Generator().manual_seed(3)
    weight = torch.randn(head.target.shape, generator=gen) + 0.5
    return torch.where(head.target == -100, torch.nan, weight.to(head.target.device))


def expected(
    input: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None, reduction: str,
    token_weight: Tensor | None = None, normalizer: float | None = None, shift: int = 0,
    class_weight: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """By hand, from PyTorch's losses a token."""
    losses = reference.linear_cross_entropy(
        input, weight, target, linear_bias=linear_bias, weight=class_weight, reduction="none",
        shift=shift, **options,
    )  # fmt: skip
    kept = (target != -100).to(losses)
    if shift:
        kept[..., :shift] = 0
    factor = kept if token_weight is None else torch.where(kept > 0, token_weight.to(losses), 0)
    if reduction == "none":
        return losses * factor
    total = (losses * factor).sum()
    if reduction == "sum":
        return total
    if class_weight is not None:
        factor = factor * class_weight.to(losses)[target.clamp_min(0)]
    return total / (factor.sum() if normalizer is None else normalizer)


CALLS: dict[str, dict[str, Any]] = {
    "token_weight": {"weighted": True, "reduction": "mean"},
    "token_weight, sum": {"weighted": True, "reduction": "sum"},
    "token_weight, none, shift": {"weighted": True, "reduction": "none", "shift": 1},
    "token_weight, shift": {"weighted": True, "reduction": "mean", "shift": 2},
    "token_weight, class weight": {"weighted": True, "reduction": "mean", "classes": True},
    "normalizer": {"reduction": "mean", "normalizer": 100.0},
    "both, everything": {
        "weighted": True, "reduction": "mean", "normalizer": 7.5, "classes": True, "shift": 1,
        "z_loss": 1e-2, "label_smoothing": 0.1,
    },
}  # fmt: skip


@pytest.mark.interpreted(
    when=lambda dtype, call: dtype == torch.bfloat16 and call == CALLS["both, everything"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_as_by_hand(backend, make, dtype, call):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton: needs bfloat16, float16 or float32")
    head = make(((3, 40), 17, 201), dtype, bias=True, ignored=0.2)
    options = dict(call)
    classes = head.class_weight if options.pop("classes", False) else None
    if options.pop("weighted", False):
        options["token_weight"] = weights_of(head)
    ours = partial(crosscut.linear_cross_entropy, weight=classes, backend=backend)
    judge(ours, partial(expected, class_weight=classes), head, **options)


def test_parts_of_a_batch_add_up_under_the_normalizer():
    """Gradient accumulation: unlike a mean of means, every token counts the same."""
    head = make_head((30, 9, 50), ignored=0.3)
    whole = outcome(crosscut.linear_cross_entropy, head)
    count = (head.target != -100).sum()
    parts = [
        outcome(
            crosscut.linear_cross_entropy,
            Head(head.input[part], head.linear_weight, head.target[part]),
            normalizer=count,
        )
        for part in (slice(0, 7), slice(7, 30))
    ]
    eps = rounding(torch.float64)
    assert error(parts[0].loss + parts[1].loss, whole.loss) <= eps
    assert error(parts[0].d_weight + parts[1].d_weight, whole.d_weight) <= eps
    assert error(torch.cat([part.d_input for part in parts]), whole.d_input) <= eps


@pytest.mark.parametrize(
    "normalizer",
    [
        12,
        12.0,
        torch.tensor(12),
        torch.tensor([12.0], dtype=torch.float64),
        torch.tensor([[12]], dtype=torch.int32),
    ],
    ids=str,
)
def test_kinds_of_normalizer(normalizer):
    head = make_head((30, 9, 50), torch.float32)
    found = crosscut.linear_cross_entropy(
        head.input, head.linear_weight, head.target, normalizer=normalizer
    )
    total = crosscut.linear_cross_entropy(
        head.input, head.linear_weight, head.target, reduction="sum"
    )
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert torch.equal(found, total / 12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16], ids=str)
def test_a_mask_is_a_token_weight(dtype):
    head = make_head((30, 9, 50), torch.float32)
    mask = torch.arange(30) % 3 == 0
    masked = crosscut.linear_cross_entropy(
        head.input, head.linear_weight, head.target, token_weight=mask.to(dtype)
    )
    ignored = torch.where(mask, head.target, -100)
    other = crosscut.linear_cross_entropy(head.input, head.linear_weight, ignored)
    torch.testing.assert_close(masked, other)


NOBODY: dict[str, dict[str, Any]] = {
    "all ignored": {"ignored": True},
    "all ignored, token_weight": {"ignored": True, "token_weight": torch.ones(9)},
    "token_weight of 0": {"token_weight": torch.zeros(9)},
    "class weights of 0": {"weight": torch.zeros(21)},
    "class weights of 0, z-loss": {"weight": torch.zeros(21), "z_loss": 0.1},
}


@pytest.mark.interpreted(
    when=lambda dtype, call: (
        (dtype == torch.bfloat16 and call is NOBODY["all ignored"])
        or (dtype == torch.float16 and call is NOBODY["token_weight of 0"])
    )
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", NOBODY.values(), ids=NOBODY)
def test_a_mean_over_nothing(place, make, dtype, call):
    """NaN, as PyTorch's is; but the gradient is 0, for no token asks for another."""
    backend, device = place
    head = make((9, 16, 21), dtype, bias=True)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
    if options.pop("ignored", False):
        head.target.fill_(-100)
    found = outcome(crosscut.linear_cross_entropy, head, backend=backend, **options)
    assert found.loss.isnan()
    for value in found[1:]:
        assert value is not None
        assert (value == 0).all()


def test_a_divergence_over_nothing():
    head = make_head((9, 16, 21), torch.float32)
    hidden = head.input.clone().requires_grad_()
    loss = crosscut.linear_kl_div(
        hidden, head.linear_weight, head.input, head.linear_weight, torch.full((9,), -100)
    )
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, hidden)
    assert (grad == 0).all()


def test_gradcheck_of_the_token_weight():
    head = make_head((6, 3, 7), bias=True, ignored=0.2)

    def loss(hidden: Tensor, token_weight: Tensor) -> Tensor:
        return crosscut.linear_cross_entropy(
            hidden, head.linear_weight, head.target, token_weight=token_weight
        )

    weight = torch.rand(6, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(loss, (head.input.requires_grad_(), weight.requires_grad_()))


def test_module_takes_both_in_the_call():
    head = make_head((30, 9, 50), torch.float32)
    options: dict[str, Any] = {"token_weight": torch.rand(30), "normalizer": 4.0}
    tensors = (head.input, head.linear_weight, head.target)
    found = crosscut.LinearCrossEntropy()(*tensors, **options)
    assert torch.equal(found, crosscut.linear_cross_entropy(*tensors, **options))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"token_weight": 1.0}, TypeError, "token_weight must be a Tensor, got float"),
        (
            {"token_weight": torch.ones(5)},
            ValueError,
            "token_weight must have target's shape, [4], got [5]",
        ),
        (
            {"token_weight": torch.ones(4, dtype=torch.complex64)},
            TypeError,
            "token_weight must have a real dtype, got torch.complex64",
        ),
        (
            {"token_weight": torch.ones(4, device="meta")},
            ValueError,
            "token_weight is on meta, input is on cpu: all must be on one device",
        ),
        (
            {"normalizer": 3, "reduction": "sum"},
            ValueError,
            "normalizer needs reduction='mean', got reduction='sum'",
        ),
        ({"normalizer": 0}, ValueError, "normalizer must be a positive finite number, got 0"),
        (
            {"normalizer": torch.tensor(0)},
            ValueError,
            "normalizer must be a positive finite number, got 0",
        ),
        (
            {"normalizer": torch.tensor([-1.5])},
            ValueError,
            "normalizer must be a positive finite number, got -1.5",
        ),
        (
            {"normalizer": True},
            TypeError,
            "normalizer must be a positive finite number, got bool",
        ),
        (
            {"normalizer": torch.tensor(True)},
            TypeError,
            "normalizer must be a number, got a tensor of torch.bool",
        ),
        (
            {"normalizer": "3"},
            TypeError,
            "normalizer must be a number or a tensor of one, got str",
        ),
        (
            {"normalizer": torch.ones(2)},
            ValueError,
            "normalizer must be a number or a tensor of one, got shape [2]",
        ),
    ],
    ids=str,
)
def test_errors(changes, kind, message):
    head = make_head((4, 3, 5), torch.float32)
    with pytest.raises(kind) as caught:
        crosscut.linear_cross_entropy(head.input, head.linear_weight, head.target, **changes)
    assert str(caught.value) == message
