"""What a deferred head costs in eager mode: microseconds a call, without the matmul.

python benchmarks/head_call.py
"""

from __future__ import annotations

import timeit

import torch

from crosscut.integrations.huggingface import DeferredLinear


def main() -> None:
    """Measure, and print a line each."""
    torch.set_num_threads(1)
    head = DeferredLinear(64, 1000, bias=False, min_numel=0)
    hidden = torch.randn(2, 8, 64, requires_grad=True)
    logits = head(hidden)
    for name, call in {
        "head": lambda: head(hidden),
        "float()": lambda: head(hidden).float(),
        "float(), view": lambda: head(hidden).float().view(-1, 1000),
        "shape": lambda: logits.shape,
    }.items():
        best = min(timeit.repeat(call, number=2000, repeat=7)) / 2000
        print(f"{name:14} {best * 1e6:6.1f} us")


if __name__ == "__main__":
    main()
