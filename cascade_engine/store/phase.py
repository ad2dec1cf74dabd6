"""A phase as one commit shows it: mapped features and columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import NotFound
from cascade_engine.store.blanks import blank_chunks
from cascade_engine.store.clips import ClipIndex
from cascade_engine.store.columns import Categorical, unpack
from cascade_engine.store.layout import presence_path
from cascade_engine.store.mapping import map_array
from cascade_engine.store.record import Record
from cascade_engine.store.writer import KINDS
from cascade_engine.tensor import BFLOAT16

Values = np.ndarray[Any, Any]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One entry of a phase's log: commit number, rows committed then, seconds since 1970, and what it did."""

    number: int
    rows: int
    time: float
    kind: str


class Phase:
    """One commit of one phase. Files are mapped when first read; the arrays stay valid while they are referenced.

    Args:
        folder: the phase's folder.
        record: what its `zarr.json` said.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record
        self._maps: dict[str, Values] = {}

    @cached_property
    def log(self) -> list[Commit]:
        """All commits so far, oldest first."""
        rows = self._array("commits").tolist()
        return [
            Commit(number=number, rows=count, time=time_ns / 1e9, kind=KINDS[kind])
            for number, (count, time_ns, kind) in enumerate(rows)
        ]

    @cached_property
    def clips(self) -> ClipIndex:
        """Clip ids to rows."""
        return ClipIndex(self._array("clip_id"))

    def rows(self, at: int | None) -> int:
        """Rows committed at commit `at`, or now."""
        if at is None:
            return self.record.rows
        if not 0 <= at <= self.record.commit:
            raise NotFound(f"at: expected a commit from 0 to {self.record.commit}, got {at}")
        return int(self._array("commits")[at, 0])

    def features(self, view: str, at: int | None = None) -> Values:
        """All rows of a view (n, D), mapped; NaN where a clip does not have it."""
        self.require_view(view)
        values = self._array(view)[: self.rows(at)]
        return values.view(BFLOAT16) if self.record.views[view].dtype == "bfloat16" else values

    def present(self, view: str, at: int | None = None) -> Mask:
        """Which clips (n,) have a view."""
        self.require_view(view)
        commit = self.record.commit if at is None else at
        found: Mask = self._array(presence_path(view))[: self.rows(at)] <= commit
        return found

    def column(self, name: str, at: int | None = None) -> Values | Categorical:
        """A column's values (n,): mapped, or coded text."""
        if name not in self.record.columns:
            raise NotFound(f"column {name!r}: expected one of {', '.join(self.record.columns)}")
        column, rows = self.record.columns[name], self.rows(at)
        commit = self.record.commit if at is None else at
        if column.versions[0][0] > commit:
            raise NotFound(f"column {name!r}: added by commit {column.versions[0][0]}, after commit {commit}")
        path = column.path(commit)
        values = self._array(path)[:rows]
        if column.type != "str":
            return values
        return Categorical(codes=values, categories=self.categories(path))

    def categories(self, path: str) -> tuple[str, ...]:
        """The texts that the codes of a text column's array mean."""
        return unpack(self._array(f"{path}-bytes"), self._array(f"{path}-ends"))

    def rows_of(self, clip_id: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of clips.

        Raises:
            NotFound: a clip that is not there.
        """
        rows = self.clips.find(clip_id)
        if (rows < 0).any():
            raise NotFound(f"clip_id: phase {self.record.phase!r} has no clip {int(clip_id[rows < 0][0])}")
        return rows

    def require_view(self, view: str) -> None:
        """Refuse a view the phase does not have."""
        if view not in self.record.views:
            raise NotFound(f"view {view!r}: phase {self.record.phase!r} has {', '.join(self.record.views)}")

    def _array(self, path: str) -> Values:
        if path not in self._maps:
            spec, length = self.record.arrays[path], self.record.tails[path].length
            view = path.removeprefix("present-")
            missing_ok = blank_chunks(self.record, path, lambda: self._array("checksums"))
            self._maps[path] = map_array(
                self.folder / path, spec, length, missing_ok if view in self.record.views else lambda _: False
            )
        return self._maps[path]
