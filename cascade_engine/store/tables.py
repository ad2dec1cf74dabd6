"""What can be imported, some rows at a time: .npy, .npz, Parquet, HDF5, plain Zarr, folders of .npy or .pt files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cascade_engine.errors import CascadeError, InvalidInput, NotFound
from cascade_engine.store.columns import Categorical
from cascade_engine.tensor import BFLOAT16

_ZARR = ("zarr.json", ".zgroup", ".zarray")


def read_tables(source: Path, rows: int = 65_536) -> Iterator[dict[str, Any]]:
    """The arrays of a file or folder by name, some rows at a time: (b, D) features and (b,) columns.

    Features that some clips do not have are masked arrays: nulls of Parquet, and of Zarr, rows of nothing but a fill
    value NaN.

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
    if any((source / name).is_file() for name in _ZARR):
        yield from _slices(_zarr(source), rows, source)
    elif source.is_dir() and ".pt" in suffixes:
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
        raise InvalidInput(f"{source}: expected .npy, .npz, .parquet, .h5, Zarr or a folder of .npy or .pt files")


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


def _zarr(source: Path) -> dict[str, Any]:
    """The arrays of a Zarr group by path, or the one array there is."""
    import zarr

    node = zarr.open(str(source), mode="r")
    if "cascade" in node.attrs:
        raise InvalidInput(f"{source}: expected plain Zarr, got a feature store's own; export it first")
    if isinstance(node, zarr.Array):
        return {source.stem: _ZarrArray(node)}
    return {name: _ZarrArray(each) for name, each in node.members(max_depth=None) if isinstance(each, zarr.Array)}


class _ZarrArray:
    """A Zarr array whose slices are what `exchanging.archive` coded: texts, bfloat16 and missing views."""

    def __init__(self, array: Any) -> None:
        self._array, self._about = array, dict(array.attrs)

    def __len__(self) -> int:
        """Its rows."""
        return int(self._array.shape[0])

    def __getitem__(self, rows: slice) -> Any:
        """Some of its rows."""
        values, fill = self._array[rows], self._array.fill_value
        if "categories" in self._about:
            return self._texts(values)
        if self._about.get("dtype") == "bfloat16":
            values, fill = values.view(BFLOAT16).astype(np.float32), np.nan
        if values.ndim != 2 or values.dtype.kind != "f" or fill is None or not np.isnan(fill):
            return values
        absent = np.isnan(values).all(axis=1)
        if not absent.any():
            return values
        return np.ma.MaskedArray(values, mask=np.broadcast_to(absent[:, None], values.shape))

    def _texts(self, codes: Any) -> Any:
        texts = tuple(self._about["categories"])
        if len(codes) and not 0 <= codes.min() <= codes.max() < len(texts):
            raise InvalidInput(
                f"array {self._array.basename!r}: expected codes from 0 to {len(texts) - 1}, "
                f"got {codes.min()} to {codes.max()}"
            )
        return Categorical(codes=codes, categories=texts)[:]


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
