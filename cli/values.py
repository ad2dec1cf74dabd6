"""What options take: numbers in a range, files to be written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click


class Finite(click.FloatRange):
    """A number in a range; not NaN, which no comparison refuses, and not infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number that was written."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class NewFile(click.Path):
    """A file to be written when the work is done: a name that cannot be written to is refused before it.

    Args:
        suffixes: that it may have; any where none is given.
    """

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The file's path."""
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path)
        if not path.parent.is_dir():
            self.fail(f"there is no folder {str(path.parent)!r}.", param, ctx)
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"{path.name!r} does not end in {' or '.join(self.suffixes)}.", param, ctx)
        return path


SHARE = Finite(0, 1, min_open=True, max_open=True)
SEED = click.IntRange(0)
