"""What PyTorch asks of a differentiable function: tracing, autocast, freezing, odd inputs."""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import reference
from support.heads import sparse_head, sparsity
from support.judging import Head, assert_as_accurate_as_pytorch, error, make_head, outcome, pairs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import crosscut
from crosscut.backends import blocks

FILTERED_OR_EXACT = ["filtered", "exact"]


def bits_equal(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    """Whether all tensors agree bit by bit."""
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


# --- torch.library -------------------------------------------------------------------------------

OPCHECKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "smoothing": {"logit_weight": True},
    "smoothing, softcap": {"logit_weight": True, "softcap": 5.0},
    "scale, ignored": {"logit_scale": 0.5, "ignored": 0.4},
    "filtered": {"policy": "filtered", "bias": True, "unwanted": True},
    "cce": {"policy": "cce", "bias": True},
    "cce_kahan": {"policy": "cce_kahan"},
    "bfloat16": {"dtype": torch.bfloat16, "bias": True},
    "bfloat16, filtered": {"dtype": torch.bfloat16, "bias": True, "unwanted": True},
    "float64": {"dtype": torch.float64},
    "no tokens": {"tokens": 0, "bias": True},
    "transposed": {"transposed": True, "bias": True},
    "transposed, filtered": {"transposed": True, "policy": "filtered"},
    "transposed, cce": {"transposed": True, "policy": "cce_kahan"},
    "inference": {"for_backward": False, "dtype": torch.bfloat16},
    "entropy": {"entropy": True, "bias": True},
    "entropy, filtered": {"entropy": True, "policy": "filtered", "bias": True, "unwanted": True},
    "entropy, cce": {"entropy": True, "policy": "cce_kahan"},
    "entropy, no tokens": {"entropy": True, "ranks": True, "tokens": 0, "bias": True},
    "ranks": {"ranks": True, "softcap": 5.0},
    "several": {"several": 3, "bias": True, "ignored": 0.4},
    "several, entropy": {"several": 2, "entropy": True, "dtype": torch.bfloat16},
    "several, filtered": {"several": 2, "policy": "filtered", "bias": True, "unwanted": True},
}


def op_arguments(
    *,
    tokens: int = 12,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    logit_weight: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    policy: str = "auto",
    ignored: float = 0.0,
    unwanted: bool = False,
    transposed: bool = False,
    entropy: bool = False,
    ranks: bool = False,
    several: int = 0,
    for_backward: bool = True,
) -> tuple[Any, ...]:
    """Positional arguments of ``crosscut::token_statistics``, in the order of its schema."""
    head = make_head((tokens, 6, 300), dtype, bias=bias, ignored=ignored)
    hidden, classifier, head_bias = head.input, head.linear_weight, head.linear_bias
    if unwanted:
        assert head_bias is not None
        head_bias[20:] = -25
    if transposed:
        hidden, classifier = (x.t().contiguous().t() for x in (hidden, classifier))
    labels = torch.where(head.target == -100, -1, head.target)
    if several:
        others = torch.arange(several - 1) * 3
        labels = torch.cat([labels[:, None], (labels[:, None] + others) % 300], 1)
    weight = None
    if logit_weight:
        weight = torch.rand(300, dtype=torch.promote_types(dtype, torch.float32)) / 300
    return (
        hidden, classifier, head_bias, labels, weight, for_backward,
        softcap, logit_scale, policy, "auto", entropy, ranks,
    )  # fmt: skip


