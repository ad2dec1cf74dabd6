"""Search in feature stores by any plan, and comparisons of phases that take a search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cascade_engine.bank import Bank, Metric
from cascade_engine.errors import InvalidInput
from cascade_engine.mining import mine
from cascade_engine.plan import CascadePlan, Keep
from cascade_engine.store import FeatureStore
from cascade_engine.store.approximate import Approximate
from cascade_engine.tensor import Array, Host, feature_matrix, id_vector, to_host

Ids = npt.NDArray[np.int64]
Exclude = Literal["video", "overlap", "self", "none"]
_MASK_BYTES = 64 << 20  # a tile's mask of excluded keys


@dataclass(frozen=True, kw_only=True)
class Hits:
    """What a search found, best first.

    Args:
        clip_id: (B, k) int64, -1 where fewer are eligible.
        video_id: (B, k) int64, -1 likewise.
        similarity: (B, k) float32, the plan's last score, -inf likewise.
    """

    clip_id: Ids
    video_id: Ids
    similarity: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where queries come from, for exclusions: (B,) video ids, and (B,) seconds of start and end where known."""

    video_id: Ids
    start: npt.NDArray[np.float64] | None = None
    end: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseDiff:
    """How the neighbours of clips changed from one phase to another.

    Args:
        clip_id: (n,) the clips that both phases have.
        changed: (n,) how many of a clip's k neighbours in the first phase are none in the second.
        k: neighbours compared.
    """

    clip_id: Ids
    changed: Ids
    k: int


def search(
    store: FeatureStore,
    plan: CascadePlan | str,
    *,
    clip: object = None,
    vectors: Mapping[str, Array] | None = None,
    k: int | None = None,
    where: str | None = None,
    phase: str | None = None,
    at: int | None = None,
    metric: Metric = "ip",
    exclude: Exclude | None = None,
    margin: float = 0.0,
    origin: Origin | None = None,
    approximate: Approximate | None = None,
    backend: str | None = None,
) -> Hits:
    """The stored clips that a plan finds for stored clips or for vectors; exact unless `approximate` is given.

    Args:
        store: the store.
        plan: the stages, or their text.
        clip: one clip id or (B,) of them, whose stored features are the queries.
        vectors: instead of `clip`, view to queries (B, D_view).
        k: results a query, in place of the last stage's count.
        where: a condition on columns; other clips are no candidates, and no part of the bank that shares refer to.
        phase: the store's current one by default.
        at: a commit number.
        metric: similarity of the bank.
        exclude: ``"video"`` clips of the query's video (the default for `clip`), ``"overlap"`` those that overlap it in
            time, ``"self"`` the clip itself, or ``"none"`` (the default for `vectors`). Clips of the same video whose
            times are not known count as overlapping.
        margin: seconds around the query that count as overlapping too; with ``exclude="overlap"``.
        origin: of `vectors`, where they are to be excluded by video or time.
        approximate: an index of the phase for the first stage, by inner products; see
            `cascade_engine.store.approximate`.
        backend: see `ce.mine`.

    Raises:
        InvalidInput: an argument is wrong; it is named.
        NotFound: no such clip, phase, view or commit.
    """
    chosen = _with_k(CascadePlan.parse(plan) if isinstance(plan, str) else plan, k)
    if (clip is None) == (vectors is None):
        raise InvalidInput("search: expected either clip or vectors")
    ids = None
    if clip is not None:
        ids = id_vector(np.atleast_1d(to_host(clip, "clip")), "clip", np.size(to_host(clip, "clip")))
    mode = _mode(exclude, ids)
    if origin is not None and (clip is not None or mode == "none"):
        given = "clip, whose place is known" if clip is not None else "nothing to exclude by it"
        raise InvalidInput(f"origin: expected with vectors and exclude='video' or 'overlap', got it with {given}")
    if not (margin == 0 or (mode == "overlap" and 0 < margin < np.inf)):
        raise InvalidInput(f"margin: expected seconds from 0 on, with exclude='overlap', got {margin} with {mode!r}")
    if ids is not None:
        vectors, origin = _stored(store, chosen, ids, phase)
    assert vectors is not None
    bank = store.bank(chosen.views, phase=phase, where=where, at=at, metric=metric)
    queries = _queries(chosen, vectors, bank)
    origin = _origin(origin, mode, len(queries[chosen.views[0]])) if mode in ("video", "overlap") else None
    if approximate is not None:
        if where is not None or at is not None:
            raise InvalidInput("approximate: expected no where and no at, an index holds a whole phase")
        _require_own(approximate, store, phase, metric)
        return _approximately(chosen, queries, bank, approximate, mode, origin, ids, backend)
    times = _times(store, bank, where, phase, at, chosen) if mode == "overlap" else None
    parts = []
    for rows in _tiles(queries, bank, masked=mode in ("overlap", "self")):
        excluded = _excluded(mode, bank, origin, ids, rows, times, margin)
        found = mine(chosen, {view: values[rows] for view, values in queries.items()}, bank, excluded, backend=backend)
        parts.append((found.index, found.similarity))
    return _hits(bank, np.concatenate([index for index, _ in parts]), np.concatenate([score for _, score in parts]))


