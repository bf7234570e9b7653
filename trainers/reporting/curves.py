"""Line plots as SVG text: axes with units, a legend, values as hover titles, gaps at NaN."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Small enough that 12 pixel letters stay readable on a phone, whose width the plot then fills.
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 76, 14, 14, 44
TICKS = 5
# More points than a screen has columns would only make the page large.
POINTS, STRIPS = 400, 160
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """A line. x, y: of equal length, x in increasing order; a y that is not finite leaves a gap; low, high: a shaded band
    around it (95 % interval), both or neither; points: also draw a dot at each value, for measurements that are few."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    points: bool = False


def svg(
    series: Sequence[Series], x_label: str, y_label: str, log_y: bool = False, lines: Sequence[tuple[str, float]] = ()
) -> str:
    """The plot as an <svg> element that takes its colours from the page's style.

    x_label, y_label: with units, such as "step" or "loss (nats)"; log_y: logarithmic axis, values that are not above 0 leave
    gaps; lines: (name, y) of horizontal reference lines. Raises ValueError for series of unequal lengths.
    """
    for s in series:
        if any(len(v) != len(s.x) for v in (s.y, s.low, s.high) if v is not None) or (s.low is None) != (s.high is None):
            raise ValueError(f"series '{s.name}': x, y, low and high must have the same length")
    shown = [_usable(s, log_y) for s in series]
    xs = [x for s in shown for x, y, *_ in s if y is not None]
    ys = [v for s in shown for _, *values in s for v in values if v is not None]
    if not xs:
        return '<p class="empty">No finite value to plot.</p>'
    ys += [y for _, y in lines if math.isfinite(y) and (y > 0 or not log_y)]
    across = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, log_y, margin=0.06)
    parts = _frame(across, up, x_label, y_label)
    for i, points in enumerate(shown):
        parts += _line(thinned(points), i % COLOURS, across, up, series[i].points)
    parts += _references(lines, up)
    parts += _strips(series, shown, across, x_label)
    title = escape(f"{y_label} over {x_label}")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    keys = "".join(f'<span><i class="k{i % COLOURS}"></i>{escape(s.name)}</span>' for i, s in enumerate(series))
    return f'{drawing}<div class="legend">{keys}</div>'


def number(value: float | None, digits: int = 4) -> str:
    """A value for people: that many significant digits, or "-" where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    if isinstance(value, int) or float(value).is_integer():
        return str(int(value))
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def thinned(points: Sequence[tuple], most: int = POINTS) -> list[tuple]:
    """At most about `most` of the points (x, y, low, high), keeping each stretch's smallest and largest y and its gaps."""
    if len(points) <= most:
        return list(points)
    kept, size = [], math.ceil(2 * len(points) / most)
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [i for i, p in enumerate(stretch) if p[1] is not None]
        gaps = [i for i, p in enumerate(stretch) if p[1] is None][:1]
        ends = [min(finite, key=lambda i: stretch[i][1]), max(finite, key=lambda i: stretch[i][1])] if finite else []
        kept += [stretch[i] for i in sorted({*ends, *gaps})]
    return kept


