"""``crosscut tune``: what it keeps, what a training takes of it, and the command."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("typer")

from typer.testing import CliRunner, Result

from crosscut import cli
from crosscut.bench import BenchError, tune, workloads
from crosscut.bench.progress import Silent
from crosscut.cache import cache_directory
from crosscut.device import tiles, tuned
from crosscut.device.tiles import Gpu, Kernel, Tiles, choose_tiles, table, tuning_key
from crosscut.device.tuned import Sizes, Winner

GPU = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
A100, H100 = Gpu((8, 0), 163 * 1024), Gpu((9, 0), 227 * 1024)
B200, RTX5090 = Gpu((10, 0), 227 * 1024), Gpu((12, 0), 99 * 1024)
DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16
WON = Sizes(128, 128, 32, 4, 5, 2)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine with an H100 and nothing tuned yet."""
    monkeypatch.setenv("CROSSCUT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: GPU)
    monkeypatch.setattr(tiles, "gpu_of", lambda device: H100)
    tuned._winners.cache_clear()
    yield tmp_path
    tuned._winners.cache_clear()


def entry(**changes: Any) -> Winner:
    """A winner for the LSE kernel at D=2304."""
    place = tuned.here(DEVICE)._replace(**changes)
    key = tuning_key(Kernel.LSE, BF16, False, 2304)
    return Winner(place=place, key=key, sizes=WON, measured="in a test")


def chosen(
    kernel: Kernel = Kernel.LSE, dtype: torch.dtype = BF16, hidden_size: int = 2304
) -> Tiles:
    like: Any = SimpleNamespace(device=DEVICE, dtype=dtype, shape=(8192, hidden_size))
    return choose_tiles(kernel, like)


def of_table(kernel: Kernel = Kernel.LSE, dtype: torch.dtype = BF16) -> Tiles:
    return table(kernel, dtype, H100, 2304)


def sizes_of(tiles: Tiles) -> Sizes:
    return Sizes(*(getattr(tiles, name) for name in Sizes._fields))


@pytest.fixture
def silence() -> Any:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path
    monkeypatch.delenv("CROSSCUT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/of/everyone")
    assert cache_directory() == Path("/of/everyone/crosscut")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "crosscut"


def test_the_table_where_nothing_was_tuned(silence: None) -> None:
    assert chosen() == of_table()


def test_a_winner_is_used_where_it_was_measured(silence: None) -> None:
    tuned.write([entry()])
    tiles = chosen()
    assert sizes_of(tiles) == WON
    assert tiles.descriptors == of_table().descriptors
    assert tiles.precision == of_table().precision
    assert chosen(hidden_size=640) == of_table()
    assert chosen(Kernel.PAIRS) == of_table(Kernel.PAIRS)
    assert chosen(dtype=torch.float16) == of_table(dtype=torch.float16)


def test_one_read_a_process(silence: None) -> None:
    tuned.write([entry()])
    before = chosen()
    tuned.path().unlink()
    assert chosen() == before


def test_tf32_is_another_key() -> None:
    assert tuning_key(Kernel.LSE, torch.float32, True, 8) != tuning_key(
        Kernel.LSE, torch.float32, False, 8
    )


@pytest.mark.parametrize("change", [{"triton": "3.0.0"}, {"kernels": "others"}])
def test_stale_winners_warn_once(change: dict[str, str]) -> None:
    tuned.write([entry(**change)])
    with pytest.warns(RuntimeWarning, match="another Triton or other kernels.*crosscut tune"):
        assert chosen() == of_table()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == of_table()


def test_another_gpu_is_none_of_our_business(silence: None) -> None:
    tuned.write([entry(gpu="NVIDIA A100, 8.0")])
    assert chosen() == of_table()


def broken(**changes: Any) -> str:
    tuned.write([entry()])
    data = json.loads(tuned.path().read_text())
    data["winners"][0] |= changes
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (lambda: "{", "Expecting"),
        (lambda: "[]", "format"),
        (lambda: '{"format": 0}', "format"),
        (lambda: '{"format": 1}', "not complete"),
        (lambda: broken(sizes=None), "not complete"),
        (lambda: broken(sizes={**WON._asdict(), "block_q": 1}), "not complete"),
        (lambda: broken(sizes={**WON._asdict(), "block_n": "128"}), "numbers from 1"),
        (lambda: broken(sizes={**WON._asdict(), "block_n": 0}), "numbers from 1"),
    ],
)
def test_a_broken_file_warns(text: Callable[[], str], reason: str) -> None:
    tuned.path().write_text(text())
    with pytest.warns(RuntimeWarning, match=f"{reason}.*crosscut tune --reset"):
        assert chosen() == of_table()


