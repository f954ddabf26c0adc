"""What an estimate says: the paper's table, measured peaks, what moves, and how it is asked."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from crosscut.bench import BenchError, estimate, results, workloads
from crosscut.bench.estimate import GIB, METHODS, MIB, MODELS, Head, Request, Unknown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Model; weights, gradients and Adam in MB; tokens before and after. From secondary copies of the
# paper (arXiv:2411.09009, Table A4), not from the paper itself.
PAPER = [
    ("gemma2-2b", 19946, 1_108_206, 10_580_057),
    ("gemma2-27b", 207727, 739_448, 2_525_554),
    ("gemma-2b", 19121, 1_155_515, 17_204_330),
    ("gpt2", 1045, 5_866_190, 69_845_595),
    ("gpt-neo-1.3b", 10421, 4_268_047, 12_996_042),
    ("gpt-neo-2.7b", 20740, 3_471_784, 7_731_585),
    ("llama2-7b", 51410, 3_164_429, 4_709_560),
    ("llama2-13b", 99303, 2_203_057, 2_891_512),
    ("llama3-8b", 61266, 1_579_333, 4_670_136),
    ("llama3-70b", 538282, 397_019, 552_414),
    ("mistral-7b", 55250, 3_154_108, 4_694_200),
    ("mixtral-8x7b", 356314, 2_344_949, 3_489_944),
    ("phi1.5", 10821, 4_264_482, 12_991_781),
    ("phi3-medium", 106508, 2_188_824, 2_873_067),
    ("qwen1.5-7b", 58909, 1_412_087, 4_679_564),
]


class TestThePaper:
    @pytest.mark.parametrize(("name", "state", "before", "after"), PAPER)
    def test_a_row(self, name: str, state: int, before: int, after: int) -> None:
        row = estimate.paper_row(MODELS[name])
        assert (row.before, row.after) == (before, after)
        assert round(row.state_bytes / MIB) == state

    def test_all_rows(self) -> None:
        assert [row.model for row in estimate.paper_table()] == [MODELS[row[0]] for row in PAPER]

    def test_sizes(self) -> None:
        row = estimate.paper_row(MODELS["gemma2-2b"])
        assert row.logits_bytes == 65536 * 256_000 * 4
        assert row.activation_bytes == 65536 * 26 * 2304 * 2


def test_models_have_the_heads_of_the_workloads() -> None:
    for name, shape in workloads.MODELS.items():
        assert (MODELS[name].hidden, MODELS[name].vocab) == (shape.hidden, shape.vocab)


def measured_peaks(pattern: str, method: str) -> dict[str, float]:
    """The estimate of a method's workspace over its measured peak, by result."""
    (chosen,) = (candidate for candidate in METHODS if candidate.name == method)
    found = {}
    for path in sorted(RESULTS.glob(pattern)):
        result = results.load(path)
        load = result.workload
        head = Head(load.tokens, load.hidden, load.vocab, workloads.DTYPES[load.dtype], shards=1)
        terms = chosen.workspace(head)
        assert not isinstance(terms, Unknown)
        for row in result.rows:
            if row.contender == method and row.peak_extra_bytes is not None:
                total = sum(term.num_bytes for term in terms)
                found[path.stem] = total / row.peak_extra_bytes
    assert found
    return found


class TestMeasuredPeaks:
    """Against what the bench measured."""

    @pytest.mark.parametrize(
        ("method", "tokens"),
        [
            *(("crosscut-auto", tokens) for tokens in (1024, 8192, 32768)),
            *(("crosscut-exact", tokens) for tokens in (1024, 8192, 32768)),
            *(("pytorch", tokens) for tokens in (1024, 8192)),  # not measured with more
        ],
    )
    def test_three_points(self, method: str, tokens: int) -> None:
        (ratio,) = measured_peaks(f"gemma2-2b-h100-{tokens}.json", method).values()
        assert 1 / 1.2 < ratio < 1.2

    @pytest.mark.parametrize("method", ["pytorch", "pytorch-compiled"])
    def test_pytorch_everywhere(self, method: str) -> None:
        """On a CPU too, and in float32."""
        for pattern in ("gemma2-2b-h100-8192.json", "gemma3-*.json", "llama3-*.json"):
            for name, ratio in measured_peaks(pattern, method).items():
                assert 0.99 < ratio <= 1, name

    @pytest.mark.parametrize("method", ["crosscut-auto", "crosscut-exact"])
    def test_crosscut_on_a_gpu(self, method: str) -> None:
        for model in workloads.MODELS:
            for name, ratio in measured_peaks(f"{model}-h100-*.json", method).items():
                few = name.endswith("-1024")  # a chunk of classes can be narrower than it may be
                assert 0.94 < ratio < (1.61 if few else 1.15), name

    def test_liger_kernel(self) -> None:
        for model in ("gemma2-2b", "llama3-8b"):
            (ratio,) = measured_peaks(f"{model}-h100-8192.json", "liger-kernel").values()
            assert 0.98 < ratio <= 1

    def test_cut_cross_entropy(self) -> None:
        """At most: a quarter less was measured for one of two heads."""
        for model in ("gemma2-2b", "llama3-8b"):
            (ratio,) = measured_peaks(f"{model}-h100-8192.json", "cut-cross-entropy").values()
            assert 0.99 < ratio < 1.33

    def test_constants_are_those_of_the_kernels(self) -> None:
        pytest.importorskip("triton")
        from crosscut.backends.triton import chunks, select
        from crosscut.kernels import tile_matmul

        assert estimate.NARROW == chunks.NARROW
        assert estimate.MOST_CLASSES == chunks.MOST_CLASSES
        assert estimate.LITTLE == select.LITTLE
        assert estimate.TILE == tile_matmul.TILE


