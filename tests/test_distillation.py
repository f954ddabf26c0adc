"""Divergences of a student from its teacher: values, gradients, memory, trl's own function."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import judging, reference
from support.heads import RealHead
from support.judging import Head, cotangents, error, make_head, outcome, pairs, rounding
from support.memory import CLASSES, MIB, TOKENS, WORKSPACE, head_of, peak
from support.places import DEVICES, INTERPRETED
from torch import Tensor

import crosscut
from crosscut.backends.blocks.distillation import LIVE_BLOCKS, gpu_block

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIVERGENCES = ["forward", "reverse", "js"]


@dataclass(frozen=True)
class Teacher:
    """The teacher's side of a call."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def double(self) -> Teacher:
        bias = None if self.bias is None else self.bias.double()
        return Teacher(self.input.double(), self.weight.double(), bias)

    def redrawn(self, seed: int) -> Teacher:
        """The same logits up to the rounding of what they are made of."""
        return Teacher(*judging.redrawn(self.input, self.weight, seed), self.bias)


def make_teacher(
    batch: tuple[int, ...],
    hidden_size: int,
    num_classes: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Teacher:
    shape = batch, hidden_size, num_classes
    head = make_head(shape, dtype, device=device, bias=True, seed=1)
    return Teacher(head.input, head.linear_weight, head.linear_bias)


def divergence_of(z: Tensor, t: Tensor, divergence: str, beta: float) -> Tensor:
    """As PyTorch has it, of full logits."""
    log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if divergence == "forward":
        return kl(log_q, log_p)
    if divergence == "reverse":
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def expected(
    input: Tensor, weight: Tensor, target: Tensor, *, teacher: Teacher, linear_bias: Tensor | None,
    divergence: str = "forward", beta: float = 0.5, temperature: float = 1.0,
    hard_weight: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0,
    teacher_softcap: float | None = None, teacher_logit_scale: float = 1.0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Loss of each token, from the full logits of both."""
    del backend
    z = reference.logits(input, weight, linear_bias, softcap=softcap, logit_scale=logit_scale)
    t = reference.logits(
        teacher.input, teacher.weight, teacher.bias, softcap=teacher_softcap,
        logit_scale=teacher_logit_scale,
    )  # fmt: skip
    soft = divergence_of(z / temperature, t / temperature, divergence, beta)
    hard = F.cross_entropy(z.flatten(0, -2), target.flatten(), reduction="none").view(soft.shape)
    loss = (1 - hard_weight) * soft + hard_weight * hard
    return torch.where(target != -100, loss, 0)


def ours(
    input: Tensor, weight: Tensor, target: Tensor, *, teacher: Teacher, **options: Any
) -> Tensor:
    return crosscut.linear_kl_div(
        input, weight, teacher.input, teacher.weight, target, teacher_bias=teacher.bias,
        reduction="none", **options,
    )  # fmt: skip


def judge(head: Head, teacher: Teacher, **options: Any) -> None:
    """Losses and gradients at most twice as far from the truth as PyTorch's."""
    judging.judge(ours, expected, head, teacher=teacher, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.0},
    "hard": {"hard_weight": 0.3},
    "hard, temperature": {"hard_weight": 0.4, "temperature": 1.7},
    "heads": {
        "softcap": 8.0, "logit_scale": 0.8, "teacher_softcap": 12.0, "teacher_logit_scale": 1.1,
        "temperature": 1.3, "hard_weight": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_as_on_full_logits(dtype, divergence, options, device):
    head = make_head(((3, 40), 32, 500), dtype, device=device, bias=True, ignored=0.2)
    teacher = make_teacher((3, 40), 24, 500, dtype, device)
    judge(head, teacher, divergence=divergence, backend="blocks", **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_which_backend(dtype, device):
    """Kernels on a GPU, where they serve; the same bits as by name."""
    head = make_head((40, 32, 500), dtype, device=device)
    teacher = make_teacher((40,), 24, 500, dtype, device)
    chosen = "triton" if device == "cuda" and dtype == torch.bfloat16 else "blocks"
    auto, named = (
        outcome(ours, head, teacher=teacher, backend=backend) for backend in ("auto", chosen)
    )
    assert torch.equal(auto.loss, named.loss)
    assert torch.equal(auto.d_weight, named.d_weight)
    if chosen == "triton":
        blocks = outcome(ours, head, teacher=teacher, backend="blocks")
        assert not torch.equal(auto.d_weight, blocks.d_weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_across_blocks(divergence, beta, device):
    tokens = 300 if device == "cpu" else 700  # a block there has more
    head = make_head(((2, tokens), 8, 9000), device=device, bias=True, ignored=0.1)
    teacher = make_teacher((2, tokens), 16, 9000, torch.float64, device)
    judge(head, teacher, divergence=divergence, beta=beta, hard_weight=0.1, temperature=1.5)


NEEDS_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
TRITON = [pytest.param("cpu", marks=NEEDS_INTERPRETER, id="interpreter"), *DEVICES[1:]]


@pytest.mark.interpreted(
    when=lambda dtype, options: options == OPTIONS["heads" if dtype == torch.bfloat16 else "plain"]
)
@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_in_triton(dtype, divergence, options, device):
    """Ragged in all sizes; a third of the tokens ignored."""
    classes = 150 if device == "cpu" else 3001
    head = make_head(((3, 13), 24, classes), dtype, device=device, bias=True, ignored=0.3)
    teacher = make_teacher((3, 13), 40, classes, dtype, device)
    judge(head, teacher, divergence=divergence, backend="triton", **options)


@pytest.mark.interpreted(when=lambda divergence: divergence == "js")
@pytest.mark.parametrize("device", TRITON)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_in_triton_across_chunks(divergence, device, monkeypatch):
    monkeypatch.setattr("crosscut.options._workspace_limit", 1)  # as few classes as there may be
    tokens, classes = (70, 300) if device == "cpu" else (3000, 5000)
    head = make_head((tokens, 16, classes), torch.float32, device=device, ignored=0.1)
    teacher = make_teacher((tokens,), 8, classes, torch.float32, device)
    judge(head, teacher, divergence=divergence, backend="triton", beta=0.1, hard_weight=0.3)


@pytest.mark.parametrize("device", TRITON)
def test_in_triton_of_an_uneven_mixture(device):
    """float32 has no 0.9999 to take from 1."""
    head = make_head((40, 16, 150), torch.float32, device=device)
    teacher = make_teacher((40,), 8, 150, torch.float32, device)
    judge(head, teacher, divergence="js", beta=0.9999, backend="triton", by_row=False)


@pytest.mark.interpreted(when=lambda backend, divergence: backend != "triton" or divergence == "js")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["blocks", pytest.param("triton", marks=NEEDS_INTERPRETER)])
def test_not_a_number_stays_one(divergence, backend):
    head = make_head((20, 16, 150), torch.float32)
    teacher = make_teacher((20,), 16, 150, torch.float32)
    head.input[3, 5] = teacher.input[3, 5] = math.nan
    found = outcome(ours, head, teacher=teacher, divergence=divergence, backend=backend)
    assert found.loss.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("blocks", torch.bfloat16),
        pytest.param("triton", torch.float32, marks=NEEDS_INTERPRETER),
    ],
)
def test_logits_far_from_each_other(divergence, backend, dtype):
    """By a constant, as those of two models may be: no softmax knows of it."""
    head = make_head((40, 16, 150), dtype, bias=True)
    assert head.linear_bias is not None
    near = head.input + 0.1 * head.input.roll(1, 0)
    teacher = Teacher(near, head.linear_weight, head.linear_bias + 30)
    judge(head, teacher, divergence=divergence, backend=backend)


@pytest.mark.parametrize("device", TRITON)
def test_in_triton_nobody_counts(device):
    head = make_head((20, 16, 150), torch.float32, device=device, bias=True, ignored=1.0)
    teacher = make_teacher((20,), 8, 150, torch.float32, device)
    found = outcome(ours, head, teacher=teacher, backend="triton", hard_weight=0.5)
    assert not any(value.any() for value in found if value is not None)


@pytest.mark.parametrize("device", TRITON)
def test_in_triton_the_same_twice(device):
    head = make_head((40, 16, 150), torch.bfloat16, device=device)
    teacher = make_teacher((40,), 8, 150, torch.bfloat16, device)
    one, other = (
        outcome(ours, head, teacher=teacher, backend="triton", divergence="js") for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


@NEEDS_INTERPRETER
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.float16, torch.float16), (torch.float32, torch.bfloat16)],
)
def test_in_triton_what_it_does_not_serve(dtype, teacher_dtype):
    head = make_head((4, 8, 30), dtype)
    teacher = make_teacher((4,), 8, 30, teacher_dtype)
    message = (
        "backend='triton' cannot serve this call: triton: distils heads that are both bfloat16"
    )
    with pytest.raises(ValueError, match=message):
        outcome(ours, head, teacher=teacher, backend="triton")


