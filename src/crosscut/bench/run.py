"""One run of the bench, from a workload to a result: truth, yardstick, gate, memory, clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

import crosscut
from crosscut.bench import measure, results
from crosscut.bench.contenders import Contender, Grade
from crosscut.bench.measure import Subject, Yardsticks
from crosscut.bench.progress import Progress
from crosscut.bench.results import BenchResult, Row, WorkloadSummary
from crosscut.bench.truth import Answer, plain_pytorch, relative_errors, truth
from crosscut.bench.workloads import DTYPES, Workload


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Whom to run, and how.

    Attributes:
        contenders: in the order of the table.
        left_out: why not, for each contender that was not asked for.
        repeats: timed runs of each.
        command: the command line, for the record.
    """

    contenders: list[Contender]
    left_out: dict[str, str] = field(default_factory=dict)
    repeats: int = 5
    command: str = ""


def run(workload: Workload, plan: Plan, progress: Progress) -> BenchResult:
    """Measure the plan's contenders on a workload."""
    reason = {
        contender.name: contender.unsupported_reason(workload) for contender in plan.contenders
    }
    present = [contender for contender in plan.contenders if reason[contender.name] is None]
    right = truth(workload, progress)
    standard = yardsticks(workload, right, present, progress)

    rows: dict[str, Row] = {}
    subjects: dict[str, Subject] = {}
    with progress.stage("checking answers", len(plan.contenders)) as step:
        for contender in plan.contenders:
            row = Row(contender=contender.name, what=contender.what, version=contender.version)
            if absent := reason[contender.name]:
                rows[contender.name] = replace(row, absent=absent)
            else:
                subject, row = _admit(contender, row, workload, right, standard)
                rows[contender.name] = row
                if subject is not None:
                    subjects[contender.name] = subject
            step(contender.name)
    del right
    times = _clock(workload, subjects, plan.repeats, progress)
    left_out = [
        Row(contender=name, what="", absent=reason) for name, reason in plan.left_out.items()
    ]
    return BenchResult(
        command=plan.command,
        crosscut=crosscut.__version__,
        commit=results.commit(),
        machine=results.this_machine(),
        workload=_summary(workload),
        yardstick=standard.same_dtype,
        matmul_s=times.matmul,
        rows=(
            *(
                replace(
                    row,
                    forward_s=tuple(times.forward.get(name, ())),
                    forward_backward_s=tuple(times.forward_backward.get(name, ())),
                    host_s=tuple(times.host.get(name, ())),
                )
                for name, row in rows.items()
            ),
            *left_out,
        ),
        cores_of_others=times.cores_of_others,
    )


def yardsticks(
    workload: Workload, right: Answer, present: list[Contender], progress: Progress
) -> Yardsticks:
    """Plain PyTorch's errors, in bfloat16 too if a contender's grade needs them."""
    same_dtype = relative_errors(plain_pytorch(workload, progress), right)
    low = torch.bfloat16
    wanted = any(contender.grade is Grade.LOW_PRECISION for contender in present)
    if workload.hidden.dtype == low or not wanted:
        return Yardsticks(same_dtype=same_dtype, bfloat16=same_dtype)
    rounded = replace(
        workload, hidden=workload.hidden.to(low), classifier=workload.classifier.to(low)
    )
    answer = plain_pytorch(rounded, progress)
    bfloat16 = relative_errors(answer, truth(rounded, progress))
    return Yardsticks(same_dtype=same_dtype, bfloat16=bfloat16)


def _admit(
    contender: Contender, row: Row, workload: Workload, right: Answer, yardsticks: Yardsticks
) -> tuple[Subject | None, Row]:
    """Hold a contender to its grade. One that passes is warm, and its memory measured."""
    limit = measure.allowed(contender, yardsticks, workload.hidden.dtype)
    row = replace(row, allowed=limit)
    try:
        subject = Subject(contender.build(), workload)
        if contender.compiles or workload.hidden.device.type == "cuda":
            subject.forward()
            subject.forward_backward()
        answer, peak = subject.answer()
        errors = relative_errors(answer, right)
        row = replace(row, errors=errors, failure=measure.objection(errors, limit))
        subject.forget_gradients()
        if row.failure:
            return None, row
        row = replace(row, peak_extra_bytes=peak)
    except torch.OutOfMemoryError:
        return None, replace(row, absent="ran out of memory", errors=None)
    except Exception as error:  # a contender's defect: shown in its row, and the run fails
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        return None, replace(row, failure=f"raised {words}")
    if contender.policy in ("auto", "filtered"):
        sparsity = crosscut.gradient_sparsity(
            workload.hidden, workload.classifier, workload.labels, policy=contender.policy
        )
        row = replace(row, kept=sparsity.kept, tail=sparsity.tail)
    return subject, row


@dataclass(frozen=True, kw_only=True)
class _Times:
    matmul: tuple[float, ...]
    forward: dict[str, list[float]]
    forward_backward: dict[str, list[float]]
    host: dict[str, list[float]]
    cores_of_others: float | None


def _clock(
    workload: Workload, subjects: dict[str, Subject], repeats: int, progress: Progress
) -> _Times:
    """Everyone in turn, again and again."""
    device = workload.hidden.device
    matmul, matmul_s = measure.logits_matmul(workload), []
    matmul()
    forward: dict[str, list[float]] = {name: [] for name in subjects}
    forward_backward: dict[str, list[float]] = {name: [] for name in subjects}
    host: dict[str, list[float]] = {name: [] for name in subjects}
    start, before = time.perf_counter(), measure.cpu_seconds_of_others()
    with progress.stage("timing", repeats * (1 + len(subjects))) as step, _no_collector():
        for _ in range(repeats):
            matmul_s.append(measure.seconds(matmul, device))
            step("logits matmul")
            for name, subject in subjects.items():
                forward[name].append(measure.seconds(subject.forward, device))
                forward_backward[name].append(measure.seconds(subject.forward_backward, device))
                if device.type == "cuda":
                    host[name].append(measure.host_seconds(subject.forward_backward, device))
                subject.forget_gradients()
                step(name)
    after, taken = measure.cpu_seconds_of_others(), time.perf_counter() - start
    others = None if before is None or after is None else max(0.0, after - before) / taken
    return _Times(
        matmul=tuple(matmul_s),
        forward=forward,
        forward_backward=forward_backward,
        host=host,
        cores_of_others=others,
    )


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's garbage collector stays out of the times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _summary(workload: Workload) -> WorkloadSummary:
    (tokens, hidden), vocab = workload.hidden.shape, len(workload.classifier)
    return WorkloadSummary(
        name=workload.name,
        tokens=tokens,
        hidden=hidden,
        vocab=vocab,
        dtype={dtype: name for name, dtype in DTYPES.items()}[workload.hidden.dtype],
        device=workload.hidden.device.type,
        source=workload.source,
        note=workload.note,
        logits_times=workload.logits_times,
    )
