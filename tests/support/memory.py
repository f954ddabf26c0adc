"""How much memory a call takes, and heads on which the logits would be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import crosscut
from crosscut.bench.measure import peak_bytes
from support.judging import Head, make_head

CPU = torch.device("cpu")
MIB = 2**20
WORKSPACE = 64 * MIB
"""What a call may hold beyond its inputs and gradients, whatever N and V."""


def most(measured: float) -> float:
    """Bytes that a call may take which was measured to take so many MiB: a fifth more."""
    return 1.2 * measured * MIB


TOKENS, HIDDEN, CLASSES = 1024, 64, 65536
LOGITS = TOKENS * CLASSES
"""Entries of the matrix that is never there: 256 MiB in float32, 128 MiB in bfloat16."""


def head_of(tokens: int, dtype: torch.dtype, classes: int = CLASSES) -> Head:
    return make_head((tokens, HIDDEN, classes), dtype, bias=True, ignored=0.05)


def peak(head: Head, *, backward: bool, loss_fn: Callable[..., Tensor] | None = None,
         **options: Any) -> int:  # fmt: skip
    """Peak bytes of one call beyond its inputs and, with ``backward``, its gradients."""
    loss_fn = loss_fn or crosscut.linear_cross_entropy
    leaves = [
        None if x is None else x.detach().requires_grad_(backward)
        for x in (head.input, head.linear_weight, head.linear_bias)
    ]

    def run() -> None:
        loss = loss_fn(leaves[0], leaves[1], head.target, linear_bias=leaves[2], **options)
        if backward:
            loss.backward()

    found = peak_bytes(run, CPU)
    return found - sum(x.grad.nbytes for x in leaves if x is not None and x.grad is not None)
