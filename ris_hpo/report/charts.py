"""Charts as SVG text: one look for the report's pages and for the figures beside a trial.

Text in, text out, in about a millisecond a chart: a trial that takes a second can afford its figures, where importing a
plotting library alone would cost as much as the trial. Colours are CSS variables, so the same chart follows a page's
light, dark and print form; ``standalone`` adds the style sheet for a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final, Literal

Point = tuple[float, float]

STYLE: Final = """
.chart{--ink:#16212b;--soft:#5b6976;--grid:#e4e8ec;--page:#fff;--accent:#0b63a5;--good:#0a7d62;--warn:#b86e00;
--bad:#bf3b30;--mark:#7a4fb5;--mute:#a9b4be;--s1:#0b63a5;--s2:#0a7d62;--s3:#b86e00;--s4:#7a4fb5;--s5:#bf3b30;
--q1:#0b4f8a;--q2:#3f86bd;--q3:#8fb6d3;--q4:#c5cfd8;--q5:#dfe3e7;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;font-size:12px}
@media (prefers-color-scheme:dark){.chart{--ink:#e8edf2;--soft:#9fadba;--grid:#2b3742;--page:#161e26;--accent:#6cb4ee;
--good:#4cc3a5;--warn:#e8a94a;--bad:#f2877d;--mark:#b99aea;--mute:#566370;--s1:#6cb4ee;--s2:#4cc3a5;--s3:#e8a94a;
--s4:#b99aea;--s5:#f2877d;--q1:#8fd0ff;--q2:#4f94c9;--q3:#3a6487;--q4:#34485a;--q5:#2a3641}}
@media print{.chart{--ink:#16212b;--soft:#4b5864;--grid:#dde2e7;--page:#fff;--accent:#0b63a5;--good:#0a7d62;
--warn:#b86e00;--bad:#bf3b30;--mark:#7a4fb5;--mute:#a9b4be;--s1:#0b63a5;--s2:#0a7d62;--s3:#b86e00;--s4:#7a4fb5;
--s5:#bf3b30;--q1:#0b4f8a;--q2:#3f86bd;--q3:#8fb6d3;--q4:#c5cfd8;--q5:#dfe3e7}}
.chart text{fill:var(--soft)}.chart .title{fill:var(--ink);font-weight:600;font-size:13px}
.chart .value{fill:var(--ink)}.chart .on-dark{fill:#fff}.chart .grid{stroke:var(--grid);fill:none}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .thin{stroke-width:1;opacity:.6}.chart .dash{stroke-dasharray:5 4;stroke-width:1.5}
.chart .dots{fill:none;stroke-linecap:round}.chart .band{stroke:none;opacity:.16}
"""
"""The look; a page that embeds charts includes it once."""

_CHARACTER: Final = 6.3
_LINE_HEIGHT: Final = 16
_SI: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its label, its ends, and whether it is logarithmic or a list of categories."""

    label: str
    low: float
    high: float
    log: bool = False
    categories: tuple[str, ...] = ()

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, log: bool = False, pad: float = 0.05) -> Axis:
        """An axis around finite values, with a margin of ``pad`` of its length on both sides."""
        finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(finite), max(finite)) if finite else (0.1 if log else 0.0, 1.0)
        if log:
            low = max(low, high * 1e-30)  # a ratio beyond it says nothing and overflows
            ratio = max(high / low, 1.5) ** pad
            return cls(label, low / ratio, high * ratio, log=True)
        margin = (high - low) * pad or max(abs(high), 1.0) * 0.1
        return cls(label, low - margin, high + margin)

    @classmethod
    def of(cls, label: str, categories: Sequence[str]) -> Axis:
        """An axis of categories at 0, 1, 2, ..."""
        return cls(label, -0.5, len(categories) - 0.5, categories=tuple(categories))

    def share(self, value: float) -> float:
        """Place of a value on the axis, 0 at its low end and 1 at its high end; values outside go to the end."""
        if self.log:
            value = max(value, self.low)
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """Round values within the axis, with their text."""
        if self.categories:
            return [(float(index), name) for index, name in enumerate(self.categories)]
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last - first >= 2:
                stride = max(1, -(-(last - first + 1) // max(2, about)))
                return [(10.0**power, number(10.0**power)) for power in range(first, last + 1, stride)]
            inner = [m * 10.0**p for p in range(first - 1, last + 2) for m in (1, 2, 5)]
            return [(value, number(value)) for value in inner if self.low <= value <= self.high]
        raw = (self.high - self.low) / max(1, about)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
        start, end = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(index * step, number(round(index * step, 12))) for index in range(start, end + 1)]


@dataclass(frozen=True, slots=True)
class Line:
    """A polyline; ``colour`` is a CSS variable of the style sheet, such as ``accent``."""

    points: Sequence[Point]
    colour: str = "accent"
    label: str = ""
    style: str = ""


@dataclass(frozen=True, slots=True)
class Dots:
    """Many points of one colour."""

    points: Sequence[Point]
    colour: str = "accent"
    label: str = ""
    radius: float = 3.0


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal reference line, named at its right end."""

    value: float
    label: str
    colour: str = "mark"


@dataclass(frozen=True, slots=True)
class Marks:
    """Points drawn as open circles, crosses or upright crosses, for truth and estimates: told by shape as by colour."""

    points: Sequence[Point]
    colour: str
    label: str = ""
    shape: Literal["ring", "cross", "plus"] = "ring"


@dataclass(frozen=True, slots=True)
class Cells:
    """A heat map: ``values[row][column]`` between the axes' ends, dark where high."""

    values: Sequence[Sequence[float]]


Series = Line | Dots | Marks | Cells


@dataclass(frozen=True, slots=True)
class Canvas:
    """Size in pixels, title, and whether the chart is a file of its own."""

    width: int = 720
    height: int = 300
    title: str = ""
    standalone: bool = False
    describe: str = ""
    left: float = field(default=0, kw_only=True)


def number(value: float) -> str:
    """A number as short as it can stand beside an axis: 0.25, 50k, 1e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, letter in _SI:
        if size >= unit * 0.9995:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.3g}"


def plot(series: Sequence[Series], x: Axis, y: Axis, canvas: Canvas, levels: Sequence[Level] = ()) -> str:
    """Lines, dots, rings and cells on two axes, with reference levels."""
    frame = _Frame(canvas, x, y, _legend_rows(series, canvas), levels)
    body = [frame.axes()]
    body += [_cells(item, frame) for item in series if isinstance(item, Cells)]
    for level in levels:
        run = f"M{frame.left:.1f} {frame.y(level.value):.1f}H{frame.right:.1f}"
        body.append(f'<path class="line dash" style="stroke:var(--{level.colour})" d="{run}"/>')
    for item in series:
        if isinstance(item, Line):
            body.append(_line(item, frame))
        elif isinstance(item, Dots) and item.points:
            path = "".join(f"M{frame.x(a):.1f} {frame.y(b):.1f}h0" for a, b in item.points if math.isfinite(b))
            style = f"stroke:var(--{item.colour});stroke-width:{2 * item.radius:g}"
            body.append(f'<path class="dots" style="{style}" d="{path}"/>')
        elif isinstance(item, Marks):
            body += [_mark(item.shape, item.colour, frame.x(a), frame.y(b)) for a, b in item.points]
    body += frame.level_labels(levels)
    return _svg(canvas, body)


def parallel(
    axes: Sequence[Axis], rows: Sequence[Sequence[float | None]], colours: Sequence[str], canvas: Canvas
) -> str:
    """Parallel coordinates: one polyline a row, the last row on top; None leaves a gap."""
    top, bottom, side = 42.0, canvas.height - 26.0, 46.0
    step = (canvas.width - 2 * side) / max(1, len(axes) - 1)
    places = [side + index * step for index in range(len(axes))]
    body = []
    for row, colour in zip(rows, colours, strict=True):
        path, pen = "", "M"
        for axis, place, value in zip(axes, places, row, strict=True):
            if value is None:
                pen = "M"
                continue
            path += f"{pen}{place:.0f} {bottom - axis.share(value) * (bottom - top):.1f}"
            pen = "L"
        width = 2 if colour == "q1" else 1
        body.append(f'<path class="line" style="stroke:var(--{colour});stroke-width:{width}" d="{path}"/>')
    room = max(6, int(step / _CHARACTER) - 1)
    for index, (axis, place) in enumerate(zip(axes, places, strict=True)):
        body.append(f'<path class="grid" style="stroke:var(--soft)" d="M{place:.0f} {top:.0f}V{bottom:.0f}"/>')
        # neighbours' names stand on two heights, so that long names do not run into each other
        name = escape(_shortened(axis.label, 2 * room))
        height = 14 if index % 2 == 0 else 28
        anchor = "start" if index == 0 else "end" if index == len(axes) - 1 else "middle"
        shift = {"start": -side + 2, "end": side - 2, "middle": 0}[anchor]
        body.append(_text(place + shift, height, name, anchor, strong=True))
        for value, text in axis.ticks(4):
            height_px = bottom - axis.share(value) * (bottom - top)
            body.append(_halo(place + 5, height_px + 4, _shortened(text, room)))
    return _svg(canvas, body)


def matrix(
    counts: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    canvas: Canvas,
) -> str:
    """A table of counts, each row shaded by its share: (row label, column label) name the two sides."""
    left, top = 74.0, 58.0
    cell_w = (canvas.width - left - 12) / len(columns)
    cell_h = (canvas.height - top - 12) / len(rows)
    body = [
        _text(left + cell_w * len(columns) / 2, top - 24, labels[1], "middle"),
        _upright(16, top + cell_h * len(rows) / 2, labels[0]),
    ]
    for column, name in enumerate(columns):
        body.append(_text(left + (column + 0.5) * cell_w, top - 7, name, "middle", strong=True))
    for row, name in enumerate(rows):
        middle = top + (row + 0.5) * cell_h
        body.append(_text(left - 10, middle + 4, name, "end", strong=True))
        total = sum(counts[row])
        for column, count in enumerate(counts[row]):
            share = count / total if total else 0.0
            colour = "good" if rows[row] == columns[column] else "bad"
            corner = f'x="{left + column * cell_w + 1:.1f}" y="{top + row * cell_h + 1:.1f}"'
            size = f'width="{cell_w - 2:.1f}" height="{cell_h - 2:.1f}" rx="3"'
            body.append(f'<rect {corner} {size} style="fill:var(--{colour});fill-opacity:{0.05 + 0.8 * share:.2f}"/>')
            if count:
                body.append(_text(left + (column + 0.5) * cell_w, middle + 4, f"{share:.0%}", "middle", strong=True))
    return _svg(canvas, body)


def intervals(rows: Sequence[tuple[str, float, float, float, str]], label: str, canvas: Canvas) -> str:
    """Estimates with their intervals beside a zero line: rows of (name, low, middle, high, colour)."""
    widest = max((len(name) for name, *_ in rows), default=0)
    left, right, top, bottom = 14 + widest * _CHARACTER, canvas.width - 14.0, 12.0, canvas.height - 40.0
    finite = [value for _, low, middle, high, _ in rows for value in (low, middle, high) if math.isfinite(value)]
    axis = Axis.over(label, [*finite, 0.0], pad=0.08)

    def x(value: float) -> float:
        return left + axis.share(value) * (right - left)

    body = []
    for value, text in axis.ticks(max(3, int((right - left) / 90))):
        body.append(f'<path class="grid" d="M{x(value):.1f} {top}V{bottom}"/>')
        body.append(_text(x(value), bottom + 16, text, "middle"))
    body.append(f'<path class="grid" style="stroke:var(--ink)" d="M{x(0):.1f} {top}V{bottom}"/>')
    step = (bottom - top) / max(1, len(rows))
    for index, (name, low, middle, high, colour) in enumerate(rows):
        y = top + (index + 0.5) * step
        low, high = (low if math.isfinite(low) else axis.low), (high if math.isfinite(high) else axis.high)
        body.append(_text(left - 10, y + 4, name, "end", strong=True))
        body.append(f'<path class="line" style="stroke:var(--{colour})" d="M{x(low):.1f} {y:.1f}H{x(high):.1f}"/>')
        body.append(f'<circle cx="{x(middle):.1f}" cy="{y:.1f}" r="5" style="fill:var(--{colour})"/>')
    body.append(_text((left + right) / 2, canvas.height - 6, label, "middle"))
    return _svg(canvas, body)


def ruler(marks: Sequence[tuple[str, float, str]], axis: Axis, canvas: Canvas) -> str:
    """Named marks on one horizontal scale, best at the right: marks of (name, value, colour)."""
    left, right, line = 16.0, canvas.width - 16.0, canvas.height - 46.0

    def x(value: float) -> float:  # lower is better, and better is right
        return right - axis.share(value) * (right - left)

    body = [f'<path class="grid" style="stroke:var(--soft);stroke-width:2" d="M{left} {line}H{right}"/>']
    for value, text in axis.ticks(max(3, canvas.width // 110)):
        body.append(f'<path class="grid" style="stroke:var(--soft)" d="M{x(value):.1f} {line}v6"/>')
        body.append(_text(x(value), line + 20, text, "middle"))
    ends: list[float] = []  # right end of the last name on each height
    for name, value, colour in sorted(marks, key=lambda mark: -mark[1]):
        text = f"{name} {value:.2f}"
        half = len(text) * _CHARACTER / 2 + 4
        middle = min(right - half, max(left + half, x(value)))
        row = next((index for index, end in enumerate(ends) if middle - half > end), len(ends))
        ends[row:] = [middle + half, *ends[row + 1 :]]
        height = line - 18 - 18 * row
        body.append(f'<path style="stroke:var(--{colour})" d="M{x(value):.1f} {line}V{height + 4:.0f}"/>')
        body.append(f'<circle cx="{x(value):.1f}" cy="{line}" r="5.5" style="fill:var(--{colour})"/>')
        style = f"fill:var(--{colour});font-weight:600"
        body.append(_text(middle, height, text, "middle", style=style))
    label = f"{axis.label} →"
    body.append(_text(right, canvas.height - 6, label, "end"))
    return _svg(canvas, body)


def side_by_side(charts: Sequence[str], canvas: Canvas) -> str:
    """Embedded charts in one row of equal widths, under one title, as one file."""
    width, top = canvas.width / len(charts), 26 if canvas.title else 0
    body = [f'<g transform="translate({index * width:.0f} {top})">{chart}</g>' for index, chart in enumerate(charts)]
    return _svg(canvas, body)


def robust(values: Iterable[float], marks: Iterable[float] = ()) -> tuple[float, float]:
    """Ends of an axis that shows the bulk of values and every mark; a few far values are drawn at its edge."""
    finite = sorted(value for value in values if math.isfinite(value))
    kept = [mark for mark in marks if math.isfinite(mark)]
    if finite:
        low, tenth, ninth = finite[0], finite[len(finite) // 10], finite[(9 * len(finite)) // 10]
        kept += [low, min(finite[-1], ninth + 1.5 * max(ninth - tenth, 0.1))]
    if not kept:
        return 0.0, 1.0
    margin = 0.06 * (max(kept) - min(kept)) or 0.1
    return min(kept) - margin, max(kept) + margin


class _Frame:
    """Where the axes stand on the canvas, and the two functions from values to pixels."""

    def __init__(
        self, canvas: Canvas, x: Axis, y: Axis, legend: list[list[tuple[str, str, str]]], levels: Sequence[Level]
    ):
        self._x, self._y, self._canvas, self._legend = x, y, canvas, legend
        self._y_ticks = y.ticks(max(2, canvas.height // 60))
        widest = max((len(text) for _, text in self._y_ticks), default=1)
        self.left = canvas.left or 36 + widest * _CHARACTER
        right_text = max((len(level.label) for level in levels), default=0)
        self.right = canvas.width - (12 + right_text * _CHARACTER if right_text else 14.0)
        self._title_height = 24.0 if canvas.title else 0.0
        self.top = 10.0 + self._title_height + _LINE_HEIGHT * len(legend)
        self.bottom = canvas.height - 42.0

    def x(self, value: float) -> float:
        return self.left + self._x.share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self._y.share(value) * (self.bottom - self.top)

    def axes(self) -> str:
        parts = []
        for value, text in self._y_ticks:
            height = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left:.1f} {height:.1f}H{self.right:.1f}"/>')
            parts.append(_text(self.left - 7, height + 4, text, "end"))
        room = (self.right - self.left) / max(1, len(self._x.categories) or 1)
        for value, text in self._x.ticks(max(2, int((self.right - self.left) / 80))):
            if self._x.categories:
                text = _shortened(text, max(3, int(room / _CHARACTER)))
            parts.append(_text(self.x(value), self.bottom + 17, text, "middle"))
        middle = (self.left + self.right) / 2
        parts.append(
            f'<path class="grid" style="stroke:var(--soft)" d="M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}"/>'
        )
        parts.append(_text(middle, self._canvas.height - 8, self._x.label, "middle"))
        across = (self.top + self.bottom) / 2
        parts.append(_upright(14, across, self._y.label))
        for index, row in enumerate(self._legend):
            place, height = self.left, 8.0 + self._title_height + _LINE_HEIGHT * index
            for label, colour, shape in row:
                parts.append(_swatch(place, height, colour, shape))
                parts.append(f'<text x="{place + 20:.1f}" y="{height + 4:.1f}">{escape(label)}</text>')
                place += 34 + len(label) * _CHARACTER
        return "".join(parts)

    def level_labels(self, levels: Sequence[Level]) -> list[str]:
        """Names at the right ends, moved apart where levels are close."""
        places: list[tuple[float, Level]] = []
        for level in sorted(levels, key=lambda item: -item.value):
            height = self.y(level.value) + 4
            if places:
                height = max(height, places[-1][0] + 13)
            places.append((height, level))
        return [
            _text(self.right + 6, height, level.label, style=f"fill:var(--{level.colour})") for height, level in places
        ]


def _svg(canvas: Canvas, body: Sequence[str]) -> str:
    size = f'viewBox="0 0 {canvas.width} {canvas.height}"'
    described = escape(canvas.describe or canvas.title, quote=True)
    head = f'<svg class="chart" {size} role="img" aria-label="{described}"'
    if not canvas.standalone:
        title = f'<text class="title" x="10" y="18">{escape(canvas.title)}</text>' if canvas.title else ""
        inner = f' width="{canvas.width}" height="{canvas.height}"'
        return f"{head}{inner}>{title}{''.join(body)}</svg>"
    title = f'<text class="title" x="12" y="20">{escape(canvas.title)}</text>' if canvas.title else ""
    page = f'<rect width="{canvas.width}" height="{canvas.height}" style="fill:var(--page)"/>'
    head += f' xmlns="http://www.w3.org/2000/svg" width="{canvas.width}" height="{canvas.height}"'
    return f"{head}><style>{STYLE}</style>{page}{title}{''.join(body)}</svg>\n"


def _line(item: Line, frame: _Frame) -> str:
    path, pen = [], "M"
    for a, b in item.points:
        if not math.isfinite(b):
            pen = "M"
            continue
        path.append(f"{pen}{frame.x(a):.1f} {frame.y(b):.1f}")
        pen = "L"
    return f'<path class="line {item.style}" style="stroke:var(--{item.colour})" d="{"".join(path)}"/>'


def _mark(shape: str, colour: str, x: float, y: float) -> str:
    style = f'style="stroke:var(--{colour});stroke-width:2;fill:none"'
    if shape == "cross":
        return f'<path {style} d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>'
    if shape == "plus":
        return f'<path {style} d="M{x - 6:.1f} {y:.1f}h12m-6 -6v12"/>'
    return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="7"/>'


def _cells(item: Cells, frame: _Frame, shades: int = 16) -> str:
    """One path a shade: runs of equal shade become one rectangle, which keeps a fine map small."""
    flat = [value for row in item.values for value in row]
    low, high = min(flat), max(flat)
    scale = (shades - 1) / (high - low) if high > low else 0.0
    paths: dict[int, list[str]] = {}
    rows, columns = len(item.values), len(item.values[0])
    # edges on whole pixels, shared by neighbours: neither gaps nor overlaps show
    edges_x = [round(frame.left + index * (frame.right - frame.left) / columns) for index in range(columns + 1)]
    edges_y = [round(frame.bottom - index * (frame.bottom - frame.top) / rows) for index in range(rows + 1)]
    for index, row in enumerate(item.values):
        levels = [round((value - low) * scale) for value in row]
        start = 0
        for column in range(1, columns + 1):
            if column == columns or levels[column] != levels[start]:
                if levels[start]:
                    run, tall = edges_x[column] - edges_x[start], edges_y[index] - edges_y[index + 1]
                    box = f"M{edges_x[start]} {edges_y[index + 1]}h{run}v{tall}h-{run}z"
                    paths.setdefault(levels[start], []).append(box)
                start = column
    drawn = []
    for shade, runs in sorted(paths.items()):
        style = f"fill:var(--accent);fill-opacity:{0.85 * shade / (shades - 1):.2f}"
        drawn.append(f'<path style="{style}" shape-rendering="crispEdges" d="{"".join(runs)}"/>')
    return "".join(drawn)


def _legend_rows(series: Sequence[Series], canvas: Canvas) -> list[list[tuple[str, str, str]]]:
    rows: list[list[tuple[str, str, str]]] = []
    used = math.inf
    for item in series:
        if isinstance(item, Cells) or not item.label:
            continue
        if isinstance(item, Marks):
            shape: str = item.shape
        elif isinstance(item, Dots):
            shape = "dots"
        else:
            shape = "dash" if "dash" in item.style else "line"
        width = 34 + len(item.label) * _CHARACTER
        if used + width > canvas.width - 60:
            rows.append([])
            used = 0.0
        rows[-1].append((item.label, item.colour, shape))
        used += width
    return rows


_SWATCHES: Final[Mapping[str, Callable[[float, float, str], str]]] = {
    "dots": lambda x, y, style: f'<circle cx="{x + 8:.1f}" cy="{y:.1f}" r="4" style="fill:var(--{style})"/>',
    "line": lambda x, y, style: f'<path class="line" style="stroke:var(--{style})" d="M{x:.1f} {y:.1f}h16"/>',
    "dash": lambda x, y, style: f'<path class="line dash" style="stroke:var(--{style})" d="M{x:.1f} {y:.1f}h16"/>',
    "ring": lambda x, y, style: _mark("ring", style, x + 8, y),
    "cross": lambda x, y, style: _mark("cross", style, x + 8, y),
    "plus": lambda x, y, style: _mark("plus", style, x + 8, y),
}


def _swatch(x: float, y: float, colour: str, shape: str) -> str:
    return _SWATCHES[shape](x, y, colour)


def _text(x: float, y: float, text: str, anchor: str = "start", *, strong: bool = False, style: str = "") -> str:
    kind = ' class="value"' if strong else ""
    look = f' style="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{look}>{escape(text)}</text>'


def _upright(x: float, y: float, text: str) -> str:
    return f'<text transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'


def _halo(x: float, y: float, text: str) -> str:
    style = "stroke:var(--page);stroke-width:3;paint-order:stroke;stroke-linejoin:round"
    return f'<text x="{x:.0f}" y="{y:.1f}" style="{style}">{escape(text)}</text>'


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(1, length - 1)] + "…"
