"""What happened to deferred logits: which losses were fused, and who asked for the logits."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

from crosscut.options import HeadOptions, check_integer

OnMaterialize = Literal["warn", "silent", "error"]


class Materialization(NamedTuple):
    """Logits that were computed, and for whom.

    Attributes:
        what: the function that needed them.
        where: ``file:line in function``, the innermost frame outside of PyTorch and crosscut.
        shape: of the logits.
        under_grad: whether a gradient could have been asked of them.
    """

    what: str
    where: str
    shape: tuple[int, ...]
    under_grad: bool


class LogitsMaterializedWarning(UserWarning):
    """Logits were computed in training, so the memory that crosscut saves was used after all."""


class LogitsMaterializedError(RuntimeError):
    """Logits were computed in training, under ``on_materialize="error"``."""


@dataclass
class HeadLog:
    """Counts of one head: calls of it, losses fused, logits materialised."""

    deferred: int = 0
    real: Counter[str] = field(default_factory=Counter)
    fused: Counter[str] = field(default_factory=Counter)
    materialized: Counter[Materialization] = field(default_factory=Counter)
    warned: bool = False


@dataclass
class HeadSettings:
    """How a head defers. All linear layers of one head share one record.

    Attributes:
        on_materialize: what to do when logits are computed under grad.
        min_numel: fewest logits that are deferred.
        options: policy and backend of the losses.
        log: what happened.
    """

    on_materialize: OnMaterialize = "warn"
    min_numel: int = 2**22
    options: HeadOptions = field(default_factory=HeadOptions)
    log: HeadLog = field(default_factory=HeadLog)

    def __post_init__(self) -> None:
        choices = get_args(OnMaterialize)
        if self.on_materialize not in choices:
            raise ValueError(
                f"on_materialize must be one of {', '.join(map(repr, choices))}, "
                f"got {self.on_materialize!r}"
            )
        check_integer("min_numel", self.min_numel)

    def note_materialized(self, what: str, shape: torch.Size, *, under_grad: bool) -> None:
        """Record that logits are about to be computed; warn or raise as the user chose."""
        file, line, function = _caller()
        event = Materialization(what, f"{file}:{line} in {function}", tuple(shape), under_grad)
        self.log.materialized[event] += 1
        if not under_grad or self.on_materialize == "silent":
            return
        message = (
            f"{what} at {event.where} needs the logits: {list(shape)} of them are computed, and "
            "take the memory that deferring them saves. on_materialize='error' stops at the first "
            "such place, crosscut.integrations.huggingface.explain(model) lists all"
        )
        if self.on_materialize == "error":
            raise LogitsMaterializedError(message)
        if not self.log.warned:
            self.log.warned = True
            warnings.warn_explicit(message, LogitsMaterializedWarning, file, line)


_NOT_THE_CALLER = (str(Path(str(torch.__file__)).parent), str(Path(__file__).parents[1]))


def _caller() -> tuple[str, int, str]:
    """File, line and function of the innermost frame that is neither PyTorch's nor crosscut's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


class HeadReport(NamedTuple):
    """What one head did. ``print`` it.

    Attributes:
        name: of the head in the model.
        head: the head's class and sizes; or why it is not deferred.
        log: the counts.
    """

    name: str
    head: str
    log: HeadLog

    def __str__(self) -> str:
        log = self.log
        lines = [f"{self.name}: {self.head}", f"  {log.deferred} calls deferred"]
        lines += [f"  {count} calls not deferred: {why}" for why, count in log.real.most_common()]
        lines += [f"  {count} fused: {what}" for what, count in log.fused.most_common()]
        lines += [
            f"  {count} materialised: {event.what} of {list(event.shape)}"
            f"{' under grad' if event.under_grad else ''}, at {event.where}"
            for event, count in log.materialized.most_common()
        ]
        return "\n".join(lines)


def describe(head: nn.Module) -> str:
    """A linear layer in a few words."""
    sizes = [f"{k}={getattr(head, k)}" for k in ("in_features", "out_features") if hasattr(head, k)]
    return f"{type(head).__name__}({', '.join(sizes)})"
