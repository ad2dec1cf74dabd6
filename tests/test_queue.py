"""The key queue against a model: a list that keeps the newest keys."""

import copy
import itertools
import math
import pickle
import sys
from functools import partial

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import cascade_engine as ce
from cascade_engine import bank as banks
from cascade_engine import queue as queues
from cascade_engine.errors import InvalidInput, StaleBank
from cascade_engine.tensor import like

DIMS = {"rgb": 3, "flow": 2}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FRAMEWORKS = ("numpy", "torch")


def rows(numbers, width, dtype, framework):
    """Features that say which key they belong to, exact in every type."""
    x = np.stack([np.asarray(numbers) % 128 + 0.0, np.asarray(numbers) // 128 + 0.0, np.full(len(numbers), 0.5)], 1)
    x = x.reshape(len(numbers), 3)[:, :width]
    if framework == "torch":
        return torch.tensor(x, dtype=getattr(torch, dtype))
    return x.astype(NUMPY[dtype])


def number_of(matrix):
    x = np.asarray(torch.as_tensor(matrix).float() if isinstance(matrix, torch.Tensor) else matrix, np.float64)
    return (x[:, 0] + 128 * x[:, 1]).astype(int).tolist()


class QueueMachine(RuleBasedStateMachine):
    """Slots, order and staleness follow from the numbers of the keys pushed."""

    @initialize(size=st.integers(1, 12), dtype=st.sampled_from(sorted(NUMPY)), device=st.sampled_from([None, "cpu"]))
    def start(self, size, dtype, device):
        self.size, self.dtype, self.device = size, dtype, device
        self.queue = ce.KeyQueue(size, DIMS, dtype=dtype, device=device)
        self.total = 0
        self.slots = {}  # slot -> number of the key in it
        self.snapshots = []  # (bank, slot -> number when it was taken, made before a state was loaded)

    @rule(count=st.integers(0, 30), kind=st.sampled_from(sorted(NUMPY)), framework=st.sampled_from(FRAMEWORKS))
    def push(self, count, kind, framework):
        numbers = list(range(self.total, self.total + count))
        ids = np.array(numbers, np.int64) * 10
        self.queue.push(
            {view: rows(numbers, width, kind, framework) for view, width in DIMS.items()},
            torch.from_numpy(ids) if framework == "torch" else ids,
            clip_id=ids + 1,
        )
        self.total += count
        for number in numbers:
            self.slots[number % self.size] = number

    @rule(bad=st.sampled_from(["nan", "views", "width", "rows", "ids", "type"]))
    def refuse(self, bad):
        good = {view: rows([1, 2], width, "float32", "numpy") for view, width in DIMS.items()}
        ids = [1, 2]
        if bad == "nan":
            good["flow"][1, 0] = np.nan
        elif bad == "views":
            del good["flow"]
        elif bad == "width":
            good["flow"] = good["flow"][:, :1]
        elif bad == "rows":
            good["flow"] = good["flow"][:1]
        elif bad == "ids":
            ids = [1]
        else:
            good["flow"] = good["flow"].astype(np.float64)
        with pytest.raises(InvalidInput):
            self.queue.push(good, ids)

    @rule()
    def snapshot(self):
        self.snapshots.append((self.queue.bank(), dict(self.slots)))

    @rule(framework=st.sampled_from(FRAMEWORKS), same=st.booleans())
    def round_trip(self, framework, same):
        state = self.queue.state_dict()
        if same:
            self.snapshots = [(bank, None if taken else taken) for bank, taken in self.snapshots]
        else:
            self.queue = ce.KeyQueue(self.size, DIMS, dtype=self.dtype, device="cpu" if framework == "torch" else None)
            self.queue.push({v: rows([7], w, "float32", framework) for v, w in DIMS.items()}, [70])
            self.snapshots = []
        self.queue.load_state_dict(state)

    @invariant()
    def shows_the_newest(self):
        bank = self.queue.bank()
        expected = [self.slots[slot] for slot in range(len(self.slots))]
        assert sorted(expected) == list(range(max(0, self.total - self.size), self.total))
        assert len(bank) == len(expected) == self.queue.filled
        assert number_of(bank.keys["rgb"]) == expected
        assert number_of(bank.keys["flow"]) == expected
        assert np.asarray(bank.video_id).tolist() == [10 * number for number in expected]
        assert np.asarray(bank.clip_id).tolist() == [10 * number + 1 for number in expected]
        assert np.asarray(bank.label).tolist() == [-1] * len(expected)

    @precondition(lambda self: self.snapshots)
    @invariant()
    def snapshots_are_stale_exactly_when_overwritten(self):
        for bank, taken in self.snapshots:
            overwritten = taken is None or any(self.slots[slot] != number for slot, number in taken.items())
            if overwritten:
                with pytest.raises(StaleBank):
                    bank.ensure_fresh()
            else:
                bank.ensure_fresh()
                assert number_of(bank.keys["rgb"]) == [taken[slot] for slot in range(len(taken))]


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestQueue = QueueMachine.TestCase


def one(**changes):
    return {view: np.ones((2, width), np.float32) for view, width in DIMS.items()} | changes


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_rounds_to_infinity_is_refused_and_nothing_changes(framework):
    queue = ce.KeyQueue(4, DIMS, dtype="float16", device="cpu" if framework == "torch" else None)
    queue.push(one(), [1, 2])
    large = np.ones((2, 2), np.float32)
    large[1, 0] = 1e6
    with pytest.raises(InvalidInput, match=r'keys\["flow"\] as float16.*row 1'):
        queue.push(one(flow=torch.from_numpy(large) if framework == "torch" else large), [3, 4])
    assert queue.filled == 2
    assert np.asarray(queue.bank().video_id).tolist() == [1, 2]


def test_a_stale_bank_refuses_to_be_mined():
    queue = ce.KeyQueue(2, DIMS)
    queue.push(one(), [1, 2])
    bank = queue.bank()
    queue.push(one(), [3, 4])
    with pytest.raises(StaleBank, match=r"queue.bank\(\)"):
        ce.mine(ce.CascadePlan.parse("rgb:1"), {"rgb": np.ones((1, 3), np.float32)}, bank)


def test_a_bank_taken_before_the_first_push_does_not_decide_the_framework():
    queue = ce.KeyQueue(4, DIMS)
    assert len(queue.bank()) == 0
    queue.push({view: torch.ones(2, width) for view, width in DIMS.items()}, torch.tensor([1, 2]))
    assert isinstance(queue.bank().keys["rgb"], torch.Tensor)


def test_gradients_do_not_enter_the_queue():
    queue = ce.KeyQueue(4, {"rgb": 3})
    queue.push({"rgb": torch.ones(2, 3, requires_grad=True)}, [1, 2])
    assert not queue.bank().keys["rgb"].requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0, "dims": DIMS}, "size and widths of at least 1"),
        ({"size": 3, "dims": {}}, "size and widths of at least 1"),
        ({"size": 3, "dims": {"rgb": 0}}, "size and widths of at least 1"),
        ({"size": 3, "dims": DIMS, "dtype": "float64"}, "dtype: expected one of"),
        ({"size": 3, "dims": {"label": 4}}, "view names other than"),
    ],
)
def test_bad_queues_are_refused(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        ce.KeyQueue(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 5},
        {"dims": {"rgb": 3}},
        {"dtype": "float16"},
        {"storage": {}},
        {"storage": None},
        {"cursor": None},
        {"cursor": 7},
        {"cursor": 1.0},
        {"cursor": 3},
        {"filled": 99},
        {"filled": -1},
        {"pushed": None},
    ],
)
def test_a_state_of_another_queue_is_refused_and_nothing_changes(change):
    queue = ce.KeyQueue(4, DIMS)
    queue.push(one(), [1, 2])
    state = queue.state_dict() | change
    if state["storage"] is None:
        state["storage"] = {"rgb": np.zeros((4, 3), np.float32), "flow": np.zeros((9, 2), np.float32)}
    other = ce.KeyQueue(4, DIMS)
    other.push({view: 9 + keys for view, keys in one().items()}, [3, 4])
    shown = other.bank()
    before = {view: keys.copy() for view, keys in shown.keys.items()}
    with pytest.raises(InvalidInput, match="expected"):
        other.load_state_dict(state)
    shown.ensure_fresh()
    assert all((shown.keys[view] == keys).all() for view, keys in before.items())


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_queues_and_banks_are_copied_with_keys_of_their_own(framework, again):
    queue = ce.KeyQueue(4, DIMS, device="cpu" if framework == "torch" else None)
    push = {view: rows(range(4), width, "float32", framework) for view, width in DIMS.items()}
    queue.push(push, [1, 2, 3, 4])
    plan, queries = ce.CascadePlan.parse("rgb:2"), {"rgb": push["rgb"]}
    shown = queue.bank()
    want = np.asarray(ce.mine(plan, queries, shown, backend="cpu").index)  # prepares what cannot be copied
    other, bank = again(queue), again(shown)
    other.push({view: keys[:1] + 50 for view, keys in push.items()}, [9])
    shown.ensure_fresh()
    queue.push({view: keys[:1] + 50 for view, keys in push.items()}, [9])
    with pytest.raises(StaleBank):
        shown.ensure_fresh()
    with pytest.raises(StaleBank):
        again(shown)
    with pytest.raises(StaleBank):
        copy.copy(shown).ensure_fresh()
    assert (np.asarray(ce.mine(plan, queries, bank, backend="cpu").index) == want).all()
    assert number_of(other.bank().keys["rgb"]) == number_of(queue.bank().keys["rgb"])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_queue_takes_its_own_keys_again(framework):
    queue = ce.KeyQueue(5, DIMS, device="cpu" if framework == "torch" else None)
    queue.push({view: rows(range(8), width, "float32", framework) for view, width in DIMS.items()}, list(range(8)))
    shown = number_of(queue.bank().keys["rgb"])
    queue.push(dict(queue.bank().keys), list(range(5)))  # from the cursor on, around the end
    again = number_of(queue.bank().keys["rgb"])
    assert queue.cursor != 0
    assert again == np.roll(shown, queue.cursor).tolist()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_queue_takes_one_views_keys_for_the_others(framework):
    queue = ce.KeyQueue(6, {"rgb": 3, "flow": 3}, device="cpu" if framework == "torch" else None)
    queue.push({v: rows(range(n, n + 6), 3, "float32", framework) for v, n in (("rgb", 0), ("flow", 50))}, range(6))
    shown = queue.bank().keys
    queue.push({"rgb": shown["flow"][2:], "flow": shown["rgb"][2:]}, range(4))
    assert number_of(queue.bank().keys["rgb"]) == [52, 53, 54, 55, 4, 5]
    assert number_of(queue.bank().keys["flow"]) == [2, 3, 4, 5, 54, 55]


