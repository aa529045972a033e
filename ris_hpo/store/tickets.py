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
public calls do the writing: inside ``Database.transaction`` they join ours.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy
from optuna.exceptions import DuplicatedStudyError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Select

from ris_hpo.errors import StudyGoneError
from ris_hpo.store import attributes as names
from ris_hpo.store.database import (
    BEATS,
    GONE,
    MARKS,
    STUDIES,
    STUDY_MARKS,
    TRIALS,
    Database,
    loaded,
    mark_of,
    put_marks,
)
from ris_hpo.store.standings import INVALID, Promote, standings

_IDENTITY = sqlalchemy.select(STUDY_MARKS.c.value_json).where(STUDY_MARKS.c.key == names.IDENTITY)


@dataclass(frozen=True, slots=True)
class Seen:
    """A trial in the few columns that tell whether it has to be read again."""

    trial_id: int
    state: TrialState
    begun: bool
    paused: int | None
    """Rung at which a waiting trial is paused."""


@dataclass(frozen=True, slots=True)
class StudyView:
    """What changes in a study, in few columns.

    Attributes:
        identity: of the study.
        invalid: its attribute ``INVALID``.
        trials: by number, every unfinished trial and every new one.
    """

    identity: str | None
    invalid: dict[str, dict[str, str]]
    trials: dict[int, Seen]


@dataclass(frozen=True)
class StudyContent:
    """All that a database holds of a study, but for its identity.

    Attributes:
        name: its name.
        directions: of its objectives.
        user_attrs: attributes of the study.
        system_attrs: Optuna's attributes of the study.
        trials: all trials, by number from 0.
        times: by number, when each began and ended, in UTC.
    """

    name: str
    directions: Sequence[StudyDirection]
    user_attrs: Mapping[str, Any]
    system_attrs: Mapping[str, Any]
    trials: Sequence[FrozenTrial]
    times: Mapping[int, tuple[datetime | None, datetime | None]]


@dataclass(frozen=True, slots=True)
class Claim:
    """A trial that was taken: its number in the study, and its id."""

    number: int
    trial_id: int


