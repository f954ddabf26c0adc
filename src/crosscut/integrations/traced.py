"""Deferred logits inside ``torch.compile``: a plain object, as dynamo builds no tensor subclass.

What it may do without logits is what :mod:`.form` knows. Everything else that a tensor can do, any
method, property, operator or function of PyTorch, happens to the real logits, which are made in
the graph. From then on they are a tensor as others are, and no loss is fused any more: what was
viewed of them is made again as a view of them, so that a write in place reaches whom it reaches in
PyTorch. Only what certainly returns memory of its own (:data:`_FRESH`) leaves them deferred.

Where the object leaves the graph, the first touch makes
:class:`~crosscut.integrations.deferred.DeferredLogits` of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crosscut.integrations.deferred import (
    IN_PLACE,
    PIECES,
    DeferredLogits,
    Undecided,
    defer,
    root_logits,
)
from crosscut.integrations.dynamo import (
    in_autograd_function,
    note_fused,
    note_materialized,
    only_inside,
    swapped_operator,
)
from crosscut.integrations.form import RECORDED, REDUCED, LogitForm, knows_arguments
from crosscut.integrations.report import HeadSettings, LogitsMaterializedError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _words("view transpose swapaxes permute movedim unsqueeze squeeze narrow select detach")
"""What is recorded and shares memory with the logits."""

_COPIES_OR_NOT = _words("contiguous reshape flatten")
"""What is recorded and shares it if the logits are contiguous; if not, it depends."""

_CASTS = _words("float double half bfloat16 to type type_as")
"""What is recorded and returns the logits themselves if there is nothing to do."""

_FRESH = _words(
    "abs all any amax amin argmax argmin argsort bmm cat clamp cross_entropy cumsum empty_like eq "
    "exp floor full_like gather ge gelu gt index_select isfinite isinf isnan kl_div le log "
    "log_softmax logsumexp lt masked_fill masked_select matmul max mean median min mm mse_loss mul "
    "multinomial ne neg nll_loss norm ones_like pow prod relu round sigmoid sign softmax sort sqrt "
    "square stack std sub sum tanh topk var where zeros_like "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ "
    "__mod__ __rmod__ __pow__ __rpow__ __matmul__ __rmatmul__ __neg__ __abs__ "
    "__lt__ __le__ __gt__ __ge__ __eq__ __ne__"
)
"""What never returns memory of what it is given."""

_METADATA = _words(
    "stride is_contiguous storage_offset is_signed get_device layout is_cuda is_cpu is_meta is_mps "
    "is_xpu is_sparse is_quantized is_nested is_mkldnn itemsize nbytes is_inference"
)
"""What the compiler computes without the logits."""

_NEW = _words("new_tensor new_empty new_zeros new_ones new_full")

_REFUSED = _words("register_hook retain_grad register_post_accumulate_grad_hook")
"""What wants a gradient that losses of other copies would not give."""

_HELP = (
    "Compute them first, by crosscut.integrations.huggingface.materialize(logits), or let the head "
    "do so, under crosscut.integrations.huggingface.eager_logits()"
)


class _Memory:
    """What logits share with the views of them.

    Attributes:
        real: whether they are real logits now, for someone may write to them.
    """

    def __init__(self) -> None:
        self.real = False


class TracedLogits(Undecided):
    """Logits that a compiled model did not compute; behaves as the tensor they would be.

    It is no ``torch.Tensor``: ``crosscut.integrations.huggingface.materialize(outputs)`` makes one
    of it where code asks for the type.
    """

    def __init__(self, form: LogitForm, settings: HeadSettings) -> None:
        self._form = form
        self._settings = settings
        self._memory = _Memory()
        self._source: TracedLogits | None = None
        """What these were recorded of."""
        self._call: tuple[str, Any, Any] | None = None
        """How: name, arguments and keywords of a method."""
        self._modes = _modes(form)
        self._contiguous = True
        """Whether they certainly are."""
        self._certain = True
        """Whether they certainly share the memory of their source, if that is theirs."""
        self._real: Tensor | None = None
        """The real logits, where the memory is real and they were asked for."""
        weight = form.terms[0].classifier
        self._weight_version = weight._version if isinstance(weight, nn.Parameter) else None
        """Of the weight, when the graph ran."""
        self._outside: Tensor | None = None
        """What they became outside of the graph."""

    def deferred(self) -> Tensor:
        if in_autograd_function():
            raise RuntimeError(f"logits of a compiled model, in an autograd.Function. {_HELP}")
        made = self._outside
        if made is None:
            if self._memory.real:
                made = self._shared()
            elif self._source is None:
                self._settings.log.deferred += 1
                made = defer(self._form, self._settings, weight_version=self._weight_version)
            elif self._source._memory.real:
                made = self._as_recorded()
            else:
                made = self._replay(self._source.deferred(), lambda x: x.deferred())
            self._outside = made
        return made

    def _check_graph(self, what: str) -> None:
        """Raise where only eager PyTorch does what is asked."""
        if self._was_outside():
            raise RuntimeError(
                f"{what} of deferred logits that were used outside of a compiled graph and came "
                f"back into one. {_HELP}"
            )
        if in_autograd_function():
            raise RuntimeError(f"deferred logits in a compiled autograd.Function. {_HELP}")

    def _was_outside(self) -> bool:
        if self._outside is not None or self._source is None:
            return self._outside is not None
        return self._source._was_outside()

    def _to_read(self, what: str) -> Tensor:
        """The real logits, for one who keeps no view of them."""
        self._check_graph(what)
        if self._memory.real:
            return self._shared()
        self._note(what)
        return self._as_recorded()

    def real_tensor(self, what: str = "") -> Tensor:
        memory = self._memory
        self._check_graph(what)
        if not memory.real:
            self._note(what)
            path: list[TracedLogits] = []
            first = self
            while first._source is not None and first._source._memory is memory:
                path.append(first)
                first = first._source
            first._real = first._as_recorded()
            memory.real = True
            for view in reversed(path):
                view._real = view._replay(view._source._shared())  # pyright: ignore
        return self._shared()

    def _shared(self) -> Tensor:
        """The real logits, where their memory is real."""
        if self._real is None:
            source, certain = self._source, self._certain
            if source is None or not certain:
                raise RuntimeError(
                    "a compiled graph made real logits, to write to them perhaps, after "
                    "contiguous(), reshape() or flatten() of deferred ones that may be a copy or a "
                    "view of them: call it after the write, or use clone() or view()"
                )
            self._real = self._replay(source._shared())
        return self._real

    def _note(self, what: str) -> None:
        """Say that they are computed; raise if the user chose so."""
        if what:
            under_grad = torch.is_grad_enabled() and self.requires_grad
            sizes = [-1] * self._form.ndim
            sizes[self._form.vdim] = self._form.num_classes
            problem = note_materialized(self._settings.key, what, tuple(sizes), under_grad)
            if problem is not None:
                raise LogitsMaterializedError(problem)

    def _as_recorded(self) -> Tensor:
        """The real logits, whatever was written to their memory since."""
        if self._source is None:
            with torch.set_grad_enabled(self._modes[0]):
                return root_logits(self._form)
        return self._replay(self._source._as_recorded(), lambda x: x._as_recorded())

    def _replay(self, source: Tensor, other: Callable[[TracedLogits], Tensor] | None = None) -> Any:
        """What was recorded, done to a tensor; ``other`` makes tensors of its other arguments."""
        name, args, kwargs = self._call  # pyright: ignore[reportGeneralTypeIssues]
        if other is not None:
            args, kwargs = _map(other, args), _map(other, kwargs)
        grad, dtype, autocast = self._modes
        # A view of tokens that are not contiguous is a copy here: a form has no strides.
        name = "reshape" if name == "view" else name
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(self._form.device.type, dtype, enabled=autocast),
        ):
            return getattr(source, name)(*args, **kwargs)

    def _record(self, form: LogitForm, name: str, args: Any, kwargs: Any) -> TracedLogits:
        made = TracedLogits(form, self._settings)
        made._source, made._call = self, (name, args, kwargs)
        made._contiguous = self._contiguous
        if name in _VIEWS or (name == "__getitem__" and not _copies(args[0])):
            made._memory = self._memory
            made._contiguous = self._contiguous and name in (
                "view",
                "unsqueeze",
                "squeeze",
                "detach",
            )
        elif name in _COPIES_OR_NOT:
            made._memory = self._memory
            made._certain = self._contiguous and not kwargs
            made._contiguous = self._contiguous or name == "contiguous"
        elif name in _CASTS and form.dtype == self._form.dtype:
            made._memory = self._memory
            made._certain = len(args) <= 2 and not {*kwargs} - {"dtype", "device"}  # copy=True
        return made

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

    @property
    def requires_grad(self) -> bool:
        return self._modes[0] and any(
            x.requires_grad for x in self._form.tensors() if x is not None
        )

    def dim(self) -> int:
        return self._form.ndim

    ndimension = dim

    def size(self, dim: int | None = None) -> Any:
        return self._form.shape if dim is None else self._form.shape[dim]

    def numel(self) -> int:
        return self._form.shape.numel()

    nelement = numel

    def is_floating_point(self) -> bool:
        return True

    def is_complex(self) -> bool:
        return False

    def element_size(self) -> int:
        return self._form.dtype.itemsize

    def __len__(self) -> int:
        return self._form.shape[0]

    def __repr__(self) -> str:
        return f"TracedLogits(shape={list(self.shape)}, dtype={self.dtype}, not computed)"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if not torch.compiler.is_compiling():
            return func(*_map(_deferred, args), **_map(_deferred, kwargs))
        operator = swapped_operator()
        if operator:
            return _operator(operator, args[1], args[0])
        name = func.__name__
        found = NotImplemented
        if args and isinstance(args[0], TracedLogits):
            found = _without_logits(name, args[0], args[1:], kwargs)
        elif isinstance(kwargs.get("input"), TracedLogits):
            rest = {k: v for k, v in kwargs.items() if k != "input"}
            found = _without_logits(name, kwargs["input"], args, rest)
        return _with_logits(func, name, args, kwargs) if found is NotImplemented else found


def _deferred(logits: TracedLogits) -> Tensor:
    return logits.deferred()


def _modes(form: LogitForm) -> tuple[bool, torch.dtype, bool]:
    """Grad mode and autocast, as they are."""
    device = form.device.type
    dtype = torch.get_autocast_dtype(device)
    return torch.is_grad_enabled(), dtype, torch.is_autocast_enabled(device)


def _copies(index: Any) -> bool:
    """Whether an index copies what it picks."""
    return any(isinstance(x, Tensor) for x in (index if isinstance(index, tuple) else (index,)))


def _map(change: Callable[[TracedLogits], Any], value: Any) -> Any:
    """The value with every deferred logits in it changed."""
    if isinstance(value, TracedLogits):
        return change(value)
    if type(value) is tuple:
        return tuple([_map(change, x) for x in value])
    if type(value) is list:
        return [_map(change, x) for x in value]
    if type(value) is dict:
        return {key: _map(change, x) for key, x in value.items()}
    return value


def _without_logits(name: str, logits: TracedLogits, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Record the call, or fuse it; NotImplemented where it needs the logits."""
    logits._check_graph(name)
    if name in PIECES:
        return PIECES[name](logits, *args, **kwargs)
    if name in _REFUSED:
        raise RuntimeError(f"{name} of deferred logits is not known in a compiled graph. {_HELP}")
    if logits._memory.real or not knows_arguments(name, kwargs):
        return NotImplemented
    form = logits._form
    if name in RECORDED:
        for other in args:
            if isinstance(other, TracedLogits) and other._memory.real:
                return NotImplemented
        if not torch.is_grad_enabled():
            form = form.detach()
        others = tuple([x._form if isinstance(x, TracedLogits) else x for x in args])
        found = RECORDED[name](form, *others, **kwargs)
        if found is NotImplemented:
            return found
        kwargs = {k: v for k, v in kwargs.items() if k != "_stacklevel"}  # of log_softmax
        return logits._record(found, name, args, kwargs)
    if name not in REDUCED:
        return NotImplemented
    found = REDUCED[name](form, *args, **kwargs)
    if found is not NotImplemented:
        note_fused(logits._settings.key, name)
    return found


