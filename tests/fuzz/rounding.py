"""A model of how PyTorch rounds: float64 arithmetic that rounds where PyTorch does.

Many evaluations run at once, along a leading axis of draws. The first has no noise: the truth. In
the others every value that PyTorch rounds, and every gradient, is rounded to the same dtype, but in
a random unit: as if each number were stored as so many thirds, or halves, or ... What they are off
by is what rounding explains, on any machine, for any order of the sums, and whether or not this
problem's own numbers happen to need no rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Arithmetic:
    """Operations that round, in evaluations ``[draws, ...]``, forward and backward.

    Args:
        low: dtype of inputs, matmuls and gradients.
        draws: how many evaluations, the first of which is exact.
        seed: of the noise.
    """

    def __init__(self, low: torch.dtype, draws: int, seed: int = 0) -> None:
        self.low_dtype = low
        self.wide_dtype = torch.promote_types(low, torch.float32)
        self.draws = draws
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def wide(self, values: Tensor) -> Tensor:
        """Rounded to float32, or float64 for float64 inputs; the gradient likewise."""
        return _Rounded.apply(values, self, self.wide_dtype)

    def sum(self, values: Tensor, axis: int = -1) -> Tensor:
        """A sum in the wide dtype."""
        total, fixed = values.sum(axis), values.detach()
        off = self._off((fixed**2).sum(axis), total.detach(), values.shape[axis])
        return self.wide(total + off)

    def linear(self, hidden: Tensor, classifier: Tensor) -> Tensor:
        """``[draws, N, D]`` times ``[draws, V, D]``: summed wide, rounded low, as its gradients."""
        return _Linear.apply(hidden, classifier, self)

    def sigmoid(self, values: Tensor) -> Tensor:
        """With a gradient made from the rounded result, as PyTorch's."""
        return _Sigmoid.apply(values, self)

    def exp(self, values: Tensor) -> Tensor:
        """With a gradient made from the rounded result, as PyTorch's."""
        return _Exp.apply(values, self)

    def tanh(self, values: Tensor) -> Tensor:
        """With a gradient made from the rounded result, as PyTorch's."""
        return _Tanh.apply(values, self)

    def logsumexp(self, values: Tensor) -> Tensor:
        """Over the last axis, with a gradient made from the rounded result, as PyTorch's."""
        return _LogSumExp.apply(values, self)

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded where the numbers of the dtype would be if its unit were another."""
        unit = self._units(values)
        found = (values * unit).to(dtype).double() / unit
        found[0] = values[0]
        return found

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """A matmul that sums wide and rounds its result to the low dtype."""
        exact = left @ right
        off = self._off(left**2 @ right**2, exact, left.shape[-1])
        return self.rounded(exact + off, self.low_dtype)

    def _off(self, squares: Tensor, total: Tensor, length: int) -> Tensor:
        """How far wide sums of ``length`` terms are off, given those of the terms' squares.

        Each addition rounds its partial sum. These grow like a random walk where the terms have
        both signs, and steadily to the total where they have one. Where all terms are the same,
        the roundings may be as well.
        """
        if length == 1:
            return torch.zeros_like(total)
        alike = (total**2 / (length * squares)).nan_to_num() ** 8
        size = length / 2 * squares + total**2 * (length / 3 + alike * length**2 / 16)
        size = size.sqrt().nan_to_num()
        noise = torch.frac(torch.frexp(size)[0] * self._units(size) * 2**20).mul_(2).sub_(1)
        noise[0] = 0
        return size * noise * (torch.finfo(self.wide_dtype).eps / 2)

    def _units(self, like: Tensor) -> Tensor:
        """Between a half and one and a half, ``[draws, ...]``.

        In every second draw the same for all values: equal ones are then rounded alike, and their
        errors add up, or cancel. In the others one for each value, as if no two were quite equal.
        """
        shape = len(like[::2]), *(1,) * (like.dim() - 1)
        units = torch.rand(like.shape, generator=self._generator, dtype=torch.float64)
        units[::2] = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return units.add_(0.5)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, arithmetic: Arithmetic, dtype: torch.dtype) -> Tensor:
        ctx.how = arithmetic, dtype
        return arithmetic.rounded(values, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        arithmetic, dtype = ctx.how
        return arithmetic.rounded(grads[0], dtype), None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, classifier: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(hidden, classifier)
        ctx.arithmetic = arithmetic
        return arithmetic.product(hidden, classifier.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, classifier = ctx.saved_tensors
        dz = ctx.arithmetic.rounded(grads[0], ctx.arithmetic.low_dtype)
        return ctx.arithmetic.product(dz, classifier), ctx.arithmetic.product(dz.mT, hidden), None


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, arithmetic: Arithmetic) -> Tensor:
        found = arithmetic.rounded(values.exp(), arithmetic.wide_dtype)
        ctx.save_for_backward(found)
        ctx.arithmetic = arithmetic
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (found,) = ctx.saved_tensors
        return ctx.arithmetic.rounded(grads[0] * found, ctx.arithmetic.wide_dtype), None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, arithmetic: Arithmetic) -> Tensor:
        found = arithmetic.rounded(values.sigmoid(), arithmetic.wide_dtype)
        ctx.save_for_backward(values, found)
        ctx.arithmetic = arithmetic
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, found = ctx.saved_tensors
        rest = ctx.arithmetic.rounded(1 - found, ctx.arithmetic.wide_dtype)
        rest[0] = torch.sigmoid(-values[0])
        return ctx.arithmetic.rounded(grads[0] * found * rest, ctx.arithmetic.wide_dtype), None


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, arithmetic: Arithmetic) -> Tensor:
        found = arithmetic.rounded(values.tanh(), arithmetic.wide_dtype)
        ctx.save_for_backward(values, found)
        ctx.arithmetic = arithmetic
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, found = ctx.saved_tensors
        slope = 1 - found**2
        slope[0] = 1 / values[0].cosh() ** 2
        return ctx.arithmetic.rounded(grads[0] * slope, ctx.arithmetic.wide_dtype), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, arithmetic: Arithmetic) -> Tensor:
        highest = values.amax(-1, keepdim=True)
        highest = torch.where(highest.isfinite(), highest, 0)
        mass = arithmetic.sum(arithmetic.exp(arithmetic.wide(values - highest)))
        found = arithmetic.wide(highest[..., 0] + arithmetic.wide(mass.log()))
        ctx.save_for_backward(values, found)
        ctx.arithmetic = arithmetic
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        values, found = ctx.saved_tensors
        share = ctx.arithmetic.exp(ctx.arithmetic.wide(values - found[..., None]))
        return ctx.arithmetic.wide(grads[0][..., None] * share), None
