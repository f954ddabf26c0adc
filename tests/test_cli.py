"""The command line: what it prints, where it writes, how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import crosscut as library

pytest.importorskip("typer")

from rich.console import Console
from typer.testing import CliRunner, Result

from crosscut import cli
from crosscut.bench import contenders, measure, real_head, report, results
from crosscut.bench.contenders import Contender, Grade
from crosscut.bench.results import BenchResult, Errors

SMALL = ["bench", "--workload", "random:N=16,D=8,V=60", "--device", "cpu", "--repeats", "1"]


def crosscut(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "120", "TERM": "dumb"})


def words(result: Result) -> str:
    """All it said, on one line, without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ((), "bench report tune explain env"),
        (("bench",), "crosscut bench --workload llama3-8b --device cuda --tokens 8192"),
        (("report",), "crosscut report benchmarks/results/gemma3-270m.json"),
        (("explain",), "crosscut explain --tokens 8192"),
        (("env",), "bug report"),
    ],
)
def test_help(command: tuple[str, ...], text: str) -> None:
    result = crosscut(*command, "--help")
    assert result.exit_code == 0
    said = words(result)
    assert all(word in said for word in text.split())


def test_bench_then_report(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    result = crosscut(*SMALL, "--dtype", "fp32", "--against", "pytorch", "--json", str(saved))
    assert result.exit_code == 0, result.output
    said = words(result)
    for text in (
        "N=16, D=8, V=60, fp32",
        "crosscut-auto",
        "crosscut-filtered",
        "(logits matmul)",
        "Random logits:",
        "Not run: crosscut-exact (what crosscut-auto is in fp32); ",
        "liger-kernel, quack-kernels (not asked for); pytorch-chunked (",
        f"Result written to {saved}",
    ):
        assert text in said
    assert said.count("Not run: ") == said.count("(not asked for)") == 1

    data = json.loads(saved.read_text())
    timed = [row["contender"] for row in data["rows"] if row["forward_s"]]
    assert timed == ["crosscut-auto", "crosscut-filtered", "pytorch"]

    table = crosscut("report", str(saved)).output
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1  # every row has every column
    assert [row[1].strip() for row in rows[2:]] == [
        "logits matmul alone", "**crosscut-auto**", "**crosscut-filtered**", "pytorch"
    ]  # fmt: skip
    assert "Not run: " in table


def with_host_times(path: Path, **seconds: list[float]) -> BenchResult:
    """A saved result in which some contenders, by policy, have host times."""
    result = results.load(path)
    rows = (
        replace(row, host_s=tuple(seconds.get(row.contender.removeprefix("crosscut-"), ())))
        for row in result.rows
    )
    return replace(result, rows=tuple(rows))


def test_host_times_have_a_column_where_there_are_any(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    crosscut(*SMALL, "--dtype", "fp32", "--against", "pytorch", "--json", str(saved))
    without = crosscut("report", str(saved)).output
    assert "host" not in without

    result = with_host_times(saved, auto=[0.001, 0.00412, 0.2], pytorch=[0.1234])
    results.save(result, saved)
    assert results.load(saved) == result
    lines = crosscut("report", str(saved)).output.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    place = rows[0].index("host, ms")
    assert [row[place] for row in rows[2:]] == ["", "4.1", "", "123"]
    others = [[cell for i, cell in enumerate(row) if i != place] for row in rows]
    before = [line.split("|") for line in without.splitlines() if line.startswith("|")]
    assert others == [[cell.strip() for cell in row] for row in before]
    assert any(line.startswith("Median times of the GPU") for line in lines)


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    crosscut(*SMALL, "--against", "none", "--json", str(saved))
    result = with_host_times(saved, auto=[0.0041])
    widest = replace(
        result.rows[0],
        contender="cut-cross-entropy", forward_s=(0.0198,), forward_backward_s=(0.0711,),
        peak_extra_bytes=10_839 * 2**20, kept=0.025,
        errors=Errors(loss=0, d_hidden=1.6e-2, d_classifier=1e-2),
    )  # fmt: skip
    console = Console(width=80, file=StringIO())
    with console.capture() as captured:
        console.print(report.table(replace(result, matmul_s=(0.0146,), rows=(widest,))))
    (line,) = (line for line in captured.get().splitlines() if "cut-cross-entropy" in line)
    assert "  4.1 10,839 " in line


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    saved, drawn = tmp_path / "run.json", tmp_path / "run.png"
    crosscut(*SMALL, "--against", "none", "--json", str(saved))
    result = crosscut("report", str(saved), "--plot", str(drawn))
    assert result.exit_code == 0
    assert f"Plot written to {drawn}" in words(result)
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_contender_ends_it_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(hidden, classifier, labels):
        return F.cross_entropy(F.linear(hidden, classifier), labels) * 1.5

    impostor = Contender(
        name="impostor", what="fast", grade=Grade.STANDARD, build=lambda: wrong, slack=1.5
    )
    known = {**contenders.everyone(), "impostor": impostor}
    monkeypatch.setattr(contenders, "everyone", lambda: known)
    saved = tmp_path / "run.json"
    result = crosscut(*SMALL, "--against", "impostor", "--json", str(saved))
    assert result.exit_code == 1
    said = words(result)
    assert re.search(r"FAILED impostor: loss off by \S+, allowed \S+; dH off by 5", said)
    assert not re.search(r"impostor \S+ m?s", said)  # no time
    row = next(r for r in json.loads(saved.read_text())["rows"] if r["contender"] == "impostor")
    assert row["forward_s"] == row["forward_backward_s"] == []


def test_list() -> None:
    said = words(crosscut("bench", "--list"))
    for name in ("gemma2-2b", "phi3.5-mini", *contenders.everyone()):
        assert name in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "gpt-9"), "--workload must be one of gemma3-270m, "),
        (("--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("--against", "nobody"), "--against must name some of default, all, none, "),
        (("--repeats", "0"), "--repeats must be at least 1, got 0"),
        (("--json", "/no/such/place.json"), "--json must be in a directory that exists"),
        (("--workload", "random:D=2,V=3", "--dtype", "fp8"), "--dtype must be one of bf16, fp16"),
        (("--json", "/"), "--json must be a file, got /, a directory"),
        (("--plot", "run.xyz"), "--plot must end in one of .png, .svg, .pdf, got run.xyz"),
        (("--logits-times", "nan"), "--logits-times must be a positive finite number, got nan"),
        (("--workload", "[/x]"), "got '[/x]'"),  # brackets are words here, not markup
        (("--json", "/no/such[a]/place.json"), "got /no/such[a]/place.json"),
    ],
)
def test_bad_arguments_of_bench(arguments: tuple[str, ...], message: str) -> None:
    result = crosscut("bench", "--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert message in words(result)


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    result = crosscut(*SMALL, "--plot", "run.png")
    assert result.exit_code == 2
    assert "--plot needs matplotlib: pip install 'crosscut[bench]'" in words(result)


def test_report_of_something_else(tmp_path: Path) -> None:
    result = crosscut("report", str(tmp_path / "nothing.json"))
    assert result.exit_code == 2
    assert "must be a result of crosscut bench --json" in words(result)


def test_a_result_that_cannot_be_written_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    saved, save = tmp_path / "run.json", results.save

    def no_room(result: BenchResult, path: Path) -> None:
        if path == saved:
            raise OSError(28, "No space left on device")
        save(result, path)

    monkeypatch.setattr(results, "save", no_room)
    result = crosscut(*SMALL, "--against", "none", "--json", str(saved))
    assert result.exit_code == 2
    (kept,) = tmp_path.glob("crosscut-*.json")
    assert f"No space left on device. The result is kept in {kept}" in words(result)
    assert results.load(kept).workload.tokens == 16


def test_a_cache_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    monkeypatch.delenv(real_head.SAVED_HEAD, raising=False)
    monkeypatch.setenv("CROSSCUT_CACHE", str(occupied))
    result = crosscut("bench", "--device", "cpu")
    assert result.exit_code == 2
    assert f"CROSSCUT_CACHE must name a directory that can be written, got {occupied}: " in (
        words(result)
    )


@pytest.mark.parametrize("missing", ["numpy", "safetensors"])
def test_what_a_real_head_needs(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where only the command line's packages are installed."""
    monkeypatch.delenv(real_head.SAVED_HEAD, raising=False)
    monkeypatch.setenv("CROSSCUT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, missing, None)
    result = crosscut("bench", "--device", "cpu")
    assert result.exit_code == 2
    said = words(result)
    assert f"Error: {missing} is not installed. Real heads need " in said
    assert "pip install 'crosscut[bench]'. Random logits need nothing" in said


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # a GPU need not be here
def test_explain(device: str) -> None:
    said: list[Result] = []
    peak = measure.peak_bytes(
        lambda: said.append(crosscut("explain", "--device", device)), torch.device("cpu")
    )
    (result,) = said
    assert result.exit_code == 0, result.output
    assert f"N=8192, D=2304, V=256000, bf16 on {device}" in words(result)
    if device == "cpu":
        assert "> blocks" in result.output
    elif find_spec("triton") is not None:
        assert "> triton" in result.output
    assert re.search(r"> \w+ +can serve this", result.output)
    assert peak < 2**20  # the head would be 1.2 GB


def test_explain_of_a_student_and_its_teacher() -> None:
    result = crosscut("explain", "--teacher-hidden", "4096", "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert "bf16 on cuda" in words(result)
    assert "teacher D=4096, bf16" in words(result)
    mixed = crosscut(
        "explain", "--teacher-hidden", "64", "--teacher-dtype", "fp32", "--device", "cuda"
    )
    assert mixed.exit_code == 0, mixed.output
    assert "> blocks" in mixed.output
    if find_spec("triton") is not None:
        assert "> triton" in result.output
        assert "distils heads that are both bfloat16 or both float32" in words(mixed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher-hidden", "0"), "--teacher-hidden must be at least 1, got 0"),
        (("--teacher-hidden", "8", "--teacher-dtype", "x"), "--teacher-dtype must be one of bf16"),
        (("--teacher-dtype", "fp32"), "--teacher-dtype needs --teacher-hidden"),
        (("--teacher-hidden", "8", "--policy", "cce"), "--policy is of no use with --teacher"),
        (("--policy", "best"), "policy must be one of 'auto'"),
        (("--backend", "best"), "backend must be one of 'auto'"),
        (("--device", "best"), "--device must be a device of PyTorch, got 'best'"),
        (("--dtype", "best"), "--dtype must be one of bf16, fp16, fp32, got 'best'"),
        (("--tokens", "0"), "--tokens must be at least 1, got 0"),
        (("--softcap", "-1"), "softcap must be a positive finite number"),
    ],
)
def test_bad_arguments_of_explain(arguments: tuple[str, ...], message: str) -> None:
    result = crosscut("explain", *arguments)
    assert result.exit_code == 2
    assert message in words(result)


def test_version() -> None:
    result = crosscut("--version")
    assert result.exit_code == 0
    assert result.output == f"crosscut {library.__version__}\n"


def test_env() -> None:
    result = crosscut("env")
    assert result.exit_code == 0
    said = words(result)
    assert torch.__version__ in said
    assert "liger-kernel" in said


def test_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "crosscut", "explain"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "can serve this" in run.stdout


def test_without_typer() -> None:
    code = "import sys; sys.modules['typer'] = None; import crosscut.cli"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.strip() == "The command line needs typer: pip install 'crosscut[cli]'"
