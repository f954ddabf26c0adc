"""Algorithm 3 of the paper (arXiv:2411.09009) without its filter: every entry of the softmax.

By chunks of the vocabulary (:mod:`.chunks`). For each a kernel makes the gradient of its logits,
``dz`` [N, chunk], and it is multiplied:

    dC[chunk] = dz^T H        complete at once
    dH       += dz C[chunk]   across the chunks, in float32 or as much

6NVD flop, of which a product that nobody wants is left out. Tokens that are not valid are left out
of all of it: the others are first put side by side, in an [N, D] copy. One launch does many chunks
(:mod:`crosscut.kernels.exact_sweep`).
"""

from __future__ import annotations

import torch

from crosscut.backends.protocol import Gradients, HeadProblem
from crosscut.backends.triton.chunks import Part
from crosscut.backends.triton.valid_tokens import ValidTokens
from crosscut.device.tiles import Kernel, choose_tiles
from crosscut.kernels.exact_sweep import SweepOutputs, exact_sweep
from crosscut.kernels.logits_tile import Head


def exact_gradients(
    problem: HeadProblem, valid: ValidTokens, out: Gradients, parts: list[Part]
) -> None:
    """Fill ``out``; a bias's only beside dC. Nothing where ``num_rows`` is negative."""
    hidden, bias, weight = problem.hidden, problem.bias, problem.logit_weight
    tiles = choose_tiles(Kernel.GRADIENT, hidden), choose_tiles(Kernel.MATMUL, hidden)
    rows, tokens, loss_scale, scale = valid
    head = Head(
        hidden, problem.classifier, None if bias is None else bias.contiguous(),
        problem.options.logit_scale, problem.options.softcap,
    )  # fmt: skip
    compensation = class_sum = None
    d_hidden = out.hidden
    if d_hidden is not None and tokens.vectors.shape[1] == 7:
        # The entropy's kernel has no registers left for a sum in two numbers.
        d_hidden = torch.zeros_like(d_hidden, dtype=torch.float32)
    elif d_hidden is not None and d_hidden.dtype != torch.float32:
        compensation = torch.empty_like(d_hidden)
    if out.bias is not None:
        class_sum = out.bias.new_empty(out.bias.shape, dtype=torch.float32)
    outputs = SweepOutputs(rows.rows, d_hidden, compensation, out.classifier, class_sum)
    weight = None if weight is None else weight.contiguous()
    for part in parts:
        dz = part.workspace(hidden.device, out.classifier)
        exact_sweep(head, weight, tokens, outputs, dz, part.classes, scale, tiles)
    if out.hidden is not None and d_hidden is not None and d_hidden is not out.hidden:
        out.hidden.copy_(d_hidden)
    if out.bias is not None and class_sum is not None:
        out.bias.copy_(class_sum if loss_scale is None else class_sum / loss_scale)
