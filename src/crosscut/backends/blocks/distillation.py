"""How far a student's softmax is from its teacher's, and the gradient: the logits of neither.

With p and q the softmax of student and teacher, at one temperature, and ``m = b q + (1 - b) p``:

    forward    sum_v q (log q - log p)             d/dz = p - q
    reverse    sum_v p (log p - log q)             d/dz = p (log p - log q - center)
    js         b sum_v q (log q - log m) + (1 - b) sum_v p (log p - log m)
                                                   d/dz = (1 - b) p (log p - log m) - p center

``center`` is the mean of what stands beside p, under p: the gradient of a softmax's logits sums to
zero. A hard loss is the cross-entropy of the same blocks of logits, times the temperature.

Forward and reverse divergence are differences of logits, averaged under one of the two: as the
log-sum-exp, this average runs along in one sweep over the classes. The mixture needs both
log-sum-exps first, and a second sweep. With D the sum of both hidden sizes, 2NVD flop a sweep; the
backward is one more, and the student's two products.

A teacher of whom k classes are stored is compared to a student of whom k logits are known, and the
log-sum-exp of the *rest*, from a sweep that leaves each token's k out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.backends.blocks.forward import BLOCK_V
from crosscut.backends.blocks.logits import (
    LogitBlocks,
    LogSum,
    check_labels,
    find_labels,
    mean_product,
    sample_classes,
    take_rows,
)
from crosscut.backends.protocol import (
    DistillationProblem,
    DivergenceCotangents,
    Divergences,
    Gradients,
    HeadProblem,
    Needs,
)
from crosscut.options import workspace_limit

BLOCK_N = 512
"""Tokens of one block, half of what a loss on one head takes: there are two, and a few of each."""

GPU_BLOCK_N, GPU_BLOCK_V = 1024, 8192
"""The most on a GPU, where a block costs some thirty launches. On a CPU they fit into its cache."""

LIVE_BLOCKS = 8
"""How many blocks there are at once, at most. On a GPU these, and the classifier's gradient of some
classes, take no more than ``workspace_limit()`` bytes; but it is 1024 classes at least."""


def compute_divergences(problem: DistillationProblem) -> Divergences:
    """The divergence of every valid row, and its hard loss."""
    check_labels(problem.student)
    rows = problem.student.rows  # [R]
    student, teacher = _sides(problem)
    hard = None if problem.temperature is None else _HardLoss(problem, rows)
    divergence = torch.zeros_like(student.lse.high)
    _look_ahead(problem, student, teacher)
    for classes in student.class_blocks():
        c, teacher_c = student.classifier(classes), teacher.classifier(classes)
        for part in student.parts():
            z, t = student.block(classes, c, part), teacher.block(classes, teacher_c, part)
            if hard is not None:
                hard.add(classes, z, student.reference[part], part)
            of_z, of_t = z.logsumexp(0), t.logsumexp(0)
            odds, teacher_odds = student.add(of_z, part), teacher.add(of_t, part)
            if problem.divergence == "js":
                continue
            log_p, log_q = z.sub_(_finite(of_z)), t.sub_(_finite(of_t))
            if problem.divergence == "forward":
                log_p, log_q, odds, teacher_odds = log_q, log_p, teacher_odds, odds
            of_block = _times_log_ratio(log_p, log_q).sum(0).to(divergence)
            divergence[part] = _joined(divergence[part], of_block, odds, teacher_odds)

    center = divergence
    if problem.divergence == "js":
        divergence, center = _mixture(problem, student, teacher)

    dtype = problem.student.statistics_dtype

    def scatter(values: Tensor) -> Tensor:
        out = values.new_zeros(problem.student.labels.shape, dtype=dtype)
        return out.index_copy_(0, rows, values.to(dtype))

    none = divergence.new_empty(0, dtype=dtype)
    student_lse, student_low = student.lse.rounded(dtype)
    teacher_lse, teacher_low = teacher.lse.rounded(dtype)
    return Divergences(
        divergence=scatter(divergence),
        hard_loss=none if hard is None else scatter(hard.loss()),
        hard_lse=none.clone() if hard is None else scatter(hard.lse_beside(student.lse)),
        student_lse=scatter(student_lse),
        teacher_lse=scatter(teacher_lse),
        lse_compensation=torch.stack([scatter(student_low), scatter(teacher_low)]),
        center=scatter(center),
    )


def _joined(of_some: Tensor, of_others: Tensor, odds: Tensor, other_odds: Tensor) -> Tensor:
    """Divergence over all classes, from those within two parts of them, [n] each.

    It is a mean of the two, and the divergence between the parts: a sum of numbers that are not
    negative, and 0 where all of them are.

    Args:
        of_some: divergence within the first part.
        of_others: within the second.
        odds: log-odds of the second part under the softmax from which the divergence is.
        other_odds: under the softmax to which it is.
    """
    total = torch.zeros_like(of_some)
    for within, sign in ((of_some, -1), (of_others, 1)):
        log_share = F.logsigmoid(sign * odds)
        term = within + (log_share - F.logsigmoid(sign * other_odds))
        total += _times_share(log_share, term)
    return total


def _times_share(log_share: Tensor, values: Tensor) -> Tensor:
    """``exp(log_share) * values``, 0 where the share is."""
    share = log_share.exp()
    return torch.where(share == 0, 0, share * values)


class _HardLoss:
    """The cross-entropy of the student's logits times the temperature, [R].

    The label's own class is left out of the sum over classes, and joins in the end: see
    :class:`crosscut.backends.protocol.Statistics`.
    """

    def __init__(self, problem: DistillationProblem, rows: Tensor) -> None:
        assert problem.temperature is not None
        self.temperature = problem.temperature
        self.labels = problem.student.labels[rows]
        target_logit = _logits_at(problem.student, rows, self.labels)
        target_logit *= self.temperature
        self.own = LogSum(target_logit, torch.zeros_like(target_logit))
        self.others = LogSum.of_nothing(self.own.low)

    def add(self, classes: slice, block: Tensor, reference: Tensor, part: slice) -> None:
        """Add a block, relative to the reference."""
        logits = block * self.temperature
        logits[find_labels(classes, len(block), self.labels[part])] = -math.inf
        reference = self.temperature * reference.to(self.own.high)
        of_block = LogSum(reference, logits.logsumexp(0).to(reference))
        self.others.put(part, self.others.at(part).plus(of_block))

    def loss(self) -> Tensor:
        return -F.logsigmoid(self.own.minus(self.others))

    def lse_beside(self, student: LogSum) -> Tensor:
        """The log-sum-exp, less the temperature times that of the divergence."""
        high, low = (self.temperature * values for values in (student.high, student.low))
        return self.others.plus(self.own).minus(LogSum(high, low))


def compute_student_gradients(
    problem: DistillationProblem,
    found: Divergences,
    cotangents: DivergenceCotangents,
    needs: Needs,
) -> Gradients:
    """Gradients of the student's inputs, given what the forward returned."""
    rows = problem.student.rows
    student, teacher = _sides(problem)
    _look_ahead(problem, student, teacher)
    student.settle(found.student_lse[rows], found.lse_compensation[0, rows])
    teacher.settle(found.teacher_lse[rows], found.lse_compensation[1, rows])
    hard = None
    if problem.temperature is not None and cotangents.hard_loss is not None:
        hard = _HardGradient(problem, found, cotangents.hard_loss, rows)

    def gradient(classes: slice, c: Tensor) -> Callable[[slice], Tensor]:
        teacher_c = teacher.classifier(classes)

        def of_part(part: slice) -> Tensor:
            log_p, slope = student.sloped_block(classes, c, part)
            log_q = teacher.block(classes, teacher_c, part)
            chosen = rows[part]
            dz = _slope(problem, log_p, log_q, found.center[chosen])
            dz.mul_(cotangents.divergence[chosen])
            if hard is not None:
                dz += hard.of_block(classes, log_p, part)
            return dz if slope is None else dz.mul_(slope)

        return of_part

    return _multiply(student, needs, gradient)


