"""`cascade store`, as it is called."""

import errno
import json

import numpy as np
import pytest
from cascade_engine.cli import main
from cascade_engine.cli.store import command
from click.testing import CliRunner
from store_rows import COLUMNS, VIEWS, batch

import cascade_engine as ce
from cascade_engine.errors import Corrupt, InvalidInput, StoreError
from cascade_engine.store import staging


def call(*arguments):
    done = CliRunner().invoke(command, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def path(tmp_path):
    with ce.FeatureStore.create(tmp_path / "s", VIEWS, columns=COLUMNS) as store:
        store.append(**batch(1, 0, 60))
    return tmp_path / "s"


def test_a_store_is_created_filled_and_described(tmp_path):
    path = tmp_path / "s"
    made = json.loads(call("create", path, "--view", "rgb=16", "--view", "flow=8", "--column", "label=str", "--json"))
    assert made["views"] == VIEWS
    content = batch(1, 0, 40)
    arrays = {"embedding": content["views"]["rgb"], "flow": content["views"]["flow"], "label": content["label"]}
    np.savez(tmp_path / "x.npz", **arrays)
    found = json.loads(call("import", path, tmp_path / "x.npz", "--map", "embedding=rgb", "--json"))
    assert found["added"] == found["rows"] == 40
    about = json.loads(call("info", path, "--json"))
    assert about["phases"]["main"]["rows"] == 40
    assert about["phases"]["main"]["coverage"] == {"rgb": 40, "flow": 40}
    assert about["labels"] == {f"label {i}": 8 for i in range(5)}
    text = call("info", path)
    assert "rgb 16 (40), flow 8 (40)" in text
    assert "label 3" in text
    call("create", path, "--view", "rgb=16", "--phase", "next")
    assert set(json.loads(call("info", path, "--json"))["phases"]) == {"main", "next"}


def test_an_import_makes_the_store_and_hints_at_float16(tmp_path):
    values = np.arange(80, dtype=np.float32).reshape(10, 8)
    np.savez(tmp_path / "x.npz", rgb=values, score=np.linspace(0, 1, 10))
    text = call("import", tmp_path / "s", tmp_path / "x.npz")
    assert "10 clips added" in text
    assert "every value of rgb is exact in float16" in text
    store = ce.FeatureStore.open(tmp_path / "s")
    assert np.array_equal(store.features("rgb"), values)
    assert store.columns["score"] == "float"


def test_a_first_import_that_adds_nothing_leaves_no_store(tmp_path):
    values = np.arange(80, dtype=np.float32).reshape(10, 8)
    np.savez(tmp_path / "x.npz", embedding=values, clip_id=np.arange(10))
    np.savez(tmp_path / "twice.npz", rgb=values, clip_id=np.zeros(10, int))
    with pytest.raises(InvalidInput, match="got clip 0 again"):
        call("import", tmp_path / "s", tmp_path / "twice.npz", "--map", "rgb=wrong")
    assert not (tmp_path / "s").exists()
    call("import", tmp_path / "s", tmp_path / "x.npz", "--map", "embedding=rgb")
    with pytest.raises(InvalidInput, match="got clip 0 again"):
        call("import", tmp_path / "s", tmp_path / "twice.npz")
    with pytest.raises(InvalidInput, match="got clip 0 again"):
        call("import", tmp_path / "two", tmp_path / "x.npz", tmp_path / "x.npz")
    for name, view in (("s", "rgb"), ("two", "embedding")):
        assert np.array_equal(ce.FeatureStore.open(tmp_path / name).features(view), values), "what is in stays"


def test_files_without_clip_ids_are_imported_one_after_the_other(tmp_path):
    values = np.arange(96, dtype=np.float32).reshape(12, 8)
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", rgb=values[number * 4 : number * 4 + 4])
    assert "12 clips added" in call("import", tmp_path / "s", *(tmp_path / f"{number}.npz" for number in range(3)))
    store = ce.FeatureStore.open(tmp_path / "s")
    assert store.column("clip_id").tolist() == list(range(12))
    assert np.array_equal(store.features("rgb"), values)


def test_a_query_answers_as_search_does(path):
    arguments = ("query", path, "--plan", "flow:50%,rgb:3", "--clip", 5, "--clip", 9, "--where", "clip_id > 20")
    found = json.loads(call(*arguments, "--json"))
    hits = ce.search(ce.FeatureStore.open(path), "flow:50%,rgb:3", clip=[5, 9], where="clip_id > 20")
    assert [each["clip_id"] for each in found] == hits.clip_id.tolist()
    assert found[0]["label"] == [f"label {clip % 5}" for clip in hits.clip_id[0]]
    assert f"{hits.similarity[0, 0]:.6f}" in call(*arguments)
    with pytest.raises(InvalidInput, match="no column is called 'nope'"):
        call("query", path, "--plan", "rgb:3", "--clip", 5, "--where", "nope")


def test_phases_are_compared_sealed_checked_published_and_exported(path, tmp_path):
    with ce.FeatureStore.open(path, mode="a") as store, store.new_phase("next") as later:
        later.append(**(batch(1, 0, 50) | {"label": ["x"] * 50}))
    found = json.loads(call("diff", path, "main", "next", "--view", "rgb", "-k", 4, "--json"))
    assert found["clips"] == 50
    assert found["mean_changed"] == 0
    assert found["without_view"] == {"main": 0, "next": 10}
    assert "50 clips in both" in call("diff", path, "main", "next", "--view", "rgb")
    with pytest.raises(StoreError, match="seal it first"):
        call("publish", path, f"file://{tmp_path}/there")
    call("seal", path)
    assert "sent to" in call("publish", path, f"file://{tmp_path}/there")
    assert ce.FeatureStore.open(tmp_path / "there").rows == 60
    assert "all bytes are as they were committed" in call("verify", path)
    assert json.loads(call("verify", path, "--json")) == []
    assert json.loads(call("export", path, tmp_path / "z", "--to", "zarr", "--json"))["ratio"] > 0
    call("export", path, tmp_path / "x.parquet", "--to", "parquet", "--where", "clip_id < 7")
    assert json.loads(call("import", tmp_path / "again", tmp_path / "x.parquet", "--json"))["added"] == 7
    file = path / "phases/main/clip_id/c.0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(Corrupt, match="1 problems"):
        call("verify", path)


def test_staging_groups_are_merged(path):
    with staging.stage(path, "a") as group:
        group.append(**batch(2, 60, 10))
    assert json.loads(call("merge", path, "--json")) == {"added": 10, "rows": 70}


def test_gc_removes_what_crashes_leave_and_nothing_else(path):
    folder = path / "phases/main"
    aside = f"new-999999999-{32 * 'a'}"
    left = [folder / "rgb/c.7.0", folder / "rgb/zarr.json.new", folder / "label-9", path.with_name(f"s.{aside}")]
    left.append(staging.folder(path) / f"main.a.{aside}")
    others = [folder / "rgb/c.tmp", folder / "rgb/c.9.tmp"]
    others += [path.with_name(f"t.{aside}"), path.with_name("s.new-2"), path.with_name("s.new-model")]
    for each in left[:2]:
        each.write_bytes(bytes(100))
    for each in left[2:] + others:
        each.mkdir(parents=True)
    found = json.loads(call("gc", path, "--dry-run", "--json"))
    assert sorted(found["files"]) == sorted(map(str, left))
    assert all(each.exists() for each in left)
    call("gc", path)
    assert not any(each.exists() for each in left)
    assert all(each.exists() for each in others), "they are somebody's"
    store = ce.FeatureStore.open(path)
    assert store.verify() == []
    assert store.rows == 60


@pytest.mark.parametrize("name", ["x.npz", "x.parquet", "x.h5", "x.npy"])
def test_a_damaged_file_is_refused_by_name_and_adds_nothing(path, tmp_path, name):
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(InvalidInput, match=f"{name}: cannot be read"):
        call("import", path, tmp_path / name)
    assert ce.FeatureStore.open(path).rows == 60


def test_what_makes_no_sense_is_refused(path, tmp_path):
    with pytest.raises(InvalidInput, match="each name once, got 'rgb' again"):
        call("create", tmp_path / "t", "--view", "rgb=4", "--view", "rgb=8")
    with pytest.raises(InvalidInput, match="--view rgb: expected a width, got '²'"):
        call("create", tmp_path / "t", "--view", "rgb=²")
    np.savez(tmp_path / "empty.npz", rgb=np.empty((0, 4), np.float32))
    with pytest.raises(InvalidInput, match="found none"):
        call("import", tmp_path / "t", tmp_path / "empty.npz")
    assert not (tmp_path / "t").exists()
    with pytest.raises(InvalidInput, match="expected with --exclude overlap only"):
        call("query", path, "--plan", "rgb:3", "--clip", 5, "--margin", 1)
    call("seal", path)
    with pytest.raises(InvalidInput, match="nosuch://there: expected a URL that fsspec knows"):
        call("publish", path, "nosuch://there")


def test_options_that_would_do_nothing_are_refused(path, tmp_path):
    np.savez(tmp_path / "x.npz", rgb=np.zeros((3, 16), np.float32))
    with pytest.raises(InvalidInput, match="--map nosuch: expected one of the arrays rgb"):
        call("import", path, tmp_path / "x.npz", "--map", "nosuch=rgb2")
    with pytest.raises(InvalidInput, match="--codec: expected with --to zarr only"):
        call("export", path, tmp_path / "x.parquet", "--to", "parquet", "--codec", "gzip")
    assert ce.FeatureStore.open(path).rows == 60
    assert not (tmp_path / "x.parquet").exists()


def test_an_export_of_no_clip_has_no_ratio(path, tmp_path):
    arguments = ("export", path, tmp_path / "none.zarr", "--to", "zarr", "--where", "video_id < 0")
    assert json.loads(call(*arguments, "--json"))["ratio"] is None
    assert call(*arguments[:2], tmp_path / "more.zarr", *arguments[3:]).endswith(", no clip\n")


def test_a_published_store_is_described_asked_and_exported_by_its_url(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    call("seal", path)
    url = f"file://{tmp_path}/there"
    call("publish", path, url)
    assert json.loads(call("info", url, "--json"))["phases"]["main"]["rows"] == 60
    arguments = ("--plan", "rgb:3", "--clip", 5, "--json")
    assert call("query", url, *arguments) == call("query", path, *arguments)
    call("export", url, tmp_path / "x.parquet", "--to", "parquet")
    assert json.loads(call("import", tmp_path / "again", tmp_path / "x.parquet", "--json"))["added"] == 60


@pytest.mark.parametrize("form", ["parquet", "zarr"])
def test_an_export_that_fails_leaves_nothing_and_spares_what_was_there(path, tmp_path, monkeypatch, form):
    target = tmp_path / "out" / "x"
    target.parent.mkdir()
    if form == "parquet":
        call("export", path, target, "--to", "parquet")
    before = target.read_bytes() if target.exists() else None
    monkeypatch.setattr(ce.FeatureStore, "coded", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("export", path, target, "--to", form)
    assert (target.read_bytes() if target.exists() else None) == before
    assert [each.name for each in target.parent.iterdir()] == (["x"] if before else [])


@pytest.mark.parametrize(("package", "extra"), [("pyarrow", "store"), ("h5py.h5", "store"), ("faiss", "faiss")])
def test_a_missing_package_is_said_with_what_brings_it(package, extra):
    hint = main._hint(ModuleNotFoundError(f"No module named {package!r}", name=package))
    assert hint == f"; pip install 'cascade-engine[{extra}]' brings it"
    assert main._hint(ModuleNotFoundError("No module named 'x'", name="x")) == main._hint(OSError("x")) == ""


def test_a_disk_that_refuses_is_said_by_gc(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system", "writer.lock")

    monkeypatch.setattr("cascade_engine.store.cleaning.take_lock", refuse)
    with pytest.raises(StoreError, match=r"cannot clean up: Read-only file system \(writer.lock\)"):
        call("gc", path)
