"""What the bench computes: hidden states, an output head and labels, by model name and shape.

- A named model has that model's hidden size D and vocabulary V, and the *logits of a real one*:
  those of Gemma 3 270M. One orthonormal map takes its hidden states and its head's rows from 640
  into D dimensions, which leaves every logit as it was; of its 262144 classes the first V stay,
  with every label among them.
- ``random:N=1024,D=640,V=262144`` draws everything from Gaussians. A trained model's softmax is
  sparse and this one is flat, so what a gradient may leave out on one it must keep on the other.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscut.bench import BenchError, real_head
from crosscut.bench.progress import Progress
from crosscut.bench.real_head import RealHead

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_TOKENS = 1024

RANDOM_NOTE = (
    "Random logits: the softmax is flat, unlike a trained model's. A filtered gradient is no "
    "faster here, or drops what it should not and only looks fast. For speed, bench a real head."
)

_ROWS = 8192  # of the classifier, rotated at once: 160 MiB at D=5120 in float32
_SEED = 2009


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Hidden size D and vocabulary V of a model's output head."""

    hidden: int
    vocab: int


MODELS = {
    "gemma3-270m": HeadShape(hidden=640, vocab=262_144),
    "gemma2-2b": HeadShape(hidden=2304, vocab=256_000),
    "llama3-8b": HeadShape(hidden=4096, vocab=128_256),
    "qwen2.5-7b": HeadShape(hidden=3584, vocab=152_064),
    "mistral-nemo": HeadShape(hidden=5120, vocab=131_072),
    "phi3.5-mini": HeadShape(hidden=3072, vocab=32_064),
}


@dataclass(frozen=True, kw_only=True)
class WorkloadRequest:
    """What was asked for.

    Attributes:
        name: a model's name, or ``random:N=..,D=..,V=..``.
        tokens: N; None for the name's own, or 1024.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        device: ``"cpu"`` or ``"cuda"``.
        logits_times: factor of every logit: 0.2 is a model early in its training.
        hidden: another hidden size D than the named model's.
        vocab: another vocabulary V than the named model's.
    """

    name: str
    tokens: int | None = None
    dtype: str = "bf16"
    device: str = "cpu"
    logits_times: float = 1.0
    hidden: int | None = None
    vocab: int | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One head to compute, in the dtype and on the device of the measurement.

    Attributes:
        name: what it was asked for by.
        hidden: ``[N, D]``.
        classifier: ``[V, D]``.
        labels: ``[N]`` int64, all in ``[0, V)``.
        source: where the logits come from, in a line.
        note: what to keep in mind when reading the numbers, or None.
        logits_times: factor the logits were scaled by.
    """

    name: str
    hidden: Tensor
    classifier: Tensor
    labels: Tensor
    source: str
    note: str | None = None
    logits_times: float = 1.0

    @property
    def logits_bytes(self) -> int:
        """Size of the [N, V] logits, were they stored in the workload's dtype."""
        return self.hidden.shape[0] * self.classifier.shape[0] * self.hidden.element_size()

    @property
    def gradient_bytes(self) -> int:
        """Size of the two gradients."""
        return self.hidden.nbytes + self.classifier.nbytes


def make(request: WorkloadRequest, progress: Progress) -> Workload:
    """Build the workload; raise BenchError where there is none of that name or size."""
    if request.dtype not in DTYPES:
        raise BenchError(f"--dtype must be one of {', '.join(DTYPES)}, got {request.dtype!r}")
    sizes = {"tokens": request.tokens, "hidden-size": request.hidden, "vocab-size": request.vocab}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise BenchError(f"--{name} must be at least 1, got {size}")
    if not 0 < request.logits_times < math.inf:  # NaN neither
        raise BenchError(
            f"--logits-times must be a positive finite number, got {request.logits_times}"
        )
    if request.name.startswith("random:"):
        if request.hidden or request.vocab:
            raise BenchError(f"--workload {request.name} has a shape of its own: give no other")
        return _random(request)
    if request.name not in MODELS:
        raise BenchError(
            f"--workload must be one of {', '.join(MODELS)} or random:N=..,D=..,V=.., "
            f"got {request.name!r}"
        )
    head = real_head.load(request.tokens or DEFAULT_TOKENS, progress)
    model = MODELS[request.name]
    shape = HeadShape(hidden=request.hidden or model.hidden, vocab=request.vocab or model.vocab)
    return from_real_head(head, shape, request, progress)


