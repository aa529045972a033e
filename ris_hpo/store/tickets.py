"""The transactions that an exact budget needs, on top of Optuna's RDB storage (SQLite or PostgreSQL).

A ticket is a WAITING trial. ``fill`` gives a study its tickets, ``claim`` hands one to a worker and writes the worker's
name on it, ``release`` puts it back, ``retire`` fails a trial and queues its successor. Each is one transaction, and
each may be repeated after an acknowledgement was lost on the way.

A paused trial is a WAITING one with the attribute ``paused``. Nobody claims it until the rule of promotion that
``claim`` is given names it: choice and claim are one transaction, so that each promotion follows from the trials as
they stand, and two workers never promote the same one. To Optuna, whose ended trials are final, it is a trial that was
begun and put back.

Why not a ticket table of our own: a claim, an end and a successor change a ticket and Optuna's trial together. Two
tables in two transactions would need a repair for every crash between them, and an outside reader (dashboard, SQL, an
older version) would see trials that are running twice or not at all. So Optuna's trials are the tickets, and its own
public calls do the writing: inside ``transaction`` they join ours, because the session they use is bound to our
connection and commits no more than a savepoint there.

What this package knows of Optuna beyond its documented interface stands in this module and in no other:

- ``RDBStorage.engine`` and ``RDBStorage.scoped_session``, attributes without documentation: ``transaction`` binds the
  session to its own connection.
- Five tables with the columns declared below, at revision ``SCHEMA`` of the database schema: reads of a few columns,
  row locks, blank trials in bulk, several attributes at once, and another name of a study, for which there is no call.

No name with a leading underscore is used here or anywhere else; a test searches for them.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Select, column
from sqlalchemy.dialects import postgresql, sqlite

from ris_hpo.errors import StoreError, StudyGoneError
from ris_hpo.store import attributes as names

OPTUNA: Final = "5.0"
"""Version of Optuna that this module was read against; the package requires it to the minor number."""

SCHEMA: Final = "v3.2.0.a"
"""Revision of Optuna's database schema that the tables below were read from."""

GONE: Final = "the study or trial is not in the store any more: it was deleted or renamed while it was in use"

_STUDIES = sqlalchemy.table("studies", column("study_id"), column("study_name"))
_STUDY_MARKS = sqlalchemy.table("study_user_attributes", column("study_id"), column("key"), column("value_json"))
_TRIALS = sqlalchemy.table(
    "trials",
    column("trial_id"),
    column("number"),
    column("study_id"),
    column("state", sqlalchemy.Enum(TrialState)),
    column("datetime_start"),
)
_MARKS = sqlalchemy.table("trial_user_attributes", column("trial_id"), column("key"), column("value_json"))
_BEATS = sqlalchemy.table("trial_heartbeats", column("trial_id"), column("heartbeat", sqlalchemy.DateTime))
_STANDING: Final = (names.RUNGS, names.PAUSED, names.PREDECESSOR, names.CAUSE, names.DIVERGED)
_IDENTITY = sqlalchemy.select(_STUDY_MARKS.c.value_json).where(_STUDY_MARKS.c.key == names.IDENTITY)


@dataclass(frozen=True, slots=True)
class Seen:
    """A trial in the few columns that tell whether it has to be read again."""

    trial_id: int
    state: TrialState
    begun: bool
    paused: int | None
    """Rung at which a waiting trial is paused."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A trial in what promotion depends on: its state, and the attributes that tell of its line and its rungs."""

    number: int
    state: TrialState
    user_attrs: dict[str, Any]


Promote = Callable[[list[Standing]], int | None]
"""Chooses the paused trial that goes on now, given all trials of the study; None where none should."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A trial that was taken: its number in the study, and its id."""

    number: int
    trial_id: int


