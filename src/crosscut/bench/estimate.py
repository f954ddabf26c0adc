"""What an output head and its loss cost, on paper: memory, bytes moved, time, the largest batch.

Nothing is computed and nothing is allocated. Three kinds of number go in, and none is made up:

- **Arithmetic.** The sizes of tensors that a method is known to hold at its peak
  (:data:`METHODS`). crosscut's are those that its own backward plans with. Every term has a name.
- **Measurements.** Times over the logits matmul come from the committed results of the bench on one
  H100, and each names its file (:func:`nearest`).
- **The caller's word**: memory of a rank, bandwidth between ranks.

What is not known is None, with the reason.

:func:`paper_row` is the arithmetic of the Cut Cross-Entropy paper (arXiv:2411.09009), Figure 1 and
Table A4: how many tokens fit on 16 GPUs with the logits and without.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crosscut.backends.column_filter import (
    NONZEROS_PER_TOKEN,
    Capacity,
    capacity_for_pairs,
    filters_columns,
    token_blocks,
)
from crosscut.backends.protocol import HeadProblem
from crosscut.bench import BenchError
from crosscut.bench.workloads import DTYPES
from crosscut.options import HeadOptions, workspace_limit

MIB, GIB = 2**20, 2**30

COPIES = 4
"""Tensors as large as the weights: they, their gradient, and Adam's two moments."""

STATISTICS = 3
"""float32 numbers per token that ranks with shards of a vocabulary exchange."""

CARD_GIB = 75.0
"""What the paper reckons with of a card of 80 GB."""

DEFAULT_MODEL = "gemma2-2b"

MEASURED = Path(__file__).with_name("data") / "h100.json"
"""Times of the bench on one H100: written by ``python benchmarks/estimate_data.py``."""


class Model(NamedTuple):
    """What counts of a model."""

    title: str
    vocab: int  # V
    layers: int  # L
    hidden: int  # D
    parameters: int
    in_paper: bool = True  # whether the paper's table has it


