"""A phase opened to be written: locked, and put in order after a crash."""

from __future__ import annotations

from pathlib import Path

from cascade_engine.errors import StoreError
from cascade_engine.store.files import Files
from cascade_engine.store.locking import Lock, take_lock
from cascade_engine.store.record import Record, read_record
from cascade_engine.store.writer import Durability, PhaseWriter


def open_writer(folder: Path, what: str, files: Files, durability: Durability) -> tuple[PhaseWriter, Lock]:
    """The one writer of the phase in a folder, and the lock that makes it so; who takes them lets go of both.

    Raises:
        NotFound: no phase there.
        StoreLocked: another process writes it; it is named.
        StoreError: it is sealed, or the disk refuses.
    """
    _unsealed(folder, what)
    try:
        lock = take_lock(folder, what)
    except OSError as error:
        raise StoreError(f"{what}: cannot open for writing: {error.strerror}") from error
    try:
        writer = PhaseWriter(folder, _unsealed(folder, what), files, durability)  # only now does its record stay
        try:
            writer.recover()
        except BaseException:
            writer.abandon()
            raise
    except BaseException:
        lock.release()
        raise
    return writer, lock


def _unsealed(folder: Path, what: str) -> Record:
    record = read_record(folder)
    if record.sealed:
        raise StoreError(f"{what}: sealed, nothing can be added")
    return record
