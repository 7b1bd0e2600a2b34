"""Charts as inline SVG: no scripts, no fonts, colours from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 22, 34
LABEL_STEP = 14  # between the labels of marks, in height

Mark = tuple[float, str]  # place on the x axis in bars, label


def bars(values: Sequence[float], labels: Sequence[str], says: str, marks: Sequence[Mark] = ()) -> Markup:
    """A bar chart. `labels`: below the bars, "" for none. `says`: the chart in a sentence, for those who do not see it.
    `marks`: vertical lines with a label; 1.5 is the middle of the second bar."""
    top = TOP + LABEL_STEP * max(0, len(marks) - 1)
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom = top + tall
    highest = max([*values, 0]) or 1
    step = inner / max(1, len(values))
    parts = [_axis(highest, top, tall)]
    for place, value in enumerate(values):
        height = tall * value / highest
        x, y = LEFT + place * step, bottom - height
        parts.append(
            f'<rect class="bar" x="{x + 0.08 * step:.1f}" y="{y:.1f}" width="{0.84 * step:.1f}" height="{height:.1f}"/>'
        )
        if labels[place]:
            last = place == len(values) - 1 and len(labels[place]) * 7 > step
            at, anchor = (WIDTH - RIGHT, "end") if last else (x + step / 2, "middle")
            parts.append(_text(at, bottom + 20, labels[place], anchor))
    for number, (at, label) in enumerate(sorted(marks)):
        parts.append(_mark(LEFT + at * step, label, number, bottom))
    return _svg(parts, says, bottom + BOTTOM)


def shares(parts: Sequence[tuple[str, float]], says: str) -> Markup:
    """One bar cut into parts, each named below with its share."""
    total = sum(value for _, value in parts) or 1
    drawn, x = [], 0.0
    for number, (name, value) in enumerate(parts):
        width = WIDTH * value / total
        drawn.append(f'<rect class="part{number}" x="{x:.1f}" y="0" width="{width:.1f}" height="28"/>')
        row = 46 + 20 * number
        drawn.append(f'<rect class="part{number}" x="0" y="{row - 11}" width="12" height="12"/>')
        drawn.append(_text(20, row - 1, f"{name}: {value:,.1f} s ({100 * value / total:.0f} %)", "start"))
        x += width
    return _svg(drawn, says, 40 + 20 * len(parts))


def _axis(highest: float, top: int, tall: int) -> str:
    lines = []
    for share in (0, 0.5, 1):
        y = top + tall * (1 - share)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text(LEFT - 6, y + 4, _short(highest * share), "end"))
    return "".join(lines)


def _mark(x: float, label: str, number: int, bottom: int) -> str:
    """A line below its label, which is to the side where there is room; each label is lower than the one to its left,
    so that none is crossed by the next line."""
    anchor, dx = ("end", -4) if x > WIDTH * 0.75 else ("start", 4)
    y = 12 + LABEL_STEP * number
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{bottom}"/>'
        f"{_text(x + dx, y, label, anchor, 'marked')}"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], says: str, height: int) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(says)}"><title>{escape(says)}</title>'
        f"{''.join(parts)}</svg>"
    )


def _short(value: float) -> str:
    """A number in at most five characters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * size or (value >= size and value % size == 0):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
