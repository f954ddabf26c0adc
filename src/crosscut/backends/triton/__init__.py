"""Triton kernels for NVIDIA GPUs: forward and backward at the speed of the matmuls they hold.

:mod:`.forward` is Algorithms 1 and 2 of the paper (arXiv:2411.09009), and finds the masses of the
softmax's columns, of which few are worth computing again. :mod:`.select` plans the backward and
lists these; :mod:`.project` carries the plan out, with :mod:`.exact` and :mod:`.chunked` for the
gradient of every entry and of the paper's tiles. :mod:`.distillation` is of two heads. See
docs/gpu.md.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from crosscut.backends.column_filter import filters_columns, sparsity, token_blocks
from crosscut.backends.protocol import (
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
    zero_gradients,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST = (8, 0)
_HAS_TRITON = find_spec("triton") is not None


class TritonBackend:
    """NVIDIA GPUs from compute capability 8.0 on: bfloat16, float16 and float32."""

    name = "triton"
    computes = frozenset(
        {"lse", "target_logit", "log_prob", "logit_sum", "entropy", "argmax", "target_rank"}
    )
    shards = False

    def unsupported_reason(self, problem: HeadProblem) -> str | None:
        device = problem.hidden.device
        if not _HAS_TRITON:
            return "needs Triton, which is not installed"
        if problem.hidden.dtype not in _DTYPES:
            return f"needs bfloat16, float16 or float32, got {problem.hidden.dtype}"
        if problem.labels.dim() > 1 and problem.options.paper_filter is not None:
            return f"serves one target per token under policy {problem.options.policy!r}"
        if problem.options.policy == "filtered" and problem.hidden.dtype == torch.float32:
            return "serves policy 'filtered' in bfloat16 and float16 only"
        if device.type != "cuda":
            if problem.options.backend == self.name and _interpreted():
                return None
            return f"needs a CUDA device, got {device.type}"
        if torch.version.hip is not None:
            return "needs an NVIDIA GPU, got one of AMD's"
        if not torch.cuda.is_available():
            return None  # no values are there: asked about a machine that has a GPU
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            oldest, found = (".".join(map(str, pair)) for pair in (_OLDEST, capability))
            return f"needs compute capability {oldest} or newer, got {found}"
        return None

    def forward(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        from crosscut.backends.triton.compile_ahead import compile_ahead
        from crosscut.backends.triton.forward import compute_statistics

        statistics = self.forward_like(problem, for_backward=for_backward)
        if not len(problem.labels):
            return statistics
        needs = Needs(True, True, problem.bias is not None) if for_backward else None
        with _on(problem):
            entropy = (False, True) if problem.entropy else (False,)
            compile_ahead(problem, statistics, needs, entropy)
            return compute_statistics(problem, statistics)

    def forward_like(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        num_tokens = len(problem.labels)
        filtered = for_backward and filters_columns(problem)

        def new(*shape: int) -> Tensor:
            return problem.hidden.new_empty(shape, dtype=torch.float32)

        saved = Saved(
            lse_compensation=new(num_tokens),
            column_mass=problem.hidden.new_empty(
                token_blocks(problem) if filtered else 0,
                len(problem.classifier),
                dtype=torch.bfloat16,
            ),
            tail_mass=new(num_tokens if filtered else 0),  # sum of slope p but for own classes
        )
        return empty_statistics(problem, saved)

    def backward(
        self, problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
    ) -> Gradients:
        from crosscut.backends.triton.compile_ahead import compile_ahead
        from crosscut.backends.triton.project import project
        from crosscut.backends.triton.select import select

        with _on(problem):
            if not len(problem.labels):
                return zero_gradients(problem, needs)
            compile_ahead(problem, statistics, needs, (cotangents.entropy is not None,))
            return project(problem, statistics, select(problem, statistics, cotangents, needs))

    def sparsity(self, problem: HeadProblem, statistics: Statistics) -> tuple[float, float]:
        return sparsity(problem, statistics)

    def unsupported_distillation_reason(self, problem: DistillationProblem) -> str | None:
        student, teacher = problem.student, problem.teacher
        dtypes = {student.hidden.dtype, teacher.hidden.dtype}
        if len(dtypes) > 1 or torch.float16 in dtypes:
            return "distils heads that are both bfloat16 or both float32"
        return self.unsupported_reason(student) or self.unsupported_reason(teacher)

    def divergences(self, problem: DistillationProblem) -> Divergences:
        from crosscut.backends.triton.distillation import compute_divergences

        with _on(problem.student):
            return compute_divergences(problem)

    def student_gradients(
        self,
        problem: DistillationProblem,
        found: Divergences,
        cotangents: DivergenceCotangents,
        needs: Needs,
    ) -> Gradients:
        from crosscut.backends.triton.distillation import compute_student_gradients

        with _on(problem.student):
            return compute_student_gradients(problem, found, cotangents, needs)


def _on(problem: HeadProblem) -> AbstractContextManager[object]:
    """Launches go to the current device: make it the problem's."""
    device = problem.hidden.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
