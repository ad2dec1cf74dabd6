"""What can be asked of a store that is there: its phases, features, columns, filters and banks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_engine.bank import Bank, Metric, Prepared
from cascade_engine.errors import InvalidInput
from cascade_engine.store import filtering
from cascade_engine.store.checking import Problem, verify
from cascade_engine.store.columns import Categorical
from cascade_engine.store.creating import phase_names
from cascade_engine.store.mapping import gather as gather_rows
from cascade_engine.store.mapping import prefetch as prefetch_rows
from cascade_engine.store.phase import Commit, Phase
from cascade_engine.store.shelving import shelf_of
from cascade_engine.tensor import id_vector, shared, to_host

Values = np.ndarray[Any, Any]
Rows = npt.NDArray[np.int64]


class StoreReader(ABC):
    """The reading half of `FeatureStore`: every call is about one commit of one phase, the current one by default."""

    path: Path
    phase: str

    @abstractmethod
    def _at(self, phase: str | None) -> Phase:
        """A phase as this store sees it."""

    @property
    def rows(self) -> int:
        """Clips committed in the current phase."""
        return self._at(None).record.rows

    @property
    def views(self) -> dict[str, int]:
        """View to width, of the current phase."""
        return {name: view.dim for name, view in self._at(None).record.views.items()}

    @property
    def columns(self) -> dict[str, str]:
        """Column to type, of the current phase, the built-in ones included."""
        return {name: column.type for name, column in self._at(None).record.columns.items()}

    @property
    def phases(self) -> tuple[str, ...]:
        """All phases, oldest first."""
        return phase_names(self.path)

    @property
    def commit(self) -> int:
        """The number of the current phase's last commit."""
        return self._at(None).record.commit

    @property
    def sealed(self) -> bool:
        """Whether the current phase is final."""
        return self._at(None).record.sealed

    def count(self, phase: str | None = None, at: int | None = None) -> int:
        """Clips committed in a phase, now or at an older commit."""
        return self._at(phase).rows(at)

    def identity(self, phase: str | None = None) -> tuple[Path, str, int, bool]:
        """A phase's folder, its uid for good, its last commit, and whether it is sealed."""
        held = self._at(phase)
        return held.folder, held.record.uid, held.record.commit, held.record.sealed

    @property
    def merged(self) -> Mapping[str, int | None]:
        """The uid of each staging group that was merged, to the rows it had; None where an older store did not say."""
        return self._at(None).record.merged

    def float16_lossless(self, phase: str | None = None) -> dict[str, bool]:
        """Which float32 views hold nothing that float16 would round: half the space would hold the same."""
        return {name: bool(view.float16_lossless) for name, view in self._at(phase).record.views.items()}

    def coverage(self) -> dict[str, dict[str, int]]:
        """How many clips have each view, by phase."""
        return {
            phase: {view: int(self.present(view, phase=phase).sum()) for view in self._at(phase).record.views}
            for phase in self.phases
        }

    def missing(self, view: str, *, phase: str | None = None, of: str | None = None) -> Rows:
        """The ids of clips without a view in a phase, ascending.

        Args:
            view: the view.
            phase: where it is looked for; the current phase by default.
            of: the phase whose clips are asked about; `phase` itself by default.
        """
        held = self._at(phase)
        asked = np.asarray(self._at(of or phase).column("clip_id"))
        if view not in held.record.views:
            return np.sort(asked)
        there = np.asarray(held.column("clip_id"))[held.present(view)]
        found: Rows = np.setdiff1d(asked, there)
        return found

    def model(self, phase: str | None = None) -> str | None:
        """What computed a phase's features, as it was told when the phase was made."""
        return self._at(phase).record.model

    def log(self, phase: str | None = None) -> list[Commit]:
        """All commits of a phase, oldest first; their numbers are what `at` takes."""
        return self._at(phase).log

    def coded(self, name: str, *, phase: str | None = None, at: int | None = None) -> Values | Categorical:
        """A column's values (n,), mapped; text as codes with their meaning."""
        return self._at(phase).column(name, at)

    def schema(self, phase: str | None = None) -> tuple[dict[str, int], dict[str, str]]:
        """The views with their widths and the columns with their types of any phase."""
        record = self._at(phase).record
        views = {name: view.dim for name, view in record.views.items()}
        return views, {name: column.type for name, column in record.columns.items()}

    def features(self, view: str, *, phase: str | None = None, at: int | None = None) -> Values:
        """All features of a view (n, D), mapped, read-only; NaN where a clip does not have it."""
        return self._at(phase).features(view, at)

    def present(self, view: str, *, phase: str | None = None, at: int | None = None) -> npt.NDArray[np.bool_]:
        """Which clips (n,) have a view."""
        return self._at(phase).present(view, at)

    def column(self, name: str, *, phase: str | None = None, at: int | None = None) -> Values:
        """A column's values (n,): int64, float64, bool or texts."""
        values = self._at(phase).column(name, at)
        return np.asarray(values)

    def rows_of(self, clip_id: object, *, phase: str | None = None) -> Rows:
        """The rows (b,) that clips are in."""
        ids = id_vector(clip_id, "clip_id", len(to_host(clip_id, "clip_id")))
        return self._at(phase).rows_of(ids)

    def gather(
        self, view: str, rows: object, *, phase: str | None = None, at: int | None = None, prefetch: bool = False
    ) -> Values:
        """A copy (b, D) of some rows of a view.

        Args:
            view: the view.
            rows: (b,) row numbers.
            phase: the current one by default.
            at: a commit.
            prefetch: ask for all rows at once before reading the first: much faster where they are not in memory,
                a little slower where they are.
        """
        values = self._at(phase).features(view, at)
        chosen = id_vector(rows, "rows", len(to_host(rows, "rows")))
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(values)):
            raise InvalidInput(f"rows: expected rows from 0 to {len(values) - 1}, got {chosen.min()} to {chosen.max()}")
        if prefetch:
            prefetch_rows(values, chosen)
        found: Values = values.take(chosen, axis=0)
        return found

    def matching(
        self,
        where: str | None = None,
        *,
        views: tuple[str, ...] = (),
        phase: str | None = None,
        at: int | None = None,
    ) -> Rows | None:
        """The rows of clips that have all `views` and fulfil a condition, ascending; None means all rows.

        Raises:
            InvalidInput: the condition cannot be read; the position is named.
        """
        held, count = self._at(phase), self._at(phase).rows(at)
        chosen: npt.NDArray[np.bool_] | None = None
        if where is not None:
            chosen = filtering.mask(
                where,
                count,
                column=lambda name: held.column(name, at),
                has=lambda view: held.present(view, at),
                names=tuple(held.record.columns),
            )
        for view in views:
            there = held.present(view, at)
            if not there.all():
                chosen = there if chosen is None else chosen & there
        return None if chosen is None or chosen.all() else np.flatnonzero(chosen)

    def bank(
        self,
        views: str | tuple[str, ...] | list[str] | None = None,
        *,
        phase: str | None = None,
        where: str | None = None,
        at: int | None = None,
        metric: Metric = "ip",
        device: str | None = None,
        keep: bool | None = None,
    ) -> Bank:
        """The clips that have all of `views` as a bank: mapped without a copy where that is all, gathered otherwise.

        Args:
            views: one view or several; all by default.
            phase: the current one by default.
            where: a condition on columns, see `cascade_engine.store.filtering`.
            at: a commit number; the last one by default.
            metric: of the bank.
            device: a torch device, for tensors (``"cpu"`` shares the mapped memory); NumPy arrays by default.
            keep: of a bank of all clips, keep on disk beside the phase what the CPU backend prepares for mining, map it
                there, and hold what is mapped to a fixed amount of memory; by default for views of 2^28 values and
                more. Otherwise it is made in memory, in every process.

        Raises:
            NotFound: a view, phase or commit that is not there.
            InvalidInput: the condition cannot be read; the position is named.
        """
        held = self._at(phase)
        names = (views,) if isinstance(views, str) else tuple(views or held.record.views)
        rows = self.matching(where, views=names, phase=phase, at=at)

        def part(values: Any) -> Any:
            if rows is None:
                return values
            return values.take(rows) if isinstance(values, Categorical) else gather_rows(values, rows)

        label = part(held.column("label", at)) if "label" in held.record.columns else None
        ids = {name: part(held.column(name, at)) for name in ("video_id", "clip_id")}
        keys = {name: part(held.features(name, at)) for name in names}
        whole = rows is None and device in (None, "cpu")
        prepared = Prepared(shelf_of(held, at, names, metric, keep) if whole else None)
        if device is not None:
            keys = {name: shared(values).to(device) for name, values in keys.items()}
            ids = {name: shared(values).to(device) for name, values in ids.items()}
        return Bank(
            keys,
            ids["video_id"],
            clip_id=ids["clip_id"],
            label=label,
            metric=metric,
            checked=True,
            prepared=prepared,
        )

    def verify(self, phase: str | None = None, progress: Callable[[int], None] = lambda _: None) -> list[Problem]:
        """Compare the bytes on disk with the checksums of what was committed; an empty list means all is well.

        Args:
            phase: one phase; all by default.
            progress: called with the bytes just checked.
        """
        return verify(self.path, None if phase is None else (phase,), progress)
