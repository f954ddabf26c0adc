"""dH and dC of selected pairs that do not fit their lists, or whose nonzeros do not.

The same pairs, and the same tail, as in :mod:`.project`, by chunks of the vocabulary as in
:mod:`.exact`: any number of pairs, in the workspace of a chunk. See
:mod:`crosscut.kernels.pair_sweep`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscut.backends.column_filter import mass_unit
from crosscut.backends.protocol import HeadProblem, Statistics
from crosscut.backends.triton.select import Plan
from crosscut.device.tiles import Kernel, choose_tiles
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.pair_sweep import (
    SelectedMasses,
    SweepOutputs,
    Tail,
    pair_sweep,
    sort_classes,
)
from crosscut.kernels.selected_pairs import SelectedPairs


def sweep_pairs(
    problem: HeadProblem,
    statistics: Statistics,
    plan: Plan,
    pairs: SelectedPairs,
    num_rows: Tensor,
    tail_row: Tensor | None,
) -> None:
    """Fill dC, and dH if the pairs are not listed. Nothing where ``num_rows`` [1] is negative.

    ``tail_row`` [blocks, D] float32 are the tail's rows for dH, None if dH is not wanted.
    """
    out, valid, options = plan.out, plan.valid, problem.options
    tiles = (
        choose_tiles(Kernel.PAIRS, problem.hidden),
        choose_tiles(Kernel.HOT_MATMUL, problem.hidden),
    )
    head = Head(problem.hidden, problem.classifier, None, options.logit_scale, options.softcap)
    masses = SelectedMasses(
        statistics.saved.column_mass, len(problem.classifier), pairs.threshold[0], pairs.hot_rank
    )
    ordered = sort_classes(num_rows, masses, (tiles[0].block_n, tiles[1].block_n))
    tail = Tail(
        mass=statistics.saved.tail_mass,
        unit=mass_unit(len(problem.classifier)),
        sum=pairs.tail,
        row=tail_row,
        selected=torch.empty_like(statistics.saved.tail_mass),
    )
    outputs = SweepOutputs(
        rows=valid.rows.rows,
        num_hidden_rows=pairs.swept_rows,
        d_hidden=out.hidden,
        compensation=None if out.hidden is None else torch.empty_like(out.hidden),
        d_classifier=out.classifier,
    )
    tokens = valid.limited_to(num_rows).tokens
    for part in plan.swept_parts:
        dz = part.workspace(problem.hidden.device, out.classifier)
        chunks = dz, part.classes
        pair_sweep(head, tokens, (masses, ordered), tail, outputs, chunks, valid.scale, tiles)
