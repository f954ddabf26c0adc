"""What a backend is given, and what it must answer.

A backend computes per-token statistics of a linear head and their gradients; it knows nothing of
losses, reductions or batch shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple, Protocol, get_type_hints

import torch
from torch import Tensor

from crosscut.options import HeadOptions


class VocabShard(NamedTuple):
    """Which classes of a vocabulary a head holds: those from ``start`` on."""

    start: int = 0
    total: int = 0  # classes of all shards; 0 where the head holds them all


WHOLE = VocabShard()
"""All of the classes."""


class Targets(NamedTuple):
    """What the labels of a call come to for the classes that are here."""

    labels: Tensor  # [N] or [N, K], places among these classes; any other place is of another shard
    valid: Tensor  # [N] bool: a row counts where it has a target, be it of another shard


@dataclass(frozen=True, kw_only=True)
class HeadProblem:
    """One call: N tokens, hidden size D, V classes.

    Attributes:
        hidden: [N, D], any float dtype.
        classifier: [V, D], the same dtype.
        bias: [V] of the same dtype or that of the statistics, or None.
        labels: [N] int64; a class of the whole vocabulary, or -1 for a row that is not valid. Or
            [N, K], K targets per token, each of them a class or -1: a row of nothing but -1 is not
            valid.
        logit_weight: [V], the weights of the logit sum, in the dtype of the statistics; None if no
            one wants it.
        options: how the logits are made and the gradient may be computed.
        entropy: whether the entropy is wanted.
        ranks: whether argmax and target_rank are wanted; only for labels [N].
        shard: which classes of the vocabulary the V of this head are; see :class:`ShardProblem`.
    """

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    labels: Tensor
    logit_weight: Tensor | None
    options: HeadOptions
    entropy: bool = False
    ranks: bool = False
    shard = WHOLE  # no field: an operator's call has all classes

    @property
    def valid(self) -> Tensor:
        """Which rows are valid, [N] bool."""
        valid = self.labels >= 0
        return valid if valid.dim() == 1 else valid.any(1)

    @property
    def rows(self) -> Tensor:
        """The valid rows [R], in ascending order."""
        return self.valid.nonzero().squeeze(1)

    @property
    def places(self) -> Tensor:
        """The labels' places among the classes of this head; any other place is of none of them."""
        start = self.shard.start
        return self.labels - start if start else self.labels

    @property
    def targets(self) -> Targets:
        """Both."""
        return Targets(self.places, self.valid)

    @property
    def total_classes(self) -> int:
        """Of the whole vocabulary."""
        return self.shard.total or len(self.classifier)

    @property
    def total_logit_weight(self) -> Tensor:
        """The sum of the weights of the logit sum over the whole vocabulary."""
        assert self.logit_weight is not None
        return self.logit_weight.sum()

    def with_logit_weight(self, weight: Tensor) -> HeadProblem:
        """The problem with a logit sum, given the weights of the whole vocabulary."""
        return replace(self, logit_weight=weight)

    @property
    def d_hidden_dtype(self) -> torch.dtype:
        """That of the gradient of ``hidden``: of a shard, of which it is a part, not rounded."""
        return self.hidden.dtype if self.shard == WHOLE else self.statistics_dtype

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Dtype of every statistic: float32, or float64 for float64 inputs."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class ShardProblem(HeadProblem):
    """One rank's part of a call whose vocabulary is spread over several.

    Attributes:
        shard: which classes are here.
        whole_logit_weight: of the whole vocabulary; None as ``logit_weight``.
    """

    shard: VocabShard
    whole_logit_weight: Tensor | None = None

    @property
    def total_logit_weight(self) -> Tensor:
        assert self.whole_logit_weight is not None
        return self.whole_logit_weight.sum()

    def with_logit_weight(self, weight: Tensor) -> ShardProblem:
        here = weight.narrow(0, self.shard.start, len(self.classifier))
        return replace(self, logit_weight=here, whole_logit_weight=weight)


@dataclass(frozen=True, kw_only=True)
class DistillationProblem:
    """A student and its teacher: N tokens, V classes, each with a hidden size of its own.

    Attributes:
        student: the student's head, at the temperature of the divergence. Its labels say which
            rows are valid, and are the targets of the hard loss.
        teacher: the teacher's head, at the same temperature.
        divergence: ``"forward"``, ``"reverse"`` or ``"js"``.
        beta: share of the teacher in the mixture of ``"js"``.
        temperature: times the student's logits, these are the logits of the hard loss; None if
            no one wants one.
    """

    student: HeadProblem
    teacher: HeadProblem
    divergence: str
    beta: float
    temperature: float | None


