"""The first call of a kind compiles all of its kernels together.

They are found by making the call on tensors without data (:mod:`crosscut.device.launch`), which
takes milliseconds. A forward that a backward will follow compiles the backward's too, as if all
gradients were wanted; where they are not, the backward's first call compiles what it lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from crosscut.backends.protocol import Cotangents, HeadProblem, Needs, Saved, Statistics
from crosscut.backends.triton.forward import compute_statistics
from crosscut.backends.triton.project import project
from crosscut.backends.triton.select import select
from crosscut.device.launch import CAN_COMPILE_AHEAD, ahead

_seen: set[Hashable] = set()
_one_at_a_time = threading.Lock()


def compile_ahead(
    problem: HeadProblem,
    like: Statistics,
    needs: Needs | None,
    entropy: tuple[bool, ...] = (False,),
) -> None:
    """Compile the kernels of a forward and, given ``needs``, of the backward that follows it.

    Args:
        problem: the call. Another one that differs in N alone needs no more.
        like: what its forward returns, by shape and dtype.
        needs: which gradients are wanted; None for a forward alone.
        entropy: whether the entropy has a cotangent; both where it is not known yet.
    """
    device = problem.hidden.device
    if device.type != "cuda" or not CAN_COMPILE_AHEAD:
        return
    kinds = {_kind(problem, needs, has_gradient) for has_gradient in entropy}
    if kinds <= _seen or torch.cuda.is_current_stream_capturing():
        return
    with _one_at_a_time:
        if not kinds <= _seen:
            statistics = Statistics(*map(_meta, like[:-1]), saved=Saved(*map(_meta, like.saved)))
            empty = _without_data(problem), statistics
            ahead(device, lambda: _call(*empty, needs, entropy))
            _seen.update(kinds)


def _call(
    problem: HeadProblem, like: Statistics, needs: Needs | None, entropy: tuple[bool, ...]
) -> None:
    found = compute_statistics(problem, like)
    if needs is None:
        return
    d_sum = None if problem.logit_weight is None else found.logit_sum
    for has_gradient in entropy:
        d_entropy = found.entropy if has_gradient else None
        cotangents = Cotangents(found.lse, found.target_logit, found.log_prob, d_sum, d_entropy)
        project(problem, found, select(problem, found, cotangents, needs))


def _kind(problem: HeadProblem, needs: Needs | None, has_gradient: bool) -> Hashable:
    """What the kernels that are launched, and their specialisations, depend on."""
    head = (problem.hidden, problem.classifier, problem.bias, problem.logit_weight)
    layout = [
        None if tensor is None else (tensor.dtype, tensor.shape[-1], tensor.stride())
        for tensor in head
    ]
    options, num_classes = problem.options, len(problem.classifier)
    logits = options.softcap is None, options.logit_scale > 0
    how = options.policy, *logits, torch.backends.cuda.matmul.allow_tf32
    what = problem.labels.shape[1:], problem.entropy, problem.ranks
    return problem.hidden.device, *layout, num_classes, *how, *what, has_gradient, needs


def _without_data(problem: HeadProblem) -> HeadProblem:
    return replace(
        problem,
        hidden=_meta(problem.hidden),
        classifier=_meta(problem.classifier),
        bias=None if problem.bias is None else _meta(problem.bias),
        labels=_meta(problem.labels),
        logit_weight=None if problem.logit_weight is None else _meta(problem.logit_weight),
    )


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
