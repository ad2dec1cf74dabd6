"""Power loss, by a model: any prefix of what the store did to its files, with subsets of what was not synced."""

import errno
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from store_rows import COLUMNS, VIEWS, batch, features, later, wrong_rows

import cascade_engine as ce
from cascade_engine.errors import StoreError
from cascade_engine.store.files import LocalFiles

PAGE, SECTOR = 4096, 512


class LoggedFiles(LocalFiles):
    """The local file system, with a log of all that could be lost."""

    def __init__(self):
        self.log = []
        self._keys = {}  # path to a key of the file there now: the path itself at first, a number if made since
        self._names = {}  # descriptor to that key
        self._lock = threading.Lock()

    def note(self, *entry):
        self.log.append(entry)

    def open_sized(self, path, size):
        with self._lock:
            before = path.stat().st_size if path.exists() else 0
            fd, new = super().open_sized(path, size)
            key = self._keys[path] = len(self.log) if new else self._keys.get(path, path)
            self._names[fd] = key
            if new:
                self.note("link", key, path)
            if size > before:
                self.note("size", key, size)
            return fd, new

    def write_at(self, fd, data, offset):
        with self._lock:
            super().write_at(fd, data, offset)
            self.note("write", self._names[fd], offset, bytes(data))

    def sync(self, fd):
        super().sync(fd)
        with self._lock:
            self.note("sync", self._names[fd])

    def rename(self, source, target):
        with self._lock:
            super().rename(source, target)
            key = self._keys[target] = self._keys.pop(source)
            self.note("rename", key, source, target)

    def sync_folder(self, path):
        super().sync_folder(path)
        with self._lock:
            self.note("sync_folder", path)

    def make_folder(self, path):
        if not path.exists():
            raise AssertionError("the workload makes no folders")


@dataclass
class Disk:
    """What is certainly on the disk, and what may or may not be."""

    names: dict  # path -> file key
    content: dict  # file key -> bytes
    names_pending: list = field(default_factory=list)
    content_pending: dict = field(default_factory=dict)
    acknowledged: tuple = (0, 0)

    def apply(self, entry):
        match entry:
            case ("link", key, path):
                self.content.setdefault(key, b"")
                self.names_pending.append((path.parent, None, path, key))
            case ("rename", key, source, target):
                self.names_pending.append((target.parent, source, target, key))
            case ("size", key, size):
                self.content_pending.setdefault(key, []).append((size, b""))
            case ("write", key, offset, data):
                self.content_pending.setdefault(key, []).append((offset, data))
            case ("sync", key):
                for change in self.content_pending.pop(key, []):
                    self.content[key] = written(self.content[key], *change)
            case ("sync_folder", folder):
                mine = [change for change in self.names_pending if change[0] == folder]
                self.names_pending = [change for change in self.names_pending if change[0] != folder]
                for change in mine:
                    renamed(self.names, *change[1:])
            case ("acknowledged", *numbers):
                self.acknowledged = tuple(numbers)

    def after_power_loss(self, keep, tear):
        """Files by path, where of what was not synced each change happened by `keep()`, sectors of it by `tear()`."""
        names = dict(self.names)
        for change in self.names_pending:
            if keep():
                renamed(names, *change[1:])
        content = {}
        for key in set(names.values()):
            data = self.content[key]
            for offset, new in self.content_pending.get(key, []):
                if keep():
                    data = written(data, offset, new)
                elif new:
                    for start in range(0, len(new), SECTOR):
                        if tear():
                            data = written(data, offset + start, new[start : start + SECTOR])
            content[key] = data
        return {path: content[key] for path, key in names.items()}


def written(data, offset, new):
    data = data.ljust(offset, b"\0")
    return data[:offset] + new + data[offset + len(new) :]


def renamed(names, source, target, key):
    if source is not None:
        names.pop(source, None)
    names[target] = key


def workload(path, durability, seed, commits):
    """Appends and fills on a store, logged; returns the disk before it and the log."""
    ce.FeatureStore.create(path, VIEWS, columns=COLUMNS, chunk_bytes=PAGE).close()
    files = [file for file in path.rglob("*") if file.is_file()]
    disk = Disk({file: file for file in files}, {file: file.read_bytes() for file in files})
    logged, rng = LoggedFiles(), np.random.default_rng(seed)
    with ce.FeatureStore.open(path, mode="a", durability=durability, files=logged) as store:
        filled = 0
        for number in range(commits):
            first, size = store.rows, int(rng.integers(1, 150))
            content = batch(number, first, size)
            store.append(**content)
            filled += size if "flow" in content["views"] else 0
            logged.note("acknowledged", first + size, filled)
            clips = later(number, first, size)
            if len(clips):
                store.fill("flow", clips, features("flow", clips))
                filled += len(clips)
                logged.note("acknowledged", first + size, filled)
    return disk, logged.log


class NotedFiles(LocalFiles):
    """The local file system, with a note of every path that was written, made or renamed."""

    def __init__(self):
        self.touched = set()

    def open_sized(self, path, size):
        self.touched.add(path)
        return super().open_sized(path, size)

    def rename(self, source, target):
        self.touched |= {source, target}
        super().rename(source, target)


