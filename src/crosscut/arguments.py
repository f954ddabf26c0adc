"""The arguments that public functions share: checked, in autocast's dtype, flat."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from crosscut import backends, ops, tokens
from crosscut.backends.protocol import HeadProblem, Statistics
from crosscut.custom_operator import eagerly
from crosscut.options import HeadOptions, check_integer, check_positive, check_shift
from crosscut.parallel.agreement import LocalHead, ParallelProblem, agree
from crosscut.parallel.operator import token_statistics as parallel_statistics
from crosscut.parallel.placement import (
    Vocabulary,
    is_spread,
    local_classes,
    local_tokens,
    spread_of_tokens,
    vocabulary_of,
)


class Names(NamedTuple):
    """What the caller calls the arguments of a head."""

    hidden: str = "input"
    classifier: str = "linear_weight"
    target: str = "target"
    bias: str = "linear_bias"
    scale: str = "logit_scale"


NAMES = Names()


def head_problem(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    options: HeadOptions,
    ignore_index: int,
    shift: int,
    *,
    scale: Tensor | float = 1.0,
    several: bool = False,
    names: Names = NAMES,
) -> HeadProblem:
    """Checked, in autocast's dtype, and flat.

    Args:
        tensors: input, linear_weight, target and linear_bias.
        options: of the head; with :func:`number_of_scale`.
        ignore_index: a target that takes no part.
        shift: how far a target is ahead of the input that predicts it.
        scale: logit_scale as it was given; a tensor scales the hidden states.
        several: whether target may also be [..., K].
        names: of the tensors.
    """
    backends.check_name(options.backend)
    ignore_index, shift = check_integer("ignore_index", ignore_index), check_shift(shift)
    vocabulary = vocabulary_of(tensors[1])

    def checked() -> LocalHead:
        local = tensors if vocabulary is None else _local(tensors, vocabulary, names)
        return _checked_head(
            local, scale, shift, several=several, in_shards=vocabulary is not None, names=names
        )

    if vocabulary is None:
        (hidden, classifier, target, bias), shard = checked(), None
    else:
        (hidden, classifier, target, bias), shard = eagerly(
            agree, vocabulary.group, checked, options
        )
    num_classes = len(classifier) if shard is None else shard.total
    hidden, labels = tokens.flatten(
        hidden, target, num_classes, ignore_index=ignore_index, shift=shift
    )
    problem = HeadProblem(
        hidden=hidden,
        classifier=classifier,
        bias=bias,
        labels=labels,
        logit_weight=None,
        options=options,
    )
    if vocabulary is None or shard is None:
        return problem
    return ParallelProblem(**vars(problem), shard=shard, group=vocabulary.group)


def _local(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None], vocabulary: Vocabulary, names: Names
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What of a head that spans devices is here."""
    hidden, classifier, target, bias = tensors
    spread = spread_of_tokens(hidden, vocabulary)
    return (
        local_tokens(hidden, spread),
        local_classes(classifier, names.classifier, vocabulary, spread),
        target,
        None if bias is None else local_classes(bias, names.bias, vocabulary, spread),
    )


def _checked_head(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    scale: Tensor | float,
    shift: int,
    *,
    several: bool,
    in_shards: bool,
    names: Names,
) -> LocalHead:
    """Plain tensors that fit together, in autocast's dtype."""
    hidden, classifier, target, bias = tensors
    given = {names.hidden: hidden, names.classifier: classifier, names.target: target}
    if bias is not None:
        given[names.bias] = bias
    if isinstance(scale, Tensor):
        given[names.scale] = scale
    check_tensors(given)
    _check_shapes(
        hidden, classifier, target, bias,
        several=several, may_be_empty=in_shards, names=names,
    )  # fmt: skip
    if shift and hidden.dim() == 1:
        raise ValueError(f"shift={shift} needs a sequence: target must have at least 1 dimension")
    if isinstance(scale, Tensor):
        hidden = _scaled(hidden, scale, names)
    hidden, classifier = _autocast(hidden), _autocast(classifier)
    bias = None if bias is None else _autocast(bias)
    _check_dtypes(hidden, classifier, target, bias, names)
    return LocalHead(hidden, classifier, target, bias)


