"""Run cases of tests/test_parallel.py on the ranks of a process group. Under torchrun.

Arguments: a file of cases, by name, and a folder for what each rank finds.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import crosscut
from crosscut.parallel import vocab_shard


def run(case: dict[str, Any]) -> dict[str, Tensor]:
    """What the function returns, and gradients; with [rank] in its name what is this rank's."""
    rank = dist.get_rank()
    bounds = [0, *accumulate(case["sizes"])]
    here = slice(bounds[rank], bounds[rank + 1])
    head, options = case["head"], case["options"]
    bias, mesh = head.linear_bias, init_device_mesh("cpu", (dist.get_world_size(),))
    leaves: dict[str, Tensor] = {}
    if case["how"] == "shards":
        group = dist.group.WORLD
        assert group is not None
        leaves["input"] = head.input.clone().requires_grad_()
        leaves["weight"] = head.linear_weight[here].clone().requires_grad_()
        weight = vocab_shard(leaves["weight"], group)
        if bias is not None:
            leaves["bias"] = bias[here].clone().requires_grad_()
            bias = leaves["bias"]
    else:
        tokens = Shard(0) if case["how"] == "sequence" else Replicate()
        leaves["input"] = distribute_tensor(head.input, mesh, [tokens]).requires_grad_()
        leaves["weight"] = weight = distribute_tensor(
            head.linear_weight, mesh, [Shard(0)]
        ).requires_grad_()
        if bias is not None:
            leaves["bias"] = bias = distribute_tensor(bias, mesh, [Shard(0)]).requires_grad_()
    function = getattr(crosscut, case["function"])
    found = function(leaves["input"], weight, head.target, linear_bias=bias, **options)
    named = {"loss": found} if isinstance(found, Tensor) else vars(found)
    named = {name: value for name, value in named.items() if value is not None}
    differentiable = [value for value in named.values() if value.is_floating_point()]
    torch.autograd.backward(differentiable, [case["cotangent"](value) for value in differentiable])
    out = {name: value.detach() for name, value in named.items()}
    for name, leaf in leaves.items():
        gradient = leaf.grad
        assert gradient is not None, name
        whole = name == "input" and case["how"] != "sequence"
        if isinstance(gradient, DTensor):
            assert gradient.placements == leaf.placements, name  # pyright: ignore
            gradient = gradient.to_local()
        out[f"d_{name}" if whole else f"d_{name}[rank]"] = gradient
    return out


def two_dimensions(case: dict[str, Any]) -> dict[str, Tensor]:
    """Tokens over one dimension of the mesh, classes over the other."""
    head = case["head"]
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    hidden = distribute_tensor(head.input, mesh, [Shard(0), Replicate()]).requires_grad_()
    weight = distribute_tensor(head.linear_weight, mesh, [Replicate(), Shard(0)]).requires_grad_()
    target = distribute_tensor(head.target, mesh, [Shard(0), Replicate()])
    loss = crosscut.linear_cross_entropy(hidden, weight, target, **case["options"])
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    total = loss.detach().clone()
    dist.all_reduce(total, group=mesh.get_group("dp"))
    return {
        "loss": total,
        "d_input": hidden.grad.full_tensor(),  # pyright: ignore
        "d_weight": weight.grad.full_tensor(),  # pyright: ignore
    }


def wrong_on_one(case: dict[str, Any]) -> str:
    """What a call raises on rank 0 whose arguments do not fit on the last rank."""
    head, group = case["head"], dist.group.WORLD
    assert group is not None
    size = len(head.linear_weight) // dist.get_world_size()
    weight = head.linear_weight[:size]
    if dist.get_rank() == dist.get_world_size() - 1:
        if case["wrong"] == "hidden size":
            weight = weight[:, :-1]
        elif case["wrong"] == "targets":  # in the order of another rank's tokens
            head = replace(head, target=head.target.flip(0))
        else:
            head = replace(head, input=head.input[:-1], target=head.target[:-1])
    return raised(
        crosscut.linear_cross_entropy, head.input, vocab_shard(weight, group), head.target
    )


def raised(function: Callable[..., Any], *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(case: dict[str, Any]) -> list[str]:
    """What functions raise that know of no shards, whichever head is in shards."""
    head, group = case["head"], dist.group.WORLD
    assert group is not None
    whole = head.linear_weight
    size = len(whole) // dist.get_world_size()
    shard = vocab_shard(whole[dist.get_rank() * size :][:size], group)
    index, prob = torch.arange(2).expand(len(head.input), 2), torch.full((len(head.input), 2), 0.5)
    return [
        raised(crosscut.linear_kl_div, head.input, shard, head.input, shard),
        raised(crosscut.linear_kl_div, head.input, whole, head.input, shard),
        raised(crosscut.linear_topk_kl_div, head.input, shard, index, prob),
        raised(crosscut.linear_cross_entropy, shard, whole, head.target),
    ]


def compiled(case: dict[str, Any]) -> dict[str, Tensor]:
    """How far a compiled call is from an eager one: the loss, and this rank's gradient."""
    head, group = case["head"], dist.group.WORLD
    assert group is not None
    size = len(head.linear_weight) // dist.get_world_size()
    here = head.linear_weight[dist.get_rank() * size :][:size].clone().requires_grad_()

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return 2 * crosscut.linear_cross_entropy(hidden, weight, target)

    found = []
    for function in (loss, torch.compile(loss, backend="eager")):
        value = function(head.input, vocab_shard(here, group), head.target)
        found.append((value.detach(), *torch.autograd.grad(value, here)))
    return {
        f"{i}[rank]": (a - b).abs().max()[None] for i, (a, b) in enumerate(zip(*found, strict=True))
    }


KINDS = {
    "run": run, "two dimensions": two_dimensions, "wrong on one": wrong_on_one,
    "refused": refused, "compiled": compiled,
}  # fmt: skip


def main() -> None:
    cases, folder = sys.argv[1:]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found = {}
    for name, case in torch.load(cases, weights_only=False).items():
        function = KINDS[case.get("kind", "run")]
        found[name] = function(case)
        if case.get("twice"):
            for key, value in function(case).items():  # pyright: ignore
                assert torch.equal(value, found[name][key]), f"{name}: {key} is not repeatable"
    torch.save(found, f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
