"""The trial store: Optuna's RDB storage on SQLite (WAL) or PostgreSQL, with the few operations an exact budget needs.

Optuna's storage is used as it is, behind its cache. What it lacks are transactions that cover more than one of its
calls, and each of these is added here as one transaction that is safe to repeat after a lost acknowledgement:
``fill`` (a study has exactly N tickets), ``claim`` (one worker takes one ticket and its name stands on it), ``release``
(it goes back), ``retire`` (a trial fails and its successor stands in the queue).
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psutil
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage, _StudyInfo
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import exc as sql_errors
from sqlalchemy import orm

from ris_hpo.errors import StoreError
from ris_hpo.hpo import attributes as names
from ris_hpo.hpo.credentials import password_from_surroundings, redact
from ris_hpo.hpo.patience import LONGEST_PAUSE_S, is_connection_loss, patiently, reason

STORAGE_VARIABLE: Final = "RIS_HPO_STORAGE_DIR"
URL_VARIABLE: Final = "RIS_HPO_STORAGE_URL"

HEARTBEAT_S: Final = 10
"""Seconds between heartbeats of a running trial; it counts as lost after three of them are missing."""

_BUSY_S = 60.0
_CHUNK = 500  # trials asked for by id in one statement
_NO_ID = 2**31 - 1

_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smbfs", "smb2", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs"}
    | {"ncpfs", "panfs", "pvfs2", "orangefs", "davfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs"}
    | {"fuse.gcsfuse", "fuse.davfs", "fuse.rclone"}
)


def storage_directory() -> Path:
    """Return where runs leave their database, checkpoints and artifacts: ``$RIS_HPO_STORAGE_DIR`` or ``./storage``."""
    return Path(os.environ.get(STORAGE_VARIABLE) or "storage")


def default_url() -> str:
    """Return the store used when none is named: ``$RIS_HPO_STORAGE_URL``, else SQLite in the storage directory."""
    return os.environ.get(URL_VARIABLE) or f"sqlite:///{storage_directory() / 'studies.db'}"


_Seen = tuple[TrialState, bool]


class TicketStorage(RDBStorage):
    """Optuna's RDB storage: state changes that are atomic on SQLite too, and calls that outlive a server restart."""

    def __init__(self, url: str, engine_kwargs: dict[str, Any], heartbeat: int | None, *, first: bool) -> None:
        self._in_transaction = threading.local()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeat_interval is marked so
            super().__init__(
                url,
                engine_kwargs=engine_kwargs,
                heartbeat_interval=heartbeat,
                grace_period=None if heartbeat is None else 3 * heartbeat,
                skip_table_creation=not first,
            )

    def __getstate__(self) -> dict[Any, Any]:
        state: dict[Any, Any] = super().__getstate__()
        del state["_in_transaction"]
        return state

    def __setstate__(self, state: dict[Any, Any]) -> None:
        self._in_transaction = threading.local()
        super().__setstate__(state)

    @property
    def is_sqlite(self) -> bool:
        """Whether the store is a file on this machine."""
        return bool(self.engine.dialect.name == "sqlite")

    @contextmanager
    def transaction(self, study_id: int | None = None) -> Iterator[orm.Session]:
        """Open a session that excludes every other writer of the study (SQLite: of the file) until it commits."""
        with orm.Session(self.engine) as session, session.begin():
            if self.is_sqlite:
                # without it a read before the first write stands outside: two workers would both find WAITING
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            elif study_id is not None:
                models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            yield session

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """Change a trial's state; on SQLite as one immediate transaction, where Optuna's own reads first and races."""
        if not self.is_sqlite:
            return bool(patiently(super().set_trial_state_values)(trial_id, state, values))
        return bool(patiently(self._set_state_on_sqlite)(trial_id, state, values))

    def _set_state_on_sqlite(self, trial_id: int, state: TrialState, values: Any) -> bool:
        with self.transaction() as session:
            trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session)
            self.check_trial_is_updatable(trial_id, trial.state)
            if state == TrialState.RUNNING and trial.state != TrialState.WAITING:
                return False
            for objective, value in enumerate(values or ()):
                self._set_trial_value_without_commit(session, trial, objective, value)
            trial.state = state
            if state == TrialState.RUNNING:
                trial.datetime_start = datetime.now()
            if state.is_finished():
                trial.datetime_complete = datetime.now()
        return True

    def trial_states(self, study_id: int, after: int) -> dict[int, _Seen]:
        """Return the state of every unfinished trial, and of every one whose id is above ``after``.

        Beside it stands whether the trial was ever begun.
        """
        trials = models.TrialModel
        begun = trials.__table__.c.datetime_start
        query = sqlalchemy.select(trials.trial_id, trials.state, begun.is_not(None)).where(
            trials.study_id == study_id,
            sqlalchemy.or_(trials.state.in_((TrialState.RUNNING, TrialState.WAITING)), trials.trial_id > after),
        )
        with orm.Session(self.engine) as session:
            return {trial_id: (state, begun) for trial_id, state, begun in session.execute(query)}

    def heartbeats(self, study_id: int) -> dict[int, datetime]:
        """Return the last heartbeat of every running trial that has one, by the database's clock."""
        beats, trials = models.TrialHeartbeatModel, models.TrialModel
        query = (
            sqlalchemy.select(beats.trial_id, beats.heartbeat)
            .join(trials, trials.trial_id == beats.trial_id)
            .where(trials.study_id == study_id, trials.state == TrialState.RUNNING)
        )
        with orm.Session(self.engine) as session:
            return {row.trial_id: row.heartbeat for row in session.execute(query)}

    # -- tickets -----------------------------------------------------------------------------------------------------

    def fill(self, study_id: int, tickets: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> int:
        """Append the trials that ``tickets`` finds missing, given all trials of the study; return how many.

        Counting and appending are one transaction, so that two supervisors, or a repetition after a lost
        acknowledgement, add nothing twice.
        """
        with self.transaction(study_id) as session:
            rows = session.query(models.TrialModel).filter(models.TrialModel.study_id == study_id)
            present = [
                self._build_frozen_trial_from_trial_model(row) for row in rows.order_by(models.TrialModel.trial_id)
            ]
            missing = tickets(present)
            for template in missing:
                self._get_prepared_new_trial(study_id, template, session)
        return len(missing)

    def claim(self, study_id: int, owner: str) -> int | None:
        """Take the first waiting trial, put ``owner`` on it, and return its id; None when nothing waits.

        Successors of lost trials come before new ones, so that what was begun is finished.

        ``owner`` must be new for each claim: finding it on a running trial means that an earlier attempt did commit.
        """
        trials = models.TrialModel
        with self.transaction() as session:
            mine = session.execute(
                sqlalchemy.select(trials.trial_id)
                .join(models.TrialUserAttributeModel, models.TrialUserAttributeModel.trial_id == trials.trial_id)
                .where(
                    trials.study_id == study_id,
                    trials.state == TrialState.RUNNING,
                    models.TrialUserAttributeModel.key == names.OWNER,
                    models.TrialUserAttributeModel.value_json == json.dumps(owner),
                )
            ).scalar_one_or_none()
            if mine is not None:
                return int(mine)
            waiting = session.query(trials).filter(trials.study_id == study_id, trials.state == TrialState.WAITING)
            marks = models.TrialUserAttributeModel
            continued = sqlalchemy.exists().where(marks.trial_id == trials.trial_id, marks.key == names.PREDECESSOR)
            # what was begun goes on first; the lock is left out on SQLite, where the whole file is ours already
            ordered = waiting.order_by(continued.desc(), trials.number).with_for_update(skip_locked=True, of=trials)
            row: Any = ordered.first()
            if row is None:
                return None
            row.state = TrialState.RUNNING
            row.datetime_start = datetime.now()
            trial_id = row.trial_id
            self._put_attributes(session, trial_id, {names.OWNER: owner})
            return int(trial_id)

    def release(self, trial_id: int, owner: str | None, marks: Mapping[str, Any]) -> bool:
        """Put a running trial back into the queue with ``marks`` as attributes; False when it is not ``owner``'s.

        Only for an owner that gives up its own trial, or is known to be dead: another one is not fenced off by this.
        """
        with self.transaction() as session:
            row = self._running(session, trial_id, owner)
            if row is None:
                return False
            row.state = TrialState.WAITING
            self._put_attributes(session, trial_id, {**marks, names.OWNER: None})
        return True

    def retire(
        self,
        trial_id: int,
        owner: str | None,
        marks: Mapping[str, Any],
        successor: Callable[[FrozenTrial], FrozenTrial | None],
    ) -> bool:
        """Fail a running trial with ``marks`` and put its successor into the queue, both or neither.

        From then on every write of a late owner raises ``UpdateFinishedTrialError``.

        Args:
            trial_id: the trial.
            owner: who must hold it; None for anyone.
            marks: user attributes, ``cause`` above all.
            successor: makes a WAITING template from the trial as it stands in the transaction, or None where the line
                ends.

        Returns:
            False when the trial is not running any more, or belongs to another owner.
        """
        with self.transaction() as session:
            row = self._running(session, trial_id, owner)
            if row is None:
                return False
            study_id = row.study_id
            if not self.is_sqlite:
                models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            template = successor(self._build_frozen_trial_from_trial_model(row))
            self._put_attributes(session, trial_id, marks)
            row.state = TrialState.FAIL
            row.datetime_complete = datetime.now()
            if template is not None:
                self._get_prepared_new_trial(study_id, template, session)
        return True

    def withdraw(self, trial_ids: Sequence[int]) -> None:
        """Take waiting trials out of the queue for good; one that a worker has claimed meanwhile stays."""
        with self.transaction() as session:
            for trial_id in trial_ids:
                row = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
                if row.state != TrialState.WAITING:
                    continue
                row.state = TrialState.FAIL
                row.datetime_complete = datetime.now()
                self._put_attributes(session, trial_id, {names.CAUSE: names.Cause.WITHDRAWN.value})

    def mark(self, trial_id: int, marks: Mapping[str, Any]) -> None:
        """Write several user attributes of an unfinished trial in one transaction."""
        with self.transaction() as session:
            row: Any = models.TrialModel.find_or_raise_by_id(trial_id, session)
            self.check_trial_is_updatable(trial_id, row.state)
            self._put_attributes(session, trial_id, marks)

    def _running(self, session: orm.Session, trial_id: int, owner: str | None) -> Any:
        row = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
        if row.state != TrialState.RUNNING:
            return None
        if owner is not None:
            held = session.execute(
                sqlalchemy.select(models.TrialUserAttributeModel.value_json).where(
                    models.TrialUserAttributeModel.trial_id == trial_id,
                    models.TrialUserAttributeModel.key == names.OWNER,
                )
            ).scalar_one_or_none()
            if held is None or json.loads(held) != owner:
                return None
        return row

    def _put_attributes(self, session: orm.Session, trial_id: int, marks: Mapping[str, Any]) -> None:
        table = models.TrialUserAttributeModel
        present = session.query(table).filter(table.trial_id == trial_id, table.key.in_(list(marks)))
        rows: dict[Any, Any] = {row.key: row for row in present}
        for key, value in marks.items():
            if key in rows:
                rows[key].value_json = json.dumps(value)
            else:
                session.add(table(trial_id=trial_id, key=key, value_json=json.dumps(value)))


class Store(_CachedStorage):
    """The storage handed to Optuna: a read cache over ``TicketStorage``, and its ticket operations."""

    def __init__(self, backend: TicketStorage, address: str) -> None:
        super().__init__(backend)
        self.tickets = backend
        self.address = address
        """What a worker in another process needs to open the same store; holds the password if the URL did."""

    @property
    def redacted(self) -> str:
        """The address fit for people, logs and attributes."""
        return redact(self.address)

    @property
    def is_sqlite(self) -> bool:
        """Whether the store is a file on this machine."""
        return self.tickets.is_sqlite

    def close(self) -> None:
        """Give the connections of this process back."""
        self.tickets.scoped_session.remove()
        self.tickets.engine.dispose()

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        """Refresh the cache without reading waiting tickets again: Optuna's own would load all of them on each look."""
        with self._lock:
            study = self._studies.setdefault(study_id, _StudyInfo())
            newest = max((trial._trial_id for trial in study.trials.values()), default=-1)
            seen: dict[int, _Seen] = patiently(self.tickets.trial_states)(study_id, newest)
            if not seen and newest == -1:
                self.tickets.get_study_directions(study_id)  # raises KeyError where there is no such study
            known = {
                trial._trial_id: (trial.state, trial.datetime_start is not None)
                for trial in study.trials.values()
                if not trial.state.is_finished()
            }
            # tickets that nobody ever took cannot have changed
            untouched = (TrialState.WAITING, False)
            stale = [key for key, now in seen.items() if now != untouched or known.get(key) != untouched]
            stale += [key for key in known if key not in seen]  # ended since the last look
            for start in range(0, len(stale), _CHUNK):
                few = stale[start : start + _CHUNK]
                self._add_trials_to_cache(
                    study_id,
                    self._backend._get_trials(
                        study_id, None, included_trial_ids=set(few), trial_id_greater_than=_NO_ID
                    ),
                )

    def fill(self, study_id: int, tickets: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> int:
        """See ``TicketStorage.fill``."""
        return int(patiently(self.tickets.fill)(study_id, tickets))

    def claim(self, study_id: int, owner: str) -> int | None:
        """See ``TicketStorage.claim``."""
        trial_id: int | None = patiently(self.tickets.claim)(study_id, owner)
        return trial_id

    def release(self, trial_id: int, owner: str | None, marks: Mapping[str, Any]) -> bool:
        """See ``TicketStorage.release``."""
        return bool(patiently(self.tickets.release)(trial_id, owner, marks))

    def retire(
        self,
        trial_id: int,
        owner: str | None,
        marks: Mapping[str, Any],
        successor: Callable[[FrozenTrial], FrozenTrial | None],
    ) -> bool:
        """See ``TicketStorage.retire``."""
        return bool(patiently(self.tickets.retire)(trial_id, owner, marks, successor))

    def heartbeats(self, study_id: int) -> dict[int, datetime]:
        """See ``TicketStorage.heartbeats``."""
        beats: dict[int, datetime] = patiently(self.tickets.heartbeats)(study_id)
        return beats

    def withdraw(self, trial_ids: Sequence[int]) -> None:
        """See ``TicketStorage.withdraw``."""
        patiently(self.tickets.withdraw)(trial_ids)

    def mark(self, trial_id: int, marks: Mapping[str, Any]) -> None:
        """See ``TicketStorage.mark``."""
        patiently(self.tickets.mark)(trial_id, marks)


def ticket(params: Mapping[str, Any] | None = None, marks: Mapping[str, Any] | None = None) -> FrozenTrial:
    """Return a WAITING template: empty for the sampler to fill, or with parameters that are fixed beforehand."""
    system = {"fixed_params": dict(params)} if params else None
    return create_trial(state=TrialState.WAITING, user_attrs=dict(marks or {}), system_attrs=system)


# Every call of Optuna's that may be repeated without harm. ``create_new_trial`` is not among them: tickets are made by
# ``fill`` alone. ``create_new_study`` repeats into DuplicatedStudyError, which its caller expects anyway.
for _name in (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "_set_trial_param",
    "get_trial",
    "_get_trials",
    "get_trial_id_from_study_id_trial_number",
    "get_trial_system_attrs",
    "get_trial_user_attrs",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "record_heartbeat",
    "_get_best_trial_id",
):
    setattr(TicketStorage, _name, patiently(vars(RDBStorage).get(_name) or getattr(RDBStorage, _name)))


# -- opening ---------------------------------------------------------------------------------------------------------


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
        return TicketStorage(url, kwargs, heartbeat, first=True)
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
