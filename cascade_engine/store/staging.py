"""Many writers: each extractor writes a staging group of its own, and one commit takes them all in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cascade_engine.errors import NotFound
from cascade_engine.store.columns import Categorical
from cascade_engine.store.feature_store import FeatureStore
from cascade_engine.store.writer import Durability

_BLOCK = 65_536  # clips at a time while merging


def stage(
    path: str | os.PathLike[str], name: str, *, phase: str | None = None, durability: Durability = "commit"
) -> FeatureStore:
    """A new staging group for a phase of the store at `path`: a store of its own, beside it, with the same views.

    Args:
        path: the store.
        name: of the group, one for each extractor process.
        phase: the store's first by default.
        durability: of the group's commits.

    Raises:
        StoreError: there is a group of that name.
    """
    with FeatureStore.open(path, phase=phase) as store:
        return store.like(folder(path) / f"{store.phase}.{name}", durability=durability)


def staged(path: str | os.PathLike[str], *, phase: str | None = None) -> list[Path]:
    """The staging groups of a phase, by name."""
    with FeatureStore.open(path, phase=phase) as store:
        return sorted(each.parent for each in folder(path).glob(f"{store.phase}.*/zarr.json"))


def merge(
    store: FeatureStore,
    groups: Sequence[str | os.PathLike[str]] | None = None,
    *,
    keep: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Take staging groups into the phase a store is opened to append to, in one commit; returns the clips added.

    A group that was merged before, and whose removal a crash prevented, is not merged twice.

    Args:
        store: opened with ``mode="a"``.
        groups: all of the phase's by default, in the order given or by name.
        keep: do not remove the groups afterwards.
        progress: called with the clips just written.

    Raises:
        InvalidInput: a clip that two groups have, or that is there already; nothing is merged then.
        StoreLocked: a group's writer is still at work.
    """
    paths = [Path(each) for each in groups] if groups is not None else staged(store.path, phase=store.phase)
    for path in paths:
        if not (path / "zarr.json").exists():
            raise NotFound(f"{path}: expected a staging group")
    sources = [FeatureStore.open(path, mode="a") for path in paths]  # their locks: nobody writes on
    try:
        added = store.append_all(_blocks(sources, progress), [source.identity()[1] for source in sources])
    finally:
        for source in sources:
            source.close()
    if not keep:
        for path in paths:
            shutil.rmtree(path)
        if folder(store.path).is_dir() and not any(folder(store.path).iterdir()):
            folder(store.path).rmdir()
    return added


def folder(path: str | os.PathLike[str]) -> Path:
    """Where the staging groups of a store are: beside it."""
    root = Path(path)
    return root.with_name(f"{root.name}.staging")


def _blocks(sources: Sequence[FeatureStore], progress: Callable[[int], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments of appends that bring all rows of some stores, with the uid of each one's store."""
    for source in sources:
        for start in range(0, source.rows, _BLOCK):
            part = slice(start, start + _BLOCK)
            yield source.identity()[1], rows_as_append(source, part)
            progress(min(_BLOCK, source.rows - start))


def rows_as_append(source: FeatureStore, part: slice) -> dict[str, Any]:
    """The arguments of an append that writes some rows of a store's current phase again."""
    present = {view: source.present(view)[part] for view in source.views}
    columns: dict[str, Any] = {name: source.coded(name) for name in source.columns}
    columns = {name: each.take(part) if isinstance(each, Categorical) else each[part] for name, each in columns.items()}
    return {
        "views": {view: source.features(view)[part] for view, held in present.items() if held.any()},
        "present": {view: held for view, held in present.items() if held.any()},
        **columns,
    }
