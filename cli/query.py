"""`cascade query`: the stored clips nearest to a video."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command("query")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--video", required=True, type=click.Path(path_type=Path), help="The file that asks.")
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The model the store was filled with.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="Clips shown.")
@click.option("--phase", help="Of the store; its first by default.")
@click.option("--plan", help="Over the store's views; by default the nearest by (the sum of) the model's views.")
@click.option("--where", help='Which clips are searched, such as "start < 60".')
@click.option("--others", is_flag=True, help="Leave out the clips of this very video.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    store: Path,
    video: Path,
    model: Path,
    k: int,
    phase: str | None,
    plan: str | None,
    where: str | None,
    others: bool,
    as_json: bool,
) -> None:
    """Find the clips in STORE that are nearest to any window of a video.

    \b
    Examples:
      cascade query clips.zarr --video new.mp4 --model features.onnx -k 5
      cascade query clips.zarr --video new.mp4 --model two.pt2 --plan 'flow_backbone:20%,rgb_backbone:5' --others
    """
    from cascade_engine.deployment.artefact import load
    from cascade_engine.deployment.embed import query
    from cascade_engine.plan import CascadePlan
    from cascade_engine.store import FeatureStore

    with FeatureStore.open(store, phase=phase) as opened:
        hits = query(
            load(model),
            opened,
            video,
            k=k,
            plan=CascadePlan.parse(plan) if plan else None,
            where=where,
            others=others,
        )
    if as_json:
        click.echo(json.dumps([asdict(hit) for hit in hits], indent=1))
        return
    for hit in hits:
        asked = f"{hit.query_start:.2f}-{hit.query_end:.2f} s"
        click.echo(f"{hit.similarity:.4f}  {hit.path}  {hit.start:.2f}-{hit.end:.2f} s  (asked by {asked})")
