#!/usr/bin/env python3
"""Does a loss train? A small language model from random weights, once for each loss and seed.

Early in a training the softmax is flat: hardly any entry of it is large, and a gradient that leaves
out the small ones leaves out nearly all of it. Whether that matters shows in the validation loss.

The model is a decoder-only transformer whose tied embedding and head, of a full vocabulary, hold
nearly all of its weights. Runs of the same seed start from the same weights and see the same
batches, whatever the loss. Every loss is given the same bfloat16 hidden states and head; one judge,
plain PyTorch in float32, computes every validation loss.

    python examples/pretrain.py train corpus.npz --out pretrain.json
    python examples/pretrain.py plot pretrain.json pretrain.png
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich import progress
from rich.console import Console
from torch import Tensor, nn

import crosscut
from crosscut.bench.results import Machine, commit, this_machine
from crosscut.options import POLICIES, GradientPolicy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
PYTORCH = "pytorch"
LOSSES = (*POLICIES, PYTORCH)
REFERENCE = "exact"
"""The loss that the others are compared with."""

HEAD_SIZE = 64
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
LAST_RATE = 0.1
"""Share of the learning rate that is left at the end."""
JUDGED_AT_ONCE = 512
"""Validation tokens whose float32 logits are in memory together."""

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From hidden states [N, D], head [V, D] and labels [N] to the mean loss."""


# ---------------------------------------------------------------------------------- what is written


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of a file have in common.

    Attributes:
        steps: optimiser steps of a run.
        tokens: tokens of a batch.
        context: tokens of a sequence.
        vocab: classes V.
        hidden: hidden size D.
        layers: blocks of the transformer.
        learning_rate: the highest learning rate.
        eval_every: steps between two validations.
        val_batches: batches of validation tokens, spread evenly over them.
    """

    steps: int
    tokens: int
    context: int
    vocab: int
    hidden: int
    layers: int
    learning_rate: float
    eval_every: int
    val_batches: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.tokens % self.context:
            raise ValueError(
                f"tokens must be a multiple of the context of {self.context}, got {self.tokens}"
            )
        if self.hidden % HEAD_SIZE:
            raise ValueError(f"hidden must be a multiple of {HEAD_SIZE}, got {self.hidden}")

    @property
    def sequences(self) -> int:
        """Sequences of a batch."""
        return self.tokens // self.context


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """Which text it was: sizes, and a digest of all ids."""

    train_tokens: int
    val_tokens: int
    distinct: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """One call of this script, and where and with which code it ran."""

    command: str
    commit: str | None
    crosscut: str
    machine: Machine


def this_invocation() -> Invocation:
    """The call that this is."""
    return Invocation(
        command=shlex.join(["python", *sys.argv]),
        commit=commit(),
        crosscut=crosscut.__version__,
        machine=this_machine(),
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """A validation.

    Attributes:
        step: optimiser steps taken before it.
        train_loss: what the loss itself said, mean over the steps since the point before.
        val_loss: what the judge says.
        step_s: seconds of a step, mean over the steps since the point before.
        peak_bytes: peak GPU memory in these steps, with text, weights and optimiser.
    """

    step: int
    train_loss: float | None = None
    val_loss: float
    step_s: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        loss: by name.
        seed: of the weights and of the order of the batches.
        invocation: number of the call that made it.
        points: its validations, the first before any step.
    """

    loss: str
    seed: int
    invocation: int
    points: tuple[Point, ...]

    @property
    def val_loss(self) -> float:
        """The last one."""
        return self.points[-1].val_loss

    @property
    def step_s(self) -> float:
        """Median seconds of a step, without those before its first validation: they compile."""
        times = [point.step_s for point in self.points if point.step_s is not None]
        return median(times[1:] or times)

    @property
    def peak_bytes(self) -> int | None:
        """Peak GPU memory, or None without a GPU."""
        return max((point.peak_bytes for point in self.points if point.peak_bytes), default=None)


