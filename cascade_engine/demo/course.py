"""The demo's course: videos, views, training, features, measures, labels, report; what is there already is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade_engine.demo.measuring import Row, measure, remarks
from cascade_engine.demo.page import write_demo_report
from cascade_engine.demo.videos import DemoOptions, Progress, find_videos, mining_in_time
from cascade_engine.deployment.artefact import load, save
from cascade_engine.deployment.assemble import assemble
from cascade_engine.deployment.finetune import finetune
from cascade_engine.deployment.finetuned import FinetuneConfig, FineTuned
from cascade_engine.deployment.predict import predict
from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import Scores, accuracy_scores
from cascade_engine.training.config import TrainConfig
from cascade_engine.training.desk import Progress as Step
from cascade_engine.training.loop import train
from cascade_engine.training.run import Run
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.index import VideoIndex


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a demo found.

    Args:
        rows: retrieval and mining, phase by phase.
        remarks: where the trained features do not win.
        labels: how the held-out videos were classified by the exported model.
        model: the exported file.
        report: the HTML file.
    """

    rows: Sequence[Row]
    remarks: Sequence[str]
    labels: Scores
    model: Path
    report: Path

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / len(self.labels.classes)


def run_demo(options: DemoOptions, progress: Progress) -> Outcome:
    """Run the whole method once, or go on where an earlier demo in the same folder stopped.

    Args:
        options: what to run, and where.
        progress: told of every step.

    Raises:
        InvalidInput: videos that cannot serve, or a folder begun with other options.
        KeyboardInterrupt: interrupted; what is done is kept.
    """
    course = options.course()
    index = find_videos(options, progress)
    cache = ClipCache.build(
        index,
        course.views,
        course.data.size,
        options.folder / "cache" / "frames",
        flow=course.data.flow,
        workers=2,
        progress=lambda done, total, _: progress("decode, compute flow", done, total),
    )

    def step(now: Step) -> None:
        progress(f"train {now.phase}", now.step, now.steps)

    if not _begun(course):  # a demo of before goes on as it was
        course = mining_in_time(course, cache)
    run = train(course, resume=True, cache=cache, report=step)
    progress("measure", 0, 1)
    rows = measure(run)
    progress("measure", 1, 1)
    model = options.folder / "model.pt2"
    if not model.exists():
        save(*assemble([_finetuned(run, view, options.epochs, progress) for view in run.views]), model)
    labels = label_held_out(model, index, progress)
    progress("report", 0, 1)
    report = write_demo_report(
        options.folder / "report.html", run, index, rows, labels, rendered=options.videos is None
    )
    progress("report", 1, 1)
    return Outcome(rows=rows, remarks=remarks(rows), labels=labels, model=model, report=report)


def _begun(course: TrainConfig) -> bool:
    """Whether the demo's run is there and was begun with this config as it is."""
    folder = Path(course.output.runs) / course.name
    return (folder / "config.toml").exists() and Run.open(folder).config.course == course.course


def _finetuned(run: Run, view: str, epochs: int, progress: Progress) -> Path:
    """The folder of the view's classifier, trained where it is not there yet."""
    folder = run.folder / f"finetuned-{view}"
    if not FineTuned.is_in(folder):
        name = f"fine-tune {view}"
        config = FinetuneConfig(view=view, epochs=epochs, seed=run.config.seed)
        finetune(run, config, progress=lambda epoch, _: progress(name, epoch, epochs)).save(folder)
    return folder


def label_held_out(model: Path, index: VideoIndex, progress: Progress) -> Scores:
    """Label the held-out videos, or parts of them, with the exported model, and judge the labels.

    Raises:
        InvalidInput: no held-out video of a label that was learnt can be read.
    """
    loaded = load(model)
    names = loaded.signature.labels
    held_out = index.split("test")
    entries = [entry for entry in held_out if entry.label in names]
    truth, probabilities = [], []
    found = predict(loaded, entries)
    for done, (entry, result) in enumerate(zip(entries, found, strict=True), start=1):
        progress("label held-out videos", done, len(entries))
        if result.probabilities is not None:
            truth.append(names.index(str(entry.label)))
            probabilities.append(result.probabilities)
    if not truth:
        raise InvalidInput(f"videos: expected a held-out video of {', '.join(names)} that can be read, found none")
    settings = {
        "videos": len(truth),
        "unreadable": len(entries) - len(truth),
        "of_other_labels": len(held_out) - len(entries),
    }
    return accuracy_scores(
        "classify", np.array(truth, np.int64), np.stack(probabilities).astype(np.float64), names, settings
    )
