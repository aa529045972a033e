"""Commands about the trials of a study: list them, see how one ended, ask for some, try some again, set some aside."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ris_hpo.cli import display, options, standing
from ris_hpo.cli.options import PANEL, DryRun, Storage, StudyName
from ris_hpo.errors import StudyError


def trials(
    study: StudyName = None,
    storage: Storage = None,
    csv: Annotated[Path | None, typer.Option(help="Write them into a CSV file instead.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write them into a Parquet file instead.")] = None,
    json_: options.Json = False,
) -> None:
    """List the trials that have begun: state, score, parameters, metrics, cost, cause where one failed."""
    from ris_hpo.api.study import Study
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.store.open import open_store

    if sum((csv is not None, parquet is not None, json_)) > 1:
        raise options.UsageError("--csv, --parquet and --json exclude each other")
    if csv is not None:
        options.check_output(csv, suffix=".csv")
    if parquet is not None:
        options.check_output(parquet, suffix=".parquet")
    store = open_store(storage, create=False)
    title = standing.choose_study(store, study)
    opened = Study(store, get_study(store, title))
    rows = opened.records()
    if csv is not None:
        display.write_csv(csv, rows)
        display.print_result(f"written: {csv}, {len(rows)} trials")
    elif parquet is not None:
        display.write_parquet(parquet, rows)
        display.print_result(f"written: {parquet}, {len(rows)} trials")
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
    from ris_hpo.search.counting import state_of
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
    was = trial.user_attrs.get(names.SET_ASIDE)
    owner, folder = Owner.parse(trial.user_attrs.get(names.OWNER)), find_folder(store, title)
    found = {
        "study": title,
        "trial": number,
        "state": state_of(trial),
        "scored": None if was is None or was["values"] is None else was["values"][0],
        "cause": trial.user_attrs.get(names.CAUSE),
        "error": trial.user_attrs.get(names.ERROR) or trial.user_attrs.get(names.DIVERGED),
        "host": trial.user_attrs.get(names.HOST) or (None if owner is None else owner.process.host),
        "process": None if owner is None else owner.process.pid,
        "device": trial.user_attrs.get(names.DEVICE),
        "version": trial.user_attrs.get(names.CODE),
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


def enqueue(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Configurations: .json (a list of objects), .toml (tables [[trial]]) or .csv (keys above)."
        ),
    ] = None,
    study: StudyName = None,
    storage: Storage = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One value of a configuration; may be repeated."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also those that a trial of the study has already.")] = False,
    dry_run: DryRun = False,
    json_: options.Json = False,
) -> None:
    """Let a study try configurations of your own next; all are checked before one is queued.

    Each takes the place of a trial that waits for the sampler; where none waits, the study's number of trials grows.
    """
    from ris_hpo.search import amend
    from ris_hpo.store.open import open_store

    own = options.changes(set_)
    if (file is None) == (not own):
        raise options.UsageError("name a FILE of configurations, or one configuration with --set KEY=VALUE")
    configurations = [own] if file is None else amend.read_configurations(file)
    store = open_store(storage, create=False, write=not dry_run)
    title = standing.choose_study(store, study)
    found = amend.enqueue(store, title, configurations, again=again, dry_run=dry_run)
    if json_:
        display.print_json(
            {"study": title, "queued": found.queued, "trials": found.numbers, "repeated": found.repeated}
            | {"n_trials": found.n_trials, "dry_run": dry_run}
        )
        return
    for params in found.queued:
        display.print_result(
            f"{'would be ' * dry_run}queued: {', '.join(f'{path}={value}' for path, value in params.items())}"
        )
    for number in found.repeated:
        display.print_result(f"left out: trial {number} has the same values; --again queues it all the same")
    runs = ", ".join(map(str, found.numbers))
    display.print_note(
        f"study '{title}': {found.n_trials} trials"
        + (f"; trials {runs} run them: ris-hpo run --study {shlex.quote(title)}" if runs else "")
    )


def retry(
    numbers: Annotated[list[int] | None, typer.Argument(metavar="[NUMBER]...", help="Failed trials.")] = None,
    study: StudyName = None,
    storage: Storage = None,
    cause: Annotated[
        list[str] | None,
        typer.Option(help="Those that failed by it: bug, timeout, lost_worker, out_of_memory, diverged; repeatable."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that failed.")] = False,
    dry_run: DryRun = False,
    json_: options.Json = False,
) -> None:
    """Queue failed trials again: same parameters and seed, from the last checkpoint where there is one.

    The number of trials of the study stays: each takes the place of the one that failed.
    """
    from dataclasses import asdict

    from ris_hpo.search import amend
    from ris_hpo.store.open import open_store

    if not (numbers or cause or every):
        raise options.UsageError("name failed trials by NUMBER, --cause or --all")
    store = open_store(storage, create=False, write=not dry_run)
    title = standing.choose_study(store, study)
    found = amend.retry(store, title, numbers=numbers or (), causes=cause or (), every=every, dry_run=dry_run)
    if json_:
        display.print_json({"study": title, "retried": [asdict(each) for each in found], "dry_run": dry_run})
        return
    for each in found:
        reached = (
            "from its start"
            if each.last_step is None
            else f"from its last checkpoint (step {each.last_step:,} or before), or from its start where none is left"
        )
        display.print_result(f"trial {each.number} ({each.cause}) {'would run' if dry_run else 'runs'} again {reached}")
    if not found:
        display.print_result("no failed trial is among these")
    elif not dry_run:
        display.print_note(f"next: ris-hpo run --study {shlex.quote(title)}, unless it is running")


def invalidate(
    numbers: Annotated[list[int], typer.Argument(metavar="NUMBER...", help="Complete or pruned trials.")],
    study: StudyName = None,
    storage: Storage = None,
    reason: Annotated[str | None, typer.Option(help="Why; shown wherever the trial is.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Let their scores count again.")] = False,
    dry_run: DryRun = False,
    json_: options.Json = False,
) -> None:
    """Take trials out of every ranking, report and comparison; they stay, with their scores and the reason.

    They still count as trials that have ended: to replace one, ask for one more with 'run --n-trials'.
    """
    from ris_hpo.search import amend
    from ris_hpo.store.open import open_store

    if (reason is None) != undo:
        raise options.UsageError("say why with --reason TEXT, or take it back with --undo")
    store = open_store(storage, create=False, write=not dry_run)
    title = standing.choose_study(store, study)
    if reason is None:
        amend.reinstate(store, title, numbers, dry_run=dry_run)
    else:
        amend.invalidate(store, title, numbers, reason, dry_run=dry_run)
    if json_:
        display.print_json({"study": title, "trials": numbers, "valid": undo, "reason": reason, "dry_run": dry_run})
        return
    what = f"trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} of study '{title}'"
    display.print_result(f"{'would be ' * dry_run}{'valid again' if undo else 'invalidated'}: {what}")


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests read."""
    examples: dict[Callable[..., None], str] = {
        trials: "ris-hpo trials --study wide --csv trials.csv",
        log: "ris-hpo log 3 --study wide",
        enqueue: "ris-hpo enqueue --study wide --set optimizer.learning_rate=0.001",
        retry: "ris-hpo retry --cause timeout --study wide",
        invalidate: 'ris-hpo invalidate 3 --study wide --reason "trained on the wrong file"',
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
