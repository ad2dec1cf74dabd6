"""The geometry of decoded pictures: shape, rotation, and the square that is cut out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def scaled_size(width: float, height: float, short: int) -> tuple[int, int]:
    """Width and height after the shorter one is scaled to `short`; neither falls under it."""
    scale = short / min(width, height)
    return max(short, round(width * scale)), max(short, round(height * scale))


def quarter_turns(rotation: int) -> int:
    """Counter-clockwise quarter turns nearest to `rotation` degrees, 0 to 3."""
    return round(rotation / 90) % 4


def centre_cut(picture: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """The middle (size, size, C) of a picture (H, W, C)."""
    top, left = (picture.shape[0] - size) // 2, (picture.shape[1] - size) // 2
    return picture[top : top + size, left : left + size]


def turned_field(field: npt.NDArray[np.float32], turns: int) -> npt.NDArray[np.float32]:
    """A vector field (H, W, 2) turned counter-clockwise with its picture; y points down: (x, y) becomes (y, -x)."""
    field = np.rot90(field, turns)
    for _ in range(turns):
        field = np.stack([field[..., 1], -field[..., 0]], axis=-1)
    return np.ascontiguousarray(field)
