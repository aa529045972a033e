"""One trial: parameters -> frozen run configuration -> training program -> complete, pruned, paused, failed, put back.

``run_trial`` turns every way a trial can end into a state of the store. The program sees it as a ``StudyTrial``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import NopPruner
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.config import Spec
from ris_hpo.errors import CheckpointError, StoreError, StudyGoneError, TrainingDivergedError, WorkerError
from ris_hpo.programs.program import RequeuedError, as_number
from ris_hpo.search.counting import lineage_root
from ris_hpo.search.proposals import choose, given_point
from ris_hpo.search.rungs import as_samplers_see
from ris_hpo.search.samplers import build_sampler
from ris_hpo.search.view import View
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.owner import Owner
from ris_hpo.trials import checkpoints
from ris_hpo.trials.context import Started, StudyTrial, TrialEnvironment
from ris_hpo.trials.failures import is_host_fault, one_line
from ris_hpo.trials.heartbeat import heartbeat
from ris_hpo.trials.record import TrialRecord


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    ``paused``: it has reached a rung, and goes on when it is promoted. ``requeued``: stopped half-way, checkpointed and
    put back. ``fenced``: it was declared lost while this worker was silent, and belongs to a successor now.
    """

    state: Literal["complete", "pruned", "paused", "failed", "requeued", "fenced"]
    number: int
    value: float | None = None
    cause: Cause | None = None
    error: str | None = None


class UnfitHostError(WorkerError):
    """This machine cannot run trials now (disk full, device gone); the trial at hand was put back."""


def run_trial(environment: TrialEnvironment, number: int, owner: Owner) -> Outcome:
    """Run one claimed trial to its end and write that end into the store.

    An unforeseen exception fails the trial with cause ``bug``, and its traceback goes into the trial's attributes.

    Args:
        environment: what the worker gives to its trials.
        number: a trial that this worker has claimed.
        owner: the owner it was claimed under; every write that ends the trial asks for it.

    Raises:
        UnfitHostError: this machine is at fault (disk full, device gone); the trial is put back.
        StoreError: the store stays away; the trial will be recovered by whoever finds it.
        StudyGoneError: the study was deleted or renamed meanwhile.
    """
    store, study_id, spec = environment.store, environment.study_id, environment.spec
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, number)
    claimed = store.get_trial(trial_id)
    record = TrialRecord(store, study_id, spec, claimed, owner)
    environment.notify(Started(number, record.seconds_before))
    with heartbeat(store, study_id, number, record.seconds):
        # a fresh study for each trial, since Optuna keeps the list of trials that it saw during the last one
        name, sampler = store.get_study_name_from_id(study_id), build_sampler(spec, lineage_root(claimed))
        seen: Any = View(store, as_samplers_see)
        study = optuna.load_study(study_name=name, storage=seen, sampler=sampler, pruner=NopPruner())
        try:
            _choose_point(environment, study, claimed, trial_id)
            trial = optuna.Trial(study, trial_id)
            outcome = _Attempt(environment, claimed, trial, owner, record).run()
        except UpdateFinishedTrialError:
            return Outcome("fenced", number, error="declared lost while this worker was silent; its successor goes on")
        except (StoreError, StudyGoneError):
            raise
        except (
            Exception,
            SystemExit,
        ) as error:  # without a cause written down the trial would look lost, and come back for ever
            if is_host_fault(error):
                record.put_back(preempted=False)
                raise UnfitHostError(f"trial {number} was put back: {one_line(error)}") from error
            cause = record.fail(error)
            state: Literal["failed", "fenced"] = "fenced" if cause is None else "failed"
            outcome = Outcome(state, number, cause=cause, error=one_line(error))
    if outcome.state in ("complete", "pruned", "failed"):
        for directory in (environment.directory(number), *_predecessors(environment, claimed)):
            checkpoints.remove_leftovers(directory)
    return outcome


