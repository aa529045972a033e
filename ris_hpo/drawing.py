"""One style for every figure: those beside a trial, in the report, and of ``train --plot`` and ``evaluate --plot``.

A figure is a function that draws on an empty matplotlib ``Figure``; ``as_svg`` and ``write`` call it and make SVG text
or a file. Lengths are pixels of the SVG. Colours in SVG text are CSS variables, so that a figure follows the light,
dark and print form of the page around it.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as MplPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ris_hpo.atomic import replacing
from ris_hpo.text import short_number

ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")

Draw = Callable[[Figure], None]
Level = tuple[float, str, str]
"""A horizontal reference line: value, label, colour."""

LIGHT: Final = {
    "ink": "#16212b", "soft": "#5b6976", "grid": "#e4e8ec", "page": "#ffffff", "accent": "#0b63a5", "good": "#0a7d62",
    "warn": "#b86e00", "bad": "#bf3b30", "mark": "#7a4fb5", "mute": "#a9b4be",
    "q1": "#0b4f8a", "q2": "#3f86bd", "q3": "#8fb6d3", "q4": "#c5cfd8", "q5": "#dfe3e7",
}  # fmt: skip
"""Colours by use; ``q1`` to ``q5`` are fifths of a ranking, best first."""
DARK: Final = {
    "ink": "#e8edf2", "soft": "#9fadba", "grid": "#2b3742", "page": "#161e26", "accent": "#6cb4ee", "good": "#4cc3a5",
    "warn": "#e8a94a", "bad": "#f2877d", "mark": "#b99aea", "mute": "#566370",
    "q1": "#8fd0ff", "q2": "#4f94c9", "q3": "#3a6487", "q4": "#34485a", "q5": "#2a3641",
}  # fmt: skip


def _variables(colours: Mapping[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in colours.items())


STYLE: Final = (
    f".chart{{{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{.chart{{{_variables(DARK)}}}}}\n"
    '.chart{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}\n'
    ".chart *{stroke-linejoin:round;stroke-linecap:butt}\n"
)
"""Style sheet of the SVG figures; a page that embeds them includes it once."""

_SVG: Final = "{http://www.w3.org/2000/svg}"
_DROPPED: Final = (f"{_SVG}metadata", f"{_SVG}style")
_PLACES: Final = {"d", "x", "y"}
_TOO_PRECISE: Final = re.compile(r"(\.\d)\d+")  # a tenth of a pixel is enough
_FAMILY: Final = re.compile(r" font-family: [^;\"]*;")
_NO_ROTATION: Final = re.compile(r' transform="rotate\(-0 [^)]*\)"')
_LEFT: Final = 62
CHARACTER: Final = 6.4
"""Mean width of a character in pixels."""
_LINE_HEIGHT: Final = 17
_SETTINGS: Final[dict[Any, Any]] = {  # the keys are literals to matplotlib
    "font.family": ["DejaVu Sans"], "font.size": 12, "text.color": LIGHT["soft"], "text.parse_math": False,
    "figure.facecolor": LIGHT["page"], "figure.dpi": 72,
    "axes.facecolor": "none", "axes.edgecolor": LIGHT["soft"], "axes.labelcolor": LIGHT["soft"], "axes.labelsize": 12,
    "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlecolor": LIGHT["ink"], "axes.titlelocation": "left",
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": LIGHT["grid"], "grid.linewidth": 1,
    "xtick.color": LIGHT["soft"], "ytick.color": LIGHT["soft"], "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.labelsize": 12, "ytick.labelsize": 12, "lines.linewidth": 2, "lines.solid_capstyle": "round",
    "legend.frameon": False, "legend.fontsize": 12, "legend.handlelength": 1.4, "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.2, "legend.borderpad": 0.2, "legend.labelspacing": 0.3,
    "svg.fonttype": "none", "path.simplify": True,
}  # fmt: skip


def as_svg(draw: Draw, width: int, height: int, describe: str, *, standalone: bool = False) -> str:
    """Return a figure as SVG text.

    Args:
        draw: draws on the empty figure.
        width: pixels.
        height: pixels.
        describe: what the figure shows, for readers who do not see it; different for each figure of one page, because
            the names of the figure's clip paths and markers are derived from it.
        standalone: a file of its own, with its style sheet; otherwise a part of a page that holds ``STYLE``.
    """
    salt = hashlib.sha256(f"{describe} {width}".encode()).hexdigest()
    buffer = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _themed(buffer.getvalue(), width, height, describe, standalone=standalone)


def write(draw: Draw, width: int, height: int, path: Path) -> None:
    """Write a figure as ``.png``, ``.pdf`` or ``.svg``, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    with matplotlib.rc_context(_SETTINGS), replacing(path) as partial:
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure)
        figure.savefig(partial, dpi=150)