class _Transactions(RDBStorage):
    """Optuna's RDB storage, with transactions that cover more than one of its calls."""

    def __init__(
        self,
        url: str,
        engine_kwargs: dict[str, Any],
        *,
        path: Path | None = None,
        heartbeat: int | None = None,
        create: bool = True,
    ) -> None:
        """Connect.

        Args:
            url: what SQLAlchemy connects by, without braces; Optuna would take them for a template's.
            engine_kwargs: the rest of what it connects by.
            path: the file, of SQLite.
            heartbeat: seconds between heartbeats of running trials.
            create: make the tables where there are none.

        Raises:
            StoreError: the database has another schema than this module was read against.
        """
        self._here = threading.local()
        self.path = path
        with ExitStack() as failed, warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeat_interval is marked so
            failed.callback(self.close)  # a connection that is left over may be one too many for the server
            super().__init__(
                url,
                engine_kwargs=engine_kwargs,
                heartbeat_interval=heartbeat,
                grace_period=None if heartbeat is None else 3 * heartbeat,
                skip_table_creation=not create,
                skip_compatibility_check=True,  # which takes two connections at once
            )
            found = self.get_current_version()
            if found != SCHEMA:
                raise StoreError(
                    f"made by another version of Optuna (schema {found}, expected {SCHEMA}); "
                    "use that version, or 'optuna storage upgrade'"
                )
            failed.pop_all()

    def __getstate__(self) -> dict[Any, Any]:
        state: dict[Any, Any] = super().__getstate__()
        del state["_here"]
        return state

    def __setstate__(self, state: dict[Any, Any]) -> None:
        self._here = threading.local()
        super().__setstate__(state)

    @property
    def is_sqlite(self) -> bool:
        """Whether the store is a file on this machine."""
        return self.path is not None

    def close(self) -> None:
        """Give the connections of this process back."""
        if hasattr(self, "scoped_session"):  # otherwise it never got so far
            self.scoped_session.remove()
            self.engine.dispose()

    @contextmanager
    def transaction(self, study_id: int | None = None) -> Iterator[Connection]:
        """Open a transaction that every Optuna call of this thread joins until it commits.

        It excludes every other writer of the file on SQLite, and of the study on PostgreSQL where one is named.

        Raises:
            StudyGoneError: no such study.
        """
        with self.engine.connect() as connection, connection.begin():
            if self.is_sqlite:
                # without it a read before the first write stands outside: two workers would both find WAITING
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            self.scoped_session.remove()
            self.scoped_session(bind=connection, join_transaction_mode="create_savepoint")
            self._here.joined = True
            try:
                if study_id is not None:
                    locked = sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id)
                    if connection.scalar(locked.with_for_update()) is None:
                        raise StudyGoneError(GONE)
                yield connection
            finally:
                self._here.joined = False
                self.scoped_session.remove()

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None, *, owner: str | None = None
    ) -> bool:
        """Change a trial's state in one transaction; Optuna's own reads before it locks on SQLite.

        Args:
            trial_id: the trial.
            state: the new state.
            values: its objective values.
            owner: who holds the trial, where it is known. A trial that this owner has already ended just so is left as
                it is: the acknowledgement of an earlier attempt was lost.

        Raises:
            UpdateFinishedTrialError: it has ended otherwise.
        """
        if getattr(self._here, "joined", False):
            return bool(super().set_trial_state_values(trial_id, state, values))
        with self.transaction() as connection:
            locked = sqlalchemy.select(_TRIALS.c.state).where(_TRIALS.c.trial_id == trial_id).with_for_update()
            before = connection.scalar(locked)
            repeated = before == state and state.is_finished() and owner is not None
            if repeated and _mark(connection, trial_id) == owner:
                ended = self.get_trial(trial_id).values
                if values is None or ended == list(values):
                    return True
            return bool(super().set_trial_state_values(trial_id, state, values))


