"""The contestants of the mining benchmark: the engine, and how else one could mine, each at its best settings.

A contestant is prepared once with the keys and then called with batches; it answers slots (B, k), best first, -1 where
fewer are eligible.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import cascade_engine as ce
from cascade_engine.tensor import Host

from .inputs import Batch, Case, Problem
from .published import prepare_published, refuse_published
from .torch_miner import TorchMiner

Search = Callable[[Batch], Any]

_GATHER_BYTES = 1 << 28  # rows gathered at a time by contestants that gather


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to mine.

    Args:
        name: as results and `--contestant` spell it.
        exact: whether its answer is right up to float32 rounding; the engine's must be equal.
        prepare: the keys' preparation, which is not timed; returns the search.
        refuse: why it cannot run a case, or None.
    """

    name: str
    exact: bool
    prepare: Callable[[Problem], Search]
    refuse: Callable[[Case], str | None]


def contestants(backend: str | None, device: str, threads: int) -> tuple[Contestant, ...]:
    """All contestants for data on `device`, the engine first; which library a peer needs is imported when prepared."""
    field = [
        Contestant(name="engine", exact=True, prepare=lambda p: _engine(p, backend, device), refuse=_runs),
        Contestant(name="torch", exact=True, prepare=lambda p: TorchMiner(p, device, torch.float32), refuse=_runs),
        Contestant(
            name="torch-bf16", exact=False, prepare=lambda p: TorchMiner(p, device, torch.bfloat16), refuse=_runs
        ),
        Contestant(
            name="faiss-default", exact=True, prepare=lambda p: FaissMiner(p, device, blas=False), refuse=_plain_views
        ),
    ]
    if device != "cpu":
        return tuple(field)
    return (
        *field,
        Contestant(
            name="faiss-blas", exact=True, prepare=lambda p: FaissMiner(p, device, blas=True), refuse=_plain_views
        ),
        Contestant(name="numpy", exact=True, prepare=_numpy, refuse=_plain_views),
        Contestant(name="scikit-learn", exact=True, prepare=_sklearn, refuse=_one_view_unit),
        Contestant(name="usearch", exact=True, prepare=lambda p: _usearch(p, threads), refuse=_one_view),
        Contestant(name="published", exact=True, prepare=prepare_published, refuse=refuse_published),
    )


def _runs(case: Case) -> str | None:
    return None


def _plain_views(case: Case) -> str | None:
    if any(stage.over_bank or stage.score.fusion is not None for stage in case.parsed.stages):
        return "plain views only"
    return None


def _one_view(case: Case) -> str | None:
    return None if case.single_view else "one view without exclusion only"


def _one_view_unit(case: Case) -> str | None:
    if case.family == "lengths":
        return "Euclidean distance ranks as the inner product does for unit vectors only"
    return _one_view(case)


def _engine(problem: Problem, backend: str | None, device: str) -> Search:
    plan = problem.case.parsed

    def placed(value: Host) -> Any:
        return value if device == "cpu" else torch.from_numpy(value).to(device)

    bank = ce.Bank({view: placed(keys) for view, keys in problem.keys.items()}, placed(problem.video_id), checked=True)
    batches = {
        id(batch): ({view: placed(q) for view, q in batch.queries.items()}, placed(batch.video_id))
        for batch in problem.batches
    }

    def search(batch: Batch) -> Any:
        queries, ids = batches[id(batch)]
        return ce.mine(plan, queries, bank, ids if problem.exclude else None, backend=backend).index

    return search


