"""One call with all its tensors, and the Python text that makes it.

The text is what is run, and what is printed when something is wrong: they cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

AXES = {
    "input": "btd",
    "linear_weight": "vd",
    "linear_bias": "v",
    "weight": "v",
    "target": "bt",
    "targets": "btk",
    "token_weight": "bt",
    "teacher_input": "bte",
    "teacher_weight": "ve",
    "teacher_bias": "v",
    "teacher_index": "btk",
    "teacher_prob": "btk",
    "reference": "bt",
    "advantage": "bt",
}
"""Axes of each tensor: sequence, position, hidden dimension, class, target of a token, dimension of
the teacher. Those of ``upstream`` are those of the value: see :meth:`Problem.value_axes`."""

HEADS = (
    "input", "linear_weight", "linear_bias", "teacher_input", "teacher_weight", "teacher_bias",
)  # fmt: skip
"""What autocast casts."""

DIFFERENTIABLE = ("input", "linear_weight", "linear_bias", "token_weight")

SEQUENCE_LOSSES = ("dpo", "ipo", "cpo", "simpo", "orpo", "kto")
TOKEN_LOSSES = ("clipped_surrogate", "kl_penalty")
REDUCING = ("linear_cross_entropy", "LinearCrossEntropy", "linear_kl_div", "defer_logits")

MODEL = """\
class Model(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.head = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
        self.head.weight, self.head.bias = weight, bias
    def get_output_embeddings(self):
        return self.head
    def forward(self, hidden):
        return self.head(hidden)
"""


@dataclass(frozen=True)
class Problem:
    """A call of one program.

    Attributes:
        program: a public function, or ``"losses.dpo"`` and the like, or ``"defer_logits"``.
        tensors: on the CPU; sequences and positions are two axes, whatever ``batch`` is.
        options: by name, without those at their defaults.
        batch: the axes that stand for the tokens: ``"bt"``, ``"t"`` or ``""`` (both for one
            sequence, the latter of one token), or ``"b1t"``.
        layouts: of tensors that are not contiguous: ``"transposed"`` or ``"strided"``.
        frozen: differentiable tensors that get no gradient.
        autocast: the dtype of autocast, or None where it is off.
        workspace: argument of ``set_workspace_limit``, or None.
    """

    program: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    batch: str = "bt"
    layouts: dict[str, str] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    autocast: torch.dtype | None = None
    workspace: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the input as it is given."""
        return self.tensors["input"].dtype

    @property
    def low(self) -> torch.dtype:
        """Of the matmul's operands."""
        return self.autocast or self.dtype

    @property
    def grade(self) -> str:
        """The dtype in short, for reports."""
        name = str(self.low).removeprefix("torch.")
        return f"autocast {name}" if self.autocast else name

    def option(self, name: str, default: Any = None) -> Any:
        """An option, or its default."""
        return self.options.get(name, default)

    @property
    def leaves(self) -> list[str]:
        """Tensors that get a gradient."""
        return [n for n in DIFFERENTIABLE if n in self.tensors and n not in self.frozen]

    def axes(self, name: str) -> str:
        """Of a tensor."""
        return self.value_axes() if name == "upstream" else AXES[name]

    def value_axes(self) -> str:
        """Of what is computed; ``s`` for several statistics."""
        name = self.program.removeprefix("losses.")
        if name in SEQUENCE_LOSSES:
            return "b"
        if name == "token_statistics":
            return "sbt"
        if name == "linear_log_probs" and "targets" in self.tensors:
            return "btk"
        reduces = name in REDUCING and not self.option("gathered")
        return "" if reduces and self.option("reduction", "mean") != "none" else "bt"

    @property
    def target(self) -> Tensor | None:
        """The tensor that says which tokens count; None where all do."""
        for name in ("target", "targets", "teacher_index"):
            if name in self.tensors:
                return self.tensors[name]
        return None

    @property
    def kept(self) -> Tensor:
        """Which hidden states take part, bool [B, T]."""
        if self.target is None:
            return torch.ones(self.tensors["input"].shape[:2], dtype=torch.bool)
        kept = self.target != self.option("ignore_index", -100)
        kept = kept.any(-1) if kept.dim() == 3 else kept
        shift = min(self.option("shift", 0), kept.shape[1])
        return torch.nn.functional.pad(kept[:, shift:], (0, shift))

    @property
    def value_kept(self) -> Tensor:
        """Where the value is not that of an ignored token, bool ``[B, T]`` or ``[B, T, K]``."""
        kept = torch.ones(self.tensors["input"].shape[:2], dtype=torch.bool)
        if self.target is not None:
            kept = self.target != self.option("ignore_index", -100)
            if kept.dim() == 3 and self.value_axes() == "bt":
                kept = kept.any(-1)
        kept = kept.clone()
        kept[:, : self.option("shift", 0)] = False
        return kept

    def given(self, name: str) -> Tensor:
        """A tensor in the shape and layout in which the call gets it."""
        values = self.tensors[name]
        axes = self.axes(name)
        if "bt" in axes:
            at = axes.index("bt")
            before, after = values.shape[:at], values.shape[at + 2 :]
            b, t = values.shape[at : at + 2]
            middle = {"bt": (b, t), "t": (t,), "": (), "b1t": (b, 1, t)}[self.batch]
            values = values.reshape((*before, *middle, *after))
        layout = self.layouts.get(name)
        if layout == "transposed" and values.dim() > 1:
            return values.mT.contiguous().mT
        if layout == "strided" and values.dim():
            return values.repeat_interleave(2, -1)[..., ::2]
        return values.clone()

    def statements(self, backend: str | None) -> str:
        """The call: what computes ``value`` from the tensors."""
        lines = [f"crosscut.set_workspace_limit({self.workspace})"] if self.workspace else []
        call = _call(self, backend)
        if self.autocast:
            device = "input.device.type"
            call = [f"with torch.autocast({device}, {self.autocast}):", *(f"    {x}" for x in call)]
        return "\n".join([*lines, *call])

    def snippet(self, backend: str | None, device: str = "cpu") -> str:
        """A program by itself, from imports to gradients."""
        lines = ["import torch, crosscut"]
        for name in self.tensors:
            given = self.given(name)
            text = _literal(given, self.layouts.get(name), device)
            if name in DIFFERENTIABLE:
                frozen = ", requires_grad=False" if name in self.frozen else ""
                text = f"torch.nn.Parameter({text}{frozen})"
            lines.append(f"{name} = {text}")
        if self.program == "defer_logits":
            lines.append(MODEL.rstrip())
        lines.append(self.statements(backend))
        if self.program != "gradient_sparsity" and self.leaves:
            lines.append("value.backward(upstream)")
            lines.append(f"print(value, {', '.join(f'{name}.grad' for name in self.leaves)})")
        else:
            lines.append("print(value)")
        return "\n".join(lines)

    def cast(self) -> dict[str, Tensor]:
        """The tensors as autocast makes them, where it is on."""
        return {
            name: values.to(self.autocast) if self.autocast and name in HEADS else values
            for name, values in self.tensors.items()
        }

    def without(self, *names: str) -> Problem:
        """The problem less some tensors or options."""
        return replace(
            self,
            tensors={k: v for k, v in self.tensors.items() if k not in names},
            options={k: v for k, v in self.options.items() if k not in names},
            layouts={k: v for k, v in self.layouts.items() if k not in names},
        )


def _literal(values: Tensor, layout: str | None, device: str) -> str:
    """A tensor as text."""
    numbers = str(values.tolist()).replace("nan", "float('nan')").replace("inf", "float('inf')")
    where = "" if device == "cpu" else f", device={device!r}"
    if layout == "transposed" and values.dim() > 1:
        numbers = str(values.mT.tolist())
        numbers = numbers.replace("nan", "float('nan')").replace("inf", "float('inf')")
        return f"torch.tensor({numbers}, dtype={values.dtype}{where}).mT"
    if layout == "strided" and values.dim():
        text = f"torch.tensor({numbers}, dtype={values.dtype}{where})"
        return f"{text}.repeat_interleave(2, -1)[..., ::2]"
    if 0 in values.shape:
        return f"torch.zeros({tuple(values.shape)}, dtype={values.dtype}{where})"
    return f"torch.tensor({numbers}, dtype={values.dtype}{where})"


def _call(problem: Problem, backend: str | None) -> list[str]:
    """Lines that compute ``value``."""
    program, tensors = problem.program, problem.tensors

    def keywords(*names: str, **values: str) -> str:
        named = {name: name for name in names if name in tensors}
        return "".join(f", {name}={value}" for name, value in (named | values).items())

    options = {name: repr(value) for name, value in problem.options.items()}
    served = {} if backend is None else {"backend": repr(backend)}
    if program == "LinearCrossEntropy":
        normalizer = {k: options.pop(k) for k in ("normalizer",) if k in options}
        module = keywords("weight", **options, **served)[2:]
        rest = keywords("linear_bias", "token_weight", **normalizer)
        return [
            f"value = crosscut.LinearCrossEntropy({module})(input, linear_weight, target{rest})"
        ]
    if program == "linear_kl_div":
        rest = keywords(
            "target", "linear_bias", "teacher_bias", "token_weight", **options, **served
        )
        arguments = f"input, linear_weight, teacher_input, teacher_weight{rest}"
        return [f"value = crosscut.linear_kl_div({arguments})"]
    if program == "linear_topk_kl_div":
        rest = keywords("linear_bias", **options, **served)
        arguments = f"input, linear_weight, teacher_index, teacher_prob{rest}"
        return [f"value = crosscut.linear_topk_kl_div({arguments})"]
    if program == "defer_logits":
        return _deferred_call(problem, served)

    labels = "targets" if "targets" in tensors else "target"
    rest = keywords("linear_bias", "weight", "token_weight", **options, **served)
    arguments = f"(input, linear_weight, {labels}{rest})"
    if program in ("linear_cross_entropy", "linear_log_probs", "gradient_sparsity"):
        return [f"value = crosscut.{program}{arguments}"]
    if program == "token_statistics":
        entropy = ", found.entropy" if "entropy" in options else ""
        stack = f"[found.lse, found.target_logit, found.log_prob{entropy}]"
        return [f"found = crosscut.token_statistics{arguments}", f"value = torch.stack({stack})"]
    lines = [f"log_prob = crosscut.linear_log_probs{arguments}"]
    if program.removeprefix("losses.") in SEQUENCE_LOSSES:
        lines.append("chosen, rejected = log_prob[:, ::2], log_prob[:, 1::2]")
        if program in ("losses.dpo", "losses.ipo"):
            lines.append("near, far = reference[:, ::2], reference[:, 1::2]")
    return [*lines, f"value = crosscut.losses.{LOSS_CALLS[program]}"]


LOSS_CALLS = {
    "losses.dpo": (
        "dpo(chosen.sum(-1), rejected.sum(-1), near.sum(-1), far.sum(-1), beta=0.3, "
        "label_smoothing=0.1)"
    ),
    "losses.ipo": "ipo(chosen.sum(-1), rejected.sum(-1), near.sum(-1), far.sum(-1), beta=0.2)",
    "losses.cpo": "cpo(chosen.sum(-1), rejected.sum(-1), beta=0.2, nll_weight=0.7)",
    "losses.simpo": "simpo(chosen.sum(-1), rejected.sum(-1), beta=2.5, gamma=1.4)",
    "losses.orpo": "orpo(chosen.sum(-1), rejected.sum(-1), beta=0.4)",
    "losses.kto": (
        "kto(log_prob.sum(-1), reference.sum(-1), reference[:, 0] > -2, 0.3, beta=0.3, "
        "desirable_weight=1.3, undesirable_weight=0.6)"
    ),
    "losses.clipped_surrogate": (
        "clipped_surrogate(log_prob, reference, advantage, clip_high=0.3, "
        "reference_log_prob=reference, kl_weight=0.04)"
    ),
    "losses.kl_penalty": "kl_penalty(log_prob, reference)",
}
"""With options of no special meaning: what is random is the log-probabilities."""


def _deferred_call(problem: Problem, served: dict[str, str]) -> list[str]:
    """A model that softcaps its logits by itself, and PyTorch's loss."""
    options = dict(problem.options)
    head = {k: repr(options.pop(k)) for k in ("policy",) if k in options} | served
    softcap = options.pop("softcap", None)
    shown = "".join(f", {k}={v}" for k, v in head.items())
    bias = "linear_bias" if "linear_bias" in problem.tensors else "None"
    wide = "" if problem.low == torch.float64 else ".float()"
    lines = [
        f"model = crosscut.defer_logits(Model(linear_weight, {bias}), min_numel=0{shown})",
        f"logits = model(input){wide}",
    ]
    if softcap is not None:
        lines.append(f"logits = {softcap} * torch.tanh(logits / {softcap})")
    if options.pop("gathered", False):
        lines.append("value = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]")
        return lines
    weight = ", weight=weight" if "weight" in problem.tensors else ""
    rest = "".join(f", {k}={v!r}" for k, v in options.items())
    lines.append(
        "value = torch.nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten()"
        f"{weight}{rest})"
    )
    return lines
