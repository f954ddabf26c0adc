"""The sweep in 8 bits against the one in 16: what each part takes, and how far off it is.

    CROSSCUT_TEST_HEAD=... python benchmarks/eight_bit.py TEXTS RESULTS.json gemma2-2b:8192 ...

TEXTS is a file of ``torch.save``: for each kind of text its final hidden states [N, 640] and next
tokens [N], of the model whose head is in CROSSCUT_TEST_HEAD. A head is MODEL:TOKENS,
MODEL:TOKENS:KIND or MODEL:TOKENS:KIND:LOGITS_TIMES; without a kind it reads the head's own text.

Each part's time is measured with the host ahead, beside that of the bare logits matmul right after
it; printed are the medians of both and of their ratio, over rounds in which all parts take turns.
Errors of the loss are per token, against float64, beside PyTorch's. ``spread`` is a token's root
mean square of ``z8 - z16`` over the selected softmax, ``guard`` that times what is not selected.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import eight_bit_kernels as eight_bit
import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.backends.column_filter import mass_unit, most_tail
from crosscut.backends.protocol import Cotangents, Gradients, HeadProblem, Needs
from crosscut.backends.triton import TritonBackend
from crosscut.backends.triton.forward import MOST_PROBES
from crosscut.bench import measure, real_head, truth, workloads
from crosscut.bench.progress import Silent
from crosscut.bench.real_head import RealHead
from crosscut.bench.workloads import Workload
from crosscut.device.tiles import Kernel, Tiles, choose_tiles
from crosscut.device.workspace import Layout, Region, Workspace
from crosscut.kernels import linear_lse, pair_matmul
from crosscut.kernels.flags import flagged_first
from crosscut.kernels.indexed_matmul import indexed_matmul
from crosscut.kernels.linear_lse import Columns, Wanted
from crosscut.kernels.logits_tile import Head
from crosscut.kernels.move_rows import move_rows
from crosscut.kernels.partial_statistics import LinearLse, Own
from crosscut.kernels.selected_pairs import Limits, SelectedPairs, list_shapes, select_pairs
from crosscut.kernels.softmax_gradient import Tokens
from crosscut.kernels.valid_rows import ValidRows, valid_rows_of
from crosscut.options import HeadOptions

ROUNDS = 5
WORKSPACE = 64 * 2**20
"""Bytes for rows of C in 8 bits."""

SAMPLE = 2048
"""Rows whose mean stands for that of all."""

SELECTIONS = "auto", "4", "16"
"""Pairs that are made again: those that a gradient keeps, or those of so many units of mass."""

LOG2_E = 1.4426950408889634
PAIR_SLOTS = 256
KEEP_ALL_LEVELS = torch.finfo(torch.float32).max


def tiles(*sizes: int, programs: int = 1) -> Tiles:
    block_n, block_v, block_d, num_warps, num_stages = sizes
    return Tiles(
        block_n=block_n, block_v=block_v, block_d=block_d, num_warps=num_warps,
        num_stages=num_stages, descriptors=True, programs=programs,
    )  # fmt: skip


SWEEPS = {
    "128x256x128 8w 3s": tiles(128, 256, 128, 8, 3),
    "128x128x128 4w 3s x2": tiles(128, 128, 128, 4, 3, programs=2),
    "128x256x128 8w 2s": tiles(128, 256, 128, 8, 2),
}
SWEEP = SWEEPS["128x256x128 8w 3s"]
COMPARE = tiles(128, 128, 64, 8, 3)


Found = tuple[eight_bit.EightBitTokens, Tensor, eight_bit.Rounded]
"""What a sweep has found: tokens, ``others8``, and rounded rows of C with the scales and shifts of
all classes."""


class Start(NamedTuple):
    """What both sweeps begin with."""

    head: Head
    labels: Tensor
    rows: ValidRows
    target_logit: Tensor
    reference: Tensor
    probes: Tensor
    of_probes: Head


def begin(head: Head, labels: Tensor, most_probes: int = MOST_PROBES) -> Start:
    """Own logits, and a lower bound of the log-sum-exp from the probe classes."""
    rows = valid_rows_of(labels)
    num_classes = len(head.classifier)
    num_probes = min(most_probes, num_classes // 16)
    flags = torch.zeros(num_classes, dtype=torch.int8, device=labels.device)
    target_logit = indexed_matmul(head, labels, flags)
    probes = flagged_first(flags, num_probes)
    some = move_rows(
        head.hidden.new_empty(num_probes, head.hidden.shape[1]), head.classifier, probes
    )
    of_probes = head._replace(classifier=some)
    own = Own(labels, target_logit)
    reference = linear_lse.linear_lse(
        of_probes, rows, own, choose_tiles(Kernel.LSE, head.hidden), Wanted(class_ids=probes)
    ).others
    return Start(head, labels, rows, target_logit, reference, probes, of_probes)


class Centers(NamedTuple):
    classifier: Tensor
    hidden: Tensor


def centers(head: Head, *, classifier: bool, hidden: bool) -> Centers:
    """Means of some rows of C and of H, or zeros."""

    def mean(matrix: Tensor, wanted: bool) -> Tensor:
        step = max(1, len(matrix) // SAMPLE)
        found = matrix[::step].mean(0, dtype=torch.float32)
        return found if wanted else torch.zeros_like(found)

    return Centers(mean(head.classifier, classifier), mean(head.hidden, hidden))


def stretch(head: Head, middle: Centers) -> tuple[float, float]:
    """What tensor cores lose of a sum of 8-bit products, and of what is rounded to 8 bits.

    Each is least squares of logits without it on logits with it, less 1, over some pairs.
    """
    hidden, classifier = head.hidden[:: max(1, len(head.hidden) // 512)], head.classifier[::31]
    some = len(classifier) // 16 * 16
    sides = [
        eight_bit.round_rows(
            eight_bit.new_rounded(len(rows), rows.shape[1], rows.device), rows.contiguous(),
            center, torch.zeros_like(center), center_first=True,
        )
        for rows, center in ((hidden, middle.hidden), (classifier[:some], middle.classifier))
    ]  # fmt: skip
    left, right = sides
    one = torch.ones((), device=hidden.device)
    lossy = torch._scaled_mm(
        left.rows, right.rows.t(), scale_a=one, scale_b=one, out_dtype=torch.float32,
        use_fast_accum=True,
    ).double()  # fmt: skip
    exact = left.rows.double() @ right.rows.double().T
    lost = ((lossy * exact).sum() / lossy.square().sum()).item() - 1
    exact *= left.scale[:, None].double() * right.scale[None, :].double()
    full = hidden.double() - middle.hidden.double()
    full = full @ (classifier[:some].double() - middle.classifier.double()).T
    rounded = ((exact * full).sum() / exact.square().sum()).item() - 1
    off = (exact - full).std().item()
    print(f"  lost by sums {lost:.2e}, by rounding {rounded:.2e}; off by {off:.3f} of "
          f"{full.std().item():.3f}")  # fmt: skip
    return lost, rounded


def round_hidden(start: Start, middle: Centers, longer: float = 0.0) -> eight_bit.EightBitTokens:
    """The tokens in 8 bits, side by side; ``longer`` makes up for what sums lose."""
    hidden, rows = start.head.hidden, start.rows.rows
    out = eight_bit.new_rounded(len(hidden), hidden.shape[1], hidden.device)
    eight_bit.round_rows(
        out, hidden, middle.hidden, middle.classifier, index=rows, center_first=False
    )
    out.scale.mul_(1 + longer)
    at = rows.clamp_min(0).long()
    bound = (start.reference[at] - out.shift * start.head.logit_scale) * LOG2_E
    return eight_bit.EightBitTokens(start.rows.count, out, start.labels[at], bound)


def round_classifier(classifier: Tensor, middle: Centers, out: eight_bit.Rounded) -> None:
    """Some rows of C in 8 bits."""
    eight_bit.round_rows(out, classifier, middle.classifier, middle.hidden, center_first=True)


def sweep(
    start: Start,
    middle: Centers,
    mass: Tensor | None,
    size: Tiles,
    *,
    workspace: int = WORKSPACE,
    shifted: bool = True,
    unit: float = 1.0,
    longer: float = 0.0,
) -> Found:
    """The whole sweep, a slice of the vocabulary at a time."""
    head = start.head
    num_classes, hidden_size = head.classifier.shape
    tokens = round_hidden(start, middle, longer)
    launches = math.ceil(num_classes * hidden_size / workspace)
    width = math.ceil(num_classes / launches / size.block_v) * size.block_v
    launches = math.ceil(num_classes / width)
    room = eight_bit.new_rounded(min(width, num_classes), hidden_size, head.hidden.device)
    scale = torch.empty(num_classes, dtype=torch.float32, device=head.hidden.device)
    shift = torch.empty_like(scale)
    slots = eight_bit.launch_slots(tokens, size)
    total = torch.empty(launches, slots, dtype=torch.float32, device=head.hidden.device)
    for i in range(launches):
        first, last = i * width, min((i + 1) * width, num_classes)
        rows = eight_bit.Rounded(room.rows[: last - first], scale[first:last], shift[first:last])
        round_classifier(head.classifier[first:last], middle, rows)
        eight_bit.sweep_classes(
            tokens, rows, total[i], mass, size, first_class=first,
            logit_scale=head.logit_scale, mass_unit=unit * mass_unit(num_classes), shifted=shifted,
        )  # fmt: skip
    others8 = eight_bit.add_slices(
        tokens, total, mass, size, num_classes=num_classes, launch_classes=width,
        logit_scale=head.logit_scale,
    )  # fmt: skip
    return tokens, others8, eight_bit.Rounded(room.rows, scale, shift)


def select(
    start: Start, own: Tensor, others8: Tensor, mass: Tensor, most: float
) -> tuple[SelectedPairs, Tensor]:
    """The selected pairs and rows of C of the hot classes, were all cotangents equal."""
    head, rows = start.head, start.rows
    classifier, hidden = head.classifier, head.hidden
    blocks, num_classes = mass.shape
    own_logit = start.target_logit[rows.rows.clamp_min(0).long()]
    lse = torch.logaddexp(others8, own_logit)
    vectors = hidden.new_zeros(len(hidden), 6, dtype=torch.float32)
    vectors[:, 0], vectors[:, 1], vectors[:, 5] = lse, 1.0, (others8 - lse).exp()
    tokens = Tokens(rows.count, hidden, own, vectors)
    most_hot = min(math.ceil(num_classes / 8), 3 * 2**25 // (2 * hidden.shape[1]))
    slots = blocks * math.ceil(num_classes / 4 / PAIR_SLOTS) * PAIR_SLOTS
    shapes = {"tail_mass": (mass.shape, mass.dtype), **list_shapes(blocks, num_classes, slots)}
    layout = Layout({name: Region(tuple(shape), dtype) for name, (shape, dtype) in shapes.items()})
    pairs = select_pairs(
        mass, tokens, Workspace(layout, hidden.device), Limits(most, most_hot, num_classes, 0),
        block_n=128, block_slots=PAIR_SLOTS,
    )  # fmt: skip
    hot_head = classifier.new_empty(len(pairs.hot), classifier.shape[1])
    pair_matmul.gather_hot_head(hot_head, classifier, pairs, block_slots=PAIR_SLOTS)
    return pairs, hot_head


def correct(
    start: Start,
    found: Found,
    selected: tuple[SelectedPairs, Tensor],
    middle: Centers,
    size: Tiles,
) -> eight_bit.Corrected:
    tokens, others8, rounded = found
    pairs, hot_head = selected
    given = eight_bit.Comparison(
        start.head.hidden, start.head.classifier, hot_head, rounded.scale, rounded.shift,
        middle.classifier,
    )  # fmt: skip
    tokens = tokens._replace(num_rows=pairs.num_rows)
    return eight_bit.correct(
        tokens, others8, start.target_logit, start.rows.rows, pairs, given, size,
        logit_scale=start.head.logit_scale,
    )  # fmt: skip


def with_probes(
    start: Start,
    found: Found,
    middle: Centers,
    size: Tiles,
    *,
    shifted: bool = True,
) -> Tensor:
    """The log-sum-exp of the others, with the probe classes in 16 bits and no others."""
    tokens, others8, _ = found
    rows = start.of_probes.classifier
    rounded = eight_bit.new_rounded(len(rows), rows.shape[1], rows.device)
    round_classifier(rows, middle, rounded)
    place = start.probes.new_full((len(start.head.classifier),), -1, dtype=torch.int64)
    place[start.probes.long()] = torch.arange(len(rows), device=rows.device)
    tokens = tokens._replace(own=place[tokens.own])
    total = torch.empty(eight_bit.launch_slots(tokens, size), device=rows.device)
    eight_bit.sweep_classes(tokens, rounded, total, None, size, first_class=0, shifted=shifted)
    of_probes = eight_bit.add_slices(
        tokens, total, None, size, num_classes=len(rows), launch_classes=len(rows)
    )
    at = start.rows.rows.clamp_min(0).long()
    ratio = 1 + (start.reference[at] - others8).double().exp() - (of_probes - others8).exp()
    return others8 + ratio.log()


def times_of(works: dict[str, Callable[[], object]], first: str) -> dict[str, float]:
    """Medians of each work's time over that of ``first`` right after it.

    A work that fails is left out, with its error on stderr.
    """
    for name, work in list(works.items()):
        try:
            work()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            del works[name]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    behind: set[str] = set()
    for _ in range(ROUNDS):
        for name, work in works.items():
            torch.cuda._sleep(15_000_000)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            work()
            for i, timed in enumerate((work, works[first])):
                flush.zero_()
                events[2 * i].record()
                timed()
                events[2 * i + 1].record()
                if i == 0 and events[0].query():
                    behind.add(name)
            torch.cuda.synchronize()
            taken[name].append(
                (events[0].elapsed_time(events[1]), events[2].elapsed_time(events[3]))
            )
    found: dict[str, float] = {}
    for name, pairs in taken.items():
        found[name] = median(mine / bare for mine, bare in pairs)
        words = "  (the host was not ahead)" if name in behind else ""
        mine, bare = (median(side) for side in zip(*pairs, strict=True))
        print(f"  {name:52s} {mine:8.3f} ms of {bare:7.3f}  {found[name]:6.3f}{words}", flush=True)
    return found


def describe(off: Tensor) -> dict[str, float]:
    """Of errors per token: mean, mean of the absolute, its 95th percentile and maximum."""
    size = off.abs().double()
    return {
        "bias": off.double().mean().item(),
        "mean": size.mean().item(),
        "p95": size.quantile(0.95).item(),
        "max": size.max().item(),
    }


class Judge:
    """Losses in float64, PyTorch's in bfloat16, and p of both on selected pairs."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        hidden, classifier, labels = workload.hidden, workload.classifier, workload.labels
        wide = classifier.double()
        self.lse = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
        self.others, self.own = torch.empty_like(self.lse), torch.empty_like(self.lse)
        self.pytorch, self.upcast = torch.empty_like(self.lse), torch.empty_like(self.lse)
        for rows in torch.arange(len(hidden), device=hidden.device).split(512):
            z = hidden[rows].double() @ wide.T
            self.lse[rows] = z.logsumexp(1)
            own = labels[rows, None]
            self.own[rows] = z.gather(1, own)[:, 0]
            self.others[rows] = z.scatter_(1, own, -math.inf).logsumexp(1)
            logits = hidden[rows] @ classifier.T
            self.pytorch[rows] = F.cross_entropy(logits, labels[rows], reduction="none").double()
            self.upcast[rows] = F.cross_entropy(
                logits.float(), labels[rows], reduction="none"
            ).double()
        self.loss = F.softplus(self.others - self.own)

    def of_pytorch(self) -> dict[str, Any]:
        return {
            "PyTorch bf16": describe(self.pytorch - self.loss),
            "PyTorch, logits.float()": describe(self.upcast - self.loss),
        }

    def of_loss(self, others: Tensor) -> dict[str, float]:
        return describe(F.softplus(others.double() - self.own) - self.loss)

    def of_selected(self, lse: Tensor, kept: Tensor) -> tuple[float, float]:
        """Relative errors of p on selected pairs but own ones, ours and PyTorch's, of 1024 tokens.

        ``kept`` [blocks, V] are the selected pairs.
        """
        hidden, classifier = self.workload.hidden[:1024], self.workload.classifier
        ours = theirs = size = 0.0
        for block, rows in enumerate(torch.arange(len(hidden), device=hidden.device).split(128)):
            classes = kept[block].nonzero()[:, 0]
            some = classifier[classes]
            z = hidden[rows].double() @ some.double().T
            p = (z - self.lse[rows, None]).exp()
            p *= classes[None, :] != self.workload.labels[rows, None]
            z16 = hidden[rows].float() @ some.float().T
            p16 = (z16 - lse[rows, None]).exp() * (p > 0)
            all_p = (hidden[rows] @ classifier.T).softmax(1)
            p_bf16 = all_p[:, classes] * (p > 0)
            ours += (p16 - p).square().sum().item()
            theirs += (p_bf16 - p).square().sum().item()
            size += p.square().sum().item()
        return math.sqrt(ours / size), math.sqrt(theirs / size)