class TicketStorage(_Transactions):
    """The ticket transactions.

    Trials are named by study and number; one that does not exist is a ``StudyGoneError``.
    """

    # -- identity ----------------------------------------------------------------------------------------------------

    def identity(self, study_id: int, replaces: str | None = None) -> str:
        """Return what tells this study from any other, of any store; it is made where there is none.

        Args:
            study_id: the study.
            replaces: an identity that must not stay, since another study has it too; this one gets a new one.
        """
        with self.transaction(study_id):
            present: str | None = self.get_study_user_attrs(study_id).get(names.IDENTITY)
            if present is None or present == replaces:
                present = secrets.token_hex(8)
                self.set_study_user_attr(study_id, names.IDENTITY, present)
            return present

    def database(self) -> tuple[str, int]:
        """Return what tells this database from any other.

        Returns:
            Path and inode of the file; cluster and number of the database on PostgreSQL.
        """
        if self.path is not None:
            return os.path.realpath(self.path), os.stat(self.path).st_ino
        with self.engine.connect() as connection:
            cluster: Any = "unknown"
            if connection.exec_driver_sql("SELECT has_function_privilege('pg_control_system()', 'execute')").scalar():
                cluster = connection.exec_driver_sql("SELECT system_identifier FROM pg_control_system()").scalar()
            number = "SELECT oid FROM pg_database WHERE datname = current_database()"
            return f"postgresql:{cluster}", int(connection.exec_driver_sql(number).scalar_one())

    def rename(self, study_id: int, name: str) -> None:
        """Give a study another name.

        Raises:
            DuplicatedStudyError: another study has it.
            StudyGoneError: no such study.
        """
        with self.transaction(study_id) as connection:
            named = sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == name)
            if connection.scalar(named) not in (None, study_id):
                raise DuplicatedStudyError(name)
            connection.execute(
                sqlalchemy.update(_STUDIES).where(_STUDIES.c.study_id == study_id).values(study_name=name)
            )

    # -- reading -----------------------------------------------------------------------------------------------------

    def trial_states(self, study_id: int, after: int) -> tuple[str | None, dict[int, Seen]]:
        """Return a study's identity, and by number every unfinished trial and every one whose id is above ``after``.

        Raises:
            StudyGoneError: no such study.
        """
        unfinished = _TRIALS.c.state.in_((TrialState.RUNNING, TrialState.WAITING))
        wanted = sqlalchemy.and_(
            _TRIALS.c.study_id == _STUDIES.c.study_id, sqlalchemy.or_(unfinished, _TRIALS.c.trial_id > after)
        )
        query = (
            sqlalchemy.select(
                _TRIALS.c.number,
                _TRIALS.c.trial_id,
                _TRIALS.c.state,
                _TRIALS.c.datetime_start,
                _attribute(names.PAUSED).label("paused"),
                _IDENTITY.where(_STUDY_MARKS.c.study_id == study_id).scalar_subquery().label("identity"),
            )
            .select_from(_STUDIES.outerjoin(_TRIALS, wanted))
            .where(_STUDIES.c.study_id == study_id)
        )
        with self.engine.connect() as connection:
            rows = connection.execute(query).all()
        if not rows:
            raise StudyGoneError(GONE)
        trials = (row for row in rows if row.trial_id is not None)
        seen = {
            row.number: Seen(row.trial_id, row.state, row.datetime_start is not None, _loaded(row.paused))
            for row in trials
        }
        return _loaded(rows[0].identity), seen

    def heartbeats(self, study_id: int) -> dict[int, datetime]:
        """Return by number the last heartbeat of every running trial that has one, by the database's clock."""
        query = (
            sqlalchemy.select(_TRIALS.c.number, _BEATS.c.heartbeat)
            .join_from(_TRIALS, _BEATS, _BEATS.c.trial_id == _TRIALS.c.trial_id)
            .where(_TRIALS.c.study_id == study_id, _TRIALS.c.state == TrialState.RUNNING)
        )
        with self.engine.connect() as connection:
            return {row.number: row.heartbeat for row in connection.execute(query)}

    # -- tickets -----------------------------------------------------------------------------------------------------

    def fill(self, study_id: int, tickets: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> int:
        """Append the trials that ``tickets`` finds missing, given all trials of the study; return how many.

        Counting and appending are one transaction, so that two supervisors, or a repetition after a lost
        acknowledgement, add nothing twice.
        """
        with self.transaction(study_id) as connection:
            present = self.get_all_trials(study_id, deepcopy=False)
            missing = tickets(present)
            blank: list[dict[str, Any]] = []
            for number, template in enumerate(missing, start=len(present)):
                if template.user_attrs or template.system_attrs or template.params:
                    if blank:
                        connection.execute(sqlalchemy.insert(_TRIALS), blank)
                        blank = []
                    self.create_new_trial(study_id, template)
                else:  # hundreds at once; one by one they take eight statements each
                    blank.append({"study_id": study_id, "number": number, "state": TrialState.WAITING})
            if blank:
                connection.execute(sqlalchemy.insert(_TRIALS), blank)
        return len(missing)

    def claim(
        self, study_id: int, owner: str, identity: str | None = None, promote: Promote | None = None
    ) -> Claim | None:
        """Take the first waiting trial and put ``owner`` on it; None when nothing waits.

        Successors of lost trials come first, then trials that were put back, so that what was begun is finished. Then
        comes a paused trial that is to be promoted, and new ones last.

        Args:
            study_id: the study.
            owner: new for each claim: finding it on a running trial means that an earlier attempt did commit.
            identity: of the study, where it is known. SQLite gives the id of a deleted study to the next one.
            promote: chooses among paused trials; None where there are none.

        Raises:
            StudyGoneError: the study has another identity.
        """
        of_study = _TRIALS.c.study_id == study_id
        chosen = sqlalchemy.select(_TRIALS.c.number, _TRIALS.c.trial_id)
        held = chosen.join_from(_TRIALS, _MARKS, _MARKS.c.trial_id == _TRIALS.c.trial_id).where(
            of_study,
            _TRIALS.c.state == TrialState.RUNNING,
            _MARKS.c.key == names.OWNER,
            _MARKS.c.value_json == json.dumps(owner),
        )
        of_trial = _MARKS.c.trial_id == _TRIALS.c.trial_id
        continued = sqlalchemy.exists().where(of_trial, _MARKS.c.key == names.PREDECESSOR)
        paused = sqlalchemy.exists().where(of_trial, _MARKS.c.key == names.PAUSED, _MARKS.c.value_json != "null")
        begun = sqlalchemy.or_(continued, _TRIALS.c.datetime_start.is_not(None))
        waiting = (
            chosen.add_columns(begun.label("begun"))
            .where(of_study, _TRIALS.c.state == TrialState.WAITING, ~paused)
            .order_by(continued.desc(), begun.desc(), _TRIALS.c.number)
            .limit(1)
            .with_for_update(skip_locked=True, of=_TRIALS)  # left out on SQLite, where the whole file is ours already
        )
        with self.transaction(None if promote is None else study_id) as connection:
            if identity is not None:
                found = connection.scalar(_IDENTITY.where(_STUDY_MARKS.c.study_id == study_id))
                if _loaded(found) != identity:
                    raise StudyGoneError(GONE)
            row = connection.execute(held).one_or_none()
            if row is not None:
                return Claim(row.number, row.trial_id)
            row = connection.execute(waiting).one_or_none()
            marks: dict[str, Any] = {names.OWNER: owner}
            if promote is not None and not (row is not None and row.begun):
                number = promote(_standings(connection, study_id))
                if number is not None:
                    row = self._locked(connection, study_id, number)
                    times = _mark(connection, row.trial_id, names.PROMOTED_AT) or []
                    marks |= {names.PAUSED: None, names.PROMOTED_AT: [*times, round(time.time(), 3)]}
            if row is None:
                return None
            self.set_trial_state_values(row.trial_id, TrialState.RUNNING)
            _put(connection, row.trial_id, marks)
            return Claim(row.number, row.trial_id)

    def release(self, study_id: int, number: int, owner: str | None, marks: Mapping[str, Any]) -> bool:
        """Put a running trial back into the queue with ``marks`` as attributes; False when ``owner`` did not hold it.

        Only for an owner that gives up its own trial, or is known to be dead: another one is not fenced off by this.
        """
        with self.transaction() as connection:
            row = self._locked(connection, study_id, number)
            if not _holds(connection, row, owner):  # repeated after a lost acknowledgement, it says so itself
                return owner is not None and _mark(connection, row.trial_id, names.RELEASED_BY) == owner
            _put(connection, row.trial_id, {**marks, names.OWNER: None, names.RELEASED_BY: owner})
            self.set_trial_state_values(row.trial_id, TrialState.WAITING)
        return True

    def retire(
        self,
        study_id: int,
        number: int,
        owner: str | None,
        marks: Mapping[str, Any],
        successor: Callable[[FrozenTrial], FrozenTrial | None],
    ) -> bool:
        """Fail a running trial with ``marks`` and put its successor into the queue, both or neither.

        From then on every write of a late owner raises ``UpdateFinishedTrialError``.

        Args:
            study_id: the study.
            number: the trial.
            owner: who must hold it; None for anyone.
            marks: user attributes, ``cause`` above all.
            successor: makes a WAITING template from the trial as it stands in the transaction, or None where the line
                ends.

        Returns:
            False when the trial is not running any more, or belongs to another owner.
        """
        with self.transaction() as connection:
            row = self._locked(connection, study_id, number)
            if not _holds(connection, row, owner):  # unless an earlier attempt committed and was not acknowledged
                return (
                    owner is not None
                    and row.state == TrialState.FAIL
                    and _mark(connection, row.trial_id) == owner
                    and all(_mark(connection, row.trial_id, key) == value for key, value in marks.items())
                )
            template = successor(self.get_trial(row.trial_id))
            _put(connection, row.trial_id, marks)
            self.set_trial_state_values(row.trial_id, TrialState.FAIL)
            if template is not None:
                self.create_new_trial(study_id, template)
        return True

    def withdraw(self, study_id: int, numbers: Sequence[int]) -> None:
        """Take waiting trials out of the queue for good; one that a worker has claimed meanwhile stays."""
        with self.transaction() as connection:
            for number in numbers:
                row = self._locked(connection, study_id, number)
                if row.state != TrialState.WAITING:
                    continue
                _put(connection, row.trial_id, {names.CAUSE: names.Cause.WITHDRAWN.value})
                self.set_trial_state_values(row.trial_id, TrialState.FAIL)

    def mark(self, study_id: int, number: int, marks: Mapping[str, Any]) -> None:
        """Write several user attributes of an unfinished trial in one transaction.

        Raises:
            UpdateFinishedTrialError: it has ended.
        """
        with self.transaction() as connection:
            row = self._locked(connection, study_id, number)
            self.check_trial_is_updatable(row.trial_id, row.state)
            _put(connection, row.trial_id, marks)

    def _locked(self, connection: Connection, study_id: int, number: int) -> Any:
        query: Select[Any] = sqlalchemy.select(_TRIALS.c.number, _TRIALS.c.trial_id, _TRIALS.c.state).where(
            _TRIALS.c.study_id == study_id, _TRIALS.c.number == number
        )
        row = connection.execute(query.with_for_update()).one_or_none()
        if row is None:
            raise StudyGoneError(GONE)
        return row


def _attribute(key: str) -> Any:
    """The value of one attribute of each row of ``_TRIALS``."""
    of_trial = sqlalchemy.and_(_MARKS.c.trial_id == _TRIALS.c.trial_id, _MARKS.c.key == key)
    return sqlalchemy.select(_MARKS.c.value_json).where(of_trial).correlate(_TRIALS).scalar_subquery()


def _standings(connection: Connection, study_id: int) -> list[Standing]:
    """Read all trials of a study, by number, in what promotion depends on."""
    trials = sqlalchemy.select(_TRIALS.c.number, _TRIALS.c.state).where(_TRIALS.c.study_id == study_id)
    found = {row.number: Standing(row.number, row.state, {}) for row in connection.execute(trials)}
    marks = (
        sqlalchemy.select(_TRIALS.c.number, _MARKS.c.key, _MARKS.c.value_json)
        .join_from(_TRIALS, _MARKS, _MARKS.c.trial_id == _TRIALS.c.trial_id)
        .where(_TRIALS.c.study_id == study_id, _MARKS.c.key.in_(_STANDING))
    )
    for row in connection.execute(marks):
        if row.number in found:  # PostgreSQL may have seen a trial begin between the two
            found[row.number].user_attrs[row.key] = _loaded(row.value_json)
    return [found[number] for number in sorted(found)]


def _holds(connection: Connection, row: Any, owner: str | None) -> bool:
    """Say whether a trial runs and ``owner`` holds it (None: anyone)."""
    return bool(row.state == TrialState.RUNNING and owner in (None, _mark(connection, row.trial_id)))


def _mark(connection: Connection, trial_id: int, key: str = names.OWNER) -> Any:
    query = sqlalchemy.select(_MARKS.c.value_json).where(_MARKS.c.trial_id == trial_id, _MARKS.c.key == key)
    return _loaded(connection.scalar(query))


def _loaded(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _put(connection: Connection, trial_id: int, marks: Mapping[str, Any]) -> None:
    """Insert or replace user attributes in one statement; Optuna's call takes four for each."""
    if not marks:
        return
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in marks.items()]
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    insert = dialect.insert(_MARKS).values(rows)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=["trial_id", "key"], set_={"value_json": insert.excluded.value_json}
        )
    )
