"""A study's own page in the dashboard: a note that says what it is and where it stands, and two plots.

One process keeps it, the one that runs the pool: notes have a version and no lock.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeVar

import optuna
from optuna.artifacts import get_all_artifact_meta
from optuna.storages import BaseStorage
from optuna_dashboard import get_note, save_note, save_plotly_graph_object

from ris_hpo.report.collect import Report, Trial, choices, collect

EVERY_S: Final = 15.0
FIGURES: Final = {
    "curve.svg": "k_loc after each validation",
    "counts.svg": "estimated against true number of sources",
    "errors.svg": "errors against SNR beside the Cramér-Rao floor",
    "scene.svg": "spectrum of one scene",
}
MAX_POINTS: Final = 300

Snapshot = TypeVar("Snapshot")


def kept_current(
    study: optuna.Study, storage: BaseStorage, snapshots: Iterable[Snapshot], every_s: float = EVERY_S
) -> Iterator[Snapshot]:
    """Hand on a pool's snapshots, and bring the study's page up to date before, between and after them.

    Not after an error: the store may be away, and whoever stops a run is not made to wait for a note.
    """
    write_page(study, storage)
    due = time.monotonic() + every_s
    for snapshot in snapshots:
        if time.monotonic() >= due:
            write_page(study, storage)
            due = time.monotonic() + every_s
        yield snapshot
    write_page(study, storage)


def write_page(study: optuna.Study, storage: BaseStorage) -> bool:
    """Write the note and the plots, if they have anything new to say; returns whether they had."""
    report = collect(study)
    text = note(report) + figures(study, storage, report)
    if get_note(study) == text:
        return False
    save_note(study, text)
    scored = [trial for trial in report.trials if trial.value is not None and trial.diverged is None]
    if len(scored) >= 3:
        chosen = sorted(scored, key=lambda trial: trial.value or 0.0)[:MAX_POINTS]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            save_plotly_graph_object(study, _cost(report, chosen), graph_object_id="score-against-cost")
            if any(trial.pipeline for trial in chosen):
                save_plotly_graph_object(study, _paths(report, chosen), graph_object_id="pipeline-against-network")
    return True


def note(report: Report) -> str:
    """The note, Markdown: command, where the study stands, and its space."""
    best, base = report.best, report.base
    rows: list[tuple[str, str]] = []
    if best is not None and best.value is not None:
        text = f"trial {best.number}: **{best.value:.3f}** on the {report.objective} path"
        pipeline = best.pipeline.get("k_loc")
        rows.append(("Best k_loc", text + (f", {pipeline:.3f} with refinement" if pipeline is not None else "")))
    if report.floor is not None:
        share = f"; the best covers {best.efficiency:.0%} of the way" if best and best.efficiency is not None else ""
        rows.append(("Floor", f"{report.floor:.3f}{share}"))
    if base is not None and base.value is not None:
        rows.append(("Base configuration", f"{base.value:.3f} (trial {base.number})"))
    ml = report.reference.get("ml", {}).get("k_loc")
    if ml is not None:
        rows.append(("ml reference", f"{ml:.3f}"))
    if report.winner is not None:
        rows.append(("Winner", str(report.winner["verdict"])))
    ended = ("complete", "pruned", "fail")
    rows.append(("Trials", ", ".join(f"{report.counts.get(state, 0)} {state}" for state in ended)))
    if report.proof:
        rows.append(("Proof", report.proof))
    lines = [f"# {report.study}", "", report.description, ""]
    if report.command:
        lines += ["```", report.command, "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows), ""]
    lines += ["k_loc is minimised: 7 is nothing right, the floor is what right counts and Cramér-Rao errors score.", ""]
    if report.space:
        lines += ["| Parameter | Range | Best |", "|---|---|---|"]
        for name, dimension in report.space.items():
            value = best.params.get(name) if best is not None else None
            shown = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {_cell(name)} | {_cell(choices(dimension))} | {_cell(shown)} |")
    return "\n".join(lines).strip() + "\n"


def figures(study: optuna.Study, storage: BaseStorage, report: Report) -> str:
    """The best trial's figures as they are served, Markdown."""
    if report.best is None:
        return ""
    trial = study.get_trials(deepcopy=False)[report.best.number]
    metas = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(trial, storage=storage)}
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
    place = f"/artifacts/{study_id}/{trial_id}"
    shown = [f"![{title}]({place}/{metas[name]})" for name, title in FIGURES.items() if name in metas]
    return "\n\n".join(["", f"## Trial {trial.number}", *shown, ""]) if shown else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _cost(report: Report, trials: list[Trial]) -> Any:
    unit = "GPU-seconds" if any(trial.gpu_seconds for trial in trials) else "core-seconds"
    x = [round(trial.gpu_seconds or trial.core_seconds, 2) for trial in trials]
    y = [round(trial.value or 0.0, 4) for trial in trials]
    return _scatter(report, trials, x, y, f"Score against cost ({unit})", unit, "k_loc, network")


def _paths(report: Report, trials: list[Trial]) -> Any:
    both = [(trial, trial.pipeline["k_loc"]) for trial in trials if trial.pipeline.get("k_loc") is not None]
    x = [round(trial.scores.get("k_loc") or trial.value or 0.0, 4) for trial, _ in both]
    y = [round(pipeline, 4) for _, pipeline in both if pipeline is not None]
    title = "Pipeline against network"
    return _scatter(report, [trial for trial, _ in both], x, y, title, "k_loc, network", "k_loc, pipeline")


def _scatter(
    report: Report, trials: list[Trial], x: list[float], y: list[float], title: str, across: str, up: str
) -> Any:
    import plotly.graph_objects as go  # half a second that a study without completed trials need not pay

    dots = go.Scatter(
        x=x, y=y, mode="markers", text=[f"trial {trial.number}" for trial in trials], marker={"color": "#0b63a5"}
    )
    figure = go.Figure(dots, {"template": "none", "title": title, "xaxis": {"title": across}, "yaxis": {"title": up}})
    marks = {"floor": (report.floor, "#7a4fb5"), "ml": (report.reference.get("ml", {}).get("k_loc"), "#b86e00")}
    for name, (value, colour) in marks.items():
        if value is not None:
            figure.add_hline(y=round(value, 4), line={"color": colour, "dash": "dash"}, annotation={"text": name})
    return figure
