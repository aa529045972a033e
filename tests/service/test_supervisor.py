"""The supervisor's decisions, on workers that follow a script: clocks, restarts, failures in a row, limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.study import Study
from optuna.trial import TrialState

from ris_hpo.errors import StudyError, WorkerError
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import status, stored_spec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.trials.context import Report, Scoring, Started
from ris_hpo.trials.run import Outcome
from ris_hpo.workers import pool as pool_module
from ris_hpo.workers.devices import Slot
from ris_hpo.workers.events import Event, Left, Note, Ready, Reason, decode, encode
from ris_hpo.workers.pool import Worker, WorkerPool
from ris_hpo.workers.supervisor import Supervisor
from ris_hpo.workers.worker import WorkerJob, job_for

from .conftest import elsewhere, id_of
from .pools import begin

Script = Sequence[Event]


class ScriptedWorker:
    """Reports what it is given; killed, it has left by the next poll, and asked to stop it leaves in good order."""

    def __init__(self, script: Script, pid: int) -> None:
        self.pid: int | None = pid
        self.events: list[Event] = list(script)
        self.killed = False

    def poll(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def ask_to_stop(self) -> None:
        self.events.append(Left(Reason.STOPPED))

    def kill(self) -> None:
        self.killed = True
        self.events.append(Left(Reason.CRASHED, "signal 9"))

    def memory_bytes(self) -> int | None:
        return None


class ScriptedExecutor:
    """Gives each worker that is started the next script of its slot; without one it stays idle."""

    def __init__(self, *scripts: Sequence[Script]) -> None:
        self.scripts = [list(of_slot) for of_slot in scripts]
        self.started: list[tuple[int, WorkerJob]] = []
        self.workers: list[ScriptedWorker] = []
        self.open = False

    def __enter__(self) -> None:
        self.open = True

    def __exit__(self, *exception: object) -> None:
        self.open = False

    def slots(self) -> list[Slot]:
        return [Slot(index, "cpu", "", 1) for index in range(len(self.scripts))]

    def has_room(self, slot: Slot, peak_bytes: Callable[[], int]) -> bool:
        return True

    def start(self, slot: Slot, job: WorkerJob) -> Worker:
        waiting = self.scripts[slot.index]
        script = waiting.pop(0) if waiting else []
        worker = ScriptedWorker([Ready(str(elsewhere(len(self.workers)))), *script], len(self.workers))
        self.workers.append(worker)
        self.started.append((slot.index, job))
        return worker

    def wait(self, workers: Sequence[Worker], seconds: float) -> None:
        pass


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pool_module, "time", made)
    return made


def pool_of(store: Store, study: Study, executor: ScriptedExecutor, **options: Any) -> WorkerPool:
    clocks = {"trial_timeout_s": None, "stall_timeout_s": None, "max_trials": None, **options}
    return WorkerPool(store, id_of(store, study), stored_spec(study), executor, job_for(store, study), **clocks)


def claim(store: Store, study: Study, pid: int) -> int:
    """Let the scripted worker ``pid`` hold the next trial; returns the trial's number."""
    number = store.claim(id_of(store, study), str(elsewhere(pid, claim=1)))
    assert number is not None
    return number


def report(number: int = 0, step: int = 100) -> Report:
    return Report(number, step, score=3.0, floor=1.0, steps_per_second=50.0, memory_bytes=1)


def failed(number: int = 0, cause: Cause = Cause.OUT_OF_MEMORY) -> list[Event]:
    left = Left(Reason.OUT_OF_MEMORY if cause is Cause.OUT_OF_MEMORY else Reason.BUG)
    return [Started(number, 0.0), Outcome("failed", number, cause=cause, error="it failed"), left]


def succeeded(number: int = 0) -> list[Event]:
    return [Started(number, 0.0), Outcome("complete", number, value=2.0)]


def turn(pool: WorkerPool, times: int = 1) -> None:
    for _ in range(times):
        pool.start()
        pool.follow()


@pytest.mark.parametrize(
    "event",
    [
        Ready(str(elsewhere())), Started(3, 1.5), report(), Scoring(3), Note("x"), Left(Reason.CRASHED, "signal 9"),
        Left(Reason.DONE), Outcome("failed", 3, cause=Cause.BUG, error="x"), Outcome("complete", 3, value=1.5),
    ],
)  # fmt: skip
def test_events_arrive_as_they_were_sent(event: Event) -> None:
    assert decode(encode(event)) == event


# -- clocks ----------------------------------------------------------------------------------------------------------