@pytest.mark.parametrize("num_rows", [0, 16, 10_000])
@pytest.mark.parametrize("hidden_size", [64, 8192])
def test_a_block_on_a_gpu_keeps_within_the_workspace(num_rows, hidden_size):
    """With the gradient of its classes and that of the one before it is added to."""
    tokens, classes = gpu_block(num_rows, hidden_size, 4)
    taken = 4 * classes * (LIVE_BLOCKS * tokens + 2 * hidden_size)
    assert taken <= crosscut.workspace_limit()
    assert tokens >= 1
    assert classes >= 1024


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_of_a_teacher_that_is_itself(divergence):
    """No divergence, and no gradient, whatever else."""
    head = make_head((40, 8, 300), bias=True)
    same = Teacher(head.input, head.linear_weight, head.linear_bias)
    found = outcome(ours, head, teacher=same, divergence=divergence)
    eps = rounding(torch.float64)
    assert (found.loss.abs() <= eps).all()
    assert found.d_input.norm() <= eps * head.linear_weight.norm()
    assert found.d_weight.norm() <= eps * head.input.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_of_one_class(divergence, dtype):
    """There is nothing to diverge in, wherever the two logits are."""
    head = make_head((40, 8, 1), dtype)
    head = replace(head, input=head.input * 6)
    teacher = make_teacher((40,), 8, 1, dtype)
    teacher = replace(teacher, input=teacher.input * 6)
    found = outcome(ours, head, teacher=teacher, divergence=divergence, backend="blocks")
    assert not any(value.any() for value in found if value is not None)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_in_another_dtype(divergence):
    head = make_head((40, 8, 300), torch.float32, bias=True)
    teacher = make_teacher((40,), 6, 300, torch.float64)
    judge(head, teacher, divergence=divergence, hard_weight=0.3)
    low = make_teacher((40,), 6, 300, torch.bfloat16)
    judge(head, low, divergence=divergence)