def test_ids_of_another_device_are_refused_and_taken_as_those_of_the_cpu_are():
    """torch's device without memory stands for a GPU."""
    keys = {"rgb": torch.ones(4, 3, device="meta")}
    queue = ce.KeyQueue(6, {"rgb": 3}, device="meta")
    for ids in (range(4), np.arange(4), torch.arange(4), torch.arange(4, device="meta", dtype=torch.int32)):
        queue.push(keys, ids)  # around the end, too
    for kind in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(InvalidInput, match=r"video_id: expected \(4,\) integers, got \(4,\)"):
            queue.push(keys, torch.ones(4, device="meta", dtype=kind))
    with pytest.raises(InvalidInput, match=r"label: expected \(4,\) integers, got \(3,\)"):
        queue.push(keys, range(4), label=torch.ones(3, device="meta", dtype=torch.int64))
    assert queue.pushed == 16


def test_a_push_without_video_ids_is_refused():
    with pytest.raises(InvalidInput, match="video_id"):
        ce.KeyQueue(4, DIMS).push(one(), None)


def test_a_large_ring_of_many_batches():
    queue = ce.KeyQueue(1000, {"rgb": 3})
    for start in range(0, 5000, 37):
        numbers = list(range(start, start + 37))
        queue.push({"rgb": rows(numbers, 3, "float32", "numpy")}, numbers)
    newest = set(range(queue.pushed - 1000, queue.pushed))
    assert set(np.asarray(queue.bank().video_id).tolist()) == newest
    assert set(number_of(queue.bank().keys["rgb"])) == newest


