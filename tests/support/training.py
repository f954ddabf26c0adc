"""What training did to a model, beside what it does to it in float64."""

from __future__ import annotations

from typing import Any

import torch

from support.judging import FACTOR, error, rounding
from support.tiny_models import tiny


def assert_as_good(ours: Any, theirs: Any, exact: Any, dtype: torch.dtype = torch.float32) -> None:
    """What training did to the weights, beside what it does to them in float64."""
    start, truth = dict(tiny().named_parameters()), dict(exact.named_parameters())
    for (name, mine), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        moved = truth[name].detach() - start[name].detach()
        assert moved.norm() > 0, name
        own, their = ((x.detach() - start[name].detach()) for x in (mine, other))
        # A weight is rounded to its dtype at each step, whatever the update.
        steps = 4 * rounding(mine.dtype) * start[name].norm() / moved.norm()
        allowed = FACTOR * error(their, moved) + rounding(dtype) + steps
        assert error(own, moved) <= allowed, name


def assert_losses(ours: Any, theirs: Any, exact: Any, dtype: torch.dtype = torch.float32) -> None:
    mine, other, true = (
        torch.tensor([e["loss"] for e in trainer.state.log_history if "loss" in e])
        for trainer in (ours, theirs, exact)
    )
    assert len(true) == 3
    assert error(mine, true) <= FACTOR * error(other, true) + rounding(dtype)