class Machine:
    """A folder in memory that becomes one crash state after the other; only files that differ are written."""

    def __init__(self, root, written):
        self.root, self.files, self._written = root, NotedFiles(), written
        self._held, self._places = {}, {}

    def become(self, files):
        for path in self.files.touched:
            self._held[path] = None
        self.files.touched.clear()
        wanted = {self._place(path): data for path, data in files.items()}
        for path in self._held.keys() - wanted.keys():
            path.unlink(missing_ok=True)
            del self._held[path]
        for path, data in wanted.items():
            if self._held.get(path) != data:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.write(fd, data)
                os.close(fd)
                self._held[path] = data

    def _place(self, path):
        if path not in self._places:
            place = self._places[path] = self.root / path.relative_to(self._written)
            place.parent.mkdir(parents=True, exist_ok=True)
        return self._places[path]


def what_is_wrong(root, files, acknowledged, plain):
    """The promises that a store as power loss left it breaks, as words; `plain` readers are asked too."""
    try:
        store = ce.FeatureStore.open(root)
        arrays = {name: store.column(name) for name in store.columns} | {"rgb": store.features("rgb")}
        found = wrong_rows(arrays)
        present = store.present("flow")
        if not np.array_equal(store.features("flow")[present], features("flow", np.flatnonzero(present))):
            found.append("flow: wrong rows")
        numbers, counts = np.unique(arrays["batch"], return_counts=True)
        if not np.array_equal(counts, arrays["size"][np.searchsorted(arrays["batch"], numbers)]):
            found.append("a torn batch")
        if store.rows < acknowledged[0] or present.sum() < acknowledged[1]:
            found.append(f"{store.rows} rows and {present.sum()} with flow left of {acknowledged}")
        if not np.array_equal(arrays["label"], [f"label {row % 5}" for row in range(store.rows)]):
            found.append("wrong labels")
        found += [str(problem) for problem in store.verify() if problem.file.parent.name == "main"]
        if plain:
            found += what_plain_readers_miss(str(root / "phases" / "main"), store.rows)
        with ce.FeatureStore.open(root, mode="a", durability="none", files=files) as again:
            first = again.rows
            again.append(**batch(1, first, 3))
            names = ("clip_id", "video_id", "start", "end")
            if again.verify() or wrong_rows({name: again.column(name) for name in names}):
                found.append("going on from there went wrong")
    except (StoreError, OSError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    return found


def what_plain_readers_miss(folder, rows):
    names = ("clip_id", "video_id", "start", "end", "rgb")
    group = zarr.open_group(folder, mode="r")
    found = wrong_rows({name: group[name][:] for name in names})
    with xarray.open_zarr(folder) as data:
        found += wrong_rows({name: data[name].values for name in names})
    lengths = [zarr.open_array(f"{folder}/{name}", mode="r").shape[0] for name in names]
    if {group[name].shape[0] for name in names} != {rows} or max(lengths) > rows:  # single arrays may lag, never lead
        found.append(f"plain readers of single arrays see {lengths} of {rows} rows")
    return found


def violations(tmp_path, durability, states, seed):
    """How many crash states there were, how many break a promise, and the first that does.

    Args:
        tmp_path: where to work.
        durability: of the writer.
        states: how many are sampled; every prefix of the log by default, each with one subset.
        seed: of the workload and the subsets.
    """
    path = tmp_path / "written"
    disk, log = workload(path, durability, seed, 8)
    memory = Path("/dev/shm")
    machine = Machine(Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tmp_path)), path)
    rng, bad, first, seen = np.random.default_rng(seed), 0, None, set()
    chosen = np.arange(len(log) + 1) if states is None else np.sort(rng.integers(0, len(log) + 1, states))
    at = 0
    for state, prefix in enumerate(chosen.tolist()):
        for entry in log[at:prefix]:
            disk.apply(entry)
        at = prefix
        share = (0.0, 1.0, 0.5, 0.9, 0.1)[state % 5]
        files = disk.after_power_loss(lambda share=share: rng.random() < share, lambda: rng.random() < 0.3)
        acknowledged = disk.acknowledged if durability == "commit" else (0, 0)
        key = hash((frozenset(files.items()), acknowledged))
        if key in seen:  # the same bytes: the answer is known
            continue
        seen.add(key)
        machine.become(files)
        found = what_is_wrong(machine.root, machine.files, acknowledged, plain=len(seen) % 50 == 0)
        if found:
            bad, first = bad + 1, first or (prefix, found)
    shutil.rmtree(machine.root)
    return len(seen), bad, first


def test_power_loss_breaks_no_promise(tmp_path):
    assert violations(tmp_path, "commit", 150, 6)[1:] == (0, None)


def test_the_model_finds_what_is_wrong_without_syncs(tmp_path):
    _, bad, _ = violations(tmp_path, "none", 60, 7)
    assert bad > 5


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20))
def test_power_loss_at_every_point_of_twenty_workloads(tmp_path, seed):
    states, bad, first = violations(tmp_path, "commit", None, seed)
    assert (bad, first) == (0, None)
    assert states > 700, "distinct ones: 20,000 in all"


