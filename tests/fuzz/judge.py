"""Whether a call is right: within what rounding explains, and true to what is always true.

An error may be :data:`FACTOR` times what rounding explains of PyTorch's (see :mod:`.rounding`), and
the rounding of the result besides: of each row of a gradient, of each loss, and of all of them
together. What rounding explains is the mean error of its evaluations and :data:`DEVIATIONS`
standard deviations, or the largest if that is more. Few evaluations say that a call is right; that
it is wrong takes many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import crosscut
from fuzz.dense import evaluate, logits
from fuzz.problem import DIFFERENTIABLE, HEADS, MODEL, Problem

FACTOR = 1.5
DEVIATIONS = 5
FEW, MANY = 12, 256
MOST_ENTRIES = 2**22
"""Of the logits of evaluations at once."""


@dataclass(frozen=True)
class Violation:
    """What is wrong with a call.

    Attributes:
        kind: in a word or two, the same for all that are wrong in the same way.
        detail: by how much.
    """

    kind: str
    detail: str


Run = Callable[[Problem], dict[str, Tensor]]
"""Value and gradients by name, on the CPU, in the shapes of the problem's tensors."""


def runner(backend: str | None, device: str = "cpu") -> Run:
    """Runs the text of a problem."""

    def run(problem: Problem) -> dict[str, Tensor]:
        given = {name: _on(problem, name, device) for name in problem.tensors}
        scope: dict[str, Any] = {"torch": torch, "crosscut": crosscut, **given}
        limit = crosscut.workspace_limit()
        if problem.program == "defer_logits":
            exec(MODEL, scope)
        try:
            exec(problem.statements(backend), scope)
            return _outcome(problem, scope, given)
        finally:
            crosscut.set_workspace_limit(limit)

    return run


def run_plain(problem: Problem) -> dict[str, Tensor]:
    """PyTorch itself."""
    from fuzz import plain

    given = {
        name: torch.nn.Parameter(values.clone()) if name in problem.leaves else values
        for name, values in problem.tensors.items()
    }
    if problem.program == "gradient_sparsity":
        return {"value": torch.tensor([1.0, 0.0])}
    value = plain.value(problem, given)
    if "upstream" in given and problem.value_axes() not in ("", "b"):
        given["upstream"] = torch.where(problem.value_kept, given["upstream"], 0)
    ranks = plain.ranks(problem, given) if problem.option("ranks") else {}
    return _outcome(problem, {"value": value}, given) | ranks


def _on(problem: Problem, name: str, device: str) -> Tensor:
    """A tensor in its layout on a device."""
    values = problem.given(name)
    if device != "cpu":
        there = torch.empty_strided(
            values.shape, values.stride(), dtype=values.dtype, device=device
        )
        values = there.copy_(values)
    if name in DIFFERENTIABLE:
        return torch.nn.Parameter(values, requires_grad=name in problem.leaves)
    return values


def _outcome(problem: Problem, scope: dict[str, Any], given: dict[str, Tensor]) -> dict:
    value = scope["value"]
    if not isinstance(value, Tensor):
        return {"value": torch.tensor([value.kept, value.tail])}
    if problem.leaves:
        value.backward(given["upstream"].reshape(value.shape))
    found = {"value": value.detach().cpu()}
    for name in problem.leaves:
        grad = given[name].grad
        grad = torch.zeros_like(given[name]) if grad is None else grad
        found[f"d_{name}"] = grad.cpu().reshape(problem.tensors[name].shape)
    for name in ("argmax", "target_rank"):
        if getattr(scope.get("found"), name, None) is not None:
            found[name] = getattr(scope["found"], name).cpu().reshape(problem.value_kept.shape)
    return found


def judge(problem: Problem, run: Run) -> Violation | None:
    """The first thing that is wrong with a call, or None."""
    return next(judgements(problem, run), None)


