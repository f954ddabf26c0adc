"""How an estimate is shown: tables on the terminal, and a plot."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from crosscut.bench.estimate import (
    GIB,
    MIB,
    PAPER_TOKENS,
    Collective,
    Estimate,
    PaperRow,
)
from crosscut.bench.report import seconds

PLOTTED = (
    ("head's weight", "#8a94a0"),
    ("its gradient", "#b9c0c8"),
    ("hidden states and their gradient", "#dfe3e7"),
    ("workspace", "#c1440e"),
)


def show(name: str, found: Estimate) -> RenderableType:
    """For the terminal."""
    parts: list[RenderableType] = [
        Text(title(name, found), style="bold"),
        Text(layout(found)),
        Text(),
        _of_rank(found),
        Text(),
        _methods(found),
        Text(),
        _workspaces(found),
        Text(),
    ]
    if found.collectives:
        parts += [_moved(found), Text()]
    return Group(*parts, *(Text(line, style="dim") for line in (*found.notes, *_sources(found))))


def title(name: str, found: Estimate) -> str:
    """What it is of, in a line."""
    asked = found.request
    more = "" if asked.layers is None else f", {asked.layers} layers"
    if asked.parameters is not None:
        more += f", {asked.parameters:,} parameters"
    return f"{name}: N={asked.tokens}, D={asked.hidden}, V={asked.vocab}, {asked.dtype}{more}"


def layout(found: Estimate) -> str:
    """The ranks, in a line."""
    asked = found.request
    shards, groups = asked.tensor_parallel, asked.data_parallel
    ranks = shards * groups
    words = [f"{ranks} rank{'s' if ranks > 1 else ''} of {asked.memory:g} GiB"]
    if shards > 1:
        words.append(f"{shards} share the vocabulary, {found.vocab} classes each")
    if groups > 1:
        whole = f"{groups} groups with N tokens each"
        words.append(whole + (", which share the weights (FSDP)" if asked.fsdp else ""))
    return "; ".join(words)


def paper(rows: list[PaperRow]) -> RenderableType:
    """The paper's table."""
    grid = _grid("model", "logits", "activations", "weights, gradients,\nAdam", "tokens\nbefore",
                 "after", "increase")  # fmt: skip
    for row in rows:
        grid.add_row(
            row.model.title,
            *(f"{size / MIB:,.0f}" for size in
              (row.logits_bytes, row.activation_bytes, row.state_bytes)),
            f"{row.before:,}",
            f"{row.after:,}",
            f"{row.after / row.before:.1f} x",
        )  # fmt: skip
    words = (
        f"MB of 2^20 bytes, the first two of {PAPER_TOKENS} tokens. Tokens that fit on 16 GPUs of "
        "75 GiB which share weights, gradients and Adam's moments: beside their float32 logits, "
        "and without any. Arithmetic, as in Figure 1 and Table A4 of arXiv:2411.09009; nothing "
        "of it was measured."
    )
    return Group(grid, Text(), Text(words, style="dim"))


