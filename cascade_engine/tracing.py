"""Named ranges in torch's profiler and on NVIDIA's timeline, at no cost where neither a profiler nor a GPU is used."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

_IDLE: AbstractContextManager[object] = nullcontext()
_CLOCK = "clock"  # a range that tells the trace's time at a known moment


def phase(name: str) -> AbstractContextManager[object]:
    """A range ``cascade::name`` in the trace of a torch profiler that is running; never imports torch.

    Once this process uses a GPU it is an NVTX range too, which NVIDIA's profilers show above what was launched in it.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or torch.compiler.is_compiling():
        return _IDLE
    profiled, on_gpu = torch.autograd._profiler_enabled(), torch.cuda.is_initialized()
    if not profiled and not on_gpu:
        return _IDLE
    return _ranges(torch, f"cascade::{name}", profiled=profiled, on_gpu=on_gpu)


@contextmanager
def _ranges(torch: Any, name: str, *, profiled: bool, on_gpu: bool) -> Iterator[None]:
    with (
        torch.profiler.record_function(name) if profiled else _IDLE,
        torch.cuda.nvtx.range(name) if on_gpu else _IDLE,
    ):
        yield


@dataclass
class EngineSpans:
    """What the CPU backend did inside its calls, on its own threads, which torch's profiler does not see.

    Args:
        noted: (phase, thread, begin, end), times in nanoseconds of `time.monotonic_ns`. ``score``: tiles of all keys;
            ``select``: one query's stages; ``repair``: float64 where bounds leave a query or a band of it open.
        anchor: when the range ``cascade::clock`` was opened.
    """

    noted: list[tuple[str, int, int, int]] = field(default_factory=list)
    anchor: int = 0

    def add_to(self, path: Path) -> None:
        """Add the spans to the Chrome trace at `path`, exported by the profiler that ran meanwhile."""
        trace = json.loads(path.read_text(encoding="utf-8"))
        events = trace["traceEvents"]
        clock = next(event for event in events if event.get("name") == f"cascade::{_CLOCK}")
        for name, thread, begin, end in self.noted:
            events.append(
                {
                    "ph": "X",
                    "cat": "cascade",
                    "name": f"cascade::{name}",
                    "pid": clock["pid"],
                    "tid": f"cascade thread {thread}",
                    "ts": clock["ts"] + (begin - self.anchor) / 1e3,
                    "dur": (end - begin) / 1e3,
                }
            )
        path.write_text(json.dumps(trace), encoding="utf-8")


@contextmanager
def engine_spans() -> Iterator[EngineSpans]:
    """Note the CPU backend's phases while a torch profiler runs; ask them to `add_to` the trace it exports.

    Every call of this process is noted, whichever thread makes it.

    Raises:
        ImportError: the CPU backend was not built.
    """
    extension: Any = import_module("cascade_engine._cpu")
    spans = EngineSpans(anchor=time.monotonic_ns())
    with phase(_CLOCK):
        pass
    extension.take_spans()
    extension.note_spans(True)
    try:
        yield spans
    finally:
        extension.note_spans(False)
        spans.noted = extension.take_spans()
