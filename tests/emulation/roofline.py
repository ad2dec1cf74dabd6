"""Count what the kernels move and compute, and what that takes at least at an A100's and an H100's rates.

Run on demand: ``python tests/emulation/roofline.py [NAME ...]`` from the checkout, in the project's environment. No
time is taken.

The emulation counts small sizes. Counters are taken as fixed + per key + per split of the keys, which as many runs
decide; one more run shows how well that holds, and the sizes that matter are read off. What does not go through the
counters (the loss's float32 arithmetic, one read of the keys from memory) is a formula beside the case.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import emulated
from test_loss import found, gradients

import cascade_engine as ce
from cascade_engine import loss as losses
from cascade_engine.kernels import cuda

# Published dense rates: half-precision tensor-core FLOP/s with float32 sums, float64 and float32 FLOP/s outside them,
# bytes/s of memory. A100's L2 reads 5,120 bytes a clock (its whitepaper) at 1.41 GHz; of H100 nothing is published.
RATES = {"A100 SXM 80 GB": (312e12, 9.7e12, 19.5e12, 2.04e12), "H100 SXM": (989e12, 34e12, 67e12, 3.35e12)}
L2 = 5120 * 1.41e9
B, D = 64, 128
CPR = ce.CascadePlan.preset("cpr", oracle="o", trainee="t")
SEARCH = ce.CascadePlan.parse("o:100,t:10")

SPLIT = 1 << 15  # keys of a split at full size; 0 where there are none

Counted = Callable[[int, int], dict[str, int]]  # at K keys, in splits of so many


@dataclass(frozen=True)
class Case:
    """What is counted, at which sizes, and for which.

    Args:
        name: of the case.
        counted: the counters.
        runs: K and keys of a split (0: none) that the emulation runs; the last one checks the others.
        wanted: K that are read off.
        memory: bytes that must come from memory at K keys.
        floats: float32 FLOP at K keys.
        workspace: bytes per query and key, which decide how many waves of queries there are; each reads all keys.
    """

    name: str
    counted: Counted
    runs: tuple[tuple[int, int], ...]
    wanted: tuple[int, ...]
    memory: Callable[[int], float]
    floats: Callable[[int], float] = lambda _: 0.0
    workspace: int = 0


def unit(rows: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mining(native: ModuleType, plan: ce.CascadePlan) -> Counted:
    """Mining with two views."""

    def counted(k: int, split: int) -> dict[str, int]:
        bank = ce.Bank({view: emulated.tensor(unit(k, seed)) for seed, view in enumerate(("o", "t"))})
        queries = {view: unit(B, 7 + seed) for seed, view in enumerate(("o", "t"))}
        for _ in range(2):  # the first search prepares the bank
            emulated.reset_counters(native)
            emulated.mine_bank(native, plan, queries, bank, split_keys=split or k)
        return emulated.counters(native)

    return counted


def contrast(native: ModuleType) -> Counted:
    """The loss with gradients, five positives a query."""

    def counted(k: int, _: int) -> dict[str, int]:
        losses.nce = emulated.loss_operator(native)
        bank = ce.Bank({"t": emulated.tensor(unit(k, 0))})
        query, key = (torch.from_numpy(unit(B, seed)) for seed in (1, 2))
        index = torch.from_numpy(np.random.default_rng(0).integers(0, k, (B, 5)))
        emulated.reset_counters(native)
        gradients(lambda q, x: ce.multi_positive_nce(q, x, bank, found(index)), query, key)
        return emulated.counters(native)

    return counted


def push(native: ModuleType) -> Counted:
    """A push of K keys of two views into a ring that has been searched."""

    def counted(k: int, _: int) -> dict[str, int]:
        queue = ce.KeyQueue(512, {"o": D, "t": D}, device="cpu", normalise=True)
        batch = {view: emulated.tensor(unit(512, seed)) for seed, view in enumerate(("o", "t"))}
        queue.push(batch, np.arange(512))
        emulated.mine_bank(native, SEARCH, {"o": unit(1, 1), "t": unit(1, 2)}, queue.bank())
        emulated.reset_counters(native)
        emulated.push(native, queue, {view: x[:k] for view, x in batch.items()}, torch.arange(k))
        return emulated.counters(native)

    return counted


def size(k: int, split: int) -> list[float]:
    """What a counter is linear in."""
    return [1, k, -(-k // split)] if split else [1, k]


def moved(counters: dict[str, float]) -> float:
    """Bytes read, written and copied."""
    return sum(counters[name] for name in ("bytes_read", "bytes_written", "async_bytes"))


def report(case: Case) -> None:
    """Print how well the last run is foretold, then a row for each wanted K."""
    seen = [case.counted(*run) for run in case.runs]
    sizes = np.array([size(*run) for run in case.runs[:-1]], float)
    parts = {name: np.linalg.solve(sizes, [run[name] for run in seen[:-1]]) for name in seen[0]}

    def at(k: int, split: int) -> dict[str, float]:
        return {name: float(np.dot(part, size(k, split))) for name, part in parts.items()}

    check, told = seen[-1], at(*case.runs[-1])
    print(f"# {case.name} {case.runs[-1]}: {moved(check):,} bytes counted, {moved(told):,.0f} foretold;")
    print(f"#   {check['multiply_adds']:,} float64 products counted, {told['multiply_adds']:,.0f} foretold")
    for k in case.wanted:
        c = at(k, SPLIT if case.runs[0][1] else 0)
        waves = -(-B // max(1, cuda.WORKSPACE_LIMIT // (case.workspace * k))) if case.workspace else 1
        c["matrix_ops"], c["async_bytes"] = c["matrix_ops"] * waves, c["async_bytes"] * waves
        tensor, double, single = c["matrix_ops"] * 4096, c["multiply_adds"] * 2, case.floats(k)
        memory = case.memory(k) * waves
        floors = [
            max(n / rate for n, rate in zip((tensor, double, single, memory), rates, strict=True)) * 1e6
            for rates in RATES.values()
        ]
        print(
            f"| {case.name}, {k:,} | {check['launches'] * waves} | {tensor / 1e6:,.0f} | {double / 1e6:,.2f} | "
            f"{single / 1e6:,.0f} | {memory / 1e6:,.2f} | {floors[0]:,.2f} / {floors[1]:,.2f} | "
            f"{moved(c) / 1e6:,.1f} | {moved(c) / L2 * 1e6:,.1f} |",
            flush=True,
        )


def main(names: list[str]) -> None:
    """Report all cases, or those whose names contain one of `names`."""
    native = emulated.emulated()
    emulated.schedule(native, 0)

    def packed(k: int) -> float:
        return 2 * k * D * 2

    whole, large = ((1024, 0), (2048, 0), (3072, 0)), (16_384, 65_536)
    splits = ((1536, 512), (3072, 512), (3072, 1024), (4096, 1024))
    cases = (
        Case("cpr", mining(native, CPR), whole, (2048, *large), packed),
        Case("o:100,t:10", mining(native, SEARCH), whole, large, packed),
        Case("o:100,t:10", mining(native, SEARCH), splits, (1 << 20, 10_000_000), packed, workspace=2 * 2 + 4),
        Case("loss", contrast(native), whole, (2048, *large), lambda k: k * D * 4, lambda k: 4 * B * k * D),
        # read once, written to the ring and as halves
        Case("push", push(native), ((32, 0), (64, 0), (128, 0)), (64, 256), lambda k: 2 * k * D * (4 + 4 + 2)),
    )
    for case in cases:
        if not names or any(name in case.name for name in names):
            report(case)


if __name__ == "__main__":
    main(sys.argv[1:])
