"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor

from crosscut import backends

hypothesis.settings.register_profile(
    "crosscut", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.load_profile("crosscut")


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend's name: a new one runs the whole conformance suite by being listed."""
    return request.param


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available())]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The kinds of device that are here."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class RealHead(NamedTuple):
    """The output head of Gemma 3 270M and what goes into it: V=262144, D=640."""

    hidden: Tensor  # [16384, 640] bfloat16: 16 windows of 1024 tokens
    labels: Tensor  # [16384] int64: the token that follows each
    classifier: Tensor  # [262144, 640] bfloat16

    def window(self, index: int, length: int = 1024) -> tuple[Tensor, Tensor]:
        """Hidden states and labels of the first ``length`` tokens of a window of 1024."""
        part = slice(1024 * index, 1024 * index + length)
        return self.hidden[part], self.labels[part]


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
