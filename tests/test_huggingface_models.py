"""Models of transformers, deferred: a few of every pattern, resizing, PEFT, torch.compile.

``python3 tasks.py coverage`` does for all models what the first test here does for a few.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support.judging import FACTOR, error, rounding
from torch import Tensor, nn

import crosscut
from crosscut.bench.measure import peak_bytes
from crosscut.integrations import huggingface
from crosscut.integrations.deferred import DeferredLogits

pytest.importorskip("transformers")
from programs import huggingface_compiled as compiled_coverage
from programs import huggingface_coverage as coverage
from support.tiny_models import FEW, IDS, assert_same_step, defer, entry_of, fused, step, tiny


@pytest.mark.parametrize("name", FEW)
def test_few(name):
    row = coverage.run(entry_of(name, FEW[name]))
    assert row.error == ""
    assert row.fused == "fused"
    assert set(row.verdicts.values()) <= {"yes", "–"}, row.verdicts
    assert list(row.verdicts.values()).count("yes") >= 8


def test_coverage_sees_a_wrong_gradient(monkeypatch):
    """The checks can fail: a loss that is off by a thousandth is found."""
    from crosscut.integrations.form import LogitForm

    right = LogitForm.cross_entropy
    monkeypatch.setattr(LogitForm, "cross_entropy", lambda *a, **k: right(*a, **k) * 1.001)
    row = coverage.run(entry_of("LlamaForCausalLM", "causal"))
    assert row.verdicts["labels"].startswith("WRONG")
    assert row.verdicts["own loop"].startswith("WRONG")


def test_state_dict_is_the_same():
    model = tiny()
    before = dict(model.state_dict())
    after = defer(model).state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)


def test_twice_is_once():
    model = defer(tiny())
    with pytest.raises(huggingface.LogitsMaterializedError):
        model(input_ids=IDS).logits.exp()
    crosscut.defer_logits(model, min_numel=0, on_materialize="silent")  # the later call counts
    model(input_ids=IDS).logits.exp()
    assert len(model._forward_pre_hooks) == 1


def test_default_leaves_small_logits_alone():
    model = crosscut.defer_logits(tiny())
    assert type(model(input_ids=IDS).logits) is Tensor
    assert "min_numel" in str(huggingface.explain(model)[0])


def test_explain():
    model = defer(tiny(), on_materialize="silent")
    outputs = model(input_ids=IDS, labels=IDS)
    outputs.logits.softmax(-1)
    (report,) = huggingface.explain(model)
    assert report.name == "lm_head"
    text = str(report)
    assert "1 fused: cross_entropy" in text
    assert "1 materialised: softmax of [2, 16, 96] under grad, at" in text
    assert "test_huggingface_models.py" in text
    assert str(huggingface.explain(tiny())[0]).startswith("LlamaForCausalLM: not deferred")


def test_resized_embeddings():
    """A new head is deferred at the next forward."""
    model, other = defer(tiny()), tiny()
    for each in (model, other):
        torch.manual_seed(0)
        each.resize_token_embeddings(120)
    assert_same_step(model, other)
    assert fused(model) == 1
    assert model.lm_head.out_features == 120


def test_frozen_head():
    model, other = defer(tiny()), tiny()
    for each in (model, other):
        each.lm_head.requires_grad_(False)
    assert_same_step(model, other)


def test_outputs_as_tuple():
    model, other = defer(tiny()), tiny()
    loss, logits = model(input_ids=IDS, labels=IDS, return_dict=False)[:2]
    expected = other(input_ids=IDS, labels=IDS, return_dict=False)
    assert torch.allclose(loss, expected[0])
    assert isinstance(logits, DeferredLogits)
    assert torch.equal(huggingface.materialize(logits), expected[1])


def test_no_head():
    class NoHead(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(TypeError, match=r"NoHead has no output head.*gives None.*DeferredLinear"):
        crosscut.defer_logits(NoHead())


class Int8Linear(nn.Linear):
    """Dequantises in its forward, as quantisers' layers do."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(torch.int8).to(input.dtype))


def test_quantised_head_is_left_alone():
    models = tiny(), tiny()
    for model in models:
        model.lm_head.__class__ = Int8Linear
    with pytest.warns(
        huggingface.HeadNotDeferredWarning, match="test_huggingface_models.Int8Linear"
    ):
        model = crosscut.defer_logits(models[0], min_numel=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", huggingface.HeadNotDeferredWarning)
        for _ in range(4):  # one warning is enough
            logits = model.train()(input_ids=IDS).logits
    assert torch.equal(logits, models[1](input_ids=IDS).logits)
    assert not huggingface.is_deferred(model)


def test_parametrised_head():
    """Before it is one it is deferred, and stays so; after, it is left alone."""

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    def parametrised(model: Any) -> Any:
        nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Halved())
        return model

    other = parametrised(tiny())
    before = parametrised(defer(tiny()))
    assert_same_step(before, other)
    assert fused(before) == 1
    with torch.no_grad():
        assert torch.equal(before(input_ids=IDS).logits, other(input_ids=IDS).logits)
    with pytest.warns(huggingface.HeadNotDeferredWarning, match="ParametrizedLinear"):
        after = defer(parametrised(tiny()))
    assert_same_step(after, other)


