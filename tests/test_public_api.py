"""The public surface: names, signatures, docstrings, and what importing it costs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import typing

import pytest
import torch
from support.judging import make_head

import crosscut
from crosscut.backends import _BACKENDS, NAMES
from crosscut.options import POLICIES, LossOptions

FUNCTIONS = [
    "explain",
    "gradient_sparsity",
    "linear_cross_entropy",
    "linear_log_probs",
    "token_statistics",
]


def test_all_is_sorted_and_complete():
    assert crosscut.__all__ == sorted(crosscut.__all__)
    modules = {name for name in vars(crosscut) if inspect.ismodule(getattr(crosscut, name))}
    public = {name for name in vars(crosscut) if not name.startswith("_")} - modules
    assert public == set(crosscut.__all__)


def test_version():
    assert all(part.isdigit() for part in crosscut.__version__.split("."))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_begin_alike(name):
    parameters = list(inspect.signature(getattr(crosscut, name)).parameters.values())
    assert [p.name for p in parameters[:3]] == ["input", "linear_weight", "target"]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[:3])
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[3:])
    assert parameters[3].name == "linear_bias"
    assert [p.name for p in parameters[-2:]] == ["policy", "backend"]
    defaults = {p.name: p.default for p in parameters[3:]}
    expected = inspect.signature(crosscut.linear_cross_entropy).parameters
    own = {"temperature": 1.0, "entropy": False, "ranks": False}
    assert defaults == {
        name: own[name] if name in own else expected[name].default for name in defaults
    }


def test_options_are_the_keywords():
    """Function, module and record agree on every name and default."""
    recorded = {field.name: field.default for field in dataclasses.fields(LossOptions)}
    own = ("linear_bias", "weight", "token_weight", "normalizer", "options")
    for function in (crosscut.linear_cross_entropy, crosscut.LinearCrossEntropy.__init__):
        keywords = {
            p.name: p.default
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in own
        }
        assert keywords == recorded


def test_policies_are_the_annotation():
    assert typing.get_args(crosscut.GradientPolicy) == POLICIES


@pytest.mark.parametrize("name", crosscut.__all__)
def test_docstrings(name):
    thing = getattr(crosscut, name)
    if not callable(thing) or name in ("GradientPolicy", "Divergence"):
        return  # a Literal cannot hold one
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and callable(value) and member != "extra_repr":
                assert inspect.getdoc(value), f"{name}.{member}"
        return
    doc = inspect.getdoc(thing) or ""
    for parameter in inspect.signature(thing).parameters:
        documented = f"{parameter}:" in doc or "Arguments and errors are those of" in doc
        assert documented, f"{name} does not document {parameter}"


def test_importing_needs_pytorch_alone():
    script = (
        "import sys, crosscut; "
        "print([m for m in ('typer', 'rich', 'transformers', 'matplotlib', 'safetensors', "
        "'crosscut.bench', 'crosscut.cli') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_the_first_call_does_not_import_the_compiler():
    """It takes seconds where files are slow, and who does not compile has no use for it."""
    script = (
        "import sys, torch, crosscut\n"
        "h, c = torch.randn(4, 8).requires_grad_(), torch.randn(16, 8).requires_grad_()\n"
        "crosscut.linear_cross_entropy(h, c, torch.arange(4)).backward()\n"
        "assert h.grad.any() and c.grad.any()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


def test_reloading():
    """As notebooks do: the operators are there already."""
    script = (
        "import importlib, torch, crosscut\n"
        "from crosscut import distillation_ops, ops\n"
        "importlib.reload(ops), importlib.reload(distillation_ops)\n"
        "print(crosscut.linear_cross_entropy(torch.eye(4), torch.eye(4), torch.arange(4)).item())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    expected = torch.nn.functional.cross_entropy(torch.eye(4), torch.arange(4)).item()
    assert float(found.stdout) == pytest.approx(expected, rel=1e-6)


def test_explain_prints_every_verdict():
    head = make_head((4, 3, 5), torch.float32)
    explanation = crosscut.explain(head.input, head.linear_weight, head.target)
    assert explanation.backend == NAMES[0] or explanation.backend is not None
    assert tuple(explanation.verdicts) == NAMES
    lines = str(explanation).splitlines()
    assert len(lines) == len(NAMES)
    for line, (name, objection) in zip(lines, explanation.verdicts.items(), strict=True):
        assert line.startswith(f"> {name}" if name == explanation.backend else f"  {name}")
        assert line.endswith(objection or "can serve this")


def test_explain_takes_every_argument():
    """Of each call that it explains."""
    known = inspect.signature(crosscut.explain).parameters
    for name in FUNCTIONS:
        for parameter in inspect.signature(getattr(crosscut, name)).parameters.values():
            assert known[parameter.name].default == parameter.default, parameter.name


def test_explain_kl_div_takes_every_argument():
    known = inspect.signature(crosscut.explain_kl_div).parameters
    assert list(known.values()) == list(
        inspect.signature(crosscut.linear_kl_div).parameters.values()
    )


def test_explain_kl_div_is_of_both_heads():
    student, teacher = make_head((4, 3, 5), torch.float32), make_head((4, 6, 5), torch.float32)
    call = student.input, student.linear_weight, teacher.input, teacher.linear_weight
    explanation = crosscut.explain_kl_div(*(x.to("meta") for x in call))
    assert explanation.backend == "blocks"
    assert tuple(explanation.verdicts) == NAMES
    narrow = [x.to(torch.float8_e4m3fn) for x in call[2:]]
    refused = crosscut.explain_kl_div(*call[:2], *narrow)
    assert refused.backend is None
    with pytest.raises(ValueError, match=re.escape(str(refused.verdicts["blocks"]))):
        crosscut.linear_kl_div(*call[:2], *narrow)
    with pytest.raises(ValueError, match="beta must be between 0 and 1, got 2"):
        crosscut.explain_kl_div(*call, beta=2)


def test_a_statistic_that_a_backend_lacks(monkeypatch):
    """It is refused, and not left as it was allocated."""
    head = make_head((4, 3, 5), torch.float32)
    call = head.input, head.linear_weight, head.target
    (blocks,) = (backend for backend in _BACKENDS if backend.name == "blocks")
    monkeypatch.setattr(blocks, "computes", blocks.computes - {"entropy"})
    crosscut.token_statistics(*call, backend="blocks")
    with pytest.raises(ValueError, match="blocks: does not compute entropy"):
        crosscut.token_statistics(*call, backend="blocks", entropy=True)


def test_explain_minds_every_argument():
    """What changes who serves a call, and what makes it an error (``test_errors.py``)."""
    head = make_head((4, 3, 5), torch.float32)
    call = head.input, head.linear_weight, head.target
    several = head.input, head.linear_weight, head.target[:, None].expand(4, 2)
    everything = {
        "linear_bias": torch.zeros(5), "weight": torch.ones(5), "reduction": "mean",
        "ignore_index": None, "label_smoothing": 0.1, "token_weight": torch.ones(4),
        "normalizer": 3, "shift": 1, "softcap": 3.0, "logit_scale": torch.ones(()),
        "z_loss": 0.1, "temperature": 2.0, "entropy": True, "ranks": True,
    }  # fmt: skip
    assert crosscut.explain(*call, **everything).backend == "blocks"
    assert crosscut.explain(*call, policy="cce").backend == "blocks"
    assert crosscut.explain(*several).backend == "blocks"
    refused = crosscut.explain(*several, policy="cce")
    assert refused.backend is None
    with pytest.raises(ValueError, match=re.escape(str(refused.verdicts["blocks"]))):
        crosscut.linear_log_probs(*several, policy="cce")


def test_explain_reads_no_values():
    """Tensors without any, on the meta device, will do; labels are not looked at."""
    explanation = crosscut.explain(
        torch.empty(4, 3, device="meta"),
        torch.empty(5, 3, device="meta"),
        torch.empty(4, dtype=torch.int64, device="meta"),
    )
    assert explanation.backend == "blocks"
    bad_label = crosscut.explain(torch.zeros(1, 3), torch.zeros(5, 3), torch.tensor([99]))
    assert bad_label.backend == "blocks"


def test_explain_names_the_objection():
    low = torch.zeros(4, 3).to(torch.float8_e4m3fn)
    explanation = crosscut.explain(low, low[:2], torch.zeros(4, dtype=torch.int64))
    assert explanation.backend is None
    assert "needs bfloat16, float16, float32 or float64" in str(explanation)
    assert ">" not in str(explanation)


def test_results_are_frozen():
    head = make_head((4, 3, 5), torch.float32)
    tensors = (head.input, head.linear_weight, head.target)
    for result, attribute in (
        (crosscut.explain(*tensors), "backend"),
        (crosscut.gradient_sparsity(*tensors), "kept"),
        (crosscut.token_statistics(*tensors), "lse"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, attribute, None)