def _choose_point(environment: TrialEnvironment, study: optuna.Study, claimed: FrozenTrial, trial_id: int) -> None:
    """Fix the parameters of a trial in a finite or constrained space beforehand; others are drawn one by one."""
    spec, points = environment.spec, environment.points
    if points.is_restricted and not points.is_whole(given_point(claimed) or {}):
        point = choose(environment.store, environment.study_id, spec, points, study, claimed)
        environment.store.set_trial_system_attr(trial_id, "fixed_params", point)


def _predecessors(environment: TrialEnvironment, trial: FrozenTrial) -> Iterator[Path]:
    """Yield the folders of the trials that this one continues, the nearest first; one that died early may have none."""
    trials = environment.store.get_all_trials(environment.study_id, deepcopy=False)
    number = trial.user_attrs.get(names.PREDECESSOR)
    while number is not None:
        yield environment.directory(number)
        number = trials[number].user_attrs.get(names.PREDECESSOR)


class _Attempt:
    """The straight path of one trial: everything here may raise, and ``run_trial`` decides what that means."""

    def __init__(
        self,
        environment: TrialEnvironment,
        claimed: FrozenTrial,
        trial: optuna.Trial,
        owner: Owner,
        record: TrialRecord,
    ) -> None:
        self.environment = environment
        self.spec = environment.spec
        self.claimed = claimed
        self.trial = trial
        self.owner = owner
        self.record = record
        self.seed = 0

    def run(self) -> Outcome:
        config = self._configure()
        directory = self.environment.directory(self.trial.number)
        checkpoints.inherit(directory, _predecessors(self.environment, self.claimed))
        try:
            return self._train(config, directory)
        except CheckpointError:
            if not directory.exists():
                raise
            # damaged by a full disk or a crash of the machine: the seed leads to the same curve from the start
            checkpoints.set_aside(directory)
            return self._train(config, directory)

    def _configure(self) -> Spec:
        """Draw the parameters and record what they and this machine make of the trial; returns the configuration."""
        environment = self.environment
        params = self.spec.suggest(self.trial)
        root = lineage_root(self.claimed)
        # a trial that was begun before keeps its seed, whatever the study's is now
        seed = self.seed = self.claimed.user_attrs.get(names.SEED, self.spec.trial_seed(root))
        config: Spec = self.spec.config(params, root, seed=seed)
        environment.store.mark(
            environment.study_id,
            self.claimed.number,
            {
                names.CONFIG_FINGERPRINT: config.fingerprint(),
                names.SEED: seed,
                names.HOST: self.owner.process.host,
                names.DEVICE: environment.device,
                names.THREADS: _threads(),
                names.CODE: version("ris-hpo"),
            },
        )
        return config

    def _train(self, config: Spec, directory: Path) -> Outcome:
        context = StudyTrial(self.environment, self.claimed, self.trial, self.record, config, directory, self.seed)
        number = self.trial.number
        try:
            returned = self.environment.program.train(context)
            if context.is_at_rung:
                is_ours = self.record.pause(context.rungs, context.attributes())
                return Outcome("paused" if is_ours else "fenced", number, value=context.last_score)
            if context.pruned:
                self.record.finish(self.trial, TrialState.PRUNED, None, context.attributes())
                return Outcome("pruned", number, value=context.last_score)
            program = self.spec.program_name()
            score = context.last_score if returned is None else as_number(returned, f"what {program} returned")
            if score is None:
                raise TypeError(f"{program} returned no score and has reported none")
            value = self.spec.finite(score)
        except RequeuedError:
            return Outcome("requeued" if self.record.put_back(preempted=True) else "fenced", number)
        except TrainingDivergedError as error:
            worst = self.spec.worst_score
            if worst is None:
                raise
            attributes = {names.DIVERGED: one_line(error), names.SECONDS: self.record.seconds()}
            self.record.finish(self.trial, TrialState.COMPLETE, worst, attributes)
            return Outcome("complete", number, value=worst, error=one_line(error))
        self.record.finish(self.trial, TrialState.COMPLETE, value, context.attributes())
        return Outcome("complete", number, value=value)


def _threads() -> int:
    torch: Any = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else 1
