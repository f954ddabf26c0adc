"""Every kernel compiles for GPUs that are not here, and fits: into shared memory, on Hopper into
registers.

The suite compiles some variants of each kernel; CROSSCUT_COMPILE_ALL=1 all of them, in every dtype,
which takes the better part of an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.kernels import decorated

from crosscut.backends.protocol import HeadProblem
from crosscut.backends.triton import TritonBackend
from crosscut.options import HeadOptions

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

ALL = os.environ.get("CROSSCUT_COMPILE_ALL") == "1"
needs_time = pytest.mark.skipif(not ALL, reason="takes long: CROSSCUT_COMPILE_ALL=1")
KIB = {"cuda:86": 99, "cuda:100": 227, "cuda:120": 99}


def compile_kernels(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "programs" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_kernel_fits_into_shared_memory() -> None:
    found = lines(compile_kernels("--few", "--shared", *KIB))
    kernels = {card: {line["kernel"] for line in found if line["card"] == card} for card in KIB}
    assert all(names == kernels["cuda:86"] for names in kernels.values())
    assert kernels["cuda:86"] == set().union(*decorated().values())
    assert [line for line in found if line["shared"] > KIB[line["card"]] * 1024] == []
    assert [line for line in found if line["tensor_memory"] > 512] == []


@needs_time
@pytest.mark.timeout(4 * 3600)
def test_everything_fits_into_shared_memory() -> None:
    assert "the card has" in compile_kernels("--table")


@needs_time
@pytest.mark.parametrize("card", ["cuda:80", "cuda:100", "cuda:120", "hip:gfx942"])
def test_assembly(card: str) -> None:
    found = {line["kernel"] for line in lines(compile_kernels("--few", "--assembly", card))}
    assert found == set().union(*decorated().values())


def test_a_launch_that_does_not_fit_loads_fewer_steps_ahead() -> None:
    of_tune, first, second = lines(compile_kernels("--too-large", "cuda:120"))
    stages = [
        [stages for name, stages in of_call["tried"] if name == "linear_lse_kernel"]
        for of_call in (of_tune, first, second)
    ]
    assert stages == [[4], [4, 3], [3]]  # found out once
    assert "shared memory" in of_tune["error"]
    assert len(of_tune["launched"]) < len(first["launched"])
    assert first["error"] == second["error"] == ""
    assert first["launched"] == second["launched"]
    assert max(shared for _, shared in first["launched"]) <= 99 * 1024


def test_turing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    hidden: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    labels = torch.zeros(1, dtype=torch.int64)
    head = HeadProblem(
        hidden=hidden, classifier=hidden, bias=None, labels=labels, logit_weight=None,
        options=HeadOptions(),
    )  # fmt: skip
    assert (
        TritonBackend().unsupported_reason(head) == "needs compute capability 8.0 or newer, got 7.5"
    )


@pytest.mark.parametrize(
    "options",
    [
        ("--few",),
        pytest.param((), marks=needs_time),
        pytest.param(("--few", "--dtype=float16"), marks=needs_time),
    ],
    ids=["few", "all", "float16"],
)
def test_nothing_spills_or_waits_on_hopper(options: tuple[str, ...]) -> None:
    kernels = lines(compile_kernels(*options, "cuda:90"))
    assert sum("serialized" in kernel for kernel in kernels) > 10
    # Of a move of rows by int64 the assembler keeps 16 bytes in memory, to need 32 registers.
    tiled = [kernel for kernel in kernels if kernel["kernel"] != "move_rows_kernel"]
    assert [kernel for kernel in tiled if kernel["spilled"]] == []
    assert [kernel for kernel in kernels if kernel.get("serialized")] == []