def judgements(problem: Problem, run: Run) -> Iterator[Violation]:
    """All that is wrong with a call."""
    try:
        found, again = run(problem), run(problem)
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        yield Violation(f"raises {type(error).__name__}", text[:200])
        return
    for name, value in found.items():
        if not torch.equal(value.nan_to_num(), again[name].nan_to_num()):
            yield Violation(f"{name}: other bits in a second call", "")
    if problem.program == "gradient_sparsity":
        yield from _sparsity(problem, found["value"])
        return
    yield from _shapes(problem, found)
    yield from _always(problem, found)
    yield from _errors(problem, found)
    if "target_rank" in found:
        yield from _ranks(problem, found["argmax"], found["target_rank"])


def _sparsity(problem: Problem, found: Tensor) -> Iterator[Violation]:
    kept, tail = found.tolist()
    if not (0 <= kept <= 1 and 0 <= tail <= 1):
        yield Violation("sparsity out of [0, 1]", f"kept {kept}, tail {tail}")
    if problem.option("policy") == "exact" and (kept, tail) != (1, 0):
        yield Violation("exact leaves something out", f"kept {kept}, tail {tail}")
    if kept == 1 and tail:
        yield Violation("all is kept, with a tail", f"tail {tail}")


def _shapes(problem: Problem, found: dict[str, Tensor]) -> Iterator[Violation]:
    wide = torch.promote_types(problem.low, torch.float32)
    if found["value"].dtype != wide:
        yield Violation("value: dtype", f"{found['value'].dtype} for {problem.dtype}")
    for name in problem.leaves:
        if found[f"d_{name}"].dtype != problem.tensors[name].dtype:
            yield Violation(f"d_{name}: dtype", f"{found[f'd_{name}'].dtype}")


def _always(problem: Problem, found: dict[str, Tensor]) -> Iterator[Violation]:
    """What holds without exception."""
    value, kept = found["value"], problem.kept
    program = problem.program
    own_loss = program in ("linear_cross_entropy", "LinearCrossEntropy")
    others = {"label_smoothing", "z_loss"} & set(problem.options)
    others |= {"weight", "token_weight"} & set(problem.tensors)
    plain = own_loss and not others
    if plain and (value < 0).any():
        yield Violation("value: a loss below 0", f"{value.min().item():.3g}")
    if plain and len(problem.tensors["linear_weight"]) == 1 and value.nan_to_num().any():
        yield Violation("value: a loss of the only class", f"{value.abs().max().item():.3g}")
    log_prob = value if program == "linear_log_probs" else None
    if program == "token_statistics":
        log_prob = value[2]
        if problem.option("entropy") and (value[3] < 0).any():
            yield Violation("value: an entropy below 0", f"{value[3].min().item():.3g}")
    if program == "defer_logits" and problem.option("gathered"):
        log_prob = value
    if log_prob is not None and (log_prob > 0).any():
        yield Violation("value: a log-probability above 0", f"{log_prob.max().item():.3g}")
    if "d_input" in found and found["d_input"][~kept].any():
        yield Violation("d_input: not 0 where the target is ignored", "")
    if not kept.any() and any(found[f"d_{name}"].any() for name in problem.leaves):
        yield Violation("a gradient where every target is ignored", "")
    if problem.value_axes() == "bt":
        counted = problem.value_kept
        ignored = value.reshape(counted.shape)[~counted]
        policy = problem.program in ("losses.clipped_surrogate", "losses.kl_penalty")
        if ignored.any() and not policy:
            yield Violation("value: not 0 where the target is ignored", "")
    if "d_token_weight" in found and found["d_token_weight"][~problem.value_kept].any():
        yield Violation("d_token_weight: not 0 where the target is ignored", "")


