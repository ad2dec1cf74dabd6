"""oracle -> reference -> cpu: equal indices and similarities, no row left out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import CORE, DTYPES, FAMILIES

import cascade_engine as ce
from cascade_engine import kernels
from cascade_engine.errors import BackendUnavailable

_cpu = pytest.importorskip("cascade_engine._cpu", reason="the wheel was built without a C++ compiler")
ISAS = [name for name, runs in _cpu.isas() if runs]
VIEWS = ("a", "b", "c")
FEW = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@contextmanager
def isa(name: str) -> Iterator[None]:
    """CASCADE_ISA set to `name`."""
    before = os.environ.get("CASCADE_ISA")
    os.environ["CASCADE_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["CASCADE_ISA"]
        else:
            os.environ["CASCADE_ISA"] = before


def oracle_stages(plan: ce.CascadePlan, keys: int) -> list[oracle.Stage]:
    counts = plan.counts(keys)
    return [
        (stage.score.fusion, stage.score.views, count, stage.over_bank)
        for stage, count in zip(plan.stages, counts, strict=True)
    ]


def assert_same(found: ce.Positives, index: np.ndarray, similarity: np.ndarray, kept: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.similarity, similarity)
    assert found.kept is not None
    for mine, want in zip(found.kept, kept, strict=True):
        np.testing.assert_array_equal(mine, want)


@st.composite
def plans(draw: st.DrawFn, fusions: tuple[str, ...] = ("sum", "min", "max", "rrf", "zsum")) -> str:
    """Plan texts over the views a, b, c."""
    stages, last_count = [], 10**6
    for _ in range(draw(st.integers(1, 5))):
        views = draw(st.permutations(VIEWS))
        fusion = draw(st.sampled_from((None, None, *fusions)))
        score = views[0] if fusion is None else f"{fusion}({','.join(views[: draw(st.integers(2, 3))])})"
        kind = draw(st.sampled_from(("count", "share", "previous")))
        if kind == "count":
            last_count = min(last_count, draw(st.integers(1, 60)))
            keep = str(last_count)
        else:
            keep = f"{'prev' if kind == 'previous' else ''}{draw(st.sampled_from((3, 12.5, 29, 50, 100)))}%"
        stages.append(f"{score}:{keep}{draw(st.sampled_from(('', '', '', '@bank')))}")
    return ",".join(stages)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.random.Generator, str, int, int, dict[str, int], str, str, str]:
    """rng, plan, B, K, dims, dtype, metric, exclusion."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dims = {view: draw(st.sampled_from((1, 2, 7, 8, 16, 19, 33))) for view in VIEWS}
    return (
        rng,
        draw(plans()),
        draw(st.sampled_from((0, 1, 2, 3))),
        draw(st.sampled_from((0, 1, 2, 5, 31, 64, 97))),
        dims,
        draw(st.sampled_from(tuple(DTYPES))),
        draw(st.sampled_from(("ip", "cosine", "l2"))),
        draw(st.sampled_from(("none", "video", "mask", "nearly all"))),
    )


