"""Draw charts as inline SVG without scripts or fonts; the page's style sheet sets the colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 22, 34
LABEL_STEP = 14  # vertical distance between the labels of marks

Mark = tuple[float, str]  # position on the x axis in bars, label


def bars(values: Sequence[float], labels: Sequence[str], description: str, marks: Sequence[Mark] = ()) -> Markup:
    """Return a bar chart.

    `labels`: below the bars, "" for none. `description`: the chart in a sentence, for screen readers. `marks`: vertical
    lines with a label; 1.5 is the middle of the second bar.
    """
    top = TOP + LABEL_STEP * max(0, len(marks) - 1)
    chart_width, chart_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom = top + chart_height
    highest = max([*values, 0]) or 1
    step = chart_width / max(1, len(values))
    parts = [_axis(highest, top, chart_height)]
    for index, value in enumerate(values):
        height = chart_height * value / highest
        x, y = LEFT + index * step, bottom - height
        parts.append(
            f'<rect class="bar" x="{x + 0.08 * step:.1f}" y="{y:.1f}" width="{0.84 * step:.1f}" height="{height:.1f}"/>'
        )
        if labels[index]:
            align_right = index == len(values) - 1 and len(labels[index]) * 7 > step
            label_x, anchor = (WIDTH - RIGHT, "end") if align_right else (x + step / 2, "middle")
            parts.append(_text(label_x, bottom + 20, labels[index], anchor))
    for number, (position, label) in enumerate(sorted(marks)):
        parts.append(_mark(LEFT + position * step, label, number, bottom))
    return _svg(parts, description, bottom + BOTTOM)


def shares(parts: Sequence[tuple[str, float]], description: str) -> Markup:
    """Return one bar divided into parts, with a legend of their shares below."""
    total = sum(value for _, value in parts) or 1
    elements, x = [], 0.0
    for number, (name, value) in enumerate(parts):
        width = WIDTH * value / total
        elements.append(f'<rect class="part{number}" x="{x:.1f}" y="0" width="{width:.1f}" height="28"/>')
        row = 46 + 20 * number
        elements.append(f'<rect class="part{number}" x="0" y="{row - 11}" width="12" height="12"/>')
        elements.append(_text(20, row - 1, f"{name}: {value:,.1f} s ({100 * value / total:.0f} %)", "start"))
        x += width
    return _svg(elements, description, 40 + 20 * len(parts))


def _axis(highest: float, top: int, height: int) -> str:
    lines = []
    for share in (0, 0.5, 1):
        y = top + height * (1 - share)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text(LEFT - 6, y + 4, _short(highest * share), "end"))
    return "".join(lines)


def _mark(x: float, label: str, number: int, bottom: int) -> str:
    """Return a vertical line with its label on the side that has room.

    Each label is lower than the one to its left, so that the next line does not cross it.
    """
    anchor, dx = ("end", -4) if x > WIDTH * 0.75 else ("start", 4)
    y = 12 + LABEL_STEP * number
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{bottom}"/>'
        f"{_text(x + dx, y, label, anchor, 'marked')}"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], description: str, height: int) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description)}">'
        f"<title>{escape(description)}</title>"
        f"{''.join(parts)}</svg>"
    )


def _short(value: float) -> str:
    """Return a number in at most five characters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * size or (value >= size and value % size == 0):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
