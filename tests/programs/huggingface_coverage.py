"""Every model of transformers that builds in miniature, deferred and untouched, side by side.

    python3 tasks.py coverage            # all of them: minutes; writes docs/huggingface-coverage.md
    python3 tasks.py coverage --mapping masked   # all of a kind; writes their table there
    python3 tasks.py coverage llama t5   # some, by model type or class; writes nothing

A deferred model is judged against the untouched one in the same dtype, and both against the
untouched one in float64: its error may be ``judging.FACTOR`` times the other's. What is bitwise
the same by construction, logits and generated ids, must be bitwise the same.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import crosscut
from crosscut.integrations import huggingface

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import zoo
from support.judging import FACTOR, rounding
from support.zoo import Entry

DOCUMENT = Path(__file__).parents[2] / "docs" / "huggingface-coverage.md"

Grads = dict[str, Tensor]
Loss = Callable[[nn.Module, "Case"], Tensor]


class UnsupportedError(Exception):
    """The untouched model itself cannot do this."""


@dataclass
class Case:
    """One model to be checked: how it is fed, and the truth about it."""

    entry: Entry
    untouched: nn.Module
    inputs: dict[str, Any]
    labels: Tensor
    truths: dict[str, tuple[Tensor, Grads]] = field(default_factory=dict)

    def fresh(self) -> Any:
        """A copy: some models keep activations, and cannot be copied after."""
        return copy.deepcopy(self.untouched)

    def deferred(self) -> Any:
        """A copy that defers every logit."""
        return crosscut.defer_logits(self.fresh(), min_numel=0, on_materialize="silent")


def make_case(entry: Entry) -> Case:
    model = zoo.build(entry)
    inputs = zoo.inputs(entry, model)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    labels[0, :3] = -100
    return Case(entry, model, inputs, labels)


# The losses.


def with_labels(model: nn.Module, case: Case) -> Tensor:
    return model(**case.inputs, labels=case.labels).loss


def with_num_items(model: nn.Module, case: Case) -> Tensor:
    """As Trainer does under gradient accumulation."""
    return model(**case.inputs, labels=case.labels, num_items_in_batch=torch.tensor(37)).loss


def by_hand(model: nn.Module, case: Case) -> Tensor:
    """A hand-written loop."""
    logits = model(**case.inputs).logits
    labels = case.labels[:, 1:].reshape(-1)
    shifted = logits[:, : case.labels.shape[1]][:, :-1].reshape(-1, logits.shape[-1])
    return nn.CrossEntropyLoss()(shifted, labels)


def checkpointed(model: nn.Module, case: Case) -> Tensor:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedError
    model.train()
    model.gradient_checkpointing_enable()  # pyright: ignore[reportCallIssue]
    inputs = {**case.inputs}
    with contextlib.suppress(TypeError):
        return model(**inputs, labels=case.labels, use_cache=False).loss
    return model(**inputs, labels=case.labels).loss


def autocast(model: nn.Module, case: Case) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(**case.inputs, labels=case.labels).loss


# What is checked. Each raises AssertionError, or UnsupportedError.


def gradients_of(model: nn.Module, loss_fn: Loss, case: Case) -> tuple[Tensor, Grads]:
    model.zero_grad()
    loss = loss_fn(model, case)
    loss.backward()
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().double(), grads


def attempt(model: nn.Module, loss_fn: Loss, case: Case) -> tuple[Tensor, Grads]:
    """Of the untouched model: what it cannot do, no one need."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss, grads = gradients_of(model, loss_fn, case)
    except Exception as error:
        raise UnsupportedError(f"{type(error).__name__}: {error}") from error
    if not all(x.isfinite().all() for x in (loss, *grads.values())):
        raise UnsupportedError("its own loss or gradients are not finite")
    return loss, grads


