"""Labels and features for many videos: windows of all of them share batches, a bad file never stops the others."""

from __future__ import annotations

import glob
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cascade_engine.deployment.artefact import F32, Model
from cascade_engine.deployment.windows import UNLIMITED, Limits, Window, sliding_windows
from cascade_engine.errors import InvalidInput, VideoError
from cascade_engine.video.index import EXTENSIONS, VideoEntry

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class WindowScores:
    """What the model said of one window."""

    start: float  # seconds
    end: float  # seconds, exclusive
    probabilities: F32 | None  # (labels,)
    features: dict[str, F32]  # view to (D,)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one video.

    Args:
        path: as given or found.
        labels: the model's.
        windows: in the order of time; none where the video failed.
        problem: why it failed, or what was wrong with a file that was read nevertheless; None where all was well.
    """

    path: Path
    labels: tuple[str, ...]
    windows: tuple[WindowScores, ...]
    problem: str | None

    @property
    def failed(self) -> bool:
        """Whether nothing could be said of the video."""
        return not self.windows

    @property
    def probabilities(self) -> F32 | None:
        """The mean over the windows (labels,), None where it failed or the model has no labels."""
        parts = [each.probabilities for each in self.windows if each.probabilities is not None]
        return np.stack(parts).mean(axis=0, dtype=np.float64).astype(np.float32) if parts else None

    def best(self, count: int = 1) -> list[tuple[str, float]]:
        """The most probable labels with their probabilities, best first."""
        return _best(self.probabilities, self.labels, count)

    def to_json(self, *, top: int = 5, timeline: bool = False) -> dict[str, Any]:
        """Plain values, for a line of JSON."""
        row: dict[str, Any] = {"path": str(self.path), "ok": self.problem is None}
        if self.problem is not None:
            row["problem"] = self.problem
        found = self.best(top)
        if found:
            row |= {"label": found[0][0], "score": found[0][1], "windows": len(self.windows)}
            row["top"] = [{"label": label, "score": score} for label, score in found]
        if timeline and found:
            row["timeline"] = [
                {"start": round(each.start, 3), "end": round(each.end, 3), "label": label, "score": score}
                for each in self.windows
                for label, score in _best(each.probabilities, self.labels, 1)
            ]
        return row


def _best(probabilities: F32 | None, labels: Sequence[str], count: int) -> list[tuple[str, float]]:
    if probabilities is None:
        return []
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(labels[place], float(probabilities[place])) for place in order]


def find_videos(patterns: Iterable[str | Path]) -> list[Path]:
    """The videos that files, folders (searched to the bottom) and glob patterns name, each once, in order.

    A name that is no pattern is kept though no such file exists: it is an input that fails, not one to forget.

    Raises:
        InvalidInput: a folder or pattern without a video, so that a typo is not taken for an empty batch.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in EXTENSIONS and each.is_file())
        elif not path.exists() and glob.has_magic(str(pattern)):
            inside = sorted(Path(each) for each in glob.glob(str(pattern), recursive=True))  # noqa: PTH207
        else:
            inside = [path]
        if not inside:
            raise InvalidInput(f"videos: expected videos in {pattern}, found none")
        found.update(dict.fromkeys(inside))
    return list(found)


@dataclass(kw_only=True)
class _Open:
    """A video whose windows are on their way."""

    path: Path
    scores: list[WindowScores] = field(default_factory=list)
    waiting: int = 0
    read: bool = False
    problem: str | None = None


def predict(
    model: Model,
    videos: Iterable[Path | VideoEntry],
    *,
    batch: int = BATCH,
    step: int | None = None,
    limits: Limits = UNLIMITED,
) -> Iterator[Result]:
    """Run a model over videos; results come in the order given, one for each video.

    Args:
        model: an exported model.
        videos: files, or entries of an index: of a part of a file, that part alone is read.
        batch: windows per call, of one or several videos; changes no result beyond float rounding.
        step: frames from window to window; half a window by default.
        limits: larger videos fail.

    Raises:
        InvalidInput: a batch or step under 1.
    """
    if batch < 1 or (step is not None and step < 1):
        raise InvalidInput(f"batch, step: expected at least 1, got {batch}, {step}")
    open_videos: deque[_Open] = deque()
    pending: list[tuple[_Open, Window]] = []
    for each in videos:
        entry = each if isinstance(each, VideoEntry) else VideoEntry(path=each, video_id=0)
        video = _Open(path=entry.path)
        open_videos.append(video)
        try:
            for window in sliding_windows(
                entry.path, model.signature, step=step, start=entry.start, end=entry.end, limits=limits
            ):
                video.waiting += 1
                video.problem = None if window.problem is None else f"{entry.path}: {window.problem}"
                pending.append((video, window))
                if len(pending) == batch:
                    _score(model, pending)
        except VideoError as error:
            video.problem = str(error)
            pending = [one for one in pending if one[0] is not video]
            video.scores, video.waiting = [], 0
        video.read = True
        yield from _finished(open_videos, model)
    if pending:
        _score(model, pending)
    yield from _finished(open_videos, model)


def _score(model: Model, pending: list[tuple[_Open, Window]]) -> None:
    """Run the waiting windows as one batch and hand out what came; leaves the list empty."""
    views = [view.name for view in model.signature.views]
    output = model.run({view: np.stack([window.pixels[view] for _, window in pending]) for view in views})
    for place, (video, window) in enumerate(pending):
        video.waiting -= 1
        video.scores.append(
            WindowScores(
                start=window.start,
                end=window.end,
                probabilities=None if output.probabilities is None else output.probabilities[place],
                features={view: output.features[view][place] for view in views},
            )
        )
    pending.clear()


def _finished(open_videos: deque[_Open], model: Model) -> Iterator[Result]:
    while open_videos and open_videos[0].read and not open_videos[0].waiting:
        video = open_videos.popleft()
        yield Result(
            path=video.path,
            labels=model.signature.labels,
            windows=tuple(video.scores),
            problem=video.problem,
        )
