"""The CUDA backend on a GPU: ``pytest -m gpu``; ``CASCADE_REQUIRE=cuda`` makes a skip a failure."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from inputs import DTYPES, FAMILIES

import cascade_engine as ce
from cascade_engine import kernels
from cascade_engine.tensor import like

pytestmark = pytest.mark.gpu
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
    return like(np.ascontiguousarray(array), torch.empty(0, device="cuda"))


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
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ce.mine(plan, {"a": queries}, bank)
    finally:
        torch.cuda.set_sync_debug_mode("default")
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
