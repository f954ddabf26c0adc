"""Heads to test on, one call's loss and gradients, and how far they are from the truth.

No tolerance here is hand-picked: an error is judged against the errors that the standard PyTorch
computation makes in the same dtype. That of a single call depends on luck and on the CPU; what is
expected of it does not, so PyTorch is asked on several draws of the same inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import crosscut
from support import reference

FACTOR = 2.0
"""How many times PyTorch's own error an error may be."""

DRAWS, DEVIATIONS = 16, 5
"""PyTorch's error is the mean over so many draws and so many standard deviations, or the largest.

A norm of many numbers hardly deviates; a single number does.
"""


@dataclass(frozen=True)
class Head:
    """The tensors of one call. ``class_weight`` is used where a test asks for it."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None = None
    class_weight: Tensor | None = None

    def double(self) -> Head:
        """The same values in float64."""
        bias = None if self.linear_bias is None else self.linear_bias.double()
        return replace(
            self,
            input=self.input.double(),
            linear_weight=self.linear_weight.double(),
            linear_bias=bias,
        )

    def redrawn(self, seed: int) -> Head:
        """The same logits up to the rounding of what they are made of."""
        input, weight = redrawn(self.input, self.linear_weight, seed)
        return replace(self, input=input, linear_weight=weight)


def redrawn(hidden: Tensor, weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A head's tensors in another unit, and their dimensions in another order.

    In exact arithmetic no logit is changed; which way each number is rounded, is.
    """
    generator = torch.Generator().manual_seed(seed)
    unit = 2 ** (torch.rand((), generator=generator, dtype=torch.float64).item() - 0.5)
    order = torch.randperm(weight.shape[1], generator=generator).to(weight.device)
    low = (unit * hidden.double()).to(hidden.dtype), (weight.double() / unit).to(weight.dtype)
    return low[0][..., order], low[1][:, order]


def make_head(
    shape: tuple[int | tuple[int, ...], int, int],
    dtype: torch.dtype = torch.float64,
    *,
    device: str = "cpu",
    bias: bool = False,
    ignored: float = 0.0,
    seed: int = 0,
) -> Head:
    """A random head ``(N or batch shape, D, V)`` with logits of standard deviation 2.

    Args:
        shape: the sizes.
        dtype: of input, weight and bias.
        device: where the tensors live; their values do not depend on it.
        bias: whether it has a bias.
        ignored: share of the targets that are -100.
        seed: of the values.
    """
    batch, hidden_size, num_classes = shape
    batch = (batch,) if isinstance(batch, int) else batch
    gen = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=gen, dtype=torch.float64)

    target = torch.randint(num_classes, batch, generator=gen)
    target[torch.rand(batch, generator=gen) < ignored] = -100
    return Head(
        input=normal(*batch, hidden_size).to(device, dtype),
        linear_weight=(2 * normal(num_classes, hidden_size) / hidden_size**0.5).to(device, dtype),
        target=target.to(device),
        linear_bias=normal(num_classes).to(device, dtype) if bias else None,
        class_weight=normal(num_classes).exp().to(device, torch.float32),
    )


