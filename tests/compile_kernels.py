"""Compile every kernel for a GPU that is not here, by calling its launcher on CPU tensors.

    python tests/compile_kernels.py cuda:90 bfloat16

prints one JSON line a kernel: registers, bytes of stack, which it has if it spills, shared memory,
whether the assembler makes matrix products wait for each other that were to run on ahead (on
Hopper; it does so silently where it loses track of their registers), and the seconds that each part
of the compiler took (with TRITON_ALWAYS_COMPILE=1, else nothing of what is in its cache). What is
compiled is what a launch would be: its options, its specialisation on alignment, the tiles of the
table. With a third word, "few", only variants with the most and with the least in them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from crosscut.kernels import tiles as tile_table
from crosscut.kernels.tiles import Kernel


class NoDriver:
    """A driver that knows its target and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


def main(target: str, dtype_name: str, few: str = "") -> None:
    kind, arch = target.split(":")
    gpu = GPUTarget(kind, int(arch) if arch.isdigit() else arch, 64 if kind == "hip" else 32)
    capability = divmod(int(arch), 10) if kind == "cuda" else (8, 0)
    dtype = getattr(torch, dtype_name)
    compiled: list[tuple[str, Any]] = []
    seconds: dict[int, dict[str, float]] = {}
    run = triton.JITFunction.run

    def listen(*, times: Any, **_: Any) -> None:
        parts = {"python": times.ir_initialization, **dict(times.lowering_stages)}
        seconds[len(compiled)] = {part: round(took / 1e6, 3) for part, took in parts.items()}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del grid, warmup
        kernel = run(self, *args, grid=(1,), warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))

    def choose(kernel: Kernel, like: torch.Tensor) -> tile_table.Tiles:
        return tile_table.table(kernel, like.dtype, capability, like.shape[1])

    driver.set_active(NoDriver(gpu))
    triton.knobs.compilation.listener = listen
    with mock.patch.object(triton.JITFunction, "run", compile_only):
        launch_everything(dtype, choose, step=2 if few else 1)
    for index, (name, kernel) in enumerate(compiled):
        found = {"kernel": name, **resources(kernel, gpu), "seconds": seconds.get(index, {})}
        print(json.dumps(found), flush=True)


