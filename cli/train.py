"""`cascade train`: a run of phases by a config or a preset."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_engine.errors import InvalidInput

from .printing import literal

if TYPE_CHECKING:
    from rich.console import Console

    from cascade_engine.training.config import TrainConfig
    from cascade_engine.training.desk import Progress as TrainProgress

PRESETS = ("infonce", "coclr", "cpr", "patent", "iic", "tiny")


@click.command("train")
@click.argument("config_file", metavar="[CONFIG.toml]", required=False, type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(PRESETS), help="Train by a preset instead of a file.")
@click.option("--print-config", "printed", type=click.Choice(PRESETS), help="Write a preset as a commented file.")
@click.option("-s", "--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Set any key; see the examples.")
@click.option("--resume", is_flag=True, help="Go on where the run of that name was interrupted; else begin it.")
@click.option("--dry-run", is_flag=True, help="Show the phases and stop.")
def command(
    config_file: Path | None,
    preset: str | None,
    printed: str | None,
    assignments: tuple[str, ...],
    resume: bool,
    dry_run: bool,
) -> None:
    """Train encoders phase by phase, as CONFIG.toml or a preset says.

    A run's folder (runs/NAME) keeps the config, metrics.csv, checkpoints, TensorBoard events, and a feature store
    with a sealed phase after each phase of training. Ctrl-C saves the last step and exits with 130; --resume goes on.

    \b
    Examples:
      cascade train --preset tiny
      cascade train --preset tiny -s name=tiny-1 -s seed=1 -s phase.3.top_k=5 -s phase.rgb-2.epochs=40
      cascade train --print-config cpr > cpr.toml
      cascade train cpr.toml --resume
      torchrun --nproc-per-node 4 --no-python cascade train cpr.toml
    """
    if printed is not None:
        others = {str(config_file): config_file, "--preset": preset, "--resume": resume, "--dry-run": dry_run}
        idle = [name for name, given in others.items() if given]
        if idle:
            raise InvalidInput(f"--print-config: expected with --set only, got {idle[0]}")
        from cascade_engine.training.settings import to_toml

        click.echo(to_toml(_config(None, printed, assignments)), nl=False)
        return
    config = _config(config_file, preset, assignments)
    _train(config, resume=resume, dry_run=dry_run)


def _config(path: Path | None, preset_name: str | None, assignments: tuple[str, ...]) -> TrainConfig:
    """The config that was asked for, with the assignments on top."""
    from cascade_engine.training.config import TrainConfig, load_config
    from cascade_engine.training.presets import preset
    from cascade_engine.training.settings import build, override, to_values

    if (path is None) == (preset_name is None):
        raise InvalidInput("train: expected a CONFIG.toml or --preset, one of the two; see cascade train --help")
    if path is not None:
        return load_config(path, assignments)
    return build(TrainConfig, override(to_values(preset(str(preset_name))), assignments))


def _train(config: TrainConfig, *, resume: bool, dry_run: bool) -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    from cascade_engine.training.loop import train

    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    console.width = console.width if console.is_terminal else 160  # a file or pipe has no width
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    _show_phases(config, console)
    if dry_run:
        return
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    cache = _prepared(config, console) if alone and config.data.source else None
    line = _Line(config, console)
    with line:
        run = train(config, resume=resume, cache=cache, report=line)
    console.print(f"done: {run.folder}; features of phases {', '.join(run.phases)} in {run.store_path}", markup=False)


def _show_phases(config: TrainConfig, console: Console) -> None:
    """The phase controller's table: what each phase trains, with whose weights."""
    from rich import box
    from rich.table import Table

    from cascade_engine.training.phases import PhaseRow, phase_rows

    title = f"{config.name}: {config.model.encoder}, seed {config.seed}"
    table = Table(title=literal(title), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in fields(PhaseRow):
        table.add_column(column.name, overflow="fold")
    for row in phase_rows(config):
        table.add_row(*(literal(getattr(row, column.name)) for column in fields(PhaseRow)))
    console.print(table)


def _prepared(config: TrainConfig, console: Console) -> Any:
    """The cache of the config's videos, with a bar while it is made."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from cascade_engine.training.data import open_cache

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("videos", total=None)

        def told(done: int, count: int, path: Path) -> None:
            bars.update(task, completed=done, total=count, description=path.name)

        return open_cache(config, progress=told)


class _Line:
    """One line per phase: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        from cascade_engine.training.phases import phase_rows

        self.console, self.live = console, console.is_terminal
        self.rows = phase_rows(config)
        text = TextColumn("{task.description}", markup=False)
        self.bars = Progress(text, BarColumn(bar_width=20), TimeRemainingColumn(), console=console)
        self.tasks: dict[int, Any] = {}
        self.epoch = (-1, -1)

    def __enter__(self) -> _Line:
        """Show the bars."""
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave them as they are."""
        if self.live:
            self.bars.stop()

    def __call__(self, now: TrainProgress) -> None:
        """A step is done."""
        if now.number not in self.tasks:
            row = self.rows[now.number]
            oracles = f", oracle {row.oracles}" if row.oracles else ""
            told = f"phase {row.number} {row.name}: trains {row.train} from {row.inherits}{oracles}"
            self.console.print(told, highlight=False, markup=False)
            self.tasks[now.number] = self.bars.add_task(now.phase, total=now.steps)
        precision = "-" if now.precision is None else f"{now.precision:.2f}"
        text = (
            f"{now.phase} epoch {now.epoch} loss {now.loss:.3f} precision {precision} bank {now.filled:4.0%} "
            f"{now.clips_per_second:.0f} clips/s mining {now.mining_share:.1%}"
        )
        self.bars.update(self.tasks[now.number], completed=now.step, description=text)
        if not self.live and (now.number, now.epoch) != self.epoch:
            self.epoch = (now.number, now.epoch)
            click.echo(text, file=sys.stderr)
