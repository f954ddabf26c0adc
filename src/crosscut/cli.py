"""The command line: ``crosscut bench``, ``report``, ``tune``, ``explain``, ``estimate``, ``env``.

Needs the extra ``crosscut[cli]``; real heads and plots need ``crosscut[bench]``, and load what is
slow to load only when they are asked for.
"""

from __future__ import annotations

import json as json_
import os
import shlex
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    if missing.name not in ("typer", "rich"):
        raise
    raise SystemExit(
        f"The command line needs {missing.name}: pip install 'crosscut[cli]'"
    ) from missing

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import crosscut
from crosscut.backends import NAMES
from crosscut.bench import BenchError, contenders, estimate_report, results, tune, workloads
from crosscut.bench import estimate as estimates
from crosscut.bench import report as reports
from crosscut.bench.progress import Bars
from crosscut.bench.results import BenchResult
from crosscut.bench.run import Plan, run
from crosscut.cache import writable_cache_directory
from crosscut.device import tuned

EXIT_FAILED_GATE, EXIT_USAGE = 1, 2

app = typer.Typer(
    name="crosscut",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Cross-entropy of a large-vocabulary head, without its logits: measure it, ask about it.",
    epilog="`crosscut bench --help` has examples. Start with `crosscut bench`.",
)

_BENCH_HELP = """
Time the loss of an output head, and its gradients, beside other ways to compute them.

Each contender's answer is checked before it is timed: one that is wrong gets no time, and the
command exits with 1. By default the head is that of Gemma 3 270M on real text; the first run
computes its hidden states (a minute) and keeps them in `$CROSSCUT_CACHE`, `~/.cache/crosscut`
unless set.

**Examples**

- `crosscut bench` : the real 262,144-token head, 1024 tokens, bfloat16
- `crosscut bench --dtype fp32 --tokens 4096 --json run.json --plot run.png`
- `crosscut bench --workload llama3-8b --device cuda --tokens 8192`
- `crosscut bench --against default,pytorch-chunked,crosscut-cce`
- `crosscut bench --logits-times 0.2` : as flat a softmax as early in training
- `crosscut bench --workload random:N=512,D=256,V=32000` : no download
- `crosscut bench --list` : workloads and contenders
"""

_TUNE_HELP = """
Look for tile sizes that are faster on this GPU than crosscut's own, and keep those that are.

crosscut never tunes while it trains: it takes its tiles from a table, measured on an H100. This
command times loss and gradients of a head with the table's sizes and with others, kernel by kernel,
in some minutes. Sizes whose error is larger than plain PyTorch's are rejected. The others must save
2 % of forward and backward, twice. Winners go to `tiles.json` in `$CROSSCUT_CACHE`,
`~/.cache/crosscut` unless set; from its next start every process on this machine takes them for
this GPU, dtype and hidden size, as long as Triton and crosscut's kernels are those they were
measured with.

Take the hidden size, vocabulary, tokens and dtype of your own training. The logits are a real
model's: what a gradient may leave out decides which kernels matter.

**Examples**

- `crosscut tune --workload llama3-8b --tokens 8192`
- `crosscut tune --hidden-size 2048 --vocab-size 151936 --tokens 4096 --dtype bf16`
- `crosscut tune --dry-run` : measure, print, keep nothing
- `crosscut tune --show` : what is kept, and whether it is used here
- `crosscut tune --reset` : forget all of it
"""

_EXPLAIN_HELP = """
Say which backend would compute a head of this shape, and why not the others.

Nothing is computed and nothing large is allocated; a device that is not here can be asked about: a
GPU is then taken to be one that crosscut's kernels run on.

**Examples**

- `crosscut explain --tokens 8192 --hidden 2304 --vocab 256000 --dtype bf16 --device cuda`
- `crosscut explain --policy cce --backend blocks`
- `crosscut explain --teacher-hidden 4096 --device cuda` : of `linear_kl_div`, with a teacher
"""

