"""Every bound of the tensor-core pass against its certified limit: too narrow a limit seldom shows in an answer.

Each input lets one source of error alone reach for its share of the limit.
"""

from __future__ import annotations

from unittest.mock import patch

import emulated
import numpy as np
import pytest
import torch
from inputs import FAMILIES

import cascade_engine as ce
from cascade_engine.kernels import cuda, reference

HALF_STEPS = 32767.5


def workspace_of(native, queries: np.ndarray, keys: np.ndarray, metric: str, **options: bool) -> np.ndarray:
    """What mining one view leaves in the workspace, as bytes."""
    spaces = []

    def run(problem, _device):
        space = torch.empty(problem.workspace(), dtype=torch.uint8)
        problem.run(space.data_ptr(), 0)
        spaces.append(space.numpy())

    with patch.object(cuda, "run", run):
        emulated.mine(native, ce.CascadePlan.parse("a:1"), {"a": queries}, {"a": keys}, metric=metric, **options)
    return spaces[0]


def bounds_of(native, queries: np.ndarray, keys: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Similarities (B, K) as the bound pass has them, and how far each row's (B,) may be off, from the workspace."""
    space = workspace_of(native, queries, keys, metric)
    b, stride = len(queries), -(-len(keys) // 8) * 8
    steps = space[: b * stride * 2].view(np.uint16).reshape(b, stride)[:, : len(keys)].astype(np.float64)
    at = -(-b * stride * 2 // 256) * 256
    scale, shift, slack = space[at : at + b * 24].view(np.float64).reshape(b, 3).T
    return scale[:, None] * (steps / HALF_STEPS - 1) - shift[:, None], scale * slack / HALF_STEPS


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("family", ["separated", "outlier", "scales"])
def test_emulated_scores_have_the_contracts_bits(native, metric, family):
    """Those of the pass without bounds, in the workspace: an order of summation seldom shows in an answer either."""
    emulated.schedule(native, 4)
    rng = np.random.default_rng(0)
    for b, k, dim in ((3, 70, 45), (17, 33, 8), (2, 5, 100)):
        queries, keys = FAMILIES[family](rng, b, dim), FAMILIES[family](rng, k, dim)
        space = workspace_of(native, queries, keys, metric, bounds=False)
        found = space[: b * k * 8].view(np.float64).reshape(b, k)
        np.testing.assert_array_equal(found, reference.similarity(queries, keys, metric))


def similarities(queries: np.ndarray, keys: np.ndarray, metric: str) -> np.ndarray:
    q, x = queries.astype(np.float64), keys.astype(np.float64)
    if metric == "l2":
        return -((q[:, None] - x[None]) ** 2).sum(2)
    if metric == "cosine":
        q, x = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (q, x))
    return q @ x.T


def off_halves(rows: int, dim: int) -> np.ndarray:
    """Constant rows as far between two halves as a float can be, all to the same side."""
    return np.full((rows, dim), 1 + 0.499 / 1024, np.float32)


def on_halves(rows: int, dim: int) -> np.ndarray:
    """Random numbers that halves hold exactly."""
    return (1 + np.random.default_rng(dim).integers(0, 8, (rows, dim)) / 1024).astype(np.float32)


CASES = {  # queries, keys, width
    "queries' rounding": (off_halves, on_halves, 64),
    "keys' rounding": (on_halves, off_halves, 64),
    "both": (off_halves, off_halves, 64),
    "the tensor cores' sums": (on_halves, on_halves, 512),
    "the tensor cores' longest sums": (on_halves, on_halves, 2048),
}


# A constant row of unit length, which cosine makes of both, is exact in halves: nothing to test.
@pytest.mark.parametrize(
    ("case", "metric"),
    [(case, metric) for case in CASES for metric in ("ip", "l2", "cosine") if (case, metric) != ("both", "cosine")],
)
def test_emulated_bounds_stay_within_their_limits(native, case, metric):
    make_queries, make_keys, dim = CASES[case]
    queries, keys = make_queries(3, dim), make_keys(300, dim)
    emulated.schedule(native, 5)
    bounds, limit = bounds_of(native, queries, keys, metric)
    off = np.abs(bounds - similarities(queries, keys, metric))
    assert (off <= limit[:, None]).all(), (off.max(1), limit)
    assert (off.max(1) > 0.02 * limit).all(), "bounds this good would mean that nothing was tested"


@pytest.fixture(scope="module")
def native():
    return emulated.emulated()
