"""The bench on many heads of one model's logits, in one process: the model's head is read once.

    python benchmarks/heads.py benchmarks/results h100 gemma2-2b:8192:0.5 llama3-8b:8192

A head is MODEL:TOKENS or MODEL:TOKENS:LOGITS_TIMES; --against=NAMES before it says whom to run
beside crosscut from there on. Each result is that of ``crosscut bench`` on that head.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console

from crosscut.bench import contenders, real_head, results, workloads
from crosscut.bench import report as reports
from crosscut.bench.progress import Bars
from crosscut.bench.run import Plan, run


def main(folder: str, machine: str, *wanted: str) -> None:
    bars, device = Bars(), "cuda" if torch.cuda.is_available() else "cpu"
    against, repeats = "crosscut-exact,pytorch", 8
    heads = [words for words in wanted if not words.startswith("--")]
    head = real_head.load(max(int(name.split(":")[1]) for name in heads), bars)
    for words in wanted:
        if words.startswith("--against="):
            against = words.removeprefix("--against=")
            continue
        model, tokens, *times = words.split(":")
        request = workloads.WorkloadRequest(
            name=model, tokens=int(tokens), device=device,
            logits_times=float(times[0]) if times else 1.0,
        )  # fmt: skip
        workload = workloads.from_real_head(head, workloads.MODELS[model], request, bars)
        chosen, left_out = contenders.choose(against, device, "bf16")
        plan = Plan(
            contenders=chosen, left_out=left_out, repeats=repeats,
            command=shlex.join(["python", *sys.argv]),
        )  # fmt: skip
        result = run(workload, plan, bars)
        name = "-".join([model, machine, tokens, *(f"x{factor}" for factor in times)])
        results.save(result, Path(folder, f"{name}.json"))
        Console(width=200).print(f"{words}, {against}", reports.table(result))
        del workload
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