def diff(
    store: FeatureStore,
    first: str,
    second: str,
    *,
    view: str,
    k: int = 10,
    sample: int | None = None,
    generator: np.random.Generator | None = None,
    backend: str | None = None,
) -> PhaseDiff:
    """How many of each clip's k nearest clips of other videos change from one phase to another, in one view.

    Both phases are searched among the clips they share.

    Args:
        store: the store.
        first: a phase.
        second: another.
        view: a view of both.
        k: neighbours a clip.
        sample: compare so many clips only, drawn from `generator`.
        generator: needed for `sample`.
        backend: see `ce.mine`.

    Raises:
        InvalidInput: `sample` is under 1, or comes without a generator; `k` is under 1.
        NotFound: no such phase or view.
    """
    if sample is not None and sample < 1:
        raise InvalidInput(f"sample: expected at least 1, got {sample}")
    banks = [store.bank(view, phase=phase) for phase in (first, second)]
    ids, rows_a, rows_b = np.intersect1d(_ids(banks[0])[1], _ids(banks[1])[1], assume_unique=True, return_indices=True)
    chosen = np.arange(len(ids))
    if sample is not None and sample < len(ids):
        if generator is None:
            raise InvalidInput("generator: expected one to draw a sample from")
        chosen = np.sort(generator.choice(len(ids), sample, replace=False))
    plan = CascadePlan.parse(f"{view}:{k}")
    neighbours = []
    for bank, rows in zip(banks, (rows_a, rows_b), strict=True):
        video = _ids(bank)[0][rows]
        shared = Bank({view: bank.keys[view][rows]}, video, checked=True)
        queries = {view: shared.keys[view][chosen]}
        parts = [
            mine(plan, {view: queries[view][tile]}, shared, video[chosen][tile], backend=backend).index
            for tile in _tiles(queries, shared, masked=False)
        ]
        neighbours.append(np.concatenate(parts) if parts else np.empty((0, k), np.int64))
    before, after = neighbours
    kept = ((before[:, :, None] == after[:, None, :]) & (before >= 0)[:, :, None]).any(axis=2)
    return PhaseDiff(clip_id=ids[chosen], changed=((before >= 0) & ~kept).sum(axis=1), k=k)


def _with_k(plan: CascadePlan, k: int | None) -> CascadePlan:
    if k is None:
        return plan
    last = replace(plan.stages[-1], keep=Keep(Fraction(k), "count"))
    return CascadePlan((*plan.stages[:-1], last))


