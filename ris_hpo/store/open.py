"""Opening a trial store: SQLite in WAL mode on a local disk, or PostgreSQL."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import psutil
import sqlalchemy
from optuna.exceptions import StorageInternalError
from sqlalchemy import exc as sql_errors

from ris_hpo.atomic import replacing
from ris_hpo.errors import StoreError
from ris_hpo.process import storage_directory
from ris_hpo.store.cache import Store
from ris_hpo.store.credentials import password_from_environment, redact
from ris_hpo.store.retry import Wait, is_connection_loss, reason
from ris_hpo.store.tickets import TicketStorage

URL_VARIABLE: Final = "RIS_HPO_STORAGE_URL"
HEARTBEAT_S: Final = 10
"""Seconds between heartbeats of a running trial; it counts as lost after three of them are missing."""

_SQLITE: Final = "sqlite:///"
_BUSY_S = 60.0
_RACES = 10  # attempts to open a database while other processes make its tables
_UNDEFINED_TABLE: Final = "42P01"
_MADE_MEANWHILE: Final = {"42P07", "42710", "23505"}  # duplicate table, duplicate object, unique violation

_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smbfs", "smb2", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs"}
    | {"ncpfs", "panfs", "pvfs2", "orangefs", "davfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs"}
    | {"fuse.gcsfuse", "fuse.davfs", "fuse.rclone"}
)


def default_url() -> str:
    """Return the store used when none is named: ``$RIS_HPO_STORAGE_URL``, else SQLite in the storage directory."""
    return os.environ.get(URL_VARIABLE) or f"{_SQLITE}{storage_directory() / 'studies.db'}"


def open_store(
    url: str | None = None,
    *,
    create: bool = True,
    write: bool | None = None,
    heartbeat: int | None = HEARTBEAT_S,
    retry_s: float = 0.0,
) -> Store:
    """Open a trial store.

    Args:
        url: ``sqlite:///path``, a path, or ``postgresql://user@host/database``; the default is ``default_url()``. A
            path is taken as it stands, whatever characters it has. A password is taken from the URL,
            ``$RIS_HPO_STORAGE_PASSWORD``, the file ``$RIS_HPO_STORAGE_PASSWORD_FILE`` or libpq's own ``~/.pgpass``.
        create: make the SQLite file and the tables where there are none.
        write: whether the store must be writable; None for what ``create`` says. An SQLite file that need not be is
            opened for reading where it can only be read.
        heartbeat: seconds between heartbeats of running trials; None for none.
        retry_s: how long a server that does not answer is tried again; a person wants to know at once, a worker
            that starts during a restart of the server does not.

    Raises:
        StoreError: not a store, not reachable, not writable, on a network file system, of another schema.
    """
    address = url or default_url()
    if "://" not in address:
        address = f"{_SQLITE}{address}"
    must_write = create if write is None else write
    scheme = address.partition("://")[0]
    if scheme == "sqlite":
        return _open_sqlite(address, create, must_write, heartbeat)
    try:
        parsed = sqlalchemy.make_url(address)
    except (sql_errors.ArgumentError, ValueError):  # the latter for a port that is no number
        # not quoted further: who can say where the password ends in what is no address
        raise StoreError(f"'{scheme}://...' is no store address; use sqlite:///FILE or postgresql://...") from None
    if parsed.get_backend_name() in ("postgresql", "postgres"):
        return _open_postgres(parsed, address, create, heartbeat, retry_s)
    raise StoreError(f"no store of kind '{parsed.get_backend_name()}'; use sqlite:///FILE or postgresql://...")


# -- SQLite ----------------------------------------------------------------------------------------------------------


def sqlite_path(address: str) -> Path:
    """Return the file of an SQLite address.

    Raises:
        StoreError: it names none.
    """
    name = address.removeprefix(_SQLITE)
    if not address.startswith(_SQLITE) or name in ("", ":memory:"):
        raise StoreError("an SQLite store needs a file that several processes can open: sqlite:///FILE")
    return Path(name).absolute()


def _open_sqlite(address: str, create: bool, must_write: bool, heartbeat: int | None) -> Store:
    path = sqlite_path(address)
    if not _exists(path) and not (create and must_write):  # what need not be written, a dashboard's, is not made either
        raise StoreError(f"{path}: no such store; start a study with 'ris-hpo run' or name another --storage")
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise StoreError(f"{path}: not usable as a store (a folder)")
    except OSError as error:
        raise StoreError(f"{path.parent}: cannot be made ({error.strerror})") from None
    kind = file_system_of(path.parent)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise StoreError(
            f"{path} lies on a network file system ({kind}), where SQLite loses data; "
            "use a local disk or --storage postgresql://..."
        )
    if _exists(path) and not os.access(path, os.R_OK):  # asked, not tried: closing the file would drop SQLite's locks
        raise StoreError(f"{path}: no permission to read it; ask its owner, or name another --storage")
    readable = _exists(path) and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))
    try:
        if readable and not must_write:
            kwargs: dict[str, Any] = {
                "creator": functools.partial(_read_sqlite, path),
                "poolclass": sqlalchemy.NullPool,  # each look finds out anew how the file can be read
            }
            tickets = TicketStorage(_SQLITE, kwargs, path=path, heartbeat=heartbeat, create=False)
            return Store(tickets, f"{_SQLITE}{path}", read_only=True)
        kwargs = {"creator": functools.partial(_connect_sqlite, path), "poolclass": sqlalchemy.QueuePool}
        if not must_write:
            tickets = TicketStorage(_SQLITE, kwargs, path=path, heartbeat=heartbeat, create=False)
            return Store(tickets, f"{_SQLITE}{path}")
        # the first opening makes the tables and turns WAL on; neither may run twice at once
        with path.with_name(path.name + ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("BEGIN IMMEDIATE")  # a read-only or foreign file says so here
                connection.rollback()
            tickets = TicketStorage(_SQLITE, kwargs, path=path, heartbeat=heartbeat, create=create)
            return Store(tickets, f"{_SQLITE}{path}")
    except (OSError, sqlite3.Error, StorageInternalError, sql_errors.SQLAlchemyError) as error:
        if isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            # SQLite alone may look into the file: whoever opens and closes it loses this process's locks on it
            path.with_name(path.name + ".lock").unlink(missing_ok=True)
        raise StoreError(f"{path}: not usable as a store ({reason(error)})") from None
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from None


def _connect_sqlite(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
    connection.execute("PRAGMA synchronous=NORMAL")  # WAL: no acknowledged commit is lost unless the power fails
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _read_sqlite(path: Path) -> sqlite3.Connection:
    """Connect to a file that can only be read, in a folder that may be read-only too.

    While somebody writes, the shared memory beside the file is there and SQLite reads by it. Without it nobody does,
    and the file can be read as it stands; with a log that was left behind, by way of a copy in memory.
    """
    try:
        return _connect_readonly(path, "mode=ro")
    except sqlite3.OperationalError:
        log = path.with_name(f"{path.name}-wal")
        if not log.exists() or log.stat().st_size == 0:
            return _connect_readonly(path, "mode=ro&immutable=1")
    with tempfile.TemporaryDirectory(prefix="ris-hpo-store-") as scratch:
        for file in (path, log):
            shutil.copyfile(file, Path(scratch) / file.name)
        copy = sqlite3.connect(":memory:", check_same_thread=False)
        with closing(sqlite3.connect(Path(scratch) / path.name)) as source:
            source.backup(copy)
        copy.execute("PRAGMA query_only=ON")
        return copy


def _connect_readonly(path: Path, how: str) -> sqlite3.Connection:
    address = f"file:{quote(str(path))}?{how}"
    connection = sqlite3.connect(address, uri=True, timeout=_BUSY_S, check_same_thread=False)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def backup(address: str | None, out: Path) -> None:
    """Copy a store into one file, whole, while studies may be running on it.

    Args:
        address: an SQLite store, as ``open_store`` takes it.
        out: the file to make or replace; it can be used as a store.

    Raises:
        StoreError: not an SQLite store, or one that cannot be read.
        OutputError: ``out`` cannot be written.
    """
    address = address or default_url()
    if "://" in address and not address.startswith("sqlite"):
        raise StoreError(f"{redact(address)}: back up PostgreSQL with 'pg_dump --format=custom --file=FILE DATABASE'")
    path = sqlite_path(address if "://" in address else f"{_SQLITE}{address}")
    open_store(str(path), create=False).close()
    if out.exists() and out.samefile(path):
        raise StoreError(f"{out}: is the store itself; name another file")
    with replacing(out, durable=True) as partial:
        try:
            with closing(_read_sqlite(path)) as source, closing(sqlite3.connect(partial)) as copy:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        except sqlite3.Error as error:
            raise StoreError(f"{path}: cannot be copied ({error})") from None


# -- PostgreSQL ------------------------------------------------------------------------------------------------------


def _open_postgres(url: sqlalchemy.URL, address: str, create: bool, heartbeat: int | None, retry_s: float) -> Store:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise StoreError("PostgreSQL needs the driver psycopg; install ris-hpo[postgres]") from None
    password = str(url.password) if url.password else password_from_environment()
    # a pooler may give each transaction another session: nothing here counts on one, no lock and no prepared statement
    connect: dict[str, Any] = {"connect_timeout": 5, "application_name": "ris-hpo", "keepalives_idle": 30}
    connect["prepare_threshold"] = None
    if password is not None:
        connect["password"] = password  # kept out of the URL, which Optuna hands on and formats
    text = url.set(drivername="postgresql+psycopg", password=None).render_as_string(hide_password=False)
    # one for the trial, and one more while a heartbeat is written
    kwargs = {"pool_size": 1, "max_overflow": 1, "pool_pre_ping": True, "pool_recycle": 1800, "connect_args": connect}
    wait = Wait(redact(address), retry_s)
    for _ in range(_RACES):
        try:
            return Store(_reached(wait, _verbatim(text), kwargs, heartbeat=heartbeat, create=False), address)
        except (StorageInternalError, sql_errors.SQLAlchemyError) as error:
            problem, state = reason(error), _state(error)
        if state == _UNDEFINED_TABLE:
            if not create:
                raise StoreError(f"{redact(address)}: no store there yet; start a study with 'ris-hpo run'")
            try:  # over a single connection, since making them takes two at once otherwise
                single = {"poolclass": sqlalchemy.StaticPool, "connect_args": connect}
                _reached(wait, _verbatim(text), single, heartbeat=None, create=True).close()
            except (StorageInternalError, sql_errors.SQLAlchemyError) as error:
                problem, state = reason(error), _state(error)
        if state not in (_UNDEFINED_TABLE, *_MADE_MEANWHILE):
            break
    raise StoreError(f"{redact(address)}: not usable as a store ({problem})")


def _reached(wait: Wait, url: str, kwargs: dict[str, Any], *, heartbeat: int | None, create: bool) -> TicketStorage:
    """Connect, again and again while there is no connection; other errors of the database are the caller's."""
    while True:
        try:
            with wait.attempt():
                return TicketStorage(url, kwargs, heartbeat=heartbeat, create=create)
        except StoreError as error:
            raise StoreError(f"{wait.what}: {error}") from None
        except (StorageInternalError, sql_errors.SQLAlchemyError) as error:
            if not is_connection_loss(error):
                raise
            if not wait.again(reason(error)):
                raise StoreError(f"{wait.what}: cannot be reached ({reason(error)})") from None


def _state(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error of PostgreSQL."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    state: str | None = getattr(getattr(cause, "orig", None), "sqlstate", None)
    return state


def _verbatim(url: str) -> str:
    return url.replace("{", "{{").replace("}", "}}")  # Optuna formats every URL it is given


def file_system_of(path: Path) -> str:
    """Return the kind of file system ``path`` lies on (``ext4``, ``nfs4``), or ``""`` where the system does not say."""
    best, kind = -1, ""
    resolved = str(path.resolve())
    for partition in psutil.disk_partitions(all=True):
        mount = partition.mountpoint.rstrip("/") + "/"
        if (resolved + "/").startswith(mount) and len(mount) > best:
            best, kind = len(mount), partition.fstype.lower()
    return kind
