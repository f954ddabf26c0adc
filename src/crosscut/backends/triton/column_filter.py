"""When the default gradient leaves out columns of the softmax, and which. Needs no Triton."""

from __future__ import annotations

import math

import torch

from crosscut.backends.protocol import HeadProblem

DROP_BELOW = 2.0**-11.5
"""A class joins a block's tail when its softmax, summed over the block's tokens, is below this."""

MAX_TAIL = 0.015
"""Mean mass of a token's tail beyond which nothing is left out, under ``auto``."""

MOST_KEPT = 3 * 2**12
"""Pairs (block of tokens, class) of a block that there is room for, on average."""

ENTRIES_PER_TOKEN = 256
"""Entries of dC that there is room for."""


def filters_columns(problem: HeadProblem) -> bool:
    """Whether the forward is to find out which columns to keep.

    In float32 PyTorch's loss is good to 1e-5: no room for a filter. A logit sum has a gradient at
    every logit, and a bias one in every class: they take the exact path. So do several targets a
    token: the lists of kept pairs know of one.
    """
    low_precision = problem.hidden.dtype in (torch.bfloat16, torch.float16)
    simple = problem.bias is None and problem.logit_weight is None and problem.labels.dim() == 1
    return low_precision and simple and problem.options.policy in ("auto", "filtered")


def block_tokens(problem: HeadProblem) -> int:
    """Tokens that decide together: those of a tile of the forward."""
    return 128 if problem.hidden.is_cuda else 16


def token_blocks(problem: HeadProblem) -> int:
    """Rows of ``column_mass``."""
    return math.ceil(len(problem.labels) / block_tokens(problem))


def most_pairs(problem: HeadProblem) -> int:
    """How many kept pairs there is room for."""
    return token_blocks(problem) * min(MOST_KEPT, len(problem.classifier))
