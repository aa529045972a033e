"""The local pool: one spawned process per slot, supervised from here.

``run()`` is a generator of snapshots, so that whoever draws them sets no thread in motion; between two of them the
supervisor reads its workers' events, notices the dead, restarts them, and watches the clocks. It holds no state of the
study: killed itself, it loses nothing, since its workers checkpoint when it is gone and the next one finds the rest.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import psutil
from optuna.study import Study
from optuna.trial import TrialState

from ris_hpo.errors import WorkerError
from ris_hpo.process import StopSignals, storage_directory
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import stored_spec
from ris_hpo.search.status import BestTrial, summarise_best
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.open import HEARTBEAT_S
from ris_hpo.store.owner import is_dead_here
from ris_hpo.workers.devices import Slot, free_memory, plan_slots
from ris_hpo.workers.lost import LostTrials
from ris_hpo.workers.worker import EXIT_BUG, EXIT_DONE, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, THREAD_VARIABLES, WorkerJob

_LOOK_S = 0.1  # between two looks at the processes
_STORE_LOOK_S = 1.0  # between two looks at the store
_GRACE_S = 7.0  # for checkpoints after a stop was asked, and for leaving when nothing is left to do
_CRASHES = 5  # deaths of one slot in a row without a finished trial
_LONGEST_BACK_OFF_S = 30.0

Ending = Literal["finished", "interrupted"] | counting.StopRule


@dataclass(frozen=True)
class WorkerView:
    """One worker as the live view shows it; figures are of its current trial."""

    slot: int
    device: str
    state: Literal["starting", "idle", "training", "restarting", "stopping", "gone", "waiting for memory"]
    pid: int | None = None
    trial: int | None = None
    step: int | None = None
    k_loc: float | None = None
    floor: float | None = None
    scenes_per_second: float | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    ended: int = 0
    restarts: int = 0


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


@dataclass
class _Place:
    """A slot and the process in it."""

    slot: Slot
    view: WorkerView
    process: subprocess.Popen[bytes] | None = None
    events: IO[bytes] | None = None
    pending: bytes = b""
    log: Path | None = None
    crashes: int = 0
    not_before: float = 0.0
    trial_began: float | None = None
    last_progress: float | None = None
    killed_for: str | None = None
    error: str | None = None
    finished: bool = False
    spent: list[int] = field(default_factory=list)


class LocalPool:
    """Supervised worker processes on this machine.

    Args:
        store: the store.
        study: the study, with its tickets filled.
        workers: number of workers; None for one per GPU place, or one on a CPU.
        gpus: GPUs to use, counted within this process's mask; None for all, empty for none.
        per_gpu: workers per GPU.
        threads: torch threads per worker; None divides the cores.
        trial_timeout_s: wall clock of one trial; None for the study's own.
        stall_timeout_s: longest wait for a validation; None for the study's own.
        program: module of the training program; None for the study kind's.
        directory: folder of the trials; None for the storage directory's.
        artifacts: folder of the dashboard's figures; None for the storage directory's.
        heartbeat: seconds between heartbeats.
        environment: further variables of the workers.

    Attributes:
        ending: after ``run()``: ``finished``, ``interrupted``, or the stop rule that struck.
    """

    def __init__(
        self,
        store: Store,
        study: Study,
        *,
        workers: int | None = None,
        gpus: list[str] | None = None,
        per_gpu: int = 1,
        threads: int | None = None,
        trial_timeout_s: float | None = None,
        stall_timeout_s: float | None = None,
        program: str | None = None,
        directory: Path | None = None,
        artifacts: Path | None = None,
        heartbeat: int | None = HEARTBEAT_S,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        spec = stored_spec(study)
        self._store = store
        self._study = study
        self._spec = spec
        self._trial_timeout = trial_timeout_s or spec.budget.trial_timeout_s
        self._stall_timeout = stall_timeout_s or spec.budget.stall_timeout_s
        self._program = program
        self._directory = directory or storage_directory().absolute() / "trials" / study.study_name
        self._artifacts = artifacts or storage_directory().absolute() / "artifacts"
        self._heartbeat = heartbeat
        self._environment = dict(environment or {})
        slots = plan_slots(workers, gpus, per_gpu, threads)
        self._places = [_Place(slot, WorkerView(slot.index, slot.device, "starting")) for slot in slots]
        self._study_id = store.get_study_id_from_name(study.study_name)
        self._lost = LostTrials(store, self._study_id, spec.retries)
        self._messages: deque[str] = deque(maxlen=200)
        self._bugs: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._stop = StopSignals()
        self._begun = time.monotonic()
        self._settled: float | None = None
        self.ending: Ending | None = None

    def run(self, *, interval: float = 0.5) -> Iterator[PoolSnapshot]:
        """Run until every trial has ended, a stop rule strikes, or SIGTERM or Ctrl-C asks to stop.

        A stop checkpoints the trials at hand and puts them back; a second signal ends this process at once, and its
        workers then do the same on their own.

        Args:
            interval: seconds between two snapshots.

        Raises:
            WorkerError: workers die before they do anything, or trials keep failing with a bug.
        """
        self._begun = time.monotonic()
        next_snapshot = next_look = 0.0
        with self._stop:
            try:
                while self.ending is None:
                    now = time.monotonic()
                    self._tend(now)
                    if self._stop():
                        self.ending = "interrupted"
                    elif now >= next_look or all(place.process is None for place in self._places):
                        next_look = now + _STORE_LOOK_S
                        self._look_at_store(now)
                    if now >= next_snapshot or self.ending is not None:
                        next_snapshot = now + interval
                        yield self.snapshot()
                    self._wait()
            finally:
                self._shut_down()
            yield self.snapshot()

    def snapshot(self) -> PoolSnapshot:
        """Return the run as it stands."""
        trials = self._store.get_all_trials(self._study_id, deepcopy=False)
        counts = counting.tally(trials)
        messages = list(self._messages)
        self._messages.clear()
        now = time.monotonic()
        return PoolSnapshot(
            study=self._study.study_name,
            n_trials=counts.ended + counts.open,
            tally=counts,
            best=summarise_best(counting.best_trial(trials)),
            workers=[self._seen(place, now) for place in self._places],
            seconds=now - self._begun,
            messages=messages,
        )

    def stop(self) -> None:
        """Ask the run to stop, as SIGTERM does."""
        self._stop.ask()

    # -- processes ---------------------------------------------------------------------------------------------------

    def _tend(self, now: float) -> None:
        for place in self._places:
            self._read_events(place)
            if place.process is None:
                if not place.finished and now >= place.not_before and not self._stop():
                    self._start(place)
                continue
            self._check_clocks(place, now)
            status = place.process.poll()
            if status is not None:
                self._read_events(place)
                self._bury(place, status, now)

    def _start(self, place: _Place) -> None:
        slot = place.slot
        if not self._has_memory(slot):
            place.view = replace(place.view, state="waiting for memory", pid=None)
            place.not_before = time.monotonic() + 5.0
            return
        job = WorkerJob(
            address=self._store.address,
            study=self._study.study_name,
            device=slot.device,
            threads=slot.threads,
            directory=str(self._directory),
            program=self._program,
            artifacts=str(self._artifacts),
            heartbeat=self._heartbeat,
            max_bugs=1,  # a fresh process after each: what a bug leaves behind in a process may break the next trial
            fresh_after_memory=True,
        )
        environment = {**os.environ, **self._environment, "CUDA_VISIBLE_DEVICES": slot.mask, "PYTHONUNBUFFERED": "1"}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(slot.threads))
        # threads that wait without spinning: measured five times faster where cores are shared, and no slower alone
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        reading, writing = os.pipe()
        place.log = self._directory / f"worker-{slot.index}.log"
        place.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with place.log.open("ab") as log:
                place.process = subprocess.Popen(
                    [sys.executable, "-m", "ris_hpo.workers.worker"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writing,),
                    start_new_session=True,  # Ctrl-C reaches the parent alone, which then asks its workers
                    env=environment,
                )
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        place.events = os.fdopen(reading, "rb", buffering=0)
        place.pending = b""
        self._selector.register(place.events, selectors.EVENT_READ)
        assert place.process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; the next look finds out why
            place.process.stdin.write(json.dumps({"job": asdict(job), "events": writing}).encode() + b"\n")
            place.process.stdin.flush()
        place.killed_for = place.error = None
        self._rest(place, "starting")

    def _has_memory(self, slot: Slot) -> bool:
        """Say whether a GPU that already has a worker has room for one more."""
        if slot.device == "cpu" or slot.rank == 0:
            return True
        figures = free_memory(slot.mask)
        if figures is None:
            return True
        free, total = figures
        peaks = [
            trial.user_attrs.get(names.PEAK_MEMORY, 0)
            for trial in self._store.get_all_trials(self._study_id, deepcopy=False)
            if trial.user_attrs.get(names.DEVICE) == "cuda"
        ]
        sharing = sum(place.slot.mask == slot.mask for place in self._places)
        return free >= (1.2 * max(peaks) if any(peaks) else 0.8 * total / sharing)

    def _read_events(self, place: _Place) -> None:
        if place.events is None:
            return
        while True:
            chunk = place.events.read(65536)
            if not chunk:
                break
            place.pending += chunk
        *lines, place.pending = place.pending.split(b"\n")
        for line in lines:
            self._handle(place, json.loads(line))

    def _handle(self, place: _Place, event: dict[str, Any]) -> None:
        now = time.monotonic()
        place.last_progress = now
        match event["event"]:
            case "ready":
                self._rest(place, "idle")
            case "claimed":
                place.trial_began = now
                self._rest(place, "training")
                place.view = replace(place.view, trial=event["number"])
            case "report":
                place.view = replace(
                    place.view,
                    state="training",
                    trial=event["number"],
                    step=event["step"],
                    k_loc=event["k_loc"],
                    floor=event["floor"],
                    scenes_per_second=event["scenes_per_second"],
                )
            case "ended":
                place.trial_began = None
                if event["state"] in ("complete", "pruned"):
                    place.crashes = 0
                    place.view = replace(place.view, ended=place.view.ended + 1)
                if event.get("cause") == Cause.BUG.value:
                    self._bugs.append(event["error"])
                if event.get("error") is not None:
                    self._messages.append(str(event["error"]))
                self._rest(place, "idle")
            case "failed":
                place.error = event["error"]

    def _check_clocks(self, place: _Place, now: float) -> None:
        if place.trial_began is None or place.killed_for is not None:
            return
        reason = None
        if self._trial_timeout is not None and now - place.trial_began > self._trial_timeout:
            reason = f"longer than {self._trial_timeout:.0f} s"
        elif self._stall_timeout is not None and now - (place.last_progress or now) > self._stall_timeout:
            reason = f"no validation for {self._stall_timeout:.0f} s"
        if reason is not None and place.process is not None:
            place.killed_for = reason
            place.process.kill()  # SIGKILL also ends a stopped process, where SIGTERM would wait with it
            with suppress(subprocess.TimeoutExpired):  # buried at once, before the store's look takes it for a lost one
                place.process.wait(timeout=_GRACE_S)

    def _bury(self, place: _Place, status: int, now: float) -> None:
        """Take note of a worker's end: free its trial, and decide whether and when another one takes the slot."""
        process = place.process
        assert process is not None
        self._close(place)
        lost = self._retire_trials_of(process.pid, place, status)
        if status == EXIT_DONE and not lost:
            place.finished = True
            self._rest(place, "gone")
            return
        if status == EXIT_STOPPED:
            place.finished = self._stop()
            self._rest(place, "gone")
            return
        place.view = replace(place.view, restarts=place.view.restarts + 1)
        self._rest(place, "restarting")
        if status in (EXIT_OUT_OF_MEMORY, EXIT_BUG) and not lost:
            if len(self._bugs) >= self._spec.retries.bugs:
                raise WorkerError(
                    f"{len(self._bugs)} trials failed with a bug, the last: {self._bugs[-1]}; tracebacks stand in the "
                    f"trials' attributes and in {place.log}; the same command goes on when it is mended"
                )
            return
        if place.killed_for is not None:
            return
        place.crashes += 1
        if place.crashes >= _CRASHES:
            raise WorkerError(
                f"worker {place.slot.index} died {place.crashes} times in a row without finishing a trial "
                f"({_ending(status)}: {place.error or _last_line(place.log)}); its log is {place.log}"
            )
        back_off = 0.0 if place.crashes == 1 else min(0.1 * 2**place.crashes, _LONGEST_BACK_OFF_S)
        place.not_before = now + back_off
        told = place.error or f"ended with {_ending(status)}"
        self._messages.append(f"worker {place.slot.index}: {told}; restarted in {back_off:.1f} s")

    def _retire_trials_of(self, pid: int, place: _Place, status: int) -> bool:
        lost = False
        for trial in self._store.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs.get(names.OWNER)
            if owner is None or owner.split(":")[1] != str(pid) or not is_dead_here(owner):
                continue
            cause = Cause.TIMEOUT if place.killed_for is not None else Cause.LOST_WORKER
            reason = place.killed_for or f"worker {place.slot.index} ended with {_ending(status)}"
            if self._stop():
                self._store.release(self._study_id, trial.number, owner, _preempted(trial.user_attrs))
            elif counting.fail_trial(
                self._store, self._study_id, trial, cause, reason, self._spec.retries, owner=owner
            ):
                self._messages.append(f"trial {trial.number}: {reason}")
                lost = True
        return lost

    def _close(self, place: _Place) -> None:
        if place.events is not None:
            self._selector.unregister(place.events)
            place.events.close()
            place.events = None
        if place.process is not None and place.process.stdin is not None:
            with suppress(BrokenPipeError):
                place.process.stdin.close()
        place.process = None
        place.trial_began = None

    # -- the study ---------------------------------------------------------------------------------------------------

    def _look_at_store(self, now: float) -> None:
        lost = self._lost.recover(self._kill_workers_of)
        self._messages.extend(f"trial {number}: its worker is gone or silent" for number in lost)
        trials = self._store.get_all_trials(self._study_id, deepcopy=False)
        counts = counting.tally(trials)
        if counts.open == 0:
            self._settled = self._settled or now
            # a worker that does not leave by itself is stuck, and has nothing left to lose
            if all(place.process is None for place in self._places) or now - self._settled > _GRACE_S:
                self.ending = "finished"
            return
        self._settled = None
        self.ending = counting.stop_reason(self._spec.stop, trials, now - self._begun)
        if counts.waiting > 0:
            for place in self._places:
                place.finished = False  # a trial came back after this slot had found nothing more to do

    def _kill_workers_of(self, numbers: list[int]) -> None:
        """End the workers of silent trials: stopped or stuck, they would hold their slots for ever."""
        for place in self._places:
            if place.process is not None and place.view.trial in numbers:
                place.process.kill()

    def _wait(self) -> None:
        self._selector.select(timeout=_LOOK_S) if self._selector.get_map() else time.sleep(_LOOK_S / 2)

    def _shut_down(self) -> None:
        """Ask every worker to checkpoint, wait, end the ones that do not, and put their trials back."""
        self._stop.ask()
        alive = [place for place in self._places if place.process is not None]
        for place in alive:
            assert place.process is not None
            place.process.terminate()
            self._rest(place, "stopping")
        deadline = time.monotonic() + _GRACE_S
        ended: list[tuple[_Place, int, int]] = []
        for place in alive:
            process = place.process
            assert process is not None
            while process.poll() is None and time.monotonic() < deadline:
                self._read_events(place)  # a full pipe would hold the worker up
                time.sleep(0.02)
            if process.poll() is None:
                process.kill()
            ended.append((place, process.pid, process.wait()))
            self._read_events(place)
            self._close(place)
            self._rest(place, "gone")
        for place, pid, status in ended:  # last, since the store may be what this run ends for
            self._retire_trials_of(pid, place, status)

    # -- views -------------------------------------------------------------------------------------------------------

    def _rest(self, place: _Place, state: Any) -> None:
        view = place.view
        place.view = WorkerView(
            slot=view.slot,
            device=f"{place.slot.device}:{place.slot.mask}" if place.slot.mask else place.slot.device,
            state=state,
            pid=None if place.process is None else place.process.pid,
            ended=view.ended,
            restarts=view.restarts,
        )

    def _seen(self, place: _Place, now: float) -> WorkerView:
        memory = None
        if place.process is not None:
            try:
                memory = int(psutil.Process(place.process.pid).memory_info().rss)
            except psutil.Error:
                memory = None
        seconds = None if place.trial_began is None else now - place.trial_began
        return replace(place.view, memory_bytes=memory, seconds=seconds)


def _preempted(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {names.PREEMPTIONS: attributes.get(names.PREEMPTIONS, 0) + 1}


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _last_line(log: Path | None) -> str:
    if log is None or not log.exists():
        return "no log"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing in its log")
