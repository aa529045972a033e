"""Where a study stands, as people and programs read it: counts, the best trial beside its floor, the table of a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from ris_hpo.cli import display, options
from ris_hpo.errors import StudyError, WorkerError
from ris_hpo.text import duration

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from ris_hpo.results.replay import ReplayReport
    from ris_hpo.search.dimension import Dimension
    from ris_hpo.search.status import BestTrial
    from ris_hpo.store.cache import Store
    from ris_hpo.workers.supervisor import Supervisor

SHOWN_TRIALS = 12


def choose_study(store: Store, name: str | None) -> str:
    """The study that is meant: the named one, or the only one.

    Raises:
        StudyError: none in the store, or several and no name.
    """
    from ris_hpo.search.lifecycle import only_study

    return name or only_study(store)


def show_status(store: Store, name: str, *, json_: bool) -> None:
    """Trials by state, the best one, failures by cause, what runs now."""
    from ris_hpo.search.lifecycle import status as status_of

    found = status_of(store, name)
    if json_:
        display.print_json(found.as_dict())
        return
    counts = ", ".join(f"{count} {state}" for state, count in found.trials.as_dict().items() if count)
    pairs: dict[str, object] = {"study": name, "trials": counts or "none yet"}
    if found.best is not None:
        pairs |= best_line(found.best, found.metric)
    if found.causes:
        pairs["failures"] = ", ".join(f"{count} {cause}" for cause, count in found.causes.items())
    for each in found.invalidated:
        pairs[f"trial {each.number} is invalid"] = each.reason
    pairs["device time"] = duration(3600 * found.device_hours)
    display.facts("", pairs)
    if found.running:
        rows = [
            (
                each.number,
                each.step,
                each.score,
                duration(each.seconds),
                each.device,
                f"{each.host}, process {each.pid}",
            )
            for each in found.running
        ]
        display.table("\nrunning", ["trial", "step", found.metric, "time", "device", "worker"], rows, text={3, 4, 5})


def best_line(best: BestTrial, metric: str) -> dict[str, object]:
    """The best trial, with its floor where it has one, as one fact."""
    text = f"trial {best.number}: {metric} {best.score:.3f}"
    if best.floor is not None:
        text += f" | floor {best.floor:.3f}"
    if best.efficiency is not None:
        text += f" | efficiency {best.efficiency:.0%}"
    return {"best": text}


def show_outcome(store: Store, name: str, *, json_: bool) -> None:
    """What a run ends with: the table of trials, the best one, its floor, and the next command."""
    from ris_hpo.search.counting import live_trials, ranked
    from ris_hpo.search.lifecycle import direction_of, get_study

    if json_:
        show_status(store, name, json_=True)
        return
    study = get_study(store, name)
    trials = live_trials(study.get_trials(deepcopy=False))
    order = {trial.number: place for place, trial in enumerate(ranked(trials, direction_of(study)))}
    shown = sorted(trials, key=lambda trial: (order.get(trial.number, len(order)), trial.number))[:SHOWN_TRIALS]
    rows = [_row(trial, (study.metric_names or ["k_loc"])[0]) for trial in shown]
    titles = list(dict.fromkeys(title for row in rows for title, value in row.items() if value is not None))
    words = [place for place, title in enumerate(titles) if title in ("state", "note")]
    display.table(f"study '{name}'", titles, [[row.get(title) for title in titles] for row in rows], text=words)
    if len(trials) > len(shown):
        display.print_result(f"... and {len(trials) - len(shown)} more")
    show_status(store, name, json_=False)
    if order:
        choice = f"--study {shlex.quote(name)}"
        display.print_note(
            f"next: ris-hpo best {choice}    ris-hpo export {choice} --out best.toml    ris-hpo dashboard"
        )


def end_of_run(supervisor: Supervisor, store: Store, name: str) -> None:
    """Say why a run or worker ended before its study did, and turn what it achieved into an exit code.

    Raises:
        typer.Exit: it was interrupted.
        WorkerError: trials ended, and all of them failed.
    """
    from ris_hpo.search.lifecycle import status as status_of

    if supervisor.ending == "interrupted":
        display.print_note("interrupted; every trial is checkpointed, and the same command goes on from there")
        raise typer.Exit(options.INTERRUPTED)
    if supervisor.ending not in ("finished", "max_trials"):
        display.print_note(f"stopped by a rule of the study: {supervisor.ending}")
    found = status_of(store, name)
    counts = found.trials
    good = counts.complete + counts.pruned + counts.paused
    if (supervisor.ended and not supervisor.succeeded) or (counts.ended and not good):
        number = supervisor.ended or counts.ended
        causes = ", ".join(f"{count} {cause}" for cause, count in found.causes.items())
        raise WorkerError(
            f"no trial of study '{name}' succeeded: {number} ended and failed ({causes} in all); 'ris-hpo status "
            f"--study {shlex.quote(name)} --json' lists each with its cause"
        )


def end_of_replay(found: ReplayReport, *, json_: bool) -> None:
    """A recorded curve beside its repetition, and the verdict as exit code.

    Raises:
        typer.Exit: a stop cut it short, or the curve came out differently.
    """
    if json_:
        display.print_json(found.as_dict())
    else:
        display.comparison(found)
    if found.stopped:
        raise typer.Exit(options.INTERRUPTED)
    if not found.identical:
        raise typer.Exit(StudyError.exit_code)


def _row(trial: FrozenTrial, metric: str) -> dict[str, object]:
    """The figures of a trial by their titles, None where it has none."""
    from ris_hpo.search.counting import state_of
    from ris_hpo.store import attributes as names

    marks: Mapping[str, Any] = trial.user_attrs
    scores, pipeline = marks.get(names.COMPONENTS, {}), marks.get(names.PIPELINE, {})
    values = list(trial.intermediate_values.values())
    seconds = marks.get(names.SECONDS)
    return {
        "trial": trial.number,
        "state": state_of(trial),
        metric: trial.values[0] if trial.values else (values[-1] if values else None),
        "floor": marks.get(names.FLOOR),
        **{name: value for name, value in marks.get(names.METRICS, {}).items() if name != "floor"},
        "efficiency": marks.get(names.EFFICIENCY),
        "pipeline": pipeline.get("k_loc"),
        "K_acc": scores.get("k_acc"),
        "success": scores.get("success"),
        "steps": marks.get(names.SCENES) or trial.last_step,
        "time": None if seconds is None else duration(seconds),
        "note": (marks.get(names.DIVERGED) and "diverged") or marks.get(names.CAUSE) or marks.get(names.ORIGIN),
    }


def condition_of(dimension: Dimension) -> str:
    """When a dimension is searched; nothing where it always is."""
    return ", ".join(f"{path} in {values}" for path, values in dimension.when.items())