def test_a_file_that_cannot_be_read_warns() -> None:
    tuned.path().mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert chosen() == of_table()


class FakeMeter:
    """Seconds by rule; remembers what it was asked."""

    def __init__(self, seconds: Callable[[dict[Kernel, Sizes]], float]) -> None:
        self.rule = seconds
        self.timed: list[tuple[str, dict[Kernel, Sizes]]] = []

    def objection(self, policy: str, choice: Any) -> str | None:
        del policy
        return "out of shared memory" if choice[Kernel.LSE].block_d == 128 else None

    def seconds(self, policy: str, *choices: Any) -> list[float]:
        self.timed += [(policy, dict(choice)) for choice in choices]
        return [self.rule(choice) for choice in choices]


def plan(*kernels: Kernel) -> tune.Plan:
    sizes = {kernel: sizes_of(of_table(kernel)) for kernel in kernels}
    return tune.Plan(policies=dict.fromkeys(kernels, "auto"), dtype=BF16, table=sizes)


def test_the_fastest_wins_and_the_next_kernel_runs_beside_it() -> None:
    def seconds(choice: dict[Kernel, Sizes]) -> float:
        return 1.0 + 0.1 * (choice[Kernel.LSE].block_v == 256) - 0.01 * choice[Kernel.LSE].num_warps

    meter = FakeMeter(seconds)
    lse, pairs = tune.search(plan(Kernel.LSE, Kernel.PAIRS), meter, Silent())
    assert lse.winner is not None
    assert (lse.winner.sizes.block_v, lse.winner.sizes.num_warps) == (128, 8)
    assert tune.saved(lse) == pytest.approx(0.1 / 1.02)
    assert pairs.winner is None  # changes nothing
    assert all(
        choice[Kernel.LSE] == lse.winner.sizes
        for _, choice in meter.timed
        if choice[Kernel.PAIRS] != pairs.table.sizes
    )
    rejected = [trial for trial in lse.trials if trial.sizes.block_d == 128]
    assert rejected
    assert all(trial.rejected == "out of shared memory" for trial in rejected)


def test_a_small_gain_is_none() -> None:
    def seconds(choice: dict[Kernel, Sizes]) -> float:
        return 1.0 - 0.015 * (choice[Kernel.LSE].block_v == 128)

    (lse,) = tune.search(plan(Kernel.LSE), FakeMeter(seconds), Silent())
    assert lse.winner is None


def test_a_gain_that_does_not_come_back_is_none() -> None:
    times = iter([1.0, 0.9] + [1.0] * 100)
    (lse,) = tune.search(plan(Kernel.LSE), FakeMeter(lambda choice: next(times)), Silent())
    assert lse.trials[0].seconds == 0.9
    assert lse.winner is None


def test_sizes_that_do_not_run_end_it() -> None:
    meter = FakeMeter(lambda choice: 1.0)
    meter.objection = lambda policy, choice: "no"
    with pytest.raises(BenchError, match="'auto' is no good with the tiles it has: no"):
        tune.search(plan(Kernel.LSE), meter, Silent())


