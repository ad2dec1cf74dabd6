"""The loss, forward and backward, against dense torch: judged in float64 first, then timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cascade_engine as ce

from .timing import HostClock, interleaved, pinned

SIZES = ((32, 2048), (32, 16384), (256, 16384), (256, 65536))
_WIDTH, _POSITIVES, _TEMPERATURE = 128, 5, 0.07
_TOLERANCE = 1e-5

Step = Callable[[Tensor], Tensor]


def run(*, threads: int, rounds: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of median times for each size: dense torch with a mask, dense torch gathering P, the engine, its products.

    ``products`` is the least that any tiled method in float32 computes, as torch does: scores and the query's gradient.

    Raises:
        AssertionError: a contestant's loss or gradient is wrong.
    """
    rows = []
    with pinned(threads):
        for queries, keys in SIZES:
            rows.append(_measure(queries, keys, rounds))
            times = ", ".join(f"{name} {row['median_ms']:.2f}" for name, row in rows[-1]["contestants"].items())
            report(f"loss {queries}x{keys}: {times} ms")
    return rows


def _measure(queries: int, keys: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, _WIDTH, generator=generator), dim=1)

    query, key, stored = unit(queries), unit(queries), unit(keys)
    index = torch.from_numpy(np.random.default_rng(0).permuted(np.tile(np.arange(keys), (queries, 1)), axis=1))
    index = index[:, :_POSITIVES].contiguous()
    steps = _steps(key, stored, index)
    wanted = _both(_steps(key.double(), stored.double(), index)["torch, mask"], query.double())
    for name, step in steps.items():
        for got, want in zip(_both(step, query), wanted, strict=True):
            if float((got - want).norm()) > _TOLERANCE * max(1.0, float(want.norm())):
                raise AssertionError(f"{name}: wrong loss or gradient")
    calls: dict[str, Callable[[int], object]] = {
        name: lambda number, step=step: _both(step, query)  # type: ignore[misc]
        for name, step in steps.items()
    }
    calls["products"] = lambda number: _products(query, stored)
    timed = interleaved(calls, rounds=rounds, clock=HostClock())
    return {"queries": queries, "keys": keys, "contestants": {name: found.as_json() for name, found in timed.items()}}


def _both(step: Step, query: Tensor) -> tuple[Tensor, Tensor]:
    leaf = query.clone().requires_grad_()
    loss = step(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _steps(key: Tensor, stored: Tensor, index: Tensor) -> dict[str, Step]:
    def scores(query: Tensor) -> Tensor:
        return torch.cat([(query * key).sum(1, keepdim=True), query @ stored.T], 1) / _TEMPERATURE

    def masked(query: Tensor) -> Tensor:
        found = scores(query)
        member = torch.zeros_like(found, dtype=torch.bool)
        member[:, 0] = True
        member.scatter_(1, index + 1, value=True)
        inside = torch.logsumexp(found.masked_fill(~member, -torch.inf), 1)
        return (torch.logsumexp(found, 1) - inside).mean()

    def gathered(query: Tensor) -> Tensor:
        found = scores(query)
        inside = torch.cat([found[:, :1], found.gather(1, index + 1)], 1)
        return (torch.logsumexp(found, 1) - torch.logsumexp(inside, 1)).mean()

    found: dict[str, Step] = {"torch, mask": masked, "torch, gather": gathered}
    if stored.dtype == torch.float32:
        bank = ce.Bank({"rgb": stored}, checked=True)
        positives = ce.Positives(index=index, similarity=index)
        found["engine"] = lambda query: ce.multi_positive_nce(query, key, bank, positives, temperature=_TEMPERATURE)
    return found


def _products(query: Tensor, stored: Tensor) -> Tensor:
    width = max(64, (1 << 19) // len(query))
    gradient = torch.zeros_like(query)
    for first in range(0, len(stored), width):
        tile = stored[first : first + width]
        gradient.addmm_(torch.mm(query, tile.T), tile)
    return gradient