class Divergences(NamedTuple):
    """What a student's forward returns, [N] each, 0 at rows that are not valid."""

    divergence: Tensor
    hard_loss: Tensor  # cross-entropy of the logits times the temperature; [0] if no one wants it
    hard_lse: Tensor  # of those logits, less the temperature times student_lse; [0] likewise
    student_lse: Tensor  # at the temperature of the divergence
    teacher_lse: Tensor
    lse_compensation: Tensor  # [2, N], what the two lost where they were rounded
    center: Tensor  # what the divergence's slope has for mean under the student


class DivergenceCotangents(NamedTuple):
    """Gradients of what a student's forward returns, [N] each; None: it has none."""

    divergence: Tensor
    hard_loss: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """What is declared of a statistic; :class:`Cotangents` says whether it has a gradient.

    Attributes:
        per_target: whether its shape is that of the labels; else it is [N].
        dtype: None for that of the statistics.
        asked: whether a problem asks for it. Where not, it is [0].
    """

    per_target: bool = False
    dtype: torch.dtype | None = None
    asked: Callable[[HeadProblem], bool] = lambda problem: True


class Saved(NamedTuple):
    """What a forward leaves for its backward alone; what it holds is the backend's own business.

    ``column_mass`` and ``tail_mass`` say what the backward may leave out. They are empty where it
    computes everything.
    """

    lse_compensation: Tensor  # [N], what lse lost where it was rounded
    column_mass: Tensor  # [filter blocks, V] or [0, V]
    tail_mass: Tensor  # [N] or [0]


class Statistics(NamedTuple):
    """What a forward returns; 0 at rows that are not valid. Each statistic is declared here alone.

    With ``p = exp(z - lse)`` the softmax, ``entropy = -sum_v p[n, v] log p[n, v]``. The rank of a
    target is the number of classes that come before it where they are sorted by descending logit,
    equal ones by index; ``argmax`` comes first.

    **Confident tokens.** Each token has one class *of its own*: its target, the one of the highest
    logit where there are several (:func:`own_labels`). That class is left out of every sum over
    classes. With ``others`` the log-sum-exp of all the rest,

        log_prob = -log(1 + exp(others - target_logit))        1 - p = -expm1(log_prob)

    are never the difference of two numbers that were rounded separately: a log-probability is at
    most 0, and has as many correct digits where the model is sure of the token as elsewhere.
    """

    lse: Annotated[Tensor, Statistic()]
    target_logit: Annotated[Tensor, Statistic(per_target=True)]
    log_prob: Annotated[Tensor, Statistic(per_target=True)]  # of the targets; at most 0
    # sum_v w[v] (z[n, v] - lse[n])
    logit_sum: Annotated[Tensor, Statistic(asked=lambda problem: problem.logit_weight is not None)]
    entropy: Annotated[Tensor, Statistic(asked=lambda problem: problem.entropy)]
    argmax: Annotated[Tensor, Statistic(dtype=torch.int64, asked=lambda problem: problem.ranks)]
    target_rank: Annotated[
        Tensor, Statistic(dtype=torch.int64, asked=lambda problem: problem.ranks)
    ]
    saved: Saved


DECLARED: dict[str, Statistic] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Statistics, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
"""The statistics by name."""


def empty_statistics(problem: HeadProblem, saved: Saved) -> Statistics:
    """Empty tensors of the shapes and dtypes of the statistics that the problem asks for."""

    def empty(statistic: Statistic) -> Tensor:
        shape = problem.labels.shape if statistic.per_target else problem.labels.shape[:1]
        return problem.hidden.new_empty(
            shape if statistic.asked(problem) else 0,
            dtype=statistic.dtype or problem.statistics_dtype,
        )

    return Statistics(*map(empty, DECLARED.values()), saved=saved)


class Cotangents(NamedTuple):
    """Gradients of the statistics that may have one, of the same shapes; None: it has none.

    They come together in the gradient of the logits, with ``w`` the logit weight:

        dz = p (lse - sum log_prob - entropy (H + log p))
             + (target_logit + log_prob) onehot + logit_sum (w - p sum w)

    ``log p = z - lse`` and H the entropy itself: ``p (a + b z)`` with two numbers a token.
    """

    lse: Tensor | None = None
    target_logit: Tensor | None = None
    log_prob: Tensor | None = None
    logit_sum: Tensor | None = None
    entropy: Tensor | None = None


class RowCotangents(NamedTuple):
    """The same by row: ``dz = factor p - d_entropy p log p + logit_sum w`` but at the targets."""

    factor: Tensor  # [N], of p
    d_own: Tensor  # [N], all of dz at the token's own class, but for its logit_sum
    d_targets: Tensor | None  # [N, K], what other targets add to it; None without several


