"""The gradient chunk by chunk, three launches each: the paper's, and what no single launch makes.

**The paper's filter** (gradient policies ``cce*``). The first kernel marks the tiles of 128 tokens
x 128 classes in which some ``|softmax - onehot|`` reaches 2**-12 (arXiv:2411.09009, section 4.3,
gradient filtering), and the products go over these alone; over all tiles of dC or of dH where the
policy says so. For the survivors to share tiles, classes are taken in the order of their mean logit
(section 4.3, vocabulary sorting).

Without a filter it is the exact gradient, for a bias whose classifier has none: its sums over
tokens come with dC otherwise (:mod:`.exact`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crosscut.backends.protocol import Gradients, HeadProblem
from crosscut.backends.triton.chunks import chunk_width, new_workspace
from crosscut.backends.triton.valid_tokens import ValidTokens
from crosscut.device.tiles import Kernel, Tiles, choose_tiles
from crosscut.kernels.move_rows import move_rows
from crosscut.kernels.softmax_gradient import HeadChunk, Tokens, softmax_gradient
from crosscut.kernels.tile_matmul import (
    TILE,
    LiveTiles,
    add_d_hidden_of_chunk,
    d_classifier_of_chunk,
    live_tiles,
)
from crosscut.options import PaperFilter, workspace_limit


def gradients_by_chunks(
    problem: HeadProblem, valid: ValidTokens, out: Gradients, paper: PaperFilter | None
) -> None:
    """Fill ``out``: every entry of the softmax, or what the paper's filter leaves."""
    chunks = _Chunks(problem, valid, out, paper)
    for first in range(0, len(problem.classifier), chunks.width):
        chunks.visit(slice(first, first + chunks.width))
    if out.hidden is not None and chunks.d_hidden is not None:
        move_rows(out.hidden, chunks.d_hidden, valid.rows.place, valid.scale)


class _Chunks:
    """One pass over the vocabulary, chunk by chunk."""

    def __init__(
        self,
        problem: HeadProblem,
        valid: ValidTokens,
        out: Gradients,
        paper: PaperFilter | None,
    ) -> None:
        hidden = problem.hidden
        self.problem = problem
        _, self.tokens, self.loss_scale, self.scale = valid
        # The gradient of a logit sum is spread over every logit: then no tile is dead.
        self.drops = paper is not None and problem.logit_weight is None
        self.paper = paper or PaperFilter()
        self.gradient = choose_tiles(Kernel.GRADIENT if paper is None else Kernel.FILTER, hidden)
        self.matmul = choose_tiles(Kernel.MATMUL, hidden)
        self.live_matmul = choose_tiles(Kernel.LIVE_MATMUL, hidden)

        self.order = None
        if paper is not None:
            self.order = _by_mean_logit(problem, self.tokens)  # [V]
            rank = torch.empty_like(self.order)
            rank[self.order] = torch.arange(len(rank), device=rank.device)
            own = self.tokens.own
            here = (own >= 0) & (own < len(rank))  # else of another shard, or no token
            own = torch.where(here, rank[torch.where(here, own, 0)], -1)
            self.tokens = self.tokens._replace(own=own)

        # [N, D], side by side
        narrow = paper is not None and not paper.accumulate_wide
        narrow &= hidden.dtype == torch.bfloat16
        total = torch.bfloat16 if narrow else torch.float32
        self.d_hidden = None
        if out.hidden is not None:
            self.d_hidden = torch.zeros_like(self.tokens.hidden, dtype=total)
        self.d_classifier, self.d_bias = out.classifier, out.bias
        self.width = chunk_width(problem, self.gradient, self.matmul, workspace_limit())
        self.workspace = new_workspace(problem, self.width)
        if out.bias is not None:
            self.workspace.zero_()  # its sums are over all rows

    def visit(self, classes: slice) -> None:
        """One chunk of classes; every token. Completes the chunk's rows of dC and d_bias."""
        problem, paper = self.problem, self.paper
        chunk, out_rows = self._chunk(classes)
        workspace = self.workspace[:, : len(chunk.classifier)]
        dz = workspace[: len(problem.labels)]  # [N, chunk]
        alive = live_of_c = live_of_e = None
        if self.drops:  # [token tiles, class tiles]
            class_tiles = math.ceil(dz.shape[1] / TILE)
            alive = dz.new_zeros(len(workspace) // TILE, class_tiles, dtype=torch.int8)
        softmax_gradient(
            dz, self.tokens, chunk, self.gradient, alive=alive,
            logit_scale=problem.options.logit_scale, softcap=problem.options.softcap,
        )  # fmt: skip

        if self.d_hidden is not None:
            if alive is not None and paper.filter_e:
                live_of_e = live_tiles(alive)
            add_d_hidden_of_chunk(
                self.d_hidden, dz, chunk.classifier, self.tokens.num_rows, live_of_e,
                self._matmul(live_of_e),
            )  # fmt: skip
        if self.d_classifier is not None:
            if alive is not None and paper.filter_c:
                live_of_c = live_tiles(alive.t())
            out = self.d_classifier[classes] if out_rows is None else self.d_classifier
            d_classifier_of_chunk(
                out, dz, self.tokens.hidden, self.tokens.num_rows, live_of_c,
                self._matmul(live_of_c), scale=self.scale, out_rows=out_rows,
            )  # fmt: skip
        if self.d_bias is not None:
            sums = workspace.unflatten(0, (-1, TILE)).sum(1, dtype=torch.float32)
            if alive is not None and paper.filter_c and paper.filter_e:
                sums *= alive.repeat_interleave(TILE, 1)[:, : sums.shape[1]]
            d_bias = sums.sum(0) if self.loss_scale is None else sums.sum(0) / self.loss_scale
            self.d_bias[classes if out_rows is None else out_rows] = d_bias.to(self.d_bias)

    def _matmul(self, live: LiveTiles | None) -> Tiles:
        return self.matmul if live is None else self.live_matmul

    def _chunk(self, classes: slice) -> tuple[HeadChunk, Tensor | None]:
        """Some classes in order, and which they are unless they are ``classes``."""
        problem, rows = self.problem, None
        if self.order is None:
            classifier = problem.classifier[classes]
        else:
            rows = self.order[classes]
            classifier = move_rows(
                problem.classifier.new_empty(len(rows), problem.classifier.shape[1]),
                problem.classifier,
                rows,
            )

        def take(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[classes if rows is None else rows]

        bias, weight = take(problem.bias), take(problem.logit_weight)
        return HeadChunk(
            classes.start,
            classifier,
            None if bias is None else bias.contiguous(),
            None if weight is None else weight.contiguous(),
        ), rows


def _by_mean_logit(problem: HeadProblem, tokens: Tokens) -> Tensor:
    """Classes [V] by descending mean logit over the valid tokens, before the softcap."""
    classifier = problem.classifier
    mean = tokens.hidden.sum(0, dtype=torch.float32) / tokens.num_rows  # [D]
    if classifier.device.type == "cuda" and classifier.dtype != torch.float32:
        mean = mean.to(classifier.dtype)
        logit = torch.mm(classifier, mean[:, None], out_dtype=torch.float32)[:, 0]
    else:
        logit = classifier.float() @ mean
    logit *= problem.options.logit_scale
    if problem.bias is not None:
        logit += problem.bias
    return logit.argsort(descending=True, stable=True)
