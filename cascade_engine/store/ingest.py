"""What a batch must be before a row of it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput, SchemaMismatch
from cascade_engine.store.columns import Dictionary, pack, typed
from cascade_engine.store.layout import ABSENT, BUILT_IN, View, presence_path
from cascade_engine.store.record import Record
from cascade_engine.tensor import BFLOAT16, to_host

Values = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A checked batch: rows by array path, categories that are new by column, and each view's float16 finding."""

    rows: dict[str, Values]
    clips: int
    fresh: dict[str, list[str]]
    lossless: dict[str, bool | None]


def check_batch(
    record: Record,
    commit: int,
    dictionaries: Mapping[str, Dictionary],
    views: Mapping[str, object],
    present: Mapping[str, object],
    columns: Mapping[str, object],
) -> Batch:
    """A batch as `append` was given it, checked and in stored types.

    Args:
        record: the phase, pending rows included.
        commit: the number the commit will have.
        dictionaries: per text column, its categories.
        views: view to features (b, D_view); views left out are missing for all clips.
        present: view to a mask (b,) of the clips that have it.
        columns: every column, built-in ones included.

    Raises:
        InvalidInput: wrong shapes or types, NaN or infinity (the clip is named).
        SchemaMismatch: a view or column the phase does not have, or one it asks for and does not get.
    """
    _require_schema(record, views, present, columns)
    clips = _count(columns["clip_id"])
    rows: dict[str, Values] = {}
    fresh: dict[str, list[str]] = {}
    lossless: dict[str, bool | None] = {}
    for name, column in record.columns.items():
        path = column.versions[-1][1]
        given = columns.get(name)
        if given is None and name in ("start", "end"):
            given = np.full(clips, np.nan)
        values = typed(given, name, column.type, clips)
        if column.type == "str":
            values, fresh[name] = dictionaries[name].encode(values)
            start = record.tails[f"{path}-bytes"].length
            rows[f"{path}-bytes"], rows[f"{path}-ends"] = pack(fresh[name], start)
        rows[path] = values
    for name, view in record.views.items():
        held = np.full(clips, name in views)
        if name in present:
            held = np.asarray(to_host(present[name], f'present["{name}"]'), np.bool_)
            if held.shape != (clips,):
                raise InvalidInput(f'present["{name}"]: expected ({clips},) bool, got {held.shape}')
        if not held.any():
            blank = record.arrays[name].blank()
            rows[name], lossless[name] = np.broadcast_to(blank, (clips, *blank.shape)), view.float16_lossless
        else:
            stored, lossless[name] = features(view, views[name], name, rows["clip_id"], held)
            rows[name] = stored
        rows[presence_path(name)] = np.where(held, commit, ABSENT).astype(np.int32)
    return Batch(rows=rows, clips=clips, fresh=fresh, lossless=lossless)


def features(
    view: View, value: object, name: str, clip_id: npt.NDArray[np.int64], held: npt.NDArray[np.bool_] | None = None
) -> tuple[Values, bool | None]:
    """Features (b, D) of a view in its stored type, and whether all so far are exact in float16.

    Normalises where the view says so. Rows that `held` leaves out become NaN.

    Raises:
        InvalidInput: wrong shape or type, NaN or infinity (the clip is named), or a zero vector to be normalised.
    """
    label = f'views["{name}"]'
    given = to_host(value, label)
    if given.ndim != 2 or given.shape != (len(clip_id), view.dim) or not _is_float(given.dtype):
        raise InvalidInput(
            f"{label}: expected ({len(clip_id)}, {view.dim}) floating point, got {tuple(given.shape)} {given.dtype}"
        )
    here = given if held is None or held.all() else given[held]
    ids = clip_id if held is None or held.all() else clip_id[held]
    _require_finite(here, label, ids)
    if view.normalised:
        here = _unit(here, label, ids)
    with np.errstate(over="ignore"):
        stored = here.astype(view.numpy, copy=False)
    if stored.dtype != here.dtype:
        _require_finite(stored, f"{label} as {view.dtype}", ids)
    lossless = view.float16_lossless
    if view.dtype == "float32" and lossless is not False and len(stored):
        with np.errstate(over="ignore"):
            lossless = bool((stored.astype(np.float16) == stored).all())
    if held is not None and not held.all():
        whole = np.full((len(clip_id), view.dim), np.nan, view.numpy)
        whole[held] = stored
        stored = whole
    return stored.view(np.uint16) if stored.dtype == BFLOAT16 else stored, lossless


def _require_schema(
    record: Record, views: Mapping[str, object], present: Mapping[str, object], columns: Mapping[str, object]
) -> None:
    for name in (*views, *present):
        if name not in record.views:
            raise SchemaMismatch(f"views: phase {record.phase!r} has {', '.join(record.views)}, got {name!r}")
    if missing := [name for name in present if name not in views]:
        raise SchemaMismatch(f'present["{missing[0]}"]: expected its features in views too')
    for name in columns:
        if name not in record.columns:
            raise SchemaMismatch(f"columns: phase {record.phase!r} has {', '.join(record.columns)}, got {name!r}")
    optional = ("start", "end")
    for name in record.columns:
        if columns.get(name) is None and name not in optional:
            kind = "column" if name in BUILT_IN else f"{record.columns[name].type} column"
            raise SchemaMismatch(f"{name}: expected a value a clip for this {kind}, got none")


def _count(clip_id: object) -> int:
    ids = to_host(clip_id, "clip_id")
    if ids.ndim != 1:
        raise InvalidInput(f"clip_id: expected (b,) integers, got {tuple(ids.shape)} {ids.dtype}")
    return len(ids)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


def _require_finite(values: Values, label: str, clip_id: npt.NDArray[np.int64]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum(dtype=np.float64 if values.dtype == np.float64 else np.float32)
    if np.isfinite(total):  # any NaN or infinity would have reached the sum
        return
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise InvalidInput(
            f"{label}: expected finite values, got {values[row, column]} in clip {clip_id[row]} (row {row} of them)"
        )


def _unit(values: Values, label: str, clip_id: npt.NDArray[np.int64]) -> Values:
    wide = values.astype(np.float64)
    scale = np.abs(wide).max(axis=1, keepdims=True, initial=0)
    if (scale == 0).any():
        row = int(np.flatnonzero(scale[:, 0] == 0)[0])
        raise InvalidInput(f"{label}: expected vectors that can be normalised, got zeros in clip {clip_id[row]}")
    wide /= scale
    unit: Values = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit
