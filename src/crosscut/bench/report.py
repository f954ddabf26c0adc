"""How a run is shown: a table on the terminal, the same in Markdown, and a plot.

All three are made from a :class:`~crosscut.bench.results.BenchResult`, so one read from a file
looks as it did when it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from crosscut.bench.results import BenchResult, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADINGS = (
    "contender",
    "forward",
    "forward + backward",
    "max ÷ min",
    "÷ matmul",
    "÷ pytorch",
    "host, ms",
    "peak extra memory",
    "error dH",
    "error dC",
    "pairs kept",
)
_SHORT_HEADINGS = (
    "contender",
    "forward",
    "with\nback-\nward",
    "max\n÷\nmin",
    "÷\nmat-\nmul",
    "÷\npy-\ntorch",
    "host\nms",
    "extra\nMiB",
    "error\ndH",
    "error\ndC",
    "kept",
)
_HOST = _HEADINGS.index("host, ms")
PLOT_FORMATS = (".png", ".svg", ".pdf")

NOISY_SPREAD = 1.3
"""The longest time of a contender over its shortest, above which neither is to be trusted."""

NOISY_SHARE = 0.1
"""Share of all CPU cores that other processes may keep busy."""


def title(result: BenchResult) -> str:
    """The workload and the machine, in a line each."""
    load, machine = result.workload, result.machine
    times = "" if load.logits_times == 1 else f", logits × {load.logits_times:g}"
    memory = machine.memory_bytes
    room = "" if memory is None else f", {memory / 2**30:.0f} GiB"
    where = machine.gpu if load.device == "cuda" else f"{machine.cpu}, {machine.cores} cores{room}"
    return (
        f"{load.name}: N={load.tokens}, D={load.hidden}, V={load.vocab}, {load.dtype}{times} "
        f"({load.source})\n{where}, PyTorch {machine.torch}, crosscut {result.crosscut}"
    )


def table(result: BenchResult) -> RenderableType:
    """For the terminal: 80 columns are enough for the contenders that run by default."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold underline")
    for number, heading in enumerate(_shown(result, _SHORT_HEADINGS)):
        grid.add_column(heading, justify="right" if number else "left", overflow="fold")
    if result.matmul is not None:
        grid.add_row("(logits matmul)", seconds(result.matmul), style="dim")
    for row in _measured(result):
        cells = [cell.removesuffix(" MiB") for cell in _cells(result, row)]
        grid.add_row(*cells, style="bold green" if _ours(row) else "")
    parts: list[RenderableType] = [Text(title(result)), "", grid, ""]
    parts += [Text(line, style="bold yellow") for line in doubts(result)]
    parts += [Text(line, style="dim") for line in notes(result)]
    parts += [
        Text(f"FAILED   {row.contender}: {row.failure}", style="bold red")
        for row in result.rows
        if row.failure
    ]
    parts += [Text(line, style="dim") for line in _absent(result)]
    return Group(*parts)


def markdown(result: BenchResult) -> str:
    """For a README: a table, and below it what was not run."""
    headings = _shown(result, _HEADINGS)
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    if result.matmul is not None:
        blank = [""] * (len(headings) - 2)
        cells = ["logits matmul alone", seconds(result.matmul), *blank]
        lines.append("| " + " | ".join(cells) + " |")
    for row in _measured(result):
        name, *cells = _cells(result, row)
        name = f"**{name}**" if _ours(row) else name
        lines.append("| " + " | ".join([name, *cells]) + " |")
    remarks = [*title(result).splitlines(), *doubts(result), *notes(result)]
    remarks += [f"FAILED {row.contender}: {row.failure}." for row in result.rows if row.failure]
    remarks += _absent(result)
    return "\n".join([*lines, "", *(remark + "  " for remark in remarks)]).rstrip()


def doubts(result: BenchResult) -> list[str]:
    """Why the times, or where they come from, are not to be trusted."""
    times = {row.contender: row.forward_backward_s for row in _measured(result)}
    times["the logits matmul"] = result.matmul_s
    spreads = {name: max(of) / min(of) for name, of in times.items() if of}
    widest = max(spreads, key=lambda name: spreads[name], default=None)
    reasons, lines = [], []
    if widest is not None and spreads[widest] > NOISY_SPREAD:
        slowest, fastest = seconds(max(times[widest])), seconds(min(times[widest]))
        reasons.append(f"times of {widest} were between {fastest} and {slowest}")
    others, cores = result.cores_of_others or 0.0, result.machine.cores
    if others > NOISY_SHARE * cores:
        reasons.append(f"other processes kept {others:.1f} of {cores} cores busy")
    if reasons:
        lines.append(
            f"NOISY: {', and '.join(reasons)}. Do not compare these times; run it again on a quiet "
            "machine."
        )
        if result.workload.device == "cpu" and result.machine.wait_policy is None:
            lines[0] += (
                " Threads that wait for others in a busy loop suffer most: where a machine cannot "
                "be quiet, set OMP_WAIT_POLICY=PASSIVE."
            )
    if any(len(of) == 1 for of in times.values()):
        lines.append("ONE RUN of each: nothing says how far its time is to be trusted.")
    if (result.commit or "").endswith("-dirty"):
        lines.append("CHANGED CODE: no commit holds what was measured.")
    return lines


