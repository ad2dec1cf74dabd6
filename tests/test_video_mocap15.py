"""The rendered benchmark: labelled, deterministic, resumable, and its splits share no background."""

import json
from unittest.mock import Mock

import numpy as np
import pytest

from cascade_engine.errors import InvalidInput
from cascade_engine.video.decode import read_frames
from cascade_engine.video.index import VideoIndex

pytest.importorskip("pybullet")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from cascade_engine.video import mocap15, scene
from cascade_engine.video.photos import photographs


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mocap15")
    return folder, mocap15.render(folder, 2, 7, size=48, frames=8, test_share=0.5)


def bytes_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.mp4"))}


def test_every_action_has_its_videos_labels_and_splits(rendered):
    folder, index = rendered
    assert len(index) == 30
    assert index.labels == tuple(sorted(mocap15.ACTIONS))
    assert sorted(entry.label for entry in index.split("train")) == sorted(mocap15.ACTIONS)
    assert sorted(entry.label for entry in index.split("test")) == sorted(mocap15.ACTIONS)
    assert all(entry.path.parent.name == entry.label for entry in index)
    again = VideoIndex.from_csv(folder / "index.csv")
    assert [(e.path, e.label, e.split) for e in again] == [(e.path, e.label, e.split) for e in index]


def test_videos_show_something_that_moves_and_differ(rendered):
    _, index = rendered
    shown = [read_frames(entry.path, size=48).rgb.astype(float) for entry in index]
    assert all(frames.shape == (8, 48, 48, 3) for frames in shown)
    assert all(np.abs(np.diff(frames, axis=0)).max() > 50 for frames in shown)
    firsts = np.stack([frames[0].ravel() for frames in shown])
    apart = np.abs(firsts[:, None] - firsts[None]).max(-1) + 1e9 * np.eye(len(firsts))
    assert apart.min() > 50


def test_scenes_tell_nothing_of_the_action(rendered):
    _, index = rendered
    shown = np.stack([read_frames(entry.path, size=48).rgb.astype(float) for entry in index])
    number = np.array([int(entry.path.stem) for entry in index])
    scenes = [np.median(shown[number == which], axis=(0, 1)) for which in (0, 1)]
    assert np.abs(scenes[0] - scenes[1]).mean() > 5
    for pictures, which in zip(shown, number, strict=True):
        still = np.median(pictures, axis=0)
        assert np.median(np.abs(still - scenes[which])) < 5 < np.median(np.abs(still - scenes[1 - which]))


def test_persons_are_the_same_in_every_action_and_others_in_the_test_split():
    request = mocap15.Request(videos_per_class=16, seed=0, size=48, frames=8, test_share=0.25)
    clothes = {}
    for number in range(16):
        painter = Mock(getNumJoints=Mock(return_value=0))
        build = scene.dress(painter, 0, 0, mocap15.person(request, number))
        colour = painter.changeVisualShape.call_args.kwargs["rgbaColor"]
        clothes.setdefault((request.split(number), number // mocap15.SCENES), set()).add((*colour, build))
    assert [split for split, _ in clothes] == ["train", "train", "train", "test"]
    assert all(len(worn) == 1 for worn in clothes.values())
    assert len(set().union(*clothes.values())) == 4


def test_two_processes_render_the_same_bytes(rendered, tmp_path):
    folder, _ = rendered
    mocap15.render(tmp_path, 2, 7, size=48, frames=8, test_share=0.5, workers=2)
    assert bytes_of(tmp_path) == bytes_of(folder)


def test_a_second_call_renders_only_what_is_missing(rendered):
    folder, _ = rendered
    before = bytes_of(folder)
    lost = folder / "walk" / "0001.mp4"
    lost.unlink()
    stamps = {file: (folder / file).stat().st_mtime_ns for file in before if folder / file != lost}
    calls = []
    mocap15.render(folder, 2, 7, size=48, frames=8, test_share=0.5, progress=lambda *told: calls.append(told))
    assert bytes_of(folder) == before
    assert all((folder / file).stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    assert calls == [(29, 30, lost), (30, 30, lost)]


def test_another_seed_does_not_go_into_the_same_folder(rendered):
    folder, _ = rendered
    with pytest.raises(InvalidInput, match="expected videos rendered with"):
        mocap15.render(folder, 2, 8, size=48, frames=8, test_share=0.5)


def test_splits_share_no_background_pixel():
    train, test = photographs("train"), photographs("test")
    assert len(train) == len(test) >= 5
    for left, right in zip(train, test, strict=True):
        whole = left.shape[1] + right.shape[1]
        assert left.shape[1] == int(0.7 * whole)


def test_postures_change_smoothly(tmp_path):
    rows = np.zeros((3, 44))
    rows[:, 0] = 0.1
    for place in scene.quaternions():
        rows[:, place] = [1, 0, 0, 0]
    rows[1, 4:8] *= -1  # the same rotation, written the other way
    (tmp_path / "motion.txt").write_text(json.dumps({"Loop": "wrap", "Frames": rows.tolist()}))
    motion = scene.Recording.load(str(tmp_path / "motion.txt"))
    assert motion.cycle == pytest.approx(0.3)
    for seconds in np.linspace(0, 1, 41):
        np.testing.assert_allclose(np.abs(motion.at(seconds)[4:8]), [1, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("wrong", [{"size": 47}, {"frames": 0}, {"test_share": 1.0}, {"workers": 0}])
def test_bad_arguments_are_refused(tmp_path, wrong):
    with pytest.raises(InvalidInput, match="mocap15: expected"):
        mocap15.render(tmp_path, 1, 0, **wrong)
