"""What a long job says while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Somewhere to show how far a job is."""

    def stage(self, what: str, steps: int) -> AbstractContextManager[Callable[[str], None]]:
        """Open a bar of ``steps`` steps; call what it gives, with a few words, after each."""
        ...


class Silent:
    """Shows nothing: for tests and scripts."""

    @contextmanager
    def stage(self, what: str, steps: int) -> Iterator[Callable[[str], None]]:
        del what, steps
        yield lambda words: None


class Bars:
    """Bars on the terminal that stay when done, with the time each stage took."""

    @contextmanager
    def stage(self, what: str, steps: int) -> Iterator[Callable[[str], None]]:
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description:<34}"),
            progress.BarColumn(bar_width=24),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[words]}", style="dim"),
        )
        with progress.Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(what, total=steps, words="")

            def step(words: str) -> None:
                bars.update(task, advance=1, words=words)

            yield step
            bars.update(task, completed=steps, words="")
