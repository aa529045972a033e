"""The report of a study: everything a reader needs in one HTML file, and the same figures as JSON.

The page holds its figures as SVG and no script at all, so it opens anywhere, prints as it looks, and stays at a few
hundred kilobytes.
"""

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

from ris_hpo import drawing
from ris_hpo.atomic import write_text
from ris_hpo.report.collect import Report, Trial, choices, collect
from ris_hpo.report.study_figures import report_figures
from ris_hpo.text import duration, finite

TOP: Final = 10
"""Best trials in the table of scores."""
LEAST_SHOWN: Final = 0.01
"""Least importance that gets a bar."""
COMPARED: Final = 5
"""Best trials whose parameters are compared with the base's."""
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
        figure=_figure,
        duration=duration,
        count="{:,}".format,
        percent="{:.0%}".format,
        choices=choices,
        setting=_setting,
        svg=Markup,  # drawing escapes what a figure says
    )
    top = report.ranked(trial for trial in report.trials if trial.ranks)[:TOP]
    others = [trial for trial in top if trial.params != report.base_params][:COMPARED]
    page: str = templates.get_template("report.html.j2").render(
        report=report,
        style=Markup(drawing.STYLE),
        figures=report_figures(report),
        headline=headline(report),
        scores=_score_table(report),
        comparison=comparison_text(report),
        top=top,
        others=others,
        changes=_changes(report, others),
        weights=[(name, report.importances[name]) for name in report.by_importance() if name in report.importances],
        least=LEAST_SHOWN,
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
        ended = sum(report.counts.get(state, 0) for state in ("complete", "pruned", "fail", "invalidated"))
        paused = f", {report.counts['paused']} paused" if report.counts.get("paused") else ""
        return [f"No trial has completed yet ({ended} ended{paused})."]
    text = f"Trial {best.number} scores {report.metric} {best.value:.3f}"
    if report.program is None:
        text += f" on the {report.objective} path"
    if best.floor is not None and best.efficiency is not None:
        text += (
            f"; the floor on the same scenes is {best.floor:.3f}, so it covers {best.efficiency:.0%} of the way there"
            " from the worst score"
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


def comparison_text(report: Report) -> str:
    """Say which trials and scores the figures of "What mattered" use."""
    compared = report.comparison
    kinds = ("complete", "pruned", "paused", "diverged")
    listed = ", ".join(f"{count} {kind}" for kind in kinds if (count := getattr(compared, kind)))
    if compared.step is None:
        return f"From the final scores of {len(compared.values)} trials ({listed}); none reported a score on its way."
    place = f"{compared.step:,} scenes" if report.program is None else f"step {compared.step:,}"
    text = f"From the scores of {len(compared.values)} trials ({listed}) at {place}, "
    if not compared.left_out:
        return text + "the last step that all of them reached."
    return text + f"the last step that most of them reached; {compared.left_out} have no score there."


def _changes(report: Report, top: Sequence[Trial]) -> list[tuple[str, str, list[str]]]:
    """Return (parameter, base value, values of the top trials) where one of these differs; "=" for the base's value."""
    base, rows = report.base_params, []
    for name in report.by_importance():
        values = [trial.params.get(name) for trial in top]
        own = base.get(name)
        if any(value is not None and value != own for value in values):
            cells = ["=" if value == own and value is not None else _setting(value) for value in values]
            rows.append((name, _setting(own), cells))
    return rows


def _setting(value: Any) -> str:
    """A parameter's value in a table; a dash where the trial does not have it."""
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _score_table(report: Report) -> dict[str, Any]:
    if report.program is not None:
        return _own_scores(report)
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


def _own_scores(report: Report) -> dict[str, Any]:
    """The score and the last metrics of the base and the best trial of a study of one's own program."""
    shown: dict[str, Trial] = {}
    if report.base is not None:
        shown["base"] = report.base
    if report.best is not None:
        shown[f"trial {report.best.number}"] = report.best
    better = "lower" if report.direction == "minimize" else "higher"
    rows = [(report.metric, better, [_setting(trial.value) for trial in shown.values()])]
    for name in dict.fromkeys(name for trial in shown.values() for name in trial.metrics):
        rows.append((name, "", [_setting(trial.metrics.get(name)) for trial in shown.values()]))
    return {"columns": list(shown), "rows": rows}


def _figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
