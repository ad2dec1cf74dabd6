"""`cascade eval`: how good a run's features are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .printing import literal
from .values import SEED, SHARE, NewFile

if TYPE_CHECKING:
    from cascade_engine.evaluation.features import Scores
    from cascade_engine.evaluation.of_run import Splits

KINDS = ("backbone", "projection", "pixels")


@click.group("eval")
def command() -> None:
    """Judge a run's features by retrieval, a linear probe, k-NN, or what a plan mines in them.

    Videos are told apart by their split; nothing is ever chosen by test labels; equal runs give equal bits.

    \b
    Examples:
      cascade eval retrieval runs/tiny
      cascade eval linear runs/tiny --view flow --phase initial
      cascade eval mining runs/tiny --plan 'flow:50%,rgb:25%,flow:5' --json
    """


def _choices(function: Callable[..., None]) -> Callable[..., None]:
    """The options that the protocols on splits share."""
    for option in (
        click.option("-o", "--output", type=NewFile(), help="Also write a page with plots here."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--test", "test_split", default="test", show_default=True, help="The split that is asked."),
        click.option("--train", "train_split", default="train", show_default=True, help="The split learnt from."),
        click.option("--kind", default="backbone", show_default=True, type=click.Choice(KINDS), help="Which features."),
        click.option("--phase", help="After which phase; the last one by default, 'initial' for random weights."),
        click.option("--view", help="The run's first view by default; rgb+flow: two streams."),
        click.argument("run", type=click.Path(path_type=Path)),
    ):
        function = option(function)
    return function


def _splits(run: Path, view: str | None, phase: str | None, kind: str, train_split: str, test_split: str) -> Splits:
    from cascade_engine.evaluation.of_run import collect
    from cascade_engine.training.run import Run

    opened = Run.open(run)
    return collect(
        opened,
        view or opened.views[0],
        phase=phase,
        kind=kind,  # type: ignore[arg-type]
        train_split=train_split,
        test_split=test_split,
    )


def _show(scores: Scores, of: dict[str, str], as_json: bool, output: Path | None) -> None:
    """Print the scores, then write their page: a disk that refuses does not take the figures along."""
    if as_json:
        click.echo(json.dumps({"features": of, **scores.to_json()}, indent=1))
    else:
        click.echo("  ".join(f"{name} {value}" for name, value in of.items()))
        click.echo("  ".join(f"{name} {value:.4f}" for name, value in scores.figures.items()))
        click.echo("  ".join(f"{name} {value}" for name, value in scores.settings.items()))
        _table(scores.per_class())
    if output is not None:
        from cascade_engine.evaluation.page import Section, matrix, table, write_report

        sections = [
            Section(title="Result", body=table([{**of, **scores.figures}]) + table([scores.settings])),
            Section(title="By class", body=table(scores.per_class())),
            Section(title="Confusion", body=matrix(scores.confusion.tolist(), scores.classes)),
        ]
        write_report(output, f"{scores.protocol}: {of['view']}, {of['phase']}", sections)


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        shown.add_column(literal(name), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        shown.add_row(*(literal(f"{each:.3f}" if isinstance(each, float) else each or "-") for each in row.values()))
    Console().print(shown)


@command.command("retrieval")
@_choices
def _retrieval(
    run: Path,
    view: str | None,
    phase: str | None,
    kind: str,
    train_split: str,
    test_split: str,
    as_json: bool,
    output: Path | None,
) -> None:
    """R@1, 5, 10, 20, 50: test videos looking for their class in the training split.

    \b
    Example:
      cascade eval retrieval runs/tiny --view rgb -o retrieval.html
    """
    from cascade_engine.evaluation.neighbours import retrieval

    splits = _splits(run, view, phase, kind, train_split, test_split)
    _show(retrieval(splits.test, splits.train), splits.of, as_json, output)


@command.command("knn")
@_choices
@click.option("--k", default=20, show_default=True, type=click.IntRange(1), help="Neighbours that vote.")
def _knn(
    run: Path,
    view: str | None,
    phase: str | None,
    kind: str,
    train_split: str,
    test_split: str,
    as_json: bool,
    output: Path | None,
    k: int,
) -> None:
    """Accuracy of the vote of the k nearest training videos.

    \b
    Example:
      cascade eval knn runs/tiny --k 5
    """
    from cascade_engine.evaluation.neighbours import knn

    splits = _splits(run, view, phase, kind, train_split, test_split)
    _show(knn(splits.test, splits.train, k=k), splits.of, as_json, output)


@command.command("linear")
@_choices
@click.option(
    "--validation", default=0.2, show_default=True, type=SHARE, help="Share of training videos that choose the L2."
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of the draw of validation videos.")
def _linear(
    run: Path,
    view: str | None,
    phase: str | None,
    kind: str,
    train_split: str,
    test_split: str,
    as_json: bool,
    output: Path | None,
    validation: float,
    seed: int,
) -> None:
    """Accuracy of a linear layer on frozen features, its strength of L2 chosen on training videos.

    \b
    Example:
      cascade eval linear runs/tiny --view flow --json
    """
    from cascade_engine.evaluation.probe import linear_probe

    splits = _splits(run, view, phase, kind, train_split, test_split)
    _show(linear_probe(splits.test, splits.train, validation=validation, seed=seed), splits.of, as_json, output)


@command.command("mining")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--plan", help="The last mining phase's own by default.")
@click.option("--phase", help="Of the run; the last one by default.")
@click.option("--split", default="train", show_default=True, help="The clips mined among.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def _mining(run: Path, plan: str | None, phase: str | None, split: str, as_json: bool) -> None:
    """What a plan mines in a phase's stored features: precision, class mining recall, coverage, hubness.

    \b
    Example:
      cascade eval mining runs/tiny --plan 'sum(flow,rgb):5'
    """
    from cascade_engine.errors import InvalidInput
    from cascade_engine.evaluation.mining import mining
    from cascade_engine.evaluation.of_run import features_of
    from cascade_engine.evaluation.run_report import last_plan
    from cascade_engine.plan import CascadePlan
    from cascade_engine.training.run import Run

    opened = Run.open(run)
    chosen = CascadePlan.parse(plan) if plan else last_plan(opened)
    if chosen is None or not opened.phases:
        raise InvalidInput("plan: expected one, or a run with a finished phase that mined")
    with features_of(opened, phase or opened.phases[-1]) as store:
        found = mining(store, chosen, where=f"split == {split!r}")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    click.echo(f"plan {found.plan}  phase {found.phase}")
    click.echo("  ".join(f"{name} {value:.4f}" for name, value in found.figures.items()))
    click.echo("alone: " + "  ".join(f"{name} {value:.4f}" for name, value in found.views.items()))
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    _table(found.per_class)
