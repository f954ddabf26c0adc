"""Tokens that the model is sure of, rightly or not: what is left of their loss and gradients.

The loss of such a token is far smaller than the two numbers whose difference it is, and all of its
gradient is in ``1 - p``. Both are right to the digits that the dtype has, in every dtype, and a
loss is never negative.
"""

from __future__ import annotations

import pytest
import torch
from support import reference
from support.heads import Head
from support.judging import assert_as_accurate_as_pytorch, outcome
from torch import Tensor

import crosscut

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def learnt_by_heart(
    sureness: float, dtype: torch.dtype, device: str, shape: tuple[int, int, int] = (40, 32, 200)
) -> Head:
    """Tokens whose labels, all distinct, are ahead of every other class."""
    num_tokens, hidden_size, num_classes = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_classes, hidden_size, generator=generator) / hidden_size**0.5
    target = torch.randperm(num_classes, generator=generator)[:num_tokens]
    noise = torch.randn(num_tokens, hidden_size, generator=generator)
    hidden = sureness * weight[target] + 0.05 * noise
    return Head(hidden.to(device, dtype), weight.to(device, dtype), target.to(device))


@pytest.mark.interpreted(
    when=lambda dtype, sureness, options: (
        (sureness == 18) == (dtype != torch.float32) and (dtype == torch.bfloat16) == bool(options)
    )
)
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("sureness", [6, 18])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learnt_by_heart(place, dtype, sureness, options):
    backend, device = place
    head = learnt_by_heart(sureness, dtype, device)
    assert_as_accurate_as_pytorch(head, factor=1.0, backend=backend, reduction="none", **options)
    loss = outcome(
        crosscut.linear_cross_entropy, head, backend=backend, reduction="none", **options
    )
    assert (loss.loss >= 0).all()
    assert loss.loss.isfinite().all()


def call(place: tuple[str, str], hidden, weight, target, dtype, **options) -> tuple[Tensor, ...]:
    """Loss of each token, dH and dC, in float64."""
    backend, device = place
    tensors = [
        torch.tensor(values).to(device, dtype).requires_grad_() for values in (hidden, weight)
    ]
    labels = torch.tensor(target, device=device)
    loss = crosscut.linear_cross_entropy(
        tensors[0], tensors[1], labels, reduction="none", backend=backend, **options
    )
    found = loss, *torch.autograd.grad(loss.sum(), tensors)
    return tuple(value.detach().double().cpu() for value in found)


def test_a_label_far_ahead(place):
    """exp(-40.25) is what is left of the first loss, not 0 or 0.05."""
    weight = [[1.0, 0.0], [0.0, 1.0], *[[0.3, 0.0]] * 14]
    hidden = [[40.25, 0.3], [0.3, 40.25]]
    loss, d_hidden, _ = call(place, hidden, weight, [0, 1], torch.bfloat16)
    assert (loss > 0).all()
    assert (loss < 1e-10).all()
    assert (d_hidden.abs() < 1e-10).all()


def test_the_log_sum_exp_is_not_rounded_before_the_softmax(place):
    _, _, d_weight = call(place, [[300.0]], [[1.0], [0.98]], [0], torch.float32)
    exact = torch.tensor([0.98], dtype=torch.float32).double()  # as it is given
    p = torch.sigmoid((exact - 1) * 300)
    assert ((d_weight[1, 0] - 300 * p).abs() / (300 * p)).item() < 3e-5
    assert d_weight.sum().abs() < 1e-6


def test_a_wrong_class_that_is_sure(place):
    _, d_hidden, _ = call(place, [[-20.625]], [[-0.78125], [0.1904]], [1], torch.bfloat16)
    assert d_hidden.item() == pytest.approx(-0.9717, abs=2**-9)


def test_a_softcap_rounds_to_no_slope_below_0(place):
    hidden, weight = [[-1.875, 200.0], [-1.6875, 200.0]], [[9.0, 0.1], [0.0, -2.0], [0.0, -2.0]]
    for dtype in DTYPES:
        found = call(place, hidden, weight, [0, 0], dtype, softcap=30.0)
        assert all(value.isfinite().all() for value in found)
        assert (found[1].abs() < 1e-10).all()


@pytest.mark.interpreted(when=lambda dtype: dtype != torch.float16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class_has_no_loss(place, dtype):
    loss, d_hidden, d_weight = call(place, [[1.125], [-3.0]], [[0.078125]], [0, 0], dtype)
    assert (loss == 0).all()
    assert (d_hidden == 0).all()
    assert (d_weight == 0).all()


def test_float16_ignores_what_is_ignored(place):
    """A NaN upstream of an ignored token, and a batch with nothing else."""
    backend, device = place
    hidden = torch.randn(6, 8, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(40, 8, device=device, dtype=torch.float16, requires_grad=True)
    upstream = torch.ones(6, device=device)
    upstream[2] = torch.nan
    for ignored in (slice(2, 3), slice(0, 6)):
        target = torch.arange(6, device=device)
        target[ignored] = -100
        loss = crosscut.linear_cross_entropy(
            hidden, weight, target, reduction="none", backend=backend
        )
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight), upstream)
        assert d_hidden.isfinite().all()
        assert d_weight.isfinite().all()
        assert (d_hidden[ignored] == 0).all()


def test_losses_of_policies_and_preferences_are_numbers(place):
    """What takes the logarithm of ``1 - p``, or a root of the loss, needs a p of at most 1."""
    backend, device = place
    head = learnt_by_heart(18, torch.bfloat16, device)
    log_prob = crosscut.linear_log_probs(
        head.input, head.linear_weight, head.target, backend=backend
    )
    assert (log_prob <= 0).all()
    odds = log_prob - torch.log(-torch.expm1(log_prob))
    assert odds.isfinite().all()
    true = reference.logits(head.input.double(), head.linear_weight.double())
    true = true.log_softmax(-1).gather(-1, head.target[:, None])[:, 0]
    assert ((log_prob - true).abs() <= 0.02 * true.abs()).all()
