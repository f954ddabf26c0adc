"""The gradient of selected pairs that do not fit their lists, or whose nonzeros do not.

In the interpreter; a GPU runs the same in tests/test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

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
)
from support.places import INTERPRETED

import crosscut

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or not INTERPRETED, reason="needs Triton's interpreter"
)

UNIT = 2.0**-7


@pytest.fixture(autouse=True)
def filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep is on; and small heads have no classes of so little mass as large ones."""
    from crosscut.backends import column_filter
    from crosscut.backends.triton import forward, pair_sweep, project

    monkeypatch.setattr(column_filter, "PAIR_SWEEP", True)
    for module in (column_filter, project, forward, pair_sweep):
        monkeypatch.setattr(module, "mass_unit", lambda num_classes: UNIT)


@pytest.fixture
def only_few_fit(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Leaves capacity for so few pairs that none are listed: one tile of them."""
    from crosscut.backends import column_filter
    from crosscut.backends.triton import select

    def set_capacity() -> None:
        def capacity(problem, lends):
            num_classes = len(problem.classifier)
            padding = 2 * column_filter.token_blocks(problem)
            return column_filter.Capacity(64 * (1 - padding), num_classes // 8, num_classes, 0)

        for module in (column_filter, select):
            monkeypatch.setattr(module, "capacity_for_pairs", capacity)

    return set_capacity


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each launch how many rows the sweep is to compute: for dC, and for dH."""
    from crosscut.backends.triton import pair_sweep

    launches: list[tuple[int, int]] = []
    sweep = pair_sweep.pair_sweep

    def spy(head, tokens, selection, tail, out, *others):
        launches.append((int(tokens.num_rows), int(out.num_hidden_rows)))
        sweep(head, tokens, selection, tail, out, *others)

    monkeypatch.setattr(pair_sweep, "pair_sweep", spy)
    return launches


def peaked(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16, ignored: float = 0.0
) -> Head:
    head = make_head(shape, dtype, ignored=ignored)
    return replace(head, input=4 * head.input)


def ours(head: Head, **options) -> Outcome:
    return outcome(
        crosscut.linear_cross_entropy, head, backend="triton", policy="filtered", **options
    )


def report(head: Head, **options) -> crosscut.GradientSparsity:
    return crosscut.gradient_sparsity(
        head.input, head.linear_weight, head.target, backend="triton", policy="filtered", **options
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "ignored", "options"),
    [
        ((34, 48, 400), torch.bfloat16, 0.0, {"softcap": 30.0}),
        ((50, 32, 300), torch.float16, 0.4, {"reduction": "none"}),
        ((50, 37, 301), torch.bfloat16, 0.4, {"logit_scale": -1.2, "z_loss": 0.01}),
        ((20, 200, 300), torch.bfloat16, 0.0, {}),
    ],
    ids=["softcap", "float16", "no TMA", "several tiles of dimensions"],
)
def test_as_accurate_as_pytorch(only_few_fit, swept, shape, dtype, ignored, options):
    head = peaked(shape, dtype, ignored)
    head.target[16:32] = -100 if ignored else head.target[16:32]
    only_few_fit()
    sizes = {key: options[key] for key in ("softcap", "logit_scale") if key in options}
    assert report(head, **sizes).kept < 0.5
    assert_as_accurate_as_pytorch(
        head, by_row=False, policy="filtered", backend="triton", **options
    )
    rows = int((head.target >= 0).sum())
    assert {*swept} == {(rows, rows)}


def test_the_same_pairs_as_lists_have(only_few_fit):
    """dH, which has all of them either way, differs by the order of its sums alone."""
    head = peaked((34, 48, 300))
    true = outcome(reference.linear_cross_entropy, head.double()).d_input
    said, listed = report(head), ours(head)
    only_few_fit()
    found = ours(head)
    assert report(head).kept <= said.kept < 0.5  # fewer classes are hot
    assert error(found.d_input, listed.d_input) < 0.5 * error(listed.d_input, true)


