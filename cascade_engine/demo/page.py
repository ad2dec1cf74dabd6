"""The demo's report: one HTML file, every number in it computed in this run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cascade_engine.demo.measuring import PLANS, RANDOM, RAW, TRAIN, Clips, Row, remarks
from cascade_engine.evaluation.features import Scores
from cascade_engine.evaluation.page import Section, curves, heading, matrix, paragraph, table, write_report
from cascade_engine.evaluation.report import cascade_strip, trace_cascade
from cascade_engine.plan import CascadePlan
from cascade_engine.store import FeatureStore
from cascade_engine.training.run import Run
from cascade_engine.video.cache import ClipCache

SHOWN_QUERIES = 4
SHOWN_FRAMES = 5


def write_demo_report(
    path: Path, run: Run, cache: ClipCache, rows: Sequence[Row], labels: Scores, *, rendered: bool
) -> Path:
    """Write the report of a finished demo.

    Args:
        path: the file.
        run: the finished run.
        cache: its videos.
        rows: from `measure`.
        labels: how the held-out videos were classified.
        rendered: whether the videos are the rendered actions.
    """
    sections = [
        Section(title="What was run", body=_setting(run, cache, rendered=rendered)),
        Section(title="Retrieval and mining, phase by phase", body=_table(rows) + "".join(map(paragraph, remarks(rows)))),
        Section(title="Cascades", body=cascades(run, cache)),
        Section(title="Curves", body=_curves(run)),
        Section(title="Labels of held-out videos", body=_labels(labels)),
    ]
    return write_report(path, "cascade demo", sections)


def _setting(run: Run, cache: ClipCache, *, rendered: bool) -> str:
    count = {split: len(cache.index.split(split)) for split in cache.index.splits}
    parts = ", ".join(f"{number} for {split}" for split, number in count.items())
    told = paragraph(f"{len(cache.index)} videos of {len(cache.index.labels)} classes ({parts}); seed {run.config.seed}.")
    if rendered:
        told += paragraph(
            "The videos are renderings of 15 motion-captured actions, one recording per class: each video has its own "
            "camera, tempo, phase, body, colours and background. A held-out video is a held-out rendering of a "
            "recording that was seen, so nothing here says how features generalise to other people."
        )
    return told


def _table(rows: Sequence[Row]) -> str:
    return table(
        [
            {
                "features": row.features,
                "view": row.view,
                "R@1": row.first,
                "R@5": row.fifth,
                **{f"mining precision, {plan}": row.mining.get(plan) for plan in PLANS},
            }
            for row in rows
        ]
    ) + paragraph(
        "R@k: share of held-out videos with a training video of their class among the k nearest (backbone features). "
        "Mining precision: share of the 5 mined positives that are of the query's class (embeddings of the training "
        f"clips, own video excluded; for {RAW} and {RANDOM} the same). coclr mines with the other view alone, cpr with "
        "the seven-stage cascade, sum with both similarities added."
    )


def _curves(run: Run) -> str:
    drawn = ""
    for figure, text in (("loss", "loss"), ("precision", "precision of the positives mined in training")):
        series = {}
        for phase in run.phases:
            points = [
                (float(row["step"]), float(row[figure]))
                for row in run.metrics
                if row["phase"] == phase and row.get(figure) is not None
            ]
            if points:
                series[phase] = ([x for x, _ in points], [y for _, y in points])
        if series:
            drawn += heading(text) + curves(series, x_label="step", y_label=text)
    return drawn


def cascades(run: Run, cache: ClipCache, queries: int = SHOWN_QUERIES) -> str:
    """The cascade of a few training clips, stage by stage, as HTML: the last phase's plan on its features."""
    phase = next(each for each in reversed(run.config.phase) if each.cascade() is not None)
    plan = phase.cascade()
    if plan is None:
        return paragraph("nothing was mined")
    with FeatureStore.open(run.store_path, phase=phase.name) as store:
        clips = Clips.of(store)
        bank = store.bank(plan.views, where=f"split == '{TRAIN}'")
        rows = np.flatnonzero(clips.split == TRAIN)
    video, start, label = clips.video[rows], clips.start[rows], clips.label[rows]
    bank.label = label
    _, first = np.unique(label, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(queries, len(first))).astype(int)]
    span = (run.config.clip.frames - 1) * run.config.clip.stride + 1

    def frame(slot: int, at: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
        return np.asarray(cache.frames("rgb", int(video[slot]), int(start[slot]), span)[at], np.uint8)

    return paragraph(f"{plan_words(plan, len(rows))} Green: of the query's class.") + "".join(
        cascade_strip(
            trace,
            query_frames=[frame(trace.query, at) for at in np.linspace(0, span - 1, SHOWN_FRAMES).astype(int)],
            query_name=clips.classes[label[trace.query]],
            thumbnail=lambda slot: frame(slot, span // 2),
            name=lambda slot: clips.classes[label[slot]],
        )
        for trace in trace_cascade(plan, bank.keys, bank, video, rows=chosen.tolist(), query_labels=label.tolist())
    )


def plan_words(plan: CascadePlan, keys: int) -> str:
    """The plan and what it keeps of a bank."""
    return f"Plan {plan} over {keys} clips keeps {', '.join(map(str, plan.counts(keys)))}."


def _labels(labels: Scores) -> str:
    figures = ", ".join(f"{name} {value:.3f}" for name, value in labels.figures.items())
    return (
        paragraph(f"{figures}; chance is {1 / len(labels.classes):.3f}. From the exported file, video in, label out.")
        + matrix(labels.confusion.tolist(), labels.classes)
        + table(labels.per_class())
    )
