"""The commit protocol: rows first, past what is committed and so invisible, then one atomic rename that shows them."""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from cascade_engine.errors import Corrupt, StoreError
from cascade_engine.store.blanks import blank_chunks
from cascade_engine.store.files import Files, write_beside, write_whole
from cascade_engine.store.layout import ABSENT, ArraySpec, Tail, presence_path
from cascade_engine.store.mapping import map_array
from cascade_engine.store.record import Record

Durability = Literal["commit", "group", "none"]
DURABILITIES: tuple[Durability, ...] = get_args(Durability)
KINDS = ("create", "append", "fill", "column", "view", "merge", "seal")
GROUP_BYTES, GROUP_SECONDS = 64 << 20, 1.0
Rows: TypeAlias = np.ndarray[Any, Any]
log = logging.getLogger(__name__)


@dataclass
class _Chunk:
    """The chunk file an array is being written to."""

    number: int
    fd: int


class PhaseWriter:
    """Writes one phase, whose lock its owner holds.

    An append goes through these steps, and a crash between any two of them leaves the phase as committed last:
    (1) chunk files are made at full size, they and their folder synced; (2) rows are written past the committed length;
    (3) they are synced; (4) `zarr.json` is replaced and synced: committed; (5) each array's own `zarr.json` follows.

    Args:
        folder: the phase.
        record: its last commit.
        files: the file system.
        durability: ``"commit"`` syncs every commit; ``"group"`` gathers appends and publishes and syncs them together;
            ``"none"`` publishes every append and never syncs: safe from a killed process, not from power loss.
    """

    def __init__(self, folder: Path, record: Record, files: Files, durability: Durability) -> None:
        self.folder, self.files, self.durability = folder, files, durability
        self.record = record
        self.pending = record  # the committed record plus rows written and not yet published
        self._sync = durability != "none"
        self._open: dict[str, _Chunk] = {}
        self._touched: dict[int, Path] = {}  # descriptors to sync before the next commit
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="cascade-sync") if self._sync else None
        self._broken: str | None = None
        self._waiting, self._since = 0, time.monotonic()

    @property
    def next_commit(self) -> int:
        """The number that the next commit will have."""
        return self.record.commit + 1

    def append(self, rows: Mapping[str, Rows], clips: int, kind: str = "append") -> None:
        """Write rows to several arrays at once, publishing them as `durability` says.

        Raises:
            StoreError: the disk is full or refuses; nothing of these rows is committed.
        """
        with self.transaction():
            self.write(rows, clips)
            self._waiting += sum(values.nbytes for values in rows.values())
            late = self._waiting >= GROUP_BYTES or time.monotonic() - self._since >= GROUP_SECONDS
            if self.durability != "group" or late:
                self.publish(kind)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Forget what was written inside where it fails: what was pending before stays so."""
        before = self.pending
        try:
            yield
        except BaseException:
            if self.pending.commit == before.commit:
                self.pending = before
            raise

    def write(self, rows: Mapping[str, Rows], clips: int) -> None:
        """Write rows without publishing them; where that fails, the rows written before stay pending."""
        self._require_whole()
        pending, entries = self.pending, []
        with _named_errors(self.folder):
            for path, values in rows.items():
                tail, full = self._extend(pending.arrays[path], pending.tails[path], values)
                entries += full
                pending = replace(pending, tails={**pending.tails, path: tail})
            pending = self._with_checksums(pending, entries)
        self.pending = replace(pending, rows=pending.rows + clips)

    def overwrite(self, path: str, rows: Rows, values: Rows) -> None:
        """Write `values` over rows that the commit shows as absent, in ascending order, without publishing them."""
        self._require_whole()
        spec, tail = self.pending.arrays[path], self.pending.tails[path]
        entries: list[tuple[str, int, int]] = []
        with _named_errors(self.folder):
            for number in np.unique(rows // spec.chunk).tolist():
                chosen = rows // spec.chunk == number
                fd = self._chunk(spec, number, blank=True)
                inside = rows[chosen] - number * spec.chunk
                for start, end in _runs(inside):
                    data = _bytes(values[chosen][start:end])
                    self.files.write_at(fd, data, int(inside[start]) * spec.row_bytes)
                end = min(spec.chunk, tail.length - number * spec.chunk)
                crc = zlib.crc32(os.pread(fd, end * spec.row_bytes, 0))
                if end == spec.chunk:
                    entries.append((path, number, crc))
                else:
                    tail = replace(tail, crc=crc)
            pending = replace(self.pending, tails={**self.pending.tails, path: tail})
            self.pending = self._with_checksums(pending, entries)

    def add_array(self, spec: ArraySpec, blank: int = 0) -> None:
        """Begin a new array, visible with the next commit, with `blank` rows of fill values that take no space."""
        crc = zlib.crc32(np.broadcast_to(spec.blank(), (blank % spec.chunk, *spec.width)).tobytes())
        self._make_array(spec)
        self.pending = self.pending.with_array(spec, Tail(length=blank, crc=crc))

    def describe(self, path: str, spec: ArraySpec) -> None:
        """Change an array's names and attributes, with the next commit."""
        self.pending = replace(self.pending, arrays={**self.pending.arrays, path: spec})

    def publish(self, kind: str) -> None:
        """Commit what is pending.

        Raises:
            StoreError: the disk is full or refuses; the phase stays as committed last.
        """
        self._require_whole()
        now = time.time_ns()
        log_row = np.array([[self.pending.rows, now, KINDS.index(kind)]], np.int64)
        with self.transaction():
            self.write({"commits": log_row}, 0)
            record = replace(self.pending, commit=self.next_commit, time=now)
            with _named_errors(self.folder):
                self.sync()
                fresh = write_beside(self.files, self.folder / "zarr.json", record.document(), sync=self._sync)
                # An interrupt from here on may leave the disk a commit ahead: what is written next would overwrite it.
                self._broken = f"{self.folder}: a commit was interrupted; open the phase again to go on"
                try:
                    self.files.rename(fresh, self.folder / "zarr.json")
                except OSError:
                    self._broken = None
                    raise
        try:
            if self._sync:
                self.files.sync_folder(self.folder)
        except OSError as error:
            self._broken = f"{self.folder}: cannot sync: {error}"
            raise StoreError(f"{self._broken}; whether the last commit survives power loss is unknown") from error
        previous, self.record, self.pending = self.record, record, record
        self._waiting, self._since = 0, time.monotonic()
        self._refresh(previous)
        self._broken = None

    def _refresh_all(self) -> None:
        """Bring every array's own `zarr.json` up to the commit: what a crash after the commit may have left behind."""
        for path, spec in self.record.arrays.items():
            document = _metadata(spec, self.record.tails[path])
            file = self.folder / path / "zarr.json"
            if not file.exists() or file.read_bytes() != document:
                self.files.make_folder(file.parent)
                write_whole(self.files, file, document, sync=self._sync)

    def make_all(self) -> None:
        """Make the folders of a new phase, and publish it empty."""
        self.files.make_folder(self.folder)
        for spec in self.pending.arrays.values():
            self._make_array(spec)
        self.publish("create")

    def recover(self) -> None:
        """Clear up what a crash can leave behind: a fill that was not committed, and metadata that lags.

        Raises:
            StoreError: the disk refuses.
        """
        with _named_errors(self.folder):
            self._undo_fills()
            self._refresh_all()

    def _undo_fills(self) -> None:
        """Blank the rows that a fill which never committed has left behind."""
        commit = self.record.commit
        for view in self.record.views:
            path = presence_path(view)
            spec, length = self.record.arrays[path], self.record.tails[path].length
            held = map_array(self.folder / path, spec, length, blank_chunks(self.record, path, self._checksums))
            left = np.flatnonzero((held > commit) & (held != ABSENT))
            if len(left):
                log.warning(
                    "%s: undoing a fill of %d clips of view %r that was not committed", self.folder, len(left), view
                )
                blank = self.record.arrays[view].blank()
                self.overwrite(view, left, np.broadcast_to(blank, (len(left), *blank.shape)))
                self.overwrite(path, left, np.full(len(left), ABSENT, np.int32))
                self.sync()
                self.pending = self.record

    def close(self) -> None:
        """Publish what is pending and let go of all files."""
        try:
            if self._broken is None and self.pending is not self.record:
                self.publish("append")
        finally:
            self.abandon()

    def abandon(self, reason: str = "the writer is closed") -> None:
        """Let go of all files and stop; what is pending is never seen."""
        if self._pool is not None:
            self._pool.shutdown()  # first: what it syncs must be open
        for fd in {chunk.fd for chunk in self._open.values()} | self._touched.keys():
            with suppress(OSError):
                self.files.close(fd)
        self._open.clear()
        self._touched.clear()
        self._broken = self._broken or f"{self.folder}: {reason}"

    def _extend(self, spec: ArraySpec, tail: Tail, values: Rows) -> tuple[Tail, list[tuple[str, int, int]]]:
        """Write `values` from the tail on; returns the new tail and the checksums of chunks now full."""
        done, length, crc, full = 0, tail.length, tail.crc, []
        while done < len(values):
            number, inside = divmod(length, spec.chunk)
            take = min(len(values) - done, spec.chunk - inside)
            fd = self._chunk(spec, number, blank=inside > 0)
            data = _bytes(values[done : done + take])
            self.files.write_at(fd, data, inside * spec.row_bytes)
            crc = zlib.crc32(data, crc)
            done, length = done + take, length + take
            if length % spec.chunk == 0:
                full.append((spec.path, number, crc))
                crc = 0
        return Tail(length=length, crc=crc), full

    def _with_checksums(self, pending: Record, entries: Iterable[tuple[str, int, int]]) -> Record:
        """Append the checksums of full chunks; the checksums' own is one over all of them."""
        numbers = {path: number for number, path in enumerate(pending.arrays)}
        rows = [(numbers[path], number, crc) for path, number, crc in entries if path != "checksums"]
        if not rows:
            return pending
        values = np.array(rows, np.int64)
        spec, tail = pending.arrays["checksums"], pending.tails["checksums"]
        extended, _ = self._extend(spec, tail, values)
        whole = Tail(length=extended.length, crc=zlib.crc32(_bytes(values), tail.crc))
        return replace(pending, tails={**pending.tails, "checksums": whole})

    def _checksums(self) -> Rows:
        spec, length = self.pending.arrays["checksums"], self.pending.tails["checksums"].length
        return map_array(self.folder / "checksums", spec, length, lambda _: False)

    def _chunk(self, spec: ArraySpec, number: int, *, blank: bool) -> int:
        """The descriptor of a chunk file, made at full size where it is new, of fill values where `blank`."""
        held = self._open.get(spec.path)
        if held is not None and held.number == number:
            self._touched[held.fd] = self.folder / spec.path
            return held.fd
        if held is not None:
            del self._open[spec.path]
            self._release(held)
        path = self.folder / spec.path / spec.chunk_file(number)
        if blank and not path.exists():
            if not blank_chunks(self.pending, spec.path, self._checksums)(number):
                raise Corrupt(f"{path}: expected a chunk file, got none")
            whole = np.broadcast_to(spec.blank(), (spec.chunk, *spec.width)).tobytes()
            write_whole(self.files, path, whole, sync=self._sync)
        fd, new = self.files.open_sized(path, spec.chunk_bytes)
        try:
            if self._sync:
                if new:
                    self._sync_file(fd)
                self.files.sync_folder(path.parent)  # of an old file too: its maker may have been stopped before this
        except BaseException:
            self.files.close(fd)
            raise
        self._open[spec.path] = _Chunk(number, fd)
        self._touched[fd] = path
        return fd

    def _release(self, chunk: _Chunk) -> None:
        """Sync and close a chunk file that is left for another; cut off, the next commit syncs it."""
        if chunk.fd in self._touched and self._sync:
            self._sync_file(chunk.fd)
        self._touched.pop(chunk.fd, None)
        self.files.close(chunk.fd)

    def sync(self) -> None:
        """Sync all descriptors written to, in parallel: the disk flushes once or twice instead of a dozen times."""
        self._each(self._sync_file, list(self._touched))
        self._touched.clear()

    def _each(self, action: Callable[[Any], None], items: list[Any]) -> None:
        if self._pool is not None:
            list(self._pool.map(action, items))

    def _refresh(self, previous: Record) -> None:
        """Let the arrays' own metadata follow; plain readers of single arrays go by it."""

        def put(path: str) -> None:
            document = _metadata(self.record.arrays[path], self.record.tails[path])
            write_whole(self.files, self.folder / path / "zarr.json", document, sync=self._sync)

        changed = [
            path
            for path, spec in self.record.arrays.items()
            if previous.arrays.get(path) != spec
            or previous.tails[path].length != self.record.tails[path].length
            or self.record.commit == 0
        ]
        try:
            if self._pool is None:
                for path in changed:
                    put(path)
            else:
                self._each(put, changed)
        except OSError as error:
            log.warning("%s: committed, but single arrays' metadata lags until the next commit: %s", self.folder, error)

    def _make_array(self, spec: ArraySpec) -> None:
        self.files.make_folder(self.folder / spec.path)
        write_whole(self.files, self.folder / spec.path / "zarr.json", _metadata(spec, Tail()), sync=self._sync)
        if self._sync:
            self.files.sync_folder(self.folder / spec.path)
            self.files.sync_folder(self.folder)

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise StoreError(self._broken)

    def _sync_file(self, fd: int) -> None:
        """Sync a file; where that fails nobody knows what is on the disk, so the writer stops."""
        try:
            self.files.sync(fd)
        except OSError as error:
            self._broken = f"{self.folder}: a sync failed ({error.strerror}); open the phase again to go on"
            raise


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says into the store's error."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        where = f" ({error.filename})" if error.filename else ""
        raise StoreError(f"{folder}: cannot write: {reason}{where}; the phase stays as committed last") from error


def _metadata(spec: ArraySpec, tail: Tail) -> bytes:
    return json.dumps(spec.metadata(tail.length)).encode()


def _bytes(values: Rows) -> memoryview:
    """The bytes of rows, without a copy where they are contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _runs(rows: Rows) -> list[tuple[int, int]]:
    """Where ascending rows follow one another: (first, end) positions of each run."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return list(pairwise(edges))
