"""Commands about studies as a whole: all of them at a glance, another name, removal, why a trial failed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ris_hpo.cli import display, options, standing
from ris_hpo.cli.options import PANEL, Storage, StudyName
from ris_hpo.errors import StudyError
from ris_hpo.text import file_size

Force = Annotated[
    bool, typer.Option("--force", help="Take running trials for lost whose process cannot be looked up from here.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def studies(storage: Storage = None, json_: options.Json = False) -> None:
    """List all studies of the store: state, trials, best score, last activity, machines, disk."""
    from ris_hpo.search.upkeep import list_entries
    from ris_hpo.store.open import open_store

    store = open_store(storage, create=False)
    entries = list_entries(store)
    if json_:
        display.print_json([entry.as_dict() for entry in entries])
        return
    rows = [
        (
            entry.study,
            entry.state,
            f"{entry.trials.at_rest} of {entry.trials.asked_for}",
            None if entry.best is None else f"{entry.metric} {display.cell(entry.best)}",
            None if entry.last_activity is None else f"{entry.last_activity:%Y-%m-%d %H:%M}",
            ", ".join(entry.hosts) or None,
            None if entry.bytes is None else file_size(entry.bytes),
        )
        for entry in entries
    ]
    titles = ["study", "state", "trials ended", "best", "last activity", "machines", "disk"]
    display.table("", titles, rows, text={0, 1, 3, 4, 5})


def delete(
    study: Annotated[str, typer.Argument(help="The study to remove.")],
    storage: Storage = None,
    force: Force = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a study with its trials, and its folder on this machine."""
    from ris_hpo.search.counting import tally
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.search.upkeep import delete_study, folder_size, require_at_rest
    from ris_hpo.store.folders import find_folder
    from ris_hpo.store.open import open_store

    store = open_store(storage, create=False, write=not dry_run)
    require_at_rest(store, study, force=force)
    counts = tally(get_study(store, study).get_trials(deepcopy=False))
    folder = find_folder(store, study)
    files = "no folder here" if folder is None else f"{file_size(folder_size(folder))} in {folder}"
    what = f"study '{study}' in {store.redacted}: {counts.asked_for} trials, {files}"
    if dry_run:
        display.print_result(f"would be removed: {what}")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise StudyError(f"{what}; add --yes to remove it")
        if not typer.confirm(f"Remove {what}?", err=True):
            raise typer.Exit(1)
    delete_study(store, study, force=force)
    display.print_result(f"removed: {what}")


def rename(
    study: Annotated[str, typer.Argument(help="The study.")],
    new: Annotated[str, typer.Argument(help="Its new name.")],
    storage: Storage = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Give a study another name; trials, checkpoints and exports stay as they are."""
    from ris_hpo.search.lifecycle import check_name
    from ris_hpo.search.upkeep import rename_study, require_at_rest
    from ris_hpo.store.open import open_store

    store = open_store(storage, create=False, write=not dry_run)
    if dry_run:
        check_name(new)
        require_at_rest(store, study, force=force)
        display.print_result(f"study '{study}' would be called '{new}'")
        return
    rename_study(store, study, new, force=force)
    display.print_result(f"study '{study}' is called '{new}' from now on")


def trials(
    study: StudyName = None,
    storage: Storage = None,
    csv: Annotated[Path | None, typer.Option(help="Write them into a CSV file instead.")] = None,
    json_: options.Json = False,
) -> None:
    """List the trials that have begun: state, score, parameters, metrics, cost, cause where one failed."""
    from ris_hpo.api.study import Study
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.store.open import open_store

    if csv is not None:
        options.check_output(csv, suffix=".csv")
    store = open_store(storage, create=False)
    title = standing.choose_study(store, study)
    rows = Study(store, get_study(store, title)).records()
    if csv is not None:
        display.write_csv(csv, rows)
        display.print_result(f"written: {csv}, {len(rows)} trials")
    elif json_:
        display.print_json(rows)
    else:
        titles = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
        words = [place for place, name in enumerate(titles) if any(isinstance(row[name], str) for row in rows)]
        display.table(f"study '{title}'", titles, [[row[name] for name in titles] for row in rows], text=words)


def log(
    number: Annotated[int, typer.Argument(min=0, help="Number of the trial.")],
    study: StudyName = None,
    storage: Storage = None,
    json_: options.Json = False,
) -> None:
    """Show how a trial ended: cause, error, machine, last step, traceback, and where its files are."""
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.store import attributes as names
    from ris_hpo.store.folders import find_folder
    from ris_hpo.store.open import open_store
    from ris_hpo.store.owner import Owner

    store = open_store(storage, create=False)
    title = standing.choose_study(store, study)
    trials = get_study(store, title).get_trials(deepcopy=False)
    if number >= len(trials):
        raise StudyError(f"study '{title}' has no trial {number}: it has {len(trials)}")
    trial = trials[number]
    owner, folder = Owner.parse(trial.user_attrs.get(names.OWNER)), find_folder(store, title)
    found = {
        "study": title,
        "trial": number,
        "state": trial.state.name.lower(),
        "cause": trial.user_attrs.get(names.CAUSE),
        "error": trial.user_attrs.get(names.ERROR) or trial.user_attrs.get(names.DIVERGED),
        "host": trial.user_attrs.get(names.HOST) or (None if owner is None else owner.process.host),
        "process": None if owner is None else owner.process.pid,
        "device": trial.user_attrs.get(names.DEVICE),
        "last step": trial.last_step,
        "continues trial": trial.user_attrs.get(names.PREDECESSOR),
        "continued by": next((one.number for one in trials if one.user_attrs.get(names.PREDECESSOR) == number), None),
        "files": None if folder is None else str(folder / str(number)),
        "worker logs": None if folder is None else str(folder / "worker-*.log"),
    }
    traceback = trial.user_attrs.get(names.TRACEBACK)
    if json_:
        display.print_json({name.replace(" ", "_"): value for name, value in found.items()} | {"traceback": traceback})
        return
    display.facts("", {name: value for name, value in found.items() if value is not None})
    if traceback is not None:
        display.print_result(f"\n{traceback.rstrip()}")


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests read."""
    examples: dict[Callable[..., None], str] = {
        studies: "ris-hpo studies",
        trials: "ris-hpo trials --study wide --csv trials.csv",
        delete: "ris-hpo delete smoke --dry-run",
        rename: "ris-hpo rename smoke smoke-2",
        log: "ris-hpo log 3 --study wide",
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