def _stored(store: FeatureStore, plan: CascadePlan, ids: Ids, phase: str | None) -> tuple[dict[str, Any], Origin]:
    """The features and whereabouts of stored clips."""
    rows = store.rows_of(ids, phase=phase)
    for view in plan.views:
        held = store.present(view, phase=phase)[rows]
        if not held.all():
            raise InvalidInput(f"clip: expected clips with view {view!r}, clip {int(ids[~held][0])} has none")
    vectors = {view: store.gather(view, rows, phase=phase) for view in plan.views}
    video, start, end = (store.column(name, phase=phase)[rows] for name in ("video_id", "start", "end"))
    return vectors, Origin(video_id=video, start=start, end=end)


def _queries(plan: CascadePlan, vectors: Mapping[str, Array], bank: Bank) -> dict[str, Host]:
    """The queries of the plan's views, of one length, as wide as the bank's."""
    checked: dict[str, Host] = {}
    for view in plan.views:
        if view not in vectors:
            raise InvalidInput(f"vectors: expected the plan's view {view!r}, got {', '.join(vectors) or 'no view'}")
        name, width = f'vectors["{view}"]', bank.keys[view].shape[1]
        checked[view] = feature_matrix(vectors[view], name, columns=width)
        rows = len(checked[plan.views[0]])
        if len(checked[view]) != rows:
            raise InvalidInput(f"{name}: expected ({rows}, {width}) as the first view has, got {checked[view].shape}")
    return checked


def _mode(exclude: Exclude | None, ids: Ids | None) -> Exclude:
    """How to exclude: as asked, or the default."""
    if exclude is None:
        return "video" if ids is not None else "none"
    if exclude not in get_args(Exclude):
        raise InvalidInput(f"exclude: expected one of {', '.join(get_args(Exclude))}, got {exclude!r}")
    if exclude == "self" and ids is None:
        raise InvalidInput("exclude: expected 'self' with clip only")
    return exclude


def _origin(origin: Origin | None, mode: Exclude, rows: int) -> Origin:
    """What is known of each query's place, as far as `mode` asks for it, in arrays."""
    if origin is None:
        raise InvalidInput(f"origin: expected where the vectors come from, to exclude by {mode!r}")
    video = id_vector(origin.video_id, "origin.video_id", rows)
    if mode == "video":
        return Origin(video_id=video)
    if origin.start is None or origin.end is None:
        raise InvalidInput("origin: expected start and end, to exclude by 'overlap'")
    start, end = (
        _seconds(value, f"origin.{name}", rows) for name, value in (("start", origin.start), ("end", origin.end))
    )
    return Origin(video_id=video, start=start, end=end)


def _seconds(value: object, name: str, rows: int) -> npt.NDArray[np.float64]:
    array = to_host(value, name)
    if array.shape != (rows,) or (array.dtype.kind not in "fiu" and array.size):
        raise InvalidInput(f"{name}: expected ({rows},) seconds, got {array.shape} {array.dtype}")
    return array.astype(np.float64, copy=False)


def _times(
    store: FeatureStore, bank: Bank, where: str | None, phase: str | None, at: int | None, plan: CascadePlan
) -> tuple[Any, Any]:
    """Start and end of the bank's keys."""
    rows = store.matching(where, views=plan.views, phase=phase, at=at)
    start, end = (store.column(name, phase=phase, at=at) for name in ("start", "end"))
    return (start, end) if rows is None else (start[rows], end[rows])


def _ids(bank: Bank) -> tuple[Ids, Ids]:
    """A store's bank always has video and clip ids."""
    assert bank.video_id is not None
    assert bank.clip_id is not None
    return bank.video_id, bank.clip_id


