"""The backends that rank and select, the requests they answer, and which of them can run here.

Every backend gives the same answer to the same request, bit for bit: ``reference`` is readable NumPy and defines it,
``cpu`` is C++ with SIMD, ``cuda`` runs on NVIDIA GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from cascade_engine.errors import BackendUnavailable, InvalidInput
from cascade_engine.tensor import require_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascade_engine.bank import Bank
    from cascade_engine.plan import CascadePlan

PREFERENCE = ("cuda", "cpu", "reference")


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """The keys that are no candidates, given one way or the other, or not at all.

    Args:
        video_id: (B,) int64: keys of the bank with the query's own video id.
        mask: (B, K) bool: keys marked True.
    """

    video_id: Any = None
    mask: Any = None


@dataclass(frozen=True, kw_only=True)
class MineRequest:
    """Checked arguments of one mining call.

    Args:
        plan: the stages.
        counts: what each stage keeps in this bank, the last one k.
        queries: view to (B, D_view), for each view of the plan, on the bank's device; on the CPU the backend refuses
            NaN and infinity, as it reads them anyway.
        bank: the keys.
        exclude: the keys that are no candidates.
        trace: also answer what each stage kept.
    """

    plan: CascadePlan
    counts: tuple[int, ...]
    queries: Mapping[str, Any]
    bank: Bank
    exclude: Exclusion
    trace: bool


@dataclass(frozen=True, kw_only=True)
class SelectRequest:
    """Checked arguments of one selection from similarities that exist already.

    Args:
        plan: the stages.
        counts: what each stage keeps.
        similarities: view to (B, K) float32 or float64.
        exclude: the keys that are no candidates, as a mask or not at all.
        trace: also answer what each stage kept.
    """

    plan: CascadePlan
    counts: tuple[int, ...]
    similarities: Mapping[str, Any]
    exclude: Exclusion
    trace: bool


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A backend's answer, in its own arrays.

    Args:
        index: (B, k) int64 slots of the bank, best first, -1 where fewer are left.
        similarity: (B, k) float32, the last stage's score rounded from float64, -inf where fewer are left.
        kept: where a trace was asked for, per stage (B, n_s) int64, best first by that stage's score, -1 padded.
    """

    index: Any
    similarity: Any
    kept: tuple[Any, ...] | None = None


class Backend(Protocol):
    """One way to answer requests. Implementations are modules of this package with these functions."""

    def unavailable(self) -> str | None:
        """Why the backend cannot run here, or None where it can."""

    def detail(self) -> str:
        """What it would run on: instruction sets, devices."""

    def mine(self, request: MineRequest) -> Selection:
        """Rank the bank's keys and select by the plan's stages."""

    def select(self, request: SelectRequest) -> Selection:
        """Select from given similarities by the plan's stages."""


def require_finite_queries(request: MineRequest) -> None:
    """Refuse NaN and infinity in the queries, naming the first row that holds one.

    Raises:
        InvalidInput: there is one.
    """
    for view in request.plan.views:
        require_finite(request.queries[view], f'queries["{view}"]')


def backend(name: str | None = None, *, device: str = "cpu") -> Backend:
    """The backend called `name`, or the best that can run on data on `device`.

    ``CASCADE_BACKEND`` stands in for a `name` that is not given.

    Raises:
        InvalidInput: no backend has that name.
        BackendUnavailable: the named backend cannot run here; the reason is in the message.
    """
    name = name or os.environ.get("CASCADE_BACKEND")
    on_gpu = not device.startswith("cpu")
    candidates = PREFERENCE[:1] if on_gpu else PREFERENCE[1:]
    for candidate in (name,) if name else candidates:
        found = load(candidate)
        reason = found.unavailable()
        if reason is None:
            break
    else:
        raise BackendUnavailable(f"backend {candidate!r} cannot run here: {reason}")
    if on_gpu != (candidate == "cuda"):
        raise BackendUnavailable(f"backend {candidate!r} cannot run on data on {device}")
    return found


@cache
def load(name: str) -> Backend:
    """The backend's module, whether or not it can run here."""
    if name not in PREFERENCE:
        raise InvalidInput(f"backend: expected one of {', '.join(PREFERENCE)}, got {name!r}")
    module: Any = import_module(f"{__name__}.{name}")
    found: Backend = module
    return found
