"""Deferred models in the loops that people train them with: same losses, fused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crosscut
from crosscut.integrations import huggingface

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from support.tiny_models import tiny
from support.training import assert_as_good, assert_losses

IDS = torch.randint(4, 90, (16, 12), generator=torch.Generator().manual_seed(5))


def pair(**options: Any) -> tuple[Any, Any]:
    options = {"min_numel": 0, "on_materialize": "error", **options}
    return crosscut.defer_logits(tiny(), **options), tiny()


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = IDS[index].clone()
        labels[: index % 5] = -100  # so that batches differ in how many labels they have
        return {"input_ids": IDS[index], "labels": labels}


def fused(model: Any) -> dict[str, int]:
    return dict(huggingface.explain(model)[0].log.fused)


def materialised(model: Any) -> int:
    return huggingface.explain(model)[0].log.materialized.total()


def three() -> tuple[Any, Any, Any]:
    """A deferred model, the untouched one, and the truth in float64."""
    return (*pair(), tiny().double())


class TestTrainer:
    def train(self, model: Any, path: Path, trainer: Any = None, **options: Any) -> Any:
        import transformers

        torch.manual_seed(0)
        arguments: dict[str, Any] = {
            "output_dir": str(path),
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "optim": "sgd",
            "report_to": "none",
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        extra = {k: options.pop(k) for k in ("compute_metrics",) if k in options}
        trained = transformers.Trainer(
            model,
            transformers.TrainingArguments(**{**arguments, **options}),
            train_dataset=Texts(),
            eval_dataset=Texts(),
            **extra,
        )
        trained.train()
        return trained

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gradient_accumulation_steps": 2},
            {"gradient_checkpointing": True},
            {"label_smoothing_factor": 0.1},
            {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        ],
        ids=str,
    )
    def test_fused(self, options, tmp_path):
        models = model, *_ = three()
        trainers = [self.train(each, tmp_path, **options) for each in models]
        assert_losses(*trainers)
        assert_as_good(*models)
        if "torch_compile" not in options:  # a compiled graph keeps no count
            assert sum(fused(model).values()) >= 3 * options.get("gradient_accumulation_steps", 1)
        assert materialised(model) == 0

    def test_bf16(self, tmp_path):
        models = model, *_ = three()
        trainers = [self.train(each, tmp_path, bf16=each is not models[2]) for each in models]
        assert_losses(*trainers, dtype=torch.bfloat16)
        assert_as_good(*models, dtype=torch.bfloat16)
        assert fused(model)["cross_entropy"] == 3

    def test_evaluation(self, tmp_path):
        """Loss alone is fused; metrics see the real logits."""

        def metrics(prediction: Any) -> dict[str, float]:
            assert type(prediction.predictions).__module__ == "numpy"
            return {
                "top1": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
            }

        model, other = pair()
        trainers = [self.train(m, tmp_path, compute_metrics=metrics) for m in (model, other)]
        alone = self.train(pair()[0], tmp_path, prediction_loss_only=True)
        before = fused(alone.model)["cross_entropy"]
        assert alone.evaluate()["eval_loss"] > 0
        assert fused(alone.model)["cross_entropy"] == before + 2
        assert materialised(alone.model) == 0
        ours, theirs = (trainer.evaluate() for trainer in trainers)
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
        assert ours["eval_top1"] == theirs["eval_top1"]

    def test_peft(self, tmp_path):
        peft = pytest.importorskip("peft")
        model, _ = pair()
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, config)
        self.train(adapted, tmp_path)
        assert fused(adapted)["cross_entropy"] == 3
        assert materialised(adapted) == 0


def test_plain_loop():
    models = model, *_ = three()
    for each in models:
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        for ids in IDS.split(4):
            logits = each(input_ids=ids).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_as_good(*models)
    assert fused(model)["cross_entropy"] == 4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    import accelerate

    models = model, *_ = three()
    for each in models:
        mixed = "no" if each is models[2] else precision
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed,
                                             gradient_accumulation_steps=2)  # fmt: skip
        prepared, optimizer = accelerator.prepare(each, torch.optim.SGD(each.parameters(), lr=0.05))
        for ids in IDS.split(4):
            with accelerator.accumulate(prepared):
                outputs = prepared(input_ids=ids)
                # The loss is outside of the model, and of its autocast.
                shifted = outputs.logits[:, :-1].flatten(0, 1)
                accelerator.backward(F.cross_entropy(shifted, ids[:, 1:].flatten()))
                optimizer.step()
                optimizer.zero_grad()
        # Accelerate puts itself around the forward.
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerate.state.AcceleratorState._reset_state(True)
    assert_as_good(*models, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    assert fused(model)["cross_entropy"] == 4
    assert materialised(model) == 0


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            outputs = self.model(**batch)
            self.log("loss", outputs.loss)
            return outputs.loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    models = model, *_ = three()
    for each in models:
        trainer = lightning.Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Module(each), torch.utils.data.DataLoader(Texts(), batch_size=4))
    assert_as_good(*models)
    assert fused(model)["cross_entropy"] == 3
    assert materialised(model) == 0


def test_copy_of_a_trained_model():
    """An exponential moving average copies the model in the middle of training."""
    model, _ = pair()
    model(input_ids=IDS, labels=IDS).loss.backward()
    average = copy.deepcopy(model)
    average(input_ids=IDS, labels=IDS).loss.backward()
    assert fused(average)["cross_entropy"] == 2
    assert fused(model)["cross_entropy"] == 1