@pytest.mark.parametrize("options", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck_forward(options):
    arguments = op_arguments(**options)
    if options.get("for_backward", True):
        for x in arguments[:3]:
            if x is not None:
                x.requires_grad_()
    torch.library.opcheck(torch.ops.crosscut.token_statistics.default, arguments)


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("options", OPCHECKS.values(), ids=OPCHECKS)
def test_opcheck_backward(options, needs):
    arguments = op_arguments(**options)
    hidden, classifier, bias, labels, logit_weight, *rest = arguments
    statistics = list(torch.ops.crosscut.token_statistics.default(*arguments))
    d_lse = torch.rand_like(statistics[0])
    d_target = -torch.rand_like(statistics[1])
    d_log_prob = torch.rand_like(statistics[2])
    d_sum = torch.rand_like(statistics[0]) if logit_weight is not None else None
    d_entropy = torch.rand_like(statistics[0]) if options.get("entropy") else None
    torch.library.opcheck(
        torch.ops.crosscut.token_statistics_backward.default,
        (
            d_lse, d_target, d_log_prob, d_sum, d_entropy, statistics,
            hidden, classifier, bias, labels, logit_weight, *rest, needs,
        ),
    )  # fmt: skip


def test_schema_names_what_the_code_names():
    schema = torch.ops.crosscut.token_statistics.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names == [
        "hidden", "classifier", "bias", "labels", "logit_weight", "for_backward",
        "softcap", "logit_scale", "policy", "backend", "entropy", "ranks",
    ]  # fmt: skip
    assert not schema.is_mutable


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "mean"},
        {"reduction": "none", "softcap": 3.0},
        {"reduction": "sum", "label_smoothing": 0.2},
        {"label_smoothing": 0.2, "softcap": 4.0, "logit_scale": 0.7},
        {"z_loss": 0.1, "shift": 1},
    ],
    ids=str,
)
def test_gradcheck(options):
    head = make_head((6, 3, 7), bias=True, ignored=0.2)

    def loss(hidden: Tensor, classifier: Tensor, bias: Tensor) -> Tensor:
        return crosscut.linear_cross_entropy(
            hidden, classifier, head.target, linear_bias=bias, policy="exact", **options
        )

    leaves = [head.input, head.linear_weight, head.linear_bias]
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in leaves])


def test_gradcheck_of_the_statistics():
    head = make_head((5, 3, 7), bias=True)

    def statistics(hidden: Tensor, classifier: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = crosscut.token_statistics(hidden, classifier, head.target, linear_bias=bias)
        return found.lse, found.target_logit, found.log_prob

    leaves = [head.input, head.linear_weight, head.linear_bias]
    assert torch.autograd.gradcheck(statistics, [x.clone().requires_grad_() for x in leaves])


# --- torch.compile -------------------------------------------------------------------------------


class TinyModel(nn.Module):
    """Embedding, one layer, and a head that shares the embedding's weight."""

    def __init__(self, loss_fn: Callable[..., Tensor], num_classes: int = 120) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 8)
        self.layer = nn.Linear(8, 8)
        self.loss_fn = loss_fn

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        return self.loss_fn(hidden[:, :-1], self.embedding.weight, ids[:, 1:])


def _losses() -> dict[str, Callable[..., Tensor]]:
    def with_options(**options: Any) -> Callable[..., Tensor]:
        return lambda *tensors: crosscut.linear_cross_entropy(*tensors, **options)

    def from_statistics(*tensors: Tensor) -> Tensor:
        found = crosscut.token_statistics(*tensors)
        return -(found.log_prob * found.lse).mean()

    return {
        "plain": with_options(),
        "filtered": with_options(policy="filtered"),
        "everything": with_options(softcap=5.0, label_smoothing=0.1, z_loss=1e-2, logit_scale=0.5),
        "shift, none": lambda *tensors: with_options(shift=1, reduction="none")(*tensors).mean(),
        "module": crosscut.LinearCrossEntropy(weight=torch.linspace(0.5, 2, 120)),
        "statistics": from_statistics,
    }