class _HardGradient:
    """Gradient of the hard loss by the student's logits. Vectors are [R]."""

    def __init__(
        self, problem: DistillationProblem, found: Divergences, d_loss: Tensor, rows: Tensor
    ) -> None:
        assert problem.temperature is not None
        self.temperature = problem.temperature
        self.labels = problem.student.labels[rows]
        self.lse = found.hard_lse[rows]
        self.d_loss = self.temperature * d_loss[rows]
        self.d_own = self.d_loss * (-found.hard_loss[rows]).expm1()

    def of_block(self, classes: slice, log_p: Tensor, part: slice) -> Tensor:
        """[v, n], given the log-probabilities of a block."""
        dz = (log_p * self.temperature).sub_(self.lse[part]).exp_().mul_(self.d_loss[part])
        row, token = find_labels(classes, len(dz), self.labels[part])
        dz[row, token] = self.d_own[part][token]
        return dz


def compute_rest(problem: HeadProblem) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`crosscut.distillation_ops.Rest` holds, and what the backward wants to know.

    Which is the log-sum-exp of the rest itself, and what it lost where it was rounded, [2, N]. All
    are 0 at rows that are not valid.
    """
    check_labels(problem)
    rows, dtype = problem.rows, problem.statistics_dtype
    side, labels = _Side(problem, rows), problem.labels[rows]
    side.begin(side.sample(), without=labels)
    for classes in side.class_blocks():
        c = side.classifier(classes)
        for part in side.parts():
            z = side.block(classes, c, part)
            z[_find_all(classes, len(c), labels[part])[:2]] = -math.inf
            side.add(z.logsumexp(0), part)
    logits = torch.full(labels.shape, -math.inf, dtype=side.logits.wide, device=labels.device)
    for k, label in enumerate(labels.t()):
        logits[:, k] = _logits_at(problem, rows, label.clamp_min(0))
    logits.masked_fill_(labels < 0, -math.inf)
    highest = _finite(logits.amax(1))

    def scatter(values: Tensor) -> Tensor:
        out = values.new_zeros((len(problem.labels), *values.shape[1:]), dtype=dtype)
        return out.index_copy_(0, rows, values.to(dtype))

    lse = side.lse.minus(LogSum(highest, torch.zeros_like(highest)))
    logits = (logits - highest[:, None]).masked_fill_(labels < 0, 0)
    of_rest = torch.stack([scatter(values) for values in side.lse.rounded(dtype)])
    return scatter(lse), scatter(logits), of_rest


def compute_rest_gradients(
    problem: HeadProblem,
    of_rest: Tensor,
    cotangents: tuple[Tensor, Tensor],
    needs: Needs,
) -> Gradients:
    """Gradients of the inputs, given what :func:`compute_rest` returned.

    Args:
        problem: as there.
        of_rest: the log-sum-exp, and what it lost, [2, N].
        cotangents: of the log-sum-exp [N], and of the logits [N, K].
        needs: which gradients are wanted.
    """
    rows = problem.rows
    side, labels = _Side(problem, rows), problem.labels[rows]
    side.begin(side.sample(), without=labels)
    side.settle(*_finite(of_rest[:, rows]))
    d_lse, d_logits = (of_rows[rows] for of_rows in cotangents)

    def gradient(classes: slice, c: Tensor) -> Callable[[slice], Tensor]:
        def of_part(part: slice) -> Tensor:
            log_p, slope = side.sloped_block(classes, c, part)
            dz = log_p.exp_()
            row, token, k = _find_all(classes, len(dz), labels[part])
            dz[row, token] = 0
            dz.mul_(d_lse[part])
            dz.index_put_((row, token), d_logits[part][token, k].to(dz), accumulate=True)
            return dz if slope is None else dz.mul_(slope)

        return of_part

    return _multiply(side, needs, gradient)


def _find_all(
    classes: slice | Tensor, num_classes: int, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Which labels [n, K] are among some classes: the place of each in them, its token, its k."""
    row, place = find_labels(classes, num_classes, labels.reshape(-1))
    return row, place // labels.shape[1], place % labels.shape[1]


