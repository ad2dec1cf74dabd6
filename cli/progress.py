"""Progress on the error stream, where a person is watching."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Tells that some more are done."""

    def __call__(self, count: int = 1) -> None: ...


@contextmanager
def bar(what: str, total: int) -> Iterator[Advance]:
    """Shows how many of `total` are done: call what this gives after each, or with a count of those done since.

    Silent where nobody watches.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count=1: progress.advance(task, count)


@contextmanager
def counter(unit: str) -> Iterator[Callable[[int], None]]:
    """A line with a count and its rate on the error stream, where a person is watching."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,.0f} " + unit), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    started, done = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(unit, total=None, rate="")

        def step(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, completed=done, rate=f"{done / (time.perf_counter() - started):,.0f} {unit}/s")

        yield step