def check_tensors(named: dict[str, Any]) -> None:
    """Raise unless all are plain dense tensors on the first one's device, and none is dual."""
    first, like = next(iter(named.items()))
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if is_spread(value):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor: a vocabulary that spans devices is "
                "for linear_cross_entropy, linear_log_probs and token_statistics, by the "
                "placement of their linear_weight"
            )
        if value.device != like.device:
            raise ValueError(
                f"{name} is on {value.device}, {first} is on {like.device}: "
                "all must be on one device"
            )
        if value.layout != torch.strided or value.is_nested:
            kind = "a nested tensor" if value.is_nested else str(value.layout)
            raise TypeError(f"{name} must be a dense tensor, got {kind}")
        if torch.compiler.is_compiling() or not value.is_floating_point():
            continue
        if forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"crosscut has no forward-mode differentiation, and {name} has a tangent "
                "(torch.func.jvp, jacfwd): differentiate backwards"
            )


def number_of_scale(scale: Tensor | float) -> float:
    """The number that the logits are scaled by: 1 where :func:`head_problem` scales ``hidden``."""
    return 1.0 if isinstance(scale, Tensor) else scale


def take_statistics(
    problem: HeadProblem,
    target: Tensor,
    ignore_index: int,
    shift: int = 0,
    *,
    for_backward: bool,
    name: str = "target",
) -> Statistics:
    """The statistics. Where a target is out of range, the error says which."""
    try:
        if isinstance(problem, ParallelProblem):
            return parallel_statistics(problem, for_backward=for_backward)
        return ops.token_statistics(problem, for_backward=for_backward)
    except IndexError:
        raise out_of_range(problem, target, ignore_index, shift, name) from None


def out_of_range(
    problem: HeadProblem, target: Tensor, ignore_index: int, shift: int, name: str = "target"
) -> IndexError:
    """The error of the first target that is no class; there must be one."""
    num_classes = problem.total_classes
    wrong = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if shift:  # the first ones may be anything
        wrong.narrow(target.dim() - problem.labels.dim(), 0, shift).fill_(False)
    place = wrong.nonzero()[0].tolist()
    return IndexError(
        f"{name}{place or ''} is {target[tuple(place)].item()}, out of range: classes must be in "
        f"[0, {num_classes}), or ignore_index={ignore_index}"
    )


def at_temperature(problem: HeadProblem, temperature: float) -> HeadProblem:
    """The problem whose logits are those of ``problem`` over ``temperature``."""
    temperature = check_positive("temperature", temperature)
    if temperature == 1:
        return problem
    softcap = problem.options.softcap
    options = replace(
        problem.options,
        softcap=None if softcap is None else softcap / temperature,
        logit_scale=problem.options.logit_scale / temperature,
    )
    bias = problem.bias
    if bias is not None:
        bias = bias.to(problem.statistics_dtype) / temperature  # in its own it would be rounded
    return replace(problem, bias=bias, options=options)


def flat_token_weight(
    token_weight: Tensor, target: Tensor, problem: HeadProblem, shift: int
) -> Tensor:
    """Weight of each row [N] in the dtype of the statistics, 0 where the target is ignored."""
    check_tensors({"input": problem.hidden, "token_weight": token_weight})
    if token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight must have target's shape, {list(target.shape)}, "
            f"got {list(token_weight.shape)}"
        )
    if token_weight.is_complex():
        raise TypeError(f"token_weight must have a real dtype, got {token_weight.dtype}")
    if shift:
        token_weight = tokens.align(token_weight, shift, axis=target.dim() - 1, fill=0)
    token_weight = token_weight.reshape(-1).to(problem.statistics_dtype)
    return torch.where(problem.labels >= 0, token_weight, 0)