def test_autocast_of_a_teacher_whose_dtypes_differ():
    """As autocast lets those of any linear layer."""
    head = make_head((40, 8, 300), torch.float32)
    teacher = make_teacher((40,), 6, 300, torch.float32)
    low = [x.bfloat16() for x in (head.input, head.linear_weight, teacher.input, teacher.weight)]
    with torch.autocast("cpu", torch.bfloat16):
        found = crosscut.linear_kl_div(low[0], head.linear_weight, low[2], teacher.weight)
    assert torch.equal(found, crosscut.linear_kl_div(*low))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_that_neither_has(divergence):
    """A padded vocabulary: logits of -inf on both sides take no part."""
    head = make_head((12, 8, 5000), bias=True)
    teacher = make_teacher((12,), 6, 5000, torch.float64)
    assert head.linear_bias is not None
    assert teacher.bias is not None
    padded = replace(head, linear_bias=head.linear_bias.clone(), target=head.target % 300)
    assert padded.linear_bias is not None
    padded.linear_bias[300:] = -torch.inf
    bias = teacher.bias.clone()
    bias[300:] = -torch.inf
    part = slice(0, 300)
    alone = Head(
        head.input, head.linear_weight[part], padded.target, padded.linear_bias[part].contiguous()
    )
    options = {"divergence": divergence, "hard_weight": 0.3}
    found = outcome(ours, padded, teacher=replace(teacher, bias=bias), **options)
    short = Teacher(teacher.input, teacher.weight[part], bias[part].contiguous())
    alike = outcome(ours, alone, teacher=short, **options)
    eps = rounding(torch.float64)
    assert error(found.loss, alike.loss) <= eps
    assert error(found.d_input, alike.d_input) <= eps
    assert error(found.d_weight[part], alike.d_weight) <= eps
    assert (found.d_weight[300:] == 0).all()


def test_what_the_student_cannot_do_is_infinitely_far():
    head = make_head((4, 3, 20), bias=True)
    teacher = make_teacher((4,), 3, 20, torch.float64)
    assert head.linear_bias is not None
    head.linear_bias[7] = -torch.inf
    head = replace(head, target=torch.zeros(4, dtype=torch.int64))
    assert outcome(ours, head, teacher=teacher).loss.isposinf().all()
    assert outcome(ours, head, teacher=teacher, divergence="reverse").loss.isfinite().all()
    assert outcome(ours, head, teacher=teacher, divergence="js").loss.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("hard", [{}, {"hard_weight": 0.4, "temperature": 1.5, "softcap": 4.0}])
def test_gradcheck(divergence, hard):
    head = make_head((6, 3, 7), bias=True, ignored=0.2)
    teacher = make_teacher((6,), 4, 7, torch.float64)

    def loss(hidden: Tensor, classifier: Tensor, bias: Tensor) -> Tensor:
        return ours(
            hidden, classifier, head.target, teacher=teacher, linear_bias=bias,
            divergence=divergence, **hard,
        )  # fmt: skip

    leaves = [head.input, head.linear_weight, head.linear_bias]
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in leaves])


def op_arguments(
    *, hard: bool, dtype: torch.dtype, tokens: int = 9, backend: str = "auto"
) -> tuple[Any, ...]:
    head = make_head((tokens, 6, 30), dtype, bias=True)
    teacher = make_teacher((tokens,), 4, 30, dtype)
    labels = torch.where(torch.arange(tokens) % 4 == 1, -1, head.target)
    return (
        head.input, head.linear_weight, head.linear_bias, labels, None,
        teacher.input, teacher.weight, teacher.bias, labels, None,
        None, 1.0, "auto", backend, False, False,
        5.0, 0.5, "auto", backend, False, False,
        "js", 0.3, 2.0 if hard else None,
    )  # fmt: skip


