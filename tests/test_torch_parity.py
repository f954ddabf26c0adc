"""An import swap is enough: everything shared with ``torch.nn.functional.linear_cross_entropy``."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from judging import FACTOR, Head, error, make_head, outcome, pairs, rounding, rounding_of_statistics

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
]


def compare(head: Head, **options: Any) -> None:
    """Same loss and gradients as PyTorch's, up to PyTorch's own rounding error."""
    class_weight = options.pop("weight", None)

    def weight(dtype: torch.dtype) -> dict[str, Any]:
        return {} if class_weight is None else {"weight": class_weight.to(dtype)}

    dtype = head.input.dtype
    theirs = outcome(F.linear_cross_entropy, head, **options, **weight(dtype))
    true = outcome(F.linear_cross_entropy, head.double(), **options, **weight(torch.float64))
    ours = outcome(crosscut.linear_cross_entropy, head, **options, **weight(dtype))
    assert ours.loss.shape == theirs.loss.shape
    their_errors = {name: error(value, exact) for name, value, exact in pairs(theirs, true)}
    least = 0.0
    if dtype == torch.float32 and not options.get("label_smoothing"):
        least = rounding_of_statistics(head, options.get("ignore_index", -100))
    for name, value, exact in pairs(ours, true):
        # Less than one rounding of each statistic is luck, in PyTorch's error too.
        allowed = FACTOR * max(their_errors[name], least) + rounding(dtype)
        assert error(value, exact) <= allowed, name
    for name, value, their in list(pairs(ours, theirs))[1:]:
        assert value.dtype == their.dtype, name
        assert value.shape == their.shape, name


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
    head = make_head((300, 16, 999), torch.float32)
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64)
    ours = outcome(crosscut.linear_cross_entropy, head)
    theirs = outcome(F.linear_cross_entropy, head, options=chunks)
    for value, their in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(value, their)