class Outcome(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor
    d_input: Tensor
    d_weight: Tensor
    d_bias: Tensor | None


def pairs(one: Outcome, other: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and both values of all that they have; they must have the same."""
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            yield name, a, b


LossFn = Callable[..., Tensor]
"""Of input, weight and target, of linear_bias by name, and of options."""


def outcome(loss_fn: LossFn, head: Head, **options: Any) -> Outcome:
    """Loss and gradients of ``loss_fn``; a loss a token gets a cotangent of its own."""
    leaves = [
        None if x is None else x.detach().requires_grad_()
        for x in (head.input, head.linear_weight, head.linear_bias)
    ]
    loss = loss_fn(leaves[0], leaves[1], head.target, linear_bias=leaves[2], **options)
    loss.backward(cotangents(loss))
    d_input, d_weight, d_bias = (None if x is None else x.grad for x in leaves)
    assert d_input is not None
    assert d_weight is not None
    return Outcome(loss.detach(), d_input, d_weight, d_bias)


def cotangents(loss: Tensor) -> Tensor:
    """1 for a scalar; otherwise numbers of both signs, the same in every dtype."""
    if loss.dim() == 0:
        return torch.ones_like(loss)
    gen = torch.Generator().manual_seed(loss.numel())
    return torch.randn(loss.shape, generator=gen, dtype=torch.float64).to(loss)


def truth(head: Head, **options: Any) -> Outcome:
    """The float64 outcome of the cross-entropy."""
    return truth_of(reference.linear_cross_entropy, head, **options)


def truth_of(loss_fn: LossFn, head: Head, **options: Any) -> Outcome:
    """The float64 outcome."""
    return outcome(loss_fn, head.double(), **_each(options, lambda other: other.double()))


def _each(options: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Options with ``change`` made to those that are heads of their own."""
    return {key: change(value) if is_dataclass(value) else value for key, value in options.items()}


def error(value: Tensor, true: Tensor) -> float:
    """Distance from the truth, relative to it (Frobenius norms); absolute where the truth is 0."""
    norm = true.double().norm()
    return ((value.double() - true.double()).norm() / (norm if norm > 0 else 1.0)).item()


def rounding(dtype: torch.dtype) -> float:
    """What is allowed where PyTorch's own error is 0 by luck, as it may be in small sums.

    One rounding of the result in low precision. In float32 a few: the statistics are rounded too.
    In float64 PyTorch is the truth, which itself has tens of roundings.
    """
    eps = torch.finfo(dtype).eps
    return {torch.float64: 64 * eps, torch.float32: 2 * eps}.get(dtype, eps / 2)


def judge(
    ours: LossFn, theirs: LossFn, head: Head, *, factor: float = FACTOR, by_row: bool = True,
    **options: Any,
) -> None:  # fmt: skip
    """Every error of ``ours`` is at most ``factor`` times what is expected of ``theirs``.

    Args:
        ours: what is judged.
        theirs: the standard PyTorch computation, and in float64 the truth.
        head: its tensors, given to both.
        factor: how many times.
        by_row: whether of each row, too. A filter that is made to leave out more than it would
            errs where its tail is, and as little as the others in the norm.
        options: given to both. Those that are dataclasses, another head, say, have the methods
            ``double`` and ``redrawn`` of :class:`Head`.
    """
    true = truth_of(theirs, head, **options)
    first = errors_of_rows(outcome(theirs, head, **options), true)
    found = outcome(ours, head, **options)
    off = errors_of_rows(found, true)
    draws = _Draws(theirs, head, options, first)
    assert found.loss.dtype == torch.promote_types(head.input.dtype, torch.float32)
    for name, value, exact in pairs(found, true):
        assert name == "loss" or value.dtype == head.input.dtype, name
        assert value.shape == exact.shape, name
        sizes = _norms(exact, name, value.dtype)
        least = rounding(value.dtype) * sizes / (sizes.norm() if sizes.any() else 1)
        for count in (1, 4, DRAWS):  # few say that a call is right; that it is wrong takes many
            theirs_off = draws.errors(name, count)
            complaint = _complaint(off[name], theirs_off, least, factor)
            complaint = complaint or (
                by_row and _row_complaint(off[name], theirs_off, least, factor)
            )
            if not complaint:
                break
        assert not complaint, f"{name}: {complaint}"


def errors_of_rows(found: Outcome, true: Outcome) -> dict[str, Tensor]:
    """Distance of each row of everything from the truth, relative to the norm of all of it."""
    errors = {}
    for name, value, exact in pairs(found, true):
        norm = exact.double().norm()
        rows = _norms(value.double() - exact.double(), name, value.dtype)
        errors[name] = rows / (norm if norm > 0 else 1.0)
    return errors


def _norms(values: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Of the rows: of a token's, or a class's, gradient; of a single loss and its like.

    In float64, whose truth is no more exact than what is judged, of all that there is.
    """
    if dtype == torch.float64:
        return values.norm()[None]
    width = values.shape[-1] if name in ("d_input", "d_weight") else 1
    return values.double().reshape(-1, width).norm(dim=1)


class _Draws:
    """PyTorch's errors on draws of a call's inputs; of the call itself first."""

    def __init__(
        self, theirs: LossFn, head: Head, options: dict[str, Any], first: dict[str, Tensor]
    ) -> None:
        self._call = theirs, head, options
        self._errors = [first]

    def errors(self, name: str, count: int) -> Tensor:
        """Of ``count`` draws: [count, rows]."""
        theirs, head, options = self._call
        while len(self._errors) < count:
            seed = len(self._errors)
            drawn = head.redrawn(seed)
            given = _each(options, lambda other, seed=seed: other.redrawn(seed))
            true = truth_of(theirs, drawn, **given)
            self._errors.append(errors_of_rows(outcome(theirs, drawn, **given), true))
        return torch.stack([errors[name] for errors in self._errors[:count]])


def _complaint(off: Tensor, draws: Tensor, least: Tensor, factor: float) -> str:
    """By how much all is further off than it may be, given PyTorch's errors [draws, rows]."""
    allowed = factor * expected_error(draws.norm(dim=1)) + least.norm()
    if not off.norm() <= allowed:
        return f"error {off.norm():.2e}, allowed {allowed:.2e}"
    return ""


def _row_complaint(off: Tensor, draws: Tensor, least: Tensor, factor: float) -> str:
    """By how much a row is further off than it may be: than its own error and a typical row's."""
    each = expected_error(draws)
    limits = factor * (each + each.square().mean().sqrt()) + least
    if not (off <= limits).all():
        row = int((off / limits).argmax())
        return f"row {row}: error {off[row]:.2e}, allowed {limits[row]:.2e}"
    return ""


def expected_error(draws: Tensor) -> Tensor:
    """Of the errors [draws, ...], the most that is to be expected of another draw."""
    spread = draws.std(0) if len(draws) > 1 else 0.0
    return torch.maximum(draws.mean(0) + DEVIATIONS * spread, draws.amax(0))


def assert_as_accurate_as_pytorch(
    head: Head, *, factor: float = FACTOR, by_row: bool = True, **options: Any
) -> None:
    """:func:`judge` of :func:`crosscut.linear_cross_entropy`, whose options are given."""
    own = {key: options.pop(key) for key in ("policy", "backend") if key in options}
    ours = functools.partial(crosscut.linear_cross_entropy, **own)
    theirs = reference.linear_cross_entropy
    judge(ours, theirs, head, factor=factor, by_row=by_row, **options)