def plot(name: str, found: Estimate, path: Path) -> None:
    """A stacked bar per method: what the head and its loss take of a rank at most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = [cost for cost in found.costs if cost.workspace_bytes is not None]
    known.sort(key=lambda cost: -(cost.peak_bytes or 0))
    names = [cost.method for cost in known]
    figure, axes = pyplot.subplots(figsize=(9, 1.9 + 0.42 * len(known)), layout="constrained")
    begin = [0.0] * len(known)
    sizes = (found.weight_bytes, found.weight_bytes, 2 * found.hidden_bytes)
    for place, (what, color) in enumerate(PLOTTED):
        widths = [
            (sizes[place] if place < len(sizes) else cost.workspace_bytes or 0) / GIB
            for cost in known
        ]
        axes.barh(names, widths, left=begin, color=color, label=what)
        begin = [at + width for at, width in zip(begin, widths, strict=True)]
    for place, end in enumerate(begin):
        axes.annotate(f"{end:.2f}", (end, place), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axes.set_xlabel("GiB of a rank")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    figure.suptitle(title(name, found), fontsize=11, x=0.01, ha="left")
    figure.text(0.01, -0.02, f"{layout(found)}. Estimated: crosscut estimate", fontsize=8,
                color="#555555", ha="left", va="top")  # fmt: skip
    figure.savefig(path, dpi=160, bbox_inches="tight")
    pyplot.close(figure)


def _grid(*headings: str) -> Table:
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold underline")
    for number, heading in enumerate(headings):
        grid.add_column(heading, justify="right" if number else "left", overflow="fold")
    return grid


def _of_rank(found: Estimate) -> Table:
    asked = found.request
    grid = _grid("on each rank", "MiB")
    whole = "the head" if asked.parameters is None else "the model"
    for what, size in (
        ("head's weight" + (", gathered" if asked.fsdp else ""), found.weight_bytes),
        ("its gradient", found.weight_bytes),
        ("hidden states", found.hidden_bytes),
        ("their gradient", found.hidden_bytes),
        ("(logits, if they were stored)", found.logits_bytes),
        (f"its part of weights, gradients and Adam of {whole}", found.state_bytes),
        ("activations: what enters each layer", found.activation_bytes),
    ):
        if size:
            grid.add_row(what, _mib(size))
    return grid


def _methods(found: Estimate) -> Table:
    memory = f"{found.request.memory:g}"
    grid = _grid("method", "workspace\nMiB", "with weight,\ngradients", "÷\nmatmul", "forward,\n"
                 "backward", f"largest N\nin {memory} GiB")  # fmt: skip
    grid.add_row("(logits matmul)", "", "", "", seconds(found.matmul_seconds), "", style="dim")
    for cost in found.costs:
        grid.add_row(
            cost.method,
            "unknown" if cost.workspace_bytes is None else _mib(cost.workspace_bytes),
            "" if cost.peak_bytes is None else _mib(cost.peak_bytes),
            "" if cost.ratio is None else f"{cost.ratio:.2f}",
            seconds(cost.seconds),
            "" if cost.most_tokens is None else f"{cost.most_tokens:,}",
            style="bold green" if cost.method == "crosscut-auto" else "",
        )
    return grid


def _moved(found: Estimate) -> Table:
    headings = ("what moves, each step", "tensor, MiB", "sent by a rank, MiB")
    grid = _grid(*headings, *([] if found.request.bandwidth is None else ["time"]))

    def row(move: Collective) -> list[str]:
        sizes = [_mib(move.payload_bytes), _mib(move.sent_bytes)]
        return [move.what, *sizes, *([] if move.seconds is None else [_duration(move.seconds)])]

    for move in found.collectives:
        grid.add_row(*row(move))
    return grid


def _workspaces(found: Estimate) -> Table:
    """What each method's workspace is made of."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold underline")
    grid.add_column("method", no_wrap=True)
    grid.add_column("what its workspace holds, MiB", overflow="fold")
    for cost in found.costs:
        terms = ", ".join(f"{term.what} {_mib(term.num_bytes)}" for term in cost.terms)
        grid.add_row(cost.method, f"unknown: {cost.unknown}" if cost.unknown else terms)
    return grid


def _sources(found: Estimate) -> list[str]:
    """Which results the ratios come from: a line for each file."""
    methods: dict[str, list[str]] = {}
    for name, source in (
        ("logits matmul", found.matmul_source),
        *((cost.method, cost.source) for cost in found.costs),
    ):
        if source is not None:
            methods.setdefault(source, []).append(name)
    return [f"benchmarks/results/{file}: {', '.join(names)}" for file, names in methods.items()]


def _duration(value: float) -> str:
    return f"{value * 1e6:.2g} µs" if value < 1e-4 else seconds(value)


def _mib(num_bytes: int) -> str:
    value = num_bytes / MIB
    return f"{value:,.0f}" if abs(value) >= 9.95 else f"{value:.2g}"