@pytest.mark.parametrize("gpu", [A100, H100, B200, RTX5090])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden_size", [640, 2304])
def test_alternatives_keep_what_kernels_share(
    hidden_size: int, dtype: torch.dtype, gpu: Gpu
) -> None:
    kernels = [Kernel.LSE, Kernel.GRADIENT, Kernel.MATMUL]
    if dtype != torch.float32:
        kernels += [
            Kernel.MASS_LSE, Kernel.PAIRS, Kernel.PAIR_MATMUL, Kernel.HOT_MATMUL,
            Kernel.NONZERO_MATMUL,
        ]  # fmt: skip
    tiles = {kernel: table(kernel, dtype, gpu, hidden_size) for kernel in kernels}
    sizes = {kernel: sizes_of(tiles[kernel]) for kernel in kernels}
    tried = {kernel: tune.alternatives(kernel, dtype, sizes[kernel]) for kernel in kernels}
    for kernel in kernels:
        assert 3 < len(tried[kernel]) < 15
        assert sizes[kernel] not in tried[kernel]
        assert len(set(tried[kernel])) == len(tried[kernel])
        assert {other.block_n for other in tried[kernel]} == {sizes[kernel].block_n}
        more = [other for other in tried[kernel] if other.programs > 1]
        assert not more or kernel in (Kernel.LSE, Kernel.MASS_LSE)  # which alone know of them
    everywhere = {kernel: [sizes[kernel], *tried[kernel]] for kernel in kernels}
    assert all(128 % other.block_d == 0 for other in everywhere[Kernel.MATMUL])
    together = {other.num_warps for k in kernels[1:3] for other in everywhere[k]}
    assert len(together) == 1
    if dtype != torch.float32:
        steps = {other.block_d for other in everywhere[Kernel.PAIR_MATMUL]}
        slots = {other.block_v for other in everywhere[Kernel.PAIRS]}
        assert all(slot % step == 0 for slot in slots for step in steps)
        assert all(128 % other.block_d == 0 for other in everywhere[Kernel.HOT_MATMUL])


def workload(dtype: torch.dtype = BF16) -> workloads.Workload:
    hidden: Any = torch.zeros(16, 2304, dtype=dtype)
    return workloads.Workload(
        name="random", hidden=hidden, classifier=torch.zeros(60, 2304, dtype=dtype),
        labels=torch.zeros(16, dtype=torch.int64), source="a test",
    )  # fmt: skip


@pytest.mark.parametrize("kept", [0.1, 1.0])
def test_the_plan(monkeypatch: pytest.MonkeyPatch, kept: float) -> None:
    found = SimpleNamespace(kept=kept)
    monkeypatch.setattr(tune.crosscut, "gradient_sparsity", lambda *arguments: found)
    made = tune.plan_for(workload())
    of_auto = [kernel for kernel, policy in made.policies.items() if policy == "auto"]
    assert len(of_auto) == (5 if kept < 1 else 0)
    assert list(made.policies)[len(of_auto) :] == [Kernel.LSE, Kernel.GRADIENT, Kernel.MATMUL]
    assert made.table[Kernel.LSE] == plan(Kernel.LSE).table[Kernel.LSE]


def test_what_is_stored_is_found() -> None:
    load = workload()
    won = tune.Trial(sizes=WON, seconds=0.9)
    base = tune.Trial(sizes=plan(Kernel.LSE).table[Kernel.LSE], seconds=1.0)
    found = tune.Tuning(
        kernel=Kernel.LSE, policy="auto", table=base, trials=(won,), winner=won, again=1.0
    )
    lost = tune.Tuning(kernel=Kernel.PAIRS, policy="auto", table=base, trials=())
    other_gpu, stale = entry(gpu="NVIDIA A100, 8.0"), entry(triton="3.0.0")
    tuned.write([other_gpu, stale])
    assert tune.store(load, tune.winners(load, [found, lost])) == tuned.path()
    kept = tuned.read()
    assert kept[0] == other_gpu
    (mine,) = kept[1:]  # the stale one is gone
    assert mine.sizes == WON
    assert "10.0% of forward and backward under 'auto' saved" in mine.measured
    assert chosen().block_d == WON.block_d

    tune.store(load, [])  # a second search, that the table wins
    assert tuned.read() == [other_gpu]


