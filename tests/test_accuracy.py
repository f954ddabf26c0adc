"""The contract of the default gradient, on the output head of a real model.

``auto`` is never less accurate than the standard PyTorch loss in the same dtype: on the logits of
real text as they are, sharpened, and flattened as they are early in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.heads import RealHead
from support.judging import error
from torch import Tensor

import crosscut

pytestmark = pytest.mark.real


class Gradients(NamedTuple):
    d_hidden: Tensor
    d_classifier: Tensor


def standard(hidden: Tensor, classifier: Tensor, labels: Tensor) -> Gradients:
    """``F.cross_entropy(F.linear(...))``, 256 tokens at a time to bound the memory.

    A token's gradient is what PyTorch computes for it. The sum of the classifier's gradient over
    the parts is taken in float32 at least: more accurate than in one matmul with a bfloat16 result,
    if any.
    """
    d_hidden = torch.empty_like(hidden)
    wide = torch.promote_types(classifier.dtype, torch.float32)
    d_classifier = torch.zeros_like(classifier, dtype=wide)
    for start in range(0, len(labels), 256):
        part = slice(start, start + 256)
        logits = F.linear(hidden[part], classifier).requires_grad_()
        loss = F.cross_entropy(logits, labels[part], reduction="sum") / len(labels)
        (dz,) = torch.autograd.grad(loss, logits)
        d_hidden[part] = dz @ classifier
        d_classifier += dz.t() @ hidden[part]
    return Gradients(d_hidden, d_classifier.to(classifier.dtype))


def crosscut_auto(hidden: Tensor, classifier: Tensor, labels: Tensor) -> Gradients:
    """The gradients of ``policy="auto"``, the default."""
    leaves = (hidden.detach().requires_grad_(), classifier.detach().requires_grad_())
    loss = crosscut.linear_cross_entropy(*leaves, labels)
    return Gradients(*torch.autograd.grad(loss, leaves))


BFLOAT16 = (torch.bfloat16, torch.float32)
FLOAT32 = (torch.float32, torch.float64)

# dtypes of the inputs and the truth; the window of 1024 tokens; tokens from it on; scale of logits
GRID = [
    (BFLOAT16, 0, 1024, 1.0),  # a whole block, which decides together
    (BFLOAT16, 9, 256, 1.0),
    (BFLOAT16, 0, 256, 2.0),
    (BFLOAT16, 0, 256, 0.5),
    (BFLOAT16, 9, 256, 0.2),
    (FLOAT32, 0, 128, 1.0),
    (FLOAT32, 9, 128, 0.2),
]
# On a GPU more tokens decide together: batches as its kernels are for, too.
CUDA_GRID = [
    *GRID,
    (BFLOAT16, 9, 1024, 1.0),
    *((BFLOAT16, 0, 512, scale) for scale in (2.0, 0.5, 0.2)),
    *((BFLOAT16, 0, 8192, scale) for scale in (1.0, 2.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.2)),
    *((BFLOAT16, 3, 1024, scale) for scale in (0.9, 0.8, 0.7)),
    *((BFLOAT16, 0, 16384, scale) for scale in (1.0, 0.95, 0.9)),
]


def cases() -> Iterator[Any]:
    for device, grid in (("cpu", GRID), ("cuda", CUDA_GRID)):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for dtypes, window, tokens, scale in grid:
            name = f"{device}, {str(dtypes[0])[6:]}, window {window}, {tokens} tokens, x{scale}"
            yield pytest.param(device, dtypes, window, tokens, scale, id=name, marks=marks)


@pytest.mark.parametrize(("device", "dtypes", "window", "tokens", "scale"), list(cases()))
def test_never_less_accurate_than_pytorch(
    real_head: RealHead,
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    window: int,
    tokens: int,
    scale: float,
):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    dtype, wide = dtypes
    hidden, labels = (tensor.to(device) for tensor in real_head.window(window, tokens))
    hidden = (scale * hidden.float()).bfloat16().to(dtype)  # the same numbers in every dtype
    classifier = real_head.classifier.to(device, dtype)
    ours = crosscut_auto(hidden, classifier, labels)
    theirs = standard(hidden, classifier, labels)
    true = standard(hidden.to(wide), classifier.to(wide), labels)
    errors = {
        name: (error_by_rows(value, exact), error_by_rows(their, exact))
        for name, value, their, exact in zip(ours._fields, ours, theirs, true, strict=True)
    }
    for name, (our_error, their_error) in errors.items():
        print(f"\n{name}: crosscut {our_error:.2e}, PyTorch {their_error:.2e}")
    for name, (our_error, their_error) in errors.items():
        assert our_error <= their_error, name


def test_the_filter_is_at_work(real_head: RealHead):
    """Or else what is judged above would be the exact gradient."""
    hidden, labels = real_head.window(0, 128)
    sparsity = crosscut.gradient_sparsity(hidden, real_head.classifier, labels)
    assert sparsity.kept < 0.1
    assert sparsity.tail > 0


def error_by_rows(value: Tensor, true: Tensor) -> float:
    """``error``, without two float64 copies of a whole classifier."""
    parts = zip(value.split(2**14), true.split(2**14), strict=True)
    off = sum(((v.double() - t.double()).norm() ** 2).item() for v, t in parts)
    return math.sqrt(off / sum((t.double().norm() ** 2).item() for t in true.split(2**14)))


def test_error_by_rows_is_the_error():
    value, true = torch.rand(40_000, 3), torch.rand(40_000, 3)
    assert error_by_rows(value, true) == pytest.approx(error(value, true))
