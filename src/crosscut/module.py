"""The loss as a module, with options where others have hyper-parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crosscut import backends
from crosscut.functional import linear_cross_entropy
from crosscut.options import GradientPolicy, LossOptions, Reduction


class LinearCrossEntropy(nn.Module):
    """:func:`crosscut.linear_cross_entropy` with its options fixed; holds no parameter.

    Args:
        weight: class weights ``[V]``, kept as a buffer that moves with the module.

    The other arguments are those of :func:`crosscut.linear_cross_entropy`.

    Example:
        >>> loss_fn = crosscut.LinearCrossEntropy(shift=1)
        >>> loss = loss_fn(hidden_states, lm_head.weight, input_ids)
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        shift: int = 0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        policy: GradientPolicy = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        backends.check_name(backend)
        self.register_buffer("weight", weight, persistent=False)
        self.options = LossOptions(
            reduction=reduction,
            ignore_index=-100 if ignore_index is None else ignore_index,
            label_smoothing=label_smoothing,
            shift=shift,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            policy=policy,
            backend=backend,
        )

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Loss of ``input [..., D]`` against ``target [...]`` under the head ``[V, D]``.

        Args:
            input: as in :func:`crosscut.linear_cross_entropy`, and so are the other tensors.
            linear_weight: the head's weight.
            target: classes.
            linear_bias: the head's bias.
            token_weight: a factor of each token's loss.
            normalizer: what a mean divides by.
            logit_scale: in place of the module's; one that is learned is a tensor.
        """
        options: dict[str, Any] = dict(vars(self.options))
        if logit_scale is not None:
            options["logit_scale"] = logit_scale
        return linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight,
            token_weight=token_weight, normalizer=normalizer, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        default = LossOptions()
        changed = {k: v for k, v in vars(self.options).items() if v != getattr(default, k)}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())
