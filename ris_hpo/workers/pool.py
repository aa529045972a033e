"""The workers of one run: started, followed, restarted when they end, given up when nothing works where they are.

Workers are processes of this machine or actors of a Ray cluster: an ``Executor`` starts them, and a ``Worker`` is
followed the same way wherever it runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from optuna.trial import FrozenTrial, TrialState

from ris_hpo.errors import StudyError, WorkerError
from ris_hpo.search import counting
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.owner import Owner, Process, this_process
from ris_hpo.trials.context import Report, Scoring, Started
from ris_hpo.trials.run import Outcome
from ris_hpo.workers.devices import Slot
from ris_hpo.workers.events import Event, Left, Note, Ready, Reason
from ris_hpo.workers.worker import WorkerJob

_GRACE_S = 7.0  # for checkpoints after a stop was asked for
_MEMORY_INTERVAL_S = 5.0  # between two looks at the free memory of a GPU
_FAILURES = 5  # in a row, after which a slot, or the whole run on this machine, is given up
_LONGEST_BACK_OFF_S = 30.0

State = Literal[
    "starting",
    "waiting for memory",
    "idle",
    "training",
    "scoring",
    "restarting",
    "stopping",
    "paused",
    "gone",
    "gave up",
]


class Worker(Protocol):
    """One worker from its start to its end, wherever it runs."""

    pid: int | None
    """Process id on this machine; None on another one."""

    def poll(self) -> list[Event]:
        """Return what the worker reported since the last call; ``Left`` is the last event, also of one that crashed."""

    def ask_to_stop(self) -> None:
        """Ask the worker to checkpoint its trial, put it back and leave."""

    def kill(self) -> None:
        """End the worker at once, and wait for its end where that can be seen."""

    def memory_bytes(self) -> int | None:
        """Return the worker's memory; None where it is not known."""


class Executor(AbstractContextManager[None], Protocol):
    """Where workers run: a context manager that is open during a run."""

    def slots(self) -> Sequence[Slot]:
        """Return one slot per worker; asked once, after entering."""

    def has_room(self, slot: Slot, peak_bytes: Callable[[], int]) -> bool:
        """Return whether the slot's device has memory for one more worker, given the peak of the study's trials."""

    def start(self, slot: Slot, job: WorkerJob) -> Worker:
        """Start a worker."""

    def wait(self, workers: Sequence[Worker], seconds: float) -> None:
        """Return when one of the workers has something to report, or after so many seconds."""


@dataclass(frozen=True)
class WorkerView:
    """One worker as the live view shows it; figures are of its current trial."""

    slot: int
    device: str
    state: State
    pid: int | None = None
    trial: int | None = None
    step: int | None = None
    score: float | None = None
    floor: float | None = None
    steps_per_second: float | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    ended: int = 0
    restarts: int = 0


@dataclass
class RunningTrial:
    """The trial that a worker runs, with its clocks (seconds of this process's monotonic clock)."""

    number: int
    began: float
    last_progress: float
    seconds_before: float
    is_scored: bool = False
    report: Report | None = None

    def seconds(self, now: float) -> float:
        """Return the seconds that workers have spent on the trial, those before it was put back included."""
        return self.seconds_before + now - self.began

    def overdue(self, now: float, trial_timeout_s: float | None, stall_timeout_s: float | None) -> str | None:
        """Return which clock has run out, as one line; None while none has.

        The wait for a validation is over once the end is being scored, which takes as long as it takes.
        """
        if trial_timeout_s is not None and now - self.began > trial_timeout_s:
            return f"longer than {trial_timeout_s:.0f} s"
        if stall_timeout_s is not None and not self.is_scored and now - self.last_progress > stall_timeout_s:
            return f"no validation for {stall_timeout_s:.0f} s"
        return None


