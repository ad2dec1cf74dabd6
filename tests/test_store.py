"""The feature store's rows, columns, phases and views, as its own reader shows them."""

import json
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch

import cascade_engine as ce
from cascade_engine.errors import InvalidInput, NotFound, SchemaMismatch, StoreError, StoreLocked
from cascade_engine.store import opening
from cascade_engine.store.cleaning import clean

PAGE = 4096


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def columns_of(ids):
    return {
        "clip_id": ids,
        "video_id": ids // 5,
        "start": ids * 1.0,
        "end": ids + 1.5,
        "label": [f"action {i % 7}" for i in ids],
        "split": ["train" if i % 2 else "test" for i in ids],
    }


def fill_store(path, rng, rows=1000, **options):
    """A store of several chunks, and what is in it."""
    store = ce.FeatureStore.create(
        path, {"rgb": 16, "flow": 8}, columns={"label": "str", "split": "str"}, chunk_bytes=PAGE, **options
    )
    held = {"rgb": unit(rng, rows, 16), "flow": unit(rng, rows, 8)}
    for start in range(0, rows, 130):
        part = slice(start, min(start + 130, rows))
        ids = np.arange(part.start, part.stop)
        assert store.append({v: x[part] for v, x in held.items()}, **columns_of(ids)) == len(ids)
    return store, held


def test_rows_and_columns_come_back_as_they_went_in_whatever_the_chunks(tmp_path, rng):
    writer, held = fill_store(tmp_path / "s", rng)
    writer.close()
    store = ce.FeatureStore.open(tmp_path / "s")
    ids = np.arange(1000)
    assert store.rows == 1000
    assert store.views == {"rgb": 16, "flow": 8}
    assert store.phases == ("main",)
    for view, values in held.items():
        assert np.array_equal(store.features(view), values)
    for name, values in columns_of(ids).items():
        assert np.array_equal(store.column(name), np.asarray(values)), name


