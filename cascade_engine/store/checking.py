"""`verify`: are the bytes on disk those that were committed?"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cascade_engine.errors import StoreError
from cascade_engine.store.blanks import is_blank
from cascade_engine.store.creating import phase_names, read_root
from cascade_engine.store.layout import ABSENT, ArraySpec, presence_path
from cascade_engine.store.record import Record, document_crc, read_record

Values = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something on disk that is not as committed: the file, and what is wrong with it."""

    file: Path
    what: str


def verify(root: Path, phases: tuple[str, ...] | None, progress: Callable[[int], None]) -> list[Problem]:
    """All problems of a store, or of some phases; none means that every committed byte is as it was written.

    Args:
        root: the store.
        phases: all by default.
        progress: called with the bytes just checked.
    """
    try:
        read_root(root)
        names = phases or phase_names(root)
    except StoreError as error:
        return [Problem(file=root / "zarr.json", what=str(error))]
    problems = []
    for name in names:
        folder = root / "phases" / name
        try:
            record = read_record(folder)
        except StoreError as error:
            problems.append(Problem(file=folder / "zarr.json", what=str(error)))
            continue
        problems += _check_phase(folder, record, progress)
    return problems


def _check_phase(folder: Path, record: Record, progress: Callable[[int], None]) -> list[Problem]:
    problems = []
    document = json.loads((folder / "zarr.json").read_bytes())
    about = document["attributes"]["cascade"]
    if about["commit"] == record.commit and about.get("crc") != document_crc(document):
        problems.append(Problem(file=folder / "zarr.json", what="the commit record is not as it was written"))
    table, problem = _checksums(folder, record)
    if problem is not None:
        return [*problems, problem]
    for number, (path, spec) in enumerate(record.arrays.items()):
        problems += _check_metadata(folder / path / "zarr.json", spec, record.tails[path].length)
        if path != "checksums":
            expected = {chunk: crc for (array, chunk), crc in table.items() if array == number}
            problems += _check_chunks(folder, record, spec, expected, progress)
    return problems


def _checksums(folder: Path, record: Record) -> tuple[dict[tuple[int, int], int], Problem | None]:
    """The newest checksum of each full chunk: (array number, chunk) to CRC-32."""
    spec, tail = record.arrays["checksums"], record.tails["checksums"]
    rows: list[Values] = []
    crc = 0
    for number in range(-(-tail.length // spec.chunk)):
        count = min(spec.chunk, tail.length - number * spec.chunk)
        data, what = _read(folder / "checksums" / spec.chunk_file(number), count * spec.row_bytes)
        if what:
            return {}, Problem(file=folder / "checksums" / spec.chunk_file(number), what=what)
        crc = zlib.crc32(data, crc)
        rows.append(np.frombuffer(data, spec.numpy).reshape(count, *spec.width))
    if crc != tail.crc:
        return {}, Problem(file=folder / "checksums", what="the checksums are not as they were written")
    return {(array, chunk): value for part in rows for array, chunk, value in part.tolist()}, None


def _check_metadata(file: Path, spec: ArraySpec, length: int) -> Iterator[Problem]:
    """An array's own metadata may lag behind the record after a crash, and nothing else."""
    try:
        parsed, shown = ArraySpec.parse(spec.path, json.loads(file.read_bytes()))
    except FileNotFoundError:
        yield Problem(file=file, what="expected the array's metadata, found none")
        return
    except (ValueError, KeyError, TypeError, IndexError):
        yield Problem(file=file, what="the array's metadata cannot be read")
        return
    if shown > length:  # committed since, by a writer at work?
        length = read_record(file.parents[1]).tails[spec.path].length
    same = (parsed.dtype, parsed.width, parsed.chunk) == (spec.dtype, spec.width, spec.chunk)
    if not same or shown > length:
        yield Problem(file=file, what=f"expected {spec.dtype} of at most {length} rows, got {parsed.dtype} of {shown}")


def _check_chunks(
    folder: Path, record: Record, spec: ArraySpec, expected: dict[int, int], progress: Callable[[int], None]
) -> Iterator[Problem]:
    tail = record.tails[spec.path]
    for number in range(-(-tail.length // spec.chunk)):
        count = min(spec.chunk, tail.length - number * spec.chunk)
        crc = expected.get(number) if count == spec.chunk else tail.crc
        file = folder / spec.path / spec.chunk_file(number)
        if _view(record, spec) is not None and not file.exists() and is_blank(spec, count, crc):
            continue
        data, what = _read(file, count * spec.row_bytes)
        if what:
            yield Problem(file=file, what=what)
        elif crc not in (None, zlib.crc32(data)):
            written = _written(folder, record, spec, number, count)
            if zlib.crc32(_as_committed(data, record, spec, written, count)) != crc:
                yield Problem(file=file, what=f"{count} rows are not as they were committed")
        progress(len(data))


def _view(record: Record, spec: ArraySpec) -> str | None:
    """The view whose features or presence an array holds."""
    view = spec.path.removeprefix("present-")
    return view if view in record.views else None


def _written(folder: Path, record: Record, spec: ArraySpec, number: int, count: int) -> Values | bool:
    """Which rows of a chunk count: all of a column's, those present of a view, none of a view nobody filled."""
    view = _view(record, spec)
    if view is None:
        return True
    presence = record.arrays[presence_path(view)]
    held = np.full(count, ABSENT, np.int32)
    first = number * spec.chunk
    for part in range(first // presence.chunk, -(-(first + count) // presence.chunk)):
        start = max(first, part * presence.chunk)
        end = min(first + count, (part + 1) * presence.chunk)
        data, _ = _read(folder / presence.path / presence.chunk_file(part), (end - part * presence.chunk) * 4)
        got = np.frombuffer(data, np.int32)[start - part * presence.chunk :]
        held[start - first : start - first + len(got)] = got
    there: Values = held <= record.commit
    later = ~there & (held != ABSENT)
    if spec.path == presence_path(view) and later.any():  # a fill under way writes the number of the commit to come
        there = there | (later & (held > read_record(folder).commit + 1))
    return there if there.any() else False


def _as_committed(data: bytes, record: Record, spec: ArraySpec, written: Values | bool, count: int) -> bytes:
    """A chunk's bytes with rows that no commit shows as blank: a fill may be under way, or have been cut off."""
    if not isinstance(written, np.ndarray):
        return data if written else np.broadcast_to(spec.blank(), (count, *spec.width)).tobytes()
    if written.all():
        return data
    rows = np.frombuffer(data, spec.numpy).reshape(count, *spec.width).copy()
    rows[~written] = spec.blank()
    return rows.tobytes()


def _read(file: Path, size: int) -> tuple[bytes, str]:
    """The first `size` bytes of a file, or what is wrong with it."""
    try:
        with file.open("rb") as stream:
            data = stream.read(size)
    except FileNotFoundError:
        return b"", "expected a chunk file, found none"
    except OSError as error:
        return b"", f"cannot be read: {error.strerror}"
    return data, "" if len(data) == size else f"expected at least {size} bytes, found {len(data)}"
