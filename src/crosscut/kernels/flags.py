"""Classes that a flag picks out of the vocabulary, numbered in ascending order, on the device.

``flags`` [V] int8 is 0 or 1. The rank of a flagged class is how many flagged classes come before
it. A program that wants the ranks of some classes counts the flags before them itself: they are few
bytes, in the L2 cache, and no program waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel

FLAG_CLASSES = 8192
"""Classes that one program ranks."""


@triton.jit
def count_flags(flags_ptr, first, end, num_classes, BLOCK: tl.constexpr):
    """Number of flags of the classes from ``first`` to ``end``, both multiples of BLOCK or V."""
    count = 0
    for start in range(first, end, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        flags = tl.load(flags_ptr + classes, mask=classes < num_classes, other=0)
        count += tl.sum(flags.to(tl.int32), 0)
    return count


@kernel
def flagged_first_kernel(flags_ptr, out_ptr, most, num_classes, BLOCK: tl.constexpr):
    """Program i owns the places of the classes from BLOCK i on."""
    first = tl.program_id(0) * BLOCK
    before = count_flags(flags_ptr, 0, first, num_classes, BLOCK)
    total = before + count_flags(flags_ptr, first, num_classes, num_classes, BLOCK)
    classes = first + tl.arange(0, BLOCK)
    flags = tl.load(flags_ptr + classes, mask=classes < num_classes, other=0).to(tl.int32)
    rank = before + tl.cumsum(flags, 0) - flags
    place = tl.where(flags > 0, rank, total + classes - rank)
    tl.store(out_ptr + place, classes, mask=(classes < num_classes) & (place < most))


def flagged_first(flags: Tensor, most: int) -> Tensor:
    """The first ``most`` classes [most] int32: those that ``flags`` [V] picks, then the others."""
    num_classes = len(flags)
    out = torch.empty(most, dtype=torch.int32, device=flags.device)
    flagged_first_kernel[(triton.cdiv(num_classes, FLAG_CLASSES),)](
        flags, out, most, num_classes, BLOCK=FLAG_CLASSES, num_warps=8
    )
    return out
