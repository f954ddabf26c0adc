"""Who computes the loss: crosscut under each policy, PyTorch's own ways, and other packages.

Every contender is a function ``(hidden [N, D], classifier [V, D], labels [N]) -> mean loss`` whose
gradients come by autograd, and a promise about their accuracy, to which :mod:`.measure` holds it
before it looks at the clock. None is dropped in silence: one that cannot run says why.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

import crosscut
from crosscut.bench import BenchError
from crosscut.bench.results import package_version
from crosscut.bench.workloads import Workload
from crosscut.options import PAPER_FILTERS, GradientPolicy

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class Grade(StrEnum):
    """What a contender promises of its gradients.

    - ``STANDARD``: an error no larger than plain PyTorch's in the same dtype.
    - ``LOW_PRECISION``: no larger than plain PyTorch's in bfloat16, whatever the dtype.
    - ``LOSSY``: nothing (the filters of the paper); they must resemble a gradient.
    """

    STANDARD = "standard"
    LOW_PRECISION = "low precision"
    LOSSY = "lossy"


def _no_objection(workload: Workload) -> str | None:
    del workload
    return None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute the loss.

    Attributes:
        name: how it is asked for.
        what: what it is, in a line.
        grade: what it promises of its gradients.
        build: makes the loss function, importing what it needs.
        package: the distribution it comes from, for its version.
        module: the module that must be importable.
        objection: why it cannot run a workload, or None.
        in_reserve: why it is not run unless asked for by name, or None. Given the device ("cpu",
            "cuda") and the dtype ("bf16", "fp16", "fp32").
        policy: crosscut's policy, where it is crosscut.
        slack: factor on the error that its grade allows.
        compiles: whether its first run is no measure of the next.
    """

    name: str
    what: str
    grade: Grade
    build: Callable[[], LossFunction]
    package: str = "torch"
    module: str = "torch"
    objection: Callable[[Workload], str | None] = _no_objection
    in_reserve: Callable[[str, str], str | None] = lambda device, dtype: None
    policy: GradientPolicy | None = None
    slack: float = 1.0
    compiles: bool = False

    @property
    def version(self) -> str | None:
        """Version of its package."""
        return crosscut.__version__ if self.policy else package_version(self.package)

    def unsupported_reason(self, workload: Workload) -> str | None:
        """Why it cannot run the workload, or None if it can."""
        if reason := self.objection(workload):
            return reason
        if find_spec(self.module) is None:
            return f"not installed: pip install {self.package}"
        return None


def everyone() -> dict[str, Contender]:
    """All contenders by name, in the order of the table."""
    contenders = [*map(_crosscut, get_args(GradientPolicy)), *_pytorch(), *_other_packages()]
    return {contender.name: contender for contender in contenders}


def choose(against: str, device: str, dtype: str) -> tuple[list[Contender], dict[str, str]]:
    """Read ``--against``.

    Args:
        against: names with commas between. ``default`` stands for those that finish in a
            reasonable time, ``all`` for all, ``none`` for none. crosscut's own defaults are always
            run.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.

    Returns:
        Those to run, and why not for each of the others.
    """
    known = everyone()
    reserve = {name: contender.in_reserve(device, dtype) for name, contender in known.items()}
    default = [name for name, reason in reserve.items() if reason is None]
    groups = {"default": default, "all": list(known), "none": []}
    wanted = {name for name in default if known[name].policy}
    for name in filter(None, map(str.strip, against.split(","))):
        if name not in groups and name not in known:
            raise BenchError(
                f"--against must name some of {', '.join((*groups, *known))}, got {name!r}"
            )
        wanted.update(groups.get(name, [name]))
    left_out = {name: reserve[name] or "not asked for" for name in known if name not in wanted}
    return [contender for name, contender in known.items() if name in wanted], left_out


def _crosscut(policy: GradientPolicy) -> Contender:
    what = {
        "auto": "crosscut's default: never less accurate than plain PyTorch in the same dtype",
        "filtered": "small columns of the softmax become one rank-one correction",
        "exact": "every entry of the softmax",
    }

    def build() -> LossFunction:
        def loss(hidden: Tensor, classifier: Tensor, labels: Tensor) -> Tensor:
            return crosscut.linear_cross_entropy(hidden, classifier, labels, policy=policy)

        return loss

    def in_reserve(device: str, dtype: str) -> str | None:
        if policy in PAPER_FILTERS:
            return "the paper's tile filter, for comparison"
        if device == "cuda":
            return "runs in plain PyTorch on a GPU" if policy == "filtered" else None
        if policy == ("exact" if dtype == "fp32" else "filtered"):
            return f"what crosscut-auto is in {dtype}"
        return None

    return Contender(
        name=f"crosscut-{policy}",
        what=what.get(policy, f"the paper's gradient filter, {policy}"),
        grade={"filtered": Grade.LOW_PRECISION}.get(
            policy, Grade.LOSSY if policy in PAPER_FILTERS else Grade.STANDARD
        ),
        build=build,
        in_reserve=in_reserve,
        policy=policy,
    )


