"""DDP and FSDP2 on two ranks of this machine: the gradients of the untouched model, fused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import FACTOR, error, rounding

pytest.importorskip("transformers")

KINDS = {
    "ddp": True,
    "ddp, loss outside": True,
    "ddp, unused": True,
    "ddp, unused, loss outside": False,  # DDP puts a node of its own behind every output
    "fsdp": True,
    "fsdp, loss outside": True,
    "fsdp, reshard, loss outside": True,
    "fsdp, head": True,
    "fsdp, head, loss outside": True,
}
"""How it is sharded -> whether the loss is fused."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both ranks run all kinds: starting them is what takes the time."""
    if not torch.distributed.is_available():
        pytest.skip("PyTorch without torch.distributed")
    file = tmp_path_factory.mktemp("ranks") / "results.pt"
    script = Path(__file__).with_name("huggingface_ranks.py")
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         str(script), str(file), *KINDS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
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
    assert found["fused"] == (2 if KINDS[kind] else 0)
    assert (found["materialised"] == []) == KINDS[kind], found["materialised"]
    assert torch.equal(found["deferred logits"], found["untouched logits"])
