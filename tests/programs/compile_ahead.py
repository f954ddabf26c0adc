"""What the first call of a kind compiles ahead, for an H100 that is not here.

    python tests/programs/compile_ahead.py

prints one JSON line a call: its kernels in order, how many of them were compiled, and whether
PyTorch's compiler has been imported.
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime import driver

from crosscut.backends.protocol import HeadProblem, Needs
from crosscut.backends.triton import TritonBackend, compile_ahead
from crosscut.device.launch import ahead
from crosscut.options import HeadOptions

sys.path.insert(0, str(Path(__file__).parents[1]))

from programs.compile_kernels import NoDriver, last_stage

GPU = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
CALLS: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto again": {},
    "auto, another N": {"num_tokens": 1000},
    "auto, one token": {"num_tokens": 1},
    "auto, softcap": {"softcap": 30.0, "compiles": False},
    "auto, float32": {"dtype": torch.float32, "compiles": False},
    "auto, float16": {"dtype": torch.float16, "compiles": False},
    "exact": {"policy": "exact"},
    "exact, bias alone": {"policy": "exact", "bias": True, "compiles": False},
    "exact, logit sum": {"policy": "exact", "weight": True, "compiles": False},
    "cce": {"policy": "cce", "compiles": False},
    "cce_kahan_full_c": {"policy": "cce_kahan_full_c", "compiles": False},
}


def call(
    *,
    num_tokens: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    policy: Any = "auto",
    softcap: float | None = None,
    bias: bool = False,
    weight: bool = False,
) -> None:
    hidden_size, num_classes = 256, 4096
    problem = HeadProblem(
        hidden=torch.empty(num_tokens, hidden_size, dtype=dtype, device="meta"),
        classifier=torch.empty(num_classes, hidden_size, dtype=dtype, device="meta"),
        bias=torch.empty(num_classes, dtype=dtype, device="meta") if bias else None,
        labels=torch.empty(num_tokens, dtype=torch.int64, device="meta"),
        logit_weight=torch.empty(num_classes, device="meta") if weight else None,
        options=HeadOptions(policy=policy, softcap=softcap),
    )
    like = TritonBackend().forward_like(problem, for_backward=True)
    compile_ahead._call(problem, like, Needs(not bias, not bias, bias), (False,))


def main() -> None:
    compiled: list[str] = []
    launched: list[str] = []
    run = triton.JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert warmup, f"{self.__name__} was launched"
        launched.append(self.__name__)
        return run(self, *args, grid=grid, warmup=warmup, **options) if compiles else None

    gpu: Any = NoDriver("cuda:90")
    gpu.launcher_cls = lambda source, metadata: None
    driver.set_active(gpu)
    triton.knobs.runtime.jit_post_compile_hook = lambda **of: compiled.append(of["fn"].name)
    with (
        last_stage(["ttir"]),  # of which kernels are compiled that is enough to see
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=GPU),
        mock.patch("torch.cuda.device", return_value=nullcontext()),
    ):
        for name, options in CALLS.items():
            compiles = options.pop("compiles", True)
            ahead(torch.device("cuda", 0), functools.partial(call, **options))
            found = {
                "call": name, "kernels": launched, "compiled": len(compiled),
                "imported": "torch._dynamo" in sys.modules,
            }  # fmt: skip
            print(json.dumps(found), flush=True)
            launched.clear()
            compiled.clear()


if __name__ == "__main__":
    main()
