"""`cascade finetune`: a classifier on a run's encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from .values import SEED, Finite

if TYPE_CHECKING:
    from cascade_engine.deployment.classifier import Crops


@click.command("finetune")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--view", help="The run's first view by default.")
@click.option("--phase", help="Whose weights to begin with; the last by default, 'initial' for random ones.")
@click.option("--layers", default="all", show_default=True, type=click.Choice(["all", "head"]), help="What learns.")
@click.option("--epochs", default=20, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Clips per step.")
@click.option(
    "--lr",
    type=Finite(0, min_open=True),
    help="Highest learning rate; by default 1e-3 for all layers, 1e-2 for the head.",
)
@click.option(
    "--area",
    default=0.8,
    show_default=True,
    type=Finite(0, 1, min_open=True),
    help="Smallest share of a picture that a crop shows.",
)
@click.option("--crops", default="1", show_default=True, type=click.Choice(["1", "2", "5", "10"]), help="Of the test.")
@click.option(
    "--with", "others", multiple=True, type=click.Path(path_type=Path), help="A fine-tuned folder to average."
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of every random draw.")
@click.option("--train", "train_split", default="train", show_default=True, help="The split learnt from.")
@click.option("--test", "test_split", default="test", show_default=True, help="The split tested once, at the end.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Folder of the result; RUN/finetuned-VIEW.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    run: Path,
    view: str | None,
    phase: str | None,
    layers: str,
    epochs: int,
    batch: int,
    lr: float | None,
    area: float,
    crops: str,
    others: tuple[Path, ...],
    seed: int,
    train_split: str,
    test_split: str,
    target: Path | None,
    as_json: bool,
) -> None:
    """Train a classifier on RUN's encoder, and test it once: all windows of a video, all crops of each.

    The epoch is chosen on videos cut from the training split. --with averages the probabilities with those of other
    fine-tuned classifiers (two streams); export takes the same option.

    \b
    Examples:
      cascade finetune runs/tiny --view flow
      cascade finetune runs/tiny --view rgb --with runs/tiny/finetuned-flow --crops 10
      cascade finetune runs/tiny --layers head --epochs 40
    """
    from cascade_engine.deployment.finetune import finetune
    from cascade_engine.deployment.finetuned import FinetuneConfig, FineTuned
    from cascade_engine.deployment.judging import judge, require_judgeable
    from cascade_engine.training.run import Run

    from .progress import bar

    opened = Run.open(run)
    members = [FineTuned.open(other) for other in others]
    config = FinetuneConfig(
        view=view or opened.views[0],
        phase=phase,
        layers="all" if layers == "all" else "head",
        epochs=epochs,
        batch=batch,
        lr=lr,
        area=area,
        crops=cast("Crops", int(crops)),
        seed=seed,
        train_split=train_split,
        test_split=test_split,
    )
    folder = target or opened.folder / f"finetuned-{config.view}"
    require_judgeable(opened, config, members)  # what is refused is refused before anything is trained
    folder.mkdir(parents=True, exist_ok=True)
    with bar("epochs", epochs) as advance:
        tuned = finetune(opened, config, progress=lambda *_: advance())
    tuned.save(folder)
    found = {"alone": judge([tuned])}
    if members:
        found["averaged"] = judge([tuned, *members])
    told = {
        "folder": str(folder),
        "curve": tuned.curve,
        "chance": 1 / len(tuned.labels),
        **{name: scores.to_json() for name, scores in found.items()},
    }
    (folder / "finetuned.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return
    best = max(tuned.curve, key=lambda row: row["validation"])
    click.echo(f"{folder}: epoch {best['epoch']:.0f} of {epochs}, validation accuracy {best['validation']:.4f}")
    for name, scores in found.items():
        figures = "  ".join(f"{key} {value:.4f}" for key, value in scores.figures.items())
        click.echo(f"test, {name}: {figures}  ({scores.settings['test_videos']} videos, chance {told['chance']:.4f})")
