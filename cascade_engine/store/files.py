"""The few things the store does to a file system, in one place, so that a test can log and replay them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class Files(Protocol):
    """The file system as the commit protocol sees it. Nothing here truncates: mapped files only grow."""

    def make_folder(self, path: Path) -> None:
        """Make a folder, with its parents, where it does not exist."""

    def open_sized(self, path: Path, size: int) -> tuple[int, bool]:
        """A descriptor of the file at `path`, at least `size` bytes long, and whether the file is new."""

    def write_at(self, fd: int, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""

    def sync(self, fd: int) -> None:
        """Return once what was written to `fd` survives power loss."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def rename(self, source: Path, target: Path) -> None:
        """Put `source` in the place of `target`, atomically."""

    def sync_folder(self, path: Path) -> None:
        """Return once the names in a folder survive power loss."""


class LocalFiles:
    """The local file system."""

    def make_folder(self, path: Path) -> None:
        """Make a folder, with its parents, where it does not exist."""
        path.mkdir(parents=True, exist_ok=True)

    def open_sized(self, path: Path, size: int) -> tuple[int, bool]:
        """A descriptor of the file at `path`, at least `size` bytes long, and whether the file is new."""
        try:
            fd, new = os.open(path, os.O_RDWR | os.O_CLOEXEC), False
        except FileNotFoundError:
            fd, new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), True
        try:
            if size and os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd, new

    def write_at(self, fd: int, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        while len(view):
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done

    def sync(self, fd: int) -> None:
        """Return once what was written to `fd` survives power loss."""
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Put `source` in the place of `target`, atomically."""
        source.rename(target)

    def sync_folder(self, path: Path) -> None:
        """Return once the names in a folder survive power loss."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def aside_of(phase: Path) -> Path:
    """The folder of a phase for what is no Zarr, made where it is missing: copies without empty folders lack it."""
    folder = phase / "commits" / "aside"
    folder.mkdir(exist_ok=True)
    return folder


def write_whole(files: Files, path: Path, data: bytes, *, sync: bool) -> None:
    """Replace the file at `path` by one with `data`, atomically; durable where `sync`, its folder's entry aside."""
    files.rename(write_beside(files, path, data, sync=sync), path)


def write_beside(files: Files, path: Path, data: bytes, *, sync: bool) -> Path:
    """Write `data` to a new file beside `path` that is to replace it."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    fd, _ = files.open_sized(temporary, 0)
    try:
        files.write_at(fd, data, 0)
        if sync:
            files.sync(fd)
    finally:
        files.close(fd)
    return temporary