def script() -> ModuleType:
    path = ROOT / "benchmarks" / "estimate_data.py"
    spec = importlib.util.spec_from_file_location("estimate_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestTimes:
    def test_they_are_those_of_the_results(self) -> None:
        """Collected again by ``python benchmarks/estimate_data.py`` they are the same."""
        assert estimate.MEASURED.read_text() == script().text()

    def test_at_a_measured_shape(self) -> None:
        result = results.load(RESULTS / "gemma2-2b-h100-8192.json")
        found = estimate.estimate(estimate.request_for("gemma2-2b", 8192))
        assert found.matmul_seconds == pytest.approx(result.matmul, rel=1e-3)
        assert found.matmul_source == "gemma2-2b-h100-8192.json"
        for cost in found.costs:
            if cost.ratio is not None:
                (row,) = (row for row in result.rows if row.contender == cost.method)
                assert cost.seconds == pytest.approx(row.forward_backward, rel=1e-3)

    def test_elsewhere_they_grow_with_the_matmul(self) -> None:
        once, twice = (
            estimate.estimate(Request(tokens=8192, hidden=2304, vocab=vocab))
            for vocab in (250_000, 500_000)
        )
        assert twice.matmul_seconds == pytest.approx(2 * (once.matmul_seconds or 0))

    def test_a_method_without_this_shape_names_its_own(self) -> None:
        found = estimate.estimate(estimate.request_for("gemma2-2b", 32768))
        sources = {cost.method: cost.source for cost in found.costs}
        assert sources["crosscut-auto"] == "gemma2-2b-h100-32768.json"
        assert sources["liger-kernel"] == "gemma2-2b-h100-8192.json"
        assert sources["pytorch-chunked"] is None

    def test_none_in_other_dtypes(self) -> None:
        found = estimate.estimate(estimate.request_for("gemma2-2b", 8192, dtype="fp32"))
        assert found.matmul_seconds is None
        assert {cost.seconds for cost in found.costs} == {None}
        assert any("No times" in note for note in found.notes)


def test_what_is_not_known_has_a_reason() -> None:
    for dtype in workloads.DTYPES:
        found = estimate.estimate(estimate.request_for("gemma2-2b", 8192, dtype=dtype))
        for cost in found.costs:
            assert (cost.workspace_bytes is None) == bool(cost.unknown) == (not cost.terms)
            assert cost.unknown or cost.workspace_bytes == sum(t.num_bytes for t in cost.terms)
        names = {cost.method for cost in found.costs if cost.unknown}
        paper = {"cut-cross-entropy"} if dtype == "fp32" else set()
        assert names == {"pytorch-chunked"} | paper


class TestRanks:
    """Of 16 ranks, 4 share the vocabulary, and 4 groups of them the weights."""

    REQUEST = estimate.request_for(
        "gemma2-2b", 8192, tensor_parallel=4, data_parallel=4, fsdp=True, bandwidth=100.0
    )

    def test_memory(self) -> None:
        found = estimate.estimate(self.REQUEST)
        assert found.vocab == 64_000
        assert found.weight_bytes == 64_000 * 2304 * 2
        assert found.logits_bytes == 8192 * 64_000 * 2
        assert found.state_bytes == 8 * 2_614_341_888 / 16
        assert found.activation_bytes == 8192 * 26 * 2304 * 2

    def test_what_moves(self) -> None:
        statistics, d_hidden, *of_weight = estimate.estimate(self.REQUEST).collectives
        assert statistics.sent_bytes == 3 * 12 * 8192
        assert d_hidden.payload_bytes == 8192 * 2304 * 4
        assert d_hidden.sent_bytes == 2 * 3 / 4 * d_hidden.payload_bytes
        assert d_hidden.seconds == pytest.approx(d_hidden.sent_bytes / 100e9)
        assert len(of_weight) == 3
        assert {move.sent_bytes for move in of_weight} == {64_000 * 2304 * 2 * 3 / 4}

    def test_uneven_shards(self) -> None:
        request = Request(tokens=8, hidden=4, vocab=10, tensor_parallel=4)
        assert estimate.estimate(request).vocab == 3

    def test_one_rank_sends_nothing(self) -> None:
        assert estimate.estimate(estimate.request_for("gemma2-2b", 8192)).collectives == ()

    def test_replicas_sum_the_gradient(self) -> None:
        found = estimate.estimate(estimate.request_for("gemma2-2b", 8192, data_parallel=2))
        (move,) = found.collectives
        assert move.sent_bytes == found.weight_bytes
        assert move.seconds is None


class TestLargest:
    @pytest.mark.parametrize("method", [m for m in METHODS if m.name != "pytorch-chunked"],
                             ids=lambda method: method.name)  # fmt: skip
    def test_one_more_does_not_fit(self, method: estimate.Method) -> None:
        request = estimate.request_for("llama3-8b", 8192, data_parallel=8, fsdp=True)
        most = estimate.most_tokens(method, request)
        memory = request.memory * GIB
        assert estimate._step_bytes(method, request, most) <= memory
        assert estimate._step_bytes(method, request, most + 1) > memory

    def test_nothing_fits(self) -> None:
        request = estimate.request_for("llama3-70b", 8192)
        assert estimate.most_tokens(METHODS[0], request) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"layers": -1}, "--layers must be at least 1, got -1"),
        ({"dtype": "fp8"}, "--dtype must be one of bf16, fp16, fp32, got 'fp8'"),
        ({"bandwidth": float("nan")}, "--bandwidth must be a positive finite number, got nan"),
        ({"memory": 0.0}, "--memory must be a positive finite number, got 0.0"),
        ({"tensor_parallel": 9}, "--tensor-parallel must be at most the vocabulary's 8 classes"),
        ({"fsdp": True}, "--fsdp needs --data-parallel of at least 2, got 1"),
    ],
)
def test_bad_requests(given: dict[str, object], message: str) -> None:
    with pytest.raises(BenchError, match=re.escape(message)):
        Request(**{"tokens": 4, "hidden": 4, "vocab": 8, **given})  # pyright: ignore


