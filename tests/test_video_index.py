"""Indexes: one's own CSV, a folder per label, and the public data sets' layouts, on tiny trees of the same shape."""

import os
import shutil
from pathlib import Path

import films
import pytest

from cascade_engine.errors import InvalidInput
from cascade_engine.video.index import VideoEntry, VideoIndex, ucf101_group


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return films.write(tmp_path_factory.mktemp("film") / "film.mp4", films.moving(3, 32, 32))


def put(film, *places):
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(film, place)


def rows(index):
    return [(e.path.name, e.label, e.split, e.start, e.end, e.group) for e in index]


def test_a_folder_for_each_label(film, tmp_path):
    put(
        film,
        tmp_path / "b" / "2.mp4",
        tmp_path / "b" / "1.MKV",
        tmp_path / "a" / "deep" / "x.avi",
        tmp_path / "top.webm",
    )
    (tmp_path / "b" / "notes.txt").write_text("no video")
    (tmp_path / "b" / "._1.mp4").write_text("what a Mac leaves behind")
    index = VideoIndex.from_folder(tmp_path)
    assert [(e.path.relative_to(tmp_path).as_posix(), e.label) for e in index] == [
        ("a/deep/x.avi", "deep"),
        ("b/1.MKV", "b"),
        ("b/2.mp4", "b"),
        ("top.webm", None),
    ]
    assert [e.video_id for e in index] == [0, 1, 2, 3]
    assert index.labels == ("b", "deep")


def test_linked_folders_are_looked_into_but_not_in_circles(film, tmp_path):
    put(film, tmp_path / "elsewhere" / "1.mp4", tmp_path / "videos" / "here" / "2.mp4")
    (tmp_path / "videos" / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "videos" / "here" / "up").symlink_to(tmp_path / "videos")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    index = VideoIndex.from_folder(tmp_path / "videos")
    assert [(e.path.relative_to(tmp_path).as_posix(), e.label) for e in index] == [
        ("videos/here/2.mp4", "here"),
        ("videos/there/1.mp4", "there"),
    ]


def test_a_folder_without_videos_says_so(tmp_path):
    with pytest.raises(InvalidInput, match="expected videos in it, found none"):
        VideoIndex.from_folder(tmp_path)
    with pytest.raises(InvalidInput, match="expected a folder of videos"):
        VideoIndex.from_folder(tmp_path / "absent")


def test_csv_goes_there_and_back(film, tmp_path):
    put(film, tmp_path / "v" / "a.mp4", tmp_path / "v" / "b, c.mp4")
    outside = film
    entries = [
        VideoEntry(path=tmp_path / "v" / "a.mp4", video_id=9, label="wave", split="train", start=0.1, end=2.5),
        VideoEntry(path=tmp_path / "v" / "b, c.mp4", video_id=9, label='say "hi"', split="test", group="g1"),
        VideoEntry(path=outside, video_id=9),
    ]
    index = VideoIndex(entries)
    index.to_csv(tmp_path / "index.csv")
    again = VideoIndex.from_csv(tmp_path / "index.csv")
    assert rows(again) == rows(index)
    assert [e.path for e in again] == [e.path for e in index]
    assert "v/a.mp4" in (tmp_path / "index.csv").read_text(), "a folder can be moved as a whole"
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.copytree(tmp_path, moved)
    assert VideoIndex.from_csv(moved / "index.csv")[0].path == moved / "v" / "a.mp4"


def test_csv_needs_a_path_only_and_may_have_a_mark_in_front(film, tmp_path):
    put(film, tmp_path / "a.mp4")
    (tmp_path / "index.csv").write_bytes("﻿path,label\r\na.mp4,übung\r\n".encode())
    assert rows(VideoIndex.from_csv(tmp_path / "index.csv")) == [("a.mp4", "übung", None, 0.0, None, None)]
    (tmp_path / "other.csv").write_text("path\na.mp4\n")
    assert len(VideoIndex.from_csv(tmp_path / "other.csv")) == 1


def test_csv_finds_relative_paths_under_a_root(film, tmp_path):
    put(film, tmp_path / "videos" / "a.mp4")
    (tmp_path / "index.csv").write_text("path\na.mp4\n")
    assert VideoIndex.from_csv(tmp_path / "index.csv").missing == (tmp_path / "a.mp4",)
    assert len(VideoIndex.from_csv(tmp_path / "index.csv", root=tmp_path / "videos")) == 1