def present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def problem_of(workload: Workload) -> HeadProblem:
    return HeadProblem(
        hidden=workload.hidden, classifier=workload.classifier, bias=None,
        labels=workload.labels, logit_weight=None, options=HeadOptions(policy="auto"),
    )  # fmt: skip


class Study:
    """One workload: what both sweeps are given."""

    def __init__(self, workload: Workload) -> None:
        hidden, classifier = workload.hidden, workload.classifier
        num_classes = len(classifier)
        self.workload, self.problem = workload, problem_of(workload)
        self.head = Head(hidden, classifier, None, 1.0, None)
        self.start = begin(self.head, workload.labels)
        self.unit, self.most = mass_unit(num_classes), most_tail(self.problem)
        shape = math.ceil(len(hidden) / 128), num_classes
        self.mass = torch.zeros(shape, dtype=torch.bfloat16, device=hidden.device)
        self.mass16 = torch.zeros_like(self.mass)
        self.middle = centers(self.head, classifier=True, hidden=True)
        self.lost, _ = stretch(self.head, self.middle)

    def sweep_16(self) -> LinearLse:
        """The sweep in 16 bits, with masses."""
        own = Own(self.start.labels, self.start.target_logit)
        columns = Columns(self.mass16, self.start.reference, self.unit)
        size = choose_tiles(Kernel.MASS_LSE, self.head.hidden)
        return linear_lse.linear_lse(self.head, self.start.rows, own, size, None, columns)

    def selection(self, found: Found, above: str) -> tuple[SelectedPairs, Tensor]:
        """The pairs that a gradient keeps, or those of so many units of mass."""
        tokens, others8, _ = found
        if above == "auto":
            return select(self.start, tokens.own, others8, self.mass, self.most)
        mass = self.mass / float(above)
        return select(self.start, tokens.own, others8, mass, KEEP_ALL_LEVELS)

    def loss_errors(self) -> dict[str, Any]:
        """Errors of the loss, by what is centered, stretched and selected."""
        judge = Judge(self.workload)
        errors = judge.of_pytorch()
        errors["16-bit sweep"] = judge.of_loss(self.sweep_16().others)
        for name, (with_hidden, longer) in {
            "C centered": (False, 0.0), "C centered, stretched": (False, self.lost),
            "both centered": (True, 0.0), "both centered, stretched": (True, self.lost),
        }.items():  # fmt: skip
            taken = centers(self.head, classifier=True, hidden=with_hidden)
            found = sweep(self.start, taken, self.mass, SWEEP, shifted=with_hidden, longer=longer)
            errors[f"8 bits alone, {name}"] = judge.of_loss(found[1])
            for most_probes in (2048, 8192):
                begun = begin(self.head, self.workload.labels, most_probes)
                others = with_probes(begun, found, taken, SWEEP, shifted=with_hidden)
                errors[f"{most_probes} probes, {name}"] = {
                    **judge.of_loss(others),
                    "selected mass": (begun.reference - others).exp().mean().item(),
                }
            for above in SELECTIONS:
                errors[f"corrected, {name}, mass >= {above}"] = self._corrected(
                    judge, found, taken, above
                )
        for name, value in errors.items():
            words = " ".join(f"{key} {number:.2e}" for key, number in value.items())
            print(f"  {name:40s} {words or 'too many pairs'}", flush=True)
        return errors

    def _corrected(
        self, judge: Judge, found: Found, taken: Centers, above: str
    ) -> dict[str, float]:
        selected = self.selection(found, above)
        pairs, _ = selected
        if pairs.num_rows.item() < 0:
            return {}
        right = correct(self.start, found, selected, taken, COMPARE)
        units = 1.0 if above == "auto" else float(above)
        kept = (self.mass / units).float() >= pairs.threshold[0][:, None]
        guard = (1 - right.selected.double()) * right.spread.double()
        p_ours, p_pytorch = judge.of_selected(right.lse, kept)
        return {
            **judge.of_loss(right.others),
            "pairs": kept.float().mean().item(),
            "hot": pairs.hot_count[0].item(),
            "selected mass": right.selected.mean().item(),
            "spread": right.spread.mean().item(),
            "spread max": right.spread.max().item(),
            "guard": guard.mean().item(),
            "guard max": guard.max().item(),
            "p on pairs": p_ours,
            "p on pairs, PyTorch": p_pytorch,
        }

    def gradient_errors(self) -> dict[str, Any]:
        """Of the backward as it is, from what each sweep has found."""
        exact = truth.truth(self.workload, Silent())
        theirs = truth.plain_pytorch(self.workload, Silent())
        errors = {"PyTorch": vars(truth.relative_errors(theirs, exact))}
        found = sweep(self.start, self.middle, self.mass, SWEEP, longer=self.lost)
        for above in SELECTIONS:
            selected = self.selection(found, above)
            if selected[0].num_rows.item() < 0:
                continue
            right = correct(self.start, found, selected, self.middle, COMPARE)
            answer = self.answer(right, self.mass)
            errors[f"8 bits, corrected >= {above}"] = vars(truth.relative_errors(answer, exact))
        of_16 = self.sweep_16()
        unknown = of_16.lse
        right = eight_bit.Corrected(
            of_16.others, of_16.lse, of_16.lse_compensation, of_16.log_prob, present(of_16.rest),
            unknown, unknown,
        )  # fmt: skip
        answer = self.answer(right, self.mass16)
        errors["16 bits"] = vars(truth.relative_errors(answer, exact))
        for name, value in errors.items():
            print(f"  gradients, {name}: {value}", flush=True)
        return errors

    def backward(self, found: eight_bit.Corrected, mass: Tensor) -> Gradients:
        """The backward as it is."""
        backend = TritonBackend()
        like = backend.forward_like(self.problem, for_backward=True)
        statistics = like._replace(
            lse=found.lse, target_logit=self.start.target_logit, log_prob=found.log_prob,
            lse_compensation=found.lse_compensation, column_mass=mass, tail_mass=found.rest,
        )  # fmt: skip
        d_log_prob = torch.full_like(found.lse, -1 / len(found.lse))
        cotangents = Cotangents(None, None, d_log_prob, None, None)
        return backend.backward(self.problem, statistics, cotangents, Needs(True, True, False))

    def answer(self, found: eight_bit.Corrected, mass: Tensor) -> truth.Answer:
        """Loss and gradients."""
        out = self.backward(found, mass)
        return truth.Answer(
            loss=-found.log_prob.mean().item(), d_hidden=present(out.hidden),
            d_classifier=present(out.classifier),
        )  # fmt: skip

    def times(self) -> dict[str, float]:
        """Of each part, and of all of them."""
        works: dict[str, Callable[[], object]] = {"torch.mm": measure.logits_matmul(self.workload)}
        works |= self._sweeps() | self._corrections() | self._whole()
        return times_of(works, "torch.mm")

    def _sweeps(self) -> dict[str, Callable[[], object]]:
        start, middle, head, mass = self.start, self.middle, self.head, self.mass
        whole = eight_bit.new_rounded(
            len(head.classifier), head.classifier.shape[1], head.hidden.device
        )
        round_classifier(head.classifier, middle, whole)
        tokens = round_hidden(start, middle)
        slots = max(eight_bit.launch_slots(tokens, one) for one in SWEEPS.values())
        total = torch.empty(slots, dtype=torch.float32, device=mass.device)
        own = Own(start.labels, start.target_logit)
        works: dict[str, Callable[[], object]] = {
            "16-bit sweep with masses": self.sweep_16,
            "16-bit sweep without": lambda: linear_lse.linear_lse(
                head, start.rows, own, choose_tiles(Kernel.LSE, head.hidden)
            ),
            "beginning: labels, probes, bound": lambda: begin(head, start.labels),
            "centers": lambda: centers(head, classifier=True, hidden=True),
            "rounding H": lambda: round_hidden(start, middle),
            "rounding C, whole": lambda: round_classifier(head.classifier, middle, whole),
        }

        def one_launch(size: Tiles, masses: Tensor | None, *, shifted: bool) -> None:
            eight_bit.sweep_classes(
                tokens, whole, total, masses, size, first_class=0, mass_unit=self.unit,
                shifted=shifted,
            )  # fmt: skip

        for name, size in SWEEPS.items():
            for masses, shifted in ((mass, True), (mass, False), (None, True)):
                words = f"sweep {name} masses={masses is not None} shifted={shifted}"
                works[words] = partial(one_launch, size, masses, shifted=shifted)
        for name, workspace in {
            "in slices of 64 MiB": WORKSPACE, "in slices of 128 MiB": 2 * WORKSPACE,
            "whole": 2**60,
        }.items():  # fmt: skip
            works[f"sweep, rounding, {name}"] = partial(
                sweep, start, middle, mass, SWEEP, workspace=workspace
            )
        return works

    def _corrections(self) -> dict[str, Callable[[], object]]:
        start, middle = self.start, self.middle
        found = sweep(start, middle, self.mass, SWEEP, longer=self.lost)
        works: dict[str, Callable[[], object]] = {
            "probes in 8 bits": lambda: with_probes(start, found, middle, SWEEP)
        }
        for above in SELECTIONS:
            works[f"selection, mass >= {above}"] = partial(self.selection, found, above)
            selected = self.selection(found, above)
            if selected[0].num_rows.item() >= 0:
                works[f"correction >= {above}"] = partial(
                    correct, start, found, selected, middle, COMPARE
                )
        return works

    def _whole(self) -> dict[str, Callable[[], object]]:
        head, labels, mass = self.head, self.workload.labels, torch.zeros_like(self.mass)
        backend = TritonBackend()

        def for_backward(unit: float) -> eight_bit.Corrected:
            begun = begin(head, labels)
            taken = centers(head, classifier=True, hidden=True)
            mass.zero_()
            swept = sweep(begun, taken, mass, SWEEP, unit=unit)
            selected = select(begun, swept[0].own, swept[1], mass, KEEP_ALL_LEVELS)
            return correct(begun, swept, selected, taken, COMPARE)

        def loss_only() -> Tensor:
            begun = begin(head, labels)
            taken = centers(head, classifier=True, hidden=True)
            return with_probes(begun, sweep(begun, taken, None, SWEEP), taken, SWEEP)

        found = for_backward(16.0)
        return {
            "whole forward, 8 bits, corrected >= 4": lambda: for_backward(4.0),
            "whole forward, 8 bits, corrected >= 16": lambda: for_backward(16.0),
            "whole forward, 8 bits, loss only, probes": loss_only,
            "whole forward, 16 bits, for a backward": lambda: backend.forward(
                self.problem, for_backward=True
            ),
            "whole forward, 16 bits, loss only": lambda: backend.forward(
                self.problem, for_backward=False
            ),
            "backward as it is": lambda: self.backward(found, self.mass),
        }


