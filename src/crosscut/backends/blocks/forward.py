"""Algorithms 1 and 2 of the paper (arXiv:2411.09009), and the column filter.

    target_logit[n] = z[n, y_n]                     (1) indexed matmul, O(N) memory
    lse[n]          = log sum_v exp z[n, v]         (2) swept over the vocabulary, O(N) memory
    entropy[n]      = lse[n] - sum_v p[n, v] z[n, v]    likewise, where asked for

The sweep goes over blocks of BLOCK_V classes and BLOCK_N tokens. Each block is made, reduced to a
sum of exponentials per token, and dropped. 2NVD flop. Each token's own class is left out, and joins
in the end (:class:`crosscut.backends.protocol.Statistics`): what is summed is the mass of the
*others*, ``r = exp(z - others)`` being their softmax among themselves.

**Column filter** (not in the paper, whose filter drops 128 x 128 tiles in the backward). The
softmax of real text is sparse in columns: over a block of tokens few classes have any mass. So
the sweep also sums each column of a block, ``sum_n r[n, v]``, and a column whose mean over the
block's tokens is below DROP_BELOW joins the *tail*, which the backward replaces by the rank-one
matrix with the same row sums ``tail_mass`` and the same column sums ``column_mass``:

    p[n, v]  ~=  tail_mass[n] * column_mass[v] / sum_v column_mass[v]      (n, v) in the tail

What decides is r and not p: a token's gradient is as large as the mass of its others, and what may
be left out of it is a share of that. With a softcap, r is a share of the mass times the slope.

The final log-sum-exp is not known during the sweep. The running one is: a lower bound, so a column
is selected rather once too often. *Probe classes* bring it close from the start: those that are
labels in this batch hold most of the mass of real text, and there are few of them, so they go
first. What error remains in a block's column sums is taken out by scaling them to the block's row
sums, which are known exactly in the end.

Whatever the softmax, the tail's mass is bounded by V * DROP_BELOW: a flat softmax has no column to
drop. Where more than half of the columns would be selected, all are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.backends.blocks.logits import (
    NEGLIGIBLE,
    LogitBlocks,
    LogSum,
    Survey,
    as_matrix,
    find_labels,
    take_rows,
)
from crosscut.backends.column_filter import (
    BLOCK_N,
    DROP_BELOW,
    MAX_TAIL_MASS,
    SELECTED,
    column_blocks,
)
from crosscut.backends.protocol import HeadProblem, Saved, Statistics, own_labels

BLOCK_V = 4096
"""Classes of one block. A block of float32 logits is 16 MiB."""

MAX_PROBES = 4096

FAR = 4.0
"""Tokens with a higher exponent in a block have it made again, relative to their highest logit and
in full precision. What is that far above the reference is nearly all of the softmax, and its error
grows with the distance: in bfloat16 it is 2**-9 of it.
"""


def compute_statistics(problem: HeadProblem, *, filter_columns: bool) -> Statistics:
    """The statistics of every row that takes part; zeros elsewhere.

    They are the same bits whether the filter is wanted or not.
    """
    running = probe(problem, filter_columns=filter_columns)
    sweep(running)
    return combine(running)


def probe(
    problem: HeadProblem,
    *,
    filter_columns: bool,
    sum_over_shards: Callable[[Tensor], Tensor] | None = None,
) -> RunningStatistics:
    """What is known before the sweep: target logits, where a token's logits are, probe classes.

    Args:
        problem: a head, or a shard of one.
        filter_columns: whether a backward is to leave out columns.
        sum_over_shards: adds up target logits, 0 where a target is not here; None: all are here.
    """
    running = RunningStatistics(
        problem, problem.rows, filter_columns=filter_columns, sum_over_shards=sum_over_shards
    )
    if len(running.rows):
        running.take_survey()
        running.visit_probes()
    return running


def sweep(running: RunningStatistics) -> None:
    """All other classes."""
    for start in range(0, running.num_classes if len(running.rows) else 0, BLOCK_V):
        running.visit(start)
    running.add_infinite_logits()


class Part(NamedTuple):
    """What one shard's sweep comes to, [R] each; :meth:`RunningStatistics.join` wants them all."""

    high: Tensor  # log-sum-exp of the others that are here, the two parts of it
    low: Tensor
    gap: Tensor
    logit_sum: Tensor
    target_rank: Tensor
    best_logit: Tensor
    best_class: Tensor  # of the whole vocabulary


