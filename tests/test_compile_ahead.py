"""The first call of a kind compiles all its kernels together, before it launches any."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.kernels import decorated
from torch._subclasses.fake_tensor import FakeTensorMode

import crosscut

pytest.importorskip("triton")

from crosscut.backends.protocol import HeadProblem, Needs, Statistics
from crosscut.backends.triton import TritonBackend, compile_ahead
from crosscut.device import launch
from crosscut.options import HeadOptions

NEEDS = Needs(True, True, False)


def launched_by(tree: ast.Module) -> Iterator[str]:
    """Names that are called by subscript, ``name[grid](...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            assert isinstance(node.func.value, ast.Name)
            yield node.func.value.id


def test_whatever_is_launched_can_be_compiled_ahead() -> None:
    """A launch by plain ``triton.jit`` would run for real, on pointers to nothing."""
    for file, names in decorated().items():
        assert set(launched_by(ast.parse(file.read_text()))) == names, file.name


def test_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parent / "programs" / "compile_ahead.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["call"]: line for line in map(json.loads, done.stdout.splitlines())}
    first = found["auto"]
    assert {"linear_lse_kernel", "exact_sweep_kernel", "d_classifier_of_hot_kernel"} <= {
        *first["kernels"]
    }
    assert len({*first["kernels"]}) <= first["compiled"] <= len(first["kernels"])
    for name in ("auto again", "auto, another N", "auto, one token"):
        assert found[name]["kernels"] == first["kernels"]
        assert found[name]["compiled"] == 0
    assert {*found["exact"]["kernels"]} < {*first["kernels"]}
    # The indexed matmul, here without flags, and a log-sum-exp that is neither of some classes nor
    # with column masses.
    assert found["exact"]["compiled"] == 2
    assert "pair_gradient_kernel" in found["auto, softcap"]["kernels"]
    assert "pair_gradient_kernel" not in found["auto, float32"]["kernels"]
    assert "tile_matmul_kernel" in found["cce"]["kernels"]
    imports = [name for name, line in found.items() if line["imported"]]
    assert imports == ["cce", "cce_kahan_full_c"]  # PyTorch's compiler, to sort classes


def problem(num_tokens: int = 512, **options: Any) -> HeadProblem:
    """On a GPU that need not be here: within FakeTensorMode."""
    return HeadProblem(
        hidden=torch.empty(num_tokens, 64, dtype=torch.bfloat16, device="cuda"),
        classifier=torch.empty(4096, 64, dtype=torch.bfloat16, device="cuda"),
        bias=None,
        labels=torch.empty(num_tokens, dtype=torch.int64, device="cuda"),
        logit_weight=None,
        options=HeadOptions(**options),
    )


def test_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[HeadProblem, Statistics, Needs | None, tuple[bool, ...]]] = []
    entered: list[torch.device] = []

    def ahead(device: torch.device, call: Callable[[], object]) -> None:
        entered.append(device)
        call()

    capturing = True
    monkeypatch.setattr(compile_ahead, "ahead", ahead)
    monkeypatch.setattr(compile_ahead, "_call", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(compile_ahead, "_seen", set())
    monkeypatch.setattr(compile_ahead, "CAN_COMPILE_AHEAD", True)  # the tests are interpreted
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def compile_for(found: HeadProblem, needs: Needs | None, *entropy: bool) -> int:
        """How many calls were made on tensors without data."""
        like = TritonBackend().forward_like(found, for_backward=needs is not None)
        before = len(calls)
        compile_ahead.compile_ahead(found, like, needs, entropy or (False,))
        return len(calls) - before

    with FakeTensorMode():
        assert compile_for(problem(), NEEDS) == 0  # into a CUDA graph nothing is compiled
        capturing = False
        assert compile_for(problem(), NEEDS) == 1
        assert compile_for(problem(), NEEDS) == 0
        assert compile_for(problem(num_tokens=100), NEEDS) == 0
        assert compile_for(problem(logit_scale=0.5), NEEDS) == 0
        assert compile_for(problem(), None) == 1
        assert compile_for(problem(), NEEDS._replace(classifier=False)) == 1
        assert compile_for(problem(policy="exact"), NEEDS) == 1
        assert compile_for(problem(softcap=30.0), NEEDS) == 1
        assert compile_for(problem(softcap=50.0), NEEDS) == 0
        asked = replace(problem(), entropy=True)
        assert compile_for(asked, NEEDS, False, True) == 1  # a forward does not know
        assert compile_for(asked, NEEDS, False) == 0
        assert compile_for(asked, NEEDS, True) == 0
        like = problem().classifier
        wide = torch.empty_strided((4096, 64), (128, 1), dtype=like.dtype, device="cuda")
        assert compile_for(replace(problem(), classifier=wide), NEEDS) == 1
    assert {device.type for device in entered} == {"cuda"}
    made, like, _, _ = calls[0]
    assert made.hidden.device.type == made.classifier.device.type == "meta"
    assert made.classifier.shape == (4096, 64)
    assert all(tensor.device.type == "meta" for tensor in (*like[:-1], *like.saved))


def test_an_interrupt_leaves_no_mode_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    device = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        patch.setattr(triton.AsyncCompileMode, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch.ahead(device, lambda: None)
    devices: list[torch.device] = []
    launch.ahead(device, lambda: devices.append(launch.real_device(torch.device("meta"))))
    assert devices == [device]
    assert launch.real_device(torch.device("meta")) == torch.device("meta")


def test_nothing_is_compiled_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "ahead", None)
    here = HeadProblem(
        hidden=torch.zeros(4, 8), classifier=torch.zeros(9, 8), bias=None,
        labels=torch.zeros(4, dtype=torch.int64), logit_weight=None, options=HeadOptions(),
    )  # fmt: skip
    like = TritonBackend().forward_like(here, for_backward=True)
    compile_ahead.compile_ahead(here, like, NEEDS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_launch_compiles_on_a_gpu() -> None:
    """What a launch needs is what was compiled ahead: dtypes, alignment, tiles and all."""
    import triton

    at_launch: list[str] = []

    def compiled(**of: Any) -> None:
        if not of["is_manual_warmup"]:
            at_launch.append(of["repr"])

    def hidden_of(num_tokens: int) -> torch.Tensor:
        hidden = torch.randn(num_tokens, 256, dtype=torch.bfloat16, device="cuda") * 4
        return hidden.requires_grad_()

    def labels_of(num_tokens: int) -> torch.Tensor:
        return torch.randint(8192, (num_tokens,), device="cuda")

    def step(num_tokens: int, **options: Any) -> None:
        head = hidden_of(num_tokens), classifier, labels_of(num_tokens)
        crosscut.linear_cross_entropy(*head, backend="triton", **options).backward()

    classifier = torch.randn(8192, 256, dtype=torch.bfloat16, device="cuda").requires_grad_()
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = compiled
    try:
        for options in ({}, {"softcap": 30.0}, {"policy": "exact"}, {"policy": "cce"}):
            for num_tokens in (512, 1000, 1):
                step(num_tokens, **options)
        found = crosscut.token_statistics(hidden_of(512), classifier, labels_of(512), entropy=True)
        found.log_prob.sum().backward()  # an entropy that is only looked at
        classifier.requires_grad_(False)
        step(512)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert at_launch == []
