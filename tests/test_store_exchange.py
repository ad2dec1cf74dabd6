"""Staging groups merged, phases published and fetched, imports and exports: what goes in comes out."""

import functools
import http.server
import os
import shutil
import threading

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xarray
import zarr
from store_rows import COLUMNS, VIEWS, batch, features, wrong_rows

import cascade_engine as ce
from cascade_engine.errors import Corrupt, InvalidInput, NotFound, StoreError, StoreLocked
from cascade_engine.store import exchanging, publishing, staging
from cascade_engine.store.tables import read_tables

PAGE = 4096


def everything(store):
    return {name: store.column(name) for name in store.columns} | {view: store.features(view) for view in store.views}


def same(a, b):
    assert a.keys() == b.keys()
    for name, values in a.items():
        there = b[name]
        if values.dtype.name == "bfloat16":  # NumPy takes its kind for raw bytes
            assert there.dtype == values.dtype
            values, there = values.astype(np.float32), there.astype(np.float32)
        assert np.array_equal(values, there, equal_nan=values.dtype.kind == "f"), name


@pytest.fixture
def path(tmp_path):
    with ce.FeatureStore.create(tmp_path / "s", VIEWS, columns=COLUMNS, chunk_bytes=PAGE) as store:
        store.append(**batch(1, 0, 150))
        store.append(**batch(3, 150, 70))
    return tmp_path / "s"


def test_extractors_write_side_by_side_and_one_commit_takes_all(path):
    before = ce.FeatureStore.open(path).commit
    pids = []
    for worker in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                with staging.stage(path, f"worker-{worker}") as store:
                    for part in range(4):
                        number = 4 + worker * 4 + part
                        store.append(**batch(number, 220 + worker * 100 + part * 25, 25))
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert len(staging.staged(path)) == 3
    with ce.FeatureStore.open(path, mode="a") as store:
        assert store.merge() == 300
        assert store.commit == before + 1
        assert store.log()[-1].kind == "merge"
        assert (
            wrong_rows(
                {name: store.column(name) for name in ("clip_id", "video_id", "start", "end")}
                | {"rgb": store.features("rgb")}
            )
            == []
        )
        assert store.column("label").tolist() == [f"label {row % 5}" for row in range(520)]
        numbers = store.column("batch")
        assert np.array_equal(store.present("flow"), numbers % 3 != 0)
        assert store.verify() == []
        store.append(**batch(16, 520, 5))
    assert not staging.folder(path).exists()


def test_a_group_is_merged_once_and_a_clash_merges_nothing(path):
    for name, first in (("a", 220), ("b", 250)):
        with staging.stage(path, name) as group:
            group.append(**batch(5, first, 30))
    with ce.FeatureStore.open(path, mode="a") as store:
        assert staging.merge(store, keep=True) == 60
        assert staging.merge(store, keep=True) == 0
        with staging.stage(path, "c") as group:
            group.append(**batch(5, 280, 10))
        with staging.stage(path, "d") as group:
            group.append(**batch(5, 289, 10))
        with pytest.raises(InvalidInput, match="clip 289 again"):
            staging.merge(store)
        assert store.rows == 280
        store.append(**batch(5, 280, 1))
        assert store.verify() == []
        with staging.stage(path, "e"), pytest.raises(StoreLocked, match=f"pid {os.getpid()}"):
            staging.merge(store)
        with pytest.raises(NotFound, match="expected a staging group"):
            staging.merge(store, [path.parent / "nothing"])


@pytest.mark.parametrize("durability", ["commit", "none"])
def test_a_group_goes_when_what_was_taken_of_it_is_on_the_disk(path, durability, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "sync", lambda: synced.append(staging.folder(path).exists()))
    with staging.stage(path, "a") as group:
        group.append(**batch(5, 220, 3))
    with ce.FeatureStore.open(path, mode="a", durability=durability) as store:
        assert store.merge() == 3
    assert not staging.folder(path).exists()
    assert synced == ([True] if durability == "none" else [])  # other commits are synced as they are made


def again(path, name):
    """A staging group that is there already, opened to go on with."""
    return ce.FeatureStore.open(staging.folder(path) / f"main.{name}", mode="a")


