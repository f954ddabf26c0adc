"""The statistics of a head in shards, differentiable: plain PyTorch on each rank.

The forward moves two small things. The target logits first, so that every rank knows each token's
own class and leaves it out of its sums; then what the sums came to, which all ranks combine alike.
The backward needs nothing of other ranks, but that each rank's dH is a part: they are added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crosscut.backends import choose
from crosscut.backends.blocks.backward import compute_gradients
from crosscut.backends.blocks.forward import Part, combine, probe, sweep
from crosscut.backends.blocks.logits import check_labels
from crosscut.backends.column_filter import filters_blocks
from crosscut.backends.protocol import Cotangents, Needs, Saved, Statistics
from crosscut.custom_operator import eagerly, no_autocast
from crosscut.parallel.agreement import ParallelProblem


def token_statistics(problem: ParallelProblem, *, for_backward: bool) -> Statistics:
    """The statistics of the whole vocabulary, the same on all ranks.

    Raises:
        ValueError: the backend or the gradient policy cannot serve a shard.
    """
    choose(problem)
    arguments = problem.hidden, problem.classifier, problem.bias, problem, for_backward
    found = eagerly(_TokenStatistics.apply, *arguments)
    return Statistics(*found[: -len(Saved._fields)], saved=Saved(*found[-len(Saved._fields) :]))


def compute_statistics(problem: ParallelProblem, *, filter_columns: bool) -> Statistics:
    """What each rank finds in its shard, exchanged and combined."""
    check_labels(problem)

    def add_up(target_logit: Tensor) -> Tensor:
        torch.distributed.all_reduce(target_logit, group=problem.group)  # one of them is not 0
        return target_logit

    running = probe(problem, filter_columns=filter_columns, sum_over_shards=add_up)
    sweep(running)
    asked = {
        "gap": problem.entropy,
        "logit_sum": problem.logit_weight is not None,
        **dict.fromkeys(("target_rank", "best_logit", "best_class"), problem.ranks),
    }
    part = running.part()
    names = [name for name in Part._fields if asked.get(name, True)]
    mine = torch.stack([getattr(part, name).to(running.gap) for name in names])
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(problem.group))]
    torch.distributed.all_gather(parts, mine, group=problem.group)

    def unpacked(values: Tensor) -> Part:
        given = {name: row.to(getattr(part, name)) for name, row in zip(names, values, strict=True)}
        return part._replace(**given)

    running.join([unpacked(values) for values in parts])
    return combine(running)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        problem: ParallelProblem,
        for_backward: bool,
    ) -> tuple[Tensor, ...]:
        filters = for_backward and filters_blocks(problem)
        with no_autocast(hidden):
            statistics = compute_statistics(problem, filter_columns=filters)
        *found, saved = statistics
        ctx.problem, ctx.num_found = problem, len(found)
        ctx.save_for_backward(hidden, classifier, bias, *found, *saved)
        names = Statistics._fields[:-1]
        undifferentiable = [
            value
            for name, value in zip(names, found, strict=True)
            if name not in Cotangents._fields
        ]
        ctx.mark_non_differentiable(*undifferentiable, *saved)
        ctx.set_materialize_grads(False)
        return (*found, *saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, *_ = tensors = ctx.saved_tensors
        found, saved = tensors[3 : 3 + ctx.num_found], tensors[3 + ctx.num_found :]
        by_name = dict(zip(Statistics._fields[:-1], grads, strict=False))
        cotangents = {
            name: grad if len(value) else None
            for (name, grad), value in zip(by_name.items(), found, strict=True)
            if name in Cotangents._fields
        }
        problem = ctx.problem
        if problem.total_classes == 1:  # whose log-probability is 0, whatever its logit
            cotangents["logit_sum"] = None
        needs = Needs(*ctx.needs_input_grad[: len(Needs._fields)])
        with no_autocast(hidden):
            gradients = compute_gradients(
                problem, Statistics(*found, saved=Saved(*saved)), Cotangents(**cotangents), needs
            )
        d_hidden = gradients.hidden
        if d_hidden is not None:
            torch.distributed.all_reduce(d_hidden, group=problem.group)
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, gradients.classifier, gradients.bias, None, None
