"""The demo, end to end on real videos: ingest, train, mine, store, evaluate, export, label, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import films
import numpy as np
import pytest
from real import real_videos

from cascade_engine.demo import course
from cascade_engine.demo.course import run_demo
from cascade_engine.demo.measuring import RANDOM, RAW, Row, remarks
from cascade_engine.demo.videos import DemoOptions, find_videos, hold_out
from cascade_engine.deployment.artefact import Model, Signature, ViewSignature
from cascade_engine.errors import InvalidInput
from cascade_engine.store import FeatureStore
from cascade_engine.training.presets import preset
from cascade_engine.training.run import Run
from cascade_engine.video.decode import probe
from cascade_engine.video.index import VideoEntry, VideoIndex

CHANCE_TIMES = 2
CLASSES = 6


def windows_of_real_videos(folder: Path) -> Path:
    """An index in which every video is a class: two parts of it are for training, the last for testing."""
    lines = ["path,label,split,start,end"]
    for path in real_videos()[:CLASSES]:
        seconds = probe(path).duration
        assert seconds, path
        for split, start, end in (("train", 0, 0.33), ("train", 0.33, 0.66), ("test", 0.66, 1)):
            lines.append(f"{path},{path.stem},{split},{start * seconds:.3f},{end * seconds:.3f}")
    index = folder / "windows.csv"
    index.write_text("\n".join(lines) + "\n")
    return index


def short(options: DemoOptions) -> DemoOptions:
    """The same course in a few steps."""
    config = options.config
    phases = tuple(replace(phase, epochs=2 if phase.plan else 1) for phase in config.phase)
    return replace(options, config=replace(config, phase=phases), epochs=1)


def test_real_videos_in_a_label_out_and_a_second_run_continues(tmp_path):
    options = short(DemoOptions(folder=tmp_path / "demo", videos=windows_of_real_videos(tmp_path)))
    told: list[str] = []
    first = run_demo(options, lambda name, done, total: told.append(name))
    classes = min(CLASSES, len(real_videos()))
    assert {row.features for row in first.rows} == {RAW, RANDOM, *(phase.name for phase in options.config.phase)}
    best = max(row.first for row in first.rows)
    figures = Run.open(tmp_path / "demo" / "run").metrics
    mined = {phase.name for phase in options.config.phase if phase.plan}
    assert {row["phase"] for row in figures if row["coverage"] is not None} == mined, "among few videos, too"
    assert best > CHANCE_TIMES / classes, "the same video from another window is found more often than by chance"
    assert first.labels.confusion.sum() == classes
    page = first.report.read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count('class="stage"') > 4
    with FeatureStore.open(tmp_path / "demo" / "run" / "features.zarr") as store:
        assert store.phases == tuple(phase.name for phase in options.config.phase)
    model = first.model.stat().st_mtime_ns
    told.clear()
    again = run_demo(options, lambda name, done, total: told.append(name))
    assert not any(name.startswith(("train", "fine-tune")) for name in told), "nothing is trained twice"
    assert again.model.stat().st_mtime_ns == model
    assert again.rows == first.rows
    assert again.labels.confusion.tolist() == first.labels.confusion.tolist()


def test_every_fourth_video_of_a_label_is_held_out():
    entries = [VideoEntry(path=Path(f"{n}.mp4"), video_id=0, label="ab"[n % 2]) for n in range(8)]
    split = [entry.split for entry in hold_out(VideoIndex(entries))]
    assert split == ["train"] * 6 + ["test"] * 2


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_labelled_videos_are_refused(count):
    entries = [VideoEntry(path=Path(f"{n}.mp4"), video_id=0, label="ab"[n % 2]) for n in range(2 * count)]
    with pytest.raises(InvalidInput, match="a folder for each label"):
        hold_out(VideoIndex(entries))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "train")], "test"),
        ([("a", "train"), ("a", "test")], "expected 2 labels or more in 'train'"),
        ([("a", "train"), ("b", "train"), ("purple", "test")], "got a, b and purple"),
    ],
)
def test_an_index_that_cannot_serve_is_refused_before_anything_is_done(tmp_path, rows, message):
    lines = [f"{real_videos()[0]},{label},{split}" for label, split in rows]
    (tmp_path / "index.csv").write_text("\n".join(["path,label,split", *lines]))
    with pytest.raises(InvalidInput, match=message):
        run_demo(DemoOptions(folder=tmp_path / "demo", videos=tmp_path / "index.csv"), lambda *_: None)


class Bright:
    """A program that takes light clips for the first label and dark ones for the second."""

    def __call__(self, inputs):
        light = inputs[0].reshape(len(inputs[0]), -1).mean(1) > 127
        return [np.stack([light, ~light], 1).astype(np.float32), np.ones((len(light), 4), np.float32)]


def test_a_held_out_part_is_labelled_by_itself_not_by_its_whole_file(tmp_path, monkeypatch):
    shades = np.repeat([250, 5], 20)[:, None, None, None]
    film = films.write(tmp_path / "two.mp4", np.broadcast_to(shades, (40, 48, 64, 3)).astype(np.uint8))
    view = ViewSignature(name="rgb", channels=3, dtype="uint8", dim=4)
    signature = Signature(
        views=(view,),
        frames=4,
        stride=1,
        size=32,
        flow="dis",
        labels=("light", "dark"),
        features="backbone",
        source={},
    )
    monkeypatch.setattr(course, "load", lambda path: Model(path, signature, Bright()))
    part = VideoEntry(path=film, video_id=0, split="test", label="light", end=0.8)
    parts = [part, replace(part, label="dark", start=0.8, end=None)]
    others = [replace(part, label="purple"), replace(part, label=None), replace(part, path=tmp_path / "gone.mp4")]
    found = course.label_held_out(tmp_path, VideoIndex([*parts, *others]), lambda *_: None)
    assert found.confusion.tolist() == [[1, 0], [0, 1]]
    assert found.settings == {"videos": 2, "unreadable": 1, "of_other_labels": 2}
    with pytest.raises(InvalidInput, match="held-out video of light, dark"):
        course.label_held_out(tmp_path, VideoIndex(others), lambda *_: None)


def test_other_videos_than_the_run_was_begun_with_leave_the_folder_as_it_is(tmp_path):
    def listed(name: str, *labels: str) -> DemoOptions:
        lines = [f"{real_videos()[0]},{label},{split}" for label in labels for split in ("train", "test")]
        (tmp_path / name).write_text("\n".join(["path,label,split", *lines]))
        return DemoOptions(folder=tmp_path / "demo", videos=tmp_path / name)

    begun = listed("a.csv", "a", "b")
    index = find_videos(begun, lambda *_: None)
    index.to_csv(Run.create(tmp_path / "demo" / "run", begun.course()).index_path)
    before = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    for other in (listed("b.csv", "a", "c"), listed("c.csv", "a", "b", "c"), replace(begun, videos=None)):
        with pytest.raises(InvalidInput, match="was begun with"):
            find_videos(other, lambda *_: None)
    assert before == {path: path.read_bytes() for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    assert find_videos(begun, lambda *_: None).difference(index) is None


def test_the_remarks_name_what_the_training_does_not_beat():
    def row(features: str, first: float) -> Row:
        return Row(features=features, view="rgb", first=first, fifth=1.0, mining={})

    rows = [row(RAW, 0.7), row(RANDOM, 0.5), row("rgb-0", 0.6), row("rgb-1", 0.6)]
    said = remarks(rows)
    assert len(said) == 2
    assert RAW in said[0]
    assert "wins against" in said[0]
    assert "InfoNCE (rgb-0)" in said[1]
    assert "as good as" in said[1]
    assert "beats" in remarks([row(RAW, 0.1), row(RANDOM, 0.2), row("rgb-0", 0.3), row("rgb-1", 0.4)])[0]


def test_the_demo_trains_with_the_other_view_as_oracle():
    phases = preset("tiny").phase
    assert any(phase.cascade() and phase.oracles and phase.train not in phase.oracles for phase in phases)
