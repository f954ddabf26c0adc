"""When the default gradient leaves out columns of the softmax, which, and how many fit.

Everything that decides is here: thresholds, capacity, predicate, and what
:func:`crosscut.gradient_sparsity` says of it. First for kernels, which do as it is said here
(:mod:`crosscut.kernels.selected_pairs`); in the end for plain PyTorch
(:mod:`crosscut.backends.blocks.forward`), whose blocks are larger, and whose masses are not
rounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut.backends.protocol import HeadProblem, Statistics
from crosscut.options import workspace_limit

TAIL_SHARE = 0.2
"""Of a token's gradient that may be in the tail under ``auto``, in units of the rounding of its
log-sum-exp, ``finfo.eps |lse|``: what PyTorch's own error in low precision comes from."""

LEVELS = 16
"""Thresholds that a block can have: level i selects a pair from a mass of 2**(-i / 2) on."""

MOST_SELECTED = 9 * 2**10
"""Pairs (block of tokens, class) per block that always fit, on average."""

NONZEROS_PER_TOKEN = 400
"""Nonzeros of dC that fit."""

PAIR_SWEEP = False
"""Whether selected pairs that do not fit their lists are computed by chunks of the vocabulary
(:mod:`crosscut.kernels.pair_sweep`), in place of everything. It is right in the interpreter and
compiles for all cards, but has not run on a GPU yet, and so is off."""

MOST_SWEPT = 0.5
"""Share of the pairs up to which that is so. An estimate."""

HOT_BYTES = 3 * 2**25
"""For rows of C of hot classes; half of it where dC lends none."""

MOST_LENT = 0.75
"""Of the rows of dC: how many at most lend their memory."""

DEFERRED_BYTES = 9 * 2**22
"""For rows of hot classes that are finished while theirs are lent."""


def mass_unit(num_classes: int) -> float:
    """What column masses are counted in: a class joins a block's tail when its share of what each
    token has beside its own class, summed over the block's tokens, is below this. Or below a part
    of it, where more than TAIL_SHARE would be in the tail.

    The fewer classes, the more is in each, and the less is a tail of such classes: less is selected
    for the same error. So it is on one model's logits over 32,064 to 262,144 of its classes; with
    few classes nothing of the kind is known.
    """
    fewer = 2**18 / num_classes if num_classes >= 2**14 else 1.0
    return 2.0**-11.5 * fewer**0.5


def most_tail(problem: HeadProblem) -> float:
    """What a block's budget is made of (:mod:`crosscut.kernels.selected_pairs`)."""
    if problem.options.policy != "auto":
        return torch.finfo(torch.float32).max  # not inf: no rows times that is no number
    unit = mass_unit(len(problem.classifier))
    return TAIL_SHARE * torch.finfo(problem.hidden.dtype).eps / unit


def most_swept() -> float:
    """Share of the pairs up to which the selected ones are computed though no list holds them."""
    return MOST_SWEPT if PAIR_SWEEP else 0.0


def block_thresholds(problem: HeadProblem, statistics: Statistics, masses: Tensor) -> Tensor:
    """The threshold of each block [blocks] of ``masses`` [blocks, V], were all cotangents equal.

    As :mod:`crosscut.kernels.selected_pairs` chooses them.
    """
    block_n = block_tokens(problem)
    valid = problem.valid
    lse, rest = (
        F.pad(value[valid], (0, -int(valid.sum()) % block_n)).view(-1, block_n)
        for value in (statistics.lse, -statistics.log_prob.expm1())
    )
    largest = rest.amax(1, True)
    size = torch.where(largest > 0, rest / largest, 0)
    budget = most_tail(problem) * (size * lse.abs()).sum(1) * size.sum(1)
    budget = torch.where(largest[:, 0] > 0, budget / size.square().sum(1), 0)
    thresholds = torch.zeros_like(budget)
    for level in range(LEVELS - 1, -1, -1):
        threshold = 2.0 ** (-level / 2)
        tail = torch.where(masses < threshold, masses, 0).sum(1)
        thresholds = torch.where(tail <= budget, threshold, thresholds)
    return thresholds


def nonzero_above(num_tokens: int) -> float:
    """An element of dz is a nonzero of dC where it is larger than this, in units of its ``d_lse``
    and of the threshold of the selected pairs.

    PyTorch's error of dC falls with the number of tokens, over which its rounding averages out
    (7.0e-3 at 8192, 4.5e-3 at 32768); the error of what is no nonzero does not.
    """
    return 2.0**-13 * min(2.0, (2**13 / num_tokens) ** 0.5)


def filters_columns(problem: HeadProblem) -> bool:
    """Whether the forward is to find out which columns to select.

    Column masses are bfloat16, and a gradient of float16 or float32 is to be better than that: they
    are not filtered unless that is asked for. A logit sum has a gradient at every logit, and a bias
    one in every class: they take the exact path. So do several targets per token: the lists of
    selected pairs know of one.
    """
    dtype, policy = problem.hidden.dtype, problem.options.policy
    sparse = policy == "auto" and dtype == torch.bfloat16
    sparse |= policy == "filtered" and dtype in (torch.bfloat16, torch.float16)
    simple = problem.bias is None and problem.logit_weight is None and problem.labels.dim() == 1
    if not (simple and sparse and len(problem.labels)):
        return False
    pairs, everything = capacity_for_pairs(problem, lends=False).pairs, token_blocks(problem)
    everything *= len(problem.classifier)
    return max(pairs * block_tokens(problem), everything) < 2**31  # lists are of int32


