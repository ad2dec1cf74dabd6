"""From a video file to the clips a model takes: sliding windows, decoded as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade_engine.deployment.artefact import Signature
from cascade_engine.errors import InvalidInput, VideoError
from cascade_engine.tensor import Host
from cascade_engine.video.decode import MAX_PIXELS, probe
from cascade_engine.video.views import FlowMethod, stream


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large a video may be that comes from strangers.

    Args:
        seconds: of video.
        frame_pixels: of one coded picture.
        total_pixels: of all pictures together: what decoding costs.
    """

    seconds: float = float("inf")
    frame_pixels: int = MAX_PIXELS
    total_pixels: float = float("inf")


UNLIMITED = Limits()


@dataclass(frozen=True, kw_only=True)
class Window:
    """One clip of a video.

    Args:
        start: seconds of its first frame.
        end: seconds at which its last frame ends.
        pixels: view to (frames, size, size, channels) as the view is stored.
        problem: what was wrong with the file, as far as it is known by now.
    """

    start: float
    end: float
    pixels: dict[str, Host]
    problem: str | None


def sliding_windows(
    path: str | Path,
    signature: Signature,
    *,
    step: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    limits: Limits = UNLIMITED,
) -> Iterator[Window]:
    """The windows of a video or of a part of it, in order: `step` frames apart, and one that ends with the last frame.

    Flow and residual views are computed on the fly; memory does not grow with the video.

    Args:
        path: the video file.
        signature: of the model that takes the windows.
        step: frames from start to start; half a window by default.
        start: seconds; windows lie within the frames from here on, and their times stay those of the file.
        end: seconds, exclusive; the video's end by default.
        limits: larger videos are refused, before decoding by what they announce, and while decoding by what they hold.

    Raises:
        VideoError: the file cannot be read, is shorter than one window, or is larger than `limits`; it is named.
        InvalidInput: a step under 1, or a part that does not start before its end.
    """
    step = max(1, signature.span // 2) if step is None else step
    if step < 1:
        raise InvalidInput(f"step: expected at least 1, got {step}")
    picture = _admit(path, limits) if limits != UNLIMITED else 0
    views = [view.name for view in signature.views]
    held: dict[str, Host] = {}
    times = np.empty(0)
    base = upcoming = total = 0
    fps, problem = 25.0, None
    flow: FlowMethod = signature.flow  # type: ignore[assignment]
    for part, frames in stream(path, views, size=signature.size, flow=flow, start=start, end=end):
        held = {view: np.concatenate([held[view], part[view]]) if view in held else part[view] for view in views}
        times = np.concatenate([times, frames.time])
        fps, problem, total = frames.fps, frames.problem, base + len(times)
        _require_within(path, limits, float(times[-1]), total * picture)
        while upcoming + signature.span <= total:
            yield _window(held, times, upcoming - base, signature, fps, problem)
            upcoming += step
        keep = min(upcoming, max(base, total - signature.span))
        held, times, base = {view: held[view][keep - base :] for view in views}, times[keep - base :], keep
    if total < signature.span:
        reason = f" ({problem})" if problem else ""
        raise VideoError(f"{path}: {total} frames, the model's clips reach over {signature.span}{reason}")
    if upcoming - step != total - signature.span:
        yield _window(held, times, total - signature.span - base, signature, fps, problem)


def _window(
    held: dict[str, Host], times: Host, first: int, signature: Signature, fps: float, problem: str | None
) -> Window:
    chosen = slice(first, first + signature.span, signature.stride)
    return Window(
        start=float(times[first]),
        end=float(times[first + signature.span - 1]) + 1 / fps,
        pixels={view: frames[chosen] for view, frames in held.items()},
        problem=problem,
    )


def _admit(path: str | Path, limits: Limits) -> int:
    """Refuse a video by what it announces of itself; returns the pixels of one picture."""
    info = probe(path, max_pixels=limits.frame_pixels)
    picture = info.width * info.height
    _require_within(path, limits, info.duration, info.frames * picture)
    return picture


def _require_within(path: str | Path, limits: Limits, seconds: float, pixels: int) -> None:
    if seconds > limits.seconds:
        raise VideoError(f"{path}: {seconds:.0f} s of video, at most {limits.seconds:g} s are taken")
    if pixels > limits.total_pixels:
        raise VideoError(
            f"{path}: {pixels / 1e6:.0f} million pixels, at most {limits.total_pixels / 1e6:.0f} are taken"
        )