MODELS = {
    "gemma2-2b": Model("Gemma 2 2B", 256_000, 26, 2304, 2_614_341_888),
    "gemma2-27b": Model("Gemma 2 27B", 256_000, 46, 4608, 27_227_128_320),
    "gemma-2b": Model("Gemma 2B", 256_000, 18, 2048, 2_506_172_416),
    "gpt2": Model("GPT-2", 50_257, 12, 768, 137_022_720),
    "gpt-neo-1.3b": Model("GPT Neo 1.3B", 50_257, 24, 2048, 1_365_907_456),
    "gpt-neo-2.7b": Model("GPT Neo 2.7B", 50_257, 32, 2560, 2_718_416_384),
    "llama2-7b": Model("Llama 2 7B", 32_000, 32, 4096, 6_738_415_616),
    "llama2-13b": Model("Llama 2 13B", 32_000, 40, 5120, 13_015_864_320),
    "llama3-8b": Model("Llama 3 8B", 128_256, 32, 4096, 8_030_261_248),
    "llama3-70b": Model("Llama 3 70B", 128_256, 80, 8192, 70_553_706_496),
    "mistral-7b": Model("Mistral 7B", 32_000, 32, 4096, 7_241_732_096),
    "mixtral-8x7b": Model("Mixtral 8x7B", 32_000, 32, 4096, 46_702_792_704),
    "phi1.5": Model("Phi 1.5", 50_295, 24, 2048, 1_418_270_720),
    "phi3-medium": Model("Phi 3 Medium", 32_011, 40, 5120, 13_960_238_080),
    "qwen1.5-7b": Model("Qwen 1.5 7B", 151_646, 32, 4096, 7_721_324_544),
    "gemma3-270m": Model("Gemma 3 270M", 262_144, 18, 640, 268_098_176, in_paper=False),
    "qwen2.5-7b": Model("Qwen 2.5 7B", 152_064, 28, 3584, 7_615_616_512, in_paper=False),
    "mistral-nemo": Model("Mistral Nemo", 131_072, 40, 5120, 12_247_782_400, in_paper=False),
    "phi3.5-mini": Model("Phi 3.5 Mini", 32_064, 32, 3072, 3_821_079_552, in_paper=False),
}
"""Those of the paper's table, then the others of the bench's workloads.

V, L and D of the paper's are from secondary copies of it. V of Phi 1.5, Phi 3 Medium and Qwen 1.5
is the tokenizer's, a little less than the head has. Parameters are counted from the architectures;
those of GPT-2 (12 of 1024 squared) and GPT Neo (12 and 16 of 2048 squared) with causal masks, as
their checkpoints have them, without which the paper's numbers do not come out.
"""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of the paper's table.

    Attributes:
        model: the model.
        logits_bytes: of the logits of 65536 tokens, in float32.
        activation_bytes: of the activations of 65536 tokens: what enters each layer, in 16 bits.
        state_bytes: of weights, gradients and Adam's two moments, in 16 bits each.
        before: tokens that fit on 16 GPUs beside their logits.
        after: tokens that fit without logits.
    """

    model: Model
    logits_bytes: int
    activation_bytes: int
    state_bytes: int
    before: int
    after: int


PAPER_TOKENS, PAPER_BYTES = 65536, 16 * 75 * GIB


def paper_row(model: Model) -> PaperRow:
    """The paper's arithmetic: tokens = (16 * 75 GiB - state) / bytes per token, rounded.

    The state is that of all 16 GPUs together, which share it (FSDP).
    """
    logits, activations = 4 * model.vocab, 2 * model.layers * model.hidden
    state = 2 * COPIES * model.parameters
    left = PAPER_BYTES - state
    return PaperRow(
        model=model,
        logits_bytes=PAPER_TOKENS * logits,
        activation_bytes=PAPER_TOKENS * activations,
        state_bytes=state,
        before=round(left / (activations + logits)),
        after=round(left / activations),
    )


def paper_table() -> list[PaperRow]:
    """The paper's rows, in its order."""
    return [paper_row(model) for model in MODELS.values() if model.in_paper]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked.

    Attributes:
        tokens: N, tokens per step of a rank; ranks that share a vocabulary have the same ones.
        hidden: D, hidden size.
        vocab: V, classes.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        layers: L, whose activations count; None: those of no layer do.
        parameters: of the model, whose state counts; None: the head's alone does.
        tensor_parallel: ranks that share the vocabulary.
        data_parallel: groups of such ranks, each with tokens of its own.
        fsdp: whether these groups share weights, gradients and Adam's moments.
        bandwidth: GB/s that a rank can send; None: no time for what is moved.
        memory: GiB of a rank.
    """

    tokens: int
    hidden: int
    vocab: int
    dtype: str = "bf16"
    layers: int | None = None
    parameters: int | None = None
    tensor_parallel: int = 1
    data_parallel: int = 1
    fsdp: bool = False
    bandwidth: float | None = None
    memory: float = CARD_GIB

    def __post_init__(self) -> None:
        sizes = {
            "tokens": self.tokens, "hidden": self.hidden, "vocab": self.vocab,
            "layers": self.layers, "parameters": self.parameters,
            "tensor-parallel": self.tensor_parallel, "data-parallel": self.data_parallel,
        }  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise BenchError(f"--{name} must be at least 1, got {size}")
        if self.dtype not in DTYPES:
            raise BenchError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name, amount in (("bandwidth", self.bandwidth), ("memory", self.memory)):
            if amount is not None and not 0 < amount < math.inf:  # NaN neither
                raise BenchError(f"--{name} must be a positive finite number, got {amount}")
        if self.tensor_parallel > self.vocab:
            raise BenchError(
                f"--tensor-parallel must be at most the vocabulary's {self.vocab} classes, "
                f"got {self.tensor_parallel}"
            )
        if self.fsdp and self.data_parallel == 1:
            raise BenchError("--fsdp needs --data-parallel of at least 2, got 1")


class Head(NamedTuple):
    """What a rank has of a head."""

    tokens: int
    hidden: int
    vocab: int  # of the largest shard
    dtype: torch.dtype
    shards: int

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Of the weight, or its gradient."""
        return self.vocab * self.hidden * self.dtype.itemsize

    @property
    def hidden_bytes(self) -> int:
        """Of the hidden states, or their gradient."""
        return self.tokens * self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class Term:
    """Part of what a method holds at its peak, beyond inputs and the two gradients."""

    what: str
    num_bytes: int


