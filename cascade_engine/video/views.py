"""Views: the feature spaces' raw material, made from the same frames and aligned with them.

| view | channels | stored | meaning of the stored value v |
|---|---|---|---|
| rgb | 3 | uint8 | colour, 0 to 255 |
| flow | 2 (x, y) | int8 | v * 20 / 127 pixels of a 128-pixel picture towards the next frame; clipped at +-20 |
| residual | 3 | int8 | next frame minus this one, clipped at +-127 |
| motion_vectors | 2 (x, y) | int8 | as flow, but read from the stream, not computed |

Displacements are counted in pixels of a 128-pixel picture, the size at which the method was published, so a movement
has the same value at any frame size. Position t of every view speaks of the step from frame t to t + 1; the last
position repeats the one before, so all views of a video have its number of frames T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast, get_args

import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput
from cascade_engine.tensor import Array, is_torch
from cascade_engine.video.decode import MAX_PIXELS, Frames, gather
from cascade_engine.video.reader import Frame, VideoReader

FlowMethod: TypeAlias = Literal["dis", "farneback", "tvl1"]
Stored: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.int8]

CLIP_PIXELS = 20.0  # displacements are clipped here ...
REFERENCE_SIZE = 128  # ... in pixels of a picture of this side
_DIS_SIZE = 12  # OpenCV's DIS looks at no smaller picture
_CHUNK = 128  # frames decoded at a time: bounds memory, changes no bit


@dataclass(frozen=True, kw_only=True)
class View:
    """One kind of picture made of frames."""

    name: str
    channels: int
    extract: Callable[[Frames, FlowMethod], Stored]  # frames -> (T, H, W, channels)
    signed: bool  # stored as int8 around 0, else uint8
    displaces: bool = False  # channels are x and y of a displacement: mirroring negates x
    from_stream: bool = False  # needs Frames.motion


def _rgb(frames: Frames, _: FlowMethod) -> Stored:
    return frames.rgb


def _residual(frames: Frames, _: FlowMethod) -> Stored:
    wide = frames.rgb.astype(np.int16)
    return _last_repeated(np.clip(wide[1:] - wide[:-1], -127, 127).astype(np.int8))


def _flow(frames: Frames, method: FlowMethod) -> Stored:
    compute = flow_function(method, frames.rgb.shape[1])
    gray = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in frames.rgb]
    steps = np.empty((len(gray) - 1, *frames.rgb.shape[1:3], 2), np.float32)
    with _one_thread():
        for t in range(len(steps)):
            steps[t] = compute(gray[t], gray[t + 1])
    return _last_repeated(_stored(steps))


def _motion_vectors(frames: Frames, _: FlowMethod) -> Stored:
    if frames.motion is None:
        raise InvalidInput("motion_vectors: expected frames read with motion=True, got frames without motion")
    return _last_repeated(_stored(frames.motion[1:]))


def _last_repeated(steps: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """The T - 1 steps between T frames, and the last of them again (zeros for a single frame)."""
    if not len(steps):
        return np.zeros((1, *steps.shape[1:]), np.int8)
    return np.concatenate([steps, steps[-1:]])


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV on one thread, its setting put back: processes are what makes extraction parallel."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _stored(displacement: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """Pixels (T, H, W, 2) of pictures of side H as int8."""
    unit = 127 / CLIP_PIXELS * REFERENCE_SIZE / displacement.shape[1]
    steps: npt.NDArray[np.float32] = np.rint(displacement * np.float32(unit))
    return np.clip(steps, -127, 127).astype(np.int8)


VIEWS: Mapping[str, View] = MappingProxyType(
    {
        "rgb": View(name="rgb", channels=3, extract=_rgb, signed=False),
        "flow": View(name="flow", channels=2, extract=_flow, signed=True, displaces=True),
        "residual": View(name="residual", channels=3, extract=_residual, signed=True),
        "motion_vectors": View(
            name="motion_vectors", channels=2, extract=_motion_vectors, signed=True, displaces=True, from_stream=True
        ),
    }
)


def chosen_views(names: Sequence[str]) -> list[View]:
    """The views of these names.

    Raises:
        InvalidInput: none, an unknown one, or one twice.
    """
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise InvalidInput(f"views: expected different view names, got {names!r}")
    for name in names:
        if name not in VIEWS:
            raise InvalidInput(f"views: expected names among {', '.join(VIEWS)}, got {name!r}")
    return [VIEWS[name] for name in names]


def flow_function(method: str, size: int) -> Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], Any]:
    """The flow (size, size, 2) in pixels between two grey pictures (size, size), by the method named.

    `dis` (fast preset, finest scale 1), `farneback`, or `tvl1`, which needs the contrib build of OpenCV.

    Raises:
        InvalidInput: an unknown method, TV-L1 without the contrib build, or pictures too small for DIS (12 pixels).

    Source: Kroeger et al., ECCV 2016 (DIS); Farneback, SCIA 2003; Zach et al., DAGM 2007 (TV-L1).
    """
    unset: Any = None  # the stubs know no call without an array to start from
    if method == "dis":
        if size < _DIS_SIZE:
            raise InvalidInput(f"size: expected at least {_DIS_SIZE} for the flow method 'dis', got {size}")
        dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        dis.setFinestScale(1)
        return lambda before, after: dis.calc(before, after, unset)
    if method == "farneback":
        return lambda before, after: cv2.calcOpticalFlowFarneback(before, after, unset, 0.5, 3, 15, 3, 5, 1.2, 0)
    if method == "tvl1":
        contrib = getattr(cv2, "optflow", None)
        if contrib is None:
            raise InvalidInput("flow: 'tvl1' needs opencv-contrib-python-headless in place of opencv-python-headless")
        tvl1 = contrib.DualTVL1OpticalFlow_create()
        return lambda before, after: tvl1.calc(before, after, unset)
    raise InvalidInput(f"flow: expected one of {', '.join(get_args(FlowMethod))}, got {method!r}")


def extract(
    source: Frames | str | PathLike[str],
    views: Sequence[str],
    *,
    size: int | None = None,
    flow: FlowMethod = "dis",
    start: float = 0.0,
    end: float | None = None,
    max_frames: int | None = None,
) -> dict[str, Stored]:
    """The views of a video, all of the same length T and side.

    Args:
        source: frames already read, or a video file.
        views: names among `VIEWS`.
        size: side of the frames, for a file.
        flow: how optical flow is computed.
        start: seconds, for a file.
        end: seconds, exclusive, for a file.
        max_frames: at most so many frames, for a file.

    Returns:
        View to (T, size, size, channels), uint8 or int8 (see the module's table).

    Raises:
        InvalidInput: an unknown view or flow method, a file without `size`, pictures too small for the flow method, no
            frames asked for, or vectors asked of frames without them.
        VideoError: the file cannot be read.
    """
    if isinstance(source, Frames):
        return {view.name: view.extract(source, flow) for view in chosen_views(views)}
    if size is None:
        raise InvalidInput("size: expected the side of the frames, got None")
    chunks = stream(source, views, size=size, flow=flow, start=start, end=end, max_frames=max_frames)
    parts = [part for part, _ in chunks]
    return {name: cast("Stored", np.concatenate([part[name] for part in parts])) for name in views}


def stream(
    path: str | PathLike[str],
    views: Sequence[str],
    *,
    size: int,
    flow: FlowMethod = "dis",
    start: float = 0.0,
    end: float | None = None,
    max_frames: int | None = None,
    chunk: int = _CHUNK,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[dict[str, Stored], Frames]]:
    """As :func:`extract`, in chunks of about `chunk` frames, so that a long video needs little memory.

    Args:
        path: the video file.
        views: names among `VIEWS`.
        size: side of the frames.
        flow: how optical flow is computed.
        start: seconds.
        end: seconds, exclusive.
        max_frames: at most so many frames.
        chunk: frames of a chunk; the last may have one more.
        max_pixels: the largest coded picture that is decoded at all.

    Returns:
        An iterator of (views, the frames they were made of); the chunks' bits do not depend on `chunk`.

    Raises:
        InvalidInput: as `extract`.
        VideoError: the file cannot be read.
    """
    chosen = chosen_views(views)
    if max_frames is not None and max_frames < 1:
        raise InvalidInput(f"max_frames: expected at least 1, got {max_frames}")
    if "flow" in views:
        flow_function(flow, size)  # refuse before anything is decoded
    motion = any(view.from_stream for view in chosen)
    with VideoReader(path, size=size, motion=motion, max_pixels=max_pixels) as reader:
        held: list[Frame] = []
        # Two frames are held back: a chunk needs the first frame of the next, and the last chunk at least two.
        for frame in islice(reader.frames(start, end), max_frames):
            held.append(frame)
            if len(held) == chunk + 2:
                ready = gather(reader, held[: chunk + 1])
                yield {view.name: view.extract(ready, flow)[:-1] for view in chosen}, ready.head(chunk)
                held = held[chunk:]
        ready = gather(reader, held)
        yield {view.name: view.extract(ready, flow) for view in chosen}, ready


def to_float(view: str, array: Array) -> Array:
    """Stored pixels as float32 in [-1, 1]: rgb is v / 127.5 - 1, all others v / 127.

    So 1 means white, a displacement of 20 pixels of a 128-pixel picture, or a difference of 127.

    Raises:
        InvalidInput: an unknown view.
    """
    signed = chosen_views([view])[0].signed
    if is_torch(array):
        own = array.float()
        own = own.clone() if own is array else own  # float() gives back a float32 tensor itself
        return own.mul_(1 / 127) if signed else own.mul_(1 / 127.5).sub_(1)
    wide = np.asarray(array, np.float32)
    return wide * np.float32(1 / 127) if signed else wide * np.float32(1 / 127.5) - np.float32(1)


def flip(view: str, array: Array) -> Array:
    """Mirror pictures (..., H, W, C) left to right; horizontal displacements change sign.

    Raises:
        InvalidInput: an unknown view.
    """
    displaces = chosen_views([view])[0].displaces
    mirrored: Any = array.flip(-2) if is_torch(array) else np.flip(np.asarray(array), -2).copy()
    if displaces:
        mirrored[..., 0] = -mirrored[..., 0]
    return cast("Array", mirrored)
