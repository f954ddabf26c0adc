"""What each of two gloo ranks runs for ``test_huggingface_distributed.py``: one training step.

    torchrun --nproc-per-node 2 huggingface_ranks.py FILE KIND...

Rank 0 writes to FILE, for each kind, loss and gradients of the deferred model, of the untouched
one, and of that one in float64; an error of a kind in their place.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import crosscut
from crosscut.integrations import huggingface

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_models import tiny

IDS = torch.randint(4, 90, (4, 12), generator=torch.Generator().manual_seed(5))


def wrap(model: Any, kind: str) -> Any:
    if kind.startswith("ddp"):
        return DistributedDataParallel(
            model, find_unused_parameters="unused" in kind, static_graph="static" in kind
        )
    if kind.startswith("tp"):
        mesh = init_device_mesh("cpu", (2,))
        if "transformers" in kind:
            plan = dict.fromkeys(("lm_head", "lm_head.weight"), "colwise_gather_output")
            return apply_tensor_parallelism(model, mesh, plan)
        return parallelize_module(
            model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())}
        )
    if kind.startswith("fsdp1"):
        head = model.lm_head
        alone = "head" in kind

        def policy(module: Any, recurse: bool, **_: Any) -> bool:
            return recurse or (alone and module is head)

        cpu = torch.device("cpu")
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params="parameters" in kind, device_id=cpu
        )
    reshard = "reshard" in kind
    for layer in model.model.layers:
        fully_shard(layer)
    if "head" in kind:
        fully_shard(model.lm_head, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=reshard or None)


def step(model: Any, kind: str, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    ids = IDS if kind.startswith("tp") else IDS[2 * rank : 2 * rank + 2]
    loss = torch.zeros(())
    for _ in range(2):  # the second time, all is as in the middle of a training
        model.zero_grad()
        if "outside" in kind:
            logits = model(input_ids=ids).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        if grad is None or not grad.numel():  # FSDP1: all of it is on the other rank
            continue
        gradients[name.removeprefix("module.")] = (
            grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        ).clone()
    return total / 2, gradients


def run(kind: str, rank: int) -> dict[str, Any]:
    """Every model of one kind."""
    results: dict[str, Any] = {}
    for which in ("deferred", "untouched", "exact"):
        model: Any = tiny()
        if which == "exact":
            model = model.double()
        if which == "deferred" and "after" not in kind:
            crosscut.defer_logits(model, min_numel=0, on_materialize="silent")
        wrapped = wrap(model, kind)
        if which == "deferred" and "after" in kind:
            crosscut.defer_logits(model, min_numel=0, on_materialize="silent")
        results[which] = step(wrapped, kind, rank)
        if which == "deferred":
            log = huggingface.explain(wrapped)[0].log
            results["fused"] = log.fused.total()
            results["materialised"] = [str(event) for event in log.materialized]
            results["real"] = dict(log.real)
        with torch.no_grad():
            logits = huggingface.materialize(wrapped(input_ids=IDS).logits)
        results[f"{which} logits"] = logits
    return results


def main() -> None:
    """Run the kinds."""
    file, *kinds = sys.argv[1:]
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for kind in kinds:
        try:
            results[kind] = run(kind, dist.get_rank())
        except Exception:  # the other rank has it too
            results[kind] = traceback.format_exc()
    if dist.get_rank() == 0:
        torch.save(results, file)
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's end races with gloo's threads, and aborts now and then


if __name__ == "__main__":
    main()