def test_nonzeros_that_do_not_fit(monkeypatch, swept):
    """dH has come from the lists by then, and stays."""
    from crosscut.backends.triton import project

    head = peaked((34, 48, 300))
    listed = ours(head)
    assert {*swept} == {(-1, -1)}
    monkeypatch.setattr(project, "NONZEROS_PER_TOKEN", 0)
    swept.clear()
    assert_as_accurate_as_pytorch(head, by_row=False, policy="filtered", backend="triton")
    found = ours(head)
    assert {*swept} == {(34, -1)}
    assert torch.equal(found.d_input, listed.d_input)
    assert not torch.equal(found.d_weight, listed.d_weight)


@pytest.mark.parametrize("frozen", ["input", "linear_weight"])
def test_a_frozen_side_changes_nothing_of_the_other(only_few_fit, swept, frozen):
    only_few_fit()
    head = peaked((40, 32, 300))
    both = ours(head)
    leaves = {"input": head.input.clone(), "linear_weight": head.linear_weight.clone()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    crosscut.linear_cross_entropy(
        **leaves, target=head.target, backend="triton", policy="filtered"
    ).backward()
    alone = leaves["linear_weight" if frozen == "input" else "input"].grad
    assert alone is not None
    assert torch.equal(alone, both.d_weight if frozen == "input" else both.d_input)
    assert {*swept} == {(40, 40)}


def test_chunks_in_rows_of_the_gradient(monkeypatch, only_few_fit, swept):
    """Several chunks, in dC and in memory of their own: the same rows of dC, and as good a dH."""
    from crosscut.backends.triton import chunks

    only_few_fit()
    head = peaked((20, 64, 1100))
    true = outcome(reference.linear_cross_entropy, head.double()).d_input
    whole = ours(head)
    assert len(swept) == 1
    monkeypatch.setattr(chunks, "workspace_limit", lambda: 128 * 128 * 2)
    swept.clear()
    found = ours(head)
    assert swept == [(20, 20), (20, 20)]
    assert torch.equal(found.d_weight, whole.d_weight)
    assert error(found.d_input, true) <= 1.1 * error(whole.d_input, true)


def test_where_most_is_selected_everything_is_computed(monkeypatch, only_few_fit, swept):
    from crosscut.backends import column_filter

    only_few_fit()
    head = peaked((40, 32, 300))
    said = report(head)
    exact = outcome(crosscut.linear_cross_entropy, head, backend="triton", policy="exact")
    for share, everything in ((said.kept, False), (0.99 * said.kept, True)):
        monkeypatch.setattr(column_filter, "MOST_SWEPT", share)
        swept.clear()
        assert torch.equal(ours(head).d_weight, exact.d_weight) == everything
        assert {*swept} == ({(-1, -1)} if everything else {(40, 40)})
        now = report(head)
        assert (now.kept, now.tail) == ((1.0, 0.0) if everything else (said.kept, said.tail))


@pytest.mark.parametrize(("num_rows", "num_classes"), [(75, 700), (50, 128), (16, 300)])
def test_sorted_classes(num_rows, num_classes):
    from crosscut.kernels.pair_sweep import SelectedMasses, sort_classes

    segment, block_n, ranks = 128, 16, 16
    blocks = 5
    mass = torch.rand(blocks, num_classes).bfloat16()
    threshold = torch.rand(blocks) * torch.linspace(0.5, 1.5, blocks)
    hot_rank = torch.where(torch.rand(num_classes) < 0.05, 1, -1).int()
    masses = SelectedMasses(mass, num_classes, threshold, hot_rank)
    found = sort_classes(torch.tensor([num_rows], dtype=torch.int32), masses, (block_n, ranks))

    used = -(-num_rows // block_n)
    selected = ((mass.float() >= threshold[:, None]) | (hot_rank >= 0))[:used]
    count = selected.sum(0)
    order = found.order.long()
    assert found.tiles == len(order) // ranks
    for first in range(0, num_classes, segment):
        classes = torch.arange(first, min(first + segment, num_classes))
        right = classes[torch.argsort(count[classes], descending=True, stable=True)]
        assert torch.equal(order[first : first + len(classes)], right)
    live = torch.zeros(used, len(order), dtype=torch.bool)
    live[:, :num_classes] = selected[:, order[:num_classes]]
    live = live.view(used, -1, ranks).any(2)
    assert torch.equal(found.live[:used] > 0, live)
    assert torch.equal(found.num_live.long(), live.sum(0))
    for tile, number in enumerate(found.num_live.tolist()):
        assert found.live_blocks[tile, :number].tolist() == live[:, tile].nonzero()[:, 0].tolist()
