"""Deferred logits by themselves: what is fused, what is computed, and that neither is ever wrong.

Every program is run on the logits of a ``torch.nn.Linear`` and of a head that defers them, in
float64, where values and gradients must agree to rounding.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from support.deferred import (
    BIAS,
    CLASS_WEIGHT,
    FLAT,
    IDS,
    LABELS,
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
from torch import Tensor, nn

import crosscut
from crosscut.integrations import huggingface
from crosscut.integrations.deferred import DeferredLogits
from crosscut.integrations.huggingface import DeferredLinear, eager_logits, is_deferred, materialize


def run(layer: nn.Linear, program: Program) -> list[Tensor]:
    """The program's value, and the gradients of hidden states, weight and bias."""
    hidden = hidden_states()
    value = program(layer(hidden))
    if value.requires_grad:
        value.sum().backward()
    grads = [hidden.grad, *[parameter.grad for parameter in layer.parameters()]]
    return [value.detach(), *[torch.zeros(()) if g is None else g for g in grads]]


def assert_same(program: Program, *, bias: bool = True) -> nn.Linear:
    """Both ways agree; returns the head that deferred."""
    layer = head(bias=bias)
    ours = run(layer, program)
    theirs = run(head(bias=bias, deferred=False), program)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
        assert error(mine, other) <= rounding(other.dtype)
    return layer


def log_of(layer: nn.Linear) -> Any:
    assert isinstance(layer, DeferredLinear)
    return layer.deferral.log


def softcapped(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 3.0) * 3.0


