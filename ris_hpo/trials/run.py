"""One trial: parameters -> frozen run configuration -> training -> ``k_loc`` after each validation -> report and prune.

``run_trial`` turns every way a trial can end into a state of the store: complete, pruned, failed with a cause, put
back. The training program is an argument, so that the service is tested without a network and tunes more than one kind.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import NopPruner
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.errors import CheckpointError, GateError, StoreError, StudyGoneError, TrainingDivergedError, WorkerError
from ris_hpo.programs.program import Program
from ris_hpo.scoring.k_loc import WORST_K_LOC, efficiency, finite_score
from ris_hpo.search.counting import lineage_root
from ris_hpo.search.pruners import build_pruner
from ris_hpo.search.samplers import build_sampler
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.owner import Owner
from ris_hpo.trials import checkpoints
from ris_hpo.trials.drawing import Drawing, Figures
from ris_hpo.trials.failures import is_host_fault, one_line
from ris_hpo.trials.heartbeat import heartbeat
from ris_hpo.trials.record import TrialRecord


class _Scores(Protocol):
    k_loc: float

    def as_dict(self) -> dict[str, Any]: ...


class _Validation(Protocol):
    scenes_seen: int
    network: _Scores
    floor: _Scores


class _Trainer(Protocol):
    history: list[_Validation]
    finished: bool
    scenes_seen: int

    def run(self, stop: Callable[[], bool]) -> Iterator[_Validation]: ...

    def conclude(self) -> Any: ...


@dataclass(frozen=True)
class Started:
    """A trial begins, or goes on from where it was put back; ``seconds_before`` were spent on it until then."""

    number: int
    seconds_before: float


@dataclass(frozen=True)
class Report:
    """One validation of the running trial."""

    number: int
    step: int
    k_loc: float
    floor: float
    scenes_per_second: float
    memory_bytes: int


@dataclass(frozen=True)
class Scoring:
    """Training is over and its end is being scored; no more validations will come, however long that takes."""

    number: int


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    ``requeued``: stopped half-way, checkpointed and put back. ``fenced``: it was declared lost while this worker was
    silent, and belongs to a successor now.
    """

    state: Literal["complete", "pruned", "failed", "requeued", "fenced"]
    number: int
    value: float | None = None
    cause: Cause | None = None
    error: str | None = None


class UnfitHostError(WorkerError):
    """This machine cannot run trials now (disk full, device gone); the trial at hand was put back."""


