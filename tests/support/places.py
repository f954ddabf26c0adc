"""Where tests run."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

INTERPRETED = find_spec("triton") is not None and not torch.cuda.is_available()
"""Whether Triton's kernels run in its interpreter: slowly, and without a GPU."""

INTERPRETER_LOGITS = 10_000
"""Most logits N * V of a head in the interpreter."""

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=(
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ),
    ),
]
"""For what is the same code on each."""
