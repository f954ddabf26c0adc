"""Makes a problem smaller for as long as the same thing is wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fuzz.problem import Problem

SECONDS = 20.0


def shrink(
    problem: Problem, still_wrong: Callable[[Problem], bool], seconds: float = SECONDS
) -> Problem:
    """A problem from which nothing can be taken, or the smallest that was found in time."""
    end = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for candidates in (_smaller, _plainer, _simpler):
            # Start over after a success: what failed on the larger problem may now do.
            found = _first(candidates(problem), still_wrong, end)
            while found is not None:
                problem, progress = found, True
                found = _first(candidates(problem), still_wrong, end)
        if time.monotonic() > end:
            break
    return problem


def _first(
    candidates: Iterator[Problem], still_wrong: Callable[[Problem], bool], end: float
) -> Problem | None:
    for candidate in candidates:
        if time.monotonic() > end:
            return None
        if still_wrong(candidate):
            return candidate
    return None


def _smaller(problem: Problem) -> Iterator[Problem]:
    """Fewer sequences, tokens, classes, dimensions: a half, a quarter, ... one."""
    for axis in "btvdek":
        lengths = [
            values.shape[problem.axes(name).index(axis)]
            for name, values in problem.tensors.items()
            if axis in problem.axes(name)
        ]
        if not lengths or lengths[0] < 2:
            continue
        length, least = lengths[0], 2 if axis == "v" else 1  # one class is a kind of its own
        size = length // 2
        while size:
            for start in range(0, length, size):
                stop = min(start + size, length)
                if length - (stop - start) >= least:
                    smaller = _cut(problem, axis, start, stop)
                    if smaller is not None:
                        yield smaller
            size //= 2


def _cut(problem: Problem, axis: str, start: int, stop: int) -> Problem | None:
    """The problem less a range of one of its axes; None where a class is a target."""
    tensors = {}
    for name, values in problem.tensors.items():
        axes = problem.axes(name)
        if axis in axes:
            at = axes.index(axis)
            parts = values.narrow(at, 0, start), values.narrow(at, stop, values.shape[at] - stop)
            values = torch.cat(parts, at)
        tensors[name] = values
    if axis == "v":
        ignore_index = problem.option("ignore_index", -100)
        if ignore_index >= 0:
            return None
        for name in ("target", "targets", "teacher_index"):
            if name in tensors:
                classes = tensors[name]
                if ((classes >= start) & (classes < stop)).any():
                    return None
                tensors[name] = torch.where(classes >= stop, classes - (stop - start), classes)
    return replace(problem, tensors=tensors)


def _plainer(problem: Problem) -> Iterator[Problem]:
    """Without an option, a bias, weights, a layout."""
    for name in ("linear_bias", "weight", "token_weight", "teacher_bias"):
        if name in problem.tensors:
            yield problem.without(name)
    for name in problem.options:
        if name == "ignore_index":
            yield _ignoring(problem, -100)
        elif name == "entropy":
            continue  # it decides the shape of the value
        elif name == "reduction":
            yield from _summed(problem)
        elif name != "gathered":
            yield problem.without(name)
    if problem.layouts:
        yield replace(problem, layouts={})
    if problem.autocast:
        yield replace(problem, autocast=None, tensors=problem.cast())
    if problem.workspace:
        yield replace(problem, workspace=None)
    if problem.frozen and problem.program != "gradient_sparsity":
        yield replace(problem, frozen=frozenset())
    if problem.batch == "b1t":
        yield replace(problem, batch="bt")
    one = problem.batch == "bt" and problem.tensors["input"].shape[0] == 1
    if one and not problem.program.startswith("losses."):
        yield replace(problem, batch="t")
    if problem.program == "LinearCrossEntropy":
        yield replace(problem, program="linear_cross_entropy")


def _ignoring(problem: Problem, ignore_index: int) -> Problem:
    """With another index for what is ignored."""
    was = problem.option("ignore_index")
    tensors = dict(problem.tensors)
    for name in ("target", "targets", "teacher_index"):
        if name in tensors:
            tensors[name] = torch.where(tensors[name] == was, ignore_index, tensors[name])
    return replace(problem, tensors=tensors).without("ignore_index")


def _summed(problem: Problem) -> Iterator[Problem]:
    """A sum, from one loss a token."""
    if problem.option("reduction") == "none":
        options = {**problem.options, "reduction": "sum"}
        upstream = torch.ones((), dtype=problem.tensors["upstream"].dtype)
        yield replace(problem, options=options, tensors={**problem.tensors, "upstream": upstream})


def _simpler(problem: Problem) -> Iterator[Problem]:
    """Values with fewer digits: 0, 1, whole numbers, few bits."""
    for name, values in problem.tensors.items():
        if not values.is_floating_point():
            continue
        for simple in _simpler_values(values):
            if not torch.equal(simple.nan_to_num(), values.nan_to_num()):
                yield replace(problem, tensors={**problem.tensors, name: simple})


def _simpler_values(values: Tensor) -> Iterator[Tensor]:
    if (values.isfinite() & (values != values.round())).any():
        yield values.round()
    for step in (2, 8, 64):
        coarse = (values * step).round() / step
        if (coarse != values).logical_and(values.isfinite()).any():
            yield coarse
    if (values != 1).any():
        yield torch.ones_like(values)
    flat = values.flatten()
    if 1 < len(flat) <= 64:
        for index in range(len(flat)):
            if flat[index] != 0:
                one = flat.clone()
                one[index] = 0
                yield one.view(values.shape)
            whole = flat[index].round()
            if whole.isfinite() and whole != flat[index]:
                one = flat.clone()
                one[index] = whole
                yield one.view(values.shape)
