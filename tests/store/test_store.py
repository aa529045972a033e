"""The store: Optuna's own contract on both back-ends, ours on top, and what is refused."""

from __future__ import annotations

import gc
import multiprocessing
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState

from ris_hpo.errors import StoreError
from ris_hpo.process import STORAGE_VARIABLE
from ris_hpo.store import attributes as names
from ris_hpo.store import credentials
from ris_hpo.store import open as module
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.credentials import redact
from ris_hpo.store.open import open_store
from tests.postgres import Postgres


@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestOptunaContract(StorageTestCase):
    """Optuna's suite, on SQLite and PostgreSQL through our factory."""

    @pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
    def storage(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
        if request.param == "sqlite":
            opened = open_store(str(tmp_path / "studies.db"))
            yield opened
            opened.close()
            return
        opened = open_store(request.getfixturevalue("postgres").shared_url())  # emptied, which is faster than made anew
        yield opened
        with opened.tickets.engine.begin() as connection:
            connection.exec_driver_sql("TRUNCATE studies, trials RESTART IDENTITY CASCADE")
        opened.close()

    def test_pickle_storage(self, storage: Store) -> None:
        super().test_pickle_storage(storage)
        with warnings.catch_warnings():  # the copy is dropped with its connection open
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def new_study(store: Store, tickets: int = 0) -> int:
    study_id = store.create_new_study([optuna.study.StudyDirection.MINIMIZE], "unit")
    store.fill(study_id, lambda present: [ticket() for _ in range(tickets)])
    return study_id


def test_claims_come_in_order_and_end(store: Store) -> None:
    study_id = new_study(store, 3)
    assert [store.claim(study_id, f"here:1:0:{i}") for i in range(4)] == [0, 1, 2, None]
    trials = store.get_all_trials(study_id)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert all(trial.state == TrialState.RUNNING for trial in trials)
    assert trials[1].user_attrs[names.OWNER] == "here:1:0:1"


def test_a_repeated_claim_is_the_same_claim(store: Store) -> None:
    study_id = new_study(store, 2)
    first = store.claim(study_id, "here:1:0:0")
    assert store.claim(study_id, "here:1:0:0") == first
    assert store.claim(study_id, "here:1:0:1") != first


def test_fill_counts_what_is_there(store: Store) -> None:
    study_id = new_study(store, 2)
    assert store.fill(study_id, lambda present: [ticket() for _ in range(5 - len(present))]) == 3
    assert store.fill(study_id, lambda present: [ticket() for _ in range(5 - len(present))]) == 0
    assert [trial.number for trial in store.get_all_trials(study_id)] == list(range(5))


def test_release_asks_for_the_owner(store: Store) -> None:
    study_id = new_study(store, 1)
    number = store.claim(study_id, "here:1:0:0")
    assert number is not None
    assert not store.release(study_id, number, "there:2:0:0", {})
    assert store.release(study_id, number, "here:1:0:0", {names.PREEMPTIONS: 1})
    (trial,) = store.get_all_trials(study_id)
    assert trial.state == TrialState.WAITING
    assert trial.user_attrs == {names.OWNER: None, names.PREEMPTIONS: 1}
    assert store.claim(study_id, "there:2:0:0") == number


def test_retire_fences_the_late_owner(store: Store) -> None:
    study_id = new_study(store, 1)
    number = store.claim(study_id, "here:1:0:0")
    assert number is not None
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, number)
    successor = ticket({"shape.x": 0.25}, {names.PREDECESSOR: 0})
    assert store.retire(study_id, number, "here:1:0:0", {names.CAUSE: "lost_worker"}, lambda trial: successor)
    assert not store.retire(study_id, number, None, {names.CAUSE: "timeout"}, lambda trial: successor)
    failed, queued = store.get_all_trials(study_id)
    assert (failed.state, failed.user_attrs[names.CAUSE]) == (TrialState.FAIL, "lost_worker")
    assert (queued.state, queued.number, queued.user_attrs[names.PREDECESSOR]) == (TrialState.WAITING, 1, 0)
    with pytest.raises(UpdateFinishedTrialError):
        store.set_trial_intermediate_value(trial_id, 5, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        store.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    with pytest.raises(UpdateFinishedTrialError):
        store.mark(study_id, number, {names.SECONDS: 1.0})


def test_withdraw_leaves_claimed_tickets_alone(store: Store) -> None:
    study_id = new_study(store, 2)
    claimed = store.claim(study_id, "here:1:0:0")
    store.withdraw(study_id, [trial.number for trial in store.get_all_trials(study_id)])
    states = {trial.number: trial.state for trial in store.get_all_trials(study_id)}
    assert states.pop(claimed) == TrialState.RUNNING
    assert list(states.values()) == [TrialState.FAIL]


def _fill_and_claim(address: str, study_id: int, results: multiprocessing.Queue[tuple[int, list[int]]]) -> None:
    store = open_store(address)
    added = store.fill(study_id, lambda present: [ticket() for _ in range(60 - len(present))])
    mine: list[int] = []
    while (number := store.claim(study_id, f"here:{os.getpid()}:0:{len(mine)}")) is not None:
        mine.append(number)
    results.put((added, mine))


def test_processes_never_claim_the_same_ticket_nor_overfill(url: str) -> None:
    store = open_store(url)
    study_id = new_study(store)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[int, list[int]]] = context.Queue()
    crew = [context.Process(target=_fill_and_claim, args=(url, study_id, results)) for _ in range(3)]
    for process in crew:
        process.start()
    found = [results.get(timeout=60) for _ in crew]
    for process in crew:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert sorted(added for added, _ in found) == [0, 0, 60]
    taken = [number for _, mine in found for number in mine]
    assert len(taken) == len(set(taken)) == 60
    store.close()


