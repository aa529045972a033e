"""The trial store: Optuna's RDB storage on SQLite (WAL) or PostgreSQL, with the few operations an exact budget needs.

Optuna's storage is used as it is, behind its cache. What it lacks are transactions that cover more than one of its
calls, and each of these is added here as one transaction that is safe to repeat after a lost acknowledgement:
``fill`` (a study has exactly N tickets), ``claim`` (one worker takes one ticket and its name stands on it), ``release``
(it goes back), ``retire`` (a trial fails and its successor stands in the queue).
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import orm

from ris_hpo.store import attributes as names
from ris_hpo.store.patience import patiently

Seen = tuple[TrialState, bool]


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

    def trial_states(self, study_id: int, after: int) -> dict[int, Seen]:
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
