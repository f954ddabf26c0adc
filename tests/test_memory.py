"""Peak memory is a result like any other: the logits are never there, whole or in halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.heads import RealHead
from support.judging import Head
from support.memory import CLASSES, CPU, LOGITS, MIB, TOKENS, WORKSPACE, head_of, most, peak
from torch import Tensor

import crosscut
from crosscut.bench.measure import peak_bytes
from crosscut.options import POLICIES

DTYPES = [torch.float32, torch.bfloat16]


class TestTheMeter:
    """It sees what there is to see."""

    def test_known_allocations(self):
        def seen(work: Callable[[], object]) -> Any:
            return pytest.approx(peak_bytes(work, CPU), abs=100)  # scalars are allocations too

        assert seen(lambda: torch.zeros(1000, 1000)) == 4_000_000
        assert seen(lambda: torch.zeros(500, 1000).add(1)) == 4_000_000
        assert seen(lambda: [torch.zeros(10**6) for _ in range(3)]) == 12_000_000

    def test_what_was_freed_in_between(self):
        def one_after_the_other() -> None:
            for _ in range(5):
                torch.zeros(10**6)

        assert peak_bytes(one_after_the_other, CPU) == 4_000_000

    def test_plain_pytorch_needs_the_logits(self):
        def plain(input: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(input, weight, linear_bias), target)

        head = head_of(128, torch.float32)
        assert peak(head, backward=True, loss_fn=plain) >= 2 * 128 * CLASSES * 4
        assert peak(head, backward=True) < 128 * CLASSES * 4


# The paper's policies hold several blocks at once: softmax, onehot, and what is left of them.
MEASURED = {
    (torch.float32, "forward"): 15.5, (torch.bfloat16, "forward"): 16.7,
    (torch.float32, "auto"): 15.5, (torch.float32, "exact"): 15.5,
    (torch.float32, "filtered"): 15.7,
    (torch.float32, "cce"): 91, (torch.float32, "cce_kahan"): 91,
    (torch.float32, "cce_kahan_full_c"): 106, (torch.float32, "cce_kahan_full_e"): 91,
    (torch.bfloat16, "auto"): 18, (torch.bfloat16, "filtered"): 18, (torch.bfloat16, "exact"): 18,
    (torch.bfloat16, "cce_kahan"): 91,
    (torch.bfloat16, "softcap, smoothing"): 48,
}  # fmt: skip
"""MiB, of the calls below."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype):
    """Less than half of the logits in two bytes: no allocation of their number of entries."""
    found = peak(head_of(TOKENS, dtype), backward=False)
    assert 0 < found <= most(MEASURED[dtype, "forward"])
    assert found < LOGITS


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        *((torch.float32, policy) for policy in POLICIES),
        *((torch.bfloat16, policy) for policy in ("auto", "filtered", "exact", "cce_kahan")),
    ],
    ids=str,
)
def test_forward_and_backward(dtype, policy):
    found = peak(head_of(TOKENS, dtype), backward=True, policy=policy)
    assert 0 < found <= most(MEASURED[dtype, policy])
    assert found < LOGITS * dtype.itemsize


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.1}, {"softcap": 30.0, "label_smoothing": 0.1}, {"z_loss": 1e-3},
     {"reduction": "none"}],
    ids=str,
)  # fmt: skip
def test_options_need_no_more(options):
    reduced = options.get("reduction") != "none"

    def loss(*tensors: Tensor, **keywords: Any) -> Tensor:
        found = crosscut.linear_cross_entropy(*tensors, **keywords)
        return found if reduced else found.mean()

    found = peak(head_of(TOKENS, torch.bfloat16), backward=True, loss_fn=loss, **options)
    # A weighted sum of softcapped logits has a gradient everywhere.
    what = "softcap, smoothing" if "softcap" in options else "auto"
    assert found <= most(MEASURED[torch.bfloat16, what])


@pytest.mark.parametrize("policy", ["exact", "filtered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_growth_with_tokens(policy, dtype):
    """Twice the tokens: some vectors more, not twice the logits."""
    once, twice = (
        peak(head_of(n, dtype, CLASSES // 2), backward=True, policy=policy)
        for n in (TOKENS, 2 * TOKENS)
    )
    assert twice - once < most(10.2)
    assert twice <= most(28)


@pytest.mark.parametrize("policy", ["exact", "filtered"])
def test_growth_with_classes(policy):
    """Twice the classes: some vectors more."""
    once, twice = (
        peak(head_of(TOKENS, torch.float32, classes), backward=True, policy=policy)
        for classes in (CLASSES // 2, CLASSES)
    )
    assert twice - once < most(0.1)
    assert twice <= most(15.7)


def test_layout_costs_nothing():
    """A transposed weight is not copied whole."""
    head = head_of(TOKENS, torch.float32)
    flat = peak(head, backward=True, policy="exact")
    transposed = head.linear_weight.t().contiguous().t()
    odd = Head(head.input, transposed, head.target, head.linear_bias)
    assert peak(odd, backward=True, policy="exact") <= flat + 4 * MIB


@pytest.mark.real
@pytest.mark.parametrize(
    ("dtype", "policy"),
    [(torch.float32, "exact"), (torch.float32, "filtered"), (torch.bfloat16, "auto")],
    ids=str,
)
def test_real_head(real_head: RealHead, dtype: torch.dtype, policy: str):
    hidden, labels = real_head.window(0)
    head = Head(hidden.to(dtype), real_head.classifier.to(dtype), labels)
    found = peak(head, backward=True, policy=policy)
    print(f"{policy} {dtype}: {found / MIB:.1f} MiB beyond the gradients")
    assert found <= WORKSPACE
