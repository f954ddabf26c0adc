"""A head in float64 that defers its logits, the same head that does not, and labels for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosscut.integrations.huggingface import DeferredLinear

B, T, D, V = 2, 6, 5, 11
Program = Callable[[Tensor], Tensor]

gen = torch.Generator().manual_seed(3)
IDS = torch.randint(V, (B, T), generator=gen)
LABELS = IDS.clone()
LABELS[0, :2] = -100
FLAT = LABELS.reshape(-1)
CLASS_WEIGHT = torch.rand(V, generator=gen, dtype=torch.float64)
BIAS = torch.randn(V, generator=gen, dtype=torch.float64)
MASK = torch.rand(B, T, generator=gen) < 0.6


def head(*, bias: bool = True, deferred: bool = True, **options: Any) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(D, V, bias=bias, dtype=torch.float64)
    if not deferred:
        return made
    options = {"min_numel": 0, "on_materialize": "silent", **options}
    layer = DeferredLinear(D, V, bias=bias, dtype=torch.float64, **options)
    layer.load_state_dict(made.state_dict())
    return layer


def hidden_states() -> Tensor:
    values = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (2 * values).requires_grad_()


def ce(logits: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, V), FLAT, **options)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return args[0] * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0] * 2
