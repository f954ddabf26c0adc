"""The examples of the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["losses.md"])
def test_examples(page):
    text = (DOCS / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    names: dict[str, Any] = {}
    for block in blocks:  # one after the other, as a reader would
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(DOCS / page), "exec"), names)
    assert names["hidden"].grad.isfinite().all()
    assert 0 <= names["accuracy"] <= names["top_5"] <= 1
