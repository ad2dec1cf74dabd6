"""Decoding: what comes out of good files, and what each kind of bad file says."""

import re

import films
import numpy as np
import pytest

from cascade_engine.errors import InvalidInput, VideoError
from cascade_engine.video.decode import probe, read_frames
from cascade_engine.video.reader import VideoReader

SHARP = {"crf": "1"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return films.write(tmp_path_factory.mktemp("plain") / "plain.mp4", films.moving(20), options=SHARP)


def test_probe_tells_what_is_in_the_file(plain):
    info = probe(plain)
    assert (info.frames, info.fps, info.width, info.height) == (20, 25.0, 96, 64)
    assert info.duration == pytest.approx(0.8, abs=0.01)
    assert (info.rotation, info.pix_fmt, info.codec) == (0, "yuv420p", "h264")


def test_frames_are_the_scaled_centre(plain):
    frames = read_frames(plain, size=32)
    assert frames.rgb.shape == (20, 32, 32, 3)
    assert frames.rgb.dtype == np.uint8
    assert frames.problem is None
    np.testing.assert_allclose(frames.time, np.arange(20) / 25, atol=1e-9)
    whole = films.moving(20)[:, :, 16:80].astype(float)
    expected = whole.reshape(20, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(frames.rgb - expected).mean() < 3


def test_an_interval_is_cut_out_by_time(plain):
    whole = read_frames(plain, size=32)
    part = read_frames(plain, size=32, start=0.2, end=0.4)
    np.testing.assert_allclose(part.time, [0.2, 0.24, 0.28, 0.32, 0.36], atol=1e-9)
    assert np.array_equal(part.rgb, whole.rgb[5:10])
    assert len(read_frames(plain, size=32, start=0.2, max_frames=3)) == 3


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_honoured(tmp_path, turns):
    pictures = films.moving(6)
    upright = read_frames(films.write(tmp_path / "upright.mp4", pictures, options=SHARP), size=64)
    path = films.rotated(tmp_path / "turned.mp4", pictures, turns)
    info = probe(path)
    assert info.rotation == 360 - 90 * turns
    assert (info.width, info.height) == ((64, 96) if turns % 2 else (96, 64))
    turned = read_frames(path, size=64).rgb
    expected = np.rot90(upright.rgb, -turns, axes=(1, 2))
    assert np.abs(turned.astype(float) - expected).mean() < 6
    assert np.abs(turned.astype(float) - upright.rgb).mean() > 20


def test_times_of_a_variable_frame_rate_come_from_the_stream(tmp_path):
    times = [0, 40, 80, 200, 210, 400, 1000, 1040]
    path = films.write(tmp_path / "vfr.mkv", films.moving(8), times=times)
    frames = read_frames(path, size=32)
    np.testing.assert_allclose(frames.time * 1000, times, atol=1e-6)
    np.testing.assert_allclose(read_frames(path, size=32, start=0.2, end=1.0).time * 1000, [200, 210, 400], atol=1e-6)


def test_ten_bits_become_eight(tmp_path):
    pictures = films.moving(6)
    path = films.write(tmp_path / "deep.mkv", pictures, codec="libx265", pix_fmt="yuv420p10le")
    assert probe(path).pix_fmt == "yuv420p10le"
    frames = read_frames(path, size=64)
    assert frames.rgb.dtype == np.uint8
    assert np.abs(frames.rgb - pictures[:, :, 16:80].astype(float)).mean() < 10


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.parent / "absent.mp4", "no such file"),
        (lambda path: path.parent, "not a file"),
        (lambda path: (path.write_bytes(b"") and None) or path, "the file is empty"),
        (lambda path: path.write_bytes(b"no video at all " * 100) and path, "not a readable video"),
        (films.audio_only, "no video stream, only audio"),
        (films.without_frames, "no frame can be decoded"),
    ],
    ids=["missing", "folder", "empty", "text", "audio", "no-frames"],
)
def test_what_cannot_be_read_says_why_and_which(tmp_path, make, reason):
    path = make(tmp_path / "bad.mp4")
    for read in (probe, lambda file: read_frames(file, size=32)):
        with pytest.raises(VideoError, match=reason) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    path = films.write(tmp_path / "huge.mp4", np.zeros((2, 720, 1280, 3), np.uint8))
    with pytest.raises(VideoError, match="1280 x 720 is more than 500000 pixels"):
        read_frames(path, size=32, max_pixels=500_000)
    assert len(read_frames(path, size=32)) == 2


