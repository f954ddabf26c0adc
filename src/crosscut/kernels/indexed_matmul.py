"""Indexed matmul: Algorithm 1 of the paper (arXiv:2411.09009).

    target_logit[n] = softcap(logit_scale * H[n] . C[y_n] + bias[y_n])

or, of K labels per token, ``target_logit[n, k]`` with ``y_nk``. Program i owns labels BLOCK_N i to
BLOCK_N (i + 1) and walks over D:

    H [BLOCK_N, D]     ->->->
    C[y] [BLOCK_N, D]  ->->->      sum of products   [BLOCK_N]

2NKD flop, two rows read per label, 4NK bytes written, no workspace. Products and sums in float32. A
label outside of [0, V) gets 0: one that is ignored, or a class of another vocabulary shard. Where
asked for, the classes that are labels are flagged on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.kernels.logits_tile import Head, logits_of

BLOCK_N = 16
BLOCK_D = 128


@kernel
def indexed_matmul_kernel(
    hidden_ptr,
    head,  # HeadArguments
    labels_ptr,
    target_logit_ptr,
    flags_ptr,
    num_labels,
    num_targets,
    num_classes,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    labels = tl.load(labels_ptr + places, mask=places < num_labels, other=-1)
    known = (labels >= 0) & (labels < num_classes)
    hidden_rows = hidden_ptr + (places // num_targets)[:, None].to(tl.int64) * head.hidden_size
    classifier_rows = head.classifier + labels[:, None].to(tl.int64) * head.stride_v

    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, head.hidden_size, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
        mask = known[:, None] & (d < head.hidden_size)
        h = tl.load(hidden_rows + d, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        c = tl.load(classifier_rows + d * head.stride_d, mask=mask, other=0.0).to(tl.float32)
        total += h * c
    bias = None
    if head.bias is not None:
        bias = tl.load(head.bias + labels, mask=known, other=0.0).to(tl.float32)
    z = logits_of(tl.sum(total, 1), bias, head.logit_scale, head.softcap)
    tl.store(target_logit_ptr + places, tl.where(known, z, 0.0), mask=places < num_labels)
    if flags_ptr is not None:
        tl.store(flags_ptr + labels, tl.full((BLOCK_N,), 1, tl.int8), mask=known)


def indexed_matmul(head: Head, labels: Tensor, flags: Tensor | None = None) -> Tensor:
    """``target_logit`` float32 for labels [N] or [N, K], contiguous; 0 where one is no class.

    ``flags`` [V] int8, if given, becomes 1 at every label.
    """
    target_logit = labels.new_empty(labels.shape, dtype=torch.float32)
    grid = (triton.cdiv(labels.numel(), BLOCK_N),)
    indexed_matmul_kernel[grid](
        head.hidden,
        head.arguments,
        labels,
        target_logit,
        flags,
        labels.numel(),
        labels.shape[1:].numel(),
        len(head.classifier),
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    return target_logit
