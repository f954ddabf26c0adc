"""Sizes of tiles, by kernel, dtype and GPU, and what they say of a launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from crosscut.device import tuned
from crosscut.device.launch import real_device


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
    HOT_MATMUL = "hot_matmul"
    NONZERO_MATMUL = "nonzero_matmul"  # 64 classes
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
    if kernel == Kernel.NONZERO_MATMUL:
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
            Kernel.HOT_MATMUL: (16, 64, 16),
            Kernel.NONZERO_MATMUL: (64, 64, 32),
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
