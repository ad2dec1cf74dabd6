"""Whether a contestant's answer is right, decided in float64 before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import cascade_engine as ce
from cascade_engine.kernels import reference
from cascade_engine.tensor import Host, is_torch

from .inputs import Batch, Problem

_WORK = 1 << 27  # multiplications the judge may spend on a case
_CHUNK = 1 << 16  # keys scored at a time
_FLOAT32 = 2.0**-20  # relative to the largest score: what a float32 product over a few hundred terms may be off by
_EXPLAINED = 0.9  # share of judged rows a float32 contestant must get right; see `Judge`


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an answer compares with the definition's.

    Args:
        rows: rows judged.
        equal: share of them with equal slots in equal order.
        explained: share that is equal, or differs only between keys that float32 rounding cannot tell apart.
    """

    rows: int
    equal: float
    explained: float

    def accepts(self, *, engine: bool) -> bool:
        """The engine must be equal; the others right up to rounding."""
        return self.equal == 1.0 if engine else self.explained >= _EXPLAINED


class Judge:
    """The definition's answer to some rows of the first batch, by the reference backend.

    A float32 contestant may put a key on the wrong side of an intermediate stage's cut, and then a final answer may
    differ by a whole key: one judged row in ten may.
    """

    def __init__(self, problem: Problem) -> None:
        """Score the judged rows against all keys."""
        self.problem, self.plan, case = problem, problem.case.parsed, problem.case
        batch = problem.batches[0]
        affordable = _WORK // max(1, case.keys * case.width * len(self.plan.views))
        self.rows = np.unique(np.linspace(0, case.queries - 1, int(np.clip(affordable, 2, 32))).astype(int))
        self.scores = {view: self._similarity(batch, view) for view in self.plan.views}
        self.mask = None
        if problem.exclude:
            self.mask = batch.video_id[self.rows, None] == problem.video_id[None]
        found = ce.select(self.plan, self.scores, self.mask, backend="reference")
        self.index = np.asarray(found.index)

    def _similarity(self, batch: Batch, view: str) -> Host:
        queries, keys = batch.queries[view][self.rows], self.problem.keys[view]
        parts = [
            reference.similarity(queries, keys[first : first + _CHUNK], "ip") for first in range(0, len(keys), _CHUNK)
        ]
        return np.concatenate(parts, axis=1)

    def __call__(self, answer: Any) -> Verdict:
        """Judge slots (B, k)."""
        given = answer.cpu().numpy() if is_torch(answer) else np.asarray(answer)
        given = given[self.rows]
        if given.shape != self.index.shape:
            return Verdict(rows=len(self.rows), equal=0.0, explained=0.0)
        equal = (given == self.index).all(1)
        explained = equal | np.array([self._close(row, given[row]) for row in range(len(given))])
        return Verdict(rows=len(equal), equal=float(equal.mean()), explained=float(explained.mean()))

    def _close(self, row: int, given: Host) -> bool:
        if len(np.unique(given[given >= 0])) < (given >= 0).sum() or ((given >= 0) != (self.index[row] >= 0)).any():
            return False
        value = self._last_score(row)
        tolerance = _FLOAT32 * float(np.abs(value[np.isfinite(value)]).max(initial=0))
        there = given >= 0
        return bool((np.abs(value[given[there]] - value[self.index[row][there]]) <= tolerance).all())

    def _last_score(self, row: int) -> Host:
        """The last stage's score of every key, as far as it does not depend on the stages before."""
        stage = self.plan.stages[-1]
        scores = {view: self.scores[view][row] for view in stage.score.views}
        everything = np.arange(self.problem.case.keys)
        eligible = everything if self.mask is None else everything[~self.mask[row]]
        value = np.full(self.problem.case.keys, -np.inf)
        value[eligible] = reference.fused(stage.score, scores, eligible)
        return value
