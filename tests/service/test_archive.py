"""A study as one file and in another store: nothing is lost, nothing is half there, nothing hostile is believed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from ris_hpo.errors import ArchiveError, OutputError, StudyError
from ris_hpo.process import STORAGE_VARIABLE
from ris_hpo.results.replay import replay
from ris_hpo.search.amend import enqueue, invalidate
from ris_hpo.search.archive import archive_study, copy_study, restore_study
from ris_hpo.search.lifecycle import get_study, status
from ris_hpo.search.spec import KeepSpec
from ris_hpo.search.upkeep import delete_study
from ris_hpo.store import attributes as names
from ris_hpo.store import transfer
from ris_hpo.store.cache import Store
from ris_hpo.store.folders import find_folder, leftovers
from ris_hpo.store.open import open_store
from ris_hpo.trials.context import Report
from ris_hpo.workers.worker import job_for, run_worker
from tests.postgres import Postgres

from .conftest import elsewhere, id_of
from .pools import begin, table


def halfway(store: Store) -> None:
    """A study in every state: ended, half-way with a checkpoint, asked for, invalid, with values that no JSON has."""
    study = begin(store, 3, pruner={"name": "none"})
    reports: list[Report] = []
    run_worker(
        job_for(store, study),
        stop=lambda: len(reports) >= 11,
        notify=lambda event: reports.append(event) if isinstance(event, Report) else None,
    )
    enqueue(store, "unit", [{"shape.x": 0.1 + 0.2, "shape.y": 7}])
    ranges = {
        "shape.x": FloatDistribution(0.0, 1.0),
        "shape.y": IntDistribution(1, 9),
        "shape.kind": CategoricalDistribution(["plain", "fancy"]),
    }
    odd = create_trial(
        state=TrialState.COMPLETE,
        value=math.inf,
        params={"shape.x": 1 / 3, "shape.y": 9, "shape.kind": "fancy"},
        distributions=ranges,
        user_attrs={"note": "é\n", "nothing": None},
        system_attrs={"rung": 0.1},
        intermediate_values={100: math.nan, 200: -math.inf, 300: 2.0},
    )
    study.add_trial(odd)
    invalidate(store, "unit", [3], "no such score")
    folder = find_folder(store, "unit")
    assert folder is not None
    artifacts = folder.parents[1] / "artifacts"
    picture = folder / "picture.svg"
    picture.write_text("<svg/>")
    identifier = upload_artifact(
        artifact_store=FileSystemArtifactStore(artifacts), file_path=str(picture), study_or_trial=study
    )
    (folder / "page").mkdir()
    (folder / "page" / "artifacts.txt").write_text(f"{identifier}\n")


def contents(store: Store, name: str = "unit") -> dict[str, Any]:
    """All that is stored of a study, in a form in which NaN equals itself and dictionaries have no order."""

    def sort(value: Any) -> Any:
        return sorted(value.items()) if isinstance(value, dict) else value

    content = store.content(store.get_study_id_from_name(name))
    trials = [
        (
            *(trial.number, trial.state, trial.values, trial.params, trial.distributions, trial.user_attrs),
            *(trial.system_attrs, trial.intermediate_values, trial.datetime_start, trial.datetime_complete),
        )
        for trial in content.trials
    ]
    return {
        "directions": content.directions, "user": content.user_attrs, "system": content.system_attrs,
        "times": content.times, "trials": repr([[sort(value) for value in trial] for trial in trials]),
    }  # fmt: skip


def files(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".study.json"}


@pytest.fixture(params=["archive", "to postgres", "from postgres"])
def moved(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """A study in one store, and the same one in another store to which it was moved."""
    here = f"sqlite:///{tmp_path / 'here.db'}"
    there = f"sqlite:///{tmp_path / 'there.db'}"
    if request.param != "archive":
        server: Postgres = request.getfixturevalue("postgres")
        here, there = (here, server.url()) if request.param == "to postgres" else (server.url(), there)
    first, second = open_store(here), open_store(there)
    halfway(first)
    if request.param == "archive":
        archive_study(first, "unit", tmp_path / "unit.zip")
        restore_study(second, tmp_path / "unit.zip")
    else:
        copy_study(first, "unit", second)
    yield first, second
    first.close()
    second.close()


@pytest.mark.postgres
def test_a_moved_study_is_the_same_goes_on_and_replays(moved: tuple[Store, Store]) -> None:
    first, second = moved
    folders = [find_folder(store, "unit") for store in moved]
    assert folders[0] != folders[1]
    before, after = contents(first), contents(second)
    assert after["system"] != before["system"]  # the picture is another file, since its name was taken
    assert {**after, "system": None} == {**before, "system": None}
    assert set(files(folders[0])) == set(files(folders[1]))
    assert status(first, "unit").as_dict() == status(second, "unit").as_dict()
    for store in moved:
        run_worker(job_for(store, get_study(store, "unit")))
    assert repr(table(first)) == repr(table(second))
    stands = status(second, "unit").trials
    assert (stands.complete, stands.invalidated, stands.open) == (3, 1, 0)
    assert replay(second, "unit", 1).identical
    assert get_study(second, "unit").get_trials()[1].user_attrs[names.PREEMPTIONS] == 1
    folder = folders[0]
    assert folder is not None
    artifacts = folder.parents[1] / "artifacts"
    delete_study(first, "unit")
    (kept,) = artifacts.iterdir()
    assert kept.read_text() == "<svg/>"
    assert kept.name in json.dumps(contents(second)["system"])
    delete_study(second, "unit")
    assert list(artifacts.iterdir()) == []


def test_a_study_of_that_name_is_left_alone(sqlite_store: Store, tmp_path: Path) -> None:
    halfway(sqlite_store)
    before = contents(sqlite_store)
    archive_study(sqlite_store, "unit", tmp_path / "unit.zip")
    for attempt in (
        lambda: restore_study(sqlite_store, tmp_path / "unit.zip"),
        lambda: copy_study(sqlite_store, "unit", sqlite_store),
    ):
        with pytest.raises(StudyError, match="has a study 'unit' already; add --name NEW"):
            attempt()
    assert restore_study(sqlite_store, tmp_path / "unit.zip", name="again").study == "again"
    copy_study(sqlite_store, "unit", sqlite_store, new="third")
    assert contents(sqlite_store) == before
    assert contents(sqlite_store, "again")["trials"] == before["trials"]
    with pytest.raises(StudyError, match="a name has letters"):
        restore_study(sqlite_store, tmp_path / "unit.zip", name="../unit")


def test_checkpoints_are_taken_by_rule_and_those_of_open_trials_always(sqlite_store: Store, tmp_path: Path) -> None:
    halfway(sqlite_store)
    archive_study(sqlite_store, "unit", tmp_path / "unit.zip", keep=KeepSpec(checkpoints="none"))
    names_in = zipfile.ZipFile(tmp_path / "unit.zip").namelist()
    assert "files/1/checkpoint.json" in names_in
    assert "files/0/checkpoint.json" not in names_in
    assert "files/0/reports.jsonl" in names_in


def test_a_study_that_runs_is_not_moved(sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = begin(sqlite_store, 2)
    other = open_store(f"sqlite:///{tmp_path / 'other.db'}")
    real = transfer.gather

    def begun_meanwhile(*arguments: Any) -> Any:
        package = real(*arguments)
        sqlite_store.claim(id_of(sqlite_store, study), str(elsewhere()))
        return package

    monkeypatch.setattr("ris_hpo.search.archive.gather", begun_meanwhile)
    with pytest.raises(StudyError, match="is running"):
        archive_study(sqlite_store, "unit", tmp_path / "unit.zip")
    monkeypatch.undo()
    monkeypatch.setenv(STORAGE_VARIABLE, str(tmp_path / "storage"))
    with pytest.raises(StudyError, match="is running"):
        copy_study(sqlite_store, "unit", other)
    assert not (tmp_path / "unit.zip").exists()
    assert other.get_all_studies() == []
    assert copy_study(sqlite_store, "unit", other, force=True).trials == 2
    other.close()


# -- killed ------------------------------------------------------------------------------------------------------------


def killed(action: Callable[[], object]) -> None:
    """Run something in a process that is killed while it does it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["files", "trials", "folder"])
