"""Blocks of logits, made relative to a reference so that low precision costs little.

A block is the transpose of the usual picture, ``[BLOCK_V, BLOCK_N]``, one row a class: the
reference of each token then is the bias of a linear layer, ``F.linear(C, H, -reference)``, which
every matmul library adds in float32 before it rounds. A bfloat16 logit near 25 is off by up to
0.06, that is 6 % of its softmax; its distance from the log-sum-exp is off by 2**-9 of that
distance, and the distance is small exactly where the softmax is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.backends.column_filter import filters_blocks
from crosscut.backends.protocol import HeadProblem

WIDE_BIAS = 8.0
"""Biases this far apart want full precision: where one logit's product is, another's is not."""

HUGE = 2.0**10
"""Logits of such a size are not known in low precision to what their softmax needs."""

NEGLIGIBLE = -1e4
"""The logarithm of a softmax that is 0 in every dtype: stands for -inf, where 0 * inf would be."""


FEW_TOKENS = 32
"""So many valid tokens are computed in full precision, forward and backward: logits far from the
center may be all that there is to a row of dC, and matmuls wait for the classifier to be read.
"""

SAMPLE = 256
"""How many classes say where the logits are, before all are made."""


def matmul_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype whose matmul is fast on the device and wide enough for inputs of ``dtype``.

    float16 has too little range for unscaled gradients of logits, and bfloat16 is emulated where
    the hardware lacks it: both are computed in float32.
    """
    if dtype == torch.bfloat16 and _has_bfloat16(device):
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # before PyTorch 2.13
            return False
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def _finite_range(bias: Tensor) -> tuple[float, float]:
    """Of the biases that are finite; 0 and 0 where none is."""
    finite = bias[bias.isfinite()]
    return (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)


def check_labels(problem: HeadProblem) -> None:
    """Raise for a label out of range, where looking costs no synchronisation."""
    labels, num_classes = problem.labels, problem.total_classes
    if labels.device.type == "cpu" and labels.numel() and labels.max() >= num_classes:
        raise IndexError(
            f"target has a class out of range: classes must be in [0, {num_classes}), "
            "or ignore_index"
        )


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]``; a view where the rows, in ascending order, have no gap."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return values.narrow(0, int(rows[0]), len(rows))
    return values[rows]


def sample_classes(num_classes: int, device: torch.device) -> Tensor:
    """At most ``SAMPLE`` classes, sorted, from all over the vocabulary."""
    return torch.arange(0, num_classes, math.ceil(num_classes / SAMPLE), device=device)


def as_matrix(values: Tensor) -> Tensor:
    """``[n]`` to ``[n, 1]``; ``[n, K]`` stays."""
    return values.view(len(values), values.shape[1:].numel())


