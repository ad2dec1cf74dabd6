"""Pages of one file: HTML with everything inside it, nothing loaded from anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from cascade_engine.errors import InvalidInput

STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--dim:#667;--line:#d8dbe0;--paper:#fff;--right:#1a8f4c;--wrong:#c93a3a}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#9aa;--line:#3a3f46;--paper:#16181b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:70rem;margin:2rem auto;
padding:0 1rem}h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}p,figcaption{color:var(--dim);margin:.3rem 0}figure{margin:1rem 0}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.15rem .7rem;border-bottom:1px solid var(--line);
text-align:left}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--dim)}.scroll{overflow-x:auto}
.cascade{margin:1.2rem 0 2rem}.stage{display:flex;gap:.8rem;align-items:center;margin:.3rem 0}
.stage>b{flex:0 0 11rem;font-weight:600}.stage>b small{display:block;font-weight:400;color:var(--dim)}
.clips{display:flex;gap:.35rem;flex-wrap:wrap}.clip{margin:0;width:5rem;text-align:center}
.clip img{width:100%;display:block;border-radius:3px;border:3px solid var(--line)}
.clip figcaption{font-size:.7rem;line-height:1.2;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;margin:0}
.right img{border-color:var(--right)}.wrong img{border-color:var(--wrong)}
.right figcaption::before{content:"\\2713 ";color:var(--right)}.wrong figcaption::before{content:"\\2717 ";
color:var(--wrong)}
""".strip()

COLOURS = ("#3b6fd4", "#d9822b", "#2a9d63", "#b0489e", "#7a6ff0", "#c9423f", "#0f97a8", "#8a7a2d", "#5d6b7a", "#d25f8a")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and the HTML under it; `body` comes from this package's functions, which escape what they are given."""

    title: str
    body: str


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write one self-contained HTML file: no script, nothing fetched, light and dark.

    Raises:
        InvalidInput: no section.
    """
    if not sections:
        raise InvalidInput("sections: expected at least one, got none")
    name = html.escape(title)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    parts = [f"<section><h2>{html.escape(each.title)}</h2>{each.body}</section>" for each in sections]
    target = Path(path)
    target.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{name}</h1>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    return target


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """A small heading within a section."""
    return f"<h3>{html.escape(text)}</h3>"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table with the first row's keys as its head; floats with three decimals, None as a dash."""
    if not rows:
        return paragraph("nothing to show")
    numeric = {key: all(isinstance(row.get(key), int | float | None) for row in rows) for key in rows[0]}
    head = "".join(f"<th{_align(numeric[key])}>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td{_align(numeric[key])}>{_cell(row.get(key))}</td>" for key in rows[0]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _align(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, y_label: str, title: str = ""
) -> str:
    """Lines over a shared pair of axes, as inline SVG; values that are not finite interrupt a line."""
    finite = {name: _pieces(list(zip(*line, strict=True))) for name, line in series.items()}
    points = [point for pieces in finite.values() for piece in pieces for point in piece]
    if not points:
        return paragraph("nothing to show")
    axes = _Axes(points, 640, 260)
    lines = []
    for number, (name, pieces) in enumerate(finite.items()):
        colour = COLOURS[number % len(COLOURS)]
        for piece in pieces:
            drawn = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in piece)
            lines.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            x, y = piece[0]
            lines.append(f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.5" fill="{colour}"/>')
        lines.append(
            f'<text x="{axes.width - 8}" y="{18 + 14 * number}" text-anchor="end" style="fill:{colour}">'
            f"{html.escape(name)}</text>"
        )
    return axes.figure("".join(lines), x_label, y_label, title)


def scatter(
    points: Iterable[tuple[float, float]], groups: Sequence[str], *, x_label: str, y_label: str, title: str = ""
) -> str:
    """Points coloured by group, with a legend, as inline SVG; hovering names a point's group."""
    places = [(float(x), float(y)) for x, y in points]
    if not places:
        return paragraph("nothing to show")
    axes = _Axes(places, 640, 420)
    names = sorted(set(groups))
    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    shape = {name: n // len(COLOURS) for n, name in enumerate(names)}
    marks = [
        f'<g fill="{colour[name]}">{_mark(axes.x(x), axes.y(y), shape[name])}<title>{html.escape(name)}</title></g>'
        for (x, y), name in zip(places, groups, strict=True)
    ]
    legend = [
        f'<g fill="{colour[name]}">{_mark(axes.width + 12, 20 + 14 * n, shape[name])}</g>'
        f'<text x="{axes.width + 20}" y="{24 + 14 * n}">{html.escape(name)}</text>'
        for n, name in enumerate(names)
    ]
    return axes.figure("".join(marks + legend), x_label, y_label, title, right=140, below=14 * len(names) + 30)


def _mark(x: float, y: float, kind: int) -> str:
    """A dot, a square or a diamond, so that more groups than colours can be told apart."""
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" opacity=".75"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if kind % 2 == 0 else ""
    return f'<rect x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" width="5.2" height="5.2" opacity=".75"{turn}/>'


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str], *, title: str = "") -> str:
    """A confusion matrix, true class by predicted class, shaded by each row's share, as inline SVG."""
    cell, left, top = 24, 130, 110
    parts = []
    for i, row in enumerate(counts):
        total = sum(row) or 1
        y = top + cell * i
        parts.append(f'<text x="{left - 6}" y="{y + 16}" text-anchor="end">{html.escape(names[i])}</text>')
        for j, count in enumerate(row):
            colour = "var(--right)" if i == j else "var(--wrong)"
            x = left + cell * j
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{colour}" '
                f'fill-opacity="{0.04 + 0.8 * count / total:.2f}"><title>{html.escape(names[i])} taken for '
                f"{html.escape(names[j])}: {count}</title></rect>"
            )
            if count:
                parts.append(f'<text x="{x + cell / 2}" y="{y + 16}" text-anchor="middle">{count}</text>')
    for j, name in enumerate(names):
        x = left + cell * j + 15
        parts.append(f'<text x="{x}" y="{top - 6}" transform="rotate(-60 {x} {top - 6})">{html.escape(name)}</text>')
    width, height = left + cell * len(names) + 60, top + cell * len(names) + 6
    return _figure(f'<svg viewBox="0 0 {width} {height}" width="{width}">{"".join(parts)}</svg>', title)


