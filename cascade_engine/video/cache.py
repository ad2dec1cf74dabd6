"""The clip cache: the views of many videos, extracted once, mapped from one file per view.

    folder/
      cache.json     options; a cache never mixes two sets of them
      rgb.bin ...    per view, the frames of all videos one after the other
      time.bin       the frames' seconds, float64
      journal.jsonl  one line per stored video: its key and where its frames lie
      index.json     the videos of the last finished build and where each is stored, or why it is not
      parts/         videos extracted but not yet appended

A line in the journal is written after the frames it speaks of are on disk. What lies beyond the last whole line is cut
off when a build starts, so a build killed at any point continues where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput, StoreError
from cascade_engine.video.extraction import Options, Task, extract_parts
from cascade_engine.video.index import VideoEntry, VideoIndex
from cascade_engine.video.journal import Journal, Stored, content_key
from cascade_engine.video.views import VIEWS, FlowMethod

Progress: TypeAlias = Callable[[int, int, Path], None]  # videos done, videos in all, the video just done


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Where a video of the index is stored."""

    offset: int = 0  # first frame, in the view files
    length: int = 0  # frames; 0 where the video failed
    fps: float = 0.0


class ClipCache:
    """The views of a :class:`VideoIndex`'s videos, ready to be cut; made by :meth:`build` or :meth:`open`.

    A row is the place of a video in `index`; a video that failed keeps its row, with no frames. It can be pickled:
    another process maps the same files.

    Attributes:
        folder: where it lies.
        options: size, views and flow method.
        index: the videos.
        failed: (path, reason) of each video of which nothing could be read, missing ones included.
        damaged: (path, problem) of each video of which only a part could be read.
    """

    def __init__(self, folder: Path, options: Options, state: Mapping[str, Any]) -> None:
        self.folder, self.options, self._state = folder, options, state
        entries = [{**entry, "path": Path(entry["path"])} for entry in state["entries"]]
        self.index = VideoIndex([VideoEntry(**entry) for entry in entries])
        self.failed = [(Path(path), str(reason)) for path, reason in state["failed"]]
        self.damaged = [(Path(path), str(problem)) for path, problem in state["damaged"]]
        self._rows = [_Row(**row) for row in state["rows"]]
        total = max((row.offset + row.length for row in self._rows), default=0)
        self._maps = {
            name: _mapped(folder / f"{name}.bin", _dtype(name), (total, options.size, options.size, channels(name)))
            for name in options.views
        }
        self._time = _mapped(folder / "time.bin", np.dtype("<f8"), (total,))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files anew, for these videos: the folder may have been built for others since."""
        return (ClipCache, (self.folder, self.options, self._state))

    def __len__(self) -> int:
        """Number of rows: all videos of the index, failed ones included."""
        return len(self._rows)

    @property
    def views(self) -> tuple[str, ...]:
        """The views held."""
        return self.options.views

    @property
    def size(self) -> int:
        """Side of the frames."""
        return self.options.size

    def length(self, row: int) -> int:
        """Frames of a video; 0 where it failed."""
        return self._rows[row].length

    def fps(self, row: int) -> float:
        """Average frames per second of a video; 0 where it failed."""
        return self._rows[row].fps

    def times(self, row: int) -> npt.NDArray[np.float64]:
        """Seconds of a video's frames, counted from the beginning of its file, (T,); a mapped, read-only array."""
        place = self._rows[row]
        return self._time[place.offset : place.offset + place.length]

    def frames(self, view: str, row: int, start: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Frames start, start + 1, ... of a video in one view, (length, H, W, C) uint8 or int8; mapped, not copied.

        Raises:
            InvalidInput: a view the cache does not hold, or frames the video does not have.
        """
        if view not in self._maps:
            raise InvalidInput(f"view: expected one of {', '.join(self._maps)}, got {view!r}")
        place = self._rows[row]
        length = place.length - start if length is None else length
        if start < 0 or length < 0 or start + length > place.length:
            raise InvalidInput(
                f"frames: {self.index[row].path} has {place.length}, asked for {start} to {start + length}"
            )
        first = place.offset + start
        return self._maps[view][first : first + length]

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> ClipCache:
        """Map a finished cache, read-only.

        Raises:
            StoreError: no cache there, one never finished, or one whose files cannot be read or are shorter than it
                says.
        """
        folder = Path(folder)
        options = Options.read(folder)
        if options is None:
            raise StoreError(f"{folder}: expected a clip cache, found none")
        file = folder / "index.json"
        try:
            return cls(folder, options, json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise StoreError(f"{folder}: this clip cache was never finished: build it again, it continues") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{file}: expected the videos of a finished build ({error!r}): build it again, it continues"
            ) from None

    @classmethod
    def build(
        cls,
        index: VideoIndex,
        views: Sequence[str],
        size: int,
        folder: str | PathLike[str],
        *,
        flow: FlowMethod = "dis",
        workers: int = 1,
        progress: Progress | None = None,
    ) -> ClipCache:
        """Extract what the folder does not hold yet, and open it.

        Videos are known by their content, so a renamed one is not extracted again. A video that cannot be read is
        listed in `failed` and the rest goes on. The bits do not depend on `workers`.

        Args:
            index: the videos.
            views: names among `VIEWS`.
            size: side of the frames.
            folder: made if need be.
            flow: how optical flow is computed.
            workers: processes that extract; with more than one, a script needs the usual
                ``if __name__ == "__main__"``.
            progress: called after each video with (videos done, videos in all, its path).

        Raises:
            InvalidInput: an unknown view or flow method, a size or number of workers under 1, a size too small for the
                flow method, or a folder that holds a cache with other options.
            StoreError: another process is building there, the disk is full, or what is stored cannot be read.
        """
        if workers < 1:
            raise InvalidInput(f"workers: expected at least 1, got {workers}")
        folder = Path(folder)
        options = Options(size=size, views=tuple(views), flow=flow)
        options.check()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with Journal(folder, _sizes(options)) as journal:
                options.settle(folder)  # before anything is cut off: with other options, all would be
                journal.recover()
                state = _fill(index, options, journal, workers, progress)
                _replace(folder / "index.json", json.dumps(state))
        except OSError as error:
            raise StoreError(f"{folder}: {error.strerror or error}; what is stored is kept, build again") from error
        return cls.open(folder)


def channels(view: str) -> int:
    """Channels of a view's pictures."""
    return VIEWS[view].channels


def _dtype(view: str) -> np.dtype[Any]:
    return np.dtype(np.int8 if VIEWS[view].signed else np.uint8)


def _sizes(options: Options) -> dict[str, int]:
    """Bytes of one frame in each file."""
    area = options.size * options.size
    return {**{name: area * channels(name) for name in options.views}, "time": 8}


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if shape[0] == 0:
        return np.empty(shape, dtype)
    try:
        return np.memmap(path, dtype, mode="r", shape=shape)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: expected {shape} {dtype} ({error})") from None


def _replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _fill(
    index: VideoIndex, options: Options, journal: Journal, workers: int, progress: Progress | None
) -> dict[str, Any]:
    """Extract and append what is missing; what index.json says."""
    failed: dict[int, str] = {}
    keys: list[str | None] = []
    for entry in index:
        try:
            keys.append(content_key(entry, journal))
        except OSError as error:
            keys.append(None)
            failed[entry.video_id] = error.strerror or str(error)
    todo: dict[str, VideoEntry] = {}
    for key, entry in zip(keys, index, strict=True):
        if key is not None and key not in journal.stored:
            todo.setdefault(key, entry)
    reasons: dict[str, str] = {}
    done = len(index) - len(todo)
    if progress is not None and index.entries:
        progress(done, len(index), index[-1].path)
    tasks = [Task(key=key, entry=entry, options=options, folder=journal.parts) for key, entry in todo.items()]
    for part in extract_parts(tasks, workers):
        if part.reason is None:
            journal.append(part, todo[part.key])
        else:
            reasons[part.key] = part.reason
        done += 1
        if progress is not None:
            progress(done, len(index), todo[part.key].path)
    for key, entry in zip(keys, index, strict=True):
        if key in reasons:
            failed[entry.video_id] = reasons[str(key)]
    return _state(index, keys, failed, journal.stored)


def _state(
    index: VideoIndex, keys: list[str | None], failed: dict[int, str], stored: Mapping[str, Stored]
) -> dict[str, Any]:
    rows = [stored.get(key) if key is not None else None for key in keys]
    where = [{"offset": row.offset, "length": row.length, "fps": row.fps} if row else {} for row in rows]
    absent = [(str(path), "no such file") for path in index.missing]
    return {
        "entries": [{**asdict(entry), "path": str(entry.path.absolute())} for entry in index],
        "rows": where,
        "failed": absent + [(str(index[row].path), reason) for row, reason in sorted(failed.items())],
        "damaged": [
            (str(entry.path), row.problem) for entry, row in zip(index, rows, strict=True) if row and row.problem
        ],
    }
