"""Search in stores against plain NumPy over the same rows, exclusions and approximate first stage included."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import cascade_engine as ce
from cascade_engine.errors import InvalidInput, NotFound, StoreError
from cascade_engine.searching import Origin, diff
from cascade_engine.store.approximate import build_index, open_index

CLIPS, K = 600, 7


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    rng = np.random.default_rng(21)
    rgb, flow = unit(rng, CLIPS, 12), unit(rng, CLIPS, 9)
    ids = rng.permutation(CLIPS) + 1000
    video = np.arange(CLIPS) // 6
    start = (np.arange(CLIPS) % 6) * 2.0
    start[5::12] = np.nan
    path = tmp_path_factory.mktemp("search") / "s"
    with ce.FeatureStore.create(path, {"rgb": 12, "flow": 9}, columns={"split": "str"}) as store:
        split = ["train" if i % 3 else "test" for i in range(CLIPS)]
        store.append({"rgb": rgb, "flow": flow}, clip_id=ids, video_id=video, start=start, end=start + 3, split=split)
        store.seal()
    return path, {"rgb": rgb, "flow": flow, "id": ids, "video": video, "start": start, "end": start + 3}


def brute(table, view, queries, excluded, k, rows=None):
    rows = np.arange(CLIPS) if rows is None else rows
    scores = queries.astype(np.float64) @ table[view][rows].astype(np.float64).T
    scores[excluded[:, rows]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return table["id"][rows[order]]


def test_stored_clips_find_what_brute_force_finds_in_other_videos(held):
    path, table = held
    store = ce.FeatureStore.open(path)
    asked = np.array([3, 400, 77])
    hits = ce.search(store, "rgb:3", clip=table["id"][asked], k=K)
    excluded = table["video"][asked][:, None] == table["video"][None]
    assert np.array_equal(hits.clip_id, brute(table, "rgb", table["rgb"][asked], excluded, K))
    one = ce.search(store, "rgb:7", clip=int(table["id"][3]))
    assert np.array_equal(one.clip_id, hits.clip_id[:1])
    with_self = ce.search(store, "rgb:7", clip=table["id"][asked], exclude="none")
    assert np.array_equal(with_self.clip_id[:, 0], table["id"][asked])
    but_self = ce.search(store, "rgb:7", clip=table["id"][asked], exclude="self")
    own = np.arange(CLIPS)[None] == asked[:, None]
    assert np.array_equal(but_self.clip_id, brute(table, "rgb", table["rgb"][asked], own, K))


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_overlapping_clips_are_excluded_and_unknown_times_overlap(held, margin):
    path, table = held
    store = ce.FeatureStore.open(path)
    asked = np.arange(0, CLIPS, 7)
    hits = ce.search(store, "rgb:20", clip=table["id"][asked], exclude="overlap", margin=margin)
    excluded = np.zeros((len(asked), CLIPS), bool)
    for row, query in enumerate(asked):
        for key in range(CLIPS):
            if table["video"][query] == table["video"][key]:
                s, e = table["start"], table["end"]
                known = not np.isnan(s[[query, key]]).any()
                apart = known and (s[key] >= e[query] + margin or e[key] <= s[query] - margin)
                excluded[row, key] = not apart
    assert np.array_equal(hits.clip_id, brute(table, "rgb", table["rgb"][asked], excluded, 20))


def test_a_cascade_of_vectors_under_a_condition_equals_mining_its_rows(held):
    path, table = held
    store = ce.FeatureStore.open(path)
    rng = np.random.default_rng(3)
    queries = {"rgb": unit(rng, 4, 12), "flow": unit(rng, 4, 9)}
    hits = ce.search(store, "flow:50%,rgb:25%,flow:5", vectors=queries, where="split == 'train'")
    rows = np.flatnonzero(np.arange(CLIPS) % 3 > 0)
    bank = ce.Bank({view: table[view][rows] for view in ("rgb", "flow")})
    found = ce.mine(ce.CascadePlan.parse("flow:50%,rgb:25%,flow:5"), queries, bank)
    assert np.array_equal(hits.clip_id, table["id"][rows[found.index]])
    assert np.array_equal(hits.video_id, table["video"][rows[found.index]])
    assert np.array_equal(hits.similarity, found.similarity)
    origin = Origin(video_id=table["video"][[0, 0, 9, 9]])
    away = ce.search(store, "flow:5", vectors=queries, origin=origin, exclude="video")
    excluded = origin.video_id[:, None] == table["video"][None]
    assert np.array_equal(away.clip_id, brute(table, "flow", queries["flow"], excluded, 5))


def test_what_cannot_be_searched_says_why(held):
    path, table = held
    store = ce.FeatureStore.open(path)
    with pytest.raises(InvalidInput, match="either clip or vectors"):
        ce.search(store, "rgb:5")
    with pytest.raises(NotFound, match="no clip 5"):
        ce.search(store, "rgb:5", clip=5)
    with pytest.raises(NotFound, match="depth"):
        ce.search(store, "depth:5", clip=int(table["id"][0]))
    with pytest.raises(InvalidInput, match="where the vectors come from"):
        ce.search(store, "rgb:5", vectors={"rgb": table["rgb"][:1]}, exclude="video")
    nothing = ce.search(store, "rgb:5", vectors={"rgb": table["rgb"][:1]}, where="clip_id < 0")
    assert nothing.clip_id.shape[0] == 1
    assert (nothing.clip_id == -1).all()


def test_where_vectors_come_from_may_be_lists(held):
    path, table = held
    store = ce.FeatureStore.open(path)
    asked = np.array([3, 400])
    vectors = {"rgb": table["rgb"][asked]}
    origin = Origin(video_id=table["video"][asked].tolist(), start=[6, 8], end=[9.0, 11.0])
    hits = ce.search(store, "rgb:5", vectors=vectors, origin=origin, exclude="overlap")
    same = ce.search(store, "rgb:5", clip=table["id"][asked], exclude="overlap")
    assert np.array_equal(hits.clip_id, same.clip_id)


UNKNOWN = "exclude: expected one of video, overlap, self, none, got"
ONE = Origin(video_id=[0, 0], start=[0.0, 0.0], end=[1.0, 1.0])
UNFIT = {
    "mode": ({"exclude": "vidoe"}, f"{UNKNOWN} 'vidoe'"),
    "empty mode": ({"exclude": ""}, f"{UNKNOWN} ''"),
    "missing view": (
        {"vectors": {"rgb": np.ones((2, 12), np.float32)}},
        "vectors: expected the plan's view 'flow', got",
    ),
    "width": ({"rgb": np.ones((2, 11), np.float32)}, r'vectors\["rgb"\]: expected \(N, 12\) .*, got \(2, 11\)'),
    "rank": ({"rgb": np.ones(12, np.float32)}, r'vectors\["rgb"\]: expected \(N, 12\) .*, got \(12,\)'),
    "lengths": ({"flow": np.ones((3, 9), np.float32)}, r'vectors\["flow"\]: expected \(2, 9\) as the first view has'),
    "videos": ({"exclude": "video", "origin": Origin(video_id=[0] * 3)}, r"origin.video_id: expected \(2,\) integers"),
    "video": ({"exclude": "video", "origin": Origin(video_id=7)}, r"origin.video_id: expected \(2,\) integers"),
    "no times": ({"exclude": "overlap", "origin": Origin(video_id=[0, 0])}, "origin: expected start and end"),
    "start": (
        {"exclude": "overlap", "origin": dataclasses.replace(ONE, start=[0.0])},
        r"origin.start: expected \(2,\) seconds, got \(1,\)",
    ),
    "end": (
        {"exclude": "overlap", "origin": dataclasses.replace(ONE, end=["a", "b"])},
        r"origin.end: expected \(2,\) seconds, got \(2,\) <U1",
    ),
}


@pytest.mark.parametrize("how", ["exact", "approximate"])
@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_named(held, how, name, tmp_path):
    path, _ = held
    store = ce.FeatureStore.open(path)
    index = None
    if how == "approximate":
        pytest.importorskip("faiss")
        shutil.copytree(path, tmp_path / "s")
        store = ce.FeatureStore.open(tmp_path / "s")
        index = build_index(store, "rgb", "ivf", generator=np.random.default_rng(4))
    changes, message = UNFIT[name]
    given = dict(changes)
    vectors = {"rgb": np.ones((2, 12), np.float32), "flow": np.ones((2, 9), np.float32)}
    vectors |= {view: given.pop(view) for view in ("rgb", "flow") if view in given}
    with pytest.raises(InvalidInput, match=message):
        ce.search(store, "rgb:40,flow:5", **({"vectors": vectors, "approximate": index} | given))


@pytest.mark.parametrize(
    "given",
    [
        {"clip": 5, "origin": Origin(video_id=np.array([1]))},
        {"vectors": {"rgb": np.ones((1, 16), np.float32)}, "origin": Origin(video_id=np.array([1]))},
        {"clip": 5, "margin": 1.0},
        {"clip": 5, "exclude": "overlap", "margin": -1.0},
        {"clip": 5, "exclude": "overlap", "margin": np.nan},
    ],
)
def test_what_would_change_nothing_is_refused(held, given):
    store = ce.FeatureStore.open(held[0])
    with pytest.raises(InvalidInput, match=r"origin: expected with vectors|margin: expected seconds"):
        ce.search(store, "rgb:3", **given)


def test_an_unknown_exclusion_is_refused_for_stored_clips_too(held):
    path, table = held
    with pytest.raises(InvalidInput, match=f"{UNKNOWN} 'vidoe'"):
        ce.search(ce.FeatureStore.open(path), "rgb:5", clip=int(table["id"][0]), exclude="vidoe")


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_approximate_first_stage_is_measured_and_refused_when_stale(held, tmp_path, kind):
    pytest.importorskip("faiss")
    path, table = held
    shutil.copytree(path, tmp_path / "s")
    store = ce.FeatureStore.open(tmp_path / "s")
    with pytest.raises(NotFound, match="build one first"):
        open_index(store, "rgb", kind)
    shutil.rmtree(tmp_path / "s/phases/main/commits/aside")  # as a copy without empty folders is
    built = build_index(store, "rgb", kind, generator=np.random.default_rng(4))
    assert built.about.recall > 0.5
    opened = open_index(store, "rgb", kind)
    assert opened.about == built.about
    asked = table["id"][:50]
    found = ce.search(store, "rgb:40,flow:5", clip=asked, approximate=opened)
    candidates = opened.candidates(table["rgb"][:50], 40)
    for row in range(50):
        slots = np.sort(candidates[row][candidates[row] >= 0])
        slots = slots[table["video"][slots] != table["video"][row]]
        best = slots[np.argsort(-(table["rgb"][slots].astype(np.float64) @ table["rgb"][row]), kind="stable")[:40]]
        best = np.sort(best)
        last = best[np.argsort(-(table["flow"][best].astype(np.float64) @ table["flow"][row]), kind="stable")[:5]]
        assert found.clip_id[row].tolist() == table["id"][last].tolist(), "exact among the index's candidates"
    with pytest.raises(InvalidInput, match="starts with view 'rgb'"):
        ce.search(store, "flow:40,rgb:5", clip=asked, approximate=opened)
    described = tmp_path / "s/phases/main/commits/aside" / f"rgb.{kind}.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"commit": 1}))
    with pytest.raises(StoreError, match="stale"):
        open_index(store, "rgb", kind)


def test_an_index_serves_its_own_phase_and_inner_products_only(tmp_path):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(6)
    clips = {"clip_id": np.arange(200), "video_id": np.arange(200)}
    store = ce.FeatureStore.create(tmp_path / "s", {"rgb": 8})
    store.append({"rgb": unit(rng, 200, 8)}, **clips)
    store.seal()
    with store.new_phase("two") as other:
        other.append({"rgb": unit(rng, 200, 8)}, **clips)
        other.seal()
    index = build_index(store, "rgb", generator=rng)
    asked = np.arange(5)
    assert (ce.search(store, "rgb:3", clip=asked, approximate=index).clip_id >= 0).all()
    with pytest.raises(InvalidInput, match=r"expected an index of phase 'two' at commit 2 of .*, got one of"):
        ce.search(store, "rgb:3", clip=asked, phase="two", approximate=index)
    for metric in ("l2", "cosine"):
        with pytest.raises(InvalidInput, match=f"approximate: expected metric 'ip'.*, got '{metric}'"):
            ce.search(store, "rgb:3", clip=asked, metric=metric, approximate=index)
    index.about = dataclasses.replace(index.about, commit=1)
    with pytest.raises(InvalidInput, match="expected an index of phase 'main' at commit 2"):
        ce.search(store, "rgb:3", clip=asked, approximate=index)


def test_an_index_that_cannot_be_kept_serves_and_it_is_said(held, tmp_path, monkeypatch, caplog):
    faiss = pytest.importorskip("faiss")
    path, table = held
    shutil.copytree(path, tmp_path / "s")
    store = ce.FeatureStore.open(tmp_path / "s")

    def refuse(*_):
        raise RuntimeError("could not open for writing")

    monkeypatch.setattr(faiss, "write_index", refuse)
    built = build_index(store, "rgb", "ivf", generator=np.random.default_rng(4))
    assert "the ivf index of rgb serves this process and is not kept (could not open for writing)" in caplog.text
    assert (built.candidates(table["rgb"][:3], 5) >= 0).any()
    with pytest.raises(NotFound, match="build one first"):
        open_index(store, "rgb", "ivf")


def test_an_index_needs_a_sealed_phase(tmp_path):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(2)
    store = ce.FeatureStore.create(tmp_path / "s", {"rgb": 4})
    store.append({"rgb": unit(rng, 50, 4)}, clip_id=np.arange(50), video_id=np.arange(50))
    with pytest.raises(StoreError, match="seal it first"):
        build_index(store, "rgb", generator=rng)


def test_the_difference_of_phases_counts_neighbours_that_changed(tmp_path):
    rng = np.random.default_rng(9)
    x = unit(rng, 80, 6)
    y = x.copy()
    y[:20] = unit(rng, 20, 6)
    ids = np.arange(80)
    store = ce.FeatureStore.create(tmp_path / "s", {"rgb": 6})
    store.append({"rgb": x}, clip_id=ids, video_id=ids // 2)
    second = store.new_phase("later")
    order = rng.permutation(80)[:70]
    second.append({"rgb": y[order]}, clip_id=ids[order], video_id=ids[order] // 2)
    assert second.commit == 1
    found = diff(store, "main", "later", view="rgb", k=4)
    common = np.sort(order)
    assert np.array_equal(found.clip_id, common)
    want = []
    for clip in common:
        sets = []
        for values in (x, y):
            scores = values[common].astype(np.float64) @ values[clip].astype(np.float64)
            scores[common // 2 == clip // 2] = -np.inf
            sets.append(set(np.argsort(-scores, kind="stable")[:4]))
        want.append(len(sets[0] - sets[1]))
    assert found.changed.tolist() == want
    assert diff(store, "main", "main", view="rgb", k=4).changed.sum() == 0
    with pytest.raises(InvalidInput, match="sample: expected at least 1, got -1"):
        diff(store, "main", "later", view="rgb", sample=-1, generator=rng)
    few = diff(store, "main", "later", view="rgb", k=4, sample=10, generator=rng)
    assert np.array_equal(few.changed, found.changed[np.searchsorted(common, few.clip_id)])
    assert store.coverage() == {"main": {"rgb": 80}, "later": {"rgb": 70}}
    assert np.array_equal(store.missing("rgb", phase="later", of="main"), np.setdiff1d(ids, order))
