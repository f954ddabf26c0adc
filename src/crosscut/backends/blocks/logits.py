"""Blocks of logits, made relative to a reference so that low precision costs little.

A block is the transpose of the usual picture, ``[BLOCK_V, BLOCK_N]``, one row a class: the
reference of each token then is the bias of a linear layer, ``F.linear(C, H, -reference)``, which
every matmul library adds in float32 before it rounds. A bfloat16 logit near 25 is off by up to
0.06, that is 6 % of its softmax; its distance from the log-sum-exp is off by 2**-9 of that
distance, and the distance is small exactly where the softmax is not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.backends.protocol import HeadProblem


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype whose matmul is fast on the device and wide enough for inputs of ``dtype``.

    float16 has too little range for unscaled gradients of logits, and bfloat16 is emulated where
    the hardware lacks it: both are computed in float32.
    """
    if dtype == torch.bfloat16 and _has_bfloat16(device):
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # before PyTorch 2.13
            return False
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]``; a view where the rows, in ascending order, have no gap."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return values.narrow(0, int(rows[0]), len(rows))
    return values[rows]


class LogitBlocks:
    """Makes the logits of one problem, block by block, and their derivative.

    Attributes:
        dtype: dtype of the blocks and of every sum over them: float32 or float64.
        fast: dtype of the matmuls that sweep the whole vocabulary.
        wide: dtype of [n] and [v] vectors that are added to many times. float64 where there is.
    """

    def __init__(self, problem: HeadProblem) -> None:
        self.dtype = problem.statistics_dtype
        self.fast = matmul_dtype(problem.hidden.dtype, problem.hidden.device)
        self.wide = self.dtype if problem.hidden.device.type == "mps" else torch.float64
        self.scale = problem.options.logit_scale
        self.softcap = problem.options.softcap
        self._plain = self.scale == 1 and self.softcap is None and problem.bias is None

    def block(
        self, classifier: Tensor, bias: Tensor | None, hidden: Tensor, reference: Tensor
    ) -> Tensor:
        """``logits - reference`` of v classes and n tokens, [v, n].

        Args:
            classifier: [v, D], in the dtype the matmul is to run in.
            bias: [v] or None.
            hidden: [n, D], in the same dtype.
            reference: [n].
        """
        center = reference if self._plain else self._before_softcap(reference)
        center = center.to(hidden.dtype)  # what the matmul can subtract before it rounds
        block = F.linear(classifier, hidden, -center).to(self.dtype)  # [v, n]
        center = center.to(self.dtype)
        if not self._plain:
            self.activate(block.add_(center), None if bias is None else bias[:, None])
            return block.sub_(reference)
        return block if hidden.dtype == self.dtype else block.add_(center - reference)

    def activate(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Dot products of hidden states and classifier rows to logits, in place."""
        if self.scale != 1:
            products.mul_(self.scale)
        if bias is not None:
            products.add_(bias)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def slope(self, block: Tensor, reference: Tensor) -> Tensor | None:
        """Derivative of the softcap at the logits of a block, [v, n]; None where it is 1."""
        if self.softcap is None:
            return None
        return (block + reference).div_(self.softcap).square_().neg_().add_(1)

    def _before_softcap(self, logit: Tensor) -> Tensor:
        """The dot product whose logit this is, bias aside: where rounding should be finest."""
        if self.softcap is not None:
            logit = self.softcap * torch.atanh((logit / self.softcap).clamp(-0.99, 0.99))
        return logit / self.scale if self.scale else torch.zeros_like(logit)
