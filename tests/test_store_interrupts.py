"""Ctrl-C, or any other error that is not the disk's, at every point of a change: nothing half-done becomes a commit."""

import shutil
from contextlib import suppress

import numpy as np
import pytest

import cascade_engine as ce
from cascade_engine.errors import StoreError
from cascade_engine.store import changing
from cascade_engine.store.files import LocalFiles

PAGE = 4096


class InterruptedFiles(LocalFiles):
    """A file system during whose `left`th change, just done, somebody presses Ctrl-C."""

    left = 10**9

    def _count(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def open_sized(self, path, size):
        found = super().open_sized(path, size)
        self._count()
        return found

    def write_at(self, fd, data, offset):
        super().write_at(fd, data, offset)
        self._count()

    def sync(self, fd):
        super().sync(fd)
        self._count()

    def rename(self, source, target):
        super().rename(source, target)
        self._count()

    def sync_folder(self, path):
        super().sync_folder(path)
        self._count()


def clips(first, count):
    """Clips all of whose values follow from their id."""
    ids = np.arange(first, first + count)
    return {"views": {"x": values(ids)}, "clip_id": ids, "video_id": ids, "label": [f"text {clip}" for clip in ids]}


def values(ids):
    return np.repeat(ids[:, None], 4, axis=1).astype(np.float32)


def wrong(path):
    """What a new reader finds wrong."""
    store = ce.FeatureStore.open(path)
    ids, found = store.column("clip_id"), [str(problem) for problem in store.verify()]
    if len(np.unique(ids)) != len(ids):
        found.append("a clip twice")
    if store.column("label").tolist() != [f"text {clip}" for clip in ids]:
        found.append("texts")
    for view in store.views:
        held = store.present(view)
        if not np.array_equal(store.features(view)[held], values(ids[held])):
            found.append(view)
    return found


@pytest.fixture
def path(tmp_path):
    with ce.FeatureStore.create(tmp_path / "s", {"x": 4, "y": 4}, columns={"label": "str"}, chunk_bytes=PAGE) as store:
        store.append(**clips(0, 300))
    return tmp_path / "s"


def interrupted(path, left, durability, change):
    """Whether the change to the store at `path` was; then what its writer goes on with shows no reader other rows."""
    files = InterruptedFiles()
    store = ce.FeatureStore.open(path, mode="a", durability=durability, files=files)
    files.left = left
    try:
        change(store)
    except KeyboardInterrupt:
        done = False
    else:
        done = True
    files.left = 10**9
    reader = ce.FeatureStore.open(path)
    before = {name: reader.column(name).copy() for name in reader.columns}
    with suppress(StoreError):
        store.append(**clips(10_000 + 1_000 * left, 7))
    store.close()
    assert all(np.array_equal(reader.column(name), before[name], equal_nan=name in ("start", "end")) for name in before)
    assert wrong(path) == [], f"interrupted after {left} changes"
    ce.FeatureStore.open(path, mode="a").close()
    assert wrong(path) == [], "a writer that came after"
    return not done


@pytest.mark.parametrize(
    ("kind", "durability"), [("append", "commit"), ("append", "group"), ("fill", "commit"), ("set_column", "commit")]
)
def test_an_interrupt_at_any_point_makes_no_commit_of_what_is_half_done(path, tmp_path, kind, durability):
    ids = np.arange(10, 290, 2)
    change = {
        "append": lambda store: store.append(**clips(5_000, 300)),
        "fill": lambda store: store.fill("y", ids, values(ids)),
        "set_column": lambda store: store.set_column("label", store.column("label").tolist()),
    }[kind]
    points = 0
    while interrupted(shutil.copytree(path, tmp_path / str(points)), points + 1, durability, change):
        shutil.rmtree(tmp_path / str(points))
        points += 1
    assert points > 5


@pytest.mark.parametrize("durability", ["commit", "group"])
def test_an_interrupt_after_the_rows_are_written_keeps_ids_and_texts_right(path, monkeypatch, durability):
    def interrupt(*_):
        raise KeyboardInterrupt

    with ce.FeatureStore.open(path, mode="a", durability=durability) as store:
        monkeypatch.setattr(changing, "accept_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.append(**clips(1_000, 20))
        monkeypatch.undo()
        with pytest.raises(StoreError, match="open the phase again"):
            store.append(**clips(1_010, 20))
    assert ce.FeatureStore.open(path).rows == 320
    assert wrong(path) == []


def test_memory_that_runs_out_in_a_fill_undoes_it(path):
    class Full(LocalFiles):
        writes = 0

        def write_at(self, fd, data, offset):
            self.writes += 1
            if self.writes == 2:
                raise MemoryError
            super().write_at(fd, data, offset)

    files = Full()
    with ce.FeatureStore.open(path, mode="a", files=files) as store:
        files.writes = 0
        with pytest.raises(MemoryError):
            store.fill("y", np.arange(10), values(np.arange(10)))
    assert not ce.FeatureStore.open(path).present("y").any()
    with ce.FeatureStore.open(path, mode="a") as store:
        store.fill("y", np.arange(10), values(np.arange(10)))
    assert wrong(path) == []
