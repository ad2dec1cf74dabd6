"""Sliding windows and batches of videos: the same whatever the batch, and a bad file never stops the others."""

import re
from pathlib import Path

import deployed
import films
import numpy as np
import pytest

from cascade_engine.deployment.artefact import Model
from cascade_engine.deployment.predict import find_videos, predict
from cascade_engine.deployment.windows import Limits, sliding_windows
from cascade_engine.errors import InvalidInput, VideoError
from cascade_engine.video.clips import windows
from cascade_engine.video.views import extract


@pytest.fixture(scope="module")
def program():
    return deployed.Live(deployed.classifier())


@pytest.fixture
def model(program):
    program.batches = []
    return Model(Path("live.pt2"), deployed.signature(program.classifier), program)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three good videos of different lengths in a tree."""
    root = tmp_path_factory.mktemp("videos")
    films.write(root / "a.mp4", films.moving(20))
    films.write(root / "inner" / "b.mkv", films.moving(31, seed=1))
    films.write(root / "inner" / "c.avi", films.moving(7, step=(0, 1), seed=2), codec="mpeg4")
    (root / "notes.txt").write_text("not a video")
    return root


@pytest.mark.parametrize("length", [7, 8, 20, 150, 263])
@pytest.mark.parametrize("step", [None, 1, 9, 50])
def test_windows_are_those_of_the_whole_video(tmp_path, length, step):
    made = deployed.signature(deployed.classifier(("residual",)))
    path = films.write(tmp_path / "v.mp4", films.moving(length, height=48, width=48, step=(1, 0)))
    whole = extract(path, ["residual"], size=deployed.SIZE)["residual"]
    found = list(sliding_windows(path, made, step=step))
    starts = windows(length, made.span, step)
    assert [round(each.start * 25) for each in found] == starts.tolist()
    for start, each in zip(starts, found, strict=True):
        assert np.array_equal(each.pixels["residual"], whole[start : start + made.span : deployed.STRIDE])
        assert each.end == pytest.approx((start + made.span) / 25)


def test_results_do_not_depend_on_the_batch_and_batches_span_videos(model, program, folder):
    videos = find_videos([folder])
    one = list(predict(model, videos, batch=1))
    program.batches = []
    many = list(predict(model, videos, batch=5))
    assert [each.path for each in many] == [each.path for each in one] == videos
    assert program.batches[:-1] == [5] * (len(program.batches) - 1)  # only the last batch is not full
    for a, b in zip(one, many, strict=True):
        assert a.best()[0][0] == b.best()[0][0]
        assert np.abs(a.probabilities - b.probabilities).max() < 1e-5


def test_a_result_is_the_mean_of_its_windows(model, folder):
    result = next(predict(model, [folder / "a.mp4"]))
    assert len(result.windows) == len(windows(20, 7, 3))
    mean = np.mean([each.probabilities for each in result.windows], axis=0)
    assert np.allclose(result.probabilities, mean, atol=1e-6)
    row = result.to_json(top=2, timeline=True)
    assert row["ok"]
    assert row["label"] == deployed.LABELS[int(mean.argmax())]
    assert len(row["top"]) == 2
    assert row["top"][0]["score"] >= row["top"][1]["score"]
    assert [each["start"] for each in row["timeline"]] == sorted(each["start"] for each in row["timeline"])


def bad_videos(root: Path) -> dict[str, tuple[Path, str]]:
    """One file for each way to be bad that leaves nothing to classify, with what is said of it."""
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("hello " * 500)
    good = films.write(root / "good.mp4", films.moving(12)).read_bytes()
    (root / "headless.mp4").write_bytes(good[: len(good) // 2])
    return {
        "missing": (root / "missing.mp4", "no such file"),
        "empty": (root / "empty.mp4", "empty"),
        "text": (root / "text.mp4", "not a readable video"),
        "truncated": (root / "headless.mp4", "not a readable video"),
        "audio": (films.audio_only(root / "sound.m4a"), "no video stream, only audio"),
        "zero frames": (films.without_frames(root / "nothing.avi"), "no frame can be decoded|not a readable"),
        "short": (films.write(root / "short.mp4", films.moving(6)), "6 frames, the model's clips reach over 7"),
    }


def test_each_bad_file_is_told_and_the_others_go_on(model, folder, tmp_path):
    cases = bad_videos(tmp_path)
    videos = [folder / "a.mp4", *(path for path, _ in cases.values()), folder / "inner" / "b.mkv"]
    results = {each.path: each for each in predict(model, videos, batch=4)}
    assert list(results) == videos
    for path, message in cases.values():
        assert results[path].failed
        assert str(path) in results[path].problem

        assert re.search(message, results[path].problem), results[path].problem
        assert results[path].to_json() == {"path": str(path), "ok": False, "problem": results[path].problem}
    alone = {each.path: each for each in predict(model, [videos[0], videos[-1]], batch=4)}
    for path in alone:
        assert results[path].problem is None
        assert np.abs(results[path].probabilities - alone[path].probabilities).max() < 1e-5


def test_a_video_cut_short_is_labelled_by_what_is_left_and_says_so(model, tmp_path):
    whole = films.write(tmp_path / "whole.mkv", films.moving(60)).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: int(len(whole) * 0.6)])
    result = next(predict(model, [tmp_path / "cut.mkv"]))
    assert not result.failed
    assert result.problem.startswith(f"{tmp_path / 'cut.mkv'}: ")
    assert result.to_json()["ok"] is False


def test_rotated_variable_rate_and_ten_bit_videos_are_labelled(model, tmp_path):
    pictures = films.moving(24)
    upright = films.write(tmp_path / "upright.mp4", np.rot90(pictures, -1, axes=(1, 2)))
    videos = [
        upright,
        films.rotated(tmp_path / "rotated.mp4", pictures, 1),
        films.write(tmp_path / "vfr.mkv", pictures, times=[40 * t + (t % 3) * 11 for t in range(24)]),
        films.write(tmp_path / "deep.mkv", pictures, codec="libx265", pix_fmt="yuv420p10le"),
    ]
    results = list(predict(model, videos))
    assert [each.problem for each in results] == [None] * 4
    # the phone's video, stored on its side, is classified as the upright one
    assert np.abs(results[1].probabilities - results[0].probabilities).max() < 0.1
    ends = [each.end for each in results[2].windows]
    assert ends == sorted(ends)


def test_limits_are_kept_before_and_while_decoding(tmp_path):
    made = deployed.signature(deployed.classifier(("rgb",)))
    path = films.write(tmp_path / "v.mp4", films.moving(50))
    assert list(sliding_windows(path, made, limits=Limits(seconds=3, frame_pixels=10_000, total_pixels=1e6)))
    for limits, message in [
        (Limits(seconds=1), "2 s of video, at most 1 s"),
        (Limits(frame_pixels=1000), "more than 1000 pixels"),
        (Limits(total_pixels=100_000), "at most 0 are taken"),
    ]:
        with pytest.raises(VideoError, match=message) as caught:
            list(sliding_windows(path, made, limits=limits))
        assert str(path) in str(caught.value)


def test_files_folders_and_patterns_are_found_once_in_order(folder, tmp_path):
    inner = folder / "inner"
    assert find_videos([folder]) == [folder / "a.mp4", inner / "b.mkv", inner / "c.avi"]
    assert find_videos([str(folder / "*" / "*.mkv"), folder]) == [inner / "b.mkv", folder / "a.mp4", inner / "c.avi"]
    assert find_videos([tmp_path / "gone.mp4"]) == [tmp_path / "gone.mp4"]
    odd = films.write(tmp_path / "what[1]?.mp4", films.moving(8))
    assert find_videos([odd]) == [odd]
    for nothing in (tmp_path / "*.mkv", tmp_path / "void"):
        (tmp_path / "void").mkdir(exist_ok=True)
        with pytest.raises(InvalidInput, match="expected videos in"):
            find_videos([nothing])
