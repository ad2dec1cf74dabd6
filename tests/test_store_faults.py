"""What plain readers see, and what `verify` and the writer say where the disk or a file is at fault."""

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from store_rows import COLUMNS, VIEWS, batch, features, wrong_rows

import cascade_engine as ce
from cascade_engine.errors import Corrupt, SchemaMismatch, StoreError

PAGE = 4096


@pytest.fixture
def path(tmp_path):
    """A store of 500 clips in two batches, the first without flow, which a fill brought to half of them."""
    with ce.FeatureStore.create(tmp_path / "s", VIEWS, columns=COLUMNS, chunk_bytes=PAGE) as store:
        store.append(**batch(0, 0, 300))
        store.append(**batch(1, 300, 200))
        store.fill("flow", np.arange(0, 300, 2), features("flow", np.arange(0, 300, 2)))
    return tmp_path / "s"


def test_plain_readers_see_the_rows_without_a_warning(path):
    folder = str(path / "phases" / "main")
    names = ("clip_id", "video_id", "start", "end", "rgb")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for consolidated in (None, False):
            root = zarr.open_group(str(path), mode="r", use_consolidated=consolidated)
            listed = dict(root.members(max_depth=None))
            assert listed["phases/main/rgb"].shape == (500, 16)
            assert np.isnan(listed["phases/main/flow"][1]).all()
        group = zarr.open_group(folder, mode="r")
        assert wrong_rows({name: group[name][:] for name in names}) == []
        labels = group["label"].attrs["categories"]
        assert [labels[code] for code in group["label"][:]] == [f"label {row % 5}" for row in range(500)]
        data = xarray.open_zarr(folder).load()
        assert wrong_rows({name: data[name].values for name in names}) == []
        assert data["clip_id"].dtype == np.int64
    for name in names:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/{name}/"}}
        array = tensorstore.open(spec, open=True).result()
        assert np.array_equal(array.read().result(), group[name][:])


def test_verify_is_silent_on_a_sound_store(path):
    assert ce.FeatureStore.open(path).verify() == []


@pytest.mark.parametrize(
    "name", ["rgb/c.2.0", "flow/c.3.0", "clip_id/c.0", "label/c.0", "present-flow/c.0", "commits/c.0.0"]
)
def test_verify_finds_and_names_a_flipped_bit(path, name):
    file = path / "phases" / "main" / name
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    if name.startswith("commits"):
        data[100] ^= 4
        data[8] ^= 1
    file.write_bytes(data)
    problems = ce.FeatureStore.open(path).verify()
    assert [problem.file for problem in problems if "present" not in name or problem.file == file] == [file]


