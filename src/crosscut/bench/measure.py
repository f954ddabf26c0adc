"""The gate, the clock and the memory meter.

**Gate.** Before anything is timed, each contender computes loss and gradients once, and they are
compared with the truth. One whose error is larger than its grade allows gets no time at all: a
wrong answer has no speed. NaN passes nowhere.

**Clock.** Median of the repeats of a forward without gradients, and of a forward and backward with
both. The contenders take turns, so that a slow minute of the machine hits all of them, and have
run before. On CUDA that is the GPU's part, between two events: first the same work runs for a
while, which sets the GPU's clock, and once more while the host launches the call ahead of it, as in
a training step; before the call the L2 cache is flushed. Whether the host was ahead is checked. If
it was not, a kernel that only counts cycles holds the GPU before all this, for longer and longer. A
call that waits for the GPU is never ahead: it is timed with its waits. There are no gradients
before a call, as after ``zero_grad()``.

On a CPU other processes count too: what they take of it meanwhile is written down, and so is the
spread of the repeats.

Where the host is not ahead its own time counts. So it is measured too, on CUDA: how long a forward
and backward keeps the host busy, from an idle GPU until the call returns. Where a call waits for
the GPU, or launches more than the GPU's queue holds, the wait is part of it.

**Memory.** The peak of PyTorch's own allocator over the forward and backward of the gate, less the
two gradients that must be there in the end. On the CPU that is what its profiler says of every
allocation; scratch space inside a BLAS library is not part of it, on any device.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscut.bench.contenders import Contender, Grade, LossFunction
from crosscut.bench.results import Errors
from crosscut.bench.truth import Answer
from crosscut.bench.workloads import Workload

LOSS_ALLOWED = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 1e-5}
"""Relative error of any loss, by input dtype: PyTorch returns a 16-bit loss in 16 bits."""

LOSSY_ALLOWED = 0.5
"""Relative error of a gradient that promises nothing."""

FP32_SLACK = 4.0
"""In float32 all errors are sums of roundings, and chance decides between 5e-7 and 1e-6."""

_L2_FLUSH_BYTES = 256 * 2**20

_WARM_UP_SECONDS = 0.1
"""How long a GPU runs the same work before it is timed: its clock depends on what ran before."""

_STAT = Path("/proc/stat")

_LEADS = (0.0, 0.012, 0.024, 0.048)
"""Seconds that the GPU is held before a call, until the host was ahead. A GPU that has rested is
faster: longer than needed it is not."""


@dataclass(frozen=True, kw_only=True)
class Yardsticks:
    """Errors of plain PyTorch: in the workload's dtype, and in bfloat16."""

    same_dtype: Errors
    bfloat16: Errors


def allowed(contender: Contender, yardsticks: Yardsticks, dtype: torch.dtype) -> Errors:
    """The errors that a contender's grade allows."""
    if contender.grade is Grade.LOSSY:
        return Errors(loss=LOSS_ALLOWED[dtype], d_hidden=LOSSY_ALLOWED, d_classifier=LOSSY_ALLOWED)
    slack = contender.slack
    yardstick = yardsticks.same_dtype
    if contender.grade is Grade.LOW_PRECISION:
        yardstick = yardsticks.bfloat16
    elif dtype == torch.float32:
        slack = max(slack, FP32_SLACK)
    return Errors(
        loss=LOSS_ALLOWED[dtype],
        d_hidden=slack * yardstick.d_hidden,
        d_classifier=slack * yardstick.d_classifier,
    )


def objection(found: Errors, limit: Errors) -> str | None:
    """What is wrong with an answer, or None."""
    wrong = [
        f"{label} off by {error:.1e}, allowed {most:.1e}"
        for label, error, most in (
            ("loss", found.loss, limit.loss),
            ("dH", found.d_hidden, limit.d_hidden),
            ("dC", found.d_classifier, limit.d_classifier),
        )
        if not error <= most  # NaN is wrong too
    ]
    return "; ".join(wrong) or None


