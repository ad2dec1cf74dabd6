"""The definition of correct, in readable NumPy: every other backend must give equal answers.

A similarity is the inner product of the stored values in float64, summed in one fixed order: eight running sums, one
for each index modulo 8, then a fixed tree. Products of two float32 are exact in float64, so the order alone decides
the bits.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cascade_engine.bank import Metric
from cascade_engine.kernels import Exclusion, MineRequest, Selection, SelectRequest, require_finite_queries
from cascade_engine.plan import RRF_OFFSET, Score, Stage
from cascade_engine.tensor import Host

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_BFLOAT16_MAX = float.fromhex("0x1.fep127")
_TILE_VALUES = 1 << 21  # float64 partial sums held at a time: 16 MiB


def unavailable() -> str | None:
    """NumPy is always there."""
    return None


def detail() -> str:
    """What it runs on."""
    return f"NumPy {np.__version__}"


def dot(q: Host, x: Host) -> F64:
    """Inner products (B, K) of the rows of q (B, D) and x (K, D), by the contract's order of summation."""
    b, k, lanes = len(q), len(x), 8
    out = np.empty((b, k))
    rows = max(1, _TILE_VALUES // max(1, k * lanes))
    x64 = x.astype(np.float64)
    for start in range(0, b, rows):
        q64 = q[start : start + rows].astype(np.float64)
        sums = np.zeros((len(q64), k, lanes))
        for d in range(0, q.shape[1], lanes):
            products = q64[:, None, d : d + lanes] * x64[None, :, d : d + lanes]
            sums[:, :, : products.shape[2]] += products
        s = np.moveaxis(sums, 2, 0)
        out[start : start + rows] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
    return out


def squared_norm(x: Host) -> F64:
    """Inner product (N,) of each row with itself, by the same order of summation."""
    sums = np.zeros((len(x), 8))
    for d in range(0, x.shape[1], 8):
        part = x[:, d : d + 8].astype(np.float64)
        sums[:, : part.shape[1]] += part * part
    s = sums.T
    return np.asarray(((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])))


def similarity(q: Host, x: Host, metric: Metric) -> F64:
    """Similarities (B, K) of queries (B, D) and keys (K, D) under the bank's metric; larger is more similar."""
    products = dot(q, x)
    if metric == "ip":
        return products
    qq, xx = squared_norm(q)[:, None], squared_norm(x)[None]
    if metric == "l2":
        return -((qq - 2 * products) + xx)
    norms = np.sqrt(qq) * np.sqrt(xx)
    return np.where(norms != 0, products / np.where(norms != 0, norms, 1), 0)


def mine(request: MineRequest) -> Selection:
    """Score every key of each view, then select query by query."""
    require_finite_queries(request)
    bank = request.bank
    scores = {
        view: similarity(np.asarray(request.queries[view]), bank.host_keys(view), bank.metric)
        for view in request.plan.views
    }
    queries = len(next(iter(scores.values())))
    return _select(request, scores, _excluded(request.exclude, bank.host_video_id(), queries, bank.size))


def select(request: SelectRequest) -> Selection:
    """Select query by query from the similarities as given."""
    scores = {view: np.asarray(given).astype(np.float64) for view, given in request.similarities.items()}
    queries, keys = next(iter(scores.values())).shape
    return _select(request, scores, _excluded(request.exclude, None, queries, keys))


def _excluded(exclude: Exclusion, key_video: Host | None, queries: int, keys: int) -> Mask:
    if exclude.mask is not None:
        return np.asarray(exclude.mask, dtype=np.bool_)
    if exclude.video_id is not None and key_video is not None:
        own: Mask = np.asarray(exclude.video_id)[:, None] == key_video[None]
        return own
    return np.zeros((queries, keys), np.bool_)


def _select(request: MineRequest | SelectRequest, scores: dict[str, F64], excluded: Mask) -> Selection:
    counts, queries = request.counts, len(excluded)
    index = np.full((queries, counts[-1]), -1, np.int64)
    value = np.full((queries, counts[-1]), -np.inf, np.float32)
    kept = [np.full((queries, count), -1, np.int64) for count in counts]
    for row in range(queries):
        eligible = np.flatnonzero(~excluded[row])
        alive, ranked = eligible, np.empty(0)
        for number, (stage, count) in enumerate(zip(request.plan.stages, counts, strict=True)):
            alive, ranked = _stage(stage, count, alive, eligible, {view: s[row] for view, s in scores.items()})
            kept[number][row, : len(alive)] = alive
        index[row, : len(alive)] = alive
        with np.errstate(over="ignore"):
            value[row, : len(alive)] = ranked
    return Selection(index=index, similarity=value, kept=tuple(kept) if request.trace else None)


def _stage(stage: Stage, count: int, alive: I64, eligible: I64, scores: dict[str, F64]) -> tuple[I64, F64]:
    """The stage's survivors, best first, and their scores."""
    ranked = eligible if stage.over_bank else alive
    value = fused(stage.score, {view: scores[view] for view in stage.score.views}, ranked)
    best = _order(value, ranked)[:count]
    if stage.over_bank:
        best = best[np.isin(ranked[best], alive)]
    return ranked[best], value[best]


def _order(value: F64, key: I64) -> I64:
    """Positions by value descending, then key ascending; -0.0 equals +0.0."""
    return np.lexsort((key, -value))


def fused(score: Score, scores: dict[str, F64], keys: I64) -> F64:
    """The stage's score of `keys`, from each view's similarities (K,) with all keys of the bank."""
    columns = [scores[view][keys] for view in score.views]
    if score.fusion == "zsum":
        weights = [zsum_weight(deviation(scores[view])) for view in score.views]
        columns = [weight * column for weight, column in zip(weights, columns, strict=True)]
    if score.fusion == "rrf":
        columns = [1.0 / (RRF_OFFSET + _rank(column, keys)) for column in columns]
    total = columns[0]
    for column in columns[1:]:
        if score.fusion in ("min", "max"):
            total = np.minimum(total, column) if score.fusion == "min" else np.maximum(total, column)
        else:
            total = total + column
    return total


def deviation(value: F64) -> float:
    """Population standard deviation; exactly 0 where all values are equal.

    The mean is rounded, by far more than values that lie close together differ: what that adds is taken back.
    """
    if not len(value) or value.min() == value.max():
        return 0.0
    off = value - value.mean()
    return math.sqrt(max(0.0, float(np.square(off).sum() - np.square(off.sum()) / len(off))) / len(off))


def zsum_weight(sigma: float) -> float:
    """1 / sigma rounded to bfloat16, so that the last bits of sigma do not matter; 0 where sigma is 0.

    Rounded to nearest even in one step: through float32, as array libraries convert, it would be rounded twice.
    """
    if sigma == 0:
        return 0.0
    weight = min(1.0 / sigma, _BFLOAT16_MAX)
    exponent = max(math.frexp(weight)[1] - 8, -133)  # of the last of 8 significant bits, or of the smallest subnormal
    return min(math.ldexp(round(math.ldexp(weight, -exponent)), exponent), _BFLOAT16_MAX)


def _rank(value: F64, keys: I64) -> F64:
    rank = np.empty(len(keys))
    rank[_order(value, keys)] = np.arange(1, len(keys) + 1)
    return rank