def _pytorch() -> list[Contender]:
    """PyTorch's own ways. Sums come in another order in each: hence the slack."""

    def plain() -> LossFunction:
        return lambda hidden, classifier, labels: F.cross_entropy(
            F.linear(hidden, classifier), labels
        )

    def upcast() -> LossFunction:
        return lambda hidden, classifier, labels: F.cross_entropy(
            F.linear(hidden, classifier).float(), labels
        )

    def compiled() -> LossFunction:
        return torch.compile(plain(), dynamic=False)

    def chunked() -> LossFunction:
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda hidden, classifier, labels: F.linear_cross_entropy(
            hidden, classifier, labels, options=options
        )

    return [
        Contender(
            name="pytorch",
            what="F.cross_entropy(F.linear(hidden, classifier), labels); so does "
            "F.linear_cross_entropy without options",
            grade=Grade.STANDARD,
            slack=1.5,
            build=plain,
            objection=lambda workload: _needs(3 * workload.logits_bytes, workload),
        ),
        Contender(
            name="pytorch-upcast",
            what="the same with logits.float(), as Transformers does and autocast",
            grade=Grade.STANDARD,
            slack=1.5,
            build=upcast,
            objection=_upcast_objection,
            in_reserve=lambda device, dtype: "much like pytorch, in more memory",
        ),
        Contender(
            name="pytorch-compiled",
            what="torch.compile of the plain one",
            grade=Grade.STANDARD,
            slack=1.5,
            build=compiled,
            compiles=True,
            objection=_compiled_objection,
        ),
        Contender(
            name="pytorch-chunked",
            what="F.linear_cross_entropy(..., options=LinearCrossEntropyOptions())",
            grade=Grade.STANDARD,
            slack=10.0,  # its sums go over many small chunks
            build=chunked,
            objection=_chunked_objection,
            in_reserve=lambda device, dtype: (
                "takes many minutes with a large vocabulary on a CPU" if device == "cpu" else None
            ),
        ),
    ]


def _other_packages() -> list[Contender]:
    """Triton and CuTe kernels of other projects."""

    def cut_cross_entropy() -> LossFunction:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy

    def liger() -> LossFunction:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy

    def quack() -> LossFunction:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy

    return [
        Contender(
            name="cut-cross-entropy",
            what="the kernels of the paper's authors",
            grade=Grade.LOSSY,
            build=cut_cross_entropy,
            package="cut-cross-entropy",
            module="cut_cross_entropy",
            objection=_needs_cuda,
        ),
        Contender(
            name="liger-kernel",
            what="chunks of logits, gradients made in the forward",
            grade=Grade.STANDARD,
            slack=2.0,
            build=liger,
            package="liger-kernel",
            module="liger_kernel",
            objection=_needs_cuda,
        ),
        Contender(
            name="quack-kernels",
            what="chunks of logits, CuTe kernels",
            grade=Grade.STANDARD,
            slack=2.0,
            build=quack,
            package="quack-kernels",
            module="quack",
            objection=_quack_objection,
        ),
    ]


def _needs_cuda(workload: Workload) -> str | None:
    device = workload.hidden.device.type
    return None if device == "cuda" else f"needs a CUDA device, got {device}"


def _quack_objection(workload: Workload) -> str | None:
    if reason := _needs_cuda(workload):
        return reason
    tokens = len(workload.hidden)
    if tokens % 8:
        return f"needs a number of tokens divisible by 8, got {tokens}"
    return None


def _upcast_objection(workload: Workload) -> str | None:
    if workload.hidden.dtype == torch.float32:
        return "the same as pytorch in fp32"
    return _needs(7 * workload.logits_bytes, workload)


def _compiled_objection(workload: Workload) -> str | None:
    if workload.hidden.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "needs a C++ compiler on a CPU, found neither g++ nor clang++"
    return _needs(3 * workload.logits_bytes, workload)


def _chunked_objection(workload: Workload) -> str | None:
    del workload
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"needs PyTorch 2.13, got {torch.__version__}"
    return None


def _needs(workspace: int, workload: Workload) -> str | None:
    """Object where so many bytes beside the gradients do not fit in what memory is free."""
    needed = workspace + workload.gradient_bytes
    free = _free_bytes(workload.hidden.device)
    if free is None or needed <= free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024
