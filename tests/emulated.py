"""The CUDA kernels on the CPU: builds csrc/cuda with g++ and tests/emulation, and drives it as the GPU is driven."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import cascade_engine as ce
from cascade_engine.kernels import Exclusion, MineRequest, Selection, SelectRequest
from cascade_engine.kernels.cuda import Engine
from cascade_engine.tensor import like

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "emulation"
COUNTERS = (
    "launches", "blocks", "barriers", "bytes_read", "bytes_written", "async_bytes", "matrix_ops", "matrix_loads",
    "multiply_adds",
)  # fmt: skip


@cache
def emulated(csrc: Path = ROOT / "csrc", flags: tuple[str, ...] = ("-O2",)) -> ModuleType:
    """`cascade_engine._cuda`'s twin, built once per state of the sources and kept in build/emulation."""
    pybind11 = pytest.importorskip("pybind11", reason="the emulation is bound with pybind11")
    compiler = shutil.which("g++") or pytest.skip("the emulation needs g++")
    sources = sorted(
        p for folder in (csrc, EMULATION) for p in folder.rglob("*") if p.suffix in (".cpp", ".hpp", ".cuh")
    )
    digest = hashlib.sha256(repr((flags, torch.__version__)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            includes = [csrc, EMULATION, pybind11.get_include(), sysconfig.get_paths()["include"]]
            common = [
                compiler, "-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
                "-Werror", "-Wno-unknown-pragmas", "-DCASCADE_EMULATION", "-DCASCADE_CUDA_MODULE=cascade_emulated",
                *flags, *(f"-I{each}" for each in includes),
            ]  # fmt: skip
            units = [csrc / "python" / "cuda_module.cpp", EMULATION / "backend.cpp", EMULATION / "controls.cpp"]
            objects = [library.with_suffix(f".{unit.stem}.o") for unit in units]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(partial(_compile, common), units, objects))
            whole = library.with_suffix(".linking")
            _run([compiler, "-shared", *flags, "-o", whole, *objects])
            whole.rename(library)
            for each in objects:
                each.unlink()
    spec = importlib.util.spec_from_file_location("cascade_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(common: list[object], unit: Path, target: Path) -> None:
    optimise = ["-O0"] if unit.parent.name == "python" else []  # the binding is slow to compile and quick to run
    _run([*common, *optimise, "-c", unit, "-o", target])


def _run(command: list[object]) -> None:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def schedule(native: ModuleType, seed: int, *, perturb: bool = True) -> None:
    """The order of threads from now on: 0 forward, 1 reversed, else random; and whether mma sums are perturbed."""
    ctypes.CDLL(native.__file__).emulation_schedule(ctypes.c_uint64(seed), ctypes.c_bool(perturb))


def reset_counters(native: ModuleType) -> None:
    """All counters to zero."""
    ctypes.CDLL(native.__file__).emulation_reset_counters()


def counters(native: ModuleType) -> dict[str, int]:
    """What was executed since the last reset."""
    values = (ctypes.c_uint64 * len(COUNTERS))()
    ctypes.CDLL(native.__file__).emulation_counters(values)
    return dict(zip(COUNTERS, values, strict=True))


def tensor(array: np.ndarray | None) -> torch.Tensor | None:
    """The array as a torch tensor that shares its memory."""
    return None if array is None else like(np.ascontiguousarray(array), torch.empty(0))


def mine(
    native: ModuleType,
    plan: ce.CascadePlan,
    queries: dict[str, np.ndarray],
    keys: dict[str, np.ndarray],
    *,
    video: np.ndarray | None = None,
    query_video: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    metric: str = "ip",
    trace: bool = False,
    **limits: int,
) -> Selection:
    """One mining request through kernels/cuda.py and the emulated kernels."""
    bank = ce.Bank({view: tensor(x) for view, x in keys.items()}, tensor(video), metric=metric)
    request = MineRequest(
        plan=plan,
        counts=plan.counts(bank.size),
        queries={view: tensor(x) for view, x in queries.items()},
        bank=bank,
        exclude=Exclusion(video_id=tensor(query_video), mask=tensor(mask)),
        trace=trace,
    )
    return Engine(native, **limits).mine(request)


def select(
    native: ModuleType, plan: ce.CascadePlan, scores: dict[str, np.ndarray], mask: np.ndarray | None, *, trace: bool
) -> Selection:
    """One selection request through kernels/cuda.py and the emulated kernels."""
    request = SelectRequest(
        plan=plan,
        counts=plan.counts(next(iter(scores.values())).shape[1]),
        similarities={view: tensor(x) for view, x in scores.items()},
        exclude=Exclusion(mask=tensor(mask)),
        trace=trace,
    )
    return Engine(native).select(request)
