"""A key queue's push as one launch, executed on the CPU: every bit as the plain push and a packing apart write it."""

from __future__ import annotations

import math

import emulated
import numpy as np
import pytest
import torch
from inputs import DTYPES, separated
from test_loss import gradients

import cascade_engine as ce
from cascade_engine import loss as losses
from cascade_engine.errors import CudaError, StaleBank

DIMS = {"a": 1, "b": 33, "c": 70, "d": 8}
SIZE = 41
BATCHES = (5, 30, 12, 0, 41, 1, 100, 7)  # filling, wrapping, none, all, more than the ring holds
SCHEDULES = [0, 1, 7]


@pytest.fixture(scope="module")
def native():
    return emulated.emulated()


def batch(rng: np.random.Generator, rows: int, dims: dict[str, int], dtype: str) -> dict[str, torch.Tensor]:
    """Keys of several lengths, of zeros, and so small that they are denormal; every other view's rows are strided."""
    made = {}
    for number, (view, dim) in enumerate(dims.items()):
        x = separated(rng, rows, dim) * rng.choice([1, 1e-3, 100], (rows, 1))
        x[rng.random(rows) < 0.1] = 0
        x[rng.random(rows) < 0.1] *= 1e-6 if dtype == "float16" else 1e-40
        whole = emulated.tensor(np.repeat(x, 1 + number % 2, axis=1).astype(DTYPES[dtype]))
        made[view] = whole[:, :dim]
    return made


def bits(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same(mine: ce.KeyQueue, plain: ce.KeyQueue) -> None:
    assert (mine.filled, mine.cursor, mine.pushed) == (plain.filled, plain.cursor, plain.pushed)
    for name, values in mine.state_dict()["storage"].items():
        assert bits(values) == bits(plain.state_dict()["storage"][name]), name


@pytest.mark.parametrize(("schedule", "given"), [(0, "float16"), (1, "bfloat16"), (7, "float32")])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("normalise", [False, True])
def test_emulated_push_writes_the_bits_of_the_plain_push(native, schedule, stored, given, normalise):
    emulated.schedule(native, schedule)
    rng = np.random.default_rng(schedule)
    mine, plain = (ce.KeyQueue(SIZE, DIMS, dtype=stored, device="cpu", normalise=normalise) for _ in range(2))
    for step, rows in enumerate(BATCHES):
        keys = batch(rng, rows, DIMS, given)
        video = torch.arange(rows) + 1000 * step
        columns = {"clip_id": video.int() + 1, "label": video.numpy() % 7} if step % 2 else {}
        emulated.reset_counters(native)
        emulated.push(native, mine, keys, video, **columns)
        assert emulated.counters(native)["launches"] == (rows > 0)
        plain.push(keys, video, **columns)
        assert_same(mine, plain)


def packed_of(queue: ce.KeyQueue, view: str) -> tuple[bytes, ...]:
    found = queue._prepared.made(("cuda", view))
    return bits(found.halves), bits(found.squares), bits(found.range)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("metric", "stored"), [("ip", "float32"), ("cosine", "bfloat16"), ("l2", "float16")])
def test_emulated_push_packs_what_it_overwrites_as_a_packing_would(native, schedule, metric, stored):
    emulated.schedule(native, schedule)
    rng = np.random.default_rng(10 + schedule)
    plan = ce.CascadePlan.parse("b:50%,c:30%,b:5")  # "a" and "d" are never searched, so never packed
    queries = {view: separated(rng, 2, DIMS[view]) for view in plan.views}
    mine, plain = (ce.KeyQueue(SIZE, DIMS, dtype=stored, device="cpu", metric=metric) for _ in range(2))
    for step, rows in enumerate((41, 9, 40, 41, 130, 3)):
        keys = batch(rng, rows, DIMS, "float32")
        emulated.push(native, mine, keys, np.arange(rows))
        plain.push(keys, np.arange(rows))
        emulated.reset_counters(native)
        found = emulated.mine_bank(native, plan, queries, mine.bank())
        assert emulated.counters(native)["launches"] == 2 or step == 0, "the push has packed what it wrote"
        emulated.mine_bank(native, plan, queries, plain.bank())
        assert_same(mine, plain)
        for view in plan.views:
            assert packed_of(mine, view) == packed_of(plain, view), (step, view)
        host = ce.Bank({view: mine.bank().host_keys(view) for view in plan.views}, metric=metric)
        want = ce.mine(plan, queries, host, backend="reference")
        np.testing.assert_array_equal(found.index, want.index)


