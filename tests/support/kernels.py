"""The kernels that there are, by their source."""

from __future__ import annotations

import ast
from pathlib import Path

import crosscut.kernels


def decorated() -> dict[Path, set[str]]:
    """Of each file of ``crosscut.kernels`` the functions that are decorated ``@kernel``."""
    return {
        file: {
            function.name
            for function in ast.parse(file.read_text()).body
            if isinstance(function, ast.FunctionDef)
            and [ast.unparse(line) for line in function.decorator_list] == ["kernel"]
        }
        for file in sorted(Path(str(crosscut.kernels.__file__)).parent.glob("*.py"))
    }
