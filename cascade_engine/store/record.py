"""The commit record: a phase's `zarr.json`, which says all that is committed."""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cascade_engine.errors import Corrupt, NotFound, SchemaMismatch
from cascade_engine.store.layout import (
    BUILT_IN,
    ArraySpec,
    Column,
    Tail,
    View,
    column_specs,
    presence_spec,
    table_spec,
    view_spec,
)

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything one commit of a phase says; `zarr.json` is its serialised form.

    Args:
        phase: the phase's name.
        uid: made with the phase, for good.
        commit: number of this commit, 0 for the empty phase.
        rows: clips committed.
        time: of the commit, nanoseconds since 1970.
        sealed: no commit follows.
        parent: the phase this one follows, where it does.
        model: what computed the features, as the user names it (a hash, a path).
        preprocessing: likewise.
        views: view name to its description.
        columns: column name to its description, the built-in ones first.
        merged: uid of each staging group that is in, to the rows it had then; None where an older store did not say.
        arrays: path to spec; an array's position is its number in `checksums`.
        tails: path to where that array ends at this commit.
    """

    phase: str
    uid: str
    commit: int = 0
    rows: int = 0
    time: int = 0
    sealed: bool = False
    parent: str | None = None
    model: str | None = None
    preprocessing: str | None = None
    views: Mapping[str, View]
    columns: Mapping[str, Column]
    merged: Mapping[str, int | None] = field(default_factory=dict)
    arrays: Mapping[str, ArraySpec]
    tails: Mapping[str, Tail]

    def document(self) -> bytes:
        """The phase's `zarr.json`: the group, its arrays' metadata inline, and the record in its attributes."""
        views = {
            name: {
                "dim": view.dim,
                "dtype": view.dtype,
                "normalised": view.normalised,
                "float16_lossless": view.float16_lossless,
            }
            for name, view in self.views.items()
        }
        columns = {name: {"type": column.type, "versions": column.versions} for name, column in self.columns.items()}
        about = {
            "format": FORMAT,
            "phase": self.phase,
            "uid": self.uid,
            "commit": self.commit,
            "n": self.rows,
            "time": self.time,
            "sealed": self.sealed,
            "parent": self.parent,
            "model": self.model,
            "preprocessing": self.preprocessing,
            "views": views,
            "columns": columns,
            "merged": dict(self.merged),
            "checksums": {path: self.tails[path].crc for path in self.arrays},
        }
        metadata = {path: spec.metadata(self.tails[path].length) for path, spec in self.arrays.items()}
        document: dict[str, Any] = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"cascade": about},
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata},
        }
        about["crc"] = document_crc(document)
        return json.dumps(document).encode()

    @classmethod
    def parse(cls, data: bytes, where: Path) -> Record:
        """The record in a phase's `zarr.json`.

        Raises:
            Corrupt: not a commit record at all.
            SchemaMismatch: of another format.
        """
        try:
            document = json.loads(data)
            about = document["attributes"]["cascade"]
            if about["format"] != FORMAT:
                raise SchemaMismatch(f"{where}: expected store format {FORMAT}, got format {about['format']}")
            parsed = {
                path: ArraySpec.parse(path, metadata)
                for path, metadata in document["consolidated_metadata"]["metadata"].items()
            }
            return cls(
                phase=about["phase"],
                uid=about["uid"],
                commit=about["commit"],
                rows=about["n"],
                time=about["time"],
                sealed=about["sealed"],
                parent=about["parent"],
                model=about["model"],
                preprocessing=about["preprocessing"],
                views={name: View(**view) for name, view in about["views"].items()},
                columns={
                    name: Column(type=value["type"], versions=tuple((c, p) for c, p in value["versions"]))
                    for name, value in about["columns"].items()
                },
                merged=merged if isinstance(merged := about["merged"], dict) else dict.fromkeys(merged),
                arrays={path: parsed[path][0] for path in about["checksums"]},
                tails={path: Tail(length=parsed[path][1], crc=crc) for path, crc in about["checksums"].items()},
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise Corrupt(f"{where}: expected a commit record, got {type(error).__name__}: {error}") from None

    def with_array(self, spec: ArraySpec, tail: Tail | None = None) -> Record:
        """The record with one array more."""
        arrays, tails = {**self.arrays, spec.path: spec}, {**self.tails, spec.path: tail or Tail()}
        return replace(self, arrays=arrays, tails=tails)


def document_crc(document: Mapping[str, Any]) -> int:
    """CRC-32 of a phase's `zarr.json`, its own `crc` aside."""
    about = {key: value for key, value in document["attributes"]["cascade"].items() if key != "crc"}
    body = {**document, "attributes": {**document["attributes"], "cascade": about}}
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def read_record(folder: Path) -> Record:
    """The last commit of the phase in `folder`."""
    path = folder / "zarr.json"
    try:
        return Record.parse(path.read_bytes(), path)
    except FileNotFoundError:
        raise NotFound(f"phase {folder.name!r}: {path} does not exist") from None


def empty_record(
    *,
    phase: str,
    uid: str,
    views: Mapping[str, View],
    columns: Mapping[str, str],
    chunk_bytes: int,
    parent: str | None = None,
    model: str | None = None,
    preprocessing: str | None = None,
) -> Record:
    """What a phase's record says before its first commit."""
    specs = [view_spec(name, view, chunk_bytes) for name, view in views.items()]
    specs += [presence_spec(name, chunk_bytes) for name in views]
    kinds = {**BUILT_IN, **columns}
    for name, kind in kinds.items():
        specs += column_specs(name, kind, chunk_bytes)
    specs.append(table_spec("commits", "int64", ("commit", "commit_field"), ("rows", "time_ns", "kind"), chunk_bytes))
    specs.append(
        table_spec("checksums", "int64", ("checksum", "checksum_field"), ("array", "chunk", "crc32"), chunk_bytes)
    )
    return Record(
        phase=phase,
        uid=uid,
        commit=-1,
        parent=parent,
        model=model,
        preprocessing=preprocessing,
        views=dict(views),
        columns={name: Column(type=kind, versions=((0, name),)) for name, kind in kinds.items()},
        arrays={spec.path: spec for spec in specs},
        tails={spec.path: Tail() for spec in specs},
    )


def emptied(record: Record) -> Record:
    """The record of a new, empty phase with the views, types and columns of another, and its name."""
    return empty_record(
        phase=record.phase,
        uid=uuid.uuid4().hex,
        views={name: replace(view, float16_lossless=None) for name, view in record.views.items()},
        columns={name: each.type for name, each in record.columns.items() if name not in BUILT_IN},
        chunk_bytes=max(record.arrays[view].chunk_bytes for view in record.views),
    )
