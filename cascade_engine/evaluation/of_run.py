"""The arrays that the protocols need, collected from a run: its features, random weights, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import cv2
import numpy as np
import torch

from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import F32, I64, FeatureSet, side_by_side
from cascade_engine.store import FeatureStore
from cascade_engine.training.extraction import encode
from cascade_engine.training.run import BACKBONE, INITIAL, Run
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.clips import ClipTable, cut

Kind: TypeAlias = Literal["backbone", "projection", "pixels"]

_PIXELS = 16  # side that raw pixels are scaled to: 16 x 16 x frames x channels values a clip
_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The features of a run's training and test windows.

    Args:
        train: the gallery, and what probes learn from.
        test: what is asked.
        of: what they are, in words: view, phase, kind.
    """

    train: FeatureSet
    test: FeatureSet
    of: dict[str, str]


def collect(
    run: Run,
    view: str,
    *,
    phase: str | None = None,
    kind: Kind = "backbone",
    train_split: str = "train",
    test_split: str = "test",
) -> Splits:
    """The features of half-overlapping windows of a run's labelled videos, by split.

    Args:
        run: the run.
        view: one of its views, or several joined by ``+``: two streams, a row for each video (see `side_by_side`).
        phase: whose features; the last one done by default; ``"initial"``: random weights, as before training. None
            with pixels.
        kind: the backbone's features, the projection that mining compares, or the pixels themselves, scaled down.
        train_split: the split that is searched and learnt from.
        test_split: the split that is asked; it may be the same one.

    Raises:
        InvalidInput: no such view, phase or split, a split without labelled windows, or a cache of other videos.
        StoreError: the run's store or cache cannot be read.
    """
    if "+" in view:
        streams = [
            collect(run, each, phase=phase, kind=kind, train_split=train_split, test_split=test_split)
            for each in view.split("+")
        ]
        return Splits(
            train=side_by_side([each.train for each in streams]),
            test=side_by_side([each.test for each in streams]),
            of={**streams[0].of, "view": view},
        )
    if view not in run.views:
        raise InvalidInput(f"view: expected one of {', '.join(run.views)}, got {view!r}")
    if kind not in get_args(Kind):
        raise InvalidInput(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
    if kind == "pixels" and phase is not None:
        raise InvalidInput(f"phase: expected none with pixels, which no phase changes, got {phase!r}")
    if phase is None:
        if not run.phases:
            raise InvalidInput(f"run: expected a phase that is done, {run.folder} has none")
        phase = run.phases[-1]
    if kind != "pixels" and phase != INITIAL:
        values, label, split, video = _stored(run, view, phase, kind)
        sets = _by_split(lambda rows: values[rows], label, split, video, (train_split, test_split))
    else:
        cache, table = windows_of(run)
        encoder = None if kind == "pixels" else run.encoder(view, INITIAL)

        def computed(rows: I64) -> F32:
            if encoder is None:
                return _pixels(cache, table, view, rows, run.config.clip.stride)
            name = view + BACKBONE if kind == "backbone" else view
            parts = [
                encode(encoder, view, cache, table, rows[first : first + _CHUNK], run.config.clip)[name]
                for first in range(0, len(rows), _CHUNK)
            ]
            return torch.cat(parts).numpy()

        sets = _by_split(computed, table.label, table.split, table.video_id, (train_split, test_split))
    told = {"view": view, "phase": phase if kind != "pixels" else "-", "kind": kind}
    return Splits(train=sets[0], test=sets[1], of={**told, "train_split": train_split, "test_split": test_split})


def features_of(run: Run, phase: str) -> FeatureStore:
    """The run's store, opened at a phase.

    Raises:
        InvalidInput: the phase is still being written: a part of its videos would be judged.
        StoreError: there is no such phase.
    """
    store = FeatureStore.open(run.store_path, phase=phase)
    if not store.sealed:
        rows = store.rows
        store.close()
        raise InvalidInput(f"phase: the features of {phase!r} are still being written ({rows} clips so far)")
    return store


def windows_of(run: Run) -> tuple[ClipCache, ClipTable]:
    """The run's cache and the half-overlapping windows that its features are of.

    Raises:
        InvalidInput: the cache was built for other videos since, or with frames of another size.
        StoreError: it cannot be read.
    """
    clip = run.config.clip
    span = (clip.frames - 1) * clip.stride + 1
    cache = ClipCache.open(run.cache_path)
    other = run.index.difference(cache.index)
    if other is not None:
        raise InvalidInput(
            f"cache: {cache.folder} was built for other videos than {run.folder} was trained on: {other}; build it for "
            "the run's again, as cascade train --resume does by its config's source (what it kept is not decoded anew)"
        )
    if cache.size != run.config.data.size:
        raise InvalidInput(f"cache: expected frames of side {run.config.data.size}, {cache.folder} has {cache.size}")
    return cache, cut(cache, span, max(1, span // 2))


def _stored(run: Run, view: str, phase: str, kind: Kind) -> tuple[F32, np.ndarray, np.ndarray, I64]:
    """All rows of a phase of the run's store: features (mapped), labels, splits, video ids."""
    run.phase_path(phase)  # refuses a name that the run does not have
    with features_of(run, phase) as store:
        name = view + BACKBONE if kind == "backbone" else view
        return store.features(name), store.column("label"), store.column("split"), store.column("video_id")


def _by_split(
    features: Callable[[I64], F32], label: np.ndarray, split: np.ndarray, video: I64, names: tuple[str, str]
) -> list[FeatureSet]:
    """The labelled rows of each split; classes are those of the first one, and of the second where it has others."""
    chosen = []
    for name in names:
        rows = np.flatnonzero((split == name) & (label != ""))
        if not len(rows):
            found = ", ".join(sorted({str(each) for each in split if each})) or "none"
            raise InvalidInput(f"split: expected labelled windows in {name!r}, found none (splits: {found})")
        chosen.append(rows)
    classes = tuple(sorted({str(each) for rows in chosen for each in label[rows]}))
    number = {name: place for place, name in enumerate(classes)}
    return [
        FeatureSet(
            values=np.array(features(rows), np.float32),
            label=np.array([number[str(each)] for each in label[rows]], np.int64),
            video_id=video[rows],
            classes=classes,
        )
        for rows in chosen
    ]


def _pixels(cache: ClipCache, table: ClipTable, view: str, rows: I64, stride: int) -> F32:
    """Windows as plain numbers: each frame scaled down to 16 x 16, all of them in a row."""
    out = []
    for row in rows.tolist():
        frames = cache.frames(view, int(table.row[row]), int(table.start_frame[row]), table.clip_length)[::stride]
        small = [
            cv2.resize(each.astype(np.float32), (_PIXELS, _PIXELS), interpolation=cv2.INTER_AREA) for each in frames
        ]
        out.append(np.stack(small).ravel())
    return np.stack(out)