def distances(ours: Grads, true: Grads, head: set[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of the head's gradients and of the others', and the norms of those."""
    assert set(ours) == set(true)
    for group in ("head", "body"):
        names = [name for name in true if (name in head) == (group == "head")]
        if names:
            errors = torch.stack([(ours[n] - true[n]).norm() for n in names])
            yield group, errors.norm(), torch.stack([true[n].norm() for n in names]).norm()


def judge(case: Case, loss_fn: Loss, dtype: torch.dtype = torch.float32) -> None:
    """Loss and gradients of the deferred model are as good as the untouched one's."""
    theirs = attempt(case.fresh().to(dtype), loss_fn, case)
    true = truth(case, loss_fn)
    model = case.deferred().to(dtype)
    torch.manual_seed(0)
    ours = gradients_of(model, loss_fn, case)
    low = torch.bfloat16 if loss_fn is autocast else dtype
    assert_as_good(ours, theirs, true, low, head_parameters(model))


def truth(case: Case, loss_fn: Loss) -> tuple[Tensor, Grads]:
    """Loss and gradients of the untouched model in float64."""
    key = loss_fn.__name__
    if key not in case.truths:
        plain = with_labels if loss_fn in (autocast, checkpointed) else loss_fn
        case.truths[key] = attempt(case.fresh().double(), plain, case)
    return case.truths[key]


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the deferred head's parameters."""
    heads = [m for m in model.modules() if isinstance(m, huggingface.DeferredLinear)]
    held = {id(p) for head in heads for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in held}


def assert_as_good(
    ours: tuple[Tensor, Grads],
    theirs: tuple[Tensor, Grads],
    true: tuple[Tensor, Grads],
    dtype: torch.dtype,
    head: set[str],
) -> None:
    """Errors of loss and gradients beside those of the untouched model."""
    own = abs(theirs[0] - true[0])
    allowed = FACTOR * own + rounding(dtype) * abs(true[0]) * 2
    assert abs(ours[0] - true[0]) <= allowed, f"loss {ours[0]:.6g}, untouched {theirs[0]:.6g}"
    pairs = zip(distances(ours[1], true[1], head), distances(theirs[1], true[1], head), strict=True)
    for (group, mine, norm), (_, other, _) in pairs:
        limit = FACTOR * other + rounding(dtype) * norm
        assert mine <= limit, f"d_{group}: {mine / norm:.1e} off, allowed {limit / norm:.1e}"


def check_evaluation(case: Case) -> None:
    model = case.deferred().eval()
    with torch.no_grad():
        ours = model(**case.inputs, labels=case.labels)
        theirs = case.fresh()(**case.inputs, labels=case.labels)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)


def check_logits_after(case: Case) -> None:
    """``outputs.logits`` is there after the backward, bitwise."""
    model = case.deferred()
    outputs = model(**case.inputs, labels=case.labels)
    outputs.loss.backward()
    theirs = case.fresh()(**case.inputs, labels=case.labels).logits
    assert outputs.logits.shape == theirs.shape
    assert outputs.logits.dtype == theirs.dtype
    assert torch.equal(huggingface.materialize(outputs).logits, theirs)


def check_generate(case: Case) -> None:
    def generate(model: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**case.inputs, max_new_tokens=4, do_sample=True)

    try:
        theirs = generate(case.fresh())
    except Exception as error:
        raise UnsupportedError(str(error)) from error
    assert torch.equal(generate(case.deferred()), theirs)


def check_save_and_load(case: Case) -> None:
    model = case.deferred()
    assert list(model.state_dict()) == list(case.untouched.state_dict())
    with tempfile.TemporaryDirectory() as directory:
        try:
            case.fresh().save_pretrained(directory)  # pyright: ignore
            type(model).from_pretrained(directory)
        except Exception as error:
            raise UnsupportedError(str(error)) from error
        model.save_pretrained(directory)
        again = type(model).from_pretrained(directory)
    assert not huggingface.is_deferred(again)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def check_copy_and_undo(case: Case) -> None:
    model = case.deferred()
    twin = copy.deepcopy(model)
    loss = gradients_of(model, with_labels, case)[0]
    assert torch.equal(gradients_of(twin, with_labels, case)[0], loss)
    fused = [huggingface.explain(m)[0].log.fused for m in (model, twin)]
    assert fused[0] == fused[1]
    crosscut.undefer_logits(twin)
    assert not huggingface.is_deferred(twin)
    untouched = case.fresh()
    expected = attempt(untouched, with_labels, case)
    undone = gradients_of(twin, with_labels, case)
    assert torch.equal(undone[0], expected[0])
    assert [type(m) for m in twin.modules()] == [type(m) for m in untouched.modules()]


CHECKS: dict[str, Callable[[Case], None]] = {
    "labels": lambda case: judge(case, with_labels),
    "num_items": lambda case: judge(case, with_num_items),
    "eval": check_evaluation,
    "checkpointing": lambda case: judge(case, checkpointed),
    "bfloat16": lambda case: judge(case, with_labels, torch.bfloat16),
    "autocast": lambda case: judge(case, autocast),
    "own loop": lambda case: judge(case, by_hand),
    "logits after": check_logits_after,
    "generate": check_generate,
    "save, load": check_save_and_load,
    "copy, undo": check_copy_and_undo,
}
"""Column of the table -> what it checks."""


def is_fused(case: Case) -> str:
    """ "fused" where a training step computes no logits; otherwise what asked for them."""
    model = case.deferred()
    with_labels(model, case).backward()
    log = huggingface.explain(model)[0].log
    if log.materialized:
        event = next(iter(log.materialized))
        return f"{event.what} at {Path(event.where).name}"
    if not log.deferred:
        return next(iter(log.real), "head not called")
    return "fused" if log.fused else "no loss was seen"


@dataclass
class Row:
    """What came of one model."""

    entry: Entry
    verdicts: dict[str, str] = field(default_factory=dict)
    fused: str = ""
    error: str = ""


def run(entry: Entry) -> Row:
    """Every check of one model."""
    row = Row(entry)
    try:
        case = make_case(entry)
        attempt(case.fresh(), with_labels, case)
    except (zoo.UnbuildableError, UnsupportedError) as error:
        row.error = str(error)
        return row
    try:
        row.fused = is_fused(case)
    except TypeError as error:
        row.fused = f"no linear head ({error})"[:100]
        return row
    for name, check in CHECKS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(case)
            row.verdicts[name] = "yes"
        except UnsupportedError:
            row.verdicts[name] = "–"
        except Exception as error:
            row.verdicts[name] = f"WRONG {type(error).__name__}: {str(error)[:300]}"
    return row


TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Sequence to sequence",
    "masked": "Masked language models",
    "vision": "Image, text to text",
}


