"""Photographs for backgrounds: sample images of scikit-image and scikit-learn, in two parts that share no pixel."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.errors import BackendUnavailable

Photo: TypeAlias = npt.NDArray[np.uint8]
Split: TypeAlias = Literal["train", "test"]

_SKIMAGE = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "ihc.png", "hubble_deep_field.jpg"),
    *("motorcycle_left.png", "grass.png", "gravel.png", "brick.png", "camera.png", "coins.png", "retina.jpg"),
)
_SKLEARN = ("china.jpg", "flower.jpg")
_TRAIN_SHARE = 0.7  # of each photograph's columns, from the left


@cache
def photographs(split: Split) -> tuple[Photo, ...]:
    """RGB photographs (H, W, 3): the left of each for training, the right for testing, so no pixel is in both.

    Raises:
        BackendUnavailable: scikit-image or scikit-learn is not installed.
    """
    files = [_folder("skimage") / "data" / name for name in _SKIMAGE]
    files += [_folder("sklearn") / "datasets" / "images" / name for name in _SKLEARN]
    found = []
    for file in files:
        picture = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if picture is None:
            continue  # releases of scikit-image differ in what they carry
        cut = int(_TRAIN_SHARE * picture.shape[1])
        part = picture[:, :cut] if split == "train" else picture[:, cut:]
        found.append(np.ascontiguousarray(part[..., ::-1]).astype(np.uint8, copy=False))
    return tuple(found)


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise BackendUnavailable(f"{package} is not installed: pip install 'cascade-engine[demo]'")
    return Path(spec.origin).parent
