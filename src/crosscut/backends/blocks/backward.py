"""Gradients of the statistics: the softmax made again, where it matters.

With what the cotangents come to (:func:`crosscut.backends.protocol.row_cotangents`), and
``p = exp(z - lse)``,

    dz[n, v] = factor[n] * p[n, v]       d_own[n] at the token's own class
    dH = dz C        dC = dz^T H        d_bias = sum_n dz

times the derivatives of softcap and scale. A cotangent g_entropy of the entropy adds
``-g_entropy[n] * p[n, v] * log p[n, v]``, other targets of the token add their onehots.

A token's labels are where most of its gradient is. Their entries of dz are taken out of the sums
over many, and added to their results: rounded once.

The columns of each block of tokens are of three kinds:

    selected  few, gathered, in the full precision of the statistics. Among them the block's labels,
              whose gradients are the largest, unless the dense sweep is in full precision too.
    tail      the rest, where the forward filtered columns: nothing is made again. The tail of p is
              replaced by the rank-one matrix ``tail_mass x column_mass / total``, which has its row
              and column sums:
              dH += (factor tail_mass / total) x (column_mass C)
              dC += column_mass x ((factor tail_mass / total) H)
    dense     the rest, where it did not: swept block by block in the dtype of fast matmuls. Also
              wherever the entropy has a cotangent: p log p is large where p no longer is, and no
              sums of it are at hand to stand for a tail.

The loop is over blocks of classes: the gradient of a block's classifier rows is complete when the
block is left and is rounded to the output's dtype once. Only dH accumulates across blocks, in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from crosscut.backends.blocks.logits import (
    LogitBlocks,
    Survey,
    as_matrix,
    find_labels,
    softmax_gradient,
    take_rows,
)
from crosscut.backends.column_filter import BLOCK_N, SELECTED
from crosscut.backends.protocol import (
    WHOLE,
    Cotangents,
    Gradients,
    HeadProblem,
    Needs,
    Statistics,
    own_labels,
    own_log_prob,
    row_cotangents,
)

WORKSPACE = 2**22
"""Entries of one block of logits, or of classifier rows: 16 MiB in float32."""

DENSE_TOKENS = 2**15
"""Most tokens of one dense group. One matmul sums over them, and rounds its result once."""


def compute_gradients(
    problem: HeadProblem, statistics: Statistics, cotangents: Cotangents, needs: Needs
) -> Gradients:
    """The exact gradient, or the filtered one where the forward left a tail."""
    return project(problem, statistics, select(problem, statistics, cotangents), needs)


@dataclass(frozen=True, kw_only=True)
class SelectedTokens:
    """Tokens that keep the same classes. Vectors are [n], in the dtype of the statistics."""

    rows: Tensor  # into [N]
    hidden: Tensor  # [n, D]
    labels: Tensor  # [P] the places of all labels here, each once a token; ascending in ``owners``
    owners: Tensor  # [P] whose label it is, into [n]
    is_own: Tensor  # [P] whether it is the token's own class
    d_target: Tensor  # [P] all of dz but the logit sum at the own class, what is added elsewhere
    dz_label: Tensor  # [P] dz at the label, once its class was visited
    one_each: bool  # whether each token has one label that is here
    lse: Tensor
    lse_compensation: Tensor
    center: Tensor | None  # the dot product at which a dense sweep in low precision rounds least
    factor: Tensor  # of p; of exp(z - lse) where log p is not needed
    d_entropy: Tensor | None
    d_sum: Tensor | None
    selected: Tensor  # classes, sorted
    column_mass: Tensor | None  # [V]: SELECTED, or the mass of a column of the tail. None: dense
    tail_mass: Tensor | None
    d_hidden: Tensor  # [n, D], accumulates

    def labels_of(self, part: slice) -> slice:
        """Where the labels of some tokens are in the vectors [P]."""
        if self.one_each:
            return part
        bounds = self.owners.new_tensor([part.start or 0, part.stop or len(self.rows)])
        first, last = torch.searchsorted(self.owners, bounds).tolist()
        return slice(first, last)


class Plan(NamedTuple):
    """What :func:`select` decides, and :func:`project` does."""

    logits: LogitBlocks
    groups: list[SelectedTokens]
    step: int  # classes of one visit


def select(problem: HeadProblem, statistics: Statistics, cotangents: Cotangents) -> Plan:
    """The valid tokens: one group per block with a tail, and the others together."""
    logits = LogitBlocks(problem)
    logits.expect(statistics.lse)
    logits.expect_tokens(len(problem.rows))
    # Where the dense sweep is in full precision, no class gains by being left out of it.
    dense_is_full = logits.fast == logits.dtype
    survey = None if dense_is_full else Survey(logits, problem)

    def selected(labels: Tensor, column_mass: Tensor | None) -> Tensor:
        if column_mass is not None:
            return (column_mass == SELECTED).nonzero().squeeze(1)
        several = problem.labels.dim() > 1  # and then too many to gather them all
        return labels[:0] if dense_is_full or several else labels.unique()

    of_rows = row_cotangents(problem, statistics, cotangents)
    own = own_labels(problem.labels, statistics.target_logit)
    own_place = own - problem.shard.start
    log_prob = own_log_prob(problem.labels, own, statistics.log_prob)

    def group(rows: Tensor, column_mass: Tensor | None) -> SelectedTokens:
        d_own, d_targets = of_rows.d_own[rows], of_rows.d_targets
        labels, owners, d_target = _distinct_labels(
            as_matrix(problem.labels[rows]),
            d_own[:, None] if d_targets is None else d_targets[rows],
        )
        is_own = labels == own[rows][owners]
        if problem.shard != WHOLE:
            places = labels - problem.shard.start
            here = (places >= 0) & (places < len(problem.classifier))
            owners, d_target, is_own = owners[here], d_target[here], is_own[here]
            labels = places[here]
        one_each = len(labels) == len(rows) and problem.labels.dim() == 1
        lse, rest = statistics.lse[rows], -log_prob[rows].expm1()
        lse_compensation = statistics.saved.lse_compensation[rows]
        sparse = column_mass is not None
        hidden, center = take_rows(problem.hidden, rows), None
        if survey is not None and not sparse:
            others = torch.where(rest > 0, lse + rest.log(), lse)
            parts = list(_parts(len(rows)))
            seen = [survey.look(hidden[part], own_place[rows[part]]) for part in parts]
            center = torch.cat(
                [
                    survey.center(*of_part)
                    for of_part in zip(seen, others.split(BLOCK_N), strict=True)
                ]
            )
        d_entropy, d_sum = cotangents.entropy, cotangents.logit_sum
        return SelectedTokens(
            rows=rows,
            hidden=hidden,
            labels=labels,
            owners=owners,
            is_own=is_own,
            d_target=torch.where(is_own, d_own[owners], d_target),
            dz_label=torch.zeros_like(d_target),
            one_each=one_each,
            lse=lse,
            lse_compensation=lse_compensation,
            center=center,
            factor=of_rows.factor[rows] * ((-lse_compensation).exp() if d_entropy is None else 1),
            d_entropy=None if d_entropy is None else d_entropy[rows],
            d_sum=None if d_sum is None else d_sum[rows],
            selected=selected(labels, column_mass),
            column_mass=column_mass,
            tail_mass=statistics.saved.tail_mass[rows] if sparse else None,
            d_hidden=statistics.lse.new_zeros(len(rows), problem.hidden.shape[1]),
        )

    groups, dense = [], []
    filtered = statistics.saved.column_mass.shape[0] > 0 and cotangents.entropy is None
    rows = problem.rows
    for index, block in enumerate(rows.split(BLOCK_N) if len(rows) else ()):
        if filtered and (statistics.saved.column_mass[index] != SELECTED).any():
            groups.append(group(block, statistics.saved.column_mass[index]))
        else:
            dense.append(block)
    if dense:
        groups += [group(block, None) for block in torch.cat(dense).split(DENSE_TOKENS)]
    largest = max([problem.classifier.shape[1], *(len(tokens.rows) for tokens in groups)])
    return Plan(logits, groups, max(128, min(4096, WORKSPACE // largest)))


def project(problem: HeadProblem, statistics: Statistics, plan: Plan, needs: Needs) -> Gradients:
    """Carry out a plan."""
    projection = _Projection(problem, statistics, plan, needs)
    for start in range(0, len(problem.classifier), plan.step):
        projection.visit(slice(start, min(start + plan.step, len(problem.classifier))))
    return projection.gradients()


class _Projection:
    """One pass over the vocabulary."""

    def __init__(
        self, problem: HeadProblem, statistics: Statistics, plan: Plan, needs: Needs
    ) -> None:
        self.problem = problem
        self.needs = needs
        self.logits, self.groups, step = plan
        self.low_rank = _LowRank(problem, self.groups, statistics.lse)
        classifier, bias = problem.classifier, problem.bias
        self.d_classifier = classifier.new_empty(classifier.shape) if needs.classifier else None
        self._wide_rows = statistics.lse.new_empty(0, classifier.shape[1])
        if needs.classifier and classifier.dtype != self.logits.dtype:
            self._wide_rows = statistics.lse.new_empty(step, classifier.shape[1])
        self.d_bias = torch.empty_like(bias) if needs.bias and bias is not None else None

    def visit(self, classes: slice) -> None:
        """One block of classes; every token. Completes the block's rows of dC and d_bias."""
        classifier = self.problem.classifier[classes].to(self.logits.fast)
        d_classifier = self._rows_to_fill(classes)
        d_bias = self.low_rank.visit(classes, classifier, d_classifier)

        for tokens in self.groups:
            selected = tokens.selected[
                (tokens.selected >= classes.start) & (tokens.selected < classes.stop)
            ]
            if tokens.column_mass is None:
                hidden, part = tokens.hidden.to(self.logits.fast), slice(None)
                dz = self._dz(classes, classifier, hidden, tokens, part)  # [BLOCK_V, n]
                dz.index_fill_(0, selected - classes.start, 0)
                d_bias += dz.sum(1)
                dz = dz.to(self.logits.fast)
                if self.needs.hidden:
                    _add_product(tokens.d_hidden, dz.t(), classifier)
                if d_classifier is not None:
                    _add_product(d_classifier, dz, hidden)
            # After the dense sweep, whose gradients at the labels are the less precise ones.
            for part in _parts(len(tokens.rows) if len(selected) else 0):
                hidden = tokens.hidden[part].to(self.logits.dtype)
                rows = self.problem.classifier[selected].to(self.logits.dtype)
                dz = self._dz(selected, rows, hidden, tokens, part)  # [selected, n]
                if self.needs.hidden:
                    _add_product(tokens.d_hidden[part], dz.t(), rows)
                if d_classifier is not None:
                    d_classifier.index_add_(0, selected - classes.start, dz @ hidden)
                d_bias.index_add_(0, selected - classes.start, dz.sum(1))
            self._add_labels(classes, tokens, d_classifier, d_bias)

        if self.d_classifier is not None and d_classifier is not None:
            if self.logits.scale != 1:
                d_classifier.mul_(self.logits.scale)
            if d_classifier.dtype != self.d_classifier.dtype:
                self.d_classifier[classes] = d_classifier
        if self.d_bias is not None:
            self.d_bias[classes] = d_bias

    def gradients(self) -> Gradients:
        """What the visits came to."""
        d_hidden = None
        if self.needs.hidden:
            d_hidden = self.problem.hidden.new_zeros(
                self.problem.hidden.shape, dtype=self.problem.d_hidden_dtype
            )
            self.low_rank.add_to_d_hidden()
            for tokens in self.groups:
                for part in _parts(len(tokens.labels)):
                    rows = self.problem.classifier[tokens.labels[part]].to(self.logits.dtype)
                    rows *= tokens.dz_label[part][:, None]
                    _add_rows(tokens.d_hidden, tokens.owners[part], rows)
                tokens.d_hidden.mul_(self.logits.scale)
                d_hidden.index_copy_(0, tokens.rows, tokens.d_hidden.to(d_hidden))
        return Gradients(d_hidden, self.d_classifier, self.d_bias)

    def _add_labels(
        self, classes: slice, tokens: SelectedTokens, d_classifier: Tensor | None, d_bias: Tensor
    ) -> None:
        """Each token's gradient at its labels, to the rows of a block of classes."""
        labels = tokens.labels
        mine = ((labels >= classes.start) & (labels < classes.stop)).nonzero().squeeze(1)
        for part in _parts(len(mine)):
            index = labels[mine[part]] - classes.start
            dz = tokens.dz_label[mine[part]]
            sums = torch.zeros_like(d_bias, dtype=self.logits.wide)
            d_bias += _add_rows(sums, index, dz.to(sums)).to(d_bias)
            if d_classifier is not None:
                hidden = tokens.hidden[tokens.owners[mine[part]]].to(self.logits.dtype)
                _add_rows(d_classifier, index, hidden * dz[:, None])

    def _rows_to_fill(self, classes: slice) -> Tensor | None:
        """Where to sum the classifier's gradient: its own rows, if they are wide enough."""
        if self.d_classifier is None:
            return None
        rows = self.d_classifier[classes]
        return rows if rows.dtype == self.logits.dtype else self._wide_rows[: len(rows)]

    def _dz(
        self,
        classes: slice | Tensor,
        classifier: Tensor,
        hidden: Tensor,
        tokens: SelectedTokens,
        part: slice,
    ) -> Tensor:
        """Gradient of the logits before the softcap, [v, n]; 0 at labels, see ``dz_label``."""
        problem, logits = self.problem, self.logits
        lse = tokens.lse[part]
        bias = None if problem.bias is None else problem.bias[classes]
        center = logits.center_at(lse, hidden.dtype)
        if hidden.dtype != logits.dtype and tokens.center is not None:
            center = tokens.center[part]
        dz, slope = logits.sloped_block(classifier, bias, hidden, lse, center)
        d_entropy = None if tokens.d_entropy is None else tokens.d_entropy[part]
        if d_entropy is not None:  # and log p is needed, too
            dz.sub_(tokens.lse_compensation[part])
        dz = softmax_gradient(dz, tokens.factor[part], d_entropy)
        pairs = tokens.labels_of(part)
        row, mine = find_labels(classes, len(dz), tokens.labels[pairs])
        at_label = row, tokens.owners[pairs][mine] - (part.start or 0)
        of_others = torch.where(tokens.is_own[pairs][mine], 0, dz[at_label])
        dz[at_label] = of_others + tokens.d_target[pairs][mine]
        if tokens.column_mass is None and tokens.d_sum is not None:
            assert problem.logit_weight is not None
            dz.addr_(problem.logit_weight[classes].to(dz), tokens.d_sum[part])
        if slope is not None:
            dz.mul_(slope)
        tokens.dz_label[pairs][mine] = dz[at_label]
        dz[at_label] = 0
        return dz


