"""Algorithm 3 of the paper (arXiv:2411.09009): the backward with its tile filter.

Tiles of 128 tokens x 128 classes in which every ``|softmax - onehot|`` is below 2**-12 are skipped
(section 4.3, gradient filtering). For the survivors to share tiles, classes are first ordered by
their mean logit (section 4.3, vocabulary sorting).

This is the paper's method for comparison and reproduction. Here a tile is made, looked at, and
then left out of the two products that follow; whole rows of dead tiles are cut from the matmuls.
Variants, by the policy's name: gradients accumulate across blocks in their own dtype (``cce``) or
in float32 (``cce_kahan``); ``full_c`` and ``full_e`` do not filter dC and dH.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.backends.blocks.logits import LogitBlocks, softmax_gradient, take_rows
from crosscut.backends.protocol import (
    Cotangents,
    Gradients,
    HeadProblem,
    Needs,
    Statistics,
    row_cotangents,
)

TILE = 128
EPSILON = 2.0**-12
BLOCK_N = 1024
BLOCK_V = 4096


def tile_filtered_backward(
    problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
) -> Gradients:
    """The paper's gradient of the statistics, under one of the ``cce`` policies."""
    paper = problem.options.paper_filter
    assert paper is not None
    logits = LogitBlocks(problem)
    hidden, classifier = problem.hidden, problem.classifier
    rows = problem.rows
    order = _by_mean_logit(problem, rows)

    def accumulator(like: Tensor) -> Tensor:
        return like.new_zeros(
            like.shape, dtype=logits.dtype if paper.accumulate_wide else like.dtype
        )

    d_hidden = accumulator(hidden)
    d_classifier = classifier.new_empty(classifier.shape)
    d_bias = None if problem.bias is None else torch.empty_like(problem.bias)

    of_rows = row_cotangents(problem, statistics, cotangents)
    d_entropy = cotangents.entropy
    for classes in order.split(BLOCK_V):
        c = classifier[classes].to(logits.fast)  # [BLOCK_V, D]
        bias = None if problem.bias is None else problem.bias[classes]
        d_c = accumulator(classifier[classes])
        d_b = torch.zeros(len(classes), dtype=logits.dtype, device=c.device)
        for tokens in rows.split(BLOCK_N) if len(rows) else ():
            h = take_rows(hidden, tokens).to(logits.fast)  # [BLOCK_N, D]
            lse = statistics.lse[tokens]
            center = logits.center_at(lse, h.dtype)
            z, slope = logits.sloped_block(c, bias, h, lse, center)  # less lse, [BLOCK_V, BLOCK_N]
            p = z.exp()
            onehot = classes[:, None] == problem.labels[tokens]

            of_entropy = None if d_entropy is None else d_entropy[tokens]
            dz = softmax_gradient(z, of_rows.factor[tokens], of_entropy)
            dz = torch.where(onehot, of_rows.d_own[tokens], dz)
            alive = _alive_tiles(p.sub_(onehot.to(p)).abs_())  # [BLOCK_V, BLOCK_N]
            if cotangents.logit_sum is not None and problem.logit_weight is not None:
                dz.addr_(problem.logit_weight[classes].to(dz), cotangents.logit_sum[tokens])
                alive.fill_(True)  # its gradient is spread over every logit
            if cotangents.entropy is not None:
                alive.fill_(True)  # p log p is large where p no longer is
            if slope is not None:
                dz.mul_(slope)
            filtered = torch.where(alive, dz, 0)

            if needs.hidden:
                part = filtered if paper.filter_e else dz
                strips = part.any(1).nonzero().squeeze(1)
                update = part[strips].to(h).t() @ c[strips]
                d_hidden.index_add_(0, tokens, update.to(d_hidden))
            part = filtered if paper.filter_c else dz
            if needs.classifier:
                strips = part.any(1).nonzero().squeeze(1)
                d_c.index_add_(0, strips, (part[strips].to(h) @ h).to(d_c))
            d_b += (filtered if paper.filter_c and paper.filter_e else dz).sum(1)
        d_classifier[classes] = (d_c * logits.scale).to(d_classifier)
        if d_bias is not None:
            d_bias[classes] = d_b.to(d_bias)

    return Gradients(
        (d_hidden * logits.scale).to(hidden) if needs.hidden else None,
        d_classifier if needs.classifier else None,
        d_bias if needs.bias else None,
    )


def _by_mean_logit(problem: HeadProblem, rows: Tensor) -> Tensor:
    """Classes [V] by descending mean logit over the tokens that take part, before the softcap."""
    dtype = problem.statistics_dtype
    mean = torch.zeros(problem.hidden.shape[1], dtype=dtype, device=rows.device)
    for tokens in rows.split(BLOCK_N) if len(rows) else ():
        mean += take_rows(problem.hidden, tokens).to(dtype).sum(0) / len(rows)
    logit = torch.cat([c.to(dtype) @ mean for c in problem.classifier.split(BLOCK_V)])
    logit *= problem.options.logit_scale
    if problem.bias is not None:
        logit += problem.bias
    return logit.argsort(descending=True, stable=True)


def _alive_tiles(difference: Tensor) -> Tensor:
    """Which entries are in a tile that some ``|softmax - onehot|`` [v, n] keeps alive."""
    v, n = difference.shape
    padded = F.pad(difference, (0, -n % TILE, 0, -v % TILE))
    tiles = padded.view(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE)
    alive = ~(tiles.amax((1, 3)) < EPSILON)  # a NaN is alive
    return alive.repeat_interleave(TILE, 0)[:v].repeat_interleave(TILE, 1)[:, :n]
