"""A store larger than the memory it may use: opened, filtered and mined by a process whose memory is then read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from cascade_engine.errors import CascadeError
from cascade_engine.mining import mine
from cascade_engine.plan import CascadePlan
from cascade_engine.store import FeatureStore
from cascade_engine.store.reading import Values

PLAN = "x:10"
WHERE = "label == 'l7' and start >= 10"
BATCH, MANY = 32, 256
_TOGETHER = 100_000
_VIDEO = 10  # clips of a video


@dataclass(frozen=True, kw_only=True)
class Use:
    """What one process took, in seconds and in megabytes.

    Args:
        open: to open the store and map the view and its columns.
        filter: to find the rows that fulfil `WHERE`.
        mine: for each batch of `BATCH` queries in turn; the first one prepares the bank, or checks what is kept.
        many: for a batch of `MANY` queries after those.
        peak: the most that was resident at any time, mapped files included (VmHWM).
        anonymous: of what was resident in the end, that which is no file's (RssAnon).
        kept: the files beside the phase.
        rows: that the filter found.
    """

    open: float
    filter: float
    mine: tuple[float, ...]
    many: float
    peak: float
    anonymous: float
    kept: float
    rows: int


def large(folder: Path, rows: int, dim: int, step: Callable[[str], None]) -> tuple[Use, Use]:
    """Generate a store of (rows, dim) float16 and use it in two processes, one after the other.

    Args:
        folder: where to write.
        rows: clips.
        dim: width of the view.
        step: called with what is being done.

    Returns:
        What the process took that prepared the bank, and one that found it prepared.

    Raises:
        CascadeError: the two do not answer alike, or not as float64 does for some of the queries.
    """
    path = folder / "large"
    generate(path, rows, dim, step)
    found = []
    for what in ("preparing", "prepared"):
        step(what)
        code = "import sys; from cascade_engine.benchmarks.store_large import use; use(sys.argv[1])"
        done = subprocess.run([sys.executable, "-P", "-c", code, str(path)], check=True, stdout=subprocess.PIPE)  # noqa: S603
        found.append(json.loads(done.stdout))
    step("comparing with float64")
    answers = [np.array(each.pop("answer")) for each in found]
    check(path, answers[0], rows, dim)
    if not np.array_equal(answers[0], answers[1]):
        raise CascadeError("large store: two processes answered differently")
    first, second = (Use(**{**each, "mine": tuple(each["mine"])}) for each in found)
    return first, second


def generate(path: Path, rows: int, dim: int, step: Callable[[str], None]) -> None:
    """Write clips around a few thousand centres, ten to a video."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4096, dim), np.float32)
    with FeatureStore.create(
        path, {"x": dim}, dtype="float16", columns={"label": "str"}, normalise=True, durability="none"
    ) as store:
        for start in range(0, rows, _TOGETHER):
            step(f"writing clip {start:,} of {rows:,}")
            ids = np.arange(start, min(start + _TOGETHER, rows))
            values = centres[rng.integers(0, len(centres), len(ids))] + rng.standard_normal((len(ids), dim), np.float32)
            seconds = (ids % _VIDEO) * 2.0
            store.append(
                {"x": values},
                clip_id=ids,
                video_id=ids // _VIDEO,
                start=seconds,
                end=seconds + 2,
                label=[f"l{i % 16}" for i in ids],
            )


def use(path: str) -> None:
    """Open, filter and mine in this process, and print what it took as JSON."""
    began = perf_counter()
    store = FeatureStore.open(path)
    bank = store.bank()
    opened = perf_counter()
    matching = store.matching(WHERE)
    filtered = perf_counter()
    assert bank.video_id is not None
    seconds, answer = [], None
    for count in (BATCH, BATCH, BATCH, MANY):
        rows, queries = _queries(bank.keys["x"], count)
        began_batch = perf_counter()
        found = mine(CascadePlan.parse(PLAN), {"x": queries}, bank, bank.video_id[rows], backend="cpu").index
        seconds.append(perf_counter() - began_batch)
        answer = found if answer is None else answer
    folder = store.identity()[0] / "commits" / "aside"
    memory = _memory()
    print(
        json.dumps(
            {
                "open": opened - began,
                "filter": filtered - opened,
                "mine": seconds[:-1],
                "many": seconds[-1],
                "peak": memory["VmHWM"] / 1e3,
                "anonymous": memory["RssAnon"] / 1e3,
                "kept": sum(file.stat().st_size for file in folder.glob("*.packed")) / 1e6,
                "rows": 0 if matching is None else len(matching),
                "answer": np.asarray(answer).tolist(),
            }
        )
    )


def check(path: Path, answer: Values, rows: int, dim: int) -> None:
    """Compare the first queries' answers with a search in float64."""
    store = FeatureStore.open(path)
    keys, video = store.features("x"), store.column("video_id")
    slots, queries = _queries(keys, BATCH)
    some = 4
    scores = np.empty((some, rows))
    for start in range(0, rows, _TOGETHER):
        part = slice(start, min(start + _TOGETHER, rows))
        scores[:, part] = queries[:some].astype(np.float64) @ keys[part].astype(np.float64).T
    for query in range(some):
        scores[query, video == video[slots[query]]] = -np.inf
        best = np.argsort(-scores[query], kind="stable")[: answer.shape[1]]
        if not np.array_equal(best, answer[query]):
            raise CascadeError(f"large store: query {query} was answered wrongly")


def _queries(keys: Values, count: int) -> tuple[Values, Values]:
    rows = np.random.default_rng(1).choice(len(keys), count, replace=False)
    return rows, np.asarray(keys[rows], np.float32)


def _memory() -> dict[str, int]:
    """Memory of this process in kB, by the kernel's names."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) == 3 and line[2] == "kB"}
