"""Which heads are too small for crosscut: CPU time of a step with a plain and a deferred one.

python benchmarks/small_heads.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from crosscut.integrations.huggingface import DeferredLinear

HIDDEN_SIZE = 128


def milliseconds(step: Callable[[], None], repeats: int) -> float:
    """The median of the process's own time, whatever else the machine does."""
    times = []
    for _ in range(repeats + 2):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times[2:])


def main() -> None:
    """Measure, and print a line each."""
    torch.set_num_threads(1)
    for tokens, classes in (
        (16, 1000), (64, 4000), (64, 32_000), (64, 128_000), (512, 8000), (512, 32_000),
        (512, 128_000), (2048, 4096), (2048, 8192),
    ):  # fmt: skip
        hidden = torch.randn(tokens, HIDDEN_SIZE, requires_grad=True)
        target = torch.randint(classes, (tokens,))
        heads = (
            nn.Linear(HIDDEN_SIZE, classes, bias=False),
            DeferredLinear(HIDDEN_SIZE, classes, bias=False, min_numel=0),
        )

        def step(head: nn.Module, hidden: torch.Tensor = hidden, y: torch.Tensor = target) -> None:
            F.cross_entropy(head(hidden), y).backward()

        repeats = 5 if tokens * classes < 2**23 else 3
        plain, deferred = (milliseconds(lambda head=head: step(head), repeats) for head in heads)
        logits = torch.tensor(tokens * classes).log2().item()
        print(
            f"{tokens:5} tokens, {classes:7} classes (2^{logits:4.1f} logits): plain {plain:7.2f} "
            f"ms, deferred {deferred:7.2f} ms, ratio {deferred / plain:.2f}"
        )


if __name__ == "__main__":
    main()