def exclusion(rng: np.random.Generator, kind: str, b: int, k: int) -> tuple[np.ndarray, object, np.ndarray]:
    """The keys' video ids, the `exclude` argument, and the mask it means."""
    video, query_video = rng.integers(0, max(1, k // 4), k), rng.integers(0, max(1, k // 4), b)
    if kind == "video":
        return video, query_video, query_video[:, None] == video[None]
    if kind in ("mask", "nearly all"):
        mask = rng.random((b, k)) < (0.5 if kind == "mask" else 0.97)
        return video, mask, mask
    return video, None, np.zeros((b, k), bool)


@pytest.mark.parametrize("family", CORE)
@FEW
@given(problem=problems())
def test_reference_and_every_isa_equal_the_oracle(family, problem):
    rng, text, b, k, dims, dtype, metric, kind = problem
    plan, make = ce.CascadePlan.parse(text), FAMILIES[family]
    both = {view: make(rng, k + b, dim).astype(DTYPES[dtype]) for view, dim in dims.items()}
    keys, queries = {v: x[:k] for v, x in both.items()}, {v: x[k:] for v, x in both.items()}
    video, exclude, mask = exclusion(rng, kind, b, k)
    want = oracle.mine(oracle_stages(plan, k), queries, keys, mask, metric)
    found = ce.mine(plan, queries, ce.Bank(keys, video, metric=metric), exclude, trace=True, backend="reference")
    assert_same(found, *want)
    for name in ISAS:
        with isa(name):
            found = ce.mine(plan, queries, ce.Bank(keys, video, metric=metric), exclude, trace=True, backend="cpu")
            assert_same(found, *want)
            found = ce.mine(plan, queries, ce.Bank(keys, video, metric=metric), exclude, backend="cpu")
            np.testing.assert_array_equal(found.index, want[0])
            np.testing.assert_array_equal(found.similarity, want[1])


@FEW
@given(problem=problems(), single=st.booleans())
def test_select_equals_the_oracle(problem, single):
    rng, text, b, k, _, _, _, kind = problem
    plan = ce.CascadePlan.parse(text)
    _, _, mask = exclusion(rng, "mask" if kind == "video" else kind, b, k)
    dtype = np.float32 if single else np.float64
    scores = {view: rng.integers(-4, 5, (b, k)).astype(dtype) / dtype(3) for view in VIEWS}
    rows = [{view: list(map(float, scores[view][row])) for view in VIEWS} for row in range(b)]
    want = oracle.select(oracle_stages(plan, k), rows, mask)
    for backend in ("reference", "cpu"):
        assert_same(ce.select(plan, scores, mask, trace=True, backend=backend), *want)


def test_near_ties_defeat_single_precision():
    rng = np.random.default_rng(3)
    keys, queries = FAMILIES["near_tie"](rng, 400, 64), FAMILIES["separated"](rng, 50, 64)
    wide = [[oracle.dot(list(map(float, q)), list(map(float, x))) for x in keys] for q in queries]
    exact = np.lexsort((np.broadcast_to(np.arange(400), (50, 400)), -np.array(wide)))
    gaps = -np.diff(-np.sort(-np.array(wide), axis=1), axis=1)
    assert (np.min(gaps, axis=1) < 1e-8).all(), "the family has lost its near ties"
    single = np.argsort(-(queries @ keys.T), axis=1, kind="stable")
    assert (single[:, :50] != exact[:, :50]).any(axis=1).mean() > 0.5, "a float32 ranking would pass"
    for backend in ("reference", "cpu"):
        found = ce.mine(ce.CascadePlan.parse("a:50"), {"a": queries}, ce.Bank({"a": keys}), backend=backend)
        np.testing.assert_array_equal(found.index, exact[:, :50])


@pytest.mark.parametrize(
    "preset", ["coclr", "cpr", "cpr-paper", "patent", "mvcgc", "cma", "sum", "zsum", "rrf", "nnclr"]
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_preset_equals_the_reference(preset, family):
    rng = np.random.default_rng(5)
    plan = ce.CascadePlan.preset(preset, oracle="a", trainee="b")
    both = {view: FAMILIES[family](rng, 2117, dim) for view, dim in (("a", 48), ("b", 33))}
    keys, queries = {v: x[:2089] for v, x in both.items()}, {v: x[2089:] for v, x in both.items()}
    video = rng.integers(0, 60, 2089)
    bank, exclude = ce.Bank(keys, video), rng.integers(0, 60, 28)
    want = ce.mine(plan, queries, bank, exclude, backend="reference")
    for name in ISAS:
        with isa(name):
            found = ce.mine(plan, queries, bank, exclude, backend="cpu")
            np.testing.assert_array_equal(found.index, want.index)
            np.testing.assert_array_equal(found.similarity, want.similarity)


FEW_OF_MANY = ["a:200,b:7", "zsum(a,b):150,a:7", "a:200,zsum(a,b):90", "a:2000,zsum(b,a):100,b:70", "rrf(a,b):40,b:7"]


@pytest.mark.parametrize("text", FEW_OF_MANY)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_few_of_a_bank_large_enough_for_8_bits_everywhere(family, text):
    rng = np.random.default_rng(6)
    plan = ce.CascadePlan.parse(text)
    both = {view: FAMILIES[family](rng, 9020, dim) for view, dim in (("a", 40), ("b", 12))}
    keys, queries = {v: x[:9000] for v, x in both.items()}, {v: x[9000:] for v, x in both.items()}
    bank, exclude = ce.Bank(keys, rng.integers(0, 90, 9000)), rng.integers(0, 90, 20)
    want = ce.mine(plan, queries, bank, exclude, backend="reference")
    for name in ISAS:
        with isa(name):
            found = ce.mine(plan, queries, bank, exclude, backend="cpu")
            np.testing.assert_array_equal(found.index, want.index)
            np.testing.assert_array_equal(found.similarity, want.similarity)


@pytest.mark.parametrize("masked", [False, True])
def test_a_large_bank_is_searched_piece_by_piece(masked):
    rng = np.random.default_rng(6)
    keys, size, batch = 70_000, {"a": 16, "b": 5}, 20
    features = {view: rng.standard_normal((keys, dim)).astype(np.float32) for view, dim in size.items()}
    features["a"][::3] = np.round(features["a"][::3])  # ties
    queries = {view: rng.standard_normal((batch, dim)).astype(np.float32) for view, dim in size.items()}
    queries["a"][0] = 0  # nothing but ties
    bank = ce.Bank(features, video_id=rng.integers(0, 100, keys))
    exclude = rng.random((batch, keys)) < 0.5 if masked else rng.integers(0, 100, batch)
    plan = ce.CascadePlan.parse("a:2000,b:50,a:7")
    want = ce.mine(plan, queries, bank, exclude, backend="reference")
    for name in ISAS:
        with isa(name):
            fresh = ce.Bank(features, video_id=bank.video_id)
            found = ce.mine(plan, queries, fresh, exclude, backend="cpu")
            np.testing.assert_array_equal(found.index, want.index)
            np.testing.assert_array_equal(found.similarity, want.similarity)


def test_an_unknown_or_missing_isa_is_refused():
    bank, plan = ce.Bank({"a": np.ones((3, 2), np.float32)}), ce.CascadePlan.parse("a:1")
    with isa("mmx"), pytest.raises(BackendUnavailable, match="CASCADE_ISA=mmx: expected one of"):
        ce.mine(plan, {"a": np.ones((1, 2), np.float32)}, bank)
    for name, runs in _cpu.isas():
        if not runs:
            with isa(name), pytest.raises(BackendUnavailable, match="this machine lacks"):
                ce.mine(plan, {"a": np.ones((1, 2), np.float32)}, bank)


def test_arrays_come_in_as_they_are():
    rng = np.random.default_rng(7)
    keys, queries = FAMILIES["separated"](rng, 200, 24), FAMILIES["separated"](rng, 9, 24)
    want = ce.mine(ce.CascadePlan.parse("a:7"), {"a": queries}, ce.Bank({"a": keys}), backend="reference").index
    frozen = keys.copy()
    frozen.flags.writeable = False
    wide = np.zeros((200, 50), np.float32)
    wide[:, :24] = keys
    layouts = (frozen, wide[:, :24], np.asfortranarray(keys), np.repeat(keys, 2, 0)[::2], keys[::-1][::-1])
    for layout in layouts:
        found = ce.mine(ce.CascadePlan.parse("a:7"), {"a": queries[::-1]}, ce.Bank({"a": layout}), backend="cpu")
        np.testing.assert_array_equal(found.index, want[::-1])


@pytest.mark.parametrize("plan", ["a:5", "a:50%,a:5", "a:100"])
@pytest.mark.parametrize("then", [1e37, 1e-42])
def test_a_queue_takes_keys_of_any_length_once_it_was_searched(plan, then):
    rng, size = np.random.default_rng(5), 20_000
    plan, queries = ce.CascadePlan.parse(plan), {"a": rng.standard_normal((50, 8)).astype(np.float32)}
    for name in ISAS:
        with isa(name):
            queue = ce.KeyQueue(size, {"a": 8})
            queue.push({"a": rng.standard_normal((size, 8)).astype(np.float32)}, np.arange(size))
            for _ in range(3):
                bank = queue.bank()
                want = ce.mine(plan, queries, ce.Bank({"a": bank.host_keys("a").copy()}), backend="reference")
                found = ce.mine(plan, queries, bank, backend="cpu")
                np.testing.assert_array_equal(found.index, want.index)
                np.testing.assert_array_equal(found.similarity, want.similarity)
                queue.push({"a": (then * rng.standard_normal((300, 8))).astype(np.float32)}, np.arange(300))


@pytest.mark.parametrize(("keys", "plan"), [(300, "a:5"), (9000, "a:5"), (9000, "a:50%,a:5"), (9000, "rrf(a,b):9")])
def test_any_byte_but_zero_excludes(keys, plan):
    rng, plan = np.random.default_rng(4), ce.CascadePlan.parse(plan)
    bank = ce.Bank({view: rng.standard_normal((keys, 8)).astype(np.float32) for view in plan.views})
    queries = {view: rng.standard_normal((20, 8)).astype(np.float32) for view in plan.views}
    mask = rng.random((20, keys)) < 0.5
    bytes_of = np.where(mask, rng.integers(1, 256, mask.shape), 0).astype(np.uint8).view(bool)
    for name in ISAS:
        with isa(name):
            want = ce.mine(plan, queries, bank, mask, backend="cpu")
            np.testing.assert_array_equal(ce.mine(plan, queries, bank, bytes_of, backend="cpu").index, want.index)
    scores = {view: (queries[view] @ bank.host_keys(view).T).astype(np.float32) for view in plan.views}
    want = ce.select(plan, scores, mask, backend="cpu")
    np.testing.assert_array_equal(ce.select(plan, scores, bytes_of, backend="cpu").index, want.index)


@pytest.mark.parametrize("ulps", [50, 5000])
def test_the_spread_of_close_scores_is_not_lost_in_their_mean(ulps):
    rng, keys, batch = np.random.default_rng(0), 300, 200
    features = {v: rng.standard_normal((keys, 2)).astype(np.float32) for v in "ab"}
    features["a"][:, 0] = 1
    queries = {v: rng.uniform(1, 2, (batch, 2)).astype(np.float32) for v in "ab"}
    queries["a"][:, 1] *= ulps * 2.0**-52 / 6  # scores of 1 to 2 and so far apart
    bank, plan = ce.Bank(features), ce.CascadePlan.parse("zsum(a,b):5")
    want, *_ = oracle.mine(oracle_stages(plan, keys), queries, features, np.zeros((batch, keys), bool))
    for backend in ("reference", "cpu"):
        np.testing.assert_array_equal(ce.mine(plan, queries, bank, backend=backend).index, want)


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_denormals_of_a_bank_and_of_what_is_pushed_count_whatever_the_caller_set(metric):
    torch = pytest.importorskip("torch")
    rng, size = np.random.default_rng(3), 9000
    keys = [(2e-5 * rng.standard_normal((n, 16))).astype(np.float16) for n in (size, 500, 500)]
    queries = {"a": rng.standard_normal((20, 16)).astype(np.float16)}

    def answers(plan):
        queue = ce.KeyQueue(size, {"a": 16}, dtype="float16", metric=metric)
        for part in keys:
            queue.push({"a": part}, np.arange(len(part)))
            yield ce.mine(plan, queries, queue.bank(), backend="cpu")

    for plan in map(ce.CascadePlan.parse, ("a:5", "a:50%,a:5")):
        for name in ISAS:
            with isa(name):
                wanted = list(answers(plan))
                torch.set_flush_denormal(True)
                try:
                    found = list(answers(plan))
                finally:
                    torch.set_flush_denormal(False)
                for one, other in zip(found, wanted, strict=True):
                    np.testing.assert_array_equal(one.index, other.index)
                    np.testing.assert_array_equal(one.similarity, other.similarity)


def test_denormals_count_whatever_the_caller_set():
    torch = pytest.importorskip("torch")
    keys = np.array([[1e-42], [2e-42], [3e-42]], np.float32)
    torch.set_flush_denormal(True)
    try:
        found = ce.mine(
            ce.CascadePlan.parse("a:3"), {"a": np.ones((1, 1), np.float32)}, ce.Bank({"a": keys}), backend="cpu"
        )
    finally:
        torch.set_flush_denormal(False)
    assert found.index.tolist() == [[2, 1, 0]]


def test_named_backends():
    assert kernels.backend("cpu").unavailable() is None
    assert "threads" in kernels.backend("cpu").detail()


TEXTS = ("a:5", "a:50%,b:25%,a:5", "sum(a,b):50%,b:3", "zsum(a,b):50%,b:3", "zsum(b,a):5", "rrf(b,a):9")
QUEUES = [*((640, text) for text in TEXTS), (9000, "a:5"), (9000, "sum(a,b):5")]  # so many keys for so few: in 8 bits


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("size", "text"), QUEUES)
@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_what_is_prepared_follows_a_queue(name, size, text, metric):
    """Pushes of every size, wrap-around included, longer keys than before, a push larger than the queue."""
    rng, plan = np.random.default_rng(13), ce.CascadePlan.parse(text)
    queue = ce.KeyQueue(size=size, dims={"a": 24, "b": 17}, metric=metric)
    queries = {"a": FAMILIES["separated"](rng, 20, 24), "b": FAMILIES["separated"](rng, 20, 17)}
    with isa(name):
        for step, rows in enumerate((size, 1, 33, size, 300, 500, 7, size + 360, 64)):
            scale = np.float32(30 if step == 4 else 1)
            keys = {"a": scale * FAMILIES["separated"](rng, rows, 24), "b": FAMILIES["separated"](rng, rows, 17)}
            queue.push(keys, video_id=rng.integers(0, 30, rows))
            bank, exclude = queue.bank(), rng.integers(0, 30, 20)
            found = ce.mine(plan, queries, bank, exclude, backend="cpu")
            want = ce.mine(plan, queries, bank, exclude, backend="reference")
            np.testing.assert_array_equal(found.index, want.index)
            np.testing.assert_array_equal(found.similarity, want.similarity)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("size", "text"), QUEUES)
@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_a_push_prepares_what_it_brought_alone(name, size, text, metric):
    """A key that is changed behind the queue's back stays what it was, until a push says so: nothing else is packed."""
    rng, plan = np.random.default_rng(14), ce.CascadePlan.parse(text)
    queue = ce.KeyQueue(size=size, dims={"a": 24, "b": 17}, metric=metric)
    drawn = {view: FAMILIES["separated"](rng, size + 20, dim) for view, dim in queue.dims.items()}
    keys, queries = {v: x[:size] for v, x in drawn.items()}, {v: x[size:] for v, x in drawn.items()}

    def best():
        return ce.mine(plan, queries, queue.bank(), backend="cpu").index[0].tolist()

    def push(rows):
        queue.push({view: x[rows] for view, x in keys.items()}, range(size)[rows])

    for view, x in keys.items():
        x[17] = -queries[view][0]
    with isa(name):
        push(slice(None))
        assert 17 not in best()
        for view, x in keys.items():
            x[17] = queries[view][0]
            queue.bank().keys[view][17] = x[17]
        push(slice(10))
        assert 17 not in best(), "prepared anew"
        push(slice(10, 20))
        assert best()[0] == 17


@pytest.mark.parametrize("text", ["a:9", "a:50%,b:25%,a:5"])
def test_answers_do_not_depend_on_threads_or_batch_splits(text):
    torch = pytest.importorskip("torch")
    rng, plan = np.random.default_rng(17), ce.CascadePlan.parse(text)
    keys = {view: FAMILIES["near_tie"](rng, 3000, 40) for view in "ab"}
    queries = {view: FAMILIES["separated"](rng, 61, 40) for view in "ab"}
    bank, before = ce.Bank(keys), torch.get_num_threads()
    whole = ce.mine(plan, queries, bank, backend="cpu")
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = ce.mine(plan, queries, bank, backend="cpu")
            np.testing.assert_array_equal(again.index, whole.index)
            np.testing.assert_array_equal(again.similarity, whole.similarity)
    finally:
        torch.set_num_threads(before)
    for rows in (1, 7, 40):
        for first in range(0, 61, rows):
            part = {view: q[first : first + rows] for view, q in queries.items()}
            again = ce.mine(plan, part, bank, backend="cpu")
            np.testing.assert_array_equal(again.index, whole.index[first : first + rows])


def _run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    setup = """
import os, signal, threading, numpy as np
import cascade_engine as ce
rng = np.random.default_rng(0)
def problem(keys, batch, dim=32):
    keys, queries = rng.standard_normal((keys, dim), np.float32), rng.standard_normal((batch, dim), np.float32)
    return ce.Bank({"a": keys}), {"a": queries}
"""
    return subprocess.run(
        [sys.executable, "-P", "-c", setup + code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_forked_child_mines_too():
    done = _run(
        """
plan = ce.CascadePlan.parse("a:5"); bank, queries = problem(4000, 64)
want = ce.mine(plan, queries, bank, backend="cpu").index
child = os.fork()
if child == 0:
    same = (ce.mine(plan, queries, bank, backend="cpu").index == want).all()
    os._exit(0 if same else 1)
print("child", os.waitpid(child, 0)[1])
""",
        OMP_NUM_THREADS="2",
    )
    assert done.stdout.strip() == "child 0", done.stderr


def test_an_interrupt_ends_a_long_call():
    done = _run(
        """
import time
plan = ce.CascadePlan.parse("rrf(a,b):100%")
bank = ce.Bank({v: rng.standard_normal((60000, 64), np.float32) for v in "ab"})
queries = {v: rng.standard_normal((3000, 64), np.float32) for v in "ab"}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it
threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    ce.mine(plan, queries, bank, backend="cpu")
    print("finished")
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - start < 60)
found = ce.mine(ce.CascadePlan.parse("a:1"), {"a": queries["a"][:3]}, bank, backend="cpu")
print(found.index.shape)
""",
        OMP_NUM_THREADS="2",
    )
    assert done.stdout.split("\n")[:2] == ["interrupted True", "(3, 1)"], done.stdout + done.stderr


def test_signal_handlers_may_multiply_and_mine():
    """They run between tiles: a handler that uses the matrix units leaves them, one that mines needs scratch memory."""
    done = _run(
        """
import torch
torch.set_num_threads(1)
keys, queries = rng.standard_normal((1 << 18, 64), np.float32), rng.standard_normal((768, 64), np.float32)
bank, small = ce.Bank({"a": keys}), ce.Bank({"a": keys[:3000]})
plans = [(ce.CascadePlan.parse("a:10"), 768), (ce.CascadePlan.parse("a:50%,a:2000"), 48),
         (ce.CascadePlan.parse("a:2000"), 96)]
def mine(plan, rows, bank):
    return ce.mine(plan, {"a": queries[:rows]}, bank, backend="cpu").index
want, inner, came = [mine(*plan, bank) for plan in plans], mine(*plans[0], small), []
product = torch.ones(512, 512, dtype=torch.bfloat16)
def handler(*_):
    product @ product
    came.append((mine(*plans[0], small) == inner).all())
    signal.setitimer(signal.ITIMER_REAL, 0.02)  # only now, lest handlers pile up on a slow machine
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.02)
same = [(mine(*plan, bank) == right).all() for plan, right in zip(plans, want) for _ in range(4)]
signal.setitimer(signal.ITIMER_REAL, 0)
print(all(same), all(came), len(came) > 2)
""",
        OMP_NUM_THREADS="2",
    )
    assert done.stdout.strip() == "True True True", (done.returncode, done.stdout, done.stderr)


def test_signal_handlers_may_mine_with_a_bank_being_packed():
    """The thread that packs it is the one that would wait for it."""
    done = _run(
        """
import faulthandler
faulthandler.dump_traceback_later(60, exit=True)
keys, queries = rng.standard_normal((1 << 18, 64), np.float32), rng.standard_normal((96, 64), np.float32)
came = []
def handler(*_):
    came.append(ce.mine(plan, {"a": queries}, bank, backend="cpu").index)
signal.signal(signal.SIGALRM, handler)
first = ce.CascadePlan.parse("a:10")
ce.mine(first, {"a": queries}, ce.Bank({"a": keys[:9000]}), backend="cpu")  # imports what there is to import
for text in ("a:10", "a:50%,a:20"):
    plan, bank = ce.CascadePlan.parse(text), ce.Bank({"a": keys})
    signal.setitimer(signal.ITIMER_REAL, 0.01)  # packing takes some 50 ms
    outer = ce.mine(plan, {"a": queries}, bank, backend="cpu").index
    again = ce.mine(plan, {"a": queries}, bank, backend="cpu").index
    print(len(came), (came.pop() == outer).all(), (again == outer).all())
""",
        OMP_NUM_THREADS="1",
    )
    assert done.stdout.split("\n")[:2] == ["1 True True"] * 2, (done.returncode, done.stdout, done.stderr)


def test_two_threads_mine_at_once():
    rng, plan = np.random.default_rng(19), ce.CascadePlan.parse("a:50%,a:5")
    bank = ce.Bank({"a": FAMILIES["separated"](rng, 3000, 32)})
    queries = [{"a": FAMILIES["separated"](rng, 40, 32)} for _ in range(2)]
    want = [ce.mine(plan, each, bank, backend="reference").index for each in queries]
    with ThreadPoolExecutor(2) as pool:
        tasks = [(i % 2, pool.submit(ce.mine, plan, queries[i % 2], bank, backend="cpu")) for i in range(30)]
        for which, task in tasks:
            np.testing.assert_array_equal(task.result().index, want[which])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_workers_stay_where_the_caller_may_run():
    done = _run(
        """
plan = ce.CascadePlan.parse("a:50%,a:5"); bank, queries = problem(2000, 64)
allowed = os.sched_getaffinity(0)
for processors in (allowed, {min(allowed)}, allowed):
    os.sched_setaffinity(0, processors)
    ce.mine(plan, queries, bank, backend="cpu")
    assert os.sched_getaffinity(0) == processors
    assert all(os.sched_getaffinity(int(task)) <= allowed for task in os.listdir("/proc/self/task"))
print("stayed")
""",
        OMP_NUM_THREADS="2",
    )
    assert done.stdout.strip() == "stayed", done.stderr


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("family", ["outlier", "scales", "near_tie", "common_mean"])
@pytest.mark.parametrize("text", ["a:9", "a:40%,a:9"])
def test_extreme_widths(name, family, text):
    plan = ce.CascadePlan.parse(text)
    for dim in (1, 4096):
        rng = np.random.default_rng(23)
        bank = ce.Bank({"a": FAMILIES[family](rng, 700, dim)})
        queries = {"a": FAMILIES[family](rng, 16, dim)}
        want = ce.mine(plan, queries, bank, backend="reference")
        with isa(name):
            found = ce.mine(plan, queries, bank, backend="cpu")
        np.testing.assert_array_equal(found.index, want.index)
        np.testing.assert_array_equal(found.similarity, want.similarity)


def test_the_oracle_rounds_to_bfloat16_as_arrays_do():
    bits = np.random.default_rng(0).integers(0, 0x7F7F0000, 4000, dtype=np.uint32)
    bits[:2000] %= 0x01000000  # subnormal, or nearly so
    for value in bits.view(np.float32):
        assert oracle.bfloat16(float(value)) == float(value.astype(ml_dtypes.bfloat16)), value
