"""What the kernels share: one tile of logits.

A tile of logits is BLOCK_N tokens x BLOCK_V classes, the product of BLOCK_N rows of H and BLOCK_V
rows of C, summed over steps of BLOCK_D in float32 registers:

                       C^T  [D, V]
                      +-----+-----+
                      |     |#####|  BLOCK_D x BLOCK_V
                      +-----+-----+
    H [N, D]          z [N, V]
    +-----+-----+     +-----+-----+
    |#####|     | --> |     |  z  |  BLOCK_N x BLOCK_V
    +-----+-----+     +-----+-----+

**Rows.** Tokens without a label are not valid. ``rows`` (see :mod:`.valid_rows`) lists the others,
and a tile's tokens are neighbours in that list. Mostly they are neighbours in H too: such a tile of
H is loaded as a block, by TMA where there is one. A tile with a gap gathers its rows by pointers.
Which of the two is decided tile by tile, on the device.

**Arguments.** A kernel takes what belongs together as one record, whose fields are pointers and
numbers on the device. TMA descriptors stay beside the records, because Triton's launcher finds them
only among a kernel's own parameters. So does what must not be specialised, like sizes that follow
the number of tokens (:mod:`crosscut.device.launch`): Triton specialises all fields of a record.

**Numerics.** Operands in their own dtype, sums in float32. float32 operands are multiplied as tf32
only where PyTorch's own setting allows it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
NEGLIGIBLE = tl.constexpr(-1e4)  # a log p whose p is 0: stands for -inf, where 0 * inf would be


class HeadArguments(NamedTuple):
    """What a kernel takes of a head, beside hidden states and the number of classes."""

    classifier: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    hidden_size: int
    stride_v: int  # of the classifier
    stride_d: int
    logit_scale: float
    softcap: float | None


class Head(NamedTuple):
    """What makes logits, ``softcap * tanh((logit_scale * H C^T + bias) / softcap)``."""

    hidden: Tensor  # [N, D], contiguous
    classifier: Tensor  # [V, D]
    bias: Tensor | None  # [V], contiguous
    logit_scale: float
    softcap: float | None

    @property
    def arguments(self) -> HeadArguments:
        """All but the hidden states, for a kernel."""
        return HeadArguments(
            classifier=self.classifier,
            bias=self.bias,
            hidden_size=self.classifier.shape[1],
            stride_v=self.classifier.stride(0),
            stride_d=self.classifier.stride(1),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )


@triton.jit
def load_rows(rows_ptr, tile, num_rows, BLOCK_N: tl.constexpr):
    """Tokens of one tile.

    Returns their numbers [BLOCK_N] int64 (the last one again past the end), which of them there
    are [BLOCK_N], the first of them, and whether they have no gap.
    """
    first = tile * BLOCK_N
    last = tl.minimum(first + BLOCK_N, num_rows) - 1
    index = first + tl.arange(0, BLOCK_N)
    rows = tl.load(rows_ptr + tl.minimum(index, last))
    first_row = tl.load(rows_ptr + first)
    no_gap = tl.load(rows_ptr + last) - first_row == last - first
    return rows.to(tl.int64), index <= last, first_row, no_gap


@triton.jit
def dot_tile(left, right, total, PRECISION: tl.constexpr):
    """``total + left right``; ``"upcast"`` for the interpreter, which has no bfloat16."""
    if PRECISION == "upcast":
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    elif PRECISION == "ieee" and left.dtype == tl.float32:
        # A step is summed apart: thousands of products one after the other round too often. The
        # last argument means nothing for float32, but keeps the two sums from being made one.
        step = tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=1)
        return total + step
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def product_tile(
    hidden_ptr,
    hidden_desc,
    head,  # HeadArguments
    classifier_desc,
    rows,  # [BLOCK_N]
    first_row,
    first_class,
    num_classes,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """``H[rows] C[first_class:]^T`` [BLOCK_N, BLOCK_V] in float32; any value past the end."""
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    offsets = tl.arange(0, BLOCK_D)
    hidden_tile = hidden_ptr + rows[:, None] * head.hidden_size + offsets  # [BLOCK_N, BLOCK_D]
    if classifier_desc is None:
        classes = first_class + tl.arange(0, BLOCK_V)
        classes = tl.minimum(classes, num_classes - 1).to(tl.int64)
        classifier_rows = head.classifier + classes[None, :] * head.stride_v  # [1, BLOCK_V]

    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, head.hidden_size, BLOCK_D):
        inside = offsets < head.hidden_size - start
        if GATHER or hidden_desc is None:
            h = tl.load(hidden_tile + start, mask=inside[None, :], other=0.0)
        else:
            h = hidden_desc.load([first_row, start])
        if classifier_desc is None:
            d = (start + offsets).to(tl.int64)[:, None] * head.stride_d
            c = tl.load(classifier_rows + d, mask=inside[:, None], other=0.0)
        else:
            c = classifier_desc.load([first_class, start]).T
        product = dot_tile(h, c, product, PRECISION)
    return product


@triton.jit
def class_product_tile(
    hidden_ptr,
    hidden_desc,
    classifier_ptr,
    classifier_desc,  # None: the classes are gathered
    first_row,
    classes,  # [BLOCK_V]
    first_class,
    hidden_size,
    stride_v,
    stride_d,
    TILE: tl.constexpr,
):
    """``C[classes] H[first_row:]^T`` [BLOCK_V, BLOCK_N] in float32, of any classes.

    :func:`product_tile` transposed: in this order a class's sum over tokens stays in few threads.
    """
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    offsets = tl.arange(0, BLOCK_D)
    rows = (first_row + tl.arange(0, BLOCK_N)).to(tl.int64)
    hidden_tile = hidden_ptr + rows[:, None] * hidden_size + offsets  # [BLOCK_N, BLOCK_D]
    classifier_rows = classifier_ptr + classes.to(tl.int64)[:, None] * stride_v  # [BLOCK_V, 1]
    product = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        inside = offsets < hidden_size - start
        if classifier_desc is None:
            d = (start + offsets).to(tl.int64)[None, :] * stride_d
            c = tl.load(classifier_rows + d, mask=inside[None, :], other=0.0)
        else:
            c = classifier_desc.load([first_class, start])
        if hidden_desc is None:
            h = tl.load(hidden_tile + start, mask=inside[None, :], other=0.0)
        else:
            h = hidden_desc.load([first_row, start])
        product = dot_tile(c, h.T, product, PRECISION)
    return product


@triton.jit
def column_part(
    tile, part: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Half ``part`` of 2, or quarter of 4, [ROWS, COLUMNS / PARTS]; no data leaves its thread.

    What is done to a whole tile at once takes registers that its product has already.
    """
    left, right = tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
    tl.static_assert(PARTS == 2 or PARTS == 4)
    if PARTS == 2:
        return left if part == 0 else right
    else:
        half = left if part < 2 else right
        first, second = half.reshape(ROWS, 2, COLUMNS // 4).permute(0, 2, 1).split()
        return first if part % 2 == 0 else second


@triton.jit
def logits_at(product, head, classes, num_classes):
    """Logits [rows, classes] from their products with some classes; any value past the end."""
    bias = None
    if head.bias is not None:
        bias = tl.load(head.bias + classes, mask=classes < num_classes, other=0.0)
        bias = bias.to(tl.float32)[None, :]
    return logits_of(product, bias, head.logit_scale, head.softcap)


@triton.jit
def logits_of(product, bias, logit_scale, softcap):
    """``softcap * tanh((logit_scale * product + bias) / softcap)``; the optional parts if given."""
    z = product * logit_scale
    if bias is not None:
        z += bias
    if softcap is not None:
        z = softcap * tanh(z * (1 / softcap))
    return z


@triton.jit
def tanh(x):
    """``1 - 2 / (1 + exp(2 x))``, right at both infinities; near 0, where it cancels, a series."""
    square = x * x
    series = -0.05396825396825397 + 0.021869488536155203 * square
    series = 0.13333333333333333 + square * series
    series = x + x * square * (-0.3333333333333333 + square * series)
    return tl.where(square < 0.0625, series, 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E))))


@triton.jit
def slope_of(z, softcap):
    """Derivative of the softcap where its result is z: never negative, however z was rounded."""
    capped = z * (1 / softcap)
    return tl.maximum(1 - capped * capped, 0.0)


@triton.jit
def one_minus_exp(x):
    """``1 - exp(x)`` for x <= 0, with all of its digits near 0 too."""
    series = 1 + x * (1 / 6) * (1 + x * (1 / 7))
    series = 1 + x * (1 / 3) * (1 + x * (1 / 4) * (1 + x * (1 / 5) * series))
    return tl.where(x > -0.25, -x * (1 + x * 0.5 * series), 1 - tl.exp(x))
