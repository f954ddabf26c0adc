"""One line for any Hugging Face model: ``model = crosscut.defer_logits(model)``.

Only the output head changes: its class is swapped for :class:`DeferredLinear`, with the same
parameters and the same state dict. Model files, forwards and losses stay transformers' own; what
they do to the logits is recorded, and the loss at the end is crosscut's.

This file alone knows of transformers' and PEFT's models: that ``get_output_embeddings`` finds the
head, and that a replaced head, or an adapter around it, holds linear layers of as many outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from crosscut.integrations import trl
from crosscut.integrations.deferred import DeferredLogits, Undecided
from crosscut.integrations.head import (
    DEFAULT_MIN_NUMEL,
    DeferredLinear,
    defer_linear,
    eager_logits,
    undefer_linear,
)
from crosscut.integrations.report import (
    HeadLog,
    HeadReport,
    HeadSettings,
    LogitsMaterializedError,
    LogitsMaterializedWarning,
    Materialization,
    OnMaterialize,
    describe,
)
from crosscut.integrations.trl import patch_trl, unpatch_trl
from crosscut.options import GradientPolicy, HeadOptions

__all__ = [
    "DeferredLinear",
    "DeferredLogits",
    "HeadNotDeferredWarning",
    "HeadReport",
    "LogitsMaterializedError",
    "LogitsMaterializedWarning",
    "Materialization",
    "defer_logits",
    "eager_logits",
    "explain",
    "is_deferred",
    "materialize",
    "patch_trl",
    "undefer_logits",
    "unpatch_trl",
]

Model = TypeVar("Model", bound=nn.Module)

_TESTED = "5.24"
"""The transformers release that the coverage table was made with."""


def defer_logits(
    model: Model,
    *,
    on_materialize: OnMaterialize = "warn",
    min_numel: int = DEFAULT_MIN_NUMEL,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> Model:
    """Train a Hugging Face model through crosscut; ``outputs.logits`` is still there.

    The head returns :class:`DeferredLogits`: tensors of the logits' shape, dtype and device that
    are computed when someone looks at them. The losses of transformers, ``F.cross_entropy`` and
    its kin do not look. Call it before or after ``get_peft_model`` or
    ``resize_token_embeddings``; under ``torch.compile``, after them.

    Args:
        model: a model with ``get_output_embeddings``, or what PEFT, DDP or ``torch.compile`` made
            of one. It is changed in place. For others, see :class:`DeferredLinear`.
        on_materialize: what to do when logits are computed where a gradient could be asked of
            them: ``"warn"`` once, be ``"silent"``, or raise (``"error"``).
        min_numel: fewest logits that are deferred; a head with less to compute returns real ones.
        policy: how much of the softmax the gradient computes. See
            :data:`crosscut.GradientPolicy`.
        backend: what computes the losses. See :func:`crosscut.explain`.

    Returns:
        ``model`` itself.

    Warns:
        HeadNotDeferredWarning: the head is no plain linear layer but a quantised one, say; or, in
            training, nothing ever calls it. It is left as it is.

    Raises:
        TypeError: model has no output head, or the type of an option does not fit.
        ValueError: an option does not fit.
    """
    base = _base_model(model)
    settings = HeadSettings(on_materialize, min_numel, HeadOptions(policy=policy, backend=backend))
    undefer_logits(model)
    head = _head_of(base)
    if head is None:
        raise TypeError(
            f"{type(base).__name__} has no output head: get_output_embeddings() gives None. Use "
            "crosscut.integrations.huggingface.DeferredLinear in the model itself, or "
            "crosscut.linear_cross_entropy"
        )
    keeper = _KeepDeferred(base, settings)
    if not _defer_heads(base, settings):
        keeper.warned = True
        warnings.warn(
            f"{type(base).__name__}'s output head is no torch.nn.Linear but a {_type(head)}: it "
            "computes its logits, and crosscut has no part in the loss",
            HeadNotDeferredWarning,
            stacklevel=2,
        )
    # PEFT calls the model's forward and not the model, but the model always calls its body.
    for module in {id(m): m for m in (base, _body_of(base))}.values():
        module.register_forward_pre_hook(keeper)
    return model


def undefer_logits(model: Model) -> Model:
    """Undo :func:`defer_logits`.

    Args:
        model: what :func:`defer_logits` was given, or a copy of it; it need not be deferred.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: model is no module.
    """
    base = _base_model(model)
    for module in base.modules():
        undefer_linear(module)
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _KeepDeferred)]:
            del hooks[key]
    return model


def is_deferred(thing: nn.Module | Tensor) -> bool:
    """Whether a model's head defers its logits, or whether logits were not computed yet."""
    if isinstance(thing, nn.Module):
        return any(isinstance(module, DeferredLinear) for module in thing.modules())
    if isinstance(thing, DeferredLogits):
        return thing._real is None
    return isinstance(thing, Undecided)