class _Axis:
    """Maps values low..high to pixels first..last; margin: a share of the range added at both ends."""

    def __init__(self, low: float, high: float, first: float, last: float, log: bool = False, margin: float = 0.0):
        self.log, self.first, self.last = log, first, last
        a, b = (math.log10(low), math.log10(high)) if log else (low, high)
        if b - a <= 1e-12 * max(abs(a), abs(b)):
            a, b = a - (abs(a) * 0.1 or 1), b + (abs(b) * 0.1 or 1)
        spare = margin * (b - a)
        self.a, self.b = a - spare, b + spare

    def at(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return round(self.first + (place - self.a) / (self.b - self.a) * (self.last - self.first), 1)

    def ticks(self) -> list[float]:
        """Round values in range."""
        if self.log and self.b - self.a >= 1:
            step = max(1, math.ceil((self.b - self.a) / TICKS))
            return [10.0**e for e in range(math.ceil(self.a), math.floor(self.b) + 1, step)]
        low, high = (10**self.a, 10**self.b) if self.log else (self.a, self.b)
        raw = (high - low) / TICKS
        size = 10 ** math.floor(math.log10(raw))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
        first = math.ceil(low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _usable(s: Series, log: bool) -> list[tuple]:
    """(x, y, low, high), None for a value that cannot be drawn."""
    nothing = [None] * len(s.x)
    rows = zip(s.x, s.y, s.low or nothing, s.high or nothing, strict=True)
    return [(float(x), *(_drawable(v, log) for v in values)) for x, *values in rows if math.isfinite(x)]


def _drawable(value: float | None, log: bool) -> float | None:
    return float(value) if value is not None and math.isfinite(value) and (value > 0 or not log) else None


def _frame(across: _Axis, up: _Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for v in up.ticks():
        y = up.at(v)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4}">{v:g}</text>')
    for v in across.ticks():
        x = across.at(v)
        parts.append(f'<path class="axis" d="M{x} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text class="tick mid" x="{x}" y="{HEIGHT - BOTTOM + 17}">{v:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="label mid" x="{middle}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    down = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label mid" transform="translate(13 {down}) rotate(-90)">{escape(y_label)}</text>')
    return parts


def _references(lines: Sequence[tuple[str, float]], up: _Axis) -> list[str]:
    parts = []
    for name, value in lines:
        if not math.isfinite(value) or (up.log and value <= 0):
            continue
        y = up.at(value)
        parts.append(f'<path class="reference" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end over" x="{WIDTH - RIGHT}" y="{y - 4}">{escape(name)}</text>')
    return parts


def _line(points: Sequence[tuple], colour: int, across: _Axis, up: _Axis, dots: bool) -> list[str]:
    parts, path, previous = [], [], False
    for run in _runs([(x, a, b) for x, _, a, b in points]):
        there = " ".join(f"{across.at(x)},{up.at(b)}" for x, _, b in run)
        back = " ".join(f"{across.at(x)},{up.at(a)}" for x, a, _ in reversed(run))
        parts.append(f'<polygon class="band f{colour}" points="{there} {back}"/>')
    for x, y, *_ in points:
        if y is not None:
            path.append(f"{'L' if previous else 'M'}{across.at(x)} {up.at(y)}")
        previous = y is not None
    parts.append(f'<path class="line s{colour}" d="{"".join(path)}"/>')
    # A value between two gaps has no line of its own.
    for i, (x, y, *_) in enumerate(points):
        alone = all(not 0 <= j < len(points) or points[j][1] is None for j in (i - 1, i + 1))
        if y is not None and (dots or alone):
            parts.append(f'<circle class="f{colour}" cx="{across.at(x)}" cy="{up.at(y)}" r="3"/>')
    return parts


def _runs(rows: Sequence[tuple]) -> list[list[tuple]]:
    """Stretches of rows in which no value is None."""
    runs: list[list[tuple]] = [[]]
    for row in rows:
        if None not in row:
            runs[-1].append(row)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _strips(series: Sequence[Series], shown: Sequence[Sequence[tuple]], across: _Axis, x_label: str) -> list[str]:
    """Invisible columns over the plot whose titles say all values there: what a pointer shows."""
    every = sorted({x for s in shown for x, *_ in s})
    every = every[:: math.ceil(len(every) / STRIPS)] or every
    edges = [LEFT, *((across.at(a) + across.at(b)) / 2 for a, b in zip(every, every[1:], strict=False)), WIDTH - RIGHT]
    values = [{x: y for x, y, *_ in s} for s in shown]
    parts = []
    for x, start, end in zip(every, edges[:-1], edges[1:], strict=True):
        said = [f"{s.name}: {number(v[x])}" for s, v in zip(series, values, strict=True) if x in v]
        text = escape("\n".join([f"{x_label} {number(x)}", *said]))
        size = f'x="{start:.1f}" y="{TOP}" width="{max(end - start, 0.5):.1f}" height="{HEIGHT - BOTTOM - TOP}"'
        parts.append(f'<rect class="strip" {size}><title>{text}</title></rect>')
    return parts
