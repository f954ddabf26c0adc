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
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from crosscut.backends.blocks.forward import BLOCK_V
from crosscut.backends.blocks.logits import LogitBlocks, check_labels, find_labels, take_rows
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
    """The divergence of every row that takes part, and the statistics of the hard loss."""
    check_labels(problem.student)
    rows = problem.student.rows  # [R]
    student, teacher = _Side(problem.student, rows), _Side(problem.teacher, rows)
    zeros = torch.zeros_like(student.lse)
    mean_gap, center = zeros.clone(), zeros.clone()
    hard_lse = torch.full_like(zeros, -math.inf)
    _look_ahead(problem, student, teacher)
    student.begin()
    teacher.begin()
    for classes in student.class_blocks():
        c, teacher_c = student.classifier(classes), teacher.classifier(classes)
        for part in student.parts():
            z, t = student.block(classes, c, part), teacher.block(classes, teacher_c, part)
            if problem.temperature is not None:
                block_lse = problem.temperature * (z + student.reference[part])
                block_lse = block_lse.logsumexp(0).to(hard_lse)
                hard_lse[part] = torch.logaddexp(hard_lse[part], block_lse)
            if problem.divergence == "js":
                student.add(z, part)
                teacher.add(t, part)
                continue
            forward = problem.divergence == "forward"
            (this, a), (other, b) = (
                ((teacher, t), (student, z)) if forward else ((student, z), (teacher, t))
            )
            weight = (a - _finite(a.amax(0))).exp_()
            gap = (a - b).masked_fill_(weight == 0, 0)  # of what cannot be, inf - inf
            sums = weight.sum(0)
            block_gap = gap.mul_(weight).sum(0).div_(sums).to(zeros)
            block_gap += this.reference[part].to(zeros) - other.reference[part]
            share = this.add(a, part)
            other.add(b, part)
            moved = mean_gap[part] + share * (block_gap - mean_gap[part])
            mean_gap[part] = torch.where(share > 0, moved, mean_gap[part])

    if problem.divergence == "js":
        divergence, center = _mixture(problem, student, teacher)
    elif problem.divergence == "forward":
        divergence = mean_gap - (teacher.lse - student.lse)
    else:
        divergence = center = mean_gap - (student.lse - teacher.lse)

    def scatter(values: Tensor) -> Tensor:
        dtype = problem.student.statistics_dtype
        out = values.new_zeros(problem.student.labels.shape, dtype=dtype)
        return out.index_copy_(0, rows, values.to(dtype))

    none = zeros.new_empty(0, dtype=problem.student.statistics_dtype)
    hard = problem.temperature is not None
    return Divergences(
        divergence=scatter(divergence),
        hard_lse=scatter(hard_lse) if hard else none,
        target_logit=scatter(_target_logits(problem, rows)) if hard else none.clone(),
        student_lse=scatter(student.lse),
        teacher_lse=scatter(teacher.lse),
        center=scatter(center),
    )


def compute_student_gradients(
    problem: DistillationProblem,
    found: Divergences,
    cotangents: DivergenceCotangents,
    needs: Needs,
) -> Gradients:
    """Gradients of the student's inputs, given what the forward returned."""
    rows = problem.student.rows
    student, teacher = _Side(problem.student, rows), _Side(problem.teacher, rows)
    _look_ahead(problem, student, teacher)
    student.settle(found.student_lse[rows])
    teacher.settle(found.teacher_lse[rows])

    def gradient(classes: slice, c: Tensor) -> Callable[[slice], Tensor]:
        teacher_c = teacher.classifier(classes)

        def of_part(part: slice) -> Tensor:
            log_p, slope = student.sloped_block(classes, c, part)
            log_q = teacher.block(classes, teacher_c, part)
            chosen = rows[part]
            dz = _hard_gradient(problem, found, cotangents, log_p, (classes, chosen))
            soft = _slope(problem, log_p, log_q, found.center[chosen])
            soft.mul_(cotangents.divergence[chosen])
            dz = soft if dz is None else dz.add_(soft)
            return dz if slope is None else dz.mul_(slope)

        return of_part

    return _multiply(student, needs, gradient)