@pytest.mark.parametrize("ending", ["mkv", "ts", "avi"])
def test_a_truncated_video_is_read_as_far_as_it_goes(tmp_path, ending):
    path = films.write(tmp_path / f"long.{ending}", films.moving(100), options={"g": "10"})
    whole = read_frames(path, size=32)
    assert whole.problem is None
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 10])
    part = read_frames(path, size=32)
    assert 10 < len(part) < 60
    if ending != "ts":  # a transport stream announces no length
        assert part.problem is not None
    assert np.array_equal(part.rgb[:10], whole.rgb[:10])


@pytest.mark.parametrize("ending", ["mkv", "webm", "mp4", "mov"])
@pytest.mark.parametrize(("late", "sound"), [(1000, 4), (5000, 0)])
def test_a_video_that_starts_late_is_whole_and_as_long_as_its_picture(tmp_path, ending, late, sound):
    kind = {"codec": "libvpx"} if ending == "webm" else {"sound": sound}
    times = [late + 100 * frame for frame in range(30)]
    path = films.write(tmp_path / f"late.{ending}", films.moving(30), fps=10, times=times, **kind)
    frames = read_frames(path, size=32)
    assert frames.problem is None
    np.testing.assert_allclose(frames.time, np.arange(30) / 10, atol=1e-9)
    assert probe(path).duration == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("writer", ["libavformat", "mkvmerge"])
