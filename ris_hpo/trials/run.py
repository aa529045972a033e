"""One trial: parameters -> frozen run configuration -> training -> ``k_loc`` after each validation -> report and prune.

``run_trial`` turns every way a trial can end into a state of the store: complete, pruned, failed with a cause, put
back. The training program is an argument, so that the service is tested without a network and tunes more than one kind.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import NopPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.errors import (
    CheckpointError,
    DeviceError,
    GateError,
    OutputError,
    RisHpoError,
    StoreError,
    TrainingDivergedError,
    WorkerError,
)
from ris_hpo.programs.program import Program
from ris_hpo.scoring.k_loc import WORST_K_LOC, efficiency, finite_score
from ris_hpo.search import counting
from ris_hpo.search.counting import lineage_root
from ris_hpo.search.pruners import build_pruner
from ris_hpo.search.samplers import build_sampler
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.credentials import redact


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


class Figures(Protocol):
    """What draws a trial for the dashboard while it runs; see ``artifacts.TrialFigures``."""

    def begin(self, config: Any) -> None:
        """Take note of the configuration."""

    def follow(self, history: Any) -> None:
        """Draw the curve so far."""

    def conclude(self, history: Any, conclusion: Any) -> None:
        """Draw the rest; ``conclusion`` is None for a pruned trial."""


@dataclass(frozen=True)
class Report:
    """One validation as the supervisor shows it."""

    number: int
    step: int
    k_loc: float
    floor: float
    scenes_per_second: float
    memory_bytes: int


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    ``requeued``: stopped half-way, checkpointed and put back. ``fenced``: another worker has the trial by now.
    """

    state: Literal["complete", "pruned", "failed", "requeued", "fenced"]
    number: int
    value: float | None = None
    cause: Cause | None = None
    error: str | None = None


class UnfitHostError(WorkerError):
    """This machine cannot run trials now (disk full, device gone); the trial at hand was put back."""


class TrialBugError(RisHpoError):
    """A trial that failed for a reason nobody foresaw; its traceback stands in the trial's attributes."""

    exit_code = 13


@dataclass
class Seat:
    """What a worker brings to a trial: store, study, program, device, and whom it tells."""

    store: Store
    study: Study
    spec: StudySpec
    program: Program
    directory: Callable[[int], Path]
    device: str = "cpu"
    stop: Callable[[], bool] = lambda: False
    notify: Callable[[Report], None] = lambda report: None
    started: Callable[[int], None] = lambda number: None
    figures: Callable[[optuna.Trial, Path], Figures] | None = None


def run_trial(seat: Seat, number: int, owner: str) -> Outcome:
    """Run one claimed trial to its end and write that end into the store.

    Args:
        seat: the worker's surroundings.
        number: a trial this worker has claimed.
        owner: the name it was claimed under; every write that ends the trial asks for it.

    Raises:
        UnfitHostError: this machine is at fault (disk full, device gone); the trial is put back.
        TrialBugError: an unforeseen exception; the trial is FAIL with cause ``bug`` and the traceback by then.
        StoreError: the store stays away; the trial will be recovered by whoever finds it.
    """
    store, spec = seat.store, seat.spec
    study_id = store.get_study_id_from_name(seat.study.study_name)
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, number)
    frozen = store.get_trial(trial_id)
    root = lineage_root(frozen)
    seat.started(frozen.number)
    begun = time.monotonic()
    with _heartbeat(store, trial_id):
        # a fresh one for each trial: Optuna keeps the list of trials that it saw during the last one
        study = optuna.load_study(
            study_name=seat.study.study_name, storage=store, sampler=build_sampler(spec, root), pruner=NopPruner()
        )
        trial = optuna.Trial(study, trial_id)
        try:
            return _Attempt(seat, study_id, trial, frozen, owner, begun).run()
        except UpdateFinishedTrialError:
            return Outcome(
                "fenced", trial.number, error="declared lost while this worker was silent; left to its successor"
            )
        except StoreError:
            raise
        except Exception as error:  # whatever a trial dies of must be written down, or it would look lost and come back
            if _is_of_the_surroundings(error):
                store.release(study_id, number, owner, {})
                raise UnfitHostError(f"trial {trial.number} was put back: {_one_line(error)}") from error
            cause = Cause.OUT_OF_MEMORY if is_out_of_memory(error) else Cause.BUG
            seconds = frozen.user_attrs.get(names.SECONDS, 0.0) + time.monotonic() - begun
            marks = {names.SECONDS: seconds, names.HOST: socket.gethostname()}
            if cause is Cause.BUG:
                marks[names.TRACEBACK] = redact("".join(traceback.format_exception(error))[-4000:])
            line = _one_line(error)
            current = store.get_trial(trial_id)
            if not counting.fail_trial(store, study_id, current, cause, line, spec.retries, owner=owner, marks=marks):
                return Outcome("fenced", trial.number, error=line)
            if cause is Cause.BUG:
                raise TrialBugError(f"trial {trial.number} failed: {line}") from error
            return Outcome("failed", trial.number, cause=cause, error=line)