def _multiply(
    side: _Side, needs: Needs, gradient: Callable[[slice, Tensor], Callable[[slice], Tensor]]
) -> Gradients:
    """Gradients of a head's inputs, given that of its logits, block by block.

    Args:
        side: the head.
        needs: which gradients are wanted.
        gradient: of classes, and their classifier [v, D], to a function of some rows, to the
            gradient by the products of classifier and hidden states, before the scale, [v, n].
    """
    head, rows = side.problem, side.rows
    dtype, scale = side.logits.dtype, side.logits.scale
    d_hidden = head.hidden.new_zeros(len(rows), head.hidden.shape[1], dtype=dtype)
    d_classifier = head.classifier.new_empty(head.classifier.shape) if needs.classifier else None
    d_bias = None
    if needs.bias and head.bias is not None:
        d_bias = head.bias.new_empty(head.bias.shape)
    for classes in side.class_blocks():
        c = side.classifier(classes)
        of_part = gradient(classes, c)
        d_c = torch.zeros(c.shape, dtype=dtype, device=c.device)
        d_b = d_c.new_zeros(len(c))
        for part in side.parts():
            dz = of_part(part)
            d_b += dz.sum(1)
            narrow = dz.to(c)
            if needs.hidden:
                d_hidden[part] += narrow.t() @ c
            if d_classifier is not None:
                d_c += narrow @ side.hidden(part)
        if d_classifier is not None:
            d_classifier[classes] = d_c.mul_(scale).to(d_classifier)
        if d_bias is not None:
            d_bias[classes] = d_b.to(d_bias)

    whole = None
    if needs.hidden:
        whole = head.hidden.new_zeros(head.hidden.shape)
        whole.index_copy_(0, rows, d_hidden.mul_(scale).to(whole))
    return Gradients(whole, d_classifier, d_bias)


