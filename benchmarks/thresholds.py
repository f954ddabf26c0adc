"""What a smaller budget for the tail keeps on a GPU, its error and its time, by flatness.

    python benchmarks/thresholds.py gemma2-2b:8192:0.9 > benchmarks/results/threshold-h100.txt

A head is MODEL:TOKENS:LOGITS_TIMES. Under ``auto`` a block of tokens may leave TAIL_SHARE to its
tail; here it is given more and less, with room for a quarter of all pairs, or 2 GiB of them. What
keeps more is the exact gradient, and has its errors. Errors of dH and dC against float32, times
over the bare logits matmul, run in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

import crosscut
from crosscut.backends import column_filter
from crosscut.bench import measure, real_head, results, truth, workloads
from crosscut.bench.progress import Silent
from crosscut.options import GradientPolicy

REPEATS = 5
ROOM = 2**31


def study(workload: workloads.Workload) -> None:
    hidden, classifier = (
        value.detach().requires_grad_() for value in (workload.hidden, workload.classifier)
    )
    right = truth.truth(workload, Silent())
    theirs = truth.relative_errors(truth.plain_pytorch(workload, Silent()), right)
    print(f"  pytorch                             {theirs.d_hidden:.2e} {theirs.d_classifier:.2e}")
    matmul = measure.logits_matmul(workload)

    def call(policy: GradientPolicy) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            loss = crosscut.linear_cross_entropy(hidden, classifier, workload.labels, policy=policy)
            return loss, *torch.autograd.grad(loss, (hidden, classifier))

        return run

    def line(name: str, run: Callable[[], tuple[Tensor, ...]]) -> None:
        loss, d_hidden, d_classifier = run()
        found = truth.Answer(loss=loss.item(), d_hidden=d_hidden, d_classifier=d_classifier)
        off = truth.relative_errors(found, right)
        del found, d_hidden, d_classifier
        times = [[measure.seconds(work, hidden.device) for work in (matmul, run)]
                 for _ in range(REPEATS)]  # fmt: skip
        matmul_s, run_s = map(median, zip(*times, strict=True))
        print(
            f"  {name:35s} {off.d_hidden:.2e} {off.d_classifier:.2e} "
            f"{1e3 * run_s:6.2f} ms {run_s / matmul_s:5.2f}",
            flush=True,
        )

    share, limit = column_filter.TAIL_SHARE, crosscut.workspace_limit()
    crosscut.set_workspace_limit(ROOM)
    for times in (4, 2, 1, 0.5, 0.25):
        column_filter.TAIL_SHARE = share * times
        sparsity = crosscut.gradient_sparsity(hidden, classifier, workload.labels)
        name = f"x{times:<5} kept {sparsity.kept:7.2%} tail {sparsity.tail:6.2%}"
        line(name, call("auto"))
    column_filter.TAIL_SHARE = share
    crosscut.set_workspace_limit(limit)
    line("exact", call("exact"))


def main(*heads: str) -> None:
    head = real_head.load(max(int(name.split(":")[1]) for name in heads), Silent())
    print(f"$ python benchmarks/thresholds.py {' '.join(heads)}")
    machine = results.this_machine()
    print(f"{machine.gpu or machine.cpu}, PyTorch {torch.__version__}, commit {results.commit()}")
    print(f"{head.source}, in the shape of each head, bfloat16")
    for name in heads:
        model, tokens, times = name.split(":")
        request = workloads.WorkloadRequest(
            name=model, tokens=int(tokens), device="cuda", logits_times=float(times)
        )
        print(f"{model}, N={tokens}, logits x {times}")
        study(workloads.from_real_head(head, workloads.MODELS[model], request, Silent()))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