_ESTIMATE_HELP = """
Say on paper what an output head and its loss cost: memory, time, bytes moved, the largest batch.

Nothing is computed and no GPU is needed. For plain PyTorch, chunks, cut-cross-entropy and crosscut
it adds up what each holds on a rank at its peak, with every term by name. Times are the logits
matmul's times the ratios that the bench measured on one H100; the result of the nearest shape is
taken and named. What is not known is said to be unknown.

A model's name stands for its D, V, layers and number of parameters. `--tokens` is per rank;
`--tensor-parallel` ranks share the vocabulary and see the same tokens, `--data-parallel` groups of
them have tokens of their own. The largest N counts weights, gradients, Adam's two moments, what
enters each layer, and the head.

**Examples**

- `crosscut estimate --model llama3-8b --tokens 8192`
- `crosscut estimate --tensor-parallel 4 --data-parallel 4 --fsdp --bandwidth 450`
- `crosscut estimate --hidden 2048 --vocab 151936 --layers 28 --parameters 1720000000`
- `crosscut estimate --model gemma2-2b --json cost.json --plot cost.png`
- `crosscut estimate --paper` : how many tokens fit on 16 GPUs with logits and without, 15 models
"""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"crosscut {crosscut.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Print the version."),
    ] = False,
) -> None:
    del version  # printed by its callback


@app.command(help=_BENCH_HELP)
def bench(
    workload: Annotated[
        str, typer.Option(help="A model's name, or random:N=..,D=..,V=..; see --list.")
    ] = "gemma3-270m",
    tokens: Annotated[
        int | None, typer.Option(help="Number of tokens N.", show_default="1024")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="Whom to run beside crosscut: names with commas between, default, all or none."
        ),
    ] = "default",
    logits_times: Annotated[float, typer.Option(help="Factor of every logit.")] = 1.0,
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed runs of each contender.", show_default="5 on a CPU, 20 on a GPU"),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the result to this file (.png, .svg, .pdf).")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show workloads and contenders, and stop.")
    ] = False,
) -> None:
    """See ``_BENCH_HELP``."""
    if list_:
        _list()
        return
    try:
        device = _device(device)
        _check_output("--json", json)
        _check_output("--plot", plot)
        repeats = (5 if device == "cpu" else 20) if repeats is None else repeats
        if repeats < 1:
            raise BenchError(f"--repeats must be at least 1, got {repeats}")
        chosen, left_out = contenders.choose(against, device, dtype)
        request = workloads.WorkloadRequest(
            name=workload, tokens=tokens, dtype=dtype, device=device, logits_times=logits_times
        )
        plan = Plan(contenders=chosen, left_out=left_out, repeats=repeats, command=_command())
        bars = Bars()
        result = run(workloads.make(request, bars), plan, bars)
    except (BenchError, OSError) as error:
        _fail(error)
    Console().print(reports.table(result))
    _write(result, json, plot)
    if result.failed:
        Console(stderr=True).print("A contender's answer was wrong: see FAILED above.", style="red")
        raise typer.Exit(EXIT_FAILED_GATE)


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="What crosscut bench --json wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Draw it to this file as well.")] = None,
) -> None:
    """Print a result of the bench as a Markdown table.

    Example: `crosscut report benchmarks/results/gemma3-270m.json --plot gemma3-270m.png`
    """
    try:
        _check_output("--plot", plot)
        loaded = results.load(result)
        print(reports.markdown(loaded))
        if plot is not None:
            reports.plot(loaded, plot)
            _written("Plot", plot)
    except (BenchError, OSError) as error:
        _fail(error)


