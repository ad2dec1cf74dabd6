"""Motion vectors: how the encoder says each block moved, read from the stream instead of computed.

FFmpeg exports them for H.264, MPEG-4, MPEG-2 and MPEG-1; other codecs have none here and give zeros.

Source: Wu et al., CVPR 2018 (Compressed Video Action Recognition).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from av.video.frame import VideoFrame


def motion_field(frame: VideoFrame, width: int, height: int) -> npt.NDArray[np.float32]:
    """Pixels that each point moved since the frame before, (height, width, 2) x and y, at the scaled size.

    A pixel gets the vector of the block its centre lies in. Blocks coded without a vector, and whole pictures coded by
    themselves (key frames), stay zero: the stream says nothing about them. A vector to a frame further back than one
    is taken as it stands, since the side data does not tell how far back it points.
    """
    field = np.zeros((height, width, 2), np.float32)
    vectors = _vectors(frame)
    if vectors is None or not len(vectors):
        return field
    past = vectors["source"] < 0
    # Future references first: where a block has both, the past one is written over it.
    vectors = np.concatenate([vectors[~past], vectors[past]])
    # src = dst + motion / scale. A past source moved from src to dst; a future one shows where dst will go.
    sign = np.where(vectors["source"] < 0, -1.0, 1.0) / np.maximum(vectors["motion_scale"], 1)
    across, down = width / frame.width, height / frame.height
    moved = np.stack([vectors["motion_x"] * sign * across, vectors["motion_y"] * sign * down], axis=1)
    left, columns = _span(vectors["dst_x"], vectors["w"], across, width)
    top, rows = _span(vectors["dst_y"], vectors["h"], down, height)
    # All pixels of all blocks in one list: block after block, row after row.
    counts = rows * columns
    block = np.repeat(np.arange(len(vectors)), counts)
    within = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
    y, x = np.divmod(within, columns[block])
    field[top[block] + y, left[block] + x] = moved[block]
    return field


def _span(
    centre: npt.NDArray[Any], length: npt.NDArray[Any], scale: float, most: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first pixel whose centre lies in each block, and how many do, inside the picture."""
    half = length.astype(np.float64) / 2
    first = np.clip(np.ceil((centre - half) * scale - 0.5), 0, most).astype(np.int64)
    last = np.clip(np.ceil((centre + half) * scale - 0.5), 0, most).astype(np.int64)
    return first, last - first


def _vectors(frame: VideoFrame) -> npt.NDArray[Any] | None:
    data: Any = frame.side_data.get("MOTION_VECTORS")
    return None if data is None else np.asarray(data.to_ndarray())