@pytest.mark.parametrize("record", ["says the rows", "is an older one, which does not"])
def test_a_group_that_goes_on_after_a_merge_loses_nothing(path, record):
    with staging.stage(path, "a") as group:
        group.append(**batch(6, 220, 30))
    with ce.FeatureStore.open(path, mode="a") as store:
        assert store.merge(keep=True) == 30
        uid = ce.FeatureStore.open(group.path).identity()[1]
        assert store.merged == {uid: 30}
    if record != "says the rows":
        file = path / "phases/main/zarr.json"
        file.write_text(file.read_text().replace(f'"merged": {{"{uid}": 30}}', f'"merged": ["{uid}"]'))
        assert ce.FeatureStore.open(path).merged == {uid: None}
    with again(path, "a") as group:
        group.append(**batch(7, 250, 3))
        group.fill("flow", np.arange(220, 250, 2), features("flow", np.arange(220, 250, 2)))
    with ce.FeatureStore.open(path, mode="a") as store:
        assert store.merge(keep=True) == 3
        assert store.merge() == 0
        assert store.column("clip_id").tolist() == list(range(253))
        assert store.present("flow")[220:].tolist() == [row % 2 == 0 for row in range(220, 250)] + [True] * 3
        assert np.array_equal(store.features("flow")[220:250:2], features("flow", np.arange(220, 250, 2)))
        assert store.verify() == []
    assert not staging.folder(path).exists()


def test_late_features_of_a_group_are_taken_to_the_bit(tmp_path):
    rng = np.random.default_rng(5)
    values = rng.standard_normal((500, 8))
    ids = np.arange(500)
    ce.FeatureStore.create(tmp_path / "s", {"a": 8, "b": 8}, normalise=True).close()
    with staging.stage(tmp_path / "s", "x") as group, ce.FeatureStore.open(tmp_path / "s", mode="a") as store:
        group.append({"a": values}, clip_id=ids, video_id=ids)
        group.close()
        store.merge(keep=True)
        with again(tmp_path / "s", "x") as group:
            group.fill("b", ids, values)
            want = group.features("b").copy()
        assert store.merge() == 0
        assert np.array_equal(store.features("b"), want)


def test_clips_that_power_loss_took_from_a_group_do_not_hide_others(path, tmp_path):
    with staging.stage(path, "a", durability="none") as group:
        shutil.copytree(group.path, tmp_path / "empty")
        group.append(**batch(5, 220, 10))
    with ce.FeatureStore.open(path, mode="a") as store:
        assert store.merge(keep=True) == 10
        shutil.rmtree(group.path)
        shutil.copytree(tmp_path / "empty", group.path)
        with again(path, "a") as group:
            group.append(**batch(5, 225, 10))
        assert store.merge() == 5
        assert store.column("clip_id").tolist() == list(range(235))


def test_a_locked_group_holds_up_its_merge_and_not_the_next(path):
    for name, first in (("a", 220), ("b", 230)):
        with staging.stage(path, name) as group:
            group.append(**batch(5, first, 10))
    with ce.FeatureStore.open(path, mode="a") as store:
        with again(path, "b"), pytest.raises(StoreLocked, match=r"main\.b"):
            store.merge()
        again(path, "a").close()
        assert store.merge() == 20


def test_nobody_writes_to_a_group_while_it_is_removed(path, monkeypatch):
    with staging.stage(path, "a") as group:
        group.append(**batch(5, 220, 30))
    seen = []

    def refused(root, paths):
        with pytest.raises(StoreLocked):
            again(path, "a")
        seen.extend(paths)

    monkeypatch.setattr(staging, "_remove", refused)
    with ce.FeatureStore.open(path, mode="a") as store:
        assert store.merge() == 30
    assert seen == staging.staged(path)


def test_a_phase_whose_name_another_begins_with_takes_its_own_groups_only(path):
    for name in ("v1", "v1.1"):
        ce.FeatureStore.open(path).new_phase(name).close()
        with staging.stage(path, "a", phase=name) as group:
            group.append(**batch(5, 10 * len(name), 5))
    staging.folder(path).joinpath(f"v1.b.new-1-{32 * 'a'}").mkdir()
    staging.folder(path).joinpath(f"v1.b.new-1-{32 * 'a'}", "zarr.json").touch()
    with ce.FeatureStore.open(path, mode="a", phase="v1") as store:
        assert store.merge() == 5
        assert store.column("clip_id").tolist() == list(range(20, 25))
    with ce.FeatureStore.open(path, mode="a", phase="v1.1") as store:
        assert store.merge() == 5


