"""`cascade bench step`: parse, measure, print."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .values import NewFile


@click.command("step")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Clips of a step.")
@click.option("--keys", default=16384, show_default=True, type=click.IntRange(1024), help="Keys in the queue.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Threads for each contestant.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--large/--no-large", default=True, help="Also a step of R3D-18, which takes a minute.")
@click.option("--json", "to", type=NewFile(), help="Write the results here.")
def command(batch: int, keys: int, threads: int, rounds: int, large: bool, to: Path | None) -> None:
    """The share of a training step that mining and the loss take, by the engine, by torch, by the published loop.

    \b
    Examples:
      cascade bench step
      cascade bench step --keys 65536 --no-large --json step.json
    """
    from cascade_engine.benchmarks import training_step

    results = training_step.run(batch=batch, keys=keys, threads=threads, rounds=rounds, large=large)
    if to is not None:
        to.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    click.echo(training_step.table(results))
