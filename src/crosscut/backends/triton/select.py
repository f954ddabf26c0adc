"""The plan of a backward, made once per call: by which method, for which pairs, in what memory.

**Method.** The gradient of selected pairs where the forward has left column masses, the paper's
under its gradient policies, else every entry of the softmax. An entropy's gradient has every entry
whatever the policy: ``p log p`` is large where p no longer is.

**Selection.** The forward has left, for each block of tokens, the mass of each class
(``column_mass``). Selected are the labels and what has too much mass to be left out; the lists live
on the device, and the host never waits (:mod:`crosscut.kernels.selected_pairs`). Each block of
tokens has a budget for the mass that is left out. Where pairs do not fit the capacity, the softmax
is too flat to leave much out, and every entry is computed: the exact sweep runs after all, decided
on the device. Where it is not needed its kernels find nothing to do, some microseconds each. With
``PAIR_SWEEP`` (:mod:`crosscut.backends.column_filter`) another method comes before it, which
computes the selected pairs chunk by chunk (:mod:`.pair_sweep`).

**Memory.** What is needed before dC is written lies in rows of dC, if it is wanted and has them.
:data:`LAST_STEP` says until when somebody reads each region.
"""

from __future__ import annotations

import math
from enum import IntEnum, auto
from typing import NamedTuple

from torch import Tensor

from crosscut.backends.column_filter import (
    Capacity,
    block_tokens,
    capacity_for_pairs,
    most_swept,
    most_tail,
)
from crosscut.backends.protocol import Cotangents, Gradients, HeadProblem, Needs, Statistics
from crosscut.backends.triton.chunks import Part, plan_parts
from crosscut.backends.triton.valid_tokens import ValidTokens, side_by_side
from crosscut.device.tiles import Kernel, Tiles, choose_tiles
from crosscut.device.workspace import Layout, Lender, Region, Workspace
from crosscut.kernels.nonzero_matmul import nonzero_shapes
from crosscut.kernels.pair_gradient import gradient_shapes
from crosscut.kernels.pair_sweep import segment_classes
from crosscut.kernels.selected_pairs import (
    CELL,
    Limits,
    SelectedPairs,
    list_shapes,
    select_pairs,
)
from crosscut.options import PaperFilter

LITTLE = 2**23
"""Bytes that are not worth another launch."""


class Step(IntEnum):
    """What is done with selected pairs, in this order."""

    SELECT = auto()  # the lists of pairs
    GATHER = auto()  # rows of C of hot classes, and the tail's rows for dH
    GRADIENT = auto()  # dz
    TAIL = auto()  # what stands for it
    HIDDEN = auto()  # dH
    NONZEROS = auto()  # their lists
    HOT = auto()  # rows of dC of hot classes, but for those whose memory is lent
    FIRST_ROWS = auto()  # of dC: up to those in which the tail's masses lie
    LAST_ROWS = auto()  # of dC


LAST_STEP = {
    "tail_mass": Step.FIRST_ROWS,
    "columns": Step.NONZEROS,
    "cell_start": Step.NONZEROS,
    "count": Step.SELECT,
    "block_count": Step.SELECT,
    "chunk_tail": Step.SELECT,
    "is_hot": Step.SELECT,
    "tails": Step.SELECT,
    "range_hot": Step.SELECT,
    "hot_head": Step.HIDDEN,
    "dz": Step.HOT,
    "num_nonzeros": Step.NONZEROS,
    "selected_mass": Step.TAIL,
    "nonzero_mass": Step.TAIL,
    "rest": Step.TAIL,
    "nonzeros_before": Step.NONZEROS,
    "nonzero_count": Step.NONZEROS,
}
"""The last step that reads each region. From ``FIRST_ROWS`` on rows of dC are written: by then only
the tail's masses, which come first and so lie in the very last rows, may be wanted, and rows before
theirs are written first."""


class Selection(NamedTuple):
    """The pairs that are computed, and the memory for what becomes of them."""

    tiles: Tiles  # BLOCK_N tokens x BLOCK_V slots
    workspace: Workspace  # with the regions of LAST_STEP
    pairs: SelectedPairs
    deferred: Tensor | None  # [most, D], for rows of deferred classes
    first_rows: int  # rows of dC before those that the tail's masses lie in, a multiple of CELL


