"""Thousands of random problems, judged against float64: ``python tests/fuzz --help``.

Goes on after something is wrong; says at the end what kinds of it there were, each with the
smallest problem that shows it. Needs nothing but PyTorch, and Triton for its modes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

Class = tuple[str, str, str]
"""Of what is wrong: program, dtype, kind."""


LONGEST = 3000
"""Characters of a problem that is printed."""


def main() -> int:
    """Read the command line, run, report; 0 where all was right."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--mode", choices=("blocks", "interpreter", "cuda"), default="blocks")
    parser.add_argument("--problems", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="I", help="number of the first")
    parser.add_argument(
        "--contender", choices=("crosscut", "pytorch"), default="crosscut",
        help="pytorch breaks no limit, or the limits are wrong",
    )  # fmt: skip
    parser.add_argument("--shrink", type=float, default=20, metavar="SECONDS", help="for each kind")
    parser.add_argument("--program", help="only this one, such as linear_kl_div")
    options = parser.parse_args()
    if options.mode == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
        warnings.simplefilter("ignore")  # it computes in NumPy, which warns of what overflows
        from support.interpreter import round_to_bfloat16

        round_to_bfloat16()
    return run(options)


def run(options: argparse.Namespace) -> int:
    """All problems of a mode; the number of classes of what was wrong, at most 100."""
    import torch

    from fuzz.generator import MODES, draw
    from fuzz.judge import judgements, run_plain, runner
    from fuzz.shrinker import shrink

    if options.mode != "cuda":
        torch.set_num_threads(1)  # tensors are tiny
    mode = MODES[options.mode]
    runs = run_plain if options.contender == "pytorch" else runner(mode.backend, mode.device)
    counts: Counter[Class] = Counter()
    wrong, began = 0, time.monotonic()
    for number in _shown(range(options.first, options.first + options.problems)):
        problem = draw(mode, options.seed, number)
        if options.program not in (None, problem.program):
            continue
        found = list(judgements(problem, runs))
        wrong += bool(found)
        for violation in found:
            name = problem.program, problem.grade, violation.kind
            counts[name] += 1
            if counts[name] > 1:
                continue
            _say(f"{number}: {' | '.join(name)}: {violation.detail}")
            if options.shrink and violation is found[0]:
                small = shrink(problem, _same(name, judgements, runs), options.shrink)
                detail = next(
                    (v.detail for v in judgements(small, runs) if v.kind == violation.kind), ""
                )
                snippet = small.snippet(mode.backend, mode.device)
                if len(snippet) > LONGEST:
                    snippet = f"python tests/fuzz --mode {options.mode} --seed {options.seed}"
                    snippet += f" --first {number} --problems 1"
                _say(f"{snippet}\n# {violation.kind}: {detail}\n")
    seconds = time.monotonic() - began
    _say(f"{options.problems} problems in {seconds:.0f} s, {wrong} of them wrong")
    for name, count in sorted(counts.items()):
        _say(f"{count:6}  {' | '.join(name)}")
    return min(len(counts), 100)


def _same(name: Class, judgements: Callable, runs: Callable) -> Callable:
    """Whether a problem has what is wrong with another."""

    def still_wrong(problem) -> bool:
        try:
            return any(violation.kind == name[2] for violation in judgements(problem, runs))
        except Exception:
            return False  # no problem at all

    return still_wrong


def _shown(numbers: range) -> Iterator[int] | Iterable[int]:
    """With a progress bar, where there is a terminal and a library for it; else a line at times."""
    try:
        from rich.progress import track
    except ImportError:
        track = None
    if track is not None and sys.stdout.isatty():
        return track(numbers, description="problems")
    return _told(numbers)


def _told(numbers: range) -> Iterator[int]:
    last = time.monotonic()
    for done, number in enumerate(numbers):
        if time.monotonic() > last + 30:
            last = time.monotonic()
            print(f"... {done} of {len(numbers)} problems", file=sys.stderr, flush=True)
        yield number


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