@app.command("tune", help=_TUNE_HELP)
def tune_(
    workload: Annotated[
        str, typer.Option(help="A model's name, or random:N=..,D=..,V=..; see bench --list.")
    ] = "gemma3-270m",
    hidden_size: Annotated[
        int | None, typer.Option(help="Hidden size D, in place of the workload's.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Vocabulary V, in place of the workload's.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Number of tokens N of a step.")] = 8192,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    repeats: Annotated[int, typer.Option(help="Timed runs of each alternative.")] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Keep nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print what is kept, and stop.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what is kept, and stop.")] = False,
) -> None:
    """See ``_TUNE_HELP``."""
    try:
        if reset:
            tuned.path().unlink(missing_ok=True)
            print(f"{tuned.path()} is gone: crosscut takes its tiles from its table.")
            return
        if show:
            _show_tuned()
            return
        if reason := tune.unsupported_reason():
            raise BenchError(f"crosscut tune cannot run on this machine: {reason}")
        if repeats < 1:
            raise BenchError(f"--repeats must be at least 1, got {repeats}")
        if not dry_run:
            writable_cache_directory()  # now, not after minutes
        bars = Bars()
        request = workloads.WorkloadRequest(
            name=workload, tokens=tokens, dtype=dtype, device="cuda",
            hidden=hidden_size, vocab=vocab_size,
        )  # fmt: skip
        load = workloads.make(request, bars)
        meter = tune.GpuMeter(load, repeats, bars)
        found = tune.search(tune.plan_for(load), meter, bars)
        Console().print(tune.table(load, found))
        entries = tune.winners(load, found)
        if dry_run:
            print("Nothing kept: --dry-run.")
        else:
            print(f"{len(entries)} of {len(found)} kernels kept in {tune.store(load, entries)}")
    except (BenchError, OSError) as error:
        _fail(error)


@app.command(help=_EXPLAIN_HELP)
def explain(
    tokens: Annotated[int, typer.Option(help="Number of tokens N.")] = 8192,
    hidden: Annotated[int, typer.Option(help="Hidden size D.")] = 2304,
    vocab: Annotated[int, typer.Option(help="Vocabulary V.")] = 256_000,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ..")] = "cpu",
    policy: Annotated[str, typer.Option(help="The gradient's policy.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, or the backend that must serve it.")] = "auto",
    softcap: Annotated[float | None, typer.Option(help="Softcap of the logits.")] = None,
    teacher_hidden: Annotated[
        int | None, typer.Option(help="Hidden size of a teacher: explain linear_kl_div.")
    ] = None,
    teacher_dtype: Annotated[
        str | None, typer.Option(help="The teacher's dtype.", show_default="--dtype")
    ] = None,
) -> None:
    """See ``_EXPLAIN_HELP``."""
    sizes = {"--tokens": tokens, "--hidden": hidden, "--vocab": vocab}
    if teacher_hidden is not None:
        sizes["--teacher-hidden"] = teacher_hidden
    dtypes = {"--dtype": dtype, "--teacher-dtype": teacher_dtype or dtype}
    try:
        for name, size in sizes.items():
            if size < 1:
                raise BenchError(f"{name} must be at least 1, got {size}")
        for name, given in dtypes.items():
            if given not in workloads.DTYPES:
                raise BenchError(
                    f"{name} must be one of {', '.join(workloads.DTYPES)}, got {given!r}"
                )
        if teacher_hidden is None and teacher_dtype is not None:
            raise BenchError("--teacher-dtype needs --teacher-hidden")
        if teacher_hidden is not None and policy != "auto":
            raise BenchError(
                f"--policy is of no use with --teacher-hidden, got {policy!r}: linear_kl_div "
                "computes everything"
            )
        try:
            torch.device(device)
        except RuntimeError as error:
            raise BenchError(f"--device must be a device of PyTorch, got {device!r}") from error
        with FakeTensorMode(), torch.device(device):  # shapes and dtypes, without memory
            input, linear_weight = _empty_head(tokens, hidden, vocab, dtype)
            if teacher_hidden is not None:
                teacher = _empty_head(tokens, teacher_hidden, vocab, teacher_dtype or dtype)
                explanation = crosscut.explain_kl_div(
                    input, linear_weight, *teacher, softcap=softcap, backend=backend
                )
            else:
                explanation = crosscut.explain(
                    input,
                    linear_weight,
                    torch.empty(tokens, dtype=torch.int64),
                    softcap=softcap,
                    policy=policy,  # pyright: ignore[reportArgumentType]
                    backend=backend,
                )
    except (BenchError, ValueError, TypeError) as error:
        _fail(error)
    absent = device.startswith("cuda") and not torch.cuda.is_available()
    where = f"{device}, which is not here" if absent else device
    print(f"N={tokens}, D={hidden}, V={vocab}, {dtype} on {where}, ", end="")
    if teacher_hidden is not None:
        print(f"teacher D={teacher_hidden}, {teacher_dtype or dtype}")
    else:
        print(f"policy={policy}")
    print(explanation)
    if explanation.backend is None:
        raise typer.Exit(EXIT_FAILED_GATE)


