"""``DeferredLinear``: an output head that returns deferred logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosscut.integrations import fsdp
from crosscut.integrations.deferred import defer
from crosscut.integrations.form import LogitForm, Term
from crosscut.integrations.report import HeadSettings, OnMaterialize
from crosscut.options import GradientPolicy, HeadOptions

DEFAULT_MIN_NUMEL = 2**24
"""Fewest logits worth deferring: 64 MiB of them in float32."""

_eager = 0
"""How many :func:`eager_logits` are open."""


@contextlib.contextmanager
def eager_logits() -> Iterator[None]:
    """Within it every head returns real logits, as if it were not deferred."""
    global _eager
    _eager += 1
    try:
        yield
    finally:
        _eager -= 1


class DeferredLinear(nn.Linear):
    """A linear output head whose logits are computed only if someone looks at them.

    For models written by hand, in place of the head's :class:`torch.nn.Linear`: parameters and
    state dict are the same. ``forward`` takes hidden states ``[..., D]`` and returns logits
    ``[..., V]`` of the usual dtype, of type :class:`~.deferred.DeferredLogits`: a loss made of
    them (``F.cross_entropy`` and its kin) is computed by crosscut; anything else computes them.

    Args:
        in_features: the hidden size D.
        out_features: the number of classes V.
        bias: as in :class:`torch.nn.Linear`, as are ``device`` and ``dtype``.
        on_materialize: what to do when logits are computed under grad: ``"warn"`` once, be
            ``"silent"``, or raise (``"error"``).
        min_numel: fewest logits ``numel(hidden) / D * V`` that are deferred.
        policy: see :data:`crosscut.GradientPolicy`.
        backend: see :func:`crosscut.explain`.

    Raises:
        ValueError: an option does not fit.
        TypeError: the type of an option does not fit.
    """

    deferral: HeadSettings
    counted: bool = True
    """Whether a call of it is a call of the head; not so where an adapter adds to the head's."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        on_materialize: OnMaterialize = "warn",
        min_numel: int = DEFAULT_MIN_NUMEL,
        policy: GradientPolicy = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.deferral = HeadSettings(
            on_materialize, min_numel, HeadOptions(policy=policy, backend=backend)
        )

    def forward(self, input: Tensor) -> Tensor:
        """Deferred logits ``[..., V]`` of hidden states ``[..., D]``."""
        settings, weight, bias = self.deferral, self.weight, self.bias
        if torch.compiler.is_compiling():
            if (
                reason_not_to_defer(input, weight, bias, settings) is not None
                or not torch.is_grad_enabled()
            ):
                return F.linear(input, weight, bias)
            from crosscut.integrations.traced import TracedLogits  # which imports dynamo

            traced = TracedLogits(_form(input, weight, bias, settings.options), settings)
            return traced  # pyright: ignore[reportReturnType]
        reason = _reason_not_eager(weight) or reason_not_to_defer(input, weight, bias, settings)
        if reason is not None:
            settings.log.real[reason] += self.counted
            if fsdp.is_partitioned(weight) and torch.is_grad_enabled():
                shape = torch.Size([*input.shape[:-1], self.out_features])
                settings.note_materialized("DeepSpeed ZeRO-3", shape, under_grad=True)
            return F.linear(input, weight, bias)
        settings.log.deferred += self.counted
        return defer(_form(input, weight, bias, settings.options), settings)


def defer_linear(layer: nn.Module, settings: HeadSettings, *, counted: bool = True) -> bool:
    """Make a linear layer defer, whatever it was made as.

    Args:
        layer: of the head.
        settings: of the head.
        counted: whether a call of it is a call of the head.

    Returns:
        Whether that could be.
    """
    if type(layer) is nn.Linear:
        layer.__class__ = DeferredLinear
    if not isinstance(layer, DeferredLinear):
        return False
    layer.deferral, layer.counted = settings, counted
    return True


def undefer_linear(layer: nn.Module) -> None:
    """Undo :func:`defer_linear`."""
    if type(layer) is DeferredLinear:
        del layer.deferral, layer.counted
        layer.__class__ = nn.Linear


def _form(input: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> LogitForm:
    dtype = input.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
    return LogitForm(
        terms=(Term(input, weight),),
        bias=bias,
        cap=None,
        vdim=input.dim() - 1,
        dtype=dtype,
        compute_dtype=dtype,
        policy=options.policy,
        backend=options.backend,
    )


def reason_not_to_defer(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: HeadSettings
) -> str | None:
    """Why these logits must be computed at once, or None."""
    if _eager:
        return "under eager_logits"
    if not isinstance(input, Tensor):
        return f"the input is a {type(input).__name__}"  # of torch.fx
    if fsdp.is_partitioned(weight):
        return "DeepSpeed ZeRO-3 gathers the weight for the head's own forward alone"
    if not input.is_floating_point() or input.dim() == 0:
        return "the input is no hidden state"
    if input.numel() // max(input.shape[-1], 1) * weight.shape[0] < settings.min_numel:
        return f"fewer logits than min_numel={settings.min_numel}"
    if input.shape[-1] != weight.shape[-1]:
        return "the sizes do not fit"
    if type(weight) not in (nn.Parameter, Tensor) or type(input) not in (nn.Parameter, Tensor):
        return f"weight or input is a {type(weight).__name__}, {type(input).__name__}"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"the weight is {weight.dtype}"
    if input.device != weight.device or input.device.type == "meta":
        return f"the input is on {input.device}, the weight on {weight.device}"
    autocast = torch.is_autocast_enabled(input.device.type)
    dtypes = {input.dtype, weight.dtype, *([] if bias is None else [bias.dtype])}
    if len(dtypes) > 1 and (not autocast or torch.float64 in dtypes):
        return "the dtypes differ"
    return None


def _reason_not_eager(weight: Tensor) -> str | None:
    """The same, of what a compiled graph need not ask."""
    if not torch.is_grad_enabled() and not fsdp.keeps(weight):
        return "the weight is no parameter, or FSDP's, and no gradient is wanted"
    if torch.jit.is_tracing():
        return "under torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "under a torch.func transform"
    return None