def test_missing_videos_are_reported_and_the_rest_goes_on(film, tmp_path, caplog):
    put(film, tmp_path / "a.mp4", tmp_path / "c.mp4")
    (tmp_path / "index.csv").write_text("path,label\na.mp4,x\nb.mp4,y\nc.mp4,z\n")
    index = VideoIndex.from_csv(tmp_path / "index.csv")
    assert [(e.path.name, e.video_id) for e in index] == [("a.mp4", 0), ("c.mp4", 1)]
    assert index.missing == (tmp_path / "b.mp4",)
    assert "b.mp4: named by the labels" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,b\n", "expected the columns path"),
        ("path,lable\na,b\n", "expected the columns path"),
        ("", "expected the columns path"),
        ("path,label\na.mp4,x\nb.mp4,x,y\n", r"index\.csv:3: expected 2 fields"),
        ("path,label\n,x\n", r"index\.csv:2: expected 2 fields with a path"),
        ("path,start\na.mp4,soon\n", r"index\.csv:2: expected seconds, got 'soon'"),
        ("path,start\na.mp4,nan\n", r"index\.csv:2: expected seconds, got 'nan'"),
        ("path,start,end\na.mp4,3,2\n", r"index\.csv:2: expected an end after the start"),
    ],
)
def test_a_bad_csv_names_the_line(tmp_path, text, message):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        VideoIndex.from_csv(tmp_path / "index.csv")


def test_a_csv_that_is_no_text_says_so(film, tmp_path):
    for path in (tmp_path / "absent.csv", film, tmp_path):
        with pytest.raises(InvalidInput, match="expected a text file"):
            VideoIndex.from_csv(path)


def test_a_field_no_csv_reader_takes_is_named(tmp_path):
    file = tmp_path / "videos.csv"
    for text, read in (
        ("path,label\na.mp4,x\nb.mp4,{}\n", VideoIndex.from_csv),
        (
            "label,youtube_id,time_start,time_end\nx,a,0,1\n{},b,0,1\n",
            lambda table: VideoIndex.from_kinetics(tmp_path, table),
        ),
    ):
        file.write_text(text.format("x" * 131_073))
        with pytest.raises(InvalidInput, match=r"videos\.csv:3: expected a CSV table \(field larger than"):
            read(file)


def test_splits_keep_their_ids(film):
    index = VideoIndex(
        [VideoEntry(path=film, video_id=0, split=split) for split in ("train", "test", "train")],
    )
    assert [e.video_id for e in index.split("train")] == [0, 2]
    assert index.splits == ("test", "train")
    with pytest.raises(InvalidInput, match="expected one of test, train, got 'val'"):
        index.split("val")


@pytest.fixture
def ucf101(film, tmp_path):
    videos, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    names = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c02.avi"]
    names += ["HandstandPushups/v_HandStandPushups_g09_c03.avi", "HandstandPushups/v_HandStandPushups_g02_c01.avi"]
    put(film, *(videos / name for name in names))
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n")
    (lists / "trainlist01.txt").write_text(f"{names[0]} 1\r\n{names[2]} 2\r\n")
    (lists / "testlist01.txt").write_text(
        f"{names[1]}\r\n{names[3]}\r\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c09.avi\r\n"
    )
    return videos, lists


def test_ucf101(ucf101):
    index = VideoIndex.from_ucf101(*ucf101)
    assert rows(index) == [
        ("v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup", "train", 0.0, None, "ApplyEyeMakeup_g08"),
        ("v_HandStandPushups_g09_c03.avi", "HandstandPushups", "train", 0.0, None, "HandStandPushups_g09"),
        ("v_ApplyEyeMakeup_g01_c02.avi", "ApplyEyeMakeup", "test", 0.0, None, "ApplyEyeMakeup_g01"),
        ("v_HandStandPushups_g02_c01.avi", "HandstandPushups", "test", 0.0, None, "HandStandPushups_g02"),
    ]
    assert [path.name for path in index.missing] == ["v_ApplyEyeMakeup_g01_c09.avi"]


