"""What deferred logits know of FSDP2 (``torch.distributed.fsdp.fully_shard``).

A sharded module puts a hook on each of its outputs: when the gradient of one comes, it gathers its
weights again. The gradient of deferred logits never comes, so the hook moves to the loss. And
where a module's weights were freed after its forward, they are gathered around the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def is_hook(hook: Any) -> bool:
    """Whether this is the hook that FSDP2 puts on a module's outputs."""
    state = getattr(hook, "__self__", None)
    return hasattr(state, "_fsdp_param_groups") and hook.__name__ == "_pre_backward"


def watch(hooks: list[Callable[[Tensor], Any]], result: Tensor) -> None:
    """Put the hooks on a result that stands for the logits."""
    if result.requires_grad:
        for hook in hooks:
            result.register_hook(hook)


@contextlib.contextmanager
def unsharded(hooks: list[Callable[[Tensor], Any]]) -> Iterator[None]:
    """Gather the weights that were freed since the forward; free them again after."""
    freed = [
        group
        for hook in hooks
        for group in hook.__self__._fsdp_param_groups  # pyright: ignore[reportFunctionMemberAccess]
        if not group.is_unsharded
    ]
    for group in freed:
        with torch.no_grad():
            group.unshard()
            group.wait_for_unshard()
    try:
        yield
    finally:
        for group in freed:
            group.reshard()