class FailingFiles(LocalFiles):
    """A file system that says no to everything after `allowed` changes, as a full disk or a quota does."""

    def __init__(self, code, allowed, kinds):
        self.code, self.allowed, self.kinds, self.refused = code, allowed, kinds, False

    def _count(self, kind):
        self.allowed -= 1
        if self.allowed < 0 and kind in self.kinds:
            self.refused = True
            raise OSError(self.code, os.strerror(self.code))

    def open_sized(self, path, size):
        self._count("open")
        return super().open_sized(path, size)

    def write_at(self, fd, data, offset):
        self._count("write")
        super().write_at(fd, data, offset)

    def sync(self, fd):
        self._count("sync")
        super().sync(fd)

    def rename(self, source, target):
        self._count("rename")
        super().rename(source, target)


@pytest.mark.parametrize(("name", "kinds"), [("EDQUOT", ("open", "write")), ("ENOSPC", ("write",)), ("EIO", ("sync",))])
def test_a_refusal_at_any_point_leaves_the_store_as_it_was(tmp_path, name, kinds):
    path = tmp_path / "s"
    with ce.FeatureStore.create(path, VIEWS, columns=COLUMNS, chunk_bytes=PAGE) as store:
        store.append(**batch(1, 0, 60))
    refused = stopped = 0
    for allowed in range(0, 400, 7):
        with ce.FeatureStore.open(path) as reader:
            before, at = reader.rows, reader.commit
        files = FailingFiles(getattr(errno, name), 10**6, kinds)
        store = ce.FeatureStore.open(path, mode="a", files=files)
        files.allowed = allowed
        content = batch(at + 1, before, 60)
        try:
            store.append(**content)
        except StoreError:
            refused += 1
            files.allowed = 10**6
            assert ce.FeatureStore.open(path).rows == before
            assert ce.FeatureStore.open(path).verify() == []
            try:
                store.append(**content)  # there is room again: the same writer goes on
            except StoreError:
                assert name == "EIO", "only where a sync failed is the writer at its end"
                stopped += 1
                store.close()
            else:
                store.close()
                assert ce.FeatureStore.open(path).rows == before + 60
        else:
            files.allowed = 10**6
            store.close()
            after = ce.FeatureStore.open(path)
            assert after.rows == before + 60
            if not files.refused:
                break
    assert refused > 3
    assert (stopped > 0) == (name == "EIO")
    after = ce.FeatureStore.open(path)
    assert after.verify() == []
    arrays = {column: after.column(column) for column in after.columns} | {"rgb": after.features("rgb")}
    assert wrong_rows(arrays) == []


def test_a_cut_off_fill_is_undone(tmp_path):
    path = tmp_path / "s"
    with ce.FeatureStore.create(path, VIEWS, columns=COLUMNS, chunk_bytes=PAGE) as store:
        store.append(**batch(0, 0, 600))
    clips = np.arange(0, 600, 2)
    for allowed in (2, 5, 20, 50, 300, 303, 304, 610):
        files = FailingFiles(errno.ENOSPC, 10**6, ("write",))
        store = ce.FeatureStore.open(path, mode="a", files=files)
        files.allowed = allowed
        with pytest.raises(StoreError):
            store.fill("flow", clips, features("flow", clips))
        files.allowed = 10**6
        with pytest.raises(StoreError, match="open the phase again"):
            store.append(**batch(1, 600, 1))
        store.close()
        reader = ce.FeatureStore.open(path)
        assert not reader.present("flow").any()
        assert reader.verify() == []
        with ce.FeatureStore.open(path, mode="a") as again:
            assert np.isnan(again.features("flow")).all()
    with ce.FeatureStore.open(path, mode="a") as store:
        store.fill("flow", clips, features("flow", clips))
        assert store.present("flow").sum() == 300
        assert store.verify() == []


def test_a_file_that_a_killed_writer_made_is_synced_into_its_folder(tmp_path):
    path = tmp_path / "s"
    with ce.FeatureStore.create(path, VIEWS, columns=COLUMNS, chunk_bytes=PAGE) as store:
        store.append(**batch(1, 0, 64))
    (path / "phases/main/rgb/c.1.0").write_bytes(bytes(PAGE))
    files = LoggedFiles()
    with ce.FeatureStore.open(path, mode="a", files=files) as store:
        store.append(**batch(2, 64, 60))
    committed = next(at for at, entry in enumerate(files.log) if entry[-1] == path / "phases/main/zarr.json")
    assert ("sync_folder", path / "phases/main/rgb") in files.log[:committed]


def test_the_log_sees_every_change(tmp_path):
    """What the model replays in full is what the file system holds."""
    disk, log = workload(tmp_path / "s", "commit", 9, 4)
    for entry in log:
        disk.apply(entry)
    files = disk.after_power_loss(lambda: True, lambda: True)
    held = {file: file.read_bytes() for file in Path(tmp_path / "s").rglob("*") if file.is_file()}
    lock = "writer.lock"
    assert {k: v for k, v in files.items() if k.name != lock} == {k: v for k, v in held.items() if k.name != lock}
