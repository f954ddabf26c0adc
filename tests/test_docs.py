"""What the documentation shows is so: its examples run, its tables are those of the results."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Model(nn.Module):
    """For pages that have one already: a head is all that crosscut sees of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 50)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def run(page: Path) -> dict[str, Any]:
    """Run the examples of a page, one after the other as a reader would; what they define."""
    text = page.read_text()
    names: dict[str, Any] = {"model": Model()}
    for block in BLOCK.findall(text):
        line = text[: text.index(block)].count("\n")
        small = block.replace("262_144", "1_000")
        exec(compile("\n" * line + small, str(page), "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=str
)
def test_examples(page: Path) -> None:
    assert len(run(page)) > 2


def test_examples_do_what_they_say() -> None:
    names = run(README)
    assert names["hidden"].grad.isfinite().all()
    assert names["log_prob"].shape == (4, 512)
    assert type(names["model"].lm_head) is not nn.Linear
    names = run(ROOT / "docs" / "losses.md")
    assert names["hidden"].grad.isfinite().all()
    assert 0 <= names["accuracy"] <= names["top_5"] <= 1


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links(page: Path) -> None:
    """They lead to files that are there."""
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_package() -> None:
    """Its description has no link that a package index lacks; its sources are whole."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    text = README.read_text()
    for change in tools["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    for path in tools["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / path).exists(), path


def test_the_tables_of_the_readme_are_those_of_its_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Made again by ``python benchmarks/readme_tables.py`` they are the same."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme_tables

    from crosscut.bench import report, results

    text = readme_tables.README.read_text()
    again, files = readme_tables.updated(text)
    assert len(files) == text.count("| contender | forward |") > 3
    assert again == text
    for file in files:
        if "cpu" in file:  # those of a GPU are older than what is doubted today
            assert not report.doubts(results.load(ROOT / file)), file