def find_labels(classes: slice | Tensor, num_classes: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels are among some classes: the place of each in them, and in ``labels``.

    Args:
        classes: a slice, or sorted classes [v].
        num_classes: v.
        labels: [n]; a negative one is nowhere.
    """
    if isinstance(classes, slice):
        row = labels - classes.start
        mine = (row >= 0) & (row < num_classes)
    else:
        row = torch.searchsorted(classes, labels).clamp_max(num_classes - 1)
        mine = classes[row] == labels
    mine = mine.nonzero().squeeze(1)
    return row[mine], mine


@dataclass(frozen=True)
class LogSum:
    """A log-sum-exp, ``high + low``: rounded to one number, far from 0, it would round every p.

    Of nothing, ``low`` is -inf.
    """

    high: Tensor
    low: Tensor

    @staticmethod
    def of_nothing(zeros: Tensor) -> LogSum:
        return LogSum(zeros.clone(), torch.full_like(zeros, -math.inf))

    def at(self, part: slice | Tensor) -> LogSum:
        return LogSum(self.high[part], self.low[part])

    def put(self, part: slice, values: LogSum) -> None:
        self.high[part], self.low[part] = values.high, values.low

    def value(self) -> Tensor:
        return self.high + self.low

    def minus(self, other: LogSum) -> Tensor:
        """The log-odds of two; 0 where they are the same, infinite ones too."""
        high, low = self.high - other.high, self.low - other.low
        high = torch.where(self.high == other.high, 0, high)
        return high + torch.where(self.low == other.low, 0, low)

    def plus(self, other: LogSum) -> LogSum:
        """Of all that both are of."""
        odds = other.minus(self)
        high = torch.where(odds > 0, other.high, self.high)
        low = torch.where(odds > 0, other.low, self.low)
        return LogSum(high, low + F.softplus(-odds.abs()))

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The value, and what it lost; NaN where it is infinite, as every p is then."""
        value = self.value().to(dtype)
        lost = torch.where(value.isfinite(), (self.high - value) + self.low, torch.nan)
        return value, lost.to(dtype)


def softmax_gradient(log_p: Tensor, factor: Tensor, d_entropy: Tensor | None) -> Tensor:
    """``p (factor - d_entropy log p)`` of a block, [v, n]: dz, but for targets and logit sum.

    Args:
        log_p: logits less the log-sum-exp, [v, n]; overwritten.
        factor: [n].
        d_entropy: [n], or None for zeros.
    """
    if d_entropy is None:
        return log_p.exp_().mul_(factor)
    p = log_p.exp()
    return log_p.clamp_min_(NEGLIGIBLE).mul_(-d_entropy).add_(factor).mul_(p)


class LogitBlocks:
    """Makes the logits of one problem, block by block, and their derivative.

    Args:
        problem: whose.
        least: dtype that the blocks have at least.

    Attributes:
        dtype: dtype of the blocks and of every sum over them: float32 or float64.
        fast: dtype of the matmuls that sweep the whole vocabulary.
        consistent: whether logits in full precision are the same to the last bit in forward and
            backward: else a p near 1 is off, where the class is not the token's own.
        wide: dtype of [n] and [v] vectors that are added to many times. float64 where there is.
    """

    def __init__(self, problem: HeadProblem, least: torch.dtype = torch.float32) -> None:
        self.dtype = torch.promote_types(problem.statistics_dtype, least)
        self.fast = matmul_dtype(problem.hidden.dtype, problem.hidden.device)
        if problem.ranks or not len(problem.classifier):  # of logits that are equal, or nearly
            self.fast = self.dtype
        self.consistent = not filters_blocks(problem)
        self.wide = self.dtype if problem.hidden.device.type == "mps" else torch.float64
        self.scale = problem.options.logit_scale
        self.softcap = problem.options.softcap
        self._plain = self.scale == 1 and self.softcap is None and problem.bias is None
        self._bias = 0.0  # that of most classes
        if problem.bias is not None and self.fast != self.dtype:
            lowest, highest = _finite_range(problem.bias)
            self._bias = (lowest + highest) / 2
            if highest - lowest > WIDE_BIAS:
                self.fast = self.dtype

    def block(
        self,
        classifier: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        reference: Tensor | None,
        center: Tensor | None = None,
    ) -> Tensor:
        """``logits - reference`` of v classes and n tokens, [v, n].

        Args:
            classifier: [v, D], in the dtype the matmul is to run in.
            bias: [v] or None.
            hidden: [n, D], in the same dtype.
            reference: [n]; None for the logits themselves.
            center: the dot product at which rounding is to be finest, [n]: 0 if None. Logits with
                the same one are the same to the last bit.
        """
        return self.sloped_block(classifier, bias, hidden, reference, center, sloped=False)[0]

    def sloped_block(
        self,
        classifier: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        reference: Tensor | None,
        center: Tensor | None = None,
        *,
        sloped: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """A block, and the derivative of the softcap at its logits [v, n]; None where it is 1."""
        if center is None:
            block = F.linear(classifier, hidden).to(self.dtype)  # [v, n]
        else:
            low = center.to(hidden.dtype)  # what the matmul can subtract before it rounds
            block = F.linear(classifier, hidden, -low).to(self.dtype)
            if self._plain and reference is not None:
                return (block if low is reference else block.add_(low - reference)), None
            block.add_(low)
        bias = None if bias is None else bias[:, None]
        block, slope = self.activate(block, bias, sloped=sloped)
        return (block if reference is None else block.sub_(reference)), slope

    def center_at(self, logit: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The dot product whose logit this is; None where nothing is gained by it.

        Not further than 0.97 softcaps: beyond, the slope of the softcap shrinks every error, and
        a log-sum-exp near the softcap says nothing of where the dot products are.

        Args:
            logit: [n].
            dtype: that of the matmul.
        """
        if dtype == self.dtype:
            return logit if self._plain and not self.consistent else None
        if self._plain:
            return logit
        if not self.scale:
            return torch.zeros_like(logit)
        if self.softcap is not None:
            logit = self.softcap * torch.atanh((logit / self.softcap).clamp(-0.75, 0.75))
        return (logit - self._bias) / self.scale

    def expect_tokens(self, num_tokens: int) -> None:
        """Go on in full precision if so many valid tokens are few."""
        if num_tokens <= FEW_TOKENS:
            self.fast = self.dtype

    def expect(self, reference: Tensor) -> None:
        """Go on in full precision if a low-precision matmul cannot subtract such references."""
        if self.fast != self.dtype and (reference.abs() > HUGE).any():
            self.fast = self.dtype

    def activate(
        self, products: Tensor, bias: Tensor | None, *, sloped: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Dot products of hidden states and classifier rows to logits, in place.

        And the derivative of the softcap; None where it is 1, or not asked for.
        """
        if self.scale != 1:
            products.mul_(self.scale)
        if bias is not None:
            products.add_(bias)
        slope = None
        if self.softcap is not None:
            products.div_(self.softcap).tanh_()
            if sloped:  # before anything else rounds: near the softcap it is next to nothing
                slope = (1 - products.square()).clamp_min_(0)
            products.mul_(self.softcap)
        return products, slope


def mean_product(products: Tensor, softmax: Tensor, slope: Tensor | None) -> Tensor:
    """Of dot products [v, n], by how much an error of each would matter, [n]."""
    weight = softmax.nan_to_num(0) if slope is None else softmax.nan_to_num(0) * slope
    return ((products * weight).sum(0) / weight.sum(0)).nan_to_num_(0, 0, 0)


class Survey:
    """Where low precision should round least, by a look at a sample of classes. Vectors are [n].

    At the mean dot product of the softmax: the log-sum-exp is far above the logits that hold the
    mass where the softmax is flat. Dot products beyond the softcap, where no error matters, have no
    say. Where most of the mass is in none of the sample, its logits are near the log-sum-exp.

    Args:
        logits: of the head.
        problem: the head.
    """

    def __init__(self, logits: LogitBlocks, problem: HeadProblem) -> None:
        num_classes = len(problem.classifier)
        self._logits = logits
        self._classes = sample_classes(num_classes, problem.hidden.device)
        self._classifier = problem.classifier[self._classes].to(logits.fast)
        self._bias = None if problem.bias is None else problem.bias[self._classes, None]
        self._all_of_one = math.log(num_classes / len(self._classes))

    def look(self, hidden: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The mean dot product, and an estimate of the log-sum-exp of all classes but one's own.

        Args:
            hidden: [n, D].
            own: the class that does not count; a negative one is none.
        """
        products = F.linear(self._classifier, hidden.to(self._classifier)).to(self._logits.dtype)
        z, slope = self._logits.activate(products.clone(), self._bias, sloped=True)
        z[find_labels(self._classes, len(z), own)] = -math.inf
        return mean_product(products, z.softmax(0), slope), z.logsumexp(0) + self._all_of_one

    def center(self, seen: tuple[Tensor, Tensor], others: Tensor) -> Tensor:
        """The dot product at which to round least, given what was seen, and the log-sum-exp."""
        (mean, lse), near = seen, self._logits.center_at(others, self._classifier.dtype)
        assert near is not None
        return torch.lerp(near, mean, (lse - others).exp().nan_to_num_(0).clamp_max_(1))
