"""Gradient of a chunk of logits: the first half of Algorithm 3 of the paper (arXiv:2411.09009).

With ``p = exp(z - lse)`` and what a token's cotangents come to (:mod:`.gather_tokens`), over the
classes of one chunk,

    dz[n, v] = (factor[n] p[n, v] + d_sum[n] logit_weight[v]) * slope[n, v]

with ``d_own[n]`` in place of the first term at the token's own class, where p is not computed
again; ``slope = 1 - (z / softcap)^2``. A cotangent of the entropy adds ``-d_entropy log p`` to the
factor; other targets of the token add their ``d_targets`` one after the other. ``dz`` is stored in
the dtype of H, for the matmuls ``dH += dz C`` and ``dC = dz^T H``. The chunk's logits are computed
again, in registers.

**Filter** (section 4.3). Where asked for, tiles of BLOCK_N tokens x FILTER_V classes in which every
``|p - onehot|`` is below EPSILON are marked dead; with BLOCK_N = 128 they are the paper's.

**Who owns what.** One program per multiprocessor; program i of P owns tiles i, i + P, i + 2P, ...
in this order, in groups of token tiles whose hidden states fit in the L2 cache:

              classes of the chunk ->
    group 0    0  3  6  9          All programs are near each other: a tile of C comes from
               1  4  7  ..         memory once for the group, and everything else from L2.
               2  5  8  ..
    group 1   ..

Tokens here are only the valid ones, side by side. Past the last of them a tile is zero.

**Cost.** 2 flop per token, class and dimension, and 2 bytes written per token and class. Each of
several targets is looked for in every tile: 3 operations per token and class.

**Numerics.** float32 until the store.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs, tiles_in_group
from crosscut.kernels.logits_tile import (
    LOG2_E,
    NEGLIGIBLE,
    Head,
    column_part,
    logits_at,
    product_tile,
    slope_of,
)

EPSILON = tl.constexpr(2.0**-12)
FILTER_V = tl.constexpr(128)


class Tokens(NamedTuple):
    """The valid tokens, side by side; hidden states and vectors from R on are zeros."""

    num_rows: Tensor  # R, [1] int32; where negative, nothing is to be done
    hidden: Tensor  # [N, D]
    own: Tensor  # [N] int64, each token's own class, by its place among the classes of the call
    vectors: Tensor  # [N, 6 or 7] float32, see :mod:`.gather_tokens`; 7 with an entropy's cotangent
    targets: Tensor | None = None  # [N, K] int64, of tokens that have several, the own one too
    d_targets: Tensor | None = None  # [N, K] float32, what they add to dz; 0 at the own class


class HeadChunk(NamedTuple):
    """Some consecutive classes."""

    first: int
    classifier: Tensor  # [chunk, D]
    bias: Tensor | None  # [chunk]
    logit_weight: Tensor | None  # [chunk] float32


@triton.jit
def gradient_tile(
    z,  # [BLOCK_N, BLOCK_V], products
    head,  # HeadArguments
    logit_weight_ptr,
    vectors,  # [BLOCK_N, 1] pointers to a token's first of VECTORS
    own,  # [BLOCK_N], the own class's place in the chunk
    several,  # pointers [BLOCK_N, 1] to a token's targets and d_targets, K, first_label; or None
    classes,  # [BLOCK_V]
    num_classes,
    VECTORS: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """``dz`` and ``|p - onehot|`` [BLOCK_N, BLOCK_V] in float32; any value past the end.

    The onehot of the second has no targets but the own class.
    """
    z = logits_at(z, head, classes, num_classes)
    log_p = z - tl.load(vectors)
    if PRECISE:
        log_p -= tl.load(vectors + 4)
    p = tl.exp2(log_p * LOG2_E)  # the difference first: it rounds less
    is_own = classes[None, :] == own[:, None]
    difference = tl.abs(tl.where(is_own, p - 1, p))
    factor = tl.load(vectors + 1)
    if VECTORS == 7:
        factor += tl.load(vectors + 6) * tl.maximum(log_p, NEGLIGIBLE)
    dz = tl.where(is_own, tl.load(vectors + 2), factor * p)
    if several is not None:
        targets, d_targets, num_targets, first_label = several
        for k in range(num_targets):
            is_target = classes[None, :] == (tl.load(targets + k) - first_label).to(tl.int32)
            dz = tl.where(is_target, dz + tl.load(d_targets + k), dz)
    if logit_weight_ptr is not None:
        weight = tl.load(logit_weight_ptr + classes, mask=classes < num_classes, other=0.0)
        dz += tl.load(vectors + 3) * weight[None, :]
    if head.softcap is not None:
        dz *= slope_of(z, head.softcap)
    return dz, difference


@kernel
def softmax_gradient_kernel(
    tokens,  # Tokens
    hidden_desc,
    head,  # HeadArguments
    classifier_desc,
    logit_weight_ptr,
    dz_ptr,
    alive_ptr,
    num_tokens,
    num_targets,
    first_label,
    begin,
    num_classes,
    stride_dz,
    most_tiles,
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    num_rows = tl.load(tokens.num_rows)
    token_tiles = tl.cdiv(tl.maximum(num_rows, 0), BLOCK_N)
    class_tiles = tl.cdiv(num_classes - begin, BLOCK_V)
    groups = tl.cdiv(token_tiles, most_tiles)
    group = tl.cdiv(token_tiles, tl.maximum(groups, 1))

    for index in range(tl.program_id(0), token_tiles * class_tiles, tl.num_programs(0)):
        start = index // (group * class_tiles) * group
        in_group = index - start * class_tiles
        height = tl.minimum(group, token_tiles - start)
        first_class = begin + in_group // height * BLOCK_V
        tile = start + in_group % height
        places = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = tl.minimum(places, num_rows - 1).to(tl.int64)
        product = product_tile(
            tokens.hidden, hidden_desc, head, classifier_desc, rows, tile * BLOCK_N, first_class,
            num_classes, False, TILE,
        )  # fmt: skip

        # A whole tile of results beside its pointers does not fit in the registers.
        PARTS: tl.constexpr = 4
        IN_TILE: tl.constexpr = FILTER_V // (BLOCK_V // PARTS)  # parts in a tile of the filter
        tl.static_assert(alive_ptr is None or (BLOCK_V == FILTER_V or BLOCK_V == 2 * FILTER_V))
        alive = 0
        for part in tl.static_range(PARTS):
            first = first_class + part * (BLOCK_V // PARTS)
            classes = first + tl.arange(0, BLOCK_V // PARTS)
            own = tl.load(tokens.own + rows) - first_label
            several = None
            if tokens.targets is not None:
                first_target = rows[:, None] * num_targets
                targets, d_targets = tokens.targets + first_target, tokens.d_targets + first_target
                several = targets, d_targets, num_targets, first_label
            dz, difference = gradient_tile(
                column_part(product, part, PARTS, BLOCK_N, BLOCK_V),
                head, logit_weight_ptr, tokens.vectors + rows[:, None] * VECTORS, own, several,
                classes, num_classes, VECTORS, tokens.hidden.dtype.element_ty == tl.float32,
            )  # fmt: skip
            inside = (places < num_rows)[:, None] & (classes < num_classes)[None, :]
            if alive_ptr is not None:
                difference = tl.where(inside, difference, 0.0)
                reaches = tl.where(difference < EPSILON, 0, 1)  # a NaN is alive
                alive = tl.maximum(alive, tl.max(reaches))
                if part + 1 == IN_TILE or part + 1 == PARTS:
                    column, columns = first // FILTER_V, tl.cdiv(num_classes, FILTER_V)
                    place = alive_ptr + tile * columns + column
                    tl.store(place, alive.to(tl.int8), mask=column < columns)
                    alive = 0
            column = classes - begin
            place = dz_ptr + places.to(tl.int64)[:, None] * stride_dz + column[None, :]
            mask = (places < num_tokens)[:, None] & (column < stride_dz)[None, :]
            dz = tl.where(inside, dz, 0.0).to(dz_ptr.dtype.element_ty)
            tl.store(place, dz, mask=mask)


def softmax_gradient(
    dz: Tensor,
    tokens: Tokens,
    chunk: HeadChunk,
    tiles: Tiles,
    *,
    logit_scale: float,
    softcap: float | None,
    alive: Tensor | None = None,
) -> None:
    """Fill the first R rows of ``dz`` [N, chunk], and those of R's tile with zeros.

    ``dz`` has contiguous rows, in any float dtype. Columns past ``chunk`` that share a tile with it
    get zeros too, as far as the row goes. It is the gradient of the logits before the softcap and
    after the scale. ``alive`` [token tiles, class tiles] int8 or None gets 1 for each tile of
    BLOCK_N x FILTER_V that is not dead, and 0 for the others; tiles of tokens past R are left as
    they were.
    """
    head = Head(tokens.hidden, chunk.classifier, chunk.bias, logit_scale, softcap)
    softmax_gradient_kernel[(num_programs(dz.device),)](
        tokens,
        descriptor(tokens.hidden, (tiles.block_n, tiles.block_d), tiles),
        head.arguments,
        descriptor(chunk.classifier, (tiles.block_v, tiles.block_d), tiles),
        chunk.logit_weight,
        dz,
        alive,
        len(dz),
        0 if tokens.targets is None else tokens.targets.shape[1],
        chunk.first,
        0,
        len(chunk.classifier),
        dz.stride(0),
        tiles_in_group(tokens.hidden, tiles),
        VECTORS=tokens.vectors.shape[1],
        TILE=tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
