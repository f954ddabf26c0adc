"""Triton kernels for NVIDIA GPUs: forward and backward at the speed of the matmuls they hold.

Forward: one kernel for the log-sum-exp, one for the target logits; O(N) memory. Backward: in
:mod:`.backward`, chunk by chunk of the vocabulary, exact or with the paper's filter.

Under ``"auto"`` the gradient is the exact one.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from crosscut.backends.protocol import Cotangents, Gradients, HeadProblem, Needs, Statistics

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST = (8, 0)


class TritonBackend:
    """NVIDIA GPUs from compute capability 8.0 on: bfloat16, float16 and float32."""

    name = "triton"

    def why_not(self, problem: HeadProblem) -> str | None:
        device = problem.hidden.device
        if find_spec("triton") is None:
            return "needs Triton, which is not installed"
        if problem.hidden.dtype not in _DTYPES:
            return f"needs bfloat16, float16 or float32, got {problem.hidden.dtype}"
        if problem.entropy or problem.ranks:
            return "serves no entropy and no ranks"
        if problem.labels.dim() > 1:
            return "serves one target a token"
        if problem.options.policy == "filtered":
            return "serves no policy 'filtered'"
        if device.type != "cuda":
            if problem.options.backend == self.name and _interpreted():
                return None
            return f"needs a CUDA device, got {device.type}"
        if torch.version.hip is not None or not torch.cuda.is_available():
            return "needs an NVIDIA GPU, and there is none"
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            oldest, found = (".".join(map(str, pair)) for pair in (_OLDEST, capability))
            return f"needs compute capability {oldest} or newer, got {found}"
        return None

    def forward(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        from crosscut.kernels.indexed_matmul import indexed_matmul
        from crosscut.kernels.kept_rows import kept_rows
        from crosscut.kernels.linear_lse import linear_lse
        from crosscut.kernels.tiles import Kernel, choose_tiles

        statistics = self.forward_like(problem, for_backward=for_backward)
        if not len(problem.labels):
            return statistics
        hidden, labels = problem.hidden.contiguous(), problem.labels.contiguous()
        bias, weight = (
            None if vector is None else vector.contiguous()
            for vector in (problem.bias, problem.logit_weight)
        )
        head = {"logit_scale": problem.options.logit_scale, "softcap": problem.options.softcap}
        with _on(problem):
            if labels.is_cuda:  # as PyTorch does it there: a late error, of the device
                torch._assert_async((labels < len(problem.classifier)).all())
            kernel = Kernel.LSE if weight is None else Kernel.WEIGHTED_LSE
            tiles = choose_tiles(kernel, hidden)
            lse, logit_sum = linear_lse(
                hidden, problem.classifier, bias, weight, kept_rows(labels), tiles, **head
            )
            target_logit = indexed_matmul(hidden, problem.classifier, bias, labels, **head)
        if logit_sum is None:
            logit_sum = statistics.logit_sum
        return statistics._replace(lse=lse, target_logit=target_logit, logit_sum=logit_sum)

    def forward_like(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        del for_backward  # the backward needs no more than the statistics
        num_tokens = len(problem.labels)

        def new(*shape: int) -> Tensor:
            return problem.hidden.new_empty(shape, dtype=torch.float32)

        return Statistics(
            lse=new(num_tokens),
            target_logit=new(num_tokens),
            logit_sum=new(0 if problem.logit_weight is None else num_tokens),
            entropy=new(0),
            argmax=problem.labels.new_empty(0),
            target_rank=problem.labels.new_empty(0),
            column_mass=new(0, len(problem.classifier)),
            tail_mass=new(0),
        )

    def backward(
        self, problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
    ) -> Gradients:
        from crosscut.backends.triton.backward import compute_gradients

        with _on(problem):
            three: Any = cotangents[:3]  # of an entropy there is none
            return compute_gradients(problem, statistics, three, needs)

    def sparsity(self, problem: HeadProblem, statistics: Statistics) -> tuple[float, float]:
        del problem, statistics
        return 1.0, 0.0


def _on(problem: HeadProblem) -> AbstractContextManager[object]:
    """Launches go to the current device: make it the problem's."""
    device = problem.hidden.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
