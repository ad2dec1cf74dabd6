"""A small cache of clips in memory, made of moving squares, with what training asks of `ClipCache`."""

from pathlib import Path

import numpy as np

from cascade_engine.video.index import VideoEntry, VideoIndex

SIDE, FRAMES = 24, 10


class MovingSquares:
    """Videos of a square that moves one of four ways over noise: the class is the way, rgb and flow show it.

    Args:
        count: videos; the last `tests` of them are of split test.
    """

    folder = Path()

    def __init__(self, count=24, tests=4, seed=0):
        rng = np.random.default_rng(seed)
        ways = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])
        self.label = np.arange(count) % 4
        entries = [
            VideoEntry(
                path=Path(f"{n}.mp4"),
                video_id=n,
                label=f"way{self.label[n]}",
                split="test" if n >= count - tests else "train",
                group=f"g{n // 2}",
            )
            for n in range(count)
        ]
        self.index = VideoIndex(entries)
        self.failed = self.damaged = []
        self._rgb = rng.integers(60, 100, (count, FRAMES, SIDE, SIDE, 3)).astype(np.uint8)
        self._flow = rng.integers(-4, 5, (count, FRAMES, SIDE, SIDE, 2)).astype(np.int8)
        for n in range(count):
            at = rng.integers(6, SIDE - 8, 2)
            for t in range(FRAMES):
                y, x = (at + t * ways[self.label[n]]) % (SIDE - 4)
                self._rgb[n, t, y : y + 4, x : x + 4] = 250
                self._flow[n, t, y : y + 4, x : x + 4] = ways[self.label[n]][::-1] * 100

    views = ("rgb", "flow")
    size = SIDE

    def __len__(self):
        return len(self.index)

    def length(self, row):
        return FRAMES

    def fps(self, row):
        return 10.0

    def times(self, row):
        return np.arange(FRAMES) / 10

    def frames(self, view, row, start=0, length=None):
        return {"rgb": self._rgb, "flow": self._flow}[view][row, start : start + (length or FRAMES - start)]