def block_tokens(problem: HeadProblem) -> int:
    """Tokens that decide together: those of a tile of the forward."""
    return 16 if problem.hidden.is_cpu else 128  # few in the interpreter


def token_blocks(problem: HeadProblem) -> int:
    """Rows of ``column_mass``."""
    return math.ceil(len(problem.labels) / block_tokens(problem))


class Capacity(NamedTuple):
    """For the selected pairs."""

    pairs: int  # how many
    hot: int  # how many hot classes
    lent_from: int  # the first class whose row of dC lends its memory; V if none does
    deferred: int  # how many hot classes from there on


def capacity_for_pairs(problem: HeadProblem, *, lends: bool) -> Capacity:
    """How many selected pairs fit, and where; ``lends`` says that dC is wanted.

    In rows of dC, if these hold as many as memory of their own would: up to a quarter of all pairs,
    from where on little time would be saved. Else as many as fit where the exact gradient would
    have ``workspace_limit()`` and dH in float32, or MOST_SELECTED per block.
    """
    blocks, num_classes = token_blocks(problem), len(problem.classifier)
    row_bytes = problem.classifier.shape[1] * problem.classifier.element_size()

    def hot(num_bytes: int) -> int:
        return min(math.ceil(num_classes / 8), num_bytes // row_bytes)

    if not blocks:
        return Capacity(0, 0, num_classes, 0)
    dz_bytes = block_tokens(problem) * problem.hidden.element_size()
    most = min(blocks * (num_classes // 4), 2**31 // dz_bytes)
    own = min((workspace_limit() + 4 * problem.hidden.numel()) // dz_bytes, most)
    own = min(max(own, MOST_SELECTED * blocks), blocks * num_classes)

    lent = int(MOST_LENT * num_classes) * row_bytes
    most_hot = hot(HOT_BYTES)
    lists = blocks * (num_classes * 9 // 4 + 2**17)  # and the tail's masses
    lists += most_hot * row_bytes
    pair_bytes = dz_bytes + 24
    pairs = min((lent - lists) // pair_bytes, most)
    if not lends or pairs < own:
        return Capacity(own, hot(HOT_BYTES // 2), num_classes, 0)
    lent_from = num_classes - math.ceil((lists + pairs * pair_bytes) / row_bytes)
    deferred = min(num_classes - lent_from, DEFERRED_BYTES // row_bytes)
    return Capacity(pairs, most_hot, lent_from, deferred)


def hot_classes(selected: Tensor, capacity: Capacity) -> Tensor:
    """The hot classes, of ``selected`` [blocks, V]: those of at least half of the blocks."""
    by = selected.sum(0)
    hot = ((2 * by >= len(selected)) & (by > 0)).nonzero()[:, 0]
    early = int((hot < capacity.lent_from).sum())
    return hot[: min(early + capacity.deferred, capacity.hot)]


def sparsity(problem: HeadProblem, statistics: Statistics) -> tuple[float, float]:
    """Share of the pairs that are selected, and mean mass of the others, were cotangents equal."""
    num_rows = int(problem.valid.sum())
    masses = statistics.saved.column_mass[: math.ceil(num_rows / block_tokens(problem))].float()
    if not masses.numel():
        return 1.0, 0.0
    selected = masses >= block_thresholds(problem, statistics, masses)[:, None]
    capacity = capacity_for_pairs(problem, lends=True)
    hot = hot_classes(selected, capacity)
    selected[:, hot] = True
    unused = len(statistics.saved.column_mass) - len(masses)  # hot classes are there too
    listed = int(selected.sum()) + unused * len(hot) <= capacity.pairs
    share = selected.double().mean().item()
    if not listed and share > most_swept():
        return 1.0, 0.0
    tail = masses[~selected].sum().item() * mass_unit(masses.shape[1])
    return share, tail / num_rows


BLOCK_N = 1024
"""Tokens of one block of plain PyTorch, and of one decision."""

DROP_BELOW = 2.0**-21
"""A column of a smaller mean softmax over a block's tokens joins the tail."""

MAX_TAIL_MASS = 2.0**-3
"""DROP_BELOW is lowered where needed to bound the tail's share of the softmax by this."""

SELECTED = -1.0
"""What ``column_mass`` says of a column that is not in the tail."""


def filters_blocks(problem: HeadProblem) -> bool:
    """Whether plain PyTorch leaves out columns of the softmax.

    A weighted sum of softcapped logits has a gradient at every logit: nothing can be left out.
    """
    if problem.logit_weight is not None and problem.options.softcap is not None:
        return False
    low_precision = problem.hidden.dtype in (torch.bfloat16, torch.float16)
    policy = problem.options.policy
    return policy == "filtered" or (policy == "auto" and low_precision)


def column_blocks(num_tokens: int) -> int:
    """Rows of ``column_mass``: blocks of tokens that decide together."""
    return math.ceil(num_tokens / BLOCK_N)


def sparsity_of_blocks(problem: HeadProblem, statistics: Statistics) -> tuple[float, float]:
    """Share of the pairs that are selected, and mean mass of the others."""
    rows = problem.rows
    if not len(rows) or not filters_blocks(problem):
        return 1.0, 0.0
    column_mass, tail_mass = statistics.saved.column_mass, statistics.saved.tail_mass
    selected = (column_mass == SELECTED).double().mean(1)[: column_blocks(len(rows))]
    sizes = selected.new_tensor([len(block) for block in rows.split(BLOCK_N)])
    return (sizes @ selected).item() / len(rows), tail_mass.sum().item() / len(rows)
