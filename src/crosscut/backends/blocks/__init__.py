"""Plain PyTorch on any device: the algorithms in their most readable form.

No [N, V] tensor is ever made. Logits come in blocks of 16 MiB; the workspace is a few of them and
O(N + V) vectors, whatever N and V. Read :mod:`.forward` beside Algorithms 1 and 2 of the paper
(arXiv:2411.09009), :mod:`.tile_filter` beside Algorithm 3, and :mod:`.backward` for the gradient
that crosscut uses by default.
"""

from __future__ import annotations

import torch

from crosscut.backends.blocks.backward import compute_gradients
from crosscut.backends.blocks.distillation import compute_divergences, compute_student_gradients
from crosscut.backends.blocks.forward import compute_statistics
from crosscut.backends.blocks.logits import check_labels
from crosscut.backends.blocks.tile_filter import tile_filtered_backward
from crosscut.backends.column_filter import column_blocks, filters_blocks, sparsity_of_blocks
from crosscut.backends.protocol import (
    DECLARED,
    WHOLE,
    Cotangents,
    DistillationProblem,
    DivergenceCotangents,
    Divergences,
    Gradients,
    HeadProblem,
    Needs,
    Saved,
    Statistics,
    empty_statistics,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class BlocksBackend:
    """The reference backend: serves every float dtype, on every device PyTorch runs on."""

    name = "blocks"
    computes = frozenset(DECLARED)
    shards = True

    def unsupported_reason(self, problem: HeadProblem) -> str | None:
        if problem.hidden.dtype not in _DTYPES:
            return f"needs bfloat16, float16, float32 or float64, got {problem.hidden.dtype}"
        if problem.labels.dim() > 1 and problem.options.paper_filter is not None:
            return f"serves one target per token under policy {problem.options.policy!r}"
        if problem.shard != WHOLE and problem.options.paper_filter is not None:
            return f"serves no shard of a vocabulary under policy {problem.options.policy!r}"
        return None

    def forward(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        check_labels(problem)
        filters = filters_blocks(problem)
        return compute_statistics(problem, filter_columns=for_backward and filters)

    def forward_like(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        num_tokens = len(problem.labels)
        filtered = for_backward and filters_blocks(problem)

        def new(*shape: int) -> torch.Tensor:
            return problem.hidden.new_empty(shape, dtype=problem.statistics_dtype)

        saved = Saved(
            lse_compensation=new(num_tokens),
            column_mass=new(column_blocks(num_tokens) if filtered else 0, len(problem.classifier)),
            tail_mass=new(num_tokens if filtered else 0),
        )
        return empty_statistics(problem, saved)

    def backward(
        self, problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
    ) -> Gradients:
        if problem.options.paper_filter is not None:
            return tile_filtered_backward(problem, statistics, cotangents, needs)
        return compute_gradients(problem, statistics, cotangents, needs)

    def sparsity(self, problem: HeadProblem, statistics: Statistics) -> tuple[float, float]:
        return sparsity_of_blocks(problem, statistics)

    def unsupported_distillation_reason(self, problem: DistillationProblem) -> str | None:
        return self.unsupported_reason(problem.student) or self.unsupported_reason(problem.teacher)

    def divergences(self, problem: DistillationProblem) -> Divergences:
        return compute_divergences(problem)

    def student_gradients(
        self,
        problem: DistillationProblem,
        found: Divergences,
        cotangents: DivergenceCotangents,
        needs: Needs,
    ) -> Gradients:
        return compute_student_gradients(problem, found, cotangents, needs)
