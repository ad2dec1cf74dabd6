"""The layout on disk: arrays, their chunk files and their Zarr metadata."""

from __future__ import annotations

import keyword
import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cascade_engine.errors import InvalidInput
from cascade_engine.tensor import BFLOAT16, FEATURE_DTYPES

CHUNK_BYTES = 16 << 20  # above glibc's largest mmap threshold a plain Zarr reader slows down several times
COLUMN_CHUNK_BYTES = 1 << 20
ABSENT = int(np.iinfo(np.int32).max)  # in a view's presence: no commit gave the clip this view
BUILT_IN = {"clip_id": "int", "video_id": "int", "start": "float", "end": "float"}
COLUMN_DTYPES = {"int": "int64", "float": "float64", "bool": "bool", "str": "int32"}
RESERVED = {*BUILT_IN, *keyword.kwlist, "present", "commits", "checksums", "views", "has"}
INLINE_CATEGORIES = 256
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PHASE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One Zarr array of a phase.

    Args:
        path: its folder in the phase.
        dtype: Zarr data type; bfloat16 is stored as ``uint16``.
        width: shape of one row, ``()`` or ``(D,)``.
        chunk: rows in a chunk file.
        dims: dimension names.
        attributes: for readers of plain Zarr.
    """

    path: str
    dtype: str
    width: tuple[int, ...]
    chunk: int
    dims: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy type of its elements, as stored."""
        return np.dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.numpy.itemsize * math.prod(self.width)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk file."""
        return self.row_bytes * self.chunk

    def chunk_file(self, number: int) -> str:
        """The name of a chunk file in the array's folder."""
        return ".".join(["c", str(number)] + ["0"] * len(self.width))

    def blank(self) -> np.ndarray[Any, Any]:
        """One row of fill values."""
        fill = {"f": math.nan, "b": False, "i": -1}.get(self.numpy.kind, 0)
        if self.attributes.get("dtype") == "bfloat16":
            fill = 0x7FC0  # a quiet NaN
        fill = self.attributes.get("absent", fill)
        return np.full(self.width, fill, self.numpy)

    def metadata(self, length: int) -> dict[str, Any]:
        """The array's `zarr.json` at `length` rows."""
        fill = self.blank().reshape(-1)[0].item()
        codec: dict[str, Any] = {"name": "bytes"}
        if self.numpy.itemsize > 1:
            codec["configuration"] = {"endian": "little"}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [length, *self.width],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.chunk, *self.width]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "NaN" if isinstance(fill, float) else fill,
            "codecs": [codec],
            "attributes": dict(self.attributes),
            "dimension_names": list(self.dims),
            "storage_transformers": [],
        }

    @classmethod
    def parse(cls, path: str, metadata: Mapping[str, Any]) -> tuple[ArraySpec, int]:
        """The spec and the length that a metadata document describes."""
        spec = cls(
            path=path,
            dtype=metadata["data_type"],
            width=tuple(metadata["shape"][1:]),
            chunk=metadata["chunk_grid"]["configuration"]["chunk_shape"][0],
            dims=tuple(metadata["dimension_names"]),
            attributes=metadata["attributes"],
        )
        return spec, metadata["shape"][0]


