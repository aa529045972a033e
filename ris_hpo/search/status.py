"""Where a study stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import Tally, best_trial, tally
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause


@dataclass(frozen=True)
class BestTrial:
    """The best trial in a few figures."""

    number: int
    k_loc: float
    floor: float | None
    efficiency: float | None
    pipeline_k_loc: float | None
    params: dict[str, Any]
    scenes: int | None


@dataclass(frozen=True)
class RunningTrial:
    """A trial that a worker holds now."""

    number: int
    owner: str | None
    step: int | None
    k_loc: float | None
    seconds: float | None


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands: what ``status --json`` prints."""

    study: str
    trials: Tally
    best: BestTrial | None
    running: list[RunningTrial]
    causes: dict[str, int]
    device_hours: float

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def summarise_best(trial: FrozenTrial | None) -> BestTrial | None:
    """Return the few figures of a trial."""
    if trial is None:
        return None
    attributes = trial.user_attrs
    pipeline = attributes.get(names.PIPELINE)
    return BestTrial(
        number=trial.number,
        k_loc=trial.values[0],
        floor=attributes.get(names.FLOOR),
        efficiency=attributes.get(names.EFFICIENCY),
        pipeline_k_loc=None if pipeline is None else pipeline.get("k_loc"),
        params=dict(trial.params),
        scenes=attributes.get(names.SCENES),
    )


def study_status(name: str, trials: Sequence[FrozenTrial]) -> StudyStatus:
    """Summarise the trials of a study."""
    now = datetime.now()
    causes: dict[str, int] = {}
    running: list[RunningTrial] = []
    seconds = 0.0
    for trial in trials:
        seconds += trial.user_attrs.get(names.SECONDS, 0.0)
        if trial.state == TrialState.FAIL:
            cause = str(trial.user_attrs.get(names.CAUSE, Cause.BUG.value))
            causes[cause] = causes.get(cause, 0) + 1
        elif trial.state == TrialState.RUNNING:
            step = trial.last_step
            running.append(
                RunningTrial(
                    number=trial.number,
                    owner=trial.user_attrs.get(names.OWNER),
                    step=step,
                    k_loc=None if step is None else trial.intermediate_values[step],
                    seconds=None if trial.datetime_start is None else (now - trial.datetime_start).total_seconds(),
                )
            )
    return StudyStatus(
        study=name,
        trials=tally(trials),
        best=summarise_best(best_trial(trials)),
        running=running,
        causes=causes,
        device_hours=seconds / 3600,
    )