class _Attempt:
    """The straight path of one trial: everything here may raise, and ``run_trial`` names what that means."""

    def __init__(
        self, seat: Seat, study_id: int, trial: optuna.Trial, frozen: FrozenTrial, owner: str, begun: float
    ) -> None:
        self.last_step = 0
        self.seat = seat
        self.study_id = study_id
        self.trial = trial
        self.reported = set(frozen.intermediate_values)
        self.root = lineage_root(frozen)
        self.owner = owner
        self.begun = begun
        self.floor: float | None = None
        self.figures: Figures | None = None

    def run(self) -> Outcome:
        seat, trial = self.seat, self.trial
        params = seat.spec.suggest(trial)
        seed = trial.user_attrs.get(names.SEED)  # of a trial that was begun before, whatever the study's seed is now
        config: Any = seat.spec.config(params, self.root, seat.program.config, seed=seed)
        seat.store.mark(
            self.study_id,
            trial.number,
            {
                names.CONFIG_FINGERPRINT: config.fingerprint(),
                names.SEED: config.seed,
                names.HOST: socket.gethostname(),
                names.DEVICE: seat.device,
                names.THREADS: _threads(),
            },
        )
        trial.study.pruner = build_pruner(
            seat.spec, seat.store, first_scenes=config.budget.validate_every, max_scenes=config.budget.scenes
        )
        self.last_step = config.budget.scenes
        directory = seat.directory(trial.number)
        self._inherit(directory)
        try:
            return self._train(config, directory)
        except CheckpointError:
            if not directory.exists():
                raise
            # damaged by a full disk or a crash of the machine: the seed leads to the same curve from the start
            aside = directory.with_name(f"{directory.name}.damaged-{os.getpid()}-{time.time_ns()}")
            directory.rename(aside)
            return self._train(config, directory)

    def _train(self, config: Any, directory: Path) -> Outcome:
        trainer: _Trainer = self.seat.program.trainer(config, directory, device=self.seat.device, resume=True)
        resumed_at = trainer.scenes_seen
        if self.seat.figures is not None:
            self.figures = self.seat.figures(self.trial, directory)
            self.figures.begin(config)
        try:
            for validation in self._validations(trainer):
                pruned = self._report(validation, resumed_at)
                if self.figures is not None and validation.scenes_seen >= resumed_at:
                    self.figures.follow(trainer.history)
                if pruned:
                    return self._pruned(trainer)
        except TrainingDivergedError as error:
            return self._diverged(error)
        except GateError as error:  # the curriculum stopped, and what it reached until then is the trial's score
            return self._complete(trainer, {names.GATE: _one_line(error)})
        return self._complete(trainer, {}) if trainer.finished else self._requeued()

    def _inherit(self, directory: Path) -> None:
        """Give a successor its predecessor's checkpoint.

        It gets a copy and a directory of its own: a late owner of the failed trial, should it wake up, writes where
        nobody reads any more. Without one (another host, no shared disk) the trial starts over, to the same curve.
        """
        if directory.exists():
            return
        source = self._left_behind()
        if source is None:
            return
        partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".*"))  # not what was half written
            partial.rename(directory)
        except OSError:  # a late owner moved a file under the copy: start over rather than from a torn checkpoint
            shutil.rmtree(partial, ignore_errors=True)

    def _left_behind(self) -> Path | None:
        """Return the directory of the nearest predecessor that has one; one that died early may have none."""
        trials = self.seat.store.get_all_trials(self.study_id, deepcopy=False)
        number = self.trial.user_attrs.get(names.PREDECESSOR)
        while number is not None:
            source = self.seat.directory(number)
            if source.is_dir():
                return source
            number = trials[number].user_attrs.get(names.PREDECESSOR)
        return None

    def _validations(self, trainer: _Trainer) -> Iterator[_Validation]:
        yield from list(trainer.history)
        yield from trainer.run(self.seat.stop)

    def _report(self, validation: _Validation, resumed_at: int) -> bool:
        """Report one validation; return whether the trial is pruned by it.

        A resumed trial reports its history again where the store does not have it. The pruner is asked at each of these
        steps too, because that is what enters the trial in the competition, but its verdict on a step the trial has
        already lived past is not heard: one death must not change what is tried.
        """
        trial, step = self.trial, validation.scenes_seen
        value = finite_score(validation.network.k_loc)
        self.floor = validation.floor.k_loc
        known = step in self.reported
        self.reported.add(step)
        if not known:
            if len(self.seat.spec.directions) == 1:
                trial.report(value, step)
            else:  # Optuna's report refuses two objectives, its store does not
                trial_id = self.seat.store.get_trial_id_from_study_id_trial_number(self.study_id, trial.number)
                self.seat.store.set_trial_intermediate_value(trial_id, step, value)
        passed = step - resumed_at
        seconds = max(time.monotonic() - self.begun, 1e-9)
        self.seat.notify(
            Report(
                number=trial.number,
                step=step,
                k_loc=value,
                floor=self.floor,
                scenes_per_second=max(passed, 0) / seconds,
                memory_bytes=_memory(self.seat.device),
            )
        )
        if len(self.seat.spec.directions) > 1 or (known and step < resumed_at):
            return False
        verdict = trial.should_prune()
        return verdict and resumed_at <= step < self.last_step  # at the last one there is nothing left to save

    def _pruned(self, trainer: _Trainer) -> Outcome:
        best = min(trainer.history, key=lambda validation: finite_score(validation.network.k_loc))
        if self.figures is not None:
            self.figures.conclude(trainer.history, None)
        self._finish(TrialState.PRUNED, None, {names.COMPONENTS: best.network.as_dict(), **self._figures(trainer)})
        return Outcome("pruned", self.trial.number, value=finite_score(trainer.history[-1].network.k_loc))

    def _complete(self, trainer: _Trainer, marks: Mapping[str, Any]) -> Outcome:
        conclusion = trainer.conclude()
        if self.figures is not None:
            self.figures.conclude(trainer.history, conclusion)
        network, pipeline = conclusion.network, conclusion.pipeline
        by_network = self.seat.spec.objective == "network"
        value = finite_score((network if by_network else pipeline).k_loc)
        floor: float = (conclusion.floor if by_network else conclusion.pipeline_floor).k_loc  # of the same scenes
        self.floor = floor
        marks = {
            **marks,
            names.COMPONENTS: network.as_dict(),
            names.PIPELINE: pipeline.as_dict(),
            names.PIPELINE_FLOOR: conclusion.pipeline_floor.k_loc,
            names.PARAMETERS: sum(conclusion.parameters.values()),
            names.EFFICIENCY: efficiency(value, floor),
            **self._figures(trainer),
        }
        self._finish(TrialState.COMPLETE, value, marks)
        return Outcome("complete", self.trial.number, value=value)

    def _diverged(self, error: TrainingDivergedError) -> Outcome:
        marks = {names.DIVERGED: _one_line(error), names.SECONDS: self._spent()}
        self._finish(TrialState.COMPLETE, WORST_K_LOC, marks)
        return Outcome("complete", self.trial.number, value=WORST_K_LOC, error=_one_line(error))

    def _requeued(self) -> Outcome:
        before = self.trial.user_attrs.get(names.PREEMPTIONS, 0)
        marks = {names.PREEMPTIONS: before + 1, names.SECONDS: self._spent()}
        back = self.seat.store.release(self.study_id, self.trial.number, self.owner, marks)
        return Outcome("requeued" if back else "fenced", self.trial.number)

    def _spent(self) -> float:
        """Seconds of this trial so far, those before it was put back included."""
        before: float = self.trial.user_attrs.get(names.SECONDS, 0.0)
        return before + time.monotonic() - self.begun

    def _figures(self, trainer: _Trainer) -> dict[str, Any]:
        seconds = self._spent()
        return {
            names.FLOOR: self.floor,
            names.SCENES: trainer.scenes_seen,
            names.SECONDS: seconds,
            names.SCENES_PER_SECOND: trainer.scenes_seen / max(seconds, 1e-9),
            names.PEAK_MEMORY: _memory(self.seat.device),
        }

    def _finish(self, state: TrialState, value: float | None, marks: Mapping[str, Any]) -> None:
        self.seat.store.mark(self.study_id, self.trial.number, marks)
        values: list[float] | None = None
        if value is not None:
            values = [value]
            if len(self.seat.spec.directions) > 1:
                cost = marks.get(names.PARAMETERS if self.seat.spec.cost == "parameters" else names.SECONDS, 0.0)
                values.append(float(cost))
        self.trial.study.tell(self.trial, values, state=state)


# -- surroundings ----------------------------------------------------------------------------------------------------


@contextmanager
def _heartbeat(store: Store, trial_id: int) -> Iterator[None]:
    interval = store.get_heartbeat_interval()
    if interval is None:
        yield
        return
    store.record_heartbeat(trial_id)  # before anything else: who never beats is not missed for a while
    done = threading.Event()

    def beat() -> None:
        while not done.wait(interval):
            with suppress(StoreError):  # the trial itself will meet it; a store that comes back finds this one beating
                store.record_heartbeat(trial_id)
        store.remove_session()

    thread = threading.Thread(target=beat, name=f"heartbeat-{trial_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=1.0)  # it may be waiting for a server that is away


_DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE}
)


def _is_of_the_surroundings(error: BaseException) -> bool:
    """Say whether this machine, not the trial, is at fault: a full disk, a device that is gone."""
    return isinstance(error, DeviceError | OutputError) or (isinstance(error, OSError) and error.errno in _DISK_ERRORS)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that device or host memory ran out (torch need not be imported for the answer)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _threads() -> int:
    torch: Any = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else 1


def _memory(device: str) -> int:
    torch: Any = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)


def _one_line(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
