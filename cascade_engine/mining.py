"""Mining: which keys of a bank are a query's positives under a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cascade_engine import kernels
from cascade_engine.bank import Bank
from cascade_engine.errors import InvalidInput
from cascade_engine.kernels import Exclusion, MineRequest, Selection, SelectRequest
from cascade_engine.plan import CascadePlan
from cascade_engine.tensor import (
    Array,
    Host,
    device_of,
    dtype_name,
    feature_matrix,
    ids_on,
    is_torch,
    like,
    require_finite,
    shared,
    to_host,
)
from cascade_engine.tracing import phase

_WIDEST = 1 << 31  # columns of an answer


@dataclass(frozen=True, kw_only=True)
class Positives:
    """What the last stage kept, in the framework and on the device of the queries.

    Args:
        index: (B, k) int64 slots of the bank, best first, -1 where fewer are eligible.
        similarity: (B, k) float32, the last stage's score, -inf where `index` is -1.
        kept: with ``trace=True``, per stage (B, n_s) int64, best first by that stage's score, -1 padded.
    """

    index: Any
    similarity: Any
    kept: tuple[Any, ...] | None = None


def mine(
    plan: CascadePlan,
    queries: Mapping[str, Array],
    bank: Bank,
    exclude: object = None,
    *,
    trace: bool = False,
    backend: str | None = None,
) -> Positives:
    """The positives of each query: the plan's stages applied to the bank, exactly.

    Args:
        plan: the stages; its views must be in `queries` and `bank`.
        queries: view to features (B, D_view), of the bank's widths, on its device.
        bank: the keys.
        exclude: (B,) video ids, whose keys are never candidates; or a (B, K) boolean mask of such keys; or None. What
            is elsewhere is taken to a GPU's bank, which waits for it.
        trace: also return what each stage kept.
        backend: ``"cuda"``, ``"cpu"`` or ``"reference"``; the best that can run by default.

    Raises:
        InvalidInput: an argument is wrong; it is named, with what was expected and what came. NaN and infinity are
            wrong, but not looked for in queries on a GPU, which would wait for the device: there they spoil their own
            row, and a queue's keys of that kind any row, which still hold slots of the bank.
        BackendUnavailable: the named backend cannot run here.
        StaleBank: `bank` is a queue's snapshot that has been overwritten.

    Source: METHOD block 500; Wu et al., CVPRW 2022, section 3.2.
    """
    bank.ensure_fresh()
    engine = kernels.backend(backend, device=bank.device)
    checked, rows = _queries(plan, queries, bank)
    request = MineRequest(
        plan=plan,
        counts=_counts(plan, bank.size),
        queries=checked,
        bank=bank,
        exclude=_exclusion(exclude, rows, bank.size, bank, bank.device),
        trace=trace,
    )
    with phase("mine"):
        found = engine.mine(request)
    return _positives(found, queries[plan.views[0]])


def select(
    plan: CascadePlan,
    similarities: Mapping[str, Array],
    exclude: object = None,
    *,
    trace: bool = False,
    backend: str | None = None,
) -> Positives:
    """The plan's stages applied to similarities that exist already.

    Args:
        plan: the stages; its views must be in `similarities`.
        similarities: view to scores (B, K), float32 or float64, ranked as given; larger is more similar.
        exclude: a (B, K) boolean mask of keys that are no candidates, or None.
        trace: also return what each stage kept.
        backend: as in `mine`.

    Raises:
        InvalidInput: an argument is wrong; it is named, with what was expected and what came.
        BackendUnavailable: the named backend cannot run here.
    """
    _require_views(plan, similarities, "similarities")
    template = similarities[plan.views[0]]
    engine = kernels.backend(backend, device=device_of(template))
    shape: tuple[int, ...] | None = None
    checked: dict[str, Any] = {}
    for view in plan.views:
        name = f'similarities["{view}"]'
        scores = _scores(similarities[view], name, shape)
        shape = tuple(scores.shape)
        checked[view] = scores
    rows, keys = shape or (0, 0)
    request = SelectRequest(
        plan=plan,
        counts=_counts(plan, keys),
        similarities=checked,
        exclude=_exclusion(exclude, rows, keys, None, device_of(template)),
        trace=trace,
    )
    with phase("select"):
        found = engine.select(request)
    return _positives(found, template)


def mine_self(
    plan: CascadePlan,
    bank: Bank,
    *,
    mutual: bool = False,
    tile: int = 1024,
    backend: str | None = None,
) -> Positives:
    """Every key of the bank as a query, keys of its own video excluded, `tile` queries at a time.

    Args:
        plan: the stages.
        bank: the keys; without video ids a key's own slot alone is excluded.
        mutual: keep j for i only where i is among j's positives too (mutual k-NN).
        tile: queries per call; bounds the memory beyond the answer.
        backend: as in `mine`.

    Returns:
        Positives with B = K.

    Raises:
        InvalidInput: the bank lacks one of the plan's views, or `tile` is under 1.
    """
    parts = [part for _, part in self_tiles(plan, bank, tile=tile, backend=backend)]
    template = bank.keys[plan.views[0]]
    k = plan.counts(bank.size)[-1]
    index = _concatenate([to_host(_cpu(p.index), "index") for p in parts], (0, k), np.int64)
    similarity = _concatenate([to_host(_cpu(p.similarity), "similarity") for p in parts], (0, k), np.float32)
    if mutual:
        index, similarity = _keep_mutual(index, similarity)
    return Positives(index=like(index, template), similarity=like(similarity, template))


def self_tiles(
    plan: CascadePlan, bank: Bank, *, tile: int = 1024, start: int = 0, backend: str | None = None
) -> Iterator[tuple[slice, Positives]]:
    """The tiles of `mine_self`, one at a time from slot `start`: the slots that were queries, and their positives."""
    if tile < 1:
        raise InvalidInput(f"tile: expected at least 1, got {tile}")
    _require_views(plan, bank.keys, "bank")
    searched, ids = bank, bank.video_id
    if ids is None:
        slots = like(np.arange(bank.size), bank.keys[plan.views[0]])
        searched, ids = Bank(bank.keys, slots, metric=bank.metric, checked=True, guard=bank.ensure_fresh), slots
    for first in range(start, bank.size, tile):
        rows = slice(first, min(first + tile, bank.size))
        queries = {view: searched.keys[view][rows] for view in plan.views}
        yield rows, mine(plan, queries, searched, ids[rows], backend=backend)


def _keep_mutual(index: Host, similarity: Host) -> tuple[Host, Host]:
    """Rows with only the mutual pairs left, moved to the front in their order."""
    rows = len(index)
    pairs = np.arange(rows)[:, None] * rows + index
    backward = index * rows + np.arange(rows)[:, None]
    mutual = (index >= 0) & np.isin(backward, pairs[index >= 0])
    order = np.argsort(~mutual, axis=1, kind="stable")
    there = np.take_along_axis(mutual, order, 1)
    index = np.where(there, np.take_along_axis(index, order, 1), -1)
    similarity = np.where(there, np.take_along_axis(similarity, order, 1), np.float32(-np.inf))
    return index, similarity


def _counts(plan: CascadePlan, keys: int) -> tuple[int, ...]:
    """What each stage keeps, and a trace shows; all there is where no array could be so wide."""
    return tuple(count if count < _WIDEST else min(count, keys) for count in plan.counts(keys))


def _concatenate(parts: list[Host], empty: tuple[int, int], dtype: Any) -> Host:
    return np.concatenate(parts) if parts else np.empty(empty, dtype)


def _cpu(value: Any) -> Any:
    return value.cpu() if is_torch(value) else value


def _positives(found: Selection, template: Array) -> Positives:
    def out(value: Any) -> Any:
        return value if is_torch(value) else like(value, template)

    kept = None if found.kept is None else tuple(map(out, found.kept))
    return Positives(index=out(found.index), similarity=out(found.similarity), kept=kept)


def _require_views(plan: CascadePlan, given: Mapping[str, object], name: str) -> None:
    missing = [view for view in plan.views if view not in given]
    if missing:
        raise InvalidInput(f"{name}: expected the plan's view {missing[0]!r}, got {', '.join(given) or 'no view'}")


def _queries(plan: CascadePlan, queries: Mapping[str, Array], bank: Bank) -> tuple[dict[str, Any], int]:
    """The queries of the plan's views, checked against the bank, and how many there are."""
    _require_views(plan, queries, "queries")
    _require_views(plan, bank.keys, "bank")
    checked: dict[str, Any] = {}
    rows: int | None = None
    for view in plan.views:
        name, value = f'queries["{view}"]', queries[view]
        if device_of(value) != bank.device:
            raise InvalidInput(f"{name}: expected data on {bank.device} as the bank's, got {device_of(value)}")
        width = bank.keys[view].shape[1]
        if bank.device == "cpu":
            value = feature_matrix(value, name, columns=width)
        elif value.ndim != 2 or value.shape[1] != width:
            raise InvalidInput(f"{name}: expected (N, {width}), got {tuple(value.shape)} {dtype_name(value)}")
        if rows is not None and len(value) != rows:
            raise InvalidInput(f"{name}: expected ({rows}, {width}) as the first view has, got {tuple(value.shape)}")
        rows = len(value)
        checked[view] = value
    return checked, rows or 0


