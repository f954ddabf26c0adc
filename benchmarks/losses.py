"""Log-probabilities with their entropy, and distillation: crosscut beside other ways.

    python benchmarks/losses.py --tokens 256 > benchmarks/results/losses-gemma3-270m-bf16-cpu.json
    python benchmarks/losses.py --device cuda --workload gemma2-2b --tokens 4096

The head of Gemma 3 270M on real text, or that in another head's shape. In distillation the student
sees its hidden states with noise. PyTorch works on full logits, in float32 from the softmax on;
liger-kernel, where it is installed and the device a GPU, on chunks of them, and so the function of
TRL's trainers, where TRL is installed. Nobody's time is printed whose gradients are further from
the truth, in float32, than 1.5 times those of plain PyTorch. Times are also given over that of the
bare logits matmul, run in between.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import crosscut
from crosscut.bench import measure, results, workloads
from crosscut.bench.progress import Silent

Loss = Callable[[Tensor, Tensor], Tensor]
REPEATS = 5
SLACK = 1.5
TOKENS = 512  # of the truth, at a time


def log_probs_and_entropy(workload: workloads.Workload) -> dict[str, Loss]:
    labels = workload.labels

    def ours(hidden: Tensor, classifier: Tensor) -> Tensor:
        found = crosscut.token_statistics(hidden, classifier, labels, entropy=True)
        assert found.entropy is not None
        return -(found.log_prob + 0.01 * found.entropy).mean()

    def theirs(hidden: Tensor, classifier: Tensor) -> Tensor:
        log_p = F.linear(hidden, classifier).float().log_softmax(-1)
        log_prob = log_p.gather(-1, labels[:, None])[:, 0]
        return -(log_prob - 0.01 * (log_p.exp() * log_p).sum(-1)).mean()

    found = contenders(ours, theirs)
    if find_spec("trl"):
        from trl.trainer import utils

        function: Any = utils._ChunkedLogProbFunction  # as its trainers call it
        chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE

        def trl(hidden: Tensor, classifier: Tensor) -> Tensor:
            log_prob, entropy, *_ = function.apply(
                hidden, classifier, None, labels, 1.0, chunk, None, 1.0, ("entropy",)
            )
            return -(log_prob + 0.01 * entropy).mean()

        found["trl"] = trl
    return found


def distillation(teacher: workloads.Workload) -> dict[str, Loss]:
    def ours(hidden: Tensor, classifier: Tensor) -> Tensor:
        return crosscut.linear_kl_div(hidden, classifier, teacher.hidden, teacher.classifier)

    def theirs(hidden: Tensor, classifier: Tensor) -> Tensor:
        log_p = F.linear(hidden, classifier).float().log_softmax(-1)
        log_q = F.linear(teacher.hidden, teacher.classifier).float().log_softmax(-1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    found = contenders(ours, theirs)
    if teacher.hidden.is_cuda and find_spec("liger_kernel"):
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearJSD,
        )

        liger = LigerFusedLinearJSD(jsd_beta=0.0)  # the forward divergence
        found["liger-kernel"] = lambda hidden, classifier: liger(
            hidden, classifier, teacher.hidden, teacher.classifier, None
        )
    return found


def contenders(ours: Loss, theirs: Loss) -> dict[str, Loss]:
    compiled = torch.compile(theirs, dynamic=False)
    return {"crosscut": ours, "pytorch": theirs, "pytorch-compiled": compiled}


def gradients(loss: Loss, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, ...]:
    leaves = hidden.detach().requires_grad_(), classifier.detach().requires_grad_()
    return torch.autograd.grad(loss(*leaves), leaves)


def error(found: Tensor, true: Tensor) -> float:
    return ((found.float() - true).norm() / true.norm()).item()


def truth(
    task: Callable[[workloads.Workload], dict[str, Loss]],
    given: workloads.Workload,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients in float32, of some tokens at a time: all of their logits have no room."""
    classifier = given.classifier.float()
    d_hidden, d_classifier = torch.zeros_like(hidden).float(), torch.zeros_like(classifier)
    for start in range(0, len(hidden), TOKENS):
        part = slice(start, start + TOKENS)
        some = replace(
            given, hidden=given.hidden[part].float(), classifier=classifier,
            labels=given.labels[part],
        )  # fmt: skip
        found = gradients(task(some)["pytorch"], hidden[part].float(), classifier)
        share = len(some.labels) / len(hidden)
        d_hidden[part] = share * found[0]
        d_classifier += share * found[1]
    return d_hidden, d_classifier


def rows_of(
    task: Callable[[workloads.Workload], dict[str, Loss]],
    given: workloads.Workload,
    hidden: Tensor,
) -> list[dict]:
    """A row a contender: ``task`` on ``hidden``, the labels or the teacher being ``given``."""
    losses, classifier = task(given), given.classifier
    device, out, errors = hidden.device, [], {}
    repeats = REPEATS if device.type == "cpu" else 2 * REPEATS
    exact = truth(task, given, hidden)
    for name, loss in losses.items():
        found = gradients(loss, hidden, classifier)
        errors[name] = {
            "d_hidden": error(found[0], exact[0]),
            "d_classifier": error(found[1], exact[1]),
        }
        del found
    del exact
    matmul = measure.logits_matmul(given)
    for name, loss in losses.items():
        row: dict = {"contender": name, "errors": errors[name]}
        out.append(row)
        if not all(errors[name][key] <= SLACK * errors["pytorch"][key] for key in errors[name]):
            row["failure"] = "less accurate than PyTorch"
            continue

        def both(loss: Loss = loss) -> None:
            gradients(loss, hidden, classifier)

        @torch.no_grad()
        def forward(loss: Loss = loss) -> None:
            loss(hidden, classifier)

        forward()  # compiles
        times = [[measure.seconds(work, device) for work in (matmul, forward, both)]
                 for _ in range(repeats)]  # fmt: skip
        *_, both_s = samples = list(zip(*times, strict=True))
        matmul_s, row["forward_s"], row["forward_backward_s"] = map(median, samples)
        row["max_over_min"] = max(both_s) / min(both_s)  # of forward and backward
        row["forward_over_matmul"] = row["forward_s"] / matmul_s
        row["forward_backward_over_matmul"] = row["forward_backward_s"] / matmul_s
        row["peak_extra_bytes"] = (
            measure.peak_bytes(both, device) - hidden.nbytes - classifier.nbytes
        )
        print(row, file=sys.stderr)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=workloads.MODELS, default="gemma3-270m")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=workloads.DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    request = workloads.WorkloadRequest(
        name=options.workload, tokens=options.tokens, dtype=options.dtype, device=options.device
    )
    head = workloads.make(request, Silent())
    noise = torch.randn(head.hidden.shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(head.hidden.device)
    student = head.hidden + (0.3 * head.hidden.float().std() * noise).to(head.hidden)
    tasks = {
        "log-probabilities and entropy": rows_of(log_probs_and_entropy, head, head.hidden),
        "distillation, forward divergence": rows_of(distillation, head, student),
    }
    print(json.dumps({
        "command": f"python benchmarks/losses.py {' '.join(sys.argv[1:])}",
        "crosscut": crosscut.__version__,
        "commit": results.commit(),
        "machine": asdict(results.this_machine()),
        "workload": {"name": head.name, "source": head.source, "tokens": options.tokens,
                     "dtype": options.dtype},
        "tasks": tasks,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
