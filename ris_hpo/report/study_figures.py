"""Figures of a study, as SVG text: of the report's page and of the study's page in the dashboard.

Figures that stretch over a page come in a wide and a narrow form, of which the page's style sheet shows one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ris_hpo import drawing
from ris_hpo.drawing import LIGHT
from ris_hpo.report.collect import Report
from ris_hpo.text import short_number

WIDE: Final = 960
NARROW: Final = 400
MAX_CURVES: Final = 120
MAX_COORDINATES: Final = 300
MAX_AXES: Final = 8
MAX_SLICES: Final = 12
MAX_POINTS: Final = 60  # of one curve
FIFTHS: Final = ("q1", "q2", "q3", "q4", "q5")
"""Colours of fifths of a ranking, best first."""

_CHARACTER: Final = 6.6
"""Mean width of a bold character in pixels."""
_LONG_SPAN: Final = 20
"""Steps that span more than this ratio are drawn on a logarithmic axis."""


def report_figures(report: Report) -> dict[str, Any]:
    """Return every figure of the report's page: an SVG, or a list of them."""
    drawn: dict[str, Any] = {"slices": slices(report)}
    if marks(report):
        drawn["ruler"] = _both(lambda figure: ruler(figure, report), 110, 150, "Scores on one scale")
    if report.trials:
        drawn["history"] = _both(lambda figure: history(figure, report), 330, 300, "Score of every trial")
    if any(trial.curve for trial in report.trials):
        drawn["curves"] = _both(lambda figure: curves(figure, report), 360, 320, "Learning curves")
    if len(report.comparison.values) >= 3 and len(report.space) >= 2:
        describe = "Parallel coordinates of the parameters and the score"
        drawn["parallel"] = drawing.as_svg(lambda figure: parallel(figure, report), 1080, 400, describe)
    if report.winner is not None:
        height = 70 + 40 * len(report.winner["candidates"])
        describe = "Differences from the base configuration with their intervals"
        drawn["winner"] = _both(lambda figure: winner(figure, report), height, height, describe)
    return drawn


def cost(report: Report) -> str:
    """Draw the score of completed trials against what they cost, as a file of its own."""
    trials = [trial for trial in report.trials if trial.ranks]
    unit = "GPU-seconds" if any(trial.gpu_seconds for trial in trials) else "core-seconds"
    points = [(trial.gpu_seconds or trial.core_seconds, trial.value or 0.0, trial.number) for trial in trials]
    return _scatter(report, points, f"Score against cost ({unit})", unit, report.metric)


def paths(report: Report) -> str:
    """Draw the pipeline's score of completed trials against the network's, as a file of its own."""
    points = [
        (trial.scores.get("k_loc") or trial.value or 0.0, trial.pipeline["k_loc"] or 0.0, trial.number)
        for trial in report.trials
        if trial.ranks and trial.pipeline.get("k_loc") is not None
    ]
    return _scatter(report, points, "Pipeline against network", "k_loc of the network", "k_loc of the pipeline")


def marks(report: Report) -> list[tuple[str, float, str]]:
    """Return the scores worth naming beside a study's: (name, score, colour)."""
    found: list[tuple[str, float | None, str]] = [
        ("floor", report.floor, "mark"),
        ("ml", report.reference.get("ml", {}).get("k_loc"), "warn"),
    ]
    if report.base is not None:
        found.append(("base", report.base.value, "soft"))
    if report.best is not None:
        found.append((f"trial {report.best.number}", report.best.value, "accent"))
        if report.objective == "network":
            found.append(("its pipeline", report.best.pipeline.get("k_loc"), "good"))
    return [(name, value, colour) for name, value, colour in found if value is not None]


def levels(report: Report) -> list[drawing.Level]:
    """Return the reference lines of a figure over the score: floor, ml and base."""
    named = ("floor", "ml", "base")
    return [(value, f"{name} {value:.2f}", colour) for name, value, colour in marks(report) if name in named]


