"""Folders of studies: no two studies share one, and a study finds its own again."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.study import StudyDirection

from ris_hpo.errors import StudyGoneError
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.folders import ARTIFACTS, MARKER, find_folder, finish_removals, leftovers, study_folder
from ris_hpo.store.open import open_store


def make(store: Store, name: str = "wide", begun: bool = False) -> str:
    study_id = store.create_new_study([StudyDirection.MINIMIZE], name)
    store.fill(study_id, lambda present: [ticket()])
    if begun:
        store.claim(study_id, "here:1:0:0")
    return name


def delete_elsewhere(store: Store, name: str) -> None:
    """As ``optuna delete-study`` does, from another process: this one is not told."""
    other = open_store(store.address)
    other.tickets.delete_study(other.get_study_id_from_name(name))
    other.close()


def rename(store: Store, old: str, new: str) -> None:
    """As the dashboard does it: a copy, and the old study is deleted."""
    optuna.copy_study(from_study_name=old, from_storage=store, to_storage=store, to_study_name=new)
    store.delete_study(store.get_study_id_from_name(old))


def test_a_study_has_one_folder_called_by_its_name(store: Store, tmp_path: Path) -> None:
    name = make(store)
    assert find_folder(store, name, tmp_path) is None
    folder = study_folder(store, name, tmp_path)
    assert folder == tmp_path / "trials" / "wide"
    assert study_folder(store, name, tmp_path) == find_folder(store, name, tmp_path) == folder
    again = open_store(store.address)
    assert study_folder(again, name, tmp_path) == folder
    again.close()


def test_two_stores_in_one_storage_directory_share_nothing(store: Store, tmp_path: Path) -> None:
    other = open_store(str(tmp_path / "other.db"))
    folders = [study_folder(each, make(each), tmp_path) for each in (store, other)]
    assert [folder.name for folder in folders] == ["wide", "wide-2"]
    assert [study_folder(each, "wide", tmp_path) for each in (store, other)] == folders
    other.close()


def test_a_study_made_anew_starts_in_an_empty_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIS_HPO_STORAGE_DIR", str(tmp_path))
    folder = study_folder(store, make(store))
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    for artifact in ("mine", "another's"):
        (artifacts / artifact).write_text("figure")
    (folder / "0").mkdir()
    (folder / "0" / "last.safetensors").write_text("weights")
    (folder / "0" / ARTIFACTS).write_text("mine\n../../outside\n")
    (tmp_path.parent / "outside").write_text("not to be touched")
    delete_elsewhere(store, "wide")
    assert leftovers(store) == [folder]
    make(store)
    assert study_folder(store, "wide") == folder
    assert [path.name for path in folder.iterdir()] == [MARKER]
    assert [path.name for path in artifacts.iterdir()] == ["another's"]
    assert (tmp_path.parent / "outside").exists()
    assert leftovers(store) == []


def test_a_study_deleted_here_takes_its_folder_with_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIS_HPO_STORAGE_DIR", str(tmp_path))
    kept = study_folder(store, make(store, "kept"))
    gone = study_folder(store, make(store, "gone"))
    store.delete_study(store.get_study_id_from_name("gone"))
    assert [path.exists() for path in (kept, gone)] == [True, False]


def test_what_killed_processes_left_half_done_is_removed(store: Store, tmp_path: Path) -> None:
    folder = study_folder(store, make(store), tmp_path)
    (folder / "0").mkdir()
    (folder.parent / ".removed-gone-77" / "3").mkdir(parents=True)
    names_of_files = {
        ".last.77-140.safetensors": False,
        ".notes.77-140": False,
        "last.safetensors": True,
        ".last.safetensors": True,
        "part.77-140": True,
    }
    for name in names_of_files:
        (folder / "0" / name).write_text("weights")
        os.utime(folder / "0" / name, (1e9, 1e9))
    (folder / "0" / ".best.77-140.safetensors").write_text("somebody may be writing it")
    finish_removals(tmp_path)
    kept = {name for name, is_kept in names_of_files.items() if is_kept} | {".best.77-140.safetensors"}
    assert {path.name for path in (folder / "0").iterdir()} == kept
    assert {path.name for path in folder.parent.iterdir()} == {"wide", ".lock"}


def test_a_folder_that_two_processes_remove_is_gone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIS_HPO_STORAGE_DIR", str(tmp_path))
    folder = study_folder(store, make(store))
    remove = shutil.rmtree

    def both(path: Path) -> None:
        remove(path)  # by the other one, just before
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", both)
    store.delete_study(store.get_study_id_from_name("wide"))
    assert [path.name for path in folder.parent.iterdir()] == [".lock"]


@pytest.mark.parametrize("text", ["", "[]", '{"identity": "x"}', "no json"])
def test_a_damaged_marker_stops_no_other_study(store: Store, tmp_path: Path, text: str) -> None:
    damaged = tmp_path / "trials" / "wide"
    damaged.mkdir(parents=True)
    (damaged / MARKER).write_text(text)
    folder = study_folder(store, make(store), tmp_path)
    assert folder == tmp_path / "trials" / "wide-2"
    assert (damaged / MARKER).read_text() == text


def test_a_renamed_study_finds_its_folder(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIS_HPO_STORAGE_DIR", str(tmp_path))
    folder = study_folder(store, make(store))
    (folder / "0").mkdir()
    rename(store, "wide", "wider")
    assert (study_folder(store, "wider"), (folder / "0").is_dir()) == (folder, True)
    make(store, "wide")
    assert study_folder(store, "wide").name == "wide-2"
    assert leftovers(store) == []


def test_a_copy_of_a_study_gets_a_folder_of_its_own(store: Store, tmp_path: Path) -> None:
    folder = study_folder(store, make(store), tmp_path)
    optuna.copy_study(from_study_name="wide", from_storage=store, to_storage=store, to_study_name="copy")
    other = open_store(str(tmp_path / "other.db"))
    optuna.copy_study(from_study_name="wide", from_storage=store, to_storage=other)
    assert study_folder(store, "copy", tmp_path) == tmp_path / "trials" / "copy"
    assert study_folder(other, "wide", tmp_path) == tmp_path / "trials" / "wide-2"
    assert study_folder(store, "wide", tmp_path) == folder
    other.close()


def test_copies_of_a_file_part_ways_and_what_was_moved_or_restored_does_not(tmp_path: Path) -> None:
    path, storage = tmp_path / "studies.db", tmp_path / "storage"
    first = open_store(str(path))
    folder = study_folder(first, make(first), storage)
    first.close()

    def folder_of(file: Path) -> Path:
        store = open_store(str(file))
        found = study_folder(store, "wide", storage)
        store.close()
        return found

    shutil.copy(path, tmp_path / "copy.db")
    assert folder_of(tmp_path / "copy.db").name == "wide-2"
    shutil.copy(path, tmp_path / "backup.db")
    path.rename(tmp_path / "moved.db")
    assert folder_of(tmp_path / "moved.db") == folder
    (tmp_path / "moved.db").unlink()
    (tmp_path / "backup.db").rename(path)  # the original is lost, and its backup takes its place
    assert folder_of(path) == folder
    assert folder_of(tmp_path / "copy.db").name == "wide-2"


def test_a_storage_directory_that_was_copied_is_complete(tmp_path: Path) -> None:
    first = open_store(str(tmp_path / "here" / "studies.db"))
    (study_folder(first, make(first), tmp_path / "here") / "0").mkdir()
    first.close()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    second = open_store(str(tmp_path / "there" / "studies.db"))
    assert (study_folder(second, "wide", tmp_path / "there") / "0").is_dir()
    second.close()


def test_files_of_a_version_without_identities_go_to_the_study_that_has_begun(store: Store, tmp_path: Path) -> None:
    old = tmp_path / "trials" / "wide" / "0"
    old.mkdir(parents=True)
    other = open_store(str(tmp_path / "other.db"))
    assert study_folder(other, make(other), tmp_path).name == "wide-2"  # a new study does not take them
    assert study_folder(store, make(store, begun=True), tmp_path) == old.parent
    assert old.is_dir()
    other.close()


def test_a_database_of_another_server_is_never_taken_for_gone(store: Store, tmp_path: Path) -> None:
    folder = study_folder(store, make(store), tmp_path)
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, "database": "postgresql:7", "number": 16384}))
    assert study_folder(store, "wide", tmp_path).name == "wide-2"


def test_a_study_in_use_is_not_taken_for_another_under_its_id(sqlite_store: Store, tmp_path: Path) -> None:
    """SQLite gives the id of a deleted study to the next one, and its trials' ids too."""
    make(sqlite_store)
    study_id = sqlite_store.get_study_id_from_name("wide")
    study_folder(sqlite_store, "wide", tmp_path)
    looking = open_store(sqlite_store.address)
    assert len(looking.get_all_trials(study_id)) == 1
    delete_elsewhere(sqlite_store, "wide")
    for call in (lambda: sqlite_store.claim(study_id, "here:1:0:1"), lambda: sqlite_store.get_all_trials(study_id)):
        with pytest.raises(StudyGoneError):
            call()
    another = open_store(sqlite_store.address)
    assert study_folder(another, make(another), tmp_path).is_dir()
    assert another.get_study_id_from_name("wide") == study_id
    for call in (lambda: sqlite_store.claim(study_id, "here:1:0:1"), lambda: sqlite_store.get_all_trials(study_id)):
        with pytest.raises(StudyGoneError, match="deleted or renamed"):
            call()
    (trial,) = looking.get_all_trials(study_id)  # who only looks is shown the new one
    assert trial.datetime_start is None
    another.claim(study_id, "here:1:0:1")
    assert looking.get_all_trials(study_id)[0].user_attrs[names.OWNER] == "here:1:0:1"
    another.close()
    looking.close()


