"""The machine's int8 peak, measured in the same run as what is held against it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

_SOURCE = Path(__file__).with_name("int8_peak.c")
_ROUNDS = 20_000_000  # about a tenth of a second
_REPEATS = 7


def int8_peak() -> float | None:
    """Operations (products and sums) one thread does in a second of processor time; None where that cannot be measured.

    Processor time, so that the peak is the machine's even while others use it.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        build = [compiler, "-O2", "-march=native", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
        if subprocess.run(build, capture_output=True, check=False).returncode:  # noqa: S603
            return None
        run = ctypes.CDLL(str(library)).int8_operations
        run.restype, run.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.POINTER(ctypes.c_int32))

        best = 0.0
        for _ in range(_REPEATS):
            start = time.thread_time()
            done = int(run(_ROUNDS, ctypes.byref(ctypes.c_int32())))
            best = max(best, done / (time.thread_time() - start))
    return best or None
