"""Where a study stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ris_hpo.search.counting import Direction, Tally, best_trial, cause_of, device_seconds, tally
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.owner import Owner


@dataclass(frozen=True)
class BestTrial:
    """The best trial in a few figures.

    Attributes:
        number: of the trial in its study.
        score: the study's objective.
        floor: the floor of that score on the same scenes.
        efficiency: how far the score has come from the worst one (0) to the floor (1).
        pipeline_k_loc: ``k_loc`` of the pipeline on the first validation scenes.
        params: the searched parameters.
        scenes: scenes seen in training.
    """

    number: int
    score: float
    floor: float | None
    efficiency: float | None
    pipeline_k_loc: float | None
    params: dict[str, Any]
    scenes: int | None


@dataclass(frozen=True)
class RunningTrial:
    """A trial that a worker holds now; ``seconds`` spent on it, as of its last heartbeat."""

    number: int
    host: str | None
    pid: int | None
    device: str | None
    step: int | None
    score: float | None
    seconds: float


@dataclass(frozen=True)
class FailedTrial:
    """A trial that failed.

    ``retried`` says whether a successor continues it; ``last_step`` is the number of scenes seen at its last report.
    """

    number: int
    cause: str
    error: str | None
    host: str | None
    device: str | None
    last_step: int | None
    seconds: float
    retried: bool


@dataclass(frozen=True)
class InvalidTrial:
    """A trial whose score does not count: why, since when, what it was, and what it scored."""

    number: int
    reason: str
    time: str
    state: str
    score: float | None


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands: what ``status --json`` prints.

    ``metric`` is what the score is called, ``k_loc`` unless the study has a program of its own.
    """

    study: str
    metric: str
    trials: Tally
    best: BestTrial | None
    running: list[RunningTrial]
    causes: dict[str, int]
    failed: list[FailedTrial]
    invalidated: list[InvalidTrial]
    device_hours: float

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types, with each score under the name of its metric."""
        tree = asdict(self)
        for trial in [tree["best"], *tree["running"], *tree["invalidated"]]:
            if trial is not None:
                trial[self.metric] = trial.pop("score")
        return tree


def summarise_best(trial: FrozenTrial | None) -> BestTrial | None:
    """Return the few figures of a trial."""
    if trial is None:
        return None
    attributes = trial.user_attrs
    pipeline = attributes.get(names.PIPELINE)
    return BestTrial(
        number=trial.number,
        score=trial.values[0],
        floor=attributes.get(names.FLOOR),
        efficiency=attributes.get(names.EFFICIENCY),
        pipeline_k_loc=None if pipeline is None else pipeline.get("k_loc"),
        params=dict(trial.params),
        scenes=attributes.get(names.SCENES),
    )


def study_status(
    name: str, trials: Sequence[FrozenTrial], metric: str = "k_loc", direction: Direction = "minimize"
) -> StudyStatus:
    """Summarise the trials of a study."""
    continued = {trial.user_attrs.get(names.PREDECESSOR) for trial in trials}
    failed = [
        _failed(trial, retried=trial.number in continued)
        for trial in trials
        if cause_of(trial) not in (None, Cause.WITHDRAWN, Cause.INVALIDATED)
    ]
    return StudyStatus(
        study=name,
        metric=metric,
        trials=tally(trials),
        best=summarise_best(best_trial(trials, direction)),
        running=[_running(trial) for trial in trials if trial.state == TrialState.RUNNING],
        causes=dict(Counter(trial.cause for trial in failed)),
        failed=failed,
        invalidated=[_invalid(trial) for trial in trials if cause_of(trial) == Cause.INVALIDATED],
        device_hours=device_seconds(trials) / 3600,
    )


def _running(trial: FrozenTrial) -> RunningTrial:
    owner, step = Owner.parse(trial.user_attrs.get(names.OWNER)), trial.last_step
    return RunningTrial(
        number=trial.number,
        host=None if owner is None else owner.process.host,
        pid=None if owner is None else owner.process.pid,
        device=trial.user_attrs.get(names.DEVICE),
        step=step,
        score=None if step is None else trial.intermediate_values[step],
        seconds=device_seconds([trial]),
    )


def _invalid(trial: FrozenTrial) -> InvalidTrial:
    was = trial.user_attrs[names.SET_ASIDE]
    score = None if was["values"] is None else was["values"][0]
    return InvalidTrial(trial.number, trial.user_attrs[names.ERROR], was["time"], was["state"], score)


def standing_verdict(attributes: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> dict[str, Any] | None:
    """Return the verdict on a study's winner; None where there is none, or a trial of it was invalidated since.

    Args:
        attributes: of the study.
        trials: of the study.
    """
    verdict: dict[str, Any] | None = attributes.get(names.WINNER)
    if verdict is None:
        return None
    compared = {candidate["name"] for candidate in verdict["candidates"]}
    invalid = {f"trial {trial.number}" for trial in trials if cause_of(trial) == Cause.INVALIDATED}
    return None if compared & invalid else verdict


def _failed(trial: FrozenTrial, *, retried: bool) -> FailedTrial:
    attributes = trial.user_attrs
    owner = Owner.parse(attributes.get(names.OWNER))
    return FailedTrial(
        number=trial.number,
        cause=str(cause_of(trial)),
        error=attributes.get(names.ERROR),
        host=attributes.get(names.HOST) or (None if owner is None else owner.process.host),  # lost before it told
        device=attributes.get(names.DEVICE),
        last_step=trial.last_step,
        seconds=device_seconds([trial]),
        retried=retried,
    )
