"""The supervisor: one loop over the workers of a run, the study's stop rules, and trials whose worker is lost.

``run()`` is a generator of snapshots, so that whoever draws them needs no thread. The supervisor holds no state of the
study: when it is killed nothing is lost, since its workers then checkpoint and leave, and the next supervisor finds the
rest in the store.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from optuna.study import Study
from optuna.trial import FrozenTrial

from ris_hpo.process import StopSignals
from ris_hpo.search import counting, disk
from ris_hpo.search.lifecycle import stored_spec, top_up
from ris_hpo.search.rungs import next_promotion
from ris_hpo.search.status import BestTrial, summarise_best
from ris_hpo.store.cache import Store
from ris_hpo.store.folders import finish_removals
from ris_hpo.workers.lost import LostTrials
from ris_hpo.workers.pool import Executor, WorkerPool, WorkerView
from ris_hpo.workers.worker import WorkerJob

_POLL_INTERVAL_S = 0.1  # between two looks at the workers
_STUDY_INTERVAL_S = 1.0  # between two looks at the study
_DISK_INTERVAL_S = 5.0  # between two looks at the room on the disk
_GRACE_S = 7.0  # for workers to leave when nothing is left to do

Ending = Literal["finished", "interrupted", "max_trials"] | counting.StopRule


@dataclass(frozen=True)
class PoolSnapshot:
    """The whole run at one moment."""

    study: str
    n_trials: int
    tally: counting.Tally
    best: BestTrial | None
    workers: list[WorkerView]
    seconds: float
    messages: list[str]
    """What happened since the last snapshot, one line each: ends, losses, restarts."""
    metric: str = "k_loc"
    """What the score is called."""
    step_unit: str = "scenes"
    paused: str | None = None
    """Why no trial runs although some wait: the disk has no room. None where they run."""


class Supervisor:
    """Runs a study on the workers of an executor.

    Args:
        store: the store.
        study: the study, with its tickets filled.
        executor: where the workers run.
        job: what each worker needs to know; device and threads are its slot's.
        trial_timeout_s: wall clock of one trial; None for the study's own.
        stall_timeout_s: longest wait for a validation; None for the study's own.
        max_trials: trials after which a worker leaves; None for as many as there are.

    Attributes:
        ending: after ``run()``: ``finished``, ``interrupted``, ``max_trials``, or the stop rule that applied.
        ended: after ``run()``: trials that ended here, whatever became of them.
        succeeded: after ``run()``: those of them that were completed, pruned or paused.
    """

    def __init__(
        self,
        store: Store,
        study: Study,
        executor: Executor,
        job: WorkerJob,
        *,
        trial_timeout_s: float | None = None,
        stall_timeout_s: float | None = None,
        max_trials: int | None = None,
    ) -> None:
        self._store = store
        self._study = study
        self._executor = executor
        self._job = job
        self._spec = stored_spec(study)
        self._trial_timeout_s = trial_timeout_s or self._spec.budget.trial_timeout_s
        self._stall_timeout_s = stall_timeout_s or self._spec.budget.stall_timeout_s
        self._max_trials = max_trials
        self._study_id = store.get_study_id_from_name(study.study_name)
        self._lost = LostTrials(store, self._study_id, self._spec.retries)
        self._stop = StopSignals()
        self._begun = time.monotonic()
        self._finished_since: float | None = None
        self._swept: set[int] = set()
        self._next_measure = 0.0
        self._paused: str | None = None
        self.ending: Ending | None = None
        self.ended = 0
        self.succeeded = 0

    def run(self, *, interval: float = 0.5) -> Iterator[PoolSnapshot]:
        """Run until every trial has ended, a stop rule applies, or SIGTERM or Ctrl-C asks to stop.

        A stop checkpoints the trials at hand and puts them back; a second signal ends this process at once, and its
        workers then do the same on their own.

        Args:
            interval: seconds between two snapshots.

        Raises:
            WorkerError: trials keep failing, or workers keep ending, and not one trial ends well.
            StudyError: the study cannot be worked on.
        """
        self._begun = time.monotonic()
        next_snapshot = next_look = 0.0
        if self._job.storage is not None:
            finish_removals(Path(self._job.storage))
        with self._stop, self._executor:
            pool = WorkerPool(
                self._store,
                self._study_id,
                self._spec,
                self._executor,
                self._job,
                trial_timeout_s=self._trial_timeout_s,
                stall_timeout_s=self._stall_timeout_s,
                max_trials=self._max_trials,
            )
            try:
                self._look_at_study(pool)  # first: where nothing is left to do no worker is started
                while self.ending is None:
                    if not self._stop() and self._paused is None:
                        pool.start()
                    pool.follow()
                    now = time.monotonic()
                    if self._stop():
                        self.ending = "interrupted"
                    elif now >= next_look or not (pool.alive or self._paused):
                        next_look = now + _STUDY_INTERVAL_S
                        self._look_at_study(pool)
                    if now >= next_snapshot or self.ending is not None:
                        next_snapshot = now + interval
                        yield self._snapshot(pool)
                    self._executor.wait(pool.alive, _POLL_INTERVAL_S)
            finally:
                pool.shut_down()
                self.ended, self.succeeded = pool.ended, pool.succeeded
            yield self._snapshot(pool)

    def stop(self) -> None:
        """Ask the run to stop, as SIGTERM does."""
        self._stop.ask()

    def _look_at_study(self, pool: WorkerPool) -> None:
        """Queue lost trials again, and decide whether the run is over."""
        lost = self._lost.recover(pool.kill_workers_of)
        pool.messages.extend(f"trial {number}: its worker is gone or silent" for number in lost)
        if self._spec.budget.hours is not None:
            self._keep_to_hours(pool, self._spec.budget.hours)
            if self.ending is not None:
                return
        trials, now = pool.trials(), time.monotonic()
        counts = counting.tally(trials)
        self._remove_checkpoints(trials)
        is_promoted = next_promotion(trials, self._spec) is not None
        if counts.open == 0 and not is_promoted:
            if self._finished_since is None:
                self._finished_since = now
            # a worker that does not leave by itself is stuck, and has nothing left to lose
            if not pool.alive or now - self._finished_since > _GRACE_S:
                self.ending = "finished"
            return
        self._finished_since = None
        self.ending = counting.stop_reason(self._spec.stop, trials, now - self._begun, self._spec.direction)
        if self.ending is None and pool.has_reached_limit:
            self.ending = "max_trials"
        elif counts.waiting > 0 or is_promoted:
            pool.reopen()
        if now >= self._next_measure:
            self._next_measure = now + _DISK_INTERVAL_S
            self._look_at_disk(pool)

    def _remove_checkpoints(self, trials: list[FrozenTrial]) -> None:
        """Remove the checkpoints of trials that have ended since the last look and do not keep them."""
        keep, folder = self._spec.keep, Path(self._job.directory)
        kept = disk.kept_numbers(trials, keep, self._spec.direction)
        ended = {trial.number for trial in trials if trial.state.is_finished()} - kept
        if ended <= self._swept:
            return
        self._swept |= ended
        disk.remove(disk.checkpoints_to_remove(folder, trials, keep, self._spec.direction))

    def _look_at_disk(self, pool: WorkerPool) -> None:
        """Pause the run before the disk is full, and let it go on when there is room again."""
        before, self._paused = self._paused, disk.shortage(Path(self._job.directory), self._spec.keep)
        if self._paused is not None:
            pool.pause()
            if before is None:
                pool.messages.append(f"paused: {self._paused}; make room ('ris-hpo clean'), and the run goes on")
        elif before is not None:
            pool.messages.append("there is room again: the run goes on")

    def _keep_to_hours(self, pool: WorkerPool, hours: float) -> None:
        """Let as many trials wait as workers may take until the next look; when the hours are spent, end the run."""
        trials = pool.trials()
        if counting.spent_hours(trials) < hours:
            top_up(self._store, self._study_id, self._spec, 2 * len(pool.places))
            return
        self.ending = "hours"
        self._store.withdraw(self._study_id, [trial.number for trial in trials if counting.is_untouched(trial)])

    def _snapshot(self, pool: WorkerPool) -> PoolSnapshot:
        trials = pool.trials()
        counts = counting.tally(trials)
        messages = list(pool.messages)
        pool.messages.clear()
        return PoolSnapshot(
            study=self._study.study_name,
            n_trials=counts.asked_for,
            tally=counts,
            best=summarise_best(counting.best_trial(trials, self._spec.direction)),
            workers=pool.views(),
            seconds=time.monotonic() - self._begun,
            messages=messages,
            metric=self._spec.score,
            step_unit=self._spec.step_unit,
            paused=self._paused,
        )
