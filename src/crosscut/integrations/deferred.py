"""``DeferredLogits``: a tensor that knows how it would be computed, and has not been.

Three layers, each a net for the one above:

1. ``__torch_function__`` sees every call from Python. What :mod:`.form` knows is recorded, or ends
   in a loss without logits. Anything else gets the real logits, computed once and kept.
2. The wrapper is made by an autograd node, so a gradient that reaches the wrapper itself, from an
   ``autograd.Function`` say, goes on to hidden states, classifier and bias, densely.
3. ``__torch_dispatch__`` sees the calls that PyTorch makes below Python, and computes.

A loss is fused only while nobody could tell: the wrapper's ``grad_fn`` is still the node that made
it, none of its aliases was written in place, and no hook or ``retain_grad`` waits for its gradient.
Wrappers that come of one call of the head share a :class:`_Group`, which knows these things.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_leaves, tree_map

from crosscut.integrations import fsdp
from crosscut.integrations.form import RECORDED, REDUCED, LogitForm, knows_arguments
from crosscut.integrations.report import HeadSettings

_NoTorchFunction = torch._C.DisableTorchFunctionSubclass


class _Group:
    """What the wrappers of one call of a head have in common.

    Attributes:
        settings: of the head.
        versions: version counters of the head's tensors when it was called.
        pinned: why every loss now needs the real logits, or None.
        members: the wrappers that are alive.
        reals: logits that were computed, and their version counters then.
        fsdp_hooks: hooks of FSDP or DeepSpeed that wait for a gradient of the logits, or of what
            is made of them.
        fused: the loss that was made without logits, to be differentiated; or None.
    """

    def __init__(self, settings: HeadSettings, form: LogitForm) -> None:
        self.settings = settings
        self.versions = [(x, _version(x)) for x in form.tensors() if x is not None]
        self.pinned: str | None = None
        self.members: list[weakref.ref[DeferredLogits]] = []
        self.reals: list[tuple[weakref.ref[Tensor], int]] = []
        self.fsdp_hooks: list[Callable[[Tensor], Any]] = []
        self.fused: str | None = None

    def check_versions(self) -> None:
        """Raise RuntimeError if hidden states or weights are no longer what the head was given."""
        for tensor, version in self.versions:
            if _version(tensor) != version:
                raise RuntimeError(
                    f"the logits were not read before a tensor {list(tensor.shape)} they are made "
                    f"of was modified in place (version {_version(tensor)}, expected {version}): "
                    "by an optimizer's step, for one. Read outputs.logits before that, or call "
                    "crosscut.integrations.huggingface.materialize(outputs)"
                )

    def alive(self) -> list[DeferredLogits]:
        """The wrappers that someone still holds."""
        return [x for x in (reference() for reference in self.members) if x is not None]

    def follow(self) -> None:
        """Put every wrapper behind its real logits: those have a history of their own now."""
        with torch.enable_grad():
            for member in self.alive():
                if (
                    member._real is not None
                    and member._real.requires_grad
                    and _has_history(member._real)
                ):
                    with _NoTorchFunction():
                        member.detach_()
                        member.copy_(member._real)  # to autograd; there is no memory to copy to
                        member._node = member.grad_fn

    def check_writes(self) -> bool:
        """Notice real logits that were written in place by someone who holds them.

        Raises RuntimeError where other logits were yet to be computed of them.
        """
        if self.pinned is not None:
            return True
        for reference, version in self.reals:
            real = reference()
            if real is not None and _version(real) != version:
                self.pinned = "written in place"
                if any(member._real is None for member in self.alive()):
                    raise RuntimeError(
                        "materialised logits were written in place while others were recorded of "
                        "them: read those before the write"
                    )
                self.follow()
        return self.pinned is not None

    def absorb(self, other: _Group) -> None:
        """Become one with another group: deferred logits of both were added."""
        self.versions += other.versions
        self.members += other.members
        self.reals += other.reals
        self.fsdp_hooks += other.fsdp_hooks
        self.fused = self.fused or other.fused
        other.__dict__ = self.__dict__  # what befalls one befalls both


def _has_history(real: Tensor) -> bool:
    """Not so a view made under ``no_grad`` whose base was written since: whoever uses it, fails."""
    try:
        return real.grad_fn is not None
    except RuntimeError:
        return False


class _Defer(torch.autograd.Function):
    """Makes the wrapper, and takes the dense gradient that may reach it."""

    @staticmethod
    def forward(ctx: Any, form: LogitForm, group: _Group, *_: Tensor | None) -> Tensor:
        ctx.form, ctx.group = form, group
        ctx.set_materialize_grads(False)  # DDP asks every output for a gradient
        return _wrapper(form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (grad,) = grads
        form: LogitForm = ctx.form
        needed = ctx.needs_input_grad[2:]
        if grad is None:
            return (None, None, *[None] * len(needed))
        if ctx.group.pinned is None and ctx.group.check_writes():
            raise RuntimeError(
                "materialised logits were written in place, and the logits were given to a "
                "function that autograd alone sees: give it what "
                "crosscut.integrations.huggingface.materialize(outputs) returns"
            )
        ctx.group.check_versions()
        tensors = tuple(
            x if x is None else x.detach().requires_grad_(need)
            for x, need in zip(form.tensors(), needed, strict=True)
        )
        with torch.enable_grad(), fsdp.unsharded(tensors, ctx.group.fsdp_hooks):
            logits = form.with_tensors(tensors).dense()
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        with torch.no_grad():
            found = iter(torch.autograd.grad(logits, wanted, as_dense(grad).to(logits.dtype)))
        return (None, None, *[next(found) if need else None for need in needed])


class _Densify(torch.autograd.Function):
    """The values of a wrapper whose gradient someone else passes on."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits) -> Tensor:
        return logits._values("an autograd node of others").detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _wrapper(form: LogitForm) -> DeferredLogits:
    return Tensor._make_wrapper_subclass(  # pyright: ignore[reportReturnType]
        DeferredLogits, form.shape, dtype=form.dtype, device=form.device
    )


