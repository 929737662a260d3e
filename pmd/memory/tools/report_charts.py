"""Line, bar and scatter charts as SVG text, coloured with the page's CSS variables."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HALF = 1100, 520  # pixels: a full-width card, and one of two side by side
LEFT, RIGHT, TOP, BOTTOM = 56, 110, 14, 40
COLOURS = {
    "strategy": "var(--l1)",
    "contrast": "var(--contrast)",
    "lesson": "var(--lesson)",
    "behaviour": "var(--l2)",
}


def lines(
    series: Sequence[tuple[str, str, Sequence[float]]],
    ticks: Sequence[int],
    label: str,
    *,
    share: bool = False,
    width: int = WIDTH,
) -> str:
    """Draw one line for each (name, colour, values); names are written at the lines' ends."""
    height = 300
    minimum = 0.1 if share else 1.0  # a line along zero needs a scale too
    top = max(minimum, *(value for _, _, values in series for value in values)) if ticks else minimum
    steps = _ticks(top)
    top = steps[-1]

    def place(position: int, value: float) -> tuple[float, float]:
        x = LEFT + (width - LEFT - RIGHT) * position / max(1, len(ticks) - 1)
        return x, TOP + (height - TOP - BOTTOM) * (1 - value / top)

    parts = ['<g class="grid">']
    for step in steps:
        y = place(0, step)[1]
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(step, share)}</text>')
    parts.append("</g>")
    every = max(1, math.ceil(len(ticks) / (width / 85)))
    for position, tick in enumerate(ticks):
        if position % every == 0:
            x = place(position, 0)[0]
            parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{width - RIGHT}" y="{height - 6}" text-anchor="end">{escape(label)}</text>')
    ends: list[float] = []
    for name, colour, values in sorted(series, key=lambda s: -s[2][-1] if s[2] else 0):
        points = [place(position, value) for position, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{name}, {label} {tick}: '
            f"{_number(value, share)}</title></circle>"
            for (x, y), tick, value in zip(points, ticks, values, strict=True)
        ]
        end = points[-1][1] if points else 0.0
        end = max(end, ends[-1] + 15) if ends else end  # names must not overlap
        ends.append(end)
        x = width - RIGHT + 10
        parts.append(f'<text x="{x}" y="{end + 4:.1f}" style="fill:{colour};font-weight:600">{escape(name)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def bars(values: Sequence[tuple[str, float]], label: str, *, width: int = WIDTH) -> str:
    """Draw one bar for each (name, value)."""
    height, top = 300, max(value for _, value in values)
    step = (width - 2 * LEFT) / len(values)
    every = max(1, math.ceil(len(values) / (width / 80)))
    parts = []
    for position, (name, value) in enumerate(values):
        tall = (height - TOP - BOTTOM - 14) * value / top
        x, y = LEFT + position * step, height - BOTTOM - tall
        parts.append(
            f'<rect x="{x + step * 0.12:.1f}" y="{y:.1f}" width="{step * 0.76:.1f}" height="{tall:.1f}" rx="3"'
            f' fill="var(--l1)"><title>{escape(name)} {escape(label)}: {value:g}</title></rect>'
        )
        if position % every == 0:
            centre = x + step / 2
            parts.append(
                f'<text x="{centre:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{escape(name)}</text>'
            )
            parts.append(f'<text x="{centre:.1f}" y="{y - 5:.1f}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{width - LEFT}" y="{height - 6}" text-anchor="end">{escape(label)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def scatter(points: Sequence[tuple[float, float, str, float, str]]) -> str:
    """Draw points (x, y, kind, support, words); a larger area means more support; behaviours are diamonds on top."""
    height, margin = 560, 24
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    spans = [max(max(values) - min(values), 1e-9) for values in (xs, ys)]
    largest = max(point[3] for point in points)
    parts = []
    for x, y, kind, support, words in sorted(points, key=lambda point: (point[2] == "behaviour", -point[3])):
        px = margin + (WIDTH - 2 * margin) * (x - min(xs)) / spans[0]
        py = height - margin - (height - 2 * margin) * (y - min(ys)) / spans[1]
        size = 3.5 + 7 * math.sqrt(support / largest)
        title, colour = f"<title>{escape(words)}</title>", COLOURS.get(kind, "var(--l1)")
        if kind == "behaviour":
            parts.append(
                f'<rect x="{px - size / 2:.1f}" y="{py - size / 2:.1f}" width="{size:.1f}" height="{size:.1f}"'
                f' transform="rotate(45 {px:.1f} {py:.1f})" fill="{colour}" stroke="var(--card)">{title}</rect>'
            )
        else:
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{size:.1f}" fill="{colour}" fill-opacity=".45"'
                f' stroke="{colour}" stroke-opacity=".8">{title}</circle>'
            )
    present = [kind for kind in COLOURS if any(point[2] == kind for point in points)]
    key = "".join(f'<li><i style="background:{COLOURS[kind]}"></i>{kind}</li>' for kind in present)
    note = "<li>larger: more support; hover for the text</li>"
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg><ul class="key">{key}{note}</ul>'


def _ticks(top: float) -> list[float]:
    """Return round steps from 0 to at least `top`."""
    size = 10.0 ** math.floor(math.log10(top))
    step = next(factor * size for factor in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5) if top / (factor * size) <= 5)
    return [step * n for n in range(math.ceil(round(top / step, 6)) + 1)]


def _number(value: float, share: bool) -> str:
    return f"{value:.0%}" if share else f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"
