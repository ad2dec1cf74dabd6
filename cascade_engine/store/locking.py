"""One writer a phase: a lock that dies with its holder and can say who that is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from cascade_engine.errors import StoreLocked
from cascade_engine.store.files import aside_of


class Lock:
    """A lock held. Children of the process that took it share it until they end; only that process can give it up.

    Args:
        fd: the lock file.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._pid = fd, os.getpid()

    @property
    def ours(self) -> bool:
        """Whether this process took it, not the one it was forked from."""
        return os.getpid() == self._pid

    def release(self) -> None:
        """Give it up; in a child, let go of its share."""
        if self.ours:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # closing is not enough while a child has it open
        os.close(self._fd)


def take_lock(phase: Path, what: str) -> Lock:
    """Hold the lock of the phase in a folder until it is released or the process ends.

    Raises:
        StoreLocked: another writer holds it; its process and host are named.
    """
    fd = os.open(aside_of(phase) / "writer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
    return Lock(fd)