def ruler(figure: Figure, report: Report) -> None:
    """Draw named scores on one scale, better to the right."""
    found = marks(report)
    values = [value for _, value, _ in found]
    lower = report.sign > 0
    if report.program is None:
        low, high = min(-0.2, *values), max(values) + 0.4
    else:
        margin = 0.1 * (max(values) - min(values)) or 0.1 * max(abs(values[0]), 1e-3)
        low, high = min(values) - margin, max(values) + margin
    axes = _scale(figure, f"{report.metric}, better →", low, high)
    if lower:
        axes.invert_xaxis()
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    axes.tick_params("x", pad=9)
    width, height = drawing.size(figure)
    box = axes.get_position()
    long, tall = box.width * width, box.height * height
    ends: list[float] = []  # right end of the last name on each row
    for name, value, colour in sorted(found, key=lambda mark: -report.sign * mark[1]):
        text = f"{name} {value:.2f}"
        half = len(text) * _CHARACTER / 2 + 4
        place = long * (high - value if lower else value - low) / (high - low)
        middle = min(long - half, max(half, place))
        row = next((index for index, end in enumerate(ends) if middle - half > end), len(ends))
        ends[row:] = [middle + half, *ends[row + 1 :]]
        up = (16 + 17 * row) / tall
        axes.plot([value, value], [0, up - 5 / tall], color=LIGHT[colour], linewidth=1)
        axes.plot([value], [0], "o", color=LIGHT[colour], markersize=10, clip_on=False)
        style: dict[str, Any] = {"color": LIGHT[colour], "weight": "bold", "ha": "center"}
        behind: dict[str, Any] = {"facecolor": LIGHT["page"], "linewidth": 0, "pad": 0.5}
        share = (high - low) * middle / long
        axes.text(high - share if lower else low + share, up, text, bbox=behind, **style)


def _short(report: Report) -> str:
    """What trials are called that were not trained to the end."""
    return "paused" if report.pruner == "promotion" else "pruned"


def history(figure: Figure, report: Report) -> None:
    """Draw the score of every trial in the order they were started, and the best so far."""
    lines = levels(report)
    complete = sorted((t.number, t.value) for t in report.trials if t.ranks and t.value is not None)
    short = [t for t in report.trials if t.state in ("pruned", "paused")]
    pruned = [(t.number, t.last_value) for t in short if t.last_value is not None]
    failed = [t.number for t in report.trials if t.state == "fail" or t.diverged is not None]
    (axes,) = drawing.frames(figure, x="trial", y=report.metric, right=drawing.room_for(lines))
    low, high = _bulk(report, [value for _, value in complete + pruned])
    worst, better = (high, min) if report.sign > 0 else (low, max)
    last = max((trial.number for trial in report.trials), default=0)
    axes.set_xlim(-0.5, last + 0.5)
    axes.set_ylim(low, high)
    size = 4 if len(report.trials) > 300 else 6
    for points, colour, name in (
        (pruned, "mute", f"{_short(report)}, at its last report"),
        ([(number, worst) for number in failed], "bad", "failed or diverged"),
        (complete, "accent", "complete"),
    ):
        drawing.dots(axes, [x for x, _ in points], [better(y, worst) for _, y in points], colour, size, name)
    if complete:
        best = [better(value for _, value in complete[: index + 1]) for index in range(len(complete))]
        numbers = [number for number, _ in complete]
        axes.step([*numbers, last], [*best, best[-1]], where="post", color=LIGHT["good"], label="best so far")
    drawing.legend(figure)
    drawing.levels(axes, lines)


