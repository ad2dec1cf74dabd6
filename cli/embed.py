"""`cascade embed`: features of video files into a store."""

from __future__ import annotations

import json
from pathlib import Path

import click

FAILED = 1


@click.command("embed")
@click.argument("videos", nargs=-1, required=True)
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The exported model, .pt2 or .onnx.")
@click.option("--store", "target", required=True, type=click.Path(path_type=Path), help="The store; made if need be.")
@click.option("--phase", default="main", show_default=True, help="Of the store; one phase holds one model's features.")
@click.option("--step", type=click.IntRange(1), help="Frames from window to window; half a window by default.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Windows per call of the model.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each video.")
def command(
    videos: tuple[str, ...], model: Path, target: Path, phase: str, step: int | None, batch: int, as_json: bool
) -> int:
    """Put features of VIDEOS (files, folders, quoted globs) into a feature store, a row for each window.

    Videos are known by their content: one that is in the store already is left out. A bad one is told, the others go
    on, and the exit code is 1 in the end.

    \b
    Examples:
      cascade embed clips/ --model features.onnx --store clips.zarr
      cascade query clips.zarr --video new.mp4 --model features.onnx
    """
    from cascade_engine.deployment.artefact import load
    from cascade_engine.deployment.embed import Embedded, embed, open_store
    from cascade_engine.deployment.predict import find_videos

    from .printing import reader_told_by_results
    from .progress import bar

    found = find_videos(videos)
    loaded = load(model)
    filling = open_store(target, loaded, phase=phase)
    with filling as store, reader_told_by_results(), bar("videos", len(found)) as advance:

        def tell(each: Embedded) -> None:
            advance()
            if each.problem is not None:
                click.echo(f"error: {each.problem}", err=True)
            if as_json:
                click.echo(json.dumps({"path": str(each.path), "clips": each.clips, "problem": each.problem}))

        told = embed(loaded, found, store, step=step, batch=batch, progress=tell)
        rows = store.rows
    if not as_json:
        added = [each for each in told if each.clips]
        known = sum(not each.clips and each.problem is None for each in told)
        click.echo(f"{target}: {sum(each.clips for each in added)} clips of {len(added)} videos added, {rows} in all")
        if known:
            click.echo(f"{known} videos were there already")
    return FAILED if any(each.problem is not None for each in told) else 0
