"""The loss as a module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.judging import make_head, outcome, pairs

import crosscut

OPTIONS = {
    "reduction": "sum",
    "ignore_index": 3,
    "label_smoothing": 0.1,
    "shift": 1,
    "softcap": 5.0,
    "logit_scale": 0.5,
    "z_loss": 1e-3,
    "policy": "filtered",
    "backend": "blocks",
}


@pytest.mark.parametrize("options", [{}, OPTIONS, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_same_as_the_function(options, weighted, bias):
    head = make_head(((3, 7), 5, 20), torch.float32, bias=bias)
    weight = head.class_weight if weighted else None
    module = crosscut.LinearCrossEntropy(weight=weight, **options)
    ours = outcome(module, head)
    theirs = outcome(crosscut.linear_cross_entropy, head, weight=weight, **options)
    for name, value, expected in pairs(ours, theirs):
        assert torch.equal(value, expected), name


def test_bias_is_the_fourth_argument():
    head = make_head((7, 5, 20), bias=True)
    module = crosscut.LinearCrossEntropy()
    by_position = module(head.input, head.linear_weight, head.target, head.linear_bias)
    by_name = crosscut.linear_cross_entropy(
        head.input, head.linear_weight, head.target, linear_bias=head.linear_bias
    )
    assert torch.equal(by_position, by_name)


def test_a_learned_scale_comes_with_the_call():
    head = make_head((7, 5, 20), torch.float32)
    tensors = (head.input, head.linear_weight, head.target)
    scale = torch.nn.Parameter(torch.tensor(0.7))
    found = crosscut.LinearCrossEntropy(logit_scale=0.1)(*tensors, logit_scale=scale)
    assert torch.equal(found, crosscut.linear_cross_entropy(*tensors, logit_scale=scale))
    (grad,) = torch.autograd.grad(found, scale)
    assert grad
    with pytest.raises(TypeError, match="logit_scale must be a finite number, got Parameter"):
        crosscut.LinearCrossEntropy(logit_scale=scale)  # pyright: ignore[reportArgumentType]


def test_repr_says_what_was_chosen():
    assert repr(crosscut.LinearCrossEntropy()) == "LinearCrossEntropy()"
    chosen = crosscut.LinearCrossEntropy(shift=1, softcap=30.0, policy="exact")
    assert repr(chosen) == "LinearCrossEntropy(softcap=30.0, policy='exact', shift=1)"


def test_holds_no_parameter_and_no_state():
    module = crosscut.LinearCrossEntropy(weight=torch.ones(20))
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    module.load_state_dict({})
    assert crosscut.LinearCrossEntropy().weight is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_class_weight_moves_with_the_module(dtype):
    weight = torch.rand(20)
    module = crosscut.LinearCrossEntropy(weight=weight).to(dtype)
    assert module.weight is not None
    assert torch.equal(module.weight, weight.to(dtype))
    assert weight.dtype == torch.float32  # the caller's tensor is left alone
    on_meta = module.to("meta")
    assert on_meta.weight is not None
    assert on_meta.weight.is_meta


def test_class_weight_is_not_aliased_into_the_loss():
    """Class weights in float32 serve bfloat16 inputs, as they do a module that was cast."""
    head = make_head((9, 5, 20), torch.bfloat16)
    module = crosscut.LinearCrossEntropy(weight=head.class_weight)
    loss = module(head.input, head.linear_weight, head.target)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies(way):
    head = make_head(((3, 7), 5, 20), torch.float32)
    module = crosscut.LinearCrossEntropy(weight=head.class_weight, **OPTIONS)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(module))
    elif way == "deepcopy":
        again = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert repr(again) == repr(module)
    for name, value, expected in pairs(outcome(again, head), outcome(module, head)):
        assert torch.equal(value, expected), name
