"""The CPU backend: C++ with SIMD, bound in `cascade_engine._cpu`."""

from __future__ import annotations

from cascade_engine.kernels import MineRequest, Selection, SelectRequest


def unavailable() -> str | None:
    """Why it cannot run here: the extension was not built."""
    return "the extension cascade_engine._cpu was not built: no C++ compiler was found at installation"


def detail() -> str:
    """The instruction set in use."""
    raise NotImplementedError


def mine(request: MineRequest) -> Selection:
    """Rank and select in C++."""
    raise NotImplementedError


def select(request: SelectRequest) -> Selection:
    """Select in C++."""
    raise NotImplementedError
