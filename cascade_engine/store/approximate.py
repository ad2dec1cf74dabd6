"""An approximate first stage for stores beyond brute force: a faiss index of one view, kept beside its sealed phase.

An IVF index is built and searched on the first GPU where faiss has that (the extra ``faiss-gpu``) and there is one; an
HNSW index, which faiss has for the CPU only, and whatever a GPU refuses, are built and searched on the CPU. What is
kept on disk is the CPU's form, so either reads what the other wrote.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput, NotFound, StoreError
from cascade_engine.mining import mine
from cascade_engine.plan import CascadePlan
from cascade_engine.store.creating import aside, left_aside
from cascade_engine.store.feature_store import FeatureStore
from cascade_engine.store.files import LocalFiles, aside_of, write_whole

Kind = Literal["hnsw", "ivf"]
_SPARE = 2  # candidates asked for, as a multiple of what the first stage keeps: some are excluded
_ON_GPU = 2048  # the most neighbours, and lists probed, that faiss takes on a GPU
_TOGETHER = 1 << 18  # keys widened to float32 at a time
log = logging.getLogger(__name__)


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
        index: of faiss, on the CPU.
        about: what it was built from.
        on_gpu: the same index on a GPU, which then is searched.
    """

    def __init__(self, index: Any, about: Measured, on_gpu: Any = None) -> None:
        self._index, self._on_gpu, self.about = index, on_gpu, about

    @property
    def view(self) -> str:
        """The view it indexes."""
        return self.about.view

    @property
    def device(self) -> str:
        """Where it is searched: ``"gpu"`` or ``"cpu"``."""
        return "cpu" if self._on_gpu is None else "gpu"

    def candidates(self, queries: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
        """About `count` or more candidates (B, n) for each query, rows of the phase, -1 where fewer are found."""
        return self.nearest(queries, min(self.about.rows, _SPARE * count))

    def nearest(self, queries: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
        """The `count` nearest (B, count) that the index finds, rows of the phase, -1 where it finds fewer."""
        index = self._index if self._on_gpu is None or count > _ON_GPU else self._on_gpu
        _, found = index.search(np.ascontiguousarray(queries, np.float32), count)
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

    Where the disk refuses it serves this process all the same, and a warning says so.

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
    keys = bank.keys[view]
    if not len(keys) or len(keys) != store.count(phase):
        raise InvalidInput(f"view {view!r}: expected every clip of phase {folder.name!r} to have it")
    index, on_gpu = _filled(faiss, keys, kind)
    chosen = generator.choice(len(keys), min(queries, len(keys)), replace=False)
    about = Measured(uid=uid, commit=commit, view=view, kind=kind, rows=len(keys), recall=0, k=k, queries=len(chosen))
    exact = mine(CascadePlan.parse(f"{view}:{k}"), {view: keys[chosen]}, bank).index
    found = Approximate(index, about, on_gpu).nearest(keys[chosen], exact.shape[1])
    about = replace(about, recall=float((exact[:, :, None] == found[:, None, :]).any(axis=2).mean()))
    try:
        _keep(faiss, index, about, folder)
    except (OSError, RuntimeError) as error:  # faiss has no error of its own for files
        log.warning("%s: the %s index of %s serves this process and is not kept (%s)", folder, kind, view, error)
    return Approximate(index, about, on_gpu)


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
    index = faiss.read_index(str(data))
    return Approximate(index, about, _moved(faiss, index, kind))


def _keep(faiss: Any, index: Any, about: Measured, folder: Path) -> None:
    aside_of(folder)
    data, described = _files(folder, about.view, about.kind)
    for left in left_aside(folder):
        left.unlink(missing_ok=True)
    temporary = aside(data)  # another process may build the same
    try:
        faiss.write_index(index, str(temporary))
        described.unlink(missing_ok=True)
        temporary.rename(data)
    finally:
        temporary.unlink(missing_ok=True)
    write_whole(LocalFiles(), described, json.dumps(asdict(about)).encode(), sync=True)


def _filled(faiss: Any, keys: npt.NDArray[Any], kind: Kind) -> tuple[Any, Any]:
    """The index with all keys on the CPU, and on a GPU where one built it."""
    index = _empty(faiss, keys.shape[1], len(keys), kind)
    on_gpu = _moved(faiss, index, kind)
    if on_gpu is not None:
        try:
            _fill(on_gpu, keys)
            filled = faiss.index_gpu_to_cpu(on_gpu)
        except RuntimeError as error:
            log.warning("a GPU could not build the %s index (%s); the CPU does", kind, _first_line(error))
            index = _empty(faiss, keys.shape[1], len(keys), kind)
        else:
            filled.nprobe = index.nprobe
            return filled, on_gpu
    _fill(index, keys)
    return index, None


def _empty(faiss: Any, dim: int, rows: int, kind: Kind) -> Any:
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 128
    elif kind == "ivf":
        lists = max(1, min(int(4 * rows**0.5), rows // 39))  # faiss warns below 39 points a list
        coarse = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFFlat(coarse, dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(lists, max(8, lists // 8), _ON_GPU)
        index.own_fields = True
        coarse.this.disown()
    else:
        raise InvalidInput(f"kind: expected hnsw or ivf, got {kind!r}")
    return index


def _fill(index: Any, keys: npt.NDArray[Any]) -> None:
    if not index.is_trained:
        index.train(np.ascontiguousarray(keys, np.float32))
    for start in range(0, len(keys), _TOGETHER):
        index.add(np.ascontiguousarray(keys[start : start + _TOGETHER], np.float32))


def _moved(faiss: Any, index: Any, kind: Kind) -> Any:
    """A copy of the index on the first GPU, or None where it stays on the CPU."""
    if kind != "ivf" or not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return None
    try:
        on_gpu = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        on_gpu.nprobe = index.nprobe
    except RuntimeError as error:
        log.warning("the %s index does not go to the GPU (%s); the CPU has it", kind, _first_line(error))
        return None
    return on_gpu


def _first_line(error: RuntimeError) -> str:
    """What faiss says without where in its sources it says it."""
    return str(error).strip().splitlines()[0]


def _files(folder: Path, view: str, kind: Kind) -> tuple[Path, Path]:
    aside = folder / "commits" / "aside"
    return aside / f"{view}.{kind}.faiss", aside / f"{view}.{kind}.json"