@pytest.mark.interpreted(
    when=lambda backend, hard, tokens: backend != "triton" or (hard and tokens)
)
@pytest.mark.parametrize("hard", [False, True], ids=["", "hard"])
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float64, "blocks"),
        (torch.bfloat16, "blocks"),
        pytest.param(torch.bfloat16, "triton", marks=NEEDS_INTERPRETER),
    ],
)
@pytest.mark.parametrize("tokens", [0, 9])
def test_opcheck(hard, dtype, backend, tokens):
    arguments = op_arguments(hard=hard, dtype=dtype, tokens=tokens, backend=backend)
    found = list(torch.ops.crosscut.divergence.default(*arguments))
    given = [torch.rand_like(found[0]) for _ in range(2)]
    torch.library.opcheck(
        torch.ops.crosscut.divergence_backward.default,
        (
            given[0], given[1] if hard else None, found,
            *arguments, [True, tokens > 0, True],
        ),
    )  # fmt: skip
    for x in arguments[:3]:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.crosscut.divergence.default, arguments)


@pytest.mark.parametrize("backend", ["blocks", pytest.param("triton", marks=NEEDS_INTERPRETER)])
def test_opcheck_of_a_transposed_head(backend):
    """The strides that the compiler is promised are the strides it gets."""
    arguments = list(op_arguments(hard=False, dtype=torch.bfloat16, backend=backend))
    arguments[1] = arguments[1].t().contiguous().t()
    for x in arguments[:3]:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.crosscut.divergence.default, tuple(arguments))


class TestReductions:
    """One token's losses, added up."""

    @pytest.fixture
    def head(self) -> Head:
        return make_head(((3, 9), 5, 30), ignored=0.3)

    @pytest.fixture
    def teacher(self) -> Teacher:
        return make_teacher((3, 9), 4, 30, torch.float64)

    @staticmethod
    def call(head: Head, teacher: Teacher, **options: Any) -> Tensor:
        return crosscut.linear_kl_div(
            head.input, head.linear_weight, teacher.input, teacher.weight, head.target,
            teacher_bias=teacher.bias, **options,
        )  # fmt: skip

    def test_mean_sum_and_normalizer(self, head, teacher):
        losses = self.call(head, teacher, reduction="none")
        kept = head.target != -100
        assert (losses[kept] > 0).all()
        assert (losses[~kept] == 0).all()
        torch.testing.assert_close(self.call(head, teacher), losses.sum() / kept.sum())
        torch.testing.assert_close(self.call(head, teacher, reduction="sum"), losses.sum())
        torch.testing.assert_close(self.call(head, teacher, normalizer=7), losses.sum() / 7)
        weight = torch.rand(3, 9, dtype=torch.float64)
        torch.testing.assert_close(
            self.call(head, teacher, token_weight=weight),
            (losses * weight).sum() / weight[kept].sum(),
        )

    def test_without_a_target_all_count(self, head, teacher):
        every = replace(head, target=torch.zeros_like(head.target))
        found = crosscut.linear_kl_div(
            head.input, head.linear_weight, teacher.input, teacher.weight,
            teacher_bias=teacher.bias,
        )  # fmt: skip
        torch.testing.assert_close(found, self.call(every, teacher))
        for ignore_index in (0, -1):  # there is none that could be ignored
            same = crosscut.linear_kl_div(
                head.input, head.linear_weight, teacher.input, teacher.weight,
                teacher_bias=teacher.bias, ignore_index=ignore_index,
            )  # fmt: skip
            assert torch.equal(same, found)

    def test_shift(self, head, teacher):
        sliced = replace(head, input=head.input[:, :-1], target=head.target[:, 1:])
        before = Teacher(teacher.input[:, :-1], teacher.weight, teacher.bias)
        options: dict[str, Any] = {"hard_weight": 0.3, "reduction": "none"}
        found = self.call(head, teacher, shift=1, **options)
        torch.testing.assert_close(found[:, 1:], self.call(sliced, before, **options))
        assert (found[:, 0] == 0).all()

    def test_hard_loss_alone_is_the_cross_entropy(self, head, teacher):
        found = self.call(head, teacher, hard_weight=1.0, temperature=3.0)
        plain = crosscut.linear_cross_entropy(head.input, head.linear_weight, head.target)
        torch.testing.assert_close(found, plain)


def test_frozen_sides():
    """The teacher gets no gradient; what of the student is frozen costs nothing."""
    head = make_head((20, 5, 30), bias=True)
    teacher = make_teacher((20,), 4, 30, torch.float64)
    whole = outcome(ours, head, teacher=teacher)
    teacher.weight.requires_grad_()
    hidden = head.input.clone().requires_grad_()
    loss = ours(
        hidden, head.linear_weight, head.target, teacher=teacher, linear_bias=head.linear_bias
    )
    loss.backward(cotangents(loss))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, whole.d_input)
    assert teacher.weight.grad is None
    assert head.linear_weight.grad is None


