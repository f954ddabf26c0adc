"""Gradients of the statistics, by policy."""

from __future__ import annotations

from dataclasses import replace

from crosscut.backends.protocol import Cotangents, Gradients, HeadProblem, Needs, Statistics
from crosscut.backends.triton.column_filter import block_tokens
from crosscut.backends.triton.filtered import filtered_gradients
from crosscut.backends.triton.sweep import side_by_side, sweep


def compute_gradients(
    problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
) -> Gradients:
    """The filtered gradient where the forward left column masses, else that of a whole sweep.

    An entropy's is exact under every policy: ``p log p`` is large where p no longer is.
    """
    inputs = problem.hidden, problem.classifier, problem.bias
    out = Gradients(*(
        value.new_empty(value.shape)  # contiguous
        if value is not None and need else None
        for value, need in zip(inputs, needs, strict=True)
    ))  # fmt: skip
    if out.hidden is not None:
        out.hidden.zero_()  # rows that take no part
    if not len(problem.labels):
        for gradient in out[1:]:
            if gradient is not None:
                gradient.zero_()
        return out
    together = side_by_side(problem, statistics, cotangents, block_n=block_tokens(problem))
    if cotangents.entropy is not None:
        sweep(replace(problem, options=replace(problem.options, policy="exact")), together, out)
    elif len(statistics.column_mass):
        filtered_gradients(problem, statistics, together, out)
    else:
        sweep(problem, together, out)
    return out