# fmt: off
FUSED: dict[str, Program] = {
    "flat": lambda z: F.cross_entropy(z.view(-1, V), FLAT),
    "inferred": lambda z: F.cross_entropy(z.view(B * T, -1), FLAT),
    "size": lambda z: F.cross_entropy(z.view(torch.Size([B * T, V])), FLAT),
    "keyword": lambda z: F.cross_entropy(input=z.flatten(0, 1), target=FLAT),
    "module": lambda z: nn.CrossEntropyLoss(label_smoothing=0.2)(z.view(-1, V), FLAT),
    "none": lambda z: ce(z, reduction="none"),
    "sum": lambda z: ce(z, reduction="sum") / 7,
    "weight": lambda z: ce(z, weight=CLASS_WEIGHT),
    "ignore_index": lambda z: F.cross_entropy(z.view(-1, V), IDS.view(-1), ignore_index=4),
    "shifted": lambda z: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, V), LABELS[..., 1:].reshape(-1)
    ),
    "shifted view": lambda z: F.cross_entropy(z[:, :-1].reshape(-1, V), LABELS[:, 1:].flatten()),
    "transposed": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS),
    "permuted": lambda z: F.cross_entropy(z.permute(0, 2, 1), LABELS),
    "movedim": lambda z: F.cross_entropy(z.movedim(-1, 1), LABELS),
    "mT": lambda z: F.cross_entropy(z.transpose(-1, -2), LABELS, reduction="sum"),
    "time first": lambda z: ce(z.transpose(0, 1).transpose(1, 0)),
    "one sequence": lambda z: F.cross_entropy(z[1], LABELS[1]),
    "one token": lambda z: F.cross_entropy(z[1, 3], LABELS[1, 3]),
    "select": lambda z: F.cross_entropy(z.select(0, 1).narrow(0, 1, 3), LABELS[1, 1:4]),
    "steps": lambda z: F.cross_entropy(z[:, ::2].reshape(-1, V), IDS[:, ::2].reshape(-1)),
    "none index": lambda z: F.cross_entropy(
        z[:, None, 1:][:, 0].flatten(0, 1), IDS[:, 1:].flatten()
    ),
    "squeezed": lambda z: ce(z.unsqueeze(1).squeeze(1)),
    "unsqueezed last": lambda z: F.cross_entropy(z.unsqueeze(-1)[:, 1], IDS[:, :1]),
    "mask": lambda z: F.cross_entropy(z[MASK], IDS[MASK]),
    "picked": lambda z: F.cross_entropy(z[0][torch.tensor([3, 1, 1])], IDS[0, :3]),
    "ellipsis": lambda z: F.cross_entropy(z[..., 1:4, :].reshape(-1, V), IDS[:, 1:4].flatten()),
    "vocabulary": lambda z: F.cross_entropy(
        z[..., :7].reshape(-1, 7), IDS.reshape(-1).clamp_max(6)
    ),
    "vocabulary steps": lambda z: F.cross_entropy(
        z[:, :, 1::2].reshape(-1, 5), IDS.reshape(-1).clamp_max(4)
    ),
    "chunks": lambda z: torch.stack(
        [F.cross_entropy(c.flatten(0, 1), i.flatten())
         for c, i in zip(z.chunk(4, 1), IDS.chunk(4, 1), strict=True)]
    ),
    "split": lambda z: torch.stack(
        [F.cross_entropy(c.flatten(0, 1), i.flatten())
         for c, i in zip(z.split([1, 5], 1), IDS.split([1, 5], 1), strict=True)]
    ),
    "rows": lambda z: torch.stack(
        [F.cross_entropy(row, ids) for row, ids in zip(z, IDS, strict=True)]
    ),
    "scaled": lambda z: ce(z * 0.3),
    "scaled left": lambda z: ce(0.3 * z),
    "divided": lambda z: ce(z / 3),
    "negated": lambda z: ce(-z),
    "softcap": lambda z: ce(softcapped(z)),
    "softcap, scale": lambda z: ce(softcapped(z * 0.5) * -2.0),
    "bias": lambda z: ce(z + BIAS),
    "bias row": lambda z: ce((z * 2 + BIAS[None]) / 3),
    "bias, softcap": lambda z: ce(softcapped(z + BIAS)),
    "sum of two": lambda z: ce(z + z * 0.5),
    "double": lambda z: ce(z.double().to(torch.float64).to("cpu").type_as(BIAS)),
    "clone": lambda z: ce(z.clone()),
    "log_softmax, nll": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, V), FLAT),
    "torch.log_softmax": lambda z: F.nll_loss(torch.log_softmax(z, 2).view(-1, V), FLAT),
    "log_softmax, nll weight": lambda z: F.nll_loss(
        z.view(-1, V).log_softmax(-1), FLAT, weight=CLASS_WEIGHT, reduction="sum"
    ),
    "log_softmax, gather": lambda z: F.log_softmax(z, -1).gather(-1, IDS[..., None]).squeeze(-1),
    "log_softmax, gather keyword": lambda z: torch.gather(
        -F.log_softmax(z, dim=-1), dim=-1, index=IDS.unsqueeze(-1)
    ),
    "gather, logsumexp": lambda z: (
        z.gather(-1, IDS[..., None]).squeeze(-1) - z.logsumexp(-1)
    ),
    "logsumexp rows": lambda z: torch.stack([torch.logsumexp(row, dim=-1) for row in z]),
    "logsumexp keepdim": lambda z: torch.logsumexp(z / 2 + BIAS, -1, keepdim=True),
    "gather of softcapped": lambda z: softcapped(z + BIAS).gather(-1, IDS[..., None]),
    "label smoother": lambda z: (-F.log_softmax(z, dim=-1)).sum(dim=-1, keepdim=True),
    "label smoother, softcap": lambda z: F.log_softmax(softcapped(z), -1).sum(
        -1, dtype=torch.float64
    ),
}
# fmt: on


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("name", FUSED)
def test_fused(name, bias):
    log = log_of(assert_same(FUSED[name], bias=bias))
    assert log.fused
    assert not log.materialized


