"""Protocols, mining metrics and the report of a run, and the commands that print them."""

import errno
import json
import re
import shutil
from dataclasses import replace

import click
import numpy as np
import pytest
import runs
import torch
from cascade_engine.cli.main import main
from click.testing import CliRunner

import cascade_engine as ce
from cascade_engine.deployment.judging import LabelledWindows
from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import side_by_side
from cascade_engine.evaluation.mining import mining
from cascade_engine.evaluation.neighbours import retrieval
from cascade_engine.evaluation.of_run import collect, windows_of
from cascade_engine.evaluation.probe import linear_probe
from cascade_engine.evaluation.run_report import ReportConfig, report_run, sample_queries
from cascade_engine.store import FeatureStore
from cascade_engine.training.extraction import write_features
from cascade_engine.training.parallel import World
from cascade_engine.training.run import Run
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.index import VideoIndex

PLAN = ce.CascadePlan.parse("residual:50%,rgb:3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.make(tmp_path_factory.mktemp("judged"))


def cascade(*arguments):
    done = CliRunner().invoke(main, [str(each) for each in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_splits_hold_the_stored_features_of_their_videos(run):
    splits = collect(run, "rgb")
    assert splits.train.classes == ("blue", "green", "red")
    with FeatureStore.open(run.store_path, phase="first") as store:
        rows = store.column("split") == "test"
        assert np.array_equal(splits.test.values, store.features("rgb_backbone")[rows])
        assert np.array_equal(splits.test.video_id, store.column("video_id")[rows])
        names = [splits.test.classes[each] for each in splits.test.label]
        assert names == store.column("label")[rows].tolist()
    assert not set(splits.test.video_id) & set(splits.train.video_id)


def test_random_weights_are_those_before_training_computed_anew(run):
    """The fixture's phase left the weights as they were, so both must agree."""
    for kind in ("backbone", "projection"):
        stored, anew = collect(run, "rgb", kind=kind), collect(run, "rgb", phase="initial", kind=kind)
        assert np.abs(stored.test.values - anew.test.values).max() < 1e-5
        assert anew.of["phase"] == "initial"


def test_raw_pixels_are_a_baseline_that_sees_colour(run):
    splits = collect(run, "rgb", kind="pixels")
    assert splits.test.values.shape[1] == 4 * 16 * 16 * 3
    cache, table = windows_of(run)
    row = table.of_split("test")[0]
    frames = cache.frames("rgb", int(table.row[row]), int(table.start_frame[row]), table.clip_length)[::2]
    assert splits.test.values[0].mean() == pytest.approx(frames.mean(), abs=0.5)
    assert retrieval(splits.test, splits.train).figures["R@1"] == 1.0


def test_two_streams_add_the_similarities_of_their_views(run):
    streams = collect(run, "rgb+residual")
    views = [collect(run, view) for view in ("rgb", "residual")]
    added = sum(
        view.test.per_video().normalised().values @ view.train.per_video().normalised().values.T for view in views
    )
    assert streams.of["view"] == "rgb+residual"
    assert len(streams.test) == len(np.unique(views[0].test.video_id))
    assert np.abs(streams.test.values @ streams.train.values.T - added).max() < 1e-5
    with pytest.raises(InvalidInput, match="the same videos"):
        side_by_side([views[0].test, views[1].train])
    told = json.loads(cascade("eval", "retrieval", run.folder, "--view", "rgb+residual", "--json"))
    assert told["figures"] == retrieval(streams.test, streams.train).figures


def test_features_still_being_written_are_refused(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(folder / "features.zarr")
    under_way = Run.open(folder)
    monkeypatch.setattr(FeatureStore, "seal", lambda store: None)
    write_features(under_way, "first", windows_of(run)[0], World(), torch.device("cpu"))
    with pytest.raises(InvalidInput, match="'first' are still being written"):
        collect(under_way, "rgb")


@pytest.fixture
def shared(run, tmp_path):
    """The run once more, and a function that builds its cache's folder for other videos."""
    folder = shutil.copytree(run.folder, tmp_path / "run")
    cache = shutil.copytree(run.cache_path, tmp_path / "cache")
    (folder / "versions.json").write_text(json.dumps({**run.versions, "cache": str(cache)}))
    return Run.open(folder), lambda entries: ClipCache.build(VideoIndex(entries), runs.VIEWS, 40, cache)


def swapped(entry):
    return replace(entry, split={"train": "test", "test": "train"}[entry.split])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries[:8], "trained on: expected 21 videos, got 8; build it"),
        (lambda entries: [swapped(entry) for entry in entries], "expected the split 'train' of .*, got 'test'"),
        (lambda entries: entries[::-1], "expected .*0.mp4 as video 0, got .*1.mp4"),
        (lambda entries: [replace(entry, label="red") for entry in entries], "the label 'blue' of .*, got 'red'"),
        (lambda entries: [replace(entry, end=0.5) for entry in entries], "expected the end None of .*, got 0.5"),
    ],
)
def test_a_cache_built_for_other_videos_is_refused(shared, tmp_path, change, message):
    run, build = shared
    build(change(run.index.entries))
    for judged in (
        lambda: collect(run, "rgb", kind="pixels"),
        lambda: collect(run, "rgb", phase="initial"),
        lambda: LabelledWindows.of(run, "train"),
        lambda: report_run(run, tmp_path / "report.html"),
    ):
        with pytest.raises(InvalidInput, match=message):
            judged()
    collect(run, "rgb")  # of the run's own store
    build(run.index.entries)
    assert np.array_equal(collect(run, "rgb", kind="pixels").test.video_id, collect(run, "rgb").test.video_id)


def test_videos_named_by_relative_paths_are_the_same_ones_from_anywhere(shared, tmp_path, monkeypatch):
    run, build = shared
    first = run.index[0].path.absolute()
    monkeypatch.chdir(first.parents[3])
    build(replace(entry, path=entry.path.relative_to(first.parents[3])) for entry in run.index)
    monkeypatch.chdir(tmp_path)
    assert len(LabelledWindows.of(run, "train").table) > 0


def test_what_a_run_does_not_have_is_refused_by_name(run):
    for arguments, message in [
        ({"view": "flow"}, "view: expected one of rgb, residual"),
        ({"view": "rgb", "phase": "later"}, "phase: expected one of initial, first"),
        ({"view": "rgb", "test_split": "val"}, "labelled windows in 'val', found none .splits: test, train"),
        ({"view": "rgb", "kind": "head"}, "kind: expected one of"),
        ({"view": "rgb", "kind": "pixels", "phase": "nosuch"}, "phase: expected none with pixels"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            collect(run, **arguments)


def test_mining_scores_are_counted_by_hand(run):
    with FeatureStore.open(run.store_path, phase="first") as store:
        found = mining(store, PLAN, where="split == 'train'")
        bank = store.bank(("residual", "rgb"), where="split == 'train'")
        rows = store.rows_of(bank.clip_id)
        label, video = store.column("label")[rows], store.column("video_id")[rows]
    positives = ce.mine_self(PLAN, bank)
    assert (positives.index >= 0).all()
    assert not (video[positives.index] == video[:, None]).any()
    right = label[positives.index] == label[:, None]
    assert found.figures["precision"] == right.mean()
    assert found.figures["recall_at_1"] == right[:, 0].mean()
    chosen = set(video[positives.index].ravel().tolist())
    assert found.figures["coverage"] == len(chosen) / len(set(video.tolist()))
    for row in found.per_class:
        members = label == row["class"]
        assert row["precision"] == pytest.approx(right[members].mean())
        hit = {int(video[j]) for i in np.flatnonzero(members) for j in positives.index[i] if label[j] == row["class"]}
        assert row["recall"] == len(hit) / row["videos"]
    assert set(found.views) == {"residual", "rgb", "agreement"}


def test_mining_is_judged_whatever_numbers_the_videos_have(tmp_path):
    """Deployed features carry hashes as ids: no table can be as long as the largest."""
    values = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    found = []
    for place, first in enumerate((0, 1 << 60, -5)):
        with FeatureStore.create(tmp_path / str(place), {"rgb": 8}, columns={"label": "str"}) as store:
            ids = {"clip_id": np.arange(20), "video_id": first + np.arange(20) // 2}
            store.append({"rgb": values}, **ids, start=0.0, end=1.0, label=np.array(["a", "b", ""] * 7)[:20])
            found.append(mining(store, ce.CascadePlan.parse("rgb:3")).to_json())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("protocol", ["retrieval", "knn", "linear"])
def test_the_protocols_commands_give_the_same_bits_twice(run, protocol, tmp_path):
    page = tmp_path / "page.html"
    first = cascade("eval", protocol, run.folder, "--json", "-o", page)
    assert first == cascade("eval", protocol, run.folder, "--json")
    found = json.loads(first)
    assert found["protocol"] == protocol
    assert found["features"] == {
        "view": "rgb",
        "phase": "first",
        "kind": "backbone",
        "train_split": "train",
        "test_split": "test",
    }
    assert np.sum(found["confusion"]) == 6
    assert all(0 <= value <= 1 for value in found["figures"].values())
    assert "<svg" in page.read_text()


def test_figures_are_printed_though_their_page_cannot_be_written(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cascade_engine.evaluation.page.write_report", full)
    done = CliRunner().invoke(main, ["eval", "retrieval", str(run.folder), "-o", str(tmp_path / "x.html"), "--json"])
    assert isinstance(done.exception, OSError)
    assert json.loads(done.stdout)["protocol"] == "retrieval"


def test_people_get_a_table(run):
    text = cascade("eval", "retrieval", run.folder, "--kind", "pixels")
    assert "R@1 1.0000" in text
    assert re.search(r"green\s+2\s+1\.000", text)
    text = cascade("eval", "mining", run.folder)
    assert "plan residual:50%,rgb:3" in text
    assert "precision 0." in text or "precision 1." in text
    assert json.loads(cascade("eval", "mining", run.folder, "--json", "--plan", "rgb:2"))["plan"] == "rgb:2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "RUN", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["eval", "linear", "RUN", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["eval", "linear", "RUN", "--validation", "nan"], "'nan' is not a finite number"),
        (["eval", "retrieval", "RUN", "-o", "none/x.html"], "there is no folder 'none'"),
        (["report", "RUN", "-o", "none/x.html"], "there is no folder 'none'"),
        (["finetune", "RUN", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["finetune", "RUN", "--lr", "inf"], "'inf' is not a finite number"),
        (["finetune", "RUN", "--area", "nan"], "'nan' is not a finite number"),
        (["finetune", "RUN", "--to", __file__], "File exists"),
        (["finetune", "RUN", "--test", "nowhere"], "labelled windows in 'nowhere'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(run, monkeypatch, arguments, message):
    def nothing(*_, **__):
        raise AssertionError("refused after the work")

    monkeypatch.setattr("cascade_engine.deployment.finetune.finetune", nothing)
    monkeypatch.setattr("cascade_engine.evaluation.of_run.collect", nothing)
    monkeypatch.setattr("cascade_engine.evaluation.run_report.report_run", nothing)
    with pytest.raises((click.UsageError, InvalidInput, FileExistsError), match=message):
        cascade(*(str(run.folder) if each == "RUN" else each for each in arguments))


def test_seeds_are_refused_by_the_functions_as_by_the_commands(run):
    splits = collect(run, "rgb")
    for asked in (lambda: ReportConfig(seed=-1), lambda: linear_probe(splits.test, splits.train, seed=-1)):
        with pytest.raises(InvalidInput, match="seed: expected a number from 0"):
            asked()


@pytest.mark.parametrize("text", ["", "[]", "{}", None])
def test_a_note_of_versions_that_is_not_whole_is_told(shared, text):
    run, _ = shared
    note = run.folder / "versions.json"
    note.unlink()
    if text is not None:
        note.write_text(text)
    with pytest.raises(InvalidInput, match=r"versions.json: expected what a run notes there"):
        collect(run, "rgb", kind="pixels")


def test_notes_are_written_beside_and_moved_into_place(shared, monkeypatch):
    run, _ = shared
    before = {name: (run.folder / name).read_bytes() for name in ("index.csv", "versions.json")}
    cache = windows_of(run)[0]
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: None)  # killed before either was moved
    run.note_data(cache)
    assert {name: (run.folder / name).read_bytes() for name in before} == before


def test_a_cache_of_another_size_is_refused(shared):
    run, _ = shared
    resized = Run(run.folder, replace(run.config, data=replace(run.config.data, size=36)))
    with pytest.raises(InvalidInput, match=r"expected frames of side 36, .* has 40"):
        windows_of(resized)


def test_the_report_holds_every_part_and_fetches_nothing(run, tmp_path):
    path = report_run(run, tmp_path / "report.html", ReportConfig(queries=3))
    text = path.read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Phases", "Training", "Retrieval", "Mining", "The cascade at work", "Maps of the features"]
    assert text.count('<div class="cascade">') == 3
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "raw pixels" in text
    assert "random weights" in text
    # loss and precision curves, two maps (one a view) and a confusion matrix
    assert text.count("<svg") == 5
    assert cascade("report", run.folder, "-o", tmp_path / "by-command.html", "--queries", 3).endswith(" MB\n")
    assert (tmp_path / "by-command.html").read_text() == text


def test_queries_are_drawn_from_all_classes():
    labels = np.array(["a"] * 10 + ["b"] * 2 + ["c"])
    rows = sample_queries(labels, 5, 0)
    assert len(set(rows)) == 5
    assert {str(labels[row]) for row in rows[:3]} == {"a", "b", "c"}
    assert len(sample_queries(labels, 50, 0)) == 13
    assert rows == sample_queries(labels, 5, 0)
    some = np.where(np.arange(13) % 2, labels, "")
    assert "" not in some[sample_queries(some, 50, 0)]
    assert len(sample_queries(np.full(4, ""), 3, 0)) == 3
