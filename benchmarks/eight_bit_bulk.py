"""What the bulk of an exact gradient costs in 8 bits: z, dz in both orders, dC and dH.

    python benchmarks/eight_bit_bulk.py RESULTS.json

Random operands: the time does not depend on them but for the GPU's power. A chunk of classes at a
time, as the exact sweep has them: ``z8`` is made again, and ``dz`` stored in e4m3 as [N, chunk] and
as [chunk, N], for Hopper multiplies 8-bit operands only where both have the summed dimension
innermost. So dC = dz^T H takes the second and a copy of H^T, dH = dz C the first and one of C^T.
One scale for all of dz: what the bulk is made of is below a threshold, and e4m3 reaches 2^-17 of
its largest. Times over that of the bare logits matmul of the chunk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton.language as tl
from eight_bit import tiles, times_of
from eight_bit_kernels import dot_rounded
from torch import Tensor

from crosscut.bench.workloads import MODELS
from crosscut.device.launch import kernel
from crosscut.device.tiles import Tiles, descriptor, num_programs
from crosscut.kernels.logits_tile import column_part

DZ_BYTES = 2**28
"""Of dz in one order, a chunk."""


@kernel
def gradient_8_kernel(
    hidden_desc, classifier_desc, hidden_scale_ptr, classifier_scale_ptr, lse_ptr, dz_desc,
    transposed_desc, num_tokens, num_classes, hidden_size, dz_scale, most_tiles,
    BOTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Dz of a chunk in e4m3, in both orders; tiles go over the programs, token tiles first."""
    BLOCK_N: tl.constexpr = TILE[0]
    BLOCK_V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    token_tiles, class_tiles = tl.cdiv(num_tokens, BLOCK_N), tl.cdiv(num_classes, BLOCK_V)
    for index in range(tl.program_id(0), token_tiles * class_tiles, tl.num_programs(0)):
        first_token = index % token_tiles * BLOCK_N
        first_class = index // token_tiles * BLOCK_V
        product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for step in range(tl.cdiv(hidden_size, BLOCK_D)):
            h = hidden_desc.load([first_token, step * BLOCK_D])
            c = classifier_desc.load([first_class, step * BLOCK_D]).T
            product = dot_rounded(h, c, product, "ieee")
        tokens = first_token + tl.arange(0, BLOCK_N)
        classes = first_class + tl.arange(0, BLOCK_V)
        scale = tl.load(hidden_scale_ptr + tokens, mask=tokens < num_tokens, other=0.0)
        lse = tl.load(lse_ptr + tokens, mask=tokens < num_tokens, other=float("inf"))
        by_class = tl.load(classifier_scale_ptr + classes, mask=classes < num_classes, other=0.0)
        z = product * by_class[None, :]
        dz = (tl.exp2(z * scale[:, None] - lse[:, None]) * dz_scale).to(tl.float8e4nv)
        dz_desc.store([first_token, first_class], dz)
        if BOTH:
            transposed_desc.store([first_class, first_token], dz.T)