HEADER = """# Models that train through crosscut

Made by `python3 tasks.py coverage`, which builds every model of transformers in miniature and sets
it, deferred, beside itself, untouched. What the columns say:
[huggingface.md](huggingface.md#coverage). "–" : the untouched model cannot do it either, in
miniature or, where gradients are judged, in float64.
"""


def section(mapping: str, rows: list[Row]) -> str:
    """The table of one mapping, in Markdown."""
    import transformers

    tested = [row for row in rows if row.verdicts]
    fused = [row for row in tested if row.fused == "fused"]
    judged = [row for row in tested if row.verdicts["labels"] != "–"]
    lines = [
        f"## {TITLES[mapping]}",
        "",
        f"transformers {transformers.__version__}, PyTorch {torch.__version__}. "
        f"{len(rows)} models; {len(tested)} could be tested: {len(fused)} fused, "
        f"{len(tested) - len(fused)} with real logits, {sum(map(is_wrong, tested))} wrong. "
        f"{len(judged)} can run in float64, so that their gradients could be judged.",
        "",
        f"| model | a step with labels | {' | '.join(CHECKS)} |",
        f"|---|---|{':-:|' * len(CHECKS)}",
    ]
    for row in tested:
        verdicts = " | ".join(row.verdicts[name].split()[0] for name in CHECKS)
        lines.append(f"| {row.entry.model_class.__name__} | {row.fused} | {verdicts} |")
    if len(tested) < len(rows):
        lines += ["", "Not tested:", ""]
        lines += [
            f"- {row.entry.model_class.__name__}: {row.error or row.fused}".split("\n")[0][:160]
            for row in rows
            if not row.verdicts
        ]
    return "\n".join(lines) + "\n"


def is_wrong(row: Row) -> bool:
    return not set(row.verdicts.values()) <= {"yes", "–"}


def write_section(mapping: str, rows: list[Row]) -> None:
    """Replace one mapping's table in the document; the others stay."""
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    parts = {part.partition("\n")[0]: "## " + part for part in text.split("\n## ")[1:]}
    parts[TITLES[mapping]] = section(mapping, rows)
    tables = [parts[title].strip() + "\n" for title in TITLES.values() if title in parts]
    DOCUMENT.write_text("\n".join([HEADER, *tables]))


def main() -> int:
    """Read the command line. Returns how many models are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="model types or class names; all if none")
    parser.add_argument("--mapping", action="append", choices=zoo.MAPPINGS)
    arguments = parser.parse_args()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    number_wrong = 0
    for mapping in arguments.mapping or zoo.MAPPINGS:
        rows: list[Row] = []
        for entry in zoo.entries(mapping):
            names = {entry.model_type, entry.model_class.__name__}
            if arguments.models and not names & set(arguments.models):
                continue
            start = time.monotonic()
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = run(entry)
            rows.append(row)
            wrong = [f"{k}: {v}" for k, v in row.verdicts.items() if v not in ("yes", "–")]
            print(
                f"{mapping} {entry.model_class.__name__}: {row.fused or row.error} "
                f"[{time.monotonic() - start:.1f} s]",
                *wrong,
                sep="\n    ",
                flush=True,
            )
        if not arguments.models:
            write_section(mapping, rows)
        number_wrong += sum(map(is_wrong, rows))
    return number_wrong


if __name__ == "__main__":
    sys.exit(main())
