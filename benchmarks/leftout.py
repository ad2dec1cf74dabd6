"""A window left out of real videos: is the nearest stored window of its own video? A model's features against pixels.

Windows do not overlap. Once all other windows are searched, once those next to it in time are left out, too: next to
it little has changed, and pixels find that as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.bank import Bank
from cascade_engine.deployment.artefact import Model
from cascade_engine.deployment.windows import Window, sliding_windows
from cascade_engine.errors import InvalidInput, VideoError
from cascade_engine.mining import mine
from cascade_engine.plan import CascadePlan

PIXELS = 16  # side that frames are scaled to, for the contestant without a model
_TICK = 1e-6  # seconds that times may be off by without a frame being shared

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one contestant reached.

    Args:
        features: its name.
        windows: asked.
        videos: they are of.
        right: share of windows whose nearest other one is of their own video.
        right_apart: the same without the windows next to them in time, of those that have others left.
        chance: what a blind choice reaches.
        chance_apart: likewise.
    """

    features: str
    windows: int
    videos: int
    right: float
    right_apart: float
    chance: float
    chance_apart: float


def measure(model: Model, videos: Sequence[Path]) -> list[Row]:
    """The model's views, each alone and all together, and raw pixels, each as it is and centred.

    Raises:
        InvalidInput: fewer than two readable videos of three windows, with which one is not next to another.
    """
    owner: list[int] = []
    features: dict[str, list[F32]] = {view.name: [] for view in model.signature.views}
    pixels: list[F32] = []
    for number, path in enumerate(videos):
        try:
            windows = list(sliding_windows(path, model.signature, step=model.signature.span))
        except VideoError:
            continue
        if len(windows) > 1 and windows[-1].start < windows[-2].end - _TICK:
            del windows[-1]  # it ends with the last frame, wherever the one before does
        found = model.run({view: np.stack([each.pixels[view] for each in windows]) for view in features})
        for view, values in found.features.items():
            features[view].extend(values)
        pixels.extend(_pixels(each) for each in windows)
        owner.extend([number] * len(windows))
    ids = np.array(owner, np.int64)
    if np.sum(np.bincount(ids) >= 3 if len(ids) else [0]) < 2:
        raise InvalidInput("videos: expected two or more of three windows each, found fewer")
    contestants = {view: np.stack(values) for view, values in features.items()}
    if len(contestants) > 1:
        contestants["all views"] = np.concatenate(list(contestants.values()), axis=1)
    contestants["raw pixels"] = np.stack(pixels)
    rows = []
    for name, values in contestants.items():
        rows.append(_judge(name, values, ids))
        rows.append(_judge(f"{name}, centred", values - values.mean(axis=0), ids))
    return rows


def _pixels(window: Window) -> F32:
    view = "rgb" if "rgb" in window.pixels else next(iter(window.pixels))
    frames = [
        cv2.resize(each.astype(np.float32), (PIXELS, PIXELS), interpolation=cv2.INTER_AREA)
        for each in window.pixels[view]
    ]
    return np.stack(frames).ravel()


def _judge(name: str, values: F32, owner: I64) -> Row:
    place = np.arange(len(owner))
    same = owner[:, None] == owner
    itself = place[:, None] == place
    beside = same & (np.abs(place[:, None] - place) <= 1)
    bank = Bank({"feature": values}, owner, metric="cosine")

    def nearest(excluded: npt.NDArray[np.bool_]) -> I64:
        found: I64 = mine(CascadePlan.parse("feature:1"), {"feature": values}, bank, excluded).index[:, 0]
        return found

    left = (same & ~beside).any(axis=1)
    return Row(
        features=name,
        windows=len(owner),
        videos=len(np.unique(owner)),
        right=float((owner[nearest(itself)] == owner).mean()),
        right_apart=float((owner[nearest(beside)] == owner)[left].mean()),
        chance=float(((same & ~itself).sum(1) / (~itself).sum(1)).mean()),
        chance_apart=float(((same & ~beside).sum(1) / (~beside).sum(1))[left].mean()),
    )
