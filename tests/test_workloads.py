"""Workloads: real logits in every shape, and the cache they come from."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosscut.bench import BenchError, real_head, workloads
from crosscut.bench.progress import Silent
from crosscut.bench.real_head import RealHead
from crosscut.bench.workloads import HeadShape, WorkloadRequest

VOCAB, HIDDEN, TOKENS = 40, 6, 9


@pytest.fixture
def head() -> RealHead:
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[0] = VOCAB - 1  # outside of every smaller vocabulary
    return RealHead(
        classifier=torch.randn(VOCAB, HIDDEN),
        hidden=torch.randn(TOKENS, HIDDEN),
        labels=labels,
        vocabulary=labels.unique(),
        source="a test",
    )


def widen(head: RealHead, hidden: int, vocab: int, **request) -> workloads.Workload:
    options = {"dtype": "fp32", **request}
    return workloads.from_real_head(
        head,
        HeadShape(hidden=hidden, vocab=vocab),
        WorkloadRequest(name="test", **options),
        Silent(),
    )


@pytest.mark.parametrize("hidden", [HIDDEN, 16])
@pytest.mark.parametrize("vocab", [VOCAB, 12])
def test_logits_are_those_of_the_real_head(head: RealHead, hidden: int, vocab: int) -> None:
    workload = widen(head, hidden, vocab)
    classes = workloads.choose_classes(head.vocabulary, of=VOCAB, keep=vocab)
    found = workload.hidden.double() @ workload.classifier.double().T
    wanted = head.hidden.double() @ head.classifier[classes].double().T
    assert workload.classifier.shape == (vocab, hidden)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)

    target = (head.hidden.double() * head.classifier[head.labels].double()).sum(1)
    torch.testing.assert_close(
        found.gather(1, workload.labels[:, None])[:, 0], target, rtol=0, atol=2e-6
    )


def test_the_cast_comes_after_the_rotation(head: RealHead) -> None:
    exact, cast = (widen(head, 16, 12, dtype=dtype) for dtype in ("fp32", "bf16"))
    assert torch.equal(exact.classifier.bfloat16(), cast.classifier)
    assert torch.equal(exact.hidden.bfloat16(), cast.hidden)


def test_rotation_in_blocks(head: RealHead, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = widen(head, 16, VOCAB)
    monkeypatch.setattr(workloads, "_ROWS", 7)
    torch.testing.assert_close(widen(head, 16, VOCAB).classifier, whole.classifier)


def test_a_named_model_of_another_shape(head: RealHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_head, "load", lambda tokens, progress: head)
    request = WorkloadRequest(name="gemma3-270m", tokens=TOKENS, hidden=16, vocab=12)
    assert workloads.make(request, Silent()).classifier.shape == (12, 16)


@pytest.mark.parametrize("hidden", [HIDDEN, 16])
def test_logits_times(head: RealHead, hidden: int) -> None:
    once, half = (widen(head, hidden, VOCAB, logits_times=times) for times in (1.0, 0.5))
    torch.testing.assert_close(half.hidden, once.hidden * 0.5)
    assert torch.equal(half.classifier, once.classifier)


def test_orthonormal() -> None:
    rotation = workloads.orthonormal(6, 16).double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6).double(), rtol=0, atol=1e-6)
    assert torch.equal(workloads.orthonormal(6, 16).double(), rotation)


@given(
    needed=st.sets(st.integers(0, 29), min_size=1, max_size=12),
    keep=st.integers(12, 30),
)
def test_chosen_classes(needed: set[int], keep: int) -> None:
    classes = workloads.choose_classes(torch.tensor(sorted(needed)), of=30, keep=keep).tolist()
    assert len(classes) == len(set(classes)) == keep
    assert needed <= set(classes)
    assert all(id_ == place for place, id_ in enumerate(classes) if id_ < keep)


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(BenchError, match=r"between 3, the distinct labels .* and 30, got 2"):
        workloads.choose_classes(torch.tensor([1, 2, 3]), of=30, keep=2)


def test_random() -> None:
    request = WorkloadRequest(name="random:N=50,D=64,V=300", dtype="fp32", logits_times=0.5)
    workload = workloads.make(request, Silent())
    assert (*workload.hidden.shape, len(workload.classifier)) == (50, 64, 300)
    assert (workload.hidden @ workload.classifier.T).std().item() == pytest.approx(0.5, rel=0.05)
    assert workload.labels.min() >= 0
    assert workload.labels.max() < 300
    assert workload.note is not None
    assert "Random logits" in workload.note


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"name": "gpt-9"}, "--workload must be one of gemma3-270m, "),
        ({"name": "random:D=4,V=9", "vocab": 7}, "has a shape of its own: give no other"),
        ({"name": "random:D=4"}, "--workload must give V, got 'random:D=4'"),
        ({"name": "random:D=4,V=0"}, "with positive sizes, got 'random:D=4,V=0'"),
        ({"name": "random:D=4,W=3"}, "--workload must look like random:N=1024,D=640,V=262144"),
        ({"name": "random:N=4,D=4,V=3", "tokens": 5}, "--tokens is 5, --workload says N=4"),
        ({"name": "random:D=4,V=1"}, "must have two classes or more, got 'random:D=4,V=1'"),
        ({"name": "random:D=4,V=3", "logits_times": math.nan}, "finite number, got nan"),
        ({"name": "random:D=4,V=3", "logits_times": math.inf}, "finite number, got inf"),
        ({"name": "random:D=4,V=3", "tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"name": "random:D=4,V=3", "dtype": "int8"}, "--dtype must be one of bf16, fp16, fp32"),
    ],
)
def test_bad_requests(request_: dict, message: str) -> None:
    with pytest.raises(BenchError) as error:
        workloads.make(WorkloadRequest(**request_), Silent())
    assert message in str(error.value)


# The real head: its text, its cache, and a saved one in its place.


def test_shipped_ids() -> None:
    ids = real_head._shipped_ids()
    assert len(ids) > 100 * real_head.WINDOW
    assert ids.min() >= 0
    assert ids.max() < real_head.VOCAB
    assert real_head._BEGIN not in ids


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in whose hidden state is its input id; remembers what it was fed."""
    pytest.importorskip("safetensors")
    monkeypatch.delenv(real_head.SAVED_HEAD, raising=False)
    monkeypatch.setenv("CROSSCUT_CACHE", str(tmp_path))
    fed: list[torch.Tensor] = []

    def body(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        fed.append(input_ids[0])
        return SimpleNamespace(last_hidden_state=input_ids[..., None].float())

    head = SimpleNamespace(weight=torch.arange(8.0)[:, None])
    fake = SimpleNamespace(model=body, lm_head=head, fed=fed, cache=tmp_path)
    monkeypatch.setattr(real_head, "_load_model", lambda cache: fake)
    return fake


def test_inputs_and_labels_of_the_model(model: SimpleNamespace) -> None:
    ids = real_head._shipped_ids()
    head = real_head.load(1500, Silent())
    assert [len(window) for window in model.fed] == [1024, 1024]  # no more than needed
    assert torch.equal(head.labels, ids[:1500])
    inputs = head.hidden[:, 0].long()
    for start in (0, 1024):  # each window begins afresh, then each input is the label before it
        assert inputs[start] == real_head._BEGIN
        rest = slice(start + 1, min(start + 1024, 1500))
        assert torch.equal(inputs[rest], head.labels[rest.start - 1 : rest.stop - 1])
    assert torch.equal(head.vocabulary, ids.unique())


def test_the_model_runs_once(model: SimpleNamespace) -> None:
    first = real_head.load(2000, Silent())
    again = real_head.load(700, Silent())
    assert len(model.fed) == 2
    assert torch.equal(again.hidden, first.hidden[:700])
    assert torch.equal(again.classifier, model.lm_head.weight)
    real_head.load(2049, Silent())  # a third window
    assert len(model.fed) == 2 + 3
    assert not list(model.cache.rglob("*.part"))


@pytest.mark.parametrize("file", ["head", "hidden-2"])
@pytest.mark.parametrize("size", [0, 5, 70])
def test_a_file_that_is_not_whole_is_made_again(
    model: SimpleNamespace, file: str, size: int
) -> None:
    first = real_head.load(1025, Silent())
    (path,) = model.cache.rglob(f"{file}.safetensors")
    whole = path.read_bytes()
    path.unlink()  # the tensors loaded from it stay mapped
    path.write_bytes(whole[:size])
    again = real_head.load(1025, Silent())
    assert len(model.fed) == 2 * 2
    assert torch.equal(again.hidden, first.hidden)
    assert torch.equal(again.classifier, first.classifier)


def test_a_broken_write_leaves_nothing(model: SimpleNamespace) -> None:
    model.lm_head.weight = torch.arange(8.0).to_sparse()
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        real_head.load(10, Silent())
    assert not [path for path in model.cache.rglob("*") if path.is_file()]


def test_too_many_tokens(model: SimpleNamespace) -> None:
    with pytest.raises(BenchError, match=r"--tokens must be at most 112640, .* got 200000"):
        real_head.load(200_000, Silent())
    assert not model.fed


def test_saved_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.setenv(real_head.SAVED_HEAD, str(tmp_path))
    with pytest.raises(BenchError, match="must hold gemma3_270m_head"):
        real_head.load(1, Silent())
    tensors = {
        "hidden": torch.randn(5, 3).bfloat16(),
        "labels": torch.tensor([1, 0, 1, 3, 2], dtype=torch.int32),
        "classifier_int8": torch.randint(-127, 128, (4, 3), dtype=torch.int8),
        "classifier_scale": torch.rand(4, 1).half(),
    }
    data = safetensors.save(tensors)
    for number, part in enumerate((data[:100], data[100:])):
        (tmp_path / f"gemma3_270m_head.safetensors.part{number}").write_bytes(part)
    head = real_head.load(2, Silent())
    assert torch.equal(head.hidden, tensors["hidden"][:2].float())
    assert head.labels.tolist() == [1, 0]
    assert head.vocabulary.tolist() == [0, 1, 2, 3]
    scaled = tensors["classifier_int8"].float() * tensors["classifier_scale"].float()
    assert torch.equal(head.classifier, scaled)
    with pytest.raises(BenchError, match="at most 5 with a saved head, got 6"):
        real_head.load(6, Silent())


@pytest.mark.real
@pytest.mark.usefixtures("real_head")
def test_real_logits_in_a_wider_head() -> None:
    request = WorkloadRequest(name="phi3.5-mini", tokens=64, dtype="fp32")
    wide = workloads.make(request, Silent())
    assert (*wide.hidden.shape, len(wide.classifier)) == (64, 3072, 32064)
    loss = torch.nn.functional.cross_entropy(wide.hidden @ wide.classifier.T, wide.labels)
    assert loss.item() < 6  # random logits would give ln 32064 = 10.4 or more