def test_what_is_not_there_is_one_line(store: Store) -> None:
    for call in (
        lambda: store.get_study_id_from_name("none"),
        lambda: store.get_all_trials(99),
        lambda: store.get_trial(99),
        lambda: store.mark(99, 0, {"a": 1}),
        lambda: store.fill(99, lambda present: []),
        lambda: store.get_trial_id_from_study_id_trial_number(99, 0),
    ):
        with pytest.raises(StudyGoneError) as caught:
            call()
        assert str(caught.value).startswith("the study or trial is not in the store any more")


def test_an_identity_is_made_once(store: Store) -> None:
    make(store)
    study_id = store.get_study_id_from_name("wide")
    first = store.identity(study_id)
    again = open_store(store.address)
    assert again.identity(study_id) == first == store.get_study_user_attrs(study_id)[names.IDENTITY]
    renewed = again.identity(study_id, replaces=first)
    assert renewed != first
    assert store.identity(study_id, replaces=first) == renewed  # somebody else was faster
    again.close()


def test_a_backup_made_with_sqlite_is_a_copy(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "studies.db"))
    folder = study_folder(store, make(store), tmp_path)
    with closing(sqlite3.connect(tmp_path / "studies.db")) as source, closing(sqlite3.connect(tmp_path / "b.db")) as to:
        source.backup(to)
    copy = open_store(str(tmp_path / "b.db"))
    assert study_folder(copy, "wide", tmp_path) != folder
    for each in (store, copy):
        each.close()
