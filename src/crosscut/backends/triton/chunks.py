"""How wide a chunk of the vocabulary is, and where the gradient of its logits lies.

A chunk's ``dz`` [N, chunk] takes at most ``workspace_limit()`` bytes. That of the exact gradient
lies in rows of dC that are not written yet (:mod:`crosscut.device.workspace`). The last of them are
made with less, and the very last with what is allocated for it:

    classes      0                      V - r       V - s    V        r, s: rows that dz takes
    dz           [N, wide]              [N, middle] [N, narrow]
    lies in      dC[V - r:]             dC[V - s:]  memory of its own
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from crosscut.backends.protocol import HeadProblem
from crosscut.device.tiles import Kernel, Tiles, choose_tiles, num_programs
from crosscut.device.workspace import Layout, Lender, Region, Workspace
from crosscut.kernels.tile_matmul import TILE
from crosscut.options import workspace_limit

MOST_CLASSES = 2**17
"""Classes of a chunk, at most."""

MIDDLE, NARROW = 0.3, 0.14
"""Of ``workspace_limit()``: the workspace of the last classes, where the others' is in dC."""

ENOUGH_CLASSES = 2**12
"""A chunk of so many is as good as a wider one."""


class Part(NamedTuple):
    """Classes whose chunks are of one width, and where ``dz`` of a chunk lies."""

    classes: range
    layout: Layout

    def workspace(self, device: torch.device, d_classifier: Tensor | None) -> Tensor:
        """``dz`` [whole tiles of tokens, chunk], of anything."""
        return Workspace(self.layout, device, d_classifier)["dz"]


def plan_parts(
    problem: HeadProblem, d_classifier: Tensor | None, *, multiple: int = TILE
) -> list[Part]:
    """Which classes go together in a sweep; every class is in one part.

    Where dC is small, or is not wanted, ``dz`` has memory of its own; and where a chunk is wide
    enough without more. A part ends at a multiple of ``multiple`` classes, itself one of TILE.
    """
    num_classes, limit = len(problem.classifier), workspace_limit()
    gradient = choose_tiles(Kernel.GRADIENT, problem.hidden)
    matmul = choose_tiles(Kernel.MATMUL, problem.hidden)

    def layout(share: float, lender: Lender | None = None) -> Layout:
        width = chunk_width(problem, gradient, matmul, int(limit * share))
        shape = math.ceil(len(problem.hidden) / TILE) * TILE, width
        return Layout({"dz": Region(shape, problem.hidden.dtype)}, lender)

    if d_classifier is None or d_classifier.nbytes < 4 * limit:
        return [Part(range(num_classes), layout(1))]
    narrow = layout(NARROW)
    parts, first = [], 0
    if narrow.regions["dz"].shape[1] < ENOUGH_CLASSES:
        for share in (1, MIDDLE):
            wide = layout(share, Lender.of(d_classifier))
            last = (wide.first_row or 0) // multiple * multiple
            if first < last:  # not so where no chunk is narrower than another
                parts.append(Part(range(first, last), wide))
                first = last
    if first < num_classes:  # not so where dz of a chunk is larger than dC
        parts.append(Part(range(first, num_classes), narrow))
    return parts


def new_workspace(problem: HeadProblem, width: int) -> Tensor:
    """For dz of a chunk: whole tiles of tokens, zeros past the last."""
    num_tokens = len(problem.hidden)
    dz = problem.hidden.new_empty(math.ceil(num_tokens / TILE) * TILE, width)
    if num_tokens % TILE:
        dz[num_tokens:] = 0
    return dz


def chunk_width(problem: HeadProblem, gradient: Tiles, matmul: Tiles, num_bytes: int) -> int:
    """Classes of a chunk: as many as so large a workspace allows, and few programs idle."""
    num_tokens = len(problem.hidden)
    row_bytes = math.ceil(num_tokens / TILE) * TILE * problem.hidden.element_size()
    most = min(num_bytes // row_bytes, MOST_CLASSES, len(problem.classifier) + TILE - 1)
    programs = num_programs(problem.hidden.device)
    return _fullest_width(tuple(problem.hidden.shape), most, gradient, matmul, programs)


@functools.cache
def _fullest_width(
    shape: tuple[int, int], most: int, gradient: Tiles, matmul: Tiles, programs: int
) -> int:
    """Of the widths near the most allowed, the one whose rounds are fullest.

    Each kernel's tiles go over the programs in rounds.
    """
    num_tokens, hidden_size = shape

    def time(width: int) -> float:
        """Of one class, in steps of a program: the gradient of logits, and dC."""
        tiles = math.ceil(num_tokens / gradient.block_n) * math.ceil(width / gradient.block_v)
        steps = math.ceil(tiles / programs) * hidden_size * gradient.block_n * gradient.block_v
        tiles = math.ceil(width / matmul.block_n) * math.ceil(hidden_size / matmul.block_v)
        steps += math.ceil(tiles / programs) * num_tokens * matmul.block_n * matmul.block_v
        return steps / width

    most_tiles = max(1, most // TILE)
    counts = range(most_tiles, most_tiles // 2, -max(1, most_tiles // 128))
    return min((TILE * count for count in counts), key=time)
