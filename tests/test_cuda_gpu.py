"""The CUDA backend on a GPU: ``pytest -m gpu``; ``CASCADE_REQUIRE=cuda`` makes a skip a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from inputs import DTYPES, FAMILIES
from test_loss import REDUCTIONS, SIBLINGS, dense, found, gradients, problem

import cascade_engine as ce
from cascade_engine import kernels
from cascade_engine.tensor import like

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PLANS = ("a:50%,b:25%,a:12.5%,b:6%,a:5", "a:30,b:30@bank", "sum(a,b):40%,min(b,a):20%,max(a,b):7", "a:50%,rrf(a,b):9")


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Skip, or fail where a GPU is required, with the reason."""
    reason = kernels.load("cuda").unavailable()
    if reason is None:
        return
    if "cuda" in os.environ.get("CASCADE_REQUIRE", "").split(","):
        pytest.fail(f"CASCADE_REQUIRE=cuda, but the backend cannot run: {reason}")
    pytest.skip(f"the CUDA backend cannot run here: {reason}")


def on_gpu(array: np.ndarray) -> torch.Tensor:
    return like(np.ascontiguousarray(array), torch.empty(0, device=DEVICE))


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Make a synchronisation an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["lattice", "separated", "near_tie", "constant"])
def test_gpu_equals_the_reference(family, dtype, metric):
    rng = np.random.default_rng(1)
    for text in PLANS:
        for b, k, dim in ((1, 63, 7), (70, 3000, 128), (33, 700, 600)):
            both = {view: FAMILIES[family](rng, k + b, dim).astype(DTYPES[dtype]) for view in ("a", "b")}
            keys, queries = {v: x[:k] for v, x in both.items()}, {v: x[k:] for v, x in both.items()}
            video, query_video = rng.integers(0, k // 3, k), rng.integers(0, k // 3, b)
            plan = ce.CascadePlan.parse(text)
            want = ce.mine(plan, queries, ce.Bank(keys, video, metric=metric), query_video, backend="reference")
            bank = ce.Bank({v: on_gpu(x) for v, x in keys.items()}, on_gpu(video), metric=metric)
            found = ce.mine(plan, {v: on_gpu(x) for v, x in queries.items()}, bank, on_gpu(query_video))
            assert found.index.device.type == "cuda"
            np.testing.assert_array_equal(found.index.cpu(), want.index)
            np.testing.assert_array_equal(found.similarity.cpu(), want.similarity)


def test_gpu_mining_waits_for_nothing_and_can_be_captured_in_a_graph():
    generator = torch.Generator("cuda").manual_seed(0)
    keys = torch.randn(5000, 64, generator=generator, device="cuda")
    queries = torch.randn(32, 64, generator=generator, device="cuda")
    plan, bank = ce.CascadePlan.parse("a:50%,a:5"), ce.Bank({"a": keys})
    want = ce.mine(plan, {"a": queries}, bank).index.clone()  # prepares the bank
    with nothing_waits():
        ce.mine(plan, {"a": queries}, bank)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ce.mine(plan, {"a": queries}, bank)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found.index, want)


def test_gpu_mining_runs_on_the_current_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        keys, queries = torch.randn(4000, 32, device="cuda"), torch.randn(8, 32, device="cuda")
        found = ce.mine(ce.CascadePlan.parse("a:3"), {"a": queries}, ce.Bank({"a": keys}))
    stream.synchronize()
    host = ce.Bank({"a": keys.cpu()})
    want = ce.mine(ce.CascadePlan.parse("a:3"), {"a": queries.cpu()}, host, backend="reference")
    assert torch.equal(found.index.cpu(), want.index)