@dataclass(kw_only=True)
class Results:
    """A file of runs, to which later calls add theirs."""

    settings: Settings
    corpus: CorpusSummary
    invocations: list[Invocation] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it, or leave what was there if that fails."""
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        new.replace(path)

    @staticmethod
    def load(path: Path) -> Results:
        """Read what :meth:`save` wrote."""
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} must be a result of this script: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} must be a result of this script, of format {FORMAT}")
        return Results(
            settings=Settings(**data["settings"]),
            corpus=CorpusSummary(**data["corpus"]),
            invocations=[
                Invocation(**{**call, "machine": Machine(**call["machine"])})
                for call in data["invocations"]
            ],
            runs=[
                Run(**{**run, "points": tuple(Point(**point) for point in run["points"])})
                for run in data["runs"]
            ],
        )

    def of(self, loss: str) -> dict[int, Run]:
        """The runs of a loss, by seed."""
        return {run.seed: run for run in self.runs if run.loss == loss}

    def losses(self) -> list[str]:
        """Those that have runs, in the order of :data:`LOSSES`."""
        return [loss for loss in LOSSES if self.of(loss)]


# --------------------------------------------------------------------------------------- the corpus


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token ids, int64, on the device."""

    train: Tensor
    val: Tensor
    summary: CorpusSummary


def load_corpus(path: Path, settings: Settings, device: torch.device) -> Corpus:
    """Read the arrays ``train`` and ``val`` of an .npz file."""
    try:
        with np.load(path) as file:
            ids = {name: file[name] for name in ("train", "val")}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} must be an .npz file with arrays train and val: {error}"
        ) from error
    digest = hashlib.sha256()
    for name, array in ids.items():
        if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) <= settings.context:
            raise ValueError(
                f"{name} must hold more than {settings.context} integers in one dimension, "
                f"got {array.dtype} {array.shape}"
            )
        if array.min() < 0 or array.max() >= settings.vocab:
            raise ValueError(
                f"{name} must hold token ids in [0, {settings.vocab}), got "
                f"{array.min()} to {array.max()}"
            )
        digest.update(array.astype("<i4").tobytes())
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in ids.items()}
    return Corpus(
        **{name: tensor.to(device) for name, tensor in tensors.items()},
        summary=CorpusSummary(
            train_tokens=len(ids["train"]),
            val_tokens=len(ids["val"]),
            distinct=len(np.unique(np.concatenate(list(ids.values())))),
            sha256=digest.hexdigest(),
        ),
    )


# ---------------------------------------------------------------------------------------- the model


def normalise(x: Tensor) -> Tensor:
    """Root mean square 1 over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions: ``turn`` holds the cosines and sines, [2, context, HEAD_SIZE / 2]."""
    left, right = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1).to(x.dtype)


class Block(nn.Module):
    """Attention, then an MLP, each with its input normalised."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attended = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:  # [sequences, context, D]
        heads = self.query_key_value(normalise(x)).unflatten(-1, (3, -1, HEAD_SIZE))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [sequences, heads, context, HEAD_SIZE]
        query, key = rotate(query, turn), rotate(key, turn)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(normalise(x))))


class Transformer(nn.Module):
    """Float32 weights, multiplied in bfloat16 (autocast). The head is the embedding."""

    turn: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(settings.vocab, settings.hidden)
        self.blocks = nn.ModuleList(Block(settings.hidden) for _ in range(settings.layers))
        speeds = 10_000 ** -torch.linspace(0, 1, HEAD_SIZE // 2)
        angles = torch.arange(settings.context)[:, None] * speeds
        self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """New random weights, in place."""
        weight = self.embedding.weight
        random = torch.Generator(weight.device).manual_seed(seed)
        weight.normal_(std=0.02, generator=random)
        for block in self.blocks:
            for matrix in block.parameters():
                matrix.normal_(std=matrix.shape[1] ** -0.5, generator=random)

    def forward(self, ids: Tensor) -> Tensor:
        """From ids [sequences, context] to bfloat16 hidden states [N, D]."""
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            x = normalise(self.embedding(ids))
            for block in self.blocks:
                x = block(x, self.turn)
        return normalise(x).flatten(0, 1).bfloat16()

    def head(self) -> Tensor:
        """The weight of the output head [V, D], bfloat16."""
        return self.embedding.weight.bfloat16()


@cache
def loss_function(name: str, device: torch.device) -> LossFunction:
    """A policy of crosscut, or PyTorch's own: compiled where that is fast."""
    if name != PYTORCH:
        policy = cast(GradientPolicy, name)
        return partial(crosscut.linear_cross_entropy, policy=policy)

    def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, head), labels)

    return torch.compile(plain, dynamic=False) if device.type == "cuda" else plain


