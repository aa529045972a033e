"""The folder of a study's files, found by the study's identity.

A name says too little: another store may have a study of the same name in the same storage directory, a deleted study
may be made anew, and a study may be renamed. So a study carries a random identity among its attributes, and its folder
says in a marker file whose it is. The folder is called by the study's name where that is free, and by the name with a
number where it is not.

    storage/trials/wide/0/       checkpoints and telemetry of trial 0
    storage/trials/wide/.study.json
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from ris_hpo.atomic import make_folder, remove_abandoned, replacing, writing
from ris_hpo.errors import StudyGoneError
from ris_hpo.process import storage_directory
from ris_hpo.store import attributes as names

if TYPE_CHECKING:
    from ris_hpo.store.cache import Store

MARKER: Final = ".study.json"
PARTIAL: Final = ".partial-"
"""How the folder of a study begins that is still being written."""
ARTIFACTS: Final = "artifacts.txt"
"""In a trial's folder: names of its files in the artifact folder, one a line, so that they go when it goes."""
_REMOVED: Final = ".removed-"
_UPLOAD_S = 3600.0  # longer than any file takes to be written and entered in a list


@dataclass(frozen=True)
class Owner:
    """What a marker says: which study the folder belongs to.

    Attributes:
        identity: of the study.
        database: the database the study is in, see ``TicketStorage.database``.
        number: of the database: inode of the SQLite file, or oid of the PostgreSQL database.
        study_id: of the study in that database.
        folder: inode of the folder itself, which a copy of it does not have.
    """

    identity: str
    database: str
    number: int
    study_id: int
    folder: int


def study_folder(store: Store, name: str, storage: Path | None = None) -> Path:
    """Return the folder of a study's files; it is made where there is none.

    No two studies ever get the same folder. Where this study turns out to be a copy of one that still has the folder,
    it gets a new identity and a folder of its own. Files that a version without identities left under the study's name
    are taken over by the study that has begun trials.

    Args:
        store: the store.
        name: the study.
        storage: the storage directory; this process's own by default.

    Raises:
        OutputError: the folder cannot be made.
        StudyGoneError: no such study.
    """
    root = make_folder(_root(storage))
    study_id = store.get_study_id_from_name(name)
    with _locked(root):
        old = names.IDENTITY not in store.get_study_user_attrs(study_id)
        inherits = old and any(trial.datetime_start for trial in store.get_all_trials(study_id, deepcopy=False))
        identity = store.identity(study_id)
        while True:
            folder = _find(root, identity, name) or _new(root, name, store, inherits)
            mine = Owner(identity, *store.database, study_id, folder.stat().st_ino)
            found = _owner(folder)
            if found is None or found == mine or _is_left(found, mine, store):
                if found != mine:
                    with replacing(folder / MARKER, durable=True) as partial:
                        partial.write_text(json.dumps(asdict(mine)), encoding="utf-8")
                return folder
            identity = store.identity(study_id, replaces=identity)


def find_folder(store: Store, name: str, storage: Path | None = None) -> Path | None:
    """Return the folder of a study's files, or None where it has none here; nothing is written."""
    identity = store.get_study_user_attrs(store.get_study_id_from_name(name)).get(names.IDENTITY)
    return None if identity is None else _find(_root(storage), identity, name)


def remove_folder(store: Store, identity: str, storage: Path | None = None) -> None:
    """Remove the files of a study that this store does not have any more, if it was this store's."""
    root = _root(storage)
    folder = _find(root, identity, "")
    if folder is not None and _is_leftover(_owner(folder), store):
        _remove(folder, root)


@contextmanager
def placing(
    store: Store, staged: Path, name: str, identity: str, storage: Path | None = None
) -> Iterator[Callable[[int], None]]:
    """Let a prepared folder become that of a study that is being added to a store.

    Args:
        store: the store, where the study is not visible yet.
        staged: the prepared folder, beside those of studies.
        name: of the study.
        identity: of the study.
        storage: the storage directory; this process's own by default.

    Yields:
        What moves the folder to its place, given the study's id; an error afterwards removes it.
    """
    root, database, placed = _root(storage), store.database, []

    def place(study_id: int) -> None:
        folder = _new(root, name, store, inherits=False)
        mine = Owner(identity, *database, study_id, staged.stat().st_ino)
        (staged / MARKER).write_text(json.dumps(asdict(mine)), encoding="utf-8")
        with writing(folder):
            staged.replace(folder)  # which is empty
        placed.append(folder)

    with _locked(root):  # before the database's lock, as in study_folder
        try:
            yield place
        except BaseException:
            for folder in placed:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def leftovers(store: Store, storage: Path | None = None) -> list[Path]:
    """Return folders of studies that were in this store and are not any more: deleted by another program."""
    root = _root(storage)
    return [folder for folder in _folders(root) if _is_leftover(_owner(folder), store)]


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder; those that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def abandoned(storage: Path | None = None) -> list[Path]:
    """Return folders that a process left half removed, or half written when it died an hour ago or more."""
    root, before = _root(storage), time.time() - _UPLOAD_S
    partial = []
    for folder in root.glob(f"{PARTIAL}*"):
        process = folder.name.removeprefix(PARTIAL).partition("-")[0]
        is_running = process.isdigit() and psutil.pid_exists(int(process))  # on this machine, that is
        if not is_running and folder.stat().st_mtime < before:
            partial.append(folder)
    return sorted([*root.glob(f"{_REMOVED}*"), *partial])