def test_another_shape_is_not_the_model() -> None:
    request = estimate.request_for("gemma2-2b", 8, vocab=1000, layers=3)
    assert (request.hidden, request.vocab, request.layers) == (2304, 1000, 3)
    assert request.parameters is None
    (note,) = (note for note in estimate.estimate(request).notes if "left out" in note)
    assert "--parameters" in note
    assert "--layers" not in note


def test_it_needs_pytorch_alone() -> None:
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'numpy', 'matplotlib', 'triton'): sys.modules[name] = None\n"
        "from crosscut.bench.estimate import estimate, request_for\n"
        "print(estimate(request_for('gemma2-2b', 8192)).costs[0].workspace_bytes)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 2**20


class TestTheCommand:
    @staticmethod
    def run(*arguments: str, code: int = 0) -> str:
        """All it said, on one line."""
        pytest.importorskip("typer")
        from typer.testing import CliRunner

        from crosscut import cli

        result = CliRunner().invoke(
            cli.app, ["estimate", *arguments], env={"COLUMNS": "100", "TERM": "dumb"}
        )
        assert result.exit_code == code, result.output
        return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())

    def test_help(self) -> None:
        assert "crosscut estimate --model llama3-8b --tokens 8192" in self.run("--help")

    def test_the_default(self) -> None:
        said = self.run()
        for words in (
            "gemma2-2b: N=8192, D=2304, V=256000, bf16, 26 layers, 2,614,341,888 parameters",
            "1 rank of 75 GiB",
            "head's weight 1,125",
            "pytorch 10,839 13,161",
            "less the gradients of weight and hidden states, which come later -1,161",
            "pytorch-chunked unknown: no committed result has its memory on a GPU",
            "as measured on one H100",
            "benchmarks/results/gemma2-2b-h100-8192.json: logits matmul, crosscut-auto",
        ):
            assert words in said
        assert "what moves" not in said

    def test_ranks(self) -> None:
        said = self.run("--tensor-parallel", "4", "--data-parallel", "4", "--fsdp")
        assert "16 ranks of 75 GiB; 4 share the vocabulary, 64000 classes each; 4 groups" in said
        assert "dH in float32: all-reduce 72 108" in said
        assert "time" not in said.split("what moves")[1].split("Memory is")[0]
        said = self.run("--tensor-parallel", "4", "--bandwidth", "450")
        assert "dH in float32: all-reduce 72 108 0.252 ms" in said

    def test_the_paper(self) -> None:
        said = self.run("--paper")
        for _, state, before, after in PAPER:
            assert f"{state:,} {before:,} {after:,} " in said

    def test_files(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        saved, drawn = tmp_path / "cost.json", tmp_path / "cost.png"
        said = self.run("--json", str(saved), "--plot", str(drawn))
        assert f"Estimate written to {saved} Plot written to {drawn}" in said
        data = json.loads(saved.read_text())
        (plain,) = (cost for cost in data["costs"] if cost["method"] == "pytorch")
        assert sum(term["num_bytes"] for term in plain["terms"]) == plain["workspace_bytes"]
        assert data["request"]["vocab"] == 256_000
        assert drawn.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--model", "gpt-9"), "--model must be one of gemma2-2b, gemma2-27b, "),
            (("--tokens", "0"), "--tokens must be at least 1, got 0"),
            (("--json", "/no/such/place.json"), "--json must be in a directory that exists"),
        ],
    )
    def test_bad_arguments(self, arguments: tuple[str, ...], message: str) -> None:
        assert message in self.run(*arguments, code=2)
