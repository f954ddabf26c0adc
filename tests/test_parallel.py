"""A head whose classes are spread over processes comes to what one process computes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.judging import FACTOR, Head, cotangents, error, make_head, rounding, truth

import crosscut

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch without torch.distributed"
)

N, D, V = 30, 16, 132
UNEVEN = {2: (31, 101), 4: (33, 1, 70, 28)}


def split(world: int, how: str) -> tuple[int, ...]:
    """Classes of each rank: DTensor's even chunks, or what a caller holds."""
    return UNEVEN[world] if how == "shards" else (V // world,) * world


def case(head: Head, how: str = "shards", **options: Any) -> dict[str, Any]:
    function = options.pop("function", "linear_cross_entropy")
    return {"head": head, "how": how, "function": function, "options": options}


def confident(dtype: torch.dtype) -> Head:
    """Tokens whose target has nearly all of the mass."""
    head = make_head((N, D, V), dtype)
    rows = head.linear_weight[head.target]
    return replace(head, input=(rows * 14 / rows.square().sum(1, keepdim=True).sqrt()).to(dtype))


def cases() -> dict[str, dict[str, Any]]:
    """By name."""
    single = make_head((N, D, V), torch.float32, bias=True, ignored=0.3)
    double = make_head((N, D, V), torch.float64, bias=True, ignored=0.3)
    low = make_head((64, D, V), torch.bfloat16, ignored=0.2)
    batch = make_head(((3, 10), D, V), torch.float64, ignored=0.1)
    one_rank = replace(double, target=double.target.clamp_max(20))
    several = replace(double, target=torch.randint(V, (N, 3), generator=torch.manual_seed(1)))
    several.target[torch.rand(N, 3, generator=torch.manual_seed(2)) < 0.3] = -100
    everything: dict[str, Any] = {
        "softcap": 3.0, "logit_scale": 0.7, "z_loss": 1e-2, "label_smoothing": 0.2,
    }  # fmt: skip
    everything["weight"] = double.class_weight
    return {
        "float64": case(double),
        "float32": case(single),
        "bfloat16": case(low),
        "bfloat16, filtered": case(low, policy="filtered"),
        "bfloat16, exact": case(low, policy="exact"),
        "everything": case(double, **everything),
        "everything, float32": case(single, **everything),
        "everything, DTensor": case(double, "DTensor", **everything),
        "DTensor, bfloat16": case(low, "DTensor"),
        "tokens in shards, too": case(double, "sequence", label_smoothing=0.1),
        "one loss per token": case(double, reduction="none"),
        "sum": case(double, reduction="sum"),
        "normalizer": case(double, normalizer=100.0),
        "shift": case(batch, shift=1),
        "token weight": case(batch, token_weight=torch.rand(3, 10, generator=torch.manual_seed(3))),
        "labels of one rank": case(one_rank),
        "no labels": case(replace(double, target=torch.full((N,), -100)), reduction="sum"),
        "confident": case(confident(torch.float32)),
        "log-probabilities": case(double, function="linear_log_probs", temperature=0.8),
        "several targets": case(several, function="linear_log_probs"),
        "statistics": case(double, function="token_statistics", entropy=True),
        "statistics, float32": case(single, function="token_statistics", entropy=True),
        "ranks": case(single, function="token_statistics", ranks=True),
    }


CASES = cases()
REFERENCES: dict[str, Callable[..., Any]] = {
    "linear_cross_entropy": reference.linear_cross_entropy,
    "linear_log_probs": crosscut.linear_log_probs,
    "token_statistics": crosscut.token_statistics,
}


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All cases on so many ranks: starting them is what takes the time."""
    world: int = request.param
    folder = tmp_path_factory.mktemp(f"ranks{world}")
    given = {
        name: {**each, "sizes": split(world, each["how"]), "cotangent": cotangents}
        for name, each in CASES.items()
    }
    for name in ("float32", "bfloat16, filtered", "DTensor, bfloat16", "statistics, float32"):
        given[name]["twice"] = True
    for kind in ("refused", "compiled"):
        given[kind] = {"kind": kind, "head": CASES["float32"]["head"]}
    for wrong in ("hidden size", "number of tokens", "targets"):
        given[wrong] = {"kind": "wrong on one", "wrong": wrong, "head": CASES["float32"]["head"]}
    given["ties"] = {**given["ranks"], "head": tied()}
    padded = {2: (V, 0), 4: (100, 32, 0, 0)}[world]  # what is left of chunks of a padded one
    given["padding"] = {**given["everything"], "sizes": padded}
    if world == 4:
        head = CASES["float64"]["head"]
        given["two dimensions"] = {
            "kind": "two dimensions",
            "head": replace(head, linear_bias=None),
            "options": {"reduction": "sum"},
        }
    torch.save(given, folder / "cases.pt")
    programs = Path(__file__).parent / "programs"
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}",
         "--standalone", str(programs / "parallel_ranks.py"), str(folder / "cases.pt"),
         str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join([str(programs.parent), *sys.path])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-5000:]
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: whole([of_rank[name] for of_rank in ranks]) for name in given}


def whole(ranks: list[Any]) -> Any:
    """What all ranks found: the same, to the last bit, or a part each."""
    if isinstance(ranks[0], str | list):
        return ranks
    result = {}
    for name, value in ranks[0].items():
        values = [of_rank[name] for of_rank in ranks]
        if name.endswith("[rank]"):
            result[name.removesuffix("[rank]")] = torch.cat(values)
            continue
        assert all(torch.equal(value, other) for other in values), f"{name} differs by rank"
        result[name] = value
    return result


def tied() -> Head:
    """Whole numbers, whose logits are exact: many are equal, on different ranks."""
    head = CASES["float32"]["head"]
    input, weight = head.input.round(), head.linear_weight.round()
    weight[V // 2 :] = weight[: V // 2]
    return replace(head, input=input, linear_weight=weight, linear_bias=None)


def alone(function: Callable[..., Any], head: Head, **options: Any) -> dict[str, torch.Tensor]:
    """What a function returns in one process, and gradients."""
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in (
            ("input", head.input), ("weight", head.linear_weight), ("bias", head.linear_bias),
        )
        if value is not None
    }  # fmt: skip
    result = function(
        leaves["input"], leaves["weight"], head.target, linear_bias=leaves.get("bias"), **options
    )
    named = {"loss": result} if isinstance(result, torch.Tensor) else vars(result)
    named = {name: value for name, value in named.items() if value is not None}
    differentiable = [value for value in named.values() if value.is_floating_point()]
    torch.autograd.backward(differentiable, [cotangents(value) for value in differentiable])
    return {
        **{name: value.detach() for name, value in named.items()},
        **{f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None},
    }


def judge(values: dict[str, torch.Tensor], head: Head, function: str, options: Any) -> None:
    """Each value's error is that of one process in the same dtype, PyTorch where it has it."""
    theirs = REFERENCES[function]
    if {"normalizer", "token_weight"} & set(options):  # the reference has none
        theirs = crosscut.linear_cross_entropy
    if theirs is reference.linear_cross_entropy:
        options = {name: value for name, value in options.items() if name != "policy"}
    exact = alone(theirs, head.double(), **options)
    same = alone(theirs, head, **options)
    assert set(values) == set(exact)
    for name, value in values.items():
        assert value.shape == exact[name].shape, name
        if not value.is_floating_point():
            assert torch.equal(value, same[name]), name
            continue
        allowed = FACTOR * error(same[name], exact[name]) + rounding(value.dtype)
        assert error(value, exact[name]) <= allowed, name


@pytest.mark.parametrize("name", CASES)
def test_shards_come_to_the_whole(name, found):
    given = CASES[name]
    judge(found[name], given["head"], given["function"], given["options"])


def test_padding_and_ranks_without_a_class(found):
    given = CASES["everything"]
    judge(found["padding"], given["head"], given["function"], given["options"])


def test_of_equal_logits_the_first_class_wins_on_whichever_rank(found):
    same = alone(crosscut.token_statistics, tied(), ranks=True)
    for name in ("argmax", "target_rank"):
        assert torch.equal(found["ties"][name], same[name]), name


def test_tokens_over_another_dimension_of_the_mesh(found):
    if "two dimensions" not in found:
        pytest.skip("needs four ranks")
    head = replace(CASES["float64"]["head"], linear_bias=None)
    exact = truth(head, reduction="sum")
    for name in ("loss", "d_input", "d_weight"):
        off = error(found["two dimensions"][name], getattr(exact, name))
        assert off <= rounding(torch.float64), name


def test_what_does_not_fit_on_one_rank_ends_all(found):
    """The last rank raises its own error, and the others name it."""
    *others, last = found["hidden size"]
    assert last.startswith("ValueError: linear_weight has hidden size 15, input has 16")
    for other in others:
        assert other.startswith("RuntimeError: another process of the head's group raised: rank ")
        assert last in other
    for raised in found["number of tokens"]:
        assert raised.startswith("ValueError: the number of tokens of input must be the same on")


def test_other_targets_on_one_rank_are_no_loss(found):
    """As where FSDP has sharded a weight, and each rank has tokens of its own."""
    for raised in found["targets"]:
        assert raised.startswith("ValueError: target must be the same on all ranks")


def test_functions_that_know_of_no_shards_say_so(found):
    for of_rank in found["refused"]:
        for raised in of_rank:
            assert raised.startswith("TypeError: ")
            assert "must be a plain tensor, got a DTensor" in raised


def test_a_compiled_call_is_the_eager_one(found):
    assert not any(value.any() for value in found["compiled"].values())
