"""What deferred logits know of FSDP, ``FullyShardedDataParallel`` and ``fully_shard``.

A sharded module puts a hook on each of its outputs: when the gradient of one comes, it gathers its
weights again. The gradient of deferred logits never comes, so the hook moves to the loss. And
where the head's weight was freed after its forward, it is gathered around the loss. Gathering is
collective: every rank must compute the loss, or read the logits.

DeepSpeed puts a hook on each of the model's outputs, whatever its ZeRO stage: a note that the
backward begins, and a scale for gradients. It moves as well. Under ZeRO-3 weights are there in the
module's own forward alone, so the head computes its logits.

This file alone knows of the insides of FSDP, those of PyTorch 2.9 to 2.13, and of DeepSpeed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Hook = Callable[[Tensor], Any]


def is_hook(hook: Any) -> bool:
    """Whether this is the hook that FSDP or DeepSpeed puts on a module's outputs."""
    if isinstance(hook, functools.partial):  # of FullyShardedDataParallel
        name, module = hook.func.__name__, hook.func.__module__
        return name == "_pre_backward_hook" and module.startswith("torch.distributed.fsdp")
    if (getattr(hook, "__module__", None) or "").startswith("deepspeed."):
        return hook.__qualname__.startswith("OutputBackwardHookManager.")
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState" and (
        hook.__name__ == "_pre_backward"
    )


class MovedHook(NamedTuple):
    """What ``register_hook`` returns for a hook that moves.

    Attributes:
        hooks: those that move.
        hook: this one.
    """

    hooks: list[Hook]
    hook: Hook

    def remove(self) -> None:
        """Move it no more."""
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


def is_partitioned(weight: Tensor) -> bool:
    """Whether it is a parameter of DeepSpeed ZeRO-3."""
    return isinstance(weight, Tensor) and hasattr(weight, "ds_id") and hasattr(weight, "ds_status")


def keeps(weight: Tensor) -> bool:
    """Whether a weight without a gradient is still there after the forward, as far as is known.

    ``FullyShardedDataParallel`` frees it, and leaves no hook by which to gather it again.
    """
    return isinstance(weight, nn.Parameter) and not getattr(weight, "_fsdp_flattened", False)


def watch(hooks: list[Hook], result: Tensor) -> None:
    """Put the hooks on a result that stands for the logits."""
    if result.requires_grad:
        for hook in hooks:
            result.register_hook(hook)


@contextlib.contextmanager
def unsharded(tensors: Iterable[Tensor | None], hooks: list[Hook]) -> Iterator[None]:
    """Gather those of the tensors that FSDP freed since the forward; free them again after.

    Args:
        tensors: what is about to be read.
        hooks: those that FSDP put on the logits.
    """
    freed = [x for x in tensors if x is not None and x.numel() and _is_freed(x)]
    grad_enabled = torch.is_grad_enabled()
    with torch.no_grad(), contextlib.ExitStack() as gathered:
        units = [hook.args for hook in hooks if freed and isinstance(hook, functools.partial)]
        for state, _, handle in units:
            gathered.enter_context(_unsharded_handle(state, handle))
        for group in _groups_of(freed) if freed and not units else []:
            group.unshard()
            group.wait_for_unshard()
            gathered.callback(group.reshard)
        with torch.set_grad_enabled(grad_enabled):
            yield


def _is_freed(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.untyped_storage().size()


@contextlib.contextmanager
def _unsharded_handle(state: Any, handle: Any) -> Iterator[None]:
    """Gather the weights of a unit of ``FullyShardedDataParallel``, unless they are there."""
    if handle is None or not handle.needs_unshard():
        yield
        return
    try:
        from torch.distributed.fsdp._runtime_utils import _reshard, _unshard

        _unshard(state, handle, state._unshard_stream, state._pre_unshard_stream)
        state._device_handle.current_stream().wait_stream(state._unshard_stream)
    except (ImportError, AttributeError) as changed:
        raise RuntimeError(_CHANGED) from changed
    yield
    _reshard(state, handle, True)


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
        raise RuntimeError(_CHANGED) from changed


_CHANGED = (
    f"PyTorch {torch.__version__} keeps FSDP's weights in another way than the versions 2.9 to "
    "2.13 that crosscut knows: compute the loss inside of the sharded model, or use "
    "crosscut.integrations.huggingface.eager_logits()"
)
