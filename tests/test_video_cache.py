"""The clip cache: the same bits however it was built, nothing lost when a build is killed, broken videos listed."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import films
import numpy as np
import pytest

from cascade_engine.errors import InvalidInput, StoreError
from cascade_engine.video import extraction, journal
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.clips import cut, windows
from cascade_engine.video.decode import read_frames
from cascade_engine.video.index import VideoEntry, VideoIndex
from cascade_engine.video.views import VIEWS, extract

ALL = tuple(VIEWS)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for number in range(6):
        shown = films.moving(8 + 3 * number, 32, 48, (number % 3, 1), seed=number)
        films.write(folder / f"kind{number % 2}" / f"film{number}.mp4", shown)
    return VideoIndex.from_folder(folder, split="train")


@pytest.fixture(scope="module")
def whole(index, tmp_path_factory):
    return ClipCache.build(index, ALL, 32, tmp_path_factory.mktemp("cache") / "whole")


def contents(cache):
    """Every array of a cache."""
    return {(view, row): np.array(cache.frames(view, row)) for view in cache.views for row in range(len(cache))} | {
        ("time", row): np.array(cache.times(row)) for row in range(len(cache))
    }


def same(one, other):
    one, other = contents(one), contents(other)
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_it_holds_what_extract_gives(index, whole):
    assert len(whole) == len(index) == 6
    assert whole.failed == whole.damaged == []
    for row, entry in enumerate(index):
        expected = extract(entry.path, ALL, size=32)
        assert whole.length(row) == len(expected["rgb"]) == 8 + 3 * int(entry.path.stem[-1])
        assert whole.fps(row) == 25.0
        for name in ALL:
            assert np.array_equal(whole.frames(name, row), expected[name])
        np.testing.assert_array_equal(whole.times(row), read_frames(entry.path, size=32).time)


def test_frames_are_mapped_not_copied(whole):
    part = whole.frames("flow", 3, 2, 5)
    assert part.shape == (5, 32, 32, 2)
    assert isinstance(part, np.memmap)
    assert np.shares_memory(part, whole.frames("flow", 3))
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 0


def test_frames_it_does_not_have_are_refused(whole):
    for start, length in ((0, 9), (-1, 2), (8, 1)):
        with pytest.raises(InvalidInput, match="has 8, asked for"):
            whole.frames("rgb", 0, start, length)
    with pytest.raises(InvalidInput, match="view: expected one of rgb"):
        whole.frames("sound", 0)


def test_it_opens_again_and_travels_to_other_processes(whole):
    opened = ClipCache.open(whole.folder)
    assert same(opened, whole)
    assert [(e.path, e.label, e.split, e.video_id) for e in opened.index] == [
        (e.path, e.label, e.split, e.video_id) for e in whole.index
    ]
    packed = pickle.dumps(whole)
    assert len(packed) < 5000, "no frames are packed"
    assert same(pickle.loads(packed), whole)


def test_it_stays_with_its_videos_when_the_folder_is_built_for_others(index, tmp_path):
    first = ClipCache.build(index, ("rgb",), 32, tmp_path / "cache")
    packed, before = pickle.dumps(first), contents(first)
    ClipCache.build(VideoIndex(index.entries[:1:-1]), ("rgb",), 32, tmp_path / "cache")
    travelled = pickle.loads(packed)
    assert contents(travelled).keys() == before.keys()
    assert same(travelled, first)
    assert index.difference(travelled.index) is None


def test_two_workers_store_the_same_bits(index, whole, tmp_path):
    told = []
    both = ClipCache.build(index, ALL, 32, tmp_path / "both", workers=2, progress=lambda *step: told.append(step))
    for name in (*ALL, "time"):
        assert (both.folder / f"{name}.bin").read_bytes() == (whole.folder / f"{name}.bin").read_bytes()
    assert [step[0] for step in told] == list(range(7))
    assert {step[1] for step in told} == {6}


def test_a_second_build_extracts_nothing(index, whole, tmp_path, monkeypatch):
    shutil.copytree(whole.folder, tmp_path / "copy")
    monkeypatch.setattr(extraction, "extract_part", None)
    again = ClipCache.build(index, ALL, 32, tmp_path / "copy")
    assert same(again, whole)


def test_a_changed_index_extracts_only_what_is_new(index, tmp_path):
    few = VideoIndex([index[4], index[1]])
    cache = ClipCache.build(few, ["rgb"], 32, tmp_path / "cache")
    stored = (cache.folder / "rgb.bin").read_bytes()
    more = VideoIndex([index[0], index[1], index[4]])
    grown = ClipCache.build(more, ["rgb"], 32, tmp_path / "cache")
    assert (cache.folder / "rgb.bin").read_bytes()[: len(stored)] == stored
    for row, entry in enumerate(more):
        assert np.array_equal(grown.frames("rgb", row), read_frames(entry.path, size=32).rgb)


def test_videos_are_known_by_content(index, tmp_path):
    moved = tmp_path / "elsewhere.mp4"
    shutil.copyfile(index[2].path, moved)
    twice = VideoIndex([index[2], VideoEntry(path=moved, video_id=0, label="copy")])
    cache = ClipCache.build(twice, ["rgb"], 32, tmp_path / "cache")
    assert np.array_equal(cache.frames("rgb", 0), cache.frames("rgb", 1))
    assert (cache.folder / "rgb.bin").stat().st_size == cache.length(0) * 32 * 32 * 3
    films.write(moved, films.moving(5, 32, 32, seed=9))
    changed = ClipCache.build(twice, ["rgb"], 32, tmp_path / "cache")
    assert (changed.length(0), changed.length(1)) == (cache.length(0), 5)


def test_parts_of_videos_are_rows_of_their_own(index, tmp_path):
    path = index[5].path
    parts = VideoIndex(
        [VideoEntry(path=path, video_id=0, start=a, end=b) for a, b in ((0.0, 0.2), (0.2, 0.48), (0.2, None))]
    )
    cache = ClipCache.build(parts, ["rgb"], 32, tmp_path / "cache")
    everything = read_frames(path, size=32).rgb
    for row, chosen in enumerate((slice(0, 5), slice(5, 12), slice(5, None))):
        assert np.array_equal(cache.frames("rgb", row), everything[chosen])
    assert cache.times(1)[0] == pytest.approx(0.2)


def test_broken_videos_are_listed_and_the_rest_goes_on(index, tmp_path):
    empty = tmp_path / "empty.mp4"
    empty.touch()
    cut_off = films.write(tmp_path / "cut.mkv", films.moving(80, 32, 48), options={"g": "8"})
    cut_off.write_bytes(cut_off.read_bytes()[: cut_off.stat().st_size // 2])
    sound = films.audio_only(tmp_path / "sound.mp4")
    gone = tmp_path / "gone.mp4"
    paths = [empty, index[0].path, sound, cut_off, gone, index[1].path]
    bad = VideoIndex([VideoEntry(path=path, video_id=0) for path in paths], missing=[tmp_path / "never.mp4"])
    for workers in (1, 2):
        cache = ClipCache.build(bad, ["rgb", "flow"], 32, tmp_path / f"cache{workers}", workers=workers)
        reasons = dict(cache.failed)
        assert set(reasons) == {empty, sound, gone, tmp_path / "never.mp4"}
        assert reasons[empty] == "the file is empty"
        assert "only audio" in reasons[sound]
        assert reasons[gone].lower().startswith("no such file")
        assert [path for path, _ in cache.damaged] == [cut_off]
        assert [cache.length(row) > 0 for row in range(6)] == [False, True, False, True, False, True]
        assert np.array_equal(cache.frames("rgb", 5), read_frames(index[1].path, size=32).rgb)
        assert cache.frames("flow", 0).shape == (0, 32, 32, 2)
        assert set(cut(cache, 4).row.tolist()) == {1, 3, 5}


def test_nothing_but_broken_videos_is_an_empty_cache(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no")
    cache = ClipCache.build(VideoIndex.from_folder(tmp_path), ["rgb"], 32, tmp_path / "cache")
    assert len(cache) == len(cache.failed) == 1
    assert len(cut(cache, 4)) == 0


class Deadly(os.PathLike):
    """A path that ends the process which unpickles it, as a decoder that crashes would."""

    def __fspath__(self):
        return "deadly.mp4"

    def __reduce__(self):
        return (os._exit, (3,))


def test_a_process_that_dies_costs_only_its_own_video(index, tmp_path):
    options = extraction.Options(size=16, views=("rgb",), flow="dis")
    entries = [*index.entries[:3], VideoEntry(path=Deadly(), video_id=0), *index.entries[3:]]
    tasks = [
        extraction.Task(key=f"key{row}", entry=entry, options=options, folder=tmp_path)
        for row, entry in enumerate(entries)
    ]
    parts = list(extraction.extract_parts(tasks, 2))
    assert [part.key for part in parts] == [task.key for task in tasks]
    assert [part.reason for part in parts if part.reason] == ["its decoder crashed or ran out of memory"]
    assert parts[3].reason
    assert [part.length for part in parts if not part.reason] == [8 + 3 * int(e.path.stem[-1]) for e in index]


SCRIPT = """
import sys
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.index import VideoIndex
if __name__ == "__main__":
    films, cache, workers = sys.argv[1:]
    def told(done, total, path): print(done, flush=True)
    ClipCache.build(VideoIndex.from_folder(films), ("rgb", "flow"), 32, cache, workers=int(workers), progress=told)
