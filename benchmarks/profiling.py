"""A torch.profiler trace of training steps, with the engine's phases as ranges ``cascade::...``."""

from __future__ import annotations

from pathlib import Path

import torch

import cascade_engine as ce
from cascade_engine.tracing import engine_spans

from .inputs import Case, make
from .timing import pinned

_STEPS = 3


def write_trace(path: Path, case: Case, *, threads: int, backend: str | None) -> None:
    """Run a few steps of mining, loss, backward and push on the case's sizes, and write a Chrome trace to `path`."""
    plan, problem = case.parsed, make(case)
    trainee = plan.views[-1]
    queue = ce.KeyQueue(case.keys, dict.fromkeys(plan.views, case.width))
    queue.push({view: torch.from_numpy(keys) for view, keys in problem.keys.items()}, problem.video_id)

    def step(number: int) -> None:
        batch = problem.batches[number % len(problem.batches)]
        queries = {view: torch.from_numpy(values) for view, values in batch.queries.items()}
        trained = queries[trainee].clone().requires_grad_()
        bank = queue.bank()
        found = ce.mine(plan, queries, bank, batch.video_id, backend=backend)
        ids = torch.from_numpy(batch.video_id)
        loss = ce.multi_positive_nce(trained, queries[trainee], bank, found, view=trainee, query_video_id=ids)
        loss.backward()  # type: ignore[no-untyped-call]
        queue.push(queries, batch.video_id)

    with pinned(threads):
        step(0)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
            engine_spans() as spans,
        ):
            for number in range(_STEPS):
                step(number)
    profiler.export_chrome_trace(str(path))
    spans.add_to(path)