def test_ucf101_lists_that_do_not_fit_are_refused(ucf101):
    videos, lists = ucf101
    with pytest.raises(InvalidInput, match=r"trainlist02\.txt: expected a text file"):
        VideoIndex.from_ucf101(videos, lists, fold=2)
    (lists / "testlist01.txt").write_text("Sleeping/v_Sleeping_g01_c01.avi\n")
    with pytest.raises(InvalidInput, match=r"expected a class of classInd\.txt, got 'Sleeping"):
        VideoIndex.from_ucf101(videos, lists)
    (lists / "testlist01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c02.avi 2\n")
    with pytest.raises(InvalidInput, match="expected a class of"):
        VideoIndex.from_ucf101(videos, lists)
    (lists / "classInd.txt").write_text("1\n")
    with pytest.raises(InvalidInput, match=r"classInd\.txt: expected a number and a class"):
        VideoIndex.from_ucf101(videos, lists)


def test_ucf101_groups():
    assert ucf101_group("v_YoYo_g25_c05.avi") == "YoYo_g25"
    assert ucf101_group("holiday.mp4") is None


def test_hmdb51(film, tmp_path):
    videos, lists = tmp_path / "hmdb51", tmp_path / "testTrainMulti_7030_splits"
    put(film, *(videos / "brush_hair" / f"{name}.avi" for name in ("a", "b", "c")), videos / "wave" / "d e [x].avi")
    lists.mkdir()
    (lists / "brush_hair_test_split1.txt").write_text("a.avi 1 \nb.avi 2 \nc.avi 0 \ngone.avi 1 \n")
    (lists / "wave_test_split1.txt").write_text("d e [x].avi 2 \n")
    (lists / "wave_test_split2.txt").write_text("d e [x].avi 1 \n")
    index = VideoIndex.from_hmdb51(videos, lists)
    assert [row[:3] for row in rows(index)] == [
        ("a.avi", "brush_hair", "train"),
        ("b.avi", "brush_hair", "test"),
        ("d e [x].avi", "wave", "test"),
    ]
    assert index.missing == (videos / "brush_hair" / "gone.avi",)
    assert [row[:3] for row in rows(VideoIndex.from_hmdb51(videos, lists, fold=2))] == [
        ("d e [x].avi", "wave", "train")
    ]
    with pytest.raises(InvalidInput, match="found none"):
        VideoIndex.from_hmdb51(videos, lists, fold=3)
    (lists / "wave_test_split1.txt").write_text("d.avi 7\n")
    with pytest.raises(InvalidInput, match="expected a file name and 0, 1 or 2"):
        VideoIndex.from_hmdb51(videos, lists)


def test_kinetics(film, tmp_path):
    videos = tmp_path / "k400"
    put(
        film,
        videos / "train" / "riding a bike" / "abcdefghijk_000010_000020.mp4",
        videos / "val" / "riding_a_bike" / "-bcdefghij__000003_000013.mkv",
        videos / "wholevideo1.webm",
    )
    head = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(f"{head}riding a bike,abcdefghijk,10,20,train\nyoga,gonegonegon,5,15,train\n")
    (tmp_path / "validate.csv").write_text(
        f"{head}riding a bike,-bcdefghij_,3,13,validate\nyoga,wholevideo1,4.0,14.0,validate\n"
    )
    index = VideoIndex.from_kinetics(videos, [tmp_path / "train.csv", tmp_path / "validate.csv"])
    assert rows(index) == [
        ("abcdefghijk_000010_000020.mp4", "riding a bike", "train", 0.0, None, None),
        ("-bcdefghij__000003_000013.mkv", "riding a bike", "validate", 0.0, None, None),
        ("wholevideo1.webm", "yoga", "validate", 4.0, 14.0, None),
    ]
    assert [path.name for path in index.missing] == ["gonegonegon_000005_000015.mp4"]
    one = VideoIndex.from_kinetics(videos, tmp_path / "train.csv")
    assert len(one) == 1
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end\nabcdefghijk,10,20\n")
    unlabelled = VideoIndex.from_kinetics(videos, tmp_path / "test.csv")
    assert [(e.label, e.split) for e in unlabelled] == [(None, "test")]
    (tmp_path / "bad.csv").write_text("id,label\n1,2\n")
    with pytest.raises(InvalidInput, match="expected youtube_id"):
        VideoIndex.from_kinetics(videos, Path(tmp_path / "bad.csv"))


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / os.fsdecode(b"n\xff.mp4")).touch()
    with pytest.raises(InvalidInput, match=r"expected names in UTF-8, got n\\udcff\.\.\.; rename that file"):
        VideoIndex.from_folder(tmp_path).to_csv(tmp_path / "index.csv")
    assert not (tmp_path / "index.csv").exists()
