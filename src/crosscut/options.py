"""What a loss is asked to do: frozen, keyword-only records, and every check of their values.

This is the lowest layer: it imports nothing of crosscut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

GradientPolicy = Literal[
    "auto", "filtered", "exact", "cce", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_e"
]
"""How much of the softmax the backward computes.

- ``"auto"``: never less accurate than the standard PyTorch loss in the inputs' dtype, and as fast
  as the softmax's sparsity allows. In bfloat16 this is the column filter with the tail
  correction, or every column where the softmax is flat; in float32 and float64, and with Triton
  in float16, it is ``"exact"``.
- ``"filtered"``: the column filter with the tail correction, whatever the dtype.
- ``"exact"``: every entry of the softmax (2NVD flop to make the logits again, 4NVD for the
  gradients).
- ``"cce"``: Algorithm 3 of the paper (arXiv:2411.09009): 128 x 128 tiles whose every
  ``|softmax - onehot|`` is below 2**-12 are skipped, the vocabulary is sorted by mean logit, and
  gradients accumulate in their own dtype.
- ``"cce_kahan"``: the same with float32 accumulation.
- ``"cce_kahan_full_c"``: the same, and no filter on the classifier's gradient.
- ``"cce_kahan_full_e"``: the same, and no filter on the hidden states' gradient.
"""

Divergence = Literal["forward", "reverse", "js"]
"""How far a student's softmax p is from its teacher's q.

- ``"forward"``: ``KL(q || p)``, the student covers what the teacher does.
- ``"reverse"``: ``KL(p || q)``, the student stays where the teacher is.
- ``"js"``: ``beta KL(q || m) + (1 - beta) KL(p || m)`` with ``m = beta q + (1 - beta) p``, the
  generalised Jensen-Shannon divergence (arXiv:2306.13649, equation 1).
"""

Reduction = Literal["none", "mean", "sum"]

POLICIES: tuple[str, ...] = get_args(GradientPolicy)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
DIVERGENCES: tuple[str, ...] = get_args(Divergence)


class PaperFilter(NamedTuple):
    """Variants of Algorithm 3 of the paper (arXiv:2411.09009, section 4.3)."""

    filter_c: bool = True  # whether dC leaves out the tiles that the filter finds
    filter_e: bool = True  # whether dH does
    accumulate_wide: bool = True  # whether sums across blocks are in float32, not in the own dtype


PAPER_FILTERS: dict[str, PaperFilter] = {
    "cce": PaperFilter(accumulate_wide=False),
    "cce_kahan": PaperFilter(),
    "cce_kahan_full_c": PaperFilter(filter_c=False),
    "cce_kahan_full_e": PaperFilter(filter_e=False),
}
"""What the paper's gradient policies say."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """How the head makes its logits, and how they are to be computed.

    The logits are ``softcap * tanh((logit_scale * hidden @ classifier.T + bias) / softcap)``,
    without the tanh where ``softcap`` is None.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    policy: GradientPolicy = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        _set(
            self,
            softcap=check_softcap("softcap", self.softcap),
            logit_scale=check_finite("logit_scale", self.logit_scale),
        )
        _check_choice("policy", self.policy, POLICIES)

    @property
    def paper_filter(self) -> PaperFilter | None:
        """What the gradient policy says if it is one of the paper's, else None."""
        return PAPER_FILTERS.get(self.policy)


