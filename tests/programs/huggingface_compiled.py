"""A training step of every causal language model of transformers, compiled, deferred or not.

    python3 tasks.py compiled              # all: minutes; writes docs/huggingface-compiled.md
    python3 tasks.py compiled llama gpt2   # some, by model type or class; writes nothing

The compiled deferred model is judged as in ``huggingface_coverage.py``: beside the untouched one,
not compiled, and both beside it in float64. A step ran fused if crosscut's operator is in one of
the graphs (or was called between two), and nothing multiplies by the head's weight. The graph
breaks of a forward are those that dynamo counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from crosscut.integrations import huggingface

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import zoo

from programs import huggingface_coverage as coverage

DOCUMENT = Path(__file__).parents[2] / "docs" / "huggingface-compiled.md"

BACKEND = "aot_eager"
INDUCTOR = ("LlamaForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM", "GPT2LMHeadModel")
"""Models that are compiled to machine code too, which takes longer."""


class Watch:
    """A backend of ``torch.compile`` that looks for the head in the graphs it is given."""

    def __init__(self, backend: str, weights: list[Tensor]) -> None:
        self.backend = backend
        self.weights = {id(x) for x in weights}
        self.losses = 0
        self.logits = 0

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        given = [node for node in graph.graph.nodes if node.op == "placeholder"]
        heads = {n for n, x in zip(given, inputs, strict=True) if id(x) in self.weights}
        for node in graph.graph.nodes:
            if "crosscut" in str(node.target):
                self.losses += 1
            elif getattr(node.target, "__name__", "") in ("linear", "matmul", "addmm", "mm"):
                self.logits += bool(heads & set(node.all_input_nodes))
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


@dataclass
class Compiled:
    """What came of one model.

    Attributes:
        entry: the model.
        untouched: graph breaks of the untouched model.
        deferred: graph breaks of the deferred one.
        fused: "fused", or what was computed.
        verdict: of loss and gradients: "yes", "–" where no float64 can judge them, or what is
            wrong.
        inductor: the same, by inductor; empty where not tried.
        error: why it could not be tested; the rest is empty then.
    """

    entry: zoo.Entry
    untouched: int = 0
    deferred: int = 0
    fused: str = ""
    verdict: str = ""
    inductor: str = ""
    error: str = ""

    @property
    def wrong(self) -> bool:
        return bool({self.verdict, self.inductor} - {"yes", "–", ""})


def compiled_step(
    model: nn.Module, case: coverage.Case, backend: Any
) -> tuple[tuple[Tensor, coverage.Grads], int]:
    """Loss and gradients of a compiled training step, and its graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    step = coverage.gradients_of(torch.compile(model, backend=backend), coverage.with_labels, case)
    compiled = {name.removeprefix("_orig_mod."): grad for name, grad in step[1].items()}
    return (step[0], compiled), sum(counters["graph_break"].values())


def judge(case: coverage.Case, backend: str) -> tuple[str, str, int]:
    """How the compiled deferred model does: fused or not, the verdict, its graph breaks."""
    model = case.deferred()
    heads = [m for m in model.modules() if isinstance(m, huggingface.DeferredLinear)]
    watch = Watch(backend, [head.weight for head in heads])
    try:
        ours, breaks = compiled_step(model, case, watch)
    except Exception as error:
        return "", f"WRONG {type(error).__name__}: {str(error)[:300]}", 0
    log = huggingface.explain(model)[0].log
    fused = "fused" if watch.losses + log.fused.total() else "no loss was seen"
    if watch.logits or log.materialized or log.real:
        fused = "computes logits"
    try:
        theirs = coverage.attempt(case.fresh(), coverage.with_labels, case)
        true = coverage.truth(case, coverage.with_labels)
        # To what no loss depends on, a compiled graph gives zeros.
        grads = {name: grad for name, grad in ours[1].items() if name in true[1] or grad.any()}
        ours = ours[0], grads
        head = coverage.head_parameters(model)
        coverage.assert_as_good(ours, theirs, true, torch.float32, head)
    except coverage.UnsupportedError:
        return fused, "–", breaks
    except AssertionError as error:
        return fused, f"WRONG {error}", breaks
    return fused, "yes", breaks


def run(entry: zoo.Entry) -> Compiled:
    """One model."""
    row = Compiled(entry)
    try:
        case = coverage.make_case(entry)
        coverage.attempt(case.fresh(), coverage.with_labels, case)
    except (zoo.UnbuildableError, coverage.UnsupportedError) as error:
        row.error = str(error)
        return row
    try:
        _, row.untouched = compiled_step(case.fresh(), case, BACKEND)
    except Exception as error:
        row.error = f"the untouched model does not compile: {type(error).__name__}: {error}"
        return row
    row.fused, row.verdict, row.deferred = judge(case, BACKEND)
    if entry.model_class.__name__ in INDUCTOR:
        _, row.inductor, _ = judge(case, "inductor")
    return row


def document(rows: list[Compiled]) -> str:
    """The table, in Markdown."""
    import transformers

    tested = [row for row in rows if not row.error]
    more = [row for row in tested if row.deferred > row.untouched]
    lines = [
        "# Causal language models under torch.compile",
        "",
        "Made by `python3 tasks.py compiled`: a training step with labels of every model in"
        f" miniature, compiled with backend `{BACKEND}`. Loss and gradients of the deferred model"
        " are judged beside those of the untouched one, not compiled, as in"
        ' [huggingface-coverage.md](huggingface-coverage.md); "–": no float64 can judge them.',
        "",
        f"transformers {transformers.__version__}, PyTorch {torch.__version__}. {len(rows)} models;"
        f" {len(tested)} could be tested: {sum(row.fused == 'fused' for row in tested)} fused,"
        f" {len(tested) - len(more)} with no more graph breaks than untouched,"
        f" {sum(row.wrong for row in tested)} wrong of {sum(row.verdict != '–' for row in tested)}"
        " that could be judged.",
        "",
        "| model | a step | breaks, untouched | breaks, deferred | loss and gradients | inductor |",
        "|---|---|--:|--:|:-:|:-:|",
    ]
    lines += [
        f"| {row.entry.model_class.__name__} | {row.fused} | {row.untouched} | {row.deferred} | "
        f"{row.verdict.split()[0]} | {row.inductor.partition(' ')[0]} |"
        for row in tested
    ]
    lines += ["", "Not tested:", ""]
    lines += [
        f"- {row.entry.model_class.__name__}: {row.error}".split("\n")[0][:160]
        for row in rows
        if row.error
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Read the command line. Returns how many models are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="model types or class names; all if none")
    wanted = set(parser.parse_args().models)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    rows: list[Compiled] = []
    for entry in zoo.entries("causal"):
        if wanted and not wanted & {entry.model_type, entry.model_class.__name__}:
            continue
        start = time.monotonic()
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = run(entry)
        rows.append(row)
        print(
            f"{entry.model_class.__name__}: {row.error or row.fused}, graph breaks "
            f"{row.untouched} -> {row.deferred}, {row.verdict} {row.inductor} "
            f"[{time.monotonic() - start:.1f} s]",
            flush=True,
        )
    if not wanted:
        DOCUMENT.write_text(document(rows))
    return sum(row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main())
