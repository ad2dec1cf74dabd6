"""The CPU backend: C++ with SIMD, bound in `cascade_engine._cpu`."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from cascade_engine.bank import METRICS, Bank
from cascade_engine.errors import BackendUnavailable, InvalidInput
from cascade_engine.kernels import MineRequest, Selection, SelectRequest, require_finite_queries
from cascade_engine.plan import FUSIONS, CascadePlan
from cascade_engine.tensor import BFLOAT16, Host

_log = logging.getLogger(__name__)


def unavailable() -> str | None:
    """Why it cannot run here: the extension was not built or does not load."""
    try:
        _extension()
    except ModuleNotFoundError:
        return "the extension cascade_engine._cpu was not built: installing it takes a C++20 compiler"
    except ImportError as error:
        return f"the extension cascade_engine._cpu does not load: {error}"
    return None


def detail() -> str:
    """The instruction set in use, of those this machine has, and the number of threads."""
    have = ", ".join(name for name, runs in _extension().isas() if runs)
    try:
        return f"{_chosen_isa()} of {have}; {threads()} threads"
    except BackendUnavailable as error:
        return str(error)


def threads() -> int:
    """Threads for one call: torch's setting where torch is loaded, else OMP_NUM_THREADS, else every CPU given."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else len(os.sched_getaffinity(0))


def mine(request: MineRequest) -> Selection:
    """Rank and select in C++."""
    bank = request.bank
    queries = request.queries
    held = bank.prepared(("cpu", _chosen_isa()), lambda: _hold(bank))
    extension = _extension()
    try:
        index, similarity, kept = extension.mine(
            held,
            _plan(request.plan, request.counts, bank.views),
            [_array(queries[view]) if view in queries else (None, False) for view in bank.views],
            None if request.exclude.video_id is None else np.ascontiguousarray(request.exclude.video_id),
            None if request.exclude.mask is None else np.ascontiguousarray(request.exclude.mask),
            request.trace,
            threads(),
        )
    except extension.NotFinite:
        try:
            require_finite_queries(request)  # tells where
        except InvalidInput as error:
            raise error from None
        raise
    for trouble in held.troubles():
        _log.warning(trouble)
    return Selection(index=index, similarity=similarity, kept=kept)


def select(request: SelectRequest) -> Selection:
    """Select in C++."""
    index, similarity, kept = _extension().select(
        _plan(request.plan, request.counts, request.plan.views),
        [_array(request.similarities[view])[0] for view in request.plan.views],
        None if request.exclude.mask is None else np.ascontiguousarray(request.exclude.mask),
        request.trace,
        threads(),
    )
    return Selection(index=index, similarity=similarity, kept=kept)


def contrast(
    query: Host,  # (B, D) float32
    own: Host,  # (B, D) float32
    keys: Host,  # (K, D) of a stored type
    mined: Host,  # (B, k) int64
    query_video: Host | None,  # (B,) int64
    key_video: Host | None,  # (K,) int64
    siblings: int,
    drop: Host | None,  # (B,) bool
    *,
    temperature: float,
    own_positive: bool,
    mean_log: bool,
    for_query: bool,
    for_own: bool,
) -> tuple[Host, Host, Host, Host]:
    """The operator of `cascade_engine.nce`.

    Raises:
        IndexError: a slot of `mined` is not one of the keys'.
    """
    found: tuple[Host, Host, Host, Host] = _extension().contrast(
        query,
        own,
        _array(keys),
        mined,
        query_video,
        key_video,
        siblings,
        drop,
        temperature,
        own_positive,
        mean_log,
        for_query,
        for_own,
        _chosen_isa(),
        threads(),
    )
    return found


@cache
def _extension() -> Any:
    """The C++ module, imported when first needed: an installation without a compiler lacks it."""
    return import_module("cascade_engine._cpu")


def _chosen_isa() -> str:
    """The instruction set that ``CASCADE_ISA`` forces, or the best of this machine."""
    return _isa(os.environ.get("CASCADE_ISA", ""))


@cache
def _isa(wanted: str) -> str:
    try:
        return str(_extension().chosen_isa(wanted))
    except (ValueError, RuntimeError) as error:
        raise BackendUnavailable(f"CASCADE_ISA={wanted}: {error}") from None


def _hold(bank: Bank) -> Any:
    """The bank's arrays, handed to C++ where everything prepared for searches is kept with them."""
    video_id = bank.host_video_id()
    return _extension().Bank(
        [_array(bank.host_keys(view)) for view in bank.views],
        None if video_id is None else np.ascontiguousarray(video_id),
        METRICS.index(bank.metric),
        _chosen_isa(),
        None if (at := bank.shelf) is None else (str(at.folder), at.suffix, at.identity, bank.views),
    )


@lru_cache(maxsize=256)
def _plan(plan: CascadePlan, counts: tuple[int, ...], views: tuple[str, ...]) -> Any:
    """The plan in C++, which no call changes, so that batch after batch has the same one."""
    return _extension().Plan(
        [
            (
                [views.index(view) for view in stage.score.views],
                0 if stage.score.fusion is None else 1 + FUSIONS.index(stage.score.fusion),
                count,
                stage.over_bank,
            )
            for stage, count in zip(plan.stages, counts, strict=True)
        ]
    )


def _array(matrix: Host) -> tuple[Host, bool]:
    """The matrix with contiguous rows, in a type DLPack knows, and whether it holds bfloat16 bits."""
    step, item = matrix.strides[0], matrix.itemsize
    if (matrix.shape[1] > 1 and matrix.strides[1] != item) or step % item or step < 0:
        matrix = np.ascontiguousarray(matrix)
    return (matrix.view(np.uint16), True) if matrix.dtype == BFLOAT16 else (matrix, False)
