"""Clips: short runs of frames, cut from cached videos at fixed starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput
from cascade_engine.video.cache import ClipCache


def windows(length: int, clip_length: int, stride: int | None = None) -> npt.NDArray[np.int64]:
    """Start frames of the windows that cover a video: `stride` apart, and one that ends with the last frame.

    Args:
        length: frames of the video.
        clip_length: frames of a window.
        stride: frames from start to start; half a window by default (half-overlapping).

    Returns:
        (n,) ascending starts; none for a video shorter than a window.

    Raises:
        InvalidInput: a length, window or stride out of range.

    Source: Han et al., NeurIPS 2020, section 4 (ten half-overlapping clips).
    """
    stride = max(1, clip_length // 2) if stride is None else stride
    if length < 0 or clip_length < 1 or stride < 1:
        raise InvalidInput(f"windows: expected lengths of at least 1, got {length}, {clip_length}, {stride}")
    if length < clip_length:
        return np.empty(0, np.int64)
    starts = np.arange(0, length - clip_length + 1, stride, dtype=np.int64)
    if starts[-1] != length - clip_length:
        starts = np.append(starts, length - clip_length)
    return starts


@dataclass(frozen=True, kw_only=True)
class ClipTable:
    """Clips cut from a cache, one row each, by video and time."""

    clip_length: int
    clip_id: npt.NDArray[np.int64]  # (N,) 0, 1, ...
    row: npt.NDArray[np.int64]  # (N,) the cache's video row
    video_id: npt.NDArray[np.int64]  # (N,)
    start_frame: npt.NDArray[np.int64]  # (N,) within the cached video
    start: npt.NDArray[np.float64]  # (N,) seconds in the video file
    end: npt.NDArray[np.float64]  # (N,) seconds, exclusive
    label: npt.NDArray[Any]  # (N,) str, "" where unknown
    split: npt.NDArray[Any]  # (N,) str, "" where none
    group: npt.NDArray[Any]  # (N,) str, "" where none

    def __len__(self) -> int:
        """Number of clips N."""
        return len(self.clip_id)

    def of_split(self, name: str) -> npt.NDArray[np.int64]:
        """Places of the clips of one split."""
        return np.flatnonzero(self.split == name)


def cut(cache: ClipCache, clip_length: int, step: int | None = None) -> ClipTable:
    """Cut every video of a cache into windows; videos that failed or are shorter than a clip give none.

    Args:
        cache: the videos.
        clip_length: frames of a clip.
        step: frames from start to start; half a clip by default.

    Raises:
        InvalidInput: a length or step under 1.
    """
    rows, starts = [], []
    for row in range(len(cache)):
        found = windows(cache.length(row), clip_length, step)
        rows.append(np.full(len(found), row, np.int64))
        starts.append(found)
    row_of = np.concatenate(rows) if rows else np.empty(0, np.int64)
    start_frame = np.concatenate(starts) if starts else np.empty(0, np.int64)
    times = [cache.times(row) for row in range(len(cache))]
    pairs = list(zip(row_of.tolist(), start_frame.tolist(), strict=True))
    last = [times[row][start + clip_length - 1] + 1 / cache.fps(row) for row, start in pairs]
    entries = [cache.index[row] for row in row_of.tolist()]
    return ClipTable(
        clip_length=clip_length,
        clip_id=np.arange(len(row_of), dtype=np.int64),
        row=row_of,
        video_id=np.array([entry.video_id for entry in entries], np.int64),
        start_frame=start_frame,
        start=np.array([times[row][start] for row, start in pairs], np.float64),
        end=np.array(last, np.float64),
        label=np.array([entry.label or "" for entry in entries], dtype=np.str_),
        split=np.array([entry.split or "" for entry in entries], dtype=np.str_),
        group=np.array([entry.group or "" for entry in entries], dtype=np.str_),
    )
