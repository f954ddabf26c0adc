"""The search behind ``crosscut tune``: other tile sizes than the table's, on this GPU.

One kernel after another, each with the winners so far for the rest: the loss and both gradients
under a policy that uses the kernel are computed with the table's sizes, then with each alternative.
One that does not compile, does not fit, or makes an error larger than plain PyTorch's, as the bench
has it, is rejected before it is timed. The fastest must beat the table by MARGIN, and do so again
when the two are timed a second time, taking turns: of many medians the best is too good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

import torch
from rich.markup import escape
from rich.table import Table

import crosscut
from crosscut.bench import BenchError, contenders, measure
from crosscut.bench.measure import Subject
from crosscut.bench.progress import Progress
from crosscut.bench.run import yardsticks
from crosscut.bench.truth import relative_errors, truth
from crosscut.bench.workloads import Workload
from crosscut.device import tuned
from crosscut.device.tuned import Sizes, Winner

if TYPE_CHECKING:  # it needs Triton, which a machine that only shows the file may lack
    from crosscut.device.tiles import Kernel

MARGIN = 0.02
"""Share of the time of forward and backward that an alternative must save."""

Choice = Mapping["Kernel", Sizes]
"""Sizes of some kernels; the others have the table's."""


class Meter(Protocol):
    """Runs loss and gradients under a policy with given sizes."""

    def objection(self, policy: str, choice: Choice) -> str | None:
        """Why these sizes are no good, or None."""
        ...

    def seconds(self, policy: str, *choices: Choice) -> list[float]:
        """How long forward and backward take with each choice; they take turns."""
        ...


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One alternative: seconds of forward and backward, or why it was rejected."""

    sizes: Sizes
    seconds: float | None = None
    rejected: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found for one kernel.

    Attributes:
        kernel: which.
        policy: the policy it was timed under.
        table: the table's sizes, with their seconds.
        trials: the alternatives.
        winner: the one that beat the table twice, with the seconds of the second time, or None.
        again: seconds of the table's sizes beside the winner.
    """

    kernel: Kernel
    policy: str
    table: Trial
    trials: tuple[Trial, ...]
    winner: Trial | None = None
    again: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to search.

    Attributes:
        policies: the kernels to tune, in order, and the policy that uses each.
        dtype: of the head.
        table: the table's sizes of these kernels.
    """

    policies: Mapping[Kernel, str]
    dtype: torch.dtype
    table: Choice


def search(plan: Plan, meter: Meter, progress: Progress) -> list[Tuning]:
    """Search the plan's kernels in order."""
    choice = dict(plan.table)
    found: list[Tuning] = []
    tried = {kernel: alternatives(kernel, plan.dtype, choice[kernel]) for kernel in plan.policies}
    with progress.stage("tuning", sum(len(sizes) + 1 for sizes in tried.values())) as step:
        for kernel, policy in plan.policies.items():
            if wrong := meter.objection(policy, choice):
                raise BenchError(f"policy {policy!r} is no good with the tiles it has: {wrong}")
            (seconds,) = meter.seconds(policy, choice)
            base = Trial(sizes=choice[kernel], seconds=seconds)
            step(f"{kernel}: the table's")
            trials = []
            for sizes in tried[kernel]:
                trials.append(_try(policy, choice, kernel, sizes, meter))
                step(f"{kernel}: {words(sizes)}")
            tuning = Tuning(kernel=kernel, policy=policy, table=base, trials=tuple(trials))
            found.append(_confirm(tuning, choice, meter))
            if winner := found[-1].winner:
                choice[kernel] = winner.sizes
    return found


def _try(policy: str, choice: Choice, kernel: Kernel, sizes: Sizes, meter: Meter) -> Trial:
    choice = {**choice, kernel: sizes}
    if rejected := meter.objection(policy, choice):
        return Trial(sizes=sizes, rejected=rejected)
    (seconds,) = meter.seconds(policy, choice)
    return Trial(sizes=sizes, seconds=seconds)


def _confirm(tuning: Tuning, choice: Choice, meter: Meter) -> Tuning:
    """Time the best alternative and the table once more, if it seems to win."""
    timed = {trial.sizes: trial.seconds for trial in tuning.trials if trial.seconds is not None}
    if not timed or tuning.table.seconds is None:
        return tuning
    best = min(timed, key=lambda sizes: timed[sizes])
    if timed[best] > (1 - MARGIN) * tuning.table.seconds:
        return tuning
    better = {**choice, tuning.kernel: best}
    again, seconds = meter.seconds(tuning.policy, choice, better)
    if seconds > (1 - MARGIN) * again:
        return tuning
    return replace(tuning, winner=Trial(sizes=best, seconds=seconds), again=again)