class Identity(torch.autograd.Function):
    """Returns a view of its input, as module hooks do."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return args[0].view_as(args[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0] * 3


def written(write: Callable[[Tensor], Any]) -> Program:
    def program(logits: Tensor) -> Tensor:
        logits = logits * 1
        write(logits)
        return ce(logits)

    return program


def written_after(read: Callable[[Tensor], Tensor], of: Callable[[Tensor], Tensor]) -> Program:
    """Something recorded before a write: it sees the write exactly if it is a view."""

    def program(logits: Tensor) -> Tensor:
        base = logits * 1
        before = of(base)
        base[:, 1] *= 2
        return read(before)

    return program


def with_hook(logits: Tensor) -> Tensor:
    logits.register_hook(lambda grad: grad * 3)
    return ce(logits)


def with_late_hook(logits: Tensor) -> Tensor:
    flat = logits.view(-1, V)
    logits.register_hook(lambda grad: grad * 3)
    return F.cross_entropy(flat, FLAT)


def with_retained_gradient(logits: Tensor) -> Tensor:
    logits.retain_grad()
    loss = ce(logits)
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    return logits.grad.detach() + loss


def with_gradient_of_logits(logits: Tensor) -> Tensor:
    logits.retain_grad()
    loss = ce(logits)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return grad + loss


def _function_after_a_write(logits: Tensor) -> Tensor:
    logits.mul_(3).sub_(1)
    return Doubled.apply(logits) + logits.mul_(2)


def _read_then_write(logits: Tensor) -> Tensor:
    with torch.no_grad():
        logits.sum()
    logits.mul_(2)
    return ce(logits)


# fmt: off
DENSE: dict[str, Program] = {
    "softmax": lambda z: z.softmax(-1).pow(2),
    "probabilities": lambda z: F.cross_entropy(
        z.view(-1, V), torch.softmax(BIAS, 0).expand(B * T, V)
    ),
    "gather of two": lambda z: z.gather(-1, torch.stack([IDS, IDS + 0], -1)),
    "log_softmax of tokens": lambda z: z.log_softmax(0).sum(),
    "two caps": lambda z: ce(softcapped(softcapped(z))),
    "bias after the cap": lambda z: ce(softcapped(z) + BIAS),
    "bias a token": lambda z: ce(z + z.detach().mean(-1, keepdim=True)),
    "merged vocabulary": lambda z: z.reshape(B, -1).logsumexp(-1),
    "vocabulary of log-probabilities": lambda z: z.log_softmax(-1)[..., :3],
    "index of the vocabulary": lambda z: z[..., 3] + z[:, :, torch.tensor([1, 2])].sum(-1),
    "concatenated": lambda z: F.cross_entropy(
        torch.cat([z, z * 2], 1).flatten(0, 1), torch.cat([IDS, IDS], 1).flatten()
    ),
    "stack": lambda z: torch.stack([z, z], 0).logsumexp(-1),
    "einsum": lambda z: torch.einsum("btv,v->bt", z, BIAS),
    "matmul": lambda z: z @ BIAS,
    "where": lambda z: ce(torch.where(z > 0, z, z / 2)),
    "zero": lambda z: ce(z * 0),
    "second operand": lambda z: torch.add(BIAS, z).logsumexp(-1),
    "function": lambda z: Doubled.apply(z).logsumexp(-1),
    "function of a view": lambda z: Doubled.apply(z[:, 1:].transpose(1, 2) / 2).logsumexp(1),
    "function of a bias": lambda z: Doubled.apply(softcapped(z + BIAS)).logsumexp(-1),
    "function of log-probabilities": lambda z: Doubled.apply(-F.log_softmax(z, -1)).exp(),
    "identity function": lambda z: ce(Identity.apply(z)),
    "identity function, two uses": lambda z: ce(Identity.apply(z)) + ce(z),
    "hook": with_hook,
    "late hook": with_late_hook,
    "retain_grad": with_retained_gradient,
    "autograd.grad of the logits": with_gradient_of_logits,
    "mul_": written(lambda z: z.mul_(0.5)),
    "imul": written(lambda z: z.__imul__(0.5)),
    "setitem": written(lambda z: z.__setitem__((slice(None), slice(None), 3), -9.0)),
    "masked_fill_": written(lambda z: z.masked_fill_(z > 0, 0.1)),
    "write to a view": written(lambda z: z[:, :, 2:5].mul_(0.1)),
    "write to a flat view": written(lambda z: z.view(-1, V)[1].zero_()),
    "out": written(lambda z: torch.mul(z.detach(), 2, out=z.detach())),
    "no_grad write": written(lambda z: torch.no_grad()(lambda: z.mul_(2))()),
    "view before a write": written_after(ce, lambda z: z.view(-1, V)),
    "slice before a write": written_after(lambda z: z.logsumexp(-1), lambda z: z[:, :2]),
    "copy before a write": written_after(ce, lambda z: z.clone()),
    "scaled before a write": written_after(ce, lambda z: z / 2),
    "write to a diagonal": written(lambda z: z.diagonal(dim1=-2, dim2=-1).mul_(2)),
    "write to an array": written(lambda z: z.detach().numpy().fill(0.5)),
    "write to a function's output": lambda z: ce(Doubled.apply(z).mul_(2)),
    "read, then write to a function's output": lambda z: _read_then_write(Doubled.apply(z)),
    "function after a write": lambda z: _function_after_a_write(z * 1),
    "function before a write": lambda z: (Doubled.apply(z), z.mul_(2))[0],
    "function of a view after a write": lambda z: _function_after_a_write(z.view(-1, V)[3:]),
    "function after a hook": lambda z: (z.register_hook(lambda g: 3 * g), Doubled.apply(z))[1],
    "numpy index": lambda z: z[numpy.int64(1)].logsumexp(-1),
    "list index": lambda z: z[[1, 0]].logsumexp(-1),
    "axis": lambda z: z.log_softmax(-1).sum(axis=-1) + z.logsumexp(-1),
    "named dimensions": lambda z: z.log_softmax(-1).sum(dim=(0, 1)),
    "data": written(lambda z: z.data.mul_(2)),
    "detached write": written(lambda z: z.detach().mul_(2)),
    "backward": lambda z: (z.backward(torch.ones_like(z), retain_graph=True), z.sum())[1],
}
# fmt: on


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    log = log_of(assert_same(DENSE[name]))
    assert log.materialized


def test_fused_and_read():
    """Logits that were read are still fused, and both gradients arrive."""

    def program(logits: Tensor) -> Tensor:
        z_loss = logits.logsumexp(-1).pow(2).mean()
        return ce(logits) + 0.1 * logits.pow(2).mean() + z_loss

    log = log_of(assert_same(program))
    assert set(log.fused) == {"cross_entropy", "logsumexp"}
    assert log.materialized.total() == 1


def test_two_losses_of_one_head():
    """Each gradient arrives once."""
    assert_same(lambda z: ce(z) + 2 * F.cross_entropy(z[:, 1:].flatten(0, 1), IDS[:, 1:].flatten()))


def test_metadata_computes_nothing():
    layer = head()
    logits = layer(hidden_states())
    assert isinstance(logits, Tensor)
    assert logits.shape == (B, T, V)
    assert (logits.dtype, logits.device, logits.ndim) == (torch.float64, torch.device("cpu"), 3)
    assert (logits.size(-1), logits.dim(), logits.numel(), len(logits)) == (V, 3, B * T * V, B)
    assert logits.requires_grad
    assert logits.is_floating_point()
    assert torch.is_tensor(logits)
    assert logits.new_zeros(3).dtype == torch.float64
    assert logits.transpose(1, 2).shape == (B, V, T)
    assert logits.half().dtype == torch.float16
    assert "not computed" in repr(logits)
    assert is_deferred(logits)
    assert not log_of(layer).materialized


def test_reading_is_bitwise():
    """Whatever the route, the logits are those of the untouched head."""
    hidden = hidden_states()
    logits, expected = head()(hidden), head(deferred=False)(hidden)
    assert torch.equal(logits[..., 1:], expected[..., 1:])
    assert torch.equal(softcapped(logits).argmax(-1), softcapped(expected).argmax(-1))
    assert logits.tolist() == expected.tolist()
    assert torch.equal(torch.from_numpy(logits.detach().numpy()), expected)
    assert not is_deferred(logits)


def test_computed_once():
    layer = head()
    logits = layer(hidden_states())
    assert logits.sum() != 0
    assert logits.max() > logits.min()
    assert log_of(layer).materialized.total() == 1
    with torch.no_grad():
        assert logits.sum() != 0
    assert log_of(layer).materialized.total() == 1


def test_read_under_no_grad_then_used():
    def program(logits: Tensor) -> Tensor:
        with torch.no_grad():
            best = logits.argmax(-1)
        return logits.gather(-1, best[..., None]) + logits.pow(2).sum(-1, keepdim=True)

    assert_same(program)


def test_no_gradient_wanted():
    layer = head()
    with torch.no_grad():
        logits = layer(hidden_states())
        loss = ce(logits)
    assert not logits.requires_grad
    assert not loss.requires_grad
    assert log_of(layer).fused
    with torch.inference_mode():
        logits = layer(hidden_states())
        assert torch.equal(ce(logits), loss)
        assert logits.sum() != 0


def test_detached():
    layer = head()
    logits = layer(hidden_states())
    assert not ce(logits.detach()).requires_grad
    with torch.no_grad():
        recorded = logits[:, 1:]
    assert not recorded.requires_grad
    assert not recorded.logsumexp(-1).requires_grad


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_frozen(frozen):
    layer, other = head(bias=False), head(bias=False, deferred=False)
    results = []
    for each in (layer, other):
        hidden = hidden_states().detach().requires_grad_(frozen == "weight")
        each.weight.requires_grad_(frozen == "hidden")
        loss = ce(each(hidden))
        assert loss.requires_grad == (frozen != "both")
        if loss.requires_grad:
            loss.backward()
        results.append((hidden.grad, each.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert error(mine, theirs) <= rounding(torch.float64)


class TestStaleLogits:
    """Weights that have changed raise; wrong numbers never come."""

    def test_optimizer_step(self):
        layer = head()
        logits = layer(hidden_states())
        loss = ce(logits)
        loss.backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        for read in (torch.sum, ce, lambda z: materialize(z)):
            with pytest.raises(RuntimeError, match="modified in place"):
                read(logits)

    def test_read_before_the_step(self):
        layer = head()
        hidden = hidden_states()
        logits = layer(hidden)
        expected = materialize(logits).clone()
        ce(logits).backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert torch.equal(logits.exp(), expected.exp())

    def test_hidden_states(self):
        layer = head()
        hidden = hidden_states() * 1
        logits = layer(hidden)
        hidden.mul_(2)
        with pytest.raises(RuntimeError, match=r"\[2, 6, 5\].*modified in place"):
            ce(logits)

    def test_before_a_dense_gradient(self):
        layer = head()
        value = Doubled.apply(layer(hidden_states())).sum()
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified"):
            value.backward()


def test_gradient_of_logits_that_are_not_there():
    logits = head()(hidden_states())
    loss = ce(logits)
    with pytest.raises(RuntimeError, match="retain_grad"):
        torch.autograd.grad(loss, logits, allow_unused=True)
    with pytest.raises(RuntimeError, match="retain_grad"):
        torch.autograd.backward(loss, inputs=[logits])


@pytest.mark.parametrize("of", [lambda z: z, lambda z: z.view(-1, V)[1:]], ids=["logits", "view"])
@pytest.mark.parametrize("which", ["register_hook", "retain_grad"])
def test_hook_after_the_loss(which, of):
    """It would never be called: the gradient does not pass by the logits."""
    logits = head()(hidden_states())
    loss = ce(logits)
    arguments = [lambda grad: grad * MASK[..., None]] if which == "register_hook" else []
    with pytest.raises(RuntimeError, match=rf"{which}.*after cross_entropy.*materialize"):
        getattr(of(logits), which)(*arguments)
    loss.backward()
    logits = head()(hidden_states())
    with torch.no_grad():
        ce(logits)  # no gradient comes of this one
    seen = []
    logits.register_hook(seen.append)
    ce(logits).backward()
    assert seen


def test_unnoticed_write_before_a_function_is_refused():
    logits = head()(hidden_states())
    values = materialize(logits)
    value = Doubled.apply(logits)
    values.mul_(2)
    with pytest.raises(RuntimeError, match="written in place"):
        value.sum().backward()


class TestBelowPython:
    """Calls that only ``__torch_dispatch__`` sees."""

    def test_read(self):
        def program(logits: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                return torch.softmax(logits, -1).pow(2) + torch.stack([logits, logits]).mean(0)

        log = log_of(assert_same(program))
        assert log.materialized

    def test_then_fused(self):
        def program(logits: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                square = logits.pow(2).mean()
            return ce(logits) + square + logits.exp().mean()

        assert log_of(assert_same(program)).fused

    def test_write(self):
        logits = head()(hidden_states())
        with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="below"):
            logits.mul_(2)
        with torch.no_grad():
            logits = head()(hidden_states())
            expected = head(deferred=False)(hidden_states()) * 2
            half = logits / 2
            with torch._C.DisableTorchFunctionSubclass():
                logits.mul_(2)
            assert torch.equal(logits.clone(), expected)
            assert torch.equal(half.clone(), expected / 4)


def test_write_to_what_was_materialised():
    """A loss afterwards sees the write; what was recorded before and not read cannot."""

    def program(logits: Tensor) -> Tensor:
        logits = logits * 1
        materialize(logits).mul_(2)
        return ce(logits)

    assert_same(lambda z: ce((z * 1).mul_(2)))
    expected = run(head(deferred=False), lambda z: ce(z * 2))
    for mine, other in zip(run(head(), program), expected, strict=True):
        assert error(mine, other) <= rounding(other.dtype)

    logits = head()(hidden_states())
    half = logits / 2
    materialize(logits).mul_(2)
    with pytest.raises(RuntimeError, match="read those before the write"):
        half.sum()


def test_written_elsewhere():
    """What is only read by a write into something else is still fused after."""

    def program(logits: Tensor) -> Tensor:
        buffer = torch.zeros(B, T, V, dtype=torch.float64)
        buffer.copy_(logits.detach())
        buffer[0] = logits[0].detach()
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            buffer.add_(logits)
        return ce(logits) + buffer.mean()

    assert log_of(assert_same(program)).fused


@pytest.mark.parametrize("inside", [True, False], ids=["read inside", "read outside"])
def test_read_log_probabilities_of_autocast(inside):
    """They are computed as they would have been where they were asked for."""
    results = []
    for layer in (head(), head(deferred=False)):
        with torch.autocast("cpu", torch.bfloat16):
            values = F.log_softmax(layer.float()(hidden_states().float()), -1)
            read = values.exp() if inside else values
        results.append((values.dtype, read if inside else read.exp()))
    (dtype, read), (their_dtype, expected) = results
    assert dtype == their_dtype == values.to("cpu").dtype
    assert torch.equal(read, expected)


@pytest.mark.parametrize(
    "program",
    [
        lambda z: F.cross_entropy(z.view(-1, V), FLAT),
        lambda z: F.nll_loss(F.log_softmax(z.view(-1, V), -1), FLAT),
        lambda z: z.logsumexp(-1),
        lambda z: F.log_softmax(z, -1).sum(-1),
        lambda z: F.log_softmax(z, -1).gather(-1, IDS[..., None]),
        lambda z: z.gather(-1, IDS[..., None]),
    ],
)
def test_dtypes_under_autocast(program):
    dtypes = []
    for layer in (head(), head(deferred=False)):
        with torch.autocast("cpu", torch.bfloat16):
            dtypes.append(program(layer.float()(hidden_states().float())).dtype)
    assert dtypes[0] == dtypes[1]


class TestOnMaterialize:
    def test_warns_once(self):
        layer = head(on_materialize="warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                layer(hidden_states()).exp()
        assert [w.category for w in caught] == [huggingface.LogitsMaterializedWarning]
        assert caught[0].filename == __file__
        assert f"exp at {__file__}" in str(caught[0].message)

    def test_error(self):
        layer = head(on_materialize="error")
        with pytest.raises(huggingface.LogitsMaterializedError, match=r"exp at .*test_error"):
            layer(hidden_states()).exp()
        with torch.no_grad():
            layer(hidden_states()).exp()  # no gradient, no harm
        materialize(layer(hidden_states()))  # and this was asked for

    def test_silent(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            head()(hidden_states()).exp()

    def test_says_who(self):
        layer = head()
        layer(hidden_states()).exp()
        (event,) = log_of(layer).materialized
        assert event.what == "exp"
        assert event.shape == (B, T, V)
        assert event.under_grad
        assert event.where.startswith(__file__)
        assert event.where.endswith("in test_says_who")


class TestOptions:
    def test_bad_ones(self):
        with pytest.raises(ValueError, match="on_materialize must be one of 'warn'"):
            DeferredLinear(2, 3, on_materialize="loud")  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="min_numel must be an int, got float"):
            DeferredLinear(2, 3, min_numel=1e6)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="policy must be one of"):
            DeferredLinear(2, 3, policy="best")  # pyright: ignore[reportArgumentType]

    def test_min_numel(self):
        layer = head(min_numel=B * T * V + 1)
        assert type(layer(hidden_states())) is Tensor
        (why,) = log_of(layer).real
        assert "min_numel" in why
        assert type(head(min_numel=B * T * V)(hidden_states())) is DeferredLogits

    def test_backend_reaches_the_loss(self):
        layer = head(backend="triton")
        with pytest.raises(ValueError, match="backend='triton' cannot serve"):
            ce(layer(hidden_states()))

    def test_eager_logits(self):
        layer = head()
        with eager_logits():
            assert type(layer(hidden_states())) is Tensor
        assert type(layer(hidden_states())) is DeferredLogits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [True, False], ids=["float()", ""])
def test_dtype_of_the_loss(dtype, cast):
    """As PyTorch's: that of the logits the loss was given."""
    layer = DeferredLinear(D, V, dtype=dtype, min_numel=0)
    logits = layer(hidden_states().to(dtype))
    loss = ce(logits.float() if cast else logits)
    assert loss.dtype == (torch.float32 if cast else dtype)
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_autocast(inside):
    results = []
    for layer in (head(), head(deferred=False)):
        layer = layer.float()
        hidden = hidden_states().float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = layer(hidden)
            assert logits.dtype == torch.bfloat16
            loss = ce(logits) if inside else logits
        loss = loss if inside else ce(logits.float())
        loss.backward()
        assert layer.weight.grad is not None
        results.append((loss, layer.weight.grad))
    (loss, grad), (their_loss, their_grad) = results
    assert loss.dtype == their_loss.dtype
    assert grad.dtype == their_grad.dtype
    assert error(grad, their_grad) <= 2 * torch.finfo(torch.bfloat16).eps


