"""Import of tables, from whatever `tables.read_tables` reads, and export to Parquet and compressed plain Zarr."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cascade_engine.errors import InvalidInput, StoreError
from cascade_engine.store.columns import Categorical
from cascade_engine.store.creating import aside
from cascade_engine.store.feature_store import FeatureStore

_KINDS = {"i": "int", "u": "int", "f": "float", "b": "bool", "U": "str", "O": "str", "T": "str"}


def import_into(
    store: FeatureStore,
    tables: Iterator[dict[str, Any]],
    *,
    rename: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Append tables to a store, arrays going to the views and columns of their names; returns the clips added.

    Args:
        store: opened with ``mode="a"``.
        tables: see `tables.read_tables`.
        rename: an array's name to the view's or column's.
        progress: called with the clips just added.

    Rows masked as a whole are clips without the view. A clip_id or video_id that is not there is counted on from the
    rows: every clip a video of its own.
    """
    store.flush()
    before, added = store.rows, 0
    for table in tables:
        named = {(rename or {}).get(name, name): values for name, values in table.items()}
        views = {name: np.ma.getdata(values) for name, values in named.items() if name in store.views}
        present = {name: ~named[name].mask.all(axis=1) for name in views if np.ma.isMaskedArray(named[name])}
        columns = {name: _column(values) for name, values in named.items() if name not in views}
        count = len(next(iter(named.values())))
        columns = {"clip_id": np.arange(before + added, before + added + count), **columns}
        columns.setdefault("video_id", columns["clip_id"])
        added += store.append(views, present=present, **columns)
        progress(count)
    return added


def schema_of(table: Mapping[str, Any], rename: Mapping[str, str]) -> tuple[dict[str, int], dict[str, str]]:
    """The views and columns that a first table suggests: two dimensions are a view, one is a column."""
    views: dict[str, int] = {}
    columns: dict[str, str] = {}
    for given, values in table.items():
        name, array = rename.get(given, given), np.asarray(values)
        if array.ndim == 2:
            views[name] = array.shape[1]
        elif name not in ("clip_id", "video_id", "start", "end"):
            columns[name] = _KINDS.get(array.dtype.kind, "str")
    return views, columns


def to_parquet(
    store: FeatureStore,
    target: Path,
    *,
    phase: str | None = None,
    where: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write a phase as one Parquet file, views as lists of a fixed size; returns its bytes.

    Missing views are null, text is text. A file of that name is replaced once the new one is whole. `progress` is
    called with the clips just written.
    """
    with _aside(target) as temporary:
        _write_parquet(store, temporary, phase, where, progress)
    return target.stat().st_size


def _write_parquet(
    store: FeatureStore, target: Path, phase: str | None, where: str | None, progress: Callable[[int], None]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = store.matching(where, phase=phase)
    chosen = np.arange(store.count(phase)) if rows is None else rows
    writer = None
    for start in range(0, max(len(chosen), 1), 65_536):
        part = chosen[start : start + 65_536]
        arrays: dict[str, Any] = {}
        for name in store.schema(phase)[1]:
            values = store.coded(name, phase=phase)
            arrays[name] = pa.array(values[part] if not isinstance(values, Categorical) else values[part].tolist())
        for view, dim in store.schema(phase)[0].items():
            features = store.gather(view, part, phase=phase)
            if features.dtype.name == "bfloat16":
                features = features.astype(np.float32)
            absent = pa.array(~store.present(view, phase=phase)[part])
            flat = pa.array(features.reshape(-1))
            arrays[view] = pa.FixedSizeListArray.from_arrays(flat, dim, mask=absent)
        table = pa.table(arrays)
        writer = writer or pq.ParquetWriter(target, table.schema)
        writer.write_table(table)
        progress(len(part))
    assert writer is not None
    writer.close()


def archive(
    store: FeatureStore,
    target: Path,
    codec: str = "zstd",
    *,
    phase: str | None = None,
    where: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Write a phase as a compressed plain Zarr v3 group; returns the bytes of its rows and those on disk.

    Args:
        store: the store.
        target: a folder that does not exist yet.
        codec: ``"zstd"``, ``"gzip"``, ``"blosc"`` (zstd with bit shuffle) or ``"none"``.
        phase: the current one by default.
        where: a condition on columns.
        progress: called with the bytes just written, as they are without compression.
    """
    from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

    codecs: dict[str, Any] = {
        "zstd": ZstdCodec(level=3),
        "gzip": GzipCodec(level=5),
        "blosc": BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
        "none": None,
    }
    if codec not in codecs:
        raise InvalidInput(f"codec: expected one of {', '.join(codecs)}, got {codec!r}")
    if target.exists():
        raise StoreError(f"{target}: expected nothing there")
    rows = store.matching(where, phase=phase)
    chosen = np.arange(store.count(phase)) if rows is None else rows
    with _aside(target) as temporary:
        raw = _write_archive(store, temporary, codecs[codec], chosen, phase, progress)
    return raw, sum(each.stat().st_size for each in target.rglob("*") if each.is_file())


def _write_archive(
    store: FeatureStore, target: Path, codec: Any, chosen: Any, phase: str | None, progress: Callable[[int], None]
) -> int:
    """Write the group; returns the bytes of its rows."""
    import zarr

    group = zarr.create_group(target)
    views, columns = store.schema(phase)
    raw = 0
    for name in (*views, *columns):
        values: Any = store.features(name, phase=phase) if name in views else store.coded(name, phase=phase)
        about: dict[str, Any] = {}
        if isinstance(values, Categorical):
            values, about = values.codes, {"categories": list(values.categories)}
        elif values.dtype.name == "bfloat16":
            values, about = values.view(np.uint16), {"dtype": "bfloat16"}
        step = max(1, (4 << 20) // (values.dtype.itemsize * int(np.prod(values.shape[1:]))))
        array = group.create_array(
            name,
            shape=(len(chosen), *values.shape[1:]),
            chunks=(min(step, max(len(chosen), 1)), *values.shape[1:]),
            dtype=values.dtype,
            compressors=codec,
            dimension_names=("clip", f"{name}_feature")[: values.ndim],
            attributes=about,
            fill_value=np.nan if values.dtype.kind == "f" else 0,
        )
        for start in range(0, len(chosen), step):
            part = values[chosen[start : start + step]]
            array[start : start + step] = part
            progress(part.nbytes)
        raw += len(chosen) * values.dtype.itemsize * int(np.prod(values.shape[1:]))
    return raw


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Where to write what is to be at `target`: renamed when whole, removed where that fails."""
    temporary = aside(target)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _column(values: Any) -> Any:
    array = np.asarray(values)
    if array.dtype.kind == "S":
        return [each.decode() for each in array.tolist()]
    if array.dtype == object:
        return [each.decode() if isinstance(each, bytes) else each for each in array.tolist()]
    return array
