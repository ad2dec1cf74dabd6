"""Timing that holds up on a machine others use too: interleaved rounds, warm-up, rotated inputs, medians with IQR."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

Call = Callable[[int], object]  # takes the number of the call, so that it can rotate its input sets

_VISIT_SECONDS = 0.02  # a visit repeats short calls for about this long
_SETTLE_SECONDS = 0.006  # torch's threads spin for about 5 ms after their last work, on processors others need
_MOST_CALLS = 50  # of a visit, counted or not
_SLOW_SECONDS = 2.0  # a contestant whose call takes longer is called in two rounds only


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of one call: by the clock, and of processor time on all threads."""

    wall: float
    processor: float


class Clock(Protocol):
    """How long one call takes on some device."""

    def measure(self, call: Call, number: int) -> Duration:
        """Run the call to its end."""


class HostClock:
    """Wall time of a call that has finished when it returns."""

    def measure(self, call: Call, number: int) -> Duration:
        """Run the call."""
        start, used = time.perf_counter(), time.process_time()
        call(number)
        return Duration(wall=time.perf_counter() - start, processor=time.process_time() - used)


class CudaClock:
    """Time between two events on the current stream, after the L2 cache has been flushed."""

    def __init__(self, device: str) -> None:
        """Allocate a buffer several times the size of any L2 cache."""
        import torch

        self._flushed = torch.empty(1 << 28, dtype=torch.int8, device=device)

    def measure(self, call: Call, number: int) -> Duration:
        """Run the call between two events and wait for the second."""
        import torch

        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        self._flushed.zero_()
        used = time.process_time()
        start.record()
        call(number)
        end.record()
        end.synchronize()
        return Duration(wall=float(start.elapsed_time(end)) / 1e3, processor=time.process_time() - used)


def clock_for(device: str) -> Clock:
    """The clock that is right for calls on `device`."""
    return HostClock() if device == "cpu" else CudaClock(device)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The spread of one contestant's call times, and the median of its processor time, in seconds."""

    median: float
    lower: float
    upper: float
    processor: float
    calls: int

    def as_json(self) -> dict[str, float | int]:
        """Milliseconds, rounded to what the clock can tell."""
        found = {name: round(value * 1e3, 4) for name, value in vars(self).items() if name != "calls"}
        return {
            "median_ms": found["median"],
            "q1_ms": found["lower"],
            "q3_ms": found["upper"],
            "cpu_ms": found["processor"],
            "calls": self.calls,
        }


def interleaved(calls: Mapping[str, Call], *, rounds: int, clock: Clock) -> dict[str, Timing]:
    """Time the contestants in turns, so that a disturbance hits all of them.

    Every visit begins with calls that are not counted: meanwhile the contestant's threads wake, the previous
    contestant's stop spinning, and the caches fill.

    Args:
        calls: contestant to its call; each has been called before.
        rounds: visits to each contestant; a slow one gets two.
        clock: measures one call.
    """
    durations: dict[str, list[Duration]] = {name: [] for name in calls}
    numbers = dict.fromkeys(calls, 0)
    for turn in range(rounds):
        for name, call in calls.items():
            slow = bool(durations[name]) and durations[name][0].wall > _SLOW_SECONDS
            if slow and turn >= 2:
                continue
            durations[name] += _visit(call, numbers[name], clock, warm=not slow)
            numbers[name] += 100
    return {name: _summary(found) for name, found in durations.items()}


def _visit(call: Call, number: int, clock: Clock, *, warm: bool) -> list[Duration]:
    first = clock.measure(call, number)
    if first.wall > _SLOW_SECONDS or not warm:
        return [first]
    settled, begin = first.wall, 1
    while settled < _SETTLE_SECONDS and begin < _MOST_CALLS:
        settled += clock.measure(call, number + begin).wall
        begin += 1
    repeats = max(1, min(_MOST_CALLS, int(_VISIT_SECONDS / max(settled / begin, 1e-6))))
    return [clock.measure(call, number + each) for each in range(begin, begin + repeats)]


def _summary(durations: list[Duration]) -> Timing:
    walls = [each.wall for each in durations]
    lower, median, upper = statistics.quantiles(walls, n=4, method="inclusive") if len(walls) > 1 else walls * 3
    processor = statistics.median(each.processor for each in durations)
    return Timing(median=median, lower=lower, upper=upper, processor=processor, calls=len(durations))


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Hold this process to `threads` processors, and every library's pool to as many threads."""
    import torch
    from threadpoolctl import threadpool_limits

    allowed = os.sched_getaffinity(0)
    before = torch.get_num_threads()
    os.sched_setaffinity(0, set(sorted(allowed)[:threads]))
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)
        os.sched_setaffinity(0, allowed)


def machine(packages: tuple[str, ...]) -> dict[str, Any]:
    """What the figures were measured on: processor, memory, versions."""
    facts = {"system": platform.platform(), "python": platform.python_version(), "processors": os.cpu_count()}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "flags"):
            facts.setdefault(name.strip(), value.strip())
    flags = str(facts.pop("flags", "")).split()
    wide = [flag for flag in flags if flag.startswith(("avx", "fma", "amx"))]
    return {**facts, "simd": wide, "versions": {name: _version(name) for name in packages}}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
