"""PyTorch custom operators on records, differentiable: a forward operator and its backward.

A record of tensors and options goes in, a record of tensors comes out. Only here are records
flattened to what an operator's schema can hold.

:func:`torch.library.custom_op` imports ``torch._dynamo`` at an operator's first call, so that the
compiler never looks into the operator's Python code. That import takes seconds where files are
slow, and most trainings have no use for it. Here it is only made sure where the compiler is there:
all it may ever see is the few lines that do so.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, Generic, Literal, TypeVar, get_origin, get_type_hints

import torch
from torch import Tensor

from crosscut.backends.protocol import Gradients, Needs

Call = TypeVar("Call")
Found = TypeVar("Found")
Cotangents = TypeVar("Cotangents")

_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    float | None: "float?",
    str: "str",
}
"""The types of a schema."""


class DifferentiableOperator(Generic[Call, Found, Cotangents]):
    """Two operators, ``name`` and ``name + "_backward"``. Call it with a record.

    Args:
        name: ``"namespace::operator"``.
        call: the record that goes in. Of the tensors in it the first three have a gradient: hidden,
            classifier and bias.
        found: the record that comes out, of new tensors.
        cotangents: the record of what has a gradient of ``found``, by the same names. None is in it
            where none came in, and where what was found is empty.
        forward: from a call to what is found; without autocast.
        like: from a call to empty tensors of the shapes and dtypes of what is found, for tracing.
        backward: from a call, what was found and the cotangents to gradients; without autocast.
        whose: the public functions that it is behind.
    """

    def __init__(
        self,
        name: str,
        call: type[Call],
        found: type[Found],
        cotangents: type[Cotangents],
        *,
        forward: Callable[[Call], Found],
        like: Callable[[Call], Found],
        backward: Callable[[Call, Found, Cotangents, Needs], Gradients],
        whose: str,
    ) -> None:
        self._in, self._out, self._cotangents = _Flat(call), _Flat(found), cotangents
        self._forward, self._like, self._of, self._whose = forward, like, backward, whose
        names = self._out.names
        self._given = [names.index(name) for name in _Flat(cotangents).names]  # who has a gradient
        self._others = [place for place in range(len(names)) if place not in self._given]

        d_given = (f"Tensor? d_{names[place]}" for place in self._given)
        of_backward = (*d_given, "Tensor[] found", *self._in.schema, "bool[] needs")
        back, num_needs = f"{name}_backward", len(Needs._fields)
        self._operator = _define(name, self._in.schema, len(names), self._run, self._fake)
        self._backward_operator = _define(
            back, of_backward, num_needs, self._run_backward, self._fake_backward
        )
        torch.library.register_autograd(name, self._backward, setup_context=self._save_for_backward)
        torch.library.register_autograd(back, self._refuse)

    def __call__(self, record: Call) -> Found:
        return self._out.record(self._operator(*self._in.values(record)))

    def _run(self, *values: Any) -> tuple[Tensor, ...]:
        with no_autocast(values[0]):
            return self._out.values(self._forward(self._in.record(values)))

    def _fake(self, *values: Any) -> tuple[Tensor, ...]:
        return self._out.values(self._like(self._in.record(values)))

    def _run_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        (*grads, tensors), (*values, needs) = self._split(arguments)
        grads = (
            grad if len(tensors[place]) else None
            for place, grad in zip(self._given, grads, strict=True)
        )
        call, found = self._in.record(values), self._out.record(tensors)
        with no_autocast(values[0]):
            gradients = self._of(call, found, self._cotangents(*grads), Needs(*needs))
        return tuple(values[0].new_empty(0) if grad is None else grad for grad in gradients)

    def _fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, (*values, needs) = self._split(arguments)
        return tuple(
            value.new_empty(value.shape) if need and value is not None else values[0].new_empty(0)
            for value, need in zip(values, needs, strict=False)
        )

    def _split(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Those of a backward: the cotangents and what was found; the call and its needs."""
        first = len(self._given) + 1
        return arguments[:first], arguments[first:]

    def _save_for_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        num_tensors = self._in.num_tensors
        ctx.save_for_backward(*inputs[:num_tensors], *output)
        ctx.options = inputs[num_tensors:]
        ctx.mark_non_differentiable(*(output[place] for place in self._others))
        ctx.set_materialize_grads(False)

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, num_tensors = ctx.saved_tensors, self._in.num_tensors
        values, found = (*saved[:num_tensors], *ctx.options), list(saved[num_tensors:])
        needs = list(ctx.needs_input_grad[: len(Needs._fields)])
        given = (grads[place] for place in self._given)
        gradients = self._backward_operator(*given, found, *values, needs)
        wanted = (grad if need else None for grad, need in zip(gradients, needs, strict=True))
        return (*wanted, *[None] * (len(values) - len(needs)))

    def _refuse(self, ctx: Any, *grads: Any) -> None:
        del ctx, grads
        raise RuntimeError(
            f"crosscut has no double backward: the gradients of {self._whose} cannot be "
            "differentiated again (create_graph=True)"
        )


