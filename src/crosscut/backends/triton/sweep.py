"""Algorithm 3 of the paper (arXiv:2411.09009), over the whole vocabulary, by chunks of it.

For each chunk a kernel makes the gradient of its logits, ``dz`` [N, chunk], at most
``workspace_limit()`` bytes, and it is multiplied:

    dC[chunk] = dz^T H        complete at once
    dH       += dz C[chunk]   across the chunks, in float32 or as much

6NVD flop, of which a product that nobody wants is left out. Tokens that take no part are left out
of all of it: the others are first put side by side, in an [N, D] copy. The exact gradient is one
launch for many chunks (:mod:`crosscut.kernels.exact_sweep`), the paper's three for each.

**Memory.** The exact gradient's ``dz`` lies in rows of dC that are not written yet
(:mod:`crosscut.device.workspace`). The last of them are made with less, and the very last with what
is allocated for it:

    classes      0                      V - r       V - s    V        r, s: rows that dz takes
    dz           [N, wide]              [N, middle] [N, narrow]
    lies in      dC[V - r:]             dC[V - s:]  memory of its own

**The paper's filter** (policies ``cce*``). The first kernel marks the tiles of 128 tokens x 128
classes in which some ``|softmax - onehot|`` reaches 2**-12 (section 4.3, gradient filtering), and
the products go over these alone; all tiles of dC with ``full_c`` and of dH with ``full_e``. For
the survivors to share tiles, classes are taken in the order of their mean logit (section 4.3,
vocabulary sorting). Plain ``cce`` sums dH across the chunks in bfloat16 if that is its dtype, the
others in float32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from crosscut.backends.protocol import (
    Cotangents,
    Gradients,
    HeadProblem,
    RowCotangents,
    Statistics,
    own_labels,
    own_log_prob,
    row_cotangents,
)
from crosscut.device.launch import like_or
from crosscut.device.tiles import Kernel, Tiles, choose_tiles, num_programs
from crosscut.device.workspace import Workspace
from crosscut.kernels.exact_sweep import SweepOutputs, exact_sweep
from crosscut.kernels.gather_tokens import PerToken, gather_tokens
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.move_rows import move_rows
from crosscut.kernels.softmax_gradient import HeadChunk, Tokens, softmax_gradient
from crosscut.kernels.tile_matmul import (
    TILE,
    add_d_hidden_of_chunk,
    d_classifier_of_chunk,
    live_tiles,
)
from crosscut.kernels.valid_rows import ValidRows, valid_rows_of
from crosscut.options import workspace_limit

MOST_CLASSES = 2**17
"""Classes of a chunk, at most."""

MIDDLE, NARROW = 0.3, 0.14
"""Of ``workspace_limit()``: the workspace of the last classes, where the others' is in dC."""

ENOUGH_CLASSES = 2**12
"""A chunk of so many is as good as a wider one."""


class ValidTokens(NamedTuple):
    """The tokens that take part, side by side, and how their gradients are to be scaled."""

    kept: ValidRows
    tokens: Tokens
    loss_scale: Tensor | None  # [], a power of two: times it, the cotangents
    scale: Tensor  # [1], what a product of scaled gradients is multiplied by


def sweep(problem: HeadProblem, together: ValidTokens, out: Gradients) -> None:
    """Fill ``out``: the exact gradient, or the paper's filtered one under a ``cce`` policy.

    Nothing is done where ``together.tokens.num_rows`` is negative.
    """
    alone = out.bias is not None and out.classifier is None  # the sums over tokens come with dC
    if problem.options.policy.startswith("cce") or alone:
        chunks = _Chunks(problem, together, out)
        for first in range(0, len(problem.classifier), chunks.width):
            chunks.visit(slice(first, first + chunks.width))
        if out.hidden is not None and chunks.d_hidden is not None:
            move_rows(out.hidden, chunks.d_hidden, together.kept.place, together.scale)
    else:
        _exact(problem, together, out)


