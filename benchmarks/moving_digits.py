"""MovingDigits: handwritten digits that move over photographs; one view sees the digit, the other the motion.

60 classes = 10 digits x 6 motions (across, up and down, two diagonals, turning, growing). The grey pictures show which
digit it is, optical flow shows how it moves, neither shows both, so mining across views can find what one view
cannot. Digits and backgrounds of training and test are different ones.

Source: digits of the UCI data set "Optical Recognition of Handwritten Digits" (CC BY 4.0), as scikit-learn carries it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.errors import BackendUnavailable, InvalidInput
from cascade_engine.video.photos import Photo, photographs

FRAMES, SIDE, CLASSES = 16, 40, 60
FLOW_UNIT = 1 / 16  # pixels per stored step; what moves faster than 8 pixels a frame is clipped
_FORMAT = 1  # of the files: changes whenever the same seed gives other numbers
_MOTIONS = 6
_TRAIN_DIGITS = 1300  # of the 1,797

Pictures: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Progress: TypeAlias = Callable[[int, int], None]  # clips done, clips in all


@dataclass(frozen=True, kw_only=True)
class MovingDigits:
    """The rendered clips. Class c shows digit c // 6 in motion c % 6."""

    train_gray: Pictures  # (N, 16, 40, 40)
    train_flow: npt.NDArray[np.int8]  # (N, 16, 40, 40, 2) to the next frame, in FLOW_UNIT; the last step is repeated
    train_label: npt.NDArray[np.int64]  # (N,)
    test_gray: Pictures  # (M, 16, 40, 40)
    test_flow: npt.NDArray[np.int8]  # (M, 16, 40, 40, 2)
    test_label: npt.NDArray[np.int64]  # (M,)

    def rgb(self, split: Literal["train", "test"]) -> Pictures:
        """The pictures of a split with three equal channels, (N, 16, 40, 40, 3), sharing memory."""
        gray = self.train_gray if split == "train" else self.test_gray
        return np.broadcast_to(gray[..., None], (*gray.shape, 3))


@dataclass(frozen=True, kw_only=True)
class DigitFeatures:
    """Hand-made features of clips of 8 frames of 32 x 32, cut from the videos; standardised by the training cuts.

    `varied` are A random cuts of each training video with changed colours, `train` and `test` three fixed cuts each.
    """

    varied_rgb: Floats  # (N, A, 840)
    varied_flow: Floats  # (N, A, 640)
    train_rgb: Floats  # (N, 3, 840)
    train_flow: Floats  # (N, 3, 640)
    test_rgb: Floats  # (M, 3, 840)
    test_flow: Floats  # (M, 3, 640)
    train_label: npt.NDArray[np.int64]  # (N,)
    test_label: npt.NDArray[np.int64]  # (M,)


def moving_digits(
    folder: str | PathLike[str], *, train: int = 3000, test: int = 900, seed: int = 0, progress: Progress | None = None
) -> MovingDigits:
    """Render the clips, or load them where the folder has them.

    Args:
        folder: made if need be; holds one file per set of arguments.
        train: training clips, spread evenly over the classes.
        test: test clips.
        seed: another one gives other clips.
        progress: called now and then with (clips done, clips in all).

    Raises:
        InvalidInput: fewer clips than classes.
        BackendUnavailable: scikit-learn or scikit-image is not installed.
    """
    if min(train, test) < CLASSES:
        raise InvalidInput(f"moving_digits: expected at least {CLASSES} clips, got {train} and {test}")
    file = Path(folder) / f"moving_digits-{_FORMAT}-{train}-{test}-{seed}.npz"
    if not file.exists():
        _save(file, _render(train, test, seed, progress))
    with np.load(file) as data:
        return MovingDigits(**{field.name: data[field.name] for field in fields(MovingDigits)})


