"""What the kernels share: tile sizes by GPU, and one tile of logits.

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

**Rows.** Tokens without a label take no part. ``rows`` (see :mod:`.kept_rows`) lists the others,
and a tile's tokens are consecutive entries of that list. Mostly they are consecutive tokens too:
such a tile of H is loaded as a block, by TMA where there is one. A tile with a gap gathers its rows
by pointers. Which of the two is decided tile by tile, on the device.

**Numerics.** Operands in their own dtype, sums in float32. float32 operands are multiplied as tf32
only where PyTorch's own setting allows it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from crosscut.kernels import tuned
from crosscut.kernels.launch import real_device

LOG2_E = tl.constexpr(1.4426950408889634)
NEGLIGIBLE = tl.constexpr(-1e4)  # a log p whose p is 0: stands for -inf, where 0 * inf would be


class Kernel(StrEnum):
    """The kernels that work on tiles. What a tile's sizes mean is said where they are launched."""

    LSE = "lse"
    MASS_LSE = "mass_lse"  # with column masses
    WEIGHTED_LSE = "weighted_lse"  # with what a sweep finds besides, if 256 classes leave no room
    GRADIENT = "gradient"
    FILTER = "filter"  # the gradient kernel where it also marks 128 x 128 tiles
    MATMUL = "matmul"
    LIVE_MATMUL = "live_matmul"  # over lists of live tiles, 128 deep at a time
    PAIRS = "pairs"
    PAIR_MATMUL = "pair_matmul"
    POPULAR_MATMUL = "popular_matmul"
    ENTRY_MATMUL = "entry_matmul"  # 64 classes
    DIVERGENCE = "divergence"  # two products at once, and what a sweep finds of them
    DIVERGENCE_GRADIENT = "divergence_gradient"  # two products at once


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of a tile and how it is computed.

    Attributes:
        block_n: tokens of a tile.
        block_v: classes of a tile.
        block_d: hidden dimensions of one step.
        num_warps: warps of a program.
        num_stages: steps loaded ahead.
        precision: ``"ieee"`` or ``"tf32"`` multiplication of float32 operands; ``"upcast"`` makes
            every operand float32 first, which the interpreter needs for bfloat16.
        descriptors: whether TMA loads blocks of those matrices that it can.
        programs: programs that a multiprocessor runs at once: while one is busy with a finished
            tile, another multiplies.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"
    descriptors: bool = False
    programs: int = 1

    @property
    def constants(self) -> tuple[int, int, int, str]:
        """What a kernel takes as ``TILE``: BLOCK_N, BLOCK_V, BLOCK_D, PRECISION."""
        return self.block_n, self.block_v, self.block_d, self.precision


WIDE = 227 * 1024
"""Bytes of shared memory that wide tiles are for: Hopper's, and Blackwell's in data centres."""


class Gpu(NamedTuple):
    """What the table goes by."""

    capability: tuple[int, int]
    shared_memory: int  # bytes that a program may have at most


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """What a CUDA device is."""
    limits = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return Gpu(torch.cuda.get_device_capability(device), limits["max_shared_mem"])


def table(
    kernel: Kernel,
    dtype: torch.dtype,
    gpu: Gpu,
    hidden_size: int,
    *,
    tf32: bool = False,
) -> Tiles:
    """The tiles measured best: by kernel, dtype, GPU and hidden size."""

    def tiles(*sizes: int, **rest: Any) -> Tiles:
        block_n, block_v, block_d, num_warps, num_stages = sizes
        return Tiles(
            block_n=block_n, block_v=block_v, block_d=block_d,
            num_warps=num_warps, num_stages=num_stages, **rest,
        )  # fmt: skip

    wide = gpu.capability >= (9, 0) and gpu.shared_memory >= WIDE
    if dtype == torch.float32:
        precision = "tf32" if tf32 else "ieee"
        if kernel == Kernel.LIVE_MATMUL:
            return tiles(64, 64, 128, 4, 1, precision=precision)
        if kernel == Kernel.FILTER:
            return tiles(128, 128, 16, 16, 2, precision=precision)
        if tf32:
            return tiles(128, 128, 32, 8, 3, precision=precision)
        return tiles(64, 64, 32, 8, 2)  # no tensor cores: registers are what is short
    if kernel == Kernel.LIVE_MATMUL:
        return tiles(128, 256 if wide else 64, 128, 8, 2, descriptors=wide)
    if kernel == Kernel.ENTRY_MATMUL:
        return tiles(64, 256 if wide else 128, 64, 4, 1)
    if kernel == Kernel.PAIRS and wide and gpu.capability >= (10, 0):
        return tiles(128, 128, 64, 8, 3, descriptors=True)
    if kernel == Kernel.PAIR_MATMUL and wide:
        return tiles(128, 256, 64, 8, 3, descriptors=True)
    if kernel in (Kernel.DIVERGENCE, Kernel.DIVERGENCE_GRADIENT):
        if wide:
            return tiles(128, 128, 64, 8, 4, descriptors=True)
        return tiles(128, 64, 64, 8, 3)
    if wide:
        if hidden_size <= 768:  # tiles are finished after few steps
            if kernel == Kernel.MASS_LSE:
                return tiles(128, 128, 64, 4, 3, descriptors=True, programs=2)
            if kernel == Kernel.MATMUL:
                return tiles(128, 128, 128, 8, 3, descriptors=True)
            if kernel == Kernel.GRADIENT:
                return tiles(128, 256, 64, 8, 3, descriptors=True)
        block_v = 128 if kernel == Kernel.WEIGHTED_LSE else 256  # more would spill
        stages = 3 if kernel in (Kernel.WEIGHTED_LSE, Kernel.MATMUL) else 4
        return tiles(128, block_v, 64, 8, stages, descriptors=True)
    return tiles(128, 128, 64, 8, 3)  # up to 68 KiB of shared memory: fits every GPU since Ampere


