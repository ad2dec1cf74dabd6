"""`cascade demo`: the whole method once."""

from __future__ import annotations

from pathlib import Path

import click

from .values import SEED


@click.command("demo")
@click.option(
    "--videos",
    type=click.Path(path_type=Path),
    help="A folder with a folder of videos for each label, or a CSV index (path, label, split, start, end).",
)
@click.option(
    "--folder", default="demo", show_default=True, type=click.Path(path_type=Path), help="Everything goes here."
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of every random draw.")
def command(videos: Path | None, folder: Path, seed: int) -> None:
    """The whole method once, thinly but for real: video in, label out.

    Renders labelled videos of human actions (or takes yours), computes the rgb and flow views, trains an encoder for
    each view (InfoNCE, then cascade mining with the other view as frozen oracle), stores the features of each phase,
    mines positives, measures retrieval against random weights and raw pixels, exports a classifier, labels the
    held-out videos with it, and writes one HTML report. Run again after an interruption, it goes on.

    \b
    Examples:
      cascade demo
      cascade demo --videos my_videos/ --folder my_demo
    """
    from cascade_engine.demo.course import run_demo
    from cascade_engine.demo.videos import DemoOptions

    from .steps import steps

    with steps() as progress:
        found = run_demo(DemoOptions(folder=folder, videos=videos, seed=seed), progress)
    click.echo(f"{'features':16} {'view':8} {'R@1':>6} {'R@5':>6}  mining precision")
    for row in found.rows:
        mining = "  ".join(f"{plan} {value:.3f}" for plan, value in row.mining.items())
        click.echo(f"{row.features:16} {row.view:8} {row.first:6.3f} {row.fifth:6.3f}  {mining}")
    for remark in found.remarks:
        click.echo(remark)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in found.labels.figures.items())
    click.echo(f"labels of {found.labels.confusion.sum()} held-out videos: {figures} (chance {found.chance:.3f})")
    click.echo(f"model: {found.model}\nreport: {found.report}")
