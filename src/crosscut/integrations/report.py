"""What happened to deferred logits: which losses were fused, and who asked for the logits."""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from crosscut import backends
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
    """Counts of one head: calls of it, losses fused, logits materialised.

    A compiled graph runs without a word, so only what is in it is known: ``compiled`` are the
    losses that graphs fuse; logits that a graph computes count once, with -1 for sizes that are
    the graph's to choose.
    """

    deferred: int = 0
    real: Counter[str] = field(default_factory=Counter)
    fused: Counter[str] = field(default_factory=Counter)
    compiled: set[str] = field(default_factory=set)
    materialized: Counter[Materialization] = field(default_factory=Counter)
    warned: bool = False

    def was_called(self) -> bool:
        """Whether anything happened at all."""
        return bool(self.deferred or self.real or self.compiled or self.materialized)


_numbers = itertools.count()
_settings: weakref.WeakValueDictionary[str, HeadSettings] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class HeadSettings:
    """How a head defers. All linear layers of one head share one record.

    Attributes:
        on_materialize: what to do when logits are computed under grad.
        min_numel: fewest logits that are deferred.
        options: policy and backend of the losses.
        log: what happened.
        key: by which a compiled graph finds these settings.
    """

    on_materialize: OnMaterialize = "warn"
    min_numel: int = 2**24
    options: HeadOptions = field(default_factory=HeadOptions)
    log: HeadLog = field(default_factory=HeadLog)
    key: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._register()
        choices = get_args(OnMaterialize)
        if self.on_materialize not in choices:
            raise ValueError(
                f"on_materialize must be one of {', '.join(map(repr, choices))}, "
                f"got {self.on_materialize!r}"
            )
        if check_integer("min_numel", self.min_numel) < 0:
            raise ValueError(f"min_numel must be >= 0, got {self.min_numel}")
        backends.check_name(self.options.backend)

    def note_materialized(self, what: str, shape: torch.Size, *, under_grad: bool) -> None:
        """Record that logits are about to be computed; warn or raise as the user chose."""
        event = Materialization(what, _caller(), tuple(shape), under_grad)
        self.log.materialized[event] += 1
        problem = self.complain(event)
        if problem is not None:
            raise LogitsMaterializedError(problem)

    def complain(self, event: Materialization) -> str | None:
        """Warn of logits that are computed as the user chose; what to raise, or None."""
        if not event.under_grad or self.on_materialize == "silent":
            return None
        message = (
            f"{event.what} at {event.where} needs the logits: {list(event.shape)} of them are "
            "computed, and take the memory that deferring them saves. on_materialize='error' stops "
            "at the first such place, crosscut.integrations.huggingface.explain(model) lists all"
        )
        if self.on_materialize == "error":
            return message
        if not self.log.warned:
            self.log.warned = True
            file, _, line = event.where.partition(" in ")[0].rpartition(":")
            warnings.warn_explicit(message, LogitsMaterializedWarning, file, int(line))
        return None

    def _register(self) -> None:
        self.key = f"head {next(_numbers)}"
        _settings[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy counts for itself
        self.__dict__.update(state)
        self._register()


def settings_of(key: str) -> HeadSettings:
    """The settings with this key."""
    return _settings[key]


_NOT_THE_CALLER = (str(Path(str(torch.__file__)).parent), str(Path(__file__).parents[1]))


def is_caller(file: str) -> bool:
    """Whether a file is neither PyTorch's nor crosscut's."""
    return not file.startswith(_NOT_THE_CALLER)


def _caller() -> str:
    """``file:line in function``: the innermost frame of neither."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_caller(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


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
        lines = [f"{self.name}: {self.head}", f"  {_calls(log.deferred)} deferred"]
        lines += [f"  {_calls(n)} not deferred: {why}" for why, n in log.real.most_common()]
        lines += [f"  in compiled graphs, fused: {what}" for what in sorted(log.compiled)]
        lines += [f"  {count} fused: {what}" for what, count in log.fused.most_common()]
        lines += [
            f"  {count} materialised: {event.what} of {list(event.shape)}"
            f"{' under grad' if event.under_grad else ''}, at {event.where}"
            for event, count in log.materialized.most_common()
        ]
        return "\n".join(lines)


def _calls(count: int) -> str:
    return f"{count} call{'' if count == 1 else 's'}"


def describe(head: nn.Module) -> str:
    """A linear layer in a few words."""
    sizes = [f"{k}={getattr(head, k)}" for k in ("in_features", "out_features") if hasattr(head, k)]
    return f"{type(head).__name__}({', '.join(sizes)})"
