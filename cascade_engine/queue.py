"""The key queue: a first-in, first-out bank of recent keys (MoCo), one ring shared by all views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from cascade_engine.bank import Bank, Metric, Prepared
from cascade_engine.errors import InvalidInput, StaleBank
from cascade_engine.kernels import cuda
from cascade_engine.tensor import (
    FEATURE_DTYPES,
    Array,
    device_of,
    dtype_name,
    feature_matrix,
    id_vector,
    ids_on,
    is_torch,
    like,
    require_finite,
    to_host,
)
from cascade_engine.tracing import phase

_COLUMNS = ("video_id", "clip_id", "label")


class KeyQueue:
    """The newest `size` keys pushed, per view, with the video and clip each was cut from.

    Slots are reused in a ring; an empty slot is never padded with anything, `bank()` shows the filled ones only.

    Args:
        size: capacity, in keys.
        dims: view to feature width.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; pushed keys are rounded to it.
        device: a torch device to hold the keys as tensors; by default NumPy on the host, or tensors where the first
            push brings tensors.
        metric: of the banks it shows.
        normalise: scale pushed keys to unit length, in float64 by the order of summation that similarities have; keys
            of zeros stay so.

    A push to a ring on a GPU is one launch where the CUDA backend can run and ids and labels are there. Captured in a
    CUDA graph, it writes to the same slots at every replay: the place in the ring is kept on the host.

    Raises:
        InvalidInput: a size or width under 1, or an unknown type.

    Source: He et al., CVPR 2020 (MoCo), section 3.2.
    """

    def __init__(
        self,
        size: int,
        dims: Mapping[str, int],
        *,
        dtype: str = "float32",
        device: object = None,
        metric: Metric = "ip",
        normalise: bool = False,
    ) -> None:
        if size < 1 or not dims or min(dims.values()) < 1:
            raise InvalidInput(f"queue: expected a size and widths of at least 1, got size={size}, dims={dict(dims)}")
        if set(dims) & set(_COLUMNS):
            raise InvalidInput(f"dims: expected view names other than {', '.join(_COLUMNS)}, got {', '.join(dims)}")
        if dtype not in FEATURE_DTYPES:
            raise InvalidInput(f"dtype: expected one of {', '.join(FEATURE_DTYPES)}, got {dtype!r}")
        self.size, self.dims, self.dtype, self.metric, self.normalise = size, dict(dims), dtype, metric, normalise
        self.filled = 0  # slots in use
        self.cursor = 0  # the slot that the next key takes
        self.pushed = 0  # keys ever pushed
        self._reused = 0  # counts up where a push that reuses slots begins to write and where it has written
        self._device = device
        self._storage: dict[str, Any] = {}
        self._prepared = Prepared()  # of the full ring, shared by its snapshots and changed in place by a push
        self._full: Bank | None = None  # the full ring, once shown: later snapshots differ in their guards alone

    def push(
        self,
        keys: Mapping[str, Array],
        video_id: object,
        clip_id: object = None,
        label: object = None,
    ) -> None:
        """Add a batch of keys; the oldest make room. Of a batch larger than the queue its newest keys stay.

        Args:
            keys: view to features (n, D_view), every view of the queue.
            video_id: (n,) integers.
            clip_id: (n,) integers; -1 where not given.
            label: (n,) integer labels for metrics; -1 where not given.

        Raises:
            InvalidInput: views, shapes or types that do not fit, NaN, infinity, or what the queue's type rounds to
                infinity. Nothing is changed then. Values of tensors on a GPU, or for a ring there what its type rounds,
                are not looked at, which would wait for the device: see `mine` for what they do.

        Where anything interrupts the writing itself (KeyboardInterrupt, a failed launch), older snapshots are stale and
        the slots that were to be reused may hold keys or ids of both batches; the next push takes them again.
        """
        with phase("push"):
            checked, rows = self._checked(keys)
            columns = {
                "video_id": _column(video_id, "video_id", rows),
                "clip_id": None if clip_id is None else _column(clip_id, "clip_id", rows),
                "label": None if label is None else _column(label, "label", rows),
            }
            storage = self._storage or self._allocated(next(iter(keys.values())))
            engine = _engine(storage)
            if engine is None:
                self._write(storage, checked, columns, rows)
            else:
                self._launch(engine, storage, keys, columns, rows)
            self._advance(storage, rows)

    def _write(
        self, storage: Mapping[str, Any], keys: Mapping[str, Array], columns: Mapping[str, Any], rows: int
    ) -> None:
        """Convert a batch, copy what it takes of the queue's own keys, then write it, piece by piece."""
        units = {view: unit_rows(value) if self.normalise else value for view, value in keys.items()}
        given = {name: -1 if value is None else value for name, value in columns.items()}
        targets = {name: _host_of(values) for name, values in storage.items()}
        batch = {name: _assignable(value, targets[name], name) for name, value in (*units.items(), *given.items())}
        pieces = self._pieces(rows)
        overlap, rings = _overlapping(targets), tuple(targets.values())
        for name, values in batch.items():
            if not isinstance(values, int) and any(overlap(values, ring) for ring in rings):
                batch[name] = values.clone() if is_torch(values) else values.copy()
        with self._overwriting(rows):
            for slots, taken in pieces:
                for name, values in batch.items():
                    targets[name][slots] = values if isinstance(values, int) else values[taken]
            if is_torch(next(iter(storage.values()))):
                _tell_autograd(storage.values())

    def _launch(
        self,
        engine: cuda.Engine,
        storage: Mapping[str, Any],
        keys: Mapping[str, Any],
        columns: Mapping[str, Any],
        rows: int,
    ) -> None:
        """Do the same on the GPU, where what is prepared of the ring takes the new keys by the way."""
        if not rows:
            return
        batches = {view: _here(keys[view], storage[view], storage) for view in self.dims}
        given = {name: _here(value, storage[name], storage) for name, value in columns.items()}
        packed = {view: self._prepared.made(cuda.purpose(view)) for view in self.dims}
        with self._overwriting(rows) as served:
            engine.push(
                {view: (batch, storage[view], packed[view]) for view, batch in batches.items()},
                [(batch, storage[name]) for name, batch in given.items()],
                metric=self.metric,
                cursor=self.cursor,
                normalise=self.normalise,
            )
            served.update(cuda.purpose(view) for view in self.dims if packed[view] is not None)

    @contextmanager
    def _overwriting(self, rows: int) -> Iterator[set[object]]:
        """Around the writing of a batch, which anything may interrupt: snapshots are stale from its start.

        Purposes for which the writing has prepared the new keys itself go into the set.
        """
        reused = self.filled + rows > self.size
        self._reused += reused
        with self._prepared.overwriting(range(slots.start, slots.stop) for slots, _ in self._pieces(rows)) as served:
            yield served
        self._reused += reused

    def _advance(self, storage: dict[str, Any], rows: int) -> None:
        filled, cursor = min(self.size, self.filled + rows), (self.cursor + rows) % self.size
        self._storage, self.filled, self.cursor, self.pushed = storage, filled, cursor, self.pushed + rows

    def _pieces(self, rows: int) -> list[tuple[slice, slice]]:
        """Which slots take which rows of a batch: one run of the ring, or two where it wraps around."""
        first = max(0, rows - self.size)
        start = (self.cursor + first) % self.size
        run = min(rows - first, self.size - start)
        pieces = [(slice(start, start + run), slice(first, first + run))]
        if first + run < rows:
            pieces.append((slice(0, rows - first - run), slice(first + run, rows)))
        return pieces

    def bank(self) -> Bank:
        """The filled slots as a bank that shares their memory, valid until a later push reuses one of them."""
        storage = self._storage or self._allocated(None)
        seen, shows = self._reused, self.filled

        def guard() -> None:
            if shows and self._reused > seen:
                raise StaleBank("bank: the queue has overwritten keys of this snapshot; take queue.bank() again")

        if self._full is not None:
            return self._full.guarded(guard)
        shown = {name: values[:shows] for name, values in storage.items()}
        full = shows == self.size
        bank = Bank(
            {view: shown[view] for view in self.dims},
            shown["video_id"],
            clip_id=shown["clip_id"],
            label=shown["label"],
            metric=self.metric,
            checked=True,
            guard=guard,
            prepared=self._prepared if full else None,
        )
        if full:
            self._full = bank
        return bank

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and deep copies, without the snapshot kept, whose guard asks this queue."""
        return {**self.__dict__, "_full": None}

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs, keys included, as copies."""
        storage = {
            name: values.clone() if is_torch(values) else values.copy() for name, values in self._storage.items()
        }
        return {
            "size": self.size,
            "dims": dict(self.dims),
            "dtype": self.dtype,
            "filled": self.filled,
            "cursor": self.cursor,
            "pushed": self.pushed,
            "storage": storage,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; earlier snapshots become stale.

        Raises:
            InvalidInput: the state is of a queue of another size, type or views, or incomplete; nothing changes then.
        """
        for name, mine in (("size", self.size), ("dims", self.dims), ("dtype", self.dtype)):
            if state.get(name) != mine:
                raise InvalidInput(f"state: expected {name} {mine}, got {state.get(name)}")
        filled, cursor, pushed = (_counter(state, name) for name in ("filled", "cursor", "pushed"))
        if filled > self.size or cursor >= max(1, self.size) or (filled < self.size and cursor != filled):
            raise InvalidInput(
                f"state: expected a queue of {self.size}, got {filled} keys filled and the next at {cursor}"
            )
        saved: Mapping[str, Any] = state.get("storage", {})
        if saved or filled:
            storage = self._storage or self._allocated(next(iter(saved.values()), None))
            for name, values in storage.items():
                if name not in saved or tuple(saved[name].shape) != tuple(values.shape):
                    got = tuple(saved[name].shape) if name in saved else "nothing"
                    raise InvalidInput(f'state["storage"]: expected {tuple(values.shape)} of {name!r}, got {got}')
            given = {name: _assignable(saved[name], values, name) for name, values in storage.items()}
            self._forget()
            for name, values in storage.items():
                values[:] = given[name]
            self._storage = storage
        self.filled, self.cursor = filled, cursor
        self.pushed = max(self.pushed, pushed) + 1
        self._forget()

    def _forget(self) -> None:
        """Let every snapshot be stale and nothing be prepared."""
        self._reused += 1
        self._prepared, self._full = Prepared(), None

    def _checked(self, keys: Mapping[str, Array]) -> tuple[dict[str, Any], int]:
        """The batch, as host matrices where it is on the host, and its rows."""
        if set(keys) != set(self.dims):
            raise InvalidInput(f"keys: expected the views {', '.join(self.dims)}, got {', '.join(keys) or 'none'}")
        rows: int | None = None
        checked: dict[str, Any] = {}
        for view, value in keys.items():
            name, width = f'keys["{view}"]', self.dims[view]
            checked[view] = value
            if device_of(value) == "cpu":
                checked[view] = feature_matrix(value, name, columns=width)
                require_finite(checked[view], name)
            elif value.ndim != 2 or value.shape[1] != width or dtype_name(value) not in FEATURE_DTYPES:
                got = f"{tuple(value.shape)} {dtype_name(value)}"
                raise InvalidInput(f"{name}: expected (N, {width}) float32, float16 or bfloat16, got {got}")
            if rows is not None and len(value) != rows:
                raise InvalidInput(
                    f"{name}: expected ({rows}, {width}) as the first view has, got {tuple(value.shape)}"
                )
            rows = len(value)
        return checked, rows or 0

    def _allocated(self, template: object) -> dict[str, Any]:
        """Empty storage: tensors where the queue has a device or `template` is a tensor, else NumPy arrays."""
        shapes = {view: (self.size, width) for view, width in self.dims.items()}
        if self._device is not None or is_torch(template):
            import torch

            device: Any = self._device if self._device is not None else getattr(template, "device", None)
            kind: Any = getattr(torch, self.dtype)
            return {
                **{view: torch.zeros(shape, dtype=kind, device=device) for view, shape in shapes.items()},
                **{name: torch.full((self.size,), -1, device=device) for name in _COLUMNS},
            }
        return {
            **{view: np.zeros(shape, FEATURE_DTYPES[self.dtype]) for view, shape in shapes.items()},
            **{name: np.full(self.size, -1, np.int64) for name in _COLUMNS},
        }


def unit_rows(matrix: Any) -> Any:
    """The rows (n, D) at unit length, float32; zeros stay zeros."""
    tensor = is_torch(matrix)
    wide: Any = matrix.detach().double() if tensor else np.asarray(matrix).astype(np.float64)
    sums: Any = wide.new_zeros((len(wide), 8)) if tensor else np.zeros((len(wide), 8))
    for d in range(0, wide.shape[1], 8):  # the contract's order: see kernels/reference.py
        part = wide[:, d : d + 8]
        sums[:, : part.shape[1]] += part * part
    s = sums.T
    length = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
    length = length.sqrt() if tensor else np.sqrt(length)
    length[length == 0] = 1
    unit = wide / length[:, None]
    return unit.float() if tensor else unit.astype(np.float32)


def _engine(storage: Mapping[str, Any]) -> cuda.Engine | None:
    """The CUDA backend, for a ring on a GPU that it can reach."""
    on_gpu = device_of(next(iter(storage.values()))).startswith("cuda")
    return cuda.engine() if on_gpu and cuda.unavailable() is None else None


def _here(value: Any, target: Any, storage: Mapping[str, Any]) -> Any:
    """A batch as a tensor on the ring's device, with memory of its own; ids as int64."""
    if value is None:
        return None
    tensor = value.detach() if is_torch(value) else like(np.array(to_host(value, "batch")), target)
    there = tensor.to(target.device, tensor.dtype if target.ndim == 2 else target.dtype)
    return there.clone() if any(_share_storage(there, ring) for ring in storage.values()) else there


def _overlapping(storage: Mapping[str, Any]) -> Callable[[Any, Any], bool]:
    """What tells whether writing to a ring of this storage may change a batch of its kind."""
    return _share_storage if is_torch(next(iter(storage.values()))) else np.may_share_memory


def _share_storage(batch: Any, ring: Any) -> bool:
    return bool(batch.untyped_storage().data_ptr() == ring.untyped_storage().data_ptr())


def _column(value: object, name: str, rows: int) -> Any:
    device = device_of(value)
    return id_vector(value, name, rows) if device == "cpu" else ids_on(device, value, name, rows)


def _host_of(values: Any) -> Any:
    """A CPU tensor as a NumPy array that shares its memory, which is written to in a fraction of the time."""
    return to_host(values, "storage") if device_of(values) == "cpu" else values


def _tell_autograd(changed: Iterable[Any]) -> None:
    """Let a backward pass that saved one of these tensors know that it was changed."""
    import torch

    for values in changed:
        if not values.is_inference():
            torch.autograd.graph.increment_version(values)


def _counter(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInput(f"state: expected {name} as a count, got {value!r}")
    return value


def _assignable(value: Any, target: Any, name: str) -> Any:
    """`value` in the framework and type of `target`, refused where a feature is too large for that type."""
    if isinstance(value, int):
        return value
    if not is_torch(target):
        host = to_host(value.cpu() if is_torch(value) else value, name)
        if host.dtype == target.dtype:
            return host
        with np.errstate(over="ignore"):
            host = host.astype(target.dtype)
        if host.ndim == 2 and dtype_name(host) != dtype_name(value):
            require_finite(host, f'keys["{name}"] as {dtype_name(target)}')
        return host
    given = value.detach() if is_torch(value) else like(np.array(to_host(value, name)), target)
    cast = given.to(target.device, target.dtype)
    if cast.ndim == 2 and cast.device.type == "cpu" and cast.dtype != given.dtype:
        require_finite(to_host(cast, name), f'keys["{name}"] as {dtype_name(target)}')
    return cast