def test_no_double_backward():
    head = make_head((6, 3, 7))
    teacher = make_teacher((6,), 4, 7, torch.float64)
    hidden = head.input.requires_grad_()
    loss = crosscut.linear_kl_div(hidden, head.linear_weight, teacher.input, teacher.weight)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="crosscut has no double backward"):
        grad.sum().backward()


def test_compiled_without_a_break():
    head = make_head((20, 5, 30), torch.float32)
    teacher = make_teacher((20,), 4, 30, torch.float32)

    def loss(hidden: Tensor, classifier: Tensor) -> Tensor:
        return crosscut.linear_kl_div(
            hidden, classifier, teacher.input, teacher.weight, head.target, divergence="js",
            hard_weight=0.2,
        )  # fmt: skip

    leaves = head.input.requires_grad_(), head.linear_weight.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours_, theirs in zip(
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(loss(*leaves), leaves),
        strict=True,
    ):
        assert torch.equal(ours_, theirs)


@pytest.mark.parametrize("divergence", ["forward", "js"])
def test_memory(divergence):
    """Of neither side's logits: 64 MiB each here, in two bytes."""
    head = head_of(TOKENS // 2, torch.float32)
    teacher = Teacher(head.input.roll(1, 0), head.linear_weight)

    def loss(*tensors: Tensor, linear_bias: Tensor) -> Tensor:
        hidden, classifier, target = tensors
        return ours(
            hidden, classifier, target, teacher=teacher, linear_bias=linear_bias,
            divergence=divergence, hard_weight=0.1,
        ).mean()  # fmt: skip

    found = peak(head, backward=True, loss_fn=loss)
    assert 0 < found <= WORKSPACE
    assert found < 2 * (TOKENS // 2) * CLASSES * 2
    print(f"{divergence}: {found / MIB:.0f} MiB")


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_against_trl(beta):
    """Generalised knowledge distillation, whose ends are the two divergences."""
    gkd = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError).GKDTrainer
    head = make_head(((3, 9), 5, 30), ignored=0.3)
    teacher = make_teacher((3, 9), 4, 30, torch.float64)
    z = reference.logits(head.input, head.linear_weight)
    t = reference.logits(teacher.input, teacher.weight, teacher.bias)
    theirs = gkd.generalized_jsd_loss(
        z, t, labels=head.target, beta=beta, temperature=1.5, reduction="sum"
    )
    options: dict[str, Any] = {"divergence": "js", "beta": beta}
    if beta in (0, 1):
        options = {"divergence": "reverse" if beta else "forward"}
    found = crosscut.linear_kl_div(
        head.input, head.linear_weight, teacher.input, teacher.weight, head.target,
        teacher_bias=teacher.bias, temperature=1.5, reduction="sum", **options,
    )  # fmt: skip
    assert error(found, theirs) <= rounding(torch.float64)


class TestTopK:
    """A teacher's stored top k."""

    @staticmethod
    def stored(t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        prob, index = t.softmax(-1).topk(count)
        return index, prob

    @staticmethod
    def theirs(
        input: Tensor, weight: Tensor, index: Tensor, *, prob: Tensor, tail: bool,
        linear_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        log_p = reference.logits(input, weight, linear_bias).log_softmax(-1)
        kept = index != -100
        q = torch.where(kept, prob.to(log_p), 0)
        at = log_p.gather(-1, index.clamp_min(0))
        loss = torch.where(kept, q * (q.log() - at), 0).sum(-1)
        if tail:
            outside = torch.ones_like(log_p).scatter(-1, index.clamp_min(0), 0)
            left = (log_p.exp() * outside).sum(-1)
            rest = 1 - q.sum(-1)
            loss = loss + rest * (rest.log() - left.log())
        return loss

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
    def test_as_on_full_logits(self, dtype, tail):
        head = make_head(((3, 20), 12, 200), dtype, bias=True)
        teacher = make_teacher((3, 20), 9, 200, torch.float64)
        t = reference.logits(teacher.input, teacher.weight, teacher.bias)
        index, prob = self.stored(t, 8)
        head = replace(head, target=index)

        def ours(input: Tensor, weight: Tensor, target: Tensor, **bias: Any) -> Tensor:
            return crosscut.linear_topk_kl_div(input, weight, target, prob, tail=tail, **bias)

        judging.judge(ours, partial(self.theirs, prob=prob, tail=tail), head)

    def test_all_classes_are_the_whole_divergence(self):
        head = make_head((20, 12, 50))
        teacher = make_teacher((20,), 9, 50, torch.float64)
        t = reference.logits(teacher.input, teacher.weight, teacher.bias)
        whole = crosscut.linear_kl_div(
            head.input, head.linear_weight, teacher.input, teacher.weight,
            teacher_bias=teacher.bias, reduction="none",
        )  # fmt: skip
        found = crosscut.linear_topk_kl_div(head.input, head.linear_weight, *self.stored(t, 50))
        assert error(found, whole) <= rounding(torch.float64)

    @pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
    def test_gradcheck_with_ignored_classes(self, tail):
        head = make_head((4, 3, 9), bias=True)
        index = torch.tensor([[1, 2, -100], [-100, -100, -100], [8, 0, 3], [4, -100, 5]])
        prob = torch.tensor([[0.5, 0.2, torch.nan], [0.1, 0.1, 0.1], [0.5, 0.3, 0.2], [0, -9, 0.4]])

        def loss(hidden: Tensor, classifier: Tensor, bias: Tensor) -> Tensor:
            return crosscut.linear_topk_kl_div(
                hidden, classifier, index, prob, linear_bias=bias, tail=tail
            )

        leaves = [head.input, head.linear_weight, head.linear_bias]
        assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in leaves])
        found = loss(*leaves)
        assert found[1] == 0
        assert found.isfinite().all()

    def test_the_tail_of_a_student_that_has_none(self):
        weight = torch.zeros(10, 1, dtype=torch.float64)
        weight[:2] = 500
        hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        found = crosscut.linear_topk_kl_div(
            hidden, weight, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4]]), tail=True
        )
        true = 0.5 * math.log(0.5 / 0.5) + 0.4 * math.log(0.4 / 0.5) + 0.1 * math.log(0.1 / 4) + 50
        assert found.item() == pytest.approx(true, rel=1e-6)
        found.sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.item() == pytest.approx(0.1 * 500, rel=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("logit", "loss"), [(17.0, 7.460280), (20.0, 8.960279)])
    def test_the_tail_of_a_sure_student(self, dtype, logit, loss):
        """``1 - p`` would have no digits, or be 0 and have no gradient."""
        hidden = torch.tensor([[logit]], dtype=dtype, requires_grad=True)
        weight = torch.tensor([[1.0], [0.0], [0.0]], dtype=dtype)
        index, prob = torch.tensor([[0]]), torch.tensor([[0.5]])
        found = crosscut.linear_topk_kl_div(hidden, weight, index, prob, tail=True)
        assert found.item() == pytest.approx(loss, rel=1e-6)
        found.sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.item() == pytest.approx(0.5, rel=1e-6)

    def test_the_tail_of_large_logits(self):
        """Their log-sum-exp is rounded, the softmax made of it is not."""
        hidden = torch.ones(1, 1, requires_grad=True)
        weight = torch.tensor([[36.0], [0.0], [36.0]])
        found = crosscut.linear_topk_kl_div(
            hidden, weight, torch.tensor([[1]]), torch.tensor([[1.0]]), tail=True
        )
        (grad,) = torch.autograd.grad(found.sum(), hidden)
        assert error(grad, torch.tensor([[36.0]])) <= rounding(torch.float32)

    def test_the_tail_where_there_is_none(self):
        """All classes are among the k, or all others impossible; a class not, too."""
        weight = torch.tensor([[1.0], [0.5], [0.0]], dtype=torch.float64)
        hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor([0, 0, -torch.inf], dtype=torch.float64)
        prob = torch.tensor([[0.75, 0.25, 0.0]], dtype=torch.float64)
        for count, options in ((3, {}), (2, {"linear_bias": bias}), (3, {"linear_bias": bias})):
            index = torch.arange(count)[None]
            found, plain = (
                crosscut.linear_topk_kl_div(
                    hidden, weight, index, prob[:, :count], tail=tail, **options
                )
                for tail in (True, False)
            )
            torch.testing.assert_close(found, plain)
            for loss in (found, plain):
                (grad,) = torch.autograd.grad(loss.sum(), hidden)
                assert grad.isfinite().all()
        found = crosscut.linear_topk_kl_div(
            hidden, weight, torch.arange(2)[None], prob[:, :2] / 2, tail=True, linear_bias=bias
        )
        assert found.isposinf().all()

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scale", [1.0, 12.0], ids=["", "sure"])
    def test_the_tail_across_blocks(self, dtype, scale, device):
        """As accurate as PyTorch, of the same rest; with a softcap, a scale and a temperature."""
        head = make_head(((2, 260), 16, 4400), dtype, bias=True, device=device)
        head = replace(head, linear_weight=head.linear_weight * scale)
        options: dict[str, Any] = {"softcap": 15.0 * scale, "logit_scale": 0.9}
        z = reference.logits(head.input, head.linear_weight, head.linear_bias, **options)
        index = z.topk(4).indices
        index[0, 3:9, 1:] = -100
        index[1, ::3] = -100
        prob = torch.rand(index.shape).to(device).softmax(-1) * 0.9
        head = replace(head, target=index)

        def ours(input: Tensor, weight: Tensor, target: Tensor, **bias: Any) -> Tensor:
            return crosscut.linear_topk_kl_div(
                input, weight, target, prob, tail=True, temperature=1.5, **options, **bias
            )

        def theirs(input: Tensor, weight: Tensor, index: Tensor, linear_bias: Tensor) -> Tensor:
            z = reference.logits(input, weight, linear_bias, **options) / 1.5
            kept = index != -100
            q = torch.where(kept, prob.to(z), 0)
            of_k = torch.where(kept, z.gather(-1, index.clamp_min(0)), -torch.inf)
            outside = torch.zeros_like(z).scatter_reduce(
                -1, index.clamp_min(0), torch.where(kept, -torch.inf, 0).to(z), "sum"
            )
            joined = torch.cat([of_k, (z + outside).logsumexp(-1, keepdim=True)], -1)
            q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
            log_p = joined.log_softmax(-1)
            loss = torch.where(q > 0, q * (q.log() - log_p), 0).sum(-1)
            return torch.where(kept.any(-1), loss, 0)

        judging.judge(ours, theirs, head)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("tokens", [0, 9])
    def test_opcheck(self, dtype, tokens):
        hidden, classifier, bias, *_ = op_arguments(hard=False, dtype=dtype, tokens=tokens)
        labels = torch.randint(30, (tokens, 3))
        labels[1::3] = -1
        labels[::2, 1] = -1
        options = (5.0, 0.5, "auto", "blocks", False, False)
        arguments = (hidden, classifier, bias, labels, None, *options)
        found = list(torch.ops.crosscut.rest.default(*arguments))
        given = torch.rand_like(found[0]), torch.rand_like(found[1]), found
        torch.library.opcheck(
            torch.ops.crosscut.rest_backward.default, (*given, *arguments, [True, False, True])
        )
        for x in arguments[:3]:
            x.requires_grad_()
        torch.library.opcheck(torch.ops.crosscut.rest.default, arguments)

    def test_compiled_without_a_break(self):
        head = make_head((20, 5, 30), torch.float32)
        index, prob = self.stored(reference.logits(head.input, head.linear_weight), 3)

        def loss(hidden: Tensor, tail: bool) -> Tensor:
            return crosscut.linear_topk_kl_div(
                hidden, head.linear_weight, index, prob / 2, tail=tail
            ).sum()

        hidden = head.input.requires_grad_()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for tail in (False, True):
            (ours,) = torch.autograd.grad(compiled(hidden, tail), hidden)
            (theirs,) = torch.autograd.grad(loss(hidden, tail), hidden)
            assert torch.equal(ours, theirs)


