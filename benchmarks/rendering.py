"""The README's table and plot, made from measured results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FAISS = ("faiss-default", "faiss-blas")
_PEERS = ("engine", "torch", "torch-bf16", *_FAISS, "scikit-learn", "usearch", "numpy", "published")


def table(results: dict[str, Any]) -> str:
    """A Markdown table: a row per case, medians in milliseconds, the factors reached and asked."""
    measured = {name for row in results["cases"] for name, o in row["contestants"].items() if "median_ms" in o}
    names = [name for name in _PEERS if name in measured]
    inexact = {n for row in results["cases"] for n, o in row["contestants"].items() if not o["exact"]}
    head = ["case", *(f"{name}\\*" if name in inexact else name for name in names), "reached / asked"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(names) + "---|"]
    for row in results["cases"]:
        cells = [_milliseconds(row["contestants"].get(name, {})) for name in names]
        bars = ", ".join(f"{bar['reached']:g} / {bar['asked']:g} {bar['peer']}" for bar in row["bars"])
        lines.append("| " + " | ".join([row["name"], *cells, bars]) + " |")
    return "\n".join(lines)


def _milliseconds(outcome: dict[str, Any]) -> str:
    value = outcome.get("median_ms")
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of time relative to the engine for each case that has a peer, on a logarithmic axis."""
    from matplotlib.figure import Figure

    def timed(row: dict[str, Any], name: str) -> bool:
        return "median_ms" in row["contestants"].get(name, {})

    rows = [row for row in results["cases"] if timed(row, "engine") and any(timed(row, n) for n in _PEERS[1:])]
    names = [n for n in _PEERS[1:] if any(timed(row, n) for row in rows)]
    figure = Figure(figsize=(9, 1.2 + 0.16 * len(names) * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        places, factors = [], []
        for place, row in enumerate(rows):
            median = row["contestants"].get(name, {}).get("median_ms")
            if median is not None:
                places.append(place + height * (number - (len(names) - 1) / 2))
                factors.append(median / row["contestants"]["engine"]["median_ms"])
        axes.barh(places, factors, height, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel(f"time relative to the engine, {results['settings']['threads']} threads (more is slower)")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