def _grads(model: nn.Module, run: Callable[[Tensor], Tensor], ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = run(ids)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", _losses())
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    model = TinyModel(_losses()[name])
    ids = torch.randint(120, (3, 9))
    eager = _grads(model, model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = _grads(model, compiled, ids)
    assert len(found) == 4
    torch.testing.assert_close(found, eager)
    longer = torch.randint(120, (3, 14))  # a new shape: traced again, or with symbolic sizes
    torch.testing.assert_close(_grads(model, compiled, longer), _grads(model, model, longer))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compile_inductor(transposed):
    """The strides that inductor was promised are the strides it gets."""
    torch._dynamo.reset()
    head = make_head((20, 6, 50), torch.float32)

    def loss(hidden: Tensor, classifier: Tensor, target: Tensor, linear_bias: None) -> Tensor:
        if transposed:
            hidden, classifier = hidden.t().contiguous().t(), classifier.t().contiguous().t()
        return crosscut.linear_cross_entropy(hidden * 2, classifier * 2, target)

    compiled = outcome(torch.compile(loss, fullgraph=True), head)
    torch.testing.assert_close(compiled[:3], outcome(loss, head)[:3])


def test_compile_with_a_number_that_changes():
    """A temperature schedule: the compiler makes a symbol of it at its second value."""
    torch._dynamo.reset()
    head = make_head((20, 6, 50), torch.float32)

    def loss(scale: float) -> Tensor:
        return crosscut.linear_cross_entropy(
            head.input, head.linear_weight, head.target, logit_scale=scale
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 0.5, 0.25):
        torch.testing.assert_close(compiled(scale), loss(scale))


def test_compile_under_no_grad():
    torch._dynamo.reset()
    head = make_head((20, 6, 50), torch.float32)
    loss = torch.compile(crosscut.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = loss(head.input, head.linear_weight, head.target)
    expected = crosscut.linear_cross_entropy(head.input, head.linear_weight, head.target)
    torch.testing.assert_close(found, expected)


def test_the_compiler_does_not_look_into_the_operator():
    """Not even where it skips the function that calls it, and looks into those below."""
    torch._dynamo.reset()
    head, graphs = make_head((20, 6, 50), torch.float32), []

    def collect(graph: Any, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    @torch._dynamo.disable(recursive=False)  # pyright: ignore[reportCallIssue]
    def skipped() -> Tensor:
        arguments = (head.input, head.linear_weight, None, head.target, None)
        options = (False, None, 1.0, "exact", "auto", False, False)
        return torch.ops.crosscut.token_statistics.default(*arguments, *options)[0]

    found = torch.compile(lambda: skipped() + 1, backend=collect)()
    logits = F.linear(head.input, head.linear_weight)
    torch.testing.assert_close(found, logits.logsumexp(-1) + 1)
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op.startswith("call")]
    assert len(nodes) == 1, nodes  # the sum


# --- autocast, checkpointing, inference ----------------------------------------------------------


class TestAutocast:
    """Dtypes as with ``F.linear`` and ``F.cross_entropy`` under autocast."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_dtypes(self, dtype):
        head = make_head((30, 6, 50), dtype, bias=True)
        with torch.autocast("cpu", torch.bfloat16):
            ours = outcome(crosscut.linear_cross_entropy, head)

            def plain(hidden: Tensor, classifier: Tensor, target: Tensor, linear_bias: Tensor):
                return F.cross_entropy(F.linear(hidden, classifier, linear_bias), target)

            theirs = outcome(plain, head)
        assert [x.dtype for x in ours if x is not None] == [
            x.dtype for x in theirs if x is not None
        ]

    def test_computes_in_the_autocast_dtype(self):
        head = make_head((30, 6, 50), torch.float32, bias=True)
        assert head.linear_bias is not None
        low = Head(
            head.input.bfloat16(),
            head.linear_weight.bfloat16(),
            head.target,
            head.linear_bias.bfloat16(),
        )
        with torch.autocast("cpu", torch.bfloat16):
            ours = outcome(crosscut.linear_cross_entropy, head)
        expected = outcome(crosscut.linear_cross_entropy, low)
        assert torch.equal(ours.loss, expected.loss)
        for _, value, low_value in pairs(ours, expected):
            assert torch.equal(value, low_value.float())

    def test_filter_works_by_the_autocast_dtype(self):
        head = sparse_head(100, dtype=torch.float32)
        assert sparsity(head, policy="auto").kept == 1.0
        with torch.autocast("cpu", torch.bfloat16):
            assert sparsity(head, policy="auto").kept < 0.5

    def test_mixed_dtypes_meet(self):
        """As the output of a layer under autocast meets a float32 head."""
        head = make_head((30, 6, 50), torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = crosscut.linear_cross_entropy(
                head.input.bfloat16(), head.linear_weight, head.target
            )
            same = crosscut.linear_cross_entropy(head.input, head.linear_weight, head.target)
        assert torch.equal(mixed, same)

    def test_does_not_disturb_the_inside(self):
        """Sums stay wide: the loss of float64 inputs does not change under autocast."""
        head = make_head((30, 6, 50), torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            under = outcome(crosscut.linear_cross_entropy, head, z_loss=0.1)
        assert bits_equal(under, outcome(crosscut.linear_cross_entropy, head, z_loss=0.1))


@pytest.mark.parametrize("policy", FILTERED_OR_EXACT)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(policy, reentrant):
    head = sparse_head(60, dtype=torch.float32)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
        return crosscut.linear_cross_entropy(
            hidden, weight, target, linear_bias=linear_bias, policy=policy
        )

    def recomputed(*tensors: Tensor, linear_bias: Tensor) -> Tensor:
        return checkpoint(loss, *tensors, linear_bias, use_reentrant=reentrant)

    assert bits_equal(outcome(recomputed, head), outcome(loss, head))


@pytest.fixture
def forward_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the backend's forward was asked, and the sizes it returned, call by call."""
    calls: list[dict[str, Any]] = []
    forward = blocks.BlocksBackend.forward

    def spy(self: Any, problem: Any, *, for_backward: bool) -> Any:
        found = forward(self, problem, for_backward=for_backward)
        calls.append({"for_backward": for_backward, "filter": found.saved.column_mass.shape[0]})
        return found

    monkeypatch.setattr(blocks.BlocksBackend, "forward", spy)
    return calls


class TestNoGradientWork:
    """Nothing is kept for a backward that cannot come."""

    def test_with_gradients(self, forward_calls):
        outcome(crosscut.linear_cross_entropy, sparse_head(60), policy="filtered")
        assert forward_calls == [{"for_backward": True, "filter": 1}]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_no_grad(self, forward_calls, mode):
        head = sparse_head(60)
        head.input.requires_grad_()
        expected = crosscut.linear_cross_entropy(
            head.input, head.linear_weight, head.target, linear_bias=head.linear_bias
        )
        forward_calls.clear()
        with mode():
            loss = crosscut.linear_cross_entropy(
                head.input, head.linear_weight, head.target,
                linear_bias=head.linear_bias, policy="filtered",
            )  # fmt: skip
        assert forward_calls == [{"for_backward": False, "filter": 0}]
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())

    def test_nothing_requires_grad(self, forward_calls):
        head = sparse_head(60)
        loss = crosscut.linear_cross_entropy(
            head.input, head.linear_weight, head.target, policy="filtered"
        )
        assert forward_calls == [{"for_backward": False, "filter": 0}]
        assert not loss.requires_grad


def matmul_flop(run: Callable[[], Any]) -> float:
    """Flop of every matrix product that ``run`` does, custom operators' insides included."""
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    flop = 0
    for event in profile.events() or ():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
            left, right = [shape for shape in event.input_shapes if len(shape) >= 2][-2:]
            flop += 2 * math.prod(left) * right[-1]
    return flop


def test_matmul_flop_sees_what_is_inside():
    a, b, bias = torch.ones(3, 5), torch.ones(5, 7), torch.ones(7)
    assert matmul_flop(lambda: a @ b) == 2 * 3 * 5 * 7
    assert matmul_flop(lambda: F.linear(a, b.t(), bias)) == 2 * 3 * 5 * 7
    assert matmul_flop(lambda: torch.zeros(3, 7).addmm_(a, b)) == 2 * 3 * 5 * 7
    head = make_head((64, 32, 4096), torch.float32)
    forward = matmul_flop(
        lambda: crosscut.linear_cross_entropy(head.input, head.linear_weight, head.target)
    )
    whole = 2 * 64 * 32 * 4096
    assert whole <= forward <= 1.25 * whole  # some classes are made twice


class TestFrozen:
    """The gradient of what is frozen is not computed, and the others do not change."""

    NAMES = ("d_input", "d_weight", "d_bias")

    @staticmethod
    def run(head: Head, wanted: str, **options: Any) -> tuple[list[Tensor | None], float]:
        """Gradients of (i)nput, (w)eight and (b)ias, None if not wanted; the backward's flop."""
        leaves = [
            x.detach().clone().requires_grad_(key in wanted)
            for key, x in zip(
                "iwb", (head.input, head.linear_weight, head.linear_bias), strict=True
            )
            if x is not None
        ]
        loss = crosscut.linear_cross_entropy(
            leaves[0], leaves[1], head.target, linear_bias=leaves[2], **options
        )
        flop = matmul_flop(loss.backward)
        return [x.grad for x in leaves], flop

    @pytest.mark.parametrize("wanted", ["i", "w", "b", "iw", "ib", "wb"])
    @pytest.mark.parametrize(
        "options",
        [
            {"policy": "exact"},
            {"policy": "filtered"},
            {"policy": "cce_kahan"},
            {"policy": "exact", "label_smoothing": 0.1},
            {"policy": "exact", "label_smoothing": 0.1, "softcap": 5.0},
        ],
        ids=str,
    )
    def test_gradients_of_the_rest(self, wanted, options):
        head = sparse_head(50, dtype=torch.float32)
        found, _ = self.run(head, wanted, **options)
        everything, _ = self.run(head, "iwb", **options)
        for key, value, expected in zip("iwb", found, everything, strict=True):
            if key in wanted:
                assert value is not None
                assert expected is not None
                torch.testing.assert_close(value, expected)
            else:
                assert value is None

    def test_products_are_skipped(self):
        """Exact: 2NVD flop for the logits, and 2NVD for each of the two products."""
        head = make_head((64, 32, 4096), torch.float32, bias=True)
        one = 2 * 64 * 32 * 4096
        for wanted, products in {"iwb": 3, "iw": 3, "i": 2, "w": 2, "wb": 2, "b": 1}.items():
            _, flop = self.run(head, wanted, policy="exact")
            assert products * one <= flop <= 1.1 * products * one, wanted

    def test_filtered_skips_most_of_it(self):
        head = sparse_head(64, hidden_size=32, num_classes=8000, dtype=torch.float32)
        assert sparsity(head).kept < 0.1
        _, exact = self.run(head, "iwb", policy="exact")
        _, filtered = self.run(head, "iwb", policy="filtered")
        assert filtered < 0.15 * exact


# --- autograd's corners --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["filtered", "exact", "cce"])
def test_double_backward(policy):
    head = make_head((5, 3, 7))
    hidden = head.input.requires_grad_()
    loss = crosscut.linear_cross_entropy(hidden, head.linear_weight, head.target, policy=policy)
    (d_hidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    message = (
        "crosscut has no double backward: the gradients of token_statistics and "
        "linear_cross_entropy cannot be differentiated again (create_graph=True)"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        d_hidden.sum().backward()


@pytest.mark.parametrize("policy", FILTERED_OR_EXACT)
def test_retain_graph(policy):
    head = sparse_head(60)
    leaves = [x.requires_grad_() for x in (head.input, head.linear_weight)]
    loss = crosscut.linear_cross_entropy(
        leaves[0], leaves[1], head.target, linear_bias=head.linear_bias, policy=policy
    )
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert bits_equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_gradient_accumulation():
    head = make_head((40, 6, 50), torch.float32)
    whole = outcome(crosscut.linear_cross_entropy, head, reduction="sum")
    weight = head.linear_weight.clone().requires_grad_()
    for part in (slice(0, 13), slice(13, 40)):
        crosscut.linear_cross_entropy(
            head.input[part], weight, head.target[part], reduction="sum"
        ).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, whole.d_weight)


def test_tied_weights():
    """The embedding and the head share one weight, which gets both gradients."""
    ids = torch.randint(120, (3, 9))
    ours = TinyModel(lambda *tensors: crosscut.linear_cross_entropy(*tensors)).double()
    theirs = copy.deepcopy(ours)
    theirs.loss_fn = reference.linear_cross_entropy
    for one, other in zip(_grads(ours, ours, ids), _grads(theirs, theirs, ids), strict=True):
        assert error(one, other) < 1e-13


def test_tensors_as_the_same_leaf():
    """Hidden states and classifier may be one tensor."""
    both = make_head((7, 5, 7)).input.requires_grad_()
    target = torch.arange(7)
    (ours,) = torch.autograd.grad(crosscut.linear_cross_entropy(both, both, target), both)
    (theirs,) = torch.autograd.grad(reference.linear_cross_entropy(both, both, target), both)
    assert error(ours, theirs) < 1e-13


@pytest.mark.parametrize("policy", ["filtered", "exact", "cce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(policy, dtype):
    """Transposed and strided inputs, a view of a longer sequence, an expanded bias."""
    head = make_head((40, 6, 300), dtype, bias=True, ignored=0.2)
    assert head.linear_bias is not None
    wide = torch.zeros(80, 12, dtype=dtype)
    wide[::2, ::2] = head.input
    strided_target = torch.stack([head.target, head.target + 1], 1)[:, 0]
    strided_bias = torch.stack([head.linear_bias, head.linear_bias], 1)[:, 0]
    expected = outcome(crosscut.linear_cross_entropy, head, policy=policy)
    for odd in (
        replace(head, input=head.input.t().contiguous().t()),
        replace(head, linear_weight=head.linear_weight.t().contiguous().t()),
        replace(head, input=wide[::2, ::2], target=strided_target, linear_bias=strided_bias),
    ):
        assert not (odd.input.is_contiguous() and odd.linear_weight.is_contiguous())
        torch.testing.assert_close(
            outcome(crosscut.linear_cross_entropy, odd, policy=policy), expected
        )


def test_expanded_inputs():
    head = make_head((1, 6, 50))
    leaf = head.input.requires_grad_()
    loss = crosscut.linear_cross_entropy(
        leaf.expand(5, 6), head.linear_weight, head.target.expand(5), reduction="sum"
    )
    loss.backward()
    true = outcome(reference.linear_cross_entropy, make_head((1, 6, 50)), reduction="sum")
    assert leaf.grad is not None
    assert error(loss, 5 * true.loss) < 1e-13
    assert error(leaf.grad, 5 * true.d_input) < 1e-13


def test_sequence_first_batch():
    """[T, B, D] transposed to [B, T, D]: the flat rows are not a view."""
    head = make_head(((7, 3), 6, 50))
    odd = replace(head, input=head.input.transpose(0, 1), target=head.target.t())
    assert_as_accurate_as_pytorch(odd, shift=1, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_token_without_a_batch(reduction):
    head = make_head(((), 6, 50), bias=True)
    assert head.input.dim() == 1
    assert_as_accurate_as_pytorch(head, reduction=reduction)


@pytest.mark.parametrize("policy", ["auto", "filtered", "exact", "cce"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch", [(0,), (2, 0), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"softcap": 3.0}], ids=str
)
def test_no_token_counts(policy, reduction, batch, options):
    """Nothing there, or all ignored: a mean is NaN as in PyTorch, the gradients exactly zero."""
    head = make_head((batch, 4, 300), torch.bfloat16, bias=True)
    head.target.fill_(-100)
    found = outcome(
        crosscut.linear_cross_entropy, head, policy=policy, reduction=reduction, **options
    )
    if reduction == "mean":
        assert math.isnan(found.loss.item())
    else:
        assert (found.loss == 0).all()
        assert found.loss.shape == (batch if reduction == "none" else ())
    for grad in found[1:]:
        assert grad is not None
        assert (grad == 0).all()


# --- inf and NaN ---------------------------------------------------------------------------------

NON_FINITE = ["nan hidden", "inf hidden", "-inf hidden", "nan weight", "inf weight",
              "-inf bias", "inf bias", "nan bias", "-inf bias at a target", "overflow"]  # fmt: skip


def non_finite_head(kind: str, dtype: torch.dtype) -> Head:
    """Eight tokens and twenty classes, of which one number or a few are not finite."""
    head = make_head((8, 4, 20), dtype, bias=True)
    hidden, weight, bias, target = head.input, head.linear_weight, head.linear_bias, head.target
    assert bias is not None
    target[:] = torch.arange(8)
    match kind:
        case "nan hidden":
            hidden[2, 1] = math.nan
        case "inf hidden":
            hidden[2, 1] = math.inf
        case "-inf hidden":
            hidden[2] = -math.inf
        case "nan weight":
            weight[15, 1] = math.nan
        case "inf weight":
            weight[15, 1] = math.inf
        case "-inf bias":
            bias[10:15] = -math.inf
        case "inf bias":
            bias[10] = math.inf
        case "nan bias":
            bias[10] = math.nan
        case "-inf bias at a target":
            bias[3] = -math.inf
        case "overflow":
            hidden[2, 1], weight[15, 1] = 3e20, 3e20
    return head


@pytest.mark.parametrize("kind", NON_FINITE)
@pytest.mark.parametrize("policy", ["exact", "filtered"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_non_finite_numbers_propagate(kind, policy, reduction, dtype):
    """NaN and inf where PyTorch has them, in the loss and in each gradient; the rest unharmed."""
    head = non_finite_head(kind, dtype)
    ours = outcome(crosscut.linear_cross_entropy, head, policy=policy, reduction=reduction)
    theirs = outcome(reference.linear_cross_entropy, head, reduction=reduction)
    tolerance = {torch.bfloat16: 0.1}.get(dtype, 1e-4)
    for name, value, their in pairs(ours, theirs):
        assert torch.equal(value.isnan(), their.isnan()), f"{name}: {value} {their}"
        assert torch.equal(value.isinf(), their.isinf()), f"{name}: {value} {their}"
        finite = their.isfinite()
        assert error(value[finite], their[finite]) < tolerance, name


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("kind", ["nan hidden", "inf hidden", "-inf bias", "-inf bias at a target"])
def test_non_finite_numbers_with_options(kind, options):
    head = non_finite_head(kind, torch.float32)
    ours = outcome(crosscut.linear_cross_entropy, head, reduction="none", **options)
    theirs = outcome(reference.linear_cross_entropy, head, reduction="none", **options)
    for name, value, their in pairs(ours, theirs):
        assert torch.equal(value.isnan(), their.isnan()), f"{name}: {value} {their}"
        finite = their.isfinite() & value.isfinite()
        assert error(value[finite], their[finite]) < 1e-4, name


@pytest.mark.parametrize("policy", FILTERED_OR_EXACT)
@pytest.mark.parametrize("factor", [5e2, 5e4, 5e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_huge_logits(policy, factor, dtype, bias):
    """Far beyond exp's range, and the largest logit comes in the second block of classes."""
    head = make_head((9, 4, 5000), dtype, bias=bias)
    weight = head.linear_weight.clone()
    weight[4500:] *= factor
    huge = replace(head, linear_weight=weight, target=head.target % 100)
    found = outcome(crosscut.linear_cross_entropy, huge, policy=policy, reduction="none")
    assert (found.loss > factor).all()
    assert_as_accurate_as_pytorch(huge, policy=policy, reduction="none")
