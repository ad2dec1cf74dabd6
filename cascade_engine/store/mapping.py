"""Chunk files of one array, mapped back to back into one address range: a contiguous array without a copy."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cascade_engine.errors import Corrupt, StoreError
from cascade_engine.store.layout import ArraySpec

_PROT_NONE, _PROT_READ = 0, 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_FAILED = ctypes.c_void_p(-1).value
_WILLNEED, _DONTNEED = 3, 4
_GATHERED = 128 << 20  # bytes of a mapped array that a gather keeps in memory at a time


class Region:
    """A mapped address range; NumPy arrays over it keep it alive, and it is unmapped after the last of them."""

    def __init__(self, address: int, size: int, spec: ArraySpec, length: int) -> None:
        self.address = address
        self.__array_interface__ = {
            "data": (address, True),
            "shape": (length, *spec.width),
            "typestr": spec.numpy.str,
            "version": 3,
        }
        self._unmap = weakref.finalize(self, _libc().munmap, ctypes.c_void_p(address), ctypes.c_size_t(size))


def map_array(folder: Path, spec: ArraySpec, length: int, missing_ok: Callable[[int], bool]) -> np.ndarray[Any, Any]:
    """The first `length` rows of an array as one read-only NumPy array over its mapped files.

    Args:
        folder: the array's folder.
        spec: the array.
        length: rows committed.
        missing_ok: whether a chunk of this number may be missing; its rows read as fill values then.

    Raises:
        Corrupt: a chunk file is missing or too short.
        StoreError: the system refuses to map it.
    """
    if length == 0:
        empty: np.ndarray[Any, Any] = np.empty((0, *spec.width), spec.numpy)
        return empty
    if spec.chunk_bytes % mmap.PAGESIZE:
        return _read_array(folder, spec, length, missing_ok)
    chunks = -(-length // spec.chunk)
    size = chunks * spec.chunk_bytes
    base = _mmap(None, size, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, folder)
    region = Region(base, size, spec, length)
    blank = -1
    try:
        for number in range(chunks):
            address = base + number * spec.chunk_bytes
            fd = _open_chunk(folder, spec, number, length, missing_ok)
            if fd is not None:
                try:
                    _mmap(address, spec.chunk_bytes, _PROT_READ, _MAP_SHARED | _MAP_FIXED, fd, folder)
                finally:
                    os.close(fd)
                continue
            if blank < 0:
                blank = _blank_file(spec)
            _mmap(address, spec.chunk_bytes, _PROT_READ, _MAP_SHARED | _MAP_FIXED, blank, folder)
    finally:
        if blank >= 0:
            os.close(blank)
    return np.asarray(region)


def prefetch(array: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
    """Ask the system to read these rows of a mapped array from disk, all at once; returns before they are there."""
    advise = _libc().madvise
    start, stride = array.__array_interface__["data"][0], array.strides[0]
    first = (start + np.unique(rows) * stride) // mmap.PAGESIZE * mmap.PAGESIZE
    pages = np.unique(first)
    span = ctypes.c_size_t(stride + mmap.PAGESIZE)
    for page in pages.tolist():
        advise(ctypes.c_void_p(page), span, _WILLNEED)


def is_mapped(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array's memory is mapped files, of which the system may be told to forget the pages."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(owner, Region)


def gather(array: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy of some rows, ascending; of a mapped array little more than the copy is in memory at any time."""
    if not len(rows) or array.nbytes <= _GATHERED or not is_mapped(array):
        few: np.ndarray[Any, Any] = array[rows]
        return few
    out = np.empty((len(rows), *array.shape[1:]), array.dtype)
    start, stride = array.__array_interface__["data"][0], array.strides[0]
    step = _GATHERED // stride
    for first in range(0, len(array), step):
        begin, end = np.searchsorted(rows, (first, first + step))
        out[begin:end] = array[rows[begin:end]]
        page = (start + first * stride) // mmap.PAGESIZE * mmap.PAGESIZE
        span = min(step, len(array) - first) * stride
        _libc().madvise(ctypes.c_void_p(page), ctypes.c_size_t(span), _DONTNEED)
    return out


def _open_chunk(
    folder: Path, spec: ArraySpec, number: int, length: int, missing_ok: Callable[[int], bool]
) -> int | None:
    """A descriptor of a chunk file that is as long as its committed rows ask."""
    path = folder / spec.chunk_file(number)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if missing_ok(number):
            return None
        raise Corrupt(f"{path}: expected a chunk file, got none") from None
    need = min(spec.chunk, length - number * spec.chunk) * spec.row_bytes
    size = os.fstat(fd).st_size
    if size < need:
        os.close(fd)
        raise Corrupt(f"{path}: expected at least {need} bytes, got {size}")
    return fd


def _blank_file(spec: ArraySpec) -> int:
    """An anonymous file that holds one chunk of fill values."""
    fd = os.memfd_create("blank", os.MFD_CLOEXEC)
    os.write(fd, np.broadcast_to(spec.blank(), (spec.chunk, *spec.width)).tobytes())
    return fd


def _read_array(folder: Path, spec: ArraySpec, length: int, missing_ok: Callable[[int], bool]) -> np.ndarray[Any, Any]:
    """A copy, for stores whose chunks are no whole pages of this machine."""
    out = np.empty((length, *spec.width), spec.numpy)
    for number in range(-(-length // spec.chunk)):
        part = out[number * spec.chunk : (number + 1) * spec.chunk]
        fd = _open_chunk(folder, spec, number, length, missing_ok)
        if fd is None:
            part[...] = spec.blank()
            continue
        with os.fdopen(fd, "rb") as file:
            part[...] = np.fromfile(file, spec.numpy, part.size).reshape(part.shape)
    out.flags.writeable = False
    return out


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return libc


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int, folder: Path) -> int:
    found: int | None = _libc().mmap(address, size, protection, flags, fd, 0)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise StoreError(f"{folder}: cannot map {size} bytes: {os.strerror(code)}")
    return found
