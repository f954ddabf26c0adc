"""The oracle: the loss from the full logits, in plain PyTorch.

In float64 it is the truth. In another dtype it is the standard PyTorch computation, whose own error
says how accurate the loss has to be in that dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Logits ``[..., V]``: the matmul in the inputs' dtype, what follows in float32 at least."""
    products = F.linear(input, linear_weight)
    z = logit_scale * products.to(torch.promote_types(products.dtype, torch.float32))
    z = z if linear_bias is None else z + linear_bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> Tensor:
    """What :func:`crosscut.linear_cross_entropy` is to compute."""
    z = logits(input, linear_weight, linear_bias, softcap=softcap, logit_scale=logit_scale)
    predicted = target[..., shift:] if shift else target
    z = z[..., : predicted.shape[-1], :] if shift else z
    weight = None if weight is None else weight.to(z)
    loss = F.cross_entropy(
        z.reshape(-1, z.shape[-1]),
        predicted.reshape(-1).long(),
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(predicted.shape)
    kept = predicted != ignore_index
    if z_loss:
        loss = loss + z_loss * torch.where(kept, z.logsumexp(-1) ** 2, 0)
    if reduction == "none":
        return F.pad(loss, (target.shape[-1] - predicted.shape[-1], 0)) if shift else loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (kept.sum() if weight is None else weight[predicted[kept].long()].sum())


def tempered(input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """The reference's logits over the temperature."""
    temperature = options.pop("temperature", 1.0)
    return logits(input, weight, bias, **options) / temperature


def entropy_of(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def shifted(values: Tensor, shift: int) -> Tensor:
    """What is said of position t, at t + shift."""
    values = values.roll(shift, 1)
    return values if not shift else values.index_fill(1, torch.arange(shift).to(values.device), 0)


def reference_entropy(
    input: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    shift: int = 0, **options: Any,
) -> Tensor:  # fmt: skip
    entropy = entropy_of(tempered(input, weight, linear_bias, **options))
    return torch.where(target != -100, shifted(entropy, shift) if shift else entropy, 0)


def reference_log_probs(
    input: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    shift: int = 0, **options: Any,
) -> Tensor:  # fmt: skip
    """The log-probabilities of target ``[B, T]`` or ``[B, T, K]``."""
    log_p = tempered(input, weight, linear_bias, **options).log_softmax(-1)
    log_p = shifted(log_p, shift) if shift else log_p
    several = target if target.dim() == input.dim() else target[..., None]
    found = log_p.gather(-1, several.clamp_min(0)).masked_fill(several == -100, 0)
    found = found if target.dim() == input.dim() else found[..., 0]
    if not shift:
        return found
    return found.index_fill(1, torch.arange(shift).to(found.device), 0)
