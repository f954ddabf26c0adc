"""TRL through crosscut: the function that is replaced, its trainers, and the losses both have."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.judging import FACTOR, cotangents, error, make_head, rounding
from support.places import DEVICES
from torch import Tensor

import crosscut
from crosscut import losses
from crosscut.integrations.huggingface import HeadNotDeferredWarning

pytest.importorskip("trl")
import datasets
import trl
from support.tiny_models import tiny
from support.training import assert_as_good, assert_losses
from trl.trainer import utils

NAME = "_ChunkedLogProbFunction"
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
THEIRS: Any = getattr(utils, NAME)


class Exact:
    """What TRL's function means, of real logits."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, temperature: float, _: int,
        cap: float | None = None, scale: float = 1.0, outputs: Any = OUTPUTS,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        logits = scale * F.linear(hidden, weight, bias)
        logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / temperature
        log_p = logits.log_softmax(-1)
        log_prob = log_p.gather(-1, targets[:, None])[:, 0]
        others = {
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(-1).detach(),
            "mean_logits": logits.mean(-1).detach(),
            "is_top1": logits.argmax(-1) == targets,
        }
        return log_prob, *(x if name in outputs else None for name, x in others.items())


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    setattr(utils, NAME, THEIRS)


HEAD = make_head((24, 16, 80), torch.float32, bias=True)
TOP = F.linear(HEAD.input, HEAD.linear_weight).argmax(-1)
TARGET = torch.where(torch.arange(24) % 2 == 0, TOP, HEAD.target)  # half of them the top class


def call(
    function: Any,
    dtype: torch.dtype,
    *,
    bias: bool,
    arguments: tuple[Any, ...],
    device: str = "cpu",
) -> Any:
    """The outputs, and the gradients of a sum of both differentiable ones."""
    hidden, weight, offset = (
        None if x is None else x.detach().to(device, dtype).requires_grad_()
        for x in (HEAD.input, HEAD.linear_weight, HEAD.linear_bias if bias else None)
    )
    found = function.apply(hidden, weight, offset, TARGET.to(device), *arguments)
    both = torch.stack([x for x in found[:2] if x is not None])
    both.backward(cotangents(both.cpu()).to(device))
    return (
        [None if x is None else x.cpu() for x in found],
        [x.grad.cpu() for x in (hidden, weight, offset) if x is not None],
    )


