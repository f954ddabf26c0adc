"""Write the bench's tables in README.md anew, each from the result that it follows.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from crosscut.bench import report, results

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

_TABLE = re.compile(
    r"(?P<before>\((?P<result>benchmarks/results/[^()]+\.json)\)[^|]*\n\n)"  # the last link before
    r"(?P<table>\| contender \|.*\n(?:\|.*\n)+)"
)


def updated(text: str) -> tuple[str, list[str]]:
    """The text with its tables made anew, and the results they were made from."""
    files: list[str] = []

    def table(found: re.Match[str]) -> str:
        files.append(found["result"])
        lines = report.markdown(results.load(ROOT / found["result"])).splitlines()
        return found["before"] + "".join(f"{line}\n" for line in lines if line.startswith("|"))

    return _TABLE.sub(table, text), files


if __name__ == "__main__":
    README.write_text(updated(README.read_text())[0])
