"""The report as one HTML page, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import optuna
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ris_hpo.atomic import write_text
from ris_hpo.report import charts
from ris_hpo.report.charts import Axis, Canvas, Dots, Level, Line
from ris_hpo.report.collect import Report, Trial, choices, collect, ranks
from ris_hpo.text import duration, finite

MAX_CURVES: Final = 120
MAX_COORDINATES: Final = 300
MAX_AXES: Final = 8
MAX_SLICES: Final = 12
TOP: Final = 10
SCORE_ROWS: Final = (
    ("k_loc", "k_loc", 3, "lower"),
    ("k_acc", "right number of sources", 3, "higher"),
    ("success", "success", 3, "higher"),
    ("f1", "F1 at 5°, 5°, 1 m", 3, "higher"),
    ("rmse_azimuth_deg", "RMSE azimuth, °", 2, "lower"),
    ("rmse_elevation_deg", "RMSE elevation, °", 2, "lower"),
    ("rmse_range_m", "RMSE range, m", 2, "lower"),
    ("gospa_m", "GOSPA, m", 2, "lower"),
)


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON types; a number that is not finite becomes None."""
    tree: dict[str, Any] = finite(dataclasses.asdict(report))
    return tree


def as_html(report: Report) -> str:
    """The report as one page without script, network access or further files."""
    templates = Environment(
        loader=PackageLoader("ris_hpo.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(
        figure=_figure, duration=duration, count="{:,}".format, percent="{:.0%}".format, choices=choices
    )
    page: str = templates.get_template("report.html.j2").render(
        report=report,
        style=Markup(charts.STYLE),
        charts=_charts(report),
        headline=headline(report),
        scores=_score_table(report),
        top=sorted((trial for trial in report.trials if ranks(trial)), key=_by_value)[:TOP],
        varied=_varied(report),
    )
    return page


def write_report(study: optuna.Study, out: Path) -> Report:
    """Write ``out`` (``.json`` for JSON, HTML otherwise), whole or not at all.

    Raises:
        OutputError: the folder is missing or not writable.
    """
    report = collect(study)
    text = json.dumps(as_json(report), indent=2) + "\n" if out.suffix == ".json" else as_html(report)
    write_text(out, text)
    return report


def headline(report: Report) -> list[str]:
    """What came out, in sentences."""
    best, base = report.best, report.base
    if best is None or best.value is None:
        ended = sum(report.counts.get(state, 0) for state in ("complete", "pruned", "fail"))
        return [f"No trial has completed yet ({ended} ended)."]
    text = f"Trial {best.number} scores k_loc {best.value:.3f} on the {report.objective} path"
    if best.floor is not None and best.efficiency is not None:
        text += (
            f"; the floor on the same scenes is {best.floor:.3f}, so it covers {best.efficiency:.0%} of the way there"
        )
    sentences = [text + "."]
    if base is not None and base.value is not None and base.number != best.number:
        gain = base.value - best.value
        word = "below" if gain > 0 else "above"
        sentences.append(f"That is {abs(gain):.3f} {word} the base configuration's {base.value:.3f}.")
    elif base is not None and base.number == best.number:
        sentences.append("That is the base configuration itself: the search has not improved on it.")
    pipeline, ml = best.pipeline.get("k_loc"), report.reference.get("ml", {}).get("k_loc")
    if pipeline is not None:
        text = f"With refinement and evidence (the pipeline, as localize runs it) it scores {pipeline:.3f}"
        sentences.append(text + (f", beside {ml:.3f} of the maximum-likelihood reference." if ml is not None else "."))
    if report.winner is None:
        sentences.append("The lead has not been confirmed on fresh seeds yet; ris-hpo best does that.")
    else:
        sentences.append(str(report.winner["verdict"]))
    return sentences


def _by_value(trial: Trial) -> tuple[float, int]:
    return (math.inf if trial.value is None else trial.value, trial.number)


def _varied(report: Report) -> list[str]:
    """Parameters in the order of their importance, then as searched."""
    order = sorted(report.importances, key=lambda name: -report.importances[name])
    return order + [name for name in report.space if name not in report.importances]


def _score_table(report: Report) -> dict[str, Any]:
    columns: list[tuple[str, Mapping[str, float | None]]] = []
    if report.base is not None:
        columns.append(("base, network", report.base.scores))
    if report.best is not None:
        columns.append((f"trial {report.best.number}, network", report.best.scores))
        if report.best.pipeline:
            columns.append((f"trial {report.best.number}, pipeline", report.best.pipeline))
    for key, title in (("ml", "ml reference"), ("floor", "floor")):
        if key in report.reference:
            columns.append((title, report.reference[key]))
        elif key == "floor" and report.floor is not None:
            columns.append((title, {"k_loc": report.floor}))
    rows = []
    for key, title, digits, better in SCORE_ROWS:
        cells = [None if values.get(key) is None else f"{values[key]:.{digits}f}" for _, values in columns]
        if any(cell is not None for cell in cells):
            rows.append((title, better, cells))
    return {"columns": [title for title, _ in columns], "rows": rows}


def _charts(report: Report) -> dict[str, Any]:
    """Every chart of the page; those that stretch come in a wide and a narrow form, and CSS shows one."""
    marks = _marks(report)
    drawn: dict[str, Any] = {}
    if marks:
        values = [value for _, value, _ in marks]
        axis = Axis("k_loc, better", min(-0.2, *values), max(values) + 0.4)
        drawn["ruler"] = _both(lambda canvas: charts.ruler(marks, axis, canvas), 118, 150)
    drawn["history"] = _both(lambda canvas: _history(report, canvas), 330, 300)
    if any(trial.curve for trial in report.trials):
        drawn["curves"] = _both(lambda canvas: _curves(report, canvas), 330, 300)
    if len([trial for trial in report.trials if ranks(trial)]) >= 3 and len(report.space) >= 2:
        drawn["parallel"] = _parallel(report)
    drawn["slices"] = _slices(report)
    if report.winner is not None:
        drawn["winner"] = _both(lambda canvas: _winner(report, canvas), 0, 0)
    return {name: _safe(value) for name, value in drawn.items()}


def _safe(value: Any) -> Any:
    """Chart text escapes what it holds, so the template may take it as it is."""
    if isinstance(value, str):
        return Markup(value)
    return [_safe(item) for item in value]


def _both(draw: Any, wide: int, narrow: int) -> list[str]:
    return [draw(Canvas(960, wide)), draw(Canvas(400, narrow))]


def _marks(report: Report) -> list[tuple[str, float, str]]:
    marks: list[tuple[str, float | None, str]] = [
        ("floor", report.floor, "mark"),
        ("ml", report.reference.get("ml", {}).get("k_loc"), "warn"),
    ]
    if report.base is not None:
        marks.append(("base", report.base.value, "soft"))
    if report.best is not None:
        marks.append((f"trial {report.best.number}", report.best.value, "accent"))
        if report.objective == "network":
            marks.append(("its pipeline", report.best.pipeline.get("k_loc"), "good"))
    return [(name, value, colour) for name, value, colour in marks if value is not None]


def _levels(report: Report) -> list[Level]:
    named = ("floor", "ml", "base")
    return [Level(value, f"{name} {value:.2f}", colour) for name, value, colour in _marks(report) if name in named]


def _history(report: Report, canvas: Canvas) -> str:
    levels = _levels(report)
    complete = [(t.number, t.value) for t in report.trials if t.value is not None and t.diverged is None]
    pruned = [(t.number, t.last_value) for t in report.trials if t.state == "pruned" and t.last_value is not None]
    failed = [t.number for t in report.trials if t.state == "fail" or t.diverged is not None]
    low, high = charts.robust([value for _, value in complete + pruned], [level.value for level in levels])
    steps: list[charts.Point] = []
    lowest = math.inf
    for number, value in sorted(complete):
        if steps:
            steps.append((number, lowest))
        lowest = min(lowest, value)
        steps.append((number, lowest))
    last = max((trial.number for trial in report.trials), default=0)
    if steps:
        steps.append((last, lowest))
    many = len(report.trials) > 300
    series: list[charts.Series] = [
        Dots(pruned, "mute", "pruned, at its last report", 2 if many else 3),
        Dots([(number, high) for number in failed], "bad", "failed or diverged", 2 if many else 3),
        Dots(complete, "accent", "complete", 2 if many else 3.5),
        Line(steps, "good", "best so far"),
    ]
    shown = [item for item in series if not isinstance(item, Dots) or item.points]
    return charts.plot(shown, Axis("trial", -0.5, last + 0.5), Axis("k_loc", low, high), canvas, levels)


def _curves(report: Report, canvas: Canvas) -> str:
    levels = _levels(report)
    order = sorted((trial for trial in report.trials if trial.curve), key=_by_value)
    if len(order) > MAX_CURVES:  # the best in full, the others thinned evenly
        rest = order[MAX_CURVES // 2 :]
        order = order[: MAX_CURVES // 2] + rest[:: -(-len(rest) // (MAX_CURVES // 2))]
    best = report.best.number if report.best else None
    values = [value for trial in order for _, value in trial.curve]
    low, high = charts.robust(values, [level.value for level in levels])
    lines: list[charts.Series] = [
        Line(_thinned(trial.curve), "mute" if trial.state == "pruned" else "accent", "", "thin")
        for trial in reversed(order)
        if trial.number != best
    ]
    if report.best is not None and report.best.curve:
        lines.append(Line(_thinned(report.best.curve), "good", f"trial {report.best.number}"))
    lines += [Line((), "accent", "complete"), Line((), "mute", "pruned")]
    end = max((step for trial in order for step, _ in trial.curve), default=1)
    return charts.plot(lines, Axis("scenes seen", 0, end * 1.01), Axis("k_loc", low, high), canvas, levels)


def _thinned(curve: Sequence[tuple[int, float]], most: int = 60) -> list[charts.Point]:
    step = -(-len(curve) // most)
    kept = list(curve[::step])
    if curve and kept[-1] != curve[-1]:
        kept.append(curve[-1])
    return [(float(scenes), value) for scenes, value in kept]


def _axis(report: Report, name: str) -> Axis:
    dimension = report.space[name]
    if dimension["kind"] == "categorical":
        return Axis.of(name, [str(choice) for choice in dimension["choices"]])
    return Axis.over(name, [dimension["low"], dimension["high"]], log=dimension["log"], pad=0.03)


def _place(report: Report, name: str, value: Any) -> float:
    dimension = report.space[name]
    if dimension["kind"] == "categorical":
        return float([str(choice) for choice in dimension["choices"]].index(str(value)))
    return float(value)


def _classes(trials: Sequence[Trial]) -> list[str]:
    """Fifths of the ranking, ``q1`` best, for trials in ranked order."""
    return [f"q{min(5, 1 + 5 * index // max(1, len(trials)))}" for index in range(len(trials))]


def _parallel(report: Report) -> str:
    order = sorted((trial for trial in report.trials if ranks(trial)), key=_by_value)
    colours = _classes(order)
    chosen = list(range(len(order)))
    if len(chosen) > MAX_COORDINATES:
        half = MAX_COORDINATES // 2
        chosen = chosen[:half] + chosen[half :: -(-(len(chosen) - half) // half)]
    searched = _varied(report)[:MAX_AXES]
    worst = max(order[index].value or 0.0 for index in chosen)
    values = Axis.over("k_loc", [order[0].value or 0.0, worst])
    axes = [_axis(report, name) for name in searched] + [values]
    rows: list[list[float | None]] = []
    for index in reversed(chosen):
        trial = order[index]
        row: list[float | None] = [
            _place(report, name, trial.params[name]) if name in trial.params else None for name in searched
        ]
        rows.append([*row, trial.value])
    return charts.parallel(axes, rows, [colours[index] for index in reversed(chosen)], Canvas(1080, 400))


def _slices(report: Report) -> list[str]:
    order = sorted((trial for trial in report.trials if ranks(trial)), key=_by_value)
    if not order:
        return []
    low, high = charts.robust([trial.value or 0.0 for trial in order])
    classes = _classes(order)
    drawn = []
    for name in _varied(report)[:MAX_SLICES]:
        groups: dict[str, list[charts.Point]] = {}
        wobble = 0.5 if report.space[name]["kind"] == "categorical" else 0.0
        for trial, group in zip(order, classes, strict=True):
            if name in trial.params and trial.value is not None:
                shift = wobble * ((trial.number * 0.618034) % 1 - 0.5)
                groups.setdefault(group, []).append((_place(report, name, trial.params[name]) + shift, trial.value))
        dots = [Dots(points, group, "", 2.5) for group, points in sorted(groups.items(), reverse=True)]
        axis = dataclasses.replace(_axis(report, name), label="")
        drawn.append(charts.plot(dots, axis, Axis("k_loc", low, high), Canvas(360, 230, title=name)))
    return drawn


def _winner(report: Report, canvas: Canvas) -> str:
    assert report.winner is not None
    rows = []
    for candidate in report.winner["candidates"]:
        low, high = candidate["low"], candidate["high"]
        colour = "good" if high is not None and high < 0 else "bad" if low is not None and low > 0 else "soft"
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        rows.append((candidate["name"], ends[0], candidate["difference"], ends[1], colour))
    sized = dataclasses.replace(canvas, height=70 + 40 * len(rows))
    label = "pipeline k_loc minus the base configuration's" if canvas.width > 500 else "k_loc minus base"
    return charts.intervals(rows, label, sized)


def _figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
