"""The gradient that crosscut uses by default: kept pairs, and a low-rank term for the tail.

The forward has left, for each block of tokens, the mass of each class (``column_mass``). The
backward keeps the labels and what has too much to be left out, and computes these pairs alone; for
the rest of the softmax stands, block by block, the rank-one matrix with the same row sums and the
same column sums (docs/method.md). Nothing here depends on how many pairs there are: the lists live
on the device, and the host never waits.

**How much.** The tail's mass bounds the error. Each block of tokens has a budget for it; where it
would have more, more pairs are kept, of the masses that the forward has left
(:mod:`crosscut.kernels.selected_pairs`).

**Where.** What is needed before dC is written lies in rows of dC, if it is wanted and has them
(:mod:`crosscut.device.workspace`). The order below keeps to that: rows that lend nothing may be
written first, and the others when nobody needs what they hold.

**When not.** Where pairs or nonzeros do not fit, the softmax is too flat to leave much out, and
every nonzero is computed: the exact sweep runs after all, decided on the device. Where it is not
needed its kernels find nothing to do, some microseconds each.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from crosscut.backends.protocol import Gradients, HeadProblem, Statistics
from crosscut.backends.triton.column_filter import (
    NONZEROS_PER_TOKEN,
    capacity_for_pairs,
    mass_unit,
    most_tail,
    nonzero_above,
)
from crosscut.backends.triton.sweep import ValidTokens, sweep
from crosscut.device.launch import like_or
from crosscut.device.tiles import Kernel, choose_tiles
from crosscut.device.workspace import Workspace
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.nonzero_matmul import d_classifier_of_nonzeros, list_nonzeros
from crosscut.kernels.pair_gradient import pair_gradient, tail_of_tokens
from crosscut.kernels.pair_matmul import (
    d_classifier_of_hot,
    d_hidden_of_pairs,
    deferred_rows,
    gather_hot_head,
)
from crosscut.kernels.selected_pairs import CELL, select_pairs

_LITTLE = 2**23  # bytes that are not worth another launch


def filtered_gradients(
    problem: HeadProblem, statistics: Statistics, together: ValidTokens, out: Gradients
) -> None:
    """Fill ``out`` from what the forward left in ``statistics``."""
    exact_rows = _from_kept_pairs(problem, statistics, together, out)
    exact = replace(problem, options=replace(problem.options, policy="exact"))
    sweep(exact, together._replace(tokens=together.tokens._replace(num_rows=exact_rows)), out)


def _from_kept_pairs(
    problem: HeadProblem, statistics: Statistics, together: ValidTokens, out: Gradients
) -> Tensor:
    """Fill ``out`` if the softmax allows it.

    Returns how many rows are left for the exact sweep, [1] int32: -1, or all.
    """
    hidden, classifier = problem.hidden, problem.classifier
    kept, tokens, _, scale = together
    tiles = choose_tiles(Kernel.PAIRS, hidden)
    head = Head(hidden, classifier, None, problem.options.logit_scale, problem.options.softcap)
    blocks, num_classes = statistics.column_mass.shape
    unit, nonzero = mass_unit(num_classes), nonzero_above(len(hidden))
    room = capacity_for_pairs(problem, lends=out.classifier is not None)
    slots = (math.ceil(room.pairs / tiles.block_v) + 2 * blocks) * tiles.block_v
    workspace = Workspace(hidden.device, out.classifier, room.lent_from)
    deferred = None
    if out.classifier is not None and room.deferred:
        deferred = torch.empty_like(out.classifier[: room.deferred])
    # First of all: what is workspace for the longest. The rows before it can be written meanwhile.
    in_dc = workspace if statistics.column_mass.nbytes > _LITTLE else Workspace(hidden.device)
    tail_mass = in_dc.new(blocks, num_classes, dtype=statistics.column_mass.dtype)
    before_tail = num_classes if in_dc.taken_from is None else in_dc.taken_from // CELL * CELL
    pairs = select_pairs(
        statistics.column_mass, tokens, tail_mass, workspace,
        block_n=tiles.block_n, num_slots=slots, block_slots=tiles.block_v,
        most_tail=most_tail(problem),
        most_hot=room.hot,
        deferred_from=room.lent_from, most_deferred=room.deferred,
    )  # fmt: skip
    exact_rows = pairs.exact_rows
    tokens = tokens._replace(num_rows=pairs.num_rows)

    by_block = _product(tail_mass, classifier) if out.hidden is not None else None  # [blocks, D]
    hot_head = workspace.new(len(pairs.hot), classifier.shape[1], dtype=classifier.dtype)
    gather_hot_head(hot_head, classifier, pairs, block_slots=tiles.block_v)
    gradient = pair_gradient(
        head, tokens, pairs, hot_head, workspace, tiles, mass_unit=unit, nonzero=nonzero
    )
    masses = statistics.tail_mass, kept.rows
    x, rows = tail_of_tokens(tokens, masses, pairs, gradient, tiles)
    if out.hidden is not None and by_block is not None:
        d_hidden_of_pairs(
            out.hidden, tokens, kept.rows, gradient.dz, classifier, hot_head, pairs,
            (x, by_block), scale, choose_tiles(Kernel.PAIR_MATMUL, hidden),
        )  # fmt: skip
    if out.classifier is not None:
        most = min(NONZEROS_PER_TOKEN * len(hidden), 2**31 - 1)
        nonzeros = list_nonzeros(
            kept.count, tokens, pairs, gradient, workspace, most=most, nonzero=nonzero
        )
        exact_rows = nonzeros.exact_rows
        tokens = tokens._replace(num_rows=nonzeros.num_rows)
        tiles = choose_tiles(Kernel.HOT_MATMUL, hidden)
        d_classifier_of_hot(out.classifier, deferred, tokens, gradient.dz, pairs, scale, tiles)
        # From here on nothing in dC is wanted but the tail's masses.
        tiles = choose_tiles(Kernel.NONZERO_MATMUL, hidden)
        of_last = tail_mass[:, before_tail:]
        of_last = like_or(of_last, of_last.contiguous)
        for classes, mass in (
            (range(before_tail), tail_mass),
            (range(before_tail, num_classes), of_last),
        ):
            if classes:
                tail = mass, rows
                d_classifier_of_nonzeros(
                    out.classifier, classes, tokens, nonzeros, pairs, tail, scale, tiles
                )
        if deferred is not None:
            deferred_rows(out.classifier, deferred, tokens, pairs)
    return exact_rows


def _product(column_mass: Tensor, classifier: Tensor) -> Tensor:
    """``column_mass @ classifier`` [blocks, D] in float32."""
    if classifier.is_meta:  # as in like_or
        shape = len(column_mass), classifier.shape[1]
        return classifier.new_empty(shape, dtype=torch.float32)
    if classifier.is_cuda:
        return torch.mm(column_mass.to(classifier), classifier, out_dtype=torch.float32)
    return column_mass.float() @ classifier.float()
