"""The plot of the training benchmark."""

from __future__ import annotations

import statistics
from pathlib import Path

from .training import Row, column, methods_of

_TITLES = {"precision": "mining precision", "R@1": "retrieval R@1", "probe": "linear probe"}


def draw(results: Row, path: Path) -> None:
    """A panel per figure: each method's seeds as points, their mean as a bar; percent."""
    from matplotlib.figure import Figure

    names = methods_of(results)
    figure = Figure(figsize=(10, 1 + 0.34 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(_TITLES), sharey=True)
    for axes, (key, title) in zip(panels, _TITLES.items(), strict=True):
        for place, name in enumerate(names):
            values = column(results, name, key)
            if values:
                axes.barh(place, statistics.mean(values), 0.7, color="#9bbcd8")
                axes.plot(values, [place] * len(values), "o", color="#1f3b57", markersize=3)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("%")
        axes.grid(axis="x", linewidth=0.4)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
