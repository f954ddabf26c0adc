"""Deferred logits in a compiled graph: they do what the tensor does, or raise a clear error.

Every program runs compiled on the logits of a head that defers them, and eager on those of a
``torch.nn.Linear``, in float64, where values and gradients must agree to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.deferred import (
    BIAS,
    FLAT,
    IDS,
    MASK,
    B,
    D,
    Doubled,
    Program,
    T,
    V,
    ce,
    head,
    hidden_states,
)  # fmt: skip
from support.judging import error, rounding
from torch import Tensor

from crosscut.integrations import huggingface
from crosscut.integrations.huggingface import LogitsMaterializedError, materialize

SQUARE = torch.randn(V, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def written(
    write: Callable[[Tensor], Any], of: Callable[[Tensor], Tensor] = lambda z: z
) -> Program:
    """A loss of logits after something of them was written; with a name for both."""

    def program(logits: Tensor) -> Tensor:
        write(of(logits))
        return ce(logits)

    return program


def set_item(logits: Tensor) -> None:
    logits[..., 3] = -9.0
    logits[:, :, torch.tensor([1, 2])] = torch.finfo(torch.float64).min


def subtract(logits: Tensor) -> None:
    logits -= BIAS


def before(read: Callable[[Tensor], Tensor], of: Callable[[Tensor], Tensor]) -> Program:
    """Something made before a write: it sees the write exactly if it is a view."""

    def program(logits: Tensor) -> Tensor:
        made = of(logits)
        logits[:, 1] *= 2
        return read(made) + logits.logsumexp(-1).sum()

    return program


def with_stopped_weights(logits: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.view(-1, V), FLAT.clamp_min(0), reduction="none")
    with torch.no_grad():
        weights = F.log_softmax(logits, -1).gather(-1, IDS[..., None]).flatten().exp()
        baseline = logits * 1.0
    return (losses * weights).sum() + (logits.logsumexp(-1) - baseline.logsumexp(-1)).pow(2).sum()


def iterated(logits: Tensor) -> Tensor:
    return torch.stack([row.amax(-1) for row in logits])


# fmt: off
WRITES: dict[str, Program] = {
    "div_": written(lambda z: z.div_(0.7)),
    "add_, clamp_": written(lambda z: z.add_(BIAS).clamp_(-1, 1)),
    "set item": written(set_item),
    "masked_fill_": written(lambda z: z.masked_fill_(MASK[..., None], 0.5)),
    "-=": written(subtract),
    "through views": written(lambda z: z.mul_(3), lambda z: z.view(-1, V)[2:].transpose(0, 1)),
    "-= through a view": written(subtract, lambda z: z.flatten(0, 1)),
    "detached": written(lambda z: z.mul_(1.5), lambda z: z.detach()),
    "out": written(lambda z: torch.mul(z.detach(), 2, out=z.detach())),
    "of the same dtype": written(lambda z: z.mul_(2), lambda z: z.double().contiguous()),
    "of a copy": written(lambda z: z.mul_(2), lambda z: z.clone()),
    "of another dtype": lambda z: ce(z.float().div_(0.7)).double(),
    "under no_grad": written(lambda z: torch.no_grad()(lambda: z.mul_(2.5))()),
    "view before": before(ce, lambda z: z.view(-1, V)),
    "slice before": before(lambda z: z.logsumexp(-1).sum(), lambda z: z[:, :2]),
    "copy before": before(ce, lambda z: z.clone()),
    "scaled before": before(ce, lambda z: z / 2),
    "logarithms before": before(lambda z: z.pow(2).sum(), lambda z: F.log_softmax(z, -1)),
    "copy of a slice": lambda z: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, V).div_(2), IDS[:, 1:].flatten()),
}
OTHERS: dict[str, Program] = {
    "stopped": with_stopped_weights,
    "cat, stack": lambda z: torch.cat([z, z * 2], 1).exp().sum() + torch.stack([z, z]).mean(),
    "operators": lambda z: (
        abs(z) % 3 + z.detach() // 2 + 2 ** -abs(z) + (1 - z) - BIAS + (z - BIAS)
    ).sum(),
    "matmul": lambda z: (z @ SQUARE).exp().sum() + (SQUARE @ z.mT).tanh().sum(),
    "matmul, name": lambda z: torch.matmul(SQUARE, z.transpose(1, 2)).tanh().sum(),
    "comparisons": lambda z: (z * ((z > BIAS) | (z <= -BIAS))).sum() + (z > BIAS).sum(),
    "iterated": iterated,
    "unknown views": lambda z: ce(z.unflatten(-1, (V, 1))[..., 0].mul_(2)) + z.sum(),
    "shapes": lambda z: z.new_ones(z.size(0), z.shape[1]).sum() * z.logsumexp(-1).sum() * z.dim(),
    "materialised": lambda z: ce(materialize({"logits": z})["logits"].mul_(2)) + z.sum(),
}
# fmt: on


def run(layer: Any, call: Callable[[Tensor], Any]) -> list[list[Tensor]]:
    """Value and gradients of each of a call's results."""
    hidden = hidden_states()
    inputs = [hidden, *layer.parameters()]
    found = []
    for value in call(hidden):
        grads = torch.autograd.grad(value.sum(), inputs, retain_graph=True, allow_unused=True)
        found.append([value.detach(), *[torch.zeros(1) if g is None else g for g in grads]])
    return found