def _exact(problem: HeadProblem, together: ValidTokens, out: Gradients) -> None:
    hidden, bias, weight = problem.hidden, problem.bias, problem.logit_weight
    tiles = choose_tiles(Kernel.GRADIENT, hidden), choose_tiles(Kernel.MATMUL, hidden)
    kept, tokens, loss_scale, scale = together
    head = Head(
        hidden, problem.classifier, None if bias is None else bias.contiguous(),
        problem.options.logit_scale, problem.options.softcap,
    )  # fmt: skip
    low = class_sum = None
    d_hidden = out.hidden
    if d_hidden is not None and tokens.vectors.shape[1] == 7:
        # The entropy's kernel has no registers left for a sum in two numbers.
        d_hidden = torch.zeros_like(d_hidden, dtype=torch.float32)
    elif d_hidden is not None and d_hidden.dtype != torch.float32:
        low = torch.empty_like(d_hidden)
    if out.bias is not None:
        class_sum = out.bias.new_empty(out.bias.shape, dtype=torch.float32)
    outputs = SweepOutputs(kept.rows, d_hidden, low, out.classifier, class_sum)
    weight = None if weight is None else weight.contiguous()
    for classes, dz in _workspaces(problem, out.classifier, *tiles):
        exact_sweep(head, weight, tokens, outputs, dz, classes, scale, *tiles)
    if out.hidden is not None and d_hidden is not None and d_hidden is not out.hidden:
        out.hidden.copy_(d_hidden)
    if out.bias is not None and class_sum is not None:
        out.bias.copy_(class_sum if loss_scale is None else class_sum / loss_scale)


def _workspaces(
    problem: HeadProblem, d_classifier: Tensor | None, gradient: Tiles, matmul: Tiles
) -> list[tuple[range, Tensor]]:
    """Which classes go together, and their ``dz`` [whole tiles of tokens, chunk]; see the module.

    Where dC is small, or is not wanted, all of them have memory of their own; and where a chunk is
    wide enough without more.
    """
    num_classes, limit = len(problem.classifier), workspace_limit()
    num_tokens = math.ceil(len(problem.hidden) / TILE) * TILE

    def workspace(share: float, lender: Tensor | None = None) -> tuple[Tensor, Workspace]:
        workspace = Workspace(problem.hidden.device, lender)
        width = chunk_width(problem, gradient, matmul, int(limit * share))
        return workspace.new(num_tokens, width, dtype=problem.hidden.dtype), workspace

    if d_classifier is None or d_classifier.nbytes < 4 * limit:
        return [(range(num_classes), workspace(1)[0])]
    narrow, _ = workspace(NARROW)
    parts, first = [], 0
    if narrow.shape[1] < ENOUGH_CLASSES:
        for share in (1, MIDDLE):
            dz, workspace = workspace(share, d_classifier)
            last = (workspace.taken_from or 0) // TILE * TILE
            if first < last:  # not so where no chunk is narrower than another
                parts.append((range(first, last), dz))
                first = last
    if first < num_classes:  # not so where dz of a chunk is larger than dC
        parts.append((range(first, num_classes), narrow))
    return parts


def new_workspace(problem: HeadProblem, width: int) -> Tensor:
    """For dz of a chunk: whole tiles of tokens, zeros past the last."""
    num_tokens = len(problem.hidden)
    dz = problem.hidden.new_empty(math.ceil(num_tokens / TILE) * TILE, width)
    if num_tokens % TILE:
        dz[num_tokens:] = 0
    return dz


