"""The Triton backend's filtered gradient: what it leaves out, and when it leaves out nothing.

In the interpreter; a GPU runs the same in tests/test_gpu.py, at the sizes it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import reference
from support.judging import (
    Head,
    Outcome,
    assert_as_accurate_as_pytorch,
    error,
    make_head,
    outcome,
    rounding,
)
from support.places import INTERPRETED
from torch import Tensor

import crosscut
from crosscut.backends.protocol import HeadProblem
from crosscut.options import LossOptions

pytest.importorskip("triton")
from crosscut.backends import column_filter
from crosscut.backends.column_filter import MOST_SELECTED, capacity_for_pairs
from crosscut.backends.triton import chunks, forward, project, select
from crosscut.backends.triton.select import LAST_STEP, Step
from crosscut.device import workspace
from crosscut.device.tiles import Tiles
from crosscut.device.workspace import Layout, Lender, Region, Workspace
from crosscut.kernels import pair_gradient
from crosscut.kernels.flags import flagged_first
from crosscut.kernels.indexed_matmul import indexed_matmul
from crosscut.kernels.logits_tile import Head as KernelHead
from crosscut.kernels.selected_pairs import (
    LEVELS,
    Limits,
    SelectedPairs,
    list_shapes,
    select_pairs,
)
from crosscut.kernels.softmax_gradient import Tokens

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


@pytest.fixture
def drop_below(monkeypatch) -> Callable[[float], None]:
    """Sets the mass below which a block drops a class: small heads have none so small."""

    def drop_below(mass: float) -> None:
        for module in (column_filter, project, forward):
            monkeypatch.setattr(module, "mass_unit", lambda num_classes: mass)

    return drop_below


CPU = torch.device("cpu")


def peaked(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16, ignored: float = 0.0
) -> Head:
    head = make_head(shape, dtype, ignored=ignored)
    return replace(head, input=3 * head.input)


def ours(head: Head, **options) -> Outcome:
    return outcome(crosscut.linear_cross_entropy, head, backend="triton", **options)


def kept(head: Head, **options) -> float:
    return crosscut.gradient_sparsity(
        head.input, head.linear_weight, head.target, backend="triton", **options
    ).kept


@pytest.mark.parametrize(
    ("dtype", "ignored", "options"),
    [
        (torch.float16, 0.0, {}),
        (torch.bfloat16, 0.4, {"softcap": 20.0}),
        (torch.bfloat16, 0.4, {"logit_scale": -0.7, "z_loss": 0.01, "reduction": "none"}),
    ],
    ids=str,
)
def test_as_accurate_as_pytorch(dtype, ignored, options, drop_below):
    drop_below(2.0**-9)
    head = peaked((50, 48, 190), dtype, ignored)
    head_options = {key: options[key] for key in ("softcap", "logit_scale") if key in options}
    assert kept(head, policy="filtered", **head_options) < 1
    assert_as_accurate_as_pytorch(
        head, by_row=False, policy="filtered", backend="triton", **options
    )


def test_the_tail_keeps_the_sums_of_the_softmax(drop_below):
    """Rows of ``softmax - onehot`` add up to 0, so the rows of dC do: whatever is left out."""
    drop_below(0.5)
    head = peaked((64, 32, 150))
    assert kept(head, policy="filtered") < 0.5
    d_weight = ours(head, policy="filtered", reduction="sum").d_weight.double()
    sizes = d_weight.norm(dim=1).sum()
    assert d_weight.sum(0).norm() <= rounding(torch.bfloat16) * sizes


@pytest.mark.parametrize(
    ("shape", "ignored"), [((50, 37, 900), 0.4), ((33, 330, 300), 0.0)], ids=str
)
def test_more_than_one_tile(shape, ignored, drop_below):
    """Of hot classes, or of dimensions that are worked on together; TMA loads none of them."""
    drop_below(2.0**-9)
    head = peaked(shape, ignored=ignored)
    assert kept(head, policy="filtered") < 1
    assert_as_accurate_as_pytorch(
        head, factor=1.0, by_row=False, policy="filtered", backend="triton"
    )


def test_rows_of_hot_and_of_other_classes(drop_below):
    """A class kept by most blocks, and one kept by a single block, are made by two kernels."""
    drop_below(2.0**-9)
    head = peaked((64, 32, 150))
    head.target[:] = torch.arange(64) % 3  # three classes in every block
    head.target[5] = 99
    head.linear_weight[99] = -2 * head.linear_weight[:3].sum(0)
    theirs = outcome(reference.linear_cross_entropy, head).d_weight
    true = outcome(reference.linear_cross_entropy, head.double()).d_weight
    found = ours(head, policy="filtered").d_weight
    for rows in (slice(0, 3), slice(99, 100)):
        allowed = 2 * error(theirs[rows], true[rows]) + rounding(torch.bfloat16)
        assert error(found[rows], true[rows]) <= allowed


def test_a_flat_softmax_gets_the_exact_gradient(monkeypatch, drop_below):
    drop_below(2.0)  # all but the labels go to the tail, which is then too heavy
    head = make_head((40, 32, 150), torch.bfloat16)
    assert kept(head, policy="filtered") < 0.2
    # All pairs are kept, and are as good as in the exact gradient: there is room.
    monkeypatch.setattr(column_filter, "TAIL_SHARE", 0)
    assert kept(head) == 1
    true = outcome(reference.linear_cross_entropy, head.double())
    exact, found = ours(head, policy="exact"), ours(head)
    for which in ("d_input", "d_weight"):
        right = getattr(true, which)
        assert error(getattr(found, which), right) <= 1.1 * error(getattr(exact, which), right)
    # Where there is none, the exact sweep does it.
    monkeypatch.setattr(column_filter, "MOST_SELECTED", 3)
    for auto, exact in zip(ours(head)[:3], ours(head, policy="exact")[:3], strict=True):
        assert auto is not None
        assert exact is not None
        assert torch.equal(auto, exact)


def test_a_smaller_budget_keeps_more(monkeypatch, drop_below):
    """Each block's own: the first threshold whose tail is light enough, in report and kernels."""
    drop_below(0.3)
    head = peaked((60, 48, 190))
    true = outcome(reference.linear_cross_entropy, head.double())
    most_left_out = ours(head, policy="filtered")
    calls = []

    def spy(column_mass, *others, **options):
        calls.append((column_mass, select_pairs(column_mass, *others, **options)))
        return calls[-1][1]

    monkeypatch.setattr(select, "select_pairs", spy)
    monkeypatch.setattr(column_filter, "TAIL_SHARE", 0.03)
    found = crosscut.gradient_sparsity(
        head.input, head.linear_weight, head.target, backend="triton"
    )
    result = ours(head)
    masses, pairs = calls[0]
    left_out = masses.float() < pairs.threshold[0, :, None]
    left_out[:, pairs.hot[: pairs.hot_count[0]]] = False
    assert len(pairs.threshold[0].unique()) > 1  # what one block needs, another does not
    assert found.tail == pytest.approx(0.3 * masses.float()[left_out].sum().item() / 60, rel=1e-4)
    assert found.kept == (~left_out).double().mean()
    assert int(pairs.num_rows) == 60
    for which in ("d_input", "d_weight"):
        exact = getattr(true, which)
        assert error(getattr(result, which), exact) < error(getattr(most_left_out, which), exact)


