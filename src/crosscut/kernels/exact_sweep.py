"""Algorithm 3 of the paper (arXiv:2411.09009) without its filter, in one launch.

The vocabulary is taken in chunks. For each, as in :mod:`.softmax_gradient` and :mod:`.tile_matmul`,

    dz        = gradient of the chunk's logits [R, chunk]     phase 2 i
    dH       += scale * dz C[chunk]                           phase 2 i + 1
    dC[chunk] = scale * dz^T H                                phase 2 i + 1

**Who owns what.** The kernels of those modules do the work, and their programs own what they own
there. One program per multiprocessor is launched, all together: between two phases they wait for
each other, so that ``dz`` is complete before any of them multiplies it, and multiplied before any
of them overwrites it. They wait for nothing else; sums are in one order, and reruns are bitwise
equal.

**One launch** replaces three per chunk, because a launch takes the host longer than a small chunk
takes the GPU, and the device may find that there is nothing to do.

**Cost.** 6NVD flop, 2 bytes written and 4 read per token and class. Workspace: ``dz`` of a chunk,
and the compensation of dH, what rounding leaves of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs, tiles_in_group
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.softmax_gradient import Tokens, softmax_gradient_kernel
from crosscut.kernels.tile_matmul import tile_matmul_kernel


@triton.jit
def wait_for_all(arrived_ptr, count, FENCE: tl.constexpr):
    """Wait until programs have come here ``count`` times in all; then see what they wrote."""
    if FENCE:  # TMA reads what ordinary stores wrote
        tl.inline_asm_elementwise(
            "fence.proxy.async; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") + 1
    while arrived < count:
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire")
    tl.debug_barrier()
    if FENCE:
        tl.inline_asm_elementwise(
            "fence.proxy.async; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@kernel
def exact_sweep_kernel(
    tokens,  # Tokens
    hidden_desc,
    hidden_right_desc,
    head,  # HeadArguments
    classifier_desc,
    classifier_right_desc,
    logit_weight_ptr,
    out,  # SweepOutputs
    dz_ptr,
    dz_left_desc,
    dz_right_desc,
    scale_ptr,
    arrived_ptr,
    last_phase,
    first_class,
    last_class,
    dz_rows,
    num_targets,
    width,
    most_tiles,
    VECTORS: tl.constexpr,
    GRADIENT: tl.constexpr,
    MATMUL: tl.constexpr,
    FIRST_PHASE: tl.constexpr,
):
    FENCE: tl.constexpr = dz_left_desc is not None
    stop = tl.where(tl.load(tokens.num_rows) < 0, FIRST_PHASE, last_phase)
    for phase in range(FIRST_PHASE, stop):
        begin = first_class + phase // 2 * width
        end = tl.minimum(begin + width, last_class)
        if phase % 2 == 0:
            softmax_gradient_kernel(
                tokens, hidden_desc, head, classifier_desc, logit_weight_ptr, dz_ptr, None,
                dz_rows, num_targets, 0, begin, end, width, most_tiles, VECTORS, GRADIENT,
            )  # fmt: skip
        else:
            if out.d_hidden is not None:
                tile_matmul_kernel(
                    dz_ptr, dz_left_desc, head.classifier, classifier_right_desc, None,
                    tokens.num_rows, scale_ptr, out.rows, None, out.d_hidden, out.compensation,
                    begin, end - begin, head.hidden_size, 0, width, head.stride_v, head.stride_d,
                    False, True, True, MATMUL,
                )  # fmt: skip
            if out.d_classifier is not None:
                sums = None
                if out.class_sum is not None:
                    sums = out.class_sum + begin
                d_classifier = out.d_classifier + tl.cast(begin, tl.int64) * head.hidden_size
                tile_matmul_kernel(
                    dz_ptr, dz_right_desc, tokens.hidden, hidden_right_desc, None,
                    tokens.num_rows, scale_ptr, None, sums, d_classifier, None,
                    0, end - begin, head.hidden_size, 0, width, head.hidden_size, 1,
                    True, False, False, MATMUL,
                )  # fmt: skip
        if phase + 1 < stop:
            wait_for_all(arrived_ptr, (phase + 1 - FIRST_PHASE) * tl.num_programs(0), FENCE)


class SweepOutputs(NamedTuple):
    """What a sweep fills; None for what is not wanted."""

    rows: Tensor  # [N] int32, of dH: where the valid tokens have theirs
    d_hidden: Tensor | None  # [N, D], contiguous
    compensation: Tensor | None  # [N, D], what d_hidden lacks, if that is not float32
    d_classifier: Tensor | None  # [V, D], contiguous
    class_sum: Tensor | None  # [V] float32, ``sum_n dz``, with d_classifier


def exact_sweep(
    head: Head,
    logit_weight: Tensor | None,
    tokens: Tokens,
    out: SweepOutputs,
    dz: Tensor,
    classes: range,
    scale: Tensor,
    tiles: tuple[Tiles, Tiles],
) -> None:
    """The exact gradient of some classes. Nothing if ``tokens.num_rows < 0``.

    Args:
        head: the head; of its hidden states those in ``tokens`` are used.
        logit_weight: [V] float32, contiguous, or None.
        tokens: the valid ones; finite up to the next multiple of TILE rows of ``dz``.
        out: what to fill. dH is added to what is there, unless the classes begin at 0.
        dz: workspace [multiple of TILE >= N, chunk], chunk a multiple of TILE, of anything.
        classes: whose gradient. If ``dz`` lies in rows of dC, they are those of other classes.
        scale: [1] float32.
        tiles: of the gradient, BLOCK_N tokens x BLOCK_V classes, in steps of BLOCK_D dimensions;
            and of the matmuls, BLOCK_N rows x BLOCK_V dimensions, in steps of BLOCK_D, with as many
            warps.
    """
    gradient, matmul = tiles
    programs, width = num_programs(dz.device), dz.shape[1]
    phases = 2 * triton.cdiv(len(classes), width)
    # The interpreter runs program after program, and so has to phase after phase.
    together = gradient.precision != "upcast"
    right = (matmul.block_d, matmul.block_v)
    hidden_desc = descriptor(tokens.hidden, (gradient.block_n, gradient.block_d), gradient)
    for first in range(0, phases, phases if together else 1):
        exact_sweep_kernel[(programs,)](
            tokens,
            hidden_desc,
            descriptor(tokens.hidden, right, matmul),
            head.arguments,
            descriptor(head.classifier, (gradient.block_v, gradient.block_d), gradient),
            descriptor(head.classifier, right, matmul),
            logit_weight,
            out,
            dz,
            descriptor(dz, (matmul.block_n, matmul.block_d), matmul),
            descriptor(dz, (matmul.block_d, matmul.block_n), matmul),
            scale,
            torch.zeros(1, dtype=torch.int32, device=dz.device),
            phases if together else first + 1,
            classes.start,
            classes.stop,
            len(dz),
            0 if tokens.targets is None else tokens.targets.shape[1],
            width,
            tiles_in_group(tokens.hidden, gradient),
            VECTORS=tokens.vectors.shape[1],
            GRADIENT=gradient.constants,
            MATMUL=matmul.constants,
            FIRST_PHASE=first,
            num_warps=gradient.num_warps,
            num_stages=gradient.num_stages,
            launch_cooperative_grid=together,
        )
