"""The clip cache's files while they grow: frames are appended first, then a line of the journal says so."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from cascade_engine.errors import StoreError
from cascade_engine.video.extraction import Part
from cascade_engine.video.index import VideoEntry


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One line of the journal: a video whose frames are on disk."""

    key: str
    offset: int  # first frame in the view files
    length: int  # frames
    fps: float
    problem: str | None  # of a video of which only a part could be read
    content: str  # hash of the file
    path: str  # where the file was, with its size and time of change: the same again need not be hashed again
    bytes: int
    changed: int  # nanoseconds


class Journal:
    """The growing files of a cache, held by one process at a time; use it with `with`.

    Args:
        folder: of the cache.
        frame_bytes: file name (without .bin) to the bytes of one frame in it.

    Raises:
        StoreError: on entering, another process holds it.
    """

    def __init__(self, folder: Path, frame_bytes: Mapping[str, int]) -> None:
        self.folder, self.frame_bytes = folder, dict(frame_bytes)
        self.parts = folder / "parts"
        self.stored: dict[str, Stored] = {}
        self.contents: dict[tuple[str, int, int], str] = {}  # (path, bytes, changed) to hash
        self._lock: IO[bytes] | None = None
        self.frames = 0

    def __enter__(self) -> Journal:
        """Take the lock; nothing is read or changed yet."""
        self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StoreError(f"{self.folder}: another process is building this cache") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the lock; after a finished build no parts are left."""
        if kind is None:
            shutil.rmtree(self.parts, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def recover(self) -> None:
        """Read what is stored and cut off what was half written.

        Raises:
            StoreError: a line of the journal cannot be read (nothing is cut off then), or a file is shorter than told.
        """
        self.parts.mkdir(exist_ok=True)
        path = self.folder / "journal.jsonl"
        whole = 0
        if path.exists():
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._remember(Stored(**json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise StoreError(f"{path}: expected a stored video in line {number} ({error!r})") from None
                whole += len(line)
            os.truncate(path, whole)
        for name, size in self.frame_bytes.items():
            file = self.folder / f"{name}.bin"
            file.touch()
            if file.stat().st_size < self.frames * size:
                raise StoreError(f"{file}: expected {self.frames * size} bytes, found {file.stat().st_size}")
            os.truncate(file, self.frames * size)

    def _remember(self, row: Stored) -> None:
        self.stored[row.key] = row
        self.contents[row.path, row.bytes, row.changed] = row.content
        self.frames = row.offset + row.length

    def append(self, part: Part, entry: VideoEntry) -> None:
        """Store one extracted video: its frames reach the disk before the journal speaks of them."""
        source = self.parts / part.key
        for name in self.frame_bytes:
            with (source / f"{name}.bin").open("rb") as given, (self.folder / f"{name}.bin").open("ab") as file:
                _copy(given, file)
                file.flush()
                os.fsync(file.fileno())
        seen = entry.path.stat()
        row = Stored(
            key=part.key,
            offset=self.frames,
            length=part.length,
            fps=part.fps,
            problem=part.problem,
            content=part.key.split("-")[0],
            path=str(entry.path.absolute()),
            bytes=seen.st_size,
            changed=seen.st_mtime_ns,
        )
        with (self.folder / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._remember(row)
        shutil.rmtree(source, ignore_errors=True)


def _copy(given: IO[bytes], file: IO[bytes]) -> None:
    shutil.copyfileobj(given, file, 1 << 22)


def content_key(entry: VideoEntry, journal: Journal) -> str:
    """A name for the part of a video that an entry asks for: by content, so a moved file keeps it.

    Raises:
        OSError: the file cannot be read.
    """
    seen = entry.path.stat()
    same = (str(entry.path.absolute()), seen.st_size, seen.st_mtime_ns)
    content = journal.contents.get(same)
    if content is None:
        with entry.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()[:40]
    if entry.start == 0 and entry.end is None:
        return content
    return f"{content}-{entry.start!r}-{entry.end!r}"
