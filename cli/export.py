"""`cascade export`: a run or fine-tuned classifiers as one deployable file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

if TYPE_CHECKING:
    from cascade_engine.deployment.classifier import Crops


@click.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="The file: .pt2 or .onnx.")
@click.option(
    "--with", "others", multiple=True, type=click.Path(path_type=Path), help="A fine-tuned folder to average."
)
@click.option("--view", "views", multiple=True, help="Of a run: a view to export; all by default.")
@click.option("--phase", help="Of a run: whose weights; the last one by default.")
@click.option(
    "--crops", default="1", show_default=True, type=click.Choice(["1", "2", "5", "10"]), help="Of every clip."
)
@click.option(
    "--features",
    default="backbone",
    show_default=True,
    type=click.Choice(["backbone", "projection"]),
    help="What it gives as features: the backbone's, or of a run the projection that mining compares.",
)
def command(
    source: Path,
    target: Path,
    others: tuple[Path, ...],
    views: tuple[str, ...],
    phase: str | None,
    crops: str,
    features: str,
) -> None:
    """Write SOURCE, a folder of `cascade finetune` or a run, as one file with all that it takes to run it.

    Weights, preprocessing, label names, views and versions are inside; it loads without training code or config.
    A run without labels gives features alone, for `cascade embed` and `cascade query`.

    \b
    Examples:
      cascade export runs/tiny/finetuned-rgb --to model.pt2
      cascade export runs/tiny/finetuned-rgb --with runs/tiny/finetuned-flow --to two-stream.onnx
      cascade export runs/tiny --view rgb --features projection --to features.onnx
    """
    from cascade_engine.deployment.artefact import save
    from cascade_engine.deployment.assemble import assemble

    classifier, signature = assemble(
        [source, *others],
        views=views or None,
        phase=phase,
        crops=cast("Crops", int(crops)),
        features="projection" if features == "projection" else "backbone",
    )
    written = save(classifier, signature, target)
    told = f"{len(signature.labels)} labels" if signature.labels else "features alone"
    shown = ", ".join(f"{view.name} {view.dim}" for view in signature.views)
    click.echo(f"{written}  {written.stat().st_size / 1e6:.1f} MB  {told}  {shown}")
