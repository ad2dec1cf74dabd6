"""An approximate first stage for stores beyond brute force: a faiss index of one view, kept beside its sealed phase."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput, NotFound, StoreError
from cascade_engine.mining import mine
from cascade_engine.plan import CascadePlan
from cascade_engine.store.feature_store import FeatureStore
from cascade_engine.store.files import LocalFiles, write_whole

Kind = Literal["hnsw", "ivf"]
_SPARE = 2  # candidates asked for, as a multiple of what the first stage keeps: some are excluded


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an index was built from, and how good it is.

    Args:
        uid: of the phase.
        commit: the sealed one.
        view: the view indexed.
        kind: ``"hnsw"`` or ``"ivf"``.
        rows: clips indexed.
        recall: share of the exact k nearest that the index finds, over `queries` stored clips.
        k: of that measurement.
        queries: of that measurement.
    """

    uid: str
    commit: int
    view: str
    kind: Kind
    rows: int
    recall: float
    k: int
    queries: int


class Approximate:
    """An index in use: `search` takes it as ``approximate``.

    Args:
        index: of faiss.
        about: what it was built from.
    """

    def __init__(self, index: Any, about: Measured) -> None:
        self._index, self.about = index, about

    @property
    def view(self) -> str:
        """The view it indexes."""
        return self.about.view

    def candidates(self, queries: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
        """About `count` or more candidates (B, n) for each query, rows of the phase, -1 where fewer are found."""
        wanted = min(self.about.rows, _SPARE * count)
        _, found = self._index.search(np.ascontiguousarray(queries, np.float32), wanted)
        return np.asarray(found, np.int64)


def build_index(
    store: FeatureStore,
    view: str,
    kind: Kind = "hnsw",
    *,
    phase: str | None = None,
    k: int = 10,
    queries: int = 200,
    generator: np.random.Generator,
) -> Approximate:
    """Build an index of a view of a sealed phase for inner products, measure its recall, and keep it beside the phase.

    Args:
        store: the store.
        view: the view; every clip must have it.
        kind: ``"hnsw"`` or ``"ivf"``.
        phase: the store's current one by default.
        k: neighbours that recall is measured over.
        queries: stored clips it is measured with, drawn from `generator`.
        generator: likewise.

    Raises:
        StoreError: the phase is not sealed.
        ImportError: faiss is not installed.
    """
    import faiss

    folder, uid, commit, sealed = store.identity(phase)
    if not sealed:
        raise StoreError(f"phase {folder.name!r}: expected a sealed phase to index, seal it first")
    bank = store.bank(view, phase=phase)
    keys = np.ascontiguousarray(bank.keys[view], np.float32)
    if not len(keys) or len(keys) != store.count(phase):
        raise InvalidInput(f"view {view!r}: expected every clip of phase {folder.name!r} to have it")
    index = _index(faiss, keys, kind)
    chosen = generator.choice(len(keys), min(queries, len(keys)), replace=False)
    exact = mine(CascadePlan.parse(f"{view}:{k}"), {view: bank.keys[view][chosen]}, bank).index
    _, found = index.search(keys[chosen], exact.shape[1])
    recall = float((exact[:, :, None] == found[:, None, :]).any(axis=2).mean())
    about = Measured(
        uid=uid, commit=commit, view=view, kind=kind, rows=len(keys), recall=recall, k=k, queries=len(chosen)
    )
    data, described = _files(folder, view, kind)
    temporary = data.with_name(data.name + ".new")
    faiss.write_index(index, str(temporary))
    described.unlink(missing_ok=True)
    temporary.rename(data)
    write_whole(LocalFiles(), described, json.dumps(asdict(about)).encode(), sync=True)
    return Approximate(index, about)


def open_index(store: FeatureStore, view: str, kind: Kind = "hnsw", *, phase: str | None = None) -> Approximate:
    """The index of a view that `build_index` kept.

    Raises:
        NotFound: there is none.
        StoreError: it was built from another phase or commit.
    """
    import faiss

    folder, uid, commit, _ = store.identity(phase)
    data, described = _files(folder, view, kind)
    try:
        about = Measured(**json.loads(described.read_bytes()))
    except FileNotFoundError:
        raise NotFound(f"phase {folder.name!r} has no {kind} index of view {view!r}; build one first") from None
    if (about.uid, about.commit) != (uid, commit):
        raise StoreError(
            f"{data}: stale, built from commit {about.commit} of {about.uid[:8]}, not {commit} of {uid[:8]}"
        )
    return Approximate(faiss.read_index(str(data)), about)


def _index(faiss: Any, keys: npt.NDArray[np.float32], kind: Kind) -> Any:
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(keys.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 128
    elif kind == "ivf":
        lists = max(1, min(int(4 * len(keys) ** 0.5), len(keys) // 39))  # faiss warns below 39 points a list
        coarse = faiss.IndexFlatIP(keys.shape[1])
        index = faiss.IndexIVFFlat(coarse, keys.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(lists, max(8, lists // 8))
        index.own_fields = True
        coarse.this.disown()
    else:
        raise InvalidInput(f"kind: expected hnsw or ivf, got {kind!r}")
    index.train(keys)
    index.add(keys)
    return index


def _files(folder: Path, view: str, kind: Kind) -> tuple[Path, Path]:
    aside = folder / "commits" / "aside"
    return aside / f"{view}.{kind}.faiss", aside / f"{view}.{kind}.json"
