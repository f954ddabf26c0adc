"""The sweep in 8 bits, and the selected pairs in 16, against float64 and PyTorch in bfloat16."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.places import INTERPRETED
from torch import Tensor

pytest.importorskip("triton")
if not INTERPRETED:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from crosscut.device.tiles import Tiles
from crosscut.device.workspace import Layout, Region, Workspace
from crosscut.kernels.pair_matmul import gather_hot_head
from crosscut.kernels.selected_pairs import Limits, SelectedPairs, list_shapes, select_pairs
from crosscut.kernels.softmax_gradient import Tokens
from crosscut.kernels.valid_rows import list_valid_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import eight_bit_kernels as eight_bit

LOG2_E = 1 / math.log(2)
TILES = Tiles(
    block_n=16, block_v=64, block_d=32, num_warps=1, num_stages=1, precision="upcast",
    descriptors=True,
)  # fmt: skip
NUM_TOKENS, HIDDEN_SIZE, NUM_CLASSES = 40, 48, 300


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and rows with means that are not 0, and labels."""
    torch.manual_seed(3)
    hidden = torch.randn(NUM_TOKENS, HIDDEN_SIZE) * 1.5 + torch.randn(HIDDEN_SIZE)
    classifier = torch.randn(NUM_CLASSES, HIDDEN_SIZE) * 0.25 + torch.randn(HIDDEN_SIZE) * 0.2
    labels = torch.randint(NUM_CLASSES, (NUM_TOKENS,))
    return hidden.bfloat16(), classifier.bfloat16(), labels


def rounded(matrix: Tensor, center: Tensor, partner: Tensor, **how: bool) -> eight_bit.Rounded:
    out = eight_bit.new_rounded(len(matrix), matrix.shape[1], matrix.device)
    return eight_bit.round_rows(out, matrix, center, partner, **how)