def from_real_head(
    head: RealHead, shape: HeadShape, request: WorkloadRequest, progress: Progress
) -> Workload:
    """The real head's logits in another head's shape: the first tokens, if there are more."""
    dtype, device = DTYPES[request.dtype], request.device
    classes = choose_classes(head.vocabulary, of=len(head.classifier), keep=shape.vocab)
    place = torch.full((len(head.classifier),), -1)
    place[classes] = torch.arange(shape.vocab)

    first = slice(request.tokens)
    hidden, source = head.hidden[first] * request.logits_times, head.source
    if shape.hidden == head.classifier.shape[1]:
        rows = head.classifier if shape.vocab == len(head.classifier) else head.classifier[classes]
        hidden, classifier = hidden.to(device, dtype), rows.to(device, dtype)
    else:
        rotation = orthonormal(head.classifier.shape[1], shape.hidden).to(device)
        classifier = torch.empty(shape.vocab, shape.hidden, dtype=dtype, device=device)
        starts = range(0, shape.vocab, _ROWS)
        with progress.stage(f"rotating into {shape.hidden} dimensions", len(starts)) as step:
            for start in starts:  # the cast comes last
                rows = head.classifier[classes[start : start + _ROWS]].to(device)
                classifier[start : start + _ROWS] = rows @ rotation
                step("")
        hidden = (hidden.to(device) @ rotation).to(dtype)
        source += f", rotated into D={shape.hidden}"
    return Workload(
        name=request.name,
        hidden=hidden,
        classifier=classifier,
        labels=place[head.labels[first]].to(device),
        source=source,
        logits_times=request.logits_times,
    )


def choose_classes(needed: Tensor, *, of: int, keep: int) -> Tensor:
    """The first ``keep`` of ``of`` classes, the last of them giving way to what is needed.

    Args:
        needed: sorted distinct classes that must be among them.
        of: number of classes there are.
        keep: number of classes to keep.

    Returns:
        ``[keep]``: the class that stands at each place.
    """
    if not len(needed) <= keep <= of:
        raise BenchError(
            f"the vocabulary must be between {len(needed)}, the distinct labels of the text, "
            f"and {of}, got {keep}"
        )
    classes = torch.arange(keep)
    outside = needed[needed >= keep]
    free = torch.ones(keep, dtype=torch.bool)
    free[needed[needed < keep]] = False
    if len(outside):
        classes[free.nonzero().squeeze(1)[-len(outside) :]] = outside
    return classes


def orthonormal(narrow: int, wide: int) -> Tensor:
    """A float32 map ``[narrow, wide]`` that keeps inner products of rows. Always the same one."""
    if wide < narrow:
        raise BenchError(f"the hidden size must be at least {narrow}, got {wide}")
    generator = torch.Generator().manual_seed(_SEED)
    gaussian = torch.randn(wide, narrow, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.T.float().contiguous()


def _random(request: WorkloadRequest) -> Workload:
    """Gaussian hidden states and rows, with logits of variance 1; uniform labels."""
    sizes = _random_sizes(request)
    tokens, hidden_size, vocab = sizes["N"], sizes["D"], sizes["V"]
    generator = torch.Generator().manual_seed(_SEED)
    hidden = torch.randn(tokens, hidden_size, generator=generator) * request.logits_times
    classifier = torch.randn(vocab, hidden_size, generator=generator) * hidden_size**-0.5
    dtype, device = DTYPES[request.dtype], request.device
    return Workload(
        name=f"random:N={tokens},D={hidden_size},V={vocab}",
        hidden=hidden.to(device, dtype),
        classifier=classifier.to(device, dtype),
        labels=torch.randint(vocab, (tokens,), generator=generator).to(device),
        source="random Gaussians",
        note=RANDOM_NOTE,
        logits_times=request.logits_times,
    )


def _random_sizes(request: WorkloadRequest) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in request.name.removeprefix("random:").split(","):
        match = re.fullmatch(r"([NDV])=(\d+)", part.strip())
        if match is None or int(match[2]) < 1:
            raise BenchError(
                "--workload must look like random:N=1024,D=640,V=262144, with positive sizes, "
                f"got {request.name!r}"
            )
        sizes[match[1]] = int(match[2])
    if request.tokens is not None and sizes.setdefault("N", request.tokens) != request.tokens:
        raise BenchError(f"--tokens is {request.tokens}, --workload says N={sizes['N']}: give one")
    sizes.setdefault("N", DEFAULT_TOKENS)
    missing = [name for name in ("D", "V") if name not in sizes]
    if missing:
        raise BenchError(f"--workload must give {' and '.join(missing)}, got {request.name!r}")
    if sizes["V"] < 2:
        raise BenchError(
            f"--workload must have two classes or more, got {request.name!r}: the loss of one is 0"
        )
    return sizes