# ------------------------------------------------------------------------------------- the training


class Trainer:
    """Trains one model again and again. It is compiled once, block by block, on a GPU."""

    def __init__(self, settings: Settings, corpus: Corpus, device: torch.device) -> None:
        self.settings, self.corpus, self.device = settings, corpus, device
        self.model = Transformer(settings).to(device)
        self.offsets = torch.arange(settings.context + 1, device=device)
        if device.type == "cuda":
            for block in self.model.blocks:
                block.compile(fullgraph=True, dynamic=False)

    def points(self, loss: str, seed: int, advance: Callable[[], None]) -> Iterator[Point]:
        """Train, and stop at each validation to say how it stands."""
        settings, train = self.settings, self.corpus.train
        self.model.initialise(seed)
        compute_loss = loss_function(loss, self.device)
        optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate)
        order = torch.Generator().manual_seed(seed)
        starts = torch.randint(
            len(train) - settings.context, (settings.steps, settings.sequences), generator=order
        ).to(self.device)

        yield Point(step=0, val_loss=self.judge())
        last, began = 0, self._begin()
        total = torch.zeros((), device=self.device)
        for step in range(1, settings.steps + 1):
            ids, labels = self._batch(train, starts[step - 1])
            value = compute_loss(self.model(ids), self.model.head(), labels)
            value.backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            total += value.detach()
            advance()
            if step % settings.eval_every == 0 or step == settings.steps:
                steps, train_loss = step - last, total.item()  # which waits for the device
                step_s = (time.perf_counter() - began) / steps
                peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
                yield Point(
                    step=step,
                    train_loss=train_loss / steps,
                    val_loss=self.judge(),
                    step_s=step_s,
                    peak_bytes=peak,
                )
                total.zero_()
                last, began = step, self._begin()

    @torch.no_grad()
    def judge(self) -> float:
        """The validation loss: plain PyTorch in float32, on the head as every loss is given it."""
        settings, val = self.settings, self.corpus.val
        head = self.model.head().float()
        sequences = settings.val_batches * settings.sequences
        starts = torch.arange(sequences) * (len(val) - settings.context) // sequences
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in starts.to(self.device).split(settings.sequences):
            ids, labels = self._batch(val, batch)
            parts = (tensor.split(JUDGED_AT_ONCE) for tensor in (self.model(ids), labels))
            for hidden, targets in zip(*parts, strict=True):
                logits = F.linear(hidden.float(), head)
                total += F.cross_entropy(logits, targets, reduction="sum")
        return total.item() / (settings.val_batches * settings.tokens)

    def _batch(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [sequences, context] from each start, and the labels [N]: the ids one further."""
        windows = text[starts[:, None] + self.offsets]
        return windows[:, :-1], windows[:, 1:].flatten()

    def _rate(self, step: int) -> float:
        """Share of the learning rate: up in a line, down in half a cosine."""
        warm_up = math.ceil(WARM_UP * self.settings.steps)
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.settings.steps - warm_up)
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2

    def _begin(self) -> float:
        """The time, and from here on the peak memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()


# ---------------------------------------------------------------------------------- what it came to


def table(results: Results) -> str:
    """The end of every run, in Markdown."""
    settings, reference = results.settings, results.of(REFERENCE)
    headings = (
        "loss", "seeds", "final validation loss", f"minus {REFERENCE}", "ms a step", "peak memory",
    )  # fmt: skip
    rows = [headings, ("---", *["---:"] * (len(headings) - 1))]
    for loss in results.losses():
        runs = results.of(loss)
        pairs = [run.val_loss - reference[seed].val_loss
                 for seed, run in runs.items() if seed in reference]  # fmt: skip
        peaks = [run.peak_bytes for run in runs.values() if run.peak_bytes is not None]
        rows.append((
            loss,
            str(len(runs)),
            _mean_and_deviation([run.val_loss for run in runs.values()]),
            _mean_and_its_error(pairs) if loss != REFERENCE else "",
            f"{1000 * median(run.step_s for run in runs.values()):.4g}",
            f"{max(peaks) / 2**20:,.0f} MiB" if peaks else "",
        ))  # fmt: skip
    where = {f"{call.machine.gpu or call.machine.cpu}, PyTorch {call.machine.torch}"
             for call in results.invocations}  # fmt: skip
    notes = [
        f"{settings.steps} steps of {settings.tokens} tokens, V={settings.vocab}, "
        f"D={settings.hidden}, {settings.layers} layers; {'; '.join(sorted(where))}.",
        f"Losses in nats a token: mean ± standard deviation over seeds. Minus {REFERENCE}: mean "
        "difference between runs of the same seed ± its standard error.",
    ]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", *notes])


def plot(results: Results, path: Path) -> None:
    """Draw the validation losses, and beside them what each differs by from the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    reference = results.of(REFERENCE)
    colours = {loss: f"C{number}" for number, loss in enumerate(LOSSES)} | {REFERENCE: "black"}
    for loss in results.losses():
        runs = results.of(loss)
        curves = [[point.val_loss for point in run.points] for run in runs.values()]
        steps = [point.step for point in next(iter(runs.values())).points]
        label = f"{loss} ({len(runs)} seed{'s'[: len(runs) > 1]})"
        _draw(left, steps, curves, label, colours[loss])
        differences = [
            [mine.val_loss - other.val_loss
             for mine, other in zip(run.points, reference[seed].points, strict=True)]
            for seed, run in runs.items() if seed in reference
        ]  # fmt: skip
        if differences:
            _draw(right, steps, differences, label, colours[loss])

    for axes in (left, right):
        axes.set_xlabel(f"step ({results.settings.tokens:,} tokens each)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_xlim(0, results.settings.steps)
    left.set_ylabel("validation loss (nats per token)")
    left.set_title("mean over seeds, band: ± standard deviation", fontsize=10)
    left.legend(frameon=False)
    right.set_yscale("symlog", linthresh=0.01)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_ylabel(f"validation loss − {REFERENCE}'s (nats per token)")
    right.set_title("same seeds; below ±0.01 the axis is linear, above logarithmic", fontsize=10)
    settings = results.settings
    figure.suptitle(
        f"Training from random weights, V={settings.vocab:,}, D={settings.hidden}, "
        f"{settings.layers} layers"
    )
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _draw(axes: Axes, steps: list[int], curves: list[list[float]], label: str, colour: Any) -> None:
    """A mean, and a standard deviation to both sides."""
    values = np.array(curves)
    mean = values.mean(0)
    dashed = "--" if label.startswith(PYTORCH) else "-"  # it may lie on another
    axes.plot(steps, mean, dashed, color=colour, label=label, linewidth=1.6)
    if len(curves) > 1:
        spread = values.std(0, ddof=1)
        axes.fill_between(
            steps, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0
        )


def _mean_and_deviation(values: list[float]) -> str:
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread}"


def _mean_and_its_error(values: list[float]) -> str:
    if not values:
        return ""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):+.4f}{error}"


# --------------------------------------------------------------------------------- the command line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help=__doc__,
)


@app.command("train")
def train_command(
    corpus: Annotated[Path, typer.Argument(help="An .npz file of token ids: train and val.")],
    out: Annotated[Path, typer.Option(help="The result, JSON. Runs in it are not made again.")],
    losses: Annotated[
        str, typer.Option(help=f"With commas between: {', '.join(LOSSES)}.")
    ] = "auto,exact,cce,cce_kahan_full_c,pytorch",
    seeds: Annotated[str, typer.Option(help="With commas between.")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="Optimiser steps of a run.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 4096,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    vocab: Annotated[int, typer.Option(help="Classes of the head.")] = 262_144,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 192,
    layers: Annotated[int, typer.Option(help="Blocks of the transformer.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-3,
    eval_every: Annotated[int, typer.Option(help="Steps between two validations.")] = 50,
    val_batches: Annotated[int, typer.Option(help="Batches of a validation.")] = 8,
) -> None:
    """Train with each loss and each seed, and add the runs to a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = dict.fromkeys((loss, seed) for seed in _seeds(seeds) for loss in _losses(losses))
        settings = Settings(
            steps=steps, tokens=tokens, context=context, vocab=vocab, hidden=hidden,
            layers=layers, learning_rate=learning_rate,
            eval_every=eval_every, val_batches=val_batches,
        )  # fmt: skip
        if not out.parent.is_dir():
            raise ValueError(f"--out must be in a directory that exists, got {out}")
        text = load_corpus(corpus, settings, device)
        results = _open(out, settings, text.summary)
    except ValueError as error:
        _fail(error)
    missing = [(loss, seed) for loss, seed in wanted if seed not in results.of(loss)]
    if missing:
        results.invocations.append(this_invocation())
        _train_all(missing, Trainer(settings, text, device), results, out)
    print(table(results))


@app.command("plot")
def plot_command(
    result: Annotated[Path, typer.Argument(help="What train wrote.")],
    image: Annotated[Path, typer.Argument(help="Draw it to this file (.png, .svg, .pdf).")],
) -> None:
    """Draw the validation losses of a result, and print its table."""
    try:
        results = Results.load(result)
    except ValueError as error:
        _fail(error)
    plot(results, image)
    print(table(results))


def _train_all(
    wanted: list[tuple[str, int]], trainer: Trainer, results: Results, out: Path
) -> None:
    """Make the runs, show how far they are, and save each when it is done."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=16),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left, {task.fields[words]}", style="dim"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=len(wanted) * trainer.settings.steps, words="compiling")
        for loss, seed in wanted:
            bars.update(task, description=f"{loss}, seed {seed}")
            points = []
            for point in trainer.points(loss, seed, partial(bars.advance, task)):
                points.append(point)
                bars.update(task, words=f"loss {point.val_loss:.3f}")
            call = len(results.invocations) - 1
            run = Run(loss=loss, seed=seed, invocation=call, points=tuple(points))
            results.runs.append(run)
            results.save(out)
            time_ = f"{1000 * run.step_s:.4g} ms a step"
            bars.print(f"{loss}, seed {seed}: validation loss {run.val_loss:.4f}, {time_}")


def _open(path: Path, settings: Settings, corpus: CorpusSummary) -> Results:
    """The file to add to, or a new one."""
    if not path.exists():
        return Results(settings=settings, corpus=corpus)
    results = Results.load(path)
    for ours, theirs in ((settings, results.settings), (corpus, results.corpus)):
        for name, value in asdict(ours).items():
            found = getattr(theirs, name)
            if found != value:
                raise ValueError(f"{path} holds runs of {name} {found}, these are of {value}")
    return results


def _losses(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"--losses must name some of {', '.join(LOSSES)}, got {name!r}")
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds must be integers with commas between, got {text!r}") from error


def _fail(error: Exception) -> NoReturn:
    Console(stderr=True).print(f"[bold red]Error:[/] {error}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
