"""Changes to a phase other than appended rows: filled and new views, new columns and new versions of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput, SchemaMismatch
from cascade_engine.store.columns import Dictionary, pack, typed
from cascade_engine.store.ingest import Batch, features
from cascade_engine.store.layout import (
    BUILT_IN,
    CHUNK_BYTES,
    INLINE_CATEGORIES,
    Column,
    View,
    check_columns,
    column_specs,
    presence_path,
    presence_spec,
    view_spec,
)
from cascade_engine.store.phase import Phase
from cascade_engine.store.writer import PhaseWriter

_INLINE_BYTES = 8192


def fill(
    writer: PhaseWriter, phase: Phase, view: str, clip_id: npt.NDArray[np.int64], value: object, *, as_is: bool = False
) -> None:
    """Give clips a view they are missing, in one commit; features `as_is` are not scaled.

    Raises:
        InvalidInput: a clip that has the view already or comes twice, or features that do not fit.
    """
    rows = phase.rows_of(clip_id)
    held = phase.present(view)[rows]
    if held.any():
        raise InvalidInput(
            f"clip_id: clip {int(clip_id[held][0])} has view {view!r} already; a new phase can hold another"
        )
    about = writer.pending.views[view]
    stored, lossless = features(replace(about, normalised=about.normalised and not as_is), value, view, clip_id)
    order = np.argsort(rows)
    if (np.diff(rows[order]) == 0).any():
        raise InvalidInput("clip_id: expected every clip once")
    commit = np.full(len(rows), writer.next_commit, np.int32)
    try:
        note_lossless(writer, {view: lossless})
        # Presence first: whatever a crash leaves behind is then known to be a fill that was not committed.
        writer.overwrite(presence_path(view), rows[order], commit)
        writer.sync()
        writer.overwrite(view, rows[order], stored[order])
        writer.publish("fill")
    except BaseException:  # an interrupt too: closing the store would commit what is pending
        writer.abandon("a fill failed half-way; open the phase again, which undoes it")
        raise


def add_view(writer: PhaseWriter, name: str, view: View) -> None:
    """Add a view that no clip has yet."""
    record = writer.pending
    if name in record.views or name in record.columns:
        raise SchemaMismatch(f"view {name!r}: phase {record.phase!r} has one of that name already")
    limit = max((record.arrays[each].chunk_bytes for each in record.views), default=CHUNK_BYTES)
    with writer.transaction():
        writer.add_array(view_spec(name, view, limit), blank=record.rows)
        writer.add_array(presence_spec(name, limit), blank=record.rows)
        writer.pending = replace(writer.pending, views={**record.views, name: view})
        writer.publish("view")


def set_column(writer: PhaseWriter, name: str, value: object, kind: str | None) -> Dictionary | None:
    """Add a column, or a new version of one; older commits keep showing the older version."""
    record = writer.pending
    if name in BUILT_IN:
        raise SchemaMismatch(f"column {name!r}: only columns of your own can be set again")
    held = record.columns.get(name)
    kind = held.type if held is not None else kind
    if held is None:
        if kind is None:
            raise InvalidInput(f"kind: expected the type of the new column {name!r}")
        check_columns({name: kind}, record.views)
    assert kind is not None
    values = typed(value, name, kind, record.rows)
    commit = writer.next_commit
    path = name if held is None else f"{name}-{commit}"
    dictionary = Dictionary([]) if kind == "str" else None
    with writer.transaction():
        if held is not None:
            _retire(writer, held.versions[-1][1])
        limit = max(record.arrays[each].chunk_bytes for each in record.views)
        for spec in column_specs(path, kind, limit):
            writer.add_array(replace(spec, attributes={**spec.attributes, "column": name, "since_commit": commit}))
        if dictionary is not None:
            codes, fresh = dictionary.encode(values)
            dictionary.accept(fresh)
            blob, ends = pack(fresh, 0)
            writer.write({f"{path}-bytes": blob, f"{path}-ends": ends, path: codes}, 0)
            note_categories(writer, path, fresh)
        else:
            writer.write({path: values}, 0)
        versions = (*(held.versions if held is not None else ()), (commit, path))
        columns = {**record.columns, name: Column(type=kind, versions=versions)}
        writer.pending = replace(writer.pending, columns=columns)
        writer.publish("column")
    return dictionary


def note_batch(writer: PhaseWriter, batch: Batch, dictionaries: Mapping[str, Dictionary]) -> None:
    """Keep what a batch brings besides its rows for the next commit: new categories, and what its values are like."""
    note_lossless(writer, batch.lossless)
    for name, fresh in batch.fresh.items():
        if fresh:
            path = writer.pending.columns[name].versions[-1][1]
            note_categories(writer, path, [*dictionaries[name].categories, *fresh])


def accept_batch(batch: Batch, dictionaries: Mapping[str, Dictionary]) -> None:
    """Remember the new categories of a batch that is written."""
    for name, fresh in batch.fresh.items():
        dictionaries[name].accept(fresh)


def note_lossless(writer: PhaseWriter, lossless: Mapping[str, bool | None]) -> None:
    """Keep what is known of each view's values for the next commit."""
    views = dict(writer.pending.views)
    for name, found in lossless.items():
        views[name] = replace(views[name], float16_lossless=found)
    writer.pending = replace(writer.pending, views=views)


def note_categories(writer: PhaseWriter, path: str, categories: list[str]) -> None:
    """Repeat few categories in the attributes of a column's codes, for readers of plain Zarr."""
    spec = writer.pending.arrays[path]
    attributes: dict[str, Any] = {key: value for key, value in spec.attributes.items() if key != "categories"}
    if len(categories) <= INLINE_CATEGORIES and sum(map(len, categories)) <= _INLINE_BYTES:
        attributes["categories"] = categories
    if attributes != spec.attributes:
        writer.describe(path, replace(spec, attributes=attributes))


def _retire(writer: PhaseWriter, path: str) -> None:
    """Give a superseded version dimension names of its own: it does not grow with the clips any more."""
    spec = writer.pending.arrays[path]
    writer.describe(path, replace(spec, dims=(f"{path}_clip",)))
