"""What deferred logits know of FSDP2 (``torch.distributed.fsdp.fully_shard``).

A sharded module puts a hook on each of its outputs: when the gradient of one comes, it gathers its
weights again. The gradient of deferred logits never comes, so the hook moves to the loss. And
where the head's weight was freed after its forward, it is gathered around the loss. Gathering is
collective: every rank must compute the loss, or read the logits.

This file alone knows of FSDP2's insides, those of PyTorch 2.9 to 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def is_hook(hook: Any) -> bool:
    """Whether this is the hook that FSDP2 puts on a module's outputs."""
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState" and (
        hook.__name__ == "_pre_backward"
    )


def watch(hooks: list[Callable[[Tensor], Any]], result: Tensor) -> None:
    """Put the hooks on a result that stands for the logits."""
    if result.requires_grad:
        for hook in hooks:
            result.register_hook(hook)


@contextlib.contextmanager
def unsharded(tensors: Iterable[Tensor | None]) -> Iterator[None]:
    """Gather those of the tensors that FSDP2 freed since the forward; free them again after."""
    freed = [x for x in tensors if x is not None and x.numel() and _is_freed(x)]
    groups = _groups_of(freed) if freed else []
    with torch.no_grad():
        for group in groups:
            group.unshard()
            group.wait_for_unshard()
    try:
        yield
    finally:
        with torch.no_grad():
            for group in groups:
                group.reshard()


def _is_freed(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.untyped_storage().size()


def _groups_of(tensors: list[Tensor]) -> list[Any]:
    """The parameter groups that own the tensors' memory."""
    try:
        from torch.distributed._composable_state import _module_state_mapping as states

        groups = {
            id(group): group
            for reference in list(states.values())
            for group in getattr(reference(), "_fsdp_param_groups", ())
        }
        wanted = {x.untyped_storage()._cdata for x in tensors}
        return [
            group
            for group in groups.values()
            if any(
                hasattr(one, "_unsharded_param")
                and one._unsharded_param.untyped_storage()._cdata in wanted
                for one in group.fsdp_params
            )
        ]
    except (ImportError, AttributeError) as changed:
        raise RuntimeError(
            f"PyTorch {torch.__version__} keeps FSDP2's weights in another way than the versions "
            "2.9 to 2.13 that crosscut knows: compute the loss inside of the sharded model, or use "
            "crosscut.integrations.huggingface.eager_logits()"
        ) from changed
