"""A study outside of its store: taken from one with its files, packed into one file, and put into another store.

``gather`` reads a study, ``pack`` writes it into an archive, ``unpack`` reads one back, ``put`` adds one to a store. A
copy from store to store is ``gather`` and ``put``; an archive is ``pack`` and ``unpack`` in between.

An archive is a ZIP file:

    manifest.json      format, and size and SHA-256 of every other member
    study.json         name, directions and attributes of the study
    trials.jsonl       one trial a line
    files/3/...        files of trial 3; other files of the study's folder
    artifacts/ID       files that the dashboard shows

It is read as if somebody hostile had written it: nothing is taken from a member that the manifest does not list with
its size and checksum, no member's name leads anywhere else, and nothing is unpacked for which the disk has no room.

Why not ``optuna.copy_study``: interrupted, it leaves part of a study that looks whole; it knows nothing of files; and
it takes three statements for each reported value.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import secrets
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.atomic import make_folder, replacing, writing
from ris_hpo.errors import ArchiveError, OutputError, reading
from ris_hpo.process import storage_directory
from ris_hpo.store import folders
from ris_hpo.store.cache import Store
from ris_hpo.store.tickets import StudyContent
from ris_hpo.text import file_size

FORMAT: Final = 1
_MANIFEST: Final = "manifest.json"
_STUDY: Final = "study.json"
_TRIALS: Final = "trials.jsonl"
_MOST_IN_MEMORY = 1 << 30  # bytes of the three members above together
_CHUNK = 1 << 20
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")  # what Optuna calls an artifact
_NOT_A_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)  # the last: encrypted
_NOT_UNDERSTOOD = (KeyError, ValueError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Package:
    """A study with its files.

    Attributes:
        content: what a database holds of it.
        files: by path within the study's folder, where each lies.
        artifacts: by identifier, where each lies.
    """

    content: StudyContent
    files: Mapping[str, Path]
    artifacts: Mapping[str, Path]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in (*self.files.values(), *self.artifacts.values()))


def gather(
    store: Store,
    name: str,
    wanted: Callable[[PurePosixPath], bool] = lambda path: True,
    storage: Path | None = None,
) -> Package:
    """Return a study with its files, as they are now; nothing is copied.

    Args:
        store: the store.
        name: the study.
        wanted: says of a path within the study's folder whether the file is taken.
        storage: the storage directory; this process's own by default.

    Raises:
        StudyGoneError: no such study.
    """
    content = store.content(store.get_study_id_from_name(name))
    folder = folders.find_folder(store, name, storage)
    files = {} if folder is None else dict(_files(folder, wanted))
    named = _named_in(content)
    place = _artifacts(storage)
    return Package(content, files, {each: place / each for each in sorted(named) if (place / each).is_file()})


def artifacts_of(store: Store) -> set[str]:
    """Return the identifiers of all artifacts that a store's studies and trials name."""
    studies = store.get_all_studies()
    contents = (store.content(store.get_study_id_from_name(study.study_name)) for study in studies)
    return {name for content in contents for name in _named_in(content)}


def _named_in(content: StudyContent) -> set[str]:
    attributes = [content.system_attrs, *(trial.system_attrs for trial in content.trials)]
    return {each for attrs in attributes for each in _UUID.findall(json.dumps([*attrs]))}