"""


@pytest.mark.parametrize(("workers", "kills"), [(1, (2, 3)), (2, (2,))])
def test_a_build_that_is_killed_continues(index, tmp_path, workers, kills):
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    root = index[0].path.parent.parent
    expected = ClipCache.build(VideoIndex.from_folder(root), ("rgb", "flow"), 32, tmp_path / "expected")
    command = [sys.executable, str(script), str(root), str(tmp_path / "cache"), str(workers)]
    reached = []
    for steps in kills:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            for _ in range(steps):
                line = running.stdout.readline()
            running.send_signal(signal.SIGKILL)
        reached.append(int(line))
        with pytest.raises(StoreError, match="never finished"):
            ClipCache.open(tmp_path / "cache")
    assert reached == sorted(set(reached)), "each run went on where the one before was killed"
    assert 0 < reached[0] <= reached[-1] < 6
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert same(ClipCache.open(tmp_path / "cache"), expected)
    assert not (tmp_path / "cache" / "parts").exists()


def test_wherever_the_files_were_cut_off_a_build_continues(index, whole, tmp_path):
    lines = (whole.folder / "journal.jsonl").read_bytes()
    ends = [0, *np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1]
    places = {0, ends[1] - 1, ends[1], ends[3] + 5, len(lines) - 1}
    for place in sorted(int(place) for place in places):
        folder = tmp_path / f"at{place}"
        shutil.copytree(whole.folder, folder)
        (folder / "index.json").unlink()
        (folder / "journal.jsonl").write_bytes(lines[:place])
        kept = sum(end <= place for end in ends[1:])
        frames = sum(json.loads(line)["length"] for line in lines.splitlines()[:kept])
        # Some files got further than the journal, by whole videos or by part of a frame.
        for extra, name in enumerate((*ALL, "time")):
            size = 8 if name == "time" else 32 * 32 * VIEWS[name].channels
            os.truncate(
                folder / f"{name}.bin", min(frames * size + 37 * extra, (whole.folder / f"{name}.bin").stat().st_size)
            )
        (folder / "parts" / "half.new").mkdir(parents=True)
        assert same(ClipCache.build(index, ALL, 32, folder), whole)
        assert (folder / "journal.jsonl").read_bytes() == lines, "no torn line is left for the next build"


def test_a_full_disk_is_told_and_costs_nothing(index, whole, tmp_path, monkeypatch):
    copies = []

    def copy(given, file):
        copies.append(file.name)
        file.write(given.read(10))
        if len(copies) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shutil.copyfileobj(given, file)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_copy", copy)
        with pytest.raises(StoreError, match="No space left on device; what is stored is kept"):
            ClipCache.build(index, ALL, 32, tmp_path / "cache")
    assert same(ClipCache.build(index, ALL, 32, tmp_path / "cache"), whole)


def test_two_builds_at_once_are_refused(index, whole):
    sizes = {"rgb": 32 * 32 * 3, "time": 8}
    with journal.Journal(whole.folder, sizes), pytest.raises(StoreError, match="another process is building"):
        ClipCache.build(index, ALL, 32, whole.folder)


def test_other_options_do_not_mix(index, whole):
    for views, size, flow in ((("rgb",), 32, "dis"), (ALL, 16, "dis"), (ALL, 32, "farneback")):
        with pytest.raises(InvalidInput, match="expected a cache with"):
            ClipCache.build(index, views, size, whole.folder, flow=flow)
    assert same(ClipCache.open(whole.folder), whole)


def test_what_is_no_cache_says_so(tmp_path, whole):
    with pytest.raises(StoreError, match="expected a clip cache, found none"):
        ClipCache.open(tmp_path)
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(StoreError, match="expected the options of a clip cache"):
        ClipCache.open(tmp_path)
    told = json.loads((whole.folder / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**told, "format": 99}))
    with pytest.raises(StoreError, match="format 99, this version reads 1"):
        ClipCache.open(tmp_path)
    shutil.copytree(whole.folder, tmp_path / "short")
    os.truncate(tmp_path / "short" / "flow.bin", 100)
    with pytest.raises(StoreError, match=r"flow\.bin"):
        ClipCache.open(tmp_path / "short")


@pytest.mark.parametrize(
    "text", [b"{", b"\xff", b"[]", b"{}", b'{"entries": [{}], "failed": [], "damaged": [], "rows": [{}]}']
)
def test_an_index_that_cannot_be_read_says_so_and_is_made_again(index, whole, tmp_path, text):
    folder = tmp_path / "cache"
    shutil.copytree(whole.folder, folder)
    (folder / "index.json").write_bytes(text)
    with pytest.raises(StoreError, match=r"index\.json: expected the videos of a finished build.*build it again"):
        ClipCache.open(folder)
    assert same(ClipCache.build(index, ALL, 32, folder), whole)


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[]", b"{}", b"null"])
def test_a_journal_that_cannot_be_read_says_which_line(index, whole, tmp_path, line):
    folder = tmp_path / "cache"
    shutil.copytree(whole.folder, folder)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = line + b"\n"
    (folder / "journal.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(StoreError, match=r"journal\.jsonl: expected a stored video in line 3"):
        ClipCache.build(index, ALL, 32, folder)
    assert (folder / "journal.jsonl").read_bytes() == b"".join(lines), "nothing is cut off"
    assert same(ClipCache.open(folder), whole)


def test_bad_arguments_are_refused_before_anything_is_made(index, tmp_path):
    for options in ({"views": ["sound"]}, {"size": 0}, {"size": 8}, {"workers": 0}, {"flow": "guess"}):
        arguments = {"views": ["flow"], "size": 16, **options}
        with pytest.raises(InvalidInput):
            ClipCache.build(index, folder=tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("length", "clip", "stride", "expected"),
    [
        (16, 8, None, [0, 4, 8]),
        (17, 8, None, [0, 4, 8, 9]),
        (8, 8, None, [0]),
        (7, 8, None, []),
        (0, 8, None, []),
        (10, 4, 3, [0, 3, 6]),
        (5, 1, None, [0, 1, 2, 3, 4]),
        (9, 2, 20, [0, 7]),
    ],
)
def test_windows_cover_a_video_to_its_last_frame(length, clip, stride, expected):
    assert windows(length, clip, stride).tolist() == expected


def test_windows_refuse_nonsense():
    for arguments in ((-1, 4, 1), (4, 0, 1), (4, 4, 0)):
        with pytest.raises(InvalidInput, match="windows: expected"):
            windows(*arguments)


def test_clips_know_where_they_come_from(index, whole):
    table = cut(whole, 6, 5)
    assert table.clip_id.tolist() == list(range(len(table)))
    rows = [row for row in range(6) for _ in windows(whole.length(row), 6, 5)]
    assert table.row.tolist() == rows
    assert table.video_id.tolist() == [index[row].video_id for row in rows]
    assert table.label.tolist() == [index[row].label for row in rows]
    assert set(table.split) == {"train"}
    np.testing.assert_allclose(table.start, table.start_frame / 25, atol=1e-9)
    np.testing.assert_allclose(table.end - table.start, 6 / 25, atol=1e-9)
    assert len(table.of_split("train")) == len(table)
    assert len(table.of_split("test")) == 0
    assert not table.group.any()
