"""Count what the mining kernels move and compute, and what that takes at least at an A100's and an H100's rates.

Run on demand: ``python tests/emulation/roofline.py`` from the checkout, in the project's environment. Nothing is timed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import emulated

import cascade_engine as ce

# Published dense rates: half-precision tensor-core FLOP/s with float32 sums, float64 FLOP/s outside them, bytes/s.
RATES = {"A100 SXM 80 GB": (312e12, 9.7e12, 2.04e12), "H100 SXM": (989e12, 34e12, 3.35e12)}
SHAPES = (("cpr", 64, 2048, 128), ("cpr", 64, 4096, 128), ("o:100,t:10", 64, 4096, 128))


def main() -> None:
    """Print one line per shape."""
    native = emulated.emulated()
    emulated.schedule(native, 0)
    rng = np.random.default_rng(0)
    for text, b, k, dim in SHAPES:
        plan = ce.CascadePlan.preset(text, oracle="o", trainee="t") if text == "cpr" else ce.CascadePlan.parse(text)
        x = {view: rng.standard_normal((b + k, dim)).astype(np.float32) for view in ("o", "t")}
        x = {view: rows / np.linalg.norm(rows, axis=1, keepdims=True) for view, rows in x.items()}
        bank = ce.Bank({view: emulated.tensor(rows[b:]) for view, rows in x.items()})
        queries = {view: rows[:b] for view, rows in x.items()}
        emulated.mine_bank(native, plan, queries, bank)  # prepares the bank
        emulated.reset_counters(native)
        emulated.mine_bank(native, plan, queries, bank)
        c = emulated.counters(native)
        moved = c["bytes_read"] + c["bytes_written"] + c["async_bytes"]
        flops, exact = c["matrix_ops"] * 4096, c["multiply_adds"] * 2
        print(f"{text}, B={b}, K={k}, D={dim}, two views: {c['launches']} launches, {flops / 1e6:.0f} MFLOP on tensor")
        print(f"  cores, {exact / 1e6:.2f} MFLOP in float64, {moved / 1e6:.1f} MB through L2")
        for name, (tensor_rate, float64_rate, memory_rate) in RATES.items():
            floor = max(
                flops / tensor_rate, exact / float64_rate, sum(rows[b:].size for rows in x.values()) * 2 / memory_rate
            )
            print(f"  {name}: not under {floor * 1e6:.2f} us")


if __name__ == "__main__":
    main()