def checked_normalizer(
    normalizer: Tensor | float, reduction: str, dtype: torch.dtype
) -> Tensor | float:
    """A number, or a scalar of the dtype."""
    if reduction != "mean":
        raise ValueError(f"normalizer needs reduction='mean', got reduction={reduction!r}")
    if isinstance(normalizer, (int, float, Real)):
        return check_positive("normalizer", normalizer)
    if not isinstance(normalizer, Tensor):
        raise TypeError(
            f"normalizer must be a number or a tensor of one, got {type(normalizer).__name__}"
        )
    if normalizer.is_complex() or normalizer.dtype == torch.bool:
        raise TypeError(f"normalizer must be a number, got a tensor of {normalizer.dtype}")
    if normalizer.numel() != 1:
        raise ValueError(
            f"normalizer must be a number or a tensor of one, got shape {list(normalizer.shape)}"
        )
    if readable(normalizer):
        check_positive("normalizer", normalizer.item())
    return normalizer.reshape(()).to(dtype)


def readable(values: Tensor) -> bool:
    """Whether they are there, and looking at them costs no synchronisation."""
    plain = type(values) in (Tensor, torch.nn.Parameter)
    return plain and values.device.type == "cpu" and not torch.compiler.is_compiling()


def wants_gradient(problem: HeadProblem) -> bool:
    """Whether a backward may follow."""
    inputs = (problem.hidden, problem.classifier, problem.bias)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _autocast(value: Tensor) -> Tensor:
    """What ``F.linear`` would cast its arguments to under autocast."""
    device = value.device.type
    if device == "meta" or value.dtype == torch.float64 or not value.is_floating_point():
        return value
    if not torch.is_autocast_enabled(device):
        return value
    return value.to(torch.get_autocast_dtype(device))


def _scaled(hidden: Tensor, scale: Tensor, names: Names) -> Tensor:
    """``scale * hidden``, differentiable in both, rounded once."""
    if scale.numel() != 1:
        raise ValueError(
            f"{names.scale} must be a number or a tensor of one, got shape {list(scale.shape)}"
        )
    if not scale.is_floating_point():
        raise TypeError(
            f"{names.scale} must be a number or a floating-point tensor, got {scale.dtype}"
        )
    if not hidden.is_floating_point():
        return hidden  # an error of its own
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) * scale.reshape(()).to(wide)).to(hidden.dtype)


def _check_shapes(
    hidden: Tensor,
    classifier: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    several: bool,
    may_be_empty: bool,
    names: Names,
) -> None:
    if hidden.dim() == 0:
        raise ValueError(f"{names.hidden} must have shape [..., D], got a scalar")
    if classifier.dim() != 2:
        raise ValueError(f"{names.classifier} must have shape [V, D], got {list(classifier.shape)}")
    if 0 in classifier.shape and not may_be_empty:
        raise ValueError(
            f"{names.classifier} must have a class and a hidden dimension, "
            f"got {list(classifier.shape)}"
        )
    if classifier.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"{names.classifier} has hidden size {classifier.shape[-1]}, {names.hidden} has "
            f"{hidden.shape[-1]}: their last dimensions must match"
        )
    if target.is_floating_point():
        raise TypeError(
            f"{names.target} must hold class indices, got {target.dtype}: class probabilities are "
            "not supported"
        )
    batch = list(hidden.shape[:-1])
    if several and target.dim() == hidden.dim():
        if target.shape[:-1] != hidden.shape[:-1] or not target.shape[-1]:
            raise ValueError(
                f"{names.target} must have shape {batch}, or that and a last dimension "
                f"of at least 1 for several targets a token, got {list(target.shape)}"
            )
    elif target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{names.target} must have {names.hidden}'s shape without its last dimension, "
            f"{batch}, got {list(target.shape)}"
        )
    if bias is not None and bias.shape != classifier.shape[:1]:
        raise ValueError(
            f"{names.bias} must have shape [{classifier.shape[0]}], one a class, "
            f"got {list(bias.shape)}"
        )


def _check_dtypes(
    hidden: Tensor, classifier: Tensor, target: Tensor, bias: Tensor | None, names: Names
) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"{names.hidden} must have a floating-point dtype, got {hidden.dtype}")
    for name, value in ((names.classifier, classifier), (names.bias, bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}, {names.hidden} has {hidden.dtype}: cast one of "
                "them, or use torch.autocast"
            )
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{names.target} must be int64 or int32, got {target.dtype}")
