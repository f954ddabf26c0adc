"""Batch shape in, one row a token out, and back.

``shift`` and ``ignore_index`` both become a label of ``IGNORED``: the hidden states are never
sliced or copied, and a backend skips the rows whose label says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1
"""The label of a row that is not valid: no statistic, no gradient."""


def flatten(
    hidden: Tensor, target: Tensor, num_classes: int, *, ignore_index: int, shift: int
) -> tuple[Tensor, Tensor]:
    """``hidden [..., D]``, ``target [...]`` to ``hidden [N, D]`` and int64 ``labels [N]``.

    A target of another dimension, ``[..., K]``, becomes labels ``[N, K]``.
    A label is a class in ``[0, num_classes)``, or ``IGNORED``. Any other target becomes
    ``num_classes``, which a backend reports as out of range.
    """
    target = target.to(torch.int64)
    labels = target.masked_fill(target < 0, num_classes)
    labels = labels.masked_fill_(target == ignore_index, IGNORED)
    batch = hidden.dim() - 1
    if shift:
        labels = align(labels, shift, axis=batch - 1, fill=IGNORED)
    # No -1 among the sizes: it has no meaning where there is no token.
    labels = labels.reshape(hidden.shape[:-1].numel(), *labels.shape[batch:])
    return hidden.reshape(-1, hidden.shape[-1]), labels


def align(values: Tensor, shift: int, *, axis: int, fill: float) -> Tensor:
    """What stands at t + shift of a sequence, at t, where the hidden state is that predicts it."""
    length = values.shape[axis]
    shift = min(shift, length)
    values = values.narrow(axis, shift, length - shift)
    return F.pad(values, (*(0, 0) * (values.dim() - 1 - axis), 0, shift), value=fill)


def unflatten(value: Tensor, batch_shape: torch.Size, *, shift: int, fill: float = 0) -> Tensor:
    """``value [N, ...]`` to ``[..., ...]``: what is said of a target stands where it stands.

    With ``shift`` the first ``shift`` targets of each sequence are predicted by nothing: ``fill``.
    """
    value = value.reshape((*batch_shape, *value.shape[1:]))
    if shift:
        axis, length = len(batch_shape) - 1, batch_shape[-1]
        shift = min(shift, length)
        value = value.narrow(axis, 0, length - shift)
        value = F.pad(value, (*(0, 0) * (value.dim() - 1 - axis), shift, 0), value=fill)
    return value
