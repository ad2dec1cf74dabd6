"""Feature stores against other formats: reading as a ratio to np.memmap, appending with what each one guarantees."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import CascadeError
from cascade_engine.store import FeatureStore

Rows = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
CHUNK = 32_768  # 16 MiB of 128 float32
GATHER = 1024


class Reader(Protocol):
    """One way to read a matrix that is on disk."""

    def scan(self) -> float:
        """The sum of all values, read once."""

    def gather(self, rows: Rows) -> Features:
        """Some rows."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One contestant's medians: scan in GB/s, gather in rows/s, open in ms."""

    name: str
    scan: float
    gather: float
    open_ms: float


@dataclass(frozen=True, kw_only=True)
class Appending:
    """One contestant's rate at one batch size, and what a batch that was acknowledged survives."""

    name: str
    batch: int
    rows_per_second: float
    guarantee: str


@dataclass(frozen=True, kw_only=True)
class Cold:
    """Rows a second of a gather from files that are not in memory, with and without prefetch."""

    prefetched: float
    plain: float


class _Array:
    """A mapped or in-memory matrix."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def scan(self) -> float:
        return _sum(self._values[start : start + CHUNK] for start in range(0, self._values.shape[0], CHUNK))

    def gather(self, rows: Rows) -> Features:
        found: Features = self._values.take(rows, axis=0)
        return found


class _Zarr(_Array):
    def gather(self, rows: Rows) -> Features:
        found: Features = self._values.oindex[rows]
        return found


class _Hdf5(_Array):
    def gather(self, rows: Rows) -> Features:
        order, back = np.unique(rows, return_inverse=True)  # h5py takes ascending rows only
        found: Features = self._values[order][back]
        return found


class _TensorStore(_Array):
    def scan(self) -> float:
        length = self._values.shape[0]
        ends = ((start, min(start + CHUNK, length)) for start in range(0, length, CHUNK))
        return _sum(self._values[start:end].read().result() for start, end in ends)

    def gather(self, rows: Rows) -> Features:
        found: Features = self._values[rows].read().result()
        return found


class _Lance:
    def __init__(self, data: Any, dim: int) -> None:
        self._data, self._dim = data, dim

    def scan(self) -> float:
        return _sum(_lance_matrix(batch["x"], self._dim) for batch in self._data.to_batches(batch_size=CHUNK))

    def gather(self, rows: Rows) -> Features:
        return _lance_matrix(self._data.take(rows.tolist())["x"].combine_chunks(), self._dim)


def reading(folder: Path, rows: int, dim: int, rounds: int, step: Callable[[str], None]) -> tuple[list[Reading], Cold]:
    """Measure readers of one matrix (rows, dim) of float32 written in every format; wrong answers are not timed.

    Args:
        folder: where to write, removed afterwards.
        rows: of the matrix.
        dim: of the matrix.
        rounds: interleaved rounds, of which the median counts.
        step: called with what is being done.

    Raises:
        CascadeError: a contestant reads other values than were written.
    """
    generator = np.random.default_rng(0)
    openers = _write_all(folder, rows, dim, step)
    picks = [generator.integers(0, rows, GATHER) for _ in range(rounds)]
    times = _rounds(openers, np.load(folder / "x.npy", mmap_mode="r"), picks, step)
    size = rows * dim * 4
    found = [
        Reading(
            name=name,
            scan=size / statistics.median(each["scan"]) / 1e9,
            gather=GATHER / statistics.median(each["gather"]),
            open_ms=statistics.median(each["open"]) * 1e3,
        )
        for name, each in times.items()
    ]
    step("cold gathers")
    return found, _cold(folder / "ours", rows, rounds, generator)


def appending(folder: Path, dim: int, seconds: float, step: Callable[[str], None]) -> list[Appending]:
    """Rows a second that each format takes at three batch sizes, one view of (rows, dim) float32 and its clip ids."""
    found = []
    for batch in (256, 4096, 65_536):
        values = np.random.default_rng(1).standard_normal((batch, dim), np.float32)
        for name, guarantee, start in _appenders():
            step(f"{name}, {batch} rows a batch")
            target = folder / "append"
            try:
                append, close = start(target, dim)
                count, began = 0, time.perf_counter()
                while count < 2 or time.perf_counter() - began < seconds:
                    append(values, np.arange(count * batch, (count + 1) * batch))
                    count += 1
                close()
                took = time.perf_counter() - began
            except ImportError:
                continue
            finally:
                shutil.rmtree(target, ignore_errors=True)
                target.unlink(missing_ok=True) if target.is_file() else None
            found.append(Appending(name=name, batch=batch, rows_per_second=count * batch / took, guarantee=guarantee))
    return found


def as_json(readings: list[Reading], cold: Cold | None, appends: list[Appending]) -> dict[str, Any]:
    """The results as plain values."""
    return {
        "reading": [asdict(each) for each in readings],
        "cold_gather": None if cold is None else asdict(cold),
        "appending": [asdict(each) for each in appends],
    }


def _appenders() -> Iterator[tuple[str, str, Callable[[Path, int], tuple[Callable[..., Any], Callable[[], Any]]]]]:
    """Name, guarantee of an acknowledged batch, and how to start; appends of one matrix and one id column."""
    whole = "batch whole or absent; "
    yield "ours, commit", whole + "survives power loss", lambda path, dim: _ours(path, dim, "commit")
    yield "ours, group", whole + "survives power loss once flushed", lambda path, dim: _ours(path, dim, "group")
    yield "ours, none", whole + "survives kill", lambda path, dim: _ours(path, dim, "none")
    yield "zarr", "rows survive kill; a kill in between shows rows never written", _zarr_append
    yield "tensorstore", "rows survive kill; a kill in between shows rows never written", _tensorstore_append
    yield "h5py + flush", "survives kill after a flush", _h5py_append
    yield "Lance", whole + "survives kill", _lance_append


def _ours(path: Path, dim: int, durability: Any) -> tuple[Callable[..., Any], Callable[[], Any]]:
    store = FeatureStore.create(path, {"x": dim}, durability=durability)
    return lambda values, ids: store.append({"x": values}, clip_id=ids, video_id=ids), store.close


def _zarr_append(path: Path, dim: int) -> tuple[Callable[..., Any], Callable[[], Any]]:
    import zarr

    group = zarr.create_group(path)
    x = group.create_array("x", shape=(0, dim), chunks=(CHUNK, dim), dtype="f4", compressors=None)
    clip = group.create_array("clip_id", shape=(0,), chunks=(CHUNK * 4,), dtype="i8", compressors=None)

    def append(values: Features, ids: Rows) -> None:
        x.append(values)
        clip.append(ids)

    return append, lambda: None


def _tensorstore_append(path: Path, dim: int) -> tuple[Callable[..., Any], Callable[[], Any]]:
    import tensorstore

    def array(name: str, shape: list[int], chunk: list[int], dtype: str) -> Any:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path}/{name}/"},
            "metadata": {
                "shape": shape,
                "data_type": dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            },
        }
        return tensorstore.open(spec, create=True).result()

    held = [array("x", [0, dim], [CHUNK, dim], "float32"), array("clip_id", [0], [CHUNK * 4], "int64")]

    def append(values: Features, ids: Rows) -> None:
        end = held[0].shape[0] + len(ids)
        for number, new in enumerate((values, ids)):
            shape = [end, dim] if number == 0 else [end]
            held[number] = held[number].resize(exclusive_max=shape).result()
            held[number][end - len(ids) : end].write(new).result()

    return append, lambda: None


def _h5py_append(path: Path, dim: int) -> tuple[Callable[..., Any], Callable[[], Any]]:
    import h5py

    file = h5py.File(path, "w")
    x = file.create_dataset("x", (0, dim), maxshape=(None, dim), chunks=(1024, dim), dtype="f4")
    clip = file.create_dataset("clip_id", (0,), maxshape=(None,), chunks=(CHUNK,), dtype="i8")

    def append(values: Features, ids: Rows) -> None:
        end = len(x) + len(ids)
        x.resize(end, axis=0)
        clip.resize(end, axis=0)
        x[end - len(ids) :] = values
        clip[end - len(ids) :] = ids
        file.flush()

    return append, file.close


def _lance_append(path: Path, dim: int) -> tuple[Callable[..., Any], Callable[[], Any]]:
    import lance
    import pyarrow as pa

    def append(values: Features, ids: Rows) -> None:
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dim)
        lance.write_dataset(pa.table({"x": lists, "clip_id": pa.array(ids)}), str(path), mode="append")

    return append, lambda: None


def _write_all(folder: Path, rows: int, dim: int, step: Callable[[str], None]) -> Mapping[str, Callable[[], Reader]]:
    """Write one random matrix in every format that is installed; returns how to open each."""
    step("writing")
    generator = np.random.default_rng(2)
    np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (rows, dim)).flush()
    memory = np.load(folder / "x.npy", mmap_mode="r+")
    for start in range(0, rows, CHUNK):
        memory[start : start + CHUNK] = generator.integers(-127, 128, memory[start : start + CHUNK].shape)
    memory.flush()
    appenders = {name: start for name, _, start in _appenders()}
    for name, key in (("ours", "ours, none"), ("zarr", "zarr"), ("h5py", "h5py + flush"), ("lance", "Lance")):
        with suppress(ImportError):
            step(f"writing {name}")
            append, close = appenders[key](folder / name, dim)
            for start in range(0, rows, CHUNK):
                part = np.array(memory[start : start + CHUNK])
                append(part, np.arange(start, start + len(part)))
            close()
    openers: dict[str, Callable[[], Reader]] = {
        "np.memmap": lambda: _Array(np.load(folder / "x.npy", mmap_mode="r")),
        "ours": lambda: _Array(FeatureStore.open(folder / "ours").features("x")),
    }
    if (folder / "zarr").exists():
        openers["zarr"] = lambda: _open_zarr(folder / "zarr")
        with suppress(ImportError):
            import tensorstore

            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/zarr/x/"}}
            openers["tensorstore"] = lambda: _TensorStore(tensorstore.open(spec, open=True).result())
    if (folder / "h5py").exists():
        openers["h5py"] = lambda: _open_h5py(folder / "h5py")
    if (folder / "lance").exists():
        openers["Lance"] = lambda: _open_lance(folder / "lance", dim)
    return openers


def _open_zarr(path: Path) -> Reader:
    import zarr

    return _Zarr(zarr.open_group(path, mode="r")["x"])


def _open_h5py(path: Path) -> Reader:
    import h5py

    return _Hdf5(h5py.File(path, "r")["x"])


def _open_lance(path: Path, dim: int) -> Reader:
    import lance

    return _Lance(lance.dataset(str(path)), dim)


def _lance_matrix(column: Any, dim: int) -> Features:
    found: Features = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return found


def _rounds(
    openers: Mapping[str, Callable[[], Reader]], truth: Any, picks: list[Rows], step: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contestant's scans, gathers and opens, once its answers are found right."""
    times: dict[str, dict[str, list[float]]] = {name: {"scan": [], "gather": [], "open": []} for name in openers}
    total = _Array(truth).scan()
    readers = {name: opener() for name, opener in openers.items()}
    for name, reader in readers.items():
        if not np.array_equal(reader.gather(picks[0]), truth[picks[0]]) or reader.scan() != total:
            raise CascadeError(f"{name}: reads other values than were written")
    for number, rows in enumerate(picks):
        step(f"round {number + 1} of {len(picks)}")
        for name, reader in readers.items():
            times[name]["scan"].append(_seconds(reader.scan))
            times[name]["gather"].append(_seconds(partial(reader.gather, rows)))
            times[name]["open"].append(_seconds(openers[name]))
    return times


def _cold(path: Path, rows: int, rounds: int, generator: np.random.Generator) -> Cold:
    """Gathers after the system was told to forget the files."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for prefetch in (True, False):
            _forget(path)
            with FeatureStore.open(path) as store:
                chosen = generator.integers(0, rows, GATHER)
                store.features("x")
                times[prefetch].append(_seconds(partial(store.gather, "x", chosen, prefetch=prefetch)))
    return Cold(prefetched=GATHER / statistics.median(times[True]), plain=GATHER / statistics.median(times[False]))


def _forget(path: Path) -> None:
    for file in path.rglob("c.*"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _sum(parts: Iterator[Any]) -> float:
    return sum(float(np.add.reduce(part, axis=None, dtype=np.float32)) for part in parts)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
