"""Real sign-language clips, where the folder is at hand (CASCADE_TEST_VIDEOS): nothing lost between file and cache."""

import os
from pathlib import Path

import numpy as np
import pytest

from cascade_engine.video.cache import ClipCache
from cascade_engine.video.clips import cut
from cascade_engine.video.decode import probe, read_frames
from cascade_engine.video.index import VideoIndex

FOLDER = Path(os.environ.get("CASCADE_TEST_VIDEOS", Path(__file__).parents[2] / "shared" / "video")) / "intel_asl"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real clips in {FOLDER}: set CASCADE_TEST_VIDEOS")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    index = VideoIndex.from_folder(FOLDER)
    return ClipCache.build(index, ("rgb", "flow"), 32, tmp_path_factory.mktemp("cache"))


def test_all_frames_of_all_clips_are_there(cache):
    assert len(cache) == 20
    assert cache.failed == cache.damaged == []
    assert sum(cache.length(row) for row in range(20)) == 1323
    for row, entry in enumerate(cache.index):
        info = probe(entry.path)
        assert (info.frames, info.width, info.height) == (cache.length(row), 640, 480)
        assert cache.fps(row) == info.fps == 30


def test_someone_moves_in_every_clip(cache):
    for row in range(len(cache)):
        flow = cache.frames("flow", row).astype(float)
        assert np.abs(flow).max() > 10
        assert np.median(np.abs(flow)) <= 2, "the camera stands still"
        assert (np.diff(cache.times(row)) > 0).all()


def test_windows_are_the_seconds_they_claim(cache):
    table = cut(cache, 16)
    assert len(table) > 100
    place = int(np.flatnonzero(table.start_frame > 0)[-1])
    row, first = int(table.row[place]), int(table.start_frame[place])
    read = read_frames(cache.index[row].path, size=32, start=float(table.start[place]), end=float(table.end[place]))
    assert np.array_equal(read.rgb, cache.frames("rgb", row, first, 16))
