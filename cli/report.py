"""`cascade report`: a run's report as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from .values import SEED, NewFile


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", default="report.html", show_default=True, type=NewFile(), help="The file.")
@click.option("--plan", help="The plan shown and measured; the last mining phase's own by default.")
@click.option("--queries", default=6, show_default=True, type=click.IntRange(1), help="Queries shown stage by stage.")
@click.option("--train", "train_split", default="train", show_default=True, help="The split mined and searched in.")
@click.option("--test", "test_split", default="test", show_default=True, help="The split that asks.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of the draw of queries.")
def command(
    run: Path, output: Path, plan: str | None, queries: int, train_split: str, test_split: str, seed: int
) -> None:
    """Write the report of a RUN's folder: curves, retrieval, mining by phase and class, maps, cascades at work.

    One self-contained file: pictures are inside, nothing is fetched, no script runs.

    \b
    Examples:
      cascade report runs/tiny -o tiny.html
      cascade report runs/tiny --plan 'flow:50%,rgb:25%,flow:5' --queries 12
    """
    from cascade_engine.evaluation.run_report import ReportConfig, report_run
    from cascade_engine.plan import CascadePlan
    from cascade_engine.training.run import Run

    config = ReportConfig(
        plan=CascadePlan.parse(plan) if plan else None,
        queries=queries,
        train_split=train_split,
        test_split=test_split,
        seed=seed,
    )
    written = report_run(Run.open(run), output, config)
    click.echo(f"{written}  {written.stat().st_size / 1e6:.1f} MB")