def test_tokens_without_a_gradient_have_no_say(drop_below):
    """Neither a block that is masked, nor masked tokens in another: not in what others keep."""
    drop_below(2.0**-9)
    head = peaked((64, 48, 190))
    tensors = head.input, head.linear_weight, head.target
    weight = torch.ones(64)
    weight[16:40] = 0  # one block and half of the next

    def gradients(value: float) -> tuple[Tensor, ...]:
        inputs = [tensor.clone().requires_grad_() for tensor in tensors[:2]]
        with torch.no_grad():
            inputs[0][16:40] *= value  # a flat softmax
        loss = crosscut.linear_cross_entropy(
            inputs[0], inputs[1], head.target,
            token_weight=weight, backend="triton", reduction="sum",
        )  # fmt: skip
        return torch.autograd.grad(loss, inputs)

    (d_hidden, d_weight), (other_hidden, other_weight) = gradients(1.0), gradients(1e-3)
    assert (d_hidden[16:40] == 0).all()
    assert torch.equal(d_hidden[:16], other_hidden[:16])
    assert d_weight.isfinite().all()
    assert other_weight.isfinite().all()


def test_pairs_that_do_not_fit_get_the_exact_gradient(monkeypatch):
    head = peaked((40, 32, 150))
    filtered = ours(head)
    monkeypatch.setattr(column_filter, "MOST_SELECTED", 3)
    assert kept(head) == 1
    for auto, exact in zip(ours(head)[:3], ours(head, policy="exact")[:3], strict=True):
        assert auto is not None
        assert exact is not None
        assert torch.equal(auto, exact)
    assert not torch.equal(filtered.d_weight, ours(head).d_weight)


