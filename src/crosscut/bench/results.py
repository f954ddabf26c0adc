"""What a run of the bench writes down: every number in its report comes from such a file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from crosscut.bench import BenchError

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors against the truth: of the loss, and in norm of the two gradients."""

    loss: float
    d_hidden: float
    d_classifier: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender.

    Attributes:
        contender: its name.
        what: what it is, in a line.
        version: of the package it comes from.
        absent: why it was not run; the rest is empty then.
        failure: why its answer was not accepted; no time is taken then.
        errors: of its answer.
        allowed: what these may be.
        forward_s: seconds of each repeat, loss only, without gradients.
        forward_backward_s: seconds of each repeat, loss and both gradients.
        host_s: seconds of each repeat that loss and both gradients keep the host busy, on a GPU;
            empty on a CPU, where they are the same.
        peak_extra_bytes: peak memory of loss and gradients, beyond inputs and gradients.
        kept: share of the (token, class) pairs whose gradient was computed, where known.
        tail: mean softmax mass of a token in the other pairs, where known.
    """

    contender: str
    what: str
    version: str | None = None
    absent: str | None = None
    failure: str | None = None
    errors: Errors | None = None
    allowed: Errors | None = None
    forward_s: tuple[float, ...] = ()
    forward_backward_s: tuple[float, ...] = ()
    host_s: tuple[float, ...] = ()
    peak_extra_bytes: int | None = None
    kept: float | None = None
    tail: float | None = None

    @property
    def forward(self) -> float | None:
        """Median seconds of a forward."""
        return median(self.forward_s) if self.forward_s else None

    @property
    def forward_backward(self) -> float | None:
        """Median seconds of a forward and backward."""
        return median(self.forward_backward_s) if self.forward_backward_s else None

    @property
    def spread(self) -> float | None:
        """The longest forward and backward over the shortest; None of fewer than two."""
        times = self.forward_backward_s
        return max(times) / min(times) if len(times) > 1 else None

    @property
    def host(self) -> float | None:
        """Median seconds that a forward and backward keeps the host busy, None on a CPU."""
        return median(self.host_s) if self.host_s else None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it ran.

    ``memory_bytes`` is the machine's, or None where unknown; ``wait_policy`` is the environment's
    ``OMP_WAIT_POLICY``, how threads wait for each other.
    """

    system: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int | None
    gpu: str | None
    python: str
    torch: str
    wait_policy: str | None = None


@dataclass(frozen=True, kw_only=True)
class WorkloadSummary:
    """What was computed: N ``tokens``, D ``hidden``, V ``vocab``."""

    name: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    device: str
    source: str
    note: str | None
    logits_times: float


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """One run.

    Attributes:
        command: the command line that makes it again.
        crosscut: version.
        commit: the git commit of the code, with ``-dirty`` where it was changed; None outside a
            checkout.
        machine: where it ran.
        workload: what was computed.
        yardstick: errors of plain PyTorch in the workload's dtype.
        matmul_s: seconds of each repeat of the bare logits matmul.
        rows: the contenders, in the order of the table.
        cores_of_others: how many CPU cores other processes kept busy while it timed, where known.
    """

    command: str
    crosscut: str
    commit: str | None
    machine: Machine
    workload: WorkloadSummary
    yardstick: Errors
    matmul_s: tuple[float, ...]
    rows: tuple[Row, ...]
    cores_of_others: float | None = None

    @property
    def matmul(self) -> float | None:
        """Median seconds of the bare logits matmul."""
        return median(self.matmul_s) if self.matmul_s else None

    @property
    def failed(self) -> bool:
        """Whether any contender's answer was not accepted."""
        return any(row.failure for row in self.rows)


def save(result: BenchResult, path: Path) -> None:
    """Write the run as JSON."""
    path.write_text(json.dumps({"format": FORMAT, **asdict(result)}, indent=1) + "\n")


def load(path: Path) -> BenchResult:
    """Read what :func:`save` wrote."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} must be a result of crosscut bench --json: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise BenchError(f"{path} must be a result of crosscut bench --json, of format {FORMAT}")
    try:
        return BenchResult(
            machine=Machine(**data.pop("machine")),
            workload=WorkloadSummary(**data.pop("workload")),
            yardstick=Errors(**data.pop("yardstick")),
            matmul_s=tuple(data.pop("matmul_s")),
            rows=tuple(_row(row) for row in data.pop("rows")),
            **data,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise BenchError(
            f"{path} must be a whole result of crosscut bench --json, got {error!r}"
        ) from error


def _row(data: dict[str, Any]) -> Row:
    for name in ("errors", "allowed"):
        data[name] = None if data[name] is None else Errors(**data[name])
    for name in ("forward_s", "forward_backward_s", "host_s"):
        data[name] = tuple(data.get(name, ()))  # older files have no host_s
    return Row(**data)


def this_machine() -> Machine:
    """The machine this runs on."""
    return Machine(
        system=platform.platform(terse=True),
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=torch.__version__,
        wait_policy=os.environ.get("OMP_WAIT_POLICY"),
    )


def package_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the checkout this code is part of, or None."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        revision = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    package = Path(__file__).parents[1]
    return subprocess.run(
        ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
    ).stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a Unix
        return None
