"""Charts: numbers to inline SVG, for the report.

    bands   what holds over a stretch of x (a generation and its layout), behind the curve
    curve   mean of what falls into a pixel column, with the range as a shade, so that a million steps stay small
    dots    rows that were done again and did not count
    marks   incidents, as a line with a number that the table below repeats

Rule of this file: geometry and text. It knows no run; colours and fonts are the style sheet's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1080, 66, 18, 30, 34
COLUMNS = 480
LETTER = 6.4  # width of one in the style sheet's small font
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch [start, stop] of the x axis. `tone` is a number from which the style sheet takes a colour."""

    start: float
    stop: float
    label: str
    tone: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A place on the x axis, with a short label and a longer text that shows when it is pointed at."""

    x: float
    label: str
    title: str


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.stop - self.start), 1)


def line_chart(
    points: Sequence[Point],
    *,
    title: str,
    unit: str,
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    dots: Sequence[Point] = (),
    stars: Sequence[Point] = (),
    log: bool = False,
    height: int = 260,
) -> str:
    """One curve over steps. `stars` are few and named points (validation losses); empty input gives a sentence."""
    if not points:
        return _empty(title)
    xs, ys = _scales([*points, *dots, *stars], bands, log=log, height=height)
    body = [
        *_bands(bands, xs, height),
        *_grid(xs, ys, height),
        *_curve(points, xs, ys),
        *(f'<circle class="again" cx="{xs(x)}" cy="{ys(y)}" r="2"/>' for x, y in _thin(dots)),
        *(
            f'<circle class="star" cx="{xs(x)}" cy="{ys(y)}" r="4"><title>step {x:g}: {y:.4g}</title></circle>'
            for x, y in stars
        ),
        *_band_names(bands, xs),
        *_marks(marks, xs, height),
    ]
    data = " ".join(f"{x:g},{y:.5g},{xs(x)},{ys(y)}" for x, y in _means(points))
    return _svg(title, unit, body, height, f' data-points="{data}"')


def bar_chart(
    points: Sequence[Point],
    *,
    title: str,
    unit: str,
    bands: Sequence[Band] = (),
    marks: Sequence[Mark] = (),
    height: int = 170,
) -> str:
    """One bar for each point, from zero."""
    if not points:
        return _empty(title)
    headroom = 1.25 * max(y for _, y in points)  # for the names of the bands
    xs, ys = _scales([*points, (points[0][0], 0.0), (points[0][0], headroom)], bands, log=False, height=height)
    width = max(1.5, min(14.0, 0.7 * (WIDTH - LEFT - RIGHT) / max(1, len(points))))
    bars = (
        f'<rect class="bar" x="{xs(x) - width / 2:.1f}" y="{ys(y)}" width="{width:.1f}" height="{ys(0) - ys(y):.1f}">'
        f"<title>step {x:g}: {y:.4g} {escape(unit)}</title></rect>"
        for x, y in points
    )
    body = [
        *_bands(bands, xs, height),
        *_grid(xs, ys, height),
        *bars,
        *_band_names(bands, xs),
        *_marks(marks, xs, height),
    ]
    return _svg(title, unit, body, height)


def lanes(rows: Sequence[tuple[str, Sequence[Band]]], marks: Sequence[Mark], *, title: str, unit: str) -> str:
    """Rows of bars over time, one row for each name."""
    spans = [band for _, bands in rows for band in bands]
    if not spans:
        return _empty(title)
    height = TOP + 30 * len(rows) + BOTTOM
    stop = max(max(band.stop for band in spans), max((mark.x for mark in marks), default=0.0))
    xs = Scale(min(band.start for band in spans), stop, LEFT + 40, WIDTH - RIGHT)
    body = [f'<g class="grid">{"".join(_x_tick(x, xs, height) for x in ticks(xs.low, xs.high))}</g>']
    for i, (name, bands) in enumerate(rows):
        y = TOP + 30 * i
        body.append(f'<text class="lane" x="{LEFT + 30}" y="{y + 19}">{escape(name)}</text>')
        body += [_lane_bar(band, xs, y) for band in bands]
    return _svg(title, unit, [*body, *_marks(marks, xs, height)], height)


def ticks(low: float, high: float, *, count: int = 6) -> list[float]:
    """Round numbers between low and high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between low and high; linear ticks where there are fewer than three of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [k * 10.0**p for p in powers for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    return found if len(found) >= 3 else ticks(low, high)


def _scales(points: Sequence[Point], bands: Sequence[Band], *, log: bool, height: int) -> tuple[Scale, Scale]:
    x_values = [x for x, _ in points] + [x for band in bands for x in (band.start, band.stop)]
    y_values = [y for _, y in points]
    low, high = min(y_values), max(y_values)
    log = log and low > 0 and high > low
    room = 0.0 if log else 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (low / 1.05, high * 1.05) if log else (low - room if low != 0 else 0.0, high + room)
    return (
        Scale(min(x_values), max(x_values), LEFT, WIDTH - RIGHT),
        Scale(low, high, height - BOTTOM, TOP, log),
    )


def _columns(points: Sequence[Point]) -> list[Sequence[Point]]:
    """Points in order of x, in at most COLUMNS groups."""
    size = max(1, -(-len(points) // COLUMNS))
    return [points[i : i + size] for i in range(0, len(points), size)]


def _means(points: Sequence[Point]) -> list[Point]:
    return [(group[len(group) // 2][0], sum(y for _, y in group) / len(group)) for group in _columns(points)]


def _thin(points: Sequence[Point]) -> list[Point]:
    return [group[0] for group in _columns(points)]


def _curve(points: Sequence[Point], xs: Scale, ys: Scale) -> list[str]:
    groups = _columns(points)
    parts = []
    if len(groups) < len(points):
        upper = [(g[len(g) // 2][0], max(y for _, y in g)) for g in groups]
        lower = [(g[len(g) // 2][0], min(y for _, y in g)) for g in reversed(groups)]
        parts.append(f'<path class="range" d="{_path([*upper, *lower], xs, ys)}Z"/>')
    return [*parts, f'<path class="curve" d="{_path(_means(points), xs, ys)}"/>']


def _path(points: Sequence[Point], xs: Scale, ys: Scale) -> str:
    return "M" + "L".join(f"{xs(x)} {ys(y)}" for x, y in points)


def _bands(bands: Sequence[Band], xs: Scale, height: int) -> list[str]:
    return [
        f'<rect class="band tone{band.tone}" x="{xs(band.start)}" y="{TOP}" height="{height - TOP - BOTTOM}" '
        f'width="{max(1.0, xs(band.stop) - xs(band.start)):.1f}"><title>{escape(band.label)}</title></rect>'
        for band in bands
    ]


def _band_names(bands: Sequence[Band], xs: Scale) -> list[str]:
    """The names that have room."""
    roomy = [band for band in bands if xs(band.stop) - xs(band.start) > LETTER * len(band.label) + 8]
    return [
        f'<text class="bandname tone{band.tone}" x="{xs(band.start) + 12:.1f}" y="{TOP - 6}">{escape(band.label)}</text>'
        for band in roomy
    ]


def _lane_bar(band: Band, xs: Scale, y: float) -> str:
    x, width = xs(band.start), max(2.0, xs(band.stop) - xs(band.start))
    name = (
        f'<text x="{x + 6:.1f}" y="{y + 18}">{escape(band.label)}</text>'
        if width > LETTER * len(band.label) + 10
        else ""
    )
    rect = f'<rect class="span tone{band.tone}" x="{x}" y="{y + 3}" width="{width:.1f}" height="22" rx="4">'
    return f'<g class="spanbox">{rect}<title>{escape(band.label)}</title></rect>{name}</g>'


def _grid(xs: Scale, ys: Scale, height: int) -> list[str]:
    rows = (_y_tick(y, ys) for y in (log_ticks if ys.log else ticks)(ys.low, ys.high))
    columns = (_x_tick(x, xs, height) for x in ticks(xs.low, xs.high, count=8))
    return [f'<g class="grid">{"".join(rows)}{"".join(columns)}</g>']


def _y_tick(value: float, ys: Scale) -> str:
    y = ys(value)
    return f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/><text class="y" x="{LEFT - 8}" y="{y + 4}">{value:g}</text>'


def _x_tick(value: float, xs: Scale, height: int) -> str:
    return f'<text class="x" x="{xs(value)}" y="{height - BOTTOM + 18}">{value:g}</text>'


def _marks(marks: Sequence[Mark], xs: Scale, height: int) -> list[str]:
    return [
        f'<g class="mark"><line x1="{xs(m.x)}" x2="{xs(m.x)}" y1="{TOP - 8}" y2="{height - BOTTOM}"/>'
        f'<circle cx="{xs(m.x)}" cy="{TOP - 12}" r="9"/><text x="{xs(m.x)}" y="{TOP - 8}">{escape(m.label)}</text>'
        f"<title>{escape(m.title)}</title></g>"
        for m in marks
    ]


def _svg(title: str, unit: str, body: Sequence[str], height: int, more: str = "") -> str:
    caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span></figcaption>"
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"{more}>{"".join(body)}</svg>'
    return f"<figure>{caption}{drawing}</figure>\n"


def _empty(title: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption><p class='none'>nothing was recorded</p></figure>\n"