def test_hot_classes_count_in_blocks_of_ignored_tokens(drop_below, capacity_of_pairs):
    drop_below(2.0**-7)
    head = peaked((160, 32, 3000))
    head.target[16:] = -100  # one block in ten has a token
    exact = ours(head, policy="exact")
    for pairs, fits in ((1500, False), (6000, True)):
        capacity_of_pairs(pairs, 375, 3000, 0)
        assert (kept(head, policy="filtered") < 1) == fits
        assert torch.equal(ours(head, policy="filtered").d_weight, exact.d_weight) != fits


@pytest.fixture
def capacity_of_pairs(monkeypatch):
    """Sets the capacity for selected pairs of all calls."""

    def set_to(*numbers: int) -> None:
        capacity = column_filter.Capacity(*numbers)
        for module in (column_filter, select):
            monkeypatch.setattr(module, "capacity_for_pairs", lambda problem, lends: capacity)

    return set_to


def test_lists_in_rows_of_the_gradient(monkeypatch, drop_below, capacity_of_pairs):
    """The same bits as with memory of their own; and every row is written in the end."""
    drop_below(2.0**-9)
    head = peaked((64, 256, 700))
    monkeypatch.setattr(select, "LITTLE", 0)
    layouts = []

    def spy(*arguments):
        layouts.append(plan_workspace(*arguments))
        return layouts[-1]

    plan_workspace = select.plan_workspace
    monkeypatch.setattr(select, "plan_workspace", spy)
    capacity_of_pairs(2800, 256, 150, 550)
    lent = ours(head, policy="filtered")
    assert 150 <= layouts[-1].first_row < 600
    # Nobody reads a region after the step that the table says is its last.
    monkeypatch.setattr(workspace, "poisons", True)
    poisoned = ours(head, policy="filtered")
    # Nor does it matter whether regions have memory of their own, or hot rows wait for their place.
    capacity_of_pairs(2800, 256, 700, 0)
    own = ours(head, policy="filtered")
    assert set(layouts[-1].offset.values()) == {None}
    for other in (poisoned, own):
        assert torch.equal(lent.d_weight, other.d_weight)
        assert torch.equal(lent.d_input, other.d_input)
    assert not torch.equal(lent.d_weight, ours(head, policy="exact").d_weight)


def test_regions_end_before_their_rows_are_written():
    """From the first rows of dC on, nobody wants any but the tail's masses, which come first."""
    assert next(iter(LAST_STEP)) == "tail_mass"
    later = {name for name, step in LAST_STEP.items() if step >= Step.FIRST_ROWS}
    assert later == {"tail_mass"}


def test_what_is_read_too_late_is_seen(monkeypatch, drop_below):
    """Where the table says that a region's life ends too early, poison reaches the gradient."""
    drop_below(2.0**-9)
    head = peaked((32, 64, 300))
    right = ours(head, policy="filtered")
    monkeypatch.setattr(workspace, "poisons", True)
    for name in ("dz", "tail_mass"):
        with monkeypatch.context() as patch:
            patch.setitem(LAST_STEP, name, Step.GRADIENT)
            assert not torch.equal(ours(head, policy="filtered").d_weight, right.d_weight), name


