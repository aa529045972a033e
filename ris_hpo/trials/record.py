"""How a trial ends in the store, and what it has cost until then."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.errors import TrainingDivergedError
from ris_hpo.search import counting
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.credentials import redact
from ris_hpo.store.owner import Owner
from ris_hpo.trials.failures import is_out_of_memory, one_line

_TRACEBACK_LENGTH = 4000


class TrialRecord:
    """Writes the end of one trial on behalf of the owner that runs it.

    Each write says whether the end is this owner's. It is not where the trial was declared lost meanwhile: then it is
    FAIL with another cause, and a successor continues it. The store repeats a write whose acknowledgement was lost.

    Args:
        store: the store.
        study_id: the study.
        spec: the study's specification.
        trial: the trial as it was claimed.
        owner: who claimed it.

    Attributes:
        seconds_before: seconds that workers had spent on the trial when it was claimed.
    """

    def __init__(self, store: Store, study_id: int, spec: StudySpec, trial: FrozenTrial, owner: Owner) -> None:
        self._store = store
        self._study_id = study_id
        self._spec = spec
        self._number = trial.number
        self._owner = str(owner)
        self.seconds_before: float = trial.user_attrs.get(names.SECONDS, 0.0)
        self._preemptions: int = trial.user_attrs.get(names.PREEMPTIONS, 0)
        self._begun = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds that workers have spent on this trial, those before it was put back included."""
        return self.seconds_before + self.seconds_here()

    def seconds_here(self) -> float:
        """Return the seconds since this owner began."""
        return time.monotonic() - self._begun

    def finish(
        self, trial: optuna.Trial, state: TrialState, value: float | None, attributes: Mapping[str, Any]
    ) -> None:
        """End the trial as COMPLETE or PRUNED.

        Args:
            trial: the trial.
            state: COMPLETE or PRUNED.
            value: the score; None for a pruned trial.
            attributes: what else to write; the study's second objective is taken from it.

        Raises:
            UpdateFinishedTrialError: the trial was declared lost.
        """
        self._store.mark(self._study_id, self._number, attributes)
        values: list[float] | None = None
        if value is not None:
            values = [value]
            if len(self._spec.directions) > 1:
                cost = names.PARAMETERS if self._spec.cost == "parameters" else names.SECONDS
                # a trial that diverged has no measured size: as one that costs nothing it would be among the best
                values.append(float(attributes.get(cost, math.inf)))
        trial.study.tell(trial, values, state=state)

    def put_back(self, *, preempted: bool) -> bool:
        """Put the trial back into the queue; False when it was declared lost.

        Args:
            preempted: count this as a stop half-way.
        """
        attributes: dict[str, Any] = {names.SECONDS: self.seconds()}
        if preempted:
            attributes[names.PREEMPTIONS] = self._preemptions + 1
        return self._store.release(self._study_id, self._number, self._owner, attributes)

    def pause(self, rungs: Sequence[float], attributes: Mapping[str, Any]) -> bool:
        """Pause the trial at the last of ``rungs``; False when it was declared lost.

        Args:
            rungs: the line's scores at the rungs it has reached.
            attributes: what else to write.
        """
        marks = {**attributes, names.RUNGS: list(rungs), names.PAUSED: len(rungs) - 1}
        return self._store.release(self._study_id, self._number, self._owner, marks)

    def fail(self, error: BaseException) -> Cause | None:
        """Fail the trial for an exception, and queue its successor where the cause is retried.

        Returns:
            The cause; None when the trial was declared lost.
        """
        if is_out_of_memory(error):
            cause = Cause.OUT_OF_MEMORY
        else:
            cause = Cause.DIVERGED if isinstance(error, TrainingDivergedError) else Cause.BUG
        attributes: dict[str, Any] = {names.SECONDS: self.seconds()}
        if cause is Cause.BUG:
            attributes[names.TRACEBACK] = redact("".join(traceback.format_exception(error))[-_TRACEBACK_LENGTH:])
        trial = self._store.get_trial(self._store.get_trial_id_from_study_id_trial_number(self._study_id, self._number))
        line, retries = one_line(error), self._spec.retries
        is_ours = counting.fail_trial(
            self._store, self._study_id, trial, cause, line, retries, owner=self._owner, marks=attributes
        )
        return cause if is_ours else None
