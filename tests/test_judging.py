"""What the other tests are judged by: it lets pass what PyTorch could be, and nothing worse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import reference
from support.judging import Head, LossFn, error, judge, make_head, outcome, redrawn, truth
from torch import Tensor


def lucky_head() -> Head:
    """Of few bits: PyTorch's logits are exact, in this order and unit alone."""
    head = make_head((30, 16, 200), torch.bfloat16)
    return replace(
        head,
        input=(2 * head.input).round().clamp(-3, 3),
        linear_weight=(4 * head.linear_weight).round() / 8,
    )


def drawn(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """What PyTorch computes in another unit: no better and no worse."""
    return reference.linear_cross_entropy(*redrawn(input, weight, 99), target, **options)


def in_eight_bits(input: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Of hidden states that have been rounded to four bits."""
    off = input.detach().to(torch.float8_e4m3fn).to(input.dtype) - input.detach()
    return reference.linear_cross_entropy(input + off, weight, target, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_luck_of_pytorch_is_not_asked_for(reduction):
    head = lucky_head()
    judge(drawn, reference.linear_cross_entropy, head, reduction=reduction)
    exact = outcome(reference.linear_cross_entropy, head, reduction=reduction).loss
    true = truth(head, reduction=reduction).loss
    assert error(exact, true) < 2**-20  # in this unit, as if it were no bfloat16


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_rounds_more_is_refused(dtype, reduction):
    head = make_head((30, 16, 200), dtype)
    judge(drawn, reference.linear_cross_entropy, head, reduction=reduction)
    with pytest.raises(AssertionError, match=r"^(loss|d_input): error .* allowed"):
        judge(in_eight_bits, reference.linear_cross_entropy, head, reduction=reduction)


def without(which: int, rows: Tensor) -> LossFn:
    """PyTorch's loss, but rows of the gradient of input (0) or weight (1) are zero."""

    def loss(*tensors: Tensor, **options: Any) -> Tensor:
        leaves = list(tensors[:2])
        found = leaves[which].clone()
        found[rows] = leaves[which][rows].detach()
        leaves[which] = found
        return reference.linear_cross_entropy(leaves[0], leaves[1], tensors[2], **options)

    return loss


@pytest.mark.parametrize("which", [0, 1], ids=["d_input", "d_weight"])
def test_every_row_counts(which):
    """Also the smallest: of a class, of which the norm of all does not show that it is missing."""
    head = make_head((33, 17, 201), torch.bfloat16)
    gradient = outcome(reference.linear_cross_entropy, head)[1 + which]
    for row in gradient.double().norm(dim=1).topk(3, largest=False).indices:
        with pytest.raises(AssertionError, match=f"row {row}: " if which else "^d_input: "):
            judge(without(which, row), reference.linear_cross_entropy, head)


@pytest.mark.parametrize("count", [3, 23])
def test_rows_that_are_zero_are_missed(count):
    """Of 201 in bfloat16: the three smallest are within what the norm of all lets pass."""
    head = make_head((33, 17, 201), torch.bfloat16)
    gradient = outcome(reference.linear_cross_entropy, head).d_weight
    call = without(1, gradient.double().norm(dim=1).topk(count, largest=False).indices)
    with pytest.raises(AssertionError, match="d_weight: "):
        judge(call, reference.linear_cross_entropy, head)
    if count == 3:
        judge(call, reference.linear_cross_entropy, head, by_row=False)
