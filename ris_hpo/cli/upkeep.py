"""Commands about studies as a whole: all of them at a glance, name, removal, archives, copies, files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ris_hpo.cli import display, options
from ris_hpo.cli.options import PANEL, DryRun, Storage
from ris_hpo.errors import StudyError
from ris_hpo.text import file_size

if TYPE_CHECKING:
    from ris_hpo.search.archive import Moved
    from ris_hpo.store.cache import Store

Force = Annotated[
    bool, typer.Option("--force", help="Take running trials for lost whose process cannot be looked up from here.")
]


Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def studies(storage: Storage = None, json_: options.Json = False) -> None:
    """List all studies of the store: state, owner, trials, best score, last activity, machines, disk."""
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
            entry.owner,
            f"{entry.trials.at_rest} of {entry.trials.asked_for}",
            None if entry.best is None else f"{entry.metric} {display.cell(entry.best)}",
            None if entry.last_activity is None else f"{entry.last_activity:%Y-%m-%d %H:%M}",
            ", ".join(entry.hosts) or None,
            None if entry.bytes is None else file_size(entry.bytes),
        )
        for entry in entries
    ]
    titles = ["study", "state", "owner", "trials ended", "best", "last activity", "machines", "disk"]
    display.table("", titles, rows, text={0, 1, 2, 4, 5, 6})


def delete(
    study: Annotated[str, typer.Argument(help="The study to remove.")],
    storage: Storage = None,
    force: Force = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Remove a study with its trials, and its folder on this machine."""
    from ris_hpo.search.upkeep import delete_study
    from ris_hpo.store.open import open_store

    store = open_store(storage, create=False, write=not dry_run)
    what = _described(store, study, force=force)
    if dry_run:
        display.print_result(f"would be removed: {what}")
        return
    _confirm(what, yes=yes)
    delete_study(store, study, force=force)
    display.print_result(f"removed: {what}")


def _described(store: Store, study: str, *, force: bool) -> str:
    """A study that is to be removed, in words; one that runs is refused."""
    from ris_hpo.search.counting import tally
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.search.upkeep import require_at_rest
    from ris_hpo.store.folders import find_folder, folder_size

    require_at_rest(store, study, force=force)
    counts = tally(get_study(store, study).get_trials(deepcopy=False))
    folder = find_folder(store, study)
    files = "no folder here" if folder is None else f"{file_size(folder_size(folder))} in {folder}"
    return f"study '{study}' in {store.redacted}: {counts.asked_for} trials, {files}"


