"""`cascade bench leftout`: does a window of a video find its own video? A model against raw pixels."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command("leftout")
@click.argument("videos", nargs=-1, required=True)
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The exported model, .pt2 or .onnx.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(videos: tuple[str, ...], model: Path, as_json: bool) -> None:
    """Ask with each window of VIDEOS for its nearest other window: is it of the same video?

    "apart" leaves out the windows next to it in time as well. A deployed model that is worth its while beats the raw
    pixels.

    \b
    Example:
      cascade bench leftout clips/ --model features.onnx
    """
    from cascade_engine.benchmarks.leftout import measure

    from cascade_engine.deployment.artefact import load
    from cascade_engine.deployment.predict import find_videos

    rows = measure(load(model), find_videos(videos))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    click.echo(f"{rows[0].windows} windows of {rows[0].videos} videos; ", nl=False)
    click.echo(f"a blind choice is right in {rows[0].chance:.3f}, apart {rows[0].chance_apart:.3f}")
    for row in rows:
        click.echo(f"{row.features:24} right {row.right:.3f}   apart {row.right_apart:.3f}")