def _figure(drawing: str, title: str) -> str:
    return f"<figure>{drawing}<figcaption>{html.escape(title)}</figcaption></figure>"


def _pieces(line: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The stretches of a line whose values are finite."""
    runs = groupby(line, lambda point: math.isfinite(point[0]) and math.isfinite(point[1]))
    return [[(float(x), float(y)) for x, y in run] for finite, run in runs if finite]


class _Axes:
    """Where values fall on a drawing of `width` x `height` with room for the axes' numbers."""

    LEFT, BOTTOM, TOP = 52, 34, 10

    def __init__(self, points: Sequence[tuple[float, float]], width: int, height: int) -> None:
        self.width, self.height = width, height
        self.x_range = _range([x for x, _ in points])
        self.y_range = _range([y for _, y in points])

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.LEFT + (value - low) / (high - low) * (self.width - self.LEFT - 12)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.BOTTOM - (value - low) / (high - low) * (self.height - self.BOTTOM - self.TOP)

    def figure(self, marks: str, x_label: str, y_label: str, title: str, right: int = 0, below: int = 0) -> str:
        grid = []
        for step in range(5):
            x = self.x_range[0] + step / 4 * (self.x_range[1] - self.x_range[0])
            y = self.y_range[0] + step / 4 * (self.y_range[1] - self.y_range[0])
            grid.append(f'<text x="{self.x(x):.1f}" y="{self.height - 18}" text-anchor="middle">{x:.4g}</text>')
            grid.append(
                f'<path d="M{self.LEFT} {self.y(y):.1f}H{self.width - 12}" stroke="var(--line)"/>'
                f'<text x="{self.LEFT - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>'
            )
        labels = (
            f'<text x="{self.width / 2}" y="{self.height - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
            f'<text x="11" y="{self.height / 2}" text-anchor="middle" '
            f'transform="rotate(-90 11 {self.height / 2})">{html.escape(y_label)}</text>'
        )
        width, height = self.width + right, max(self.height, below)
        inside = "".join(grid) + marks + labels
        return _figure(f'<svg viewBox="0 0 {width} {height}" width="{width}">{inside}</svg>', title)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