@dataclass(frozen=True, kw_only=True)
class View:
    """One feature space of a phase: its width, stored type, and what is known of its values."""

    dim: int
    dtype: str
    normalised: bool = False
    float16_lossless: bool | None = None  # None until a first row says

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy type a user sees."""
        return FEATURE_DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One index column: its type and, per version, the commit since which it holds and its array."""

    type: str
    versions: tuple[tuple[int, str], ...]

    def path(self, commit: int) -> str:
        """The array that held the column at a commit."""
        return [path for since, path in self.versions if since <= commit][-1]


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Where an array ends: rows written, and the CRC-32 of those in its last, unfilled chunk."""

    length: int = 0
    crc: int = 0


def chunk_rows(row_bytes: int, limit: int) -> int:
    """Rows in a chunk file: the largest power of two within `limit` bytes, and whole pages in any case."""
    rows = 1 << max(0, (limit // row_bytes).bit_length() - 1)
    while rows * row_bytes % mmap.PAGESIZE:
        rows *= 2
    return rows


def view_spec(name: str, view: View, chunk_bytes: int) -> ArraySpec:
    """The array of a view."""
    stored = np.dtype(np.uint16) if view.numpy == BFLOAT16 else view.numpy
    return ArraySpec(
        path=name,
        dtype=stored.name,
        width=(view.dim,),
        chunk=chunk_rows(view.dim * stored.itemsize, chunk_bytes),
        dims=("clip", f"{name}_feature"),
        attributes={"dtype": "bfloat16"} if view.numpy == BFLOAT16 else {},
    )


def column_specs(path: str, kind: str, chunk_bytes: int) -> list[ArraySpec]:
    """The arrays of a column: its values, and for text its categories as a blob with where each one ends."""
    if kind != "str":
        return [_vector(path, COLUMN_DTYPES[kind], "clip", {}, chunk_bytes)]
    about = {"categories_in": f"{path}-bytes", "ends_in": f"{path}-ends"}
    return [
        _vector(path, "int32", "clip", about, chunk_bytes),
        _vector(f"{path}-bytes", "uint8", f"{path}_byte", {}, chunk_bytes),
        _vector(f"{path}-ends", "int64", f"{path}_category", {}, chunk_bytes),
    ]


def _vector(path: str, dtype: str, dim: str, attributes: Mapping[str, Any], chunk_bytes: int) -> ArraySpec:
    rows = chunk_rows(np.dtype(dtype).itemsize, min(chunk_bytes, COLUMN_CHUNK_BYTES))
    return ArraySpec(path=path, dtype=dtype, width=(), chunk=rows, dims=(dim,), attributes=attributes)


def table_spec(path: str, dtype: str, dims: tuple[str, str], names: tuple[str, ...], chunk_bytes: int) -> ArraySpec:
    """An array of several integers a row, whose names are kept in its attributes."""
    limit = min(chunk_bytes, COLUMN_CHUNK_BYTES)
    rows = chunk_rows(len(names) * np.dtype(dtype).itemsize, limit)
    attributes = {dims[1]: list(names)}
    return ArraySpec(path=path, dtype=dtype, width=(len(names),), chunk=rows, dims=dims, attributes=attributes)


def presence_path(view: str) -> str:
    """The array that says since which commit each clip has a view."""
    return f"present-{view}"


def presence_spec(view: str, chunk_bytes: int) -> ArraySpec:
    """The array at `presence_path`: a commit number, or `ABSENT`."""
    return _vector(presence_path(view), "int32", "clip", {"absent": ABSENT}, chunk_bytes)


def check_views(views: Mapping[str, int], dtype: str | Mapping[str, str], *, normalise: bool) -> dict[str, View]:
    """The views a user described, checked."""
    if not views:
        raise InvalidInput("views: expected at least one view, got none")
    kinds = {name: dtype if isinstance(dtype, str) else dtype.get(name, "float32") for name in views}
    for name, dim in views.items():
        if not _NAME.match(name) or name in RESERVED:
            raise InvalidInput(f"views: expected names of letters, digits and _ that are not reserved, got {name!r}")
        if dim < 1:
            raise InvalidInput(f'views["{name}"]: expected a width of at least 1, got {dim!r}')
        if kinds[name] not in FEATURE_DTYPES:
            raise InvalidInput(f"dtype: expected one of {', '.join(FEATURE_DTYPES)}, got {kinds[name]!r}")
    return {name: View(dim=int(dim), dtype=kinds[name], normalised=normalise) for name, dim in views.items()}


def check_columns(columns: Mapping[str, str], views: Mapping[str, object]) -> dict[str, str]:
    """The user's columns, checked."""
    for name, kind in columns.items():
        if not _NAME.match(name) or name in RESERVED or name in views:
            raise InvalidInput(f"columns: expected names of letters, digits and _ that are not taken, got {name!r}")
        if kind not in COLUMN_DTYPES:
            raise InvalidInput(f'columns["{name}"]: expected one of {", ".join(COLUMN_DTYPES)}, got {kind!r}')
    return dict(columns)


def check_phase(name: str) -> str:
    """A phase's name, checked."""
    if not _PHASE.match(name):
        raise InvalidInput(f"phase: expected a name of letters, digits, _, . and -, got {name!r}")
    return name