@dataclass
class Place:
    """A slot, the worker in it, and what has become of those before."""

    slot: Slot
    worker: Worker | None = None
    process: Process | None = None
    state: State = "starting"
    running: RunningTrial | None = None
    ended: int = 0
    restarts: int = 0
    failures: int = 0
    start_after: float = 0.0
    killed_for: str | None = None
    is_done: bool = False
    has_given_up: bool = False

    def view(self, now: float) -> WorkerView:
        """Return the place as the live view shows it."""
        device = f"{self.slot.device}:{self.slot.mask}" if self.slot.mask else self.slot.device
        if self.process is not None and self.process.host != this_process().host:
            device += f"@{self.process.host}"
        running = self.running
        report = None if running is None else running.report
        return WorkerView(
            slot=self.slot.index,
            device=device,
            state=self.state,
            pid=None if self.worker is None else self.worker.pid,
            trial=None if running is None else running.number,
            step=None if report is None else report.step,
            score=None if report is None else report.score,
            floor=None if report is None else report.floor,
            steps_per_second=None if report is None else report.steps_per_second,
            memory_bytes=None if self.worker is None else self.worker.memory_bytes(),
            seconds=None if running is None else now - running.began,
            ended=self.ended,
            restarts=self.restarts,
        )


class WorkerPool:
    """The workers of one run, one per slot.

    Args:
        store: the store.
        study_id: the study.
        spec: its specification.
        executor: where the workers run; entered by now.
        job: what each worker needs to know; device and threads are its slot's.
        trial_timeout_s: wall clock of one trial; None for none.
        stall_timeout_s: longest wait for a validation; None for none.
        max_trials: trials after which a slot is done; None for as many as there are.

    Attributes:
        places: the slots and their workers.
        succeeded: trials that were completed, pruned or paused here.
        messages: what happened, one line each, for whoever takes them out.
    """

    def __init__(
        self,
        store: Store,
        study_id: int,
        spec: StudySpec,
        executor: Executor,
        job: WorkerJob,
        *,
        trial_timeout_s: float | None,
        stall_timeout_s: float | None,
        max_trials: int | None,
    ) -> None:
        self._store = store
        self._study_id = study_id
        self._retries = spec.retries
        self._executor = executor
        self._job = job
        self._trial_timeout_s = trial_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._max_trials = max_trials
        self._bugs: list[str] = []
        self._failures = 0
        self._is_stopping = self._is_paused = False
        self.places = [Place(slot) for slot in executor.slots()]
        self.succeeded = 0
        self.messages: deque[str] = deque(maxlen=200)

    @property
    def ended(self) -> int:
        """Trials that ended here: completed, pruned, paused or failed."""
        return sum(place.ended for place in self.places)

    @property
    def alive(self) -> list[Worker]:
        """The workers that have not ended."""
        return [place.worker for place in self.places if place.worker is not None]

    @property
    def has_reached_limit(self) -> bool:
        """Whether every slot has ended as many trials as it was to."""
        limit = self._max_trials
        return limit is not None and all(place.ended >= limit for place in self.places)

    def views(self) -> list[WorkerView]:
        """Return the workers as the live view shows them."""
        return [place.view(time.monotonic()) for place in self.places]

    def trials(self) -> list[FrozenTrial]:
        """Return all trials of the study."""
        return self._store.get_all_trials(self._study_id, deepcopy=False)

    def start(self) -> None:
        """Start a worker in every slot that has none and is to have one."""
        now, self._is_paused = time.monotonic(), False
        for place in self.places:
            if place.worker is not None or place.is_done or place.has_given_up or now < place.start_after:
                continue
            if not self._executor.has_room(place.slot, self._peak_bytes):
                place.state = "waiting for memory"
                place.start_after = now + _MEMORY_INTERVAL_S
                continue
            job = replace(self._job, device=place.slot.device, threads=place.slot.threads)
            if self._max_trials is not None:
                job = replace(job, max_trials=self._max_trials - place.ended)
            place.worker, place.state = self._executor.start(place.slot, job), "starting"
            place.process = place.killed_for = None

    def follow(self) -> None:
        """Read what the workers report, and end those whose trial takes too long.

        Raises:
            WorkerError: trials keep failing, or workers keep ending, and not one trial ends well.
            StudyError: a worker found that the study cannot be worked on.
        """
        for place in self.places:
            self._read(place)
            if place.worker is None or place.running is None or place.killed_for is not None:
                continue
            place.killed_for = place.running.overdue(time.monotonic(), self._trial_timeout_s, self._stall_timeout_s)
            if place.killed_for is not None:
                place.worker.kill()
                self._read(place)  # now, before its trial is taken for a lost one

    def kill_workers_of(self, numbers: list[int]) -> None:
        """End the workers of these trials: stopped or stuck, they would hold their slots for ever."""
        for place in self.places:
            if place.worker is not None and place.running is not None and place.running.number in numbers:
                place.worker.kill()

    def reopen(self) -> None:
        """Let slots go on that had found nothing to do: a trial has come back into the queue."""
        for place in self.places:
            place.is_done = False

    def pause(self) -> None:
        """Ask every worker to checkpoint its trial, put it back and leave; ``start`` starts new ones."""
        if not self._is_paused:
            self._is_paused = True
            for worker in self.alive:
                worker.ask_to_stop()
        for place in self.places:
            if not (place.is_done or place.has_given_up):
                place.state = "paused"

    def shut_down(self) -> None:
        """Ask every worker to checkpoint, wait, end those that do not leave, and put their trials back."""
        self._is_stopping = True
        stopping = [place for place in self.places if place.worker is not None]
        for place in stopping:
            assert place.worker is not None
            place.worker.ask_to_stop()
            place.state = "stopping"
        deadline = time.monotonic() + _GRACE_S
        while self.alive and time.monotonic() < deadline:
            self._executor.wait(self.alive, 0.05)
            for place in stopping:
                self._read(place)
        for worker in self.alive:
            worker.kill()
        for place in stopping:  # last, since the store may be what this run ends for
            self._read(place)
            self._take_back_trials(place, Cause.LOST_WORKER, "its run ended")
            place.worker = place.running = None
            place.state = "gone"

    # -- one worker --------------------------------------------------------------------------------------------------

    def _read(self, place: Place) -> None:
        for event in [] if place.worker is None else place.worker.poll():
            self._handle(place, event)

    def _handle(self, place: Place, event: Event) -> None:
        now, running = time.monotonic(), place.running
        match event:
            case Ready(owner=text):
                owner = Owner.parse(text)
                place.process = None if owner is None else owner.process
                place.state = "idle"
            case Started(number=number, seconds_before=seconds_before):
                place.running = RunningTrial(number, now, now, seconds_before)
                place.state = "training"
            case Report() if running is not None:
                running.report, running.last_progress = event, now
            case Scoring() if running is not None:
                running.is_scored, place.state = True, "scoring"
            case Outcome():
                place.running, place.state = None, "idle"
                self._count_outcome(place, event)
            case Note(text=text):
                self.messages.append(f"worker {place.slot.index}: {text}")
            case Left():
                self._handle_end(place, event)

    def _count_outcome(self, place: Place, outcome: Outcome) -> None:
        error = outcome.error or ""
        if error:
            cause = "" if outcome.cause is None else f"{outcome.cause.value}: "
            self.messages.append(f"trial {outcome.number}: {cause}{error}")
        place.ended += outcome.state in ("complete", "pruned", "paused", "failed")
        if outcome.state in ("complete", "pruned", "paused"):
            self.succeeded += 1
            place.failures = self._failures = 0
        if outcome.cause is Cause.BUG:
            self._bugs.append(error)
        if outcome.state == "failed" and outcome.cause is not Cause.DIVERGED:  # which the machine is not to blame for
            self._count_failure(place, f"trial {outcome.number}: {error}")

    def _handle_end(self, place: Place, end: Left) -> None:
        """Free the trial of a worker that has ended, and decide whether and when another one takes its place."""
        if self._is_stopping:
            place.worker, place.state = None, "gone"
            return
        if place.killed_for is not None:
            cause, reason = Cause.TIMEOUT, place.killed_for
        else:
            cause, reason = Cause.LOST_WORKER, f"worker {place.slot.index} ended: {end.error or end.reason}"
        place.worker = None  # first, since the store may refuse
        self._take_back_trials(place, cause, reason)
        place.running = None
        if end.reason in (Reason.DONE, Reason.LIMIT):
            place.is_done, place.state = True, "gone"
            return
        if end.reason is Reason.STOPPED and self._is_paused:
            return
        place.state = "gave up" if place.has_given_up else "restarting"
        place.restarts += not place.has_given_up
        if end.reason is Reason.REFUSED:
            raise StudyError(end.error)
        if len(self._bugs) >= self._retries.bugs:
            raise WorkerError(
                f"{len(self._bugs)} trials failed with a bug, the last: {self._bugs[-1]}; their tracebacks stand in "
                "the trials' attributes; run the same command again when it is mended"
            )
        if place.killed_for is not None:
            self._count_failure(place, reason)
        elif end.reason in (Reason.UNFIT, Reason.STORE, Reason.CRASHED):
            self._count_failure(place, end.error)
            if not place.has_given_up:
                back_off = 0.0 if place.failures == 1 else min(0.1 * 2**place.failures, _LONGEST_BACK_OFF_S)
                place.start_after = time.monotonic() + back_off
                self.messages.append(f"{reason}; restarted in {back_off:.1f} s")

    def _count_failure(self, place: Place, error: str) -> None:
        """Count a failure; give up a slot, or the whole run, after too many in a row.

        Raises:
            WorkerError: nothing works here; trials that wait are left to other machines.
        """
        place.failures += 1
        self._failures += 1
        if place.failures >= _FAILURES:
            place.has_given_up, place.state = True, "gave up"
            self.messages.append(f"worker {place.slot.index} gave up after {place.failures} failures in a row: {error}")
        nothing_works = self._failures >= max(_FAILURES, 2 * len(self.places))
        if not self._is_stopping and (nothing_works or all(each.has_given_up for each in self.places)):
            raise WorkerError(
                f"gave up after {self._failures} failures in a row without a trial that ended well, the last: {error}; "
                "the trials that wait are left to others, and the same command goes on here"
            )

    def _take_back_trials(self, place: Place, cause: Cause, reason: str) -> None:
        """Fail what a worker held when it ended, and queue it again; put it back at the end of a run."""
        for trial in self.trials():
            owner = Owner.parse(trial.user_attrs.get(names.OWNER))
            if trial.state != TrialState.RUNNING or owner is None or owner.process != place.process:
                continue
            attributes: dict[str, object] = {}
            if place.running is not None and place.running.number == trial.number:
                attributes[names.SECONDS] = place.running.seconds(time.monotonic())
            if self._is_stopping:
                attributes[names.PREEMPTIONS] = trial.user_attrs.get(names.PREEMPTIONS, 0) + 1
                self._store.release(self._study_id, trial.number, str(owner), attributes)
            elif counting.fail_trial(
                self._store, self._study_id, trial, cause, reason, self._retries, owner=str(owner), marks=attributes
            ):
                place.ended += 1
                self.messages.append(f"trial {trial.number}: {cause.value}: {reason}")

    def _peak_bytes(self) -> int:
        """Return the most memory that a trial of the study has taken on a GPU; 0 where none has run on one."""
        attributes = [trial.user_attrs for trial in self.trials()]
        on_gpus = [each for each in attributes if str(each.get(names.DEVICE)).startswith("cuda")]
        return max((int(each.get(names.PEAK_MEMORY, 0)) for each in on_gpus), default=0)
