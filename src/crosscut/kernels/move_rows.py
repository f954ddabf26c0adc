"""Move rows of a matrix to other places, scaled and cast: ``out[i] = scale * source[index[i]]``.

A negative index makes a row of zeros. Program i owns rows BLOCK_N i to BLOCK_N (i + 1) of ``out``.
Each row is read and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel

BLOCK_N = 8
BLOCK_D = 256


@triton.jit
def move_to(
    out_ptr, rows, num_rows, source_ptr, index, scale, hidden_size, stride_row, stride_d,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[rows] = scale * source[index]``, both [BLOCK_N] int64; ``scale`` may be None."""
    for start in range(0, hidden_size, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]  # [1, BLOCK_D]
        mask = (d < hidden_size) & (index >= 0)[:, None]
        place = source_ptr + index[:, None] * stride_row + d * stride_d
        value = tl.load(place, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        if scale is not None:
            value = value.to(tl.float32) * scale
        value = value.to(out_ptr.dtype.element_ty)
        mask = (d < hidden_size) & (rows < num_rows)[:, None]
        tl.store(out_ptr + rows[:, None] * hidden_size + d, value, mask=mask)


@kernel
def move_rows_kernel(
    source_ptr,
    index_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    hidden_size,
    stride_row,
    stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    index = tl.load(index_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int64)
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    move_to(
        out_ptr, rows, num_rows, source_ptr, index, scale, hidden_size, stride_row, stride_d,
        BLOCK_D,
    )  # fmt: skip


def move_rows(out: Tensor, source: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
    """Fill ``out`` [n, D], contiguous, from ``source`` [m, D] by ``index`` [n]; return it.

    ``scale`` [1] float32, or None for 1.
    """
    if len(out):
        move_rows_kernel[(triton.cdiv(len(out), BLOCK_N),)](
            source, index, scale, out, *out.shape, *source.stride(),
            BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return out
