"""DDP, FSDP, FSDP2 and a tensor-parallel head on two ranks of this machine: the untouched model's
gradients, fused where they can be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.judging import FACTOR, error, rounding

pytest.importorskip("transformers")

KINDS = {
    "ddp": "fused",
    "ddp, loss outside": "fused",
    "ddp, unused": "fused",
    "ddp, unused, loss outside": "materialised",  # DDP puts a node of its own behind every output
    "ddp, static": "fused",
    "ddp, static, loss outside": "materialised once",  # the same node, in the first step alone
    "fsdp": "fused",
    "fsdp, loss outside": "fused",
    "fsdp, reshard, loss outside": "fused",
    "fsdp, head": "fused",
    "fsdp, head, loss outside": "fused",
    "fsdp1": "fused",
    "fsdp1, loss outside": "fused",
    "fsdp1, head": "fused",  # a unit of its own, as PEFT's policy has it
    "fsdp1, head, loss outside": "fused",
    "fsdp1, head, parameters, loss outside": "fused",
    "tp": "real",  # the weight is a DTensor
    "tp, loss outside": "real",
    "tp, transformers": "real",
    "tp, transformers, loss outside": "real",
    "tp, transformers, deferred after": "real",  # transformers calls the forward it found
}
"""How it is sharded -> what becomes of the logits."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both ranks run all kinds: starting them is what takes the time."""
    if not torch.distributed.is_available():
        pytest.skip("PyTorch without torch.distributed")
    file = tmp_path_factory.mktemp("ranks") / "results.pt"
    script = Path(__file__).parent / "programs" / "huggingface_ranks.py"
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         str(script), str(file), *KINDS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(kind, results):
    found = results[kind]
    assert not isinstance(found, str), found
    (loss, gradients), (other_loss, others) = found["deferred"], found["untouched"]
    exact_loss, exact = found["exact"]
    eps = rounding(torch.float32)
    assert error(loss, exact_loss) <= FACTOR * error(other_loss, exact_loss) + eps
    assert set(gradients) == set(others)
    for name, true in exact.items():
        allowed = FACTOR * error(others[name], true) + eps
        assert error(gradients[name], true) <= allowed, name
    assert found["fused"] == {"fused": 2, "materialised once": 1}.get(KINDS[kind], 0)
    assert bool(found["materialised"]) == KINDS[kind].startswith("materialised")
    if KINDS[kind] == "real" and "after" not in kind:
        assert found["real"] == {"weight or input is a DTensor, DTensor": 2}
    assert torch.equal(found["deferred logits"], found["untouched logits"])