def test_emulated_push_takes_a_launch_for_every_eight_views(native):
    emulated.schedule(native, 3)
    rng = np.random.default_rng(0)
    dims = {f"v{number}": 5 + number for number in range(11)}
    mine, plain = (ce.KeyQueue(SIZE, dims, device="cpu") for _ in range(2))
    for _ in range(3):
        keys = batch(rng, 20, dims, "float32")
        emulated.reset_counters(native)
        emulated.push(native, mine, dict(reversed(keys.items())), torch.arange(20))
        assert emulated.counters(native)["launches"] == 2
        plain.push(keys, torch.arange(20))
        assert_same(mine, plain)


def test_emulated_push_rounds_every_float_as_torch_does(native):
    emulated.schedule(native, 0)
    steps = torch.arange(1 << 16, dtype=torch.int32)
    halfway = (steps << 16) + torch.tensor([[-1], [0], [0x7FFF], [0x8000], [0x8001]], dtype=torch.int32)
    floats = halfway.flatten().view(torch.float32)
    floats = floats[floats.abs() < 65519]
    floats = floats[: len(floats) // 64 * 64].view(-1, 64)
    for stored in DTYPES:
        queue = ce.KeyQueue(len(floats), {"x": 64}, dtype=stored, device="cpu")
        emulated.push(native, queue, {"x": floats}, torch.arange(len(floats)))
        assert bits(queue.bank().keys["x"]) == bits(floats.to(getattr(torch, stored)))


def test_emulated_training_step_takes_four_launches(native, monkeypatch):
    """Mining by the published cascade of two views, the loss with its gradients, and the push."""
    monkeypatch.setattr(losses, "nce_now", emulated.loss_operator(native))
    emulated.schedule(native, 4)
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        return {v: torch.nn.functional.normalize(torch.randn(count, 24, generator=generator)) for v in ("rgb", "flow")}

    plan = ce.CascadePlan.preset("cpr", oracle="flow", trainee="rgb", k=5)
    queue = ce.KeyQueue(300, {"rgb": 24, "flow": 24}, device="cpu")
    emulated.push(native, queue, rows(300), torch.arange(300) // 3)
    launches, ranges = [], []
    for step in range(4):
        keys, queries, video = rows(32), rows(32), torch.arange(32) + step
        emulated.reset_counters(native)
        bank = queue.bank()
        given = {view: x.numpy() for view, x in queries.items()}
        found = emulated.mine_bank(native, plan, given, bank, emulated.Exclusion(video_id=video))

        def loss(query, key, bank=bank, found=found, video=video):
            return ce.multi_positive_nce(query, key, bank, found, view="rgb", query_video_id=video)

        gradients(loss, queries["rgb"], keys["rgb"])
        emulated.push(native, queue, keys, video)
        launches.append(emulated.counters(native)["launches"])
        ranges.append(emulated.phases(native))
    assert launches[0] == 8, "the first search packs the ring: two launches a view"
    assert launches[1:] == [4, 4, 4]
    assert ranges[0] == ["pack"] * 4 + ranges[1]
    assert ranges[1] == ["score", "select", "contrast", "push"]


def test_emulated_push_sums_lengths_in_the_contracts_order(native):
    """1 / length lies so near a tie of float32 that the order decides: a sum that holds 1 loses every 2^-54."""
    emulated.schedule(native, 1)
    row = torch.zeros(1, 1608)
    row[0, ::8], row[0, 0], row[0, 1] = 2.0**-27, 1, 2.0**-12
    mine, plain = (ce.KeyQueue(1, {"x": 1608}, device="cpu", normalise=True) for _ in range(2))
    emulated.push(native, mine, {"x": row}, [0])
    plain.push({"x": row}, [0])
    assert_same(mine, plain)
    length = math.sqrt(math.fsum(value * value for value in row[0].tolist()))
    assert mine.bank().keys["x"][0, 0] == 1 != np.float32(1 / length)


def test_emulated_push_divides_by_lengths(native):
    """Pairs, found by continued fractions, whose quotient by their length a product with its reciprocal misses."""
    emulated.schedule(native, 1)
    pairs = [(11304017, 13340865), (8579757, 13402922), (14302471, 2419024), (11706231, 3037949)]
    mine = ce.KeyQueue(4, {"x": 2}, device="cpu", normalise=True)
    emulated.push(native, mine, {"x": torch.tensor(pairs, dtype=torch.float32)}, range(4))
    for got, (x, y) in zip(mine.bank().keys["x"].tolist(), pairs, strict=True):
        length = math.sqrt(x * x + y * y)
        assert got[0] == float(np.float32(x / length)) != float(np.float32(x * (1 / length)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_emulated_push_takes_the_queues_own_keys_again(native, schedule):
    emulated.schedule(native, schedule)
    rng, size = np.random.default_rng(0), 100
    keys = {view: torch.from_numpy(separated(rng, size, 8)) for view in "ab"}
    mine, plain = (ce.KeyQueue(size, {"a": 8, "b": 8}, device="cpu") for _ in range(2))
    for queue, push in ((mine, lambda *batch: emulated.push(native, mine, *batch)), (plain, plain.push)):
        queue.push(keys, torch.arange(size))
        for taken in (slice(5, 45), slice(0, 90)):
            bank = queue.bank()
            a, b = (bank.keys[view][taken] for view in "ab")
            push({"a": a, "b": b}, bank.video_id[taken])
            push({"a": b, "b": a}, bank.video_id[taken])
    assert_same(mine, plain)


class Failing:
    """The native module, whose next call of a given name fails, having done its work or not."""

    def __init__(self, native, *, done):
        self.native, self.done, self.next = native, done, None

    def __getattr__(self, name):
        call = getattr(self.native, name)
        if name != self.next:
            return call
        self.next = None

        def fail(**arguments):
            if self.done:
                call(**arguments)
            raise RuntimeError("a launch failed")

        return fail


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("launch", ["push", "pack"])
def test_emulated_launches_that_fail_leave_no_answers_of_keys_that_are_gone(native, launch, done):
    emulated.schedule(native, 2)
    rng, plan = np.random.default_rng(6), ce.CascadePlan.parse("b:50%,b:5")
    queries = {"b": separated(rng, 4, 33)}
    queue, failing = ce.KeyQueue(SIZE, {"b": 33}, device="cpu"), Failing(native, done=done)

    def assert_right():
        bank = queue.bank()
        found = emulated.mine_bank(failing, plan, queries, bank)
        want = ce.mine(plan, queries, ce.Bank({"b": bank.host_keys("b")}), backend="reference")
        np.testing.assert_array_equal(found.index, want.index)

    queue.push({"b": torch.from_numpy(separated(rng, SIZE, 33))}, torch.arange(SIZE))
    assert_right()  # packs the ring
    shown, other = queue.bank(), {"b": torch.from_numpy(3 * separated(rng, 30, 33))}
    failing.next = launch
    if launch == "push":
        with pytest.raises(CudaError, match="a launch failed"):
            emulated.push(failing, queue, other, torch.arange(30))
        with pytest.raises(StaleBank):
            shown.ensure_fresh()
    else:
        queue.push(other, torch.arange(30))
        with pytest.raises(CudaError, match="a launch failed"):
            assert_right()
    assert_right()
    emulated.push(native, queue, {"b": other["b"][:5]}, torch.arange(5))
    assert_right()


def test_emulated_mine_takes_a_push_of_nothing(native):
    emulated.schedule(native, 0)
    plan, keys = ce.CascadePlan.parse("x:5"), torch.randn(SIZE, 8, generator=torch.Generator().manual_seed(0))
    queue = ce.KeyQueue(SIZE, {"x": 8}, device="cpu")
    queue.push({"x": keys}, torch.arange(SIZE))
    want = emulated.mine_bank(native, plan, {"x": keys[:2].numpy()}, queue.bank()).index
    queue.push({"x": keys[:0]}, torch.arange(0))
    assert torch.equal(emulated.mine_bank(native, plan, {"x": keys[:2].numpy()}, queue.bank()).index, want)