def _files(folder: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        within = PurePosixPath(path.relative_to(folder).as_posix())
        hidden = any(part.startswith(".") or re.search(r"\.(partial|damaged)-", part) for part in within.parts)
        if not hidden and path.is_file() and not path.is_symlink() and wanted(within):
            yield str(within), path


def _artifacts(storage: Path | None) -> Path:
    return (storage or storage_directory()).absolute() / "artifacts"


# -- archives --------------------------------------------------------------------------------------------------------


def pack(package: Package, out: Path, *, check: Callable[[], None] = lambda: None) -> None:
    """Write a study into an archive, and read it back before it takes its name.

    Args:
        package: the study.
        out: the file to make or replace.
        check: called when all is written; what it raises leaves no archive.

    Raises:
        OutputError: the file cannot be written.
        ArchiveError: a file changed meanwhile.
    """
    texts = {_STUDY: _study_text(package.content), _TRIALS: _trials_text(package.content)}
    members = {f"files/{name}": path for name, path in package.files.items()}
    members |= {f"artifacts/{name}": path for name, path in package.artifacts.items()}
    listed = {name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in texts.items()}
    for name, path in members.items():
        with path.open("rb") as stream:
            listed[name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    with replacing(out, durable=True) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1, strict_timestamps=False) as archive:
            archive.writestr(_MANIFEST, json.dumps({"format": FORMAT, "members": listed}))
            for name, text in texts.items():
                archive.writestr(name, text)
            for name, path in members.items():
                archive.write(path, name)
        with _opened(partial) as archive:
            for name, entry in _manifest(archive, out).items():
                _check(archive, name, entry, out)
        check()


def unpack(path: Path, scratch: Path) -> Package:
    """Read an archive; its files are unpacked below ``scratch``, an empty folder.

    Raises:
        ArchiveError: missing, damaged, cut short, or not an archive of this program.
        OutputError: the disk has no room for it.
    """
    with reading(path, ArchiveError), _opened(path) as archive:
        members = _manifest(archive, path)
        texts = {name: _check(archive, name, members.pop(name, None), path, keep=True) for name in (_STUDY, _TRIALS)}
        try:
            content = _content(json.loads(texts[_STUDY]), texts[_TRIALS].decode().splitlines())
        except _NOT_UNDERSTOOD as error:
            raise ArchiveError(f"{path}: is damaged, its study cannot be read ({type(error).__name__})") from None
        require_room(scratch, sum(entry["bytes"] for entry in members.values()))
        for name, entry in members.items():
            target = scratch / name
            make_folder(target.parent)
            with writing(target), target.open("xb") as out:
                _check(archive, name, entry, path, out)
    found = {name: scratch / name for name in members}
    return Package(
        content,
        {name.removeprefix("files/"): file for name, file in found.items() if name.startswith("files/")},
        {name.removeprefix("artifacts/"): file for name, file in found.items() if name.startswith("artifacts/")},
    )


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _NOT_A_ZIP as error:
        raise ArchiveError(
            f"{path}: is damaged or cut short, or not an archive of a study ({' '.join(str(error).split())[:100]}); "
            "expected a file that 'ris-hpo archive' wrote"
        ) from None


def _manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, dict[str, Any]]:
    """Return size and checksum of every member but the manifest, all of which the archive has and no others."""
    infos = {info.filename: info for info in archive.infolist()}
    head = infos.pop(_MANIFEST, None)
    if head is None:
        raise ArchiveError(f"{path}: is not an archive of a study, it has no {_MANIFEST}")
    in_memory = sum(info.file_size for info in (head, *(infos[name] for name in (_STUDY, _TRIALS) if name in infos)))
    if in_memory > _MOST_IN_MEMORY:
        raise ArchiveError(f"{path}: claims {in_memory:,} bytes of trials, more than any study has")
    try:
        tree = json.loads(archive.read(head))
        if tree["format"] != FORMAT:
            raise ArchiveError(
                f"{path}: is of format {tree['format']!r}, this program reads {FORMAT}; use the version that wrote it"
            )
        members = {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in tree["members"].items()
        }
    except _NOT_UNDERSTOOD as error:
        raise ArchiveError(f"{path}: is damaged, its {_MANIFEST} cannot be read ({type(error).__name__})") from None
    if len(infos) + 1 != len(archive.infolist()) or infos.keys() != members.keys():
        raise ArchiveError(f"{path}: is damaged, its members are not those that its {_MANIFEST} lists")
    for name, info in infos.items():
        if not _is_member(name):
            raise ArchiveError(f"{path}: has a member {name!r}, which no archive of a study has")
        if info.file_size != members[name]["bytes"]:
            raise ArchiveError(f"{path}: is damaged, {name} has not the {members[name]['bytes']} bytes that are listed")
    return members


def _is_member(name: str) -> bool:
    """Say whether a member may have this name: of the study itself, or of a file below its folder."""
    if name in (_STUDY, _TRIALS):
        return True
    kind, _, rest = name.partition("/")
    if kind == "artifacts":
        return _UUID.fullmatch(rest) is not None
    parts = rest.split("/")
    return kind == "files" and all(part and not part.startswith(".") for part in parts) and not set(rest) & {"\\", "\0"}


def _check(
    archive: zipfile.ZipFile,
    name: str,
    entry: Mapping[str, Any] | None,
    path: Path,
    out: IO[bytes] | None = None,
    *,
    keep: bool = False,
) -> bytes:
    """Read a member, into a file or not, and compare its checksum; return it where it is to be kept."""
    if entry is None:
        raise ArchiveError(f"{path}: is not an archive of a study, it has no {name}")
    digest, kept = hashlib.sha256(), bytearray()
    with archive.open(name) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if out is not None:
                out.write(chunk)
            if keep:
                kept += chunk
    if digest.hexdigest() != entry["sha256"]:
        raise ArchiveError(f"{path}: is damaged, the checksum of {name} is not the one that was recorded")
    return bytes(kept)


def _study_text(content: StudyContent) -> bytes:
    tree = {
        "name": content.name,
        "directions": [direction.name for direction in content.directions],
        "user_attrs": content.user_attrs,
        "system_attrs": content.system_attrs,
        "trials": len(content.trials),
    }
    return json.dumps(tree).encode()


def _trials_text(content: StudyContent) -> bytes:
    lines = []
    for trial in content.trials:
        began, ended = content.times[trial.number]
        params = {
            name: [trial.distributions[name].to_internal_repr(value), distribution_to_json(trial.distributions[name])]
            for name, value in trial.params.items()
        }
        tree = {
            "state": trial.state.name,
            "values": trial.values,
            "began": None if began is None else began.isoformat(),
            "ended": None if ended is None else ended.isoformat(),
            "params": params,
            "reports": list(trial.intermediate_values.items()),
            "user_attrs": trial.user_attrs,
            "system_attrs": trial.system_attrs,
        }
        lines.append(json.dumps(tree))
    return "\n".join(lines).encode()


