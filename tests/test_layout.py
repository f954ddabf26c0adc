"""Where things of the tests live."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_no_test_is_imported() -> None:
    """What tests share lives in ``support``, what runs in a process of its own in ``programs``."""
    files = sorted(TESTS.rglob("*.py"))
    tests = {file.stem for file in files if file.parent == TESTS}
    assert {"conftest", "test_layout"} <= tests
    for file in files:
        assert tests.isdisjoint(imported(file)), file.name