def has_others(store: Store, storage: Path | None = None) -> bool:
    """Say whether folders lie here of studies of another store, or of one that is not known."""
    owners = [_owner(folder) for folder in _folders(_root(storage))]
    return any(owner is None or (owner.database, owner.number) != store.database for owner in owners)


def unlisted_artifacts(storage: Path | None = None) -> list[Path]:
    """Return files in the artifact folder that no study's folder lists, made an hour ago or more."""
    root = _root(storage)
    listed = {name for each in root.glob(f"*/*/{ARTIFACTS}") for name in each.read_text(encoding="utf-8").split()}
    before = time.time() - _UPLOAD_S
    files = [path for path in (root.parent / "artifacts").glob("*") if path.is_file() and not path.is_symlink()]
    return sorted(path for path in files if path.name not in listed and path.stat().st_mtime < before)


def remove(folder: Path) -> None:
    """Remove a folder of this module, with the artifacts that it lists.

    Raises:
        OutputError: it cannot be removed.
    """
    if folder.name.startswith((PARTIAL, _REMOVED)):
        shutil.rmtree(folder, ignore_errors=True)  # whoever began it may be at it still
    else:
        _remove(folder, folder.parent)


def finish_removals(storage: Path | None = None) -> None:
    """Remove what killed processes left in the folders of all studies: half removed folders, half written files."""
    root = _root(storage)
    for folder in root.glob(f"{_REMOVED}*"):
        shutil.rmtree(folder, ignore_errors=True)  # whoever began it may be at it still
    remove_abandoned(root)


def _root(storage: Path | None) -> Path:
    return (storage or storage_directory()).absolute() / "trials"


def _folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"*/{MARKER}"))


def _owner(folder: Path) -> Owner | None:
    try:
        return Owner(**json.loads((folder / MARKER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or not whole: nobody is known to own the folder
        return None


def _find(root: Path, identity: str, name: str) -> Path | None:
    """Return the folder of an identity: the original before a copy of it, and the one of this name before others."""
    found = [folder for folder in _folders(root) if getattr(_owner(folder), "identity", None) == identity]

    def order(folder: Path) -> tuple[bool, bool]:
        owner = _owner(folder)
        return owner is None or owner.folder != folder.stat().st_ino, folder.name != name

    return min(found, key=order, default=None)


def _new(root: Path, name: str, store: Store, inherits: bool) -> Path:
    """Return a folder for a study that has none: under its name, or under its name with the first free number."""
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        with writing(folder), suppress(FileExistsError):
            folder.mkdir()
            return folder
        if not folder.is_dir():
            number += 1
            continue
        owner = _owner(folder)
        if _is_leftover(owner, store):
            _remove(folder, root)
        elif not (folder / MARKER).exists() and ((inherits and number == 1) or not any(folder.iterdir())):
            return folder
        else:
            number += 1


def _is_left(found: Owner, mine: Owner, store: Store) -> bool:
    """Say whether a folder of this identity is free for ``mine``: nobody else of this identity is left to use it."""
    if found.folder != mine.folder:
        return True  # a copy of the folder: the original lies elsewhere, or on another disk
    theirs, ours = Path(found.database), Path(mine.database)
    if not theirs.is_absolute() or not ours.is_absolute():
        if (found.database, found.number) != (mine.database, mine.number):
            return False  # of another server nothing can be said
    elif theirs.exists() and theirs.stat().st_ino == found.number and not theirs.samefile(ours):
        return False  # another file, of which this one is a copy
    elif found.number != mine.number:
        return True  # this file has taken its place: restored from a copy, or brought from elsewhere
    if found.study_id == mine.study_id:
        return True  # the file has moved
    try:
        return store.get_study_user_attrs(found.study_id).get(names.IDENTITY) != mine.identity
    except StudyGoneError:
        return True  # renamed: the dashboard makes a copy under the new name and deletes the old one


def _is_leftover(owner: Owner | None, store: Store) -> bool:
    """Say whether a folder belonged to this store, and to a study that it does not have any more."""
    if owner is None or (owner.database, owner.number) != store.database:
        return False
    return all(study.user_attrs.get(names.IDENTITY) != owner.identity for study in store.get_all_studies())


def _remove(folder: Path, root: Path) -> None:
    artifacts = root.parent / "artifacts"
    for listed in folder.glob(f"*/{ARTIFACTS}"):
        for name in listed.read_text(encoding="utf-8").split():
            (artifacts / Path(name).name).unlink(missing_ok=True)
    doomed = folder.with_name(f"{_REMOVED}{folder.name}-{os.getpid()}")
    with writing(folder):
        folder.rename(doomed)  # at once, whatever happens while its files are removed
        with suppress(FileNotFoundError):  # another process finishes it
            shutil.rmtree(doomed)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one process at a time choose folders, where the file system has locks."""
    with writing(root), (root / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