@dataclass(frozen=True, kw_only=True)
class LossOptions(HeadOptions):
    """How per-token statistics become a loss. See :func:`crosscut.linear_cross_entropy`."""

    reduction: Reduction = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    shift: int = 0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("reduction", self.reduction, REDUCTIONS)
        _set(
            self,
            ignore_index=check_integer("ignore_index", self.ignore_index),
            shift=check_shift(self.shift),
            label_smoothing=check_between("label_smoothing", self.label_smoothing, 0, 1),
            z_loss=check_between("z_loss", self.z_loss, 0, math.inf),
        )


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """What a student is asked to do. See :func:`crosscut.linear_kl_div`."""

    divergence: Divergence = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    hard_weight: float = 0.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        _check_choice("divergence", self.divergence, DIVERGENCES)
        beta = _number("beta", self.beta, "a number between 0 and 1")
        if not 0 < beta < 1:
            raise ValueError(f"beta must be between 0 and 1, got {beta}")
        _set(
            self,
            beta=beta,
            temperature=check_positive("temperature", self.temperature),
            hard_weight=check_between("hard_weight", self.hard_weight, 0, 1),
        )
        _check_choice("reduction", self.reduction, REDUCTIONS)


def check_flag(name: str, value: Any) -> bool:
    """``value``. Raise TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def check_shift(shift: Any) -> int:
    """``shift``. Raise unless it is an integer >= 0."""
    shift = check_integer("shift", shift)
    if shift < 0:
        raise ValueError(f"shift must be >= 0, got {shift}")
    return shift


def check_integer(name: str, value: Any) -> int:
    """``value`` as an int, also if it is NumPy's. Raise TypeError unless it is one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return value if isinstance(value, int) else int(value)


def check_softcap(name: str, value: Any) -> float | None:
    """``value``. Raise unless it is None or a positive finite number."""
    if value is None:
        return None
    number = _number(name, value, "a positive finite number or None")
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {number}")
    return number


def check_positive(name: str, value: Any) -> float:
    """``value``. Raise unless it is a positive finite number."""
    number = _number(name, value, "a positive finite number")
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {number}")
    return number


def check_finite(name: str, value: Any) -> float:
    """``value``. Raise unless it is a finite number."""
    number = _number(name, value, "a finite number")
    if not -math.inf < number < math.inf:  # the compiler knows no isfinite of a symbol
        raise ValueError(f"{name} must be a finite number, got {number}")
    return number


def check_between(name: str, value: Any, least: float, most: float) -> float:
    """``value``. Raise unless it is a number in ``[least, most]``."""
    needed = f"a finite number >= {least}" if most == math.inf else f"in [{least}, {most}]"
    number = _number(name, value, needed if most == math.inf else f"a number {needed}")
    if not (least <= number <= most and number < math.inf):
        raise ValueError(f"{name} must be {needed}, got {number}")
    return number


def _number(name: str, value: Any, needed: str) -> float:
    """``value`` as one of Python's numbers, also if it is NumPy's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {needed}, got {type(value).__name__}")
    return value if isinstance(value, (int, float)) else float(value)


def _set(record: Any, **values: Any) -> None:
    """Replace fields of a frozen record that is being made."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


_workspace_limit = 5 * 2**25


def workspace_limit() -> int:
    """Bytes that a backward on a GPU may use for the gradient of a chunk of logits.

    And distillation, for its blocks. Where the classifier's gradient is wanted, and four times as
    large, they lie in it and a seventh of them is allocated. Where not, the logits that ``auto``
    keeps may use as much, and as much again as dH in float32; where they do not fit, every logit is
    computed. 160 MiB unless :func:`set_workspace_limit` was called.
    """
    return _workspace_limit


def set_workspace_limit(num_bytes: int) -> None:
    """Set what :func:`workspace_limit` returns, for this process.

    A larger workspace makes fewer and fuller launches, and under ``auto`` leaves parts of a flatter
    softmax out. At least 128 classes are worked on at a time, in distillation 1024, whatever the
    limit. What else is plain PyTorch, and all that is on a CPU, has a fixed workspace.

    Args:
        num_bytes: at least 1.

    Raises:
        TypeError: num_bytes is not an int.
        ValueError: num_bytes is below 1.
    """
    num_bytes = check_integer("num_bytes", num_bytes)
    if num_bytes < 1:
        raise ValueError(f"num_bytes must be at least 1, got {num_bytes}")
    global _workspace_limit
    _workspace_limit = num_bytes