# -- settings and refusals -------------------------------------------------------------------------------------------


def test_sqlite_runs_in_wal_with_a_long_busy_timeout(sqlite_store: Store) -> None:
    with sqlite_store.tickets.engine.connect() as connection:
        pragma = {
            key: connection.exec_driver_sql(f"PRAGMA {key}").scalar()
            for key in ("journal_mode", "synchronous", "busy_timeout")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 60000}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mysql://user:secret@host/db", "no store of kind"),
        ("sqlite://", "needs a file"),
        ("nonsense://", "no store of kind"),
        ("://", "no store address"),
        ("postgresql://someone:secret@127.0.0.1:1/none", "cannot be reached"),
    ],
)
def test_refusals_are_one_line_without_the_password(address: str, words: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(address)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_store_is_not_made_by_looking(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such store"):
        open_store(str(tmp_path / "none.db"), create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_bytes(b"these are notes and no database" * 100)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not usable as a store"):
        open_store(str(path))
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        open_store(str(tmp_path / "file" / "studies.db"))


def test_opening_twice_takes_no_lock_away(tmp_path: Path) -> None:
    """A process that closes a file loses all its locks on it; another one then takes the log away from under it."""
    address = str(tmp_path / "studies.db")
    first = open_store(address)
    assert first.get_all_studies() == []
    second = open_store(address)
    assert second.get_all_studies() == []
    code = "import sys; from optuna.study import StudyDirection; from ris_hpo.store.open import open_store; "
    code += "s = open_store(sys.argv[1]); s.create_new_study([StudyDirection.MINIMIZE], sys.argv[2]); s.close()"
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", code, address, name], check=True)
        assert (tmp_path / "studies.db-wal").exists()  # it did not think itself the last one
    for store in (first, second):
        assert [study.study_name for study in store.get_all_studies()] == ["one", "two"]
        store.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes read-only files")
def test_a_read_only_store(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    open_store(str(path)).close()
    path.chmod(stat.S_IRUSR)
    with pytest.raises(StoreError, match="not usable"):
        open_store(str(path))


def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "file_system_of", lambda path: "nfs4")
    with pytest.raises(StoreError, match="network file system \\(nfs4\\)"):
        open_store(str(tmp_path / "studies.db"))


def test_file_system_of_knows_this_disk(tmp_path: Path) -> None:
    assert module.file_system_of(tmp_path) not in ("", "nfs4")


def test_default_url_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.URL_VARIABLE, raising=False)
    monkeypatch.setenv(STORAGE_VARIABLE, "/somewhere")
    assert module.default_url() == "sqlite:////somewhere/studies.db"
    monkeypatch.setenv(module.URL_VARIABLE, "postgresql://host/db")
    assert module.default_url() == "postgresql://host/db"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pa:ss@w0rd@host/db", "postgresql://me:***@host/db"),
        ("see postgresql+psycopg://me:secret@host:5432/db now", "see postgresql+psycopg://me:***@host:5432/db now"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("host=a password=secret user=b", "host=a password=*** user=b"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=***"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_redaction(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.postgres
def test_passwords_from_the_surroundings(postgres: Postgres, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = postgres.url()
    secret = tmp_path / "secret"
    secret.write_text("from{file}\n")
    monkeypatch.setenv(credentials.PASSWORD_FILE_VARIABLE, str(secret))
    store = open_store(address)
    assert store.tickets.engine_kwargs["connect_args"]["password"] == "from{file}"
    assert "from{file}" not in store.tickets.url
    store.close()
    monkeypatch.setenv(credentials.PASSWORD_VARIABLE, "direct")
    store = open_store(address)
    assert store.tickets.engine_kwargs["connect_args"]["password"] == "direct"
    store.close()
    secret.unlink()
    monkeypatch.delenv(credentials.PASSWORD_VARIABLE)
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(address)
