"""A study's own page in the dashboard: a note that says what the study is and how far it has come, with figures.

Only the process that runs the pool writes it: the dashboard's notes have a version and no lock.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import optuna
from optuna.artifacts import get_all_artifact_meta
from optuna.storages import BaseStorage
from optuna_dashboard import get_note, save_note

from ris_hpo.report.artifacts import Artifacts
from ris_hpo.report.collect import Report, choices, collect
from ris_hpo.store.folders import ARTIFACTS

EVERY_S: Final = 15.0
FIGURES: Final = {
    "curve.svg": "k_loc after each validation",
    "counts.svg": "estimated against true number of sources",
    "errors.svg": "errors against SNR beside the Cramér-Rao floor",
    "scene.svg": "spectrum of one scene",
}
MIN_SCORED: Final = 3
"""Completed trials from which on the study's own figures are drawn."""
_HEADING: Final = "\n## Figures\n"

Snapshot = TypeVar("Snapshot")


def kept_current(
    study: optuna.Study,
    storage: BaseStorage,
    snapshots: Iterable[Snapshot],
    artifacts: Path,
    folder: Path | None = None,
    every_s: float = EVERY_S,
) -> Iterator[Snapshot]:
    """Pass a pool's snapshots on, and bring the study's page up to date before, between and after them.

    Not after an error: the store may be unreachable, and a user who stops a run should not wait for a note.

    Args:
        study: the study.
        storage: where it is stored, which knows its number.
        snapshots: of its pool.
        artifacts: folder of the artifact store, as given to the dashboard.
        folder: of the study's files, where its figures are listed, so that they go when it goes.
        every_s: seconds between two updates.
    """
    write_page(study, storage, artifacts, folder)
    due = time.monotonic() + every_s
    for snapshot in snapshots:
        if time.monotonic() >= due:
            write_page(study, storage, artifacts, folder)
            due = time.monotonic() + every_s
        yield snapshot
    write_page(study, storage, artifacts, folder)


def write_page(study: optuna.Study, storage: BaseStorage, artifacts: Path, folder: Path | None = None) -> bool:
    """Write the note and the figures if anything has changed; returns whether it had."""
    report = collect(study, with_importances=False)
    text = note(report)
    study_id = storage.get_study_id_from_name(study.study_name)
    written, _, figures = get_note(study).partition(_HEADING)
    if written == text and set(re.findall(r"\(/artifacts/(\d+)/", figures)) <= {str(study_id)}:  # else it is a copy
        return False
    listing = None if folder is None else folder / "page" / ARTIFACTS
    shown = _study_figures(study_id, report, Artifacts(study, artifacts, listing))
    if report.best is not None:
        trial = study.get_trials(deepcopy=False)[report.best.number]
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        metas = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(trial, storage=storage)}
        place = f"/artifacts/{study_id}/{trial_id}"
        found = [f"![{title}]({place}/{metas[name]})" for name, title in FIGURES.items() if name in metas]
        shown += [f"### Trial {trial.number}", *found] if found else []
    save_note(study, text + (_HEADING + "\n" + "\n\n".join(shown) + "\n" if shown else ""))
    return True


def note(report: Report) -> str:
    """Return the note as Markdown: command, scores so far, and the search space."""
    best, base = report.best, report.base
    rows: list[tuple[str, str]] = []
    if best is not None and best.value is not None:
        text = f"trial {best.number}: **{best.value:.3f}**"
        text += f" on the {report.objective} path" if report.program is None else ""
        pipeline = best.pipeline.get("k_loc")
        rows.append(
            (f"Best {report.metric}", text + (f", {pipeline:.3f} with refinement" if pipeline is not None else ""))
        )
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
    further = [state for state in ("paused", "invalidated") if report.counts.get(state)]
    ended = ["complete", "pruned", "fail", *further]
    rows.append(("Trials", ", ".join(f"{report.counts.get(state, 0)} {state}" for state in ended)))
    if report.proof:
        rows.append(("Proof", report.proof))
    lines = [f"# {report.study}", "", report.description, ""]
    if report.command:
        lines += ["```", report.command, "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows), ""]
    if report.program is None:
        meaning = "k_loc is minimised: 7 is nothing right, the floor is what right counts and Cramér-Rao errors score."
    else:
        meaning = f"{report.metric} of {report.program} is {report.direction}d."
    lines += [meaning, ""]
    if report.space:
        lines += ["| Parameter | Range | Best |", "|---|---|---|"]
        for name, dimension in report.space.items():
            value = best.params.get(name) if best is not None else None
            shown = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {_cell(name)} | {_cell(choices(dimension))} | {_cell(shown)} |")
    return "\n".join(lines).strip() + "\n"


def _study_figures(study_id: int, report: Report, files: Artifacts) -> list[str]:
    """Draw the study's own figures; returns them as Markdown."""
    scored = [trial for trial in report.trials if trial.ranks]
    if len(scored) < MIN_SCORED:
        return []
    from ris_hpo.report import study_figures  # a plotting library, which a study without scores need not load

    wanted: dict[str, tuple[str, Callable[[Report], str]]] = {"cost.svg": ("score against cost", study_figures.cost)}
    if any(trial.pipeline.get("k_loc") is not None for trial in scored):
        wanted["paths.svg"] = ("pipeline against network", study_figures.paths)
    for name, (_, draw) in wanted.items():
        files.put(name, lambda draw=draw: draw(report))  # type: ignore[misc]
    return [
        f"![{title}](/artifacts/{study_id}/{files.identifiers[name]})"
        for name, (title, _) in wanted.items()
        if name in files.identifiers
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
