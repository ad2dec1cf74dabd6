"""What commands print: JSON, tables, sizes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.text import Text

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def say(about: dict[str, Any], as_json: bool, text: str) -> None:
    """The same for programs or for people."""
    click.echo(json.dumps(about, indent=2) if as_json else text)


def literal(text: object) -> Text:
    """The text for rich, which would take words in brackets for its markup: names and labels have any."""
    from rich.text import Text

    return Text(str(text))


@contextmanager
def reader_told_by_results() -> Iterator[None]:
    """Keeps the video reader's warnings off the screen: a result has the same words, and they are printed with it."""
    log = logging.getLogger("cascade_engine.video.reader")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def sized(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest text."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
