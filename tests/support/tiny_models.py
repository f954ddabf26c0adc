"""Models of transformers in miniature, a few of every pattern, and a training step of theirs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import crosscut
from crosscut.integrations import huggingface
from support import zoo
from support.judging import FACTOR, error, rounding

FEW = {
    "LlamaForCausalLM": "causal",
    "Gemma2ForCausalLM": "causal",  # softcap
    "CohereForCausalLM": "causal",  # times a scale
    "GraniteForCausalLM": "causal",  # divided by a scale
    "GPT2LMHeadModel": "causal",  # tied weights
    "MambaForCausalLM": "causal",  # no attention
    "RecurrentGemmaForCausalLM": "causal",  # softcap by nn.functional
    "T5ForConditionalGeneration": "seq2seq",
    "BartForConditionalGeneration": "seq2seq",  # + final_logits_bias
    "BertForMaskedLM": "masked",  # a head with a bias, inside of others
    "Gemma3ForConditionalGeneration": "vision",
}

IDS = torch.randint(4, 90, (2, 16), generator=torch.Generator().manual_seed(1))


def entry_of(name: str, mapping: str) -> zoo.Entry:
    return next(e for e in zoo.entries(mapping) if e.model_class.__name__ == name)


def tiny(name: str = "LlamaForCausalLM") -> Any:
    return zoo.build(entry_of(name, FEW[name]))


def defer(model: Any, **options: Any) -> Any:
    return crosscut.defer_logits(model, **{"min_numel": 0, "on_materialize": "error", **options})


def fused(model: nn.Module) -> int:
    return sum(report.log.fused.total() for report in huggingface.explain(model))


def step(model: Any, ids: Tensor = IDS) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, by name without the wrappers' prefixes."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: Any, theirs: Any, ids: Tensor = IDS) -> None:
    """As good as the untouched model in float32, beside float64."""
    exact = step(copy.deepcopy(theirs).double(), ids)
    mine, other = step(ours, ids), step(theirs, ids)
    assert set(mine[1]) == set(other[1])
    assert error(mine[0], exact[0]) <= FACTOR * error(other[0], exact[0]) + rounding(torch.float32)
    for name, true in exact[1].items():
        allowed = FACTOR * error(other[1][name], true) + rounding(torch.float32)
        assert error(mine[1][name], true) <= allowed, name
