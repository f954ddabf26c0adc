"""Batch shape in, one row a token out, and back.

``shift`` and ``ignore_index`` both become a label of ``IGNORED``: the hidden states are never
sliced or copied, and a backend skips the rows whose label says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1
"""The label of a row that takes no part: no statistic, no gradient."""


def flatten(
    hidden: Tensor, target: Tensor, num_classes: int, *, ignore_index: int, shift: int
) -> tuple[Tensor, Tensor]:
    """``hidden [..., D]``, ``target [...]`` to ``hidden [N, D]`` and int64 ``labels [N]``.

    A label is a class in ``[0, num_classes)``, or ``IGNORED``. Any other target becomes
    ``num_classes``, which a backend reports as out of range.
    """
    labels = target.to(torch.int64)
    labels = torch.where((labels < 0) & (labels != ignore_index), num_classes, labels)
    labels = torch.where(labels == ignore_index, IGNORED, labels)
    if shift:  # the hidden state at t predicts the target at t + shift
        labels = F.pad(labels[..., shift:], (0, min(shift, labels.shape[-1])), value=IGNORED)
    return hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)


def unflatten(value: Tensor, batch_shape: torch.Size, *, shift: int) -> Tensor:
    """``value [N]`` to ``[...]``: the entry of a target stands where that target stands.

    With ``shift`` the first ``shift`` targets of each sequence are predicted by nothing: zero.
    """
    value = value.reshape(batch_shape)
    if shift:
        length = batch_shape[-1]
        value = F.pad(value[..., : max(length - shift, 0)], (min(shift, length), 0))
    return value