def plan_for(workload: Workload) -> Plan:
    """The plan for a workload on a GPU.

    Not the kernels of the paper's filter, which are for comparison. Those of ``"auto"`` only where
    it leaves anything out: else they have nothing to do.
    """
    from crosscut.device.tiles import Kernel, gpu_of, table

    kept = crosscut.gradient_sparsity(workload.hidden, workload.classifier, workload.labels).kept
    of_auto = (
        Kernel.MASS_LSE, Kernel.PAIRS, Kernel.PAIR_MATMUL, Kernel.NONZERO_MATMUL,
        Kernel.HOT_MATMUL,
    )  # fmt: skip
    policies: dict[Kernel, str] = dict.fromkeys(of_auto if kept < 1 else (), "auto")
    policies |= dict.fromkeys((Kernel.LSE, Kernel.GRADIENT, Kernel.MATMUL), "exact")
    dtype, gpu = workload.hidden.dtype, gpu_of(workload.hidden.device)
    tiles = {
        kernel: table(kernel, dtype, gpu, workload.hidden.shape[1], tf32=_tf32(dtype))
        for kernel in policies
    }
    return Plan(
        policies=policies,
        dtype=dtype,
        table={
            kernel: Sizes(*(getattr(of_table, name) for name in Sizes._fields))
            for kernel, of_table in tiles.items()
        },
    )


def unsupported_reason() -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "it measures on an NVIDIA GPU, and PyTorch sees none here"
    if find_spec("triton") is None:
        return "it needs Triton, which is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return f"it needs a GPU of compute capability 8.0 or newer, got {found}"
    return None