def test_the_exact_gradient_in_rows_of_its_own(monkeypatch):
    """Chunks in dC, in less of it, and in memory of their own: each class is in one of them."""
    head = make_head((100, 128, 1100), torch.bfloat16, ignored=0.3)
    whole = ours(head, policy="exact")
    parts = []

    def spy(*arguments):
        parts.extend(chunks.plan_parts(*arguments))
        return parts

    monkeypatch.setattr(select, "plan_parts", spy)
    monkeypatch.setattr(chunks, "workspace_limit", lambda: 128 * 256 * 2)
    found = ours(head, policy="exact")
    assert [len(part.classes) > 0 for part in parts] == 3 * [True]
    assert [number for part in parts for number in part.classes] == [*range(1100)]
    assert [part.layout.offset["dz"] is None for part in parts] == [False, False, True]
    assert torch.equal(found.d_weight, whole.d_weight)
    true = outcome(reference.linear_cross_entropy, head.double())
    theirs = outcome(reference.linear_cross_entropy, head)
    assert error(found.d_input, true.d_input) <= error(theirs.d_input, true.d_input)


@pytest.mark.parametrize(
    ("limit", "shape"),
    [(limit, (150, 64, 3000)) for limit in (1, 2**15, 2**16, 2**18, 2**30)]
    + [(1, (150, 16, 384))],  # dC is smaller than dz of the fewest classes
    ids=str,
)
def test_every_class_has_a_workspace(monkeypatch, limit, shape):
    """Each is in one part, and none is empty, however little there is."""
    monkeypatch.setattr(chunks, "workspace_limit", lambda: limit)
    num_tokens, hidden_size, num_classes = shape
    classifier = torch.empty(num_classes, hidden_size, dtype=torch.bfloat16)
    parts = chunks.plan_parts(some_problem(num_tokens, classifier), classifier)
    assert all(len(part.classes) for part in parts)
    assert [number for part in parts for number in part.classes] == [*range(num_classes)]
    for part in parts:
        dz = part.workspace(CPU, classifier)
        assert dz.shape == (256, dz.shape[1])
        assert dz.shape[1] >= 128


def some_problem(num_tokens: int, classifier: Tensor) -> HeadProblem:
    return HeadProblem(
        hidden=classifier.new_empty(num_tokens, classifier.shape[1]),
        classifier=classifier,
        bias=None,
        labels=torch.empty(num_tokens, dtype=torch.int64),
        logit_weight=None,
        options=LossOptions(),
    )


def test_workspace(monkeypatch):
    matrix = torch.zeros(100, 64, dtype=torch.bfloat16)
    regions = {
        "first": Region((3, 100), torch.float32, until=1),
        "second": Region((10,), torch.bfloat16, until=2),
        "too large": Region((10_000,), torch.int32),
        "alone": Region((2, 3), torch.int8, alone=True),
    }
    layout = Layout(regions, Lender.of(matrix, 40))
    assert layout.first_row == 100 - 10 - 2
    made = Workspace(layout, CPU, matrix)
    first, second = made["first"].fill_(1), made["second"].fill_(2)
    assert (first.shape, second.shape) == ((3, 100), (10,))
    assert made["first"] is first
    assert (first == 1).all()
    assert {piece.data_ptr() % 64 for piece in (first, second)} == {matrix.data_ptr() % 64}
    assert not matrix[:88].any()
    for name in ("too large", "alone"):
        assert layout.offset[name] is None
        assert made[name].untyped_storage().data_ptr() != matrix.data_ptr()
    made.end(1)
    assert (first == 1).all()
    monkeypatch.setattr(workspace, "poisons", True)
    made.end(2)
    assert second.isnan().all()
    without = Layout(regions)
    assert without.first_row is None
    assert Workspace(without, CPU)["second"].shape == (10,)


def test_room_for_pairs(monkeypatch):
    """Within what the exact gradient would have, a fixed number at least, a quarter at most."""

    def room(tokens: int, classes: int) -> int:
        """Of a block of 16 tokens."""
        problem = some_problem(tokens, torch.empty(classes, 8, dtype=torch.bfloat16))
        return capacity_for_pairs(problem, lends=False).pairs // max(1, -(-tokens // 16))

    monkeypatch.setattr("crosscut.options._workspace_limit", 2**20)
    assert room(16, 30) == 30
    assert room(16, 200_000) == (2**20 + 16 * 8 * 4) // (16 * 2)
    assert room(16, 100_000) == 25_000
    assert room(1600, 200_000) == MOST_SELECTED
    assert room(0, 200_000) == 0


