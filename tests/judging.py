"""Heads to test on, one call's loss and gradients, and how far they are from the truth.

No tolerance here is hand-picked: an error is judged against the error that the standard PyTorch
computation makes in the same dtype, on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import reference
import torch
from torch import Tensor

import crosscut

FACTOR = 2.0
"""How many times PyTorch's own error an error may be."""


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


def outcome(loss_fn: Callable[..., Tensor], head: Head, **options: Any) -> Outcome:
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
    """The float64 outcome."""
    return outcome(reference.linear_cross_entropy, head.double(), **options)


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


def rounding_of_statistics(head: Head, ignore_index: int = -100) -> float:
    """What a loss may be off, relative to itself, as the difference of two float32 statistics.

    Each is rounded once, to half of its last place; a loss may be much smaller than they are, and
    then ``softmax - onehot`` is as small as it and as much off. PyTorch subtracts before it rounds.
    """
    head = head.double()
    z = reference.logits(head.input, head.linear_weight, head.linear_bias)
    kept = head.target != ignore_index
    target = z.gather(-1, torch.where(kept, head.target, 0)[..., None])[..., 0]
    lse = z.logsumexp(-1)
    sizes, losses = ((lse.abs() + target.abs())[kept].sum(), (lse - target)[kept].sum())
    return (torch.finfo(torch.float32).eps / 2 * sizes / losses).item()


def assert_as_accurate_as_pytorch(head: Head, *, factor: float = FACTOR, **options: Any) -> None:
    """Every error of crosscut is at most ``factor`` times that of PyTorch in the same dtype.

    ``options`` are those of :func:`crosscut.linear_cross_entropy`. The gradients are judged by
    norm. PyTorch's error in a single number can be 0 by luck, so a reduced loss is judged by the
    relative error of PyTorch's losses, one a token.
    """
    shared = {k: v for k, v in options.items() if k not in ("policy", "backend")}
    true = truth(head, **shared)
    ours = outcome(crosscut.linear_cross_entropy, head, **options)
    theirs = outcome(reference.linear_cross_entropy, head, **shared)
    their_loss_error = error(_losses(head, shared), _losses(head.double(), shared))

    wide = torch.float64 if head.input.dtype == torch.float64 else torch.float32
    assert ours.loss.dtype == wide
    assert ours.loss.shape == true.loss.shape
    _judge("loss", error(ours.loss, true.loss), their_loss_error, head.input.dtype, factor)
    their_errors = {name: error(value, exact) for name, value, exact in pairs(theirs, true)}
    for name, value, exact in list(pairs(ours, true))[1:]:
        assert value.dtype == head.input.dtype, name
        assert value.shape == exact.shape, name
        _judge(name, error(value, exact), their_errors[name], head.input.dtype, factor)


@torch.no_grad()
def _losses(head: Head, options: dict[str, Any]) -> Tensor:
    """PyTorch's losses, one a token."""
    options = {**options, "reduction": "none"}
    return reference.linear_cross_entropy(
        head.input, head.linear_weight, head.target, linear_bias=head.linear_bias, **options
    )


def _judge(name: str, ours: float, theirs: float, dtype: torch.dtype, factor: float) -> None:
    allowed = factor * theirs + rounding(dtype)
    assert ours <= allowed, (
        f"{name}: error {ours:.2e}, allowed {allowed:.2e} (PyTorch {theirs:.2e})"
    )
