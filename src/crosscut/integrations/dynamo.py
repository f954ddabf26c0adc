"""What a graph that is being compiled says of itself; dynamo runs these functions as it traces.

This file alone knows of dynamo's insides, those of PyTorch 2.9 to 2.13. Importing it imports
dynamo, which takes seconds: only code that is being compiled does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch._dynamo.eval_frame import skip_code
from torch._guards import TracingContext

from crosscut.integrations.report import Materialization, is_caller, settings_of


@torch.compiler.assume_constant_result
def note_fused(key: str, what: str) -> None:
    """Record that the graph fuses a loss."""
    settings_of(key).log.compiled.add(what)


@torch.compiler.assume_constant_result
def note_materialized(key: str, what: str, shape: tuple[int, ...], under_grad: bool) -> str | None:
    """Record that the graph makes logits; returns what to raise."""
    settings = settings_of(key)
    where = "a compiled graph:0 in ?"
    for frame in reversed(TracingContext.extract_stack()):
        if is_caller(frame.filename):
            where = f"{frame.filename}:{frame.lineno} in {frame.name}"
            break
    event = Materialization(what, where, shape, under_grad)
    settings.log.materialized[event] = 1
    return settings.complain(event)


@torch.compiler.assume_constant_result
def swapped_operator() -> str:
    """The Python operator (``isub``) whose operands dynamo swapped, or an empty string.

    To ``__torch_function__`` it gives ``logits - tensor`` and ``logits -= tensor`` both as
    ``tensor.__rsub__(logits)``, and ``logits @ tensor`` as ``tensor @ logits``.
    """
    for frame in _frames():
        if frame.f_code.co_name == "dispatch_torch_function":
            caller = frame.f_back
            if caller is not None and caller.f_code.co_name == "_handle_insert_op_in_graph":
                swapped = "tmp" in caller.f_locals
                return caller.f_locals["self"].fn.__name__ if swapped else ""
            return ""
    return ""


@torch.compiler.assume_constant_result
def in_autograd_function() -> bool:
    """Whether the code is the forward of an ``autograd.Function``.

    It would be differentiated, and the function's own backward left out: neither autograd nor
    dynamo sees a tensor in the logits of a compiled graph.
    """
    return any(
        frame.f_code in _APPLY or frame.f_code.co_name == "call_apply" for frame in _frames()
    )


_APPLY = (torch.autograd.Function.apply.__func__.__code__,)  # pyright: ignore


def only_inside(*functions: Any) -> None:
    """Trace calls of these where a graph makes them; never begin a graph with one."""
    for function in functions:
        skip_code(function.__code__)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
