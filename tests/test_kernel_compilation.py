"""Every kernel compiles for GPUs that are not here, and keeps its tiles in registers on Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def compile_for(target: str, *options: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, target, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
def test_compiles(target):
    assert len(compile_for(target, "bfloat16", "few")) > 15


@pytest.mark.parametrize("options", [("bfloat16",), ("float16", "few")], ids=" ".join)
def test_nothing_spills_or_waits_on_hopper(options):
    kernels = compile_for("cuda:90", *options)
    assert sum("serialized" in kernel for kernel in kernels) > 15
    assert [kernel for kernel in kernels if kernel["spilled"]] == []
    assert [kernel for kernel in kernels if kernel.get("serialized")] == []
