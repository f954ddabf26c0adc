"""Random programs on logits: deferred, they do what they do untouched, eager and compiled.

A program is a random sequence of what models and losses do to logits: views, copies, arithmetic,
writes in place, parts under ``no_grad``, and losses of whatever is there at the end. It runs in
float64 on the logits of a ``torch.nn.Linear`` and of one that defers them. Loss and gradients must
agree to rounding; only programs that PyTorch itself refuses are left out.

``CROSSCUT_PROGRAMS=10000`` runs so many eager ones, and a fiftieth of that compiled.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.judging import error, rounding
from torch import Tensor, nn

from crosscut.integrations.huggingface import DeferredLinear, materialize

B, T, D, V = 2, 4, 3, 5
EAGER = int(os.environ.get("CROSSCUT_PROGRAMS", "250"))
COMPILED = max(EAGER // 50, 5)

gen = torch.Generator().manual_seed(11)
BIAS = torch.randn(V, generator=gen, dtype=torch.float64)
SQUARE = torch.randn(V, V, generator=gen, dtype=torch.float64) / 2
NOISE = torch.randn(B * T * V, generator=gen, dtype=torch.float64)
PICKED = torch.rand(B * T * V, generator=gen) < 0.3
IDS = torch.randint(V, (B * T,), generator=gen)

Step = Callable[[Tensor, list[Tensor]], Tensor | None]
Program = Callable[[Tensor], Tensor]


def like(values: Tensor, z: Tensor) -> Tensor:
    """The first of the values, in the shape of z."""
    return values[: z.numel()].view(z.shape)


def labels(z: Tensor) -> Tensor:
    """Of z ``[..., C]``: its leading shape."""
    return IDS[: z.numel() // z.shape[-1]].view(z.shape[:-1]).clamp_max(z.shape[-1] - 1)


def constant(change: Callable[[Tensor], Tensor]) -> Step:
    """Made under ``no_grad``: no gradient flows to what it is made of."""

    def step(z: Tensor, _: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return change(z)

    return step


def assigned(index: Any) -> Step:
    def step(z: Tensor, _: list[Tensor]) -> None:
        z[index] = 0.25

    return step


def subtracted(z: Tensor, _: list[Tensor]) -> Tensor:
    z -= like(NOISE, z)
    return z


def multiplied(z: Tensor, _: list[Tensor]) -> Tensor:
    z *= 1.5
    return z


def added_up(z: Tensor, pool: list[Tensor]) -> Tensor:
    """The sum with another value of the same shape."""
    return z + next(x for x in pool if x.shape == z.shape)


def joined(z: Tensor, pool: list[Tensor]) -> Tensor:
    return torch.cat([z, next(x for x in pool if x.shape == z.shape)], 0)


# fmt: off
VIEWS: dict[str, Step] = {
    "view": lambda z, _: z.view(-1, z.shape[-1]),
    "reshape": lambda z, _: z.reshape(-1, z.shape[-1]),
    "flatten": lambda z, _: z.flatten(0, z.dim() - 2) if z.dim() > 1 else z.flatten(),
    "rows": lambda z, _: z[1:],
    "shifted": lambda z, _: z[..., :-1, :],
    "one row": lambda z, _: z[0],
    "classes": lambda z, _: z[..., 1:],
    "steps": lambda z, _: z[..., ::2, :],
    "narrow": lambda z, _: z.narrow(0, 0, 1),
    "transpose": lambda z, _: z.transpose(0, -2),
    "permute": lambda z, _: z.permute(*range(1, z.dim()), 0).movedim(-1, 0),
    "unsqueeze": lambda z, _: z.unsqueeze(0),
    "squeeze": lambda z, _: z.squeeze(0),
    "detach": lambda z, _: z.detach(),
    "chunk": lambda z, _: z.chunk(2, 0)[0],
    "unbind": lambda z, _: z.unbind(0)[-1],
    "same": lambda z, _: z.to(z.dtype).double(),
    "diagonal": lambda z, _: z.diagonal(dim1=-2, dim2=-1),
    "contiguous": lambda z, _: z.contiguous(),
}
COPIES: dict[str, Step] = {
    "clone": lambda z, _: z.clone(),
    "scaled": lambda z, _: z * 0.7,
    "scaled left": lambda z, _: 0.7 * z,
    "divided": lambda z, _: z / 1.5,
    "negated": lambda z, _: -z,
    "capped": lambda z, _: 2.0 * torch.tanh(z / 2.0),
    "bias": lambda z, _: z + BIAS[: z.shape[-1]],
    "float": lambda z, _: (z * 2).double(),
    "log_softmax": lambda z, _: F.log_softmax(z, -1),
    "softmax": lambda z, _: z.softmax(-1),
    "mask": lambda z, _: z[labels(z) > 0],
    "picked": lambda z, _: z[torch.tensor([0, 0])],
    "power": lambda z, _: z**2 / 4,
    "abs": lambda z, _: abs(z),
    "remainder": lambda z, _: (z - z.floor()) + z % 3,
    "floor": lambda z, _: (z // 1) + z,
    "matmul": lambda z, _: z @ SQUARE[: z.shape[-1]],
    "matmul left": lambda z, _: SQUARE[:, : z.shape[-1]] @ z.transpose(-1, -2),
    "subtracted from": lambda z, _: like(NOISE, z) - z,
    "noise": lambda z, _: z - like(NOISE, z),
    "centred": lambda z, _: z - z.mean(-1, keepdim=True),
    "where": lambda z, _: torch.where(like(PICKED, z), z, z / 2),
    "masked": lambda z, _: z.masked_fill(like(PICKED, z), -1.0),
    "stacked": lambda z, _: torch.stack([z, z * 2]),
    "joined": joined,
    "added up": added_up,
    "einsum": lambda z, _: torch.einsum("...v,v->...v", z, BIAS[: z.shape[-1]]),
    "sorted": lambda z, _: z.sort(-1).values,
}
WRITES: dict[str, Step] = {
    "mul_": lambda z, _: z.mul_(0.5),
    "div_": lambda z, _: z.div_(1.5),
    "add_": lambda z, _: z.add_(like(NOISE, z)),
    "copied float div_": lambda z, _: z.float().double().div_(2.0),
    "clamp_": lambda z, _: z.clamp_(-1.0, 1.0),
    "masked_fill_": lambda z, _: z.masked_fill_(like(PICKED, z), 0.5),
    "one class": assigned((..., 1)),
    "one row, set": assigned(0),
    "zeroed view": lambda z, _: z[..., :1].zero_(),
    "copy_": lambda z, _: z.copy_(like(NOISE, z)),
    "-=": subtracted,
    "*=": multiplied,
    "softmax of itself": lambda z, _: z.sub_(z.logsumexp(-1, keepdim=True)),
    "under no_grad": constant(lambda z: z.mul_(2.0)),
}
CONSTANTS: dict[str, Step] = {
    "probabilities": constant(lambda z: z.softmax(-1)),
    "log-probabilities": constant(lambda z: F.log_softmax(z, -1)),
    "copy": constant(lambda z: z * 1.0),
    "constant view": constant(lambda z: z[...]),
    "detached copy": lambda z, _: z.detach().clone(),
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: F.cross_entropy(z.reshape(-1, z.shape[-1]), labels(z).flatten()),
    "smoothed": lambda z: F.cross_entropy(
        z.reshape(-1, z.shape[-1]), labels(z).flatten(), reduction="sum", label_smoothing=0.1),
    "nll": lambda z: F.nll_loss(
        F.log_softmax(z, -1).reshape(-1, z.shape[-1]), labels(z).flatten()),
    "logsumexp": lambda z: z.logsumexp(-1).pow(2).mean(),
    "gather": lambda z: z.gather(-1, labels(z)[..., None]).sum(),
    "token weights": lambda z: (F.cross_entropy(
        z.reshape(-1, z.shape[-1]), labels(z).flatten(), reduction="none")
        * constant(lambda x: x.log_softmax(-1).exp().amax(-1).flatten())(z, [])).sum(),
    "square": lambda z: z.pow(2).mean(),
    "entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(),
}
# fmt: on
KINDS = [VIEWS, COPIES, WRITES, CONSTANTS]


def make_program(seed: int) -> tuple[str, Program]:
    """A program and what it is called: its steps, each of a value made before."""
    draw = random.Random(seed)
    steps: list[tuple[str, Step, float]] = []
    for _ in range(draw.randint(1, 6)):
        (kind,) = draw.choices(KINDS, [5, 4, 3, 1])
        name = draw.choice(list(kind))
        steps.append((name, kind[name], draw.random()))
    losses = [(name, draw.random()) for name in draw.choices(list(LOSSES), k=draw.randint(1, 3))]

    def program(logits: Tensor) -> Tensor:
        pool = [logits]
        for _, step, which in steps:
            made = step(pool[int(which * len(pool))], pool)
            if made is not None:
                pool.append(made)
        # The last value most often; any other as well, as a write may have reached it.
        total = torch.zeros((), dtype=torch.float64)
        for name, which in losses:
            value = pool[-1 if which > 0.5 else int(2 * which * len(pool))]
            total = total + LOSSES[name](value)
        return total

    names = [f"{name}({which:.2f})" for name, _, which in steps]
    return " ".join([*names, "->", *[f"{name}({which:.2f})" for name, which in losses]]), program


def make_head(*, deferred: bool) -> nn.Linear:
    torch.manual_seed(0)
    plain = nn.Linear(D, V, dtype=torch.float64)
    if not deferred:
        return plain
    layer = DeferredLinear(D, V, dtype=torch.float64, min_numel=0, on_materialize="silent")
    layer.load_state_dict(plain.state_dict())
    return layer


def run(layer: nn.Linear, program: Program, *, compiled: bool = False) -> list[Tensor]:
    """Loss and gradients of hidden states, weight and bias."""
    hidden = torch.randn(
        B, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()

    def loss_of(hidden: Tensor) -> Tensor:
        return program(layer(hidden))

    if compiled:
        torch._dynamo.reset()
        loss_of = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    loss = materialize(loss_of(hidden))
    if loss.requires_grad:
        loss.backward()
    grads = [hidden.grad, *[parameter.grad for parameter in layer.parameters()]]
    return [loss.detach(), *[torch.zeros(1) if g is None else g for g in grads]]


def check(seed: int, *, compiled: bool) -> bool:
    """Whether PyTorch runs the program; raises AssertionError if it does something else here."""
    name, program = make_program(seed)
    try:
        theirs = run(make_head(deferred=False), program)
    except (RuntimeError, IndexError, ValueError, TypeError, StopIteration):
        return False
    if not all(x.isfinite().all() for x in theirs):
        return False
    try:
        ours = run(make_head(deferred=True), program, compiled=compiled)
    except Exception as problem:
        raise AssertionError(f"program {seed}: {name}") from problem
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape, f"program {seed}: {name}"
        assert error(mine, other) <= rounding(other.dtype), f"program {seed}: {name}"
    return True


def check_many(seeds: range, *, compiled: bool) -> None:
    ran = sum(check(seed, compiled=compiled) for seed in seeds)
    assert ran > 0.7 * len(seeds)  # most are programs that PyTorch runs


@pytest.mark.parametrize("part", range(4))
def test_eager(part):
    check_many(range(part, EAGER, 4), compiled=False)


def test_compiled():
    check_many(range(COMPILED), compiled=True)


def test_sees_a_lost_write(monkeypatch):
    """Programs find it if a write in place reaches the values alone, and not what is fused."""
    monkeypatch.setattr("crosscut.integrations.deferred.DeferredLogits._pin", lambda *_: None)
    with pytest.raises(AssertionError):
        check_many(range(100), compiled=False)