@pytest.mark.parametrize("programs", [WRITES, OTHERS], ids=["writes", "others"])
def test_as_eager(programs):
    """One graph of them all, without a break; no two do the same, or PyTorch confuses them."""
    results = []
    for layer in (head(), head(deferred=False)):

        def call(hidden: Tensor, layer: Any = layer) -> list[Tensor]:
            return [program(layer(hidden)) for program in programs.values()]

        if isinstance(layer, huggingface.DeferredLinear):
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        results.append(run(layer, call))
    for name, ours, theirs in zip(programs, *results, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape, name
            assert mine.dtype == other.dtype, name
            dtype = torch.float32 if "another dtype" in name else other.dtype
            assert error(mine, other) <= rounding(dtype), name


def test_writes_leave_the_graph():
    """Logits that were written, and a view of them, as the graph returns them."""

    def call(hidden: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        logits = layer(hidden)
        view = logits.view(-1, V)
        logits.mul_(2)
        return logits, view

    hidden = hidden_states()
    logits, view = torch.compile(call, fullgraph=True, backend="aot_eager")(hidden, head())
    expected = head(deferred=False)(hidden) * 2
    assert torch.allclose(materialize(logits), expected)
    assert torch.allclose(ce(view), ce(expected))


def test_views_leave_the_graph():
    """A view and its base are still that outside: a write to one reaches the other."""

    def call(hidden: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        logits = layer(hidden)
        return logits, logits.view(-1, V)

    layer = head()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    logits, view = compiled(hidden_states(), layer)
    logits.mul_(2)
    assert torch.allclose(ce(view), ce(head(deferred=False)(hidden_states()) * 2))
    logits, view = compiled(hidden_states(), layer)
    assert huggingface.is_deferred(view)
    ce(view)
    assert layer.deferral.log.fused


def test_stale_logits_are_refused():
    layer = head()
    compiled = torch.compile(lambda hidden: layer(hidden), fullgraph=True, backend="aot_eager")
    logits = compiled(hidden_states())
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        logits.sum()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_functions_of_others_are_refused(fullgraph):
    """Dynamo would leave their backward out; outside of a graph, so would autograd."""
    layer = head()

    def call(hidden: Tensor) -> Tensor:
        return Doubled.apply(layer(hidden)).sum()

    compiled = torch.compile(call, fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(Exception, match=r"autograd\.Function.*materialize"):
        compiled(hidden_states())
    logits = torch.compile(lambda hidden: layer(hidden), backend="aot_eager")(hidden_states())
    with pytest.raises(RuntimeError, match=r"autograd\.Function.*materialize"):
        Doubled.apply(logits)
    assert torch.equal(Doubled.apply(materialize(logits)), 2 * materialize(logits))


def test_hooks():
    """They leave the graph; where that may not be, an error says so."""
    results = []
    for layer in (head(), head(deferred=False)):

        def call(hidden: Tensor, layer: Any = layer) -> list[Tensor]:
            logits = layer(hidden)
            logits.register_hook(lambda grad: 3 * grad)
            return [ce(logits)]

        results.append(run(layer, torch.compile(call, backend="aot_eager")))
    for mine, other in zip(*results[0], *results[1], strict=True):
        assert error(mine, other) <= rounding(torch.float64)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"register_hook of deferred logits"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(hidden_states(), head())


def test_what_a_slice_may_have_copied_is_refused():
    """A write to the logits reaches ``contiguous()`` of a slice or not, as its shape has it."""
    layer = head()

    def call(hidden: Tensor) -> Tensor:
        logits = layer(hidden)
        made = logits[:, 1:].contiguous()
        logits.mul_(2)
        return made.exp().sum()

    with pytest.raises(Exception, match=r"may be a copy or a view"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(hidden_states())
    torch._dynamo.reset()
    expected = head(deferred=False)(hidden_states())[:, 1:].exp().sum()
    found = torch.compile(call, backend="aot_eager")(hidden_states())
    assert torch.allclose(found, expected)


def test_diagnostics():
    """What graphs fuse and make is known when they are compiled."""

    def call(hidden: Tensor, layer: Any) -> Tensor:
        logits = layer(hidden)
        return ce(logits) + torch.softmax(logits, -1).pow(2).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    layer = head(on_materialize="warn")
    with pytest.warns(huggingface.LogitsMaterializedWarning, match=rf"softmax at {__file__}"):
        compiled(hidden_states(), layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(hidden_states(), layer)
    log = layer.deferral.log
    assert log.compiled == {"cross_entropy"}
    (event,) = log.materialized
    assert event.what == "softmax"
    assert event.shape[-1] == V
    assert event.where.startswith(__file__)
    assert event.where.endswith("in call")

    with pytest.raises(Exception, match=r"softmax at .* needs the logits"):
        compiled(hidden_states(), head(on_materialize="error"))
    with pytest.raises(LogitsMaterializedError, match="softmax at"):
        torch.compile(call, backend="aot_eager")(hidden_states(), head(on_materialize="error"))


def test_shape_and_type():
    seen: list[Any] = []

    def call(hidden: Tensor, layer: Any) -> Tensor:
        logits = layer(hidden)
        seen.append((logits.shape, logits.dtype, logits.requires_grad, logits.is_contiguous()))
        return ce(logits)

    torch.compile(call, fullgraph=True, backend="aot_eager")(hidden_states(), head())
    assert seen == [((B, T, V), torch.float64, True, True)]
    assert D != V