# Alternatives: classes (or dimensions) of a tile, of a step, warps, stages, programs if not one.
# What is not varied is fixed by what a kernel shares with others: BLOCK_N is the filter's block of
# 128 tokens, or a cell of 64 classes; a step of PAIR_MATMUL divides the slots of PAIRS; MATMUL runs
# inside GRADIENT's kernel, with its warps and stages.
_LOGITS = (
    (256, 64, 8, 3), (256, 64, 8, 4), (256, 32, 8, 4), (256, 128, 8, 2),
    (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 8, 2),
)  # fmt: skip
_TWO_PROGRAMS = ((128, 64, 4, 2, 2), (128, 64, 4, 3, 2), (128, 32, 4, 4, 2), (128, 64, 8, 3, 2))
_ENTRIES = (
    (256, 64, 4, 1), (256, 64, 4, 2), (256, 64, 8, 1), (256, 32, 4, 2), (256, 128, 8, 1),
    (128, 64, 4, 1), (128, 64, 4, 2), (128, 32, 4, 3), (128, 128, 4, 1),
)  # fmt: skip
_PRODUCTS = (
    (256, 128, 8, 2), (256, 64, 8, 2), (256, 64, 8, 3), (256, 64, 8, 4), (256, 32, 8, 4),
    (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2),
)  # fmt: skip
_FLOAT32 = (
    (128, 32, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (128, 64, 8, 2), (64, 32, 8, 3),
    (64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2),
)  # fmt: skip


def alternatives(kernel: Kernel, dtype: torch.dtype, table: Sizes) -> list[Sizes]:
    """Other sizes to try."""
    from crosscut.device.tiles import Kernel

    if dtype == torch.float32:
        tried = _FLOAT32
    elif kernel in (Kernel.LSE, Kernel.MASS_LSE):
        tried = _LOGITS + _TWO_PROGRAMS
    elif kernel in (Kernel.GRADIENT, Kernel.PAIRS):
        tried = _LOGITS
    else:
        tried = _ENTRIES if kernel == Kernel.NONZERO_MATMUL else _PRODUCTS
    found = dict.fromkeys(Sizes(table.block_n, *sizes) for sizes in tried)
    if kernel == Kernel.GRADIENT:
        found = [sizes for sizes in found if sizes.num_warps == table.num_warps]
    elif kernel == Kernel.MATMUL:
        found = dict.fromkeys(
            sizes._replace(num_warps=table.num_warps, num_stages=table.num_stages)
            for sizes in found
        )
    return [sizes for sizes in found if sizes != table]


class GpuMeter:
    """Measures on the GPU that the workload is on."""

    def __init__(self, workload: Workload, repeats: int, progress: Progress) -> None:
        self._workload, self._repeats = workload, repeats
        self._right = truth(workload, progress)
        known = contenders.everyone()
        standard = yardsticks(workload, self._right, [], progress)
        dtype = workload.hidden.dtype
        self._subjects = {
            policy: Subject(known[f"crosscut-{policy}"].build(), workload)
            for policy in ("auto", "exact")
        }
        self._allowed = {
            policy: measure.allowed(known[f"crosscut-{policy}"], standard, dtype)
            for policy in self._subjects
        }

    def objection(self, policy: str, choice: Choice) -> str | None:
        subject = self._subjects[policy]
        try:
            with self._trial(choice):
                subject.forward_backward()  # compiles
                answer, _ = subject.answer()
        except Exception as error:  # of the compiler or of the driver, whatever they raise
            self._still_works(error, choice)
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            subject.forget_gradients()
        return measure.objection(relative_errors(answer, self._right), self._allowed[policy])

    def seconds(self, policy: str, *choices: Choice) -> list[float]:
        subject = self._subjects[policy]
        device = self._workload.hidden.device
        times: list[list[float]] = [[] for _ in choices]
        for _ in range(self._repeats):
            for choice, of_choice in zip(choices, times, strict=True):
                with self._trial(choice):
                    of_choice.append(measure.seconds(subject.forward_backward, device))
        subject.forget_gradients()
        return [median(of_choice) for of_choice in times]

    def _trial(self, choice: Choice) -> AbstractContextManager[None]:
        keys = keys_of(self._workload, choice)
        return tuned.trial({keys[kernel]: sizes for kernel, sizes in choice.items()})

    def _still_works(self, error: Exception, choice: Choice) -> None:
        """An illegal access ends every later call of the process too."""
        try:
            torch.cuda.synchronize(self._workload.hidden.device)
        except RuntimeError:
            raise BenchError(
                f"the GPU stopped answering with {choice}, and nothing was stored: please report it"
            ) from error


def keys_of(workload: Workload, kernels: Iterable[Kernel]) -> dict[Kernel, tuned.Key]:
    """Under which keys a workload's kernels are stored."""
    from crosscut.device.tiles import tuning_key

    dtype, hidden_size = workload.hidden.dtype, workload.hidden.shape[1]
    return {kernel: tuning_key(kernel, dtype, _tf32(dtype), hidden_size) for kernel in kernels}


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


def winners(workload: Workload, found: list[Tuning]) -> list[Winner]:
    """The entries to store."""
    place = tuned.here(workload.hidden.device)
    keys = keys_of(workload, [tuning.kernel for tuning in found])
    tokens, classes = len(workload.hidden), len(workload.classifier)
    return [
        Winner(
            place=place,
            key=keys[tuning.kernel],
            sizes=tuning.winner.sizes,
            measured=f"{workload.name}, N={tokens}, V={classes}: {saved(tuning):.1%} of "
            f"forward and backward under {tuning.policy!r} saved",
        )
        for tuning in found
        if tuning.winner is not None
    ]


def saved(tuning: Tuning) -> float:
    """Share of the time that the winner saves."""
    if tuning.winner is None or tuning.winner.seconds is None or tuning.again is None:
        return 0.0
    return 1 - tuning.winner.seconds / tuning.again


def store(workload: Workload, entries: list[Winner]) -> Path:
    """Write the winners, in place of all that the file had for this GPU, dtype and hidden size.

    What it had for this GPU with another Triton or other kernels goes too. Returns the file.
    """
    from crosscut.device.tiles import Kernel

    place, replaced = tuned.here(workload.hidden.device), keys_of(workload, Kernel).values()
    try:
        before = tuned.read()
    except ValueError:  # not a file of ours to keep
        before = []
    kept = [
        winner
        for winner in before
        if winner.place.gpu != place.gpu or (winner.place == place and winner.key not in replaced)
    ]
    tuned.write([*kept, *entries])
    return tuned.path()


def table(workload: Workload, found: list[Tuning]) -> Table:
    """All that was tried, with the winners marked."""
    tokens, hidden_size = workload.hidden.shape
    grid = Table(
        "kernel", "tokens x classes x step", "forward + backward", "", box=None,
        padding=(0, 2, 0, 0), title_justify="left",
        title=f"{workload.name}: N={tokens}, D={hidden_size}, V={len(workload.classifier)}",
    )  # fmt: skip
    for tuning in found:
        grid.add_section()
        grid.add_row(
            f"[bold]{tuning.kernel}[/] ({tuning.policy})",
            words(tuning.table.sizes),
            _time(tuning.table),
            "the table's",
        )
        for trial in tuning.trials:
            grid.add_row("", words(trial.sizes), _time(trial), _verdict(trial, tuning))
    return grid


def _time(trial: Trial) -> str:
    return "" if trial.seconds is None else f"{trial.seconds * 1e3:.2f} ms"


def _verdict(trial: Trial, tuning: Tuning) -> str:
    if trial.rejected:
        return f"rejected: {escape(trial.rejected)}"
    if tuning.winner is not None and trial.sizes == tuning.winner.sizes:
        return f"[bold green]kept: saves {saved(tuning):.1%}[/]"
    return ""


def words(sizes: Sizes) -> str:
    """Sizes in a few characters."""
    n, v, d, warps, stages, programs = sizes
    several = f", {programs} programs" if programs > 1 else ""
    return f"{n} x {v} x {d}, {warps} warps, {stages} stages{several}"