class TicketStorage(Database):
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
        with self.reading() as connection:
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
            named = sqlalchemy.select(STUDIES.c.study_id).where(STUDIES.c.study_name == name)
            if connection.scalar(named) not in (None, study_id):
                raise DuplicatedStudyError(name)
            connection.execute(sqlalchemy.update(STUDIES).where(STUDIES.c.study_id == study_id).values(study_name=name))

    def receive(self, content: StudyContent, identity: str, place: Callable[[int], None]) -> int:
        """Add a study with all its trials, whole or not at all; return its id.

        Args:
            content: the study.
            identity: of the study, new: finding it here means that an earlier attempt did commit.
            place: called with the study's id before it can be seen; what it raises undoes all.

        Raises:
            DuplicatedStudyError: another study has the name.
        """
        with self.transaction() as connection:
            named = sqlalchemy.select(STUDIES.c.study_id).where(STUDIES.c.study_name == content.name)
            present: int | None = connection.scalar(named)
            if present is not None:
                if self.get_study_user_attrs(present).get(names.IDENTITY) == identity:
                    return present
                raise DuplicatedStudyError(content.name)
            study_id = self.create_new_study(content.directions, content.name)
            for key, value in content.system_attrs.items():
                self.set_study_system_attr(study_id, key, value)
            for key, value in {**content.user_attrs, names.IDENTITY: identity}.items():
                self.set_study_user_attr(study_id, key, value)
            self.add_trials(connection, study_id, content.trials, content.times)
            place(study_id)
            return study_id

    # -- reading -----------------------------------------------------------------------------------------------------

    def view(self, study_id: int, after: int) -> StudyView:
        """Return what changes in a study; new are the trials whose id is above ``after``.

        Raises:
            StudyGoneError: no such study.
        """
        unfinished = TRIALS.c.state.in_((TrialState.RUNNING, TrialState.WAITING))
        wanted = sqlalchemy.and_(
            TRIALS.c.study_id == STUDIES.c.study_id, sqlalchemy.or_(unfinished, TRIALS.c.trial_id > after)
        )
        query = (
            sqlalchemy.select(
                TRIALS.c.number,
                TRIALS.c.trial_id,
                TRIALS.c.state,
                TRIALS.c.datetime_start,
                _attribute(names.PAUSED).label("paused"),
                _IDENTITY.where(STUDY_MARKS.c.study_id == study_id).scalar_subquery().label("identity"),
                INVALID.where(STUDY_MARKS.c.study_id == study_id).scalar_subquery().label("invalid"),
            )
            .select_from(STUDIES.outerjoin(TRIALS, wanted))
            .where(STUDIES.c.study_id == study_id)
        )
        with self.reading() as connection:
            rows = connection.execute(query).all()
        if not rows:
            raise StudyGoneError(GONE)
        trials = (row for row in rows if row.trial_id is not None)
        seen = {
            row.number: Seen(row.trial_id, row.state, row.datetime_start is not None, loaded(row.paused))
            for row in trials
        }
        return StudyView(loaded(rows[0].identity), loaded(rows[0].invalid) or {}, seen)

    def heartbeats(self, study_id: int) -> dict[int, datetime]:
        """Return by number the last heartbeat of every running trial that has one, by the database's clock."""
        query = (
            sqlalchemy.select(TRIALS.c.number, BEATS.c.heartbeat)
            .join_from(TRIALS, BEATS, BEATS.c.trial_id == TRIALS.c.trial_id)
            .where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.RUNNING)
        )
        with self.reading() as connection:
            return {row.number: row.heartbeat for row in connection.execute(query)}

    def content(self, study_id: int) -> StudyContent:
        """Return all that is held of a study, as it is stored.

        Raises:
            KeyError: no such study.
        """
        marks = self.get_study_user_attrs(study_id)
        return StudyContent(
            name=self.get_study_name_from_id(study_id),
            directions=self.get_study_directions(study_id),
            user_attrs={key: value for key, value in marks.items() if key != names.IDENTITY},
            system_attrs=self.get_study_system_attrs(study_id),
            trials=self.get_all_trials(study_id, deepcopy=False),
            times=self.times(study_id),
        )

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
                        connection.execute(sqlalchemy.insert(TRIALS), blank)
                        blank = []
                    self.create_new_trial(study_id, template)
                else:  # hundreds at once; one by one they take eight statements each
                    blank.append({"study_id": study_id, "number": number, "state": TrialState.WAITING})
            if blank:
                connection.execute(sqlalchemy.insert(TRIALS), blank)
        return len(missing)

    def enqueue(self, study_id: int, tickets: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> None:
        """Give the parameters of ``tickets`` to trials that wait for the sampler, and append those that find none.

        So they run next, and the study has no more trials than before as long as enough of them wait.

        Args:
            study_id: the study.
            tickets: what is missing, given all trials of the study; asked again when this call is repeated.
        """
        with self.transaction(study_id) as connection:
            present = self.get_all_trials(study_id, deepcopy=False)
            free = [
                trial.number
                for trial in present
                if trial.state is TrialState.WAITING and not (trial.user_attrs or trial.system_attrs or trial.params)
            ]
            for template in tickets(present):
                taken = None
                while free and (taken is None or taken.state is not TrialState.WAITING):  # else a worker was faster
                    taken = self._locked(connection, study_id, free.pop(0))
                if taken is None or taken.state is not TrialState.WAITING:
                    self.create_new_trial(study_id, template)
                    continue
                put_marks(connection, taken.trial_id, template.user_attrs)
                for key, value in template.system_attrs.items():
                    self.set_trial_system_attr(taken.trial_id, key, value)

    def change_attribute(self, study_id: int, key: str, change: Callable[[Any], Any]) -> None:
        """Replace a study attribute by what ``change`` makes of it (None where there is none), in one transaction."""
        with self.transaction(study_id):
            self.set_study_user_attr(study_id, key, change(self.get_study_user_attrs(study_id).get(key)))

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
        of_study = TRIALS.c.study_id == study_id
        chosen = sqlalchemy.select(TRIALS.c.number, TRIALS.c.trial_id)
        held = chosen.join_from(TRIALS, MARKS, MARKS.c.trial_id == TRIALS.c.trial_id).where(
            of_study,
            TRIALS.c.state == TrialState.RUNNING,
            MARKS.c.key == names.OWNER,
            MARKS.c.value_json == json.dumps(owner),
        )
        of_trial = MARKS.c.trial_id == TRIALS.c.trial_id
        continued = sqlalchemy.exists().where(of_trial, MARKS.c.key == names.PREDECESSOR)
        paused = sqlalchemy.exists().where(of_trial, MARKS.c.key == names.PAUSED, MARKS.c.value_json != "null")
        begun = sqlalchemy.or_(continued, TRIALS.c.datetime_start.is_not(None))
        waiting = (
            chosen.add_columns(begun.label("begun"))
            .where(of_study, TRIALS.c.state == TrialState.WAITING, ~paused)
            .order_by(continued.desc(), begun.desc(), TRIALS.c.number)
            .limit(1)
            .with_for_update(skip_locked=True, of=TRIALS)  # left out on SQLite, where the whole file is ours already
        )
        with self.transaction(None if promote is None else study_id) as connection:
            if identity is not None:
                found = connection.scalar(_IDENTITY.where(STUDY_MARKS.c.study_id == study_id))
                if loaded(found) != identity:
                    raise StudyGoneError(GONE)
            row = connection.execute(held).one_or_none()
            if row is not None:
                return Claim(row.number, row.trial_id)
            row = connection.execute(waiting).one_or_none()
            marks: dict[str, Any] = {names.OWNER: owner}
            if promote is not None and not (row is not None and row.begun):
                number = promote(standings(connection, study_id))
                if number is not None:
                    row = self._locked(connection, study_id, number)
                    times = mark_of(connection, row.trial_id, names.PROMOTED_AT) or []
                    marks |= {names.PAUSED: None, names.PROMOTED_AT: [*times, round(time.time(), 3)]}
            if row is None:
                return None
            self.set_trial_state_values(row.trial_id, TrialState.RUNNING)
            put_marks(connection, row.trial_id, marks)
            return Claim(row.number, row.trial_id)

    def release(self, study_id: int, number: int, owner: str | None, marks: Mapping[str, Any]) -> bool:
        """Put a running trial back into the queue with ``marks`` as attributes; False when ``owner`` did not hold it.

        Only for an owner that gives up its own trial, or is known to be dead: another one is not fenced off by this.
        """
        with self.transaction() as connection:
            row = self._locked(connection, study_id, number)
            if not _holds(connection, row, owner):  # repeated after a lost acknowledgement, it says so itself
                return owner is not None and mark_of(connection, row.trial_id, names.RELEASED_BY) == owner
            put_marks(connection, row.trial_id, {**marks, names.OWNER: None, names.RELEASED_BY: owner})
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
                    and mark_of(connection, row.trial_id) == owner
                    and all(mark_of(connection, row.trial_id, key) == value for key, value in marks.items())
                )
            template = successor(self.get_trial(row.trial_id))
            put_marks(connection, row.trial_id, marks)
            self.set_trial_state_values(row.trial_id, TrialState.FAIL)
            if template is not None:
                self.create_new_trial(study_id, template)
        return True

    def reserve(self, study_id: int, number: int, choose: Callable[[Collection[str]], str]) -> str:
        """Give a running trial a text that no other trial of the study has; repeated, the same one.

        Args:
            study_id: the study.
            number: the trial.
            choose: makes the text, given those of all other trials.
        """
        with self.transaction(study_id) as connection:
            row = self._locked(connection, study_id, number)
            own = mark_of(connection, row.trial_id, names.POINT)
            if own is None:
                self.check_trial_is_updatable(row.trial_id, row.state)
                query = (
                    sqlalchemy.select(MARKS.c.value_json)
                    .join_from(TRIALS, MARKS, MARKS.c.trial_id == TRIALS.c.trial_id)
                    .where(TRIALS.c.study_id == study_id, MARKS.c.key == names.POINT)
                )
                own = choose({loaded(text) for text in connection.scalars(query)})
                put_marks(connection, row.trial_id, {names.POINT: own})
        return str(own)

    def withdraw(self, study_id: int, numbers: Sequence[int]) -> None:
        """Take waiting trials out of the queue for good; one that a worker has claimed meanwhile stays."""
        with self.transaction() as connection:
            for number in numbers:
                row = self._locked(connection, study_id, number)
                if row.state != TrialState.WAITING:
                    continue
                put_marks(connection, row.trial_id, {names.CAUSE: names.Cause.WITHDRAWN.value})
                self.set_trial_state_values(row.trial_id, TrialState.FAIL)

    def mark(self, study_id: int, number: int, marks: Mapping[str, Any]) -> None:
        """Write several user attributes of an unfinished trial in one transaction.

        Raises:
            UpdateFinishedTrialError: it has ended.
        """
        with self.transaction() as connection:
            row = self._locked(connection, study_id, number)
            self.check_trial_is_updatable(row.trial_id, row.state)
            put_marks(connection, row.trial_id, marks)

    def _locked(self, connection: Connection, study_id: int, number: int) -> Any:
        query: Select[Any] = sqlalchemy.select(TRIALS.c.number, TRIALS.c.trial_id, TRIALS.c.state).where(
            TRIALS.c.study_id == study_id, TRIALS.c.number == number
        )
        row = connection.execute(query.with_for_update()).one_or_none()
        if row is None:
            raise StudyGoneError(GONE)
        return row


def _attribute(key: str) -> Any:
    """The value of one attribute of each row of ``TRIALS``."""
    of_trial = sqlalchemy.and_(MARKS.c.trial_id == TRIALS.c.trial_id, MARKS.c.key == key)
    return sqlalchemy.select(MARKS.c.value_json).where(of_trial).correlate(TRIALS).scalar_subquery()


def _holds(connection: Connection, row: Any, owner: str | None) -> bool:
    """Say whether a trial runs and ``owner`` holds it (None: anyone)."""
    return bool(row.state == TrialState.RUNNING and owner in (None, mark_of(connection, row.trial_id)))
