"""Many writers: each extractor writes a staging group of its own, and one commit takes them all in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import NotFound
from cascade_engine.store.columns import Categorical
from cascade_engine.store.creating import aside, is_aside, read_root
from cascade_engine.store.feature_store import FeatureStore
from cascade_engine.store.writer import Durability

Rows = npt.NDArray[np.int64]
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
        named = sorted(each.parent for each in folder(path).glob(f"{store.phase}.*/zarr.json"))
        # Phases' names may have dots too: of groups of main.flow, only what they say tells that they are not of main.
        return [each for each in named if not is_aside(each) and read_root(each) == store.phase]


def merge(
    store: FeatureStore,
    groups: Sequence[str | os.PathLike[str]] | None = None,
    *,
    keep: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Take staging groups into the phase a store is opened to append to, in one commit; returns the clips added.

    Of a group that was merged before, because it was kept or a crash prevented its removal, only what came since is
    taken: new clips in that commit, views of clips that the phase lacks in a fill each. Nobody writes to a group
    from before it is read until it is gone, so nothing goes with it that was not taken.

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
    with ExitStack() as locks:  # nobody writes on
        sources = [locks.enter_context(FeatureStore.open(path, mode="a")) for path in paths]
        before = store.merged
        added = store.append_all(
            _blocks(store, sources, progress), {source.identity()[1]: source.rows for source in sources}
        )
        for source in sources:
            if source.identity()[1] in before:
                _fill(store, source)
        if not keep:
            if store.durability == "none":
                os.sync()  # a group's clips may be safe from power loss: they go when the phase's are
            _remove(store.path, paths)
    return added


def folder(path: str | os.PathLike[str]) -> Path:
    """Where the staging groups of a store are: beside it."""
    root = Path(path)
    return root.with_name(f"{root.name}.staging")


def _blocks(
    store: FeatureStore, sources: Sequence[FeatureStore], progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """The arguments of appends that bring a store all rows of others that it does not have from an earlier merge."""
    for source in sources:
        rows = _left(store, source)
        for start in range(0, len(rows), _BLOCK):
            part = rows[start : start + _BLOCK]
            yield rows_as_append(source, part)
            progress(len(part))


def _left(store: FeatureStore, source: FeatureStore) -> Rows:
    """The rows of a group that are not in a store's phase from an earlier merge.

    Those that are were in the group then and are found by their clip: power loss may have taken them from a group
    that does not sync, and others may have come in their place.
    """
    had = store.merged.get(source.identity()[1], 0)
    had = source.rows if had is None else min(had, source.rows)
    if not had:
        return np.arange(source.rows)
    there = np.isin(source.column("clip_id")[:had], store.column("clip_id"))
    return np.concatenate([np.flatnonzero(~there), np.arange(had, source.rows)])


def _fill(store: FeatureStore, source: FeatureStore) -> None:
    """Give clips that a store's phase has of a group the views that they have got there since."""
    ids = source.column("clip_id")
    rows = store.rows_of(ids)
    for view in source.views:
        late = np.flatnonzero(source.present(view) & ~store.present(view)[rows])
        if len(late):
            store.fill(view, ids[late], source.features(view)[late], as_is=True)


def _remove(root: Path, paths: Sequence[Path]) -> None:
    """Remove groups, each at once: a crash leaves none half-removed under its name."""
    for path in paths:
        gone = aside(path)
        path.rename(gone)
        shutil.rmtree(gone)
    if folder(root).is_dir() and not any(folder(root).iterdir()):
        folder(root).rmdir()


def rows_as_append(source: FeatureStore, part: Rows) -> dict[str, Any]:
    """The arguments of an append that writes some rows of a store's current phase again."""
    present = {view: source.present(view)[part] for view in source.views}
    columns: dict[str, Any] = {name: source.coded(name) for name in source.columns}
    columns = {name: each.take(part) if isinstance(each, Categorical) else each[part] for name, each in columns.items()}
    return {
        "views": {view: source.features(view)[part] for view, held in present.items() if held.any()},
        "present": {view: held for view, held in present.items() if held.any()},
        **columns,
    }