def digit_features(digits: MovingDigits, folder: str | PathLike[str], *, cuts: int = 8, seed: int = 0) -> DigitFeatures:
    """The hand-made features of the clips, or load them where the folder has them.

    The rgb view gets a colour grid, oriented gradients, local change and background statistics; the flow view
    histograms of flow directions by place and time, the camera's own motion taken away.

    Args:
        digits: the clips.
        folder: made if need be; holds one file per set of arguments and clips.
        cuts: random cuts of each training video.
        seed: of the random cuts.
    """
    mark = f"{_FORMAT}-{len(digits.train_label)}-{len(digits.test_label)}-{_mark(digits)}-{cuts}-{seed}"
    file = Path(folder) / f"digit_features-{mark}.npz"
    if not file.exists():
        rng = np.random.default_rng(seed)
        varied = _features(digits.rgb("train"), digits.train_flow, cuts, rng)
        train = _features(digits.rgb("train"), digits.train_flow, 3, None)
        test = _features(digits.rgb("test"), digits.test_flow, 3, None)
        made: dict[str, npt.NDArray[Any]] = {"train_label": digits.train_label, "test_label": digits.test_label}
        for place, view in enumerate(("rgb", "flow")):
            mean = varied[place].mean((0, 1))
            spread = varied[place].std((0, 1)) + 1e-3
            for name, values in (("varied", varied), ("train", train), ("test", test)):
                made[f"{name}_{view}"] = ((values[place] - mean) / spread).astype(np.float32)
        _save(file, made)
    with np.load(file) as data:
        return DigitFeatures(**{field.name: data[field.name] for field in fields(DigitFeatures)})


def _mark(digits: MovingDigits) -> str:
    """Eight digits that tell one set of clips from another."""
    return f"{int(digits.train_gray[:, 3].sum(dtype=np.int64)) % 10**8:08d}"


