"""Fine-tune Gemma 3 270M in a loop of one's own: only the second line below is crosscut's.

python examples/plain_loop.py [--steps 3] [--length 128]
"""

from __future__ import annotations

import argparse

import gemma3
import torch

import crosscut
from crosscut.integrations import huggingface


def main() -> None:
    """Train, and say what was fused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()

    model = gemma3.load()
    model = crosscut.defer_logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-4)
    ids = gemma3.windows(options.length, 2)  # the same text again and again: few steps show it
    for step in range(1, options.steps + 1):
        logits = model(input_ids=ids, use_cache=False).logits  # nothing is computed here
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
    print(*huggingface.explain(model), sep="\n")


if __name__ == "__main__":
    main()
