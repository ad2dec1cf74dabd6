"""The report of a run: what it learnt, how it mined, and the cascade at work on some of its queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import I64, Scores
from cascade_engine.evaluation.mining import MiningScores, mining
from cascade_engine.evaluation.neighbours import knn, retrieval
from cascade_engine.evaluation.of_run import Kind, Splits, collect, features_of, windows_of
from cascade_engine.evaluation.page import (
    Section,
    curves,
    heading,
    matrix,
    paragraph,
    scatter,
    table,
    write_report,
)
from cascade_engine.evaluation.report import Pixels, cascade_strip, project, trace_cascade
from cascade_engine.plan import CascadePlan
from cascade_engine.training.config import require_seed
from cascade_engine.training.run import INITIAL, Run
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.clips import ClipTable

CURVES = {
    "loss": "loss",
    "precision": "share of mined positives that are right (PMR)",
    "class_recall_video": "share of a class's videos mined rightly (median, CMR)",
    "coverage": "share of videos mined at all",
}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What a report shows.

    Args:
        plan: for the mining tables and the cascades; the last phase's own plan by default.
        queries: how many queries the cascade is shown for.
        train_split: the split mined in, and the gallery.
        test_split: the split asked in retrieval.
        seed: of the draw of queries.
    """

    plan: CascadePlan | None = None
    queries: int = 6
    train_split: str = "train"
    test_split: str = "test"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a seed that no generator takes."""
        require_seed(self.seed)


def report_run(run: Run, path: str | Path, config: ReportConfig | None = None) -> Path:
    """Write a run's report as one self-contained HTML file.

    Raises:
        InvalidInput: the run has no finished phase, no labelled videos in the splits, or a cache of other videos.
        StoreError: its store or cache cannot be read.
    """
    return write_report(path, f"Run {run.config.name}", run_sections(run, config or ReportConfig()))


def run_sections(run: Run, config: ReportConfig) -> list[Section]:
    """The sections of a run's report; raises as `report_run`."""
    if not run.phases:
        raise InvalidInput(f"run: expected a phase that is done, {run.folder} has none")
    plan = config.plan or last_plan(run)
    sections = [_overview(run), *_curves(run), _retrieval(run, config)]
    if plan is not None:
        sections += [_mining(run, plan, config), _cascades(run, plan, config)]
    return [*sections, _maps(run, config)]


def last_plan(run: Run) -> CascadePlan | None:
    """The plan of the last finished phase that mined; None where none did."""
    plans = [phase.cascade() for phase in run.config.phase if phase.name in run.phases]
    return next((plan for plan in reversed(plans) if plan is not None), None)


def _overview(run: Run) -> Section:
    rows = [
        {
            "phase": phase.name,
            "trains": phase.train,
            "oracles": ", ".join(phase.oracles) or None,
            "plan": str(phase.cascade() or "own key only"),
            "epochs": phase.epochs,
            "state": "done" if phase.name in run.phases else "not done",
        }
        for phase in run.config.phase
    ]
    model, clip = run.config.model, run.config.clip
    told = (
        f"{model.encoder}, {model.dim} dimensions; clips of {clip.frames} frames {clip.stride} apart, "
        f"{clip.size} x {clip.size}; seed {run.config.seed}."
    )
    return Section(title="Phases", body=paragraph(told) + table(rows))


def _curves(run: Run) -> list[Section]:
    rows = run.metrics
    drawn = []
    for key, title in CURVES.items():
        series = {
            phase: (
                [float(row["step"]) for row in rows if row["phase"] == phase and row.get(key) is not None],
                [float(row[key]) for row in rows if row["phase"] == phase and row.get(key) is not None],
            )
            for phase in dict.fromkeys(str(row["phase"]) for row in rows)
        }
        series = {phase: line for phase, line in series.items() if line[0]}
        if series:
            drawn.append(curves(series, x_label="step", y_label=key, title=title))
    return [Section(title="Training", body="".join(drawn))] if drawn else []


def _retrieval(run: Run, config: ReportConfig) -> Section:
    rows: list[dict[str, Any]] = []
    last: tuple[Splits, Scores] | None = None
    streams = ["+".join(run.views)] if len(run.views) > 1 else []
    for view in [*run.views, *streams]:
        wanted: list[tuple[str, str | None, Kind]] = [
            ("raw pixels", None, "pixels"),
            ("random weights", INITIAL, "backbone"),
            *((f"after {phase}", phase, "backbone") for phase in run.phases),
        ]
        for name, phase, kind in wanted:
            if view in run.views and phase not in (None, INITIAL) and run.trained_in(view, phase) != phase:
                continue  # this phase trained another view
            splits = collect(
                run, view, phase=phase, kind=kind, train_split=config.train_split, test_split=config.test_split
            )
            found = retrieval(splits.test, splits.train)
            accuracy = knn(splits.test, splits.train).figures["accuracy"]
            rows.append({"view": view, "features": name, **found.figures, "20-NN": accuracy})
            last = (splits, found)
    assert last is not None
    splits, found = last
    chance = float((splits.test.per_video().label[:, None] == splits.train.per_video().label).mean())
    words = (
        f"Test videos looking for videos of their class in the training split: {found.settings['queries']} queries, "
        f"{found.settings['gallery']} in the gallery, backbone features averaged over half-overlapping windows, "
        f"centred per split; views joined by + are two streams, their similarities added. "
        f"A blind guess has R@1 {chance:.3f}."
    )
    shown = heading(f"Confusion of the last row: {splits.of['view']}, nearest neighbour")
    return Section(
        title="Retrieval", body=paragraph(words) + table(rows) + shown + matrix(found.confusion.tolist(), found.classes)
    )