def test_entries_that_do_not_fit_get_the_exact_gradient(monkeypatch, drop_below):
    drop_below(2.0**-7)  # so that some classes are kept by few blocks: only they have nonzeros
    head = peaked((80, 32, 120))
    monkeypatch.setattr(project, "NONZEROS_PER_TOKEN", 0)
    for auto, exact in zip(ours(head)[:3], ours(head, policy="exact")[:3], strict=True):
        assert auto is not None
        assert exact is not None
        assert torch.equal(auto, exact)


def test_an_entropy_that_is_only_looked_at_keeps_the_filter(drop_below):
    drop_below(0.5)
    head = peaked((50, 48, 190))

    def loss(*tensors, which: str, **options) -> torch.Tensor:
        return getattr(
            crosscut.token_statistics(*tensors, entropy=True, ranks=True, **options), which
        )

    looked_at, differentiated = (
        outcome(loss, head, which=which, backend="triton", policy="filtered").d_weight
        for which in ("log_prob", "entropy")
    )
    plain, exact = (
        outcome(crosscut.linear_log_probs, head, backend="triton", policy=policy).d_weight
        for policy in ("filtered", "exact")
    )
    assert 2 * rounding(torch.bfloat16) < error(looked_at, exact) <= 2 * error(plain, exact)
    true = outcome(loss, head.double(), which="entropy", backend="blocks").d_weight
    assert error(differentiated, true) <= 2 * rounding(torch.bfloat16)