def combine(running: RunningStatistics) -> Statistics:
    """The statistics of all classes; each token's own joins the others."""
    problem, rows = running.problem, running.rows

    def scatter(values: Tensor) -> Tensor:
        shape = (len(problem.labels), *values.shape[1:])
        return values.new_zeros(shape).index_copy_(0, rows, values)

    def none() -> Tensor:
        return running.gap.new_empty(0, dtype=dtype)

    dtype = problem.statistics_dtype
    lse, lse_compensation = running.lse().rounded(dtype)
    return Statistics(
        lse=scatter(lse),
        target_logit=scatter(running.target_logit.to(dtype).view(-1, *problem.labels.shape[1:])),
        log_prob=scatter(running.finish_log_prob().to(dtype).view(-1, *problem.labels.shape[1:])),
        logit_sum=none()
        if problem.logit_weight is None
        else scatter(running.finish_logit_sum().to(dtype)),
        entropy=scatter(running.finish_entropy().to(dtype)) if problem.entropy else none(),
        argmax=scatter(running.finish_argmax()) if problem.ranks else rows[:0].clone(),
        target_rank=scatter(running.target_rank) if problem.ranks else rows[:0].clone(),
        saved=Saved(
            lse_compensation=scatter(lse_compensation),
            column_mass=running.column_mass,
            tail_mass=scatter(running.settle_tail()) if running.filter_columns else none(),
        ),
    )


