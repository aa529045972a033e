"""Opening a store: what is refused, what can be read only, few connections, backups."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
import sqlalchemy
from optuna.study import StudyDirection
from optuna.trial import TrialState

from ris_hpo.errors import OutputError, StoreError
from ris_hpo.process import STORAGE_VARIABLE
from ris_hpo.store import credentials, retry
from ris_hpo.store import open as module
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.credentials import redact
from ris_hpo.store.open import backup, open_store
from tests.postgres import Postgres


def fill(store: Store, tickets: int = 2) -> int:
    study_id = store.create_new_study([StudyDirection.MINIMIZE], "unit")
    store.fill(study_id, lambda present: [ticket() for _ in range(tickets)])
    return study_id


# -- settings and refusals ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["run%20a", "what?", "a{b}c", "x#y", "two words", "ü&=;"])
@pytest.mark.parametrize("prefix", ["", "sqlite:///"])
def test_the_store_lies_in_the_folder_that_was_named(name: str, prefix: str, tmp_path: Path) -> None:
    address = f"{prefix}{tmp_path / name / 'studies.db'}"
    store = open_store(address)
    fill(store)
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert "studies.db" in [path.name for path in (tmp_path / name).iterdir()]
    again = open_store(store.address, create=False)
    assert [study.study_name for study in again.get_all_studies()] == ["unit"]
    again.close()
    backup(address, tmp_path / name / "copy.db")
    assert (tmp_path / name / "copy.db").is_file()


def test_another_schema_is_refused(store: Store) -> None:
    with store.tickets.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    with pytest.raises(StoreError, match=r"another version of Optuna \(schema v2.6.0.a, expected v3.2.0.a\)"):
        open_store(store.address)


# -- stores that may only be read --------------------------------------------------------------------------------------

LOOK = """
import sys
from ris_hpo.store.open import open_store
store = open_store(sys.argv[1], create=False)
print([len(store.get_all_trials(store.get_study_id_from_name(each.study_name))) for each in store.get_all_studies()])
try:
    store.claim(1, "here:1:0:0")
except Exception as error:
    print(type(error).__name__, error)
try:
    open_store(sys.argv[1], create=False, write=True)
except Exception as error:
    print(type(error).__name__, error)