def defer(
    form: LogitForm, settings: HeadSettings, *, weight_version: int | None = None
) -> DeferredLogits:
    """Logits that a head did not compute.

    Args:
        form: what they are.
        settings: of the head.
        weight_version: version counter of the weight when the head was called, if not now.
    """
    group = _Group(settings, form)
    if weight_version is not None:
        group.versions.append((form.terms[0].classifier, weight_version))
    if not torch.is_grad_enabled():
        form = form.detach()
    return _make(form, group, lambda: root_logits(form))


def _make(form: LogitForm, group: _Group, compute: Callable[[], Tensor]) -> DeferredLogits:
    if torch.is_grad_enabled():
        made = cast(DeferredLogits, _Defer.apply(form, group, *form.tensors()))
    else:
        made = _wrapper(form)
    with _NoTorchFunction():
        made._node = made.grad_fn
    made._form, made._group, made._compute, made._real = form, group, compute, None
    made._adopted = False
    group.members.append(weakref.ref(made))
    return made


def root_logits(form: LogitForm) -> Tensor:
    """Exactly what the head would have returned."""
    (term,), dtype = form.terms, form.compute_dtype
    with torch.autocast(form.device.type, enabled=False):
        bias = None if form.bias is None else form.bias.to(dtype)
        return torch.nn.functional.linear(term.hidden.to(dtype), term.classifier.to(dtype), bias)


class Undecided:
    """Logits of a compiled graph, :class:`~.traced.TracedLogits`: in it real or not."""

    def deferred(self) -> Tensor:
        """The same logits as a tensor, outside of the graph."""
        raise NotImplementedError

    def real_tensor(self, what: str = "") -> Tensor:
        """The real logits, inside of it, for anyone.

        Args:
            what: the function that needs them; empty where the user asks.
        """
        raise NotImplementedError