def _content(study: dict[str, Any], lines: list[str]) -> StudyContent:
    times: dict[int, tuple[datetime | None, datetime | None]] = {}
    trials = []
    for number, line in enumerate(lines):
        tree = json.loads(line)
        began, ended = (None if tree[key] is None else datetime.fromisoformat(tree[key]) for key in ("began", "ended"))
        params, distributions = {}, {}
        for name, (value, text) in tree["params"].items():
            distributions[name] = json_to_distribution(text)
            params[name] = distributions[name].to_external_repr(float(value))
        times[number] = began, ended
        trials.append(
            FrozenTrial(
                number=number,
                state=TrialState[tree["state"]],
                value=None,
                values=None if tree["values"] is None else [float(value) for value in tree["values"]],
                datetime_start=began,
                datetime_complete=ended,
                params=params,
                distributions=distributions,
                user_attrs=dict(tree["user_attrs"]),
                system_attrs=dict(tree["system_attrs"]),
                intermediate_values={int(step): float(value) for step, value in tree["reports"]},
                trial_id=number,
            )
        )
    if len(trials) != study["trials"]:
        raise ValueError("trials are missing")
    return StudyContent(
        name=str(study["name"]),
        directions=[StudyDirection[name] for name in study["directions"]],
        user_attrs=dict(study["user_attrs"]),
        system_attrs=dict(study["system_attrs"]),
        trials=trials,
        times=times,
    )


# -- into a store ----------------------------------------------------------------------------------------------------


def put(
    package: Package,
    store: Store,
    *,
    move: bool = False,
    check: Callable[[], None] = lambda: None,
    storage: Path | None = None,
) -> None:
    """Add a study with its files to a store, whole or not at all.

    The study gets an identity and a folder of its own; where an artifact's name is taken, the artifact gets another one
    and the study's attributes say so. Killed at any moment, nothing is left but files that ``clean`` finds.

    Args:
        package: the study; its name must be free.
        store: the store.
        move: the package's files are not needed any more.
        check: called when the files are there and the study is not yet; what it raises undoes all.
        storage: the storage directory; this process's own by default.

    Raises:
        DuplicatedStudyError: a study of the store has the name.
        OutputError: files cannot be written, or the disk has no room for them.
    """
    place = _artifacts(storage)
    renamed = {name: str(uuid.uuid4()) for name in package.artifacts if (place / name).exists()}
    content, identity = _renamed(package.content, renamed), secrets.token_hex(8)
    made: list[Path] = []
    with scratch_folder(storage) as staged:
        if not move:
            require_room(staged, package.bytes)
        transfer: Callable[[Path, Path], Any] = os.replace if move else shutil.copyfile
        try:
            for name, path in package.files.items():
                target = staged / name
                make_folder(target.parent)
                with writing(target):
                    transfer(path, target)
                if renamed and target.name == folders.ARTIFACTS:
                    target.write_text(_with_names(target.read_text(encoding="utf-8"), renamed), encoding="utf-8")
            for name, path in package.artifacts.items():
                target = make_folder(place) / renamed.get(name, name)
                with replacing(target) as partial:
                    transfer(path, partial)
                made.append(target)
            check()
            with folders.placing(store, staged, content.name, identity, storage) as put_in_place:
                store.receive(content, identity, put_in_place if package.files else lambda study_id: None)
        except BaseException:
            for target in made:
                target.unlink(missing_ok=True)
            raise


@contextmanager
def scratch_folder(storage: Path | None = None) -> Iterator[Path]:
    """Make a folder beside those of studies, of which nothing is left afterwards unless it was moved away."""
    root = make_folder((storage or storage_directory()).absolute() / "trials")
    folder = make_folder(root / f"{folders.PARTIAL}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield folder
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)


def require_room(folder: Path, needed: int) -> None:
    """Refuse to write more than the disk has room for.

    Raises:
        OutputError: it has less.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"{folder.parent}: {file_size(needed)} are needed, {file_size(free)} are free; make room")


def _renamed(content: StudyContent, renamed: Mapping[str, str]) -> StudyContent:
    """Return a study whose attributes call artifacts by their new names."""
    if not renamed:
        return content

    def attributes(before: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(_with_names(json.dumps(before), renamed))
        return found

    trials = []
    for trial in content.trials:
        changed = attributes(trial.system_attrs)
        if changed != trial.system_attrs:
            trial = copy.copy(trial)
            trial.system_attrs = changed
        trials.append(trial)
    return replace(content, system_attrs=attributes(content.system_attrs), trials=trials)


def _with_names(text: str, renamed: Mapping[str, str]) -> str:
    return _UUID.sub(lambda found: renamed.get(found.group(), found.group()), text)