def own_labels(labels: Tensor, target_logit: Tensor) -> Tensor:
    """Each token's own class [N], which sums over classes leave out; -1 where it has no target.

    Args:
        labels: [N] or [N, K].
        target_logit: of the same shape.
    """
    if labels.dim() == 1:
        return labels
    logit = target_logit.masked_fill(labels < 0, -torch.inf)
    # A NaN or a -inf must not point to a label that there is not.
    best = torch.where((labels >= 0) & (logit == logit.amax(1, True)), labels, -1).amax(1)
    return torch.where(best < 0, labels.amax(1), best)


def own_log_prob(labels: Tensor, own: Tensor, log_prob: Tensor) -> Tensor:
    """Log-probability of each token's own class [N], given those of its labels [N] or [N, K]."""
    if labels.dim() == 1:
        return log_prob
    return torch.where(labels == own[:, None], log_prob, -torch.inf).amax(1)


def row_cotangents(
    problem: HeadProblem, statistics: Statistics, cotangents: Cotangents
) -> RowCotangents:
    """What the cotangents come to, row by row; undefined at rows that are not valid.

    ``1 - p`` is taken from the log-probability and not as a difference: at a token that the model
    is sure of, all of the gradient is in it.
    """
    several = problem.labels.dim() > 1
    labels = problem.labels if several else problem.labels[:, None]
    own = own_labels(problem.labels, statistics.target_logit)
    zeros = torch.zeros_like(statistics.lse)

    def of_targets(cotangent: Tensor | None) -> Tensor:
        if cotangent is None:
            return zeros[:, None].expand(labels.shape)
        return torch.where(labels >= 0, cotangent.view(labels.shape), 0)

    d_lse = zeros if cotangents.lse is None else cotangents.lse
    if cotangents.logit_sum is not None and problem.logit_weight is not None:
        d_lse = d_lse - cotangents.logit_sum * problem.total_logit_weight
    d_target, d_log_prob = of_targets(cotangents.target_logit), of_targets(cotangents.log_prob)
    is_own = labels == own[:, None]
    log_prob = own_log_prob(problem.labels, own, statistics.log_prob)
    p = log_prob.exp()
    of_own = torch.where(is_own, d_log_prob, 0).sum(1)
    of_others = torch.where(is_own, 0, d_log_prob).sum(1)
    d_own = torch.where(is_own, d_target, 0).sum(1) - of_own * log_prob.expm1()
    d_own = d_own + (d_lse - of_others) * p
    factor = d_lse - of_own - of_others
    if cotangents.entropy is not None:
        entropy, d_entropy = statistics.entropy, cotangents.entropy
        d_own = d_own - d_entropy * p * (entropy + log_prob.clamp_min(-1e4))
        factor = factor - d_entropy * entropy
    d_targets = torch.where(is_own, 0, d_target + d_log_prob) if several else None
    return RowCotangents(factor, d_own, d_targets)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    classifier: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients in the inputs' dtypes; None where not wanted."""

    hidden: Tensor | None
    classifier: Tensor | None
    bias: Tensor | None


def zero_gradients(problem: HeadProblem, needs: Needs) -> Gradients:
    """Those of a call without tokens."""
    inputs = problem.hidden, problem.classifier, problem.bias
    return Gradients(*(
        None if value is None or not need else value.new_zeros(value.shape)
        for value, need in zip(inputs, needs, strict=True)
    ))  # fmt: skip


class Backend(Protocol):
    """A way to compute the statistics of a head and their gradients."""

    name: str
    computes: frozenset[str]  # the names of the statistics it has
    shards: bool  # whether a vocabulary may be spread over processes

    def unsupported_reason(self, problem: HeadProblem) -> str | None:
        """Why this backend cannot serve the problem, or None if it can.

        Reads shapes, dtypes and devices only, never values.
        """
        ...

    def forward(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        """The statistics; with ``for_backward`` also what the backward will want to know."""
        ...

    def forward_like(self, problem: HeadProblem, *, for_backward: bool) -> Statistics:
        """Empty tensors of the shapes and dtypes ``forward`` returns."""
        ...

    def backward(
        self, problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
    ) -> Gradients:
        """Gradients of the inputs, given what ``forward(..., for_backward=True)`` returned."""
        ...

    def sparsity(self, problem: HeadProblem, statistics: Statistics) -> tuple[float, float]:
        """Share of the pairs the backward would compute, and mean mass of those it would not."""
        ...

    def unsupported_distillation_reason(self, problem: DistillationProblem) -> str | None:
        """As ``unsupported_reason``, of a student and its teacher."""
        ...

    def divergences(self, problem: DistillationProblem) -> Divergences:
        """How far the student is from its teacher."""
        ...

    def student_gradients(
        self,
        problem: DistillationProblem,
        found: Divergences,
        cotangents: DivergenceCotangents,
        needs: Needs,
    ) -> Gradients:
        """Gradients of the student's inputs, given what ``divergences`` returned."""
        ...
