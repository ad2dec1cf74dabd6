"""The approximate first stage on a GPU: emulated where there is none, and as faiss-gpu has it where there is one."""

import os

import numpy as np
import pytest
from test_searching import unit

import cascade_engine as ce
from cascade_engine.store.approximate import build_index, open_index

faiss = pytest.importorskip("faiss")
CLIPS, DIM = 3000, 16


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(30)
    with ce.FeatureStore.create(tmp_path / "s", {"rgb": DIM}) as made:
        made.append({"rgb": unit(rng, CLIPS, DIM)}, clip_id=np.arange(CLIPS), video_id=np.arange(CLIPS) // 3)
        made.seal()
    return ce.FeatureStore.open(tmp_path / "s")


class Emulated:
    """A GPU index as faiss presents it, computed on the CPU: it has its own copy and refuses what a GPU refuses."""

    def __init__(self, index, room):
        self.held, self.room, self.added, self.searched = faiss.clone_index(index), room, [], []
        self.nprobe = 1

    @property
    def is_trained(self):
        return self.held.is_trained

    def train(self, keys):
        self.held.train(keys)

    def add(self, keys):
        if self.held.ntotal + len(keys) > self.room:
            raise RuntimeError("Error in void alloc(): out of memory\nat StandardGpuResources.cpp:1")
        self.added.append(len(keys))
        self.held.add(keys)

    def search(self, queries, count):
        if count > 2048 or self.nprobe > 2048:
            raise RuntimeError("GPU index only supports min/max-K selection up to 2048")
        self.held.nprobe = self.nprobe
        self.searched.append(count)
        return self.held.search(queries, count)


@pytest.fixture
def emulate(monkeypatch):
    """Let faiss have GPUs; returns the indexes that were moved to one."""

    def start(gpus=1, room=10**9):
        moved = []

        def to_gpu(resources, device, index):
            assert not isinstance(faiss.downcast_index(index), faiss.IndexHNSW), "faiss has no HNSW on a GPU"
            assert device == 0
            assert resources == "resources"
            if index.ntotal > room:
                raise RuntimeError("Error in void alloc(): out of memory\nat StandardGpuResources.cpp:1")
            moved.append(Emulated(index, room))
            return moved[-1]

        monkeypatch.setattr(faiss, "get_num_gpus", lambda: gpus)
        monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
        monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: faiss.clone_index(index.held), raising=False)
        return moved

    return start


def test_an_index_is_built_and_searched_on_a_gpu_and_kept_as_the_cpu_has_it(store, emulate, monkeypatch):
    on_cpu = build_index(store, "rgb", "ivf", generator=np.random.default_rng(1))
    queries = np.asarray(store.features("rgb")[:40])
    want = on_cpu.candidates(queries, 20)
    moved = emulate()
    monkeypatch.setattr("cascade_engine.store.approximate._TOGETHER", 1000)
    built = build_index(store, "rgb", "ivf", generator=np.random.default_rng(1))
    assert (on_cpu.device, built.device) == ("cpu", "gpu")
    assert moved[0].added == [1000, 1000, 1000]
    assert built.about == on_cpu.about, "the same recall, measured on the GPU"
    assert moved[0].searched == [10]
    assert np.array_equal(built.candidates(queries, 20), want)
    opened = open_index(store, "rgb", "ivf")
    assert opened.device == "gpu"
    assert moved[1].held.ntotal == CLIPS
    assert moved[1].nprobe > 1
    assert np.array_equal(opened.candidates(queries, 20), want)
    assert moved[1].searched == [40]
    found = ce.search(store, "rgb:20", clip=np.arange(40), approximate=opened)
    monkeypatch.undo()
    without = open_index(store, "rgb", "ivf")
    assert without.device == "cpu"
    assert np.array_equal(without.candidates(queries, 20), want), "what the GPU wrote is read without one"
    assert np.array_equal(found.clip_id, ce.search(store, "rgb:20", clip=np.arange(40), approximate=without).clip_id)


def test_more_neighbours_than_a_gpu_takes_come_from_the_cpu(store, emulate):
    moved = emulate()
    built = build_index(store, "rgb", "ivf", generator=np.random.default_rng(1))
    before = list(moved[0].searched)
    found = built.candidates(np.asarray(store.features("rgb")[:2]), 1100)
    assert found.shape == (2, 2200)
    assert moved[0].searched == before


@pytest.mark.parametrize("room", [0, 2500])
def test_a_gpu_that_is_full_leaves_the_work_to_the_cpu_and_it_is_said(store, emulate, caplog, room):
    moved = emulate(room=room)
    built = build_index(store, "rgb", "ivf", generator=np.random.default_rng(1))
    assert built.device == "cpu"
    assert built.about.recall > 0.5
    assert len(moved) == 1
    assert caplog.messages == [
        "a GPU could not build the ivf index (Error in void alloc(): out of memory); the CPU does"
    ]
    opened = open_index(store, "rgb", "ivf")
    assert opened.device == "cpu"
    assert "does not go to the GPU (Error in void alloc(): out of memory)" in caplog.messages[1]
    queries = np.asarray(store.features("rgb")[:5])
    assert np.array_equal(opened.candidates(queries, 9), built.candidates(queries, 9))


@pytest.mark.parametrize(("kind", "gpus"), [("hnsw", 1), ("ivf", 0)])
def test_what_no_gpu_can_take_stays_on_the_cpu(store, emulate, kind, gpus):
    moved = emulate(gpus=gpus)
    built = build_index(store, "rgb", kind, generator=np.random.default_rng(1))
    assert built.device == open_index(store, "rgb", kind).device == "cpu"
    assert moved == []


@pytest.mark.gpu
def test_faiss_gpu_itself(store, monkeypatch):
    reason = None
    if not hasattr(faiss, "StandardGpuResources"):
        reason = "faiss was built without GPUs; install cascade-engine[faiss-gpu]"
    elif faiss.get_num_gpus() == 0:
        reason = "faiss sees no GPU"
    if reason is not None:
        if "faiss-gpu" in os.environ.get("CASCADE_REQUIRE", "").split(","):
            pytest.fail(f"CASCADE_REQUIRE=faiss-gpu, but: {reason}")
        pytest.skip(reason)
    built = build_index(store, "rgb", "ivf", generator=np.random.default_rng(1))
    opened = open_index(store, "rgb", "ivf")
    assert built.device == opened.device == "gpu"
    assert built.about.recall > 0.5
    queries = np.asarray(store.features("rgb")[:50])
    assert np.array_equal(opened.candidates(queries, 20), built.candidates(queries, 20))
    assert built.candidates(queries, 1100).shape == (50, 2200)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    on_cpu = open_index(store, "rgb", "ivf")
    assert on_cpu.device == "cpu"
    pairs = zip(built.candidates(queries, 20), on_cpu.candidates(queries, 20), strict=True)
    same = [len(np.intersect1d(gpu, cpu)) for gpu, cpu in pairs]
    assert np.mean(same) > 38, "of 40, the same lists are probed in float32"