class Unknown(NamedTuple):
    """Why something is not known."""

    reason: str


class Method(NamedTuple):
    """A way to compute the loss and its gradients, by the name that the bench gives it."""

    name: str
    workspace: Callable[[Head], list[Term] | Unknown]


def _pytorch(head: Head) -> list[Term] | Unknown:
    """The larger of two moments: before there are gradients, and while they are made."""
    gradients = head.weight_bytes + head.hidden_bytes
    before = 3 * head.logits_bytes - gradients
    if before <= head.logits_bytes:
        return [Term("gradient of the logits", head.logits_bytes)]
    return [
        Term("log-softmax, kept for the backward", head.logits_bytes),
        Term("its gradient", head.logits_bytes),
        Term("gradient of the logits", head.logits_bytes),
        Term("less the gradients of weight and hidden states, which come later", -gradients),
    ]


def _compiled(head: Head) -> list[Term] | Unknown:
    return [Term("logits, overwritten by their gradient", head.logits_bytes)]


def _pytorch_chunked(head: Head) -> list[Term] | Unknown:
    del head
    return Unknown("no committed result has its memory on a GPU")


def _liger(head: Head) -> list[Term] | Unknown:
    """As many tokens at a time as have logits of the hidden states' size, up to a power of two."""
    tokens = math.ceil(head.tokens / math.ceil(head.vocab / head.hidden))
    tokens = min(2 ** (tokens - 1).bit_length(), head.tokens)
    return [
        Term(f"logits of {tokens} tokens", tokens * head.vocab * head.dtype.itemsize),
        Term("losses", 4 * head.tokens),
    ]


def _cut_cross_entropy(head: Head) -> list[Term] | Unknown:
    if head.dtype == torch.float32:
        return Unknown("its backward takes bf16 and fp16")
    # At most: of the two measured peaks one is this to 1 %, the other a quarter less.
    return [
        Term("numbers of each class, for their order", 16 * head.vocab),
        Term("log-sum-exps and target logits", 8 * head.tokens),
    ]


def _crosscut_auto(head: Head) -> list[Term] | Unknown:
    """Of selected pairs or of the exact gradient, whichever is larger: the softmax decides."""
    problem = _problem(head)
    if not filters_columns(problem):
        return _crosscut_exact(head)
    masses = 2 * token_blocks(problem) * head.vocab
    pairs = _of_pairs(head, masses, capacity_for_pairs(problem, lends=True))
    exact = [Term("column masses", masses), *_exact(head)]
    return max(pairs, exact, key=_total) + _of_shards(head)


def _crosscut_exact(head: Head) -> list[Term] | Unknown:
    return _exact(head) + _of_shards(head)


def _of_shards(head: Head) -> list[Term]:
    if head.shards == 1:
        return []
    return [Term("dH of this shard in float32", 4 * head.tokens * head.hidden)]


NARROW = 0.14
"""Of ``workspace_limit()``: what the exact gradient allocates beside dC, at most."""

TILE = 128
"""Tokens of a block and classes of a tile."""

MOST_CLASSES = 2**17
"""Of which the exact gradient works on the logits at a time."""

LITTLE = 2**23
"""Bytes of column masses that are not worth a place in rows of dC."""


def _exact(head: Head) -> list[Term]:
    """Rows of dC hold dz where dC is large: what is left is for the last classes."""
    limit, size = workspace_limit(), head.dtype.itemsize
    row_bytes = math.ceil(head.tokens / TILE) * TILE * size
    share = 1.0 if head.weight_bytes < 4 * limit else NARROW
    classes = min(math.ceil(head.vocab / TILE) * TILE, MOST_CLASSES)
    most = min(int(limit * share), classes * row_bytes)
    terms = [
        Term("copy of the hidden states", head.hidden_bytes),
        Term("gradient of some classes' logits", max(most, TILE * row_bytes)),
    ]
    if head.dtype != torch.float32:
        terms.append(Term("what rounding leaves of dH", head.hidden_bytes))
    return terms


