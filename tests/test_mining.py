"""Mining's border and laws; that every backend gives the oracle's answer is test_kernels' story."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import lattice, near_tie, separated

import cascade_engine as ce
from cascade_engine import kernels
from cascade_engine.errors import BackendUnavailable, InvalidInput

BACKENDS = [name for name in ("reference", "cpu") if kernels.load(name).unavailable() is None]
FAMILIES = {"lattice": lattice, "separated": separated, "near-tie": near_tie}
parse = ce.CascadePlan.parse


def problem(family="separated", b=5, k=60, seed=0, videos=8):
    rng = np.random.default_rng(seed)
    draw = FAMILIES[family]
    bank = ce.Bank({"rgb": draw(rng, k, 9), "flow": draw(rng, k, 6)}, video_id=rng.integers(0, videos, k))
    queries = {"rgb": draw(rng, b, 9), "flow": draw(rng, b, 6)}
    return bank, queries, rng.integers(0, videos, b)


problems = st.builds(
    problem, st.sampled_from(sorted(FAMILIES)), st.integers(0, 6), st.integers(0, 70), st.integers(0, 999)
)


def same(a, b):
    assert np.array_equal(a.index, b.index)
    assert np.array_equal(a.similarity, b.similarity)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [10**12, 10**20])
def test_a_stage_may_ask_for_more_than_there_is(backend, count):
    bank = ce.Bank({"rgb": np.eye(9, 4, dtype=np.float32), "flow": np.eye(9, 3, dtype=np.float32)})
    queries = {"rgb": np.ones((2, 4), np.float32), "flow": np.ones((2, 3), np.float32)}
    for trace in (False, True):
        got = ce.mine(parse(f"rgb:{count},flow:5"), queries, bank, trace=trace, backend=backend)
        same(got, ce.mine(parse("rgb:9,flow:5"), queries, bank, trace=trace, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@given(problems, st.integers(1, 12))
@settings(max_examples=25)
def test_the_laws_of_stages(backend, drawn, k):
    bank, queries, ids = drawn

    def mine(text):
        return ce.mine(parse(text), queries, bank, ids, backend=backend)

    whole = max(bank.size, k)
    same(mine(f"rgb:{whole},flow:{k}"), mine(f"flow:{k}"))  # a stage that keeps everything changes nothing
    same(mine(f"rgb:{k + 3},rgb:{k}"), mine(f"rgb:{k}"))  # two stages of one score are the smaller
    last = mine(f"flow:{k},rgb:{k}").index  # a last stage that keeps everything changes only the order
    assert [sorted(row) for row in last.tolist()] == [sorted(row) for row in mine(f"flow:{k}").index.tolist()]
    top = mine(f"rgb:{k}").index
    again = mine(f"rgb:{k + 5},flow:{k + 4},rgb:{k}").index
    between = ce.mine(parse(f"rgb:{k + 5},flow:{k + 4},rgb:{k}"), queries, bank, ids, trace=True, backend=backend)
    for row in range(len(top)):  # the first view again: equal where no stage between lost one of its best
        best = set(top[row].tolist()) - {-1}
        if best <= set(between.kept[1][row].tolist()):
            assert top[row].tolist() == again[row].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@given(problems, st.sampled_from(["rgb:7", "flow:50%,rgb:25%,flow:5", "flow:12,rgb:12@bank", "rrf(flow,rgb):9,rgb:4"]))
@settings(max_examples=25)
def test_what_is_found_is_eligible_distinct_ordered_and_padded(backend, drawn, text):
    bank, queries, ids = drawn
    plan = parse(text)
    found = ce.mine(plan, queries, bank, ids, trace=True, backend=backend)
    k = plan.counts(bank.size)[-1]
    assert found.index.shape == found.similarity.shape == (len(ids), k)
    assert found.index.dtype == np.int64
    assert found.similarity.dtype == np.float32
    for row, index in enumerate(found.index):
        there = index[index >= 0]
        assert (index[len(there) :] == -1).all()
        assert np.isneginf(found.similarity[row, len(there) :]).all()
        assert len(set(there.tolist())) == len(there)
        assert (bank.host_video_id()[there] != ids[row]).all()
        assert (np.diff(found.similarity[row, : len(there)]) <= 0).all()
    assert len(found.kept) == len(plan.stages)
    assert [kept.shape[1] for kept in found.kept] == list(plan.counts(bank.size))
    assert np.array_equal(found.kept[-1], found.index)
    for before, stage, after in zip(found.kept, plan.stages[1:], found.kept[1:], strict=False):
        for a, b in zip(before, after, strict=True):
            assert set(b.tolist()) - {-1} <= set(a.tolist()), stage
    masked = ce.mine(plan, queries, bank, ids[:, None] == bank.host_video_id()[None], backend=backend)
    same(found, masked)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problems)
@settings(max_examples=15)
def test_select_of_the_contracts_scores_is_mine(backend, drawn):
    from cascade_engine.kernels.reference import similarity

    bank, queries, ids = drawn
    scores = {view: similarity(queries[view], bank.host_keys(view), "ip") for view in bank.views}
    plan = parse("flow:50%,rgb:9,sum(rgb,flow):5")
    mask = ids[:, None] == bank.host_video_id()[None]
    same(ce.mine(plan, queries, bank, ids, backend=backend), ce.select(plan, scores, mask, backend=backend))


def test_split_batches_and_permuted_rows_give_the_same_rows():
    bank, queries, ids = problem("near-tie", b=12)
    plan = parse("flow:50%,rgb:25%,flow:5")
    whole = ce.mine(plan, queries, bank, ids)
    order = np.random.default_rng(1).permutation(12)
    permuted = ce.mine(plan, {v: q[order] for v, q in queries.items()}, bank, ids[order])
    assert np.array_equal(permuted.index, whole.index[order])
    for row in range(12):
        one = ce.mine(plan, {v: q[row : row + 1] for v, q in queries.items()}, bank, ids[row : row + 1])
        assert np.array_equal(one.index[0], whole.index[row])


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_in_torch_out_and_equal_to_numpy(kind):
    bank, queries, ids = problem()
    keys = {v: torch.from_numpy(x).to(kind) for v, x in bank.keys.items()}
    asked = {v: torch.from_numpy(q).to(kind) for v, q in queries.items()}
    tensors = ce.Bank(keys, torch.from_numpy(bank.video_id))
    arrays = ce.Bank({v: tensors.host_keys(v) for v in tensors.views}, bank.video_id)
    plan = parse("flow:20,rgb:4")
    found = ce.mine(plan, asked, tensors, torch.from_numpy(ids), trace=True)
    assert isinstance(found.index, torch.Tensor)
    assert isinstance(found.similarity, torch.Tensor)
    assert all(isinstance(kept, torch.Tensor) for kept in found.kept)
    host = {v: ce.Bank({v: q}).host_keys(v) for v, q in asked.items()}
    assert np.array_equal(found.index.numpy(), ce.mine(plan, host, arrays, ids).index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", ["rgb:3", "flow:9,rgb:4", "sum(rgb,flow):50"])
@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_mine_self_is_mining_every_key(backend, text, tile):
    bank, _, _ = problem("near-tie", k=30)
    plan = parse(text)
    want = ce.mine(plan, dict(bank.keys), bank, bank.video_id, backend=backend)
    found = ce.mine_self(plan, bank, tile=tile, backend=backend)
    same(found, want)
    mutual = ce.mine_self(plan, bank, tile=tile, mutual=True, backend=backend)
    neighbours = [set(row.tolist()) - {-1} for row in want.index]
    for i, row in enumerate(mutual.index):
        expected = [j for j in want.index[i].tolist() if j >= 0 and i in neighbours[j]]
        assert row.tolist() == expected + [-1] * (len(row) - len(expected))
        there = [want.similarity[i, want.index[i].tolist().index(j)] for j in expected]
        assert mutual.similarity[i].tolist() == there + [-np.inf] * (len(row) - len(expected))


def test_mine_self_without_video_ids_leaves_out_the_key_itself():
    keys = separated(np.random.default_rng(0), 20, 6)
    found = ce.mine_self(parse("rgb:19"), ce.Bank({"rgb": keys}))
    assert [sorted(row) for row in found.index.tolist()] == [sorted(set(range(20)) - {i}) for i in range(20)]
    tensors = ce.mine_self(parse("rgb:19"), ce.Bank({"rgb": torch.from_numpy(keys)}))
    assert np.array_equal(tensors.index.numpy(), found.index)


def test_empty_banks_and_batches():
    for b, k in ((0, 5), (3, 0), (0, 0)):
        bank, queries, ids = problem(b=b, k=k)
        assert ce.mine(parse("flow:3,rgb:2"), queries, bank, ids).index.shape == (b, min(2, k))
    empty, _, _ = problem(k=0)
    assert ce.mine_self(parse("rgb:2"), empty, mutual=True).index.shape == (0, 0)


def changed(queries, view, value):
    return queries | {view: value}


X = np.ones((5, 9), np.float32)
NAN = X.copy()
NAN[4, 1] = np.nan
BAD = {
    "missing view": (lambda q: {"flow": q["flow"]}, None, "queries: expected the plan's view 'rgb', got flow"),
    "no view": (lambda q: {}, None, "queries: expected the plan's view 'flow', got no view"),
    "rank": (lambda q: changed(q, "rgb", X[0]), None, r'queries\["rgb"\]: expected \(N, 9\).*got \(9,\)'),
    "width": (lambda q: changed(q, "rgb", X[:, :8]), None, r'queries\["rgb"\]: expected \(N, 9\).*got \(5, 8\)'),
    "type": (lambda q: changed(q, "rgb", X.astype(float)), None, r'queries\["rgb"\]: .*got \(5, 9\) float64'),
    "rows": (lambda q: changed(q, "rgb", X[:4]), None, r'queries\["rgb"\]: expected \(5, 9\).*got \(4, 9\)'),
    "nan": (lambda q: changed(q, "rgb", NAN), None, r'queries\["rgb"\]: expected finite values, got nan in row 4'),
    "device": (lambda q: changed(q, "rgb", torch.empty(5, 9, device="meta")), None, "data on cpu.*got meta"),
    "ids short": (lambda q: q, np.zeros(4, int), r"exclude: expected \(5,\) video ids or a \(5, 60\) bool mask"),
    "ids floats": (lambda q: q, np.zeros(5), r"exclude: expected \(5,\) integers, got \(5,\) float64"),
    "torch ids floats": (lambda q: q, torch.zeros(5), "exclude: expected"),
    "mask shape": (lambda q: q, np.zeros((5, 59), bool), r"exclude: expected \(5, 60\) bool, got \(5, 59\) bool"),
    "mask type": (lambda q: q, np.zeros((5, 60)), "exclude: expected"),
    "nothing of sense": (lambda q: q, "all", "exclude: expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, exclude, message = BAD[name]
    bank, queries, _ = problem()
    with pytest.raises(InvalidInput, match=message):
        ce.mine(parse("flow:9,rgb:3"), change(queries), bank, exclude)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_queries_must_be_finite_whatever_their_type_and_however_large(backend, dtype):
    bank, dtype = ce.Bank({"rgb": np.ones((40, 9), np.float32)}), np.dtype(dtype)
    for place in ((0, 0), (4, 8)):
        queries = np.full((6, 12), ml_dtypes.finfo(dtype).max, dtype)[:5, 2:11]
        assert ce.mine(parse("rgb:3"), {"rgb": queries}, bank, backend=backend).index.tolist() == [[0, 1, 2]] * 5
        for value in (np.nan, np.inf, -np.inf):
            queries[place] = value
            with pytest.raises(InvalidInput, match=rf'queries\["rgb"\]: .* got {value} in row {place[0]}'):
                ce.mine(parse("rgb:3"), {"rgb": queries}, bank, backend=backend)


def test_views_the_bank_lacks_and_ids_it_lacks():
    bank, queries, ids = problem()
    with pytest.raises(InvalidInput, match="bank: expected the plan's view 'audio'"):
        ce.mine(parse("audio:3"), queries | {"audio": X}, bank)
    with pytest.raises(InvalidInput, match="bank: expected the plan's view 'audio'"):
        ce.mine_self(parse("audio:3"), bank)
    bare = ce.Bank(bank.keys)
    with pytest.raises(InvalidInput, match="exclude: expected a bank with video_id"):
        ce.mine(parse("rgb:3"), queries, bare, ids)
    with pytest.raises(InvalidInput, match="tile: expected at least 1, got 0"):
        ce.mine_self(parse("rgb:3"), bank, tile=0)


SCORES = np.zeros((2, 6))
BAD_SCORES = {
    "missing": ({"flow": SCORES}, None, "similarities: expected the plan's view 'rgb'"),
    "rank": ({"rgb": SCORES[0], "flow": SCORES}, None, r'similarities\["rgb"\]: expected'),
    "type": ({"rgb": SCORES.astype(int), "flow": SCORES}, None, r'similarities\["rgb"\]: .*int64'),
    "shapes": ({"rgb": SCORES, "flow": SCORES[:, :5]}, None, r"expected \(2, 6\) float32 or float64, got \(2, 5\)"),
    "nan": ({"rgb": SCORES * np.nan, "flow": SCORES}, None, r'similarities\["rgb"\]: expected finite.*row 0'),
    "ids": ({"rgb": SCORES, "flow": SCORES}, [1, 2], r"exclude: expected \(2, 6\) bool"),
    "mask": ({"rgb": SCORES, "flow": SCORES}, np.zeros((6, 2), bool), r"exclude: expected \(2, 6\) bool"),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_bad_similarities_are_named(name):
    similarities, exclude, message = BAD_SCORES[name]
    with pytest.raises(InvalidInput, match=message):
        ce.select(parse("rgb:3,flow:2"), similarities, exclude)


def test_select_ranks_scores_as_given():
    scores = torch.tensor([[0.0, -0.0, 1.0, 1.0]])
    found = ce.select(parse("rgb:4"), {"rgb": scores})
    assert found.index.tolist() == [[2, 3, 0, 1]]
    mask = torch.tensor([[False, False, True, False]])
    assert ce.select(parse("rgb:4"), {"rgb": scores}, mask).index.tolist() == [[3, 0, 1, -1]]


def test_backends_by_name_and_by_environment(monkeypatch):
    bank, queries, _ = problem()
    with pytest.raises(InvalidInput, match="backend: expected one of cuda, cpu, reference, got 'gpu'"):
        ce.mine(parse("rgb:3"), queries, bank, backend="gpu")
    monkeypatch.setenv("CASCADE_BACKEND", "gpu")
    with pytest.raises(InvalidInput, match="'gpu'"):
        ce.mine(parse("rgb:3"), queries, bank)
    monkeypatch.setenv("CASCADE_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match="'cuda' cannot run"):
        ce.mine(parse("rgb:3"), queries, bank)


class Recorder:
    """A backend that keeps the requests and finds nothing."""

    def __init__(self):
        self.asked = None

    def mine(self, request):
        self.asked = request
        nothing = torch.empty((2, request.counts[-1]), dtype=torch.int64, device="meta")
        return kernels.Selection(index=nothing, similarity=nothing.float())

    select = mine


def test_what_is_excluded_goes_to_the_banks_device(monkeypatch):
    """torch's device without memory stands for a GPU."""
    recorder = Recorder()
    monkeypatch.setattr(kernels, "backend", lambda *_, **__: recorder)
    there = torch.ones(6, 4, device="meta")
    bank, mask, x = ce.Bank({"rgb": there}, range(6), checked=True), np.zeros((2, 6), bool), np.ones((6, 4), np.float32)

    def mine(exclude):
        ce.mine(parse("rgb:3"), {"rgb": there[:2]}, bank, exclude)
        return recorder.asked.exclude

    for ids in ([0, 1], np.arange(2), torch.arange(2), torch.arange(2, device="meta", dtype=torch.int32)):
        found = mine(ids).video_id
        assert (found.device.type, found.dtype) == ("meta", torch.int64)
    for marked in (mask, torch.from_numpy(mask), torch.from_numpy(mask).to("meta")):
        assert mine(marked).mask.device.type == "meta"
        ce.select(parse("rgb:3"), {"rgb": torch.ones(2, 6, device="meta")}, marked)
        assert recorder.asked.exclude.mask.device.type == "meta"
    for kind in (torch.float32, torch.bool):
        with pytest.raises(InvalidInput, match=r"exclude: expected"):
            mine(torch.ones(2, device="meta", dtype=kind))
    with pytest.raises(InvalidInput, match="exclude: expected data on the CPU, got a tensor on meta"):
        ce.mine(parse("rgb:3"), {"rgb": x[:2]}, ce.Bank({"rgb": x}, range(6)), torch.arange(2, device="meta"))