def compute_rest(problem: HeadProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the classes that are no label of a token [N], and its labels' logits [N, K].

    And what the former lost where it was rounded [N]. All are 0 at rows that take no part.
    """
    check_labels(problem)
    rows = problem.rows
    side, labels = _Side(problem, rows), problem.labels[rows]
    side.begin(labels)
    for classes in side.class_blocks():
        c = side.classifier(classes)
        for part in side.parts():
            z = side.block(classes, c, part)
            z[_find_all(classes, len(c), labels[part])[:2]] = -math.inf
            side.add(z, part)
    lse = torch.zeros_like(problem.labels[:, 0], dtype=problem.statistics_dtype)
    lse.index_copy_(0, rows, side.lse.to(lse))
    low = torch.zeros_like(lse).index_copy_(0, rows, _finite(side.lse - lse[rows]).to(lse))
    logits = torch.zeros_like(problem.labels, dtype=problem.statistics_dtype)
    for k in range(labels.shape[1]):
        logits[rows, k] = _logits_at(problem, rows, labels[:, k].clamp_min(0)).to(logits)
    return lse, logits.masked_fill_(problem.labels < 0, 0), low


def compute_rest_gradients(
    problem: HeadProblem,
    lse: tuple[Tensor, Tensor],
    cotangents: tuple[Tensor, Tensor],
    needs: Needs,
) -> Gradients:
    """Gradients of the inputs, given what :func:`compute_rest` returned.

    Args:
        problem: as there.
        lse: [N], and what it lost.
        cotangents: of the log-sum-exp [N], and of the logits [N, K].
        needs: which gradients are wanted.
    """
    rows = problem.rows
    side, labels = _Side(problem, rows), problem.labels[rows]
    high, low = (of_rows[rows] for of_rows in lse)
    side.settle(_finite(high))
    d_lse, d_logits = (of_rows[rows] for of_rows in cotangents)

    def gradient(classes: slice, c: Tensor) -> Callable[[slice], Tensor]:
        def of_part(part: slice) -> Tensor:
            log_p, slope = side.sloped_block(classes, c, part)
            dz = log_p.sub_(low[part]).exp_()
            row, token, k = _find_all(classes, len(dz), labels[part])
            dz[row, token] = 0
            dz.mul_(d_lse[part])
            dz.index_put_((row, token), d_logits[part][token, k].to(dz), accumulate=True)
            return dz if slope is None else dz.mul_(slope)

        return of_part

    return _multiply(side, needs, gradient)


def _find_all(classes: slice, num_classes: int, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


class _Side:
    """One of the two heads: its blocks of logits and its running log-sum-exp, [R]."""

    def __init__(self, problem: HeadProblem, rows: Tensor) -> None:
        self.problem, self.rows = problem, rows
        self.logits = LogitBlocks(problem)
        zeros = torch.zeros(rows.shape, dtype=self.logits.dtype, device=rows.device)
        self.lse = torch.full_like(zeros, -math.inf, dtype=self.logits.wide)
        self.reference = zeros  # what blocks are relative to: the log-sum-exp as far as known
        self.center: Tensor | None = None  # where low precision rounds least
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

    def classifier(self, classes: slice) -> Tensor:
        return self.problem.classifier[classes].to(self.logits.fast)

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
        bias = None if self.problem.bias is None else self.problem.bias[classes]
        center = None if self.center is None else self.center[part]
        hidden = self.hidden(part)
        return self.logits.sloped_block(
            classifier, bias, hidden, self.reference[part], center, sloped=sloped
        )

    def begin(self, without: Tensor | None = None) -> None:
        """Have the first block made relative to its own log-sum-exp and not to 0.

        Differences of logits then are rounded to a share of what matters, wherever the logits are.

        Args:
            without: labels [R, K] that do not count.
        """
        classes = next(self.class_blocks())
        c = self.classifier(classes)
        for part in self.parts():
            block = self.block(classes, c, part)
            if without is not None:
                block[_find_all(classes, len(c), without[part])[:2]] = -math.inf
            self.reference[part] = _finite(block.logsumexp(0))

    def add(self, block: Tensor, part: slice) -> Tensor:
        """Add a block to the log-sum-exp; its share of the softmax so far, [n]."""
        block_lse = block.logsumexp(0).to(self.lse) + self.reference[part]
        self.lse[part] = lse = torch.logaddexp(self.lse[part], block_lse)
        self.reference[part] = torch.where(
            lse.isfinite(), lse.to(self.reference), self.reference[part]
        )
        return (block_lse - lse).exp()

    def settle(self, lse: Tensor) -> None:
        """Make blocks of log-probabilities from now on."""
        self.reference = lse


def _look_ahead(problem: DistillationProblem, student: _Side, teacher: _Side) -> None:
    """Have low precision round least where it matters most, going by the first block.

    That is at the mean logit of the softmax: the log-sum-exp is far above the logits that hold the
    mass where the softmax is flat. The reverse divergence asks the teacher what the student thinks
    likely. Forward and backward come to the same centers, and so to the same blocks, as long as the
    workspace has the same limit.
    """
    if all(side.logits.fast == side.logits.dtype for side in (student, teacher)):
        return
    classes = next(student.class_blocks())
    centers = torch.zeros_like(student.reference), torch.zeros_like(teacher.reference)
    for part in student.parts():
        z = student.block(classes, student.classifier(classes), part)
        t = teacher.block(classes, teacher.classifier(classes), part)
        p = z.softmax(0)
        q = p if problem.divergence == "reverse" else t.softmax(0)
        for center, block, weight in zip(centers, (z, t), (p, q), strict=True):
            center[part] = _finite(block.masked_fill_(weight == 0, 0).mul_(weight).sum(0))
    for side, center in zip((student, teacher), centers, strict=True):
        if side.logits.fast != side.logits.dtype:
            side.center = center - _likely_bias(side.problem.bias, center)


def _likely_bias(bias: Tensor | None, like: Tensor) -> Tensor | float:
    """What of a likely class's logit is bias: products that round are that much lower.

    The mean under the softmax of the bias alone; 0 where there is none.
    """
    if bias is None:
        return 0.0
    values = bias.to(like)
    return _finite(_finite(values) @ values.softmax(0))


def _mixture(problem: DistillationProblem, student: _Side, teacher: _Side) -> tuple[Tensor, Tensor]:
    """The Jensen-Shannon divergence [R] and the center of its slope, once both lse are known."""
    divergence = torch.zeros_like(student.lse)
    center = torch.zeros_like(student.lse)
    student.settle(student.lse.to(student.reference))
    teacher.settle(teacher.lse.to(teacher.reference))
    for classes in student.class_blocks():
        c, teacher_c = student.classifier(classes), teacher.classifier(classes)
        for part in student.parts():
            log_p = student.block(classes, c, part)
            log_q = teacher.block(classes, teacher_c, part)
            log_m = _log_mixture(log_p, log_q, problem.beta)
            of_student = _times_log_ratio(log_p, log_m).sum(0).to(center)
            center[part] += (1 - problem.beta) * of_student
            divergence[part] += problem.beta * _times_log_ratio(log_q, log_m).sum(0).to(center)
    return divergence + center, center


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))


def _times_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p (log p - log q)``, 0 where p is."""
    p = log_p.exp()
    return (log_p - log_q).masked_fill_(p == 0, 0).mul_(p)


def _slope(problem: DistillationProblem, log_p: Tensor, log_q: Tensor, center: Tensor) -> Tensor:
    """Derivative of the divergence by the student's logits, [v, n]."""
    if problem.divergence == "forward":
        return log_p.exp() - log_q.exp()
    if problem.divergence == "reverse":
        return _times_log_ratio(log_p, log_q).sub_(log_p.exp().mul_(center))
    log_m = _log_mixture(log_p, log_q, problem.beta)
    slope = _times_log_ratio(log_p, log_m).mul_(1 - problem.beta)
    return slope.sub_(log_p.exp().mul_(center))


def _hard_gradient(
    problem: DistillationProblem,
    found: Divergences,
    cotangents: DivergenceCotangents,
    log_p: Tensor,
    where: tuple[slice, Tensor],
) -> Tensor | None:
    """Gradient of the hard loss by the student's logits, [v, n], for some classes and rows."""
    _, d_lse, d_target = cotangents
    if problem.temperature is None or d_lse is None or d_target is None:
        return None
    classes, rows = where
    z = (log_p + found.student_lse[rows]).mul_(problem.temperature)
    dz = z.sub_(found.hard_lse[rows]).exp_().mul_(d_lse[rows])
    at_label = find_labels(classes, len(dz), problem.student.labels[rows])
    dz[at_label] += d_target[rows][at_label[1]]
    return dz.mul_(problem.temperature)


def _target_logits(problem: DistillationProblem, rows: Tensor) -> Tensor:
    """Logits of the hard loss at the labels, [R]."""
    logits = _logits_at(problem.student, rows, problem.student.labels[rows])
    return logits.mul_(problem.temperature or 1.0)


def _logits_at(head: HeadProblem, rows: Tensor, labels: Tensor) -> Tensor:
    """A logit of each row, [R], at a class of its own."""
    logits = LogitBlocks(head)
    out = torch.zeros(rows.shape, dtype=logits.dtype, device=rows.device)
    for part in range(0, len(rows), BLOCK_N):
        some = slice(part, part + BLOCK_N)
        products = (head.hidden[rows[some]].to(out) * head.classifier[labels[some]]).sum(1)
        bias = None if head.bias is None else head.bias[labels[some]]
        out[some] = logits.activate(products, bias)
    return out


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0)
