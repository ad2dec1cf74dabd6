"""Features of new videos into a store, and the stored clips nearest to a video."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade_engine.deployment.artefact import F32, Model
from cascade_engine.deployment.predict import BATCH, Result, predict
from cascade_engine.errors import InvalidInput, SchemaMismatch, VideoError
from cascade_engine.mining import mine
from cascade_engine.plan import CascadePlan
from cascade_engine.store import FeatureStore
from cascade_engine.store.cleaning import made_to_fill

PHASE = "main"
COLUMNS = {"path": "str"}


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What came of one video: clips added, or why none."""

    path: Path
    clips: int
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A stored clip that is near to a video.

    Args:
        path: of the stored clip's video.
        video_id: of it.
        clip_id: the stored clip.
        start: seconds in that video.
        end: seconds, exclusive.
        similarity: the plan's last score; for one view the cosine.
        query_start: seconds of the window that found it.
        query_end: seconds, exclusive.
    """

    path: str
    video_id: int
    clip_id: int
    start: float
    end: float
    similarity: float
    query_start: float
    query_end: float


def stored_view(model: Model, view: str) -> str:
    """What a view's features are called in a store: as in a run's own store, where backbones have a suffix."""
    return f"{view}_backbone" if model.signature.features == "backbone" else view


def video_id_of(path: Path) -> int:
    """A number for a video that depends on its content alone: a copy under another name is the same video.

    Raises:
        VideoError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from None
    return int.from_bytes(digest, "little") >> 1  # a store's ids are signed


def open_store(path: str | Path, model: Model, *, phase: str = PHASE) -> AbstractContextManager[FeatureStore]:
    """The store opened to append a model's features; made where there is none, and removed where no clip gets in.

    A phase is bound to the model that it was made for: one left by a typing error would refuse all others.

    Raises:
        SchemaMismatch: the phase holds another model's features, or other views.
        StoreError: it is sealed or locked.
    """
    views = {stored_view(model, view.name): view.dim for view in model.signature.views}
    if not Path(path).exists():
        return made_to_fill(
            FeatureStore.create(path, views, columns=COLUMNS, phase=phase, durability="group", model=model.fingerprint)
        )
    with FeatureStore.open(path) as found:
        if phase not in found.phases:
            return made_to_fill(
                found.new_phase(
                    phase, views, columns=COLUMNS, durability="group", model=model.fingerprint, dtype="float32"
                )
            )
    store = FeatureStore.open(path, mode="a", phase=phase, durability="group")
    try:
        _require_same_model(store, model, phase)
    except SchemaMismatch:
        store.close()
        raise
    return store


def _require_same_model(store: FeatureStore, model: Model, phase: str) -> None:
    written = store.model(phase)
    if written != model.fingerprint:
        raise SchemaMismatch(
            f"{store.path}: phase {phase!r} holds features of the model {written}, {model.path} is "
            f"{model.fingerprint}: similarities between them mean nothing; choose another phase"
        )


def embed(
    model: Model,
    videos: Sequence[Path],
    store: FeatureStore,
    *,
    step: int | None = None,
    batch: int = BATCH,
    progress: Callable[[Embedded], None] | None = None,
) -> list[Embedded]:
    """Put the features of videos' windows into a store; a video that is there already adds nothing.

    Args:
        model: an exported model.
        videos: files; one that cannot be read is told, as are its copies, and the others go on.
        store: from `open_store`.
        step: frames from window to window; half a window by default.
        batch: windows per call of the model.
        progress: called after each video.

    Raises:
        StoreError: the disk is full or refuses.
    """
    known = set(store.column("video_id").tolist())
    upcoming = int(store.column("clip_id").max(initial=-1)) + 1
    told: list[Embedded] = []

    def note(path: Path, clips: int, problem: str | None) -> None:
        told.append(Embedded(path=path, clips=clips, problem=problem))
        if progress is not None:
            progress(told[-1])

    copies: dict[int, list[Path]] = {}
    for path in dict.fromkeys(videos):
        try:
            video = video_id_of(path)
        except VideoError as error:
            note(path, 0, str(error))
            continue
        if video in known:
            note(path, 0, None)
        else:
            copies.setdefault(video, []).append(path)
    firsts = [paths[0] for paths in copies.values()]
    for video, result in zip(copies, predict(model, firsts, step=step, batch=batch), strict=True):
        if not result.failed:
            count = len(result.windows)
            store.append(
                _features(model, result),
                clip_id=np.arange(upcoming, upcoming + count),
                video_id=np.full(count, video),
                start=np.array([window.start for window in result.windows]),
                end=np.array([window.end for window in result.windows]),
                path=_text(result.path.absolute()),
            )
            upcoming += count
        note(result.path, len(result.windows), result.problem)
        for copy in copies[video][1:]:
            note(copy, 0, f"{copy}: a copy of {result.problem}" if result.failed else None)
    store.flush()
    return told


