"""Whatever a user can get wrong: an error with the argument, what came, and what is needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import crosscut
from crosscut.backends import NAMES
from crosscut.options import POLICIES

FUNCTIONS = [
    crosscut.linear_cross_entropy,
    crosscut.linear_log_probs,
    crosscut.token_statistics,
    crosscut.gradient_sparsity,
    crosscut.explain,
]

FULL = [crosscut.linear_cross_entropy, crosscut.explain]
"""Those that take every argument of the loss."""


def arguments(**changes: Any) -> dict[str, Any]:
    """A good call of 3 tokens, hidden size 4 and 5 classes, with some arguments changed."""
    return {
        "input": torch.zeros(3, 4),
        "linear_weight": torch.zeros(5, 4),
        "target": torch.tensor([0, 1, 4]),
    } | changes


def refuses(kind: type[Exception], message: str) -> Any:
    """Expect exactly this type with exactly this message."""
    return _Refusal(kind, message)


class _Refusal:
    def __init__(self, kind: type[Exception], message: str) -> None:
        self.kind, self.message = kind, message

    def __enter__(self) -> None:
        self.context = pytest.raises(self.kind, match=f"^{re.escape(self.message)}$")
        self.info = self.context.__enter__()

    def __exit__(self, *exception: Any) -> bool:
        swallowed = self.context.__exit__(*exception)
        assert self.info.type is self.kind  # and not a subclass of it
        return bool(swallowed)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# name: arguments changed, type, message. For all functions.
TENSORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input is no tensor": (
        {"input": [[1.0]]},
        TypeError,
        "input must be a Tensor, got list",
    ),
    "linear_weight is no tensor": (
        {"linear_weight": None},
        TypeError,
        "linear_weight must be a Tensor, got NoneType",
    ),
    "target is no tensor": (
        {"target": [0, 1, 2]},
        TypeError,
        "target must be a Tensor, got list",
    ),
    "linear_bias is no tensor": (
        {"linear_bias": 0.0},
        TypeError,
        "linear_bias must be a Tensor, got float",
    ),
    "input is a scalar": (
        {"input": zeros()},
        ValueError,
        "input must have shape [..., D], got a scalar",
    ),
    "linear_weight is a vector": (
        {"linear_weight": zeros(4)},
        ValueError,
        "linear_weight must have shape [V, D], got [4]",
    ),
    "linear_weight is a batch": (
        {"linear_weight": zeros(2, 5, 4)},
        ValueError,
        "linear_weight must have shape [V, D], got [2, 5, 4]",
    ),
    "no class": (
        {"linear_weight": zeros(0, 4)},
        ValueError,
        "linear_weight must have a class and a hidden dimension, got [0, 4]",
    ),
    "no hidden dimension": (
        {"input": zeros(3, 0), "linear_weight": zeros(5, 0)},
        ValueError,
        "linear_weight must have a class and a hidden dimension, got [5, 0]",
    ),
    "hidden sizes differ": (
        {"linear_weight": zeros(5, 6)},
        ValueError,
        "linear_weight has hidden size 6, input has 4: their last dimensions must match",
    ),
    "target is too short": (
        {"target": torch.tensor([0, 1])},
        ValueError,
        "target must have input's shape without its last dimension, [3], got [2]",
    ),
    "target has two dimensions more": (
        {"target": torch.zeros(3, 1, 1, dtype=torch.int64)},
        ValueError,
        "target must have input's shape without its last dimension, [3], got [3, 1, 1]",
    ),
    "target has one dimension more": (
        {"target": torch.tensor([[0], [1], [2]])},
        ValueError,
        "target must have input's shape without its last dimension, [3], got [3, 1]",
    ),
    "target has one dimension less": (
        {"input": zeros(2, 3, 4)},
        ValueError,
        "target must have input's shape without its last dimension, [2, 3], got [3]",
    ),
    "target is a scalar": (
        {"target": torch.tensor(1)},
        ValueError,
        "target must have input's shape without its last dimension, [3], got []",
    ),
    "bias of another length": (
        {"linear_bias": zeros(4)},
        ValueError,
        "linear_bias must have shape [5], one a class, got [4]",
    ),
    "bias of two dimensions": (
        {"linear_bias": zeros(1, 5)},
        ValueError,
        "linear_bias must have shape [5], one a class, got [1, 5]",
    ),
    "class probabilities": (
        {"target": zeros(3, 5)},
        TypeError,
        "target must hold class indices, got torch.float32: class probabilities are not supported",
    ),
    "float target": (
        {"target": zeros(3, dtype=torch.float64)},
        TypeError,
        "target must hold class indices, got torch.float64: class probabilities are not supported",
    ),
    "uint8 target": (
        {"target": zeros(3, dtype=torch.uint8)},
        TypeError,
        "target must be int64 or int32, got torch.uint8",
    ),
    "bool target": (
        {"target": zeros(3, dtype=torch.bool)},
        TypeError,
        "target must be int64 or int32, got torch.bool",
    ),
    "integer input": (
        {"input": zeros(3, 4, dtype=torch.int64)},
        TypeError,
        "input must have a floating-point dtype, got torch.int64",
    ),
    "complex input": (
        {"input": zeros(3, 4, dtype=torch.complex64)},
        TypeError,
        "input must have a floating-point dtype, got torch.complex64",
    ),
    "weight of another dtype": (
        {"linear_weight": zeros(5, 4, dtype=torch.bfloat16)},
        TypeError,
        "linear_weight has dtype torch.bfloat16, input has torch.float32: cast one of them, or use "
        "torch.autocast",
    ),
    "integer weight": (
        {"linear_weight": zeros(5, 4, dtype=torch.int32)},
        TypeError,
        "linear_weight has dtype torch.int32, input has torch.float32: cast one of them, or use "
        "torch.autocast",
    ),
    "bias of another dtype": (
        {"linear_bias": zeros(5, dtype=torch.float64)},
        TypeError,
        "linear_bias has dtype torch.float64, input has torch.float32: cast one of them, or use "
        "torch.autocast",
    ),
    "weight elsewhere": (
        {"linear_weight": zeros(5, 4, device="meta")},
        ValueError,
        "linear_weight is on meta, input is on cpu: all must be on one device",
    ),
    "target elsewhere": (
        {"target": zeros(3, dtype=torch.int64, device="meta")},
        ValueError,
        "target is on meta, input is on cpu: all must be on one device",
    ),
    "sparse weight": (
        {"linear_weight": zeros(5, 4).to_sparse()},
        TypeError,
        "linear_weight must be a dense tensor, got torch.sparse_coo",
    ),
    "sparse input": (
        {"input": zeros(3, 4).to_sparse_csr()},
        TypeError,
        "input must be a dense tensor, got torch.sparse_csr",
    ),
    "nested input": (
        {"input": torch.nested.nested_tensor([zeros(3, 4)])},
        TypeError,
        "input must be a dense tensor, got a nested tensor",
    ),
    "bias elsewhere": (
        {"linear_bias": zeros(5, device="meta")},
        ValueError,
        "linear_bias is on meta, input is on cpu: all must be on one device",
    ),
}

# For all functions.
HEAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "softcap=0": (
        {"softcap": 0},
        ValueError,
        "softcap must be a positive finite number, got 0",
    ),
    "softcap=-30": (
        {"softcap": -30.0},
        ValueError,
        "softcap must be a positive finite number, got -30.0",
    ),
    "softcap=inf": (
        {"softcap": math.inf},
        ValueError,
        "softcap must be a positive finite number, got inf",
    ),
    "softcap=nan": (
        {"softcap": math.nan},
        ValueError,
        "softcap must be a positive finite number, got nan",
    ),
    "softcap='30'": (
        {"softcap": "30"},
        TypeError,
        "softcap must be a positive finite number or None, got str",
    ),
    "softcap=True": (
        {"softcap": True},
        TypeError,
        "softcap must be a positive finite number or None, got bool",
    ),
    "softcap is a tensor": (
        {"softcap": torch.tensor(30.0)},
        TypeError,
        "softcap must be a positive finite number or None, got Tensor",
    ),
    "logit_scale=nan": (
        {"logit_scale": math.nan},
        ValueError,
        "logit_scale must be a finite number, got nan",
    ),
    "logit_scale=-inf": (
        {"logit_scale": -math.inf},
        ValueError,
        "logit_scale must be a finite number, got -inf",
    ),
    "logit_scale=None": (
        {"logit_scale": None},
        TypeError,
        "logit_scale must be a finite number, got NoneType",
    ),
    "logit_scale=False": (
        {"logit_scale": False},
        TypeError,
        "logit_scale must be a finite number, got bool",
    ),
    "logit_scale of two": (
        {"logit_scale": torch.ones(2)},
        ValueError,
        "logit_scale must be a number or a tensor of one, got shape [2]",
    ),
    "logit_scale is an integer tensor": (
        {"logit_scale": torch.tensor(2)},
        TypeError,
        "logit_scale must be a number or a floating-point tensor, got torch.int64",
    ),
    "logit_scale elsewhere": (
        {"logit_scale": torch.ones((), device="meta")},
        ValueError,
        "logit_scale is on meta, input is on cpu: all must be on one device",
    ),
    "policy='fast'": (
        {"policy": "fast"},
        ValueError,
        "policy must be one of 'auto', 'filtered', 'exact', 'cce', 'cce_kahan', "
        "'cce_kahan_full_c', 'cce_kahan_full_e', got 'fast'",
    ),
    "policy=None": (
        {"policy": None},
        ValueError,
        "policy must be one of 'auto', 'filtered', 'exact', 'cce', 'cce_kahan', "
        "'cce_kahan_full_c', 'cce_kahan_full_e', got None",
    ),
    "backend='cublas'": (
        {"backend": "cublas"},
        ValueError,
        f"backend must be one of 'auto', {', '.join(map(repr, NAMES))}, got 'cublas'",
    ),
    "backend=None": (
        {"backend": None},
        ValueError,
        f"backend must be one of 'auto', {', '.join(map(repr, NAMES))}, got None",
    ),
}

# For those that take labels into account.
TARGET_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shift=-1": ({"shift": -1}, ValueError, "shift must be >= 0, got -1"),
    "shift=1.0": ({"shift": 1.0}, TypeError, "shift must be an int, got float"),
    "shift=True": ({"shift": True}, TypeError, "shift must be an int, got bool"),
    "ignore_index=False": (
        {"ignore_index": False},
        TypeError,
        "ignore_index must be an int, got bool",
    ),
    "shift of a single token": (
        {"input": zeros(4), "target": torch.tensor(0), "shift": 1},
        ValueError,
        "shift=1 needs a sequence: target must have at least 1 dimension",
    ),
    "ignore_index=None": (
        {"ignore_index": None},
        TypeError,
        "ignore_index must be an int, got NoneType",
    ),
    "ignore_index=-1.0": (
        {"ignore_index": -1.0},
        TypeError,
        "ignore_index must be an int, got float",
    ),
}

# For the loss alone.
LOSS_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "reduction='avg'": (
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of 'none', 'mean', 'sum', got 'avg'",
    ),
    "reduction=None": (
        {"reduction": None},
        ValueError,
        "reduction must be one of 'none', 'mean', 'sum', got None",
    ),
    "label_smoothing=1.5": (
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing must be in [0, 1], got 1.5",
    ),
    "label_smoothing=-0.1": (
        {"label_smoothing": -0.1},
        ValueError,
        "label_smoothing must be in [0, 1], got -0.1",
    ),
    "label_smoothing=nan": (
        {"label_smoothing": math.nan},
        ValueError,
        "label_smoothing must be in [0, 1], got nan",
    ),
    "label_smoothing='0.1'": (
        {"label_smoothing": "0.1"},
        TypeError,
        "label_smoothing must be a number in [0, 1], got str",
    ),
    "z_loss=-1": (
        {"z_loss": -1},
        ValueError,
        "z_loss must be a finite number >= 0, got -1",
    ),
    "z_loss=inf": (
        {"z_loss": math.inf},
        ValueError,
        "z_loss must be a finite number >= 0, got inf",
    ),
    "z_loss=None": (
        {"z_loss": None},
        TypeError,
        "z_loss must be a finite number >= 0, got NoneType",
    ),
    "options are no options": (
        {"options": 5},
        TypeError,
        "options must be a torch.nn.LinearCrossEntropyOptions or None, got int",
    ),
    "weight is no tensor": (
        {"weight": [1.0] * 5},
        TypeError,
        "weight must be a Tensor, got list",
    ),
    "sparse class weights": (
        {"weight": zeros(5).to_sparse()},
        TypeError,
        "weight must be a dense tensor, got torch.sparse_coo",
    ),
    "sparse token weights": (
        {"token_weight": zeros(3).to_sparse()},
        TypeError,
        "token_weight must be a dense tensor, got torch.sparse_coo",
    ),
    "weight of another length": (
        {"weight": zeros(4)},
        ValueError,
        "weight must have shape [5], one a class, got [4]",
    ),
    "weight of two dimensions": (
        {"weight": zeros(5, 1)},
        ValueError,
        "weight must have shape [5], one a class, got [5, 1]",
    ),
    "integer weight": (
        {"weight": zeros(5, dtype=torch.int64)},
        TypeError,
        "weight must have a floating-point dtype, got torch.int64",
    ),
    "weight elsewhere": (
        {"weight": zeros(5, device="meta")},
        ValueError,
        "weight is on meta, input is on cpu: all must be on one device",
    ),
}


def test_the_good_call_is_good():
    for function in FUNCTIONS:
        function(**arguments())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [*TENSORS.values(), *HEAD_OPTIONS.values()],
    ids=[*TENSORS, *HEAD_OPTIONS],
)
def test_every_function(
    function: Callable[..., Any], changes: dict[str, Any], kind: type[Exception], message: str
):
    several = function in (crosscut.linear_log_probs, crosscut.explain)
    if several and message.endswith("[3, 1]"):
        pytest.skip("one of several targets a token")
    with refuses(kind, message):
        function(**arguments(**changes))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("changes", "kind", "message"), TARGET_OPTIONS.values(), ids=list(TARGET_OPTIONS)
)
def test_targets(
    function: Callable[..., Any], changes: dict[str, Any], kind: type[Exception], message: str
):
    if function in FULL and changes == {"ignore_index": None}:
        pytest.skip("as in PyTorch: -100")
    with refuses(kind, message):
        function(**arguments(**changes))


@pytest.mark.parametrize("function", FULL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("changes", "kind", "message"), LOSS_OPTIONS.values(), ids=list(LOSS_OPTIONS)
)
def test_loss(
    function: Callable[..., Any], changes: dict[str, Any], kind: type[Exception], message: str
):
    with refuses(kind, message):
        function(**arguments(**changes))


@pytest.mark.parametrize("name", ["entropy", "ranks"])
@pytest.mark.parametrize("function", [crosscut.token_statistics, crosscut.explain])
def test_flags(function, name):
    with refuses(TypeError, f"{name} must be True or False, got str"):
        function(**arguments(**{name: "no"}))


@pytest.mark.parametrize(
    "name", ["reduction", "label_smoothing", "z_loss", "softcap", "shift", "backend"]
)
def test_module_refuses_when_it_is_made(name):
    """Not at the first batch."""
    wrong: dict[str, Any] = {name: -1}
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be "):
        crosscut.LinearCrossEntropy(**wrong)


def test_a_deferred_head_refuses_when_it_is_made():
    backends = ", ".join(map(repr, ("auto", *NAMES)))
    with refuses(ValueError, f"backend must be one of {backends}, got 'cublas'"):
        crosscut.defer_logits(torch.nn.Linear(4, 5), backend="cublas")
    with refuses(ValueError, "min_numel must be >= 0, got -1"):
        crosscut.defer_logits(torch.nn.Linear(4, 5), min_numel=-1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("target", "wrong"),
    [
        ([0, 5, 1], "target[1] is 5"),
        ([-1, 0, 0], "target[0] is -1"),
        ([0, 2**40, 0], "target[1] is 1099511627776"),
        ([-100, 1, -101], "target[2] is -101"),
    ],
    ids=str,
)
def test_label_out_of_range(policy, target, wrong):
    message = f"{wrong}, out of range: classes must be in [0, 5), or ignore_index=-100"
    with refuses(IndexError, message):
        crosscut.linear_cross_entropy(**arguments(target=torch.tensor(target), policy=policy))
    with refuses(IndexError, message):
        crosscut.token_statistics(**arguments(target=torch.tensor(target), policy=policy))


def test_label_out_of_range_that_shift_leaves_out():
    """The first target of a sequence is predicted by nothing: it may be anything."""
    crosscut.linear_cross_entropy(**arguments(target=torch.tensor([99, 1, 2])), shift=1)
    message = "target[2] is 98, out of range: classes must be in [0, 5), or ignore_index=-1"
    with refuses(IndexError, message):
        crosscut.linear_cross_entropy(
            **arguments(target=torch.tensor([99, -1, 98])), shift=1, ignore_index=-1
        )


def test_where_a_label_is_out_of_range():
    """Of a single token, of several targets a token, and before any loss."""
    where = "out of range: classes must be in [0, 5), or ignore_index=-100"
    with refuses(IndexError, f"target is 7, {where}"):
        crosscut.linear_cross_entropy(**arguments(input=zeros(4), target=torch.tensor(7)))
    target = torch.tensor([[[9, 9], [0, 0]], [[9, 9], [0, -3]]])
    with refuses(IndexError, f"target[1, 1, 1] is -3, {where}"):
        crosscut.linear_log_probs(zeros(2, 2, 4), zeros(5, 4), target, shift=1)
    with refuses(IndexError, f"target[0] is 7, {where}"):
        crosscut.gradient_sparsity(**arguments(target=torch.tensor([7, 0, 8])))


@pytest.mark.parametrize("target", [[0, 7, 1], [0, -7, 1]], ids=str)
def test_ignore_index_may_be_out_of_range(target):
    found = crosscut.linear_cross_entropy(
        **arguments(target=torch.tensor(target)), ignore_index=target[1], reduction="none"
    )
    assert found[1] == 0
    assert (found[[0, 2]] > 1).all()


def test_a_dtype_no_backend_serves():
    low = torch.float8_e4m3fn
    blocks = "needs bfloat16, float16, float32 or float64, got torch.float8_e4m3fn"
    triton = "needs Triton, which is not installed"
    if find_spec("triton"):
        triton = "needs bfloat16, float16 or float32, got torch.float8_e4m3fn"
    refusal = "backend={!r} cannot serve this call: {}".format
    call = arguments(input=zeros(3, 4).to(low), linear_weight=zeros(5, 4).to(low))
    with refuses(ValueError, refusal("auto", f"triton: {triton}; blocks: {blocks}")):
        crosscut.linear_cross_entropy(**call)
    with refuses(ValueError, refusal("blocks", f"blocks: {blocks}")):
        crosscut.linear_cross_entropy(**call, backend="blocks")
    explanation = crosscut.explain(**call)
    assert explanation.backend is None
    assert explanation.verdicts == {"triton": triton, "blocks": blocks}


def test_workspace_limit():
    before = crosscut.workspace_limit()
    with refuses(ValueError, "num_bytes must be at least 1, got 0"):
        crosscut.set_workspace_limit(0)
    with refuses(TypeError, "num_bytes must be an int, got float"):
        crosscut.set_workspace_limit(1e9)  # pyright: ignore[reportArgumentType]
    with refuses(TypeError, "num_bytes must be an int, got bool"):
        crosscut.set_workspace_limit(True)
    assert crosscut.workspace_limit() == before


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("dtype", "policy", "reason"),
    [
        (torch.float64, "auto", "needs bfloat16, float16 or float32, got torch.float64"),
        (torch.float32, "filtered", "serves policy 'filtered' in bfloat16 and float16 only"),
    ],
    ids=["dtype", "policy"],
)
def test_what_triton_does_not_serve(dtype, policy, reason):
    call = arguments(input=zeros(3, 4).to(dtype), linear_weight=zeros(5, 4).to(dtype))
    with refuses(ValueError, f"backend='triton' cannot serve this call: triton: {reason}"):
        crosscut.linear_cross_entropy(**call, backend="triton", policy=policy)
    assert crosscut.explain(**call, policy=policy).backend == "blocks"


def test_positional_arguments_end_after_target():
    with pytest.raises(TypeError, match="takes 3 positional arguments but 4 were given"):
        crosscut.linear_cross_entropy(*arguments().values(), zeros(5))  # type: ignore[misc]


def test_paper_policies_have_no_sparsity_ahead():
    message = "policy must be 'auto', 'filtered' or 'exact' here, got 'cce_kahan'"
    with refuses(ValueError, message):
        crosscut.gradient_sparsity(**arguments(), policy="cce_kahan")


def test_autocast_lets_dtypes_differ():
    """What is an error otherwise is PyTorch's way under autocast."""
    mixed = arguments(linear_weight=zeros(5, 4, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert crosscut.linear_cross_entropy(**mixed).dtype == torch.float32


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "logit_scale"])
@pytest.mark.parametrize("function", [crosscut.linear_cross_entropy, crosscut.linear_log_probs])
def test_forward_mode(function, name):
    """A word of why, where silence would be a derivative of 0."""
    call = arguments(linear_bias=zeros(5), logit_scale=torch.ones(()))
    message = (
        f"crosscut has no forward-mode differentiation, and {name} has a tangent "
        "(torch.func.jvp, jacfwd): differentiate backwards"
    )

    def loss(value: Tensor) -> Tensor:
        return function(**call | {name: value}).sum()

    with refuses(RuntimeError, message):
        torch.func.jvp(loss, (call[name],), (torch.ones_like(call[name]),))
    with forward_ad.dual_level(), refuses(RuntimeError, message):
        loss(forward_ad.make_dual(call[name], torch.ones_like(call[name])))


