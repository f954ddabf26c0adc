"""Fixtures shared by the tests."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from support.heads import RealHead
from support.interpreter import round_to_bfloat16
from support.judging import Head, make_head
from support.places import INTERPRETED, INTERPRETER_LOGITS

from crosscut import backends

if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
    round_to_bfloat16()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a process a core: more threads would wait for each other, spinning

hypothesis.settings.register_profile(
    "crosscut", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.load_profile("crosscut")


def _places() -> Iterator[Any]:
    """Every backend on every kind of device that is here."""
    for name in backends.NAMES:
        if name != "triton" or INTERPRETED:
            yield pytest.param((name, "cpu"), id=f"{name}-cpu")
        if torch.cuda.is_available():
            yield pytest.param((name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=_places())
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A backend and a device: a new one runs the whole conformance suite by being listed."""
    return request.param


@pytest.fixture
def backend(place: tuple[str, str]) -> str:
    """The backend's name."""
    return place[0]


@pytest.fixture
def device(place: tuple[str, str]) -> str:
    """Where its tensors live."""
    return place[1]


@pytest.fixture
def widest(backend: str) -> torch.dtype:
    """The widest dtype that the backend serves."""
    return torch.float32 if backend == "triton" else torch.float64


@pytest.fixture
def make(backend: str, device: str, widest: torch.dtype) -> Callable[..., Head]:
    """``judging.make_head`` on the backend's device, and in its widest dtype unless told."""
    interpreted = backend == "triton" and device == "cpu"

    def make(shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Head:
        batch, _, num_classes = shape
        num_tokens = math.prod(batch) if isinstance(batch, tuple) else batch
        if interpreted and num_tokens * num_classes > INTERPRETER_LOGITS:
            pytest.skip("takes minutes in Triton's interpreter: for a GPU")
        return make_head(shape, dtype or widest, device=device, **options)

    return make


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the interpreter would run to see what it sees in another case.

    It takes seconds where a GPU takes none. What is the same code for every backend, as a reduction
    is, other backends' cases cover; a GPU runs them all.
    """
    chosen = [item for item in items if _is_worth_interpreting(item)]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in {*chosen}])
        items[:] = chosen


def _is_worth_interpreting(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    if callspec is None or callspec.params.get("place", ("triton", "cpu")) != ("triton", "cpu"):
        return True
    if callspec.params.get("device", "cpu") != "cpu":
        return True
    for mark in item.iter_markers("interpreted"):
        when = mark.kwargs["when"]
        names = inspect.signature(when).parameters
        if not when(**{name: callspec.params[name] for name in names}):
            return False
    return True


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_head() -> RealHead:
    """From ``gemma3_270m_head.safetensors.part0..3`` in the directory CROSSCUT_TEST_HEAD."""
    directory = os.environ.get("CROSSCUT_TEST_HEAD")
    if not directory:
        pytest.skip("set CROSSCUT_TEST_HEAD to the directory of gemma3_270m_head.safetensors.part*")
    import safetensors.torch  # of the bench's packages: no other test needs it

    parts = [Path(directory, f"gemma3_270m_head.safetensors.part{i}") for i in range(4)]
    tensors = safetensors.torch.load(b"".join(part.read_bytes() for part in parts))
    scale = tensors["classifier_scale"].float().reshape(-1, 1)
    classifier = torch.empty(tensors["classifier_int8"].shape, dtype=torch.bfloat16)
    for rows, ints, scales in zip(
        classifier.split(2**14),
        tensors["classifier_int8"].split(2**14),
        scale.split(2**14),
        strict=True,
    ):
        rows.copy_(ints.float() * scales)
    return RealHead(tensors["hidden"].bfloat16(), tensors["labels"].long(), classifier)
