"""Motion vectors: how the encoder says each block moved, read from the stream instead of computed.

FFmpeg exports them for H.264, MPEG-4, MPEG-2 and MPEG-1; other codecs have none here and give zeros.

Source: Wu et al., CVPR 2018 (Compressed Video Action Recognition).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

_CELL = 4  # every block of these codecs is a whole number of 4 x 4 cells, at a multiple of 4


def motion_field(frame: VideoFrame, width: int, height: int) -> npt.NDArray[np.float32]:
    """Pixels that each point moved since the frame before, (height, width, 2) x and y, at the scaled size.

    Blocks coded without a vector, and whole pictures coded by themselves (key frames), stay zero: the stream says
    nothing about them. A vector to a frame further back than one is taken as it stands, since the side data does not
    tell how far back it points.
    """
    vectors = _vectors(frame)
    if vectors is None or not len(vectors):
        return np.zeros((height, width, 2), np.float32)
    # src = dst + motion / scale. A past source moved from src to dst; a future one shows where dst will go.
    sign = np.where(vectors["source"] < 0, -1.0, 1.0) / np.maximum(vectors["motion_scale"], 1)
    moved = np.stack([vectors["motion_x"] * sign, vectors["motion_y"] * sign], axis=1).astype(np.float32)
    grid = _cells(vectors, moved, frame.width, frame.height)
    shrinks = width < grid.shape[1]
    field = cv2.resize(grid, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST)
    return np.asarray(field * np.array([width / frame.width, height / frame.height], np.float32))


def _cells(
    vectors: npt.NDArray[Any], moved: npt.NDArray[np.float32], width: int, height: int
) -> npt.NDArray[np.float32]:
    """The displacement (n, 2) of each block written to the 4 x 4 cells it covers, (rows, columns, 2)."""
    rows, columns = -(-height // _CELL), -(-width // _CELL)
    grid = np.zeros((rows, columns, 2), np.float32)
    past = vectors["source"] < 0
    sizes = np.unique(np.stack([vectors["w"], vectors["h"]], axis=1), axis=0)
    # Future references first: where a block has both, the past one is what stays.
    for chosen in (~past, past):
        for w, h in sizes:
            block = chosen & (vectors["w"] == w) & (vectors["h"] == h)
            left = (vectors["dst_x"][block].astype(int) - int(w) // 2) // _CELL
            top = (vectors["dst_y"][block].astype(int) - int(h) // 2) // _CELL
            for down in range(max(1, int(h) // _CELL)):
                for right in range(max(1, int(w) // _CELL)):
                    y, x = top + down, left + right
                    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
                    grid[y[inside], x[inside]] = moved[block][inside]
    return grid


def _vectors(frame: VideoFrame) -> npt.NDArray[Any] | None:
    data: Any = frame.side_data.get("MOTION_VECTORS")
    return None if data is None else np.asarray(data.to_ndarray())