class TestFunction:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(
        "arguments",
        [
            (1.0, 32, None, 1.0, ()),
            (0.7, 32, None, 1.0, ("entropy",)),
            (1.3, 32, None, 0.4, OUTPUTS),
            (0.7, 32, 8.0, 1.0, OUTPUTS),
            (0.7, 32, 8.0, 1.6, OUTPUTS),
        ],
        ids=str,
    )
    def test_as_good_as_trl(self, arguments, bias, device):
        report = crosscut.patch_trl()
        how: dict[str, Any] = {"bias": bias, "arguments": arguments}
        ours, mine = call(getattr(utils, NAME), torch.float32, device=device, **how)
        theirs, others = call(THEIRS, torch.float32, device=device, **how)
        exact, truths = call(Exact, torch.float64, **how)
        largest = F.linear(HEAD.input, HEAD.linear_weight).abs().max() / arguments[0]
        for name, own, their, true in zip(
            ("log_probs", *OUTPUTS), ours, theirs, exact, strict=True
        ):
            assert (own is None) == (their is None), name
            if name == "is_top1" and own is not None:
                assert torch.equal(own, true)
                assert 0 < own.sum() < len(own)
            elif own is not None:
                assert own.dtype == their.dtype
                assert own.requires_grad == their.requires_grad, name
                # Sums and maxima of logits are rounded at the size of these.
                eps = rounding(torch.float32) * largest * len(own) ** 0.5
                allowed = FACTOR * (their - true).norm() + eps
                assert (own - true).norm() <= allowed, name
        for own, their, true in zip(mine, others, truths, strict=True):
            assert error(own, true) <= FACTOR * error(their, true) + rounding(torch.float32)
        asked = [name for name in OUTPUTS if name in arguments[-1]]
        assert report.log.fused == {", ".join(["log_probs", *asked]): 1}
        assert not report.log.real

    def test_autocast(self):
        crosscut.patch_trl()
        with torch.autocast("cpu", torch.bfloat16):
            arguments = (1.0, 32, None, 1.0, OUTPUTS)
            ours, mine = call(getattr(utils, NAME), torch.float32, bias=True, arguments=arguments)
            theirs, others = call(THEIRS, torch.float32, bias=True, arguments=arguments)
        exact, truths = call(Exact, torch.float64, bias=True, arguments=arguments)
        for own, their, true in zip(
            (*ours[:4], *mine), (*theirs[:4], *others), (*exact[:4], *truths), strict=True
        ):
            assert own.dtype == their.dtype
            assert error(own, true) <= FACTOR * error(their, true) + rounding(torch.bfloat16)

    def test_no_tokens(self):
        crosscut.patch_trl()
        hidden = torch.zeros(0, 8, requires_grad=True)
        weight = torch.randn(16, 8, requires_grad=True)
        found = getattr(utils, NAME).apply(
            hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 32, 3.0
        )
        assert [x.shape for x in found] == [(0,)] * 5
        (found[0].sum() + found[1].sum()).backward()
        assert weight.grad is not None
        assert not weight.grad.any()

    @pytest.mark.parametrize(
        ("hidden_dtype", "scale", "why"),
        [
            (torch.float64, 1.0, "the dtypes differ"),  # cast_lm_head_to_fp32, in miniature
            (torch.float32, -1.0, "logit_scale=-1.0, temperature=1.0, softcap=None"),
        ],
    )
    def test_left_to_trl(self, hidden_dtype, scale, why):
        report = crosscut.patch_trl()
        hidden = torch.randn(4, 8, dtype=hidden_dtype)
        arguments = (hidden, torch.randn(16, 8), None, torch.arange(4), 1.0, 32, None, scale)
        for own, their in zip(
            getattr(utils, NAME).apply(*arguments), THEIRS.apply(*arguments), strict=True
        ):
            assert torch.equal(own, their)
        assert report.log.real == {why: 1}
        assert f"1 call not deferred: {why}" in str(report)

    def test_compiled(self):
        crosscut.patch_trl()
        arguments = (0.7, 32, 8.0, 1.6, OUTPUTS)

        def run(*tensors: Any) -> Any:
            return getattr(utils, NAME).apply(*tensors)

        compiled = SimpleNamespace(apply=torch.compile(run, fullgraph=True, backend="aot_eager"))
        ours, mine = call(compiled, torch.float32, bias=True, arguments=arguments)
        theirs, others = call(getattr(utils, NAME), torch.float32, bias=True, arguments=arguments)
        for own, their in zip((*ours, *mine), (*theirs, *others), strict=True):
            torch.testing.assert_close(own, their)


class TestPatch:
    def test_undo(self):
        crosscut.unpatch_trl()  # nothing to undo
        assert getattr(utils, NAME) is THEIRS
        crosscut.patch_trl()
        again = crosscut.patch_trl(policy="exact", backend="blocks")
        patched: Any = getattr(utils, NAME)
        assert patched.theirs is THEIRS
        assert patched.settings.log is again.log
        assert patched.settings.options.policy == "exact"
        crosscut.unpatch_trl()
        assert getattr(utils, NAME) is THEIRS

    def test_options(self):
        with pytest.raises(ValueError, match="policy must be"):
            crosscut.patch_trl(policy="none")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="backend must be"):
            crosscut.patch_trl(backend="none")
        assert getattr(utils, NAME) is THEIRS

    def test_without_trl(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "trl", None)
        with pytest.raises(ImportError, match="patch_trl needs TRL"):
            crosscut.patch_trl()

    def test_other_versions(self, monkeypatch):
        class Other(torch.autograd.Function):
            @staticmethod
            def forward(ctx, hidden, weight): ...

        monkeypatch.setattr(utils, NAME, Other)
        with pytest.raises(RuntimeError, match="as crosscut knows it"):
            crosscut.patch_trl()
        monkeypatch.delattr(utils, NAME)
        with pytest.raises(RuntimeError, match="as crosscut knows it"):
            crosscut.patch_trl()


# The trainers.

WORDS = [f"w{i}" for i in range(4, 90)]


def tokenizer() -> Any:
    import tokenizers
    import transformers

    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {
        w: i + 4 for i, w in enumerate(WORDS)
    }
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>",
    )  # fmt: skip


def sentence(start: int, length: int) -> str:
    return " ".join(WORDS[(start * 7 + 3 * i) % len(WORDS)] for i in range(length))


