"""A few hundred random problems, always the same. ``python3 tasks.py fuzz`` runs thousands."""

from __future__ import annotations

from collections.abc import Iterable

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


def is_open(problem: Problem) -> bool:
    """Whether a problem is of a kind of which some are still worse than in PyTorch."""
    return problem.low == torch.float64 or problem.program.endswith("kl_div")


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
    problems = [problem for problem in first(mode, count) if not is_open(problem)]
    found = wrong(problems, runner(chosen.backend, chosen.device))
    assert not found, "\n\n".join(found)


@pytest.mark.xfail(
    strict=False, reason="divergences; float64, where nothing wider holds a log-sum-exp"
)
def test_what_is_still_open():
    problems = [problem for problem in first("blocks", 250) if is_open(problem)]
    found = wrong(problems, runner("blocks"))
    assert not found, "\n\n".join(found)


def test_the_limits_are_not_too_strict_for_pytorch():
    found = wrong(first("blocks", 250), run_plain)
    assert not found, "\n\n".join(found)


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
