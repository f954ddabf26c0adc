"""The command line: what it prints, where it writes, how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("typer")

from typer.testing import CliRunner, Result

from crosscut import cli
from crosscut.bench import contenders, measure
from crosscut.bench.contenders import Contender, Grade

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
        "not run liger-kernel: not asked for",
        "not run crosscut-exact: what crosscut-auto is in fp32",
    ):
        assert text in said

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


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    saved, drawn = tmp_path / "run.json", tmp_path / "run.png"
    crosscut(*SMALL, "--against", "none", "--json", str(saved))
    result = crosscut("report", str(saved), "--plot", str(drawn))
    assert result.exit_code == 0
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
    ],
)
def test_bad_arguments_of_bench(arguments: tuple[str, ...], message: str) -> None:
    result = crosscut("bench", "--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert message in words(result)


def test_report_of_something_else(tmp_path: Path) -> None:
    result = crosscut("report", str(tmp_path / "nothing.json"))
    assert result.exit_code == 2
    assert "must be a result of crosscut bench --json" in words(result)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # a GPU need not be here
def test_explain(device: str) -> None:
    results: list[Result] = []
    peak = measure.peak_bytes(
        lambda: results.append(crosscut("explain", "--device", device)), torch.device("cpu")
    )
    (result,) = results
    assert result.exit_code == 0, result.output
    assert f"N=8192, D=2304, V=256000, bf16 on {device}" in words(result)
    assert re.search(r"> \w+ +can serve this", result.output)
    assert peak < 2**20  # the head would be 1.2 GB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
