"""Compile every kernel for GPUs that are not here, by calls that launch it on tensors without data.

    python tests/programs/compile_kernels.py --dtype bfloat16 cuda:90

prints one JSON line a kernel and set of arguments: registers, bytes of stack, which it has if it
spills, shared memory, whether the assembler makes matrix products wait for each other that were to
run on ahead (on Hopper; it does so silently where it loses track of their registers), and the
seconds that each part of the compiler took (with TRITON_ALWAYS_COMPILE=1, else nothing of what is
in its cache). What is compiled is what a launch would be: its options, its specialisation on
alignment, the tiles that such a GPU is given. ``tf32`` is float32 that may be multiplied so.

    --few       only some variants
    --shared    stop where shared memory is known, before LLVM: in a third of the time
    --assembly  stop at PTX, or its like: of the resources, shared memory alone is known

    python tests/programs/compile_kernels.py --table

does so for every card in every dtype, of matrices that TMA does not load too, prints the most
shared memory that each kernel takes, in KiB, and fails where a card has less. Cards that are given
the same tiles, and that Triton has the same code for, are compiled for once.

    python tests/programs/compile_kernels.py --too-large cuda:120

launches a forward there (on nothing) with Hopper's tiles, which do not fit: as ``crosscut tune``
would, and twice as a training does. It prints one JSON line each: what was tried and launched.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton._C.libtriton import amd, nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import crosscut.kernels
from crosscut.backends.protocol import (
    DistillationProblem,
    DivergenceCotangents,
    HeadProblem,
    Needs,
)
from crosscut.backends.triton import TritonBackend, compile_ahead, forward
from crosscut.backends.triton.distillation import compute_divergences, compute_student_gradients
from crosscut.device import launch, tuned
from crosscut.device.tiles import Gpu, Kernel, gpu_of, table
from crosscut.kernels.partial_statistics import joined
from crosscut.options import HeadOptions

CARDS = {  # what a program may have of shared memory, KiB, and multiprocessors
    "cuda:80": (163, 108),
    "cuda:86": (99, 82),
    "cuda:89": (99, 128),
    "cuda:90": (227, 132),
    "cuda:100": (227, 148),
    "cuda:103": (227, 148),
    "cuda:120": (99, 170),
    "cuda:121": (99, 48),
    "hip:gfx942": (64, 304),
}
TENSOR_MEMORY = 512  # columns, on data centre GPUs since Blackwell
DTYPES = ("bfloat16", "float16", "float32", "tf32")
Call = Callable[[], object]


class NoDriver:
    """A driver that knows its target and launches nothing. Each target is a device of its own."""

    def __init__(self, target: str) -> None:
        kind, arch = target.split(":")
        number = int(re.sub(r"\D", "", arch))
        self.target = GPUTarget(*((kind, number, 32) if kind == "cuda" else (kind, arch, 64)))
        self.device = torch.device("cuda", number)
        self.shared_memory, self.multiprocessors = CARDS[target][0] * 1024, CARDS[target][1]
        self.capability = divmod(number, 10) if kind == "cuda" else (8, 0)
        self.family = kind, self.capability[0]  # which Triton compiles for alike
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": self.shared_memory},
            load_binary=lambda *arguments: (object(), 0, 100, 0, 1024),
        )
        self.launcher_cls: Any = None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device.index

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


@dataclass
class Compiled:
    """A kernel with one set of arguments."""

    name: str
    kernel: Any
    options: dict[str, Any]
    seconds: dict[str, float]


@contextmanager
def gpu(target: str) -> Iterator[NoDriver]:
    """As if there were such a card."""
    card = NoDriver(target)
    driver.set_active(card)  # type: ignore[arg-type]
    properties = SimpleNamespace(multi_processor_count=card.multiprocessors)
    token = launch._device_ahead.set(card.device)
    try:
        with (
            mock.patch("torch.cuda.get_device_capability", return_value=card.capability),
            mock.patch("torch.cuda.get_device_properties", return_value=properties),
            mock.patch("crosscut.device.tuned.lookup", return_value=None),
            mock.patch("crosscut.backends.column_filter.PAIR_SWEEP", new=True),
        ):
            yield card
    finally:
        launch._device_ahead.reset(token)


def compile_all(
    calls: list[Call], *, shared: bool = False, assembly: bool = False
) -> list[Compiled]:
    """What these calls launch, compiled for the current card, or so far."""
    found: dict[int, Compiled] = {}
    seconds: dict[str, float] = {}
    run = triton.JITFunction.run

    def listen(*, times: Any, **_: Any) -> None:
        parts = {"python": times.ir_initialization, **dict(times.lowering_stages)}
        seconds.update({part: round(took / 1e6, 3) for part, took in parts.items()})

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert warmup, f"{self.__name__} was launched"
        seconds.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        # Triton's launcher finds no descriptor there, and says so when there is a GPU to launch on.
        nested = [kind for kind in kernel.src.signature.values() if isinstance(kind, tuple)]
        assert "tensordesc" not in str(nested), f"{self.__name__}: a descriptor in a tuple"
        found.setdefault(id(kernel), Compiled(self.__name__, kernel, options, dict(seconds)))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.JITFunction, "run", compile_only))
        triton.knobs.compilation.listener = listen
        if shared:
            stack.enter_context(only_shared_memory())
        if assembly:
            stack.enter_context(last_stage(["ptx", "amdgcn"]))
        for call in calls:
            call()
    return list(found.values())


class _AllocatedError(Exception):
    """Shared memory has been allocated."""


@contextmanager
def only_shared_memory() -> Iterator[None]:
    """Compile no further than shared memory is allocated; there is no code then."""

    def allocate(make_llir: Any, module: Any, metadata: dict[str, Any]) -> str:
        def stop(passes: Any, *_: Any) -> None:
            passes.run(module, "allocate")  # those before this one
            raise _AllocatedError

        with ExitStack() as stack:
            for backend in (nvidia, amd):
                of_backend = backend.passes.ttgpuir
                stack.enter_context(mock.patch.object(of_backend, "add_to_llvmir", stop))
            stack.enter_context(suppress(_AllocatedError))
            make_llir(module, metadata)
        metadata["shared"] = module.get_int_attr("ttg.shared")
        metadata["tmem_size"] = module.get_int_attr("ttg.tensor_memory_size")
        metadata["name"] = ""
        return ""

    with last_stage(["llir"], lambda make_llir: partial(allocate, make_llir)):
        yield


@contextmanager
def last_stage(
    names: Sequence[str], change: Callable[[Any], Any] = lambda make: make
) -> Iterator[None]:
    """Compile no further than a stage, the one of these names; what follows makes nothing.

    Args:
        names: what it is called, by one compiler or another.
        change: what becomes of it.
    """

    def nothing(module: Any, metadata: dict[str, Any]) -> str:
        del module
        for name, value in (("shared", 0), ("tmem_size", 0), ("name", "")):
            metadata.setdefault(name, value)
        return ""

    def shorten(*arguments: Any) -> Any:
        if not arguments:  # which is asked for what it does, for the cache
            return names[0], names[0]
        stages = arguments[1]
        (last,) = (name for name in stages if name in names)
        stages[last] = change(stages[last])
        for name in list(stages)[list(stages).index(last) + 1 :]:
            stages[name] = nothing
        return None

    triton.knobs.runtime.add_stages_inspection_hook = shorten
    with tempfile.TemporaryDirectory() as cache:
        before, triton.knobs.cache.dir = triton.knobs.cache.dir, cache
        try:
            yield
        finally:
            triton.knobs.cache.dir = before
            triton.knobs.runtime.add_stages_inspection_hook = None


def calls(dtype_name: str, *, few: bool = False, any_layout: bool = False) -> list[Call]:
    """Calls that launch every kernel, with everything and with nothing else.

    Args:
        dtype_name: of DTYPES.
        few: only some of them.
        any_layout: also with matrices that TMA does not load.
    """
    dtype = torch.float32 if dtype_name == "tf32" else getattr(torch, dtype_name)
    torch.backends.cuda.matmul.allow_tf32 = dtype_name == "tf32"
    exact: dict[str, Any] = {"policy": "exact"}
    capped: dict[str, Any] = {"bias": True, "softcap": 30.0}
    some: list[dict[str, Any]] = [
        {},
        exact | capped | {"weight": True},
        {"policy": "cce"},
    ]
    more = [
        {"num_classes": 4096},  # whose rows of dC lend no memory
        {"softcap": 30.0, "entropy": True, "ranks": True},
        {"softcap": 30.0},
        {"entropy": True},
        {"entropy": True, "softcap": 30.0},
        {"ranks": True},
        exact,
        exact | capped,
        exact | {"weight": True},
        exact | {"entropy": True},
        exact | {"entropy": True, "ranks": True} | capped,
        exact | {"several": True},
        exact | {"several": True} | capped,
        {"policy": "cce"} | capped,
        {"policy": "cce_kahan_full_e"},
        {"policy": "cce_kahan_full_c", "weight": True} | capped,
    ]
    new = partial(problem, dtype=dtype)
    layouts: list[dict[str, Any]] = [{}]
    variants = some
    if not few:
        layouts += [{"hidden_size": 640}]  # which has tiles of its own
        variants = some + more
    if any_layout:
        layouts += [{"hidden_size": 1001}, {"transposed": True}]
    found: list[Call] = [
        partial(head_call, new(**options, **layout)) for layout in layouts for options in variants
    ]
    found.append(partial(shard_call, new(ranks=True, entropy=True, weight=True)))
    if dtype != torch.float16:
        pair = new(**capped), new(hidden_size=2048, **capped)
        found.append(partial(distil, "js", 2.0, *pair))
        for kind in () if few else ("js", "forward", "reverse"):
            found += [partial(distil, kind, None, new(**layout), new()) for layout in layouts]
    return found


def shard_call(head: HeadProblem) -> None:
    """What a shard of a vocabulary tells the others."""
    probed = forward.probe(head, bound=False)
    joined(forward.sweep(head, probed, None), probed.rows)


def print_table(*, few: bool) -> None:
    """The most shared memory that each kernel takes on each card; all of it must fit."""
    most: dict[tuple[str, str], int] = {}
    alike: dict[Hashable, str] = {}
    for name in CARDS:
        with gpu(name) as card:
            kind = card.family, tiles_of(card)
            if other := alike.get(kind):
                most.update({(kernel, name): most[kernel, other] for kernel in every_kernel()})
                continue
            alike[kind] = name
            for dtype in DTYPES:
                some = few or dtype in ("float16", "tf32")  # as bfloat16 and float32
                layouts = dtype == "bfloat16" or not few
                found = compile_all(calls(dtype, few=some, any_layout=layouts), shared=True)
                print(name, dtype, len(found), file=sys.stderr, flush=True)
                for one in found:
                    metadata = one.kernel.metadata
                    key = one.name, name
                    most[key] = max(most.get(key, 0), metadata.shared)
                    assert (metadata.tmem_size or 0) <= TENSOR_MEMORY, (*key, dtype, one.options)
        missing = [kernel for kernel in every_kernel() if (kernel, name) not in most]
        assert not missing, f"no call launches {missing}"
    names = [name.split(":")[1] for name in CARDS]
    print(f"{'':28}" + "".join(f"{name:>8}" for name in names))
    for kernel in sorted(every_kernel()):
        kib = "".join(f"{most[kernel, name] / 1024:8.1f}" for name in CARDS)
        print(f"{kernel:28}{kib}")
    limits = {name: of_card[0] for name, of_card in CARDS.items()}
    print(f"{'the card has':28}" + "".join(f"{limit:8.1f}" for limit in limits.values()))
    too_large = {key: size for key, size in most.items() if size > 1024 * limits[key[1]]}
    assert not too_large, too_large


def tiles_of(card: NoDriver) -> Hashable:
    """All that the table has for a card."""
    return tuple(
        table(kernel, dtype, gpu_of(card.device), hidden_size, tf32=tf32)
        for kernel in Kernel
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for hidden_size in (640, 1024)
        for tf32 in (False, True)
    )


def launch_too_large(card: NoDriver) -> None:
    """Launch a forward with tiles that do not fit."""
    tried: list[tuple[str, int]] = []
    launched: list[tuple[str, int]] = []
    run = triton.JITFunction.run

    def record(self: Any, *args: Any, **options: Any) -> Any:
        tried.append((self.__name__, options.get("num_stages", 0)))
        return run(self, *args, **options)

    def launcher(source: Any, metadata: Any) -> Any:
        return lambda *arguments: launched.append((source.fn.__name__, metadata.shared))

    def launched_for_real(self: Any, grid: Any) -> Any:
        return partial(self.run, grid=grid, warmup=False)

    card.launcher_cls = launcher
    head = problem(dtype=torch.bfloat16, policy="exact")
    like = TritonBackend().forward_like(head, for_backward=False)
    with (
        mock.patch("crosscut.device.tiles.gpu_of", return_value=Gpu((9, 0), 227 * 1024)),
        mock.patch.object(launch._Kernel, "__getitem__", launched_for_real),
        mock.patch.object(triton.JITFunction, "run", record),
        only_shared_memory(),
    ):
        for trial in (tuned.trial({}), nullcontext(), nullcontext()):
            error = ""
            try:
                with trial:
                    compile_ahead._call(head, like, None, (False,))
            except triton.OutOfResources as caught:
                error = str(caught)
            print(json.dumps({"tried": tried, "launched": launched, "error": error}), flush=True)
            tried.clear()
            launched.clear()


def problem(
    *,
    dtype: torch.dtype,
    hidden_size: int = 1024,
    num_classes: int = 2**18,
    transposed: bool = False,
    bias: bool = False,
    weight: bool = False,
    several: bool = False,
    entropy: bool = False,
    ranks: bool = False,
    **options: Any,
) -> HeadProblem:
    """512 tokens, without data."""
    new = partial(torch.empty, device="meta")
    classifier = new(num_classes, hidden_size, dtype=dtype)
    return HeadProblem(
        hidden=new(512, hidden_size, dtype=dtype),
        classifier=torch.empty_like(classifier.t()).t() if transposed else classifier,
        bias=new(num_classes, dtype=dtype) if bias else None,
        labels=new((512, 3) if several else 512, dtype=torch.int64),
        logit_weight=new(num_classes) if weight else None,
        options=HeadOptions(**options),
        entropy=entropy,
        ranks=ranks,
    )


def head_call(head: HeadProblem) -> None:
    """Forward and backward."""
    like = TritonBackend().forward_like(head, for_backward=True)
    needs = Needs(True, True, head.bias is not None)
    compile_ahead._call(head, like, needs, (False, True) if head.entropy else (False,))


def distil(
    divergence: str, temperature: float | None, student: HeadProblem, teacher: HeadProblem
) -> None:
    """Forward and backward."""
    pair = DistillationProblem(
        student=student, teacher=teacher, divergence=divergence, beta=0.5, temperature=temperature
    )
    found = compute_divergences(pair)
    hard = None if temperature is None else found.hard_lse
    cotangents = DivergenceCotangents(found.divergence, hard)
    compute_student_gradients(pair, found, cotangents, Needs(True, True, student.bias is not None))


def every_kernel() -> set[str]:
    """Their names."""
    modules = [
        importlib.import_module(f"crosscut.kernels.{module.name}")
        for module in pkgutil.iter_modules(crosscut.kernels.__path__)
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, launch._Kernel)
    }


def resources(kernel: Any) -> dict[str, Any]:
    """What the machine code takes."""
    found: dict[str, Any] = {}
    if not kernel.asm.get("cubin"):
        return found
    with tempfile.NamedTemporaryFile() as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = run_tool("cuobjdump", "-res-usage", cubin.name)
        found["registers"], found["spilled"] = (
            max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in ("REG", "STACK")
        )
        if groups := kernel.asm["ptx"].count("wgmma.commit_group"):
            code = run_tool("nvdisasm", "-c", cubin.name)
            waits = len(re.findall(r"HGMMA[^;]*gsb0", code))  # one a group, unless each waits
            found["serialized"] = waits > groups
    return found


def run_tool(name: str, *arguments: str) -> str:
    """What one of the programs prints that come with Triton."""
    program = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [program, *arguments], check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cards", nargs="*", choices=[*CARDS, []], metavar="CARD")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    for option in ("few", "shared", "assembly", "table", "too-large"):
        parser.add_argument(f"--{option}", action="store_true")
    wanted = parser.parse_args()
    if wanted.table:
        print_table(few=wanted.few)
        return
    for name in wanted.cards:
        with gpu(name) as card:
            if wanted.too_large:
                launch_too_large(card)
                continue
            wanted_calls = calls(wanted.dtype, few=wanted.few)
            for compiled in compile_all(
                wanted_calls, shared=wanted.shared, assembly=wanted.assembly
            ):
                metadata = compiled.kernel.metadata
                line = {
                    "card": name,
                    "kernel": compiled.name,
                    "shared": metadata.shared,
                    "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
                    **resources(compiled.kernel),
                    "options": compiled.options,
                    "seconds": compiled.seconds,
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
