"""The public functions: check the arguments, flatten the batch, take statistics, make a loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosscut import backends, statistics, tokens
from crosscut.arguments import (
    at_temperature,
    check_tensors,
    checked_normalizer,
    flat_token_weight,
    head_problem,
    number_of_scale,
    take_statistics,
    wants_gradient,
)
from crosscut.backends import Explanation
from crosscut.backends.protocol import HeadProblem, Statistics
from crosscut.options import GradientPolicy, HeadOptions, LossOptions, Reduction, check_flag
from crosscut.parallel.placement import local_target
from crosscut.statistics import TokenStatistics


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: Tensor | float = 1.0,
    z_loss: float = 0.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of a linear head, without its logits ever being stored.

    Equals ``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)``, with the
    arguments of :func:`torch.nn.functional.linear_cross_entropy` and a few more. The method is
    Cut Cross-Entropy (arXiv:2411.09009); memory beyond the gradients is O(N + V) for N tokens and
    V classes, plus a workspace of fixed size. Of what PyTorch's function takes, two things are
    errors here: a target of class probabilities, and a head of more than two dimensions.

    Args:
        input: hidden states ``[..., D]`` of any float dtype.
        linear_weight: the head's weight ``[V, D]``, of the same dtype. Where its classes are spread
            over processes, a ``DTensor`` with placement ``Shard(0)``, or what
            :func:`crosscut.parallel.vocab_shard` makes of a plain tensor; see docs/parallel.md.
        target: classes in ``[0, V)`` or ``ignore_index``, integer ``[...]``.
        linear_bias: the head's bias ``[V]``, of the same dtype.
        weight: class weights ``[V]``, as in :class:`torch.nn.CrossEntropyLoss`.
        reduction: ``"mean"`` over the targets kept (weighted by ``weight`` and ``token_weight``),
            ``"sum"``, or ``"none"`` for the shape of ``target``.
        ignore_index: a target of this value takes no part and costs no time. None is -100.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        options: a :class:`torch.nn.LinearCrossEntropyOptions`, or None. It says how PyTorch's
            function cuts the logits into chunks, and changes nothing here.
        token_weight: a factor of each token's loss, ``[...]`` as ``target``, differentiable. What
            it says of an ignored target is not looked at.
        normalizer: what ``"mean"`` divides the sum by, in place of the number of targets kept (or
            their summed weights): a positive number, or a tensor of one. With gradient
            accumulation or data parallelism the number of tokens of the whole batch, so that
            every token counts the same, wherever it is.
        shift: predict ``target[..., t + shift]`` from ``input[..., t, :]``: 1 for a causal
            language model whose labels are its input ids. The first ``shift`` targets of each
            sequence are ignored.
        softcap: logits become ``softcap * tanh(logits / softcap)``, as in Gemma 2.
        logit_scale: factor of ``input @ linear_weight.T``, as in Cohere's and Granite's models: a
            number, or a floating-point tensor of one, which may be learned (CLIP, muP). With a
            tensor the hidden states are multiplied by it first, in float32 at least: a copy of
            them is made, and its gradient comes from theirs.
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
        IndexError: a target is out of range, on the CPU. On a GPU it fails an assertion on the
            device, as in PyTorch: a later call raises, and the process can use the GPU no more.
        RuntimeError: a tensor has a tangent, as under ``torch.func.jvp``.

    Note:
        Gradients come in the inputs' dtypes. Differentiating them again raises RuntimeError.
    """
    target = local_target(target, linear_weight)
    call = _loss_call(
        (input, linear_weight, target, linear_bias, logit_scale),
        LossOptions(
            softcap=softcap,
            logit_scale=number_of_scale(logit_scale),
            policy=policy,
            backend=backend,
            reduction=reduction,
            ignore_index=-100 if ignore_index is None else ignore_index,
            label_smoothing=label_smoothing,
            shift=shift,
            z_loss=z_loss,
        ),
        (weight, token_weight, normalizer),
        options,
    )
    problem, asked, weight = call.problem, call.options, call.weight
    found = take_statistics(
        problem, target, asked.ignore_index, asked.shift, for_backward=wants_gradient(problem)
    )
    loss = statistics.cross_entropy(
        TokenStatistics(lse=found.lse, target_logit=found.target_logit, log_prob=found.log_prob),
        found.logit_sum if asked.label_smoothing else None,
        problem.labels,
        weight,
        asked,
    )
    if call.token_weight is not None:
        loss = loss * call.token_weight
    if reduction == "none":
        return tokens.unflatten(loss, target.shape, shift=asked.shift)
    if reduction == "sum":
        return loss.sum()
    divisor = call.normalizer
    if divisor is None:
        divisor = statistics.total_weight(problem.labels, weight, call.token_weight)
    return statistics.mean(loss, divisor)


