"""`cascade bench training`: parse, train, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cascade_engine.errors import InvalidInput

from .heeding import require_heeded
from .values import NewFile


@click.command("training")
@click.option("--method", "names", multiple=True, help="Only this method; repeatable. By default all.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Train with the seeds 0, 1, ...")
@click.option("--first-seed", default=0, show_default=True, type=click.IntRange(0), help="Instead of 0.")
@click.option("--train", default=3000, show_default=True, type=click.IntRange(64), help="Training videos.")
@click.option("--test", default=900, show_default=True, type=click.IntRange(60), help="Test videos.")
@click.option("--queue", default=2048, show_default=True, type=click.IntRange(1), help="Keys in the queue.")
@click.option("--warm", default=12, show_default=True, type=click.IntRange(1), help="Epochs of InfoNCE per view first.")
@click.option("--epochs", default=20, show_default=True, type=click.IntRange(1), help="Epochs of each method.")
@click.option("--view", default="rgb", show_default=True, type=click.Choice(["rgb", "flow"]), help="The view trained.")
@click.option(
    "--oracle",
    default="learned",
    show_default=True,
    type=click.Choice(["learned", "noise", "collapsed"]),
    help="The other view: as it learned, random vectors, or squeezed into a narrow cone.",
)
@click.option("--probe/--no-probe", default=True, show_default=True, help="Fit the linear probe, a third of the time.")
@click.option("--data", default="cache", show_default=True, help="Folder that keeps the videos and their features.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of torch.")
@click.option("--json", "to", type=NewFile(), help="Write the results here.")
@click.option(
    "--from",
    "sources",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show results measured before; repeatable, for runs with other seeds.",
)
@click.option("--plot", type=NewFile(".png", ".svg"), help="Draw the results into this PNG or SVG.")
@click.pass_context
def command(
    ctx: click.Context,
    names: tuple[str, ...],
    seeds: int,
    first_seed: int,
    train: int,
    test: int,
    queue: int,
    warm: int,
    epochs: int,
    view: str,
    oracle: str,
    probe: bool,
    data: str,
    threads: int,
    to: Path | None,
    sources: tuple[Path, ...],
    plot: Path | None,
) -> None:
    """Positives compared on MovingDigits: own key, CoCLR, CPR, fusions, labels.

    One small net, one budget, several seeds; mining precision, retrieval and linear probe, mean and spread. Videos
    and features are made first, in minutes, and kept; then all methods of a seed take about five minutes of one core.

    \b
    Examples:
      cascade bench training --json training.json --plot training.svg
      cascade bench training --seeds 2 --method CoCLR --method CPR
      cascade bench training --oracle noise --seeds 3
      cascade bench training --from training.json --plot training.png
    """
    require_heeded(ctx, {"sources": {"to", "plot"}})
    import torch
    from cascade_engine.benchmarks import digit_nets, moving_digits, training, training_report

    def keep(found: dict[str, Any]) -> None:
        if to is not None:
            to.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if sources:
        results = training_report.joined([_read(source) for source in sources])
        keep(results)
    else:
        torch.set_num_threads(threads)
        budget = digit_nets.Budget(
            trainee="rgb" if view == "rgb" else "flow",
            oracle="noise" if oracle == "noise" else "collapsed" if oracle == "collapsed" else "learned",
            queue=queue,
            warm=warm,
            epochs=epochs,
        )
        methods = training.find(names)
        with click.progressbar(length=train + test, label="drawing videos", file=sys.stderr) as bar:
            videos = moving_digits.moving_digits(
                data, train=train, test=test, progress=lambda done, _: bar.update(done - bar.pos)
            )
        features = moving_digits.digit_features(videos, data)

        chosen = range(first_seed, first_seed + seeds)
        results = training.run(features, budget, methods, chosen, probe=probe, report=click.echo, keep=keep)
    click.echo(training_report.table(results))
    click.echo()
    click.echo(training_report.views_table(results))
    if plot is not None:
        training_report.draw(results, plot)


def _read(source: Path) -> dict[str, Any]:
    """Results that were written before."""
    try:
        results: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        complete = {"budget", "data"} <= results.keys() and all(
            "methods" in row and int(seed) >= 0 for seed, row in results["seeds"].items()
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        complete = False
    if not complete:
        raise InvalidInput(f"--from: expected what cascade bench training --json wrote, got {source}")
    return results