def test_a_bank_of_a_whole_phase_shares_the_mapped_files(tmp_path, rng):
    writer, held = fill_store(tmp_path / "s", rng)
    bank = writer.bank()
    assert bank.views == ("rgb", "flow")
    assert np.shares_memory(bank.keys["rgb"], writer.features("rgb"))
    assert not bank.keys["rgb"].flags.writeable
    assert np.array_equal(bank.video_id, np.arange(1000) // 5)
    assert np.array_equal(bank.clip_id, np.arange(1000))
    assert bank.label[13] == "action 6"
    tensors = writer.bank("rgb", device="cpu")
    assert isinstance(tensors.keys["rgb"], torch.Tensor)
    assert tensors.keys["rgb"].data_ptr() == bank.keys["rgb"].__array_interface__["data"][0]
    assert torch.equal(tensors.keys["rgb"], torch.from_numpy(held["rgb"]))
    writer.close()
    assert np.array_equal(bank.keys["rgb"], held["rgb"]), "a bank outlives its store"


def test_a_filtered_bank_holds_the_rows_that_the_condition_names(tmp_path, rng):
    store, held = fill_store(tmp_path / "s", rng)
    ids = np.arange(1000)
    bank = store.bank(("flow",), where="split == 'train' and label in ('action 1', 'action 4') and video_id >= 20")
    wanted = (ids % 2 == 1) & np.isin(ids % 7, (1, 4)) & (ids // 5 >= 20)
    assert np.array_equal(bank.keys["flow"], held["flow"][wanted])
    assert np.array_equal(bank.clip_id, ids[wanted])
    assert set(np.asarray(bank.label)) == {"action 1", "action 4"}
    empty = store.bank(where="clip_id < 0")
    assert len(empty) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_stored_type_holds_its_rounding_of_what_came(tmp_path, rng, dtype):
    values = unit(rng, 40, 6)
    with ce.FeatureStore.create(tmp_path / "s", {"rgb": 6}, dtype=dtype) as store:
        store.append({"rgb": torch.from_numpy(values)}, clip_id=np.arange(40), video_id=np.zeros(40, int))
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        got = store.bank().keys["rgb"]
        assert got.dtype == kind
        assert np.array_equal(got, values.astype(kind))
        assert str(store.bank(device="cpu").keys["rgb"].dtype) == f"torch.{dtype}"


def test_an_older_commit_shows_what_it_showed_then(tmp_path, rng):
    store, held = fill_store(tmp_path / "s", rng)
    assert [entry.rows for entry in store.log()] == [0, *range(130, 1000, 130), 1000]
    assert [entry.kind for entry in store.log()] == ["create"] + ["append"] * 8
    assert np.array_equal(store.bank(at=2).keys["rgb"], held["rgb"][:260])
    assert len(store.bank(at=3, where="split == 'test'")) == 195
    with pytest.raises(NotFound, match="expected a commit from 0 to 8, got 9"):
        store.bank(at=9)


def test_missing_views_are_nan_and_absent_until_filled(tmp_path, rng):
    rgb, flow = unit(rng, 300, 16), unit(rng, 300, 8)
    ids = np.arange(300) * 3
    store = ce.FeatureStore.create(tmp_path / "s", {"rgb": 16, "flow": 8}, chunk_bytes=PAGE)
    store.append({"rgb": rgb[:200]}, clip_id=ids[:200], video_id=ids[:200])
    mask = np.arange(100) % 4 == 0
    partly = np.where(mask[:, None], flow[200:], np.nan)
    store.append({"rgb": rgb[200:], "flow": partly}, clip_id=ids[200:], video_id=ids[200:], present={"flow": mask})
    assert np.isnan(store.features("flow")[:200]).all()
    assert np.array_equal(store.present("flow"), np.concatenate([np.zeros(200, bool), mask]))
    assert np.array_equal(store.bank().clip_id, ids[200:][mask])
    assert len(store.bank("rgb")) == 300
    before = store.commit
    chosen = rng.permutation(np.flatnonzero(~store.present("flow")))[:150]
    store.fill("flow", ids[chosen], flow[chosen])
    there = store.present("flow")
    assert set(np.flatnonzero(there)) == set(chosen) | set(200 + np.flatnonzero(mask))
    assert np.array_equal(store.features("flow")[there], flow[there])
    assert np.isnan(store.features("flow")[~there]).all()
    assert np.array_equal(store.bank(at=before).clip_id, ids[200:][mask]), "an older commit does not see the fill"
    with pytest.raises(InvalidInput, match="has view 'flow' already"):
        store.fill("flow", ids[chosen[:1]], flow[chosen[:1]])
    with pytest.raises(NotFound, match="no clip 1"):
        store.fill("flow", [1], flow[:1])


def test_a_view_and_a_column_can_be_added_and_a_column_set_anew(tmp_path, rng):
    store, held = fill_store(tmp_path / "s", rng)
    audio = unit(rng, 1000, 4)
    store.add_view("audio", 4, dtype="float16")
    assert not store.present("audio").any()
    assert np.isnan(store.features("audio")).all()
    some = np.arange(500, 640)
    store.fill("audio", some, audio[some])
    store.append({"rgb": held["rgb"][:1], "audio": audio[:1]}, **columns_of(np.array([5000])))
    assert np.flatnonzero(store.present("audio")).tolist() == [*some, 1000]
    assert np.array_equal(store.bank("audio").keys["audio"], audio[[*some, 0]].astype(np.float16))
    at = store.commit
    store.set_column("label", ["changed"] * 1001)
    store.set_column("quality", np.arange(1001) / 2, kind="float")
    assert store.column("label")[7] == "changed"
    assert store.column("label", at=at)[7] == "action 0"
    assert store.column("quality")[9] == 4.5
    with pytest.raises(NotFound, match="added by commit"):
        store.column("quality", at=at)
    store.append({"rgb": held["rgb"][:1]}, quality=1.0, **columns_of(np.array([5001])))
    store.close()
    again = ce.FeatureStore.open(tmp_path / "s")
    assert again.column("label").tolist()[-2:] == ["changed", "action 3"]


def test_a_batch_that_does_not_fit_is_refused_and_leaves_no_trace(tmp_path, rng):
    store, held = fill_store(tmp_path / "s", rng, rows=10)
    good = {"rgb": held["rgb"][:2], "flow": held["flow"][:2]}
    ids = np.array([70, 71])
    spoilt = held["rgb"][:2].copy()
    spoilt[1, 3] = np.inf
    cases = [
        ({"views": good | {"rgb": spoilt}}, InvalidInput, r"got inf in clip 71 \(row 1"),
        ({"views": good | {"rgb": held["flow"][:2]}}, InvalidInput, r'views\["rgb"\]: expected \(2, 16\)'),
        ({"views": good | {"depth": spoilt}}, SchemaMismatch, "has rgb, flow, got 'depth'"),
        ({"clip_id": np.array([70, 70])}, InvalidInput, "got clip 70 again"),
        ({"clip_id": np.array([70, 3])}, InvalidInput, "got clip 3 again"),
        ({"clip_id": np.array([0.5, 3])}, InvalidInput, "clip_id: expected"),
        ({"label": None}, SchemaMismatch, "label: expected a value a clip for this str column"),
        ({"label": ["a"]}, InvalidInput, "label: expected 2 texts, got 1"),
        ({"label": ["a", 3]}, InvalidInput, "expected Unicode texts"),
        ({"colour": ["a", "b"]}, SchemaMismatch, "got 'colour'"),
        ({"present": {"flow": np.ones(3, bool)}}, InvalidInput, r"expected \(2,\) bool"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            store.append(**({"views": good} | columns_of(ids) | change))
    assert store.rows == 10
    store.append(good, **columns_of(ids))
    assert np.array_equal(store.features("rgb"), np.concatenate([held["rgb"], held["rgb"][:2]]))
    assert store.column("label")[-2:].tolist() == ["action 0", "action 1"]


def test_features_are_scaled_to_unit_length_where_the_store_says_so(tmp_path, rng):
    values = rng.standard_normal((20, 6)) * 10.0 ** rng.integers(-200, 200, (20, 1))
    with ce.FeatureStore.create(tmp_path / "s", {"rgb": 6}, normalise=True) as store:
        store.append({"rgb": values}, clip_id=np.arange(20), video_id=np.arange(20))
        direction = values / np.abs(values).max(axis=1, keepdims=True)
        want = direction / np.sqrt((direction**2).sum(1, keepdims=True))
        assert np.abs(store.features("rgb") - want).max() < 1e-7
        with pytest.raises(InvalidInput, match="zeros in clip 9"):
            store.append({"rgb": np.zeros((1, 6))}, clip_id=[9], video_id=[1])


def test_too_large_for_float16_is_refused(tmp_path):
    store = ce.FeatureStore.create(tmp_path / "s", {"rgb": 2}, dtype="float16")
    with pytest.raises(InvalidInput, match="as float16: expected finite values, got inf in clip 4"):
        store.append({"rgb": np.array([[70000.0, 1.0]])}, clip_id=[4], video_id=[4])


def test_a_second_writer_is_refused_and_told_who_holds_the_phase(tmp_path, rng):
    store, _ = fill_store(tmp_path / "s", rng, rows=10)
    with pytest.raises(StoreLocked, match=f"pid {os.getpid()} on host {socket.gethostname()}"):
        ce.FeatureStore.open(tmp_path / "s", mode="a")
    store.close()
    ce.FeatureStore.open(tmp_path / "s", mode="a").close()


def test_a_forked_child_neither_keeps_the_phase_nor_writes_it(tmp_path, rng):
    store, held = fill_store(tmp_path / "s", rng, 10, durability="group")
    more = {v: x[:1] for v, x in held.items()}
    waiting, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with pytest.raises(StoreError, match="forked from"):
                store.append(more, **columns_of(np.arange(10, 11)))
            store.close()
            with pytest.raises(StoreLocked):
                ce.FeatureStore.open(tmp_path / "s", mode="a")
            assert ce.FeatureStore.open(tmp_path / "s").rows == 0, "what is pending is its parent's to publish"
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.read(waiting, 1)  # it lives on, and touches nothing
        os._exit(0)
    store.close()
    with ce.FeatureStore.open(tmp_path / "s", mode="a") as store:
        assert store.append(more, **columns_of(np.arange(10, 11))) == 1
        assert store.rows == 11
    os.close(go)
    os.close(waiting)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_phase_sealed_while_its_lock_is_awaited_takes_nothing_more(tmp_path, rng, monkeypatch):
    fill_store(tmp_path / "s", rng, 10)[0].close()

    def sealed_first(*args):
        monkeypatch.undo()
        ce.FeatureStore.open(tmp_path / "s", mode="a").seal()
        return opening.take_lock(*args)

    monkeypatch.setattr(opening, "take_lock", sealed_first)
    with pytest.raises(StoreError, match="sealed"):
        ce.FeatureStore.open(tmp_path / "s", mode="a")
    assert clean(tmp_path / "s") == [], "nor is its lock kept"


def test_a_copy_without_empty_folders_is_a_store_like_any(tmp_path, rng):
    fill_store(tmp_path / "s", rng, 10)[0].close()
    aside = tmp_path / "s/phases/main/commits/aside"
    for use in (clean, lambda path: ce.FeatureStore.open(path, mode="a").close()):
        shutil.rmtree(aside)
        use(tmp_path / "s")
        assert aside.is_dir()


def test_phases_stand_side_by_side_and_a_sealed_one_takes_nothing_more(tmp_path, rng):
    store, held = fill_store(tmp_path / "s", rng, rows=10)
    second = store.new_phase("cycle 1".replace(" ", "-"), model="abc")
    second.append({v: -x for v, x in held.items()}, **columns_of(np.arange(10)))
    second.seal()
    assert second.sealed
    assert store.phases == ("main", "cycle-1")
    assert np.array_equal(store.bank("rgb", phase="cycle-1").keys["rgb"], -held["rgb"])
    assert np.array_equal(store.bank("rgb").keys["rgb"], held["rgb"])
    with pytest.raises(StoreError, match="sealed"):
        ce.FeatureStore.open(tmp_path / "s", mode="a", phase="cycle-1")
    with pytest.raises(StoreError, match="exists already"):
        store.new_phase("main")
    with pytest.raises(NotFound, match="phase 'cycle-2'"):
        store.bank(phase="cycle-2")


def test_threads_make_phases_and_stores_side_by_side(tmp_path, rng):
    fill_store(tmp_path / "s", rng, 10)
    store = ce.FeatureStore.open(tmp_path / "s")
    names = [f"phase-{number}" for number in range(8)]
    start = threading.Barrier(8)

    def make(name):
        start.wait()
        store.new_phase(name).close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, names))
    assert set(store.phases) == {"main", *names}
    assert store.verify() == []
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


def test_grouped_appends_show_together(tmp_path, rng):
    values = unit(rng, 50, 8)
    store = ce.FeatureStore.create(tmp_path / "s", {"rgb": 8}, durability="group")
    for row in range(40):
        store.append({"rgb": values[row : row + 1]}, clip_id=[row], video_id=[row])
    assert ce.FeatureStore.open(tmp_path / "s").rows in (0, *range(1, 40))
    store.flush()
    assert ce.FeatureStore.open(tmp_path / "s").rows == 40
    with pytest.raises(InvalidInput, match="clip 12 again"):
        store.append({"rgb": values[:1]}, clip_id=[12], video_id=[0])
    store.append({"rgb": values[40:]}, clip_id=np.arange(40, 50), video_id=np.arange(10))
    with pytest.raises(InvalidInput, match="clip 44 again"):
        store.append({"rgb": values[:1]}, clip_id=[44], video_id=[0])
    store.close()
    assert np.array_equal(ce.FeatureStore.open(tmp_path / "s").features("rgb"), values)


def test_a_store_sees_a_phase_it_seals_and_its_writer_refreshes_others(tmp_path, rng):
    store, held = fill_store(tmp_path / "s", rng, 10)
    two = store.new_phase("two")
    assert store.count("two") == 0
    two.append(held, **columns_of(np.arange(10)))
    assert store.count("two") == 0, "a store keeps the commit it has seen"
    store.refresh()
    assert store.count("two") == 10
    assert store.append({v: x[:1] for v, x in held.items()}, **columns_of(np.arange(10, 11))) == 1
    two.append({v: x[:1] for v, x in held.items()}, **columns_of(np.arange(10, 11)))
    two.close()
    store.seal("two")
    assert store.identity("two")[2:] == (3, True)
    assert store.count("two") == store.rows == 11


def test_a_reader_keeps_its_commit_until_it_refreshes(tmp_path, rng):
    writer, held = fill_store(tmp_path / "s", rng, rows=100)
    reader = ce.FeatureStore.open(tmp_path / "s")
    shown = reader.features("rgb")
    writer.append({v: x[:5] for v, x in held.items()}, **columns_of(np.arange(100, 105)))
    assert reader.rows == 100
    assert np.array_equal(shown, held["rgb"])
    reader.refresh()
    assert reader.rows == 105


def test_gathered_rows_are_the_rows_prefetched_or_not(tmp_path, rng):
    store, held = fill_store(tmp_path / "s", rng)
    rows = rng.integers(0, 1000, 200)
    for prefetch in (False, True):
        assert np.array_equal(store.gather("rgb", rows, prefetch=prefetch), held["rgb"][rows])
    with pytest.raises(InvalidInput, match="expected rows from 0 to 999"):
        store.gather("rgb", [1000])


def test_what_is_no_store_says_so(tmp_path):
    with pytest.raises(NotFound, match="found nothing"):
        ce.FeatureStore.open(tmp_path / "none")
    (tmp_path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    with pytest.raises(SchemaMismatch, match="expected the root of a feature store"):
        ce.FeatureStore.open(tmp_path)
    with pytest.raises(StoreError, match="expected nothing there"):
        ce.FeatureStore.create(tmp_path, {"rgb": 2})
    for views in ({}, {"clip_id": 3}, {"a b": 3}, {"rgb": 0}):
        with pytest.raises(InvalidInput):
            ce.FeatureStore.create(tmp_path / "new", views)
    assert [path.name for path in tmp_path.iterdir()] == ["zarr.json"]