"""


def look(folder: Path, file: str) -> list[str]:
    """Look at a store as somebody who may read its files and write nothing in their folder."""
    command = [sys.executable, "-W", "error", "-c", LOOK, str(folder / file)]
    for path in (folder, *folder.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to give up its right to write everywhere")
        for path in (folder, *folder.iterdir()):
            os.chown(path, 65534, 65534)
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_store_in_an_archive_can_be_read(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    store = open_store(str(archive / "studies.db"))
    fill(store)
    store.close()
    assert not (archive / "studies.db-wal").exists()
    seen, refused, closed = look(archive, "studies.db")
    assert seen == "[2]"
    assert refused == "StoreError the store refused: attempt to write a readonly database"
    assert closed.startswith(f"StoreError {archive / 'studies.db'}: not usable as a store (")


def test_a_log_that_was_left_behind_is_read(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "studies.db"))
    fill(store)
    archive = tmp_path / "archive"
    archive.mkdir()
    for name in ("studies.db", "studies.db-wal"):  # as a plain copy of a running store has it
        shutil.copy(tmp_path / name, archive)
    assert look(archive, "studies.db")[0] == "[2]"
    assert sorted(path.name for path in archive.iterdir()) == ["studies.db", "studies.db-wal"]
    store.close()


def test_a_store_that_somebody_else_is_writing_can_be_read(tmp_path: Path) -> None:
    place = tmp_path / "place"
    store = open_store(str(place / "studies.db"))
    study_id = fill(store)
    assert look(place, "studies.db")[0] == "[2]"
    store.fill(study_id, lambda present: [ticket()])
    assert look(place, "studies.db")[0] == "[3]"
    store.close()


def test_a_store_in_a_closed_folder_is_not_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(StoreError, match=r"cannot be read \(Permission denied\)"):
        open_store(str(tmp_path / "studies.db"), create=False)


@pytest.mark.postgres
@pytest.mark.parametrize("create", [True, False])
def test_a_store_that_may_not_be_read_is_not_said_to_be_missing(
    create: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "studies.db"
    open_store(str(path)).close()
    monkeypatch.setattr(os, "access", lambda *_: False)  # as mode 000 has it for all but root
    with pytest.raises(StoreError, match=r"studies\.db: no permission to read it; ask its owner"):
        open_store(str(path), create=create)


def test_a_role_that_may_only_read(postgres: Postgres) -> None:
    owner = postgres.url()
    store = open_store(owner)
    study_id = fill(store)
    reading = open_store(role_of(postgres, owner, "SELECT ON ALL TABLES IN SCHEMA public"), create=False)
    assert len(reading.get_all_trials(study_id)) == 2
    assert reading.heartbeats(study_id) == {}
    with pytest.raises(StoreError, match="the store refused: permission denied"):
        reading.claim(study_id, "here:1:0:0")
    assert reading.database == store.database
    reading.close()
    store.close()


# -- PostgreSQL with few connections, and a pooler ---------------------------------------------------------------------


def role_of(postgres: Postgres, url: str, rights: str, limit: int = -1) -> str:
    """Address of a database for a new role that is no superuser, with so many connections."""
    role = f"role_of_{sqlalchemy.make_url(url).database}"
    postgres.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT {limit}")
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"GRANT {rights} TO {role}")
    return sqlalchemy.make_url(url).set(username=role).render_as_string(hide_password=False)


@pytest.fixture
def scarce(postgres: Postgres) -> str:
    """A fresh database for a role with a single connection."""
    return role_of(postgres, postgres.url(), "ALL ON SCHEMA public", 1)


@pytest.mark.postgres
def test_one_connection_is_enough(scarce: str) -> None:
    store = open_store(scarce)
    study_id = fill(store)
    assert store.claim(study_id, "here:1:0:0") == 0
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, 0)
    store.record_heartbeat(trial_id)
    assert list(store.heartbeats(study_id)) == [0]
    store.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert store.retire(study_id, 0, None, {}, lambda trial: None) is False
    store.close()


@pytest.mark.postgres
def test_too_many_connections_are_named_at_once(scarce: str) -> None:
    first = open_store(scarce)
    first.get_all_studies()
    with pytest.raises(StoreError, match=r"too many connections for role .* use fewer workers") as caught:
        open_store(scarce)
    assert "\n" not in str(caught.value)
    first.close()


@pytest.mark.postgres
def test_whoever_waits_for_a_connection_says_so_and_goes_on(
    scarce: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert retry.QUIET_S + retry.LONGEST_PAUSE_S < 10
    first = open_store(scarce)
    first.get_all_studies()
    monkeypatch.setattr(retry, "QUIET_S", 0.0)
    monkeypatch.setattr(retry.Wait, "attempt", lambda self: nullcontext())
    told = threading.Event()

    class Notice(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    handler = Notice()
    logging.getLogger("ris_hpo").addHandler(handler)

    def leave() -> None:
        told.wait(60)
        first.close()

    thread = threading.Thread(target=leave)
    thread.start()
    second = open_store(scarce, retry_s=120)
    thread.join()
    logging.getLogger("ris_hpo").removeHandler(handler)
    (record,) = [record for record in caplog.records if record.name == "ris_hpo.store.retry"]
    assert "too many connections for role" in record.getMessage()
    assert "trying again for 120 s" in record.getMessage()
    second.close()


def test_a_pooler_that_lets_its_clients_wait_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts the connection, and answers no query until one of its own connections is free: here, never."""
    assert 2 * retry.QUIET_S < 10
    monkeypatch.setattr(retry, "QUIET_S", 0.05)
    listener = socket.create_server(("127.0.0.1", 0))

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!i", 4 + len(body)) + body

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            while struct.unpack("!ii", client.recv(8, socket.MSG_WAITALL))[1] == 80877103:  # asks for TLS
                client.sendall(b"N")
            client.recv(4096)
            version = message(b"S", b"server_version\x0016.0\x00")
            client.sendall(message(b"R", bytes(4)) + version + message(b"Z", b"I"))
            while "all its connections may be in use" not in caplog.text:
                time.sleep(0.01)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(StoreError, match="cannot be reached"):
        open_store(f"postgresql://me@127.0.0.1:{listener.getsockname()[1]}/db")
    thread.join()
    listener.close()