class RunningStatistics:
    """Statistics of the classes visited so far. Vectors are [R], for the R valid rows."""

    def __init__(
        self,
        problem: HeadProblem,
        rows: Tensor,
        *,
        filter_columns: bool,
        sum_over_shards: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.problem, self.rows = problem, rows
        self.logits = LogitBlocks(problem)
        self.num_classes = problem.classifier.shape[0]
        self.labels = as_matrix(problem.labels[rows])  # [R, K], some of them -1
        self.places = as_matrix(problem.places[rows])  # the same among the classes that are here
        here = (self.labels >= 0) & (self.places >= 0) & (self.places < self.num_classes)
        self.here = here  # [R, K]
        self.token_blocks = rows.split(BLOCK_N) if len(rows) else ()

        zeros = torch.zeros(rows.shape, dtype=self.logits.dtype, device=rows.device)
        self.others = LogSum.of_nothing(zeros.to(self.logits.wide))
        # The same of what the softcap has left of the gradient.
        capped = self.logits.softcap is not None
        self.sloped = LogSum.of_nothing(self.others.high) if capped else self.others
        self.gap = zeros.to(self.logits.wide)  # others less the mean logit of the others
        self.target_logit = self._indexed_matmul()  # [R, K]
        if sum_over_shards is not None:
            self.target_logit = sum_over_shards(self.target_logit)
        self.own = own_labels(self.labels, self.target_logit)  # [R]
        self.own_place = self.own - problem.shard.start
        own_logit = torch.where(self.labels == self.own[:, None], self.target_logit, -math.inf)
        self.own_logit = own_logit.amax(1)
        self.own_sum = LogSum(self.own_logit, torch.zeros_like(self.own_logit))
        # What the next block is made relative to: the running log-sum-exp of the others, and before
        # there is one that of a survey, or the logit of the token's own class. Always finite.
        finite = self.own_logit.isfinite()
        self.reference = torch.where(finite, self.own_logit, 0).to(self.logits.dtype)
        self.logits.expect(self.reference)
        self.logits.expect_tokens(len(rows))
        self.survey = None
        if self.logits.fast != self.logits.dtype:
            self.survey = Survey(self.logits, problem)
        self.seen = zeros.clone(), torch.full_like(zeros, -math.inf)  # what the survey has found

        self.target_rank = torch.zeros_like(rows)
        self.best_class = torch.zeros_like(rows)  # of all but the target
        self.best_logit = torch.full_like(self.gap, -math.inf)

        self.weight = problem.logit_weight
        self.logit_sum = torch.zeros_like(self.gap)

        self.filter_columns = filter_columns
        most = min(MAX_PROBES, self.num_classes // 16)
        if self.logits.consistent and self.logits.fast == self.logits.dtype:
            most = 0  # no better than the others, and not the same to the last bit
        self.probes = _most_frequent(self.places[here], most)  # sorted
        blocks = column_blocks(problem.labels.shape[0]) if filter_columns else 0
        self.column_mass = zeros.new_zeros(blocks, self.num_classes)
        self.column_mass[:, self.probes] = SELECTED
        if filter_columns:
            for index, part, _ in self._tokens():
                self.column_mass[index, self.places[part][here[part]]] = SELECTED
        self.log_tail: list[Tensor] = []  # of each block of classes, [R]

    def take_survey(self) -> None:
        """See where the logits of each token are."""
        if self.survey is None:
            return
        for _, part, hidden in self._tokens():
            found = self.survey.look(hidden, self.own_place[part])
            for values, of_part in zip(self.seen, found, strict=True):
                values[part] = of_part
            lse = found[1]
            self.reference[part] = torch.where(lse.isfinite(), lse, self.reference[part])

    def visit_probes(self) -> None:
        """The classes that hold most of the mass, in the full precision of the statistics."""
        none = self.probes[:0]
        for classes in self.probes.split(BLOCK_V // 4) if len(self.probes) else ():
            classifier = self.problem.classifier[classes].to(self.logits.dtype)
            for _, part, hidden in self._tokens():
                found = self._reduce(classes, classifier, hidden.to(classifier), part, none)
                if self.filter_columns:
                    self._add_slope(*found, part)

    def visit(self, start: int) -> None:
        """One block of classes, less the probes; every token, BLOCK_N at a time."""
        classes = slice(start, start + BLOCK_V)
        classifier = self.problem.classifier[classes].to(self.logits.fast)  # [BLOCK_V, D]
        probes = self.probes[(self.probes >= start) & (self.probes < start + BLOCK_V)] - start
        log_tail = torch.full_like(self.reference, -math.inf)
        for index, part, hidden in self._tokens():
            block, slope, reference = self._reduce(
                classes, classifier, hidden.to(classifier), part, probes
            )  # [BLOCK_V, BLOCK_N]
            if self.filter_columns:
                self._add_slope(block, slope, reference, part)
                log_tail[part] = self._filter(block, reference, index, part, classes) + reference
        if self.filter_columns:
            self.log_tail.append(log_tail)

    def _add_slope(
        self, block: Tensor, slope: Tensor | None, reference: Tensor, part: slice
    ) -> None:
        """Multiply the exponentials of a block by the softcap's slope, and add them up."""
        if slope is None:
            return
        sums = block.mul_(slope).sum(0).to(self.gap)
        of_block = LogSum(reference.to(sums), sums.log())
        self.sloped.put(part, self.sloped.at(part).plus(of_block))

    def _filter(
        self, block: Tensor, reference: Tensor, index: int, part: slice, classes: slice
    ) -> Tensor:
        """Decide each column of a block; log of the tail's mass of each token, less reference."""
        lse = self.others.at(part).plus(self.own_sum.at(part)).value()
        of_others, mass = (
            block @ (reference - total).exp().to(block)
            for total in (self.sloped.at(part).value(), lse)
        )  # [BLOCK_V], the sums of r and of p
        most = min(DROP_BELOW, MAX_TAIL_MASS / self.problem.total_classes)
        threshold = block.shape[1] * most
        column_mass = self.column_mass[index, classes]
        dropped = (of_others < threshold) & (column_mass != SELECTED)  # a NaN is selected
        column_mass.copy_(torch.where(dropped, mass, SELECTED))
        return (dropped.to(block) @ block).log()

    def settle_tail(self) -> Tensor:
        """Tail mass [R] under the final lse; column masses rescaled to it, or all selected."""
        if not self.log_tail:
            return torch.zeros_like(self.reference)
        lse = self.lse().value()
        tails = (torch.stack(self.log_tail) - lse).exp().to(self.column_mass)  # [-, R]
        tail_mass = tails.sum(0)
        for index, part, _ in self._tokens():
            mass = self.column_mass[index]
            # An infinite logit makes its token's gradient NaN, and no one else's.
            if (mass == SELECTED).float().mean() > 0.5 or not lse[part].isfinite().all():
                mass.fill_(SELECTED)
                tail_mass[part] = 0
                continue
            for true, block in zip(tails[:, part].sum(1), mass.split(BLOCK_V), strict=True):
                dropped = block != SELECTED
                running = block[dropped].sum()
                factor = torch.where(running > 0, true / running, 0)
                block.copy_(torch.where(dropped, block * factor, SELECTED))
        return tail_mass

    def add_infinite_logits(self) -> None:
        """To the logit sum, which nothing can be relative to them."""
        if self.weight is None or not self.num_classes:
            return
        mine = (self.here & (self.labels == self.own[:, None])).any(1)
        of_own = self.weight[torch.where(mine, self.own_place, 0)] * self.own_logit
        self.logit_sum += torch.where(mine & ~self.own_logit.isfinite(), of_own, 0)

    def part(self) -> Part:
        """What the classes that are here come to."""
        return Part(
            self.others.high,
            self.others.low,
            self.gap,
            self.logit_sum,
            self.target_rank,
            self.best_logit,
            self.best_class + self.problem.shard.start,
        )

    def join(self, parts: Sequence[Part]) -> None:
        """Make these the statistics of the whole vocabulary, given the parts of all its shards.

        Args:
            parts: by ascending class.
        """
        first, *rest = parts
        self.others, self.gap = LogSum(first.high, first.low), first.gap
        self.logit_sum, self.target_rank = first.logit_sum, first.target_rank
        self.best_logit, self.best_class = first.best_logit, first.best_class
        for part in rest:
            of_part = LogSum(part.high, part.low)
            self.gap = _joint_gap(self.others, self.gap, of_part, part.gap)
            self.others = self.others.plus(of_part)
            self.logit_sum = self.logit_sum + part.logit_sum
            self.target_rank = self.target_rank + part.target_rank
            better = part.best_logit > self.best_logit
            self.best_logit = torch.where(better, part.best_logit, self.best_logit)
            self.best_class = torch.where(better, part.best_class, self.best_class)

    def lse(self) -> LogSum:
        """The log-sum-exp of each row [R]."""
        return self.others.plus(self.own_sum)

    def finish_log_prob(self) -> Tensor:
        """Log-probabilities [R, K]."""
        lse = self.lse()
        own_log_prob = F.logsigmoid(self.own_sum.minus(self.others))
        own_log_prob += lse.value() - lse.value()  # 0; of infinite logits, as in PyTorch, NaN
        others = (self.target_logit - lse.high[:, None]) - lse.low[:, None]
        log_prob = torch.where(self.labels == self.own[:, None], own_log_prob[:, None], others)
        return log_prob.masked_fill_(self.labels < 0, 0)

    def finish_logit_sum(self) -> Tensor:
        """``sum_v weight[v] * (z[n, v] - lse[n])`` of each row [R]."""
        lse, known = self.lse(), self.own_logit.isfinite()
        own_log_prob = F.logsigmoid(self.own_sum.minus(self.others))
        own_log_prob += lse.value() - lse.value()
        start = torch.where(known, own_log_prob, -lse.value())
        return self.logit_sum + self.problem.total_logit_weight * start

    def finish_entropy(self) -> Tensor:
        """``-sum_v p log p`` of each row [R]: of being one's own class or not, and of which other.

        A sum of numbers that are not negative.
        """
        log_odds = self.own_sum.minus(self.others)
        log_p, log_rest = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
        rest = log_rest.exp()
        of_rest = torch.where(rest > 0, rest * (self.gap.clamp_min(0) - log_rest), 0)  # 0 log 0 = 0
        return of_rest - torch.where(log_p > -math.inf, log_p.exp() * log_p, 0)

    def finish_argmax(self) -> Tensor:
        """The class that is sorted first, of each row [R]."""
        return torch.where(self.target_rank == 0, self.labels[:, 0], self.best_class)

    def _tokens(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Number, slice of the [R] vectors, and hidden states [n, D] of each block of tokens."""
        for index, rows in enumerate(self.token_blocks):
            first = index * BLOCK_N
            yield index, slice(first, first + len(rows)), take_rows(self.problem.hidden, rows)

    def _indexed_matmul(self) -> Tensor:
        """Algorithm 1: each hidden state times the classifier rows of its labels, [R, K]."""
        target_logit = torch.zeros_like(self.labels, dtype=self.logits.wide)
        if not self.num_classes:
            return target_logit
        for _, part, hidden in self._tokens():
            # A loss may be far smaller than the two numbers it is the difference of.
            wide = hidden.to(self.logits.wide)
            for k, places in enumerate(torch.where(self.here, self.places, 0)[part].t()):
                products = (wide * self.problem.classifier[places]).sum(1)
                bias = None if self.problem.bias is None else self.problem.bias[places]
                target_logit[part, k] = self.logits.activate(products, bias)[0]
        return target_logit.masked_fill_(~self.here, 0)

    def _reduce(
        self, classes: slice | Tensor, classifier: Tensor, hidden: Tensor, part: slice, seen: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One block of Algorithm 2, added to the running sums; without its rows ``seen`` before.

        Returns the exponentials of ``logits - reference`` [v, n], the slope of the softcap where
        the column filter wants it, and the reference [n].
        """
        bias = None if self.problem.bias is None else self.problem.bias[classes]
        reference = self.reference[part].clone()  # no view: the original is about to move on
        # Ranks compare logits: equal ones must stay so, whatever is subtracted.
        center = self.logits.center_at(reference, hidden.dtype)
        if self.problem.ranks:
            center = None
        elif hidden.dtype != self.logits.dtype and self.survey is not None:
            center = self.survey.center((self.seen[0][part], self.seen[1][part]), reference)
        full = center is None  # the logits themselves are at hand, and precise
        block, slope = self.logits.sloped_block(
            classifier, bias, hidden, None if full else reference, center,
            sloped=self.filter_columns,
        )  # fmt: skip
        own = find_labels(classes, len(block), self.own_place[part])
        if full:
            of_own = block[own]
            block[own] = -math.inf
            highest = block.amax(0)
            far = self._are_far(highest - reference, part) & highest.isfinite()
            reference = torch.where(far, highest, reference)
            block[own] = of_own
            block.sub_(reference)
        if self.weight is not None:
            weight = self.weight[classes].index_fill(0, seen, 0)
            self._add_to_logit_sum(weight, block, reference, own, part)
        block.index_fill_(0, seen, -math.inf)
        block[own] = -math.inf
        if not full:
            self._make_far_ones_again(block, slope, reference, part, (classifier, bias, hidden))
        if self.problem.ranks:
            self._rank(classes, block, reference, part)
        if not self.problem.entropy:
            exponentials = block.exp_()
            self._add_to_others(exponentials.sum(0), reference, part)
        else:
            exponentials = block.exp()
            weighted = block.clamp_min_(NEGLIGIBLE).mul_(exponentials).sum(0)
            self._add_to_others(exponentials.sum(0), reference, part, weighted)
        return exponentials, slope, reference

    def _rank(self, classes: slice | Tensor, block: Tensor, reference: Tensor, part: slice) -> None:
        """Count the classes of a block ahead of the target, and find the best of them."""
        places = self.places[part, 0]
        target = self.target_logit[part, 0].to(reference) - reference
        if isinstance(classes, slice):
            index = torch.arange(classes.start, classes.start + len(block), device=block.device)
        else:
            index = classes
        ahead = (block == target).logical_and_(index[:, None] < places).logical_or_(block > target)
        self.target_rank[part] += ahead.sum(0)
        highest, row = block.max(0)
        logit, best = highest.to(self.best_logit) + reference, self.best_logit[part]
        better = (logit > best) | ((logit == best) & (index[row] < self.best_class[part]))
        self.best_logit[part] = torch.where(better, logit, best)
        self.best_class[part] = torch.where(better, index[row], self.best_class[part])

    def _are_far(self, highest: Tensor, part: slice) -> Tensor:
        """Whether the highest of a block is far above the reference, given their distance [n].

        Or on either side of it, as long as nothing is known of the others.
        """
        unknown = self.others.at(part).low == -math.inf
        return (highest > FAR) | (unknown & (highest < -FAR))

    def _make_far_ones_again(
        self,
        block: Tensor,
        slope: Tensor | None,
        reference: Tensor,
        part: slice,
        factors: tuple[Tensor, Tensor | None, Tensor],
    ) -> None:
        """Mend columns of a block, and slopes, whose highest logit is far from their reference."""
        highest = block.amax(0)
        tokens = (self._are_far(highest, part) & highest.isfinite()).nonzero().squeeze(1)
        if not len(tokens):
            return
        classifier, bias, hidden = factors
        classifier = classifier.to(self.logits.dtype)
        for some in tokens.split(BLOCK_N // 8):
            moved = reference[some] + highest[some]
            center = self.logits.center_at(moved, classifier.dtype)
            again, sloped = self.logits.sloped_block(
                classifier, bias, hidden[some].to(classifier), moved, center
            )
            if slope is not None:
                slope[:, some] = sloped
            again.masked_fill_(block[:, some] == -math.inf, -math.inf)
            rest = torch.nan_to_num(again.amax(0), 0, 0, 0)  # what rounding has left of huge ones
            block[:, some] = again.sub_(rest)
            reference[some] = moved + rest
        self.logits.expect(reference)

    def _add_to_logit_sum(
        self,
        weight: Tensor,
        block: Tensor,
        reference: Tensor,
        own: tuple[Tensor, Tensor],
        part: slice,
    ) -> None:
        """Add a block, relative to the reference, to a sum relative to the own logit."""
        block[own] = 0
        weights = weight.sum().expand(block.shape[1]).index_add(0, own[1], -weight[own[0]])
        known = self.own_logit[part].isfinite()
        moved = reference - torch.where(known, self.own_logit[part], 0)
        self.logit_sum[part] += weight.to(block) @ block + weights * moved

    def _add_to_others(
        self, sums: Tensor, reference: Tensor, part: slice, weighted: Tensor | None = None
    ) -> None:
        """Add a block, given ``sum_v e`` and ``sum_v e (z - reference)``, [n], of its e = exp(z -
        reference).
        """
        sums = sums.to(self.gap)
        block_lse, before = LogSum(reference.to(sums), sums.log()), self.others.at(part)
        if weighted is not None:
            block_gap = sums.log() - weighted / sums
            self.gap[part] = _joint_gap(before, self.gap[part], block_lse, block_gap)
        self.others.put(part, before.plus(block_lse))
        others = self.others.at(part).value()
        finite = others.isfinite()
        self.reference[part] = torch.where(finite, others.to(reference), self.reference[part])


def _joint_gap(some: LogSum, gap: Tensor, more: LogSum, gap_of_more: Tensor) -> Tensor:
    """Log-sum-exp less the mean logit, of two sets of classes together; both may be empty."""
    log_odds = more.minus(some)
    log_share, log_rest = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
    joint = log_share.exp() * (gap_of_more - log_share) + log_rest.exp() * (gap - log_rest)
    joint = torch.where(log_odds == math.inf, gap_of_more, joint)  # the first ones
    return torch.where(more.low > -math.inf, joint, gap)


def _most_frequent(labels: Tensor, most: int) -> Tensor:
    """The distinct labels, or the ``most`` frequent of them, sorted."""
    distinct, counts = labels.unique(return_counts=True)
    if len(distinct) > most:
        distinct = distinct[counts.argsort(descending=True, stable=True)[:most]].sort().values
    return distinct
