"""Opening a trial store: SQLite in WAL mode on a local disk, or PostgreSQL."""

from __future__ import annotations

import fcntl
import functools
import os
import sqlite3
import time
from pathlib import Path
from typing import Any, Final

import psutil
import sqlalchemy
from optuna.exceptions import StorageInternalError
from sqlalchemy import exc as sql_errors

from ris_hpo.errors import StoreError
from ris_hpo.process import storage_directory
from ris_hpo.store.cache import Store
from ris_hpo.store.credentials import password_from_surroundings, redact
from ris_hpo.store.patience import LONGEST_PAUSE_S, is_connection_loss, reason
from ris_hpo.store.tickets import TicketStorage

URL_VARIABLE: Final = "RIS_HPO_STORAGE_URL"


HEARTBEAT_S: Final = 10
"""Seconds between heartbeats of a running trial; it counts as lost after three of them are missing."""


_BUSY_S = 60.0


_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smbfs", "smb2", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs"}
    | {"ncpfs", "panfs", "pvfs2", "orangefs", "davfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs"}
    | {"fuse.gcsfuse", "fuse.davfs", "fuse.rclone"}
)


def default_url() -> str:
    """Return the store used when none is named: ``$RIS_HPO_STORAGE_URL``, else SQLite in the storage directory."""
    return os.environ.get(URL_VARIABLE) or f"sqlite:///{storage_directory() / 'studies.db'}"


def open_store(
    url: str | None = None, *, create: bool = True, heartbeat: int | None = HEARTBEAT_S, patience_s: float = 0.0
) -> Store:
    """Open a trial store.

    Args:
        url: ``sqlite:///path``, a path, or ``postgresql://user@host/database``; the default is ``default_url()``.
            A password is taken from the URL, ``$RIS_HPO_STORAGE_PASSWORD``, the file ``$RIS_HPO_STORAGE_PASSWORD_FILE``
            or libpq's own ``~/.pgpass``.
        create: make the SQLite file and the tables where there are none.
        heartbeat: seconds between heartbeats of running trials; None for none.
        patience_s: how long a server that does not answer is tried again; a person wants to know at once, a worker
            that starts during a restart of the server does not.

    Raises:
        StoreError: not a store, not reachable, not writable, on a network file system, of another schema.
    """
    address = url or default_url()
    if "://" not in address:
        address = f"sqlite:///{address}"
    try:
        parsed = sqlalchemy.make_url(address)
    except (sql_errors.ArgumentError, ValueError):  # the latter for a port that is no number
        # not quoted further: who can say where the password ends in what is no address
        scheme = address.partition("://")[0]
        raise StoreError(f"'{scheme}://...' is no store address; use sqlite:///FILE or postgresql://...") from None
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, address, create, heartbeat)
    if parsed.get_backend_name() in ("postgresql", "postgres"):
        return _open_postgres(parsed, address, heartbeat, patience_s)
    raise StoreError(f"no store of kind '{parsed.get_backend_name()}'; use sqlite:///FILE or postgresql://...")


def _open_sqlite(url: sqlalchemy.URL, address: str, create: bool, heartbeat: int | None) -> Store:
    if not url.database or url.database == ":memory:":
        raise StoreError("an SQLite store needs a file that several processes can open: sqlite:///FILE")
    path = Path(url.database).absolute()
    if not path.exists() and not create:
        raise StoreError(f"{path}: no such store; start a study with 'ris-hpo run' or name another --storage")
    try:
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
    kwargs = {"creator": functools.partial(_connect_sqlite, str(path))}
    try:
        # the first opening makes the tables and turns WAL on; neither may run twice at once
        with path.with_name(path.name + ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            connection = sqlite3.connect(path, timeout=_BUSY_S)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("BEGIN IMMEDIATE")  # a read-only or foreign file says so here
                connection.rollback()
            finally:
                connection.close()
            return Store(_opened(_verbatim(f"sqlite:///{path}"), kwargs, heartbeat), f"sqlite:///{path}")
    except (OSError, sqlite3.Error, StorageInternalError, sql_errors.SQLAlchemyError) as error:
        if isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            # SQLite alone may look into the file: whoever opens and closes it loses this process's locks on it
            path.with_name(path.name + ".lock").unlink()
        raise StoreError(f"{path}: not usable as a store ({reason(error)})") from None


def _connect_sqlite(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
    connection.execute("PRAGMA synchronous=NORMAL")  # WAL: no acknowledged commit is lost unless the power fails
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


def _open_postgres(url: sqlalchemy.URL, address: str, heartbeat: int | None, patience_s: float) -> Store:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise StoreError("PostgreSQL needs the driver psycopg; install ris-hpo[postgres]") from None
    password = str(url.password) if url.password else password_from_surroundings()
    connect: dict[str, Any] = {"connect_timeout": 10, "application_name": "ris-hpo", "keepalives_idle": 30}
    if password is not None:
        connect["password"] = password  # kept out of the URL, which Optuna hands on and formats
    plain = url.set(drivername="postgresql+psycopg", password=None)
    text = plain.render_as_string(hide_password=False)
    kwargs = {"pool_size": 2, "max_overflow": 2, "pool_pre_ping": True, "pool_recycle": 1800, "connect_args": connect}
    guard = sqlalchemy.create_engine(plain, poolclass=sqlalchemy.NullPool, connect_args=connect)
    pause, deadline = 0.1, time.monotonic() + patience_s
    while True:
        try:
            with guard.connect() as connection:  # two workers that open an empty database must not both make the tables
                connection.exec_driver_sql("SELECT pg_advisory_lock(727153)")
                return Store(_opened(_verbatim(text), kwargs, heartbeat), address)
        except (StorageInternalError, sql_errors.SQLAlchemyError) as error:
            if time.monotonic() + pause > deadline or not is_connection_loss(error):
                raise StoreError(f"{redact(address)}: cannot be reached ({reason(error)})") from None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _opened(url: str, kwargs: dict[str, Any], heartbeat: int | None) -> TicketStorage:
    try:
        return TicketStorage(url, kwargs, heartbeat, create=True)
    except RuntimeError as error:  # what Optuna raises on another schema
        raise StoreError(f"{redact(url)}: made by another Optuna ({reason(error)})") from None
    except (StorageInternalError, sql_errors.SQLAlchemyError) as error:
        if is_connection_loss(error):
            raise
        raise StoreError(f"{redact(url)}: not usable as a store ({reason(error)})") from None


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
