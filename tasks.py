#!/usr/bin/env python3
"""The task file: everything a newcomer or CI runs, from nothing but Python 3.11 or newer.

Each task first makes ``.venv`` and installs what it needs into it, once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 (older ones can read this file, and no more)
    sys.exit(
        "crosscut needs Python 3.11 or newer, and this is "
        + ".".join(map(str, sys.version_info[:3]))
        + ": start tasks.py with another, as in python3.12 tasks.py test"
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
CONSTRAINTS = ROOT / "constraints" / "cpu.txt"


def run(*command: str | Path) -> None:
    """Show a command and run it in the repository; end the task if it fails."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    code = subprocess.run(words, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def tool(name: str, *arguments: str) -> None:
    """Run a tool of the virtual environment."""
    run(BIN / name, *arguments)


def has_gpu() -> bool:
    """Whether an NVIDIA GPU answers."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def setup(_: list[str]) -> None:
    """Make .venv and install crosscut, the bench, and our tools into it."""
    pyproject = (ROOT / "pyproject.toml").read_bytes()
    wanted = hashlib.sha256(pyproject + CONSTRAINTS.read_bytes()).hexdigest()
    stamp = VENV / "installed.sha256"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if shutil.which("pip", path=str(BIN)) is None:  # the last thing that comes into it
        print("$ python -m venv --clear", VENV, flush=True)
        venv.create(VENV, clear=True, with_pip=True)
    pip = (BIN / "python", "-m", "pip", "install", "--disable-pip-version-check")
    if not sys.stdout.isatty():  # nobody to show bars to
        pip += ("--quiet",)
    print("Installing into .venv: some minutes and 2.6 GB of disk, more with CUDA", flush=True)
    run(*pip, "--upgrade", "pip>=25.1")  # the first that knows --group
    constraints = () if has_gpu() else ("--constraint", CONSTRAINTS)
    run(*pip, *constraints, "torch")
    run(*pip, *constraints, "--editable", ".[bench]", "--group", "dev")
    stamp.write_text(wanted)


def bench(arguments: list[str]) -> None:
    """Crosscut beside PyTorch on the output head of Gemma 3 270M. Arguments go to the bench."""
    setup([])
    tool("crosscut", "bench", "--workload", "gemma3-270m", *arguments)


def coverage(arguments: list[str]) -> None:
    """Every model of transformers in miniature, deferred and not; some, if named. Takes minutes."""
    setup([])
    tool("python", "tests/programs/huggingface_coverage.py", *arguments)


def compiled(arguments: list[str]) -> None:
    """Every causal language model in miniature under torch.compile; some, if named."""
    setup([])
    tool("python", "tests/programs/huggingface_compiled.py", *arguments)


def fuzz(arguments: list[str]) -> None:
    """Ten thousand random problems against float64. Arguments go to the fuzzer: try --help."""
    setup([])
    tool("python", "tests/fuzz", *arguments)


def style() -> None:
    """What of lint takes seconds."""
    tool("ruff", "check")
    tool("ruff", "format", "--check")
    tool("lint-imports")


def lint(_: list[str]) -> None:
    """Style, types, and the direction of imports."""
    setup([])
    style()
    tool("pyright")


def test(arguments: list[str]) -> None:
    """Lint, and every test that this machine can run. Arguments go to pytest."""
    setup([])
    style()
    # Types are checked beside the tests: by themselves they keep all cores but one waiting.
    with tempfile.TemporaryFile("w+") as said:
        types = subprocess.Popen([BIN / "pyright"], cwd=ROOT, stdout=said, stderr=said)
        try:
            tool("pytest", "--numprocesses=auto", "--dist=worksteal", "--durations=10", *arguments)
        finally:
            code = types.wait()
            said.seek(0)
            print("$", BIN / "pyright", f"\n{said.read()}", flush=True)
    if code:
        sys.exit(code)


def fix(_: list[str]) -> None:
    """Format, and mend what ruff can."""
    setup([])
    tool("ruff", "check", "--fix")
    tool("ruff", "format")


def clean(_: list[str]) -> None:
    """Remove .venv and caches."""
    for name in (".venv", ".pytest_cache", ".ruff_cache", ".hypothesis", ".import_linter_cache"):
        shutil.rmtree(ROOT / name, ignore_errors=True)


TASKS: tuple[Callable[[list[str]], None], ...] = (
    setup, bench, test, coverage, compiled, fuzz, lint, fix, clean,
)  # fmt: skip


def main() -> None:
    """Read the command line."""
    tasks = {task.__name__: task for task in TASKS}
    lines = [f"  {name:8} {task.__doc__}" for name, task in tasks.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="tasks:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=tasks, metavar="task")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on")
    options = parser.parse_args()
    try:
        tasks[options.task](options.arguments)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell has it; a traceback of ours says nothing


if __name__ == "__main__":
    main()
