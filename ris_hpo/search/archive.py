"""A study packed into one file and back, and copied from store to store; what stands in the way is said beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from optuna.exceptions import DuplicatedStudyError

from ris_hpo.errors import ArchiveError, StudyError
from ris_hpo.search.disk import is_checkpoint, kept_numbers
from ris_hpo.search.lifecycle import check_name, direction_of, get_study
from ris_hpo.search.spec import KeepSpec, StudySpec
from ris_hpo.search.upkeep import require_at_rest
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.transfer import Package, gather, pack, put, scratch_folder, unpack

EVERYTHING = KeepSpec()


@dataclass(frozen=True)
class Moved:
    """What was packed, restored or copied: the study's name there, and trials, files and their bytes."""

    study: str
    trials: int
    files: int
    bytes: int


def archive_study(
    store: Store,
    name: str,
    out: Path,
    *,
    keep: KeepSpec = EVERYTHING,
    force: bool = False,
    dry_run: bool = False,
) -> Moved:
    """Write a study with its files into one file; it stays in the store.

    Args:
        store: the store.
        name: the study.
        out: the file to write.
        keep: whose checkpoints are taken; those of trials that have not ended are in any case.
        force: see ``require_at_rest``.
        dry_run: write nothing.

    Raises:
        StudyError: no such study, or it runs.
        OutputError: the file cannot be written.
    """
    package = _gathered(store, name, keep, force=force)
    moved = _moved(package)
    if not dry_run:
        pack(package, out, check=lambda: _require_unchanged(store, name, package, force=force))
    return moved


def restore_study(store: Store, archive: Path, *, name: str | None = None, dry_run: bool = False) -> Moved:
    """Put the study of an archive into a store, as it was: it resumes and replays.

    Args:
        store: the store.
        archive: the file.
        name: of the study from now on; None for its own.
        dry_run: read and check the archive, and write nothing.

    Raises:
        ArchiveError: not a whole archive of a study.
        StudyError: the store has a study of that name.
        OutputError: the disk has no room, or files cannot be written.
    """
    with scratch_folder() as scratch:
        package = unpack(archive, scratch)
        spec = package.content.user_attrs.get(names.SPEC)
        if not isinstance(spec, dict):
            raise ArchiveError(f"{archive}: its study was not made by ris-hpo, it carries no specification")
        StudySpec.from_stored(spec, f"the study in {archive}")  # refuses what this version cannot run
        package = _named(store, package, name)
        moved = _moved(package)
        if not dry_run:
            _put(store, package, move=True)
        return moved


def copy_study(
    store: Store, name: str, target: Store, *, new: str | None = None, force: bool = False, dry_run: bool = False
) -> Moved:
    """Copy a study with its files into another store, or into the same one under another name.

    Args:
        store: the store it is in.
        name: the study.
        target: the store that gets it.
        new: its name there; None for its own.
        force: see ``require_at_rest``.
        dry_run: write nothing.

    Raises:
        StudyError: no such study, or it runs; the target has a study of that name.
        OutputError: the disk has no room, or files cannot be written.
    """
    package = _named(target, _gathered(store, name, EVERYTHING, force=force), new)
    if not dry_run:
        _put(target, package, check=lambda: _require_unchanged(store, name, package, force=force))
    return _moved(package)


def _gathered(store: Store, name: str, keep: KeepSpec, *, force: bool) -> Package:
    require_at_rest(store, name, force=force)
    study = get_study(store, name)
    numbers = kept_numbers(study.get_trials(deepcopy=False), keep, direction_of(study))

    def wanted(path: PurePath) -> bool:
        trial = path.parts[0]
        return not trial.isdigit() or int(trial) in numbers or not is_checkpoint(path)

    return gather(store, name, wanted)


def _named(target: Store, package: Package, new: str | None) -> Package:
    """Return a package under the name that it is to have, which must be a free one."""
    title = new or package.content.name
    check_name(title)
    if title in [study.study_name for study in target.get_all_studies()]:
        raise _taken(target, title)
    return replace(package, content=replace(package.content, name=title))


def _put(target: Store, package: Package, *, move: bool = False, check: Callable[[], None] = lambda: None) -> None:
    try:
        put(package, target, move=move, check=check)
    except DuplicatedStudyError:
        raise _taken(target, package.content.name) from None


def _taken(target: Store, title: str) -> StudyError:
    return StudyError(
        f"{target.redacted} has a study '{title}' already; add --name NEW, or rename or delete the one that is there"
    )


def _require_unchanged(store: Store, name: str, package: Package, *, force: bool) -> None:
    """Refuse what was read of a study that somebody began to work on meanwhile."""
    require_at_rest(store, name, force=force)
    now = store.content(store.get_study_id_from_name(name)).trials
    if [(t.state, t.last_step) for t in now] != [(t.state, t.last_step) for t in package.content.trials]:
        raise StudyError(f"study '{name}' changed while it was read; stop what works on it, and try again")


def _moved(package: Package) -> Moved:
    files = len(package.files) + len(package.artifacts)
    return Moved(package.content.name, len(package.content.trials), files, package.bytes)
