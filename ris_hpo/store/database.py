"""Optuna's RDB storage with transactions of our own, and all that this package knows of it beyond its interface.

That stands in this module and in no other:

- ``RDBStorage.engine`` and ``RDBStorage.scoped_session``, attributes without documentation: ``transaction`` binds the
  session to its own connection. Optuna's public calls then join the transaction, because the session they use is bound
  to our connection and commits no more than a savepoint there.
- Nine tables with the columns declared below, at revision ``SCHEMA`` of the database schema: reads of a few columns,
  row locks, many trials or attributes at once, and another name of a study, for which there is no call.

No name with a leading underscore is used here or anywhere else; a test searches for them.
"""

from __future__ import annotations

import json
import math
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, column
from sqlalchemy.dialects import postgresql, sqlite

from ris_hpo.errors import StoreError, StudyGoneError
from ris_hpo.store import attributes as names

OPTUNA: Final = "5.0"
"""Version of Optuna that this module was read against; the package requires it to the minor number."""

SCHEMA: Final = "v3.2.0.a"
"""Revision of Optuna's database schema that the tables below were read from."""

GONE: Final = "the study or trial is not in the store any more: it was deleted or renamed while it was in use"

STUDIES = sqlalchemy.table("studies", column("study_id"), column("study_name"))
STUDY_MARKS = sqlalchemy.table("study_user_attributes", column("study_id"), column("key"), column("value_json"))
TRIALS = sqlalchemy.table(
    "trials",
    column("trial_id"),
    column("number"),
    column("study_id"),
    column("state", sqlalchemy.Enum(TrialState)),
    column("datetime_start", sqlalchemy.DateTime),
    column("datetime_complete", sqlalchemy.DateTime),
)
PARAMS = sqlalchemy.table(
    "trial_params", column("trial_id"), column("param_name"), column("param_value"), column("distribution_json")
)
VALUES = sqlalchemy.table(
    "trial_values",
    column("trial_id"),
    column("objective"),
    column("value"),
    column("value_type", sqlalchemy.Enum("FINITE", "INF_POS", "INF_NEG", name="trialvaluetype")),
)
REPORTS = sqlalchemy.table(
    "trial_intermediate_values",
    column("trial_id"),
    column("step"),
    column("intermediate_value"),
    column(
        "intermediate_value_type",
        sqlalchemy.Enum("FINITE", "INF_POS", "INF_NEG", "NAN", name="trialintermediatevaluetype"),
    ),
)
SYSTEM_MARKS = sqlalchemy.table("trial_system_attributes", column("trial_id"), column("key"), column("value_json"))
MARKS = sqlalchemy.table("trial_user_attributes", column("trial_id"), column("key"), column("value_json"))
BEATS = sqlalchemy.table("trial_heartbeats", column("trial_id"), column("heartbeat", sqlalchemy.DateTime))