def test_errors():
    head = make_head((4, 3, 5), torch.float32)
    good = (head.input, head.linear_weight, torch.zeros(4, 2), torch.zeros(5, 2))

    def message(kind: type[Exception], *changed: Any, **options: Any) -> str:
        tensors = [new if new is not None else old for new, old in zip(changed, good, strict=True)]
        with pytest.raises(kind) as caught:
            crosscut.linear_kl_div(*tensors, **options)
        return str(caught.value)

    same = (None,) * 4
    assert message(ValueError, None, None, torch.zeros(3, 2), None) == (
        "teacher_input must have input's shape but for its last dimension, [4], got [3]"
    )
    assert message(ValueError, None, None, None, torch.zeros(6, 2)) == (
        "teacher_weight must have linear_weight's 5 classes, got shape [6, 2]"
    )
    assert message(ValueError, None, None, None, torch.zeros(5, 3)) == (
        "teacher_weight has hidden size 3, teacher_input has 2: their last dimensions must match"
    )
    assert message(TypeError, None, None, None, torch.zeros(5, 2).double()) == (
        "teacher_weight has dtype torch.float64, teacher_input has torch.float32: cast one of "
        "them, or use torch.autocast"
    )
    assert message(TypeError, None, None, 1, None) == "teacher_input must be a Tensor, got int"
    assert message(ValueError, *same, divergence="kl") == (
        "divergence must be one of 'forward', 'reverse', 'js', got 'kl'"
    )
    assert message(ValueError, *same, beta=1) == "beta must be between 0 and 1, got 1"
    assert message(ValueError, *same, hard_weight=2, target=head.target) == (
        "hard_weight must be in [0, 1], got 2"
    )
    assert message(ValueError, *same, hard_weight=0.5) == (
        "hard_weight=0.5 and shift=0 need a target, got None"
    )
    assert message(ValueError, *same, temperature=0) == (
        "temperature must be a positive finite number, got 0"
    )
    assert message(IndexError, *same, target=torch.tensor([0, 1, 2, 5])) == (
        "target[3] is 5, out of range: classes must be in [0, 5), or ignore_index=-100"
    )
    assert message(ValueError, *same, teacher_softcap=0) == (
        "teacher_softcap must be a positive finite number, got 0"
    )
    assert message(ValueError, *same, teacher_logit_scale=math.inf) == (
        "teacher_logit_scale must be a finite number, got inf"
    )
    assert message(TypeError, *same, teacher_bias=0.0) == (
        "teacher_bias must be a Tensor, got float"
    )
    assert message(ValueError, *same, teacher_bias=torch.zeros(4)) == (
        "teacher_bias must have shape [5], one a class, got [4]"
    )
    integers = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64)
    assert message(TypeError, None, None, *integers) == (
        "teacher_input must have a floating-point dtype, got torch.int64"
    )