def _operator(name: str, logits: Any, other: Any) -> Any:
    """``logits - other``, of the name ``sub``; of the name ``isub``, ``logits -= other``."""
    method = f"__{name.strip('_')}__"
    if not hasattr(TracedLogits, method):  # @=
        method = f"__{name[1:]}__"
    return getattr(logits, method)(other)


def _with_logits(call: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Make the call, of real logits."""
    if name in _FRESH and kwargs.get("out") is None:
        return call(*_map(_reader(name), args), **_map(_reader(name), kwargs))
    found = call(*_map(_writer(name), args), **_map(_writer(name), kwargs))
    if name in IN_PLACE and args and isinstance(args[0], TracedLogits):
        return args[0]
    return found


def _reader(what: str) -> Callable[[TracedLogits], Tensor]:
    return lambda logits: logits._to_read(what)


def _writer(what: str) -> Callable[[TracedLogits], Tensor]:
    return lambda logits: logits.real_tensor(what)


def _method(name: str) -> Callable[..., Any]:
    def method(self: TracedLogits, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return getattr(self.deferred(), name)(*_map(_deferred, args), **_map(_deferred, kwargs))
        if name in _NEW:
            source = torch.empty(0, dtype=self.dtype, device=self.device)
            return getattr(source, name)(*args, **kwargs)
        if name in _METADATA:
            return getattr(self._to_read(""), name)(*args, **kwargs)
        found = _without_logits(name, self, args, kwargs)
        if found is not NotImplemented:
            return found

        def call(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            return getattr(logits, name)(*args, **kwargs)

        return _with_logits(call, name, (self, *args), kwargs)

    return method


def _property(name: str) -> property:
    def get(self: TracedLogits) -> Any:
        if not torch.compiler.is_compiling():
            return getattr(self.deferred(), name)
        return getattr(self._to_read("") if name in _METADATA else self.real_tensor(name), name)

    def put(self: TracedLogits, value: Any) -> None:
        setattr(self.deferred(), name, value)

    return property(get, put)


def _complete() -> None:
    """Give the class every other attribute that a tensor has, but what makes it an object."""
    of_objects = {*dir(object), *_words("__dict__ __module__ __weakref__ __annotations__")}
    of_objects |= _words("__torch_function__ __torch_dispatch__ __setstate__ __array_priority__")
    of_objects -= _words("__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __reduce_ex__")
    for name in dir(Tensor):
        if name in of_objects or name in TracedLogits.__dict__:
            continue
        made = _method(name) if callable(getattr(Tensor, name)) else _property(name)
        setattr(TracedLogits, name, made)
    TracedLogits.__hash__ = object.__hash__  # pyright: ignore[reportAttributeAccessIssue]


_complete()


# Outside of a graph everything is done to deferred logits, and nothing of that is traced.
only_inside(TracedLogits.__torch_function__.__func__, _method("dim"), _map)  # pyright: ignore
only_inside(_property("data").fget, _property("data").fset)
for _name in ("__torch_function__", "__torch_dispatch__"):
    _eager = torch.compiler.disable(getattr(DeferredLogits, _name).__func__)
    setattr(DeferredLogits, _name, classmethod(_eager))
TracedLogits.deferred = torch.compiler.disable(TracedLogits.deferred)