def launch_everything(dtype: torch.dtype, choose: Any, step: int) -> None:
    from crosscut.kernels.exact_sweep import SweepOutputs, exact_sweep
    from crosscut.kernels.flags import flagged_first
    from crosscut.kernels.gather_tokens import PerToken, gather_tokens
    from crosscut.kernels.indexed_matmul import indexed_matmul
    from crosscut.kernels.kept_rows import KeptRows, kept_rows
    from crosscut.kernels.linear_lse import Wanted, linear_lse
    from crosscut.kernels.move_rows import move_rows
    from crosscut.kernels.softmax_gradient import HeadChunk, Tokens, softmax_gradient
    from crosscut.kernels.tile_matmul import (
        add_hidden_gradient,
        classifier_gradient,
        live_tiles,
    )
    from crosscut.kernels.tiles import Head

    n, d, v = 256, 1024, 512
    hidden, classifier = torch.zeros(n, d, dtype=dtype), torch.zeros(v, d, dtype=dtype)
    bias, weight = torch.zeros(v, dtype=dtype), torch.zeros(v)
    labels, index = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int32)
    kept_rows(labels)
    kept = KeptRows(index[:1], index, index)
    vector = torch.zeros(n)
    for lift in (None, vector[0]):
        for some, other in ((None, None), (vector, None), (vector, vector)):
            of_tokens = PerToken(labels, vector, other, vector, vector, some, other)
            gather_tokens(hidden, of_tokens, kept, lift, multiple=128)
    of_tokens = PerToken(None, vector, None, vector, None, None, None)
    gather_tokens(hidden, of_tokens, kept, None, multiple=128)
    move_rows(torch.empty_like(hidden), hidden, index, torch.ones(1))
    move_rows(torch.empty_like(hidden), torch.zeros(n, d), index, torch.ones(1))
    tokens = Tokens(index[:1], hidden, labels, torch.zeros(n, 4))
    dz, alive = torch.zeros(n, v, dtype=dtype), torch.zeros(2, 4, dtype=torch.int8)
    live = live_tiles(alive)
    heads = (None, None, None), (bias, None, 30.0), (bias, weight, 30.0)
    for b, w, softcap in heads[::step]:
        head = Head(hidden, classifier, b, 1.0, softcap)
        indexed_matmul(head, labels)
        tiles = choose(Kernel.LSE if w is None else Kernel.WEIGHTED_LSE, hidden)
        linear_lse(head, kept, tiles, Wanted(logit_weight=w))
        sums = None if b is None else torch.zeros(v)
        low = None if dtype == torch.float32 else hidden
        out = SweepOutputs(index, torch.empty_like(hidden), low, torch.empty_like(classifier), sums)
        for like in (hidden, hidden[:, :640]):  # whose tiles are others
            tiles = choose(Kernel.GRADIENT, like), choose(Kernel.MATMUL, like)
            exact_sweep(head, w, tokens, out, dz, range(v), torch.ones(1), *tiles)
        chunk, options = HeadChunk(0, classifier, b, w), {"logit_scale": 1.0, "softcap": softcap}
        softmax_gradient(dz, tokens, chunk, choose(Kernel.GRADIENT, hidden), **options)
        tiles = choose(Kernel.FILTER, hidden)
        softmax_gradient(dz, tokens, chunk, tiles, alive=alive if w is None else None, **options)
    for some, kernel in ((None, Kernel.MATMUL), (live, Kernel.LIVE_MATMUL)):
        tiles = choose(kernel, hidden)
        classifier_gradient(
            torch.empty_like(classifier), dz, hidden, index[:1], some, tiles,
            scale=torch.ones(1), out_rows=None if some is None else labels,
        )  # fmt: skip
        add_hidden_gradient(torch.zeros(n, d), dz, classifier, index[:1], some, tiles)
    for b, softcap in ((None, None), (None, 30.0), (bias, 30.0))[::step]:
        launch_others(Head(hidden, classifier, b, 1.0, softcap), tokens, kept, dz, choose)
    launch_divergence(dtype, choose, ("js", "forward", "reverse")[: 3 // step])
    if dtype != torch.float32:
        flags = torch.zeros(v, dtype=torch.int8)
        flagged_first(flags, 32)
        for softcap in (None, 30.0):
            launch_filtered(Head(hidden, classifier, None, 1.0, softcap), tokens, kept, choose)


def launch_divergence(dtype: torch.dtype, choose: Any, kinds: tuple[str, ...]) -> None:
    """With everything and with nothing else."""
    from crosscut.kernels.divergence import Pair, divergence, divergence_gradient
    from crosscut.kernels.kept_rows import KeptRows
    from crosscut.kernels.tiles import Head

    n, v = 256, 512
    labels, index = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int32)
    dz, bias = torch.zeros(n, v, dtype=dtype), torch.zeros(v, dtype=dtype)
    for kind in kinds:
        for b, softcap, temperature in ((None, None, None), (bias, 30.0, 2.0)):
            student, teacher = (
                Head(
                    torch.zeros(n, d, dtype=dtype), torch.zeros(v, d, dtype=dtype), b, 1.0, softcap
                )
                for d in (1024, 2048)
            )
            pair = Pair(student, teacher, kind, 0.5, temperature)
            tiles = choose(Kernel.DIVERGENCE, student.hidden)
            divergence(pair, KeptRows(index[:1], index, index), tiles)
            tiles = choose(Kernel.DIVERGENCE_GRADIENT, student.hidden)
            tokens = index[:1], labels, torch.zeros(n, 7)
            divergence_gradient(dz, pair, slice(0, v), tokens, tiles)


def launch_others(head: Any, tokens: Any, kept: Any, dz: torch.Tensor, choose: Any) -> None:
    """Entropy, ranks, and several targets."""
    from crosscut.kernels.exact_sweep import SweepOutputs, exact_sweep
    from crosscut.kernels.indexed_matmul import indexed_matmul
    from crosscut.kernels.linear_lse import Wanted, linear_lse
    from crosscut.kernels.softmax_gradient import HeadChunk, softmax_gradient

    hidden = head.hidden
    n = len(hidden)
    target = tokens.labels, torch.zeros(n)
    linear_lse(head, kept, choose(Kernel.LSE, hidden), Wanted(entropy=True))
    for entropy in (False, True):
        wanted = Wanted(entropy=entropy, target=target)
        linear_lse(head, kept, choose(Kernel.WEIGHTED_LSE, hidden), wanted)
    several = torch.zeros(n, 4, dtype=torch.int64)
    indexed_matmul(head, several)
    sums = None if head.bias is None else torch.zeros(len(head.bias))
    low = None if hidden.dtype == torch.float32 else hidden
    d_classifier = torch.empty_like(head.classifier)
    for some in (
        tokens._replace(vectors=torch.zeros(n, 5)),
        tokens._replace(labels=several, d_targets=torch.zeros(n, 4)),
    ):
        total = hidden, low
        if some.vectors.shape[1] == 5:
            total = torch.zeros(n, hidden.shape[1]), None
        out = SweepOutputs(kept.rows, *total, d_classifier, sums)
        for like in (hidden[:, :640], hidden):
            tiles = choose(Kernel.GRADIENT, like), choose(Kernel.MATMUL, like)
            classes = range(len(head.classifier))
            exact_sweep(head, None, some, out, dz, classes, torch.ones(1), *tiles)
        softmax_gradient(
            dz, some, HeadChunk(0, head.classifier, head.bias, None), tiles[0],
            logit_scale=1.0, softcap=head.softcap,
        )  # fmt: skip


def launch_filtered(head: Any, tokens: Any, kept: Any, choose: Any) -> None:
    from crosscut.kernels.entry_matmul import classifier_rows, list_entries
    from crosscut.kernels.indexed_matmul import indexed_matmul
    from crosscut.kernels.kept_pairs import kept_pairs
    from crosscut.kernels.linear_lse import Columns, Wanted, linear_lse
    from crosscut.kernels.pair_gradient import pair_gradient, tail_of_tokens
    from crosscut.kernels.pair_matmul import hidden_rows, late_rows, popular_head, popular_rows
    from crosscut.kernels.scratch import Scratch

    hidden, classifier = head.hidden, head.classifier
    tiles = choose(Kernel.PAIRS, hidden)
    blocks, scale = len(hidden) // tiles.block_n, torch.ones(1)
    mass = torch.zeros(blocks, len(classifier), dtype=torch.bfloat16)
    narrow = hidden[:, :640]  # whose tiles are others
    entropy = Kernel.MASS_LSE if head.softcap is None else Kernel.WEIGHTED_LSE
    target = tokens.labels, torch.zeros(len(hidden))
    for kernel, like, wanted in (
        (Kernel.MASS_LSE, hidden, None),
        (Kernel.MASS_LSE, narrow, None),
        (entropy, hidden, Wanted(entropy=True)),
        (entropy, narrow, Wanted(entropy=True)),
        (Kernel.WEIGHTED_LSE, hidden, Wanted(entropy=True, target=target)),
    ):
        columns = Columns(mass, tokens.labels, torch.zeros(len(hidden)), 2.0**-12)
        linear_lse(head, kept, choose(kernel, like), wanted, columns)
    indexed_matmul(head, tokens.labels, torch.zeros(len(classifier), dtype=torch.int8))
    scratch, v = Scratch(hidden.device), len(classifier)
    pairs = kept_pairs(
        mass, kept.count, torch.empty_like(mass), scratch, block_n=tiles.block_n,
        num_slots=4 * tiles.block_v, block_slots=tiles.block_v, most_tail=1.0,
        most_popular=v, late_from=v, most_late=0,
    )  # fmt: skip
    of_popular = torch.empty(v, hidden.shape[1], dtype=hidden.dtype)
    popular_head(of_popular, classifier, pairs, block_slots=tiles.block_v)
    gradient = pair_gradient(
        head, tokens, pairs, of_popular, scratch, tiles, mass_unit=2.0**-12, entry=2.0**-13
    )
    slopes = None if head.softcap is None else (torch.zeros(len(hidden)), kept.rows)
    by_token, by_block = tail_of_tokens(tokens, slopes, pairs, gradient, tiles)
    rows = torch.zeros(blocks, hidden.shape[1])
    hidden_rows(
        torch.empty_like(hidden), tokens, kept.rows, gradient.dz, classifier, of_popular, pairs,
        (by_token, rows), scale, choose(Kernel.PAIR_MATMUL, hidden),
    )  # fmt: skip
    tail, out = (mass, by_block), torch.empty_like(classifier)
    entries = list_entries(kept.count, tokens, pairs, gradient, scratch, most=1024, entry=2.0**-13)
    tiles = choose(Kernel.ENTRY_MATMUL, hidden)
    classifier_rows(out, range(v), tokens, entries, pairs, tail, scale, tiles)
    tiles = choose(Kernel.POPULAR_MATMUL, hidden)
    for late in (None, out):
        popular_rows(out, late, tokens, gradient.dz, pairs, scale, tiles)
    late_rows(out, out, tokens, pairs)


def resources(kernel: Any, gpu: GPUTarget) -> dict[str, int]:
    found = {"shared": kernel.metadata.shared}
    if gpu.backend != "cuda":
        return found
    with tempfile.NamedTemporaryFile() as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = run_tool("cuobjdump", "-res-usage", cubin.name)
        found["registers"], found["spilled"] = (
            max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in ("REG", "STACK")
        )
        if groups := kernel.asm["ptx"].count("wgmma.commit_group"):
            code = run_tool("nvdisasm", "-c", cubin.name)
            waits = len(re.findall(r"HGMMA[^;]*gsb0", code))  # one a group, unless each waits
            found["serialized"] = waits > groups
    return found


def run_tool(name: str, *arguments: str) -> str:
    """What one of the programs prints that come with Triton."""
    program = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [program, *arguments], check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
