"""Train a small head whose classes are spread over processes. Needs PyTorch and crosscut alone.

torchrun --nproc-per-node=2 examples/vocab_parallel.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import crosscut

CLASSES, HIDDEN, TOKENS, STEPS = 1000, 64, 256, 20


class Model(nn.Module):
    """An embedding, a layer and a head: the next token is twice this one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, HIDDEN)
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, CLASSES, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states; the head is in the loss."""
        return self.layer(self.embedding(tokens)).relu()


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same model and tokens on all ranks
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model.lm_head, mesh, ColwiseParallel())
    weight = model.lm_head.weight
    assert isinstance(weight, DTensor)
    print(f"rank {dist.get_rank()} holds {len(weight.to_local())} of {len(weight)} classes")
    others = [*model.embedding.parameters(), *model.layer.parameters()]
    optimizers = [torch.optim.AdamW(group, lr=1e-2) for group in ([weight], others)]
    for step in range(STEPS):
        tokens = torch.randint(CLASSES, (TOKENS,))
        loss = crosscut.linear_cross_entropy(model(tokens), weight, 2 * tokens % CLASSES)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
