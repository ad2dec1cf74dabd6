"""The CUDA kernels on the CPU: builds csrc/cuda with g++ and tests/emulation, and drives it as the GPU is driven."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch

import cascade_engine as ce
from cascade_engine import queue as queues
from cascade_engine.kernels import Exclusion, MineRequest, Selection, SelectRequest
from cascade_engine.kernels.cuda import Engine
from cascade_engine.nce import NceCall, mean_of
from cascade_engine.tensor import like

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "emulation"
COUNTERS = (
    "launches", "blocks", "barriers", "bytes_read", "bytes_written", "async_bytes", "matrix_ops", "matrix_loads",
    "multiply_adds",
)  # fmt: skip


@cache
def emulated() -> ModuleType:
    """`cascade_engine._cuda`'s twin, built once per state of the sources and kept in build/emulation.

    plant_bugs.py points ``CASCADE_EMULATED_CSRC`` to sources with a bug; ``CASCADE_EMULATED_FLAGS`` adds sanitizers.
    """
    flags = tuple(os.environ.get("CASCADE_EMULATED_FLAGS", "-O2").split())
    csrc = Path(os.environ.get("CASCADE_EMULATED_CSRC", ROOT / "csrc"))
    pybind11 = pytest.importorskip("pybind11", reason="the emulation is bound with pybind11")
    compiler = shutil.which("g++") or pytest.skip("the emulation needs g++")
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    binding = [csrc / "python" / "cuda_module.cpp", csrc / "cuda" / "backend.hpp", csrc / "cuda" / "arguments.hpp"]
    binding += sorted((csrc / "core").iterdir())
    kernels = [*sorted((csrc / "cuda").iterdir()), *sorted(EMULATION.glob("*.?pp"))]
    library = folder / f"{_digest(flags, binding + kernels)}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            includes = [csrc, EMULATION, pybind11.get_include(), sysconfig.get_paths()["include"]]
            common = [
                compiler, "-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
                "-Werror", "-Wno-unknown-pragmas", "-DCASCADE_EMULATION", "-DCASCADE_CUDA_MODULE=cascade_emulated",
                *flags, *(f"-I{each}" for each in includes),
            ]  # fmt: skip
            # The binding is slow to compile, quick to run, and changes rarely: not optimised, and kept.
            jobs = {
                folder / f"binding.{_digest(flags, binding)}.o": [*common, "-O0", "-c", binding[0]],
                library.with_suffix(".kernels.o"): [*common, "-c", EMULATION / "backend.cpp"],
                library.with_suffix(".controls.o"): [*common, "-c", EMULATION / "controls.cpp"],
            }
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(_run, ([*job, "-o", target] for target, job in jobs.items() if not target.exists())))
            whole = library.with_suffix(".linking")
            _run([compiler, "-shared", *flags, "-o", whole, *jobs])
            whole.rename(library)
    spec = importlib.util.spec_from_file_location("cascade_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest(flags: tuple[str, ...], paths: list[Path]) -> str:
    digest = hashlib.sha256(repr((flags, torch.__version__)).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[object]) -> None:
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def schedule(native: ModuleType, seed: int, *, perturb: bool = True) -> None:
    """The order of threads from now on: 0 forward, 1 reversed, else random; and whether mma sums are perturbed."""
    ctypes.CDLL(native.__file__).emulation_schedule(ctypes.c_uint64(seed), ctypes.c_bool(perturb))


@contextmanager
def shared_limit(native: ModuleType, bytes_a_block: int) -> Iterator[None]:
    """A device whose blocks may ask for so much shared memory."""
    limit = ctypes.CDLL(native.__file__).emulation_shared_limit
    limit(ctypes.c_uint64(bytes_a_block))
    try:
        yield
    finally:
        limit(ctypes.c_uint64(99 * 1024))


def reset_counters(native: ModuleType) -> None:
    """All counters to zero."""
    ctypes.CDLL(native.__file__).emulation_reset_counters()


def counters(native: ModuleType) -> dict[str, int]:
    """What was executed since the last reset."""
    values = (ctypes.c_uint64 * len(COUNTERS))()
    ctypes.CDLL(native.__file__).emulation_counters(values)
    return dict(zip(COUNTERS, values, strict=True))


def phases(native: ModuleType) -> list[str]:
    """What the launches since the last reset were for."""
    library = ctypes.CDLL(native.__file__)
    library.emulation_phases.restype = ctypes.c_char_p
    return library.emulation_phases().decode().split()


def loss_operator(native: ModuleType, **limits: int) -> Callable[..., torch.Tensor]:
    """`cascade_engine.nce.nce_now` by the emulated kernel, for `cascade_engine.loss`."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, _fresh, *arguments):
            out = mean_of(Engine(native, **limits).contrast, NceCall(*arguments))
            ctx.save_for_backward(*out[1:])
            return out[0]

        @staticmethod
        def backward(ctx, grad):
            count, *to = ctx.saved_tensors
            each = grad / count.float().clamp(min=1)
            needed = zip(ctx.needs_input_grad[1:3], to, strict=True)
            gradients = (each * gradient if need else None for need, gradient in needed)
            return (None, *gradients, *[None] * 11)

    return Operator.apply


def push(native: ModuleType, queue: ce.KeyQueue, *batch: object, **columns: object) -> None:
    """`queue.push` by the emulated kernel."""
    with patch.object(queues, "_engine", lambda _: Engine(native)):
        queue.push(*batch, **columns)


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
    exclude = Exclusion(video_id=tensor(query_video), mask=tensor(mask))
    return mine_bank(native, plan, queries, bank, exclude, trace=trace, **limits)


def mine_bank(
    native: ModuleType,
    plan: ce.CascadePlan,
    queries: dict[str, np.ndarray],
    bank: ce.Bank,
    exclude: Exclusion | None = None,
    *,
    trace: bool = False,
    **limits: int,
) -> Selection:
    """The same for a bank of torch tensors, which keeps what is prepared for it."""
    request = MineRequest(
        plan=plan,
        counts=plan.counts(bank.size),
        queries={view: tensor(x) for view, x in queries.items()},
        bank=bank,
        exclude=exclude or Exclusion(),
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
