"""Deferred logits inside ``torch.compile``: a plain object, as dynamo builds no tensor subclass.

It is what :class:`crosscut.integrations.deferred.DeferredLogits` is, without the safety nets that
a traced graph does not need: nothing is written in place, hooked or modified between the head and
the loss of one graph that dynamo does not see. Where it leaves the graph, the first touch makes
deferred logits of it, and the nets are back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crosscut.integrations.deferred import DeferredLogits, defer
from crosscut.integrations.form import RECORDED, REDUCED, LogitForm, knows_arguments
from crosscut.integrations.report import HeadSettings


class TracedLogits:
    """Logits that a compiled model did not compute; behaves as the tensor they would be.

    It is no ``torch.Tensor``: ``crosscut.integrations.huggingface.materialize(outputs)`` makes one
    of it where code asks for the type.
    """

    def __init__(self, form: LogitForm, settings: HeadSettings) -> None:
        self._form = form
        self._settings = settings

    def deferred(self) -> DeferredLogits:
        """The same logits as a tensor, outside of a compiled graph."""
        made = self.__dict__.get("_deferred")
        if made is None:
            made = self.__dict__["_deferred"] = defer(self._form, self._settings, again=True)
        return made

    def values(self) -> Tensor:
        """The real logits, inside of a compiled graph."""
        return self._form.dense()

    @property
    def shape(self) -> torch.Size:
        return self._form.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._form.dtype

    @property
    def device(self) -> torch.device:
        return self._form.device

    @property
    def ndim(self) -> int:
        return self._form.ndim

    def dim(self) -> int:
        return self._form.ndim

    def size(self, dim: int | None = None) -> Any:
        return self._form.shape if dim is None else self._form.shape[dim]

    def numel(self) -> int:
        return self._form.shape.numel()

    def __len__(self) -> int:
        return self._form.shape[0]

    def __repr__(self) -> str:
        return f"TracedLogits(shape={list(self.shape)}, dtype={self.dtype}, not computed)"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_form", "_settings"):
            raise AttributeError(name)
        if torch.compiler.is_compiling():
            return getattr(self.values(), name)
        return getattr(self.deferred(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if not torch.compiler.is_compiling():
            args = tuple(x.deferred() if isinstance(x, TracedLogits) else x for x in args)
            kwargs = {
                k: v.deferred() if isinstance(v, TracedLogits) else v for k, v in kwargs.items()
            }
            return func(*args, **kwargs)
        name = func.__name__
        if args and isinstance(args[0], TracedLogits):
            found = _without_logits(name, args[0], args[1:], kwargs)
        elif isinstance(kwargs.get("input"), TracedLogits):
            rest = {k: v for k, v in kwargs.items() if k != "input"}
            found = _without_logits(name, kwargs["input"], (), rest)
        else:
            found = NotImplemented
        if found is not NotImplemented:
            return found
        args = tuple(x.values() if isinstance(x, TracedLogits) else x for x in args)
        kwargs = {k: v.values() if isinstance(v, TracedLogits) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _without_logits(name: str, logits: TracedLogits, args: tuple[Any, ...], kwargs: Any) -> Any:
    form = logits._form
    if not knows_arguments(name, kwargs):
        return NotImplemented
    if name in RECORDED:
        others = tuple(x._form if isinstance(x, TracedLogits) else x for x in args)
        found = RECORDED[name](form, *others, **kwargs)
        if found is NotImplemented:
            return found
        return TracedLogits(found, logits._settings)
    return REDUCED[name](form, *args, **kwargs) if name in REDUCED else NotImplemented


def _method(name: str) -> Callable[..., Any]:
    def method(self: TracedLogits, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            args = tuple(x.deferred() if isinstance(x, TracedLogits) else x for x in args)
            return getattr(self.deferred(), name)(*args, **kwargs)
        found = _without_logits(name, self, args, kwargs)
        if found is not NotImplemented:
            return found
        args = tuple(x.values() if isinstance(x, TracedLogits) else x for x in args)
        return getattr(self.values(), name)(*args, **kwargs)

    return method


_OPERATORS = "__sub__ __rsub__ __pow__ __lt__ __le__ __gt__ __ge__ __eq__ __ne__ __matmul__ "
_OPERATORS += "__rmatmul__ __iter__ __setitem__ __imul__ __iadd__ __isub__ __itruediv__ __float__"
for _method_name in (*RECORDED, *REDUCED, *_OPERATORS.split()):
    if hasattr(Tensor, _method_name):
        setattr(TracedLogits, _method_name, _method(_method_name))
TracedLogits.__hash__ = object.__hash__  # pyright: ignore[reportAttributeAccessIssue]
