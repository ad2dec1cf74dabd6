"""Named ranges in torch's profiler, at no cost where none runs."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_IDLE: AbstractContextManager[object] = nullcontext()


def phase(name: str) -> AbstractContextManager[object]:
    """A range ``cascade::name`` in the trace of a torch profiler that is running; never imports torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.autograd._profiler_enabled():
        return _IDLE
    found: AbstractContextManager[object] = torch.profiler.record_function(f"cascade::{name}")
    return found
