"""A few hundred random problems, always the same. ``python3 tasks.py fuzz`` runs thousands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzz.generator import MODES, draw
from fuzz.judge import Run, judge, run_plain, runner
from fuzz.problem import Problem
from fuzz.shrinker import shrink
from support.places import INTERPRETED

import crosscut

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
needs_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
)


# Triton's interpreter computes in NumPy, which warns of what overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


def wrong(problems: Iterable[Problem], run: Run) -> list[str]:
    """What is wrong with problems."""
    judged = ((problem, judge(problem, run)) for problem in problems)
    return [f"{p.snippet(None)}\n{violation}" for p, violation in judged if violation]


def first(mode: str, count: int) -> list[Problem]:
    """The first problems of a mode."""
    return [draw(MODES[mode], 0, number) for number in range(count)]


@pytest.mark.parametrize(
    ("mode", "count"),
    [
        ("blocks", 250),
        pytest.param("interpreter", 15, marks=needs_interpreter),
        pytest.param("cuda", 500, marks=needs_gpu),
    ],
)
def test_crosscut(mode, count):
    chosen = MODES[mode]
    found = wrong(first(mode, count), runner(chosen.backend, chosen.device))
    assert not found, "\n\n".join(found)


def test_the_limits_are_not_too_strict_for_pytorch():
    found = wrong(first("blocks", 250), run_plain)
    assert not found, "\n\n".join(found)


def case(program: str, dtype: torch.dtype, options: dict[str, Any], **tensors: Any) -> Problem:
    """A problem of one sequence; numbers become tensors, and what is not said is drawn."""
    given = {
        name: torch.as_tensor(
            values, dtype=None if name in ("target", "targets", "teacher_index") else dtype
        )
        for name, values in tensors.items()
    }
    for name in set(given) - {"linear_weight", "linear_bias", "teacher_weight", "teacher_bias"}:
        given[name] = given[name][None]
    problem = Problem(program=program, tensors=given, options=options)
    axes, (tokens, *several) = problem.value_axes(), given.get("targets", given["input"]).shape[1:]
    shape = {"": (), "bt": (1, tokens), "btk": (1, tokens, *several)}[axes]
    upstream = torch.ones(shape, dtype=torch.promote_types(dtype, torch.float32))
    return replace(problem, tensors={**given, "upstream": upstream})


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal ones, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ONE_CLASS = {"input": [[11, 0.189453125, -0.365234375]], "linear_weight": [[10, 0.2676, -0.1523]]}
FAR = {"input": 30 * numbers(20, 2), "linear_weight": 30 * numbers(15, 2, seed=1)}
CASES = {
    "a far log-sum-exp": case(
        "linear_log_probs", FP64, {}, input=[[9]], linear_weight=[[-10], [-10], [-9]], target=[0]
    ),
    "a sure class that is not the target": case(
        "linear_log_probs", FP64, {"policy": "exact"}, **FAR, target=[0] * 20
    ),
    "smoothing over two equal classes": case(
        "linear_cross_entropy", FP32, {"label_smoothing": 1.0, "reduction": "sum"},
        input=[[8]], linear_weight=[[1], [1]], target=[1],
    ),
    "a bias far from the products": case(
        "linear_log_probs", BF16, {}, input=[[1], [1], [1]],
        linear_weight=[[0.01104736328125], [-0.017333984375]], linear_bias=[-24.625, -25],
        targets=[[0], [1], [0]],
    ),
    "a softcap and a bias": case(
        "defer_logits", BF16, {"softcap": 5.0, "reduction": "none"}, input=[[0.0]],
        linear_weight=[[1], [1], [1]], linear_bias=[-0.96484375, 0.5, -0.25], target=[0],
    ),
    "a flat softmax": case(
        "linear_log_probs", BF16, {"policy": "exact"}, input=0.1 * numbers(40, 4),
        linear_weight=numbers(120, 4, seed=1), target=list(range(40)),
    ),
    "labels far below the rest": case(
        "linear_topk_kl_div", FP32, {"tail": True}, input=[[1]],
        linear_weight=[[874.765], [-2034.855], [796.524], [-57.459]],
        teacher_index=[[1, 2, 3]], teacher_prob=[[0.026, 0.0034624, 0.0707]],
    ),
    "divergences within float64": case(
        "linear_kl_div", FP64, {"divergence": "reverse", "reduction": "none"}, **FAR,
        teacher_input=FAR["input"], teacher_weight=numbers(15, 2, seed=2), target=[0] * 20,
    ),
    "a student's bias": case(
        "linear_kl_div", BF16, {"hard_weight": 1.0, "reduction": "none"}, input=numbers(8, 3),
        linear_weight=0.1 * numbers(2, 3, seed=1), linear_bias=[-10, -10], target=[0] * 8,
        teacher_input=numbers(8, 3), teacher_weight=numbers(2, 3, seed=2),
    ),
    **{
        f"smoothing over one class, {dtype}": case(
            "linear_cross_entropy", dtype, {"label_smoothing": 0.1, "reduction": "sum"},
            **ONE_CLASS, target=[0],
        )
        for dtype in (BF16, FP16)
    },
    **{
        f"one class, {divergence}": case(
            "linear_kl_div", BF16, {"divergence": divergence, "hard_weight": 0.3}, **ONE_CLASS,
            teacher_input=[[-41]], teacher_weight=[[1.1]], target=[0],
        )
        for divergence in ("forward", "reverse", "js")
    },
}  # fmt: skip
"""The smallest problems of kinds that were wrong once."""


@pytest.mark.parametrize("name", CASES)
def test_what_was_wrong_once(name):
    found = wrong([CASES[name]], runner("blocks"))
    assert not found, found[0]


def off_in_few_bits(problem: Problem) -> bool:
    """Whether a gradient is wrong that was rounded to 4 bits."""

    def run(problem: Problem) -> dict[str, torch.Tensor]:
        found = run_plain(problem)
        return {**found, "d_input": found["d_input"].to(torch.float8_e4m3fn).to(problem.dtype)}

    violation = judge(problem, run)
    return violation is not None and violation.kind == "d_input: off"


def test_what_is_wrong_is_found_and_made_small():
    """And the text of the smallest problem runs."""
    problems = (draw(MODES["blocks"], 1, number) for number in range(1000))
    problem = next(
        problem
        for problem in problems
        if problem.program == "linear_cross_entropy"
        and problem.dtype == torch.float32
        and problem.tensors["input"].numel() > 100
        and "linear_bias" in problem.tensors
        and off_in_few_bits(problem)
    )
    small = shrink(problem, off_in_few_bits, seconds=600)
    assert off_in_few_bits(small)
    assert small.tensors["input"].numel() <= 2
    assert "linear_bias" not in small.tensors
    assert not small.layouts
    exec(small.snippet("blocks"), {})


@pytest.mark.parametrize("number", range(0, 40, 5))
def test_snippets_are_what_was_run(number):
    """Layouts, batch shapes, frozen tensors and all."""
    problem = draw(MODES["blocks"], 2, number)
    scope: dict = {}
    limit = crosscut.workspace_limit()
    exec(problem.snippet("blocks"), scope)
    crosscut.set_workspace_limit(limit)  # which a snippet may have changed
    found = runner("blocks")(problem)
    for name in problem.leaves:
        assert torch.equal(
            scope[name].grad.reshape(found[f"d_{name}"].shape).nan_to_num(),
            found[f"d_{name}"].nan_to_num(),
        )
