"""Forward and backward replayed from a CUDA graph: what is left when the host has nothing to do.

    python benchmarks/cuda_graph.py benchmarks/results/cuda-graph-h100.json gemma2-2b:1024

A head is MODEL:TOKENS, of one model's logits, in bfloat16, as in ``crosscut bench``. Loss and both
gradients are captured once and replayed into memory that held NaN; what comes must be, bit by bit,
what the same call gives without a graph. Times are medians, over that of the bare logits matmul: of
the GPU with the host ahead, and from an idle GPU until the result is there.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

import crosscut
from crosscut.bench import measure, real_head, results, workloads
from crosscut.bench.progress import Bars

REPEATS = 8


def replayed(workload: workloads.Workload) -> dict[str, Any]:
    """Times of one head."""
    hidden, classifier = (
        value.detach().requires_grad_() for value in (workload.hidden, workload.classifier)
    )

    def call() -> list[torch.Tensor]:
        loss = crosscut.linear_cross_entropy(hidden, classifier, workload.labels)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, classifier))]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        right = call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = call()
    for value in found:
        value.fill_(math.nan)
    graph.replay()
    if not all(torch.equal(one, other) for one, other in zip(found, right, strict=True)):
        raise SystemExit(f"{workload.name}: the graph computes something else")
    del right
    ways = {"matmul": measure.logits_matmul(workload), "call": call, "replay": graph.replay}
    times: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        for name, work in ways.items():
            taken = measure.seconds(work, hidden.device)
            times.setdefault(f"{name}_s", []).append(taken)
            times.setdefault(f"{name}_from_idle_s", []).append(from_idle(work))
    row = {name: median(values) for name, values in times.items()}
    ratios = {
        name.replace("_s", "_over_matmul"): seconds / row["matmul_s"]
        for name, seconds in row.items()
        if not name.startswith("matmul")
    }
    return row | ratios


def from_idle(work: Callable[[], object]) -> float:
    """Seconds from an idle GPU until the result of a call is there."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main(out: str, *wanted: str) -> None:
    bars, rows = Bars(), {}
    head = real_head.load(max(int(name.split(":")[1]) for name in wanted), bars)
    for words in wanted:
        model, tokens = words.split(":")
        request = workloads.WorkloadRequest(name=model, tokens=int(tokens), device="cuda")
        workload = workloads.from_real_head(head, workloads.MODELS[model], request, bars)
        rows[words] = replayed(workload)
        print(words, {name: float(f"{value:.3g}") for name, value in rows[words].items()})
        torch.cuda.empty_cache()
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "crosscut": crosscut.__version__,
        "commit": results.commit(),
        "machine": asdict(results.this_machine()),
        "heads": rows,
    }
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