def _scores(value: Array, name: str, shape: tuple[int, ...] | None) -> Any:
    """Similarities as given, checked: (B, K) float32 or float64 without NaN."""
    scores: Any = value if device_of(value) != "cpu" else to_host(value, name)
    if scores.ndim != 2 or dtype_name(scores) not in ("float32", "float64") or (shape and tuple(scores.shape) != shape):
        want = "(B, K)" if shape is None else str(shape)
        raise InvalidInput(
            f"{name}: expected {want} float32 or float64, got {tuple(scores.shape)} {dtype_name(scores)}"
        )
    if not is_torch(scores):
        require_finite(scores, name)
    return scores


def _exclusion(exclude: object, rows: int, keys: int, bank: Bank | None, device: str) -> Exclusion:
    """What `exclude` means, on a device: ids (B,) where the bank has video ids, or a boolean mask (B, K)."""
    if exclude is None:
        return Exclusion()
    given: Any = exclude if is_torch(exclude) and device != "cpu" else to_host(exclude, "exclude")

    def got() -> str:
        return f"{tuple(given.shape)} {dtype_name(given)}"

    if given.ndim == 2 and dtype_name(given) == "bool":
        if tuple(given.shape) != (rows, keys):
            raise InvalidInput(f"exclude: expected ({rows}, {keys}) bool, got {got()}")
        return Exclusion(mask=given if device == "cpu" else (given if is_torch(given) else shared(given)).to(device))
    if bank is None:
        raise InvalidInput(f"exclude: expected ({rows}, {keys}) bool, got {got()}")
    if bank.video_id is None:
        raise InvalidInput("exclude: expected a bank with video_id to exclude by video ids, got a bank without")
    if given.ndim != 1 or len(given) != rows:
        raise InvalidInput(f"exclude: expected ({rows},) video ids or a ({rows}, {keys}) bool mask, got {got()}")
    return Exclusion(video_id=ids_on(device, given, "exclude", rows))