def test_the_meter_rejects_what_fails_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, whose backend takes no tiles: a stand-in for the loss reads the trial's."""
    import torch.nn.functional as F

    used: list[Sizes | None] = []

    def loss(hidden: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sizes = tuned.lookup(DEVICE, key)
        used.append(sizes)
        if sizes is not None and sizes.num_stages == 9:
            raise RuntimeError("out of resource: shared memory")
        factor = 1.5 if sizes is not None and sizes.num_stages == 8 else 1.0
        return factor * F.cross_entropy(F.linear(hidden, classifier), labels)

    load = workloads.make(workloads.WorkloadRequest(name="random:N=16,D=8,V=60"), Silent())
    key = tune.keys_of(load, [Kernel.LSE])[Kernel.LSE]
    meter = tune.GpuMeter(load, 2, Silent())
    for subject in meter._subjects.values():
        subject.loss_function = loss
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert meter.objection("auto", {Kernel.LSE: WON}) is None
    assert meter.objection("auto", {Kernel.LSE: WON._replace(num_stages=4)}) is None
    used.clear()
    assert min(meter.seconds("auto", {Kernel.LSE: WON}, {})) > 0
    assert [sizes for sizes, _ in itertools.groupby(used)] == [WON, None] * 2  # in turns
    wrong = meter.objection("auto", {Kernel.LSE: WON._replace(num_stages=8)})
    assert re.match(r"loss off by \S+, allowed \S+; dH off by", str(wrong))
    failed = meter.objection("auto", {Kernel.LSE: WON._replace(num_stages=9)})
    assert failed == "RuntimeError: out of resource: shared memory"

    def dead(device: torch.device) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(BenchError, match="the GPU stopped answering"):
        meter.objection("auto", {Kernel.LSE: WON._replace(num_stages=9)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_search_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels run with the first two of their alternatives."""
    monkeypatch.undo()  # the GPU as it is; nothing is stored
    alternatives = tune.alternatives
    monkeypatch.setattr(tune, "alternatives", lambda *arguments: alternatives(*arguments)[:2])
    request = workloads.WorkloadRequest(
        name="random:N=512,D=256,V=8192", dtype="bf16", device="cuda", logits_times=16.0
    )
    load = workloads.make(request, Silent())
    made = tune.plan_for(load)
    assert Kernel.PAIRS in made.policies
    found = tune.search(made, tune.GpuMeter(load, 1, Silent()), Silent())
    assert [tuning.kernel for tuning in found] == list(made.policies)
    timed = [trial for tuning in found for trial in tuning.trials if trial.seconds]
    assert len(timed) > len(found)


def crosscut(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["tune", *arguments], env={"COLUMNS": "120", "TERM": "dumb"})


def words(result: Result) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_help() -> None:
    said = words(crosscut("--help"))
    for text in ("crosscut tune --workload llama3-8b --tokens 8192", "--reset", "CROSSCUT_CACHE"):
        assert text in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu() -> None:
    result = crosscut()
    assert result.exit_code == 2
    assert "cannot run on this machine: it measures on an NVIDIA GPU" in words(result)


def test_a_cache_that_cannot_be(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Said before the minutes of measuring, not after."""
    occupied = cache / "file"
    occupied.touch()
    monkeypatch.setattr(tune, "unsupported_reason", lambda: None)
    monkeypatch.setenv("CROSSCUT_CACHE", str(occupied))
    result = crosscut()
    assert result.exit_code == 2
    reason = f"CROSSCUT_CACHE must name a directory that can be written, got {occupied}: "
    assert reason in words(result)


def test_show_and_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "0 entries" in words(crosscut("--show"))
    tuned.write([entry(), entry(triton="3.0.0")])
    monkeypatch.setattr(tune, "unsupported_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    result = crosscut("--show")
    assert result.exit_code == 0
    said = words(result)
    assert "lse, bfloat16, D=2304: 128 x 128 x 32, 4 warps, 5 stages, 2 programs in a test" in said
    assert "NVIDIA H100, 9.0, Triton 3.0.0" in said
    assert said.count("not used here") == 1
    assert said.count(": used here") == 1

    assert "is gone" in words(crosscut("--reset"))
    assert not tuned.path().exists()
    assert crosscut("--reset").exit_code == 0


def test_show_of_a_broken_file() -> None:
    tuned.path().write_text("{")
    result = crosscut("--show")
    assert result.exit_code == 2
    assert "cannot be used" in words(result)


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's search replaced."""
    base = plan(Kernel.LSE).table[Kernel.LSE]
    won = tune.Trial(sizes=WON, seconds=0.018)
    tuning = tune.Tuning(
        kernel=Kernel.LSE, policy="auto", table=tune.Trial(sizes=base, seconds=0.02),
        trials=(won, tune.Trial(sizes=base._replace(block_d=128), rejected="no [room]")),
        winner=won, again=0.02,
    )  # fmt: skip
    asked: list[workloads.WorkloadRequest] = []

    def make(request: workloads.WorkloadRequest, progress: Any) -> workloads.Workload:
        asked.append(request)
        return workload()

    monkeypatch.setattr(tune, "unsupported_reason", lambda: None)
    monkeypatch.setattr(workloads, "make", make)
    monkeypatch.setattr(tune, "GpuMeter", lambda *arguments: None)
    monkeypatch.setattr(tune, "plan_for", lambda load: None)
    monkeypatch.setattr(tune, "search", lambda *arguments: [tuning])
    arguments = ("--hidden-size", "2304", "--vocab-size", "60000", "--tokens", "512")
    result = crosscut(*arguments, "--dry-run")
    assert result.exit_code == 0, result.output
    assert (asked[0].hidden, asked[0].vocab, asked[0].tokens) == (2304, 60000, 512)
    said = words(result)
    for text in ("20.00 ms", "kept: saves 10.0%", "rejected: no [room]", "Nothing kept"):
        assert text in said
    assert not tuned.path().exists()
    assert "1 of 1 kernels kept in" in words(crosscut(*arguments))
    assert chosen().block_d == WON.block_d


def test_no_home_and_odd_entries(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A training needs no file, and no place for one."""
    tuned.write([entry()])
    text = tuned.path().read_text()
    tuned.path().write_text(text.replace('"kernel": "lse"', '"kernel": ["lse"]'))
    with pytest.warns(RuntimeWarning, match="words and numbers"):
        assert tuned._winners(DEVICE) == {}
    tuned._winners.cache_clear()
    monkeypatch.setenv(
        "CROSSCUT_CACHE", str(cache / "tiles.json")
    )  # a file where a folder would be
    assert tuned._winners(DEVICE) == {}

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    tuned._winners.cache_clear()
    monkeypatch.setattr(tuned, "cache_directory", no_home)
    assert tuned._winners(DEVICE) == {}


KERNEL = """
BLOCK = 4


@kernel
def double_kernel(x_ptr, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)
    tl.store(at, 2 * tl.load(at))


def double(x):
    double_kernel[(1,)](x, SIZE=BLOCK)
"""


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        ("    at = x_ptr", "    # Where it is.\n    at = x_ptr", False),
        ("    at = x_ptr", '    """Twice as much."""\n    at = x_ptr', False),
        ("def double(x):", 'def double(x):\n    """Launch it."""', False),
        ("2 * tl.load", "3 * tl.load", True),
        ("BLOCK = 4", "BLOCK = 8", True),
    ],
    ids=["comment", "docstring", "launcher", "code", "constant"],
)
def test_tiles_are_of_what_is_compiled(before, after, counts):
    """They are forgotten when the code of a kernel changes, and not for a comment."""
    changed = KERNEL.replace(before, after)
    assert changed != KERNEL
    assert (tuned.compiled_code(changed) != tuned.compiled_code(KERNEL)) == counts
