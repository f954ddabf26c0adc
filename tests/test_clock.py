"""The bench's clock on a GPU: the GPU's part of a call, and the host's, each by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from crosscut.bench import measure

CUDA = torch.device("cuda")


def on_gpu(test: Callable) -> Callable:
    """Run a test where there is a GPU."""
    there = torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(not there, reason="needs a CUDA GPU")(test))


class FakeGpu:
    """The host is ahead if the GPU is held for ``needed`` seconds; a call takes a second more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, needed: float) -> None:
        self.leads: list[float] = []
        self.needed = needed
        monkeypatch.setattr(measure, "_WARM_UP_SECONDS", 0.0)
        monkeypatch.setattr(measure, "_LEADS", (0.0, 0.008, 0.016))
        monkeypatch.setattr(measure, "_seconds_behind", self.seconds_behind)

    def seconds_behind(self, lead: float, work: object, device: object) -> tuple[float, bool]:
        self.leads.append(lead)
        return 1.0 + lead, lead >= self.needed


@pytest.mark.parametrize(
    ("needed", "leads"),
    [(0.000, [0.0]), (0.010, [0.0, 0.008, 0.016]), (9.000, [0.0, 0.008, 0.016])],
    ids=["ahead", "not at once", "never"],
)
def test_the_gpu_is_held_until_the_host_is_ahead(
    needed: float, leads: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, needed)
    assert measure.seconds(lambda: None, CUDA) == 1.0 + gpu.leads[-1]
    assert gpu.leads == leads


@on_gpu
@pytest.mark.parametrize("host", [0.004, 0.015])  # the first lead is enough, and not enough
def test_gpu_and_host_are_timed_apart(host: float) -> None:
    value = torch.zeros(1, device=CUDA)

    def work() -> None:
        time.sleep(host)
        value.add_(1)

    assert 0 < measure.seconds(work, CUDA) < 5e-4
    assert host <= measure.host_seconds(work, CUDA) < 2 * host


@on_gpu
def test_what_the_gpu_is_busy_with_is_timed() -> None:
    value = torch.zeros(2**28, device=CUDA)  # 1 GiB is read and written

    def work() -> None:
        value.add_(1)

    taken = measure.seconds(work, CUDA)
    assert 2 * value.nbytes / taken < 2e13  # bytes a second
    assert measure.host_seconds(work, CUDA) < taken


@on_gpu
def test_a_call_that_waits_is_timed_with_its_wait() -> None:
    value = torch.zeros(1, device=CUDA)

    def work() -> None:
        value.add_(1).item()
        time.sleep(0.005)
        value.add_(1)

    assert 0.005 <= measure.seconds(work, CUDA) < 0.02
