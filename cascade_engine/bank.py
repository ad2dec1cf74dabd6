"""The bank: the immutable keys that are searched, one matrix per view, sharing their slots."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from cascade_engine.errors import InvalidInput
from cascade_engine.tensor import (
    FEATURE_DTYPES,
    Array,
    device_of,
    dtype_name,
    feature_matrix,
    ids_on,
    is_torch,
    require_finite,
    to_host,
)

if TYPE_CHECKING:
    from cascade_engine.tensor import Host

Metric = Literal["ip", "cosine", "l2"]
METRICS: tuple[Metric, ...] = get_args(Metric)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Where a backend may keep on disk what it prepares of keys that are mapped from files and never change.

    Args:
        folder: for the files, which must exist.
        suffix: of their names.
        identity: says which keys, for good: a file that was made from others is refused and made anew.
    """

    folder: Path
    suffix: str
    identity: str


class Prepared:
    """What backends made of a bank's keys for their searches, kept until the keys are overwritten.

    A key queue shares one among its snapshots. Whatever has a method ``update(first, count)`` is brought up to date in
    place when it is next asked for; anything else is made anew. With a `shelf`, what is large is kept on disk.

    A signal handler may search, or push, while its own thread is in here.
    """

    def __init__(self, shelf: Shelf | None = None) -> None:
        self.shelf = shelf
        self._made: dict[object, Any] = {}
        self._behind: dict[object, list[range]] = {}  # slots overwritten since, in runs that do not touch
        self._overwritings = 0
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        """As nothing made: it is made again where it is needed."""
        return Prepared, ()

    def get(self, purpose: object, make: Callable[[], T]) -> T:
        """What `make` returned for `purpose`, made once and up to date; safe to call from several threads."""
        with self._lock:
            while purpose not in self._made:
                before = self._overwritings
                made = make()
                if self._overwritings == before:  # else a signal handler has pushed meanwhile
                    self._made.setdefault(purpose, made)
            found: T = self._updated(purpose)
            return found

    def made(self, purpose: object) -> Any:
        """What `get` has returned for `purpose`, up to date, or None."""
        with self._lock:
            return self._updated(purpose) if purpose in self._made else None

    def _updated(self, purpose: object) -> Any:
        """Brought up to date; slots stay behind until that has succeeded."""
        made = self._made[purpose]
        while behind := self._behind.get(purpose):
            slots = behind[0]
            made.update(slots.start, len(slots))
            # by identity: a signal handler may have brought them up to date, or overwritten them again
            self._behind[purpose] = [other for other in self._behind[purpose] if other is not slots]
        return made

    @contextmanager
    def overwriting(self, runs: Iterable[range]) -> Iterator[set[object]]:
        """Around writing other keys to runs of slots: what is made is behind from its start, whatever ends it.

        Purposes that the writing has brought up to date itself, once it has, go into the set.
        """
        runs = [slots for slots in runs if slots]
        self._note(runs)
        served: set[object] = set()
        try:
            yield served
        finally:
            self._note(runs, served)

    def _note(self, runs: list[range], served: Container[object] = ()) -> None:
        """Let what is made be behind by `runs`, or by `runs` no longer where its purpose has been `served`."""
        with self._lock:
            self._overwritings += 1
            for purpose, made in list(self._made.items()):
                behind = self._behind.get(purpose, [])
                for slots in runs:
                    behind = _without(behind, slots) if purpose in served else _with(behind, slots)
                self._behind[purpose] = behind
                if not hasattr(made, "update") and purpose not in served:
                    del self._made[purpose], self._behind[purpose]


def _with(runs: list[range], slots: range) -> list[range]:
    """Runs of slots and some more; what these touch becomes one run, and a new object."""
    touched = [run for run in runs if run.start <= slots.stop and slots.start <= run.stop]
    whole = range(min(run.start for run in [slots, *touched]), max(run.stop for run in [slots, *touched]))
    return [*(run for run in runs if run not in touched), whole]


def _without(runs: list[range], slots: range) -> list[range]:
    """Runs of slots less some."""
    before = (range(run.start, min(run.stop, slots.start)) for run in runs)
    after = (range(max(run.start, slots.stop), run.stop) for run in runs)
    return [part for part in (*before, *after) if part]


