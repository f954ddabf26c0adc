"""Heads of which a filter leaves much out, and what backends say of heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import crosscut
from crosscut.options import GradientPolicy
from support.judging import Head, make_head

WANTED = 200
"""Classes with a bias of 0; the others have one of UNWANTED."""

UNWANTED = -11.0


def sparse_head(
    batch: int | tuple[int, ...],
    hidden_size: int = 24,
    num_classes: int = 6000,
    *,
    dtype: torch.dtype = torch.float64,
    unwanted: float = UNWANTED,
    ignored: float = 0.0,
) -> Head:
    """A head whose classes from WANTED on have a tiny softmax, structured like the hidden states.

    The hidden states have a common part, as those of real text: the tail then looks alike in
    every token, and a rank-one matrix is a good stand-in.
    """
    head = make_head((batch, hidden_size, num_classes), dtype, bias=True, ignored=ignored)
    assert head.linear_bias is not None
    gen = torch.Generator().manual_seed(1)
    common = 1.5 * torch.randn(hidden_size, generator=gen, dtype=torch.float64).to(dtype)
    bias = torch.full_like(head.linear_bias, unwanted)
    bias[:WANTED] = 0
    target = torch.where(head.target == -100, -100, head.target % WANTED)
    return Head(
        input=head.input * 0.2 + common,
        linear_weight=head.linear_weight * 0.5,
        target=target,
        linear_bias=bias,
    )


def sparsity(head: Head, **options: Any) -> crosscut.GradientSparsity:
    options.setdefault("policy", "filtered")
    return crosscut.gradient_sparsity(
        head.input, head.linear_weight, head.target, linear_bias=head.linear_bias, **options
    )


def skip_if_not_served(backend: str, head: Head, policy: GradientPolicy) -> None:
    """Skip the test if the backend objects to such a call."""
    objection = crosscut.explain(
        head.input, head.linear_weight, head.target, linear_bias=head.linear_bias,
        policy=policy, backend=backend,
    ).verdicts[backend]  # fmt: skip
    if objection:
        pytest.skip(f"{backend}: {objection}")


class RealHead(NamedTuple):
    """The output head of Gemma 3 270M and what goes into it: V=262144, D=640."""

    hidden: Tensor  # [16384, 640] bfloat16: 16 windows of 1024 tokens
    labels: Tensor  # [16384] int64: the token that follows each
    classifier: Tensor  # [262144, 640] bfloat16

    def window(self, index: int, length: int = 1024) -> tuple[Tensor, Tensor]:
        """Hidden states and labels of ``length`` tokens from the first of a window of 1024 on."""
        part = slice(1024 * index, 1024 * index + length)
        return self.hidden[part], self.labels[part]
