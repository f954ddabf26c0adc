"""Tile sizes that ``crosscut tune`` measured on this machine's GPU, in place of the table's.

They are read once a process from ``tiles.json`` in the cache directory. Each entry says what it was
measured on: GPU, Triton, the code of the kernels, kernel, dtype and hidden size. One that does not
match in all of them is not used, and neither is a file that cannot be read: a training goes on with
the table's tiles, and a warning says so, once.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crosscut.cache import cache_directory

FORMAT = 1


class Sizes(NamedTuple):
    """The fields of a ``Tiles`` that are tuned."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    programs: int = 1


class Key(NamedTuple):
    """What sizes are chosen for."""

    kernel: str
    dtype: str
    tf32: bool
    hidden_size: int


class Place(NamedTuple):
    """Where sizes were measured: nothing measured elsewhere is used."""

    gpu: str  # its name and compute capability
    triton: str  # version
    kernels: str  # a hash of their code


@dataclass(frozen=True, kw_only=True)
class Winner:
    """One entry of the file.

    Attributes:
        place: where it was measured.
        key: what for.
        sizes: the sizes that won.
        measured: with what tokens and classes, and by how much, for people to read.
    """

    place: Place
    key: Key
    sizes: Sizes
    measured: str


def path() -> Path:
    """The file."""
    return cache_directory() / "tiles.json"


def read() -> list[Winner]:
    """All entries of the file, whatever GPU they are of; none where there is no file.

    Raises:
        ValueError: the file is not what ``crosscut tune`` writes.
        OSError: it cannot be read.
    """
    try:
        text = path().read_text()
    except (FileNotFoundError, NotADirectoryError):
        return []
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    try:
        return [_winner(entry) for entry in data["winners"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"an entry is not complete: {error!r}") from error


def _winner(entry: dict[str, Any]) -> Winner:
    sizes = Sizes(**entry["sizes"])
    if not all(type(size) is int and 0 < size <= 1024 for size in sizes):
        raise ValueError(f"sizes must be numbers from 1 to 1024, got {tuple(sizes)}")
    place, key = Place(**entry["place"]), Key(**entry["key"])
    if not all(isinstance(value, str | int) for value in (*place, *key)):
        raise ValueError(f"an entry is of words and numbers, got {place} and {key}")
    return Winner(
        place=place,
        key=key,
        sizes=sizes,
        measured=entry["measured"],
    )


def write(winners: list[Winner]) -> None:
    """Make these the file's entries: all of the file or none of it."""
    entries = [
        {
            "place": winner.place._asdict(),
            "key": winner.key._asdict(),
            "sizes": winner.sizes._asdict(),
            "measured": winner.measured,
        }
        for winner in winners
    ]
    path().parent.mkdir(parents=True, exist_ok=True)
    part = path().with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"format": FORMAT, "winners": entries}, indent=1) + "\n")
    part.replace(path())


def here(device: torch.device) -> Place:
    """This GPU, this Triton and these kernels."""
    import triton

    gpu = torch.cuda.get_device_properties(device)
    name = f"{gpu.name}, {gpu.major}.{gpu.minor}"
    return Place(gpu=name, triton=triton.__version__, kernels=_kernels())


@functools.cache
def _kernels() -> str:
    files = sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
    code = "".join(compiled_code(file.read_text()) for file in files)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def compiled_code(source: str) -> str:
    """What of a file of kernels is compiled: not its comments, docstrings, and launchers."""
    compiled = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            node.body = node.body[ast.get_docstring(node) is not None :]
            compiled.append(node)
        elif isinstance(node, ast.Assign):
            compiled.append(node)
    return "\n".join(map(ast.dump, compiled))


_on_trial: Mapping[Key, Sizes] | None = None


def lookup(device: torch.device, key: Key) -> Sizes | None:
    """The sizes that won on this device, or None."""
    winners = _winners(device) if _on_trial is None else _on_trial
    return winners.get(key)


@contextmanager
def trial(winners: Mapping[Key, Sizes]) -> Iterator[None]:
    """Look up these in place of the file's, in all threads: for ``crosscut tune``."""
    global _on_trial
    before, _on_trial = _on_trial, winners
    try:
        yield
    finally:
        _on_trial = before


def on_trial() -> bool:
    """Whether sizes are being tried, by ``crosscut tune``: then one that is no good is to fail."""
    return _on_trial is not None


@functools.cache
def _winners(device: torch.device) -> dict[Key, Sizes]:
    """What the file has for this device; a warning where it has something and it is no good."""
    try:
        file = path()
    except RuntimeError:  # no home directory, and so no file
        return {}
    try:
        winners = read()
    except (OSError, ValueError) as error:
        _warn(f"{file} cannot be used: {error}")
        return {}
    if not winners:
        return {}
    place = here(device)
    of_this_gpu = [winner for winner in winners if winner.place.gpu == place.gpu]
    found = {winner.key: winner.sizes for winner in of_this_gpu if winner.place == place}
    if of_this_gpu and not found:
        _warn(f"the sizes in {file} were measured with another Triton or other kernels")
    return found


def _warn(what: str) -> None:
    warnings.warn(
        f"crosscut runs with its own tile sizes: {what}. Measure again with `crosscut tune`, or "
        "forget them with `crosscut tune --reset`.",
        RuntimeWarning,
        stacklevel=2,
    )
