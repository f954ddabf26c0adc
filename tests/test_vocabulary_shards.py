"""A head in shards: stage by stage, what each finds comes to the statistics of the whole."""

from __future__ import annotations

import itertools
from dataclasses import fields
from importlib.util import find_spec

import pytest
import torch
from support.judging import FACTOR, error, make_head, rounding
from support.places import INTERPRETED
from torch import Tensor

from crosscut.backends.protocol import HeadProblem, ShardProblem, VocabShard
from crosscut.options import LossOptions

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or not INTERPRETED, reason="needs Triton's interpreter"
)

SHARDS = (0, 37, 100, 101, 190)
"""Where shards begin, and the end: uneven ones, one of a single class."""


def whole_problem(*, entropy: bool = False, ranks: bool = False) -> HeadProblem:
    head = make_head((40, 24, SHARDS[-1]), torch.float32, ignored=0.3)
    labels = head.target.masked_fill(head.target == -100, -1)
    return HeadProblem(
        hidden=head.input, classifier=head.linear_weight, bias=None, labels=labels,
        logit_weight=None, options=LossOptions(backend="triton"), entropy=entropy, ranks=ranks,
    )  # fmt: skip


def shards_of(problem: HeadProblem) -> list[ShardProblem]:
    whole = {field.name: getattr(problem, field.name) for field in fields(problem)}
    return [
        ShardProblem(
            **whole | {"classifier": problem.classifier[start:end]},
            shard=VocabShard(start, SHARDS[-1]),
        )
        for start, end in itertools.pairwise(SHARDS)
    ]


def test_a_target_of_another_shard_is_a_valid_row():
    problem = whole_problem()
    for shard in shards_of(problem):
        labels, valid = shard.targets
        assert torch.equal(valid, problem.labels >= 0)
        here = (labels >= 0) & (labels < len(shard.classifier)) & valid
        end = shard.shard.start + len(shard.classifier)
        assert torch.equal(here, (problem.labels >= shard.shard.start) & (problem.labels < end))
        assert torch.equal(shard.rows, problem.rows)


@pytest.mark.parametrize("asked", [{}, {"entropy": True}, {"ranks": True}], ids=str)
def test_parts_of_shards_come_to_the_whole(asked):
    from crosscut.backends.triton import forward
    from crosscut.kernels.partial_statistics import Own, beside, combine, joined

    problem = whole_problem(**asked)
    shards = shards_of(problem)
    probes = [forward.probe(shard, bound=False) for shard in shards]
    target_logit = torch.stack([probe.target_logit for probe in probes]).sum(0)
    parts = []
    for shard, probe in zip(shards, probes, strict=True):
        probe = probe._replace(own_logit=target_logit)
        swept = forward.sweep(shard, probe, None)
        parts.append(joined(swept, probe.rows, shard.shard.start))
    probe = forward.probe(problem, bound=False)
    assert torch.equal(target_logit, probe.target_logit)
    found = combine(beside(parts), probe.rows, Own(probe.own, target_logit), block_n=16)
    whole = combine(
        forward.sweep(problem, probe, None), probe.rows, Own(probe.own, target_logit), block_n=16
    )
    logits = problem.hidden.double() @ problem.classifier.double().t()
    rows, labels = problem.rows, problem.labels[problem.rows]
    # Plain PyTorch's error in float32 is what a sum in other parts may have, too.
    for name in ("log_prob", "lse", "entropy"):
        if (value := getattr(found, name)) is None:
            continue
        exact, theirs = (of_classes(z[rows], labels, name) for z in (logits, logits.float()))
        allowed = FACTOR * error(theirs, exact) + rounding(torch.float32)
        assert error(value[rows], exact) <= allowed, name
    for name in ("rank", "best_class"):
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(found, name), getattr(whole, name)), name


def of_classes(z: Tensor, labels: Tensor, name: str) -> Tensor:
    """A statistic by its definition, of logits [n, V]."""
    log_p = z.log_softmax(1)
    if name == "lse":
        return z.logsumexp(1)
    if name == "entropy":
        return -(log_p.exp() * log_p).sum(1)
    return log_p.gather(1, labels[:, None])[:, 0]