def test_a_rounded_row_is_off_by_half_a_step(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, classifier, _ = problem
    center, partner = hidden.float().mean(0), classifier.float().mean(0)
    hidden = torch.cat([hidden, torch.zeros_like(hidden[:1]) + center.bfloat16()])
    center = hidden[-1].float()  # the last row is nothing but the center
    found = rounded(hidden, center, partner, center_first=False)
    right = hidden.float() - center
    off = (found.rows.float() * found.scale[:, None] - right).abs()
    half_step = torch.maximum(right.abs() * 2.0**-4, found.scale[:, None] * 2.0**-9)
    assert (off <= half_step * (1 + 1e-5)).all()
    assert found.rows[:-1].float().abs().amax(1).eq(448).all()
    torch.testing.assert_close(found.shift, hidden.float() @ partner)
    after = rounded(hidden, center, partner, center_first=True)
    torch.testing.assert_close(after.shift, right @ partner, atol=1e-5, rtol=1e-5)


def sweep(
    problem: tuple[Tensor, Tensor, Tensor], launch_classes: int
) -> tuple[eight_bit.EightBitTokens, Tensor, Tensor, eight_bit.Rounded, Tensor]:
    """Tokens, ``others8``, masses in units of 1, the rounded rows and their center."""
    hidden, classifier, labels = problem
    of_hidden, center = hidden.float().mean(0), classifier.float().mean(0)
    z = hidden.float() @ classifier.float().T
    reference = z.scatter(1, labels[:, None], -math.inf)[:, :90].logsumexp(1)
    h8 = rounded(hidden, of_hidden, center, center_first=False)
    tokens = eight_bit.EightBitTokens(
        torch.tensor([len(hidden)], dtype=torch.int32), h8, labels, (reference - h8.shift) * LOG2_E
    )
    c8 = rounded(classifier, center, of_hidden, center_first=True)
    launches = math.ceil(len(classifier) / launch_classes)
    total = torch.full((launches, eight_bit.launch_slots(tokens, TILES)), math.nan)
    mass = torch.full((math.ceil(len(hidden) / TILES.block_n), len(classifier)), math.nan)
    for i in range(launches):
        classes = slice(i * launch_classes, (i + 1) * launch_classes)
        part = eight_bit.Rounded(c8.rows[classes], c8.scale[classes], c8.shift[classes])
        eight_bit.sweep_classes(tokens, part, total[i], mass, TILES, first_class=classes.start)
    others8 = eight_bit.add_slices(
        tokens, total, mass, TILES, num_classes=len(classifier), launch_classes=launch_classes
    )
    return tokens, others8, mass, c8, center


@pytest.mark.parametrize("launch_classes", [NUM_CLASSES, 128])
def test_a_sweep_sums_the_rounded_logits(
    problem: tuple[Tensor, Tensor, Tensor], launch_classes: int
) -> None:
    labels = problem[2]
    tokens, others8, mass, c8, _ = sweep(problem, launch_classes)
    h8 = tokens.hidden
    z = (h8.rows.double() @ c8.rows.double().T) * h8.scale[:, None] * c8.scale
    z += h8.shift[:, None] + c8.shift
    z.scatter_(1, labels[:, None], -math.inf)
    right = z.logsumexp(1)
    float32 = (z.float().logsumexp(1) - right).abs().max()
    assert (others8 - right).abs().max() <= 4 * float32
    bound = tokens.start.double() / LOG2_E + h8.shift  # in 16 bits: it may be above the sum in 8
    p = (z - torch.maximum(right, bound)[:, None]).exp()
    rounding = 8 * torch.finfo(torch.float32).eps * z[z.isfinite()].abs().max()  # of exponents
    for block, tile in enumerate(p.split(TILES.block_n)):
        own = mass[block].isinf()
        assert set(own.nonzero()[:, 0].tolist()) == set(
            labels[block * TILES.block_n : (block + 1) * TILES.block_n].tolist()
        )
        assert (mass[block] >= tile.sum(0) * (1 - rounding))[~own].all()  # never too small


def select(problem: tuple[Tensor, Tensor, Tensor], mass: Tensor, unit: float) -> SelectedPairs:
    hidden, _, labels = problem
    vectors = torch.ones(len(hidden), 6)
    tokens = Tokens(torch.tensor([len(hidden)], dtype=torch.int32), hidden, labels, vectors)
    mass = mass.bfloat16() / unit
    shapes = {
        "tail_mass": (mass.shape, mass.dtype),
        **list_shapes(len(mass), mass.shape[1], 64 * 64),
    }
    layout = Layout({name: Region(tuple(shape), dtype) for name, (shape, dtype) in shapes.items()})
    limits = Limits(torch.finfo(torch.float32).max, 128, mass.shape[1], 0)
    return select_pairs(
        mass, tokens, Workspace(layout, hidden.device), limits,
        block_n=TILES.block_n, block_slots=TILES.block_v,
    )  # fmt: skip


@pytest.mark.parametrize("unit", [1e-9, 0.05])
def test_selected_pairs_are_in_16_bits(problem: tuple[Tensor, Tensor, Tensor], unit: float) -> None:
    hidden, classifier, labels = problem
    tokens, others8, mass, c8, center = sweep(problem, 128)
    pairs = select(problem, mass, unit)
    head = classifier.new_zeros(len(pairs.hot), HIDDEN_SIZE)
    gather_hot_head(head, classifier, pairs, block_slots=TILES.block_v)
    own_logit = (hidden.float() * classifier[labels].float()).sum(1)
    given = eight_bit.Comparison(hidden, classifier, head, c8.scale, c8.shift, center)
    found = eight_bit.correct(
        tokens, others8, own_logit, list_valid_rows(labels).rows, pairs, given, TILES
    )
    z = hidden.double() @ classifier.double().T
    right = F.cross_entropy(z, labels, reduction="none")
    pytorch = F.cross_entropy(hidden @ classifier.T, labels, reduction="none")
    off = (-found.log_prob - right).abs()
    without = (F.softplus(others8 - own_logit) - right).abs().mean()
    assert off.mean() < 0.1 * without
    assert off.mean() <= (pytorch - right).abs().mean()
    lse = found.lse.double() + found.lse_compensation
    assert (lse - z.logsumexp(1)).abs().mean() <= (pytorch - right).abs().mean()
    h8 = tokens.hidden
    z8 = (h8.rows.double() @ c8.rows.double().T) * h8.scale[:, None] * c8.scale
    z8 += h8.shift[:, None] + c8.shift
    if unit == 1e-9:  # everything is selected
        others = z.scatter(1, labels[:, None], -math.inf)
        p = (others - others.logsumexp(1, keepdim=True)).exp()
        spread = (p * (z8 - z).square()).sum(1).sqrt()
        torch.testing.assert_close(found.spread.double(), spread, atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(found.selected, torch.ones_like(found.selected))
