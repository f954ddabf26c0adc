"""The public functions: check the arguments, flatten the batch, take statistics, make a loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosscut import backends, ops, statistics, tokens
from crosscut.backends import Explanation
from crosscut.backends.protocol import HeadProblem
from crosscut.options import (
    GradientPolicy,
    HeadOptions,
    LossOptions,
    Reduction,
    check_integer,
    check_shift,
)
from crosscut.statistics import TokenStatistics


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of a linear head, without its logits ever being stored.

    Equals ``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)``, with the
    arguments of :func:`torch.nn.functional.linear_cross_entropy` and a few more. The method is
    Cut Cross-Entropy (arXiv:2411.09009); memory beyond the gradients is O(N + V) for N tokens and
    V classes, plus a workspace of fixed size.

    Args:
        input: hidden states ``[..., D]`` of any float dtype.
        linear_weight: the head's weight ``[V, D]``, of the same dtype.
        target: classes in ``[0, V)`` or ``ignore_index``, integer ``[...]``.
        linear_bias: the head's bias ``[V]``, of the same dtype.
        weight: class weights ``[V]``, as in :class:`torch.nn.CrossEntropyLoss`.
        reduction: ``"mean"`` over the targets kept (weighted by ``weight``), ``"sum"``, or
            ``"none"`` for the shape of ``target``.
        ignore_index: a target of this value takes no part and costs no time.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        shift: predict ``target[..., t + shift]`` from ``input[..., t, :]``: 1 for a causal
            language model whose labels are its input ids. The first ``shift`` targets of each
            sequence are ignored.
        softcap: logits become ``softcap * tanh(logits / softcap)``, as in Gemma 2.
        logit_scale: factor of ``input @ linear_weight.T``, as in Cohere's and Granite's models.
        z_loss: adds ``z_loss * lse**2`` to each token's loss (PaLM, arXiv:2204.02311, section 5).
        policy: how much of the softmax the gradient computes. See
            :data:`crosscut.GradientPolicy`.
        backend: ``"auto"``, or the name of one that must serve this call. See
            :func:`crosscut.explain`.

    Returns:
        The loss in nats, float32 (float64 for float64 inputs): a scalar, or ``[...]``.

    Raises:
        ValueError: a shape, a device or an option does not fit.
        TypeError: a dtype or the type of an option does not fit.
        IndexError: a target is out of range (checked on the CPU; on a GPU it is undefined, as
            looking would stall it).

    Note:
        Gradients come in the inputs' dtypes. Differentiating them again raises RuntimeError.
    """
    options = LossOptions(
        softcap=softcap,
        logit_scale=logit_scale,
        policy=policy,
        backend=backend,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        shift=shift,
        z_loss=z_loss,
    )
    problem = _problem((input, linear_weight, target, linear_bias), options, ignore_index, shift)
    if weight is not None:
        weight = _checked_class_weight(weight, problem)
    if label_smoothing:
        ones = problem.classifier.new_ones(len(linear_weight), dtype=problem.statistics_dtype)
        smoothing_weight = (ones if weight is None else weight) / len(linear_weight)
        problem = replace(problem, logit_weight=smoothing_weight)

    found = ops.token_statistics(problem, for_backward=_wants_gradient(problem))
    loss = statistics.cross_entropy(
        TokenStatistics(lse=found.lse, target_logit=found.target_logit),
        found.logit_sum if label_smoothing else None,
        problem.labels,
        weight,
        options,
    )
    if reduction == "none":
        return tokens.unflatten(loss, target.shape, shift=shift)
    return statistics.reduce(loss, problem.labels, weight, reduction)


def token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> TokenStatistics:
    """Log-sum-exp and target logit of each token, differentiable, in the shape of ``target``.

    Build any loss of the target's log-probability from them. Arguments and errors are those of
    :func:`linear_cross_entropy`. With ``shift`` a token's statistics stand where its target
    stands.

    Returns:
        Float32 (float64 for float64 inputs); 0, without gradient, where the target is ignored.
    """
    options = HeadOptions(softcap=softcap, logit_scale=logit_scale, policy=policy, backend=backend)
    problem = _problem((input, linear_weight, target, linear_bias), options, ignore_index, shift)
    found = ops.token_statistics(problem, for_backward=_wants_gradient(problem))
    return TokenStatistics(
        lse=tokens.unflatten(found.lse, target.shape, shift=shift),
        target_logit=tokens.unflatten(found.target_logit, target.shape, shift=shift),
    )


@dataclass(frozen=True, kw_only=True)
class GradientSparsity:
    """What a gradient would leave out.

    Attributes:
        kept: share of the (token, class) pairs that the backward computes, in [0, 1].
        tail: mean softmax mass of a token in the pairs it does not, in [0, 1]: what the rank-one
            correction stands for.
    """

    kept: float
    tail: float


def gradient_sparsity(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> GradientSparsity:
    """How sparse the gradient of this very call would be. Costs a forward.

    Arguments and errors are those of :func:`linear_cross_entropy`. The paper's ``"cce"`` policies
    decide in the backward: for them, ValueError.
    """
    options = HeadOptions(softcap=softcap, logit_scale=logit_scale, policy=policy, backend=backend)
    if policy.startswith("cce"):
        raise ValueError(f"policy must be 'auto', 'filtered' or 'exact' here, got {policy!r}")
    problem = _problem((input, linear_weight, target, linear_bias), options, ignore_index, shift)
    with torch.no_grad():
        found = ops.token_statistics(problem, for_backward=True)
    kept, tail = backends.choose(problem).sparsity(problem, found)
    return GradientSparsity(kept=kept, tail=tail)


def explain(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> Explanation:
    """Which backend would run this call, and why not the others. Reads no values.

    Arguments and errors are those of :func:`linear_cross_entropy`; tensors on the ``meta`` device
    will do.
    """
    options = HeadOptions(softcap=softcap, logit_scale=logit_scale, policy=policy, backend=backend)
    return backends.explain(
        _problem((input, linear_weight, target, linear_bias), options, ignore_index=-100, shift=0)
    )


def _problem(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    options: HeadOptions,
    ignore_index: int,
    shift: int,
) -> HeadProblem:
    """Checked, in autocast's dtype, and flat."""
    hidden, classifier, target, bias = tensors
    backends.check_name(options.backend)
    check_integer("ignore_index", ignore_index)
    check_shift(shift)
    _check_shapes(hidden, classifier, target, bias)
    if shift and target.dim() == 0:
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


def _wants_gradient(problem: HeadProblem) -> bool:
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


def _check_shapes(hidden: Tensor, classifier: Tensor, target: Tensor, bias: Tensor | None) -> None:
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
    if target.shape != hidden.shape[:-1]:
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


def _checked_class_weight(weight: Tensor, problem: HeadProblem) -> Tensor:
    """Class weights [V] in the dtype of the statistics."""
    num_classes = problem.classifier.shape[0]
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor or None, got {type(weight).__name__}")
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight must have shape [{num_classes}], one a class, got {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"weight must have a floating-point dtype, got {weight.dtype}")
    if weight.device != problem.hidden.device:
        raise ValueError(
            f"weight is on {weight.device}, input is on {problem.hidden.device}: "
            "all must be on one device"
        )
    return weight.detach().to(problem.statistics_dtype)