def test_every_byte_that_was_committed_is_under_a_checksum(path):
    rng = np.random.default_rng(8)
    record = ce.FeatureStore.open(path)
    files = [file for file in (path / "phases" / "main").rglob("c.*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        original = file.read_bytes()
        whole = original.rstrip(b"\0")
        position = int(rng.integers(len(whole)))
        if file.parent.name == "flow" and np.isnan(np.frombuffer(original, np.float32)[position // 4]):
            continue  # a missing view's NaN says nothing that is not in its presence
        spoilt = bytearray(original)
        spoilt[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(spoilt)
        assert record.verify(), file
        file.write_bytes(original)
    assert record.verify() == []


def test_a_missing_or_truncated_chunk_is_refused_by_readers_and_named_by_verify(path):
    missing, short = path / "phases/main/rgb/c.1.0", path / "phases/main/video_id/c.0"
    missing.unlink()
    os.truncate(short, 100)
    store = ce.FeatureStore.open(path)
    found = {problem.file: problem.what for problem in store.verify()}
    assert found == {missing: "expected a chunk file, found none", short: "expected at least 4000 bytes, found 100"}
    with pytest.raises(Corrupt, match=r"rgb/c\.1\.0: expected a chunk file"):
        store.features("rgb")
    with pytest.raises(Corrupt, match=r"video_id/c\.0: expected at least 4000 bytes, got 100"):
        store.column("video_id")


@pytest.mark.parametrize("number", [0, 1], ids=["the tail", "a full chunk"])
@pytest.mark.parametrize("lost", ["present-rgb", "both"])
def test_a_lost_presence_is_no_phase_without_the_view(tmp_path, number, lost):
    rows = PAGE // 4 * number + 100
    with ce.FeatureStore.create(tmp_path / "s", {"rgb": 4}, chunk_bytes=PAGE) as store:
        store.append({"rgb": np.ones((rows, 4), np.float32)}, clip_id=np.arange(rows), video_id=np.arange(rows))
    folder = tmp_path / "s/phases/main"
    gone = [folder / "present-rgb/c.0"] + [folder / "rgb/c.0.0"] * (lost == "both")
    for file in gone:
        file.unlink()
    store = ce.FeatureStore.open(tmp_path / "s")
    assert sorted(each.file for each in store.verify()) == gone
    for read in (store.bank, store.coverage, lambda: store.present("rgb"), lambda: store.matching("has('rgb')")):
        with pytest.raises(Corrupt, match=r"present-rgb/c\.0: expected a chunk file"):
            read()
    with pytest.raises(Corrupt, match=r"present-rgb/c\.0: expected a chunk file"):
        ce.FeatureStore.open(tmp_path / "s", mode="a")


def test_a_lost_tail_is_not_made_anew_by_the_next_append(path):
    gone = path / "phases/main/rgb/c.7.0"
    assert gone.exists()
    gone.unlink()
    with ce.FeatureStore.open(path, mode="a") as store, pytest.raises(Corrupt, match=r"rgb/c\.7\.0: expected a chunk"):
        store.append(**batch(1, 500, 10))
    store = ce.FeatureStore.open(path)
    assert store.rows == 500
    assert [each.file for each in store.verify()] == [gone]


def test_views_that_no_clip_has_need_no_files(path):
    with ce.FeatureStore.open(path, mode="a") as store:
        store.add_view("depth", 16)
        assert not list((path / "phases/main/depth").glob("c.*"))
        assert not store.present("depth").any()
        assert np.isnan(store.features("depth")).all()
        store.fill("depth", [3, 499], np.ones((2, 16), np.float32))
        store.append(**batch(1, 500, 10))
    store = ce.FeatureStore.open(path)
    assert np.flatnonzero(store.present("depth")).tolist() == [3, 499]
    assert np.isfinite(store.features("depth")).all(axis=1).sum() == 2
    assert store.verify() == []
    for number in range(1, 7):  # between the two nothing was ever written
        assert not (path / f"phases/main/depth/c.{number}.0").exists()


def test_a_spoilt_commit_record_is_found(path):
    file = path / "phases/main/zarr.json"
    text = file.read_text()
    file.write_text(text.replace('"model": null', '"model": "x"'))
    assert "not as it was written" in ce.FeatureStore.open(path).verify()[0].what
    file.write_text(text[: len(text) // 2])
    with pytest.raises(Corrupt, match="expected a commit record"):
        ce.FeatureStore.open(path)


def test_a_store_of_another_format_is_refused_and_named(path):
    store = ce.FeatureStore.open(path)
    for file, word in ((path / "phases/main/zarr.json", "format 0"), (path / "zarr.json", "format 0")):
        file.write_text(file.read_text().replace('"format": 1', '"format": 0'))
        with pytest.raises(SchemaMismatch, match="expected store format 1, got format 0"):
            ce.FeatureStore.open(path)
        assert [problem.file for problem in store.verify()] == [file]
        assert word in store.verify()[0].what


def test_array_metadata_that_is_ahead_or_unreadable_is_found(path):
    file = path / "phases/main/rgb/zarr.json"
    text = file.read_text()
    file.write_text(text.replace("[500, 16]", "[501, 16]"))
    assert "at most 500 rows" in ce.FeatureStore.open(path).verify()[0].what
    file.write_text("")
    assert "cannot be read" in ce.FeatureStore.open(path).verify()[0].what
    ce.FeatureStore.open(path, mode="a").close()
    assert file.read_text() == text, "a writer puts it right"


@contextmanager
def mounted(folder, *options):
    """A small file system of its own, where this process may mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_costs_nothing_that_was_committed(tmp_path):
    with mounted(tmp_path / "small", "-o", "size=1500k") as disk:
        store = ce.FeatureStore.create(disk / "s", VIEWS, columns=COLUMNS, chunk_bytes=64 << 10)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(400 << 10))

        def fill_up():
            for number in range(1, 100):
                store.append(**batch(3 * number + 1, store.rows, 500))

        with pytest.raises(StoreError, match="No space left on device"):
            fill_up()
        rows = store.rows
        assert rows > 0
        assert rows % 500 == 0
        assert store.verify() == []
        ballast.unlink()
        store.append(**batch(1, rows, 100))
        store.close()
        again = ce.FeatureStore.open(disk / "s")
        assert again.rows == rows + 100
        arrays = {name: again.column(name) for name in again.columns} | {"rgb": again.features("rgb")}
        assert wrong_rows(arrays) == []


def test_a_read_only_file_system_reads_and_refuses_to_write(tmp_path):
    with mounted(tmp_path / "small", "-o", "size=8m") as disk:
        with ce.FeatureStore.create(disk / "s", VIEWS, columns=COLUMNS, chunk_bytes=PAGE) as store:
            store.append(**batch(1, 0, 50))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert len(ce.FeatureStore.open(disk / "s").bank()) == 50
        with pytest.raises(StoreError, match="Read-only file system"):
            ce.FeatureStore.open(disk / "s", mode="a")
        with pytest.raises(StoreError, match="Read-only file system"):
            ce.FeatureStore.create(disk / "other", VIEWS)


def test_no_permission_is_said(path):
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    anyones = Path(tempfile.mkdtemp())
    anyones.chmod(0o755)
    shutil.copytree(path, anyones / "s")
    script = (
        "import os, sys; import cascade_engine as ce; from cascade_engine.errors import StoreError; ce.FeatureStore;"
        "os.setgid(65534); os.setuid(65534)\n"
        "assert len(ce.FeatureStore.open(sys.argv[1]).bank('rgb')) == 500\n"
        "try: ce.FeatureStore.open(sys.argv[1], mode='a')\n"
        "except StoreError as error: print(error)"
    )
    try:
        command = [sys.executable, "-c", script, str(anyones / "s")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(anyones)
    assert "cannot open for writing: Permission denied" in done.stdout
