"""Chunks without a file: a view's or presence's chunk that holds fill values only need not have been written."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from cascade_engine.store.layout import ArraySpec
from cascade_engine.store.record import Record


def is_blank(spec: ArraySpec, rows: int, crc: int | None) -> bool:
    """Whether the `rows` committed to a chunk are fill values, going by their checksum.

    A full chunk without one was never written to.
    """
    return crc is None or crc == zlib.crc32(np.broadcast_to(spec.blank(), (rows, *spec.width)).tobytes())


def blank_chunks(record: Record, path: str, checksums: Callable[[], np.ndarray[Any, Any]]) -> Callable[[int], bool]:
    """Says of each chunk of an array, by its number, whether it may be missing; other missing chunks were lost.

    Args:
        record: the commit.
        path: the array.
        checksums: reads the table (n, 3) of array number, chunk and checksum, oldest first; called when first needed.
    """
    spec, length = record.arrays[path], record.tails[path].length

    @cache
    def newest() -> dict[int, int]:
        table = checksums()
        return dict(table[table[:, 0] == list(record.arrays).index(path), 1:].tolist())

    def is_blank_chunk(number: int) -> bool:
        rows = min(spec.chunk, length - number * spec.chunk)
        return is_blank(spec, rows, newest().get(number) if rows == spec.chunk else record.tails[path].crc)

    return is_blank_chunk
