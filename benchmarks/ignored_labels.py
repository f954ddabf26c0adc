"""Time of forward and backward when every second label is ignored, over the time when none is.

    python benchmarks/ignored_labels.py > benchmarks/results/ignored-labels-h200.json

Random logits: what an exact gradient takes does not depend on them. That the gradients are, bit for
bit, those of the other half alone is a test (tests/test_gpu.py).
"""

from __future__ import annotations

import json
from statistics import median

import torch

import crosscut
from crosscut.bench import results


def milliseconds(hidden: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> float:
    times = []
    for _ in range(13):
        hidden.grad = classifier.grad = None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        crosscut.linear_cross_entropy(hidden, classifier, labels, policy="exact").backward()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times[3:])


def main() -> None:
    rows = []
    for tokens, hidden_size, classes in ((8192, 2304, 256_000), (8192, 640, 262_144)):
        hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16)
        classifier = torch.randn(classes, hidden_size, device="cuda", dtype=torch.bfloat16)
        classifier *= hidden_size**-0.5
        labels = torch.randint(classes, (tokens,), device="cuda")
        leaves = hidden.requires_grad_(), classifier.requires_grad_()
        all_ms = milliseconds(*leaves, labels)
        labels[::2] = -100
        half_ms = milliseconds(*leaves, labels)
        rows.append({
            "tokens": tokens, "hidden": hidden_size, "vocab": classes,
            "all_ms": all_ms, "half_ms": half_ms, "ratio": half_ms / all_ms,
        })  # fmt: skip
    machine = results.this_machine()
    print(json.dumps({"gpu": machine.gpu, "torch": machine.torch, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