def arguments(config: Any, path: Path, **options: Any) -> Any:
    return config(
        output_dir=str(path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05,
        optim="sgd", lr_scheduler_type="constant", report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip


def sft(model: Any, path: Path, **options: Any) -> Any:
    rows = [
        {"prompt": sentence(i, 3), "completion": " " + sentence(i + 1, 3 + i % 5)}
        for i in range(12)
    ]
    return trl.SFTTrainer(
        model,
        arguments(trl.SFTConfig, path, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def dpo(model: Any, path: Path, **options: Any) -> Any:
    rows = [
        {"prompt": sentence(i, 3), "chosen": " " + sentence(i + 1, 3 + i % 5),
         "rejected": " " + sentence(i + 5, 6 - i % 3)}
        for i in range(12)
    ]  # fmt: skip
    return trl.DPOTrainer(
        model,
        ref_model=tiny().to(model.dtype),
        args=arguments(trl.DPOConfig, path, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def kto(model: Any, path: Path, **options: Any) -> Any:
    rows = [
        {"prompt": sentence(i, 3), "completion": " " + sentence(i + 1, 3 + i % 5),
         "label": i % 3 > 0}
        for i in range(12)
    ]  # fmt: skip
    return trl.KTOTrainer(
        model,
        ref_model=tiny().to(model.dtype),
        args=arguments(trl.KTOConfig, path, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def grpo(model: Any, path: Path, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def generate(input_ids: Tensor, **_: Any) -> Tensor:  # the same in every dtype
        made = torch.randint(4, 90, (len(input_ids), 6), generator=generator)
        return torch.cat([input_ids, made], 1)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 17) for text in completions]

    model.generate = generate
    return trl.GRPOTrainer(
        model,
        reward,
        arguments(
            trl.GRPOConfig, path, num_generations=4, max_completion_length=6,
            temperature=0.8, **options,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": sentence(i, 4)} for i in range(12)]),
        processing_class=tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options", "outputs"),
    [
        (sft, {}, {"log_probs, entropy, is_top1"}),
        (sft, {"loss_type": "dft", "gradient_accumulation_steps": 2},
         {"log_probs, entropy, is_top1"}),
        (dpo, {"use_weighting": True}, {"log_probs, " + ", ".join(OUTPUTS), "log_probs"}),
        (kto, {}, {"log_probs, entropy, mean_logits", "log_probs"}),
        # without its entropy the loss is the rest of terms that cancel
        (grpo, {"entropy_coef": 0.5, "num_iterations": 2}, {"log_probs, entropy"}),
    ],
    ids=["sft", "sft, dft", "dpo, weighted", "kto", "grpo"],
)  # fmt: skip
def test_trainers(make, options, outputs, tmp_path, monkeypatch):
    trainers, models = [], (tiny(), tiny(), tiny().double())
    for which, model in enumerate(models):
        report = None
        if which == 0:
            report = crosscut.patch_trl()
        else:
            monkeypatch.setattr(utils, NAME, THEIRS if which == 1 else Exact)
        torch.manual_seed(0)
        trainer = make(model, tmp_path, **options)
        trainer.train()
        trainers.append(trainer)
        if report is not None:
            assert set(report.log.fused) == outputs
            assert not report.log.real
            crosscut.unpatch_trl()
    assert_losses(*trainers)
    assert_as_good(*models)
    ours, theirs = (trainer.state.log_history for trainer in trainers[:2])
    for mine, other in zip(ours, theirs, strict=True):
        for key in set(mine) - {"train_runtime", "train_samples_per_second", "step_time"}:
            if isinstance(mine[key], float) and "per_second" not in key and "time" not in key:
                assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key


# The losses of crosscut.losses, beside what the trainers make of the same log-probabilities.


def test_without_patch(tmp_path):
    """TRL reads the head's weight, not its logits: ``defer_logits`` does nothing, and says so."""
    model = crosscut.defer_logits(tiny(), min_numel=0)
    with pytest.warns(HeadNotDeferredWarning, match="patch_trl"):
        sft(model, tmp_path).train()
    crosscut.patch_trl()
    model = crosscut.defer_logits(tiny(), min_numel=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadNotDeferredWarning)
        sft(model, tmp_path).train()


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def log_probs(*shape: int, seed: int) -> Tensor:
    return -numbers(*shape, seed=seed).exp()


def same_gradients(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs)
    for own, their in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        assert own.any()
        torch.testing.assert_close(own, their)


class Answers:
    """Four answers of up to 9 tokens, the last two rejected, and a model that gives their
    log-probabilities."""

    def __init__(self) -> None:
        self.mask = torch.arange(10) >= torch.tensor([[4], [2], [5], [3]])
        shifted = self.mask[:, 1:]
        self.policy = (log_probs(4, 9, seed=1) * shifted).requires_grad_()
        self.reference = log_probs(4, 9, seed=2) * shifted
        self.inputs = {
            "input_ids": torch.full((4, 10), 5),
            "attention_mask": torch.ones(4, 10, dtype=torch.int64),
            "completion_mask": self.mask.long(),
        }

    def model(self, log_prob: Tensor) -> Any:
        zeros = torch.zeros(4, 9)
        return lambda **_: SimpleNamespace(
            log_probs=log_prob, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_and_ipo(loss_type, tmp_path):
    answers, trainer = Answers(), dpo(tiny(), tmp_path, beta=0.3, loss_type=[loss_type])
    trainer.ref_model = answers.model(answers.reference)
    theirs = trainer._compute_loss(answers.model(answers.policy), answers.inputs, False)
    four = [x for log_prob in (answers.policy, answers.reference) for x in log_prob.sum(1).chunk(2)]
    if loss_type == "ipo":
        lengths = answers.mask.sum(1).chunk(2) * 2
        ours = losses.ipo(*(x / n for x, n in zip(four, lengths, strict=True)), beta=0.3)
    else:
        ours = losses.dpo(*four, beta=0.3)
    same_gradients(ours.mean(), theirs, answers.policy)


def test_kto(tmp_path):
    answers = Answers()
    trainer = kto(tiny(), tmp_path, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    model, trainer.ref_model = answers.model(answers.policy), answers.model(answers.reference)
    divergence = {id(model): torch.tensor([0.9, 0.3]), id(trainer.ref_model): torch.tensor([0.1])}
    trainer._compute_kl_logps = lambda model, batch: divergence[id(model)]
    desirable = torch.tensor([True, False, True, False])
    theirs = trainer._compute_loss(model, {**answers.inputs, "label": desirable}, False)
    ours = losses.kto(
        answers.policy.sum(1), answers.reference.sum(1), desirable, 0.5, beta=0.3,
        desirable_weight=1.2, undesirable_weight=0.7,
    )  # fmt: skip
    same_gradients(ours.mean(), theirs, answers.policy)


def test_cpo_simpo_orpo():
    from trl.experimental import cpo, orpo

    chosen, rejected = (log_probs(4, seed=seed).requires_grad_() for seed in (1, 2))
    trainer = SimpleNamespace(
        alpha=0.0, beta=0.3, label_smoothing=0.1, simpo_gamma=0.5, loss_type="sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)
    ours = losses.cpo(chosen, rejected, beta=0.3, label_smoothing=0.1, nll_weight=0.0)
    same_gradients(ours.sum(), theirs.sum(), chosen, rejected)

    trainer.loss_type, trainer.label_smoothing = "simpo", 0.0
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)
    ours = losses.simpo(chosen, rejected, beta=0.3, gamma=0.5)
    same_gradients(ours.sum(), theirs.sum(), chosen, rejected)

    gain, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)  # in float32
    ours = losses.orpo(chosen.float(), rejected.float(), beta=0.3)
    same_gradients(ours.sum(), (-chosen.float() - gain).sum(), chosen, rejected)


def test_clipped_surrogate(tmp_path):
    trainer = grpo(
        tiny(), tmp_path, loss_type="bnpo", epsilon=0.2, epsilon_high=0.28, entropy_coef=0.01,
        use_bias_correction_kl=False,  # true: it multiplies the penalty by the ratio
    )  # fmt: skip
    trainer.beta = 0.04  # told so, it would load a reference
    trainer.model.eval()
    policy, old, reference = (log_probs(4, 6, seed=seed) for seed in (1, 2, 3))
    policy, entropy = policy.requires_grad_(), numbers(4, 6, seed=4).exp().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (policy, entropy, None)
    advantage, mask = numbers(4, seed=5), torch.arange(6) < torch.tensor([[6], [3], [5], [1]])
    ids, ones = torch.full((4, 6), 5), torch.ones(4, 6, dtype=torch.int64)
    theirs = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids,
            "completion_mask": mask.long(), "advantages": advantage, "old_per_token_logps": old,
            "ref_per_token_logps": reference,
        },
    )  # fmt: skip
    ours = losses.clipped_surrogate(
        policy, old, advantage[:, None], clip_low=0.2, clip_high=0.28,
        reference_log_prob=reference, kl_weight=0.04, entropy=entropy, entropy_weight=0.01,
    )  # fmt: skip
    same_gradients((ours * mask).sum() / mask.sum(), theirs, policy, entropy)