def _mining(run: Run, plan: CascadePlan, config: ReportConfig) -> Section:
    parts = [paragraph(f"The plan {plan} mines each phase's stored features among themselves, {config.train_split}.")]
    rows: list[dict[str, Any]] = []
    last: MiningScores | None = None
    for phase in run.phases:
        with features_of(run, phase) as store:
            last = mining(store, plan, where=f"split == {config.train_split!r}")
        rows.append({"phase": phase, **last.figures})
    assert last is not None
    alone = ", ".join(f"{name} {value:.3f}" for name, value in last.views.items())
    parts += [table(rows), paragraph(f"Precision of each view alone, and their agreement, at the end: {alone}.")]
    parts += [paragraph(warning) for warning in last.warnings]
    parts += [heading(f"By class, after {last.phase}"), table(last.per_class)]
    return Section(title="Mining", body="".join(parts))


def _cascades(run: Run, plan: CascadePlan, config: ReportConfig) -> Section:
    cache, clips = windows_of(run)
    with features_of(run, run.phases[-1]) as store:
        bank = store.bank(plan.views, where=f"split == {config.train_split!r}")
        places = store.rows_of(bank.clip_id)
        labels, starts = store.column("label")[places], store.column("start_frame")[places]
    videos = np.asarray(bank.host_video_id())
    bank.label = labels
    rows = sample_queries(labels, config.queries, config.seed)
    traces = trace_cascade(
        plan,
        {view: bank.keys[view] for view in plan.views},
        bank,
        videos,
        rows=rows,
        query_labels=labels.tolist() if (labels != "").any() else None,
    )
    shown = _Thumbnails(cache, clips, videos, starts)
    body = "".join(
        cascade_strip(
            trace,
            query_frames=shown.frames(trace.query, 5),
            query_name=f"{labels[trace.query]} (video {videos[trace.query]})",
            thumbnail=shown.middle,
            name=lambda slot: f"{labels[slot]} {videos[slot]}",
        )
        for trace in traces
    )
    told = (
        f"Each query's way through {plan}: the best survivors of every stage; green ones are of its class, clips "
        "without a label of none."
    )
    return Section(title="The cascade at work", body=paragraph(told) + body)


def sample_queries(labels: np.ndarray, count: int, seed: int) -> list[int]:
    """Rows to show: drawn one from each class in turn, so that no class is shown twice before all are once.

    Rows without a label are drawn where there is no other.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels[labels != ""]) if (labels != "").any() else np.unique(labels)
    piles = [rng.permutation(np.flatnonzero(labels == name)).tolist() for name in rng.permutation(classes)]
    chosen: list[int] = []
    while len(chosen) < count and any(piles):
        for pile in piles:
            if pile and len(chosen) < count:
                chosen.append(pile.pop())
    return chosen


class _Thumbnails:
    """Pictures of stored clips, from the cache of decoded frames."""

    def __init__(self, cache: ClipCache, clips: ClipTable, videos: I64, starts: I64) -> None:
        self.cache, self.length, self.videos, self.starts = cache, clips.clip_length, videos, starts
        self.view = "rgb" if "rgb" in cache.views else cache.views[0]

    def frames(self, slot: int, count: int) -> Sequence[Pixels]:
        row, start = int(self.videos[slot]), int(self.starts[slot])
        stored = self.cache.frames(self.view, row, start, self.length)
        return [_picture(stored[place]) for place in np.linspace(0, self.length - 1, count).astype(int)]

    def middle(self, slot: int) -> Pixels:
        row, start = int(self.videos[slot]), int(self.starts[slot])
        return _picture(self.cache.frames(self.view, row, start + self.length // 2, 1)[0])


def _picture(stored: np.ndarray) -> Pixels:
    """A frame as a picture: colours as they are; signed views around grey, two channels as red and green."""
    if stored.dtype == np.uint8:
        return stored
    shifted = (stored.astype(np.int16) + 128).astype(np.uint8)
    if shifted.shape[2] == 3:
        return shifted
    return np.dstack([shifted, np.full(shifted.shape[:2], 128, np.uint8)])


def _maps(run: Run, config: ReportConfig) -> Section:
    parts = []
    for view in run.views:
        splits = collect(run, view, train_split=config.train_split, test_split=config.test_split)
        videos = splits.test.per_video().normalised()
        parts.append(
            scatter(
                [(float(x), float(y)) for x, y in project(videos.values)],
                [videos.classes[each] for each in videos.label],
                x_label="first principal component",
                y_label="second",
                title=f"{view}: test videos, backbone features after {run.phases[-1]}, projected by PCA",
            )
        )
    return Section(title="Maps of the features", body="".join(parts))