def test_other_weights_fall_back():
    """A weight that is no plain tensor, or a dtype apart: real logits, and why."""

    class Odd(Tensor):
        pass

    layer = head(bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Odd))
    logits = layer(hidden_states())
    assert not isinstance(logits, DeferredLogits)
    assert log_of(layer).real
    with pytest.raises(RuntimeError, match="dtype"):
        head()(hidden_states().float())  # as torch.nn.Linear


def test_symbolic_tracing():
    """``torch.fx`` sees a linear layer."""
    layer, other = nn.Sequential(head()), nn.Sequential(head(deferred=False))
    hidden = hidden_states().detach()
    assert torch.equal(torch.fx.symbolic_trace(layer)(hidden), other(hidden))


def test_functorch_and_tracing():
    layer, other = head(), head(deferred=False)
    hidden = hidden_states().detach()

    def loss(each: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: F.cross_entropy(each(x), IDS[0])

    for transform in (torch.func.grad, torch.func.vmap):
        given = hidden[0] if transform is torch.func.grad else hidden
        assert torch.equal(transform(loss(layer))(given), transform(loss(other))(given))
    traced = torch.jit.trace(layer, hidden)
    assert torch.equal(traced(hidden), other(hidden))


def test_copies_and_pickles_are_plain():
    logits = head()(hidden_states().detach())
    values = materialize(logits)
    assert torch.equal(copy.deepcopy(logits.detach()), values)
    assert torch.equal(pickle.loads(pickle.dumps(logits.detach())), values)
    file = io.BytesIO()
    torch.save({"logits": logits.detach()}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["logits"], values)


def test_nothing_is_kept_alive():
    layer = head()
    hidden = hidden_states()
    held = weakref.ref(hidden)
    ce(layer(hidden)).backward()
    del hidden
    gc.collect()
    assert held() is None


def test_repr():
    logits = head()(hidden_states())
    assert (
        repr(logits) == f"DeferredLogits(shape=[{B}, {T}, {V}], dtype=torch.float64, not computed)"
    )
    values = materialize(logits)
    assert repr(logits) == repr(values.detach()).replace("tensor", "DeferredLogits", 1)


def partitioned(layer: nn.Linear) -> nn.Linear:
    """As DeepSpeed ZeRO-3 keeps a module: its weight is there in its own forward alone."""
    whole = layer.weight.detach().clone()

    def gather(*_: Any) -> None:
        layer.weight.data = whole

    def free(*_: Any) -> None:
        layer.weight.data = torch.empty(0, dtype=whole.dtype)

    class BeforeBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            return args[0].detach()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Tensor:
            gather()
            return grads[0]

    layer.weight.ds_id, layer.weight.ds_status = 0, "NOT_AVAILABLE"  # pyright: ignore
    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(free)
    layer.register_forward_hook(lambda module, args, output: BeforeBackward.apply(output))
    free()
    return layer


def test_partitioned_weight():
    layer, other = partitioned(head(bias=False)), head(bias=False, deferred=False)
    for mine, theirs in zip(run(layer, ce), run(other, ce), strict=True):
        assert error(mine, theirs) <= rounding(torch.float64)
    (why,) = log_of(layer).real
    assert "ZeRO-3" in why
    with pytest.warns(huggingface.LogitsMaterializedWarning, match="ZeRO-3"):
        partitioned(head(on_materialize="warn"))(hidden_states())
    with pytest.raises(huggingface.LogitsMaterializedError, match="ZeRO-3"):
        partitioned(head(on_materialize="error"))(hidden_states())


class TestOutputHooks:
    """DeepSpeed puts one on every output of the model, and scales gradients in it."""

    @pytest.fixture
    def hook(self) -> Any:
        def backward_hook(grad: Tensor) -> Tensor:
            return grad * 3

        backward_hook.__module__ = "deepspeed.runtime.utils"
        backward_hook.__qualname__ = "OutputBackwardHookManager._make_backward_hook.<locals>.hook"
        return backward_hook

    @pytest.mark.parametrize("loss_of", [ce, lambda z: z.exp() + ce(z)], ids=["fused", "read"])
    def test_loss_after(self, loss_of, hook):
        def program(logits: Tensor) -> Tensor:
            logits.register_hook(hook)
            return loss_of(logits)

        log = log_of(assert_same(program))
        assert log.fused == {"cross_entropy": 1}

    def test_loss_before(self, hook):
        """It is an output as well, with a hook of its own."""
        layer = head()
        logits = layer(hidden_states())
        loss = ce(logits)
        handle = logits.register_hook(hook)
        loss.backward()
        handle.remove()
        assert log_of(layer).fused
        assert not log_of(layer).materialized


def test_materialize_nests():
    layer = head()
    outputs = materialize({"a": (layer(hidden_states()), 3), "b": [None, "text"]})
    assert type(outputs["a"][0]) is Tensor
    assert outputs["a"][1] == 3
    assert outputs["b"] == [None, "text"]


def test_layer_is_a_linear_layer():
    layer = head()
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    copied = copy.deepcopy(layer)
    assert is_deferred(copied)
    assert torch.equal(ce(copied(hidden_states())), ce(layer(hidden_states())))
    assert is_deferred(pickle.loads(pickle.dumps(layer)))


def test_not_a_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        crosscut.defer_logits("llama")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"get_output_embeddings.*Linear does not.*DeferredLinear"):
        crosscut.defer_logits(nn.Linear(2, 3))