@pytest.mark.parametrize("target", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_a_copy_that_is_killed_leaves_no_half_study(
    request: pytest.FixtureRequest, tmp_path: Path, moment: str, target: str
) -> None:
    address = f"sqlite:///{tmp_path / 'here.db'}"
    other = f"sqlite:///{tmp_path / 'there.db'}"
    if target == "postgres":
        other = request.getfixturevalue("postgres").url()
    store = open_store(address)
    study = begin(store, 3)
    folder = tmp_path / "storage" / "trials" / "unit"
    job_for(store, study)  # makes the folder
    (folder / "0").mkdir()
    (folder / "0" / "checkpoint.json").write_text("{}")
    store.close()
    open_store(other).close()

    def copied() -> None:
        here, there = open_store(address), open_store(other)
        real = there.tickets.add_trials
        if moment == "files":
            there.tickets.receive = die  # type: ignore[method-assign]
        elif moment == "trials":
            there.tickets.add_trials = lambda *args: (real(*args), die())  # type: ignore[assignment,method-assign]
        else:
            replaced = Path.replace
            Path.replace = lambda self, target: (replaced(self, target), die())  # type: ignore[assignment,method-assign]
        copy_study(here, "unit", there)

    killed(copied)
    store, there = open_store(address), open_store(other)
    assert there.get_all_studies() == []
    assert len(leftovers(there)) == (moment == "folder")
    copy_study(store, "unit", there)
    assert contents(store)["trials"] == contents(there)["trials"]
    assert files(find_folder(there, "unit")) == files(folder)
    store.close()
    there.close()


# -- hostile archives --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of a small study."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STORAGE_VARIABLE, str(folder / "storage"))
        store = open_store(f"sqlite:///{folder / 'studies.db'}")
        study = begin(store, 2)
        own = Path(job_for(store, study).directory) / "0"
        own.mkdir()
        (own / "checkpoint.bin").write_bytes(bytes(range(256)) * 8)
        archive_study(store, "unit", folder / "good.zip")
        store.close()
    return folder / "good.zip"


def rewritten(good: Path, bad: Path, change: Callable[[dict[str, bytes]], None], *, listed: bool = True) -> None:
    """Write an archive with other members, and with a manifest that lists them if so wanted."""
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    if listed:
        entries = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
            if name != "manifest.json"
        }
        members["manifest.json"] = json.dumps({"format": 1, "members": entries}).encode()
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def replaced_in(name: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        assert old in members[name]
        members[name] = members[name].replace(old, new)

    return change


ESCAPES = ["../evil", "/evil", "files/../../evil", "files/..", "files//evil", "artifacts/evil", "files/a\\b", "evil"]
HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], Any], bool, str]] = {
    **{name: (lambda members, name=name: members.update({name: b"x"}), True, "which no archive") for name in ESCAPES},
    "another format": (replaced_in("manifest.json", b'"format": 1', b'"format": 9'), False, "is of format 9"),
    "no manifest": (lambda members: members.pop("manifest.json"), False, "has no manifest.json"),
    "no trials": (lambda members: members.pop("trials.jsonl"), True, "has no trials.jsonl"),
    "not listed": (lambda members: members.update({"files/evil": b"x"}), False, "are not those"),
    "other bytes": (replaced_in("files/0/checkpoint.bin", b"\x01", b"\x02"), False, "the checksum of files/0"),
    "more bytes": (replaced_in("files/0/checkpoint.bin", b"\x01", b"\x02\x02"), False, "has not the"),
    "a manifest of no sense": (lambda members: members.update({"manifest.json": b"[1]"}), False, "cannot be read"),
    "trials of no sense": (lambda members: members.update({"trials.jsonl": b'{"state": 3}\n'}), True, "cannot be read"),
    "a trial too few": (lambda m: m.update({"trials.jsonl": b""}), True, "cannot be read"),
    "a study of no sense": (lambda members: members.update({"study.json": b"{}"}), True, "cannot be read"),
    "deep nesting": (lambda m: m.update({"study.json": b"[" * 100_000}), True, "cannot be read"),
    "of another program": (replaced_in("study.json", b'"spec"', b'"spek"'), True, "carries no specification"),
    "a bomb": (
        replaced_in("manifest.json", b'"bytes": 2048', b'"bytes": 9007199254740992'), False, "has not the",
    ),
}  # fmt: skip


