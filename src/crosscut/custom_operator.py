"""PyTorch custom operators that leave its compiler alone until someone uses it.

:func:`torch.library.custom_op` imports ``torch._dynamo`` at an operator's first call, so that the
compiler never looks into the operator's Python code. That import takes seconds where files are
slow, and most trainings have no use for it. Here it is only made sure where the compiler is there:
all it may ever see is the few lines that do so.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def custom_operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function on tensors the operator ``name``, ``"namespace::operator"``.

    It returns new tensors, changes none of its arguments, and its annotations are its schema.
    ``torch.library.register_fake`` and ``torch.library.register_autograd`` take it from there.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        untraced: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            if not untraced and "torch._dynamo" in sys.modules:
                untraced.append(torch.compiler.disable(function))
            return (untraced[0] if untraced else function)(*arguments)

        namespace, operator = name.split("::")
        if not hasattr(getattr(torch.ops, namespace), operator):  # else this module is reloaded
            schema = torch.library.infer_schema(function, mutates_args=())
            torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", run)
        return getattr(getattr(torch.ops, namespace), operator).default

    return register
