"""`cascade classify`: labels for video files, from one exported model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cascade_engine.errors import InvalidInput

FAILED = 1


@click.command("classify")
@click.argument("videos", nargs=-1, required=True)
@click.option("--model", required=True, type=click.Path(path_type=Path), help="The exported model, .pt2 or .onnx.")
@click.option("--top", default=1, show_default=True, type=click.IntRange(1), help="Labels shown for each video.")
@click.option("--timeline", is_flag=True, help="Also show the label of each window.")
@click.option("--step", type=click.IntRange(1), help="Frames from window to window; half a window by default.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Windows per call of the model.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each video.")
def command(
    videos: tuple[str, ...], model: Path, top: int, timeline: bool, step: int | None, batch: int, as_json: bool
) -> int:
    """Label VIDEOS: files, folders (searched to the bottom) and quoted glob patterns.

    A video that cannot be read is told on the error stream, the others go on, and the exit code is 1 in the end.
    A video of which only a part could be read is labelled by that part, and told, too.

    \b
    Examples:
      cascade classify match.mp4 --model model.pt2 --top 3
      cascade classify clips/ 'more/**/*.mkv' --model model.onnx --json > labels.jsonl
      cascade classify match.mp4 --model model.pt2 --timeline
    """
    from cascade_engine.deployment.artefact import load
    from cascade_engine.deployment.predict import find_videos, predict

    from .printing import reader_told_by_results
    from .progress import bar

    found = find_videos(videos)
    loaded = load(model)
    if not loaded.signature.labels:
        raise InvalidInput(f"model: {model} gives features alone; fine-tune the run with labels and export it again")
    troubled = 0
    with reader_told_by_results(), bar("videos", len(found)) as advance:
        for result in predict(loaded, found, batch=batch, step=step):
            advance()
            if result.problem is not None:
                troubled += 1
                click.echo(f"error: {result.problem}", err=True)
            if as_json:
                click.echo(json.dumps(result.to_json(top=top, timeline=timeline)))
            elif not result.failed:
                labels = "  ".join(f"{label} {score:.3f}" for label, score in result.best(top))
                click.echo(f"{result.path}  {labels}")
                if timeline:
                    for row in result.to_json(timeline=True)["timeline"]:
                        click.echo(f"  {row['start']:8.2f} s  {row['end']:8.2f} s  {row['label']} {row['score']:.3f}")
    if troubled:
        click.echo(f"{troubled} of {len(found)} videos had problems", err=True)
    return FAILED if troubled else 0