class _LowRank:
    """The part of dz that is a sum of few products ``tokens [n] x classes [V]``.

    One for the tail of each group that has one; one for its logit sum, whose gradient is the same
    at every logit.
    """

    def __init__(self, problem: HeadProblem, groups: list[SelectedTokens], like: Tensor) -> None:
        self.terms: list[tuple[SelectedTokens, int, Tensor]] = []  # tokens, row below, [n]
        across_classes: list[Tensor] = []  # [V] each
        for tokens in groups:
            if tokens.column_mass is not None and tokens.tail_mass is not None:
                mass = tokens.column_mass.clamp_min(0)
                total = mass.sum()
                across_tokens = tokens.factor * tokens.tail_mass / total
                across_tokens = torch.where(total > 0, across_tokens, 0)
                self.terms.append((tokens, len(across_classes), across_tokens))
                across_classes.append(mass)
        if problem.logit_weight is not None:
            self.terms += [
                (tokens, len(across_classes), tokens.d_sum)
                for tokens in groups
                if tokens.column_mass is not None and tokens.d_sum is not None
            ]
            across_classes.append(problem.logit_weight.to(like))

        rank, hidden_size = len(across_classes), problem.hidden.shape[1]
        self.across_classes = torch.stack(across_classes) if rank else None  # [rank, V]
        self.times_hidden = like.new_zeros(rank, hidden_size)
        self.times_classifier = like.new_zeros(rank, hidden_size)
        self.times_ones = like.new_zeros(rank)
        for tokens, row, across_tokens in self.terms:
            self.times_ones[row] += across_tokens.sum()
            parts = zip(across_tokens.split(BLOCK_N), tokens.hidden.split(BLOCK_N), strict=True)
            for values, hidden in parts:
                self.times_hidden[row] += values @ hidden.to(values)

    def visit(self, classes: slice, classifier: Tensor, d_classifier: Tensor | None) -> Tensor:
        """Start one block's gradients: fills ``d_classifier`` [v, D], returns d_bias [v]."""
        if self.across_classes is None:
            if d_classifier is not None:
                d_classifier.zero_()
            return self.times_ones.new_zeros(len(classifier))
        across_classes = self.across_classes[:, classes]  # [rank, v]
        self.times_classifier += across_classes.to(classifier) @ classifier
        if d_classifier is not None:
            torch.mm(across_classes.t(), self.times_hidden, out=d_classifier)
        return self.times_ones @ across_classes

    def add_to_d_hidden(self) -> None:
        for tokens, row, across_tokens in self.terms:
            tokens.d_hidden.addr_(across_tokens, self.times_classifier[row])


def _distinct_labels(labels: Tensor, d_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [n, K] as a list [P], each once a token, with their tokens and summed cotangents."""
    owners, column = (labels >= 0).nonzero(as_tuple=True)
    classes, d_target = labels[owners, column], d_target[owners, column]
    if labels.shape[1] > 1:
        span = int(labels.max()) + 1
        pairs, inverse = (owners * span + classes).unique(return_inverse=True)
        owners, classes = pairs // span, pairs % span
        d_target = _add_rows(d_target.new_zeros(len(pairs)), inverse, d_target)
    return classes, owners, d_target


def _parts(length: int) -> Iterator[slice]:
    """Slices of BLOCK_N tokens."""
    return (slice(first, min(first + BLOCK_N, length)) for first in range(0, length, BLOCK_N))


def _add_rows(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``out[index] += values``, always in the same order, where ``index`` has repetitions."""
    if out.device.type == "cuda":
        return out.index_put_((index,), values, accumulate=True)  # sorts; index_add_ races
    return out.index_add_(0, index, values)  # serial; index_put_ races


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right``, in one call where the dtypes agree."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)
