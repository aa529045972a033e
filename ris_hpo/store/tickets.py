"""The transactions that an exact budget needs, on top of Optuna's RDB storage (SQLite or PostgreSQL).

A ticket is a WAITING trial. ``fill`` gives a study its tickets, ``claim`` hands one to a worker and writes the worker's
name on it, ``release`` puts it back, ``retire`` fails a trial and queues its successor. Each is one transaction, and
each may be repeated after an acknowledgement was lost on the way.

Why not a ticket table of our own: a claim, an end and a successor change a ticket and Optuna's trial together. Two
tables in two transactions would need a repair for every crash between them, and an outside reader (dashboard, SQL, an
older version) would see trials that are running twice or not at all. So Optuna's trials are the tickets, and its own
public calls do the writing: inside ``transaction`` they join ours, because the session they use is bound to our
connection and commits no more than a savepoint there.

What this package knows of Optuna beyond its documented interface stands in this module and in no other:

- ``RDBStorage.engine`` and ``RDBStorage.scoped_session``, attributes without documentation: ``transaction`` binds the
  session to its own connection.
- Five tables with the columns declared below, at revision ``SCHEMA`` of the database schema: reads of a few columns,
  row locks, blank trials in bulk, and several attributes at once, for which there is no call.

No name with a leading underscore is used here or anywhere else; a test searches for them.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Select, column
from sqlalchemy.dialects import postgresql, sqlite

from ris_hpo.store import attributes as names

OPTUNA: Final = "5.0"
"""Version of Optuna that this module was read against; the package requires it to the minor number."""

SCHEMA: Final = "v3.2.0.a"
"""Revision of Optuna's database schema that the tables below were read from."""

_STUDIES = sqlalchemy.table("studies", column("study_id"))
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


@dataclass(frozen=True, slots=True)
class Seen:
    """A trial in the few columns that tell whether it has to be read again."""

    trial_id: int
    state: TrialState
    begun: bool


