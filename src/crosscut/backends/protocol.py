"""What a backend is given, and what it must answer.

A backend computes per-token statistics of a linear head and their gradients; it knows nothing of
losses, reductions or batch shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from crosscut.options import HeadOptions


@dataclass(frozen=True, kw_only=True)
class HeadProblem:
    """One call: N tokens, hidden size D, V classes.

    Attributes:
        hidden: [N, D], any float dtype.
        classifier: [V, D], the same dtype.
        bias: [V] of the same dtype, or None.
        labels: [N] int64; a class, or -1 for a row that takes no part.
        logit_weight: [V], the weights of the logit sum; None if no one wants it.
        options: how the logits are made and the gradient may be computed.
    """

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    labels: Tensor
    logit_weight: Tensor | None
    options: HeadOptions

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Dtype of every statistic: float32, or float64 for float64 inputs."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


class Statistics(NamedTuple):
    """What a forward returns. [N] vectors are 0 at rows that take no part.

    The last two say what the backward may leave out; they are empty where it computes everything.
    What they hold is the backend's own business.
    """

    lse: Tensor  # [N]
    target_logit: Tensor  # [N]
    logit_sum: Tensor  # [N], or [0] without logit_weight
    column_mass: Tensor  # [filter blocks, V] or [0, V]
    tail_mass: Tensor  # [N] or [0]


class Cotangents(NamedTuple):
    """Gradients of the statistics, [N] each; ``logit_sum`` is None without logit_weight."""

    lse: Tensor
    target_logit: Tensor
    logit_sum: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    classifier: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients in the inputs' dtypes; None where not wanted."""

    hidden: Tensor | None
    classifier: Tensor | None
    bias: Tensor | None


class Backend(Protocol):
    """A way to compute the statistics of a head and their gradients."""

    name: str

    def why_not(self, problem: HeadProblem) -> str | None:
        """Why this backend cannot serve the problem, or None if it can.

        Reads shapes, dtypes and devices only, never values.
        """
        ...

    def forward(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        """The statistics; with ``for_backward`` also what the backward will want to know."""
        ...

    def forward_like(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        """Empty tensors of the shapes and dtypes ``forward`` returns."""
        ...

    def backward(
        self, problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
    ) -> Gradients:
        """Gradients of the inputs, given what ``forward(..., for_backward=True)`` returned."""
        ...

    def sparsity(self, problem: HeadProblem, statistics: Statistics) -> tuple[float, float]:
        """Share of the pairs the backward would compute, and mean mass of those it would not."""
        ...