def eagerly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that PyTorch's compiler is not to look into: there the graph breaks."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*arguments)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Outside of autocast on the tensor's device."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()  # several times faster


class _Flat(Generic[Call]):
    """A record, and the records in it, as a list of values, tensors first."""

    def __init__(self, record: type[Call]) -> None:
        leaves = sorted(_leaves(record), key=lambda leaf: not leaf[1].startswith("Tensor"))
        paths = [path for path, _ in leaves]
        last = [path[-1] for path in paths]
        self.names = [path[-1] if last.count(path[-1]) == 1 else "_".join(path) for path in paths]
        self.schema = [f"{kind} {name}" for name, (_, kind) in zip(self.names, leaves, strict=True)]
        self.num_tensors = sum(kind.startswith("Tensor") for _, kind in leaves)
        self.record: Callable[[Sequence[Any]], Call] = _maker(record, paths)
        self._paths, self._get = paths, attrgetter(*map(".".join, paths))

    def values(self, record: Call) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():  # it does not know attrgetter
            return tuple(_at(record, path) for path in self._paths)
        return self._get(record)


def _at(record: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        record = getattr(record, name)
    return record


def _leaves(record: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where in a record its values are, and their types in a schema."""
    for name, hint in get_type_hints(record).items():
        if get_origin(hint) is Literal:
            yield (*path, name), "str"
        elif hint in _KINDS:
            yield (*path, name), _KINDS[hint]
        else:
            yield from _leaves(hint, (*path, name))


def _maker(
    record: type[Call], paths: list[tuple[str, ...]], path: tuple[str, ...] = ()
) -> Callable[[Sequence[Any]], Call]:
    """The function from the values at some paths to the record."""
    places, records = {}, {}
    for name, hint in get_type_hints(record).items():
        here = (*path, name)
        if here in paths:
            places[name] = paths.index(here)
        else:
            records[name] = _maker(hint, paths, here)

    def make(values: Sequence[Any]) -> Call:
        fields = {name: values[place] for name, place in places.items()}
        for name, inner in records.items():
            fields[name] = inner(values)
        return record(**fields)

    return make


def _define(
    name: str,
    schema: Iterable[str],
    num_outputs: int,
    function: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a function on tensors the operator ``name``; it changes none of its arguments."""
    untraced: list[Callable[..., tuple[Tensor, ...]]] = []

    @functools.wraps(function)
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        if not untraced and "torch._dynamo" in sys.modules:
            untraced.append(torch.compiler.disable(function))
        return (untraced[0] if untraced else function)(*arguments)

    namespace, operator = name.split("::")
    if not hasattr(getattr(torch.ops, namespace), operator):  # else its module is reloaded
        outputs = ["Tensor"] * num_outputs
        whole = f"({', '.join(schema)}) -> ({', '.join(outputs)})"
        torch.library.define(name, whole, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)
    return getattr(getattr(torch.ops, namespace), operator).default