def test_the_wall_clock_ends_a_trial_and_what_it_took_is_counted(sqlite_store: Store, clock: Clock) -> None:
    study = begin(sqlite_store, 1)
    executor = ScriptedExecutor([[Started(0, 40.0), report()]])
    pool = pool_of(sqlite_store, study, executor, trial_timeout_s=5.0)
    claim(sqlite_store, study, pid=0)
    turn(pool)
    clock.now += 5
    turn(pool)
    assert not executor.workers[0].killed
    clock.now += 1
    turn(pool)
    assert executor.workers[0].killed
    lost, successor = study.get_trials()
    assert (lost.state, successor.state) == (TrialState.FAIL, TrialState.WAITING)
    assert lost.user_attrs[names.CAUSE] == Cause.TIMEOUT
    assert lost.user_attrs[names.ERROR] == "longer than 5 s"
    assert lost.user_attrs[names.SECONDS] == 46.0
    turn(pool)
    assert len(executor.workers) == 2  # a fresh one at once


def test_the_stall_clock_starts_again_at_each_validation(sqlite_store: Store, clock: Clock) -> None:
    study = begin(sqlite_store, 1)
    executor = ScriptedExecutor([[Started(0, 0.0)]])
    pool = pool_of(sqlite_store, study, executor, stall_timeout_s=5.0)
    claim(sqlite_store, study, pid=0)
    for _ in range(3):
        turn(pool)
        clock.now += 4
        executor.workers[0].events.append(report())
    turn(pool)
    clock.now += 6
    turn(pool)
    assert executor.workers[0].killed
    assert study.get_trials()[0].user_attrs[names.ERROR] == "no validation for 5 s"


def test_the_stall_clock_does_not_run_while_the_end_is_scored(sqlite_store: Store, clock: Clock) -> None:
    study = begin(sqlite_store, 1)
    executor = ScriptedExecutor([[Started(0, 0.0), report(), Scoring(0)]])
    pool = pool_of(sqlite_store, study, executor, stall_timeout_s=5.0, trial_timeout_s=500.0)
    turn(pool)
    clock.now += 400
    turn(pool)
    assert not executor.workers[0].killed
    assert pool.views()[0].state == "scoring"
    clock.now += 101
    turn(pool)
    assert executor.workers[0].killed  # the wall clock goes on


# -- failures in a row -----------------------------------------------------------------------------------------------


def test_a_machine_on_which_trial_after_trial_fails_gives_up(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 12)
    executor = ScriptedExecutor([failed(number) for number in range(12)])
    pool = pool_of(sqlite_store, study, executor)
    with pytest.raises(WorkerError, match=r"gave up after 5 failures in a row .*trial 4: it failed.*left to others"):
        turn(pool, 12)
    assert len(executor.workers) == 5


def test_a_trial_that_ends_well_clears_the_count(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 12)
    scripts = [failed() for _ in range(4)] + [[*succeeded(), *failed()]] + [failed() for _ in range(3)]
    executor = ScriptedExecutor(scripts)
    turn(pool_of(sqlite_store, study, executor), 9)
    assert len(executor.workers) == 9


def test_trials_that_diverge_are_not_the_machines_fault(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 12)
    diverged = [event for number in range(9) for event in failed(number, Cause.DIVERGED)[:2]]
    pool = pool_of(sqlite_store, study, ScriptedExecutor([diverged]))
    turn(pool)
    assert pool.places[0].ended == 9
    assert not pool.places[0].has_given_up


def test_one_bad_device_is_given_up_and_the_others_go_on(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 40)
    good = [[*succeeded(), Left(Reason.OUT_OF_MEMORY)] for _ in range(20)]
    executor = ScriptedExecutor([failed() for _ in range(20)], good)
    pool = pool_of(sqlite_store, study, executor)
    turn(pool, 15)
    assert [index for index, _ in executor.started].count(0) == 5
    assert [index for index, _ in executor.started].count(1) == 15
    assert [view.state for view in pool.views()] == ["gave up", "restarting"]
    assert any("worker 0 gave up after 5 failures in a row" in message for message in pool.messages)


def test_all_machines_of_a_cluster_together_may_fail_twice_each(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 40)
    executor = ScriptedExecutor(*[[failed() for _ in range(20)] for _ in range(4)])
    with pytest.raises(WorkerError, match="gave up after 8 failures in a row"):
        turn(pool_of(sqlite_store, study, executor), 20)


def test_bugs_end_the_run_for_every_worker(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 40, retries={"bugs": 2})
    scripts = [[[*succeeded(), *failed(cause=Cause.BUG)] for _ in range(9)] for _ in range(4)]
    executor = ScriptedExecutor(*scripts)
    with pytest.raises(WorkerError, match="2 trials failed with a bug, the last: it failed"):
        turn(pool_of(sqlite_store, study, executor), 20)