def _of_pairs(head: Head, masses: int, capacity: Capacity) -> list[Term]:
    """Where rows of dC lend their memory, lists and dz lie there."""
    size, row_bytes = head.dtype.itemsize, head.hidden * head.dtype.itemsize
    blocks = math.ceil(head.tokens / TILE)
    nonzeros = (4 + size) * NONZEROS_PER_TOKEN * head.tokens
    terms = [
        Term("column masses", masses),
        Term("copy of the hidden states", head.hidden_bytes),
        Term("the tail's rows", 8 * blocks * head.hidden),
    ]
    if capacity.lent_from < head.vocab:
        if masses <= LITTLE:
            terms.append(Term("masses of the tail", masses))
        terms.append(Term("hot classes' rows that wait", capacity.deferred * row_bytes))
        return [*terms, Term("nonzeros", nonzeros)]
    slots = capacity.pairs + 2 * TILE * blocks
    return [
        *terms,
        Term("masses of the tail", masses),
        Term("gradient of the selected pairs' logits", slots * TILE * size),
        Term("lists of the selected pairs", 24 * slots),
        Term("hot classes' rows, then nonzeros", max(capacity.hot * row_bytes, nonzeros)),
    ]


def _problem(head: Head) -> HeadProblem:
    """A problem without data, for crosscut's own plans."""
    with torch.device("meta"):
        return HeadProblem(
            hidden=torch.empty(head.tokens, head.hidden, dtype=head.dtype),
            classifier=torch.empty(head.vocab, head.hidden, dtype=head.dtype),
            bias=None,
            labels=torch.empty(head.tokens, dtype=torch.int64),
            logit_weight=None,
            options=HeadOptions(),
        )


METHODS = (
    Method("crosscut-auto", _crosscut_auto),
    Method("crosscut-exact", _crosscut_exact),
    Method("pytorch", _pytorch),
    Method("pytorch-compiled", _compiled),
    Method("pytorch-chunked", _pytorch_chunked),
    Method("liger-kernel", _liger),
    Method("cut-cross-entropy", _cut_cross_entropy),
)


def _total(terms: list[Term]) -> int:
    return sum(term.num_bytes for term in terms)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A result of the bench.

    Attributes:
        file: in ``benchmarks/results``.
        tokens: N.
        hidden: D.
        vocab: V.
        matmul_s: seconds of the logits matmul.
        ratios: of forward and backward over it, by contender.
    """

    file: str
    tokens: int
    hidden: int
    vocab: int
    matmul_s: float
    ratios: dict[str, float]


@functools.cache
def measured() -> tuple[Measured, ...]:
    """What the bench measured on one H100, in bfloat16, with real logits as they are."""
    return tuple(Measured(**point) for point in json.loads(MEASURED.read_text())["points"])


def nearest(head: Head, method: str | None = None) -> Measured | None:
    """The result for the shape most like this one, in which a method was measured.

    Distance is that of the logarithms of N, D and V. None if there is no such result.
    """

    def distance(point: Measured) -> float:
        sizes = (
            (point.tokens, head.tokens),
            (point.hidden, head.hidden),
            (point.vocab, head.vocab),
        )
        return sum(abs(math.log(there / here)) for there, here in sizes)

    points = [point for point in measured() if method is None or method in point.ratios]
    if head.dtype != torch.bfloat16 or not points:
        return None
    return min(points, key=distance)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What moves between ranks in a step.

    Attributes:
        what: in words.
        payload_bytes: of the tensor that it is about.
        sent_bytes: that each rank sends, in a ring.
        seconds: for that, at the bandwidth that was given; None without one.
    """

    what: str
    payload_bytes: int
    sent_bytes: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method costs on a rank.

    Attributes:
        method: its name.
        terms: what it holds at its peak beyond inputs and gradients; empty where not known.
        unknown: why not.
        workspace_bytes: all of that.
        peak_bytes: with the head's weight, hidden states, and the gradients of both.
        ratio: seconds of forward and backward over the logits matmul, as measured.
        seconds: the same times the matmul of this shape.
        source: the file the ratio comes from.
        most_tokens: the largest N that fits.
    """

    method: str
    terms: tuple[Term, ...]
    unknown: str | None
    workspace_bytes: int | None
    peak_bytes: int | None
    ratio: float | None
    seconds: float | None
    source: str | None
    most_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The answer to a request. All bytes are those of one rank.

    Attributes:
        request: what was asked.
        vocab: classes of a rank.
        weight_bytes: of the head's weight, gathered where ranks share it; its gradient has as many.
        hidden_bytes: of the hidden states; their gradient has as many.
        logits_bytes: of the logits, were they stored in the dtype.
        state_bytes: of the weights, gradients and Adam's moments that the rank keeps.
        activation_bytes: of what enters each layer, kept for the backward.
        matmul_flop: of the logits matmul.
        matmul_seconds: at the speed that was measured; None where it was not.
        matmul_source: the file it comes from.
        costs: of each method.
        collectives: what moves, per step.
        notes: what to keep in mind.
    """

    request: Request
    vocab: int
    weight_bytes: int
    hidden_bytes: int
    logits_bytes: int
    state_bytes: int
    activation_bytes: int
    matmul_flop: int
    matmul_seconds: float | None
    matmul_source: str | None
    costs: tuple[Cost, ...]
    collectives: tuple[Collective, ...]
    notes: tuple[str, ...]