def study(workload: Workload, *, with_gradients: bool) -> dict[str, Any]:
    """Errors and times of one workload."""
    one = Study(workload)
    report: dict[str, Any] = {"errors": one.loss_errors()}
    if with_gradients:
        report["gradients"] = one.gradient_errors()
    report["times"] = one.times()
    return report


def resources() -> None:
    """Registers and spills of the new kernels."""
    for name in ("eight_bit_sweep_kernel", "compare_pairs_kernel", "round_rows_kernel"):
        for cache, *_ in getattr(eight_bit, name).device_caches.values():
            for compiled in cache.values():
                metadata = compiled.metadata
                print(
                    f"  {name}: {compiled.n_regs} registers, {compiled.n_spills} spills, "
                    f"{metadata.shared} bytes shared, {metadata.num_warps} warps, "
                    f"{metadata.num_stages} stages, {str(compiled.src.constants)[-160:]}"
                )


def main(texts: str, results: str, *wanted: str) -> None:
    kinds: dict[str, tuple[Tensor, Tensor]] = torch.load(texts)
    saved = real_head.load(16384, Silent())
    vocabulary = torch.cat([saved.labels, *(labels for _, labels in kinds.values())]).unique()
    report: dict[str, Any] = {}
    for words in wanted:
        model, tokens, *more = words.split(":")
        num_tokens = int(tokens)
        kind = more[0] if more and more[0] != "own" else None
        factor = float(more[1]) if len(more) > 1 else 1.0
        hidden, labels = (saved.hidden, saved.labels) if kind is None else kinds[kind]
        head = RealHead(
            classifier=saved.classifier, hidden=hidden[:num_tokens].float(),
            labels=labels[:num_tokens], vocabulary=vocabulary, source=saved.source,
        )  # fmt: skip
        request = workloads.WorkloadRequest(
            name=model, tokens=num_tokens, device="cuda", logits_times=factor
        )
        workload = workloads.from_real_head(head, workloads.MODELS[model], request, Silent())
        print(f"{words}, {torch.cuda.get_device_name()}", flush=True)
        report[words] = study(workload, with_gradients=num_tokens >= 8192)
        Path(results).write_text(json.dumps(report, indent=1))
        del workload
        torch.cuda.empty_cache()
    resources()


if __name__ == "__main__":
    main(*sys.argv[1:])
