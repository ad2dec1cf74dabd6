"""Extraction of views, one video at a time, in this process or in several."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

from cascade_engine.errors import InvalidInput, StoreError, VideoError
from cascade_engine.video.index import VideoEntry
from cascade_engine.video.views import FlowMethod, chosen_views, flow_function, stream

FORMAT = 1  # of the cache's files and of the bits in them


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the bits of a cache, besides the videos."""

    size: int
    views: tuple[str, ...]
    flow: FlowMethod
    format: int = FORMAT

    def check(self) -> None:
        """Refuse what cannot be extracted, before anything is.

        Raises:
            InvalidInput: an unknown view or flow method, or a size under 1 or too small for the flow method.
        """
        chosen_views(self.views)
        if self.size < 1:
            raise InvalidInput(f"size: expected at least 1, got {self.size}")
        if "flow" in self.views:
            flow_function(self.flow, self.size)

    @classmethod
    def read(cls, folder: Path) -> Options | None:
        """The options of the cache in a folder, None where there is none.

        Raises:
            StoreError: what is there is no cache's.
        """
        file = folder / "cache.json"
        if not file.exists():
            return None
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            found = cls(size=told["size"], views=tuple(told["views"]), flow=told["flow"], format=told["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{file}: expected the options of a clip cache ({error!r})") from None
        if found.format != FORMAT:
            raise StoreError(f"{folder}: a clip cache of format {found.format}, this version reads {FORMAT}")
        return found

    def settle(self, folder: Path) -> None:
        """Write the options into a new cache, or compare them with those of the one that is there.

        Raises:
            InvalidInput: the folder holds a cache with other options.
        """
        there = Options.read(folder)
        if there is None:
            fresh = folder / "cache.json.new"
            fresh.write_text(json.dumps(asdict(self)), encoding="utf-8")
            fresh.replace(folder / "cache.json")
        elif there != self:
            raise InvalidInput(f"{folder}: expected a cache with {asdict(self)}, found one with {asdict(there)}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One video to extract."""

    key: str
    entry: VideoEntry
    options: Options
    folder: Path  # where parts go


@dataclass(frozen=True, kw_only=True)
class Part:
    """One video extracted into `folder/key`, or the reason why not."""

    key: str
    length: int = 0
    fps: float = 0.0
    problem: str | None = None
    reason: str | None = None


def extract_part(task: Task) -> Part:
    """Write the views of one video as files of a part folder, complete or not at all."""
    final = task.folder / task.key
    if (final / "part.json").exists():  # left by a build that was interrupted
        return Part(**json.loads((final / "part.json").read_text(encoding="utf-8")))
    fresh = task.folder / f"{task.key}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        part = _write(task, fresh)
    except (VideoError, MemoryError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        reason = str(error).removeprefix(f"{task.entry.path}: ") or "not enough memory"
        return Part(key=task.key, reason=reason)
    (fresh / "part.json").write_text(json.dumps(asdict(part)), encoding="utf-8")
    fresh.rename(final)
    return part


def _write(task: Task, folder: Path) -> Part:
    options, entry = task.options, task.entry
    length, fps, problem = 0, 0.0, None
    files = {name: (folder / f"{name}.bin").open("wb") for name in (*options.views, "time")}
    try:
        chunks = stream(
            entry.path, options.views, size=options.size, flow=options.flow, start=entry.start, end=entry.end
        )
        for views, frames in chunks:
            for name, pixels in views.items():
                files[name].write(pixels.data)
            files["time"].write(frames.time.astype("<f8").data)
            length += len(frames)
            fps, problem = frames.fps, frames.problem
    finally:
        for file in files.values():
            file.close()
    return Part(key=task.key, length=length, fps=fps, problem=problem)


def extract_parts(tasks: Sequence[Task], workers: int) -> Iterator[Part]:
    """The parts of all tasks, in order, made by so many processes; a process that dies costs only its own video."""
    if workers == 1:
        yield from map(extract_part, tasks)
        return
    left = deque(tasks)
    while left:
        try:
            yield from _in_parallel(left, workers)
        except BrokenProcessPool:
            # One of the videos under way killed its process: each of these gets a process of its own.
            for _ in range(min(len(left), 2 * workers)):
                yield _alone(left.popleft())


def _in_parallel(left: deque[Task], workers: int) -> Iterator[Part]:
    """Take tasks off `left` as their parts come; on an exception `left` holds those not yet handed out."""
    with _pool(workers) as pool:
        try:
            running: deque[Future[Part]] = deque()
            for task in list(left)[: 2 * workers]:
                running.append(pool.submit(extract_part, task))
            while running:
                part = running.popleft().result()
                if len(left) > 2 * workers:
                    running.append(pool.submit(extract_part, left[2 * workers]))
                left.popleft()
                yield part
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _alone(task: Task) -> Part:
    with _pool(1) as pool:
        try:
            return pool.submit(extract_part, task).result()
        except BrokenProcessPool:
            return Part(key=task.key, reason="its decoder crashed or ran out of memory")


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_follow_parent)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