@app.command(help=_ESTIMATE_HELP)
def estimate(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(estimates.MODELS)}.")
    ] = estimates.DEFAULT_MODEL,
    tokens: Annotated[int, typer.Option(help="Number of tokens N of a rank.")] = 8192,
    hidden: Annotated[
        int | None, typer.Option(help="Hidden size D, in place of the model's.")
    ] = None,
    vocab: Annotated[
        int | None, typer.Option(help="Vocabulary V, in place of the model's.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers, in place of the model's.")] = None,
    parameters: Annotated[
        int | None, typer.Option(help="Number of parameters, in place of the model's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share the vocabulary.")] = 1,
    data_parallel: Annotated[
        int, typer.Option(help="Groups of such ranks, each with tokens of its own.")
    ] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="The groups share weights, gradients and moments.")
    ] = False,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s that a rank sends, for times of what moves.")
    ] = None,
    memory: Annotated[
        float, typer.Option(help="GiB of a rank; 75 are what a card of 80 GB leaves.")
    ] = estimates.CARD_GIB,
    json: Annotated[Path | None, typer.Option(help="Write the estimate to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it to this file (.png, .svg, .pdf).")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Print the paper's table, and stop.")
    ] = False,
) -> None:
    """See ``_ESTIMATE_HELP``."""
    if paper:
        Console().print(estimate_report.paper(estimates.paper_table()))
        return
    try:
        _check_output("--json", json)
        _check_output("--plot", plot)
        request = estimates.request_for(
            model, tokens, hidden=hidden, vocab=vocab, layers=layers, parameters=parameters,
            dtype=dtype, tensor_parallel=tensor_parallel, data_parallel=data_parallel, fsdp=fsdp,
            bandwidth=bandwidth, memory=memory,
        )  # fmt: skip
        found = estimates.estimate(request)
        name = estimates.name_of(model, request)
        Console().print(estimate_report.show(name, found))
        if json is not None:
            json.write_text(json_.dumps(asdict(found), indent=1) + "\n")
            _written("Estimate", json)
        if plot is not None:
            estimate_report.plot(name, found, plot)
            _written("Plot", plot)
    except (BenchError, OSError) as error:
        _fail(error)


@app.command()
def env() -> None:
    """Print versions and devices: paste it into a bug report."""
    machine = results.this_machine()
    memory = machine.memory_bytes
    packages = {contender.package for contender in contenders.everyone().values()} - {"torch"}
    packages |= {"triton", "numpy", "transformers"}
    lines = {
        "crosscut": f"{crosscut.__version__} (commit {results.commit() or 'unknown'})",
        "backends": ", ".join(NAMES),
        "python": f"{machine.python} on {machine.system}",
        "cpu": f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used",
        "memory": "unknown" if memory is None else f"{memory / 2**30:.1f} GiB",
        "torch": machine.torch,
        "cuda": torch.version.cuda or "not in this build of PyTorch",
        "gpu": machine.gpu or "none",
        **{name: results.package_version(name) or "not installed" for name in sorted(packages)},
    }
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))


def main() -> None:
    """The entry point of ``crosscut`` and of ``python -m crosscut``."""
    app(prog_name="crosscut")


