"""What a threshold of the default gradient keeps on a GPU, and the error that is left: on a CPU.

    python benchmarks/threshold_study.py > benchmarks/results/threshold-study-cpu.txt

A model's real softmax in float32, over the first V of its classes (labels moved in). Tokens decide
in blocks of 128; what is dropped is replaced by the rank-one matrix of a block; every kept pair
counts whole, in dC too. Relative errors of dH and dC against the whole softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscut.bench import real_head, workloads
from crosscut.bench.progress import Silent

BLOCK = 128
CASES = ((32_064, 2048, 1.0), (128_256, 1024, 1.0), (262_144, 1024, 1.0), (32_064, 2048, 0.5),
         (262_144, 1024, 0.95))  # classes, tokens, factor of the logits  # fmt: skip
EXPONENTS = (-12.5, -11.5, -10.5, -9.5, -8.5, -7.5)


def study(head: real_head.RealHead, num_classes: int, tokens: int, times: float) -> None:
    everything = len(head.classifier)
    classes = workloads.choose_classes(head.vocabulary, of=everything, keep=num_classes)
    place = torch.full((everything,), -1)
    place[classes] = torch.arange(num_classes)
    hidden, labels = head.hidden[:tokens] * times, place[head.labels[:tokens]]
    classifier = head.classifier[classes]

    p = (hidden @ classifier.t()).softmax(1)
    dz = p.clone()
    dz[torch.arange(tokens), labels] -= 1
    d_hidden, d_classifier = dz @ classifier, dz.t() @ hidden
    print(f"V={num_classes}, N={tokens}, logits x {times}")
    for exponent in EXPONENTS:
        select_pairs, tail = 0, 0.0
        ours_hidden = torch.empty_like(d_hidden)
        ours_classifier = torch.zeros_like(d_classifier)
        for start in range(0, tokens, BLOCK):
            rows = slice(start, start + BLOCK)
            mass = p[rows].sum(0)
            kept = mass >= 2.0**exponent
            kept[labels[rows]] = True
            select_pairs += int(kept.sum())
            column, row = torch.where(kept, 0, mass), (p[rows] * ~kept).sum(1)
            total = column.sum()
            tail += total.item()
            some = torch.where(kept, dz[rows], 0)
            ours_hidden[rows] = some @ classifier + torch.outer(row, column @ classifier) / total
            ours_classifier += some.t() @ hidden[rows]
            ours_classifier += torch.outer(column, row @ hidden[rows]) / total
        share = select_pairs * BLOCK / (tokens * num_classes)
        print(
            f"  2^{exponent} kept {share:.4f} tail {tail / tokens:.4f} "
            f"dH {error(ours_hidden, d_hidden):.2e} dC {error(ours_classifier, d_classifier):.2e}",
            flush=True,
        )


def error(value: Tensor, true: Tensor) -> float:
    return ((value - true).norm() / true.norm()).item()


def main() -> None:
    head = real_head.load(max(tokens for _, tokens, _ in CASES), Silent())
    print(f"{head.source}; PyTorch {torch.__version__}, float32\n")
    for case in CASES:
        study(head, *case)


if __name__ == "__main__":
    main()