def estimate(request: Request) -> Estimate:
    """What a head and its loss cost on each rank."""
    head = _head_of(request, request.tokens)
    flop = 2 * head.tokens * head.vocab * head.hidden
    matmul_s, near = None, nearest(head)
    if near is not None:
        matmul_s = near.matmul_s * flop / (2 * near.tokens * near.vocab * near.hidden)
    return Estimate(
        request=request,
        vocab=head.vocab,
        weight_bytes=head.weight_bytes,
        hidden_bytes=head.hidden_bytes,
        logits_bytes=head.logits_bytes,
        state_bytes=_state_bytes(request),
        activation_bytes=_activation_bytes(request, request.tokens),
        matmul_flop=flop,
        matmul_seconds=matmul_s,
        matmul_source=None if near is None else near.file,
        costs=tuple(_cost(method, request, head, matmul_s) for method in METHODS),
        collectives=tuple(_collectives(request, head)),
        notes=tuple(_notes(request)),
    )


def _head_of(request: Request, tokens: int) -> Head:
    shards = request.tensor_parallel
    vocab = math.ceil(request.vocab / shards)
    return Head(tokens, request.hidden, vocab, DTYPES[request.dtype], shards)


def _cost(method: Method, request: Request, head: Head, matmul_s: float | None) -> Cost:
    terms, unknown = method.workspace(head), None
    if isinstance(terms, Unknown):
        terms, unknown = [], terms.reason
    workspace = None if unknown else _total(terms)
    near = nearest(head, method.name)
    ratio = None if near is None else near.ratios[method.name]
    return Cost(
        method=method.name,
        terms=tuple(terms),
        unknown=unknown,
        workspace_bytes=workspace,
        peak_bytes=None if workspace is None else workspace + _inputs_and_gradients(head),
        ratio=ratio,
        seconds=None if ratio is None or matmul_s is None else ratio * matmul_s,
        source=None if near is None else near.file,
        most_tokens=None if unknown else most_tokens(method, request),
    )


def _inputs_and_gradients(head: Head) -> int:
    return 2 * head.weight_bytes + 2 * head.hidden_bytes


def _state_bytes(request: Request) -> int:
    """A rank's part of the model's state, or of the head's."""
    numbers = request.parameters or request.vocab * request.hidden
    ranks = request.tensor_parallel * (request.data_parallel if request.fsdp else 1)
    return math.ceil(COPIES * numbers * DTYPES[request.dtype].itemsize / ranks)


def _activation_bytes(request: Request, tokens: int) -> int:
    return tokens * (request.layers or 0) * request.hidden * DTYPES[request.dtype].itemsize


def _step_bytes(method: Method, request: Request, tokens: int) -> int:
    """A rank's peak: state, activations, hidden states, and the head with its loss."""
    head = _head_of(request, tokens)
    terms = method.workspace(head)
    assert not isinstance(terms, Unknown)
    used = _state_bytes(request) + _activation_bytes(request, tokens) + _total(terms)
    used += 2 * head.hidden_bytes
    if request.fsdp:  # gathered, beside the rank's part of them in the state
        used += 2 * head.weight_bytes
    return used


