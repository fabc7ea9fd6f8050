"""Small charts as inline SVG: no script, no file beside the page; colours and fonts are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 480, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 36


@dataclass(frozen=True)
class Point:
    """One place on a curve: its name, its value, and the interval around it."""

    name: str
    value: float
    low: float
    high: float


def histogram(values: Sequence[float], unit: str, bins: int = 24) -> Markup:
    """How often which value occurs, up to the 99th percentile; what lies beyond counts in the last bar."""
    ordered = sorted(values)
    if not ordered:
        return Markup("")
    top = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)] or 1.0
    counts = [0] * bins
    for value in ordered:
        counts[min(bins - 1, int(value / top * bins))] += 1
    width = (_WIDTH - _LEFT - _RIGHT) / bins
    most = max(counts)
    bars = []
    for index, count in enumerate(counts):
        height = count / most * (_HEIGHT - _TOP - _BOTTOM)
        bars.append(
            f'<rect class="bar" x="{_LEFT + index * width + 0.5:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}"'
            f' width="{width - 1:.1f}" height="{height:.1f}"><title>{index * top / bins:.4g} to'
            f" {(index + 1) * top / bins:.4g} {escape(unit)}: {count} rows</title></rect>"
        )
    marks = [_x_mark(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), f"{share * top:.3g}") for share in (0, 0.5, 1)]
    told = f"from {ordered[0]:.4g} to {ordered[-1]:.4g} {unit}, median {ordered[len(ordered) // 2]:.4g}"
    return _svg([*bars, *marks, *_y_marks(0, most), _unit(unit)], told)


def curve(points: Sequence[Point], unit: str) -> Markup:
    """Values in the order given, each with its interval as a whisker; the highest is marked."""
    if not points:
        return Markup("")
    low, high = min(p.low for p in points), max(p.high for p in points)
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)

    def place(index: int, value: float) -> tuple[float, float]:
        across = (index + 0.5) / len(points) * (_WIDTH - _LEFT - _RIGHT)
        return _LEFT + across, _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    places = [place(i, p.value) for i, p in enumerate(points)]
    best = max(range(len(points)), key=lambda i: points[i].value)
    parts = [f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        ends = [place(index, end)[1] for end in (point.low, point.high)]
        told = f"{point.name}: {point.value:.2f} ({point.low:.2f} to {point.high:.2f})"
        parts.append(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>')
        parts.append(
            f'<circle class="{"best" if index == best else "bar"}" cx="{x:.1f}" cy="{y:.1f}"'
            f' r="{6 if index == best else 4}"><title>{escape(told)}</title></circle>'
        )
        if index % max(1, math.ceil(len(points) / 6)) == 0:
            parts.append(_x_mark(x, point.name.rpartition("-")[2][:10]))
    return _svg([*parts, *_y_marks(low, high), _unit(unit)], f"{unit}, best {points[best].name}")


def _svg(parts: Sequence[str], told: str) -> Markup:
    inner = "\n".join(parts)
    # What is inside is numbers, and names that were escaped above.
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(told)}">\n{inner}\n</svg>'
    )


def _x_mark(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{escape(text)}</text>'


def _y_marks(low: float, high: float) -> list[str]:
    base = _HEIGHT - _BOTTOM
    return [
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>',
        f'<text x="{_LEFT - 5}" y="{base + 4}" text-anchor="end">{low:g}</text>',
        f'<text x="{_LEFT - 5}" y="{_TOP + 10}" text-anchor="end">{high:g}</text>',
    ]


def _unit(unit: str) -> str:
    return f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(unit)}</text>'
