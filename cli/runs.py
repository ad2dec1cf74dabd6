"""`cascade runs`: what was trained, and how two runs differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_engine.errors import CascadeError, InvalidInput

from .printing import literal

if TYPE_CHECKING:
    from cascade_engine.training.run import Run

FIGURES = ("loss", "precision", "recall_at_1", "class_recall_video", "coverage", "clips_per_second", "mining_share")


@click.command("runs")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(paths: tuple[Path, ...], as_json: bool) -> None:
    """List the runs in a folder ("runs" by default), or compare the runs named: settings that differ, last figures.

    \b
    Examples:
      cascade runs
      cascade runs runs/tiny runs/tiny-1
    """
    if len(paths) < 2 and not (paths and (paths[0] / "config.toml").is_file()):
        _list(paths[0] if paths else Path("runs"), as_json)
    else:
        _compare(paths, as_json)


def _list(folder: Path, as_json: bool) -> None:
    from cascade_engine.training.run import Run

    if not folder.is_dir():
        raise InvalidInput(f"runs: expected a folder of runs, got {folder}")
    rows = []
    for file in sorted(folder.glob("*/config.toml"), key=lambda each: each.stat().st_mtime):
        try:
            rows.append({"run": str(file.parent), **_summary(Run.open(file.parent))})
        except CascadeError as error:
            rows.append({"run": str(file.parent), "problem": str(error)})
    _show(rows, as_json, empty=f"no runs in {folder}")


def _summary(run: Run) -> dict[str, Any]:
    """A run in one row: phases done, and the last of each figure."""
    rows = run.metrics
    last = {name: next((row[name] for row in reversed(rows) if row[name] is not None), None) for name in FIGURES}
    return {
        "encoder": run.config.model.encoder,
        "seed": run.config.seed,
        "phases": f"{len(run.phases)}/{len(run.config.phase)}",
        "step": rows[-1]["step"] if rows else 0,
        **last,
    }


def _compare(paths: tuple[Path, ...], as_json: bool) -> None:
    from cascade_engine.training.run import Run
    from cascade_engine.training.settings import to_values

    runs = [Run.open(path) for path in paths]
    flat = [dict(_flattened(to_values(run.config), "")) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    differing = [key for key in keys if len({json.dumps(each.get(key)) for each in flat}) > 1]
    settings = [
        {"setting": key, **{str(p): each.get(key) for p, each in zip(paths, flat, strict=True)}} for key in differing
    ]
    summaries = [_summary(run) for run in runs]
    figures = [
        {"figure": name, **{str(p): each[name] for p, each in zip(paths, summaries, strict=True)}}
        for name in summaries[0]
    ]
    if as_json:
        click.echo(json.dumps({"settings": settings, "figures": figures}, indent=2))
        return
    _show(settings, False, empty="no setting differs")
    _show(figures, False, empty="")


def _flattened(value: Any, place: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, each in value.items() for pair in _flattened(each, f"{place}.{key}" if place else key)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [pair for row in value for pair in _flattened(row, f"{place}.{row.get('name')}")]
    return [(place, value)]


def _show(rows: list[dict[str, Any]], as_json: bool, *, empty: str) -> None:
    """Rows as a table, or as JSON."""
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo(empty)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(literal(name), overflow="fold")
    for row in rows:
        table.add_row(*(literal(_cell(row.get(name))) for name in names))
    console = Console()
    console.width = console.width if console.is_terminal else 200  # a file or pipe has no width
    console.print(table)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