@pytest.mark.parametrize("siblings", SIBLINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("never", [False, True])
def test_gpu_loss_and_gradients_equal_the_definition_and_wait_for_nothing(reduction, siblings, never):
    for shape in ((5, 40, 8, 3), (33, 3000, 128, 5), (16, 700, 600, 90)):
        query, key, keys, index, own, other = problem(*shape, videos=30)
        bank = ce.Bank({"rgb": keys.to(DEVICE)}, video_id=other.to(DEVICE))
        positives, ids = found(index.to(DEVICE)), own.to(DEVICE)

        def mine(q, x, bank=bank, positives=positives, ids=ids):
            return ce.multi_positive_nce(
                q, x, bank, positives, reduction=reduction, siblings=siblings, query_video_id=ids,
                self_positive="never" if never else "always",
            )  # fmt: skip

        def want(q, x, case=(keys, index, own, other)):
            return dense(
                q, x, case[0].double(), case[1], reduction=reduction, siblings=siblings, never=never, own_video=case[2:]
            )

        on_device = [each.float().to(DEVICE) for each in (query, key)]
        first = gradients(mine, *on_device)
        for got, right in zip(first, gradients(want, query, key), strict=True):
            torch.testing.assert_close(got.cpu().double(), right, rtol=2e-5, atol=2e-6)
        with nothing_waits():
            again = gradients(mine, *on_device)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("normalise", [False, True])
def test_gpu_push_writes_the_bits_of_the_cpu_and_waits_for_nothing(stored, normalise):
    rng = np.random.default_rng(2)
    dims = {"a": 33, "b": 128}
    there, here = (ce.KeyQueue(500, dims, dtype=stored, device=at, normalise=normalise) for at in (DEVICE, "cpu"))
    plan = ce.CascadePlan.parse("a:50%,b:5")
    for step, rows in enumerate((100, 480, 33, 500, 1200, 7)):
        keys = {view: FAMILIES["separated"](rng, rows, dim) for view, dim in dims.items()}
        on_device, ids = {view: on_gpu(x) for view, x in keys.items()}, torch.arange(rows, device=DEVICE)
        if step == 0:
            there.push(on_device, ids)  # the first push allocates the ring
        else:
            with nothing_waits():
                there.push(on_device, ids)
        here.push(keys, np.arange(rows))
        for name, values in there.state_dict()["storage"].items():
            assert torch.equal(values.cpu(), here.state_dict()["storage"][name]), (step, name)
        queries = {view: FAMILIES["separated"](rng, 9, dim) for view, dim in dims.items()}
        mined = ce.mine(plan, {view: on_gpu(x) for view, x in queries.items()}, there.bank())
        want = ce.mine(plan, queries, ce.Bank({v: here.bank().host_keys(v) for v in dims}), backend="reference")
        np.testing.assert_array_equal(mined.index.cpu(), want.index)


def test_gpu_step_of_mining_loss_and_push_can_be_captured_in_a_graph():
    queue = ce.KeyQueue(2000, {"a": 64, "b": 64}, device=DEVICE, normalise=True)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def rows(count):
        return {view: torch.randn(count, 64, generator=generator, device=DEVICE) for view in ("a", "b")}

    ids = torch.arange(2000, device=DEVICE) // 4
    queue.push(rows(2000), ids)
    plan = ce.CascadePlan.preset("cpr", oracle="b", trainee="a", k=5)
    queries, keys = rows(32), rows(32)

    def step():
        bank = queue.bank()
        positives = ce.mine(plan, queries, bank, ids[:32])
        loss = ce.multi_positive_nce(queries["a"], keys["a"], bank, positives, view="a", query_video_id=ids[:32])
        queue.push(keys, ids[:32])
        return positives.index, loss

    want = [each.clone() for each in step()]  # prepares the bank, and takes slots 0 to 31
    before = {name: values.clone() for name, values in queue.state_dict()["storage"].items()}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), nothing_waits():
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], want[0]) or not torch.equal(captured[1], want[1]), "the ring holds other keys"
    after = queue.state_dict()["storage"]
    assert torch.equal(after["a"][64:96], after["a"][:32])  # the slots at which the ring stood when it was captured
    assert torch.equal(after["a"][96:], before["a"][96:])
