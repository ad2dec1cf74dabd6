"""What the demo measures: retrieval of held-out videos and precision of mined positives, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.bank import Bank
from cascade_engine.evaluation.features import FeatureSet
from cascade_engine.evaluation.neighbours import retrieval
from cascade_engine.mining import mine_self
from cascade_engine.plan import CascadePlan
from cascade_engine.store import FeatureStore
from cascade_engine.tensor import Host
from cascade_engine.training.run import BACKBONE, INITIAL, Run
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.views import to_float

RAW = "raw pixels"
RANDOM = "random weights"
RAW_SIDE = 12  # raw pixels are compared as frames of this side
PLANS = ("coclr", "cpr", "sum")
TRAIN, TEST = "train", "test"


@dataclass(frozen=True, kw_only=True)
class Row:
    """How well some features find videos of the same class.

    Args:
        features: what was compared: raw pixels, random weights, or the encoders after a phase.
        view: of which view.
        first: R@1 of held-out videos among the training videos.
        fifth: R@5.
        mining: plan to the precision of the positives it mines for the training clips of this view.
    """

    features: str
    view: str
    first: float
    fifth: float
    mining: dict[str, float]


def measure(run: Run, cache: ClipCache) -> list[Row]:
    """A row for raw pixels, random weights and each phase, of every view.

    Random weights are those the run began with.
    """
    with FeatureStore.open(run.store_path, phase=INITIAL) as store:
        clips = Clips.of(store)
    span = (run.config.clip.frames - 1) * run.config.clip.stride + 1
    raw = {view: raw_pixels(cache, view, clips, span) for view in run.views}
    rows = [_row(RAW, view, raw[view], raw, clips) for view in run.views]
    for phase in (INITIAL, *run.phases):
        with FeatureStore.open(run.store_path, phase=phase) as store:
            embedded = {view: np.asarray(store.features(view)) for view in run.views}
            pooled = {view: np.asarray(store.features(view + BACKBONE)) for view in run.views}
        views = run.views if phase == INITIAL else [each.train for each in run.config.phase if each.name == phase]
        name = RANDOM if phase == INITIAL else phase
        rows += [_row(name, view, pooled[view], embedded, clips) for view in views]
    return rows


@dataclass(frozen=True, kw_only=True)
class Clips:
    """The clips of a store's phase: whose they are, and where in the cache."""

    video: npt.NDArray[np.int64]  # (N,)
    start: npt.NDArray[np.int64]  # (N,) frames
    label: npt.NDArray[np.int64]  # (N,) indices into `classes`
    split: npt.NDArray[np.str_]  # (N,)
    classes: tuple[str, ...]

    @classmethod
    def of(cls, store: FeatureStore) -> Clips:
        """Those of the phase that the store is opened at."""
        names = np.asarray(store.column("label")[:], np.str_)
        classes, label = np.unique(names, return_inverse=True)
        return cls(
            video=np.asarray(store.column("video_id")[:], np.int64),
            start=np.asarray(store.column("start_frame")[:], np.int64),
            label=label.astype(np.int64),
            split=np.asarray(store.column("split")[:], np.str_),
            classes=tuple(classes.tolist()),
        )

    def features(self, values: Host, split: str) -> FeatureSet:
        """Those of one split, with their classes."""
        rows = self.split == split
        return FeatureSet(
            values=values[rows], label=self.label[rows], video_id=self.video[rows], classes=self.classes
        )


def raw_pixels(cache: ClipCache, view: str, clips: Clips, span: int) -> Host:
    """Clips as small frames side by side (N, T * 12 * 12 * C) float32: what features must beat to be worth it."""
    rows = []
    for video, start in zip(clips.video.tolist(), clips.start.tolist(), strict=True):
        frames = np.asarray(to_float(view, np.asarray(cache.frames(view, video, start, span))), np.float32)
        small = [cv2.resize(frame, (RAW_SIDE, RAW_SIDE), interpolation=cv2.INTER_AREA) for frame in frames]
        rows.append(np.stack(small).ravel())
    return np.stack(rows)


def _row(name: str, view: str, compared: Host, mined: dict[str, Host], clips: Clips) -> Row:
    found = retrieval(clips.features(compared, TEST), clips.features(compared, TRAIN), ks=(1, 5)).figures
    return Row(
        features=name, view=view, first=found["R@1"], fifth=found["R@5"], mining=mining_precision(view, mined, clips)
    )


def mining_precision(view: str, features: dict[str, Host], clips: Clips, k: int = 5) -> dict[str, float]:
    """Plan to the share of mined positives that are of their query's class, with `view` as the trainee.

    Every training clip is a query among all of them, clips of its own video excluded. Raw pixels have no unit
    length, so features are compared by their cosine.
    """
    rows = clips.split == TRAIN
    others = [each for each in features if each != view]
    if not others:
        return {}
    bank = Bank({name: values[rows] for name, values in features.items()}, clips.video[rows], metric="cosine")
    label = clips.label[rows]
    found = {}
    for name in PLANS:
        plan = CascadePlan.preset(name, oracle=others[0], trainee=view, k=k)
        index = np.asarray(mine_self(plan, bank).index)
        there = index >= 0
        found[name] = float((label[index] == label[:, None])[there].mean()) if there.any() else 0.0
    return found


def remarks(rows: Sequence[Row]) -> list[str]:
    """Where the last phase of a view does not beat raw pixels, random weights or its first phase, said plainly."""
    said = []
    for view in dict.fromkeys(row.view for row in rows):
        mine = [row for row in rows if row.view == view]
        last = mine[-1]
        for other in (mine[0], mine[1], mine[2]):
            if other is last or last.first > other.first:
                continue
            verb = "wins against" if other.first > last.first else "draws with"
            said.append(
                f"{view}: {other.features} (R@1 {other.first:.3f}) {verb} {last.features} (R@1 {last.first:.3f})."
            )
    return said or ["In this run the last phase of each view beats raw pixels, random weights and InfoNCE in R@1."]
