"""Decoding: a video file in, square RGB frames and their times out, whatever the file is like.

Everything a stored file may do wrong ends here in a :class:`VideoError` that names it, or in frames plus a note of
what was wrong (`Frames.problem`), so that a batch of videos goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput
from cascade_engine.video.reader import MAX_PIXELS as MAX_PIXELS
from cascade_engine.video.reader import Frame, VideoReader
from cascade_engine.video.reader import VideoInfo as VideoInfo


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The frames of a video or of a part of it, in the order shown."""

    path: Path
    rgb: npt.NDArray[np.uint8]  # (T, size, size, 3)
    time: npt.NDArray[np.float64]  # (T,) seconds since the video's first frame
    fps: float  # average
    motion: npt.NDArray[np.float32] | None = None  # (T, size, size, 2) pixels moved since the frame before
    problem: str | None = None  # what was wrong with the file, where something could be read nevertheless

    def __len__(self) -> int:
        """Number of frames T."""
        return len(self.rgb)

    def head(self, count: int) -> Frames:
        """The first `count` frames, sharing memory."""
        motion = None if self.motion is None else self.motion[:count]
        return replace(self, rgb=self.rgb[:count], time=self.time[:count], motion=motion)


def probe(path: str | PathLike[str], *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """What is in the file: packets are counted, the first frame is decoded, nothing more.

    Args:
        path: the video file.
        max_pixels: the largest coded picture that is decoded at all.

    Raises:
        VideoError: no such file, not a video, without a picture, or larger than `max_pixels`.
    """
    with VideoReader(path, size=None, max_pixels=max_pixels) as reader:
        return reader.info()


def read_frames(
    path: str | PathLike[str],
    *,
    size: int,
    start: float = 0.0,
    end: float | None = None,
    max_frames: int | None = None,
    motion: bool = False,
    max_pixels: int = MAX_PIXELS,
    threads: int = 1,
) -> Frames:
    """Decode a video, or the seconds [start, end) of it, to square RGB frames.

    The short side is scaled to `size`, the centre is cut out; rotation and non-square pixels are honoured; 10-bit and
    other formats become 8-bit RGB. Times come from the stream, so a variable frame rate is told truly.

    Args:
        path: the video file.
        size: side of the frames.
        start: seconds since the first frame.
        end: seconds, exclusive; None is the video's end.
        max_frames: at most so many frames.
        motion: also read the motion vectors of the stream.
        max_pixels: the largest coded picture that is decoded at all.
        threads: decoder threads.

    Returns:
        At least one frame. `problem` says what was wrong where the file is damaged or ends early.

    Raises:
        VideoError: nothing can be read: the message names the file and the reason.
        InvalidInput: a size under 1 or an interval that runs backwards.
    """
    if max_frames is not None and max_frames < 1:
        raise InvalidInput(f"max_frames: expected at least 1, got {max_frames}")
    with VideoReader(path, size=size, motion=motion, max_pixels=max_pixels, threads=threads) as reader:
        return gather(reader, list(islice(reader.frames(start, end), max_frames)))


def gather(reader: VideoReader, found: Sequence[Frame]) -> Frames:
    """Stack decoded pictures into one :class:`Frames`."""
    motion = np.stack([frame.motion for frame in found if frame.motion is not None]) if reader.motion else None
    return Frames(
        path=reader.path,
        rgb=np.stack([frame.rgb for frame in found]),
        time=np.array([frame.time for frame in found]),
        fps=reader.fps,
        motion=motion,
        problem=reader.problem,
    )