def _confirm(what: str, *, yes: bool) -> None:
    """Ask once before something is removed for good.

    Raises:
        StudyError: there is nobody to ask.
        typer.Exit: the answer was no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise StudyError(f"{what}; add --yes to remove it")
    if not typer.confirm(f"Remove {what}?", err=True):
        raise typer.Exit(1)


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


def archive(
    study: Annotated[str, typer.Argument(help="The study.")],
    out: Annotated[Path, typer.Option(help="The file to write, ending in .zip; one that is there is replaced.")],
    storage: Storage = None,
    checkpoints: Annotated[
        Literal["all", "best", "last_rung", "none"],
        typer.Option(help="Whose checkpoints are taken; trials that have not ended keep theirs in any case."),
    ] = "all",
    best: Annotated[int, typer.Option(min=1, help="How many the best are.")] = 3,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the study afterwards; asks first.")] = False,
    force: Force = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json_: options.Json = False,
) -> None:
    """Pack a study with all its trials, attributes, figures and checkpoints into one file."""
    from ris_hpo.search.archive import archive_study
    from ris_hpo.search.spec import KeepSpec
    from ris_hpo.search.upkeep import delete_study
    from ris_hpo.store.open import open_store

    options.check_output(out, suffix=".zip")
    store = open_store(storage, create=False, write=delete and not dry_run)
    keep = KeepSpec(checkpoints=checkpoints, best=best)
    if delete and not dry_run:
        _confirm(_described(store, study, force=force), yes=yes)
    moved = archive_study(store, study, out, keep=keep, force=force, dry_run=dry_run)
    if delete and not dry_run:
        delete_study(store, study, force=force)
    _show_moved(moved, f"written to {out}{' and removed' * delete}", dry_run=dry_run, json_=json_)


def restore(
    file: Annotated[Path, typer.Argument(help="What 'archive' wrote.")],
    storage: Storage = None,
    name: Annotated[str | None, typer.Option(help="Name of the study from now on.", show_default="its own")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the whole archive, and change nothing.")] = False,
    json_: options.Json = False,
) -> None:
    """Put the study of an archive into a store; it resumes and replays as before."""
    from ris_hpo.search.archive import restore_study
    from ris_hpo.store.open import open_store

    moved = restore_study(open_store(storage), file, name=name, dry_run=dry_run)
    _show_moved(moved, f"restored from {file}", dry_run=dry_run, json_=json_)


def copy(
    study: Annotated[str, typer.Argument(help="The study.")],
    to: Annotated[str, typer.Option(metavar="URL", help="The store that gets it, made where it is not there.")],
    storage: Storage = None,
    name: Annotated[str | None, typer.Option(help="Its name there.", show_default="its own")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    json_: options.Json = False,
) -> None:
    """Copy a study with its files into another store: from SQLite to PostgreSQL, and back."""
    from ris_hpo.search.archive import copy_study
    from ris_hpo.search.upkeep import require_at_rest
    from ris_hpo.store.open import open_store

    store = open_store(storage, create=False)
    require_at_rest(store, study, force=force)  # before the other store is made
    target = open_store(to)
    moved = copy_study(store, study, target, new=name, force=force, dry_run=dry_run)
    _show_moved(moved, f"copied to {target.redacted}", dry_run=dry_run, json_=json_)


def clean(
    study: Annotated[
        str | None, typer.Argument(help="The study whose checkpoints are looked at.", show_default="all of the store")
    ] = None,
    storage: Storage = None,
    checkpoints: Annotated[
        Literal["all", "best", "last_rung", "none"] | None,
        typer.Option(help="Whose checkpoints stay among the ended trials.", show_default="what each study says"),
    ] = None,
    best: Annotated[int, typer.Option(min=1, help="How many the best are.")] = 3,
    dry_run: DryRun = False,
    yes: Yes = False,
    json_: options.Json = False,
) -> None:
    """Remove files that nobody needs: checkpoints by rule, folders without a study, artifacts without a trial."""
    from ris_hpo.search import disk
    from ris_hpo.search.lifecycle import get_study
    from ris_hpo.search.spec import KeepSpec
    from ris_hpo.store.open import open_store

    store = open_store(storage, create=False)
    keep = None if checkpoints is None else KeepSpec(checkpoints=checkpoints, best=best)
    titles = [each.study_name for each in store.get_all_studies()] if study is None else [study]
    for title in titles:
        get_study(store, title)
    found = disk.removable(store, titles, keep)
    size = file_size(sum(each.bytes for each in found))
    if not json_:
        for each in found:
            display.print_result(f"{each.path}: {file_size(each.bytes)}, {each.why}")
    if found and not dry_run:
        _confirm(f"{len(found)} files and folders, {size}", yes=yes)
        disk.remove(found)
    if json_:
        rows = [{"path": str(each.path), "bytes": each.bytes, "why": each.why} for each in found]
        display.print_json({"removed": rows, "dry_run": dry_run})
        return
    display.print_result(f"{'would be ' * dry_run}removed: {len(found)} files and folders, {size}")


def _show_moved(moved: Moved, what: str, *, dry_run: bool, json_: bool) -> None:
    if json_:
        display.print_json({**asdict(moved), "dry_run": dry_run})
        return
    size = f"{moved.trials} trials, {moved.files} files, {file_size(moved.bytes)}"
    display.print_result(f"{'would be ' * dry_run}{what}: study '{moved.study}', {size}")


def register(app: typer.Typer) -> None:
    """Add the commands, each with an example that the tests read."""
    examples: dict[Callable[..., None], str] = {
        studies: "ris-hpo studies",
        delete: "ris-hpo delete smoke --dry-run",
        rename: "ris-hpo rename smoke smoke-2",
        archive: "ris-hpo archive wide --out wide.zip --checkpoints best",
        restore: "ris-hpo restore wide.zip --name wide-2025",
        clean: "ris-hpo clean --dry-run",
        copy: "ris-hpo copy wide --to postgresql://ris_hpo@db/ris_hpo",
    }
    for command, example in examples.items():
        app.command(rich_help_panel=PANEL, epilog=f"Example: {example}")(command)
