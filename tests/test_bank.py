"""The bank: what it takes as it is, what it refuses and how, what it keeps."""

import signal
import threading

import ml_dtypes
import numpy as np
import pytest
import torch

import cascade_engine as ce
from cascade_engine.bank import Prepared
from cascade_engine.errors import InvalidInput, StaleBank
from cascade_engine.kernels import cpu

X, Y = np.ones((6, 4), np.float32), np.ones((6, 3), np.float32)


def test_arrays_are_kept_without_a_copy():
    bank = ce.Bank({"rgb": X, "flow": Y}, video_id=np.arange(6))
    assert np.shares_memory(bank.host_keys("rgb"), X)
    tensor = torch.ones(6, 4, dtype=torch.bfloat16)
    held = ce.Bank({"rgb": tensor})
    assert held.keys["rgb"].data_ptr() == tensor.data_ptr()
    assert held.host_keys("rgb").dtype == ml_dtypes.bfloat16
    assert held.host_keys("rgb").ctypes.data == tensor.data_ptr()
    strided = X[:, ::2]
    assert np.shares_memory(ce.Bank({"rgb": strided}).host_keys("rgb"), X)


def test_what_it_says_of_itself():
    bank = ce.Bank({"rgb": X, "flow": torch.ones(6, 3).half()}, metric="cosine")
    assert len(bank) == bank.size == 6
    assert bank.views == ("rgb", "flow")
    assert bank.device == "cpu"
    assert repr(bank) == "Bank(rgb: (6, 4) float32, flow: (6, 3) float16, metric='cosine', device='cpu')"
    assert bank.video_id is None
    assert bank.host_video_id() is None


def test_ids_become_int64_in_their_own_framework():
    for ids in ([5, 4, 3, 2, 1, 0], np.arange(6, dtype=np.uint8), np.arange(6, dtype=np.int32)):
        assert ce.Bank({"rgb": X}, video_id=ids).video_id.dtype == np.int64
    bank = ce.Bank({"rgb": X}, video_id=torch.arange(6, dtype=torch.int32))
    assert bank.video_id.dtype == torch.int64
    assert bank.host_video_id().tolist() == list(range(6))


def test_ids_go_to_the_keys_device():
    """torch's device without memory stands for a GPU."""
    there = torch.ones(6, 4, device="meta")
    for ids in (range(6), np.arange(6), torch.arange(6), torch.arange(6, device="meta", dtype=torch.int32)):
        bank = ce.Bank({"rgb": there}, ids, clip_id=ids, checked=True)
        for found in (bank.video_id, bank.clip_id):
            assert (found.device.type, found.dtype) == ("meta", torch.int64)
    assert isinstance(ce.Bank({"rgb": X}, torch.arange(6)).video_id, torch.Tensor)


def test_gradients_are_left_outside():
    assert not ce.Bank({"rgb": torch.ones(6, 4, requires_grad=True)}).keys["rgb"].requires_grad


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 4096)])
def test_any_size(shape):
    assert len(ce.Bank({"rgb": np.zeros(shape, np.float32)}, video_id=np.zeros(shape[0], int))) == shape[0]


def spoiled(value):
    x = X.copy()
    x[3, 2] = value
    return x