class FaissMiner:
    """IndexFlatIP for the first stage, the other views' rows gathered for the stages after it.

    Its exhaustive search takes the BLAS path for large enough query sets only; ``blas=True`` forces it and picks the
    fastest of a few block sizes.
    """

    def __init__(self, problem: Problem, device: str, *, blas: bool) -> None:
        """Index the first view's keys."""
        import faiss

        self.case, self.plan, self.blas, self._faiss = problem.case, problem.case.parsed, blas, faiss
        self.keys = {view: torch.from_numpy(keys) for view, keys in problem.keys.items()}
        self.video = torch.from_numpy(problem.video_id)
        counts = np.unique(problem.video_id, return_counts=True)[1]
        self.spare = int(counts.max(initial=0)) if problem.exclude else 0
        self.block = int(faiss.cvar.distance_compute_blas_database_bs)
        first = self.plan.stages[0].score.views[0]
        self.index: Any = faiss.IndexFlatIP(problem.case.width)
        if device != "cpu":
            self.index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self.index)
        self.index.add(problem.keys[first])
        if blas:
            self.block = self._fastest_block(problem)

    def _fastest_block(self, problem: Problem) -> int:
        best, chosen = float("inf"), self.block
        for block in (256, 1024, 4096, 16384):
            self.block = block
            for _ in range(2):
                start = time.perf_counter()
                self(problem.batches[0])
                taken = time.perf_counter() - start
            if taken < best:
                best, chosen = taken, block
        return chosen

    def __call__(self, batch: Batch) -> Host:
        """Search the first view, then gather and rank."""
        stages, counts = self.plan.stages, self.plan.counts(self.case.keys)
        first = stages[0].score.views[0]
        asked = min(counts[0] + self.spare, self.case.keys)
        found = torch.from_numpy(self._search(batch.queries[first], asked))
        if self.spare:
            own = self.video[found] == torch.from_numpy(batch.video_id)[:, None]
            kept = torch.argsort(own.to(torch.uint8), dim=1, stable=True)[:, : counts[0]]
            found = found.gather(1, kept)
        for number in range(1, len(stages)):
            view = stages[number].score.views[0]
            scores = self._gathered(torch.from_numpy(batch.queries[view]), self.keys[view], found)
            last = number == len(stages) - 1
            found = found.gather(1, scores.topk(counts[number], dim=1, sorted=last).indices)
        return found.numpy()

    def _search(self, queries: Host, count: int) -> Host:
        settings = self._faiss.cvar
        before = settings.distance_compute_blas_threshold, settings.distance_compute_blas_database_bs
        if self.blas:
            settings.distance_compute_blas_threshold, settings.distance_compute_blas_database_bs = 0, self.block
        try:
            index: Host = self.index.search(queries, count)[1]
        finally:
            settings.distance_compute_blas_threshold, settings.distance_compute_blas_database_bs = before
        return index

    def _gathered(self, queries: torch.Tensor, keys: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        out = torch.empty(found.shape)
        step = max(1, _GATHER_BYTES // (4 * keys.shape[1] * max(1, found.shape[1])))
        for start in range(0, len(found), step):
            rows = slice(start, start + step)
            out[rows] = torch.bmm(keys[found[rows]], queries[rows, :, None])[:, :, 0]
        return out


def _numpy(problem: Problem) -> Search:
    plan, counts = problem.case.parsed, problem.case.parsed.counts(problem.case.keys)

    def search(batch: Batch) -> Host:
        scores = {view: batch.queries[view] @ problem.keys[view].T for view in plan.views}
        if problem.exclude:
            scores[plan.views[0]][batch.video_id[:, None] == problem.video_id[None]] = -np.inf
        alive: Host | None = None
        for stage, count in zip(plan.stages, counts, strict=True):
            values = scores[stage.score.views[0]]
            if alive is not None:
                values = np.take_along_axis(values, alive, 1)
            best = np.argpartition(-values, count - 1, axis=1)[:, :count]
            kept = np.take_along_axis(values, best, 1)
            alive = best if alive is None else np.take_along_axis(alive, best, 1)
        if alive is None:
            raise AssertionError("a plan has stages")
        return np.take_along_axis(alive, np.argsort(-kept, axis=1), 1)

    return search


def _sklearn(problem: Problem) -> Search:
    from sklearn.neighbors import NearestNeighbors

    view = problem.case.parsed.views[0]
    k = problem.case.parsed.counts(problem.case.keys)[-1]
    fitted = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(problem.keys[view])
    return lambda batch: fitted.kneighbors(batch.queries[view], return_distance=False)


def _usearch(problem: Problem, threads: int) -> Search:
    from usearch.compiled import MetricKind
    from usearch.index import search

    view = problem.case.parsed.views[0]
    k = problem.case.parsed.counts(problem.case.keys)[-1]

    def run(batch: Batch) -> Host:
        found = search(problem.keys[view], batch.queries[view], k, MetricKind.IP, exact=True, threads=threads)
        return np.asarray(found.keys).astype(np.int64)

    return run
