"""What the training benchmark found: runs joined, a table, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_engine.errors import InvalidInput

Row = dict[str, Any]
FIGURES = ("precision", "R@1", "R@5", "probe")
START = "start"  # before any method has trained
_TITLES = {"precision": "mining precision", "R@1": "retrieval R@1", "probe": "linear probe"}


def joined(parts: Sequence[Row]) -> Row:
    """Runs with other seeds, or of other methods, as one.

    Raises:
        InvalidInput: another budget or other data, or a method twice with one seed.
    """
    seeds: dict[str, Row] = {}
    for part in parts:
        if (part["budget"], part["data"]) != (parts[0]["budget"], parts[0]["data"]):
            raise InvalidInput("from: expected results of one budget on the same data")
        for seed, found in part["seeds"].items():
            there = seeds.setdefault(seed, {**found, "methods": {}})
            twice = set(there["methods"]) & set(found["methods"]) - {START}
            if twice:
                raise InvalidInput(f"from: expected each method once with a seed, got {min(twice)} twice with {seed}")
            there["methods"] = {**found["methods"], **there["methods"]}
    return {**parts[0], "seeds": dict(sorted(seeds.items(), key=lambda item: int(item[0])))}


def by_seed(results: Row, method: str, figure: str) -> dict[str, float]:
    """Seed to a method's figure, in percent, where it was measured."""
    rows = {seed: found["methods"].get(method, {}).get(figure) for seed, found in results["seeds"].items()}
    return {seed: 100 * value for seed, value in rows.items() if value is not None}


def column(results: Row, method: str, figure: str) -> list[float]:
    """A method's figure, seed by seed, in percent."""
    return list(by_seed(results, method, figure).values())


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(results: Row) -> str:
    """A Markdown table: a row per method, mean ± standard deviation over seeds, in percent; R@1 against CoCLR's."""
    lines = [
        "| positives | seeds | mining precision | R@1 | R@5 | linear probe | R@1 - CoCLR's, same seeds |",
        "|---|" + "---:|" * 6,
    ]
    base = by_seed(results, "CoCLR", "R@1")
    for name in methods_of(results):
        own = by_seed(results, name, "R@1")
        differences = [own[seed] - base[seed] for seed in own if seed in base and name not in ("CoCLR", START)]
        above = f", above in {sum(d > 0 for d in differences)} of {len(differences)}" if differences else ""
        cells = [str(len(own)), *(spread(column(results, name, figure)) for figure in FIGURES)]
        lines.append("| " + " | ".join([name, *cells, spread(differences) + above]) + " |")
    return "\n".join(lines)


def methods_of(results: Row) -> list[str]:
    """The methods in results, in the order trained."""
    return list(dict.fromkeys(name for found in results["seeds"].values() for name in found["methods"]))


def views_table(results: Row) -> str:
    """A Markdown table: what each view and plan mined before any method trained; then what is known of the views."""
    found = [seed["views"] for seed in results["seeds"].values() if "views" in seed]
    if not found:
        return "What the views are worth was not measured."
    names = list(found[0]["precision"])
    cells = [spread([100 * each["precision"][name] for each in found]) for name in names]
    agreement = spread([100 * each["agreement"] for each in found])
    known = ", ".join(
        f"{view} {spread([100 * each['instance'][view] for each in found])} %" for view in found[0]["instance"]
    )
    lines = ["| mined before training by | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += ["| precision | " + " | ".join(cells) + " |", ""]
    lines.append(f"Neighbours that the views share: {agreement} %; by chance {100 * found[0]['chance']:.1f} %.")
    lines.append(f"A video's own other clip is nearer than another video's: {known}.")
    lines += sorted({f"Warning: {text}" for each in found for text in each["warnings"]})
    return "\n".join(lines)


def draw(results: Row, path: Path) -> None:
    """A panel per figure: each method's seeds as points, their mean as a bar; percent."""
    from matplotlib import rc_context
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
    with rc_context({"svg.fonttype": "none"}):  # text stays text: a tenth of the size
        figure.savefig(path, dpi=120)