class Subject:
    """One contender's loss function on one workload: what can be run again and again."""

    def __init__(self, loss_function: LossFunction, workload: Workload) -> None:
        self.loss_function = loss_function
        self.hidden = workload.hidden.detach().requires_grad_()
        self.classifier = workload.classifier.detach().requires_grad_()
        self.labels = workload.labels

    def forward(self) -> Tensor:
        """The loss alone."""
        with torch.no_grad():
            return self.loss_function(self.hidden, self.classifier, self.labels)

    def forward_backward(self) -> Tensor:
        """The loss, and gradients left in ``hidden.grad`` and ``classifier.grad``, not added."""
        self.forget_gradients()
        loss = self.loss_function(self.hidden, self.classifier, self.labels)
        loss.backward()
        return loss.detach()

    def forget_gradients(self) -> None:
        """Free both gradients."""
        self.hidden.grad = self.classifier.grad = None

    def answer(self) -> tuple[Answer, int]:
        """Loss and gradients, and the peak memory they took beyond inputs and gradients.

        They come from memory that held NaN before, where that can be arranged.
        """
        self.forget_gradients()
        _poison(self.hidden, self.classifier)
        losses: list[Tensor] = []
        peak = peak_bytes(lambda: losses.append(self.forward_backward()), self.hidden.device)
        d_hidden, d_classifier = self.hidden.grad, self.classifier.grad
        assert d_hidden is not None
        assert d_classifier is not None
        answer = Answer(loss=losses[0].item(), d_hidden=d_hidden, d_classifier=d_classifier)
        return answer, peak - d_hidden.nbytes - d_classifier.nbytes


def _poison(*like: Tensor) -> None:
    """Leave NaN in CUDA's cached memory, for whoever returns what it never wrote."""
    if like[0].device.type == "cuda":
        poisoned = [torch.full_like(tensor, math.nan) for tensor in like for _ in range(2)]
        del poisoned


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, from its start until its results are there.

    On CUDA the GPU's part of it, with the host ahead.
    """
    if device.type != "cuda":
        return _until_return(work)
    start = time.perf_counter()
    while time.perf_counter() - start < _WARM_UP_SECONDS:
        work()
        torch.cuda.synchronize(device)
    taken = math.nan
    for lead in _LEADS:
        taken, ahead = _seconds_behind(lead, work, device)
        if ahead:
            break
    return taken


def host_seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long one call keeps the host busy on CUDA, until it returns."""
    torch.cuda.synchronize(device)
    taken = _until_return(work)
    torch.cuda.synchronize(device)
    return taken


def cpu_seconds_of_others() -> float | None:
    """CPU time that all other processes have used since the machine started, where Linux says it.

    What a hypervisor gave to other machines is part of it.
    """
    try:
        every_cpu = _STAT.read_text().splitlines()[0]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, every_cpu.split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / ticks - own.user - own.system


def _until_return(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _seconds_behind(
    lead: float, work: Callable[[], object], device: torch.device
) -> tuple[float, bool]:
    """The GPU's seconds for the second of two calls, queued while it is held for ``lead`` seconds.

    And whether the host was ahead: had launched the call before the GPU got to it.
    """
    if lead:
        torch.cuda._sleep(math.ceil(lead * _cycles_per_second(device)))
    work()
    torch.empty(_L2_FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    ahead = not begin.query()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000, ahead


@functools.cache
def _cycles_per_second(device: torch.device) -> float:
    """How fast the GPU counts in :func:`torch.cuda._sleep`."""
    cycles = 10**7
    torch.cuda._sleep(cycles)  # loads the kernel
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize(device)
    return cycles / (begin.elapsed_time(end) / 1000)


def logits_matmul(workload: Workload) -> Callable[[], object]:
    """``hidden @ classifier.T`` and nothing else: 2NVD flop, the least any forward can do.

    Into one preallocated result where it has room, else into a block of it again and again.
    """
    hidden, classifier = workload.hidden.detach(), workload.classifier.detach()
    num_tokens, num_classes = len(hidden), len(classifier)
    most = 2**31 if hidden.device.type == "cpu" else 2**34  # bytes
    step = min(num_classes, max(1, most // (num_tokens * hidden.element_size())))
    out = hidden.new_empty(num_tokens * step)

    def work() -> None:
        for start in range(0, num_classes, step):
            rows = classifier[start : start + step]
            block = out[: num_tokens * len(rows)].view(num_tokens, len(rows))
            torch.mm(hidden, rows.T, out=block)

    return work


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that PyTorch's allocator held at once during a call, beyond those before."""
    if device.type != "cuda":
        return _peak_cpu_bytes(work)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu_bytes(work: Callable[[], object]) -> int:
    """From what PyTorch's profiler records of each allocation."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself otherwise
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    tree = recorded.profiler.kineto_results.experimental_event_tree()  # pyright: ignore
    allocations = sorted(
        (
            event
            for event in _every(tree)
            if type(event.extra_fields).__name__ == "_ExtraFields_Allocation"
            and event.extra_fields.device.type == "cpu"
        ),
        key=lambda event: event.start_time_ns,
    )
    if not allocations:
        return 0
    first = allocations[0].extra_fields
    before = first.total_allocated - first.alloc_size
    return max(event.extra_fields.total_allocated for event in allocations) - before


def _every(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _every(event.children)
