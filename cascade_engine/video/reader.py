"""An open video file: packets in, frames out, one at a time, and a note of what was wrong with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput, VideoError
from cascade_engine.video.geometry import centre_cut, quarter_turns, scaled_size, turned_field
from cascade_engine.video.motion import motion_field

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

log = logging.getLogger(__name__)

MAX_PIXELS = 8192 * 4352  # of one picture, as coded: 8K television and the common 8K cameras pass
MAX_ASPECT = 16.0  # long to short side of a picture
# Containers that hold their own pictures: none that names other files (playlists, image sequences, concatenations).
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,obu,ivf,flv,asf,ogg,gif,apng,"
    "mxf,rm,dv,wtv,nut,yuv4mpegpipe,mjpeg,vob,h263,vc1,amv,nsv,wav,mp3,aac,flac"
)
# Formats without a time for each shown frame (AVI stores none, raw streams have no container): frames are counted.
_UNTIMED = frozenset({"avi", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "obu", "vc1"})

# Containers with an index, which a seek can trust; elsewhere it may land behind the time asked for.
_INDEXED = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
_SEEK_MARGIN = 1.0  # seconds: an index tells when a key frame is decoded, and its neighbours may need the one before


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file says of itself, and its first frame."""

    path: Path
    frames: int  # coded pictures, counted without decoding them
    fps: float  # average
    width: int  # as shown: after rotation, pixels made square
    height: int
    duration: float  # seconds
    rotation: int  # degrees counter-clockwise that the player must turn the coded picture
    pix_fmt: str
    codec: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One decoded picture."""

    rgb: npt.NDArray[np.uint8]  # (size, size, 3)
    time: float  # seconds since the video's first frame
    motion: npt.NDArray[np.float32] | None  # (size, size, 2) pixels moved since the frame before; None if not asked for


class VideoReader:
    """An open video file; frames are decoded as they are asked for.

    Use it with `with`. Each reading begins anew and ends the one before; `problem` is filled while reading.

    Raises:
        VideoError: from the constructor, where the file holds no readable video stream.
        InvalidInput: a size under 1.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        size: int | None,
        motion: bool = False,
        max_pixels: int = MAX_PIXELS,
        threads: int = 1,
    ) -> None:
        if size is not None and size < 1:
            raise InvalidInput(f"size: expected at least 1, got {size}")
        self.path = Path(path)
        self.size, self.motion = size, motion
        self.problem: str | None = None
        self._max_pixels, self._threads = max_pixels, threads
        self._reading: int | None = 0  # the number of the reading under way; None: the file is closed
        self._begin()
        rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(25)
        self.fps = float(rate)
        self._counted = self._container.format.name in _UNTIMED

    def __enter__(self) -> VideoReader:
        """The reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._reading = None
        self._container.close()

    def _begin(self) -> None:
        """Open the file, at its beginning."""
        self._container = self._open()
        try:
            self._stream = self._choose()
        except BaseException:
            self._container.close()
            raise

    def _begin_again(self) -> None:
        self._container.close()
        self._begin()

    def _next_reading(self) -> int:
        """Stand at the file's beginning, whatever was read before; the number of the reading that starts."""
        if self._reading is None:
            raise InvalidInput(f"{self.path}: the reader is closed")
        if self._reading:
            self._begin_again()
        self._reading += 1
        return self._reading

    def _open(self) -> InputContainer:
        if not self.path.is_file():
            raise VideoError(f"{self.path}: no such file" if not self.path.exists() else f"{self.path}: not a file")
        if self.path.stat().st_size == 0:
            raise VideoError(f"{self.path}: the file is empty")
        try:
            # Only the file itself: a playlist or a crafted container must not open other files or the network.
            return av.open(
                "file:" + str(self.path.absolute()),
                metadata_errors="replace",
                container_options={"protocol_whitelist": "file", "format_whitelist": _FORMATS},
            )
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            raise VideoError(f"{self.path}: not a readable video ({_reason(error)})") from None

    def _choose(self) -> VideoStream:
        moving = [stream for stream in self._container.streams.video if not _is_cover(stream)]
        if not moving:
            kinds = sorted({stream.type for stream in self._container.streams})
            raise VideoError(f"{self.path}: no video stream, only {', '.join(kinds) or 'an empty container'}")
        stream = moving[0]
        context = stream.codec_context
        if context is None:
            raise VideoError(f"{self.path}: no decoder for its video stream")
        pixels = context.width * context.height
        if pixels > self._max_pixels:
            raise VideoError(
                f"{self.path}: {context.width} x {context.height} is more than {self._max_pixels} pixels a frame"
            )
        context.thread_count = self._threads
        context.options = {"max_pixels": str(self._max_pixels), **({"flags2": "+export_mvs"} if self.motion else {})}
        return stream

    def frames(self, start: float = 0.0, end: float | None = None) -> Iterator[Frame]:
        """The frames whose times lie in [start, end), in the order shown.

        Raises:
            VideoError: not one frame could be decoded, or none lies in the interval.
            InvalidInput: `start` is negative or not before `end`, the reader has no size, or it was closed or read anew
                meanwhile.
        """
        if start < 0 or not math.isfinite(start) or (end is not None and not end > start):
            raise InvalidInput(f"start, end: expected 0 <= start < end in seconds, got {start}, {end}")
        if self.size is None:
            raise InvalidInput(f"{self.path}: expected a reader with a size of its frames, this one only probes")
        reading = self._next_reading()
        decoded = taken = 0
        shown = 0.0
        ended = False
        for frame, time in self._from(start):
            decoded += 1
            shown = time + self._stays(frame)
            # Half a millisecond of tolerance: seconds written as decimals must not lose or double a frame.
            if time < start - 0.5e-3:
                continue
            if end is not None and time >= end - 0.5e-3:
                ended = True
                break
            taken += 1
            yield self._convert(frame, time)
            if self._reading != reading:  # PyAV would go on in memory that the closed container gave back
                raise InvalidInput(f"{self.path}: was closed or read anew, these frames end here")
        if taken == 0:
            raise VideoError(self._nothing(decoded, start, end))
        if not ended:
            self._check_end(shown)

    def _nothing(self, decoded: int, start: float, end: float | None) -> str:
        if decoded == 0:
            return f"{self.path}: no frame can be decoded" + (f" ({self.problem})" if self.problem else "")
        until = "the end" if end is None else f"{end:g} s"
        return f"{self.path}: no frame between {start:g} s and {until}"

    def _from(self, start: float) -> Iterator[tuple[VideoFrame, float]]:
        """Frames from one at or before `start` on, by a seek where the container's index can be trusted."""
        base = self._stream.time_base
        if start <= _SEEK_MARGIN or self._container.format.name not in _INDEXED or base is None:
            return self._timed()
        target = int((start - _SEEK_MARGIN) / base) + (self._stream.start_time or 0)
        try:
            self._container.seek(target, stream=self._stream, backward=True)
        except av.FFmpegError as error:
            log.debug("%s: cannot seek (%s)", self.path, _reason(error))
        else:
            timed = self._timed()
            first = next(timed, None)
            if first is not None and first[1] <= start:
                return chain([first], timed)
        self._begin_again()
        return self._timed()

    def _timed(self) -> Iterator[tuple[VideoFrame, float]]:
        """Frames with seconds since the video's start; a frame without a time follows the one before."""
        base = float(self._stream.time_base or 0)
        origin = (self._stream.start_time or 0) * base
        last: float | None = None
        for frame in self._decoded():
            if frame.pts is not None and base and not self._counted:
                time = frame.pts * base - origin
            else:
                time = 0.0 if last is None else last + 1 / self.fps
            if last is not None and time <= last:
                self._note("frame times run backwards")
                time = last + 1 / self.fps
            last = time
            yield frame, time

    def _decoded(self) -> Iterator[VideoFrame]:
        """What the decoder gives; a damaged packet is counted and skipped, a damaged container ends the video."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.FFmpegError, OSError) as error:
                self._note(f"the file is damaged or cut off ({_reason(error)})")
                return
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                if isinstance(error, av.error.EOFError):
                    return
                if packet.size:  # the flush at the end repeats what was already counted
                    self._note(f"damaged data was skipped ({_reason(error)})")
            if packet.is_corrupt:
                self._note("damaged data was read")

    def _note(self, problem: str) -> None:
        if self.problem is None:
            self.problem = problem
            log.warning("%s: %s", self.path, problem)

    def _stays(self, frame: VideoFrame) -> float:
        """Seconds that a picture is shown: those it tells, but at least those of the average one."""
        told = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        return max(told, 1 / self.fps)

    def _check_end(self, shown: float) -> None:
        """Note a video that stops well before the length it announces (a download or recording cut off)."""
        announced = self._announced()
        if announced is not None and shown < announced - max(0.5, 3 / self.fps):
            self._note(f"ends after {shown:.2f} of {announced:.2f} s")

    def _announced(self) -> float | None:
        """Seconds of picture the file announces, None where it does not say (or speaks of its sound, too)."""
        stream = self._stream
        base = float(stream.time_base or 0)
        if stream.duration and base:
            return stream.duration * base
        told = _clock(stream.metadata.get("DURATION", ""))  # Matroska's
        if told is None and self._container.duration and len(self._container.streams) == 1:
            told = self._container.duration / av.time_base
        if told is not None and self._announces_end():
            told -= (stream.start_time or 0) * base
        return told

    def _announces_end(self) -> bool:
        """Whether what Matroska calls a duration is the time of the end: mkvmerge writes lengths, libavformat ends."""
        told = {key.lower(): value for key, value in self._container.metadata.items()}
        return "matroska" in self._container.format.name and told.get("encoder", "").startswith("Lavf")

    def _convert(self, frame: VideoFrame, time: float) -> Frame:
        """Scale, turn and cut one picture."""
        assert self.size is not None
        turned = quarter_turns(frame.rotation)
        wide = self._shown_width(frame)
        width, height = scaled_size(wide, frame.height, self.size)
        try:
            small = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA", threads=1)
            rgb: Any = small.to_ndarray()
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{self.path}: frames of format {frame.format.name} cannot be read ({error})") from None
        field = motion_field(frame, width, height) if self.motion else None
        rgb = centre_cut(np.rot90(rgb, turned), self.size)
        if field is not None:
            field = centre_cut(turned_field(field, turned), self.size)
        return Frame(rgb=np.ascontiguousarray(rgb), time=time, motion=field)

    def _shown_width(self, frame: VideoFrame) -> float:
        """The width of a picture once its pixels are square; a shape no video has is refused.

        Scaling the short side of a thin strip to the size asked for would make the long side enormous.
        """
        aspect = self._stream.sample_aspect_ratio
        wide = frame.width * float(aspect) if aspect else float(frame.width)
        if not 1 / MAX_ASPECT <= wide / frame.height <= MAX_ASPECT:
            raise VideoError(f"{self.path}: a picture of {wide:.0f} x {frame.height} is too narrow for a video")
        return wide

    def info(self) -> VideoInfo:
        """What the file says of itself.

        Raises:
            VideoError: not one frame could be decoded.
            InvalidInput: the reader is closed.
        """
        self._next_reading()
        count = 0
        first: VideoFrame | None = None
        try:
            for packet in self._container.demux(self._stream):
                count += bool(packet.size)
                if first is None:
                    first = self._first(packet)
        except (av.FFmpegError, OSError) as error:
            self._note(f"the file is damaged or cut off ({_reason(error)})")
        if first is None:
            raise VideoError(self._nothing(0, 0.0, None))
        turned = quarter_turns(first.rotation)
        width, height = round(self._shown_width(first)), first.height
        if turned % 2:
            width, height = height, width
        announced = self._announced()
        return VideoInfo(
            path=self.path,
            frames=count,
            fps=self.fps,
            width=width,
            height=height,
            duration=announced if announced is not None else count / self.fps,
            rotation=90 * turned,
            pix_fmt=first.format.name,
            codec=self._stream.codec_context.name,
        )

    def _first(self, packet: Any) -> VideoFrame | None:
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            self._note(f"damaged data was skipped ({_reason(error)})")
            return None
        return frames[0] if frames else None


def _clock(text: str) -> float | None:
    """The seconds of "00:00:02.133000000", None where it is no such text."""
    parts = text.split(":")
    try:
        hours, minutes, seconds = int(parts[0]), int(parts[1]), float(parts[2])
    except (ValueError, IndexError):
        return None
    return hours * 3600 + minutes * 60 + seconds


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _is_cover(stream: VideoStream) -> bool:
    """Whether the stream is a still picture attached to music, not a video."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)
