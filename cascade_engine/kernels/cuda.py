"""The CUDA backend, bound in `cascade_engine._cuda`."""

from __future__ import annotations

from cascade_engine.kernels import MineRequest, Selection, SelectRequest


def unavailable() -> str | None:
    """Why it cannot run here: the extension was not built."""
    return "this installation was built without CUDA"


def detail() -> str:
    """The devices found."""
    raise NotImplementedError


def mine(request: MineRequest) -> Selection:
    """Rank and select on the GPU."""
    raise NotImplementedError


def select(request: SelectRequest) -> Selection:
    """Select on the GPU."""
    raise NotImplementedError
