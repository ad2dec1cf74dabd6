"""What a backend prepares of a whole phase for mining, kept beside the phase: which files, and which are superseded."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cascade_engine.bank import Metric, Shelf
from cascade_engine.store.files import aside_of
from cascade_engine.store.mapping import is_mapped
from cascade_engine.store.phase import Phase
from cascade_engine.store.record import Record

LARGE = 1 << 28  # stored values of a view: 2 million clips of width 128, whose packed copy takes a second or two


def shelf_of(held: Phase, at: int | None, views: Iterable[str], metric: Metric, wanted: bool | None) -> Shelf | None:
    """Where the preparation of all clips of a phase is kept, or None where it is not worth it or cannot be.

    Args:
        held: the phase.
        at: a commit; the last one by default.
        views: of the bank.
        metric: of the bank.
        wanted: whether to keep it; by default where a view has at least `LARGE` values.
    """
    features = [held.features(view, at) for view in views]
    if not (any(each.size >= LARGE for each in features) if wanted is None else wanted):
        return None
    if not all(len(each) and is_mapped(each) for each in features):
        return None
    with suppress(OSError):  # a disk that refuses is said where the file is to be made
        aside_of(held.folder)
    number = held.record.commit if at is None else at
    commit = held.log[number]
    # A number alone may come again: commits that power loss took back are made anew, with other rows.
    identity = f"{held.record.uid} commit {number} at {commit.time!r}, {commit.rows} rows, {metric}"
    return Shelf(folder=_folder(held.folder), suffix=f"{metric}.{number}.packed", identity=identity)


def superseded(folder: Path, record: Record) -> list[Path]:
    """The files that were made of another commit than the phase's last, and what broken-off processes left."""
    left = [each for each in _folder(folder).glob("*.packed.new-*") if not _runs(each)]
    kept = f".{record.commit}.packed"
    return left + [each for each in _folder(folder).glob("*.packed") if not each.name.endswith(kept)]


def _folder(folder: Path) -> Path:
    return folder / "commits" / "aside"


def _runs(path: Path) -> bool:
    """Whether the process that is making this file still runs."""
    return Path(f"/proc/{path.name.rpartition('-')[2]}").exists()
