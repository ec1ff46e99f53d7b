"""Scatter plots of shares of bounds as inline SVG: a logarithmic axis, one row per case or per backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LOWEST, HIGHEST = 0.03, 10.0  # shares beyond are drawn at the edge
TICKS = ((0.03, "3 %"), (0.1, "10 %"), (0.3, "30 %"), (1.0, "100 %"), (3.0, "300 %"), (10.0, "1000 %"))
SHAPES = ("circle", "square", "triangle")
WIDTH, LABEL, RIGHT, TOP, ROW = 1160, 260, 40, 22, 18


@dataclass(frozen=True)
class Mark:
    share: float
    colour: int  # of the backend
    shape: str  # of the dtype
    title: str
    broken: bool = False
    lift: float = 0.0  # downwards, so that marks do not hide each other


def colour(index: int) -> str:
    return f"var(--c{index % 6})"


def across(share: float) -> float:
    """x of a share."""
    # NaN is no success: the right edge.
    share = HIGHEST if math.isnan(share) else min(max(share, LOWEST), HIGHEST)
    part = math.log(share / LOWEST) / math.log(HIGHEST / LOWEST)
    return LABEL + part * (WIDTH - LABEL - RIGHT)


def symbol(mark: Mark, x: float, y: float, r: float = 4.0) -> str:
    look = f'fill="{colour(mark.colour)}" fill-opacity=".75"' + (' class="broken"' if mark.broken else "")
    title = f"<title>{escape(mark.title)}</title>" if mark.title else ""
    if mark.shape == "square":
        return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}" {look}>{title}</rect>'
    if mark.shape == "triangle":
        points = f"{x:.1f},{y - 1.2 * r:.1f} {x - 1.1 * r:.1f},{y + r:.1f} {x + 1.1 * r:.1f},{y + r:.1f}"
        return f'<polygon points="{points}" {look}>{title}</polygon>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {look}>{title}</circle>'


def scatter(rows: Sequence[tuple[str, Sequence[Mark]]], description: str) -> str:
    """(label, marks) from top to bottom."""
    height = TOP + ROW * len(rows) + 26
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(description)}">'
    ]
    for i in range(0, len(rows), 2):
        parts.append(f'<rect class="stripe" x="0" y="{TOP + ROW * i}" width="{WIDTH}" height="{ROW}"/>')
    bottom = TOP + ROW * len(rows)
    for share, text in TICKS:
        x = across(share)
        parts.append(
            f'<line class="{"bound" if share == 1 else "axis"}" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>'
        )
        for y in (TOP - 7, bottom + 16):
            parts.append(f'<text class="faint" x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>')
    for i, (label, marks) in enumerate(rows):
        y = TOP + ROW * (i + 0.5)
        parts.append(f'<text x="{LABEL - 14}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        parts += [symbol(mark, across(mark.share), y + mark.lift) for mark in marks]
    return "".join([*parts, "</svg>"])


def legend(backends: Sequence[str], dtypes: Sequence[tuple[str, str]]) -> str:
    """Colours of the backends, shapes of the dtypes."""

    def entry(mark: Mark, text: str) -> str:
        return f'<span><svg width="12" height="12" viewBox="0 0 12 12">{symbol(mark, 6, 6)}</svg> {escape(text)}</span>'

    entries = [entry(Mark(1, i, "circle", ""), name) for i, name in enumerate(backends)]
    entries += [entry(Mark(1, 0, shape, ""), name) for name, shape in dtypes]
    return f'<div class="legend">{"".join(entries)}</div>'