def _text(path: Path) -> str:
    """The path in a store's column, which is Unicode as names of files need not be."""
    return os.fsencode(path).decode("utf-8", "replace")


def _features(model: Model, result: Result) -> dict[str, F32]:
    return {
        stored_view(model, view.name): np.stack([window.features[view.name] for window in result.windows])
        for view in model.signature.views
    }


def default_plan(model: Model, k: int) -> CascadePlan:
    """The k nearest by the model's view, or by the sum of its views' similarities."""
    names = [stored_view(model, view.name) for view in model.signature.views]
    score = names[0] if len(names) == 1 else f"sum({','.join(names)})"
    return CascadePlan.parse(f"{score}:{k}")


def query(
    model: Model,
    store: FeatureStore,
    video: Path,
    *,
    k: int = 10,
    plan: CascadePlan | None = None,
    where: str | None = None,
    others: bool = False,
    step: int | None = None,
) -> list[Hit]:
    """The stored clips nearest to any window of a video, each once, best first.

    Args:
        model: the one that the stored features are of.
        store: at the phase to be searched.
        video: the file that asks.
        k: clips.
        plan: over the store's views; `default_plan` by default.
        where: which clips are searched.
        others: leave out the clips of this very video.
        step: frames from window to window of `video`; half a window by default.

    Raises:
        VideoError: the video cannot be read.
        SchemaMismatch: the stored features are another model's.
        InvalidInput: k under 1, or a plan or condition that does not fit the store.
    """
    if k < 1:
        raise InvalidInput(f"k: expected at least 1, got {k}")
    _require_same_model(store, model, store.phase)
    result = next(predict(model, [video], step=step))
    if result.failed:
        raise VideoError(str(result.problem))
    stages = plan or default_plan(model, k)
    bank = store.bank(stages.views, where=where, metric="cosine")
    exclude = np.full(len(result.windows), video_id_of(video)) if others else None
    found = mine(stages, _features(model, result), bank, exclude)
    best: dict[int, tuple[float, int]] = {}
    for window, (slots, similarities) in enumerate(zip(found.index, found.similarity, strict=True)):
        for slot, similarity in zip(slots.tolist(), similarities.tolist(), strict=True):
            if slot >= 0 and (slot not in best or similarity > best[slot][0]):
                best[slot] = (similarity, window)
    chosen = sorted(best, key=lambda slot: (-best[slot][0], slot))[:k]
    rows = store.rows_of(np.asarray(bank.clip_id)[chosen]) if chosen else np.empty(0, np.int64)
    columns = {name: store.column(name)[rows] for name in ("video_id", "clip_id", "start", "end")}
    paths = store.column("path")[rows] if "path" in store.columns else np.full(len(rows), "")
    return [
        Hit(
            path=str(paths[place]),
            video_id=int(columns["video_id"][place]),
            clip_id=int(columns["clip_id"][place]),
            start=float(columns["start"][place]),
            end=float(columns["end"][place]),
            similarity=best[slot][0],
            query_start=result.windows[best[slot][1]].start,
            query_end=result.windows[best[slot][1]].end,
        )
        for place, slot in enumerate(chosen)
    ]
