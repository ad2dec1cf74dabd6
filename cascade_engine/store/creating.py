"""New stores and phases: built aside and renamed into place, so that there is no half-made one."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade_engine.errors import NotFound, SchemaMismatch, StoreError
from cascade_engine.store.files import LocalFiles, aside_of, write_whole
from cascade_engine.store.record import FORMAT, Record
from cascade_engine.store.writer import PhaseWriter

_ASIDE = re.compile(r"\.new-(\d+)-[0-9a-f]{32}$")


def make_store(root: Path, record: Record) -> None:
    """Make a store whose only phase is the empty `record`.

    Raises:
        StoreError: there is something at `root`, or the disk refuses.
    """
    if root.exists():
        raise StoreError(f"{root}: expected nothing there, found a {'folder' if root.is_dir() else 'file'}")
    fresh = aside(root)
    try:
        phases = fresh / "phases"
        phases.mkdir(parents=True)
        write_whole(LocalFiles(), phases / "zarr.json", _group({}), sync=True)
        about = {"cascade": {"format": FORMAT, "default_phase": record.phase}}
        write_whole(LocalFiles(), fresh / "zarr.json", _group(about), sync=True)
        _build(phases / record.phase, record)
        _place(fresh, root)
    except OSError as error:
        raise StoreError(f"{root}: cannot create: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def make_phase(root: Path, record: Record) -> None:
    """Add the empty phase `record` to a store.

    Raises:
        StoreError: the phase exists, or the disk refuses.
    """
    target = root / "phases" / record.phase
    if target.exists():
        raise StoreError(f"phase {record.phase!r}: {target} exists already")
    fresh = aside(root)
    try:
        fresh.mkdir(parents=True)
        _build(fresh / record.phase, record)
        _place(fresh / record.phase, target)
    except OSError as error:
        raise StoreError(f"{target}: cannot create: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_root(root: Path) -> str:
    """The default phase of the store at `root`.

    Raises:
        NotFound: no store there.
        SchemaMismatch: a Zarr group that is no feature store, or one of another format.
    """
    path = root / "zarr.json"
    try:
        about = json.loads(path.read_bytes())["attributes"]["cascade"]
        if about["format"] != FORMAT:
            raise SchemaMismatch(f"{root}: expected store format {FORMAT}, got format {about['format']}")
        return str(about["default_phase"])
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(
            f"{root}: expected a feature store, found {'no zarr.json' if root.exists() else 'nothing'}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise SchemaMismatch(f"{path}: expected the root of a feature store, got something else") from None


def phase_names(root: Path) -> tuple[str, ...]:
    """The phases of a store, in the order they were made."""
    names = [path.parent.name for path in (root / "phases").glob("*/zarr.json")]
    return tuple(sorted(names, key=lambda name: (_made(root / "phases" / name), name)))


def _made(folder: Path) -> int:
    """When a phase was made: its first commit's time, which every copy of it keeps."""
    try:
        with (folder / "commits" / "c.0.0").open("rb") as file:
            head = file.read(24)
        return int.from_bytes(head[8:16], "little")
    except OSError:
        return 0


def _build(folder: Path, record: Record) -> None:
    writer = PhaseWriter(folder, record, LocalFiles(), "commit")
    try:
        writer.make_all()
        aside_of(folder)
    finally:
        writer.abandon()


def _place(source: Path, target: Path) -> None:
    LocalFiles().sync_folder(source)
    source.rename(target)
    LocalFiles().sync_folder(target.parent)


def aside(path: Path) -> Path:
    """A name beside `path` for what is not whole: being made, or being removed."""
    return path.with_name(f"{path.name}.new-{os.getpid()}-{uuid.uuid4().hex}")


def is_aside(path: Path) -> bool:
    """Whether `aside` gave this name, in any process."""
    return _ASIDE.search(path.name) is not None


def left_aside(folder: Path, name: str | None = None) -> list[Path]:
    """What `aside` named in a folder, of things called `name` where given, and whose process runs no more."""
    found = [(each, _ASIDE.search(each.name)) for each in sorted(folder.glob("*.new-*"))]
    ours = [(each, match) for each, match in found if match and name in (None, each.name[: match.start()])]
    return [each for each, match in ours if not Path(f"/proc/{match[1]}").exists()]


def _group(attributes: Mapping[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()