def _tiles(queries: Mapping[str, Any], bank: Bank, *, masked: bool) -> Iterator[slice]:
    count = len(next(iter(queries.values()))) if queries else 0
    step = max(1, _MASK_BYTES // max(1, len(bank))) if masked else 1024
    for start in range(0, max(count, 1), step):
        yield slice(start, min(start + step, count))


def _excluded(
    mode: Exclude,
    bank: Bank,
    origin: Origin | None,
    ids: Ids | None,
    rows: slice,
    times: tuple[Any, Any] | None,
    margin: float,
) -> Any:
    """What `mine` takes as excluded: video ids, or a mask of keys."""
    if mode == "none":
        return None
    if mode == "self":
        assert ids is not None
        return np.asarray(bank.clip_id)[None] == ids[rows, None]
    assert origin is not None
    video = origin.video_id[rows]
    if mode == "video":
        return video
    assert times is not None
    assert origin.start is not None
    assert origin.end is not None
    mask = np.asarray(bank.video_id)[None] == video[:, None]
    start, end = times
    # Written so that unknown times (NaN) count as overlapping.
    apart = (start[None] >= origin.end[rows, None] + margin) | (end[None] <= origin.start[rows, None] - margin)
    mask &= ~apart
    return mask


def _hits(bank: Bank, index: Ids, similarity: Any) -> Hits:
    there = index >= 0

    def named(values: Any) -> Ids:
        found: Ids = np.where(there, np.asarray(values)[np.where(there, index, 0)], -1) if len(bank) else index
        return found

    return Hits(clip_id=named(bank.clip_id), video_id=named(bank.video_id), similarity=similarity)


def _require_own(approximate: Approximate, store: FeatureStore, phase: str | None, metric: Metric) -> None:
    """Refuse an index of other features, or one that ranks them in another order than the search does."""
    folder, uid, commit, _ = store.identity(phase)
    about = approximate.about
    if (about.uid, about.commit) != (uid, commit):
        raise InvalidInput(
            f"approximate: expected an index of phase {folder.name!r} at commit {commit} of {uid[:8]}, "
            f"got one of commit {about.commit} of {about.uid[:8]}"
        )
    if metric != "ip":
        raise InvalidInput(f"approximate: expected metric 'ip', which an index is built for, got {metric!r}")


def _approximately(
    plan: CascadePlan,
    queries: Mapping[str, Any],
    bank: Bank,
    approximate: Approximate,
    mode: Exclude,
    origin: Origin | None,
    ids: Ids | None,
    backend: str | None,
) -> Hits:
    """Candidates of the first stage from an index, then the plan, exactly, among each query's candidates."""
    first = plan.stages[0].score
    if first.fusion is not None or first.views[0] != approximate.view or mode == "overlap":
        raise InvalidInput(
            f"approximate: expected a plan that starts with view {approximate.view!r}, and no exclusion by overlap"
        )
    if len(bank) != approximate.about.rows:
        raise InvalidInput("approximate: expected all clips of the phase to have the plan's views")
    if any(stage.over_bank or stage.score.fusion == "zsum" for stage in plan.stages):
        raise InvalidInput("approximate: expected no @bank stage and no zsum, which look at the whole bank")
    counts = np.minimum.accumulate(plan.counts(len(bank))).tolist()
    candidates = approximate.candidates(queries[approximate.view], counts[0])
    stages = tuple(
        replace(stage, keep=Keep(Fraction(count), "count")) for stage, count in zip(plan.stages, counts, strict=True)
    )
    width = counts[-1]
    index = np.full((len(candidates), width), -1, np.int64)
    similarity = np.full((len(candidates), width), -np.inf, np.float32)
    for row, slots in enumerate(candidates):
        there = np.sort(slots[slots >= 0])
        small = Bank(
            {view: bank.keys[view][there] for view in plan.views},
            _ids(bank)[0][there],
            checked=True,
            clip_id=_ids(bank)[1][there],
            metric=bank.metric,
        )
        one = slice(row, row + 1)
        excluded = _excluded(mode, small, origin, ids, one, None, 0.0)
        found = mine(
            CascadePlan(stages),
            {view: values[one] for view, values in queries.items()},
            small,
            excluded,
            backend=backend,
        )
        kept = found.index[0][found.index[0] >= 0]
        index[row, : len(kept)] = there[kept]
        similarity[row, : len(kept)] = found.similarity[0][: len(kept)]
    return _hits(bank, index, similarity)