class Plan(NamedTuple):
    """What :func:`select` decides, and :func:`crosscut.backends.triton.project.project` does."""

    out: Gradients  # to be filled
    valid: ValidTokens
    selection: Selection | None  # where pairs are selected
    paper: PaperFilter | None  # where the gradient is the paper's
    by_chunks: bool  # whether chunks are launched one by one
    parts: list[Part]  # of the exact sweep, if chunks are not
    swept_parts: list[Part]  # of the sweep over selected pairs, if there is one


def select(
    problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
) -> Plan:
    """The plan of a call's backward, its lists filled on the device."""
    out = _empty_gradients(problem, needs)
    valid = side_by_side(problem, statistics, cotangents, multiple=block_tokens(problem))
    selection = paper = None
    swept_parts: list[Part] = []
    if cotangents.entropy is None:
        paper = problem.options.paper_filter
        if len(statistics.saved.column_mass):
            selection = _select_pairs(problem, statistics, valid, out.classifier)
            if most_swept():
                segment = segment_classes(problem.hidden.device)
                swept_parts = plan_parts(problem, out.classifier, multiple=segment)
    # The exact sweep makes the sums over tokens, of a bias, with dC.
    by_chunks = paper is not None or (out.bias is not None and out.classifier is None)
    parts = [] if by_chunks else plan_parts(problem, out.classifier)
    return Plan(out, valid, selection, paper, by_chunks, parts, swept_parts)


def _empty_gradients(problem: HeadProblem, needs: Needs) -> Gradients:
    inputs = problem.hidden, problem.classifier, problem.bias
    out = Gradients(*(
        value.new_empty(value.shape)  # contiguous
        if value is not None and need else None
        for value, need in zip(inputs, needs, strict=True)
    ))  # fmt: skip
    if out.hidden is not None:
        out.hidden.zero_()  # rows that are not valid
    return out


def _select_pairs(
    problem: HeadProblem, statistics: Statistics, valid: ValidTokens, d_classifier: Tensor | None
) -> Selection:
    column_mass = statistics.saved.column_mass
    tiles = choose_tiles(Kernel.PAIRS, problem.hidden)
    capacity = capacity_for_pairs(problem, lends=d_classifier is not None)
    layout = plan_workspace(problem, column_mass, capacity, tiles, d_classifier)
    workspace = Workspace(layout, problem.hidden.device, d_classifier)
    limits = Limits(
        most_tail(problem), capacity.hot, capacity.lent_from, capacity.deferred, most_swept()
    )
    pairs = select_pairs(
        column_mass, valid.tokens, workspace, limits,
        block_n=tiles.block_n, block_slots=tiles.block_v,
    )  # fmt: skip
    deferred = None
    if d_classifier is not None and capacity.deferred:
        deferred = d_classifier.new_empty(capacity.deferred, d_classifier.shape[1])
    first_rows, begin = column_mass.shape[1], layout.offset["tail_mass"]
    if d_classifier is not None and begin is not None:
        row_bytes = d_classifier.shape[1] * d_classifier.element_size()
        first_rows = begin // row_bytes // CELL * CELL
    workspace.end(Step.SELECT)
    return Selection(tiles, workspace, pairs, deferred, first_rows)


def plan_workspace(
    problem: HeadProblem,
    column_mass: Tensor,
    capacity: Capacity,
    tiles: Tiles,
    d_classifier: Tensor | None,
) -> Layout:
    """Where everything lies that the backward needs of selected pairs."""
    (blocks, num_classes), dtype = column_mass.shape, problem.hidden.dtype
    slots = (math.ceil(capacity.pairs / tiles.block_v) + 2 * blocks) * tiles.block_v
    hot = math.ceil(capacity.hot / tiles.block_v) * tiles.block_v
    shapes = {
        "tail_mass": ((blocks, num_classes), column_mass.dtype),
        **list_shapes(blocks, num_classes, slots),
        "hot_head": ((hot, problem.classifier.shape[1]), dtype),
        **gradient_shapes(slots, dtype, tiles),
        **nonzero_shapes(blocks, num_classes, slots),
    }
    little = column_mass.nbytes <= LITTLE
    regions = {
        name: Region(shape, dtype, LAST_STEP[name], name == "tail_mass" and little)
        for name, (shape, dtype) in shapes.items()
    }
    lender = None if d_classifier is None else Lender.of(d_classifier, capacity.lent_from)
    return Layout(regions, lender)
