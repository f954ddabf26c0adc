"""The right answer, and how far off it plain PyTorch is.

The truth is computed two precisions above the inputs: in float64 for float32 inputs, in float32
for 16-bit ones, on the very same input values. Neither it nor the yardstick ever holds the [N, V]
logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.bench.progress import Progress
from crosscut.bench.results import Errors
from crosscut.bench.workloads import Workload

_BLOCK = 2**22
"""Logits made at once: 32 MiB in float64."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A mean loss, in nats, and its gradients ``[N, D]`` and ``[V, D]``."""

    loss: float
    d_hidden: Tensor
    d_classifier: Tensor


def truth(workload: Workload, progress: Progress) -> Answer:
    """Mean cross-entropy and gradients, in blocks of the vocabulary."""
    wide = torch.float64 if workload.hidden.dtype == torch.float32 else torch.float32
    hidden, labels = workload.hidden.to(wide), workload.labels
    num_tokens, num_classes = len(hidden), len(workload.classifier)
    starts = range(0, num_classes, max(1, _BLOCK // num_tokens))

    def classes(start: int) -> Tensor:
        return workload.classifier[start : start + starts.step].to(wide)  # [v, D]

    lse = torch.full((num_tokens,), -math.inf, dtype=torch.float64, device=hidden.device)
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    d_classifier = torch.empty(workload.classifier.shape, dtype=wide, device=hidden.device)
    with progress.stage(f"truth, in {str(wide).removeprefix('torch.')}", 2 * len(starts)) as step:
        for start in starts:
            lse = torch.logaddexp(lse, (hidden @ classes(start).T).logsumexp(1).double())
            step("loss")
        for start in starts:
            rows = classes(start)
            error = (hidden @ rows.T - lse.to(wide)[:, None]).exp_()  # [N, v], the softmax
            inside = ((labels >= start) & (labels < start + len(rows))).nonzero().squeeze(1)
            error[inside, labels[inside] - start] -= 1
            error /= num_tokens
            d_hidden += error @ rows
            torch.mm(error.T, hidden, out=d_classifier[start : start + len(rows)])
            step("gradients")
    target_logit = (hidden.double() * workload.classifier[labels].double()).sum(1)
    return Answer(
        loss=(lse - target_logit).mean().item(), d_hidden=d_hidden, d_classifier=d_classifier
    )


def plain_pytorch(workload: Workload, progress: Progress) -> Answer:
    """``F.cross_entropy(F.linear(hidden, classifier), labels)``, a few tokens at a time.

    Each token's gradient is what PyTorch computes for it; only the sum over tokens, in the
    classifier's gradient, is taken in float32 between the groups, and rounded in the end.
    """
    hidden, classifier, labels = workload.hidden, workload.classifier, workload.labels
    groups = torch.arange(len(hidden)).split(max(1, 64 * _BLOCK // len(classifier)))
    loss, d_hidden = 0.0, torch.empty_like(hidden)
    d_classifier = torch.zeros_like(classifier, dtype=torch.float32)
    with progress.stage("yardstick: plain PyTorch", len(groups)) as step:
        for group in groups:
            rows = slice(int(group[0]), int(group[-1]) + 1)
            logits = F.linear(hidden[rows], classifier).requires_grad_()  # [n, V]
            part = F.cross_entropy(logits, labels[rows])
            share = len(group) / len(hidden)
            (part * share).backward()
            assert logits.grad is not None
            loss += part.item() * share
            d_hidden[rows] = logits.grad @ classifier
            d_classifier += logits.grad.T @ hidden[rows]
            step("")
    return Answer(loss=loss, d_hidden=d_hidden, d_classifier=d_classifier.to(classifier.dtype))


def relative_errors(found: Answer, right: Answer) -> Errors:
    """``|found - right| / |right|``, 0 where both are 0; NaN where anything found is NaN."""
    return Errors(
        loss=_ratio(abs(found.loss - right.loss), abs(right.loss)),
        d_hidden=_relative_error(found.d_hidden, right.d_hidden),
        d_classifier=_relative_error(found.d_classifier, right.d_classifier),
    )


def _relative_error(found: Tensor, right: Tensor) -> float:
    """Frobenius norms, summed in float64, some rows at a time."""
    off = size = 0.0
    rows = max(1, _BLOCK // right.shape[1])
    for ours, theirs in zip(found.split(rows), right.split(rows), strict=True):
        theirs = theirs.double()
        off += (ours.double() - theirs).square_().sum().item()
        size += theirs.square().sum().item()
    return math.sqrt(_ratio(off, size))


def _ratio(off: float, size: float) -> float:
    """``off / size``. A softmax with all its mass on the label has a size of 0: 0 or infinity."""
    return off / size if size else off and off * math.inf