class Database(RDBStorage):
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
    def reading(self) -> Iterator[Connection]:
        """Open a connection to read from."""
        with self.engine.connect() as connection:
            yield connection

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
                    locked = sqlalchemy.select(STUDIES.c.study_id).where(STUDIES.c.study_id == study_id)
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
            locked = sqlalchemy.select(TRIALS.c.state).where(TRIALS.c.trial_id == trial_id).with_for_update()
            before = connection.scalar(locked)
            repeated = before == state and state.is_finished() and owner is not None
            if repeated and mark_of(connection, trial_id) == owner:
                ended = self.get_trial(trial_id).values
                if values is None or ended == list(values):
                    return True
            return bool(super().set_trial_state_values(trial_id, state, values))

    def times(self, study_id: int) -> dict[int, tuple[datetime | None, datetime | None]]:
        """Return by number when each trial of a study began and ended, in UTC: local times repeat an hour in autumn."""
        query = sqlalchemy.select(TRIALS.c.number, TRIALS.c.datetime_start, TRIALS.c.datetime_complete)
        with self.reading() as connection:
            rows = connection.execute(query.where(TRIALS.c.study_id == study_id))
            return {row.number: (row.datetime_start, row.datetime_complete) for row in rows}

    def outline(self, study_id: int, keys: Collection[str]) -> list[FrozenTrial]:
        """Return the trials of a study by number, without parameters, curves and attributes other than ``keys``.

        Reading ten thousand whole trials with fifty reports each takes half a minute of processor time.
        """
        of_study = TRIALS.c.study_id == study_id
        scored = sqlalchemy.select(VALUES).join_from(TRIALS, VALUES, VALUES.c.trial_id == TRIALS.c.trial_id)
        marked = sqlalchemy.select(MARKS).join_from(TRIALS, MARKS, MARKS.c.trial_id == TRIALS.c.trial_id)
        values: dict[int, list[float]] = {}
        marks: dict[int, dict[str, Any]] = {}
        with self.reading() as connection:
            rows = connection.execute(sqlalchemy.select(TRIALS).where(of_study).order_by(TRIALS.c.number)).all()
            for row in connection.execute(scored.where(of_study).order_by(VALUES.c.objective)):
                infinite = math.inf if row.value_type == "INF_POS" else -math.inf
                values.setdefault(row.trial_id, []).append(row.value if row.value_type == "FINITE" else infinite)
            for row in connection.execute(marked.where(of_study, MARKS.c.key.in_(keys))):
                marks.setdefault(row.trial_id, {})[row.key] = json.loads(row.value_json)
        return [
            FrozenTrial(
                number=row.number,
                trial_id=row.trial_id,
                state=row.state,
                value=None,
                values=values.get(row.trial_id),
                datetime_start=row.datetime_start,
                datetime_complete=row.datetime_complete,
                params={},
                distributions={},
                user_attrs=marks.get(row.trial_id, {}),
                system_attrs={},
                intermediate_values={},
            )
            for row in rows
        ]

    def add_trials(
        self,
        connection: Connection,
        study_id: int,
        trials: Sequence[FrozenTrial],
        times: Mapping[int, tuple[datetime | None, datetime | None]],
    ) -> None:
        """Add trials as they are to a study that has none; one by one takes minutes.

        Args:
            connection: of ``transaction``.
            study_id: the study.
            trials: numbered from 0.
            times: by number, when each began and ended, in UTC.
        """
        rows = [
            {
                "study_id": study_id,
                "number": trial.number,
                "state": trial.state,
                "datetime_start": times[trial.number][0],
                "datetime_complete": times[trial.number][1],
            }
            for trial in trials
        ]
        _insert(connection, TRIALS, rows)
        found = sqlalchemy.select(TRIALS.c.number, TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)
        ids = {row.number: row.trial_id for row in connection.execute(found)}
        for table, parts in ((PARAMS, _params), (VALUES, _values), (REPORTS, _reports)):
            _insert(connection, table, [{"trial_id": ids[t.number], **part} for t in trials for part in parts(t)])
        for table, kind in ((MARKS, "user_attrs"), (SYSTEM_MARKS, "system_attrs")):
            marks = [
                {"trial_id": ids[trial.number], "key": key, "value_json": json.dumps(value)}
                for trial in trials
                for key, value in getattr(trial, kind).items()
            ]
            _insert(connection, table, marks)


def _insert(connection: Connection, table: sqlalchemy.TableClause, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(sqlalchemy.insert(table), rows)


def _params(trial: FrozenTrial) -> Iterator[dict[str, Any]]:
    for name, value in trial.params.items():
        distribution = trial.distributions[name]
        yield {
            "param_name": name,
            "param_value": distribution.to_internal_repr(value),
            "distribution_json": distribution_to_json(distribution),
        }


def _values(trial: FrozenTrial) -> Iterator[dict[str, Any]]:
    for objective, number in enumerate(trial.values or ()):
        value, kind = _stored(number)
        yield {"objective": objective, "value": value, "value_type": kind}


def _reports(trial: FrozenTrial) -> Iterator[dict[str, Any]]:
    for step, number in trial.intermediate_values.items():
        value, kind = _stored(number)
        yield {"step": step, "intermediate_value": value, "intermediate_value_type": kind}


def _stored(number: float) -> tuple[float | None, str]:
    """Return a number as the tables have it: databases disagree about infinities and NaN."""
    if math.isfinite(number):
        return number, "FINITE"
    return None, "NAN" if math.isnan(number) else "INF_POS" if number > 0 else "INF_NEG"


def mark_of(connection: Connection, trial_id: int, key: str = names.OWNER) -> Any:
    """Return a user attribute of a trial, None where it has none."""
    query = sqlalchemy.select(MARKS.c.value_json).where(MARKS.c.trial_id == trial_id, MARKS.c.key == key)
    return loaded(connection.scalar(query))


def loaded(text: str | None) -> Any:
    """Return the value of a column of JSON, None where there is no row."""
    return None if text is None else json.loads(text)


def put_marks(connection: Connection, trial_id: int, marks: Mapping[str, Any]) -> None:
    """Insert or replace user attributes in one statement; Optuna's call takes four for each."""
    if not marks:
        return
    rows = [{"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in marks.items()]
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    insert = dialect.insert(MARKS).values(rows)
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=["trial_id", "key"], set_={"value_json": insert.excluded.value_json}
        )
    )