class TicketStorage(RDBStorage):
    """Optuna's RDB storage with ticket transactions, and with state changes that are atomic on SQLite too.

    Trials are named by study and number; a trial that does not exist is a ``KeyError``, as in Optuna's own calls.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any], heartbeat: int | None, *, create: bool) -> None:
        self._here = threading.local()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeat_interval is marked so
            super().__init__(
                url,
                engine_kwargs=engine_kwargs,
                heartbeat_interval=heartbeat,
                grace_period=None if heartbeat is None else 3 * heartbeat,
                skip_table_creation=not create,
            )

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
        return bool(self.engine.dialect.name == "sqlite")

    def close(self) -> None:
        """Give the connections of this process back."""
        self.scoped_session.remove()
        self.engine.dispose()

    @contextmanager
    def transaction(self, study_id: int | None = None) -> Iterator[Connection]:
        """Open a transaction that every Optuna call of this thread joins until it commits.

        It excludes every other writer of the file on SQLite, and of the study on PostgreSQL where one is named.

        Raises:
            KeyError: no such study.
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
                        raise KeyError(f"no study with id {study_id}")
                yield connection
            finally:
                self._here.joined = False
                self.scoped_session.remove()

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Change a trial's state; on SQLite as one immediate transaction, where Optuna's own reads first and races."""
        if self.is_sqlite and not getattr(self._here, "joined", False):
            with self.transaction():
                return bool(super().set_trial_state_values(trial_id, state, values))
        return bool(super().set_trial_state_values(trial_id, state, values))

    # -- reading -----------------------------------------------------------------------------------------------------

    def trial_states(self, study_id: int, after: int) -> dict[int, Seen]:
        """Return by number every unfinished trial of a study, and every one whose id is above ``after``.

        Raises:
            KeyError: no such study.
        """
        unfinished = _TRIALS.c.state.in_((TrialState.RUNNING, TrialState.WAITING))
        wanted = sqlalchemy.and_(
            _TRIALS.c.study_id == _STUDIES.c.study_id, sqlalchemy.or_(unfinished, _TRIALS.c.trial_id > after)
        )
        query = (
            sqlalchemy.select(_TRIALS.c.number, _TRIALS.c.trial_id, _TRIALS.c.state, _TRIALS.c.datetime_start)
            .select_from(_STUDIES.outerjoin(_TRIALS, wanted))
            .where(_STUDIES.c.study_id == study_id)
        )
        with self.engine.connect() as connection:
            rows = connection.execute(query).all()
        if not rows:
            raise KeyError(f"no study with id {study_id}")
        trials = (row for row in rows if row.trial_id is not None)
        return {row.number: Seen(row.trial_id, row.state, row.datetime_start is not None) for row in trials}

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

    def claim(self, study_id: int, owner: str) -> int | None:
        """Take the first waiting trial, put ``owner`` on it, and return its number; None when nothing waits.

        Successors of lost trials come before new ones, so that what was begun is finished.

        ``owner`` must be new for each claim: finding it on a running trial means that an earlier attempt did commit.
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
        waiting = (
            chosen.where(of_study, _TRIALS.c.state == TrialState.WAITING)
            .order_by(continued.desc(), _TRIALS.c.number)
            .limit(1)
            .with_for_update(skip_locked=True, of=_TRIALS)  # left out on SQLite, where the whole file is ours already
        )
        with self.transaction() as connection:
            mine = connection.execute(held).one_or_none()
            if mine is not None:
                return int(mine.number)
            row = connection.execute(waiting).one_or_none()
            if row is None:
                return None
            self.set_trial_state_values(row.trial_id, TrialState.RUNNING)
            self._put(connection, row.trial_id, {names.OWNER: owner})
            return int(row.number)

    def release(self, study_id: int, number: int, owner: str | None, marks: Mapping[str, Any]) -> bool:
        """Put a running trial back into the queue with ``marks`` as attributes; False when it is not ``owner``'s.

        Only for an owner that gives up its own trial, or is known to be dead: another one is not fenced off by this.
        """
        with self.transaction() as connection:
            trial_id = self._held(connection, study_id, number, owner)
            if trial_id is None:
                return False
            self._put(connection, trial_id, {**marks, names.OWNER: None})
            self.set_trial_state_values(trial_id, TrialState.WAITING)
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
            trial_id = self._held(connection, study_id, number, owner)
            if trial_id is None:
                return False
            template = successor(self.get_trial(trial_id))
            self._put(connection, trial_id, marks)
            self.set_trial_state_values(trial_id, TrialState.FAIL)
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
                self._put(connection, row.trial_id, {names.CAUSE: names.Cause.WITHDRAWN.value})
                self.set_trial_state_values(row.trial_id, TrialState.FAIL)

    def mark(self, study_id: int, number: int, marks: Mapping[str, Any]) -> None:
        """Write several user attributes of an unfinished trial in one transaction.

        Raises:
            UpdateFinishedTrialError: it has ended.
        """
        with self.transaction() as connection:
            row = self._locked(connection, study_id, number)
            self.check_trial_is_updatable(row.trial_id, row.state)
            self._put(connection, row.trial_id, marks)

    def _locked(self, connection: Connection, study_id: int, number: int) -> Any:
        query: Select[Any] = sqlalchemy.select(_TRIALS.c.trial_id, _TRIALS.c.state).where(
            _TRIALS.c.study_id == study_id, _TRIALS.c.number == number
        )
        row = connection.execute(query.with_for_update()).one_or_none()
        if row is None:
            raise KeyError(f"no trial {number} in the study with id {study_id}")
        return row

    def _held(self, connection: Connection, study_id: int, number: int, owner: str | None) -> int | None:
        """Return the id of a running trial that ``owner`` holds (None: anyone), locked; None where it is not so."""
        row = self._locked(connection, study_id, number)
        if row.state != TrialState.RUNNING:
            return None
        if owner is not None and self._mark(connection, row.trial_id, names.OWNER) != owner:
            return None
        return int(row.trial_id)

    def _mark(self, connection: Connection, trial_id: int, key: str) -> Any:
        query = sqlalchemy.select(_MARKS.c.value_json).where(_MARKS.c.trial_id == trial_id, _MARKS.c.key == key)
        text = connection.scalar(query)
        return None if text is None else json.loads(text)

    def _put(self, connection: Connection, trial_id: int, marks: Mapping[str, Any]) -> None:
        """Insert or replace user attributes in one statement; Optuna's call takes four for each."""
        if not marks:
            return
        rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in marks.items()]
        dialect: Any = sqlite if self.is_sqlite else postgresql
        insert = dialect.insert(_MARKS).values(rows)
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=["trial_id", "key"], set_={"value_json": insert.excluded.value_json}
            )
        )