def materialize(outputs: Any) -> Any:
    """``outputs`` with real logits in place of deferred ones, wherever they are in it.

    Args:
        outputs: logits, a model's output, or any nest of tuples, lists and dictionaries. It is
            not changed.

    Raises:
        RuntimeError: the weights were modified since the logits' forward.
    """

    def real(value: Any) -> Any:
        if isinstance(value, Undecided):
            if torch.compiler.is_compiling():
                return value.real_tensor()
            value = value.deferred()
        return value._dense("") if isinstance(value, DeferredLogits) else value

    return tree_map(real, outputs)


def explain(model: nn.Module) -> list[HeadReport]:
    """What the heads of a model did since :func:`defer_logits`: print the list's items.

    Each says how many calls were deferred, which losses were fused, and which logits were
    computed: how often, by what, and from which line of whose code.
    """
    base = _base_model(model)
    found: dict[int, HeadReport] = {}
    for name, module in base.named_modules():
        if isinstance(module, DeferredLinear):
            log = module.deferral.log
            found.setdefault(id(log), HeadReport(name, describe(module), log))
    if not found:
        return [HeadReport(type(base).__name__, "not deferred", HeadLog())]
    return list(found.values())


class HeadNotDeferredWarning(UserWarning):
    """Losses are not computed by crosscut, though :func:`defer_logits` was called."""


class _KeepDeferred:
    """Before each forward: defers a head that was replaced since, by PEFT or by a resize."""

    def __init__(self, model: nn.Module, settings: HeadSettings) -> None:
        self.model = model
        self.settings = settings
        self.forwards = 0
        self.warned = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _defer_heads(self.model, self.settings)
            if module.training and torch.is_grad_enabled() and module is _body_of(self.model):
                self.forwards += 1
                if self.forwards == 3 and not self.warned:
                    self._check_calls()

    def _check_calls(self) -> None:
        """Warn if two forwards did without the layers that defer."""
        if not self.settings.log.was_called() and not trl.is_patched():
            warnings.warn(
                f"{type(self.model).__name__} was trained, and the linear layers of its output "
                f"head, a {_type(_head_of(self.model))}, were never called: crosscut has "
                "no part in the loss. TRL's trainers read the head's weight instead: call "
                "crosscut.patch_trl(). An adapter may compute the logits in its own way",
                HeadNotDeferredWarning,
                stacklevel=4,
            )


def _type(module: nn.Module | None) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _defer_heads(model: nn.Module, settings: HeadSettings) -> int:
    """Defer every linear layer of the output head; returns how many."""
    layers = list(_head_layers(_head_of(model)))
    widest = max((layer.in_features for layer in layers), default=0)
    return sum(
        defer_linear(layer, settings, counted=layer.in_features == widest) for layer in layers
    )


def _head_layers(head: nn.Module | None) -> Iterator[nn.Linear]:
    """The layers that make logits: the head itself, or those inside of an adapter around it."""
    if isinstance(head, nn.Linear):
        yield head
    elif head is not None:
        linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
        num_classes = max((layer.out_features for layer in linear), default=0)
        yield from (layer for layer in linear if layer.out_features == num_classes)


def _head_of(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    if find is None:
        raise TypeError(
            f"model must have get_output_embeddings, as models of transformers (tested: {_TESTED})"
            f" do; {type(model).__name__} does not. For a model written by hand use "
            "crosscut.integrations.huggingface.DeferredLinear as its head"
        )
    return find()


def _body_of(model: nn.Module) -> nn.Module:
    """The part that makes hidden states; the model itself where transformers names none."""
    body = getattr(model, "base_model", model)
    return body if isinstance(body, nn.Module) else model


def _base_model(model: nn.Module) -> nn.Module:
    """What DDP, torch.compile and PEFT were put around."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # pyright: ignore[reportCallIssue]
        else:
            return model
