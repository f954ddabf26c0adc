"""The divergence of a student's head from its teacher's, and the student's gradients.

One sweep over both heads (two for a mixture); then, by chunks of the vocabulary as in
:mod:`.chunked`, the gradient of the student's logits and its two products. 2NV(D + E) flop per
sweep and as much for the gradient, D and E being both hidden sizes, and 4NVD for the products.
Workspace: a copy of both hidden states; in the backward, as much of the gradient of the logits as
``workspace_limit()`` allows, and dH in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crosscut.backends.protocol import (
    DistillationProblem,
    DivergenceCotangents,
    Divergences,
    Gradients,
    HeadProblem,
    Needs,
)
from crosscut.backends.triton.chunks import chunk_width, new_workspace
from crosscut.device.tiles import Kernel, choose_tiles
from crosscut.kernels.divergence import Pair, PairTokens, divergence, divergence_gradient
from crosscut.kernels.indexed_matmul import indexed_matmul
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.move_rows import move_rows
from crosscut.kernels.tile_matmul import TILE, add_d_hidden_of_chunk, d_classifier_of_chunk
from crosscut.kernels.valid_rows import ValidRows, valid_rows_of
from crosscut.options import workspace_limit


def compute_divergences(problem: DistillationProblem) -> Divergences:
    """The divergence of every row that takes part, and the statistics of the hard loss."""
    student = problem.student
    if student.labels.is_cuda:  # as PyTorch does it there: a deferred error, of the device
        torch._assert_async((student.labels < len(student.classifier)).all())
    none = student.hidden.new_empty(0, dtype=torch.float32)
    if not len(student.labels):
        empty = Divergences(*(none.clone() for _ in Divergences._fields))
        return empty._replace(lse_compensation=none.new_empty(2, 0))
    valid_rows = valid_rows_of(student.labels)
    tiles = choose_tiles(Kernel.DIVERGENCE, student.hidden)
    found = divergence(_pair(problem, valid_rows), valid_rows, tiles)
    hard_loss, hard_lse = none, none.clone()
    if found.hard_lse is not None:
        head = _head(student, student.hidden.contiguous())
        target_logit = indexed_matmul(head, student.labels.contiguous()) * problem.temperature
        hard_loss = (found.hard_lse - target_logit).clamp_min(0)  # two roundings
        hard_lse = found.hard_lse - problem.temperature * found.lse
    return Divergences(
        divergence=found.divergence,
        hard_loss=hard_loss,
        hard_lse=hard_lse,
        student_lse=found.lse,
        teacher_lse=found.teacher_lse,
        lse_compensation=found.lse.new_zeros(2, len(found.lse)),
        center=found.center,
    )


def compute_student_gradients(
    problem: DistillationProblem,
    found: Divergences,
    cotangents: DivergenceCotangents,
    needs: Needs,
) -> Gradients:
    """Gradients of the student's inputs, given what the forward returned."""
    head = problem.student
    if not len(head.labels):
        inputs = head.hidden, head.classifier, head.bias
        return Gradients(*(
            None if value is None or not need else value.new_zeros(value.shape)
            for value, need in zip(inputs, needs, strict=True)
        ))  # fmt: skip
    valid_rows = valid_rows_of(head.labels)
    pair, rows = _pair(problem, valid_rows), valid_rows.rows.clamp_min(0).long()
    zeros = torch.zeros_like(found.divergence)
    hard = zeros
    if problem.temperature is not None:
        hard = found.hard_lse + problem.temperature * found.student_lse
    d_divergence, d_hard = (zeros if grad is None else grad for grad in cotangents)
    of_tokens = [found.student_lse, found.teacher_lse, found.center, d_divergence, hard, d_hard]
    vectors = torch.stack([*of_tokens, -d_hard], 1)[rows].float()  # [N, 7]
    tokens = PairTokens(valid_rows.count, head.labels[rows], vectors)

    gradient = choose_tiles(Kernel.DIVERGENCE_GRADIENT, head.hidden)
    matmul = choose_tiles(Kernel.MATMUL, head.hidden)
    width = chunk_width(head, gradient, matmul, workspace_limit())
    workspace = new_workspace(head, width)
    scale = workspace.new_full((1,), head.options.logit_scale, dtype=torch.float32)
    d_hidden = d_classifier = d_bias = None
    if needs.hidden:
        d_hidden = torch.zeros_like(pair.student.hidden, dtype=torch.float32)
    if needs.classifier:
        d_classifier = head.classifier.new_empty(head.classifier.shape)
    if needs.bias and head.bias is not None:
        d_bias = head.bias.new_empty(head.bias.shape)
        workspace.zero_()  # its sums are over all rows
    for first in range(0, len(head.classifier), width):
        classes = slice(first, min(first + width, len(head.classifier)))
        dz = workspace[: len(head.labels), : classes.stop - first]  # [N, chunk]
        divergence_gradient(dz, pair, classes, tokens, gradient)
        if d_hidden is not None:
            chunk = head.classifier[classes]
            add_d_hidden_of_chunk(d_hidden, dz, chunk, valid_rows.count, None, matmul)
        if d_classifier is not None:
            d_classifier_of_chunk(
                d_classifier[classes], dz, pair.student.hidden, valid_rows.count, None, matmul,
                scale=scale, out_rows=None,
            )  # fmt: skip
        if d_bias is not None:
            d_bias[classes] = dz.sum(0, dtype=torch.float32).to(d_bias)
    out = None
    if d_hidden is not None:
        out = move_rows(head.hidden.new_empty(head.hidden.shape), d_hidden, valid_rows.place, scale)
    return Gradients(out, d_classifier, d_bias)


def _pair(problem: DistillationProblem, valid_rows: ValidRows) -> Pair:
    """Both heads, with the hidden states of valid tokens side by side, then zeros."""

    def together(side: HeadProblem) -> Head:
        num_tokens, hidden_size = side.hidden.shape
        hidden = side.hidden.new_zeros(math.ceil(num_tokens / TILE) * TILE, hidden_size)
        move_rows(hidden[:num_tokens], side.hidden, valid_rows.rows)
        return _head(side, hidden)

    return Pair(
        student=together(problem.student),
        teacher=together(problem.teacher),
        divergence=problem.divergence,
        beta=problem.beta,
        temperature=problem.temperature,
    )


def _head(side: HeadProblem, hidden: Tensor) -> Head:
    bias = None if side.bias is None else side.bias.contiguous()
    return Head(hidden, side.classifier, bias, side.options.logit_scale, side.options.softcap)