def test_other_weights():
    model = defer(tiny())
    model.lm_head.weight = nn.Parameter(
        model.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises((RuntimeError, NotImplementedError)):  # as torch.nn.Linear
        model(input_ids=IDS)
    assert any("float8" in why for why in huggingface.explain(model)[0].log.real)


def test_no_tensor_of_logits_in_a_step():
    """Peak memory of a training step: less than one matrix of logits, where PyTorch has several."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=65_536, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(65_536, (1, 1024))
    logits = ids.numel() * config.vocab_size

    def peak(model: Any, dtype: torch.dtype) -> int:
        model.to(dtype)
        gradients = sum(p.nbytes for p in model.parameters())

        def run() -> None:
            outputs = model(input_ids=ids, labels=ids)
            outputs.loss.backward()

        model(input_ids=ids[:, :8], labels=ids[:, :8]).loss.backward()
        model.zero_grad(set_to_none=True)
        return peak_bytes(run, torch.device("cpu")) - gradients

    model = transformers.LlamaForCausalLM(config)
    for dtype in (torch.float32, torch.bfloat16):
        untouched = peak(copy.deepcopy(model), dtype)
        deferred = peak(defer(copy.deepcopy(model)), dtype)
        assert deferred < logits * dtype.itemsize / 2
        assert untouched > 2 * logits * dtype.itemsize


class TestPeft:
    @pytest.fixture(autouse=True)
    def _peft(self) -> None:
        pytest.importorskip("peft")

    def adapted(self, model: Any, **options: Any) -> Any:
        import peft

        torch.manual_seed(0)
        options = {"target_modules": ["q_proj", "v_proj"], **options}
        adapted: Any = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options)
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zeros would hide a mistake
                nn.init.normal_(parameter, std=0.2)
        return adapted

    CONFIGS: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "body": {},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "head, modules_to_save": {"modules_to_save": ["lm_head"]},
        "head, rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
        "head, bias": {"target_modules": ["lm_head"], "lora_bias": True},
    }

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_fused(self, name, when):
        options = self.CONFIGS[name]
        other = self.adapted(tiny(), **options)
        if when == "before":
            model = self.adapted(defer(tiny()), **options)
        else:
            model = defer(self.adapted(tiny(), **options))
        model.load_state_dict(other.state_dict())
        assert_same_step(model, other)
        assert fused(model) == 1
        (report,) = huggingface.explain(model)
        assert report.log.deferred == 1  # of the head, not of its parts
        outputs = [each(input_ids=IDS, labels=IDS) for each in (model, other)]
        with torch.no_grad():
            assert torch.allclose(outputs[0].logits, outputs[1].logits)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_adapter_without_the_head(self, when):
        """Some compute the logits without ever calling the layer they adapt."""
        import peft

        config = peft.HRAConfig(target_modules=["lm_head"])
        model = tiny()
        if when == "before":
            model = peft.get_peft_model(defer(model), config)
        else:
            model = defer(peft.get_peft_model(model, config))
        model.train()
        for _ in range(2):
            model(input_ids=IDS, labels=IDS)
        with pytest.warns(huggingface.HeadNotDeferredWarning, match=r"HRALinear.*never called"):
            model(input_ids=IDS, labels=IDS)

    def test_subclass_of_linear(self):
        import peft

        torch.manual_seed(0)
        config = peft.VBLoRAConfig(
            target_modules=["lm_head"], num_vectors=8, vector_length=16, topk=2
        )
        other: Any = peft.get_peft_model(tiny(), config)
        with pytest.warns(huggingface.HeadNotDeferredWarning, match=r"vblora\.layer\.Linear"):
            model = defer(copy.deepcopy(other))
        assert_same_step(model, other)

    def test_head_under_autocast(self):
        other = self.adapted(tiny(), target_modules=["lm_head"])
        model = defer(self.adapted(tiny(), target_modules=["lm_head"]))
        model.load_state_dict(other.state_dict())
        exact = step(copy.deepcopy(other).double())[1]
        with torch.autocast("cpu", torch.bfloat16):
            mine, theirs = step(model)[1], step(other)[1]
        for name, true in exact.items():
            allowed = FACTOR * error(theirs[name], true) + rounding(torch.bfloat16)
            assert error(mine[name], true) <= allowed, name

    def test_dora_on_the_head_is_right(self):
        """Its magnitudes scale the logits one by one: real ones."""
        options = {"target_modules": ["lm_head"], "use_dora": True}
        other = self.adapted(tiny(), **options)
        model = defer(self.adapted(tiny(), **options), on_materialize="silent")
        model.load_state_dict(other.state_dict())
        assert_same_step(model, other)

    def test_merge_and_unmerge(self):
        other = self.adapted(tiny(), target_modules=["q_proj", "lm_head"])
        model = defer(self.adapted(tiny(), target_modules=["q_proj", "lm_head"]))
        model.load_state_dict(other.state_dict())
        for change in ("merge_adapter", "unmerge_adapter"):
            for each in (model, other):
                getattr(each, change)()
            with torch.no_grad():
                losses = [each(input_ids=IDS, labels=IDS).loss for each in (model, other)]
            assert torch.allclose(*losses)
        merged, others = model.merge_and_unload(), other.merge_and_unload()
        for each in (merged, others):
            each.requires_grad_(True)
        assert_same_step(merged, others)

    def test_disabled_adapter(self):
        model = defer(self.adapted(tiny(), target_modules=["lm_head"]))
        with torch.no_grad(), model.disable_adapter():
            loss = model(input_ids=IDS, labels=IDS).loss
        assert torch.allclose(loss, tiny()(input_ids=IDS, labels=IDS).loss)

    def test_tied_head(self):
        """An adapter on a head that shares its weight with the embedding."""
        other = self.adapted(
            tiny("GPT2LMHeadModel"), target_modules=["c_attn"], fan_in_fan_out=True
        )
        model = defer(copy.deepcopy(other))
        assert_same_step(model, other)

    def test_undo(self):
        model = defer(self.adapted(tiny(), target_modules=["lm_head"]))
        crosscut.undefer_logits(model)
        assert not huggingface.is_deferred(model)
        assert type(model(input_ids=IDS).logits) is Tensor


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> None:
        torch._dynamo.reset()

    @pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
    def test_full_graph(self, name):
        model, other = tiny(name), tiny(name)
        compiled = torch.compile(defer(model), fullgraph=True, backend="aot_eager")
        outputs = compiled(input_ids=IDS, labels=IDS, use_cache=False)
        outputs.loss.backward()
        expected = step(copy.deepcopy(other).double())
        theirs = step(other)
        mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for key, true in expected[1].items():
            allowed = FACTOR * error(theirs[1][key], true) + rounding(torch.float32)
            assert error(mine[key], true) <= allowed, key
        assert not logits_in_a_step(compiled, IDS)
        assert logits_in_a_step(torch.compile(other, backend="aot_eager"), IDS)

    @pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BartForCausalLM"])
    def test_graph_breaks(self, name):
        """Around the loss they cost the graph, and nothing else."""
        case = coverage.make_case(entry_of(name, "causal"))
        assert compiled_coverage.judge(case, "aot_eager")[:2] == ("fused", "yes")
        untouched = case.fresh()
        watch = compiled_coverage.Watch("eager", [untouched.get_output_embeddings().weight])
        compiled_coverage.compiled_step(untouched, case, watch)
        assert (watch.losses, watch.logits) == (0, 1)

    def test_logits_outside_of_the_graph(self):
        model, other = defer(tiny()), tiny()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = compiled(input_ids=IDS, use_cache=False).logits
        expected = other(input_ids=IDS).logits
        assert logits.shape == expected.shape
        assert logits.dtype == expected.dtype
        loss = nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, 96), IDS[:, 1:].reshape(-1))
        loss.backward()
        their_loss = nn.CrossEntropyLoss()(expected[:, :-1].reshape(-1, 96), IDS[:, 1:].reshape(-1))
        their_loss.backward()
        assert torch.allclose(loss, their_loss)
        assert torch.allclose(model.lm_head.weight.grad, other.lm_head.weight.grad, atol=1e-6)
        assert fused(model) == 1
        assert huggingface.is_deferred(logits)
        assert torch.allclose(huggingface.materialize({"logits": logits})["logits"], expected)
        with torch.no_grad():
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
            assert torch.allclose(torch.softmax(logits, -1), torch.softmax(expected, -1))

    def test_evaluation_has_real_logits(self):
        model, other = defer(tiny()), tiny()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            outputs = compiled(input_ids=IDS, labels=IDS, use_cache=False)
            expected = other(input_ids=IDS, labels=IDS)
        assert type(outputs.logits) is Tensor
        assert torch.allclose(outputs.logits, expected.logits, atol=1e-6)
        assert torch.allclose(outputs.loss, expected.loss)


def logits_in_a_step(compiled: Any, ids: Tensor) -> list[torch.Size]:
    """Shapes of tensors made in a step that have as many entries as the logits, and classes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[torch.Size] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            found = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(found)
            seen.extend(x.shape for x in leaves if isinstance(x, Tensor))
            return found

    with Shapes():
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    rows = ids.numel() - ids.shape[0]  # without the last token of each sequence
    return [s for s in seen if s[-1:] == (96,) and s.numel() >= rows * 96]
