"""The bench: truth, gate, memory meter, records. No clock is judged here."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from crosscut.bench import BenchError, contenders, measure, report, results, truth, workloads
from crosscut.bench.contenders import Contender, Grade
from crosscut.bench.measure import Yardsticks
from crosscut.bench.progress import Silent
from crosscut.bench.results import BenchResult, Errors
from crosscut.bench.run import Plan, run
from crosscut.bench.truth import Answer
from crosscut.bench.workloads import Workload, WorkloadRequest


def small(dtype: str = "fp32", name: str = "random:N=13,D=8,V=50") -> Workload:
    return workloads.make(WorkloadRequest(name=name, dtype=dtype, logits_times=3.0), Silent())


def autograd(workload: Workload, dtype: torch.dtype) -> Answer:
    hidden = workload.hidden.clone().to(dtype).requires_grad_()
    classifier = workload.classifier.clone().to(dtype).requires_grad_()
    loss = F.cross_entropy(F.linear(hidden, classifier), workload.labels)
    loss.backward()
    assert hidden.grad is not None
    assert classifier.grad is not None
    return Answer(loss=loss.item(), d_hidden=hidden.grad, d_classifier=classifier.grad)


def plain(hidden, classifier, labels):
    return F.cross_entropy(F.linear(hidden, classifier), labels)


def twice_the_gradient(hidden, classifier, labels):
    loss = plain(hidden, classifier, labels)
    return 2 * loss - loss.detach()  # the right loss


def nan_in_one_entry(hidden, classifier, labels):
    hole = torch.zeros_like(hidden)
    hole[0, 0] = math.nan
    loss = plain(hidden, classifier, labels)
    return loss + (hidden * hole).sum() - (hidden * hole).sum().detach()


def contender(name: str, loss, grade: Grade = Grade.STANDARD, **fields) -> Contender:
    return Contender(
        name=name, what="for a test", grade=grade, build=lambda: loss, slack=1.5, **fields
    )


def bench(*chosen: Contender, dtype: str = "fp32") -> BenchResult:
    plan = Plan(contenders=list(chosen), left_out={"nobody": "a test"}, repeats=2, command="test")
    # Of a smaller head errors are a few roundings, and chance decides which of two is larger.
    return run(small(dtype, "random:N=64,D=32,V=500"), plan, Silent())


# Truth and yardstick.


@pytest.mark.parametrize("block", [2**22, 40])  # 40: three classes at a time
def test_truth_is_float64_autograd(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "_BLOCK", block)
    workload = small()
    errors = truth.relative_errors(
        truth.truth(workload, Silent()), autograd(workload, torch.float64)
    )
    assert max(errors.loss, errors.d_hidden, errors.d_classifier) < 1e-12


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_truth_of_low_precision_inputs_is_far_more_precise(dtype: str) -> None:
    workload = small(dtype)
    errors = truth.relative_errors(
        truth.truth(workload, Silent()), autograd(workload, torch.float64)
    )
    assert max(errors.loss, errors.d_hidden, errors.d_classifier) < 1e-6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_yardstick_is_plain_pytorch(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = small(dtype)
    right = truth.truth(workload, Silent())
    wanted = truth.relative_errors(autograd(workload, workload.hidden.dtype), right)
    for block in (2**22, 4):  # all tokens at once, and 5 at a time
        monkeypatch.setattr(truth, "_BLOCK", block)
        found = truth.relative_errors(truth.plain_pytorch(workload, Silent()), right)
        assert found.d_hidden == pytest.approx(wanted.d_hidden, rel=0.5)
        assert found.d_classifier == pytest.approx(wanted.d_classifier, rel=0.5)


def test_relative_errors() -> None:
    right = Answer(loss=2.0, d_hidden=torch.tensor([[3.0, 4.0]]), d_classifier=torch.ones(1, 1))
    found = Answer(
        loss=2.1, d_hidden=torch.tensor([[3.0, 4.5]]), d_classifier=torch.full((1, 1), math.nan)
    )
    errors = truth.relative_errors(found, right)
    assert errors.loss == pytest.approx(0.05)
    assert errors.d_hidden == pytest.approx(0.1)
    assert math.isnan(errors.d_classifier)


def test_relative_errors_of_nothing() -> None:
    """A softmax that has all its mass on the label has no gradient."""
    nothing = Answer(loss=0.0, d_hidden=torch.zeros(1, 1), d_classifier=torch.zeros(1, 1))
    assert truth.relative_errors(nothing, nothing) == Errors(loss=0, d_hidden=0, d_classifier=0)
    something = replace(nothing, loss=1e-9, d_hidden=torch.ones(1, 1))
    errors = truth.relative_errors(something, nothing)
    assert errors == Errors(loss=math.inf, d_hidden=math.inf, d_classifier=0)


# The gate.


def test_the_gate_lets_right_answers_in() -> None:
    result = bench(contender("right", plain), *contenders.choose("none", "cpu", "fp32")[0])
    assert not result.failed
    names = [row.contender for row in result.rows if row.forward_s]
    assert names == ["right", "crosscut-auto", "crosscut-filtered"]
    for row in result.rows[:3]:
        assert len(row.forward_s) == len(row.forward_backward_s) == 2
        assert row.host is None  # on a CPU it is the same
        assert row.peak_extra_bytes is not None
    assert result.rows[1].kept == 1.0


@pytest.mark.parametrize("loss", [twice_the_gradient, nan_in_one_entry])
@pytest.mark.parametrize("grade", list(Grade))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_answer_gets_no_time(loss, grade: Grade, dtype: str) -> None:
    result = bench(contender("wrong", loss, grade), contender("right", plain), dtype=dtype)
    wrong, right = result.rows[:2]
    assert result.failed
    assert wrong.failure is not None
    assert "dH off by" in wrong.failure
    assert wrong.forward_s == wrong.forward_backward_s == ()
    assert wrong.peak_extra_bytes is None
    assert right.failure is None
    assert len(right.forward_s) == 2


def test_a_wrong_loss_fails_too() -> None:
    result = bench(contender("wrong", lambda h, c, y: plain(h, c, y) + 0.1))
    assert result.failed
    assert "loss off by" in (result.rows[0].failure or "")


def test_an_error_is_a_failure_and_out_of_memory_is_not() -> None:
    def broken(hidden, classifier, labels):
        raise RuntimeError("no such kernel")

    def too_large(hidden, classifier, labels):
        raise torch.OutOfMemoryError("too large")

    result = bench(contender("broken", broken), contender("large", too_large))
    assert result.rows[0].failure == "raised RuntimeError: no such kernel"
    assert result.rows[1].failure is None
    assert result.rows[1].absent == "ran out of memory"


def test_what_each_grade_allows() -> None:
    yardsticks = Yardsticks(
        same_dtype=Errors(loss=0, d_hidden=1e-6, d_classifier=2e-6),
        bfloat16=Errors(loss=0, d_hidden=1e-2, d_classifier=2e-2),
    )

    def most(grade: Grade, dtype: torch.dtype, slack: float = 1.0) -> tuple[float, float]:
        limit = measure.allowed(
            replace(contender("any", plain, grade), slack=slack), yardsticks, dtype
        )
        return limit.d_hidden, limit.d_classifier

    assert most(Grade.STANDARD, torch.float32) == pytest.approx((4e-6, 8e-6))
    assert most(Grade.STANDARD, torch.bfloat16) == pytest.approx((1e-6, 2e-6))
    assert most(Grade.STANDARD, torch.bfloat16, 2.0) == pytest.approx((2e-6, 4e-6))
    assert most(Grade.LOW_PRECISION, torch.float32) == pytest.approx((1e-2, 2e-2))
    assert most(Grade.LOSSY, torch.bfloat16) == (0.5, 0.5)


def test_crosscut_is_held_to_pytorch_itself_in_low_precision() -> None:
    known = contenders.everyone()
    for name in ("crosscut-auto", "crosscut-exact"):
        assert known[name].grade is Grade.STANDARD
        assert known[name].slack == 1.0
    assert known["crosscut-filtered"].grade is Grade.LOW_PRECISION


# Who is there.


def test_absent_contenders_are_listed() -> None:
    result = bench(contender("far-away", plain, package="far-away", module="no_such_module"))
    assert result.rows[0].absent == "not installed: pip install far-away"
    (line,) = (line for line in report.markdown(result).splitlines() if "Not run" in line)
    assert line == "Not run: far-away (not installed: pip install far-away); nobody (a test)."
    assert result.rows[1].contender == "nobody"
    assert result.rows[1].absent == "a test"
    assert not result.failed


def test_choice_of_contenders() -> None:
    def names(against: str, device: str = "cpu", dtype: str = "bf16") -> list[str]:
        return [contender.name for contender in contenders.choose(against, device, dtype)[0]]

    every = list(contenders.everyone())
    assert names("none") == ["crosscut-auto", "crosscut-exact"]
    assert names("none", dtype="fp32") == ["crosscut-auto", "crosscut-filtered"]
    assert names("all") == every
    assert names("pytorch, crosscut-cce") == [
        "crosscut-auto", "crosscut-exact", "crosscut-cce", "pytorch"
    ]  # fmt: skip
    assert "pytorch-chunked" not in names("default")
    assert "pytorch-chunked" in names("default,pytorch-chunked")
    assert "pytorch-chunked" in names("default", device="cuda")
    chosen, left_out = contenders.choose("default", "cpu", "bf16")
    assert sorted([*left_out, *(contender.name for contender in chosen)]) == sorted(every)
    assert left_out["pytorch-chunked"].startswith("takes many minutes")
    assert contenders.choose("none", "cpu", "bf16")[1]["pytorch"] == "not asked for"
    with pytest.raises(BenchError, match=r"--against must name some of .* got 'foo'"):
        contenders.choose("pytorch,foo", "cpu", "bf16")


def test_contenders_that_need_cuda_say_so() -> None:
    known = contenders.everyone()
    for name in ("cut-cross-entropy", "liger-kernel", "quack-kernels"):
        assert (
            known[name].unsupported_reason(small()) == "needs a CUDA device, got cpu"
        )  # installed or not


def test_no_logits_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_free_bytes", lambda device: 2**30)
    known = contenders.everyone()
    workload = small()
    huge = replace(workload, classifier=torch.empty(2**26, 8, device="meta"))
    assert known["pytorch"].unsupported_reason(workload) is None
    assert (
        known["pytorch"].unsupported_reason(huge) == "needs about 12 GiB of memory, 1 GiB are free"
    )


# The memory meter.


def test_the_meter_sees_every_byte() -> None:
    before = torch.empty(5_000_000, dtype=torch.uint8)
    kept = []

    def work() -> None:
        first = torch.empty(1_000_000, dtype=torch.uint8)
        second = torch.empty(2_000_000, dtype=torch.uint8)
        del first
        third = torch.empty(500_000, dtype=torch.uint8)  # 3.0 MB was the peak
        del second
        kept.append(third)

    for _ in range(2):  # what the first run keeps is no part of the second
        assert measure.peak_bytes(work, before.device) == 3_000_000


def test_gradients_are_not_added_to_older_ones() -> None:
    """Else what is timed is an addition too, three times as many bytes as dC has."""
    subject = measure.Subject(contenders.everyone()["pytorch"].build(), small())
    found = []
    for _ in range(2):
        subject.forward_backward()
        assert subject.classifier.grad is not None
        found.append(subject.classifier.grad.clone())
    assert torch.equal(*found)


def test_the_meter_tells_stored_logits_from_none() -> None:
    workload = small(name="random:N=512,D=16,V=20000")
    found = {}
    for name in ("crosscut-exact", "pytorch"):
        subject = measure.Subject(contenders.everyone()[name].build(), workload)
        found[name] = subject.answer()[1]
    assert found["pytorch"] > 2 * workload.logits_bytes * 0.9  # 41 MB each
    assert 0 < found["crosscut-exact"] < 1.5 * workload.logits_bytes


# Doubts.


@functools.cache
def measured() -> BenchResult:
    return bench(contender("right", plain))


def quiet(**changes) -> BenchResult:
    """A result that nothing speaks against."""
    result = measured()
    machine = replace(result.machine, wait_policy=None)
    row = replace(result.rows[0], forward_backward_s=(1.0, 1.2))
    fields = {
        "matmul_s": (1.0, 1.1),
        "cores_of_others": 0.0,
        "commit": "c0ffee",
        "rows": (row,),
        "machine": machine,
    }
    return replace(result, **(fields | changes))


def test_a_quiet_run_raises_no_doubts() -> None:
    result = quiet()
    assert result.rows[0].spread == pytest.approx(1.2)
    assert report.doubts(result) == []
    assert report.doubts(replace(result, cores_of_others=None)) == []  # an older file


def test_a_noisy_run_says_so() -> None:
    row = quiet().rows[0]
    wide = replace(row, contender="crosscut-auto", forward_backward_s=(1.34, 2.0, 18.2))
    result = quiet(rows=(row, wide))
    (line,) = report.doubts(result)
    assert line.startswith("NOISY: times of crosscut-auto were between 1.34 s and 18.2 s. ")
    assert "OMP_WAIT_POLICY=PASSIVE" in line
    assert line in report.markdown(result)
    console = Console(width=10_000, file=StringIO())
    with console.capture() as captured:
        console.print(report.table(result))
    assert line in captured.get()
    passive = replace(result, machine=replace(result.machine, wait_policy="PASSIVE"))
    assert "OMP_WAIT_POLICY" not in report.doubts(passive)[0]
    (line,) = report.doubts(quiet(matmul_s=(0.1, 0.2)))
    assert line.startswith("NOISY: times of the logits matmul were between 100 ms and 200 ms. ")


def test_a_machine_with_other_work_is_noisy() -> None:
    result = quiet(cores_of_others=1.84)
    result = replace(result, machine=replace(result.machine, cores=2))
    (line,) = report.doubts(result)
    assert line.startswith("NOISY: other processes kept 1.8 of 2 cores busy. ")


def test_what_else_is_no_measurement() -> None:
    once = replace(quiet().rows[0], forward_backward_s=(1.0,))
    assert once.spread is None
    assert [line.split(" ")[0] for line in report.doubts(quiet(rows=(once,)))] == ["ONE"]
    assert [line.split(" ")[0] for line in report.doubts(quiet(commit="c0ffee-dirty"))] == [
        "CHANGED"
    ]


def test_cpu_seconds_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that is not idle, and not ours."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(measure, "_STAT", stat)
    monkeypatch.setattr(measure.os, "times", lambda: SimpleNamespace(user=0.5, system=0.25))
    monkeypatch.setattr(measure.os, "sysconf", {"SC_CLK_TCK": 10}.__getitem__)
    assert measure.cpu_seconds_of_others() is None
    stat.write_text("cpu  1000 200 30 99999 88888 4 5 6 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n")
    assert measure.cpu_seconds_of_others() == 124.5 - 0.75


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs F.linear_cross_entropy"
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pytorch_is_its_linear_cross_entropy(dtype: str) -> None:
    """Without options. With them it is a contender of its own, which is right as well."""
    workload, known = small(dtype), contenders.everyone()
    head = (workload.hidden, workload.classifier, workload.labels)
    assert torch.equal(known["pytorch"].build()(*head), F.linear_cross_entropy(*head))
    result = bench(known["pytorch-chunked"], dtype=dtype)
    assert not result.failed
    assert result.rows[0].forward_backward_s


# The bare matmul, and what is written down.


def test_logits_matmul_reads_every_row() -> None:
    workload = small()
    measure.logits_matmul(workload)()
    classifier = workload.classifier.clone()
    classifier[-1, 0] = math.nan
    seen = []

    def mm(left, right, *, out):
        seen.append(right.isnan().any().item())
        return torch.matmul(left, right, out=out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        measure.logits_matmul(replace(workload, classifier=classifier))()
    assert seen[-1]


def test_json_round_trip(tmp_path: Path) -> None:
    result = bench(contender("right", plain), contender("wrong", twice_the_gradient))
    results.save(result, tmp_path / "result.json")
    assert results.load(tmp_path / "result.json") == result
    assert result.machine.torch == torch.__version__
    assert result.command == "test"


def test_results_from_before_host_times(tmp_path: Path) -> None:
    result, path = bench(contender("right", plain)), tmp_path / "result.json"
    results.save(result, path)
    data = json.loads(path.read_text())
    for row in data["rows"]:
        del row["host_s"]
    path.write_text(json.dumps(data))
    assert results.load(path) == result


NOT_RESULTS = ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "machine": []}']


@pytest.mark.parametrize("content", NOT_RESULTS)
def test_not_a_result(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"must be a (whole )?result of crosscut bench --json"):
        results.load(path)
    with pytest.raises(BenchError, match="must be a result of crosscut bench --json"):
        results.load(tmp_path / "missing.json")


@pytest.mark.real
@pytest.mark.usefixtures("real_head")
def test_the_real_head_passes_the_gate() -> None:
    request = WorkloadRequest(name="gemma3-270m", tokens=64, dtype="bf16")
    chosen = [contenders.everyone()[name] for name in ("crosscut-auto", "pytorch")]
    result = run(workloads.make(request, Silent()), Plan(contenders=chosen, repeats=1), Silent())
    assert not result.failed
    auto = result.rows[0]
    assert auto.kept is not None
    assert 0 < auto.kept < 0.5  # the softmax of real text is sparse
