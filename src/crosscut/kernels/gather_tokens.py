"""The valid tokens, side by side: what a backward works on.

With ``rows`` as :mod:`.valid_rows` lists them, place i gets token ``rows[i]``:

    hidden[i]   = H[rows[i]]
    own[i]      = y[rows[i]]
    vectors[i]  = lse, factor, d_own, d_sum, lse_compensation, rest, and -d_entropy if there is one

``factor`` multiplies the softmax in the gradient of the logits. ``d_own`` is that gradient at the
token's own class y, without the logit sum's part. ``rest = 1 - p`` is the mass of all other
classes. With ``log_prob`` the logarithm of p (see ``row_cotangents`` in
:mod:`crosscut.backends.protocol`):

    factor = d_lse - d_log_prob - d_entropy entropy
    d_own  = d_target + d_log_prob rest + d_lse p - d_entropy p (entropy + log_prob)

Cotangents are multiplied by ``loss_scale`` on the way. Places past the last token are zeros, their
label -1. Program i owns places BLOCK_N i to BLOCK_N (i + 1). Each token is read and written once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.kernels.logits_tile import NEGLIGIBLE, one_minus_exp
from crosscut.kernels.move_rows import BLOCK_D, BLOCK_N, move_to
from crosscut.kernels.softmax_gradient import Tokens
from crosscut.kernels.valid_rows import ValidRows


@triton.jit
def cotangents_of(ptr, rows, stride):
    """The cotangents of some rows, [BLOCK_N]; 0 at row -1, and where the pointer is None."""
    if ptr is None:
        return tl.zeros((rows.shape[0],), tl.float32)
    else:
        return tl.load(ptr + rows * stride, mask=rows >= 0, other=0.0)


@kernel
def gather_tokens_kernel(
    rows_ptr,
    hidden_ptr,
    statistics,  # TokenStatistics
    d_lse_ptr,  # not in a tuple, where Triton would specialise on alignment
    d_target_ptr,
    d_log_prob_ptr,
    d_sum_ptr,
    d_entropy_ptr,
    loss_scale_ptr,
    out,  # Tokens, to be filled
    num_tokens,
    num_rows,
    hidden_size,
    stride_n,
    stride_d,
    stride_d_lse,
    stride_d_target,
    stride_d_log_prob,
    stride_d_sum,
    stride_d_entropy,
    COMBINED: tl.constexpr,  # d_lse and d_target are factor and d_own already
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    VECTORS: tl.constexpr = 6 if d_entropy_ptr is None else 7
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = places < num_tokens
    rows = tl.load(rows_ptr + places, mask=inside, other=-1).to(tl.int64)
    valid = rows >= 0
    move_to(
        out.hidden, places.to(tl.int64), num_rows, hidden_ptr, rows, None, hidden_size,
        stride_n, stride_d, BLOCK_D,
    )  # fmt: skip
    own = tl.load(statistics.own + rows, mask=valid, other=-1)
    tl.store(out.own + places, own, mask=inside)

    loss_scale = 1.0
    if loss_scale_ptr is not None:
        loss_scale = tl.load(loss_scale_ptr)
    log_prob = tl.load(statistics.log_prob + rows, mask=valid, other=0.0)
    p, rest = tl.exp(log_prob), one_minus_exp(log_prob)
    d_entropy = cotangents_of(d_entropy_ptr, rows, stride_d_entropy)
    factor = cotangents_of(d_lse_ptr, rows, stride_d_lse)
    d_own = cotangents_of(d_target_ptr, rows, stride_d_target)
    if not COMBINED:
        d_log_prob = cotangents_of(d_log_prob_ptr, rows, stride_d_log_prob)
        d_own += d_log_prob * rest + factor * p
        factor -= d_log_prob
        if d_entropy_ptr is not None:
            entropy = tl.load(statistics.entropy + rows, mask=valid, other=0.0)
            factor -= d_entropy * entropy
            d_own -= d_entropy * p * (entropy + tl.maximum(log_prob, NEGLIGIBLE))
    vectors = out.vectors + places * VECTORS
    if d_entropy_ptr is not None:
        tl.store(vectors + 6, -d_entropy * loss_scale, mask=inside)
    d_sum = cotangents_of(d_sum_ptr, rows, stride_d_sum)
    lse = tl.load(statistics.lse + rows, mask=valid, other=0.0)
    lse_compensation = tl.load(statistics.lse_compensation + rows, mask=valid, other=0.0)
    tl.store(vectors, lse, mask=inside)
    tl.store(vectors + 1, factor * loss_scale, mask=inside)
    tl.store(vectors + 2, d_own * loss_scale, mask=inside)
    tl.store(vectors + 3, d_sum * loss_scale, mask=inside)
    tl.store(vectors + 4, lse_compensation, mask=inside)
    tl.store(vectors + 5, rest, mask=inside)


class TokenStatistics(NamedTuple):
    """The fields of PerToken that a kernel takes as one."""

    own: Tensor
    lse: Tensor
    lse_compensation: Tensor
    log_prob: Tensor
    entropy: Tensor | None


class PerToken(NamedTuple):
    """What goes with the tokens, in the order of the call; cotangents [N] float32, None for 0."""

    own: Tensor  # [N] int64, contiguous
    lse: Tensor  # [N] float32, contiguous
    lse_compensation: Tensor  # [N] float32, contiguous
    log_prob: Tensor  # [N] float32, contiguous, of the own classes
    entropy: Tensor | None  # [N] float32, contiguous, where it has a cotangent
    d_lse: Tensor | None
    d_target: Tensor | None
    d_log_prob: Tensor | None
    d_sum: Tensor | None
    d_entropy: Tensor | None


def gather_tokens(
    hidden: Tensor,
    of_tokens: PerToken,
    valid_rows: ValidRows,
    loss_scale: Tensor | None,
    *,
    combined: bool,
    multiple: int,
) -> Tokens:
    """The tokens of ``hidden`` [N, D] that are valid, then zeros up to a multiple of tokens.

    ``loss_scale`` [] float32, or None for 1. ``combined`` says that ``d_lse`` and ``d_target`` are
    ``factor`` and ``d_own`` already.
    """
    num_tokens, hidden_size = hidden.shape
    statistics, cotangents = TokenStatistics(*of_tokens[:5]), of_tokens[5:]
    vectors = 6 if of_tokens.d_entropy is None else 7
    tokens = Tokens(
        valid_rows.count,
        hidden.new_empty(triton.cdiv(num_tokens, multiple) * multiple, hidden_size),
        valid_rows.rows.new_empty(num_tokens, dtype=torch.int64),
        of_tokens.lse.new_empty(num_tokens, vectors),
    )
    gather_tokens_kernel[(triton.cdiv(len(tokens.hidden), BLOCK_N),)](
        valid_rows.rows,
        hidden,
        statistics,
        *cotangents,
        loss_scale,
        tokens,
        num_tokens,
        *tokens.hidden.shape,
        *hidden.stride(),
        *(0 if given is None else given.stride(0) for given in cotangents),
        COMBINED=combined,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
    )
    return tokens