@pytest.mark.parametrize(
    ("index", "prob", "kind", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), torch.zeros(4), ValueError,
         "teacher_index must have shape [4, K], got [4]"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 3), ValueError,
         "teacher_prob must have teacher_index's shape, [4, 2], got [4, 3]"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64), TypeError,
         "teacher_prob must have a floating-point dtype, got torch.int64"),
        ([[0, 1]] * 4, torch.zeros(4, 2), TypeError, "teacher_index must be a Tensor, got list"),
        (torch.zeros(4, 2, dtype=torch.int64), [[0.5, 0.5]] * 4, TypeError,
         "teacher_prob must be a Tensor, got list"),
        (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2, device="meta"), ValueError,
         "teacher_prob is on meta, input is on cpu: all must be on one device"),
        (torch.zeros(4, 2), torch.zeros(4, 2), TypeError,
         "teacher_index must hold class indices, got torch.float32: class probabilities are not "
         "supported"),
        (torch.tensor([[0, 1]] * 3 + [[-100, 5]]), torch.zeros(4, 2), IndexError,
         "teacher_index[3, 1] is 5, out of range: classes must be in [0, 5), or "
         "ignore_index=-100"),
        (torch.tensor([[0, 1]] * 4), torch.tensor([[0.5, 0.5]] * 3 + [[0.5, -0.5]]), ValueError,
         "teacher_prob must be in [0, 1], got -0.5 at [3, 1]"),
        (torch.tensor([[0, 1]] * 4), torch.tensor([[0.5, 0.5]] * 2 + [[1.25, 0]] * 2), ValueError,
         "teacher_prob must be in [0, 1], got 1.25 at [2, 0]"),
        (torch.tensor([[0, 1]] * 4), torch.full((4, 2), math.nan), ValueError,
         "teacher_prob must be in [0, 1], got nan at [0, 0]"),
        (torch.tensor([[0, 1, -100, -100]] * 3 + [[3, 1, 2, 3]]), torch.full((4, 4), 0.25),
         ValueError, "teacher_index must have a class at most once a token, got 3 again at [3, 3]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tail", [False, True], ids=["", "tail"])
