"""TRL's trainers through crosscut: ``crosscut.patch_trl()``.

TRL does not call the output head. It reads the head's weight, and one autograd function of its own
makes of it what its losses and metrics want to know of each token. :class:`_TokenStatistics` stands
in that function's place, for every trainer and model there is. This file alone knows of TRL.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crosscut import ops
from crosscut.arguments import at_temperature, head_problem, wants_gradient
from crosscut.backends.protocol import HeadProblem
from crosscut.integrations.head import reason_not_to_defer
from crosscut.integrations.report import HeadReport, HeadSettings
from crosscut.options import GradientPolicy, HeadOptions

_TESTED = "1.15 and 1.16"
_NAME = "_ChunkedLogProbFunction"
_PARAMETERS = (
    "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, "
    "logit_scale, outputs"
)
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def patch_trl(*, policy: GradientPolicy = "auto", backend: str = "auto") -> HeadReport:
    """Have TRL's trainers compute their log-probabilities and entropies with crosscut.

    Of all models and trainers in this process, made before or after; :func:`unpatch_trl` takes it
    back. Calling it again changes the options. What crosscut cannot serve stays with TRL.

    Args:
        policy: how much of the softmax the gradient computes. See
            :data:`crosscut.GradientPolicy`.
        backend: what computes the losses. See :func:`crosscut.explain`.

    Returns:
        A record that goes on counting: ``print`` it to see what crosscut computed, and what was
        left to TRL and why.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL computes its losses in a way that is not known here.
        ValueError: an option does not fit.
    """
    settings = HeadSettings(min_numel=0, options=HeadOptions(policy=policy, backend=backend))
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        raise ImportError("patch_trl needs TRL: pip install 'crosscut[trl]'") from error
    unpatch_trl()
    utils = importlib.import_module("trl.trainer.utils")
    theirs = getattr(utils, _NAME, None)
    forward = getattr(theirs, "forward", None)
    if forward is None or ", ".join(inspect.signature(forward).parameters) != _PARAMETERS:
        raise RuntimeError(
            f"TRL {trl.__version__} has no trl.trainer.utils.{_NAME} as crosscut knows it of "
            f"TRL {_TESTED}: crosscut.defer_logits(model) serves the trainers that use logits"
        )
    setattr(utils, _NAME, _TokenStatistics(theirs, settings))
    return HeadReport("trl", f"TRL {trl.__version__}", settings.log)


def unpatch_trl() -> None:
    """Undo :func:`patch_trl`. Nothing happens where it was not called."""
    utils = sys.modules.get("trl.trainer.utils")
    patched = getattr(utils, _NAME, None)
    if isinstance(patched, _TokenStatistics):
        setattr(utils, _NAME, patched.theirs)


def is_patched() -> bool:
    """Whether TRL's trainers go through crosscut."""
    return isinstance(getattr(sys.modules.get("trl.trainer.utils"), _NAME, None), _TokenStatistics)


class _TokenStatistics:
    """In place of TRL's autograd function, which it keeps for what crosscut cannot serve."""

    def __init__(self, theirs: Any, settings: HeadSettings) -> None:
        self.theirs = theirs
        self.settings = settings

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Collection[str] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities, and the ``_OUTPUTS`` or None, in the order of TRL's function.

        Args:
            hidden: ``[N, D]``.
            weight: ``[V, D]``.
            bias: ``[V]`` or None.
            targets: ``[N]``, classes.
            temperature: divides the logits.
            chunk_size: of TRL's own way.
            final_logit_softcapping: of the scaled logits, or None.
            logit_scale: factor of the logits, their bias included.
            outputs: names of what is wanted.

        Returns:
            ``[N]`` each: float32 (float64 for float64 hidden states), ``is_top1`` bool. The first
            two are differentiable.
        """
        cap, log = final_logit_softcapping, self.settings.log
        reason = reason_not_to_defer(hidden, weight, bias, self.settings)
        if reason is None and not (
            logit_scale > 0 and temperature > 0 and (cap is None or cap > 0)
        ):
            reason = f"logit_scale={logit_scale}, temperature={temperature}, softcap={cap}"
        if reason is not None:
            if not torch.compiler.is_compiling():
                log.real[reason] += 1
            return self.theirs.apply(
                hidden, weight, bias, targets, temperature, chunk_size, cap, logit_scale, outputs
            )  # fmt: skip
        if not torch.compiler.is_compiling():
            log.deferred += 1
            log.fused[", ".join(("log_probs", *(x for x in _OUTPUTS if x in outputs)))] += 1

        # The scale, which is the bias's too, goes into cap and temperature.
        softcap = None if cap is None else cap / logit_scale
        options = replace(self.settings.options, softcap=softcap)
        problem = head_problem((hidden, weight, targets, bias), options, ignore_index=-100, shift=0)
        problem = at_temperature(problem, temperature / logit_scale)
        asked = replace(problem, entropy="entropy" in outputs, ranks="is_top1" in outputs)
        found = ops.token_statistics(asked, for_backward=wants_gradient(problem))
        return (
            found.target_logit - found.lse,
            found.entropy if asked.entropy else None,
            _log_sum_sq_probs(problem, found.lse) if "log_sum_sq_probs" in outputs else None,
            _mean_logits(problem) if "mean_logits" in outputs else None,
            found.target_rank == 0 if asked.ranks else None,
        )


@torch.no_grad()
def _log_sum_sq_probs(problem: HeadProblem, lse: Tensor) -> Tensor:
    """``log sum_v p_v**2`` [N]: a sweep of its own, at half the temperature."""
    found = ops.token_statistics(at_temperature(problem, 0.5), for_backward=False)
    return found.lse - 2 * lse


@torch.no_grad()
def _mean_logits(problem: HeadProblem) -> Tensor:
    """Mean logit [N]: that of the mean class; under a softcap, a sweep of its own."""
    dtype, num_classes = problem.statistics_dtype, len(problem.classifier)
    if problem.options.softcap is not None:
        weight = problem.classifier.new_full((num_classes,), 1 / num_classes, dtype=dtype)
        weighted = replace(problem, logit_weight=weight)
        found = ops.token_statistics(weighted, for_backward=False)
        return found.lse + found.logit_sum
    row = problem.classifier.mean(0, dtype=dtype)
    with torch.autocast(row.device.type, enabled=False):
        logits = problem.options.logit_scale * (problem.hidden.to(dtype) @ row)
    return logits if problem.bias is None else logits + problem.bias.mean(dtype=dtype)
