"""Collect the times that ``crosscut estimate`` multiplies with, from the bench's results.

python benchmarks/estimate_data.py
"""

from __future__ import annotations

import json
from pathlib import Path

from crosscut.bench import results
from crosscut.bench.estimate import MEASURED

RESULTS = Path(__file__).parent / "results"


def points() -> list[dict[str, object]]:
    """Each result of the bench on an H100, in bfloat16, of logits as they are."""
    found: list[dict[str, object]] = []
    for path in sorted(RESULTS.glob("*-h100-*.json")):
        data = json.loads(path.read_text())
        if data.get("workload", {}).get("logits_times") != 1 or "yardstick" not in data:
            continue
        result = results.load(path)
        load, matmul = result.workload, result.matmul
        if load.dtype != "bf16" or "H100" not in (result.machine.gpu or "") or not matmul:
            continue
        ratios = {
            row.contender: round(row.forward_backward / matmul, 3)
            for row in result.rows
            if row.forward_backward is not None
        }
        found.append({
            "file": path.name, "tokens": load.tokens, "hidden": load.hidden, "vocab": load.vocab,
            "matmul_s": round(matmul, 7), "ratios": ratios,
        })  # fmt: skip
    return found


def text() -> str:
    """The file's text: a result per line."""
    lines = ",\n".join(f"  {json.dumps(point)}" for point in points())
    return f'{{\n "points": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    MEASURED.write_text(text())
