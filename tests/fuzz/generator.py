"""Draws problems: every program, dtype, layout, option and extreme, from a seed and a number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fuzz.problem import LOSS_CALLS, Problem


@dataclass(frozen=True)
class Mode:
    """Where problems run, and which of them.

    Attributes:
        name: on the command line.
        backend: that is asked for; None leaves the choice to crosscut.
        device: of the tensors.
        dtypes: of the inputs.
        most: how many tokens, hidden dimensions and classes at most, nearly always.
        large: how often there are more: several blocks of tokens or of classes.
    """

    name: str
    backend: str | None
    device: str
    dtypes: tuple[torch.dtype, ...]
    most: tuple[int, int, int]
    large: float


_LOW = (torch.bfloat16, torch.float16, torch.float32)
MODES = {
    "blocks": Mode("blocks", "blocks", "cpu", (*_LOW, torch.float64), (40, 24, 300), 0.01),
    "interpreter": Mode("interpreter", "triton", "cpu", _LOW, (12, 20, 60), 0.0),
    "cuda": Mode("cuda", None, "cuda", (*_LOW, torch.float64), (200, 64, 600), 0.03),
}

PROGRAMS: dict[str, int] = {
    "linear_cross_entropy": 40,
    "LinearCrossEntropy": 5,
    "token_statistics": 12,
    "linear_log_probs": 14,
    "linear_kl_div": 12,
    "linear_topk_kl_div": 10,
    "gradient_sparsity": 3,
    "defer_logits": 8,
    **dict.fromkeys(LOSS_CALLS, 1),
}
"""How often each comes."""


def draw(mode: Mode, seed: int, number: int) -> Problem:
    """One problem, always the same."""
    return _Draw(mode, random.Random(f"{seed}:{number}")).problem()


class _Draw:
    def __init__(self, mode: Mode, rng: random.Random) -> None:
        self.mode, self.rng = mode, rng
        self.gen = torch.Generator().manual_seed(rng.getrandbits(40))
        self.program = rng.choices(list(PROGRAMS), list(PROGRAMS.values()))[0]
        self.dtype = rng.choice(mode.dtypes)
        if mode.name == "interpreter" and self.program == "linear_kl_div":
            self.dtype = rng.choice((torch.bfloat16, torch.float32))  # all that it serves
        self.autocast: torch.dtype | None = None
        if self.dtype == torch.float32 and self._chance(0.25):
            self.autocast = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16))
        if mode.name == "interpreter" and self.program == "linear_kl_div" and self.autocast:
            self.autocast = torch.bfloat16
        self.low = self.autocast or self.dtype
        self.options: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    def problem(self) -> Problem:
        self._sizes()
        self._targets()
        self._head()
        self._head_options()
        if self.program == "linear_kl_div":
            self._distillation()
        if self.program in ("linear_cross_entropy", "LinearCrossEntropy", "defer_logits"):
            self._loss_options()
        elif self.program == "linear_topk_kl_div":
            self._top()
        elif self.program.startswith("losses."):
            call = LOSS_CALLS[self.program]
            if "reference" in call or "near" in call:
                self.tensors["reference"] = -4 * self._uniform(*self.shape)
            if "advantage" in call:
                self.tensors["advantage"] = self._normal(*self.shape)
        self._policy()
        return self._finish()

    def _sizes(self) -> None:
        rng = self.rng
        most_tokens, most_hidden, most_classes = self.mode.most
        large = self._chance(self.mode.large)
        self.num_classes = rng.choice((1, 2, 3, rng.randint(4, 24), rng.randint(4, most_classes)))
        tokens = rng.choice((1, 2, rng.randint(3, 10), rng.randint(3, most_tokens)))
        self.hidden_size = rng.choice((1, 2, 8, 16, rng.randint(1, most_hidden)))
        if large:
            tokens, self.num_classes = rng.choice(((20, 1000), (12, 4100), (9, 9000), (1100, 13)))
        elif self._chance(0.01):
            tokens = 0
        if self.program == "linear_topk_kl_div":
            self.num_classes = max(self.num_classes, 2)
        self.batch = rng.choice(("bt", "bt", "t", "b1t"))
        sequences = 1 if self.batch == "t" else rng.choice((1, 2, 3))
        if self.program.startswith("losses."):
            self.batch, tokens, sequences = "bt", max(tokens, 2), rng.choice((1, 2, 3))
        elif self._chance(0.03) and self.program != "defer_logits":
            self.batch, sequences, tokens = "", 1, 1
        self.shape = sequences, max(min(tokens, 1), tokens // sequences)

    def _targets(self) -> None:
        """Classes, some or all of them ignored."""
        rng, classes = self.rng, self.num_classes
        ignore_index = rng.choice((-100, -100, -100, -1, 0, classes - 1, 255))
        count = math.prod(self.shape)
        labels = torch.randint(classes, (count,), generator=self.gen)
        if self._chance(0.3):
            order = torch.randperm(classes, generator=self.gen)
            labels = order[torch.arange(count) % classes]
        elif self._chance(0.2):
            labels[:] = labels[:1]
        self.labels = labels.clone()  # before any is ignored
        share = rng.choice((0, 0, 0.3, 0.5, 0.9, 1.0 if self._chance(0.2) else 0.5))
        labels[self._uniform(count) < share] = ignore_index
        if self._chance(0.2):
            labels[: count // 2] = ignore_index
        if ignore_index != -100:
            self.options["ignore_index"] = ignore_index
        target = labels.view(self.shape)
        if self.program == "linear_log_probs" and self._chance(0.4):
            k = rng.randint(1, 5)
            targets = torch.randint(classes, (*self.shape, k), generator=self.gen)
            targets[..., 0] = target
            targets[self._uniform(*targets.shape) < rng.choice((0, 0.3))] = ignore_index
            self.tensors["targets"] = targets
        elif self.program != "linear_topk_kl_div":
            kind = rng.choice((torch.int64, torch.int64, torch.int32))
            kind = torch.int64 if self.program == "defer_logits" else kind
            self.tensors["target"] = target.to(kind)

    def _head(self) -> None:
        """Hidden states, weight and bias, of one of many kinds."""
        count, d, v = math.prod(self.shape), self.hidden_size, self.num_classes
        scale = self.rng.choice((0.1, 1, 1, 3, 10, 30, 100))
        hidden = self._normal(count, d)
        classifier = self._normal(v, d) * scale / math.sqrt(d)
        kind = self.rng.choice(_KINDS)
        if self.program == "token_statistics" and self._chance(0.2):
            kind = _grid  # ranks of equal logits
        hidden, classifier = kind(self, hidden, classifier)
        self.tensors["input"] = hidden.view(*self.shape, d)
        self.tensors["linear_weight"] = classifier
        if self._chance(0.3):
            self.tensors["linear_bias"] = self._bias()

    def _bias(self) -> Tensor:
        v = self.num_classes
        bias = self._normal(v) * self.rng.choice((0, 0.3, 1, 10))
        if self._chance(0.2):
            bias += self.rng.choice((-30, 30, 100))
        if self._chance(0.3):
            bias[v // 4 :] -= self.rng.choice((10, 25, 60))
        if self._chance(0.25) and self.program not in ("linear_kl_div", "linear_topk_kl_div"):
            impossible = self._uniform(v) < self.rng.choice((0.1, 0.75))
            impossible[self.labels] = False
            for name in ("target", "targets"):
                if name in self.tensors:
                    named = self.tensors[name]
                    named = named[(named >= 0) & (named < v)]
                    impossible[named.long()] = False
            bias[impossible] = -math.inf
        return bias

    def _head_options(self) -> None:
        rng, options = self.rng, self.options
        if self._chance(0.3):
            options["softcap"] = rng.choice((1.0, 3.0, 5.0, 30.0, 50.0))
        if self._chance(0.3) and self.program != "defer_logits":
            options["logit_scale"] = rng.choice((0.5, 0.0625, 2.0, -1.5, 0.0))
        sequences = self.batch != "" and not self.program.startswith("losses.")
        fits = self.program not in ("linear_topk_kl_div", "defer_logits")
        if sequences and fits and self._chance(0.25):
            options["shift"] = rng.choice((1, 1, 2, self.shape[1], self.shape[1] + 1))
        tempered = ("token_statistics", "linear_log_probs", "linear_kl_div", "linear_topk_kl_div")
        if self.program in tempered and self._chance(0.4):
            options["temperature"] = rng.choice((0.5, 0.7, 2.0, 8.0))
        if self.program == "token_statistics":
            options.update({"entropy": True} if self._chance(0.5) else {})
            options.update({"ranks": True} if self._chance(0.5) else {})

    def _loss_options(self) -> None:
        rng, options, tensors = self.rng, self.options, self.tensors
        own, target = self.program != "defer_logits", tensors["target"]
        self._reduction()
        if self._chance(0.2):
            tensors["weight"] = self._normal(self.num_classes).exp()
            if self._chance(0.4):
                tensors["weight"][self._uniform(self.num_classes) < 0.4] = 0
        impossible = "linear_bias" in tensors and tensors["linear_bias"].isinf().any()
        if self._chance(0.25) and not impossible:
            options["label_smoothing"] = rng.choice((0.1, 0.1, 1.0))
        if own and self._chance(0.2):
            options["z_loss"] = rng.choice((1e-4, 1e-2))
        if own:
            self._weights()
        elif self._chance(0.3) and ((target >= 0) & (target < self.num_classes)).all():
            for name in ("reduction", "label_smoothing", "ignore_index"):
                options.pop(name, None)
            tensors.pop("weight", None)
            options["gathered"] = True

    def _reduction(self) -> None:
        self.options["reduction"] = self.rng.choice(("mean", "sum", "none", "none"))
        if self.options["reduction"] == "mean":
            del self.options["reduction"]

    def _weights(self) -> None:
        """Of tokens, and what a mean is over."""
        if self._chance(0.25):
            weight = self._normal(*self.shape).abs()
            if self._chance(0.4):
                weight[self._uniform(*self.shape) < 0.5] = 0
            if self._chance(0.3) and self.options.get("reduction"):
                weight *= self._normal(*self.shape).sign()
            self.tensors["token_weight"] = weight
        if "reduction" not in self.options and self._chance(0.2):
            self.options["normalizer"] = self.rng.choice((1, 7.5, 1024))

    def _distillation(self) -> None:
        rng, options, tensors = self.rng, self.options, self.tensors
        e = rng.choice((self.hidden_size, rng.randint(1, self.mode.most[1])))
        classes = self.num_classes
        if self._chance(0.3):  # a student that is nearly its teacher
            e = self.hidden_size
            off = rng.choice((0, 0.01, 0.1))
            teacher = tensors["linear_weight"] + off * self._normal(classes, e)
            hidden = tensors["input"].nan_to_num().clone()
        else:
            scale = rng.choice((0.1, 1, 3, 10)) / math.sqrt(e)
            hidden, teacher = self._normal(*self.shape, e), scale * self._normal(classes, e)
        tensors["teacher_input"], tensors["teacher_weight"] = hidden.view(*self.shape, e), teacher
        if self._chance(0.3):
            tensors["teacher_bias"] = self._normal(classes) + rng.choice((0, 30))
        options["divergence"] = rng.choice(("forward", "reverse", "js"))
        if options["divergence"] == "js" and self._chance(0.5):
            options["beta"] = rng.choice((0.1, 0.9))
        if self._chance(0.3):
            options["hard_weight"] = rng.choice((0.3, 1.0))
        if self._chance(0.2):
            options["teacher_softcap"] = rng.choice((5.0, 30.0))
        if self._chance(0.2):
            options["teacher_logit_scale"] = rng.choice((0.5, -1.0))
        if self._chance(0.2) and "hard_weight" not in options and "shift" not in options:
            del tensors["target"]
            options.pop("ignore_index", None)
        self._reduction()
        self._weights()

    def _top(self) -> None:
        """A teacher's top k, with nothing, something or nearly all left to the others."""
        rng = self.rng
        k = rng.randint(1, min(4, self.num_classes - 1))
        order = self._uniform(*self.shape, self.num_classes).argsort(-1)
        order[..., 0] = self.labels.view(self.shape)
        same = (order[..., 1:] == order[..., :1]).nonzero(as_tuple=True)
        order[..., 1:][same] = (order[..., :1].expand_as(order[..., 1:])[same] + 1) % (
            self.num_classes
        )
        index = order[..., :1] if k == 1 else _distinct(order, k, self.num_classes)
        prob = self._uniform(*index.shape) + 1e-3
        prob = prob / prob.sum(-1, keepdim=True) * rng.choice((1.0, 0.99, 0.5, 0.1))
        ignore = self.options.get("ignore_index", -100)
        if ignore in range(self.num_classes):
            ignore = self.options["ignore_index"] = -1
        index = index.masked_fill(self._uniform(*index.shape) < rng.choice((0, 0.3)), ignore)
        self.tensors["teacher_index"], self.tensors["teacher_prob"] = index, prob
        if self._chance(0.6) and self.mode.name != "interpreter":  # there is no kernel for it
            self.options["tail"] = True

    def _policy(self) -> None:
        if self.program == "linear_kl_div":
            return
        choices = ["auto", "auto", "exact", "filtered"]
        plain = not {"z_loss", "label_smoothing"} & set(self.options)
        if self.program in ("linear_cross_entropy", "LinearCrossEntropy") and plain:
            choices.append(
                self.rng.choice(("cce", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_e"))
            )
        policy = self.rng.choice(choices)
        if policy == "filtered" and self.low == torch.float32 and self.mode.name == "interpreter":
            policy = "auto"
        if policy != "auto":
            self.options["policy"] = policy

    def _finish(self) -> Problem:
        """Dtypes, upstream gradients, layouts, and what stands at ignored tokens."""
        rng = self.rng
        teacher = self.dtype
        if self.mode.name != "interpreter" and not self.autocast and self._chance(0.15):
            teacher = rng.choice((torch.bfloat16, torch.float32, torch.float64))
        wide = torch.promote_types(self.dtype, torch.float32)
        dtypes: dict[str, torch.dtype] = dict.fromkeys(
            ("input", "linear_weight", "linear_bias"), self.dtype
        )
        dtypes |= dict.fromkeys(("teacher_input", "teacher_weight", "teacher_bias"), teacher)
        tensors = {}
        for name, values in self.tensors.items():
            if values.is_floating_point():
                values = values.to(dtypes.get(name, wide))
            tensors[name] = values
        frozen = set()
        if self._chance(0.2):
            frozen = {n for n in ("input", "linear_weight", "linear_bias") if self._chance(0.5)}
        problem = Problem(
            program=self.program,
            tensors=tensors,
            options=self.options,
            batch=self.batch,
            layouts=self._layouts(tensors),
            frozen=frozenset(frozen),
            autocast=self.autocast,
            workspace=1 if self._chance(0.05) else None,
        )
        if self.program == "gradient_sparsity":
            return replace(problem, frozen=frozenset(("input", "linear_weight", "linear_bias")))
        upstream = self._upstream(problem).to(torch.promote_types(problem.low, torch.float32))
        problem = replace(problem, tensors={**tensors, "upstream": upstream})
        return self._spoil_ignored(problem)

    def _upstream(self, problem: Problem) -> Tensor:
        axes, shape = problem.value_axes(), list(self.shape)
        if axes == "":
            return torch.tensor(self.rng.choice((1.0, 1.0, -2.0, 1024.0, 2.0**-10, 0.0)))
        if axes == "b":
            shape = shape[:1]
        if axes == "sbt":
            shape = [4 if problem.option("entropy") else 3, *shape]
        if axes == "btk":
            shape = list(problem.tensors["targets"].shape)
        upstream = self._normal(*shape)
        if self._chance(0.3):
            upstream = torch.ones(shape)
        if self._chance(0.3):
            upstream[self._uniform(*shape) < 0.5] = 0
        if axes == "sbt" and self._chance(0.4):
            upstream[self.rng.randrange(len(upstream))] = 0
        return upstream

    def _spoil_ignored(self, problem: Problem) -> Problem:
        """NaN and inf where nobody should look."""
        tensors = dict(problem.tensors)
        bad = self.rng.choice((math.nan, math.inf, -math.inf))
        deferred = self.program == "defer_logits"
        if self._chance(0.15) and not deferred:
            hidden = tensors["input"].clone()
            hidden[~problem.kept] = bad
            tensors["input"] = hidden
        counted = problem.value_kept
        own = problem.value_axes() in ("bt", "btk", "sbt") and problem.program not in LOSS_CALLS
        if self._chance(0.15) and own and not deferred:
            upstream = tensors["upstream"].clone()
            upstream[~counted.expand_as(upstream)] = bad
            tensors["upstream"] = upstream
        if self._chance(0.15) and "token_weight" in tensors:
            weight = tensors["token_weight"].clone()
            weight[~counted] = bad
            tensors["token_weight"] = weight
        return replace(problem, tensors=tensors)

    def _layouts(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        if not self._chance(0.3):
            return {}
        kinds = ("transposed", "strided")
        return {name: self.rng.choice(kinds) for name in tensors if self._chance(0.5)}

    def _chance(self, share: float) -> bool:
        return self.rng.random() < share

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.gen, dtype=torch.float64)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.gen, dtype=torch.float64)


def _distinct(order: Tensor, k: int, num_classes: int) -> Tensor:
    """``k`` different classes a token, the first of them that of ``order``."""
    first = order[..., :1]
    others = torch.arange(k).expand(*order.shape[:-1], k)
    return (first + others * max(1, (num_classes - 1) // k)) % num_classes


Kind = Callable[[_Draw, Tensor, Tensor], tuple[Tensor, Tensor]]


def _random(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    return hidden, classifier


def _confident(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """Each token is near its label's row: ahead of the others by some nats."""
    classifier = classifier / classifier.norm(dim=-1, keepdim=True).clamp_min(1e-3)
    ahead = draw.rng.choice((4, 8, 12, 17, 28, 40, 120))
    noise = draw.rng.choice((0, 0.05, 0.3))
    return ahead * classifier[draw.labels] + noise * hidden, classifier


def _mixed(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """Confident tokens and others."""
    sure, classifier = _confident(draw, hidden, classifier)
    some = draw._uniform(len(hidden), 1) < draw.rng.choice((0.5, 0.9))
    return torch.where(some, sure, hidden), classifier


def _hopeless(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """Each token is far from its label, or sure of another class."""
    if draw._chance(0.5):
        hidden, classifier = _confident(draw, hidden, classifier)
        return -hidden, classifier
    other = (draw.labels + 1) % draw.num_classes
    draw.labels, own = other, draw.labels
    hidden, classifier = _confident(draw, hidden, classifier)
    draw.labels = own
    return hidden, classifier


def _grid(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, in which nothing rounds and many logits are the same."""
    return hidden.mul(2).round().clamp(-4, 4), classifier.round().clamp(-4, 4)


def _common(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """All logits far from 0, on one side."""
    size = draw.rng.choice((3, 10)) * draw.rng.choice((-1, 1))
    hidden, classifier = hidden.clone(), classifier.clone()
    hidden[:, 0] += 10
    classifier[:, 0] += size
    return hidden, classifier


def _outlier(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """One dimension of the hidden states is huge."""
    hidden = hidden.clone()
    hidden[:, -1] = draw.rng.choice((-200.0, 200.0))
    return hidden, classifier


def _equal(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """All classes the same, or no hidden state."""
    if draw._chance(0.5):
        return torch.zeros_like(hidden), classifier
    return hidden, classifier[:1].expand_as(classifier).clone()


def _rare(draw: _Draw, hidden: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """Most classes have next to no mass."""
    hidden, classifier = hidden.clone(), classifier.clone()
    hidden[:, 0] = hidden[:, 0].abs() + 4
    classifier[draw.num_classes // 4 :, 0] -= draw.rng.choice((1, 2.5, 4, 8))
    return hidden, classifier


_KINDS: tuple[Kind, ...] = (
    _random, _random, _random, _confident, _confident, _mixed, _hopeless, _grid, _common, _outlier,
    _equal, _rare,
)  # fmt: skip