def _ranks(problem: Problem, argmax: Tensor, rank: Tensor) -> Iterator[Violation]:
    """Ranks of the logits up to what rounding explains; where nothing rounds, exactly."""
    z = logits(problem, 1 + 2 * FEW)
    kept, num_classes = problem.value_kept, z.shape[-1]
    target = torch.where(kept, problem.tensors["target"], 0).long()[..., None]
    z = z - z.gather(-1, target.expand(len(z), *target.shape))
    slack = FACTOR * _explained((z[1:] - z[0]).abs()).nan_to_num(0)  # at -inf
    exact, index = z[0], torch.arange(num_classes)
    if _is_exact(problem):
        least = most = ((exact > 0) | ((exact == 0) & (index < target))).sum(-1)
        best = torch.where(exact == exact.amax(-1, keepdim=True), index, num_classes).amin(-1)
        right = argmax == best
    else:
        least, most = (exact > slack).sum(-1), (exact >= -slack).sum(-1) - 1
        at = argmax.clamp_min(0)[..., None]
        highest = (exact - slack).amax(-1)
        right = (exact + slack).gather(-1, at)[..., 0] >= highest
    if (((rank < least) | (rank > most)) & kept).any() or (rank[~kept] != num_classes).any():
        yield Violation("target_rank: wrong", f"{rank.tolist()}, right {least.tolist()}")
    if (~right & kept).any() or (argmax[~kept] != -1).any():
        yield Violation("argmax: wrong", f"{argmax.tolist()}")


def _is_exact(problem: Problem) -> bool:
    """Whether no logit is rounded on the way, in any order of the sums."""
    if "softcap" in problem.options or problem.option("temperature", 1.0) == 0.7:
        return False
    tensors = problem.cast()
    kept = tensors["input"][problem.kept].double()
    heads = [kept, *(tensors[name].double() for name in HEADS[1:] if name in tensors)]
    small = all(((8 * of).frac() == 0).all() and (of.abs() <= 64).all() for of in heads)
    products = kept @ tensors["linear_weight"].double().T
    return small and torch.equal(products, products.to(problem.low).double())


def _errors(problem: Problem, found: dict[str, Tensor]) -> Iterator[Violation]:
    suspects = {violation.kind for violation in _beyond(problem, found, FEW)}
    if suspects:
        for violation in _beyond(problem, found, MANY):
            if violation.kind in suspects:
                yield violation


def _beyond(problem: Problem, found: dict[str, Tensor], draws: int) -> Iterator[Violation]:
    """What is further off than rounding explains."""
    own = _evaluations(problem, draws, problem.low)
    loose = own
    if problem.option("policy") == "filtered" and problem.low in (torch.float32, torch.float64):
        loose = _evaluations(problem, draws, torch.bfloat16)
    overflows = not bool(own["value"].isfinite().all())
    for name in own:
        if overflows and name != "value":
            continue  # its gradients are not defined
        evaluations = (own if name in ("value", "d_token_weight") else loose)[name]
        value = found[name].double().reshape(evaluations.shape[1:])
        violation = _compare(problem, name, value, evaluations)
        if violation is not None:
            yield violation


