"""What flatter softmaxes and other texts cost: crosscut with and without the sweep over pairs.

    python benchmarks/flatter_softmax.py benchmarks/results/flatter-softmax-h100.json

Forward and backward over the logits matmul of the same workload, along factors of the logits: with
``PAIR_SWEEP`` (src/crosscut/backends/column_filter.py) off and on, under ``exact``, and PyTorch
compiled. With the share of pairs that are selected, and the errors of loss, dH and dC.

    --texts FILE    also other texts: what torch.save wrote of a dict from the name of a text to its
                    hidden states [N, 640] of Gemma 3 270M and its next tokens [N]

A line is printed per workload; the file is written anew after each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import crosscut
from crosscut.backends import column_filter
from crosscut.bench import contenders, real_head, results, workloads
from crosscut.bench.measure import Subject, logits_matmul, seconds
from crosscut.bench.progress import Silent
from crosscut.bench.truth import plain_pytorch, relative_errors, truth
from crosscut.bench.workloads import Workload, WorkloadRequest

SHAPES = [("gemma2-2b", 8192), ("gemma3-270m", 8192), ("llama3-8b", 8192), ("gemma2-2b", 4096)]
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
OF_TEXTS = (1.0, 0.7)


def milliseconds(subject: Subject, repeats: int = 5) -> float:
    device = subject.hidden.device
    return 1e3 * median(seconds(subject.forward_backward, device) for _ in range(repeats))


def measure(workload: Workload, *, compiled: float | None) -> dict[str, Any]:
    """One workload; ``compiled`` is what PyTorch takes of the shape, measured if None."""
    known, silent = contenders.everyone(), Silent()
    device = workload.hidden.device
    matmul = 1e3 * median(seconds(logits_matmul(workload), device) for _ in range(5))
    found: dict[str, Any] = {"matmul_ms": matmul}
    auto = Subject(known["crosscut-auto"].build(), workload)
    right = truth(workload, silent)
    for name, on in (("auto", False), ("auto_pair_sweep", True)):
        column_filter.PAIR_SWEEP = on
        found[f"{name}_ms"] = milliseconds(auto)
        found[f"{name}_error"] = asdict(relative_errors(auto.answer()[0], right))
        auto.forget_gradients()
    sparsity = crosscut.gradient_sparsity(workload.hidden, workload.classifier, workload.labels)
    column_filter.PAIR_SWEEP = False
    found |= {"selected": sparsity.kept, "tail": sparsity.tail}
    found["pytorch_error"] = asdict(relative_errors(plain_pytorch(workload, silent), right))
    del right, auto
    torch.cuda.empty_cache()
    found["exact_ms"] = milliseconds(Subject(known["crosscut-exact"].build(), workload), 3)
    contender = known["pytorch-compiled"]
    if compiled is None and contender.unsupported_reason(workload) is None:
        compiled = milliseconds(Subject(contender.build(), workload), 3)
    found["pytorch_compiled_ms"] = compiled
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--texts", type=Path)
    wanted = parser.parse_args()
    head = real_head.load(max(tokens for _, tokens in SHAPES), Silent())
    cases = [(*shape, "english", factor, head) for shape in SHAPES for factor in FACTORS]
    texts = torch.load(wanted.texts) if wanted.texts else {}
    vocabulary = torch.cat([head.vocabulary, *(labels for _, labels in texts.values())]).unique()
    for text, (hidden, labels) in texts.items():
        of_text = replace(head, hidden=hidden.float(), labels=labels, vocabulary=vocabulary)
        for model in ("gemma2-2b", "gemma3-270m"):
            cases += [(model, len(labels), text, factor, of_text) for factor in OF_TEXTS]
    machine, rows = asdict(results.this_machine()), []
    compiled: dict[tuple[str, int], float | None] = {}
    for model, tokens, text, factor, of_text in cases:
        request = WorkloadRequest(name=model, tokens=tokens, device="cuda", logits_times=factor)
        shape = workloads.MODELS[model]
        workload = workloads.from_real_head(of_text, shape, request, Silent())
        row = {"head": model, "tokens": tokens, "text": text, "logits_times": factor}
        row |= measure(workload, compiled=compiled.get((model, tokens)))
        compiled[model, tokens] = row["pytorch_compiled_ms"]
        rows.append(row)
        times = {name: row[f"{name}_ms"] or 0 for name in ("auto", "auto_pair_sweep", "exact")}
        ratios = {name: round(time / row["matmul_ms"], 2) for name, time in times.items()}
        print(model, tokens, text, factor, f"selected {row['selected']:.3f}", ratios, flush=True)
        report = {"commit": results.commit(), "machine": machine, "rows": rows}
        wanted.result.write_text(json.dumps(report, indent=1) + "\n")
        del workload


if __name__ == "__main__":
    main()