def frames(
    figure: Figure,
    titles: Sequence[str] = ("",),
    *,
    x: str,
    y: str,
    heading: str = "",
    right: float = 16,
    columns: int | None = None,
) -> list[Axes]:
    """Return axes in rows, one for each title, with room for ticks and labels.

    Args:
        figure: the figure, empty.
        titles: of the axes.
        x: label of every x axis.
        y: label of the y axes in the first column.
        heading: of the whole figure.
        right: pixels beside each of the axes, for the names of ``levels``.
        columns: axes in a row; by default all of them.
    """
    width, height = size(figure)
    if heading:
        style: dict[str, Any] = {"color": LIGHT["ink"], "weight": "bold", "size": 13, "va": "top"}
        figure.text(12 / width, 1 - 8 / height, heading, **style)
    columns = columns or len(titles)
    cell_width = width / columns
    cell_height = (height - (24 if heading else 0)) / -(-len(titles) // columns)
    inner_width = max(40.0, cell_width - _LEFT - right)
    bottom = 46 if x else 26
    inner_height = max(40.0, cell_height - bottom - (34 if any(titles) else 14))
    found = []
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        up = height - (24 if heading else 0) - (row + 1) * cell_height + bottom
        box = ((column * cell_width + _LEFT) / width, up / height, inner_width / width, inner_height / height)
        axes = figure.add_axes(box)
        axes.set_xlabel(x)
        axes.set_ylabel(y if column == 0 else "")
        axes.set_title(shortened(title, int(inner_width / (1.2 * CHARACTER))), pad=6)
        for axis, length in ((axes.xaxis, inner_width / 70), (axes.yaxis, inner_height / 45)):
            axis.set_major_locator(MaxNLocator(max(2, min(8, int(length))), steps=[1, 2, 5, 10]))
            axis.set_major_formatter(ticks_told_apart(axis))
        found.append(axes)
    return found


def legend(figure: Figure) -> None:
    """Name the labelled series of all axes above them, in as many rows as the names need; call it after drawing."""
    named = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if not named:
        return
    width, height = size(figure)
    columns = max(1, int((width - _LEFT) / (CHARACTER * max(map(len, named)) + 36)))
    taken = _LINE_HEIGHT * -(-len(named) // columns)
    above = 28 if figure.texts else 4
    place = (_LEFT / width, 1 - above / height)
    figure.legend(
        list(named.values()), list(named), loc="upper left", bbox_to_anchor=place, ncols=columns, borderaxespad=0
    )
    kept = 1 - taken / height
    for axes in figure.axes:
        box = axes.get_position()
        axes.set_position((box.x0, box.y0 * kept, box.width, box.height * kept))


def levels(axes: Axes, lines: Sequence[Level]) -> None:
    """Draw horizontal reference lines with their names at the right, apart from each other.

    A level outside the axis is named at the edge behind which it lies; call it when the axis is final.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    low, high = axes.get_ylim()
    inside = [line for line in lines if low <= line[0] <= high]
    for value, _, colour in inside:
        axes.axhline(value, color=LIGHT[colour], linestyle=(0, (4, 3)), linewidth=1.5, zorder=1.5)
    tall = axes.get_position().height * size(figure)[1]
    previous = math.inf
    for value, name, colour in sorted(lines, reverse=True):
        place = tall * (min(high, max(low, value)) - low) / (high - low)
        place = min(place, previous - 14)
        previous = place
        text = f"{name} \N{DOWNWARDS ARROW}" if value < low else f"{name} \N{UPWARDS ARROW}" if value > high else name
        style: dict[str, Any] = {
            "color": LIGHT[colour],
            "va": "center",
            "annotation_clip": False,
            "textcoords": "offset points",
        }
        axes.annotate(text, (1, 0), xytext=(6, place), xycoords="axes fraction", **style)


def room_for(lines: Sequence[Level]) -> float:
    """Return the pixels that the names of levels take beside the axes."""
    return 24 + CHARACTER * max((len(name) for _, name, _ in lines), default=0)


def dots(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, size: float, label: str = "") -> None:
    """Draw many points as one path, a third of the text of as many markers."""
    points = [point for point in zip(x, y, strict=True) if all(map(math.isfinite, point))]
    if points:
        vertices = [point for point in points for _ in range(2)]
        patch = PathPatch(
            MplPath(vertices, [MplPath.MOVETO, MplPath.LINETO] * len(points)),
            edgecolor=LIGHT[colour],
            facecolor="none",
            linewidth=size,
            capstyle="round",
            clip_on=False,
        )
        patch.get_path().should_simplify = False  # it would drop lines of no length
        axes.add_patch(patch)
        axes.plot([], [], "o", color=LIGHT[colour], markersize=size, label=label)


def logarithmic(axes: Axes, side: str, low: float, high: float) -> None:
    """Make the ``x`` or ``y`` axis logarithmic."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    (axes.set_xscale if side == "x" else axes.set_yscale)("log")
    (axes.set_xlim if side == "x" else axes.set_ylim)(low, high)
    axis.set_major_locator(log_ticks(low, high, 1.6 if side == "x" else 2.2))  # labels are wider than they are high
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: short_number(value))


def log_ticks(low: float, high: float, few_decades: float = 1.6) -> LogLocator:
    """Return ticks at powers of ten, or at 1, 2 and 5 times them on an axis of at most ``few_decades``."""
    return LogLocator(subs=(1.0,) if math.log10(high / low) > few_decades else (1.0, 2.0, 5.0), numticks=6)


def categories(axes: Axes, names: Sequence[str]) -> None:
    """Make the x axis a list of categories at 0, 1, 2, ...; names that do not fit are shortened."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    room = axes.get_position().width * size(figure)[0] / max(1, len(names))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(range(len(names)), [shortened(name, max(3, int(room / CHARACTER))) for name in names])


def bulk(values: Iterable[float], share: float = 0.9, marks: Iterable[float] = ()) -> tuple[float, float]:
    """Return the ends of an axis that shows the lowest ``share`` of finite values and every mark.

    Values above are drawn at its upper edge: a few bad trials must not press all others into one line.
    """
    finite = sorted(value for value in values if math.isfinite(value))
    kept = [mark for mark in marks if math.isfinite(mark)]
    if finite:
        kept += [finite[0], finite[min(len(finite) - 1, math.ceil(share * len(finite)) - 1)]]
    if not kept:
        return 0.0, 1.0
    margin = 0.06 * (max(kept) - min(kept)) or 0.1
    return min(kept) - margin, max(kept) + margin


def shortened(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters, its end replaced by an ellipsis."""
    return text if len(text) <= length else text[: max(1, length - 1)] + "…"


def ticks_told_apart(axis: Axis) -> FuncFormatter:
    """Return a formatter of as many digits as neighbouring ticks of the axis need to differ."""

    def text(value: float, _: int | None) -> str:
        low, high = axis.get_view_interval()
        step = abs(high - low) / 10 or 1.0
        digits = math.floor(math.log10(max(abs(value), step))) - math.floor(math.log10(step)) + 1
        return short_number(0.0 if abs(value) < 1e-6 * step else value, max(3, digits))

    return FuncFormatter(text)


def size(figure: Figure) -> tuple[float, float]:
    """Return width and height of a figure in pixels."""
    width, height = figure.get_size_inches()
    return 72 * float(width), 72 * float(height)


def _themed(text: str, width: int, height: int, describe: str, *, standalone: bool) -> str:
    """Return matplotlib's SVG with colours and font left to ``STYLE``, and without what nobody sees."""
    root = ElementTree.fromstring(text)
    for parent in root.iter():
        parent.text = None if parent.text is None or parent.text.isspace() else parent.text
        parent.tail = None
        if parent.tag == f"{_SVG}g":
            parent.attrib.pop("id", None)
        for place in _PLACES & parent.attrib.keys():
            parent.attrib[place] = _TOO_PRECISE.sub(r"\1", parent.attrib[place])
        for child in list(parent):
            if child.tag in _DROPPED or (child.tag == f"{_SVG}g" and not len(child)):
                parent.remove(child)
    root.attrib = {"class": "chart", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": describe}
    root.attrib |= {"width": str(width), "height": str(height)}
    body = ElementTree.tostring(root, encoding="unicode")
    body = _FAMILY.sub("", _NO_ROTATION.sub("", body))
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    return body.replace(">", f"><style>{STYLE}</style>", 1) + "\n" if standalone else body