def test_a_matroska_that_starts_late_and_is_cut_off_is_noted(tmp_path, writer):
    times = [5000 + 100 * frame for frame in range(30)]
    path = films.write(tmp_path / "late.mkv", films.moving(30), fps=10, times=times, options={"g": "5"})
    data = path.read_bytes()
    if writer == "mkvmerge":  # which calls the length of a track its duration, not the time of its end
        data = data.replace(b"Lavf", b"libe").replace(b"00:00:08.000000000", b"00:00:03.000000000")
        path.write_bytes(data)
        assert read_frames(path, size=32).problem is None
    assert probe(path).duration == pytest.approx(3, abs=0.01)
    path.write_bytes(data[: len(data) * 6 // 10])
    assert re.match(r"ends after [012]\.\d\d of 3\.00 s", read_frames(path, size=32).problem)


@pytest.mark.parametrize("ending", ["mkv", "mp4", "mov", "gif"])
def test_a_last_picture_that_stays_is_no_missing_end(tmp_path, ending):
    kind = {"codec": "gif", "pix_fmt": "rgb8"} if ending == "gif" else {"options": {"bf": "0"}}
    path = films.write(tmp_path / f"still.{ending}", films.moving(20), hold=5, **kind)
    assert probe(path).duration == pytest.approx(5.76, abs=0.05)
    assert read_frames(path, size=32).problem is None


def test_damage_in_the_middle_is_flagged_and_the_rest_is_read(tmp_path):
    path = films.write(tmp_path / "long.mp4", films.moving(100), options={"g": "10"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(bytes(data))
    frames = read_frames(path, size=32)
    assert frames.problem is not None
    assert len(frames) > 40


def test_a_playlist_opens_no_other_file(tmp_path):
    films.write(tmp_path / "secret.ts", films.moving(10))
    for name in ("upload.mp4", "upload.m3u8"):
        playlist = tmp_path / name
        playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\nsecret.ts\n#EXT-X-ENDLIST\n")
        with pytest.raises(VideoError, match="not a readable video"):
            read_frames(playlist, size=32)


def test_bad_arguments_are_refused(plain):
    for options in ({"size": 0}, {"size": 8, "start": -1.0}, {"size": 8, "start": 2.0, "end": 1.0}):
        with pytest.raises(InvalidInput):
            read_frames(plain, **options)
    with pytest.raises(InvalidInput, match="max_frames"):
        read_frames(plain, size=8, max_frames=0)
    with pytest.raises(VideoError, match="no frame between 5 s and the end"):
        read_frames(plain, size=8, start=5.0)


def test_a_reader_gives_frames_one_by_one(plain):
    with VideoReader(plain, size=16) as reader:
        first = next(iter(reader.frames()))
    assert first.rgb.shape == (16, 16, 3)
    assert first.motion is None


def test_a_reader_begins_anew_each_time(plain):
    with VideoReader(plain, size=16) as reader:
        assert reader.info() == probe(plain)
        assert len(list(reader.frames())) == 20
        assert [frame.time for frame in reader.frames(0.2, 0.3)] == pytest.approx([0.2, 0.24, 0.28])
        assert len(list(reader.frames())) == 20
        assert reader.info() == probe(plain)
        assert reader.problem is None


def test_frames_of_a_reader_that_was_closed_or_read_anew_are_refused(plain):
    with VideoReader(plain, size=16) as reader:
        older, newer = reader.frames(), reader.frames()
        assert next(older).time == next(newer).time == 0
        with pytest.raises(InvalidInput, match="was closed or read anew"):
            next(older)
        assert next(newer).time == pytest.approx(0.04)
    with pytest.raises(InvalidInput, match="was closed or read anew"):
        next(newer)
    for read in (reader.info, lambda: next(reader.frames())):
        with pytest.raises(InvalidInput, match="the reader is closed"):
            read()
    with VideoReader(plain, size=None) as probing, pytest.raises(InvalidInput, match="this one only probes"):
        next(probing.frames())


def test_a_strip_no_video_has_is_refused(tmp_path):
    path = films.write(tmp_path / "strip.mp4", np.zeros((2, 16, 640, 3), np.uint8))
    for read in (probe, lambda file: read_frames(file, size=32)):
        with pytest.raises(VideoError, match="640 x 16 is too narrow for a video"):
            read(path)


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    pictures = films.moving(4, 64, 64)
    path = films.write(tmp_path / "wide.mp4", pictures, options=SHARP, aspect=2)
    assert (probe(path).width, probe(path).height) == (128, 64)
    frames = read_frames(path, size=64)
    middle = np.repeat(pictures[:, :, 16:48], 2, axis=2)
    assert np.abs(frames.rgb - middle.astype(float)).mean() < 12


def test_a_resolution_that_changes_midway_keeps_the_size_of_frames(tmp_path):
    small = films.write(tmp_path / "a.ts", films.moving(6, 64, 64))
    large = films.write(tmp_path / "b.ts", films.moving(6, 128, 160))
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    frames = read_frames(both, size=32)
    assert frames.rgb.shape == (12, 32, 32, 3)
    assert (np.diff(frames.time) > 0).all()


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "avi", "flv"])
@pytest.mark.parametrize("options", [{"g": "12"}, {"g": "12", "bf": "3", "x264-params": "open-gop=1"}, {"g": "250"}])
def test_a_part_is_what_the_whole_has_there(tmp_path, ending, options):
    path = films.write(tmp_path / f"film.{ending}", films.moving(80, 32, 48, (1, 0)), options=options)
    whole = read_frames(path, size=16)
    assert len(whole) == 80
    # Around key frames, where the seek of some containers lands behind the time asked for, and at the end.
    for first in (1, 11, 13, 35, 47, 59, 71, 79):
        part = read_frames(path, size=16, start=float(whole.time[first]), end=float(whole.time[first]) + 0.12)
        assert np.array_equal(part.rgb, whole.rgb[first : first + 3])
        np.testing.assert_allclose(part.time, whole.time[first : first + 3], atol=1e-9)