@pytest.mark.parametrize("dtype", sorted(NUMPY))
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_normalised_keys_have_the_length_that_the_contract_sums(framework, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((9, 21)) * 10.0 ** rng.integers(-3, 3, (9, 1))).astype(NUMPY[dtype])
    x[4] = 0
    queue = ce.KeyQueue(9, {"rgb": 21}, normalise=True)
    queue.push({"rgb": like(x, torch.empty(0)) if framework == "torch" else x}, range(9))
    for got, row in zip(np.asarray(queue.bank().keys["rgb"]), x.astype(np.float64), strict=True):
        length = math.sqrt(oracle.dot(row.tolist(), row.tolist())) or 1.0
        assert got.tolist() == [float(np.float32(value / length)) for value in row]


def test_a_push_tells_autograd_that_the_keys_changed():
    queue = ce.KeyQueue(4, {"x": 3}, device="cpu")
    queue.push({"x": torch.eye(4, 3)}, np.arange(4))
    query = torch.ones(2, 3, requires_grad=True)
    scores = (query @ queue.bank().keys["x"].T).sum()
    queue.push({"x": torch.ones(1, 3)}, np.arange(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.backward()


def is_interrupted(call, after):
    """Makes a call, raising KeyboardInterrupt `after` lines of queue.py and bank.py; whether it got so far."""
    files, lines = {queues.__file__, banks.__file__}, itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and next(lines) == after:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("change", ["push", "load_state_dict"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_an_interrupted_change_leaves_no_answers_of_keys_that_are_gone(change, metric):
    rng, plan, size = np.random.default_rng(0), ce.CascadePlan.parse("rgb:50%,rgb:5"), 520

    def batch(count, scale=1):
        return {"rgb": (scale * rng.standard_normal((count, 8))).astype(np.float32)}, np.arange(count)

    first, second, third, queries = batch(size + 9), batch(size - 1, 3), batch(20), batch(16)[0]

    def assert_right(bank):
        found = ce.mine(plan, queries, bank, backend="cpu")
        want = ce.mine(
            plan, queries, ce.Bank({"rgb": bank.host_keys("rgb").copy()}, metric=metric), backend="reference"
        )
        assert (found.index == want.index).all()

    other = ce.KeyQueue(size, {"rgb": 8}, metric=metric)
    other.push(*second)
    other.push(*third)
    state = other.state_dict()
    for after in itertools.count():
        queue = ce.KeyQueue(size, {"rgb": 8}, metric=metric)
        queue.push(*first)
        shown = queue.bank()
        assert_right(shown)  # prepares it
        call = partial(queue.push, *second) if change == "push" else partial(queue.load_state_dict, state)
        interrupted = is_interrupted(call, after)
        try:
            assert_right(shown)
        except StaleBank:
            pass
        else:
            assert (shown.host_keys("rgb")[9:] == first[0]["rgb"][9:size]).all()
        assert_right(queue.bank())
        queue.push(*third)
        assert_right(queue.bank())
        if not interrupted:
            break
    assert after > 20
