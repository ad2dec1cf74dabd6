"""Sealed phases on any fsspec URL: published once, read through a local cache, every byte under a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade_engine.errors import Corrupt, InvalidInput, NotFound, StoreError
from cascade_engine.store.creating import read_root
from cascade_engine.store.feature_store import FeatureStore
from cascade_engine.store.layout import check_phase

_MANIFEST = "commits/aside/manifest.json"
_BLOCK = 8 << 20


def publish(
    store: FeatureStore, url: str, *, phase: str | None = None, progress: Callable[[int], None] = lambda _: None
) -> int:
    """Copy a sealed phase to a URL; its commit record goes last, so that no reader sees half of it.

    Args:
        store: the store.
        url: of the store there, such as ``s3://bucket/features.zarr``; whatever fsspec can write to.
        phase: the current one by default.
        progress: called with the bytes just sent.

    Returns:
        The bytes sent.

    Raises:
        StoreError: the phase is not sealed, or another phase of that name is there.
    """
    folder, uid, _, sealed = store.identity(phase)
    if not sealed:
        raise StoreError(f"phase {folder.name!r}: expected a sealed phase to publish, seal it first")
    files, root = _far(url)
    target = f"{root}/phases/{folder.name}"
    if files.exists(f"{target}/zarr.json"):
        there = json.loads(files.cat_file(f"{target}/zarr.json"))["attributes"]["cascade"]["uid"]
        if there != uid:
            raise StoreError(f"{url}: has another phase {folder.name!r} already")
    sent = 0
    manifest: dict[str, dict[str, Any]] = {}
    last = [folder / "zarr.json"]
    aside = folder / "commits" / "aside"
    held = (each for each in folder.rglob("*") if each.is_file() and not each.is_relative_to(aside))
    for path in sorted(held) + last:
        name = path.relative_to(folder).as_posix()
        manifest[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    _put(files, f"{target}/{_MANIFEST}", json.dumps(manifest).encode())
    for name, about in manifest.items():
        if name != "zarr.json":
            _send(files, folder / name, f"{target}/{name}")
            sent += int(about["bytes"])
            progress(about["bytes"])
    if not files.exists(f"{root}/zarr.json"):
        root_document = json.loads((store.path / "zarr.json").read_bytes())
        root_document["attributes"]["cascade"]["default_phase"] = folder.name
        _put(files, f"{root}/phases/zarr.json", (store.path / "phases" / "zarr.json").read_bytes())
        _put(files, f"{root}/zarr.json", json.dumps(root_document).encode())
    _send(files, folder / "zarr.json", f"{target}/zarr.json")
    return sent + int(manifest["zarr.json"]["bytes"])


def fetch(
    url: str,
    *,
    phase: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> FeatureStore:
    """Open a published phase: copied into a local cache once, each file checked against its SHA-256, then mapped.

    Args:
        url: of the store.
        phase: the one published first by default.
        cache: a folder; ``$XDG_CACHE_HOME/cascade_engine`` (``~/.cache``) by default.
        progress: called with the bytes just fetched.

    Raises:
        NotFound: no store, or no such phase.
        Corrupt: a file is not as it was published; nothing of it stays in the cache.
    """
    files, root = _far(url)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade_engine"
    local = Path(cache or home) / hashlib.sha256(url.encode()).hexdigest()[:16]
    local.mkdir(parents=True, exist_ok=True)
    (local / "zarr.json").write_bytes(_get(files, f"{root}/zarr.json", url))
    (local / "phases").mkdir(exist_ok=True)
    name = check_phase(phase or read_root(local))
    there = f"{root}/phases/{name}"
    record = _get(files, f"{there}/zarr.json", f"{url}, phase {name!r}")
    folder = local / "phases" / name
    if (folder / "zarr.json").is_file() and (folder / "zarr.json").read_bytes() == record:
        return FeatureStore.open(local, phase=name)
    manifest = json.loads(_get(files, f"{there}/{_MANIFEST}", f"{url}, phase {name!r}"))
    arriving = local / f"{name}.{uuid.uuid4().hex}"
    try:
        for file, about in manifest.items():
            _receive(files, f"{there}/{file}", _inside(arriving, file), about)
            progress(about["bytes"])
        shutil.rmtree(folder, ignore_errors=True)
        arriving.rename(folder)
    finally:
        shutil.rmtree(arriving, ignore_errors=True)
    return FeatureStore.open(local, phase=name)


def _far(url: str) -> tuple[Any, str]:
    """The file system that a URL names, and the path there."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except ValueError as error:
        raise InvalidInput(f"{url}: expected a URL that fsspec knows: {error}") from None
    return files, root


def _inside(folder: Path, name: str) -> Path:
    """Where a file of a manifest goes: never outside the folder."""
    target = folder / name
    if (target.is_absolute() and not target.is_relative_to(folder)) or ".." in Path(name).parts:
        raise Corrupt(f"{name!r}: the manifest names a file outside its phase")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _put(files: Any, target: str, data: bytes) -> None:
    files.makedirs(target.rpartition("/")[0], exist_ok=True)
    files.pipe_file(target, data)


def _send(files: Any, path: Path, target: str) -> None:
    files.makedirs(target.rpartition("/")[0], exist_ok=True)
    files.put_file(str(path), target)


def _get(files: Any, path: str, what: str) -> bytes:
    try:
        data: bytes = files.cat_file(path)
    except FileNotFoundError:
        raise NotFound(f"{what}: expected a published store, found no {path.rpartition('/')[2]}") from None
    else:
        return data


def _receive(files: Any, source: str, target: Path, about: dict[str, Any]) -> None:
    """Copy one file and check it on the way."""
    digest, size = hashlib.sha256(), 0
    try:
        with files.open(source, "rb") as remote, target.open("wb") as local:
            while block := remote.read(_BLOCK):
                digest.update(block)
                size += len(block)
                local.write(block)
    except FileNotFoundError:
        raise Corrupt(f"{source}: expected a file of {about['bytes']} bytes, found none") from None
    if digest.hexdigest() != about["sha256"]:
        raise Corrupt(f"{source}: expected {about['bytes']} bytes as published, got {size} other ones")