@kernel
def matmul_8_kernel(
    left_desc, right_desc, out_desc, rows, columns, inner, scale, ADD: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``out = scale left right^T``, or added to it; rows of both have the summed dimension."""
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[1]
    BLOCK_K: tl.constexpr = TILE[2]
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for index in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        group = index // (GROUP * column_tiles) * GROUP
        height = tl.minimum(row_tiles - group, GROUP)
        row = (group + (index - group * column_tiles) % height) * BLOCK_M
        column = (index - group * column_tiles) // height * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(inner, BLOCK_K)):
            left = left_desc.load([row, step * BLOCK_K])
            right = right_desc.load([column, step * BLOCK_K]).T
            total = dot_rounded(left, right, total, "ieee")
        for part in tl.static_range(2):  # a whole tile of float32 leaves no room for operands
            some = column_part(total, part, 2, BLOCK_M, BLOCK_N) * scale
            place = column + part * (BLOCK_N // 2)
            if ADD:
                some += out_desc.load([row, place])
            out_desc.store([row, place], some.to(out_desc.dtype))


def gradient_8(
    hidden: Tensor, classifier: Tensor, vectors: tuple[Tensor, Tensor, Tensor], dz: Tensor,
    transposed: Tensor | None, size: Tiles,
) -> None:  # fmt: skip
    gradient_8_kernel[(num_programs(hidden.device),)](
        descriptor(hidden, (size.block_n, size.block_d), size),
        descriptor(classifier, (size.block_v, size.block_d), size), *vectors,
        descriptor(dz, (size.block_n, size.block_v), size),
        None if transposed is None
        else descriptor(transposed, (size.block_v, size.block_n), size),
        len(hidden), len(classifier), hidden.shape[1], 2.0**19, 0,
        BOTH=transposed is not None, TILE=size.constants, num_warps=size.num_warps,
        num_stages=size.num_stages,
    )  # fmt: skip


def matmul_8(out: Tensor, left: Tensor, right: Tensor, size: Tiles, *, add: bool) -> None:
    matmul_8_kernel[(num_programs(out.device),)](
        descriptor(left, (size.block_n, size.block_d), size),
        descriptor(right, (size.block_v, size.block_d), size),
        descriptor(out, (size.block_n, size.block_v // 2), size),
        *out.shape, left.shape[1], 2.0**-19, ADD=add, GROUP=16, TILE=size.constants,
        num_warps=size.num_warps, num_stages=size.num_stages,
    )  # fmt: skip


def study(name: str, num_tokens: int) -> dict[str, float]:
    model, device = MODELS[name], torch.device("cuda")
    hidden_size, vocab = model.hidden, model.vocab
    chunk = min(DZ_BYTES // num_tokens // 256 * 256, vocab // 256 * 256)
    chunks = vocab / chunk
    print(f"{name}, N={num_tokens}, {chunk} classes a chunk, times of one chunk x {chunks:.2f}")

    def eight(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.float8_e4m3fn)

    hidden, classifier = eight(num_tokens, hidden_size), eight(chunk, hidden_size)
    hidden_t, classifier_t = hidden.t().contiguous(), classifier.t().contiguous()
    hidden16, classifier16 = hidden.bfloat16(), classifier.bfloat16()
    dz = (torch.rand(num_tokens, chunk, device=device) * 100).to(torch.float8_e4m3fn)
    dz_t = dz.t().contiguous()
    d_classifier = torch.empty(chunk, hidden_size, dtype=torch.bfloat16, device=device)
    d_hidden = torch.zeros(num_tokens, hidden_size, dtype=torch.float32, device=device)
    logits = torch.empty(num_tokens, chunk, dtype=torch.bfloat16, device=device)
    vectors = (
        torch.full((num_tokens,), 0.3, device=device), torch.full((chunk,), 0.1, device=device),
        torch.full((num_tokens,), 17.0, device=device),
    )  # fmt: skip
    one = torch.ones((), device=device)

    def scaled(left: Tensor, right: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
        return torch._scaled_mm(
            left, right.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=fast
        )

    works: dict[str, Callable[[], object]] = {
        "torch.mm": lambda: torch.mm(hidden16, classifier16.T, out=logits),
        "bf16 dC = dz^T H": lambda: torch.mm(logits.t(), hidden16, out=d_classifier),
        "bf16 dH = dz C": lambda: torch.mm(logits, classifier16),
        "copy of C^T": lambda: classifier_t.copy_(classifier.t()),
        "copy of dz^T": lambda: dz_t.copy_(dz.t()),
    }
    for fast in (True, False):
        works |= {
            f"scaled_mm z, fast={fast}": lambda fast=fast: scaled(
                hidden, classifier, torch.bfloat16, fast=fast
            ),
            f"scaled_mm dC, fast={fast}": lambda fast=fast: scaled(
                dz_t, hidden_t, torch.bfloat16, fast=fast
            ),
            f"scaled_mm dH, fast={fast}": lambda fast=fast: scaled(
                dz, classifier_t, torch.float32, fast=fast
            ),
        }
    for label, size in {
        "128x256x128 8w 3s": tiles(128, 256, 128, 8, 3),
        "128x256x128 8w 2s": tiles(128, 256, 128, 8, 2),
        "128x128x128 4w 4s": tiles(128, 128, 128, 4, 4),
    }.items():  # fmt: skip
        works[f"dz one order, {label}"] = lambda size=size: gradient_8(
            hidden, classifier, vectors, dz, None, size
        )
        works[f"dz both orders, {label}"] = lambda size=size: gradient_8(
            hidden, classifier, vectors, dz, dz_t, size
        )
        works[f"dC, {label}"] = lambda size=size: matmul_8(
            d_classifier, dz_t, hidden_t, size, add=False
        )
        works[f"dH +=, {label}"] = lambda size=size: matmul_8(
            d_hidden, dz, classifier_t, size, add=True
        )
    matmul_8(d_classifier, dz_t, hidden_t, tiles(128, 128, 128, 8, 3), add=False)
    right = dz_t[:256].float() @ hidden_t.float().T * 2.0**-19
    off = (d_classifier[:256].float() - right).norm() / right.norm()
    print(f"  dC against float32: {off:.1e}")
    return times_of(works, "torch.mm")


def main(results: str) -> None:
    report = {
        f"{name}:{num_tokens}": study(name, num_tokens)
        for name, num_tokens in (("gemma2-2b", 8192), ("llama3-8b", 8192), ("gemma3-270m", 8192))
    }
    Path(results).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