BAD = {
    "no view": (({},), {}, "keys: expected at least one view"),
    "rank": (({"rgb": X[0]},), {}, r'keys\["rgb"\]: expected \(N, D\) float32, float16 or bfloat16, got \(4,\)'),
    "rank 3": (({"rgb": X[None]},), {}, r"got \(1, 6, 4\)"),
    "no width": (({"rgb": X[:, :0]},), {}, r"got \(6, 0\)"),
    "float64": (({"rgb": X.astype(np.float64)},), {}, "got .* float64"),
    "integers": (({"rgb": X.astype(np.int8)},), {}, "got .* int8"),
    "torch float64": (({"rgb": torch.ones(6, 4).double()},), {}, "got .* float64"),
    "words": (({"rgb": [["a", "b"]]},), {}, r'keys\["rgb"\]: expected'),
    "ragged": (({"rgb": [[1.0], [1.0, 2.0]]},), {}, r'keys\["rgb"\]: expected an array'),
    "nothing": (({"rgb": None},), {}, r'keys\["rgb"\]: expected an array of numbers, got NoneType'),
    "unequal K": (({"rgb": X, "flow": Y[:5]},), {}, r'keys\["flow"\]: expected \(6, D\).*got \(5, 3\) float32'),
    "nan": (({"rgb": spoiled(np.nan)},), {}, r'keys\["rgb"\]: expected finite values, got nan in row 3'),
    "inf": (({"rgb": torch.from_numpy(spoiled(-np.inf))},), {}, "got -inf in row 3"),
    "bfloat16 nan": (({"rgb": torch.from_numpy(spoiled(np.nan)).bfloat16()},), {}, "got nan in row 3"),
    "ids short": (({"rgb": X}, [1, 2]), {}, r"video_id: expected \(6,\) integers, got \(2,\)"),
    "ids floats": (({"rgb": X}, np.zeros(6)), {}, "video_id: .*float64"),
    "ids rank": (({"rgb": X}, X.astype(int)), {}, "video_id"),
    "ids words": (({"rgb": X}, list("abcdef")), {}, "video_id"),
    "torch ids": (({"rgb": X}, torch.zeros(6)), {}, r"video_id: expected \(6,\) integers, got \(6,\) float32"),
    "torch bool ids": (({"rgb": X}, torch.zeros(6, dtype=torch.bool)), {}, "video_id: expected"),
    "clip ids": (({"rgb": X},), {"clip_id": [0]}, "clip_id"),
    "metric": (({"rgb": X},), {"metric": "dot"}, "metric: expected one of ip, cosine, l2, got 'dot'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    arguments, options, message = BAD[name]
    with pytest.raises(InvalidInput, match=message):
        ce.Bank(*arguments, **options)


def test_a_row_far_down_is_named():
    x = np.zeros((100_000, 64), np.float32)
    x[77_777, 5] = np.inf
    with pytest.raises(InvalidInput, match="got inf in row 77777"):
        ce.Bank({"rgb": x})
    ce.Bank({"rgb": x}, checked=True)  # the caller vouches for it


def test_a_guard_speaks_before_use():
    def guard():
        raise StaleBank("gone")

    bank = ce.Bank({"rgb": X}, guard=guard)
    with pytest.raises(StaleBank, match="gone"):
        bank.ensure_fresh()


def test_a_preparation_is_made_once_by_many_threads():
    bank, made = ce.Bank({"rgb": X}), []

    def prepare():
        bank.prepared(("packed", "rgb"), lambda: made.append(1) or len(made))

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert bank.prepared(("packed", "rgb"), lambda: 2) == 1
    assert bank.prepared(("packed", "flow"), lambda: 2) == 2


def test_a_preparation_that_fails_leaves_nothing():
    bank = ce.Bank({"rgb": X})
    with pytest.raises(ZeroDivisionError):
        bank.prepared("x", lambda: 1 / 0)
    assert bank.prepared("x", lambda: 7) == 7


class Followed:
    """Something prepared that notes what it is brought up to date with; `meanwhile` runs within an update."""

    def __init__(self, meanwhile=lambda: None):
        self.updates, self.meanwhile = [], meanwhile

    def update(self, first, count):
        self.meanwhile()
        self.updates.append((first, count))


def test_an_update_that_fails_is_made_up_for():
    def fail():
        raise MemoryError

    prepared, made = Prepared(), Followed()
    prepared.get("x", lambda: made)
    for first in (3, 8):
        with prepared.overwriting([range(first, first + 2), range(0)]):
            pass
    made.meanwhile = fail
    for _ in range(2):
        with pytest.raises(MemoryError):
            prepared.made("x")
    made.meanwhile = lambda: None
    assert prepared.made("x") is made
    assert prepared.made("x") is made
    assert made.updates == [(3, 2), (8, 2)]


def test_what_is_made_is_behind_however_the_writing_ends():
    prepared, made, served, plain = Prepared(), Followed(), Followed(), object()
    for purpose, thing in {"x": made, "served": served, "plain": plain}.items():
        prepared.get(purpose, lambda thing=thing: thing)
    with prepared.overwriting([range(4, 6)]) as purposes:
        prepared.made("x")  # before the keys were written
        assert prepared.made("plain") is None
        purposes.add("served")
    assert prepared.made("x").updates == [(4, 2), (4, 2)]
    assert prepared.made("served").updates == []

    def interrupt():
        with prepared.overwriting([range(1, 2)]):
            prepared.made("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert prepared.made("x").updates == [(4, 2)] * 2 + [(1, 1)] * 2
    assert prepared.made("served").updates == [(1, 1)]


def test_what_is_made_is_behind_by_runs_that_do_not_touch():
    rng, prepared, made, behind = np.random.default_rng(0), Prepared(), Followed(), set()
    prepared.get("x", lambda: made)
    for _ in range(300):
        first, count = rng.integers(30), rng.integers(9)
        with prepared.overwriting([range(first, first + count)]) as served:
            if rng.random() < 0.4:
                served.add("x")
        slots = set(range(first, first + count))
        behind = behind - slots if "x" in served else behind | slots
        if rng.random() < 0.3:
            made.updates.clear()
            prepared.made("x")
            told = sorted(slot for first, count in made.updates for slot in range(first, first + count))
            assert told == sorted(behind), "each slot once, and no other"
            starts = {first for first, _ in made.updates}
            assert not starts & {first + count for first, count in made.updates}
            behind = set()


@pytest.mark.timeout(20)
def test_signal_handlers_may_search_and_push_while_their_thread_prepares():
    prepared, made = Prepared(), []

    def overwrite():
        with prepared.overwriting([range(7, 9)]):
            pass

    def make():
        made.append(Followed())
        if len(made) == 1:
            prepared.get("x", make)  # as a handler would
            overwrite()
        return made[-1]

    assert prepared.get("x", make).updates == [(7, 2)]

    inner = prepared.made("x")
    inner.meanwhile = lambda: setattr(inner, "meanwhile", lambda: None) or overwrite()
    overwrite()
    assert prepared.made("x").updates == [(7, 2)] * 3, "what was overwritten during the update is behind"
    inner.meanwhile = lambda: setattr(inner, "meanwhile", lambda: None) or prepared.made("x")
    overwrite()
    assert prepared.made("x").updates == [(7, 2)] * 5, "once by the handler, once by what it interrupted"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_signal_handler_may_mine_with_a_bank_being_held(monkeypatch, metric):
    x = np.random.default_rng(0).standard_normal((700, 8)).astype(np.float32)
    bank, plan, inner, hold = ce.Bank({"rgb": x}, metric=metric), ce.CascadePlan.parse("rgb:5"), [], cpu._hold

    def mine(*_):
        return ce.mine(plan, {"rgb": x[:9]}, bank, backend="cpu").index

    def interrupted(bank):
        monkeypatch.setattr(cpu, "_hold", hold)
        signal.raise_signal(signal.SIGUSR1)
        return hold(bank)

    monkeypatch.setattr(cpu, "_hold", interrupted)
    before = signal.signal(signal.SIGUSR1, lambda *_: inner.append(mine()))
    try:
        found = mine()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (found == inner[0]).all()
