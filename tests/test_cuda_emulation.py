"""The CUDA kernels, executed on the CPU, against the same oracle as every backend: equal, no row left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import emulated
import numpy as np
import oracle
import pytest
from inputs import DTYPES, FAMILIES

import cascade_engine as ce
from cascade_engine.errors import BackendUnavailable, InvalidInput
from cascade_engine.kernels import cuda

SCHEDULES = {"forward": 0, "reversed": 1, "random": 7}
PLANS = (
    "a:1",
    "a:100%",
    "a:5",
    "a:50%,b:25%,a:12.5%,b:6%,a:5",
    "a:prev50%,b:prev50%,a:prev90%",
    "a:30,b:30@bank",
    "a:30,b:22@bank,a:20@bank,b:3",
    "sum(a,b):40%,min(b,a):20%,max(a,b):7",
    "b:60%,zsum(a,b):9",
    "a:50%,rrf(a,b):9",
    "rrf(b,a):80%,a:40@bank,b:7",
)


@pytest.fixture(scope="module")
def native():
    return emulated.emulated()


def stages_of(plan: ce.CascadePlan, keys: int) -> list[oracle.Stage]:
    counts = plan.counts(keys)
    return [
        (stage.score.fusion, stage.score.views, count, stage.over_bank)
        for stage, count in zip(plan.stages, counts, strict=True)
    ]


def exclusion(rng: np.random.Generator, kind: str, b: int, k: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arguments of `emulated.mine`, and the mask that they mean."""
    video, query_video = rng.integers(0, max(1, k // 4), k), rng.integers(0, max(1, k // 4), b)
    if kind == "video":
        return {"video": video, "query_video": query_video}, query_video[:, None] == video[None]
    if kind == "none":
        return {}, np.zeros((b, k), bool)
    mask = rng.random((b, k)) < {"mask": 0.5, "nearly all": 0.97, "all": 2.0}[kind]
    return {"mask": mask}, mask


def assert_equal(found, index, similarity, kept, *, trace: bool) -> None:
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.similarity, similarity)
    if trace:
        for mine, want in zip(found.kept, kept, strict=True):
            np.testing.assert_array_equal(mine, want)


def check_problem(native, seed: int, *, trace: bool, plan: str | None = None, most_keys: int = 97) -> None:
    rng = np.random.default_rng(seed)
    plan = ce.CascadePlan.parse(plan or PLANS[rng.integers(len(PLANS))])
    b, k = int(rng.integers(1, 4)), int(rng.choice([1, 2, 5, 31, 64, most_keys]))
    family = FAMILIES[list(FAMILIES)[rng.integers(len(FAMILIES))]]
    dtype = DTYPES[list(DTYPES)[rng.integers(len(DTYPES))]]
    dims = {view: int(rng.choice([1, 2, 7, 8, 16, 19, 33, 70])) for view in ("a", "b")}
    with np.errstate(over="ignore"):
        both = {view: family(rng, k + b, dim).astype(dtype) for view, dim in dims.items() if view in plan.views}
    both = {view: np.where(np.isfinite(x), x, 0).astype(dtype) for view, x in both.items()}
    keys, queries = {v: x[:k] for v, x in both.items()}, {v: x[k:] for v, x in both.items()}
    metric = str(rng.choice(["ip", "cosine", "l2"]))
    kind = str(rng.choice(["none", "video", "mask", "nearly all", "all"]))
    arguments, mask = exclusion(rng, kind, b, k)
    want = oracle.mine(stages_of(plan, k), queries, keys, mask, metric)
    limit = int(rng.choice([1, 1 << 30]))
    found = emulated.mine(native, plan, queries, keys, **arguments, metric=metric, trace=trace, workspace_limit=limit)
    assert_equal(found, *want, trace=trace)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("trace", [False, True])
def test_emulated_mine_equals_the_oracle(native, schedule, trace):
    emulated.schedule(native, SCHEDULES[schedule])
    for seed in range(25):
        check_problem(native, 1000 * SCHEDULES[schedule] + seed, trace=trace)


@pytest.mark.parametrize("plan", PLANS)
def test_emulated_mine_runs_every_kind_of_plan(native, plan):
    emulated.schedule(native, 11)
    for seed in range(3):
        check_problem(native, 5000 + seed, trace=seed == 0, plan=plan)


def aligned(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Multiples of one direction, a little apart: rounding errors all point the same way, as the bound allows."""
    return np.repeat(1 + 1e-3 * rng.random((rows, 1)), dim, axis=1).astype(np.float32)


def exact_halves(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Numbers that halves hold exactly, sums close together: only the tensor cores' own error is left to bound."""
    return (1 + rng.integers(0, 8, (rows, dim)) / 1024).astype(np.float32)


# plan, B, K, D, family, split_keys
REGIMES = {
    "several query tiles": ("a:50%,b:25%,a:5", 70, 300, 40, FAMILIES["separated"], 1 << 15),
    "aligned errors": ("a:50%,b:25%,a:12%,b:5", 3, 900, 64, aligned, 1 << 15),
    "aligned, fused": ("sum(a,b):50%,min(a,b):25%,max(a,b):12%,sum(b,a):5", 3, 900, 64, aligned, 1 << 15),
    "exact halves": ("a:50%,a:25%,a:5", 2, 600, 512, exact_halves, 1 << 15),
    "near ties": ("a:50%,b:25%,a:9", 3, 1500, 48, FAMILIES["near_tie"], 1 << 15),
    "more ties than a block holds": ("a:60%,b:40%,a:7", 2, 2600, 17, FAMILIES["constant"], 1 << 15),
    "narrow tiles": ("a:50%,b:5", 20, 200, 600, FAMILIES["separated"], 1 << 15),
    "wider than tiles": ("a:50%,b:5", 2, 90, 2100, FAMILIES["separated"], 1 << 15),
    "splits": ("a:20,b:15,a:5", 3, 3000, 24, FAMILIES["duplicates"], 700),
    "splits of ties": ("a:20,b:5", 2, 2600, 24, FAMILIES["constant"], 700),
    "splits of a fused score": ("min(b,a):20,b:5", 2, 2000, 24, FAMILIES["positive"], 300),
    "k beyond shared memory": ("a:2300", 2, 2600, 9, FAMILIES["lattice"], 1 << 15),
    "k = K": ("a:50%,b:100%,a:100%", 2, 2100, 9, FAMILIES["separated"], 1 << 15),
}


BLOCKS = {"ip": 1, "cosine": 3, "l2": 528}  # that share the tiles of keys: several for each, or one


@pytest.mark.parametrize("metric", BLOCKS)
@pytest.mark.parametrize("regime", REGIMES)
def test_emulated_mine_equals_the_reference_in_every_regime(native, regime, metric):
    text, b, k, dim, family, split_keys = REGIMES[regime]
    rng = np.random.default_rng(len(regime))
    emulated.schedule(native, 2 + len(regime))
    plan = ce.CascadePlan.parse(text)
    both = {view: family(rng, k + b, dim) for view in plan.views}
    keys, queries = {v: x[:k] for v, x in both.items()}, {v: x[k:] for v, x in both.items()}
    video, query_video = rng.integers(0, k // 3, k), rng.integers(0, k // 3, b)
    want = ce.mine(plan, queries, ce.Bank(keys, video, metric=metric), query_video, backend="reference")
    found = emulated.mine(
        native, plan, queries, keys, video=video, query_video=query_video, metric=metric, split_keys=split_keys,
        blocks=BLOCKS[metric],
    )  # fmt: skip
    np.testing.assert_array_equal(found.index, want.index)
    np.testing.assert_array_equal(found.similarity, want.similarity)


@pytest.mark.parametrize("text", ["min(a,b):50%", "max(b,a):50%", "sum(a,b):50%,a:5"])
def test_emulated_views_are_compared_by_the_lengths_that_the_contract_sums(native, text):
    """Far from all keys, as float64 has it, two views' squared lengths are equal whose difference decides in truth."""
    emulated.schedule(native, 0, perturb=False)
    rng, plan = np.random.default_rng(0), ce.CascadePlan.parse(text)
    a, b = np.zeros((2, 2, 2048), np.float32)
    a[:, :8] = b[:, :8] = 1
    a[:, 8:] = 1.4 * 2.0**-27  # each square is lost in a sum that holds 1
    keys = {view: np.zeros((300, 2048), np.float32) for view in "ab"}
    for x in keys.values():
        x[:, :16] = 1e-12 * rng.integers(-8, 9, (300, 16)) / 8
    queries = {"a": a, "b": b}
    want = ce.mine(plan, queries, ce.Bank(keys, metric="l2"), backend="reference")
    found = emulated.mine(native, plan, queries, keys, metric="l2")
    np.testing.assert_array_equal(found.index, want.index)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40))
def test_emulated_mine_under_many_schedules(native, seed):
    emulated.schedule(native, seed)
    for problem in range(40):
        check_problem(native, 100_000 + 100 * seed + problem, trace=problem % 3 == 0, most_keys=150)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_emulated_kernels_touch_no_memory_but_their_own(tmp_path):
    # With libstdc++, which the interpreter lacks at its start: the sanitizer looks for the real __cxa_throw then.
    preloaded = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:log_path={tmp_path / 'report'}",
        "CASCADE_EMULATED_FLAGS": "-O1 -fsanitize=address",
    }
    modules = [str(Path(__file__).with_name(f"test_cuda_{name}.py")) for name in ("emulation", "contrast", "push")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not full", "-k", "emulated", *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    reports = "".join(each.read_text()[:3000] for each in tmp_path.iterdir())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + reports


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_emulated_select_equals_the_oracle(native, kind):
    rng = np.random.default_rng(3)
    emulated.schedule(native, 5)
    for text in PLANS:
        plan = ce.CascadePlan.parse(text)
        scores = {view: rng.integers(-9, 9, (3, 83)).astype(kind) / 7 for view in ("a", "b")}
        scores["b"][0] = -0.0
        mask = rng.random((3, 83)) < 0.3
        rows = [{view: [float(s) for s in x[b]] for view, x in scores.items()} for b in range(3)]
        want = oracle.select(stages_of(plan, 83), rows, mask)
        assert_equal(emulated.select(native, plan, scores, mask, trace=True), *want, trace=True)


def test_emulated_mine_of_nothing_is_empty(native):
    plan = ce.CascadePlan.parse("a:3")
    none = emulated.mine(native, plan, {"a": np.zeros((0, 4), np.float32)}, {"a": np.ones((5, 4), np.float32)})
    assert none.index.shape == (0, 3)
    empty = emulated.mine(native, plan, {"a": np.ones((2, 4), np.float32)}, {"a": np.zeros((0, 4), np.float32)})
    assert empty.index.shape == (2, 0)


def test_emulated_backend_refuses_what_a_launch_cannot_carry(native):
    rng = np.random.default_rng(0)
    x = {"a": rng.standard_normal((4, 3)).astype(np.float32)}
    emulated.reset_counters(native)
    with pytest.raises(BackendUnavailable, match="at most 8 views and 32 stages, got 1 and 33"):
        emulated.mine(native, ce.CascadePlan.parse(",".join(["a:2"] * 33)), x, x)
    with pytest.raises(InvalidInput, match=r'queries."a".: expected float32, float16 or bfloat16, got float64'):
        emulated.mine(native, ce.CascadePlan.parse("a:2"), {"a": x["a"].astype(np.float64)}, x)
    assert emulated.counters(native)["launches"] == 0


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("text", ["a:50%,a:5", "min(a,b):20,rrf(a,b):5", "zsum(a,b):5"])
def test_emulated_queries_that_are_not_finite_spoil_their_own_row_alone(native, text, metric):
    emulated.schedule(native, 0)
    rng, plan = np.random.default_rng(0), ce.CascadePlan.parse(text)
    keys = {view: rng.standard_normal((300, 16)).astype(np.float32) for view in "ab"}
    queries = {view: rng.standard_normal((4, 16)).astype(np.float32) for view in "ab"}
    want = ce.mine(plan, queries, ce.Bank(keys, metric=metric), backend="reference")
    queries["a"][1], queries["a"][2, 3] = np.nan, -np.inf
    found = emulated.mine(native, plan, queries, keys, metric=metric)
    np.testing.assert_array_equal(found.index[[0, 3]], want.index[[0, 3]])
    keys["a"][3:9], keys["a"][9, 2] = np.nan, np.inf
    bank = ce.Bank({view: emulated.tensor(x) for view, x in keys.items()}, metric=metric, checked=True)
    for index in (found.index, emulated.mine_bank(native, plan, queries, bank).index):
        assert ((index >= 0) & (index < 300)).all()
        assert all(len(set(row)) == 5 for row in index.tolist())


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_emulated_queue_packs_only_what_a_push_brought(native, metric):
    rng = np.random.default_rng(4)
    emulated.schedule(native, 6)
    plan = ce.CascadePlan.parse("a:50%,a:7")
    queue = ce.KeyQueue(90, {"a": 20}, metric=metric)
    queries = {"a": rng.standard_normal((2, 20)).astype(np.float32)}
    for step, (rows, size) in enumerate([(90, 1), (17, 1), (80, 1e-3), (9, 300), (200, 1)]):  # 300: longer than any
        rows_pushed = (size * rng.standard_normal((rows, 20))).astype(np.float32)
        queue.push({"a": emulated.tensor(rows_pushed)}, np.arange(rows))
        bank = queue.bank()
        emulated.reset_counters(native)
        found = emulated.mine_bank(native, plan, queries, bank)
        want = ce.mine(plan, queries, ce.Bank({"a": bank.host_keys("a")}, metric=metric), backend="reference")
        np.testing.assert_array_equal(found.index, want.index)
        np.testing.assert_array_equal(found.similarity, want.similarity)
        wraps = step == 2  # from slots before the end of the ring to others after its start
        packing = (1 if metric == "cosine" else 2) if step == 0 else 1 + wraps
        assert emulated.counters(native)["launches"] == 2 + packing


@pytest.mark.parametrize(("bounds", "blocks"), [(True, 1), (False, 2)])
def test_emulated_waves_take_every_query_once(native, bounds, blocks):
    emulated.schedule(native, 3)
    rng = np.random.default_rng(0)
    plan, keys = ce.CascadePlan.parse("a:3"), rng.standard_normal((40, 8)).astype(np.float32)
    queries = rng.standard_normal((5, 8)).astype(np.float32)
    sizes, run = [], cuda.run
    with patch.object(cuda, "run", lambda problem, device: (sizes.append(problem.workspace()), run(problem, device))):
        emulated.mine(native, plan, {"a": queries[:1]}, {"a": keys}, bounds=bounds)
    bank = ce.Bank({"a": emulated.tensor(keys)})
    emulated.mine_bank(native, plan, {"a": queries}, bank, bounds=bounds)  # prepares the bank
    emulated.reset_counters(native)
    found = emulated.mine_bank(native, plan, {"a": queries}, bank, bounds=bounds, workspace_limit=2 * sizes[0])
    counted = emulated.counters(native)
    assert (counted["launches"], counted["blocks"]) == (3 * 2, 3 * blocks + 5)  # two, two and one query
    want = ce.mine(plan, {"a": queries}, ce.Bank({"a": keys}), backend="reference")
    np.testing.assert_array_equal(found.index, want.index)


@pytest.mark.parametrize(
    ("kib", "dim", "bounded"),
    [(64, 224, True), (64, 225, True), (64, 992, True), (64, 993, False), (99, 2048, True), (99, 2049, False)],
)
def test_emulated_views_too_wide_for_a_devices_bounds_are_scored_and_not_packed(native, kib, dim, bounded):
    emulated.schedule(native, 0)
    rng, plan = np.random.default_rng(dim), ce.CascadePlan.parse("a:50%,b:3")
    keys = {"a": FAMILIES["separated"](rng, 40, dim), "b": FAMILIES["separated"](rng, 40, 9)}
    queries = {view: x[:3] for view, x in keys.items()}
    emulated.reset_counters(native)
    with emulated.shared_limit(native, kib * 1024):
        found = emulated.mine(native, plan, queries, keys)
    assert emulated.phases(native) == ["pack"] * 4 * bounded + ["score", "select"]
    want = ce.mine(plan, queries, ce.Bank(keys), backend="reference")
    np.testing.assert_array_equal(found.index, want.index)


@pytest.mark.parametrize(("split_keys", "launches"), [(1 << 15, 2), (50, 3)])
def test_emulated_mine_takes_few_launches(native, split_keys, launches):
    rng = np.random.default_rng(0)
    bank = ce.Bank({v: emulated.tensor(rng.standard_normal((300, 40)).astype(np.float32)) for v in ("a", "b")})
    queries = {v: rng.standard_normal((5, 40)).astype(np.float32) for v in ("a", "b")}
    plan = ce.CascadePlan.parse("a:20,b:10,a:5")
    emulated.mine_bank(native, plan, queries, bank, split_keys=split_keys)  # prepares the bank
    emulated.reset_counters(native)
    emulated.mine_bank(native, plan, queries, bank, split_keys=split_keys)
    assert emulated.counters(native)["launches"] == launches