def test_a_pooler_without_transactions_is_refused_by_name_at_once() -> None:
    """What PgBouncer says with pool_mode = statement."""
    said = Exception("transaction blocks not allowed in statement pooling mode")
    error = sqlalchemy.exc.OperationalError("BEGIN", {}, said)
    assert not retry.is_connection_loss(error)
    assert "set pool_mode = transaction (or session) in PgBouncer" in retry.reason(error)
    away = sqlalchemy.exc.OperationalError("BEGIN", {}, Exception("server closed the connection"))
    assert retry.is_connection_loss(away)


@pytest.mark.postgres
def test_nothing_is_left_in_a_session(postgres: Postgres) -> None:
    """A pooler in transaction mode gives each transaction another session: no lock, no prepared statement lasts."""
    store = open_store(postgres.url())
    study_id = fill(store, 20)
    for index in range(20):
        store.claim(study_id, f"here:1:0:{index}")
        store.get_all_trials(study_id)
    with store.tickets.engine.connect() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar()
        locks = connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").scalar()
    assert (count, locks) == (0, 0)
    store.close()


@pytest.mark.postgres
def test_an_empty_database_is_opened_by_many_at_once(postgres: Postgres) -> None:
    url, opened, barrier = postgres.url(), [], threading.Barrier(4)

    def open_one() -> None:
        barrier.wait()
        opened.append(open_store(url, retry_s=60))

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.get_all_studies() for store in opened] == [[]] * 4
    for store in opened:
        store.close()


@pytest.mark.postgres
def test_a_missing_store_is_not_made_on_a_server_by_looking(postgres: Postgres) -> None:
    url = postgres.url()
    with pytest.raises(StoreError, match="no store there yet"):
        open_store(url, create=False)
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    assert sqlalchemy.inspect(engine).get_table_names() == []


# -- backups -----------------------------------------------------------------------------------------------------------


def test_a_running_store_is_backed_up_whole(sqlite_store: Store, tmp_path: Path) -> None:
    study_id = fill(sqlite_store, 5)
    sqlite_store.claim(study_id, "here:1:0:0")
    assert (tmp_path / "studies.db-wal").stat().st_size > 0  # what a copy of the file alone would lack
    out = tmp_path / "copies" / "monday.db"
    out.parent.mkdir()
    with sqlite_store.tickets.transaction(study_id):  # somebody is writing just now
        backup(sqlite_store.address, out)
    sqlite_store.fill(study_id, lambda present: [ticket()])
    assert [path.name for path in out.parent.iterdir()] == ["monday.db"]
    copy = open_store(str(out), create=False)
    assert [trial.state.name for trial in copy.get_all_trials(study_id)] == ["RUNNING"] + ["WAITING"] * 4
    copy.close()
    backup(str(tmp_path / "studies.db"), out)  # again, in its place
    with closing(sqlite3.connect(out)) as connection:
        assert connection.execute("SELECT count(*) FROM trials").fetchone() == (6,)


def test_what_cannot_be_backed_up(sqlite_store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is the store itself"):
        backup(sqlite_store.address, tmp_path / "studies.db")
    with pytest.raises(OutputError, match="cannot be written"):
        backup(sqlite_store.address, tmp_path / "none" / "copy.db")
    with pytest.raises(StoreError, match="no such store"):
        backup(str(tmp_path / "none.db"), tmp_path / "copy.db")
    with pytest.raises(StoreError, match="pg_dump"):
        backup("postgresql://me:secret@host/db", tmp_path / "copy.db")
    (tmp_path / "notes.db").write_text("these are notes and no database" * 100)
    with pytest.raises(StoreError, match="not usable as a store"):
        backup(str(tmp_path / "notes.db"), tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()
