"""Named ranges: nothing where nobody looks, NVTX once a GPU is in use."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from cascade_engine import tracing


def test_without_a_profiler_and_a_gpu_no_range_is_made():
    assert tracing.phase("mine") is tracing.phase("loss") is tracing._IDLE


def test_with_a_gpu_in_use_every_phase_is_an_nvtx_range(monkeypatch):
    seen = []

    @contextmanager
    def noted(name):
        seen.append(f"<{name}")
        yield
        seen.append(f"{name}>")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", noted)
    with tracing.phase("mine"):
        seen.append("work")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, tracing.phase("loss"):
        pass
    assert seen == ["<cascade::mine", "work", "cascade::mine>", "<cascade::loss", "cascade::loss>"]
    assert "cascade::loss" in {event.key for event in profiler.key_averages()}
