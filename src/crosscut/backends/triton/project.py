"""dH and dC, as :mod:`.select` has planned them.

Of selected pairs alone, dz is made again and multiplied; for the rest of the softmax stands, block
by block, the rank-one matrix with the same row sums and the same column sums (docs/method.md).
Nothing here depends on how many pairs there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscut.backends.column_filter import NONZEROS_PER_TOKEN, mass_unit, nonzero_above
from crosscut.backends.protocol import Gradients, HeadProblem, Statistics
from crosscut.backends.triton.chunked import gradients_by_chunks
from crosscut.backends.triton.exact import exact_gradients
from crosscut.backends.triton.pair_sweep import sweep_pairs
from crosscut.backends.triton.select import Plan, Selection, Step
from crosscut.backends.triton.valid_tokens import ValidTokens
from crosscut.device.launch import like_or
from crosscut.device.tiles import Kernel, choose_tiles
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.nonzero_matmul import d_classifier_of_nonzeros, list_nonzeros
from crosscut.kernels.pair_gradient import PairGradient, pair_gradient, tail_of_tokens
from crosscut.kernels.pair_matmul import (
    d_classifier_of_hot,
    d_hidden_of_pairs,
    deferred_rows,
    gather_hot_head,
)


def project(problem: HeadProblem, statistics: Statistics, plan: Plan) -> Gradients:
    """Carry out a plan."""
    valid = plan.valid
    if plan.selection is not None:
        pairs = plan.selection.pairs
        rows_left, tail_row = _of_listed_pairs(problem, statistics, plan, plan.selection)
        if plan.swept_parts:
            sweep_pairs(problem, statistics, plan, pairs, rows_left, tail_row)
            rows_left = pairs.exact_rows
        valid = valid.limited_to(rows_left)
    if plan.by_chunks:
        gradients_by_chunks(problem, valid, plan.out, plan.paper)
    else:
        exact_gradients(problem, valid, plan.out, plan.parts)
    return plan.out


def _of_listed_pairs(
    problem: HeadProblem, statistics: Statistics, plan: Plan, selection: Selection
) -> tuple[Tensor, Tensor | None]:
    """Fill the gradients if the pairs, and the nonzeros of dC, are listed.

    Returns:
        How many rows are left for the sweep over pairs, or the exact one if there is none, [1]
        int32: -1, or all; and the tail's rows for dH, [blocks, D] float32, if it is wanted.
    """
    classifier, options = problem.classifier, problem.options
    tiles, workspace, pairs, _, _ = selection
    out, valid = plan.out, plan.valid.limited_to(pairs.num_rows)
    head = Head(problem.hidden, classifier, None, options.logit_scale, options.softcap)
    nonzero = nonzero_above(len(problem.hidden))
    unlisted_rows = pairs.swept_rows if plan.swept_parts else pairs.exact_rows
    # Before the gradient fills in what it leaves of each pair: dH has all of the pairs.
    by_block = None
    if out.hidden is not None:
        by_block = _product(workspace["tail_mass"], classifier)  # [blocks, D]
    gather_hot_head(workspace["hot_head"], classifier, pairs, block_slots=tiles.block_v)
    workspace.end(Step.GATHER)
    gradient = pair_gradient(
        head, valid.tokens, pairs, workspace, tiles,
        mass_unit=mass_unit(len(classifier)), nonzero=nonzero,
    )  # fmt: skip
    workspace.end(Step.GRADIENT)
    masses = statistics.saved.tail_mass, valid.rows.rows
    by_token, tail_rows = tail_of_tokens(valid.tokens, masses, pairs, gradient, tiles)
    workspace.end(Step.TAIL)
    if out.hidden is not None and by_block is not None:
        d_hidden_of_pairs(
            out.hidden, (valid.tokens, valid.rows.rows), gradient.dz,
            (classifier, workspace["hot_head"]), pairs, (by_token, by_block), valid.scale,
            choose_tiles(Kernel.PAIR_MATMUL, problem.hidden),
        )  # fmt: skip
    workspace.end(Step.HIDDEN)
    if out.classifier is None:
        for step in (Step.NONZEROS, Step.HOT, Step.FIRST_ROWS):
            workspace.end(step)
        return unlisted_rows, by_block
    left = unlisted_rows, tail_rows
    rows_left = _d_classifier(out.classifier, valid, selection, gradient, left, nonzero)
    return rows_left, by_block


def _d_classifier(
    out: Tensor,
    valid: ValidTokens,
    selection: Selection,
    gradient: PairGradient,
    left: tuple[Tensor, Tensor],
    nonzero: float,
) -> Tensor:
    """Fill dC; returns how many rows are left, as its caller.

    ``left`` are these of pairs that are not listed, and the tail's rows for dC.
    """
    unlisted_rows, tail_rows = left
    _, workspace, pairs, deferred, first_rows = selection
    most = min(NONZEROS_PER_TOKEN * len(valid.rows.rows), 2**31 - 1)
    nonzeros = list_nonzeros(
        valid.rows.count,
        valid.tokens,
        pairs,
        gradient,
        workspace,
        unlisted_rows,
        most=most,
        nonzero=nonzero,
    )
    workspace.end(Step.NONZEROS)
    tokens = valid.limited_to(nonzeros.num_rows).tokens
    tiles = choose_tiles(Kernel.HOT_MATMUL, tokens.hidden)
    d_classifier_of_hot(out, deferred, tokens, gradient.dz, pairs, valid.scale, tiles)
    workspace.end(Step.HOT)
    tiles = choose_tiles(Kernel.NONZERO_MATMUL, tokens.hidden)
    tail_mass = workspace["tail_mass"]
    of_last = tail_mass[:, first_rows:]
    of_last = like_or(of_last, of_last.contiguous)
    for step, classes, mass in (
        (Step.FIRST_ROWS, range(first_rows), tail_mass),
        (Step.LAST_ROWS, range(first_rows, len(out)), of_last),
    ):
        if classes:
            tail = mass, tail_rows
            d_classifier_of_nonzeros(
                out, classes, tokens, nonzeros, pairs, tail, valid.scale, tiles
            )
        workspace.end(step)
    if deferred is not None:
        deferred_rows(out, deferred, tokens, pairs)
    return nonzeros.rows_left


def _product(column_mass: Tensor, classifier: Tensor) -> Tensor:
    """``column_mass @ classifier`` [blocks, D] in float32."""
    if classifier.is_meta:  # as in like_or
        shape = len(column_mass), classifier.shape[1]
        return classifier.new_empty(shape, dtype=torch.float32)
    if classifier.is_cuda:
        return torch.mm(column_mass.to(classifier), classifier, out_dtype=torch.float32)
    return column_mass.float() @ classifier.float()
