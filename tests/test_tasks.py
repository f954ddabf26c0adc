"""The task file, which runs before anything is installed."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "tasks.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tasks", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_older_python_gets_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ast.parse(FILE.read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(SystemExit) as ended:
        load()
    assert str(ended.value).startswith("crosscut needs Python 3.11 or newer, and this is 3.10.13: ")


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    tasks = load()
    monkeypatch.setattr(tasks, "TASKS", (interrupted,))
    monkeypatch.setattr(sys, "argv", ["tasks.py", "interrupted"])
    with pytest.raises(SystemExit) as ended:
        tasks.main()
    assert ended.value.code == 130


@pytest.mark.parametrize("terminal", [True, False])
def test_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: bool) -> None:
    """Goes on where it was broken off, and shows what it does where someone looks."""
    tasks = load()
    made: list[bool] = []
    ran: list[tuple[Any, ...]] = []

    def create(directory: Path, *, clear: bool, with_pip: bool) -> None:
        made.append(clear and with_pip)
        (directory / "bin").mkdir(exist_ok=True)
        (directory / "bin" / "pip").touch(mode=0o755)

    monkeypatch.setattr(tasks, "VENV", tmp_path)
    monkeypatch.setattr(tasks, "BIN", tmp_path / "bin")
    monkeypatch.setattr(tasks, "run", lambda *command: ran.append(command))
    monkeypatch.setattr(tasks.venv, "create", create)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    (tmp_path / "bin").mkdir()  # without pip: interrupted there
    tasks.setup([])
    assert made == [True]
    assert len(ran) == 3
    assert all(("--quiet" in command) is not terminal for command in ran)
    tasks.setup([])  # nothing to do
    (tmp_path / "installed.sha256").write_text("another pyproject.toml")
    tasks.setup([])
    assert made == [True]
    assert len(ran) == 6


@pytest.mark.parametrize("wrong", [None, "pytest", "pyright"])
def test_tests_and_types_both_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], wrong: Any
) -> None:
    tasks = load()
    monkeypatch.setattr(tasks, "BIN", tmp_path)
    monkeypatch.setattr(tasks, "setup", lambda _: None)
    for name in ("ruff", "lint-imports", "pytest", "pyright"):
        code = 3 if name == wrong else 0
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} says so\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    if wrong is None:
        tasks.test([])
    else:
        with pytest.raises(SystemExit) as ended:
            tasks.test([])
        assert ended.value.code == 3
    said = capfd.readouterr().out
    assert "pytest says so" in said
    assert "pyright says so" in said