@pytest.mark.parametrize("frozen", ["input", "linear_weight"])
def test_a_frozen_side_changes_nothing_of_the_other(frozen):
    head = peaked((40, 32, 150))
    both = ours(head)
    leaves = {"input": head.input.clone(), "linear_weight": head.linear_weight.clone()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    crosscut.linear_cross_entropy(**leaves, target=head.target, backend="triton").backward()
    alone = leaves["linear_weight" if frozen == "input" else "input"].grad
    assert alone is not None
    assert torch.equal(alone, both.d_weight if frozen == "input" else both.d_input)


@pytest.mark.parametrize("num_classes", [40, 8192, 20_000])
def test_labels_come_first(num_classes):
    """Among the classes whose log-sum-exp is taken first: each once, the batch's labels before."""
    labels = torch.randint(num_classes, (77,))
    labels[::5] = -1
    some = min(num_classes, 300)
    flags = torch.zeros(num_classes, dtype=torch.int8)
    indexed_matmul(
        KernelHead(torch.ones(77, 16), torch.ones(num_classes, 16), None, 1.0, None), labels, flags
    )
    found = flagged_first(flags, some).tolist()
    mine = sorted({*labels.tolist()} - {-1})
    others = sorted({*range(num_classes)} - {*mine})
    assert found == [*mine, *others][:some]


@pytest.mark.parametrize(
    (
        "num_rows",
        "first_level",
        "blocks",
        "num_classes",
        "most_hot",
        "deferred_from",
        "most_deferred",
    ),
    [
        (75, 0, 5, 700, 700, 700, 0),
        (75, 14, 5, 3000, 700, 3000, 0),
        (20, 0, 5, 700, 700, 333, 40),
        (0, 0, 5, 700, 700, 700, 0),
        (4800, 2, 300, 200, 200, 200, 0),
        (60, 0, 4, 9000, 128, 9000, 40),
        (60, 0, 4, 9000, 9000, 8192, 40),
        (60, 0, 4, 9000, 9000, 5001, 3999),
        (60, 2, 4, 40000, 128, 30000, 40),
    ],
)
def test_lists_of_kept_pairs(
    num_rows, first_level, blocks, num_classes, most_hot, deferred_from, most_deferred
):
    block_n, block_slots = 16, 32
    used = -(-num_rows // block_n)
    mass = 1.5 * torch.rand(blocks, num_classes)
    mass[torch.rand(blocks, num_classes) < torch.linspace(0, 0.9, num_classes)] = torch.inf
    # What some threshold leaves, and another from block to block; the last block has no say.
    thresholds = 2.0 ** (-torch.arange(LEVELS) / 2)
    tails = torch.stack([torch.where(mass < t, mass, 0).sum(1) for t in thresholds])
    level = first_level + torch.arange(blocks) % 3
    budget = torch.where(level < LEVELS, tails[level.clamp_max(LEVELS - 1), range(blocks)], -1)
    fits = tails <= budget
    threshold = torch.where(fits.any(0), thresholds[fits.int().argmax(0)], 0)
    vectors = torch.zeros(blocks * block_n, 6)
    of_block = torch.arange(blocks * block_n) // block_n
    rows = torch.bincount(of_block[:num_rows], minlength=blocks).clamp_min(1)
    vectors[:, 0] = (1.00001 * budget / rows).clamp_min(0)[of_block]  # the log-sum-exp
    vectors[:, 1], vectors[:, 5] = -3.0, 0.25  # equal gradients
    if used > 1:
        vectors[(used - 1) * block_n :, 1] = 0
        threshold[used - 1] = torch.inf
    vectors[num_rows:] = 0
    tokens = some_tokens(num_rows, vectors)
    found = select_pairs(
        mass, tokens, workspace_for(mass, 2**18),
        Limits(1.0, most_hot, deferred_from, most_deferred, 0.5),
        block_n=block_n, block_slots=block_slots,
    )  # fmt: skip

    reached = torch.where(found.threshold[0] > 1e38, torch.inf, found.threshold[0])
    assert torch.equal(reached[:used], threshold[:used])
    kept = mass >= threshold[:, None]
    kept[used:] = False
    hot = ((2 * kept.sum(0) >= used) & kept.any(0)).nonzero().flatten()
    early, deferred = hot[hot < deferred_from], hot[hot >= deferred_from]
    hot = torch.cat([early, deferred[:most_deferred]])[:most_hot]
    count, num_early = found.hot_count.tolist()
    assert num_early == min(len(early), most_hot)
    assert torch.equal(found.hot[:count].long(), hot)
    assert torch.equal((found.hot_rank >= 0).nonzero().flatten(), hot)
    slots = -(-count // block_slots) * block_slots
    assert (found.hot[count:slots] == -1).all()
    kept[:, hot] = False
    first = slots * blocks
    for block in range(blocks):
        classes = kept[block].nonzero().flatten()
        end = first + len(classes)
        next_block = first + -(-len(classes) // block_slots) * block_slots
        assert torch.equal(found.columns[first:end].long(), classes)
        assert (found.columns[end:next_block] == 0).all()
        cells = torch.bincount(classes // 64, minlength=-(-num_classes // 64)).cumsum(0)
        assert found.cell_start[block].tolist() == [first, *(first + cells).tolist()]
        tail = torch.where((mass[block] < threshold[block]) & (block < used), mass[block], 0)
        tail[hot] = 0
        assert torch.equal(found.column_mass[block], tail)
        assert found.tail[block].item() == pytest.approx(float(tail.sum()), rel=1e-5)
        first = next_block
    rows = found.num_rows, found.swept_rows, found.exact_rows
    assert [int(number) for number in rows] == [num_rows, -1, -1]


@pytest.mark.parametrize(("most_swept", "swept", "exact"), [(0.9, -1, 32), (1.0, 32, -1)])
def test_too_many_pairs_are_not_listed(most_swept, swept, exact):
    mass, tokens = torch.full((2, 300), torch.inf), some_tokens(32, torch.ones(32, 6))
    found = select_pairs(
        mass, tokens, workspace_for(mass, 512), Limits(1e9, 300, 300, 0, most_swept),
        block_n=16, block_slots=32,
    )  # fmt: skip
    rows = found.num_rows, found.swept_rows, found.exact_rows
    assert [int(number) for number in rows] == [-1, swept, exact]


def workspace_for(mass: Tensor, num_slots: int) -> Any:
    blocks, num_classes = mass.shape
    shapes = list_shapes(blocks, num_classes, num_slots)
    shapes["tail_mass"] = (blocks, num_classes), mass.dtype
    regions = {name: Region(shape, dtype) for name, (shape, dtype) in shapes.items()}
    return Workspace(Layout(regions), CPU)


def some_tokens(num_rows: int, vectors: Tensor) -> Any:
    count, none = torch.tensor([num_rows], dtype=torch.int32), torch.empty(0)
    return Tokens(count, none, none, vectors)


def test_pairs_of_many_blocks_by_tiles_as_wide_as_on_hopper(monkeypatch):
    """Tiles of 256 slots are worked on in parts; 4100 blocks, of which three have pairs."""
    blocks, block_n, slots, num_classes, hidden_size = 4100, 16, 256, 130, 8
    classes_of = {0: [3, 70, 129], 2049: [*range(128)], 4099: [5, 64]}
    generator = torch.Generator().manual_seed(0)
    hidden = torch.zeros(blocks * block_n, hidden_size)
    weight = torch.randn(num_classes, hidden_size, generator=generator)
    num_rows = blocks * block_n - 3
    hidden[:num_rows] = torch.randn(num_rows, hidden_size, generator=generator)
    own = torch.zeros(len(hidden), dtype=torch.int64)  # of block 0, which does not keep it
    own[-block_n:] = 5
    cells = -(-num_classes // 64)
    cell_start = torch.zeros(blocks, cells + 1, dtype=torch.int32)
    columns = torch.zeros(len(classes_of) * slots, dtype=torch.int32)
    first = 0
    for block in range(blocks):
        some = torch.tensor(classes_of.get(block, []), dtype=torch.int64)
        ends = torch.bincount(some // 64, minlength=cells).cumsum(0)
        cell_start[block] = torch.tensor([first, *(first + ends).tolist()])
        columns[first : first + len(some)] = some
        first += slots if len(some) else 0
    logits = hidden @ weight.t()
    lse = logits.logsumexp(1)
    factor = torch.rand(len(hidden), generator=generator)
    factor[num_rows:] = 0
    vectors = torch.zeros(len(hidden), 6)
    vectors[:, 0], vectors[:, 1], vectors[:, 2], vectors[:, 5] = lse, factor, -7.0, 1.0
    count = torch.tensor([num_rows], dtype=torch.int32)
    pairs = SelectedPairs(
        columns=columns, cell_start=cell_start, column_mass=torch.zeros(blocks, num_classes),
        tail=torch.zeros(blocks), threshold=torch.ones(2, blocks),
        hot=torch.full((slots,), -1, dtype=torch.int32),
        hot_count=torch.zeros(2, dtype=torch.int32),
        hot_rank=torch.full((num_classes,), -1, dtype=torch.int32),
        num_rows=count, swept_rows=-count, exact_rows=-count,
    )  # fmt: skip
    monkeypatch.setattr(pair_gradient, "num_programs", lambda device: 1)  # each sees all blocks
    made: Any = {
        "dz": torch.empty(len(columns), block_n),
        "num_nonzeros": torch.empty(len(columns), dtype=torch.int32),
        "selected_mass": torch.empty(len(classes_of), block_n),
        "nonzero_mass": torch.empty(len(classes_of), block_n),
        "rest": torch.empty(len(columns)),
        "hot_head": torch.zeros(slots, hidden_size),
    }
    found = pair_gradient.pair_gradient(
        KernelHead(hidden, weight, None, 1.0, None), Tokens(count, hidden, own, vectors), pairs,
        made,
        Tiles(
            block_n=block_n, block_v=slots, block_d=16, num_warps=1, num_stages=1,
            precision="upcast",
        ),
        mass_unit=1.0, nonzero=0.1,
    )  # fmt: skip
    p = (logits - lse[:, None]).exp()
    for tile, (block, classes) in enumerate(classes_of.items()):
        rows = slice(block * block_n, min((block + 1) * block_n, num_rows))
        mine = p[rows][:, classes].t()
        is_own = torch.tensor(classes)[:, None] == own[rows]
        dz = torch.where(is_own, -7.0, factor[rows] * mine)
        part = slice(tile * slots, tile * slots + len(classes))
        others = torch.where(is_own, 0, mine)
        is_nonzero = is_own | (dz > 0.1 * factor[rows])
        width = dz.shape[1]
        torch.testing.assert_close(found.dz[part, :width], dz)
        torch.testing.assert_close(found.selected_mass[tile, :width], others.sum(0))
        torch.testing.assert_close(
            found.nonzero_mass[tile, :width], torch.where(is_nonzero, others, 0).sum(0)
        )
        assert torch.equal(found.num_nonzeros[part].long(), is_nonzero.sum(1))
        rest = torch.where(is_nonzero, 0, others).sum(1)
        torch.testing.assert_close(found.rest[part], rest)
        torch.testing.assert_close(pairs.column_mass[block, classes], rest)
