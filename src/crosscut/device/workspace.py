"""Workspace in memory whose own contents come later: rows of dC that nobody has written yet.

dC takes 2 VD bytes from the start of a backward to its end, and most of them wait for their turn
while dz, lists and sums come and go beside them. So these live in rows of dC, which are written
once nobody needs what they hold:

    dC [V, D]   +--------------------------+---------------------------------+
                | rows, free to be written | lent       .. third second first |
                +--------------------------+---------------------------------+
                0                        ``lent_from``             ``taken_from``

Pieces are handed out from the end; what comes first can stay the longest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as much as PyTorch's own allocator has


class Workspace:
    """Hands out tensors: of the rows that are lent, or new ones where those are used up.

    Args:
        device: of the tensors.
        lender: [V, D], contiguous, or None if nobody lends.
        lent_from: its first row that is lent.
    """

    def __init__(self, device: torch.device, lender: Tensor | None = None, lent_from: int = 0):
        self._device = device
        self._row_bytes = self._least = self._taken = 0
        self._memory: dict[torch.dtype, Tensor] = {}  # the lender's, flat
        if lender is not None:
            self._memory[torch.uint8] = lender.view(-1).view(torch.uint8)
            self._row_bytes = lender.shape[1] * lender.element_size()
            self._least, self._taken = lent_from * self._row_bytes, lender.nbytes

    @property
    def taken_from(self) -> int | None:
        """The first of the lender's rows of which something is taken; None if nobody lends."""
        return self._taken // self._row_bytes if self._memory else None

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor [shape] of anything."""
        size = math.prod(shape)
        begin = (self._taken - size * dtype.itemsize) // ALIGNMENT * ALIGNMENT
        if not self._memory or begin < self._least:
            return torch.empty(shape, dtype=dtype, device=self._device)
        self._taken = begin
        if dtype not in self._memory:
            of_dtype = self._memory[torch.uint8]
            whole = len(of_dtype) // dtype.itemsize * dtype.itemsize
            self._memory[dtype] = of_dtype[:whole].view(dtype)
        first = begin // dtype.itemsize
        return self._memory[dtype][first : first + size].view(shape)