def most_tokens(method: Method, request: Request) -> int:
    """The largest N of a rank whose step fits its memory; 0 if none does."""
    memory = int(request.memory * GIB)

    def fits(tokens: int) -> bool:
        return _step_bytes(method, request, tokens) <= memory

    power = next((power for power in range(30, -1, -1) if fits(2**power)), None)
    if power is None:
        return 0
    low, high = 2**power, 2 ** (power + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _collectives(request: Request, head: Head) -> list[Collective]:
    """Of a head whose vocabulary or weight is shared, by the ring algorithms."""
    moves: list[Collective] = []

    def add(what: str, payload: int, ranks: int, passes: int) -> None:
        sent = math.ceil(passes * payload * (ranks - 1) / ranks)
        bandwidth = request.bandwidth
        seconds = None if bandwidth is None else sent / (bandwidth * 1e9)
        moves.append(Collective(what=what, payload_bytes=payload, sent_bytes=sent, seconds=seconds))

    shards, groups = request.tensor_parallel, request.data_parallel
    if shards > 1:
        statistics = 4 * STATISTICS * head.tokens
        add(f"{STATISTICS} float32 per token: all-gather", shards * statistics, shards, 1)
        add("dH in float32: all-reduce", 4 * head.tokens * head.hidden, shards, 2)
    if request.fsdp:
        add("head's weight, forward: all-gather", head.weight_bytes, groups, 1)
        add("head's weight, backward: all-gather", head.weight_bytes, groups, 1)
        add("dC: reduce-scatter", head.weight_bytes, groups, 1)
    elif groups > 1:
        add("dC: all-reduce", head.weight_bytes, groups, 2)
    return moves


def _notes(request: Request) -> list[str]:
    notes = [
        "Memory is that of PyTorch's allocator on a GPU. Of the peaks measured on one H100, "
        "estimates for PyTorch are 0.99 to 1.00, for crosscut 0.94 to 1.15 from 8192 tokens on and "
        "0.97 to 1.6 with fewer.",
    ]
    if request.dtype == "bf16":
        notes.append(
            "Times: ratios to the logits matmul, and its speed, as measured on one H100 with a "
            "trained model's logits, in the result of the shape nearest to a rank's. On a flat "
            "softmax crosscut-auto takes what crosscut-exact does."
        )
    else:
        notes.append(f"No times: what was measured on a GPU is bf16, not {request.dtype}.")
    if request.tensor_parallel > 1:
        notes.append(
            "Shards of a vocabulary: the formulas of one device, with the shard's classes. They "
            "were not checked on several."
        )
    if request.tensor_parallel * request.data_parallel > 1:
        notes.append("What moves: ring algorithms, without latency, nothing overlapped.")
    left_out = [
        words
        for missing, words in (
            (request.layers is None, "activations (give --layers)"),
            (request.parameters is None, "the state of all but the head (give --parameters)"),
        )
        if missing
    ]
    if left_out:
        notes.append(f"Of the largest N are left out {' and '.join(left_out)}.")
    return notes


def request_for(model: str, tokens: int, **others: Any) -> Request:
    """A request for a model of :data:`MODELS`, or for its head in another shape.

    Args:
        model: its name.
        tokens: N.
        others: of :class:`Request`. What is None is the model's; but layers and parameters of a
            model with another D or V are those that are given, or none.
    """
    if model not in MODELS:
        raise BenchError(f"--model must be one of {', '.join(MODELS)}, got {model!r}")
    known = MODELS[model]
    given = {name: value for name, value in others.items() if value is not None}
    shape = {"hidden": known.hidden, "vocab": known.vocab}
    if all(given.get(name, size) == size for name, size in shape.items()):
        shape |= {"layers": known.layers, "parameters": known.parameters}
    return Request(tokens=tokens, **{**shape, **given})


def name_of(model: str, request: Request) -> str:
    """The model's name, where it is that model's head."""
    known = MODELS[model]
    return model if (request.hidden, request.vocab) == (known.hidden, known.vocab) else "a head"
