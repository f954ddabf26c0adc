"""Log-probabilities with their entropy, and distillation: crosscut beside PyTorch's own ways.

    python benchmarks/losses.py --tokens 256 > benchmarks/results/losses-gemma3-270m-bf16-cpu.json

The head of Gemma 3 270M on real text. In distillation the student sees its hidden states with
noise. PyTorch works on full logits, in float32 from the softmax on. Nobody's time is printed whose
gradients are further from the truth, in float32, than 1.5 times those of plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import crosscut
from crosscut.bench import measure, results, workloads
from crosscut.bench.progress import Silent

Loss = Callable[[Tensor, Tensor], Tensor]
REPEATS = 3
SLACK = 1.5


def log_probs_and_entropy(labels: Tensor) -> dict[str, Loss]:
    def ours(hidden: Tensor, classifier: Tensor) -> Tensor:
        found = crosscut.token_statistics(hidden, classifier, labels, entropy=True)
        assert found.entropy is not None
        return -(found.log_prob + 0.01 * found.entropy).mean()

    def theirs(hidden: Tensor, classifier: Tensor) -> Tensor:
        log_p = F.linear(hidden, classifier).float().log_softmax(-1)
        log_prob = log_p.gather(-1, labels[:, None])[:, 0]
        return -(log_prob - 0.01 * (log_p.exp() * log_p).sum(-1)).mean()

    return contenders(ours, theirs)


def distillation(teacher_hidden: Tensor, teacher: Tensor) -> dict[str, Loss]:
    def ours(hidden: Tensor, classifier: Tensor) -> Tensor:
        return crosscut.linear_kl_div(hidden, classifier, teacher_hidden, teacher)

    def theirs(hidden: Tensor, classifier: Tensor) -> Tensor:
        log_p = F.linear(hidden, classifier).float().log_softmax(-1)
        log_q = F.linear(teacher_hidden, teacher).float().log_softmax(-1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    return contenders(ours, theirs)


def contenders(ours: Loss, theirs: Loss) -> dict[str, Loss]:
    compiled = torch.compile(theirs, dynamic=False)
    return {"crosscut": ours, "pytorch": theirs, "pytorch-compiled": compiled}


def gradients(loss: Loss, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, ...]:
    leaves = hidden.detach().requires_grad_(), classifier.detach().requires_grad_()
    return torch.autograd.grad(loss(*leaves), leaves)


def error(found: Tensor, true: Tensor) -> float:
    return ((found.float() - true).norm() / true.norm()).item()


def rows_of(losses: dict[str, Loss], true: Loss, hidden: Tensor, classifier: Tensor) -> list[dict]:
    device, out = hidden.device, []
    exact = gradients(true, hidden.float(), classifier.float())
    errors = {}
    for name, loss in losses.items():
        found = gradients(loss, hidden, classifier)
        errors[name] = {
            "d_hidden": error(found[0], exact[0]),
            "d_classifier": error(found[1], exact[1]),
        }
        del found
    del exact
    for name, loss in losses.items():
        row: dict = {"contender": name, "errors": errors[name]}
        out.append(row)
        if any(errors[name][key] > SLACK * errors["pytorch"][key] for key in errors[name]):
            row["failure"] = "less accurate than PyTorch"
            continue

        def both(loss: Loss = loss) -> None:
            gradients(loss, hidden, classifier)

        @torch.no_grad()
        def forward(loss: Loss = loss) -> None:
            loss(hidden, classifier)

        forward()  # compiles
        row["forward_s"] = median(measure.seconds(forward, device) for _ in range(REPEATS))
        row["forward_backward_s"] = median(measure.seconds(both, device) for _ in range(REPEATS))
        row["peak_extra_bytes"] = (
            measure.peak_bytes(both, device) - hidden.nbytes - classifier.nbytes
        )
        print(row, file=sys.stderr)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=workloads.DTYPES, default="bf16")
    options = parser.parse_args()
    request = workloads.WorkloadRequest(
        name="gemma3-270m", tokens=options.tokens, dtype=options.dtype
    )
    head = workloads.make(request, Silent())
    noise = torch.randn(head.hidden.shape, generator=torch.Generator().manual_seed(0))
    student = head.hidden + (0.3 * head.hidden.float().std() * noise).to(head.hidden)
    wide = head.hidden.float(), head.classifier.float()
    tasks = {
        "log-probabilities and entropy": rows_of(
            log_probs_and_entropy(head.labels),
            log_probs_and_entropy(head.labels)["pytorch"],
            head.hidden,
            head.classifier,
        ),
        "distillation, forward divergence": rows_of(
            distillation(head.hidden, head.classifier),
            distillation(*wide)["pytorch"],
            student,
            head.classifier,
        ),
    }
    print(json.dumps({
        "command": f"python benchmarks/losses.py --tokens {options.tokens} --dtype {options.dtype}",
        "crosscut": crosscut.__version__,
        "commit": results.commit(),
        "machine": asdict(results.this_machine()),
        "workload": {"name": head.name, "source": head.source, "tokens": options.tokens,
                     "dtype": options.dtype},
        "tasks": tasks,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
