"""The loss against its definition: a dense float64 computation that shares nothing with the package."""

import itertools
import warnings

import numpy as np
import pytest
import torch

import cascade_engine as ce
from cascade_engine import nce as operator
from cascade_engine.errors import InvalidInput, StaleBank
from cascade_engine.tensor import FEATURE_DTYPES

try:
    from cascade_engine import _cpu
except ImportError:
    _cpu = None

REDUCTIONS = ("logsumexp", "mean_log")
SIBLINGS = ("positive", "ignore", "negative")


def dense(query, key, keys, index, *, tau=0.07, reduction="logsumexp", drop=None, never=False, own_video=None,
          siblings="positive"):  # fmt: skip
    """PLAN's definition with everything written out, in the type of its inputs."""
    b, k = len(query), len(keys)
    scores = torch.cat([(query * key).sum(1, keepdim=True), query @ keys.to(query.dtype).T], 1) / tau
    member = torch.zeros(b, 1 + k, dtype=torch.bool)
    absent = torch.zeros(b, 1 + k, dtype=torch.bool)
    for i in range(b):
        mined = {int(j) for j in index[i] if j >= 0}
        close = set() if own_video is None else {j for j in range(k) if own_video[0][i] == own_video[1][j]}
        mined -= close
        if siblings == "positive":
            mined |= close
        if siblings == "ignore":
            absent[i, [1 + j for j in close]] = True
        member[i, [1 + j for j in mined]] = True
        member[i, 0] = not never and not (drop is not None and bool(drop[i]) and len(mined) > 0)
    every = torch.logsumexp(scores.masked_fill(absent, -torch.inf), 1)
    losses = []
    for i in range(b):
        if member[i].any():
            inside = scores[i][member[i]]
            losses.append(every[i] - (torch.logsumexp(inside, 0) if reduction == "logsumexp" else inside.mean()))
    return torch.stack(losses).mean() if losses else (scores * 0).sum()


def unit(generator, *shape):
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def problem(b, k, d, p, seed=0, videos=5):
    g = torch.Generator().manual_seed(seed)
    keys = unit(g, k, d).float()
    index = torch.randint(-1, max(k, 1), (b, p), generator=g) if k else torch.full((b, p), -1)
    own, other = (torch.randint(0, videos, (n,), generator=g) for n in (b, k))
    return unit(g, b, d), unit(g, b, d), keys, index, own, other


def found(index):
    return ce.Positives(index=index, similarity=torch.zeros(index.shape))


def gradients(function, query, key):
    query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
    loss = function(query, key)
    loss.backward()
    return loss.detach(), query.grad, key.grad


