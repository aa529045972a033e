"""The program of ``training`` studies: one run of the trainer, scored by the network's or the refined estimates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

from ris_hpo.errors import GateError
from ris_hpo.learning.inference import Path
from ris_hpo.programs.program import Program, TrialContext
from ris_hpo.scoring.k_loc import efficiency, finite_score
from ris_hpo.training.config import RunConfig
from ris_hpo.training.operations import operations_per_scene
from ris_hpo.training.results import Conclusion, Validation
from ris_hpo.training.trainer import Trainer

Objective = Path
"""The path whose ``k_loc`` is a trial's score. Validations report that of ``fast``, or else that of ``network``."""


class _Run(Protocol):
    history: list[Validation]
    finished: bool
    scenes_seen: int

    @property
    def last_validation(self) -> int: ...

    def run(self, stop: Any) -> Iterator[Validation]: ...

    def conclude(self) -> Conclusion: ...


def train(trial: TrialContext, *, objective: Objective) -> float | None:
    """Train one configuration and return the ``k_loc`` of its best weights.

    Args:
        trial: settings of a ``RunConfig``.
        objective: whose ``k_loc``.
    """
    config = RunConfig.parse(trial.config)
    trial.plan(config.budget.validate_every, config.budget.scenes)
    trainer = Trainer(config, trial.directory, device=trial.device, fast=objective == "fast")
    return follow(trial, trainer, objective)


def follow(trial: TrialContext, run: _Run, objective: Objective) -> float | None:
    """Run something that validates like a trainer to its end, and report it; see ``train``."""
    try:
        if _is_pruned(trial, run):
            best = min(run.history, key=lambda validation: finite_score(validation.searched[0].k_loc))
            trial.show(history=run.history, conclusion=None)
            trial.record(components=best.searched[0].as_dict())
            return None
        if not run.finished:
            trial.requeue()
    except GateError as error:  # the curriculum stopped, and what it reached until then is the trial's score
        trial.record(gate=str(error))
    trial.concluding()
    conclusion = run.conclude()
    trial.show(history=run.history, conclusion=conclusion)
    if objective == "network":
        score, floor = conclusion.network, conclusion.floor
    elif objective == "fast" and conclusion.fast is not None:
        score, floor = conclusion.fast, conclusion.pipeline_floor
    else:  # on fewer scenes, which have a floor of their own
        score, floor = conclusion.pipeline, conclusion.pipeline_floor
    value = finite_score(score.k_loc)
    trial.record(
        components=(score if objective == "fast" else conclusion.network).as_dict(),
        pipeline=conclusion.pipeline.as_dict(),
        pipeline_floor=conclusion.pipeline_floor.k_loc,
        parameters=sum(conclusion.parameters.values()),
        floor=floor.k_loc,
        efficiency=efficiency(value, floor.k_loc),
    )
    return value


def _is_pruned(trial: TrialContext, run: _Run) -> bool:
    resumed_at = run.scenes_seen

    def validations() -> Iterator[Validation]:
        yield from list(run.history)  # what a worker that was lost may not have reported any more
        yield from run.run(trial.should_stop)

    for validation in validations():
        trial.replan(run.last_validation)
        scores, floor = validation.searched
        pruned = trial.report(validation.scenes_seen, scores.k_loc, floor=floor.k_loc)
        if validation.scenes_seen >= resumed_at:
            trial.show(history=run.history)
        if pruned:
            return True
    return False


def _program(objective: Objective) -> Program:
    return Program(
        partial(train, objective=objective),
        RunConfig,
        length="budget.scenes",
        interval="budget.validate_every",
        rungs="budget.rungs",
        cost=operations_per_scene,
    )


NETWORK, FAST, PIPELINE = _program("network"), _program("fast"), _program("pipeline")