def test_workers_that_crash_wait_longer_each_time(sqlite_store: Store, clock: Clock) -> None:
    study = begin(sqlite_store, 4)
    executor = ScriptedExecutor([[Left(Reason.CRASHED, "signal 11")] for _ in range(9)])
    pool = pool_of(sqlite_store, study, executor)
    waits = []
    turn(pool)
    for _ in range(3):
        before = clock.now
        count = len(executor.workers)
        while len(executor.workers) == count:
            clock.now += 0.05
            turn(pool)
        waits.append(clock.now - before)
    assert waits == pytest.approx([0.05, 0.4, 0.8], abs=0.06)
    clock.now += 60
    with pytest.raises(WorkerError, match="signal 11"):
        turn(pool)
    assert sum("restarted in" in message for message in pool.messages) == 4


def test_a_study_that_cannot_be_worked_on_ends_the_run_at_once(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 4)
    executor = ScriptedExecutor([[Left(Reason.REFUSED, "study 'unit' is gone")]])
    with pytest.raises(StudyError, match="study 'unit' is gone"):
        turn(pool_of(sqlite_store, study, executor))


# -- trials of workers that end --------------------------------------------------------------------------------------


def test_the_trial_of_a_dead_worker_is_queued_again_with_its_time(sqlite_store: Store, clock: Clock) -> None:
    study = begin(sqlite_store, 2)
    executor = ScriptedExecutor([[Started(0, 3.0)]], [[Started(1, 0.0)]])
    pool = pool_of(sqlite_store, study, executor)
    assert [claim(sqlite_store, study, pid) for pid in (0, 1)] == [0, 1]
    turn(pool)
    clock.now += 7
    executor.workers[0].kill()
    turn(pool)
    first, second, successor = study.get_trials()
    assert (first.user_attrs[names.CAUSE], first.user_attrs[names.SECONDS]) == (Cause.LOST_WORKER, 10.0)
    assert first.user_attrs[names.ERROR] == "worker 0 ended: signal 9"
    assert second.state == TrialState.RUNNING  # another worker's
    assert successor.user_attrs[names.PREDECESSOR] == 0
    pool.shut_down()
    second = study.get_trials()[1]
    assert second.state == TrialState.WAITING
    assert second.user_attrs[names.SECONDS] == 7.0
    assert second.user_attrs[names.PREEMPTIONS] == 1
    assert status(sqlite_store, "unit").device_hours == pytest.approx(17 / 3600)


def test_a_worker_that_does_not_stop_is_killed_and_its_trial_put_back(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(sqlite_store, 1)
    executor = ScriptedExecutor([[Started(0, 0.0)]])
    pool = pool_of(sqlite_store, study, executor)
    claim(sqlite_store, study, pid=0)
    turn(pool)
    monkeypatch.setattr(ScriptedWorker, "ask_to_stop", lambda self: None)
    monkeypatch.setattr(pool_module, "_GRACE_S", 0.0)
    pool.shut_down()
    assert executor.workers[0].killed
    assert study.get_trials()[0].state == TrialState.WAITING
    assert counting.tally(study.get_trials()).retried == 0


# -- the loop --------------------------------------------------------------------------------------------------------


def test_the_loop_leaves_after_its_share(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 9)
    executor = ScriptedExecutor([[*succeeded(0), *failed(1)], [*succeeded(2), Left(Reason.LIMIT)]])
    supervisor = Supervisor(sqlite_store, study, executor, job_for(sqlite_store, study), max_trials=3)
    list(supervisor.run(interval=0.0))
    assert [job.max_trials for _, job in executor.started] == [3, 1]
    assert (supervisor.ending, supervisor.ended, supervisor.succeeded) == ("max_trials", 3, 2)
    assert not executor.open


def test_a_trial_that_comes_back_opens_closed_slots(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 1)
    executor = ScriptedExecutor([[Left(Reason.DONE)]])
    supervisor = Supervisor(sqlite_store, study, executor, job_for(sqlite_store, study))
    for _ in supervisor.run(interval=0.0):
        if len(executor.workers) == 2:
            supervisor.stop()
    assert supervisor.ending == "interrupted"


def test_where_nothing_is_left_to_do_no_worker_starts(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 1)
    study.tell(claim(sqlite_store, study, 0), 2.0)
    executor = ScriptedExecutor([[], []])
    job = job_for(sqlite_store, study)
    killed = Path(job.directory).with_name(".removed-wide-77")  # half removed
    (killed / "0").mkdir(parents=True)
    supervisor = Supervisor(sqlite_store, study, executor, job)
    snapshot = list(supervisor.run(interval=0.0))[-1]
    assert (supervisor.ending, snapshot.tally.complete) == ("finished", 1)
    assert executor.started == []
    assert not killed.exists()
