"""The gradient that crosscut uses by default: kept pairs, and a low-rank term for the tail.

The forward has marked, for each block of tokens, the classes that it keeps, and knows the mass of
each of the others (``column_mass``). The backward computes the kept pairs alone; for what it leaves
out of the softmax stands, block by block, the rank-one matrix with the same row sums and the same
column sums (docs/method.md). Nothing here depends on how many pairs there are: the lists live on
the device, and the host never waits.

**When not.** Where the tail's mass exceeds MAX_TAIL, or the pairs do not fit, the softmax is too
flat to leave much out, and every entry is computed: the exact sweep runs after all, decided on the
device. Where it is not needed its kernels find nothing to do, some microseconds each.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from crosscut.backends.protocol import Gradients, HeadProblem, Statistics
from crosscut.backends.triton.column_filter import (
    DROP_BELOW,
    ENTRIES_PER_TOKEN,
    MAX_TAIL,
    most_pairs,
)
from crosscut.backends.triton.sweep import KeptTokens, sweep
from crosscut.kernels.entry_matmul import classifier_rows, list_entries
from crosscut.kernels.kept_pairs import kept_pairs
from crosscut.kernels.pair_gradient import pair_gradient, tail_of_tokens
from crosscut.kernels.pair_matmul import hidden_rows, popular_rows
from crosscut.kernels.tiles import Head, Kernel, choose_tiles


def filtered_gradients(
    problem: HeadProblem,
    statistics: Statistics,
    side_by_side: KeptTokens,
    out: Gradients,
) -> None:
    """Fill ``out`` from what the forward left in ``statistics``."""
    hidden, classifier = problem.hidden, problem.classifier
    kept, tokens, _, scale = side_by_side
    tiles = choose_tiles(Kernel.PAIRS, hidden)
    head = Head(hidden, classifier, None, problem.options.logit_scale, problem.options.softcap)
    column_mass = statistics.column_mass
    blocks = len(column_mass)
    num_blocks = (kept.count[0] + tiles.block_n - 1) // tiles.block_n
    most = math.ceil(most_pairs(problem) / tiles.block_v) + blocks
    pairs = kept_pairs(
        column_mass, num_blocks, num_slots=most * tiles.block_v, block_slots=tiles.block_v
    )
    filters = pairs.fits
    if problem.options.policy == "auto":
        filters = filters & (pairs.tail.sum() * DROP_BELOW <= MAX_TAIL * kept.count[0])
    tokens = tokens._replace(num_rows=torch.where(filters, kept.count, -1))

    column_mass = column_mass.clamp_min(0)
    tail_of_classes = None
    if out.hidden is not None:
        tail_of_classes = _product(column_mass, classifier)  # [blocks, D]
    gradient = pair_gradient(head, tokens, pairs, column_mass, tiles, drop_below=DROP_BELOW)
    slope_mean = None
    if problem.options.softcap is not None:
        slope_mean = statistics.tail_mass[kept.rows.clamp_min(0).long()]
    tail_hidden, tail_classes = tail_of_tokens(tokens, slope_mean, pairs, gradient, tiles)
    if out.hidden is not None and tail_of_classes is not None:
        out.hidden.zero_()
        hidden_rows(
            out.hidden, tokens, kept.rows, gradient.dz, classifier, pairs,
            (tail_hidden, tail_of_classes), scale, choose_tiles(Kernel.PAIR_MATMUL, hidden),
        )  # fmt: skip
    if out.classifier is not None:
        entries = list_entries(tokens, pairs, gradient, most=ENTRIES_PER_TOKEN * len(hidden))
        filters = filters & entries.fits
        tokens = tokens._replace(num_rows=torch.where(filters, kept.count, -1))
        tail = (
            column_mass,
            torch.bmm(
                tail_classes.view(blocks, 1, -1).to(column_mass),
                tokens.hidden.view(blocks, -1, hidden.shape[1]).to(column_mass),
            )[:, 0],
        )  # [blocks, V], [blocks, D]
        tiles = choose_tiles(Kernel.ENTRY_MATMUL, hidden)
        classifier_rows(out.classifier, tokens, entries, pairs, tail, scale, tiles)
        tiles = choose_tiles(Kernel.POPULAR_MATMUL, hidden)
        popular_rows(out.classifier, tokens, gradient.dz, pairs, tail, scale, tiles)

    del gradient, pairs, column_mass  # their memory is the sweep's now
    exact = replace(problem, options=replace(problem.options, policy="exact"))
    tokens = tokens._replace(num_rows=torch.where(filters, -1, kept.count))
    sweep(exact, side_by_side._replace(tokens=tokens), out)


def _product(column_mass: Tensor, classifier: Tensor) -> Tensor:
    """``column_mass @ classifier`` [blocks, D] in float32."""
    if classifier.is_cuda:
        return torch.mm(column_mass.to(classifier), classifier, out_dtype=torch.float32)
    return column_mass.float() @ classifier.float()