def token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: Tensor | float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    ranks: bool = False,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> TokenStatistics:
    """What the softmax says of each token, differentiable, in the shape of ``target``.

    Build any loss of the target's log-probability from it. Arguments and errors are those of
    :func:`linear_cross_entropy`, and three more:

    - ``temperature``, a positive number, divides the logits, also in ``lse`` and ``target_logit``.
    - ``entropy=True`` adds the entropy of the softmax. Its gradient is exact under every policy:
      ``p log p`` is large where p no longer is, so no column is left out where it has one. An
      entropy that is only looked at costs the backward nothing.
    - ``ranks=True`` adds the predicted class and the rank of the target, with no further matmul.

    With ``shift`` a token's statistics stand where its target stands.

    Returns:
        Float32 (float64 for float64 inputs); 0, without gradient, where the target is ignored.
    """
    target = local_target(target, linear_weight)
    scale = number_of_scale(logit_scale)
    options = HeadOptions(softcap=softcap, logit_scale=scale, policy=policy, backend=backend)
    problem = head_problem(
        (input, linear_weight, target, linear_bias),
        options,
        ignore_index,
        shift,
        scale=logit_scale,
    )
    problem = replace(
        at_temperature(problem, temperature),
        entropy=check_flag("entropy", entropy),
        ranks=check_flag("ranks", ranks),
    )
    found = take_statistics(
        problem, target, ignore_index, shift, for_backward=wants_gradient(problem)
    )

    def shaped(values: Tensor, ignored: int = 0) -> Tensor:
        if ignored:
            values = torch.where(problem.labels >= 0, values, ignored)
        return tokens.unflatten(values, target.shape, shift=shift, fill=ignored)

    return TokenStatistics(
        lse=shaped(found.lse),
        target_logit=shaped(found.target_logit),
        log_prob=shaped(found.log_prob),
        entropy=shaped(found.entropy) if entropy else None,
        argmax=shaped(found.argmax, -1) if ranks else None,
        target_rank=shaped(found.target_rank, problem.total_classes) if ranks else None,
    )


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: Tensor | float = 1.0,
    temperature: float = 1.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each target, differentiable; under ``no_grad`` at the cost of a forward.

    Equals ``log_softmax(linear(input, linear_weight, linear_bias) / temperature, -1)`` at the
    targets. Losses on log-probabilities, of policies and of preferences, are in
    :mod:`crosscut.losses`. Arguments and errors are those of :func:`linear_cross_entropy`, but
    ``temperature``, a positive number, divides the logits, and ``target`` may also be ``[..., K]``:
    K targets a token, in one sweep over the classes. Each of them may be ``ignore_index``, and a
    class may come more than once.

    Returns:
        Nats in the shape of ``target``, float32 (float64 for float64 inputs); 0, without
        gradient, where the target is ignored.
    """
    target = local_target(target, linear_weight)
    scale = number_of_scale(logit_scale)
    options = HeadOptions(softcap=softcap, logit_scale=scale, policy=policy, backend=backend)
    problem = head_problem(
        (input, linear_weight, target, linear_bias),
        options,
        ignore_index,
        shift,
        scale=logit_scale,
        several=True,
    )
    problem = at_temperature(problem, temperature)
    found = take_statistics(
        problem, target, ignore_index, shift, for_backward=wants_gradient(problem)
    )
    log_prob = log_probs_of(problem, found)
    return tokens.unflatten(log_prob, target.shape[: input.dim() - 1], shift=shift)


def log_probs_of(problem: HeadProblem, found: Statistics) -> Tensor:
    """Log-probabilities of the labels, in their shape, 0 where there is none."""
    return torch.where(problem.labels >= 0, found.log_prob, 0)


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
    logit_scale: Tensor | float = 1.0,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> GradientSparsity:
    """How sparse the gradient of this very call would be. Costs a forward.

    Arguments and errors are those of :func:`linear_cross_entropy`. The paper's ``"cce"`` policies
    decide in the backward: for them, ValueError.
    """
    target = local_target(target, linear_weight)
    scale = number_of_scale(logit_scale)
    options = HeadOptions(softcap=softcap, logit_scale=scale, policy=policy, backend=backend)
    if options.paper_filter is not None:
        raise ValueError(f"policy must be 'auto', 'filtered' or 'exact' here, got {policy!r}")
    problem = head_problem(
        (input, linear_weight, target, linear_bias),
        options,
        ignore_index,
        shift,
        scale=logit_scale,
    )
    with torch.no_grad():
        found = take_statistics(problem, target, ignore_index, shift, for_backward=True)
    kept, tail = backends.choose(problem).sparsity(problem, found)
    return GradientSparsity(kept=kept, tail=tail)


def explain(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: Any = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: Tensor | float = 1.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    entropy: bool = False,
    ranks: bool = False,
    policy: GradientPolicy = "auto",
    backend: str = "auto",
) -> Explanation:
    """Which backend would run this call, and why not the others. Reads no class.

    Arguments and errors are those of :func:`linear_cross_entropy`, and of the other functions that
    the call may be of: ``temperature`` and targets ``[..., K]`` as in :func:`linear_log_probs`,
    ``entropy`` and ``ranks`` as in :func:`token_statistics`. Tensors on the ``meta`` device will
    do. Of :func:`crosscut.linear_kl_div` there is :func:`crosscut.explain_kl_div`.
    """
    problem = _loss_call(
        (input, linear_weight, target, linear_bias, logit_scale),
        LossOptions(
            softcap=softcap,
            logit_scale=number_of_scale(logit_scale),
            policy=policy,
            backend=backend,
            reduction=reduction,
            ignore_index=-100 if ignore_index is None else ignore_index,
            label_smoothing=label_smoothing,
            shift=shift,
            z_loss=z_loss,
        ),
        (weight, token_weight, normalizer),
        options,
        several=True,
    ).problem
    problem = replace(
        at_temperature(problem, temperature),
        entropy=check_flag("entropy", entropy),
        ranks=check_flag("ranks", ranks),
    )
    return backends.explain(problem)


@dataclass(frozen=True, kw_only=True)
class _LossCall:
    """A call of :func:`linear_cross_entropy`, checked.

    Attributes:
        problem: whose statistics the loss is made of.
        options: of the loss.
        weight: class weights [V] in the dtype of the statistics, or None.
        token_weight: weight of each row [N] in that dtype, or None.
        normalizer: what a mean is over, if not the rows that count.
    """

    problem: HeadProblem
    options: LossOptions
    weight: Tensor | None
    token_weight: Tensor | None
    normalizer: Tensor | float | None


def _loss_call(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | float],
    options: LossOptions,
    weights: tuple[Tensor | None, Tensor | None, Tensor | float | None],
    torch_options: Any,
    *,
    several: bool = False,
) -> _LossCall:
    """The arguments of :func:`linear_cross_entropy`, checked.

    Args:
        tensors: input, linear_weight, target, linear_bias and logit_scale.
        options: of the loss.
        weights: weight, token_weight and normalizer.
        torch_options: PyTorch's.
        several: whether target may also be [..., K].
    """
    _check_torch_options(torch_options)
    *_, scale = tensors
    problem = head_problem(
        tensors[:4], options, options.ignore_index, options.shift, scale=scale, several=several
    )
    dtype, num_classes = problem.statistics_dtype, problem.total_classes
    weight, token_weight, normalizer = weights
    if weight is not None:
        weight = _checked_class_weight(weight, problem)
    if token_weight is not None:
        token_weight = flat_token_weight(token_weight, tensors[2], problem, options.shift)
    if normalizer is not None:
        normalizer = checked_normalizer(normalizer, options.reduction, dtype)
    if options.label_smoothing:
        ones = problem.classifier.new_ones(num_classes, dtype=dtype)
        smoothing_weight = (ones if weight is None else weight) / num_classes
        problem = problem.with_logit_weight(smoothing_weight)
    return _LossCall(
        problem=problem,
        options=options,
        weight=weight,
        token_weight=token_weight,
        normalizer=normalizer,
    )


def _check_torch_options(options: Any) -> None:
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", ())  # from PyTorch 2.13 on
    if options is not None and not isinstance(options, kind):
        raise TypeError(
            "options must be a torch.nn.LinearCrossEntropyOptions or None, "
            f"got {type(options).__name__}"
        )


def _checked_class_weight(weight: Tensor, problem: HeadProblem) -> Tensor:
    """Class weights [V] in the dtype of the statistics."""
    num_classes = problem.total_classes
    check_tensors({"input": problem.hidden, "weight": weight})
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight must have shape [{num_classes}], one a class, got {list(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"weight must have a floating-point dtype, got {weight.dtype}")
    return weight.detach().to(problem.statistics_dtype)