@pytest.fixture
def served(tmp_path):
    """A folder served over HTTP on this machine."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "www"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_sealed_phase_is_published_and_read_from_afar(path, tmp_path, served, monkeypatch):
    folder, url = served
    store = ce.FeatureStore.open(path, mode="a")
    with pytest.raises(StoreError, match="seal it first"):
        publishing.publish(store, f"file://{folder}/s")
    store.seal()
    sent = []
    assert publishing.publish(store, f"file://{folder}/s", progress=sent.append) > 50_000
    assert len(sent) > 20
    for address in (f"file://{folder}/s", f"{url}/s"):
        there = publishing.fetch(address, cache=tmp_path / "cache")
        same(everything(there), everything(store))
        assert there.verify() == []
    again = []
    publishing.fetch(f"{url}/s", cache=tmp_path / "cache", progress=again.append)
    assert again == [], "the cache serves the second reader"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    same(everything(ce.FeatureStore.open(f"{url}/s")), everything(store))
    assert (tmp_path / "home" / "cascade_engine").is_dir()
    with pytest.raises(StoreError, match="can only be read"):
        ce.FeatureStore.open(f"{url}/s", mode="a")
    plain = zarr.open_group(str(folder / "s" / "phases" / "main"), mode="r")
    assert np.array_equal(plain["rgb"][:], store.features("rgb"))
    other = store.like(tmp_path / "other")
    other.seal()
    with pytest.raises(StoreError, match="another phase 'main'"):
        publishing.publish(other, f"file://{folder}/s")
    with pytest.raises(NotFound, match="expected a published store"):
        publishing.fetch(f"{url}/none", cache=tmp_path / "cache")


def test_everything_is_published_whatever_folders_and_views_are_called(tmp_path):
    root = tmp_path / "aside" / "s"
    root.parent.mkdir()
    features = np.arange(40, dtype=np.float32).reshape(10, 4)
    with ce.FeatureStore.create(root, {"rgb": 4, "aside": 4}) as store:
        store.append({"rgb": features, "aside": -features}, clip_id=np.arange(10), video_id=np.arange(10))
        store.seal()
    store = ce.FeatureStore.open(root)
    (root / "phases" / "main" / "commits" / "aside" / "rgb.hnsw.faiss").write_bytes(b"a cache, which is left behind")
    publishing.publish(store, f"file://{tmp_path}/there")
    there = publishing.fetch(f"file://{tmp_path}/there", cache=tmp_path / "cache")
    assert np.array_equal(there.features("rgb"), features)
    same(everything(store), everything(there))
    assert there.verify() == []
    assert not list(there.path.rglob("*.faiss"))


def test_what_was_changed_on_the_way_is_refused(path, tmp_path, served):
    folder, url = served
    store = ce.FeatureStore.open(path, mode="a")
    store.seal()
    publishing.publish(store, f"file://{folder}/s")
    file = folder / "s/phases/main/rgb/c.1.0"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    with pytest.raises(Corrupt, match=r"rgb/c\.1\.0: expected 4096 bytes as published"):
        publishing.fetch(f"{url}/s", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("c.1.0")), "nothing of it stays"
    data[7] ^= 1
    file.write_bytes(data)
    manifest = folder / "s/phases/main/commits/aside/manifest.json"
    manifest.write_text(manifest.read_text().replace('"rgb/c.1.0"', '"../../../../evil"'))
    with pytest.raises(Corrupt, match="outside its phase"):
        publishing.fetch(f"{url}/s", cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("evil"))


def tables():
    rows = np.arange(90)
    content = batch(1, 0, 90)
    return {
        "rgb": content["views"]["rgb"],
        "flow": content["views"]["flow"],
        "clip_id": rows,
        "video_id": rows // 3,
        "start": content["start"],
        "end": content["end"],
        "label": np.array(content["label"]),
        "batch": content["batch"],
        "size": content["size"],
    }


def write_as(kind, folder):
    arrays = tables()
    if kind == "npz":
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"
    if kind == "npy":
        (folder / "x").mkdir()
        for name, values in arrays.items():
            np.save(folder / "x" / f"{name}.npy", values)
        return folder / "x"
    if kind == "parquet":
        columns = {name: pa.array(list(values) if values.ndim == 2 else values) for name, values in arrays.items()}
        pq.write_table(pa.table(columns), folder / "x.parquet")
        return folder / "x.parquet"
    if kind == "h5":
        with h5py.File(folder / "x.h5", "w") as file:
            for name, values in arrays.items():
                file[name] = values if name != "label" else [text.encode() for text in values]
        return folder / "x.h5"
    (folder / "x").mkdir()
    for start in range(0, 90, 40):
        part = {name: values[start : start + 40] for name, values in arrays.items()}
        content = {n: v.tolist() if n == "label" else torch.from_numpy(v.copy()) for n, v in part.items()}
        torch.save(content, folder / "x" / f"{start:04}.pt")
    return folder / "x"


@pytest.mark.parametrize("kind", ["npz", "npy", "parquet", "h5", "pt"])
def test_every_format_is_imported_to_the_same_store(tmp_path, kind):
    source = write_as(kind, tmp_path)
    views, columns = exchanging.schema_of(next(read_tables(source)), {})
    assert views == VIEWS
    assert columns == COLUMNS
    with ce.FeatureStore.create(tmp_path / "s", views, columns=columns) as store:
        assert exchanging.import_into(store, read_tables(source, rows=35)) == 90
        same(everything(store), tables())


@pytest.mark.parametrize("durability", ["commit", "group", "none"])
def test_clips_without_ids_are_counted_on_from_those_not_yet_published(tmp_path, durability):
    rgb = np.arange(280, dtype=np.float32).reshape(70, 4)
    with ce.FeatureStore.create(tmp_path / "s", {"rgb": 4}, durability=durability) as store:
        store.append({"rgb": rgb[:10]}, clip_id=np.arange(10), video_id=np.arange(10))
        parts = [{"rgb": rgb[start : start + 20]} for start in (10, 30, 50)]
        assert exchanging.import_into(store, iter(parts)) == 60
    store = ce.FeatureStore.open(tmp_path / "s")
    assert store.column("clip_id").tolist() == store.column("video_id").tolist() == list(range(70))
    assert np.array_equal(store.features("rgb"), rgb)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_plain_zarr_is_imported_group_or_array(tmp_path, zarr_format):
    arrays = tables()
    arrays.pop("label")
    group = zarr.create_group(tmp_path / "x.zarr", zarr_format=zarr_format)
    for name, values in arrays.items():
        group.create_array(name, data=values, chunks=(7, *values.shape[1:]))
    zarr.create_array(tmp_path / "rgb.zarr", data=arrays["rgb"], chunks=(7, 16), zarr_format=zarr_format)
    kinds = {name: kind for name, kind in COLUMNS.items() if name != "label"}
    with ce.FeatureStore.create(tmp_path / "s", VIEWS, columns=kinds) as store:
        assert exchanging.import_into(store, read_tables(tmp_path / "x.zarr", rows=35)) == 90
        same(everything(store), arrays)
    with ce.FeatureStore.create(tmp_path / "t", {"rgb": 16}) as store:
        assert exchanging.import_into(store, read_tables(tmp_path / "rgb.zarr", rows=35)) == 90
        assert np.array_equal(store.features("rgb"), arrays["rgb"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_archive_comes_back_texts_and_missing_views_included(tmp_path, dtype):
    with ce.FeatureStore.create(tmp_path / "s", VIEWS, columns=COLUMNS, dtype=dtype) as store:
        store.append(**batch(1, 0, 150))
        store.append(**batch(3, 150, 70))
        store.archive(tmp_path / "x")
        with store.like(tmp_path / "back") as back:
            assert exchanging.import_into(back, read_tables(tmp_path / "x", rows=100)) == 220
            same(everything(back), everything(store))
            assert np.array_equal(back.present("flow"), store.present("flow"))


def test_a_feature_store_is_no_plain_zarr_to_import(path, tmp_path):
    for source in (path, path / "phases" / "main"):
        with pytest.raises(InvalidInput, match=r"expected plain Zarr, got a feature store's own; export it first"):
            next(read_tables(source))
    zarr.create_group(tmp_path / "x").create_array("n", data=np.arange(3), attributes={"categories": ["a", "b"]})
    with pytest.raises(InvalidInput, match=r"array 'n': expected codes from 0 to 1, got 0 to 2"):
        next(read_tables(tmp_path / "x"))
    zarr.create_group(tmp_path / "none")
    with pytest.raises(InvalidInput, match="arrays of one length, got none"):
        next(read_tables(tmp_path / "none"))


def test_clips_in_files_of_their_own_are_imported_in_the_order_of_names(tmp_path):
    for number in range(5):
        torch.save({"x": torch.full((6,), float(number)), "label": f"l{number}"}, tmp_path / f"{number}.pt")
    with ce.FeatureStore.create(tmp_path / "s", {"rgb": 6}, columns={"label": "str"}) as store:
        assert exchanging.import_into(store, read_tables(tmp_path), rename={"x": "rgb"}) == 5
        assert store.features("rgb")[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert store.column("label").tolist() == ["l0", "l1", "l2", "l3", "l4"]


def test_what_cannot_be_imported_says_why(tmp_path):
    with pytest.raises(NotFound, match="found nothing"):
        next(read_tables(tmp_path / "none"))
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(InvalidInput, match=r"expected \.npy"):
        next(read_tables(tmp_path / "x.txt"))
    np.savez(tmp_path / "x.npz", a=np.zeros(3), b=np.zeros(4))
    with pytest.raises(InvalidInput, match="arrays of one length"):
        next(read_tables(tmp_path / "x.npz"))


@pytest.mark.parametrize("fixed", [True, False])
def test_clips_without_a_view_come_back_from_parquet_without_it(tmp_path, fixed):
    rgb = np.arange(24, dtype=np.float32).reshape(6, 4)
    absent = np.array([False, False, True, False, True, True])
    lists = [None if gone else row for gone, row in zip(absent, rgb, strict=True)]
    column = pa.array(lists, pa.list_(pa.float32(), 4 if fixed else -1))
    pq.write_table(pa.table({"rgb": column, "flow": pa.array(list(rgb))}), tmp_path / "x.parquet")
    assert exchanging.schema_of(next(read_tables(tmp_path / "x.parquet")), {})[0] == {"rgb": 4, "flow": 4}
    with ce.FeatureStore.create(tmp_path / "s", {"rgb": 4, "flow": 4}) as store:
        tables = read_tables(tmp_path / "x.parquet", rows=2)  # the last two have no rgb at all
        assert exchanging.import_into(store, tables) == 6
        assert store.present("rgb").tolist() == (~absent).tolist()
        assert np.array_equal(store.features("rgb")[~absent], rgb[~absent])
        assert np.array_equal(store.features("flow"), rgb)


@pytest.mark.parametrize("lists", [[[1.0], [2.0, 3.0, 4.0]], [[1.0, 2.0], None, [3.0, None]]])
def test_lists_of_different_lengths_or_with_nulls_are_refused(tmp_path, lists):
    pq.write_table(pa.table({"rgb": pa.array(lists)}), tmp_path / "x.parquet")
    with pytest.raises(InvalidInput, match="column 'rgb': expected lists of one length without nulls in them"):
        next(read_tables(tmp_path / "x.parquet"))


def test_nan_is_no_missing_view(tmp_path):
    rgb = np.full((3, 4), np.nan, np.float32)
    pq.write_table(pa.table({"rgb": pa.array(list(rgb))}), tmp_path / "x.parquet")
    source = read_tables(tmp_path / "x.parquet")
    with ce.FeatureStore.create(tmp_path / "s", {"rgb": 4}) as store, pytest.raises(InvalidInput, match="got nan in"):
        exchanging.import_into(store, source)


def test_exports_hold_the_rows(path, tmp_path):
    store = ce.FeatureStore.open(path)
    exchanging.to_parquet(store, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["label"].to_pylist() == store.column("label").tolist()
    assert [row is not None for row in table["flow"].to_pylist()] == store.present("flow").tolist()
    with store.like(tmp_path / "back") as back:
        assert exchanging.import_into(back, read_tables(tmp_path / "x.parquet")) == 220
        same(everything(back), everything(store))
        assert np.array_equal(back.present("flow"), store.present("flow"))
    for codec in ("zstd", "gzip", "blosc", "none"):
        raw, packed = exchanging.archive(store, tmp_path / codec, codec, where="clip_id < 100")
        assert raw > packed or codec == "none"
        data = xarray.open_zarr(str(tmp_path / codec), consolidated=False)
        assert np.array_equal(data["rgb"].values, store.features("rgb")[:100])
        assert np.array_equal(data["start"].values, store.column("start")[:100])
    store.archive(tmp_path / "all")
    assert zarr.open_group(tmp_path / "all", mode="r")["rgb"].shape == (220, 16)
    with pytest.raises(InvalidInput, match="codec: expected one of"):
        store.archive(tmp_path / "no", "lzma")
