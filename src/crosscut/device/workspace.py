"""Workspace in memory whose own contents come later: rows of dC that nobody has written yet.

dC takes 2 VD bytes from the start of a backward to its end, and most of them wait for their turn
while dz, lists and sums come and go beside them. So these lie in rows of dC, which are written once
nobody needs what they hold:

    dC [V, D]   +--------------------------+--------------------------------+
                | rows, free to be written | lent      .. third second first |
                +--------------------------+--------------------------------+
                0                       ``lent_from``              ``first_row``

A :class:`Layout` is made first, from shapes alone: where each region lies, and until which step of
the backward somebody reads it. It is applied to a dC later (:class:`Workspace`). Regions are placed
from the end, in the order in which they are given: the first can stay the longest. One that does
not fit has memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes, as much as PyTorch's own allocator has."""

poisons = False
"""Whether a region is overwritten at the end of its life: a test of who reads it too late."""


class Region(NamedTuple):
    """A tensor of a workspace."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    until: int = 0  # the last step that reads it
    alone: bool = False  # whether it has memory of its own whatever there is


class Lender(NamedTuple):
    """A contiguous matrix whose last rows lend their memory."""

    rows: int
    row_bytes: int
    lent_from: int = 0  # the first row that is lent

    @classmethod
    def of(cls, matrix: Tensor, lent_from: int = 0) -> Lender:
        """What a matrix lends."""
        return cls(len(matrix), matrix.shape[1] * matrix.element_size(), lent_from)


class Layout:
    """Where regions lie.

    Attributes:
        regions: all of them by name.
        offset: bytes from the beginning of the lender to each region; None where it has memory of
            its own.
        last_of: by step, the regions that nobody reads later.
        first_row: the first of the lender's rows of which something is taken; None without one.
    """

    def __init__(self, regions: Mapping[str, Region], lender: Lender | None = None) -> None:
        self.regions = regions
        self.offset: dict[str, int | None] = {}
        self.last_of: dict[int, list[str]] = {}
        taken = 0 if lender is None else lender.rows * lender.row_bytes
        for name, region in regions.items():
            self.last_of.setdefault(region.until, []).append(name)
            size = math.prod(region.shape) * region.dtype.itemsize
            begin = (taken - size) // ALIGNMENT * ALIGNMENT
            if lender is None or region.alone or begin < lender.lent_from * lender.row_bytes:
                self.offset[name] = None
            else:
                self.offset[name] = taken = begin
        self.first_row = None if lender is None else taken // lender.row_bytes


class Workspace:
    """The regions of a layout, of anything: in rows of ``lender`` [V, D], and beside it."""

    def __init__(self, layout: Layout, device: torch.device, lender: Tensor | None = None) -> None:
        self.layout = layout
        self._device = device
        self._lender = None if lender is None else lender.view(-1).view(torch.uint8)
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A region, the same tensor each time."""
        if name not in self._made:
            self._made[name] = self._make(*self.layout.regions[name][:2], self.layout.offset[name])
        return self._made[name]

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int | None) -> Tensor:
        if offset is None or self._lender is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        size = math.prod(shape) * dtype.itemsize
        return self._lender[offset : offset + size].view(dtype).view(shape)

    def end(self, step: int) -> None:
        """Nobody reads what is needed until this step any more, nor may."""
        for name in self.layout.last_of.get(step, ()):
            gone = self._made.pop(name, None)
            if poisons and gone is not None:
                gone.view(-1).view(torch.uint8).fill_(0xFF)  # NaN, or -1
