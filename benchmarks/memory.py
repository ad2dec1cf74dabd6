"""Peak memory beyond the bank: no (B, K) array may ever exist."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .inputs import Case, make
from .timing import pinned

SUBJECTS = ("rgb:10", "rgb:1024", "flow:1024,rgb:50", "flow:50%,rgb:25%,flow:5", "loss")
_WARM_QUERIES = 32  # enough that the bank is packed
_SMALL_BANK = 1 << 17
_MIB = 1 << 20


def peaks(
    *,
    subjects: tuple[str, ...] = SUBJECTS,
    threads: int = 2,
    backend: str | None = None,
    keys: int = 1 << 20,
    queries: int = 1024,
) -> Iterator[dict[str, Any]]:
    """Measure mining by a plan, or the ``loss`` forward and backward, each in a fresh process.

    Each is measured with an eighth of the keys too: a peak that does not depend on K says so itself.

    Returns:
        Rows with MiB of the bank, of what was prepared for it, of the peak beyond both, and of a (B, K) float32 array.
    """
    context = multiprocessing.get_context("spawn")
    for what in subjects:
        for size in (min(_SMALL_BANK, keys), keys):
            with context.Pool(1) as pool:
                yield pool.apply(_peak, (what, queries, size, threads, backend))


def _peak(what: str, queries: int, keys: int, threads: int, backend: str | None) -> dict[str, Any]:
    import torch

    import cascade_engine as ce

    plan = "rgb:5" if what == "loss" else what
    case = Case(name="memory", group="memory", plan=plan, queries=queries, keys=keys, exclude=True)
    with pinned(threads):
        problem = make(case)
        batch = problem.batches[0]
        bank = ce.Bank(problem.keys, problem.video_id, checked=True)

        def mine(rows: int) -> None:
            part = {view: q[:rows] for view, q in batch.queries.items()}
            ce.mine(case.parsed, part, bank, batch.video_id[:rows], backend=backend)

        def contrast(rows: int) -> None:
            query = torch.from_numpy(batch.queries["rgb"][:rows]).requires_grad_()
            found = ce.Positives(index=np.zeros((rows, 5), np.int64), similarity=np.zeros((rows, 5), np.float32))
            ids = torch.from_numpy(batch.video_id[:rows])
            loss = ce.multi_positive_nce(query, query.detach(), bank, found, query_video_id=ids)
            loss.backward()  # type: ignore[no-untyped-call]

        call = contrast if what == "loss" else mine
        before = _status("VmRSS")
        call(_WARM_QUERIES)
        prepared = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        call(queries)
        peak = _status("VmHWM")
    return {
        "what": what,
        "queries": queries,
        "keys": keys,
        "bank_mib": round(sum(value.nbytes for value in problem.keys.values()) / _MIB),
        "prepared_mib": round(prepared - before),
        "peak_beyond_mib": round(peak - prepared, 1),
        "score_matrix_mib": round(queries * keys * 4 / _MIB),
    }


def _status(field: str) -> float:
    """A field of this process' status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)
