"""The stages of a head's work, and what passes between them; the same for every backend.

    forward     probe -> sweep -> combine
    backward    select -> project

``probe`` finds out what is known of each token before all classes are swept, ``sweep`` goes over
the classes and leaves statistics of parts of them, ``combine`` makes statistics of those.
``select`` plans the backward: which pairs of tokens and classes, by which method, in what memory;
``project`` carries it out. Each takes what those before it returned and nothing else, so that one
can be replaced alone: a sweep in another precision, or one over a shard of the vocabulary.

A backend's records are of its own layout where they say so; their meaning is the same.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

Rows = TypeVar("Rows")


class Probe(NamedTuple, Generic[Rows]):
    """What is known of the valid tokens before the sweep.

    Vectors are [N] in Triton, of every token, and [R] elsewhere, of the valid ones.
    """

    rows: Rows  # which tokens are valid, in the backend's own form
    target_logit: Tensor  # Algorithm 1 of the paper (arXiv:2411.09009); one per label
    own: Tensor  # int64, each token's own class, which sums over classes leave out
    own_logit: Tensor  # its logit
    lower_bound: Tensor | None  # of the log-sum-exp of the others, near it; None if nobody asked