def curves(figure: Figure, report: Report) -> None:
    """Draw scores against steps, on an axis over the scores that trials end at, where they can be told apart."""
    lines = levels(report)
    order = report.ranked(trial for trial in report.trials if trial.curve)
    if len(order) > MAX_CURVES:  # the better half of them in full, the others thinned evenly
        rest = order[MAX_CURVES // 2 :]
        order = order[: MAX_CURVES // 2] + rest[:: -(-len(rest) // (MAX_CURVES // 2))]
    best = report.best
    low, high = curve_range(report)
    steps_axis = "scenes seen" if report.program is None else report.step_unit
    (axes,) = drawing.frames(figure, x=steps_axis, y=report.metric, right=drawing.room_for(lines))
    for state, colour in ((_short(report), "mute"), ("complete", "accent")):
        is_short = colour == "mute"
        chosen = [trial for trial in order if (trial.state in ("pruned", "paused")) == is_short and trial is not best]
        paths = [_thinned(trial.curve) for trial in chosen]
        if paths:
            axes.add_collection(LineCollection(paths, colors=LIGHT[colour], linewidths=1, alpha=0.7, label=state))
            ends = [path[-1] for path in paths if low <= path[-1][1] <= high]
            drawing.dots(axes, [x for x, _ in ends], [y for _, y in ends], colour, 3)
    if best is not None and best.curve:
        x, y = zip(*_thinned(best.curve), strict=True)
        axes.plot(x, y, color=LIGHT["good"], linewidth=2.5, label=f"trial {best.number}")
    steps = [step for trial in order for step, _ in trial.curve]
    if max(steps) > _LONG_SPAN * min(steps):
        drawing.logarithmic(axes, "x", min(steps) / 1.1, max(steps) * 1.1)
    else:
        axes.set_xlim(0, 1.01 * max(steps))
    axes.set_ylim(low, high)
    drawing.legend(figure)
    drawing.levels(axes, lines)


def curve_range(report: Report) -> tuple[float, float]:
    """Return the ends of the axis of learning curves: from the best score to what three of four trials end below."""
    ends = [trial.last_value for trial in report.trials if trial.last_value is not None]
    best = [report.sign * value for trial in report.trials for _, value in trial.curve]
    return _bulk(report, ends, 0.75, [report.sign * min(best)] if best else [])


def parallel(figure: Figure, report: Report) -> None:
    """Draw one polyline a compared trial over the most important parameters and its score, best fifth on top."""
    order, values, groups = report.compared(), report.comparison.values, _fifths(report)
    if len(order) > MAX_COORDINATES:  # the better half of them in full, the others thinned evenly
        half = MAX_COORDINATES // 2
        order = order[:half] + order[half :: -(-(len(order) - half) // half)]
    names = report.by_importance()[:MAX_AXES]
    sides = [*(_Side.of(report.space[name]) for name in names), _Side(*_bulk(report, values.values()))]
    axes = figure.add_axes((0.045, 0.06, 0.91, 0.8))
    axes.axis("off")
    axes.set_xlim(0, len(names))
    axes.set_ylim(0, 1)
    for trial in reversed(order):
        row = [trial.params.get(name) for name in names] + [values[trial.number]]
        places = [
            math.nan if value is None else side.share(side.position(value))
            for side, value in zip(sides, row, strict=True)
        ]
        group = groups[trial.number]
        axes.plot(places, color=LIGHT[group], linewidth=2 if group == "q1" else 1, clip_on=False)
    room = max(6, int(0.91 * drawing.size(figure)[0] / len(names) / drawing.CHARACTER) - 1)
    for index, (name, side) in enumerate(zip([*names, report.metric], sides, strict=True)):
        axes.plot([index, index], [0, 1], color=LIGHT["soft"], linewidth=1, clip_on=False)
        first, last = index == 0, index == len(names)
        style: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}
        align = "left" if first else "right" if last else "center"
        up = (-20 if first else 20 if last else 0, 8 + 15 * (index % 2 == 0))  # so that neighbours do not overlap
        axes.annotate(drawing.shortened(name, 2 * room), (index, 1), up, ha=align, color=LIGHT["ink"], **style)
        behind: dict[str, Any] = {"facecolor": LIGHT["page"], "alpha": 0.75, "linewidth": 0, "pad": 0.5}
        for position, text in side.ticks():
            label = drawing.shortened(text, room)
            axes.annotate(label, (index, side.share(position)), (5, 0), va="center", bbox=behind, **style)


def slices(report: Report) -> list[str]:
    """Draw the score of the compared trials against each of the most important parameters, one small figure each."""
    values, groups = report.comparison.values, _fifths(report)
    ends = _bulk(report, values.values())
    describe = f"{report.metric}, "
    names = report.by_importance()[:MAX_SLICES] if values else []
    return [
        drawing.as_svg(partial(_slice, report=report, name=name, groups=groups, ends=ends), 360, 230, describe + name)
        for name in names
    ]


def _slice(figure: Figure, report: Report, name: str, groups: Mapping[int, str], ends: tuple[float, float]) -> None:
    side = _Side.of(report.space[name])
    (axes,) = drawing.frames(figure, [name], x="", y=report.metric)
    if side.categories:
        drawing.categories(axes, side.categories)
    elif side.log:
        drawing.logarithmic(axes, "x", side.low, side.high)
    else:
        axes.set_xlim(side.low, side.high)
    axes.set_ylim(*ends)
    for group in FIFTHS[::-1]:
        chosen = [trial for trial in report.compared() if groups[trial.number] == group and name in trial.params]
        # trials of one category stand side by side; their order is that of their numbers, and means nothing
        aside = [0.5 * ((trial.number * 0.618034) % 1 - 0.5) if side.categories else 0.0 for trial in chosen]
        x = [side.position(trial.params[name]) + shift for trial, shift in zip(chosen, aside, strict=True)]
        y = [min(max(report.comparison.values[trial.number], ends[0]), ends[1]) for trial in chosen]
        drawing.dots(axes, x, y, group, 5)


def winner(figure: Figure, report: Report) -> None:
    """Draw the difference of every confirmed candidate from the base configuration, with its interval."""
    assert report.winner is not None
    rows = report.winner["candidates"]
    wide = drawing.size(figure)[0] > 500
    score = "pipeline k_loc" if report.program is None and wide else report.metric
    label = f"{score} minus the base configuration's" if wide else f"{score} minus base"
    known = [row[end] for row in rows for end in ("low", "difference", "high") if row[end] is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    margin = 0.08 * (high - low) or 0.1
    axes = _scale(figure, label, low - margin, high + margin, left=14 + _CHARACTER * max(len(r["name"]) for r in rows))
    axes.grid(visible=True, axis="x")
    axes.axvline(0, color=LIGHT["ink"], linewidth=1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    for place, row in enumerate(rows):
        ends = [
            end if row[side] is None else row[side] for side, end in zip(("low", "high"), axes.get_xlim(), strict=True)
        ]
        side = report.sign if ends[0] > 0 else -report.sign if ends[1] < 0 else 0
        colour = LIGHT[{-1: "good", 0: "soft", 1: "bad"}[side]]
        axes.plot(ends, [place, place], color=colour)
        axes.plot([row["difference"]], [place], "o", color=colour, markersize=9)


def _bulk(
    report: Report, values: Iterable[float], share: float = 0.9, marks: Iterable[float] = ()
) -> tuple[float, float]:
    """Return the ends of an axis of scores, from the better side; see ``drawing.bulk``."""
    sign = report.sign
    low, high = drawing.bulk((sign * value for value in values), share, (sign * mark for mark in marks))
    return (low, high) if sign > 0 else (-high, -low)


def _both(draw: Callable[[Figure], None], wide: int, narrow: int, describe: str) -> list[str]:
    forms = ((WIDE, wide), (NARROW, narrow))
    return [drawing.as_svg(draw, width, height, describe) for width, height in forms]


def _scale(figure: Figure, label: str, low: float, high: float, left: float = 16) -> Axes:
    """Return axes of one horizontal scale."""
    width, height = drawing.size(figure)
    axes = figure.add_axes((left / width, 46 / height, (width - left - 16) / width, (height - 54) / height))
    axes.grid(visible=False)
    axes.set_xlim(low, high)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(max(3, min(9, int(width // 100))), steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(drawing.ticks_told_apart(axes.xaxis))
    return axes


def _scatter(report: Report, points: Sequence[tuple[float, float, int]], heading: str, x: str, y: str) -> str:
    """Draw trials as points, the five best named, beside floor and ml."""
    lines = [line for line in levels(report) if not line[1].startswith("base")]

    def draw(figure: Figure) -> None:
        (axes,) = drawing.frames(figure, x=x, y=y, heading=heading, right=drawing.room_for(lines))
        across, up, _ = zip(*points, strict=True)
        axes.set_xlim(*drawing.bulk(across, 1.0))
        axes.set_ylim(*drawing.bulk(up, 1.0))
        drawing.dots(axes, across, up, "accent", 6)
        for a, b, number in sorted(points, key=lambda point: report.sign * point[1])[:5]:
            axes.annotate(f"trial {number}", (a, b), xytext=(6, 4), textcoords="offset points", size=11)
        drawing.levels(axes, lines)

    return drawing.as_svg(draw, 720, 360, heading, standalone=True)


def _thinned(curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    kept = list(curve[:: -(-len(curve) // MAX_POINTS)])
    if kept[-1] != curve[-1]:
        kept.append(curve[-1])
    return [(float(scenes), value) for scenes, value in kept]


def _fifths(report: Report) -> dict[int, str]:
    """Return the fifth of the ranking of each compared trial, by its number."""
    order = report.compared()
    return {trial.number: FIFTHS[5 * index // len(order)] for index, trial in enumerate(order)}


@dataclass(frozen=True)
class _Side:
    """The axis of one dimension of the space."""

    low: float
    high: float
    log: bool = False
    categories: tuple[str, ...] = ()

    @classmethod
    def of(cls, dimension: Mapping[str, Any]) -> _Side:
        if dimension["kind"] == "categorical":
            names = tuple(str(choice) for choice in dimension["choices"])
            return cls(-0.5, len(names) - 0.5, categories=names)
        low, high = float(dimension["low"]), float(dimension["high"])
        if dimension["log"]:
            margin = max(high / low, 1.5) ** 0.03
            return cls(low / margin, high * margin, log=True)
        margin = 0.03 * (high - low) or 0.1 * max(abs(high), 1.0)
        return cls(low - margin, high + margin)

    def position(self, value: Any) -> float:
        """Place of a value on the axis: itself, or the number of its category."""
        return float(self.categories.index(str(value)) if self.categories else value)

    def share(self, position: float) -> float:
        """Place of a position, 0 at the low end and 1 at the high end; positions outside go to the end."""
        if self.log:
            share = math.log(max(position, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (position - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self) -> list[tuple[float, str]]:
        """Round positions on the axis with their text."""
        if self.categories:
            return [(float(index), name) for index, name in enumerate(self.categories)]
        locator = drawing.log_ticks(self.low, self.high) if self.log else MaxNLocator(4, steps=[1, 2, 5, 10])
        found = locator.tick_values(self.low, self.high)
        return [(float(value), short_number(float(value))) for value in found if self.low <= value <= self.high]
