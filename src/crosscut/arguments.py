"""The arguments that public functions share: checked, in autocast's dtype, flat."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosscut import backends, tokens
from crosscut.backends.protocol import HeadProblem
from crosscut.options import HeadOptions, check_integer, check_positive, check_shift


def head_problem(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    options: HeadOptions,
    ignore_index: int,
    shift: int,
    *,
    several: bool = False,
) -> HeadProblem:
    """Checked, in autocast's dtype, and flat.

    Args:
        tensors: input, linear_weight, target and linear_bias.
        options: of the head.
        ignore_index: a target that takes no part.
        shift: how far a target is ahead of the input that predicts it.
        several: whether target may also be [..., K].
    """
    hidden, classifier, target, bias = tensors
    backends.check_name(options.backend)
    check_integer("ignore_index", ignore_index)
    check_shift(shift)
    _check_shapes(hidden, classifier, target, bias, several=several)
    if shift and hidden.dim() == 1:
        raise ValueError(f"shift={shift} needs a sequence: target must have at least 1 dimension")
    hidden, classifier = _autocast(hidden), _autocast(classifier)
    bias = None if bias is None else _autocast(bias)
    _check_dtypes(hidden, classifier, target, bias)

    num_classes = classifier.shape[0]
    hidden, labels = tokens.flatten(
        hidden, target, num_classes, ignore_index=ignore_index, shift=shift
    )
    return HeadProblem(
        hidden=hidden,
        classifier=classifier,
        bias=bias,
        labels=labels,
        logit_weight=None,
        options=options,
    )


def at_temperature(problem: HeadProblem, temperature: float) -> HeadProblem:
    """The problem whose logits are those of ``problem`` over ``temperature``."""
    check_positive("temperature", temperature)
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
    if not isinstance(token_weight, Tensor):
        raise TypeError(f"token_weight must be a Tensor or None, got {type(token_weight).__name__}")
    if token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight must have target's shape, {list(target.shape)}, "
            f"got {list(token_weight.shape)}"
        )
    if token_weight.is_complex():
        raise TypeError(f"token_weight must have a real dtype, got {token_weight.dtype}")
    if token_weight.device != problem.hidden.device:
        raise ValueError(
            f"token_weight is on {token_weight.device}, input is on {problem.hidden.device}: "
            "all must be on one device"
        )
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
    if isinstance(normalizer, float | int):
        check_positive("normalizer", normalizer)
        return normalizer
    if not isinstance(normalizer, Tensor):
        raise TypeError(
            f"normalizer must be a number or a tensor of one, got {type(normalizer).__name__}"
        )
    if normalizer.numel() != 1:
        raise ValueError(
            f"normalizer must be a number or a tensor of one, got shape {list(normalizer.shape)}"
        )
    return normalizer.reshape(()).to(dtype)


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


def _check_shapes(
    hidden: Tensor, classifier: Tensor, target: Tensor, bias: Tensor | None, *, several: bool
) -> None:
    named: dict[str, Any] = {"input": hidden, "linear_weight": classifier, "target": target}
    if bias is not None:
        named["linear_bias"] = bias
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if value.device != hidden.device:
            raise ValueError(
                f"{name} is on {value.device}, input is on {hidden.device}: "
                "all must be on one device"
            )
    if hidden.dim() == 0:
        raise ValueError("input must have shape [..., D], got a scalar")
    if classifier.dim() != 2:
        raise ValueError(f"linear_weight must have shape [V, D], got {list(classifier.shape)}")
    if 0 in classifier.shape:
        raise ValueError(
            f"linear_weight must have a class and a hidden dimension, got {list(classifier.shape)}"
        )
    if classifier.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"linear_weight has hidden size {classifier.shape[-1]}, input has "
            f"{hidden.shape[-1]}: their last dimensions must match"
        )
    if target.is_floating_point():
        raise TypeError(
            f"target must hold class indices, got {target.dtype}: class probabilities are not "
            "supported"
        )
    if several and target.dim() == hidden.dim():
        if target.shape[:-1] != hidden.shape[:-1] or not target.shape[-1]:
            raise ValueError(
                f"target must have shape {list(hidden.shape[:-1])}, or that and a last dimension "
                f"of at least 1 for several targets a token, got {list(target.shape)}"
            )
    elif target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target must have input's shape without its last dimension, "
            f"{list(hidden.shape[:-1])}, got {list(target.shape)}"
        )
    if bias is not None and bias.shape != classifier.shape[:1]:
        raise ValueError(
            f"linear_bias must have shape [{classifier.shape[0]}], one a class, "
            f"got {list(bias.shape)}"
        )


def _check_dtypes(hidden: Tensor, classifier: Tensor, target: Tensor, bias: Tensor | None) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"input must have a floating-point dtype, got {hidden.dtype}")
    for name, value in (("linear_weight", classifier), ("linear_bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}, input has {hidden.dtype}: cast one of them, or "
                "use torch.autocast"
            )
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target must be int64 or int32, got {target.dtype}")