class Head(NamedTuple):
    """What makes logits, ``softcap * tanh((logit_scale * H C^T + bias) / softcap)``."""

    hidden: Tensor  # [N, D], contiguous
    classifier: Tensor  # [V, D]
    bias: Tensor | None  # [V], contiguous
    logit_scale: float
    softcap: float | None


def choose_tiles(kernel: Kernel, like: Tensor) -> Tiles:
    """The tiles of a kernel for operands [.., D] of the dtype and on the device of ``like``.

    Those of the table, or what ``crosscut tune`` found better on this GPU.
    """
    device = real_device(like.device)
    if device.type != "cuda":  # the interpreter: small, so that small inputs have many
        sizes = {
            Kernel.FILTER: (128, 128, 64),
            Kernel.MATMUL: (16, 64, 16),  # steps within the tokens that a gradient's tile fills
            Kernel.LIVE_MATMUL: (128, 64, 128),
            Kernel.PAIR_MATMUL: (16, 64, 16),
            Kernel.POPULAR_MATMUL: (16, 64, 16),
            Kernel.ENTRY_MATMUL: (64, 64, 32),
        }
        n, v, d = sizes.get(kernel, (16, 64, 32))
        return Tiles(
            block_n=n, block_v=v, block_d=d, num_warps=1, num_stages=1,
            precision="upcast", descriptors=True,
        )  # fmt: skip
    tf32 = like.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    tiles = table(kernel, like.dtype, gpu_of(device), like.shape[-1], tf32=tf32)
    sizes = tuned.lookup(device, tuning_key(kernel, like.dtype, tf32, like.shape[-1]))
    return tiles if sizes is None else replace(tiles, **sizes._asdict())


def tuning_key(kernel: Kernel, dtype: torch.dtype, tf32: bool, hidden_size: int) -> tuned.Key:
    """What a kernel's tuned sizes are found by."""
    return tuned.Key(kernel.value, str(dtype).removeprefix("torch."), tf32, hidden_size)


def has_descriptor(matrix: Tensor) -> bool:
    """Whether TMA can load blocks of a matrix: contiguous rows, everything on 16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return (
        matrix.numel() > 0
        and matrix.stride(1) == 1
        and row_bytes % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def descriptor(matrix: Tensor, block: tuple[int, int], tiles: Tiles) -> TensorDescriptor | None:
    """A TMA descriptor of blocks of a matrix, where the tiles want one and TMA can load it."""
    if not tiles.descriptors or not has_descriptor(matrix):
        return None
    return TensorDescriptor.from_tensor(matrix, list(block))


def num_programs(device: torch.device) -> int:
    """Multiprocessors: programs that run at once, unless ``Tiles.programs`` says more."""
    return _num_programs(real_device(device))


@functools.cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter; an odd number finds more
    return torch.cuda.get_device_properties(device).multi_processor_count


# Bytes of hidden states that a group of programs works on at a time. They are read once for each
# tile of the vocabulary and must stay in the L2 cache meanwhile.
GROUP_BYTES = 20 * 2**20


def tiles_in_group(hidden: Tensor, tiles: Tiles) -> int:
    """Most token tiles that are worked on at a time."""
    tile_bytes = tiles.block_n * hidden.shape[1] * hidden.element_size()
    return max(1, min(num_programs(hidden.device), GROUP_BYTES // tile_bytes))


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
    classifier_ptr,
    classifier_desc,
    rows,  # [BLOCK_N]
    first_row,
    first_class,
    num_classes,
    hidden_size,
    stride_v,
    stride_d,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """``H[rows] C[first_class:]^T`` [BLOCK_N, BLOCK_V] in float32; any value past the end."""
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    PRECISION: tl.constexpr = TILE[3]
    offsets = tl.arange(0, BLOCK_D)
    hidden_tile = hidden_ptr + rows[:, None] * hidden_size + offsets  # [BLOCK_N, BLOCK_D]
    if classifier_desc is None:
        classes = first_class + tl.arange(0, BLOCK_V)
        classes = tl.minimum(classes, num_classes - 1).to(tl.int64)
        classifier_rows = classifier_ptr + classes[None, :] * stride_v  # [1, BLOCK_V]

    product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        inside = offsets < hidden_size - start
        if GATHER or hidden_desc is None:
            h = tl.load(hidden_tile + start, mask=inside[None, :], other=0.0)
        else:
            h = hidden_desc.load([first_row, start])
        if classifier_desc is None:
            d = (start + offsets).to(tl.int64)[:, None] * stride_d
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