@dataclass(frozen=True)
class TrialEnvironment:
    """What a worker gives to each of its trials.

    Attributes:
        store: the store.
        study_id: the study.
        spec: the study's specification.
        program: what is trained.
        directory: returns the folder of a trial's checkpoints by the trial's number.
        device: torch device.
        stop: asked between training steps; when true, the trial is checkpointed and put back.
        notify: called with a ``Started``, ``Report`` or ``Scoring`` when it happens.
        figures: makes what draws a trial, given the trial and its folder; None draws nothing.
    """

    store: Store
    study_id: int
    spec: StudySpec
    program: Program
    directory: Callable[[int], Path]
    device: str = "cpu"
    stop: Callable[[], bool] = lambda: False
    notify: Callable[[Started | Report | Scoring], None] = lambda event: None
    figures: Callable[[optuna.Trial, Path], Figures] | None = None


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
        study = optuna.load_study(study_name=name, storage=store, sampler=sampler, pruner=NopPruner())
        trial = optuna.Trial(study, trial_id)
        try:
            outcome = _Attempt(environment, claimed, trial, owner, record).run()
        except UpdateFinishedTrialError:
            return Outcome("fenced", number, error="declared lost while this worker was silent; its successor goes on")
        except (StoreError, StudyGoneError):
            raise
        except Exception as error:  # without a cause written down the trial would look lost, and come back for ever
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
        self.reported = set(claimed.intermediate_values)
        self.last_step = 0
        self.floor: float | None = None

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

    def _configure(self) -> Any:
        """Draw the parameters and record what they and this machine make of the trial; returns the configuration."""
        environment = self.environment
        params = self.spec.suggest(self.trial)
        seed = self.claimed.user_attrs.get(names.SEED)  # of a trial that was begun under another seed of the study
        config: Any = self.spec.config(params, lineage_root(self.claimed), environment.program.config, seed=seed)
        environment.store.mark(
            environment.study_id,
            self.claimed.number,
            {
                names.CONFIG_FINGERPRINT: config.fingerprint(),
                names.SEED: config.seed,
                names.HOST: self.owner.process.host,
                names.DEVICE: environment.device,
                names.THREADS: _threads(),
            },
        )
        self.last_step = config.budget.scenes
        budget = config.budget
        self.trial.study.pruner = build_pruner(
            self.spec, environment.store, first_scenes=budget.validate_every, max_scenes=budget.scenes
        )
        return config

    def _train(self, config: Any, directory: Path) -> Outcome:
        environment = self.environment
        trainer: _Trainer = environment.program.trainer(config, directory, device=environment.device, resume=True)
        resumed_at = trainer.scenes_seen
        make = environment.figures
        drawing = Drawing(self.trial.number, None if make is None else lambda: make(self.trial, directory))
        drawing.begin(config)
        try:
            for validation in self._validations(trainer):
                pruned = self._report(validation, resumed_at)
                if validation.scenes_seen >= resumed_at:
                    drawing.follow(trainer.history)
                if pruned:
                    return self._pruned(trainer, drawing)
        except TrainingDivergedError as error:
            return self._diverged(error)
        except GateError as error:  # the curriculum stopped, and what it reached until then is the trial's score
            return self._complete(trainer, drawing, {names.GATE: one_line(error)})
        if trainer.finished:
            return self._complete(trainer, drawing, {})
        return Outcome("requeued" if self.record.put_back(preempted=True) else "fenced", self.trial.number)

    def _validations(self, trainer: _Trainer) -> Iterator[_Validation]:
        yield from list(trainer.history)
        yield from trainer.run(self.environment.stop)

    def _report(self, validation: _Validation, resumed_at: int) -> bool:
        """Report one validation; return whether the trial is pruned by it.

        A resumed trial reports its history again where the store does not have it. The pruner is asked at each of these
        steps too, because that is what enters the trial in the competition, but its verdict on a step that the trial
        has already trained past is ignored: the death of one worker must not change what is tried.
        """
        trial, step = self.trial, validation.scenes_seen
        value = finite_score(validation.network.k_loc)
        self.floor = validation.floor.k_loc
        single = len(self.spec.directions) == 1
        known = step in self.reported
        if not known:
            self.reported.add(step)
            if single:
                trial.report(value, step)
            else:  # Optuna's report refuses two objectives, its store does not
                store, study_id = self.environment.store, self.environment.study_id
                trial_id = store.get_trial_id_from_study_id_trial_number(study_id, trial.number)
                store.set_trial_intermediate_value(trial_id, step, value)
        self.environment.notify(
            Report(
                number=trial.number,
                step=step,
                k_loc=value,
                floor=self.floor,
                scenes_per_second=max(step - resumed_at, 0) / max(self.record.seconds_here(), 1e-9),
                memory_bytes=_memory(self.environment.device),
            )
        )
        if not single or (known and step < resumed_at):
            return False
        verdict = trial.should_prune()
        return verdict and resumed_at <= step < self.last_step  # at the last one there is nothing left to save

    def _pruned(self, trainer: _Trainer, drawing: Drawing) -> Outcome:
        best = min(trainer.history, key=lambda validation: finite_score(validation.network.k_loc))
        drawing.conclude(trainer.history, None)
        attributes = {names.COMPONENTS: best.network.as_dict(), **self._costs(trainer)}
        self.record.finish(self.trial, TrialState.PRUNED, None, attributes)
        return Outcome("pruned", self.trial.number, value=finite_score(trainer.history[-1].network.k_loc))

    def _complete(self, trainer: _Trainer, drawing: Drawing, attributes: Mapping[str, Any]) -> Outcome:
        self.environment.notify(Scoring(self.trial.number))
        conclusion = trainer.conclude()
        drawing.conclude(trainer.history, conclusion)
        network, pipeline = conclusion.network, conclusion.pipeline
        if self.spec.objective == "network":
            score, floor = network, conclusion.floor
        else:  # on fewer scenes, which have a floor of their own
            score, floor = pipeline, conclusion.pipeline_floor
        value, self.floor = finite_score(score.k_loc), floor.k_loc
        attributes = {
            **attributes,
            names.COMPONENTS: network.as_dict(),
            names.PIPELINE: pipeline.as_dict(),
            names.PIPELINE_FLOOR: conclusion.pipeline_floor.k_loc,
            names.PARAMETERS: sum(conclusion.parameters.values()),
            names.EFFICIENCY: efficiency(value, floor.k_loc),
            **self._costs(trainer),
        }
        self.record.finish(self.trial, TrialState.COMPLETE, value, attributes)
        return Outcome("complete", self.trial.number, value=value)

    def _diverged(self, error: TrainingDivergedError) -> Outcome:
        attributes = {names.DIVERGED: one_line(error), names.SECONDS: self.record.seconds()}
        self.record.finish(self.trial, TrialState.COMPLETE, WORST_K_LOC, attributes)
        return Outcome("complete", self.trial.number, value=WORST_K_LOC, error=one_line(error))

    def _costs(self, trainer: _Trainer) -> dict[str, Any]:
        seconds = self.record.seconds()
        return {
            names.FLOOR: self.floor,
            names.SCENES: trainer.scenes_seen,
            names.SECONDS: seconds,
            names.SCENES_PER_SECOND: trainer.scenes_seen / max(seconds, 1e-9),
            names.PEAK_MEMORY: _memory(self.environment.device),
        }


def _threads() -> int:
    torch: Any = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else 1


def _memory(device: str) -> int:
    """Return peak bytes: of the device on a GPU, of this process on a CPU."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)