class Bank:
    """Keys to search: per view a matrix (K, D_view), with the video each key was cut from.

    The arrays are kept as given, without a copy, and must not be changed while the bank is in use. What a backend
    prepares for its searches is made at the first one and kept on the bank.

    Args:
        keys: view name to features (K, D_view), float32, float16 or bfloat16, NumPy or torch, on one device.
        video_id: (K,) integers, the source video of each key; needed to exclude a query's own video. Ids go to the
            keys' device.
        clip_id: (K,) integers, for the caller's use; defaults to the slot number.
        label: (K,) labels where known; mining never reads them.
        metric: ``"ip"`` inner product, ``"cosine"`` or ``"l2"`` (negative squared distance); larger is more similar.
        checked: the keys are known to be finite (a feature store checked them on the way in).

    Raises:
        InvalidInput: no view, views of different K, wrong rank or type, NaN or infinity (the row is named).
    """

    def __init__(
        self,
        keys: Mapping[str, Array],
        video_id: object = None,
        *,
        clip_id: object = None,
        label: Any = None,
        metric: Metric = "ip",
        checked: bool = False,
        guard: Callable[[], None] | None = None,
        prepared: Prepared | None = None,
    ) -> None:
        if not keys:
            raise InvalidInput("keys: expected at least one view, got none")
        if metric not in METRICS:
            raise InvalidInput(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        devices = {device_of(value) for value in keys.values()}
        if len(devices) != 1:
            raise InvalidInput(f"keys: expected all views on one device, got {', '.join(sorted(devices))}")
        self.device = devices.pop()
        self.metric: Metric = metric
        self.keys: dict[str, Any] = {}
        size: int | None = None
        for view, value in keys.items():
            name = f'keys["{view}"]'
            checked_value = _matrix(value, name)
            if size is not None and len(checked_value) != size:
                raise InvalidInput(
                    f"{name}: expected ({size}, D) as the first view has, "
                    f"got {tuple(checked_value.shape)} {dtype_name(checked_value)}"
                )
            size = len(checked_value)
            if not checked:
                _require_finite(checked_value, name)
            self.keys[view] = checked_value
        self.size: int = size or 0
        self.video_id = None if video_id is None else ids_on(self.device, video_id, "video_id", self.size)
        self.clip_id = None if clip_id is None else ids_on(self.device, clip_id, "clip_id", self.size)
        self.label = label
        self._guard = guard
        self._prepared = Prepared() if prepared is None else prepared

    @property
    def views(self) -> tuple[str, ...]:
        """The views' names, in the order given."""
        return tuple(self.keys)

    def __len__(self) -> int:
        """K, the number of keys."""
        return self.size

    def __repr__(self) -> str:
        """Views with their shapes and types."""
        shapes = ", ".join(f"{view}: {tuple(keys.shape)} {dtype_name(keys)}" for view, keys in self.keys.items())
        return f"Bank({shapes}, metric={self.metric!r}, device={self.device!r})"

    def __copy__(self) -> Bank:
        """The same keys, and the same guard."""
        other = object.__new__(Bank)
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and deep copies, whose keys are their own: nothing overwrites them, nothing is prepared.

        Raises:
            StaleBank: the queue that this bank is a snapshot of has overwritten it since.
        """
        self.ensure_fresh()
        return {**self.__dict__, "_guard": None}

    def host_keys(self, view: str) -> Host:
        """One view's keys as a NumPy matrix (K, D) that shares their memory."""
        return to_host(self.keys[view], f'keys["{view}"]')

    def host_video_id(self) -> Host | None:
        """The keys' video ids (K,) int64 as a NumPy array, or None."""
        return None if self.video_id is None else to_host(self.video_id, "video_id")

    def guarded(self, guard: Callable[[], None]) -> Bank:
        """The same bank, nothing checked anew, whose `ensure_fresh` calls `guard`."""
        other = self.__copy__()
        other._guard = guard
        return other

    def ensure_fresh(self) -> None:
        """Raise StaleBank where this bank is a queue's snapshot and the queue has overwritten it since."""
        if self._guard is not None:
            self._guard()

    @property
    def shelf(self) -> Shelf | None:
        """Where backends may keep what they prepare, or None: in memory."""
        return self._prepared.shelf

    def prepared(self, purpose: object, make: Callable[[], T]) -> T:
        """What `make` returned for `purpose`, made once and kept on the bank; safe to call from several threads."""
        return self._prepared.get(purpose, make)


def _matrix(value: Array, name: str) -> Any:
    """The matrix as given, with the sequence kinds of NumPy made arrays."""
    if is_torch(value) and value.device.type != "cpu":
        if value.ndim != 2 or value.shape[1] < 1 or dtype_name(value) not in FEATURE_DTYPES:
            raise InvalidInput(
                f"{name}: expected (N, D) float32, float16 or bfloat16, got {tuple(value.shape)} {dtype_name(value)}"
            )
        return value.detach()
    host = feature_matrix(value, name)
    return value.detach() if is_torch(value) else host


def _require_finite(value: Any, name: str) -> None:
    if is_torch(value) and value.device.type != "cpu":
        import torch

        finite = torch.isfinite(value).all(dim=1)
        if not bool(finite.all()):
            raise InvalidInput(
                f"{name}: expected finite values, got NaN or infinity in row {int((~finite).nonzero()[0])}"
            )
        return
    require_finite(to_host(value, name), name)
