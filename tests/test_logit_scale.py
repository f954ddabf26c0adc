"""A factor of the logits that is learned: CLIP's temperature, the multiplier of muP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.judging import DRAWS, FACTOR, Head, error, expected_error, make_head, rounding
from torch import Tensor

import crosscut


def plain(
    input: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor, logit_scale: Tensor,
    softcap: float | None, backend: str,
) -> Tensor:  # fmt: skip
    """As a model does that scales its hidden states."""
    del backend
    z = reference.logits(input * logit_scale.to(input), weight, linear_bias, softcap=softcap)
    return F.cross_entropy(z, target)


def differentiate(loss_fn: Any, head: Head, scale: Tensor, **options: Any) -> list[Tensor]:
    """The loss, and its gradients in all that have one."""
    tensors = (head.input, head.linear_weight, head.linear_bias, scale)
    leaves = [x.detach().requires_grad_() for x in tensors if x is not None]
    loss = loss_fn(
        leaves[0], leaves[1], head.target, linear_bias=leaves[2], logit_scale=leaves[3], **options
    )
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.interpreted(when=lambda dtype, of_scale: dtype != of_scale == torch.float32)
@pytest.mark.parametrize(
    ("dtype", "of_scale"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_as_accurate_as_pytorch(backend, make, dtype, of_scale):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton: needs bfloat16, float16 or float32")
    options: dict[str, Any] = {"softcap": 20.0, "backend": backend}
    head = make((60, 32, 150), dtype, bias=True, ignored=0.2)
    factor = torch.tensor(1.7, dtype=of_scale, device=head.input.device)
    ours = differentiate(crosscut.linear_cross_entropy, head, factor, **options)
    draws, true = [], []
    for drawn in (*(head.redrawn(seed) for seed in range(1, DRAWS)), head):
        true = differentiate(plain, drawn.double(), factor.double(), **options)
        theirs = differentiate(plain, drawn, factor, **options)
        draws.append([error(value, exact) for value, exact in zip(theirs, true, strict=True)])
    names = ("loss", "d_input", "d_weight", "d_bias", "d_scale")
    wanted = (None, dtype, dtype, dtype, factor.dtype)
    for index, (name, value, exact) in enumerate(zip(names, ours, true, strict=True)):
        assert value.shape == exact.shape, name
        assert value.dtype == (wanted[index] or value.dtype), name
        their_error = expected_error(torch.tensor([draw[index] for draw in draws]))
        allowed = FACTOR * their_error + rounding(value.dtype)
        assert error(value, exact) <= allowed, f"{name}: {error(value, exact)} > {allowed}"


FUNCTIONS = ["cross-entropy", "log-probs", "statistics", "divergence", "top k", "tail"]


def value(function: str, tensors: tuple[Tensor, ...], scale: Tensor | float) -> Tensor:
    """Of one function, a sum of what it gives."""
    hidden, classifier, target, teacher, teacher_weight = tensors
    head = hidden, classifier
    call: dict[str, Any] = {"logit_scale": scale, "softcap": 3.0}
    if function == "cross-entropy":
        return crosscut.linear_cross_entropy(*head, target, shift=1, z_loss=0.1, **call)
    if function == "log-probs":
        return crosscut.linear_log_probs(*head, target, temperature=2.0, **call).sum()
    if function == "statistics":
        found = crosscut.token_statistics(*head, target, entropy=True, **call)
        assert found.entropy is not None
        return (found.entropy + found.lse).sum()
    if function == "divergence":
        return crosscut.linear_kl_div(
            *head, teacher, teacher_weight, teacher_logit_scale=scale, **call
        )
    index = torch.stack([target, (target + 1) % 9], -1)
    prob = torch.full(index.shape, 0.3, dtype=torch.float64)
    return crosscut.linear_topk_kl_div(*head, index, prob, tail=function == "tail", **call).sum()


@pytest.fixture
def tensors() -> tuple[Tensor, ...]:
    head = make_head(((2, 4), 3, 9))
    teacher = make_head(((2, 4), 2, 9), seed=1)
    return head.input, head.linear_weight, head.target, teacher.input, teacher.linear_weight


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function(function, tensors):
    """The value is that of the number; the gradient is right, and the teacher has none."""
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found = value(function, tensors, scale)
    torch.testing.assert_close(found.detach(), value(function, tensors, 0.7))
    torch.testing.assert_close(value(function, tensors, scale.detach().view(1)), found.detach())
    (grad,) = torch.autograd.grad(found, scale)
    step = 1e-5
    higher, lower = (
        crosscut.linear_kl_div(
            *tensors[:2], *tensors[3:], softcap=3.0, logit_scale=x, teacher_logit_scale=0.7
        )
        if function == "divergence"
        else value(function, tensors, x)
        for x in (0.7 + step, 0.7 - step)
    )
    torch.testing.assert_close(grad, (higher - lower) / (2 * step), rtol=1e-7, atol=1e-8)


def test_gradcheck(tensors):
    hidden, classifier, target = tensors[:3]

    def loss(hidden: Tensor, classifier: Tensor, scale: Tensor) -> Tensor:
        return crosscut.linear_cross_entropy(
            hidden, classifier, target, logit_scale=scale, reduction="none"
        )

    leaves = [hidden, classifier, torch.tensor([0.7], dtype=torch.float64)]
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in leaves])


def test_the_scale_alone_has_a_gradient(tensors):
    """Of a frozen model; under ``no_grad`` it has none."""
    scale = torch.nn.Parameter(torch.tensor(0.7))
    loss = crosscut.linear_cross_entropy(*tensors[:3], logit_scale=scale)
    loss.backward()
    assert scale.grad is not None
    assert scale.grad != 0
    with torch.no_grad():
        assert not crosscut.linear_cross_entropy(*tensors[:3], logit_scale=scale).requires_grad


def test_under_autocast(tensors):
    """Multiplied before the cast, so that there is one rounding and not two."""
    hidden, classifier, target = (x.float() if x.is_floating_point() else x for x in tensors[:3])
    scale = torch.tensor(0.7)
    with torch.autocast("cpu", torch.bfloat16):
        found = crosscut.linear_cross_entropy(hidden, classifier, target, logit_scale=scale)
    low = (hidden * scale).bfloat16(), classifier.bfloat16()
    assert torch.equal(found, crosscut.linear_cross_entropy(*low, target))


@pytest.mark.parametrize("kind", ["tensor", "number"])
def test_compiled_without_a_break(tensors, kind):
    """Another value is no other program; a number may become a symbol."""
    hidden, classifier, target = tensors[:3]

    def loss(hidden: Tensor, scale: Tensor | float) -> Tensor:
        return crosscut.linear_cross_entropy(hidden, classifier, target, logit_scale=scale)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    hidden.requires_grad_()
    for number in (0.7, 0.8, 0.9):
        scale = torch.tensor(number).double().requires_grad_() if kind == "tensor" else number
        leaves = [x for x in (hidden, scale) if isinstance(x, Tensor)]
        ours = torch.autograd.grad(compiled(hidden, scale), leaves)
        theirs = torch.autograd.grad(loss(hidden, scale), leaves)
        for mine, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, their, rtol=0, atol=0)
