"""The demo's course: videos, views, training, features, measures, labels, report; what is there already is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cascade_engine.demo.measuring import Row, measure, remarks
from cascade_engine.demo.page import write_demo_report
from cascade_engine.demo.videos import DemoOptions, Progress, find_videos
from cascade_engine.evaluation.features import Scores
from cascade_engine.training.desk import Progress as Step
from cascade_engine.training.extraction import write_features
from cascade_engine.training.loop import train
from cascade_engine.training.parallel import World
from cascade_engine.training.run import INITIAL, Run
from cascade_engine.video.cache import ClipCache


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a demo found.

    Args:
        rows: retrieval and mining, phase by phase.
        remarks: where the trained features do not win.
        labels: how the held-out videos were classified.
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

    run = train(course, resume=True, cache=cache, report=step)
    progress("measure", 0, 1)
    write_features(run, INITIAL, cache, World(), torch.device("cpu"))
    rows = measure(run, cache)
    progress("measure", 1, 1)
    model, labels = label_held_out(run, options.folder / "model.pt2", progress)
    report = write_demo_report(
        options.folder / "report.html", run, cache, rows, labels, rendered=options.videos is None
    )
    return Outcome(rows=rows, remarks=remarks(rows), labels=labels, model=model, report=report)
