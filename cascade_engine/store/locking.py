"""One writer a phase: a lock that dies with its holder and can say who that is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from cascade_engine.errors import StoreLocked


def take_lock(path: Path, what: str) -> int:
    """Hold the lock file at `path` until the returned descriptor is closed or the process ends.

    Raises:
        StoreLocked: another writer holds it; its process and host are named.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 512, 0).decode(errors="replace").strip() or "a process that has not named itself yet"
        os.close(fd)
        raise StoreLocked(f"{what}: another writer holds it: {holder}") from None
    except OSError:
        os.close(fd)
        raise
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only the name is missing
        os.pwrite(fd, f"pid {os.getpid()} on host {socket.gethostname()}".ljust(256).encode(), 0)
    return fd
