"""Import from and export to the formats people have: .npy, .npz, Parquet, HDF5, folders of .pt files, other Zarr."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cascade_engine.errors import CascadeError, InvalidInput, NotFound, StoreError
from cascade_engine.store.columns import Categorical
from cascade_engine.store.feature_store import FeatureStore

Table = Mapping[str, Any]
_KINDS = {"i": "int", "u": "int", "f": "float", "b": "bool", "U": "str", "O": "str", "T": "str"}


def read_tables(source: Path, rows: int = 65_536) -> Iterator[dict[str, Any]]:
    """The arrays of a file or folder by name, some rows at a time: (b, D) features and (b,) columns.

    Features that some clips do not have, such as nulls of Parquet, are masked arrays.

    A folder of .npy files has one array a file; a folder of .pt files is read in the order of their names, each a
    dictionary of tensors of as many rows, or of one clip's vectors and values.

    Raises:
        InvalidInput: not one of the formats, a damaged file, or arrays of different lengths.
        NotFound: there is nothing.
        ImportError: what reads the format is not installed.
    """
    if not source.exists():
        raise NotFound(f"{source}: expected a file or folder to import, found nothing")
    try:
        yield from _tables(source, rows)
    except (CascadeError, ImportError, MemoryError):
        raise
    except Exception as error:  # each format's reader has errors of its own for a damaged file
        raise InvalidInput(f"{source}: cannot be read: {error}") from error


def _tables(source: Path, rows: int) -> Iterator[dict[str, Any]]:
    suffixes = {each.suffix for each in source.iterdir()} if source.is_dir() else {source.suffix}
    if source.is_dir() and ".pt" in suffixes:
        yield from _pt(source)
    elif suffixes & {".npy", ".npz"}:
        yield from _slices(_numpy(source), rows, source)
    elif suffixes & {".parquet"}:
        yield from _parquet(source, rows)
    elif suffixes & {".h5", ".hdf5"}:
        import h5py

        with h5py.File(source, "r") as file:
            found: dict[str, Any] = {}
            file.visititems(lambda name, each: found.update({name: each}) if isinstance(each, h5py.Dataset) else None)
            yield from _slices(found, rows, source)
    else:
        raise InvalidInput(f"{source}: expected .npy, .npz, .parquet, .h5 or a folder of .npy or .pt files")


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
        tables: see `read_tables`.
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
    temporary = target.with_name(f"{target.name}.new-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _numpy(source: Path) -> dict[str, Any]:
    if source.is_dir():
        return {each.stem: np.load(each, mmap_mode="r", allow_pickle=False) for each in sorted(source.glob("*.npy"))}
    if source.suffix == ".npy":
        return {source.stem: np.load(source, mmap_mode="r", allow_pickle=False)}
    with np.load(source, allow_pickle=False) as file:
        return dict(file)


def _slices(found: Mapping[str, Any], rows: int, source: Path) -> Iterator[dict[str, Any]]:
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) != 1:
        raise InvalidInput(f"{source}: expected arrays of one length, got {lengths or 'none'}")
    for start in range(0, next(iter(lengths.values())), rows):
        yield {name: values[start : start + rows] for name, values in found.items()}


def _parquet(source: Path, rows: int) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
        for path in files:
            file = stack.enter_context(pq.ParquetFile(path))
            for batch in file.iter_batches(batch_size=rows):
                table: dict[str, Any] = {}
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
                        table[name] = _matrix(column, f"{path}, column {name!r}")
                    else:
                        table[name] = np.asarray(column.to_numpy(zero_copy_only=False))
                yield table


def _matrix(column: Any, what: str) -> Any:
    """A list column as (b, D), masked where there are null lists."""
    import pyarrow as pa

    flat = column.flatten()
    if pa.types.is_fixed_size_list(column.type):
        widths = [column.type.list_size]
    else:
        widths = column.value_lengths().drop_null().unique().to_pylist() or [0]
    if len(widths) > 1 or flat.null_count:
        raise InvalidInput(f"{what}: expected lists of one length without nulls in them")
    there = ~np.asarray(column.is_null())
    rows = flat.to_numpy(zero_copy_only=False).reshape(there.sum(), widths[0])
    if there.all():
        return rows
    matrix = np.zeros((len(column), widths[0]), rows.dtype)
    matrix[there] = rows
    return np.ma.MaskedArray(matrix, mask=np.repeat(~there[:, None], widths[0], axis=1))


def _pt(source: Path) -> Iterator[dict[str, Any]]:
    import torch

    for path in sorted(source.glob("*.pt")):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InvalidInput(f"{path}: cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise InvalidInput(
                f"{path}: expected a dictionary of tensors by view and column, got {type(content).__name__}"
            )
        table = {name: each.numpy() if isinstance(each, torch.Tensor) else each for name, each in content.items()}
        single = all(not isinstance(each, np.ndarray) or each.ndim <= 1 for each in table.values()) and not any(
            isinstance(each, list | tuple) for each in table.values()
        )
        yield {name: np.asarray(each)[None] for name, each in table.items()} if single else table


def _column(values: Any) -> Any:
    array = np.asarray(values)
    if array.dtype.kind == "S":
        return [each.decode() for each in array.tolist()]
    if array.dtype == object:
        return [each.decode() if isinstance(each, bytes) else each for each in array.tolist()]
    return array
