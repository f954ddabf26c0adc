"""Where crosscut keeps what it would rather not compute twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$CROSSCUT_CACHE``, else ``crosscut`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    if ours := os.environ.get("CROSSCUT_CACHE"):
        return Path(ours)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crosscut"