class DeferredLogits(Tensor):
    """Logits in shape, dtype and device, computed when someone looks.

    Made by a head under :func:`crosscut.defer_logits`; a loss of them is computed by crosscut
    without their ever being stored. ``isinstance(logits, torch.Tensor)`` holds, and every
    operation works.
    """

    _form: LogitForm
    _group: _Group
    _node: Any
    _compute: Callable[[], Tensor]
    _real: Tensor | None
    _adopted: bool

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if func in _METADATA and type(first) is DeferredLogits:
            if first._group.pinned is None:
                with _NoTorchFunction():
                    return func(*args, **kwargs)
            return func(first._values(_name(func)), *args[1:], **kwargs)
        name = _name(func)
        special = _SPECIAL.get(name)
        if special is not None and type(first) is DeferredLogits:
            return special(first, *args[1:], **kwargs)
        if func in _DIFFERENTIATE:
            _refuse_unconnected(name, args, kwargs)
        if _writes(name, kwargs):
            return _write(func, name, args, kwargs)
        if type(first) is DeferredLogits and not _elsewhere(args[1:], kwargs):
            found = _without_logits(func, name, first, args, kwargs)
            if found is not NotImplemented:
                return found
        real_args, real_kwargs = tree_map(lambda x: as_dense(x, name), (args, kwargs))
        found = func(*real_args, **real_kwargs)
        _pin_what_escapes(name, found, (args, kwargs))
        return found

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "detach" and len(args) == 1:  # what PyTorch does to hold a tensor, not to read
            source = cast(DeferredLogits, args[0])
            held = _wrapper(source._form)
            held._node, held._real, held._adopted = None, None, False
            held._form, held._group = source._form.detach(), source._group
            held._compute = lambda: source._values(name).detach()
            return held
        if name == "copy_" and type(args[0]) is DeferredLogits and args[1] is args[0]._real:
            return args[0]  # _Group.follow
        given = [x for x in tree_leaves((args, kwargs)) if type(x) is DeferredLogits]
        written = _written_by_schema(func, args, kwargs)
        for logits in written:
            if any(x is not None and x.requires_grad for x in logits._form.tensors()):
                raise RuntimeError(
                    f"{name} writes to deferred logits below Python: give it what "
                    "crosscut.integrations.huggingface.materialize(outputs) returns"
                )
            logits._pin(f"written in place by {name}")
        # Autograd is switched off here: logits that want a graph are not kept.
        real = {id(x): _value_below_autograd(x, name) for x in given}
        real_args, real_kwargs = tree_map(lambda x: real.get(id(x), x), (args, kwargs))
        found = func(*real_args, **real_kwargs)
        returned = {id(real[id(x)]): x for x in written}
        return tree_map(lambda x: returned.get(id(x), x), found)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # pyright: ignore
        form, real = self._form, self._real
        if real is not None:
            return repr(real.detach()).replace("tensor(", "DeferredLogits(", 1)
        return f"DeferredLogits(shape={list(form.shape)}, dtype={form.dtype}, not computed)"

    def _values(self, what: str) -> Tensor:
        """The real logits, with the graph they would have; computed once."""
        if self._real is not None:
            return self._real
        group, form = self._group, self._form
        group.check_writes()
        group.check_versions()
        tensors = [x for x in form.tensors() if x is not None]
        grad = any(x.requires_grad for x in tensors)
        if what:
            under_grad = grad and torch.is_grad_enabled()
            group.settings.note_materialized(what, form.shape, under_grad=under_grad)
        with (
            torch.inference_mode(any(x.is_inference() for x in tensors)),
            torch.set_grad_enabled(grad),
            fsdp.unsharded(tensors, group.fsdp_hooks),
        ):
            real = self._compute()
            fsdp.watch(group.fsdp_hooks, real)
        self._real = real
        group.reals.append((weakref.ref(real), _version(real)))
        return real

    def _dense(self, what: str) -> Tensor:
        """The real logits, whoever made this wrapper's ``grad_fn``."""
        with _NoTorchFunction():
            own = self.grad_fn is self._node
        if own or not torch.is_grad_enabled():
            return self._values(what)
        if not self._adopted:
            self._real, self._adopted = cast(Tensor, _Densify.apply(self)), True
        return cast(Tensor, self._real)

    def _pin(self, why: str) -> None:
        """From now on these are real logits: compute every alias, as it is at this moment."""
        group = self._group
        if group.pinned is None:
            for member in group.alive():
                member._dense(why)
            group.pinned = why
            group.follow()

    def _fusible(self) -> bool:
        self._group.check_writes()
        with _NoTorchFunction():
            return self._group.pinned is None and self.grad_fn is self._node


def _value_below_autograd(logits: DeferredLogits, what: str) -> Tensor:
    if logits._real is not None:
        return logits._real.detach()
    made = _wrapper(logits._form.detach())
    made.__dict__.update(logits.__dict__)
    made._form = logits._form.detach()
    real = made._values(what)
    if not any(x is not None and x.requires_grad for x in logits._form.tensors()):
        logits._real = real
    return real


def _written_by_schema(func: Any, args: Any, kwargs: Any) -> list[DeferredLogits]:
    """Those arguments of an operator that it writes to."""
    writes = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    values = [{**named, **kwargs}.get(name) for name in writes]
    return [x for x in tree_leaves(values) if type(x) is DeferredLogits]


