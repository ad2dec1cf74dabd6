"""What crashes leave behind and newer commits supersede, and what was made for nothing: removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cascade_engine.errors import StoreError, StoreLocked
from cascade_engine.store import staging
from cascade_engine.store.creating import aside, left_aside, phase_names, read_root
from cascade_engine.store.locking import take_lock
from cascade_engine.store.record import Record, read_record
from cascade_engine.store.shelving import superseded

if TYPE_CHECKING:
    from cascade_engine.store.feature_store import FeatureStore

_CHUNK = re.compile(r"c\.([0-9]+)(\.[0-9]+)*")


def clean(root: Path, *, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove temporary files, half-made phases, half-removed staging groups, chunk files past the last commit, and
    what was prepared for mining of earlier commits; returns them with their bytes.

    Args:
        root: the store.
        dry_run: remove nothing.

    Raises:
        StoreLocked: a writer is at work; what looks left behind may be its.
        StoreError: the disk refuses.
    """
    read_root(root)
    gone = [(each, _bytes(each)) for each in left_aside(root.parent, root.name) + left_aside(staging.folder(root))]
    locks = []
    try:
        for name in phase_names(root):
            folder = root / "phases" / name
            locks.append(take_lock(folder, f"phase {name!r} of {root}"))
            record = read_record(folder)
            gone += [(each, _bytes(each)) for each in folder.rglob("*.new")]
            gone += [(each, _bytes(each)) for each in _past(folder, record) + superseded(folder, record)]
        if not dry_run:
            for path, _ in gone:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise StoreError(f"{root}: cannot clean up: {error.strerror} ({error.filename})") from error
    finally:
        for lock in locks:
            lock.release()
    return gone


@contextmanager
def made_to_fill(store: FeatureStore) -> Iterator[FeatureStore]:
    """A phase just made, closed at the end, and removed where no clip got in; with its only phase the store goes."""
    try:
        with store:
            yield store
    finally:
        if not store.rows:
            with suppress(StoreLocked):  # another writer's by now
                _remove_empty(store.path, store.phase)


def _remove_empty(root: Path, phase: str) -> None:
    folder, gone = root / "phases" / phase, aside(root)
    lock = take_lock(folder, f"phase {phase!r} of {root}")  # nobody else fills it meanwhile
    try:
        alone = phase_names(root) == (phase,)
        if read_record(folder).rows or (read_root(root) == phase and not alone):
            return
        (root if alone else folder).rename(gone)  # at once: no reader meets half of it
    finally:
        lock.release()
    shutil.rmtree(gone)


def _past(folder: Path, record: Record) -> list[Path]:
    """Chunk files beyond what is committed, and arrays that no commit knows."""
    found = []
    for each in folder.iterdir():
        if not each.is_dir():
            continue
        if each.name not in record.arrays:
            found.append(each)
            continue
        spec, length = record.arrays[each.name], record.tails[each.name].length
        first = -(-length // spec.chunk)
        chunks = [(file, _CHUNK.fullmatch(file.name)) for file in each.glob("c.*")]
        found += [file for file, match in chunks if match and int(match[1]) >= first]
    return found


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_blocks * 512 for each in files)