def test_errors_of_top_k(index, prob, kind, message, tail):
    head = make_head((4, 3, 5), torch.float32)
    with pytest.raises(kind) as caught:
        crosscut.linear_topk_kl_div(head.input, head.linear_weight, index, prob, tail=tail)
    assert str(caught.value) == message


def test_errors_of_the_tail():
    head = make_head((4, 3, 5), torch.float32)
    index, prob = torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.25)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"tail": "no"}, TypeError, "tail must be True or False, got str"),
        (
            {"tail": True, "backend": "triton"},
            ValueError,
            "backend='triton' cannot serve this call: triton: has no kernel for tail=True",
        ),
        (
            {"tail": True, "backend": "cublas"},
            ValueError,
            "backend must be one of 'auto', 'triton', 'blocks', got 'cublas'",
        ),
        (
            {"tail": True, "policy": "cce"},
            ValueError,
            "backend='blocks' cannot serve this call: blocks: ",
        ),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=f"^{re.escape(message)}"):
            crosscut.linear_topk_kl_div(head.input, head.linear_weight, index, prob, **options)


@pytest.mark.real
@pytest.mark.parametrize("divergence", ["reverse", "js"])
def test_real_head(real_head: RealHead, divergence: str):
    """A teacher that sees the real hidden states, a student that sees them with noise."""
    hidden, labels = real_head.window(3, 32)
    classifier = real_head.classifier[: 2**16]  # the most frequent quarter
    noise = torch.randn(hidden.shape).mul(0.3 * hidden.float().std()).bfloat16()
    head = Head(hidden + noise, classifier, labels % len(classifier))

    def theirs(input: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Tensor:
        z, t = (input @ weight.t()).float(), (hidden.to(weight) @ weight.t()).float()
        return divergence_of(z, t.detach(), divergence, 0.5)

    def kl_div(input: Tensor, weight: Tensor, target: Tensor, **_: Any) -> Tensor:
        return ours(input, weight, target, teacher=Teacher(hidden, weight), divergence=divergence)

    wide = replace(head, input=head.input.float(), linear_weight=head.linear_weight.float())
    true, expected, found = outcome(theirs, wide), outcome(theirs, head), outcome(kl_div, head)
    their_errors = [error(value, exact) for _, value, exact in pairs(expected, true)]
    for (name, value, exact), their_error in zip(pairs(found, true), their_errors, strict=True):
        print(f"{name}: crosscut {error(value, exact):.2e}, PyTorch {their_error:.2e}")
        assert error(value, exact) <= their_error, name