SHAPES = [(5, 40, 8, 3), (3, 1, 2, 2), (4, 0, 6, 2), (0, 7, 4, 2), (9, 200, 5, 0), (2, 130, 3, 90)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", list(itertools.product(REDUCTIONS, SIBLINGS, ("always", "never", 0.6))), ids=str)
def test_equals_the_definition(shape, options, monkeypatch):
    monkeypatch.setattr(operator, "TILE_VALUES", 200)  # several tiles, and a rest
    reduction, siblings, self_positive = options
    query, key, keys, index, own, other = problem(*shape)
    drop = torch.rand(len(query), generator=torch.Generator().manual_seed(3)) < 0.6 if self_positive == 0.6 else None
    bank = ce.Bank({"rgb": keys}, video_id=other)
    for ids in (None, own):
        mine = gradients(
            lambda q, x, ids=ids: ce.multi_positive_nce(
                q, x, bank, found(index), reduction=reduction, siblings=siblings, self_positive=self_positive,
                query_video_id=ids, generator=torch.Generator().manual_seed(3),
            ),
            query, key,
        )  # fmt: skip
        want = gradients(
            lambda q, x, ids=ids: dense(
                q, x, keys, index, reduction=reduction, siblings=siblings, drop=drop,
                never=self_positive == "never", own_video=None if ids is None else (ids, other),
            ),
            query, key,
        )  # fmt: skip
        for got, expected in zip(mine, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def error(got, want):
    return float(sum((g.double() - w).norm() for g, w in zip(got, want, strict=True)))


def distances(dtype, reduction, case, seed):
    """How far our loss and its two gradients are from float64, how far plain torch's are, and half an ulp of each."""
    query, key, keys, index, _, _ = problem(8, 700, 64, 5, seed)
    if case == "confident":  # P holds nearly all of the mass: gradients nearly cancel
        query = keys[index[:, 0].clamp(min=0)].double()
    query, key, keys = query.to(dtype), key.to(dtype), keys.to(dtype)
    tau = 0.003 if case == "cold" else 0.07
    bank = ce.Bank({"rgb": keys})

    def ours(q, x):
        return ce.multi_positive_nce(q, x, bank, found(index), temperature=tau, reduction=reduction)

    def plain(q, x):
        return dense(q, x, keys, index, tau=tau, reduction=reduction)

    exact = gradients(plain, query.double(), key.double())
    mine, torchs = gradients(ours, query, key), gradients(plain, query, key)
    assert mine[0].dtype == torch.float32
    assert mine[1].dtype == mine[2].dtype == dtype
    far = [[error([each], [want]) for each, want in zip(given, exact, strict=True)] for given in (mine, torchs)]
    return [
        *far,
        [torch.finfo(each.dtype).eps / 2 * float(want.norm()) for each, want in zip(mine, exact, strict=True)],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["random", "confident", "cold"])
def test_is_at_most_twice_as_far_from_float64_as_plain_torch(dtype, reduction, case):
    mine, plain, floor = np.sum([distances(dtype, reduction, case, seed) for seed in range(3)], 0)
    assert (mine <= 2 * plain + floor).all(), (mine, plain, floor)


ISAS = [name for name, runs in _cpu.isas() if runs] if _cpu is not None else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(5, 700, 64, 3), (40, 2100, 100, 3), (33, 1, 1, 1), (3, 0, 6, 2), (0, 9, 6, 2)], ids=str
)
@pytest.mark.parametrize("siblings", ["ignore", "positive"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_as_right_as_plain_torch_whatever_the_threads(
    isa, siblings, shape, dtype, monkeypatch
):
    monkeypatch.setenv("CASCADE_ISA", isa)
    query, key, keys, index, own, other = problem(*shape)
    query, key, keys = query.float(), key.float(), keys.to(dtype)
    bank = ce.Bank({"rgb": keys[:, ::2].contiguous() if shape[2] > 1 else keys}, video_id=other)
    query, key = (each[:, ::2] if shape[2] > 1 else each for each in (query, key))

    def ours(q, x):
        return ce.multi_positive_nce(q, x, bank, found(index), siblings=siblings, query_video_id=own)

    def plain(q, x):
        return dense(q, x, bank.keys["rgb"], index, own_video=(own, other), siblings=siblings)

    once = gradients(ours, query, key)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = gradients(ours, query, key)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    exact = gradients(plain, query.double(), key.double())
    floor = sum(float(each.norm()) for each in exact) * torch.finfo(torch.float32).eps
    assert error(once, exact) <= 2 * error(gradients(plain, query, key), exact) + floor


def test_autocast_changes_nothing():
    query, key, keys, index, own, other = problem(8, 300, 32, 4)
    bank = ce.Bank({"rgb": keys}, video_id=other)

    def loss(q, x):
        return ce.multi_positive_nce(q, x, bank, found(index), query_video_id=own)

    plain = gradients(loss, query.bfloat16(), key.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(loss, query.bfloat16(), key.float())
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_queries_may_be_of_another_type_than_the_bank():
    query, key, keys, index, _, _ = problem(8, 300, 32, 4)
    want = dense(query.bfloat16().double(), key.float().double(), keys.half().double(), index)
    bank = ce.Bank({"rgb": keys.half()})
    torch.testing.assert_close(
        ce.multi_positive_nce(query.bfloat16(), key.float(), bank, found(index)).double(), want, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("tau", [1e-3, 1e-6])
def test_a_tiny_temperature_stays_finite(tau):
    query, key, keys, index, _, _ = problem(8, 300, 32, 4)
    loss, to_query, to_key = gradients(
        lambda q, x: ce.multi_positive_nce(q, x, ce.Bank({"rgb": keys}), found(index), temperature=tau),
        query.float(), key.float(),
    )  # fmt: skip
    want = dense(query.float().double(), key.float().double(), keys.double(), index, tau=tau)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(to_query).all()
    assert torch.isfinite(to_key).all()


def test_minus_one_is_no_member_and_duplicates_count_once():
    query, key, keys, _, _, _ = problem(2, 20, 4, 3)
    bank = ce.Bank({"rgb": keys})
    for reduction in REDUCTIONS:
        values = [
            ce.multi_positive_nce(query, key, bank, found(torch.tensor(index)), reduction=reduction)
            for index in ([[3, 3, -1], [7, 7, 7]], [[-1, 3, 3], [-1, 7, -1]], [[3], [7]])
        ]
        assert values[0] == values[1] == values[2]


def test_an_empty_p_is_not_counted():
    query, key, keys, _, _, _ = problem(3, 20, 4, 1)
    bank = ce.Bank({"rgb": keys})
    index = torch.tensor([[4], [-1], [9]])
    some = ce.multi_positive_nce(query, key, bank, found(index), self_positive="never")
    rows = torch.tensor([0, 2])
    torch.testing.assert_close(
        some, ce.multi_positive_nce(query[rows], key[rows], bank, found(index[rows]), self_positive="never")
    )
    nothing = gradients(
        lambda q, x: ce.multi_positive_nce(q, x, bank, found(torch.full((3, 1), -1)), self_positive="never"),
        query, key,
    )  # fmt: skip
    assert [float(each.abs().sum()) for each in nothing] == [0, 0, 0]


def test_the_generator_decides_who_is_dropped():
    query, key, keys, index, _, _ = problem(64, 50, 8, 3)
    bank = ce.Bank({"rgb": keys})

    def loss(p, seed):
        drawn = torch.Generator().manual_seed(seed)
        return ce.multi_positive_nce(query, key, bank, found(index), self_positive=p, generator=drawn)

    assert loss(0.5, 1) == loss(0.5, 1) != loss(0.5, 2)
    drop = torch.rand(64, generator=torch.Generator().manual_seed(1)) < 0.5
    assert loss(drop, 2) == loss(0.5, 1), "drawn before"
    assert loss(0.0, 1) == ce.multi_positive_nce(query, key, bank, found(index))
    lone = found(torch.full((64, 1), -1))
    assert ce.multi_positive_nce(query, key, bank, lone, self_positive=1.0) == ce.multi_positive_nce(
        query, key, bank, lone
    )


def test_cross_view_pairs_contrast_with_the_named_view():
    query, key, keys, index, _, _ = problem(4, 30, 6, 2)
    other = problem(4, 30, 6, 2, seed=9)[2]
    bank = ce.Bank({"rgb": keys, "flow": other})
    torch.testing.assert_close(
        ce.multi_positive_nce(query, key, bank, found(index), view="flow"), dense(query, key, other, index)
    )


@pytest.mark.parametrize("bank_of", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
def test_numpy_banks_ids_and_positives_work(bank_of):
    query, key, keys, index, own, other = problem(4, 30, 6, 2)
    bank = ce.Bank({"rgb": bank_of(keys.numpy())}, video_id=bank_of(other.numpy()))
    positives = ce.Positives(index=bank_of(index.numpy()), similarity=None)
    got = ce.multi_positive_nce(query, key, bank, positives, query_video_id=bank_of(own.numpy()))
    torch.testing.assert_close(got, dense(query, key, keys, index, own_video=(own, other)))


LAYOUTS = {
    "backwards": lambda x: x[::-1].copy()[::-1],
    "mirrored": lambda x: x[:, ::-1].copy()[:, ::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}
LAID_OUT = [("keys", "backwards"), ("keys", "mirrored")]
LAID_OUT += itertools.product(("positives", "bank ids", "query ids"), ("backwards", "big-endian"))


@pytest.mark.parametrize(("which", "layout"), LAID_OUT)
def test_numpy_of_any_layout_gives_the_same_loss(which, layout):
    query, key, keys, index, own, other = problem(4, 30, 6, 2)
    given = {"keys": keys.numpy(), "positives": index.numpy(), "bank ids": other.numpy(), "query ids": own.numpy()}
    given[which] = LAYOUTS[layout](given[which])
    bank = ce.Bank({"rgb": given["keys"]}, video_id=given["bank ids"])
    positives = ce.Positives(index=given["positives"], similarity=None)
    got = ce.multi_positive_nce(query, key, bank, positives, query_video_id=given["query ids"])
    torch.testing.assert_close(got, dense(query, key, keys, index, own_video=(own, other)))


def test_no_queries_may_have_no_ids():
    query, key, keys, index, _, other = problem(0, 30, 6, 2)
    bank = ce.Bank({"rgb": keys}, video_id=other)
    assert ce.mine(ce.CascadePlan.parse("rgb:2"), {"rgb": query.float()}, bank, []).index.shape == (0, 2)
    assert ce.multi_positive_nce(query, key, bank, found(index), query_video_id=[]) == 0


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_a_store_s_arrays_that_cannot_be_written_to_need_no_warning(kind):
    query, key, keys, index, own, other = problem(4, 30, 6, 2)
    stored = keys.numpy().astype(FEATURE_DTYPES[kind])
    ids, mined = other.numpy().astype(np.int32), index.numpy().copy()
    for array in (stored, ids, mined):
        array.flags.writeable = False
    bank = ce.Bank({"rgb": stored}, video_id=ids)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = ce.multi_positive_nce(
                query, key, bank, ce.Positives(index=mined, similarity=None), query_video_id=own.numpy()
            )
    finally:
        torch.set_warn_always(False)
    want = dense(query, key, torch.from_numpy(stored.astype(np.float32)), index, own_video=(own, other))
    torch.testing.assert_close(got, want)


def arguments(dtype=torch.float64, b=4, k=11, siblings=1):
    g = torch.Generator().manual_seed(5)
    query, own = ((unit(g, b, 3) / 0.2).to(dtype).requires_grad_() for _ in range(2))
    keys = unit(g, k, 3).float()
    mined = torch.tensor([[2, -1, 2], [0, 9, 1], [-1, -1, -1], [2, -1, 3]])
    videos = torch.tensor([7, 5, 8, 8]), torch.tensor([1, 7, 2, 8, 3, 3, 3, 3, 7, 3, 5])
    return query, own, keys, mined, *videos, siblings, torch.tensor([True, False, True, True]), 0.4


@pytest.mark.parametrize("siblings", range(3))
@pytest.mark.parametrize("flags", list(itertools.product((True, False), repeat=2)), ids=str)
def test_gradcheck(flags, siblings):
    given = arguments(siblings=siblings)
    assert torch.autograd.gradcheck(
        lambda q, x: operator.nce(q, x, *given[2:], *flags, True, True)[0], given[:2], atol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    given = arguments(dtype)
    torch.library.opcheck(operator.nce, (*given, True, False, True, True))
    with torch.no_grad():
        for wanted in ((False, False), (True, False), (False, True)):
            torch.library.opcheck(operator.nce, (*given, True, True, *wanted), test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_that_were_not_asked_for_are_refused_not_guessed(dtype, wanted):
    given = arguments(dtype)
    loss = operator.nce(*given, True, False, *wanted)[0]
    both = operator.nce(*given, True, False, True, True)[0]
    assert torch.equal(loss, both)
    for each, asked in zip(given[:2], wanted, strict=True):
        if asked:  # the other needs none then
            other = given[1 - wanted.index(True)].detach()
            pair = (each, other) if wanted[0] else (other, each)
            alone = operator.nce(*pair, *given[2:], True, False, *wanted)[0]
            got, want = (torch.autograd.grad(of, each, retain_graph=True)[0] for of in (alone, both))
            assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="without `for_query` or `for_own`"):
        loss.backward()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiles(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch's own outlives changes of an operator
    query, key, keys, index, own, other = problem(6, 90, 8, 3)
    bank = ce.Bank({"rgb": keys}, video_id=other)

    def step(q, x):
        q = torch.nn.functional.normalize(q * 2 + 1, dim=1)
        return ce.multi_positive_nce(q, x, bank, found(index), query_video_id=own) * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend)
    for got, want in zip(gradients(compiled, query, key), gradients(step, query, key), strict=True):
        torch.testing.assert_close(got, want)


def test_the_operator_compiles_in_one_graph():
    given = arguments()
    compiled = torch.compile(
        lambda q, x: operator.nce(q, x, *given[2:], True, False, True, True)[0], backend="aot_eager", fullgraph=True
    )
    plain = operator.nce(*given, True, False, True, True)[0]
    assert compiled(*given[:2]) == plain
    got, want = torch.autograd.grad(compiled(*given[:2]), given[:2]), torch.autograd.grad(plain, given[:2])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_push_that_overwrites_stops_the_backward_pass_and_one_that_fills_does_not(framework, compiled):
    def keys(n, seed):
        x = problem(1, n, 4, 1, seed)[2]
        return {"rgb": x if framework == "torch" else x.numpy()}

    def loss(q, x):
        return ce.multi_positive_nce(q, x, bank, found(torch.tensor([[0], [5]])))

    if compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss, backend="aot_eager")
    queue = ce.KeyQueue(8, {"rgb": 4})
    queue.push(keys(6, 1), np.arange(6))
    bank = queue.bank()
    query, key, *_ = problem(2, 1, 4, 1)
    query = query.requires_grad_()
    before = gradients(loss, query.detach(), key)
    value = loss(query, key)
    queue.push(keys(2, 2), np.arange(2))  # fills the last slots
    value.backward()
    assert torch.equal(query.grad, before[1])
    value = loss(query, key)
    queue.push(keys(1, 3), np.arange(1))  # overwrites the first
    with pytest.raises(StaleBank, match=r"queue.bank\(\)"):
        value.backward()
    with pytest.raises(StaleBank):
        loss(query, key)


def test_no_array_of_all_scores_is_made():
    b, k = 64, 1 << 16
    query, key, keys, index, own, other = problem(b, k, 8, 5, videos=1000)
    bank = ce.Bank({"rgb": keys}, video_id=other)
    query = query.float().requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profiler:
        ce.multi_positive_nce(query, key.float(), bank, found(index), query_video_id=own).backward()
    largest = max(event.cpu_memory_usage for event in profiler.events() if event.name == "aten::empty")
    assert 0 < largest <= 4 * operator.TILE_VALUES < 4 * b * k // 4


def test_mine_and_contrast_equals_the_two_calls():
    query, key, keys, _, own, other = problem(6, 80, 8, 3)
    bank = ce.Bank({"rgb": keys, "flow": keys.flip(0)}, video_id=other)
    plan = ce.CascadePlan.parse("flow:20,rgb:4")
    query, key = query.float(), key.float()
    queries = {"rgb": query, "flow": query.flip(1)}
    options = {"self_positive": 0.5, "siblings": "ignore", "query_video_id": own, "temperature": 0.1}
    options |= {"reduction": "mean_log"}

    def both(q, x):
        nonlocal positives
        positives, loss = ce.mine_and_contrast(
            plan, queries | {"rgb": q}, x, bank, view="rgb", exclude=own,
            generator=torch.Generator().manual_seed(1), **options,
        )  # fmt: skip
        return loss

    def apart(q, x):
        return ce.multi_positive_nce(
            q, x, bank, mined, view="rgb", generator=torch.Generator().manual_seed(1), **options
        )

    positives = None
    mined = ce.mine(plan, queries, bank, own)
    for got, want in zip(gradients(both, query, key), gradients(apart, query, key), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(positives.index, mined.index)
    assert torch.equal(positives.similarity, mined.similarity)


def test_mine_and_contrast_takes_numpy_for_the_views_that_are_not_trained():
    query, key, keys, _, own, other = problem(6, 80, 8, 3)
    bank = ce.Bank({"rgb": keys, "flow": keys.flip(0)}, video_id=other)
    query = query.float().requires_grad_()
    plan = ce.CascadePlan.parse("flow:20,rgb:4")
    queries = {"rgb": query, "flow": query.detach().numpy()}
    _, loss = ce.mine_and_contrast(plan, queries, key.float(), bank, view="rgb", exclude=own)
    loss.backward()
    assert query.grad.abs().sum() > 0


GOOD = {"query": torch.ones(3, 4), "key": torch.ones(3, 4), "index": torch.zeros(3, 2, dtype=torch.int64)}
BAD = {
    "query rank": ({"query": torch.ones(4)}, r"query: expected \(B, 4\)"),
    "query width": ({"query": torch.ones(3, 5)}, r"query: expected \(B, 4\).*got \(3, 5\)"),
    "query type": ({"query": torch.ones(3, 4, dtype=torch.int64)}, "query: expected .*floating"),
    "query not of torch": ({"query": np.ones((3, 4))}, r"query: expected a torch tensor \(B, 4\), got ndarray"),
    "key not of torch": ({"key": [[1.0] * 4] * 3}, r"key: expected a torch tensor \(B, 4\), got list"),
    "key shape": ({"key": torch.ones(2, 4)}, r"key: expected \(3, 4\)"),
    "positives rows": ({"index": torch.zeros(2, 2, dtype=torch.int64)}, r"positives.index: expected \(3, k\)"),
    "positives slot": ({"index": torch.full((3, 2), 9)}, "positives.index: expected slots under 9, got 9"),
    "positives slot, float64": (
        {"query": GOOD["query"].double(), "key": GOOD["key"].double(), "index": torch.full((3, 2), 9)},
        "positives.index: expected slots under 9, got 9",
    ),
    "positives type": ({"index": torch.zeros(3, 2)}, "positives.index: expected integers"),
    "view": ({"view": "audio"}, "view: expected one of rgb, flow, got 'audio'"),
    "no view": ({"view": None}, "view: expected one of rgb, flow, got none"),
    "temperature 0": ({"temperature": 0.0}, "temperature: expected"),
    "temperature nan": ({"temperature": float("nan")}, "temperature: expected"),
    "reduction": ({"reduction": "sum"}, "reduction: expected one of logsumexp, mean_log, got 'sum'"),
    "siblings": ({"siblings": "maybe"}, "siblings: expected one of"),
    "self": ({"self_positive": "sometimes"}, "self_positive: expected"),
    "self probability": ({"self_positive": 1.5}, "self_positive: expected"),
    "self drawn": ({"self_positive": torch.ones(2, dtype=torch.bool)}, r"self_positive: expected \(3,\) bool"),
    "ids": ({"query_video_id": torch.zeros(2, dtype=torch.int64)}, r"query_video_id: expected \(3,\)"),
    "ids type": ({"query_video_id": torch.zeros(3)}, "query_video_id: expected integers"),
    "ids of names": ({"query_video_id": ["a", "b", "c"]}, r"query_video_id: expected \(3,\) integers, got \(3,\) <U1"),
    "ids that are bool": ({"query_video_id": [True] * 3}, r"query_video_id: expected \(3,\) integers, got \(3,\) bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, message = BAD[name]
    given = GOOD | {"view": "rgb"} | changes
    bank = ce.Bank({"rgb": torch.ones(9, 4), "flow": torch.ones(9, 4)}, video_id=torch.arange(9))
    with pytest.raises(InvalidInput, match=message):
        ce.multi_positive_nce(given.pop("query"), given.pop("key"), bank, found(given.pop("index")), **given)


def test_siblings_need_a_bank_that_knows_its_videos():
    with pytest.raises(InvalidInput, match="bank with video_id"):
        ce.multi_positive_nce(
            GOOD["query"], GOOD["key"], ce.Bank({"rgb": torch.ones(9, 4)}), found(GOOD["index"]),
            query_video_id=torch.arange(3),
        )  # fmt: skip