def gpu_block(num_rows: int, hidden_size: int, number_bytes: int) -> tuple[int, int]:
    """Tokens and classes of a block on a GPU."""
    tokens = max(1, min(num_rows, GPU_BLOCK_N))
    of_a_class = number_bytes * (LIVE_BLOCKS * tokens + 2 * hidden_size)
    classes = workspace_limit() // of_a_class // 256 * 256
    return tokens, min(max(1024, classes), GPU_BLOCK_V)


def _sides(problem: DistillationProblem) -> tuple[_Side, _Side]:
    """Student and teacher; the latter's logits are at least in the dtype of the former's."""
    student = _Side(problem.student, problem.student.rows)
    return student, _Side(problem.teacher, student.rows, student.logits.dtype)


class _Side:
    """One of the two heads: its blocks of logits and its running log-sum-exp, [R]."""

    def __init__(
        self, problem: HeadProblem, rows: Tensor, least: torch.dtype = torch.float32
    ) -> None:
        self.problem, self.rows = problem, rows
        self.logits = LogitBlocks(problem, least)
        self.logits.expect_tokens(len(rows))
        zeros = torch.zeros(rows.shape, dtype=self.logits.dtype, device=rows.device)
        self.lse = LogSum.of_nothing(zeros.to(self.logits.wide))
        self.reference = zeros  # what blocks are relative to: the log-sum-exp as far as known
        self.low: Tensor | None = None  # what the reference lost where it was rounded
        self.center: Tensor | None = None  # the product at which low precision rounds least
        self.block_n, self.block_v = BLOCK_N, BLOCK_V
        if rows.device.type != "cpu":
            number_bytes = zeros.element_size()
            self.block_n, self.block_v = gpu_block(len(rows), problem.hidden.shape[1], number_bytes)
        # Whether the rows have a gap is looked at once: a GPU must be waited for.
        no_gap = len(rows) > 0 and bool(rows[-1] - rows[0] == len(rows) - 1)
        self._together = take_rows(problem.hidden, rows) if no_gap else None

    def class_blocks(self) -> Iterator[slice]:
        num_classes = len(self.problem.classifier)
        for start in range(0, num_classes, self.block_v):
            yield slice(start, min(start + self.block_v, num_classes))

    def parts(self) -> Iterator[slice]:
        """Slices of ``block_n`` rows."""
        for start in range(0, len(self.rows), self.block_n):
            yield slice(start, min(start + self.block_n, len(self.rows)))

    def classifier(self, classes: slice | Tensor) -> Tensor:
        return self.problem.classifier[classes].to(self.logits.fast)

    def bias(self, classes: slice | Tensor) -> Tensor | None:
        return None if self.problem.bias is None else self.problem.bias[classes]

    def hidden(self, part: slice) -> Tensor:
        if self._together is None:
            return self.problem.hidden[self.rows[part]].to(self.logits.fast)
        return self._together[part].to(self.logits.fast)

    def block(self, classes: slice, classifier: Tensor, part: slice) -> Tensor:
        """:meth:`sloped_block` without the slope."""
        return self.sloped_block(classes, classifier, part, sloped=False)[0]

    def sloped_block(
        self, classes: slice, classifier: Tensor, part: slice, *, sloped: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Logits less the reference, [v, n]."""
        center = None if self.center is None else self.center[part]
        # The same logits in forward and backward, or a p near 1 would not be.
        block, slope = self.logits.sloped_block(
            classifier, self.bias(classes), self.hidden(part), None, center, sloped=sloped
        )
        block.sub_(self.reference[part])
        return (block if self.low is None else block.sub_(self.low[part])), slope

    def sample(self) -> Tensor:
        """Some classes, from all over the vocabulary."""
        return sample_classes(len(self.problem.classifier), self.rows.device)

    def begin(
        self,
        classes: Tensor,
        without: Tensor | None = None,
        weights: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Look at a sample of classes: where the log-sum-exp is, and the logits with the mass.

        Blocks then are made relative to about that log-sum-exp, and low precision rounds least at
        the mean logit: the log-sum-exp is far above where the softmax is flat.

        Args:
            classes: the sample.
            without: labels [R, K] that do not count.
            weights: the softmax of what counts as mass [v, n] of each part; its own if None.

        Returns:
            That softmax.
        """
        c, found = self.classifier(classes), []
        centers = torch.zeros_like(self.reference)
        for number, part in enumerate(self.parts()):
            products = F.linear(c, self.hidden(part)).to(self.reference)
            bias = self.bias(classes)
            bias = None if bias is None else bias[:, None]
            z, slope = self.logits.activate(products.clone(), bias, sloped=True)
            if without is not None:
                z[_find_all(classes, len(c), without[part])[:2]] = -math.inf
            self.reference[part] = _finite(z.logsumexp(0))
            found.append(z.softmax(0) if weights is None else weights[number])
            centers[part] = mean_product(products, found[-1], slope)
        if self.logits.fast != self.logits.dtype:
            self.center = centers
        return found

    def add(self, of_block: Tensor, part: slice) -> Tensor:
        """Add a block's log-sum-exp, less the reference, [n]; its log-odds to what was before."""
        block_lse = LogSum(self.reference[part].to(self.lse.low), of_block.to(self.lse.low))
        before = self.lse.at(part)
        odds = block_lse.minus(before)
        self.lse.put(part, before.plus(block_lse))
        lse = self.lse.at(part).value()
        self.reference[part] = torch.where(
            lse.isfinite(), lse.to(self.reference), self.reference[part]
        )
        return odds

    def settle(self, lse: Tensor, low: Tensor) -> None:
        """Make blocks of log-probabilities from now on."""
        self.reference, self.low = lse, low


def _look_ahead(problem: DistillationProblem, student: _Side, teacher: _Side) -> None:
    """Have both begin on the same classes.

    The reverse divergence asks the teacher what the student thinks likely. Forward and backward
    come to the same centers, and so to the same blocks.
    """
    classes = student.sample()
    weights = student.begin(classes)
    teacher.begin(classes, weights=weights if problem.divergence == "reverse" else None)


def _mixture(problem: DistillationProblem, student: _Side, teacher: _Side) -> tuple[Tensor, Tensor]:
    """The Jensen-Shannon divergence [R] and the center of its slope, once both lse are known."""
    divergence = torch.zeros_like(student.lse.high)
    center = torch.zeros_like(student.lse.high)
    student.settle(*student.lse.rounded(student.logits.dtype))
    teacher.settle(*teacher.lse.rounded(teacher.logits.dtype))
    for classes in student.class_blocks():
        c, teacher_c = student.classifier(classes), teacher.classifier(classes)
        for part in student.parts():
            log_p = student.block(classes, c, part)
            log_q = teacher.block(classes, teacher_c, part)
            above_p, above_q = _log_mixture(log_p, log_q, problem.beta)
            of_student = _times(log_p, above_p).sum(0).to(center)
            center[part] -= (1 - problem.beta) * of_student
            divergence[part] -= problem.beta * _times(log_q, above_q).sum(0).to(center)
    return divergence + center, center


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """How far ``log m`` is above ``log p``, and above ``log q``: little where these are near."""
    apart = log_p.to(torch.promote_types(log_p.dtype, log_q.dtype)) - log_q
    p_is_larger, apart = apart > 0, apart.abs_()
    share = torch.where(p_is_larger, apart.new_tensor(beta), apart.new_tensor(1 - beta))
    above_larger = (-apart).expm1_().mul_(share).log1p_()  # at most 0
    del share  # a block as large as the others
    above_smaller = apart.add_(above_larger)
    return (
        torch.where(p_is_larger, above_larger, above_smaller),
        torch.where(p_is_larger, above_smaller, above_larger),
    )


def _times(log_p: Tensor, values: Tensor) -> Tensor:
    """``p`` times values, 0 where p is; these are overwritten."""
    p = log_p.exp()
    return values.masked_fill_(p == 0, 0).mul_(p)


def _times_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p (log p - log q)``, 0 where p is."""
    return _times(log_p, log_p - log_q)


def _slope(problem: DistillationProblem, log_p: Tensor, log_q: Tensor, center: Tensor) -> Tensor:
    """Derivative of the divergence by the student's logits, [v, n]."""
    if problem.divergence == "forward":
        return log_p.exp() - log_q.exp()
    if problem.divergence == "reverse":
        return _times_log_ratio(log_p, log_q).sub_(log_p.exp().mul_(center))
    above_p, _ = _log_mixture(log_p, log_q, problem.beta)
    slope = _times(log_p, above_p).mul_(problem.beta - 1)
    return slope.sub_(log_p.exp().mul_(center))


def _logits_at(head: HeadProblem, rows: Tensor, labels: Tensor) -> Tensor:
    """A logit of each row, [R], at a class of its own; in the widest dtype."""
    logits = LogitBlocks(head)
    out = torch.zeros(rows.shape, dtype=logits.wide, device=rows.device)
    for part in range(0, len(rows), BLOCK_N):
        some = slice(part, part + BLOCK_N)
        products = (head.hidden[rows[some]].to(out) * head.classifier[labels[some]]).sum(1)
        bias = None if head.bias is None else head.bias[labels[some]]
        out[some] = logits.activate(products, bias)[0]
    return out


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0)
