"""The trials of a study in what promotion depends on, read within the transaction that claims one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy
from optuna.trial import TrialState
from sqlalchemy import Connection

from ris_hpo.store import attributes as names
from ris_hpo.store.database import MARKS, STUDY_MARKS, TRIALS, loaded

INVALID: Final = sqlalchemy.select(STUDY_MARKS.c.value_json).where(STUDY_MARKS.c.key == names.INVALID)
_STANDING: Final = (names.RUNGS, names.PAUSED, names.PREDECESSOR, names.CAUSE, names.DIVERGED)


@dataclass(frozen=True, slots=True)
class Standing:
    """A trial in what promotion depends on: its state, and the attributes that tell of its line and its rungs."""

    number: int
    state: TrialState
    user_attrs: dict[str, Any]


Promote = Callable[[list[Standing]], int | None]
"""Chooses the paused trial that goes on now, given all trials of the study; None where none should."""


def standings(connection: Connection, study_id: int) -> list[Standing]:
    """Read all trials of a study, by number, in what promotion depends on; invalid ones have reached no rung."""
    trials = sqlalchemy.select(TRIALS.c.number, TRIALS.c.state).where(TRIALS.c.study_id == study_id)
    found = {row.number: Standing(row.number, row.state, {}) for row in connection.execute(trials)}
    marks = (
        sqlalchemy.select(TRIALS.c.number, MARKS.c.key, MARKS.c.value_json)
        .join_from(TRIALS, MARKS, MARKS.c.trial_id == TRIALS.c.trial_id)
        .where(TRIALS.c.study_id == study_id, MARKS.c.key.in_(_STANDING))
    )
    for row in connection.execute(marks):
        if row.number in found:  # PostgreSQL may have seen a trial begin between the two
            found[row.number].user_attrs[row.key] = loaded(row.value_json)
    for number in loaded(connection.scalar(INVALID.where(STUDY_MARKS.c.study_id == study_id))) or {}:
        found[int(number)].user_attrs.pop(names.RUNGS, None)
        found[int(number)] = replace(found[int(number)], state=TrialState.FAIL)
    return [found[number] for number in sorted(found)]