def test_numbers_may_be_numpys():
    """What comes out of an array is as good as Python's own."""
    numpy = pytest.importorskip("numpy")
    torch.manual_seed(0)
    call = arguments(input=torch.randn(3, 4), linear_weight=torch.randn(5, 4))
    plain = {
        "ignore_index": 1, "shift": 1, "label_smoothing": 0.5, "z_loss": 0.25, "softcap": 2.0,
        "logit_scale": 0.75, "normalizer": 4,
    }  # fmt: skip
    kinds = {int: numpy.int32, float: numpy.float32}
    theirs = {name: kinds[type(value)](value) for name, value in plain.items()}
    found = crosscut.linear_cross_entropy(**call, **theirs)
    assert torch.equal(found, crosscut.linear_cross_entropy(**call, **plain))
    found = crosscut.linear_log_probs(**call, temperature=numpy.float16(0.5))
    assert torch.equal(found, crosscut.linear_log_probs(**call, temperature=0.5))
    with refuses(ValueError, "label_smoothing must be in [0, 1], got 1.5"):
        crosscut.linear_cross_entropy(**call, label_smoothing=numpy.float32(1.5))
    before = crosscut.workspace_limit()
    crosscut.set_workspace_limit(numpy.int64(before))
    assert type(crosscut.workspace_limit()) is int