def _empty_head(tokens: int, hidden: int, vocab: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Hidden states and weight, on the default device."""
    torch_dtype = workloads.DTYPES[dtype]
    return torch.empty(tokens, hidden, dtype=torch_dtype), torch.empty(
        vocab, hidden, dtype=torch_dtype
    )


def _list() -> None:
    """What ``bench --list`` prints."""
    models = Table("workload", "hidden D", "vocabulary V", "logits", title="Workloads")
    for name, shape in workloads.MODELS.items():
        source = "Gemma 3 270M on real text" + (", rotated" if name != "gemma3-270m" else "")
        models.add_row(name, str(shape.hidden), str(shape.vocab), source)
    models.add_row("random:N=..,D=..,V=..", "D", "V", "Gaussian: flat, unlike a trained model's")
    people = Table("contender", "what it is", "version", title="Contenders")
    for contender in contenders.everyone().values():
        people.add_row(contender.name, contender.what, contender.version or "not installed")
    console = Console()
    console.print(models, people)


def _show_tuned() -> None:
    """What ``tune --show`` prints."""
    try:
        kept = tuned.read()
    except (OSError, ValueError) as error:
        raise BenchError(
            f"{tuned.path()} cannot be used: {error}. Forget it with crosscut tune --reset"
        ) from error
    print(f"{tuned.path()}: {len(kept)} entries")
    here = (
        None
        if tune.unsupported_reason()
        else tuned.here(torch.device("cuda", torch.cuda.current_device()))
    )
    for winner in kept:
        kernel, dtype, tf32, hidden_size = winner.key
        used = "used here" if winner.place == here else "not used here"
        print(
            f"\n{kernel}, {dtype}{' as tf32' if tf32 else ''}, D={hidden_size}: "
            f"{tune.words(winner.sizes)}\n  {winner.measured}\n"
            f"  {winner.place.gpu}, Triton {winner.place.triton}, "
            f"kernels {winner.place.kernels}: {used}"
        )


def _device(name: str | None) -> str:

    here = torch.cuda.is_available()
    if name is None:
        return "cuda" if here else "cpu"
    if name not in ("cpu", "cuda"):
        raise BenchError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not here:
        raise BenchError("--device is cuda, but PyTorch sees no CUDA device here")
    return name


def _check_output(option: str, path: Path | None) -> None:
    """Find out before the minutes, not after."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise BenchError(f"{option} must be in a directory that exists, got {path}")
    if path.is_dir():
        raise BenchError(f"{option} must be a file, got {path}, a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BenchError(f"{option} must be a file that can be written, got {path}")
    if option != "--plot":
        return
    if path.suffix.lower() not in reports.PLOT_FORMATS:
        formats = ", ".join(reports.PLOT_FORMATS)
        raise BenchError(f"--plot must end in one of {formats}, got {path}")
    if find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'crosscut[bench]'")


def _write(result: BenchResult, json: Path | None, plot: Path | None) -> None:
    """Write what was asked for. Minutes of work are not lost to a disk that is full."""
    try:
        if json is not None:
            results.save(result, json)
            _written("Result", json)
        if plot is not None:
            reports.plot(result, plot)
            _written("Plot", plot)
    except OSError as error:
        handle, kept = tempfile.mkstemp(prefix="crosscut-", suffix=".json")
        os.close(handle)
        results.save(result, Path(kept))
        _fail(BenchError(f"{error}. The result is kept in {kept}: see crosscut report --help"))


def _written(what: str, path: Path) -> None:
    print(f"{what} written to {path}", file=sys.stderr)


def _command() -> str:
    return shlex.join(["crosscut", *sys.argv[1:]])


def _fail(error: Exception) -> NoReturn:
    words = Text.assemble(("Error:", "bold red"), f" {error}")  # whose brackets are no markup
    Console(stderr=True).print(words, soft_wrap=True)
    raise typer.Exit(EXIT_USAGE)
