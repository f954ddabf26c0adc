"""An import swap is enough: everything shared with ``torch.nn.functional.linear_cross_entropy``."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.judging import Head, LossFn, judge, make_head, outcome
from torch import Tensor

import crosscut

pytestmark = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="needs PyTorch >= 2.13"
)

SHARED = [
    "input",
    "linear_weight",
    "target",
    "linear_bias",
    "weight",
    "reduction",
    "ignore_index",
    "label_smoothing",
    "options",
]


def compare(head: Head, **options: Any) -> None:
    """Same loss and gradients as PyTorch's, up to PyTorch's own rounding error."""
    class_weight = options.pop("weight", None)

    def weighted(loss_fn: LossFn) -> LossFn:
        def loss(input: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
            if class_weight is not None:
                options["weight"] = class_weight.to(input.dtype)
            return loss_fn(input, *tensors, **options)

        return loss

    ours, theirs = weighted(crosscut.linear_cross_entropy), weighted(F.linear_cross_entropy)
    # All of a smoothed gradient is p - 1/V: in float32 one row in forty is 3 to 14 % beyond.
    by_row = head.input.dtype != torch.float32 or options.get("label_smoothing") != 1
    judge(ours, theirs, head, by_row=by_row, **options)


def test_signature_begins_as_theirs():
    ours = inspect.signature(crosscut.linear_cross_entropy).parameters
    theirs = inspect.signature(F.linear_cross_entropy).parameters
    assert list(ours)[: len(SHARED)] == SHARED
    for name in SHARED:
        assert ours[name].kind == theirs[name].kind
        if name != "ignore_index":  # theirs is None, which it documents to mean -100
            assert ours[name].default == theirs[name].default


@pytest.mark.parametrize("shape", [((), 6, 11), (1, 3, 2), (37, 20, 301), (7, 5, 4200)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_shapes_and_dtypes(shape, reduction, dtype, bias):
    compare(make_head(shape, dtype, bias=bias), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_options(reduction, ignore_index, label_smoothing, weighted, dtype):
    head = make_head((40, 12, 53), dtype, bias=True)
    head.target[::4] = ignore_index
    compare(
        head,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        weight=head.class_weight if weighted else None,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 3], ids=["empty", "all ignored"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_no_token_counts(reduction, tokens, label_smoothing):
    """The loss as PyTorch gives it, NaN for a mean; the gradients exactly zero."""
    head = make_head((tokens, 4, 9), torch.float32, bias=True)
    head.target.fill_(-100)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    ours = outcome(crosscut.linear_cross_entropy, head, **options)
    theirs = outcome(F.linear_cross_entropy, head, **options)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=0, equal_nan=True)
    for value in ours[1:]:
        assert value is not None
        assert (value == 0).all()


def test_agrees_with_their_chunked_path():
    """Called as theirs, chunks and all, which change nothing here."""
    head = make_head((300, 16, 999), torch.float32, ignored=0.2)
    call = {
        "options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64),
        "ignore_index": None,
    }
    ours = outcome(crosscut.linear_cross_entropy, head, **call)
    theirs = outcome(F.linear_cross_entropy, head, **call)
    for value, their in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(value, their)
    plain = outcome(crosscut.linear_cross_entropy, head)
    for value, same in zip(ours[:3], plain[:3], strict=True):
        assert torch.equal(value, same)
    module = crosscut.LinearCrossEntropy(ignore_index=None)
    assert torch.equal(module(head.input, head.linear_weight, head.target), plain.loss)