def as_dense(value: Any, what: str = "") -> Any:
    """The real logits of deferred ones; anything else as it is."""
    return value._dense(what) if type(value) is DeferredLogits else value


def _without_logits(func: Any, name: str, logits: DeferredLogits, args: Any, kwargs: Any) -> Any:
    """Record the call, or fuse it; NotImplemented where it needs the logits."""
    if name in PIECES:
        return PIECES[name](logits, *args[1:], **kwargs)
    if not logits._fusible():
        return NotImplemented
    rest = {k: v for k, v in kwargs.items() if k != "input"}
    form, group = logits._form, logits._group
    if not knows_arguments(name, rest):
        return NotImplemented
    if name in RECORDED:
        if not torch.is_grad_enabled():
            form = form.detach()
        others = tuple(x._form if type(x) is DeferredLogits else x for x in args[1:])
        found = RECORDED[name](form, *others, **rest)
        if found is NotImplemented:
            return found
        for other in args[1:]:
            if type(other) is DeferredLogits:
                if not other._fusible():
                    return NotImplemented
                if other._group.__dict__ is not group.__dict__:
                    group.absorb(other._group)

        device = form.device.type
        autocast = (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

        def again() -> Tensor:
            # A view of tokens that are not contiguous is a copy here: a form has no strides.
            replayed = Tensor.reshape if name == "view" else func
            with torch.autocast(device, autocast[0], enabled=autocast[1]):
                return replayed(*(as_dense(x) for x in args), **kwargs)

        return _make(found, group, again)
    if name not in REDUCED:
        return NotImplemented
    group.check_versions()
    if not torch.is_grad_enabled():
        form = form.detach()
    with fsdp.unsharded(form.tensors(), group.fsdp_hooks):
        found = REDUCED[name](form, *args[1:], **rest)
    if found is not NotImplemented:
        group.settings.log.fused[name] += 1
        if found.requires_grad:
            group.fused = name
        fsdp.watch(group.fsdp_hooks, found)
    return found


# Calls that give several pieces: each is a slice.


def _unbind(logits: DeferredLogits, dim: int = 0) -> Any:
    dim = dim + logits._form.ndim if dim < 0 else dim
    if dim == logits._form.vdim:
        return NotImplemented
    return tuple(logits.select(dim, i) for i in range(logits._form.shape[dim]))


def _split(logits: DeferredLogits, split_size: Any, dim: int = 0) -> Any:
    length = logits._form.shape[dim]
    if isinstance(split_size, int):
        starts = range(0, max(length, 1), split_size)
        sizes = [min(split_size, length - start) for start in starts]
    else:
        sizes = list(split_size)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(logits.narrow(dim, start, size))
        start += size
    return tuple(pieces) if start == length else NotImplemented


def _chunk(logits: DeferredLogits, chunks: int, dim: int = 0) -> Any:
    return _split(logits, max(-(-logits._form.shape[dim] // chunks), 1), dim)


PIECES: dict[str, Callable[..., Any]] = {
    "unbind": _unbind,
    "split": _split,
    "chunk": _chunk,
}


# Calls with a meaning of their own.


def _iterate(logits: DeferredLogits) -> Any:
    return iter(logits.unbind(0))


def _register_hook(logits: DeferredLogits, hook: Callable[[Tensor], Any]) -> Any:
    """Of FSDP or DeepSpeed: it moves to what is made of the logits. Any other wants a gradient."""
    if fsdp.is_hook(hook) and logits._group.pinned is None:
        logits._group.fsdp_hooks.append(hook)
        if logits._real is not None and logits._real.requires_grad:
            logits._real.register_hook(hook)
        return fsdp.MovedHook(logits._group.fsdp_hooks, hook)
    _refuse_late("register_hook", logits)
    logits._pin("given a hook")
    return logits._values("register_hook").register_hook(hook)


def _refuse_late(name: str, logits: DeferredLogits) -> None:
    """Raise where a loss is made already, whose gradient does not pass by the logits."""
    group = logits._group
    if group.pinned is None and group.fused is not None:
        raise RuntimeError(
            f"{name} of logits that were not computed, after {group.fused} of them was: the "
            f"gradient does not pass by them. Call {name} before the loss, or compute the loss of "
            "what crosscut.integrations.huggingface.materialize(outputs) returns"
        )


def _retain_grad(logits: DeferredLogits) -> None:
    _refuse_late("retain_grad", logits)
    logits._pin("told to retain_grad")
    logits._values("retain_grad").retain_grad()


def _grad(logits: DeferredLogits) -> Tensor | None:
    return logits._values("grad").grad if logits._group.pinned is not None else None


def _new(name: str) -> Callable[..., Tensor]:
    def new(logits: DeferredLogits, *args: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        source = torch.empty(0, dtype=logits._form.dtype, device=logits._form.device)
        return getattr(source, name)(*args, dtype=dtype, **kwargs)

    return new


_SPECIAL: dict[str, Callable[..., Any]] = {
    "__iter__": _iterate,
    "register_hook": _register_hook,
    "retain_grad": _retain_grad,
    "grad.__get__": _grad,
    **{name: _new(name) for name in ("new_tensor", "new_empty", "new_zeros", "new_ones")},
    **{name: _new(name) for name in ("new_full",)},
}

_DIFFERENTIATE = {torch.autograd.grad, torch.autograd.backward}


def _refuse_unconnected(name: str, args: Any, kwargs: Any) -> None:
    """Raise where a gradient is asked of logits that the loss was not made of."""
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 and name == "grad" else ())
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    for value in inputs or ():
        if type(value) is DeferredLogits and value._group.pinned is None:
            raise RuntimeError(
                f"torch.autograd.{name} asks for the gradient of logits that were not computed: "
                "call crosscut.integrations.huggingface.materialize(outputs), or retain_grad() on "
                "the logits, before the loss"
            )


def _elsewhere(args: Any, kwargs: Any) -> bool:
    """Whether deferred logits are hidden where only real ones are looked for."""
    nested = [x for x in (*args, *kwargs.values()) if isinstance(x, (tuple, list, dict))]
    return bool(nested) and tree_any(lambda x: type(x) is DeferredLogits, nested)


def _in_place_names() -> frozenset[str]:
    operators = "add sub mul div truediv floordiv mod pow and or xor lshift rshift"
    names = {name for space in (Tensor, torch, torch.nn.functional) for name in dir(space)}
    return frozenset(
        {name for name in names if name.endswith("_") and not name.endswith("__")}
        | {f"__i{name}__" for name in operators.split()}
    )


IN_PLACE = _in_place_names()
"""What writes to its first argument and returns it."""


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    return (
        name in IN_PLACE
        or name == "__setitem__"
        or name.endswith(".__set__")
        or name == "data.__get__"  # whoever asks for it means to write
        or kwargs.get("out") is not None
    )


def _write(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """In place: every alias becomes real first, then the write happens to the real logits."""
    written = args[0] if args else kwargs.get("input")
    targets = [x for x in tree_leaves((written, kwargs.get("out"))) if type(x) is DeferredLogits]
    for target in targets:
        target._pin(f"written in place by {name}")
    real_args, real_kwargs = tree_map(lambda x: as_dense(x, name), (args, kwargs))
    found = func(*real_args, **real_kwargs)
    for target in targets:
        target._group.follow()
    if type(written) is DeferredLogits and found is real_args[0]:
        return written
    return found


_SHARES_MEMORY = {"numpy", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"}


def _pin_what_escapes(name: str, found: Any, arguments: Any) -> None:
    """Real logits whose memory someone else now holds may be written without our seeing it."""
    given = [x for x in tree_leaves(arguments) if type(x) is DeferredLogits]
    for logits in given:
        if logits._group.pinned is None and logits._real is not None:
            ours = logits._real.untyped_storage().data_ptr()
            if name in _SHARES_MEMORY or any(
                isinstance(x, Tensor) and x.untyped_storage().data_ptr() == ours
                for x in tree_leaves(found)
            ):
                logits._pin(f"given away as a view by {name}")


_METADATA_NAMES = (
    "shape dtype device ndim layout requires_grad is_leaf grad_fn is_cuda is_cpu is_mps is_xpu "
    "is_meta is_sparse is_quantized is_nested is_mkldnn itemsize nbytes output_nr _version _base"
)
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _METADATA_NAMES.split()),
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.is_signed,
    Tensor.is_inference,
    Tensor.get_device,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.__len__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
"""What the wrapper knows without computing anything."""


def _name(func: Any) -> str:
    name = getattr(func, "__name__", repr(func))
    if name in ("__get__", "__set__", "__delete__"):
        return f"{func.__self__.__name__}.{name}"
    return name


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