def refused(store: Store, bad: Path, message: str, kind: type[Exception] = ArchiveError) -> None:
    with pytest.raises(kind, match=message) as failure:
        restore_study(store, bad)
    assert "\n" not in str(failure.value)
    assert store.get_all_studies() == []
    storage = Path(os.environ[STORAGE_VARIABLE])
    assert [path for path in storage.rglob("*") if path.name not in ("trials", "artifacts", ".lock")] == []
    assert not list(storage.parent.rglob("evil*"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_one_line_and_leaves_nothing(
    sqlite_store: Store, good: Path, tmp_path: Path, kind: str
) -> None:
    change, listed, message = HOSTILE[kind]
    rewritten(good, tmp_path / "bad.zip", change, listed=listed)
    refused(sqlite_store, tmp_path / "bad.zip", message)


def test_an_archive_that_is_cut_short_or_changed_is_one_line(sqlite_store: Store, good: Path, tmp_path: Path) -> None:
    whole, bad = good.read_bytes(), tmp_path / "bad.zip"
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:length])
        refused(sqlite_store, bad, "bad.zip: is damaged or cut short")
    for place in (40, len(whole) // 3, len(whole) // 2):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        refused(sqlite_store, bad, "bad.zip: is damaged")
    bad.write_text("no archive at all")
    refused(sqlite_store, bad, "not an archive of a study")
    refused(sqlite_store, tmp_path / "none.zip", "no such file")


def test_a_link_in_an_archive_is_a_file_and_a_name_twice_is_refused(
    sqlite_store: Store, good: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.zip"
    rewritten(good, bad, lambda members: members.update({"files/0/link": b"/etc/passwd"}))
    with zipfile.ZipFile(bad) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(bad, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16 if name.endswith("link") else 0o644 << 16
            archive.writestr(info, data)
    restore_study(sqlite_store, bad, name="linked")
    folder = find_folder(sqlite_store, "linked")
    assert folder is not None
    assert not (folder / "0" / "link").is_symlink()
    delete_study(sqlite_store, "linked")
    with zipfile.ZipFile(bad, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("files/0/link", b"x")
    refused(sqlite_store, bad, "are not those that its manifest.json lists")


def test_nothing_is_unpacked_for_which_there_is_no_room(
    sqlite_store: Store, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**6, 10**6, 2047)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage)
    refused(sqlite_store, good, "2.05 kB are needed, 2.05 kB are free", OutputError)
