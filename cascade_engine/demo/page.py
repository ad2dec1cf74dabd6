"""The demo's report: the run's own report, with what the demo adds; every number in it computed in this run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cascade_engine.demo.measuring import MINED, PLANS, Row, remarks
from cascade_engine.evaluation.features import Scores
from cascade_engine.evaluation.page import Section, matrix, paragraph, table, write_report
from cascade_engine.evaluation.run_report import ReportConfig, run_sections
from cascade_engine.training.run import Run
from cascade_engine.video.index import VideoIndex

RENDERED = (
    "The videos are renderings of 15 motion-captured actions, one recording per class: each video has its own camera, "
    "tempo, phase and light, and every person does every action in every scene. A held-out video is a held-out "
    "rendering, of a person not trained on, of a recording that was: nothing here says how features generalise to "
    "other people."
)
EXPLAINED = (
    "R@k: share of held-out videos with a training video of their class among the k nearest (backbone features). "
    f"Mining precision: share of the {MINED} positives mined for each training clip that are of its class. coclr mines "
    "with the other view alone, cpr with the seven-stage cascade, sum with both similarities added."
)


def write_demo_report(
    path: Path, run: Run, index: VideoIndex, rows: Sequence[Row], labels: Scores, *, rendered: bool
) -> Path:
    """Write the report of a finished demo.

    Args:
        path: the file.
        run: the finished run.
        index: its videos.
        rows: from `measure`.
        labels: how the held-out videos were classified.
        rendered: whether the videos are the rendered actions.
    """
    split = ", ".join(f"{len(index.split(name))} {name}" for name in index.splits)
    told = f"{len(index)} videos of {len(index.labels)} classes ({split}); seed {run.config.seed}."
    glance = "".join(map(paragraph, [told, *([RENDERED] if rendered else [])])) + _table(rows)
    glance += "".join(map(paragraph, [*remarks(rows), EXPLAINED]))
    figures = ", ".join(f"{name} {value:.3f}" for name, value in labels.figures.items())
    judged = paragraph(
        f"{figures}; chance is {1 / len(labels.classes):.3f}. From the exported file: video in, label out."
    )
    judged += matrix(labels.confusion.tolist(), labels.classes) + table(labels.per_class())
    sections = [
        Section(title="At a glance", body=glance),
        *run_sections(run, ReportConfig(queries=4)),
        Section(title="Labels of held-out videos", body=judged),
    ]
    return write_report(path, "cascade demo", sections)


def _table(rows: Sequence[Row]) -> str:
    return table(
        [
            {
                "view": row.view,
                "features": row.features,
                "R@1": row.first,
                "R@5": row.fifth,
                **{f"mining precision, {plan}": row.mining.get(plan) for plan in PLANS},
            }
            for row in rows
        ]
    )