class _Chunks:
    """One pass over the vocabulary, chunk by chunk."""

    def __init__(self, problem: HeadProblem, together: ValidTokens, out: Gradients) -> None:
        hidden, policy = problem.hidden, problem.options.policy
        self.problem, self.policy = problem, policy
        _, self.tokens, self.loss_scale, self.scale = together
        self.filtered = policy.startswith("cce")
        # The gradient of a logit sum is spread over every logit: then no tile is dead.
        self.drops = self.filtered and problem.logit_weight is None
        self.gradient = choose_tiles(Kernel.FILTER if self.filtered else Kernel.GRADIENT, hidden)
        self.matmul = choose_tiles(Kernel.MATMUL, hidden)
        self.live_matmul = choose_tiles(Kernel.LIVE_MATMUL, hidden)

        self.order = None
        if self.filtered:
            self.order = _by_mean_logit(problem, self.tokens)  # [V]
            rank = torch.empty_like(self.order)
            rank[self.order] = torch.arange(len(rank), device=rank.device)
            self.tokens = self.tokens._replace(own=rank[self.tokens.own.clamp_min(0)])

        # [N, D], side by side
        narrow = policy == "cce" and hidden.dtype == torch.bfloat16
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
        problem, policy = self.problem, self.policy
        chunk, out_rows = self._chunk(classes)
        workspace = self.workspace[:, : len(chunk.classifier)]
        dz = workspace[: len(problem.labels)]  # [N, chunk]
        alive = None
        if self.drops:  # [token tiles, class tiles]
            class_tiles = math.ceil(dz.shape[1] / TILE)
            alive = dz.new_zeros(len(workspace) // TILE, class_tiles, dtype=torch.int8)
        softmax_gradient(
            dz, self.tokens, chunk, self.gradient, alive=alive,
            logit_scale=problem.options.logit_scale, softcap=problem.options.softcap,
        )  # fmt: skip

        if self.d_hidden is not None:
            live = None if alive is None or policy.endswith("full_e") else live_tiles(alive)
            tiles = self.matmul if live is None else self.live_matmul
            add_d_hidden_of_chunk(
                self.d_hidden, dz, chunk.classifier, self.tokens.num_rows, live, tiles
            )
        if self.d_classifier is not None:
            live = None if alive is None or policy.endswith("full_c") else live_tiles(alive.t())
            out = self.d_classifier[classes] if out_rows is None else self.d_classifier
            tiles = self.matmul if live is None else self.live_matmul
            d_classifier_of_chunk(
                out, dz, self.tokens.hidden, self.tokens.num_rows, live, tiles,
                scale=self.scale, out_rows=out_rows,
            )  # fmt: skip
        if self.d_bias is not None:
            sums = workspace.unflatten(0, (-1, TILE)).sum(1, dtype=torch.float32)
            if alive is not None and "full" not in policy:
                sums *= alive.repeat_interleave(TILE, 1)[:, : sums.shape[1]]
            d_bias = sums.sum(0) if self.loss_scale is None else sums.sum(0) / self.loss_scale
            self.d_bias[classes if out_rows is None else out_rows] = d_bias.to(self.d_bias)

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


def side_by_side(
    problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, *, block_n: int
) -> ValidTokens:
    """The tokens that take part, then zeros up to a multiple of ``block_n``."""
    kept = valid_rows_of(problem.labels)
    labels, log_prob = problem.labels.contiguous(), statistics.log_prob
    d_lse, d_target, d_log_prob, d_sum, d_entropy = cotangents
    targets = d_targets = loss_scale = None
    # What a kernel does of a token with one target, PyTorch does of those with more; and of
    # float16, whose range wants to know what comes of it.
    combined = labels.dim() > 1 or problem.hidden.dtype == torch.float16
    if combined and labels.is_meta:  # as in like_or
        if labels.dim() > 1:
            targets, d_targets = labels, log_prob
            labels, log_prob = labels[:, 0].contiguous(), log_prob[:, 0].contiguous()
        d_lse, d_target, d_log_prob = statistics.lse, statistics.lse, None
        loss_scale = log_prob.new_empty(()) if problem.hidden.dtype == torch.float16 else None
    elif combined:
        of_rows = row_cotangents(problem, statistics, cotangents)
        own = own_labels(labels, statistics.target_logit)
        log_prob = own_log_prob(labels, own, log_prob).contiguous()
        if problem.hidden.dtype == torch.float16:
            loss_scale = _loss_scale(problem, of_rows, log_prob, cotangents)
        d_lse, d_target, d_log_prob = of_rows.factor, of_rows.d_own, None
        if labels.dim() > 1:
            rows = kept.rows.clamp_min(0).long()
            targets, d_targets = labels[rows], of_rows.d_targets
            d_targets = d_targets[rows].float() if d_targets is not None else None
            if d_targets is not None and loss_scale is not None:
                d_targets *= loss_scale
            labels = own
    # One kernel, whichever statistics have a gradient.
    zeros = statistics.lse.new_zeros(1).expand(len(statistics.lse))
    d_lse, d_target, d_log_prob = (
        zeros if given is None else given for given in (d_lse, d_target, d_log_prob)
    )
    of_tokens = PerToken(
        own=labels,
        lse=statistics.lse,
        lse_low=statistics.lse_low,
        log_prob=log_prob,
        entropy=None if d_entropy is None else statistics.entropy,
        d_lse=d_lse,
        d_target=d_target,
        d_log_prob=d_log_prob,
        d_sum=d_sum,
        d_entropy=d_entropy,
    )
    tokens = gather_tokens(
        problem.hidden, of_tokens, kept, loss_scale, combined=combined, multiple=block_n
    )
    tokens = tokens._replace(targets=targets, d_targets=d_targets)
    scale = torch.full(
        (1,), problem.options.logit_scale, dtype=torch.float32, device=problem.hidden.device
    )
    if loss_scale is not None:
        unscaled = scale
        scale = like_or(unscaled, lambda: unscaled / loss_scale)
    return ValidTokens(kept, tokens, loss_scale, scale)


def _loss_scale(
    problem: HeadProblem, of_rows: RowCotangents, log_prob: Tensor, cotangents: Cotangents
) -> Tensor:
    """float16 has too little range for the gradients of logits: what to multiply them by.

    The largest there may be is brought near 2**14, and what comes of them is divided by the same
    power. Rows that take no part have no say, whatever is in them.
    """
    largest = of_rows.factor.abs() * -log_prob.expm1()
    if cotangents.entropy is not None:  # -p log p is at most 1 / e
        largest = largest + cotangents.entropy.abs() / math.e
    largest = torch.maximum(largest, of_rows.d_own.abs())
    if of_rows.d_targets is not None:
        largest = largest + of_rows.d_targets.abs().sum(1)
    if problem.logit_weight is not None and cotangents.logit_sum is not None:
        largest = largest + cotangents.logit_sum.abs() * problem.logit_weight.abs().max()
    valid = problem.labels >= 0 if problem.labels.dim() == 1 else (problem.labels >= 0).any(1)
    largest = torch.where(valid, largest, 0).amax()
    return torch.exp2(14 - largest.clamp(2.0**-100, 2.0**100).log2().ceil()).float()


def _by_mean_logit(problem: HeadProblem, tokens: Tokens) -> Tensor:
    """Classes [V] by descending mean logit over the tokens that take part, before the softcap."""
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


def chunk_width(problem: HeadProblem, gradient: Tiles, matmul: Tiles, num_bytes: int) -> int:
    """Classes of a chunk: as many as so large a workspace allows, and few programs idle."""
    num_tokens = len(problem.hidden)
    row_bytes = math.ceil(num_tokens / TILE) * TILE * problem.hidden.element_size()
    most = min(num_bytes // row_bytes, MOST_CLASSES, len(problem.classifier) + TILE - 1)
    programs = num_programs(problem.hidden.device)
    return _fullest_width(tuple(problem.hidden.shape), most, gradient, matmul, programs)


@functools.cache
def _fullest_width(
    shape: tuple[int, int], most: int, gradient: Tiles, matmul: Tiles, programs: int
) -> int:
    """Of the widths near the most allowed, the one whose rounds are fullest.

    Each kernel's tiles go over the programs in rounds.
    """
    num_tokens, hidden_size = shape

    def time(width: int) -> float:
        """Of one class, in steps of a program: the gradient of logits, and dC."""
        tiles = math.ceil(num_tokens / gradient.block_n) * math.ceil(width / gradient.block_v)
        steps = math.ceil(tiles / programs) * hidden_size * gradient.block_n * gradient.block_v
        tiles = math.ceil(width / matmul.block_n) * math.ceil(hidden_size / matmul.block_v)
        steps += math.ceil(tiles / programs) * num_tokens * matmul.block_n * matmul.block_v
        return steps / width

    most_tiles = max(1, most // TILE)
    counts = range(most_tiles, most_tiles // 2, -max(1, most_tiles // 128))
    return min((TILE * count for count in counts), key=time)