def _save(file: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new.npz")
    np.savez(fresh, allow_pickle=False, **arrays)
    fresh.replace(file)


def _render(train: int, test: int, seed: int, progress: Progress | None) -> dict[str, npt.NDArray[Any]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BackendUnavailable("scikit-learn is not installed: pip install 'cascade-engine[demo]'") from None
    drawn = load_digits()
    order = np.random.default_rng(1).permutation(len(drawn.target))
    rng = np.random.default_rng(seed)
    made: dict[str, npt.NDArray[Any]] = {}
    parts: tuple[tuple[Literal["train", "test"], int, Any], ...] = (
        ("train", train, order[:_TRAIN_DIGITS]),
        ("test", test, order[_TRAIN_DIGITS:]),
    )
    done = 0
    for split, count, chosen in parts:
        photos = [_large_enough(photo) for photo in photographs(split)]
        by_digit = [chosen[drawn.target[chosen] == digit] for digit in range(10)]
        label = np.arange(count) % CLASSES
        gray = np.empty((count, FRAMES, SIDE, SIDE), np.uint8)
        flow = np.empty((count, FRAMES, SIDE, SIDE, 2), np.int8)
        for i in range(count):
            image = drawn.images[rng.choice(by_digit[label[i] // _MOTIONS])]
            gray[i] = _clip(rng, image, int(label[i] % _MOTIONS), photos[int(rng.integers(len(photos)))])
            flow[i] = _flow(gray[i])
            done += 1
            if progress is not None and done % 50 == 0:
                progress(done, train + test)
        made |= {f"{split}_gray": gray, f"{split}_flow": flow, f"{split}_label": label}
    return made


def _large_enough(photo: Photo) -> npt.NDArray[Any]:
    return photo if min(photo.shape[:2]) > 100 else np.asarray(cv2.resize(photo, (160, 160)))


def _clip(rng: np.random.Generator, image: Floats, motion: int, photo: npt.NDArray[Any]) -> Pictures:
    """One clip (16, 40, 40): a digit that swings in one of the motions over a part of a photograph."""
    height, width = photo.shape[:2]
    y, x = rng.integers(height - 90), rng.integers(width - 90)
    behind = cv2.resize(photo[y : y + 80, x : x + 80], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    ground = behind.astype(np.float32).mean(-1)
    ground = (ground - ground.mean()) * 0.45 + rng.uniform(30, 110)
    digit = cv2.resize(image.astype(np.float32) / 16, (24, 24), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    ink = rng.uniform(170, 255)
    phase, speed, swing = rng.uniform(0, 6.28), rng.uniform(0.8, 1.25), rng.uniform(5, 7.5)
    zoom = rng.uniform(0.85, 1.1)
    centre = SIDE / 2 + rng.uniform(-2.5, 2.5, 2)
    tilt = rng.uniform(-8, 8)
    frames = np.empty((FRAMES, SIDE, SIDE), np.uint8)
    for t in range(FRAMES):
        right, down, turn, growth = _motion(motion, np.sin(2 * np.pi * speed * t / 8 + phase), swing)
        matrix = cv2.getRotationMatrix2D((12, 12), turn + tilt, zoom * growth)
        matrix[:, 2] += [centre[0] - 12 + right, centre[1] - 12 + down]
        opaque = cv2.warpAffine(digit, matrix, (SIDE, SIDE))
        shown = ground * (1 - opaque) + ink * opaque + rng.normal(0, 4, (SIDE, SIDE))
        frames[t] = np.clip(shown, 0, 255).astype(np.uint8)
    return frames


def _motion(motion: int, s: float, swing: float) -> tuple[float, float, float, float]:
    """Shift right and down in pixels, turn in degrees and growth, s in [-1, 1] of the way."""
    return (
        (swing * s, 0.0, 0.0, 1.0),
        (0.0, swing * s, 0.0, 1.0),
        (0.8 * swing * s, 0.8 * swing * s, 0.0, 1.0),
        (0.8 * swing * s, -0.8 * swing * s, 0.0, 1.0),
        (0.0, 0.0, 50 * s, 1.0),
        (0.0, 0.0, 0.0, 1 + 0.33 * s),
    )[motion]


def _flow(gray: Pictures) -> npt.NDArray[np.int8]:
    """Farneback flow (16, 40, 40, 2) with windows that fit pictures this small; the last step is repeated."""
    unset: Any = None  # the stubs know no call without an array to start from
    steps = [
        cv2.calcOpticalFlowFarneback(before, after, unset, 0.5, 2, 9, 2, 5, 1.1, 0) for before, after in pairwise(gray)
    ]
    stored = np.stack([*steps, steps[-1]]) / FLOW_UNIT
    return np.clip(stored, -127, 127).astype(np.int8)


_LONG, _CUT = 8, 32  # frames and side of the clips that features are made of


def _features(
    rgb: Pictures, flow: npt.NDArray[np.int8], cuts: int, rng: np.random.Generator | None
) -> tuple[Floats, Floats]:
    """Features (N, cuts, D) of both views; cuts are random with `rng`, fixed without."""
    made: tuple[list[Floats], list[Floats]] = ([], [])
    for cut in range(cuts):
        pictures, moved = _cut_out(rgb, flow, cut, rng)
        made[0].append(_appearance(pictures))
        made[1].append(_movement(moved))
    return np.stack(made[0], 1), np.stack(made[1], 1)


def _cut_out(
    rgb: Pictures, flow: npt.NDArray[np.int8], cut: int, rng: np.random.Generator | None
) -> tuple[Floats, Floats]:
    """Clips (N, 8, 32, 32, 3) in [0, 1] and (N, 8, 32, 32, 2) in pixels."""
    count = len(rgb)
    room_t, room = FRAMES - _LONG + 1, SIDE - _CUT + 1
    if rng is None:
        start = np.full(count, (0, 4, 8)[cut % 3])
        left = top = np.full(count, (SIDE - _CUT) // 2)
    else:
        start, left, top = rng.integers(0, room_t, count), rng.integers(0, room, count), rng.integers(0, room, count)
    places = [
        (i, slice(t, t + _LONG), slice(y, y + _CUT), slice(x, x + _CUT))
        for i, (t, y, x) in enumerate(zip(start, top, left, strict=True))
    ]
    pictures: Floats = np.stack([rgb[place] for place in places]).astype(np.float32)
    pictures /= np.float32(255)
    moved: Floats = np.stack([flow[place] for place in places]).astype(np.float32)
    moved *= np.float32(FLOW_UNIT)
    if rng is not None:
        gain = rng.uniform(0.85, 1.15, (count, 1, 1, 1, 3)).astype(np.float32)
        pictures = pictures * gain + rng.uniform(-0.1, 0.1, (count, 1, 1, 1, 1)).astype(np.float32)
    return pictures, moved


def _directions(x: Floats, y: Floats, *, signed: bool) -> Floats:
    """Histograms (..., 4, 4, 8) of the directions of vectors (..., 32, 32), weighted by length, in 4 x 4 cells."""
    length, angle = np.hypot(x, y), np.arctan2(y, x)
    turn = 2 * np.pi if signed else np.pi
    bins = np.floor((angle % turn) / turn * 8).astype(int) % 8
    cell = x.shape[-1] // 4
    made = np.zeros((*x.shape[:-2], 4, 4, 8), np.float32)
    for b in range(8):
        weight = np.where(bins == b, length, 0)
        made[..., b] = weight.reshape(*x.shape[:-2], 4, cell, 4, cell).mean((-3, -1))
    return made


def _appearance(pictures: Floats) -> Floats:
    """What a frame looks like, (N, 840): gradients, a colour grid, change, border colours, texture."""
    count = len(pictures)
    gray = pictures[:, ::2].mean(-1)
    down, right = np.gradient(gray, axis=(-2, -1))
    edges = _directions(right, down, signed=False)
    edges = edges / (np.linalg.norm(edges.reshape(count, 4, -1), axis=-1)[:, :, None, None, None] + 1e-3)
    cells = pictures[:, ::4].reshape(count, 2, 4, 8, 4, 8, 3)
    colour = [cells.mean((3, 5)).reshape(count, -1), cells.std((3, 5)).reshape(count, -1)]
    change = np.abs(np.diff(gray, axis=1)).reshape(count, 3, 4, 8, 4, 8).mean((3, 5)).reshape(count, -1)
    border = np.ones((_CUT, _CUT), bool)
    border[6:, 8:24] = False  # where the digit hardly ever is
    levels = (np.clip(pictures[:, ::4][:, :, border], 0, 0.999) * 4).astype(int)
    codes = (levels[..., 0] * 16 + levels[..., 1] * 4 + levels[..., 2]).reshape(count, -1)
    palette = np.stack([np.bincount(code, minlength=64) for code in codes]).astype(np.float32) / codes.shape[1]
    parts = [edges.reshape(count, -1), *colour, change * 4, np.sqrt(palette) * 2, _texture(gray, border)]
    return np.concatenate(parts, 1).astype(np.float32)


def _texture(gray: Floats, border: npt.NDArray[np.bool_]) -> Floats:
    """Quantiles of the border's differences at three distances, both ways, (N, 24) on a log scale."""
    inner = border[: _CUT - 4, : _CUT - 4]
    made = []
    for apart in (1, 2, 4):
        down = np.abs(gray[..., apart:, :] - gray[..., :-apart, :])[..., : _CUT - 4, : _CUT - 4].mean(1)
        right = np.abs(gray[..., apart:] - gray[..., :-apart])[..., : _CUT - 4, : _CUT - 4].mean(1)
        both = np.stack([down[:, inner], right[:, inner]], 1)
        quantiles = np.quantile(both, [0.25, 0.5, 0.75, 0.9], axis=-1)
        made.append(quantiles.transpose(1, 2, 0).reshape(len(gray), -1))
    return np.log(np.concatenate(made, 1) + 0.01).astype(np.float32)


def _movement(moved: Floats) -> Floats:
    """How things move, (N, 640): directions of flow by place and time, less the median motion of each frame."""
    moved = moved - np.median(moved, axis=(2, 3), keepdims=True)
    found = _directions(moved[..., 0], moved[..., 1], signed=True)  # (N, 8, 4, 4, 8)
    found = found.reshape(len(moved), 4, 2, 4, 4, 8).mean(2)
    parts = [np.sqrt(found).reshape(len(moved), -1), np.sqrt(found.mean(1)).reshape(len(moved), -1)]
    return np.concatenate(parts, 1).astype(np.float32)
