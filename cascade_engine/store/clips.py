"""Which row a clip is in: sorted runs of clip ids, merged as they grow, so that a million appends stay cheap."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class ClipIndex:
    """Clip ids to rows. Memory is 16 bytes a clip, and nothing while ids only ever grow.

    Args:
        ids: (n,) the clip ids of the rows there are, kept without a copy.
    """

    def __init__(self, ids: Ids) -> None:
        self._base = ids
        self._runs: list[tuple[Ids, Ids]] | None = None  # sorted ids with their rows, longest first
        self._rows = len(ids)
        self._late: list[tuple[Ids, int]] = []  # added since, not in a run yet
        self._highest: int | None = None

    def __len__(self) -> int:
        """How many rows it knows."""
        return self._rows

    def duplicates(self, ids: Ids) -> Ids:
        """Those of `ids` that are there already, or twice among themselves."""
        ordered = np.sort(ids)
        twice: Ids = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice) or not len(ids) or ordered[0] > self._top():
            return twice
        known: Ids = ids[self.find(ids) >= 0]
        return known

    def add(self, ids: Ids) -> None:
        """Note ids that follow the rows so far."""
        if len(ids):
            self._late.append((ids.copy(), self._rows))
            self._highest = max(self._top(), int(ids.max()))
            self._rows += len(ids)

    def find(self, ids: Ids) -> Ids:
        """The rows of `ids`, -1 where there is none."""
        found = np.full(len(ids), -1, np.int64)
        for keys, rows in self._sorted():
            at = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
            hit = keys[at] == ids
            found[hit] = rows[at[hit]]
        return found

    def _top(self) -> int:
        if self._highest is None:
            self._highest = int(self._base.max()) if len(self._base) else int(np.iinfo(np.int64).min)
        return self._highest

    def _sorted(self) -> list[tuple[Ids, Ids]]:
        if self._runs is None:
            self._runs = [_run(self._base, 0)] if len(self._base) else []
        for ids, first in self._late:
            self._runs.append(_run(ids, first))
            while len(self._runs) > 1 and len(self._runs[-1][0]) * 2 > len(self._runs[-2][0]):
                (a, rows_a), (b, rows_b) = self._runs.pop(), self._runs.pop()
                keys, rows = np.concatenate([a, b]), np.concatenate([rows_a, rows_b])
                order = np.argsort(keys, kind="stable")
                self._runs.append((keys[order], rows[order]))
        self._late = []
        return self._runs


def _run(ids: Ids, first: int) -> tuple[Ids, Ids]:
    order = np.argsort(ids, kind="stable")
    return ids[order], order + first