def _evaluations(problem: Problem, draws: int, low: torch.dtype) -> dict[str, Tensor]:
    """Exact ones, and so many others."""
    b, t = problem.tensors["input"].shape[:2]
    entries = max(1, b * t * len(problem.tensors["linear_weight"]))
    at_once = min(draws, max(2, MOST_ENTRIES // entries // 2 * 2))  # even
    parts = [
        evaluate(problem, 1 + min(at_once, draws - first), low=low, seed=first)
        for first in range(0, draws, at_once)
    ]
    others = [{name: of[1:] for name, of in part.items()} for part in parts[1:]]
    return {
        name: torch.cat([of, *(other[name] for other in others)]) for name, of in parts[0].items()
    }


def _compare(problem: Problem, name: str, found: Tensor, draws: Tensor) -> Violation | None:
    """Whether a row of a value, or all of it, is further from the truth than it may be."""
    by_row = name in ("d_input", "d_linear_weight")
    width = draws.shape[-1] if by_row else 1
    rows = draws.reshape(len(draws), -1, width)  # [draws, rows, width]
    possible = rows.isfinite().all(0).all(-1)  # [rows]: where PyTorch's value is one
    true, value, rows = rows[0, possible], found.reshape(-1, width)[possible], rows[:, possible]
    if not true.numel():
        return None
    wrong = ~value.isfinite().all(-1)
    if wrong.any():
        detail = f"{value[wrong][0].tolist()}, right {true[wrong][0].tolist()}"
        return Violation(f"{name}: NaN or inf", detail)
    allowance = _allowance(problem, name, len(possible))[possible]
    result = _result_rounding(problem, name, true) + allowance
    explained = _explained((rows[1:] - true).norm(dim=-1))  # [rows]
    # Where rounding is as large as the value itself, its errors have a long tail.
    explained = torch.where(explained > true.norm(dim=-1), 3 * explained, explained)
    partial = name in ("d_input", "d_linear_weight", "d_linear_bias") and _filters(problem)
    typical = explained.square().mean().sqrt() if partial else 0.0
    factor = FACTOR + (problem.low == torch.float64)  # where the truth rounds like PyTorch
    limits = factor * (explained + typical) + result
    errors = (value - true).norm(dim=-1)
    kind = f"{name}: off"
    if (errors > limits).any():
        row = int((errors / limits).nan_to_num(0).argmax())
        number = int(possible.nonzero()[row])
        return Violation(kind, f"row {number} {_off(errors[row], limits[row], true[row])}")
    limit = factor * _explained((rows[1:] - true).flatten(1).norm(dim=-1)) + result.norm()
    if errors.norm() > limit:
        return Violation(kind, f"the norm {_off(errors.norm(), limit, true)}")
    return None


def _off(error: Tensor, limit: Tensor, true: Tensor) -> str:
    sizes = error.item(), limit.item(), true.norm().item()
    return "by {:.2e}, may be {:.2e}, of {:.2e}".format(*sizes)


def _explained(errors: Tensor) -> Tensor:
    """What rounding explains, of errors [draws, ...] that were made in one of two ways by turns."""

    def of(errors: Tensor) -> Tensor:
        spread = errors.std(0) if len(errors) > 1 and errors.numel() else 0
        return torch.maximum(errors.mean(0) + DEVIATIONS * spread, errors.amax(0))

    return torch.maximum(of(errors[::2]), of(errors[1::2]))


def _result_rounding(problem: Problem, name: str, true: Tensor) -> Tensor:
    """Of the result in its own dtype, [rows]; in float64 that of the truth as well."""
    dtype = torch.promote_types(problem.low, torch.float32)
    if name != "value":
        dtype = problem.tensors[name.removeprefix("d_")].dtype
        dtype = problem.low if name != "d_token_weight" else dtype
    # What is smaller than normal numbers may be flushed on the way, in the wide dtype.
    wide = torch.finfo(torch.promote_types(dtype, torch.float32))
    own = torch.finfo(dtype)
    least = max(64 * wide.smallest_normal, own.smallest_normal * own.eps / 2)
    half = (true.abs() * own.eps / 2).clamp_min(least).norm(dim=-1)
    return 64 * half if dtype == torch.float64 else half


def _filters(problem: Problem) -> bool:
    """Whether the policy leaves out parts of the gradient."""
    low = problem.low in (torch.bfloat16, torch.float16)
    policy = problem.option("policy", "auto")
    return policy not in ("auto", "exact") or (policy == "auto" and low)


def _allowance(problem: Problem, name: str, rows: int) -> Tensor:
    """What the paper's policies drop: ``|softmax - onehot|`` below 2**-12, times the upstream."""
    paper = problem.option("policy", "auto").startswith("cce")
    if not paper or name not in ("d_input", "d_linear_weight", "d_linear_bias"):
        return torch.zeros(rows, dtype=torch.float64)
    size = 2.0**-12
    for factor in ("upstream", "token_weight", "weight"):
        if factor in problem.tensors:
            values = problem.tensors[factor].double().abs().nan_to_num(0, 0, 0)
            size *= max(values.flatten().tolist(), default=0.0)
    if name == "d_linear_bias":
        size *= int(problem.kept.sum())
    else:
        others = problem.tensors["input" if name == "d_linear_weight" else "linear_weight"]
        others = others[problem.kept] if name == "d_linear_weight" else others
        size *= abs(problem.option("logit_scale", 1.0)) * others.double().norm(dim=-1).sum().item()
    return torch.full((rows,), size, dtype=torch.float64)