def notes(result: BenchResult) -> list[str]:
    """What the columns mean, and what to keep in mind."""
    times = "Median times; max ÷ min is of forward and backward."
    if _has_host_times(result):
        times = (
            "Median times of the GPU, with the host ahead unless a call waits for the GPU; max ÷ "
            "min is of forward and backward; host: how long these keep the host busy."
        )
    lines = [
        f"{times} Memory beyond inputs and the two gradients. Errors are relative to a truth "
        "of higher precision; plain PyTorch's in this dtype: "
        f"dH {_power(result.yardstick.d_hidden)}, dC {_power(result.yardstick.d_classifier)}.",
    ]
    return [*lines, result.workload.note] if result.workload.note else lines


def plot(result: BenchResult, path: Path) -> None:
    """Horizontal bars: time to the left, memory to the right, the fastest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(_measured(result), key=lambda row: -(row.forward_backward or 0))
    names = [row.contender for row in rows]
    ours = ["#0b6e4f" if _ours(row) else "#8a94a0" for row in rows]
    pale = ["#8fcfb5" if _ours(row) else "#cfd5db" for row in rows]
    forward = [row.forward or 0 for row in rows]
    total = [row.forward_backward or 0 for row in rows]
    unit, factor = ("s", 1.0) if max(total, default=0) >= 1 else ("ms", 1000.0)

    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(10, 1.9 + 0.42 * len(rows)), layout="constrained"
    )
    left.barh(names, [value * factor for value in total], color=pale)
    left.barh(names, [value * factor for value in forward], color=ours)
    _label(left, [f"{value * factor:.3g} {unit}" for value in total], [v * factor for v in total])
    if result.matmul is not None:
        left.axvline(result.matmul * factor, color="#c1440e", linewidth=1.2, linestyle="--")
        left.annotate(
            "logits matmul alone",
            (result.matmul * factor, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            color="#c1440e",
            fontsize=8,
        )
    left.set_xlabel(f"{unit}: forward (dark), with backward (pale)")

    peaks = [(row.peak_extra_bytes or 0) / 2**20 for row in rows]
    right.barh(names, peaks, color=ours)
    _label(right, [f"{value:,.0f} MiB" for value in peaks], peaks)
    right.set_xlabel("MiB: peak memory beyond inputs and gradients")

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.16)
    heading, where = title(result).splitlines()
    figure.suptitle(heading.split(" (")[0], fontsize=12, x=0.01, ha="left")
    below = [where, *(line.split(". ")[0] for line in doubts(result))]
    figure.text(0.01, -0.02, "\n".join(below), fontsize=8, color="#555555", ha="left", va="top")
    figure.savefig(path, dpi=160, bbox_inches="tight")
    pyplot.close(figure)


def seconds(value: float | None) -> str:
    """Three digits and a unit."""
    if value is None:
        return ""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _measured(result: BenchResult) -> list[Row]:
    return [row for row in result.rows if row.forward_backward is not None]


def _absent(result: BenchResult) -> list[str]:
    """In a line, who was not run: together those with the same reason."""
    reasons: dict[str, list[str]] = {}
    for row in result.rows:
        if row.absent:
            reasons.setdefault(row.absent, []).append(row.contender)
    absent = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return [f"Not run: {'; '.join(absent)}."] if absent else []


def _ours(row: Row) -> bool:
    return row.contender.startswith("crosscut-")


def _cells(result: BenchResult, row: Row) -> list[str]:
    plain = next((r.forward_backward for r in result.rows if r.contender == "pytorch"), None)
    peak, errors = row.peak_extra_bytes, row.errors
    cells = (
        row.contender,
        seconds(row.forward),
        seconds(row.forward_backward),
        _ratio(row.spread, 1.0),
        _ratio(row.forward_backward, result.matmul),
        _ratio(row.forward_backward, plain),
        _milliseconds(row.host),
        "" if peak is None else f"{peak / 2**20:,.0f} MiB",
        "" if errors is None else _power(errors.d_hidden),
        "" if errors is None else _power(errors.d_classifier),
        "" if row.kept is None else f"{row.kept:.1%}",
    )
    return _shown(result, cells)


def _shown(result: BenchResult, columns: Sequence[str]) -> list[str]:
    """All columns, or all but the host's time where no contender has one."""
    return [
        column for place, column in enumerate(columns) if place != _HOST or _has_host_times(result)
    ]


def _has_host_times(result: BenchResult) -> bool:
    return any(row.host is not None for row in result.rows)


def _milliseconds(value: float | None) -> str:
    """Two digits, or all before the point."""
    if value is None:
        return ""
    return f"{value * 1000:.2g}" if value < 0.01 else f"{value * 1000:.0f}"


def _ratio(value: float | None, unit: float | None) -> str:
    if value is None or not unit:
        return ""
    return f"{value / unit:.2f}" if value / unit < 100 else f"{value / unit:.0f}"


def _power(value: float) -> str:
    """Two digits and a power of ten: 2.4e-3."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def _label(axes: Axes, texts: list[str], values: list[float]) -> None:
    for place, (text, value) in enumerate(zip(texts, values, strict=True)):
        axes.annotate(
            text,
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
