"""Where crosscut keeps what it would rather not compute twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$CROSSCUT_CACHE``, else ``crosscut`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    if ours := os.environ.get("CROSSCUT_CACHE"):
        return Path(ours)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crosscut"


def writable_cache_directory() -> Path:
    """:func:`cache_directory`, made where it is missing.

    Raises:
        OSError: there can be no such directory, or it cannot be written.
    """
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
        reason = "it is read-only"
    except OSError as error:
        writable, reason = False, error.strerror
    if not writable:
        raise OSError(
            f"CROSSCUT_CACHE must name a directory that can be written, got {directory}: {reason}"
        )
    return directory
