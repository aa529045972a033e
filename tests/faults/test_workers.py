"""Workers killed, stopped, hung or out of memory: every trial ends, and its curve is the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from ris_hpo.results.replay import replay
from ris_hpo.search import counting
from ris_hpo.search.files import load_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.workers import lost as lost_module
from ris_hpo.workers import supervisor as supervisor_module
from ris_hpo.workers.supervisor import Supervisor
from tests.service.pools import begin, drain, same_curves, slow_base, supervisor_of


def kill_some(pool: Supervisor, kills: int, generator: random.Random, journal: Path) -> int:
    """Run the pool and kill -9 a random training worker, moments drawn by the validations that the journal counts."""
    done = 0
    next_kill = generator.randint(2, 8)
    for snapshot in pool.run(interval=0.05):
        training = [view for view in snapshot.workers if view.state == "training" and view.pid is not None]
        progress = journal.read_text().count("\n") if journal.exists() else 0
        if done < kills and training and progress >= next_kill:
            pid = generator.choice(training).pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            done += 1
            next_kill = progress + generator.randint(3, 9)
    return done


def check_campaign(store: Store, study: Study, n_trials: int, kills: int, journal: Path) -> None:
    trials = study.get_trials()
    counts = counting.tally(trials)
    final = [trial for trial in counting.live_trials(trials) if trial.state == TrialState.FAIL]
    assert final == [], [trial.user_attrs for trial in final]
    assert (counts.ended, counts.open) == (n_trials, 0)
    assert len(trials) == n_trials + counts.retried
    lost = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert all(trial.user_attrs[names.CAUSE] == Cause.LOST_WORKER for trial in lost)
    assert 0 < len(lost) <= kills
    # none runs twice: a validation is computed once per line, but for the one a kill may have caught half-way
    ran = Counter(tuple(line.split()[1:3]) for line in journal.read_text().splitlines())
    assert sum(count - 1 for count in ran.values()) <= kills
    same_curves(store, study)


@pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.system])], indirect=True
)
def test_killed_workers_lose_nothing(store: Store, tmp_path: Path) -> None:
    study = begin(store, 5, base=slow_base(1600, 0.06), pruner={"name": "median", "startup": 3})
    done = kill_some(supervisor_of(store, study, tmp_path, 2), 3, random.Random(5), tmp_path / "journal")
    assert done == 3
    check_campaign(store, study, 5, done, tmp_path / "journal")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_campaign_of_kills(seed: int, store: Store, tmp_path: Path) -> None:
    pruner = {"name": "median", "startup": 10}
    study = begin(store, 40, base=slow_base(1600, 0.12), pruner=pruner, retries={"lost_worker": 10})
    done = kill_some(supervisor_of(store, study, tmp_path, 4), 15, random.Random(seed), tmp_path / "journal")
    assert done >= 10
    check_campaign(store, study, 40, done, tmp_path / "journal")


@pytest.mark.slow
def test_killed_workers_of_the_real_trainer(sqlite_store: Store, tmp_path: Path) -> None:
    spec = load_study("smoke").replaced({"pruner.name": "none"}).with_base({"budget.scenes": 256})
    study = create_or_resume_study(sqlite_store, spec)
    fill_budget(sqlite_store, study, 4)
    pool = supervisor_of(sqlite_store, study, tmp_path, 1)
    kills, killed_at = 0, None
    for snapshot in pool.run(interval=0.05):
        view = snapshot.workers[0]
        here = (view.trial, view.step)
        if kills < 4 and view.pid is not None and view.step is not None and view.step >= 64 and here != killed_at:
            os.kill(view.pid, signal.SIGKILL)
            kills, killed_at = kills + 1, here
    counts = counting.tally(study.get_trials())
    assert (counts.complete, counts.open, counts.fail) == (4, 0, 0)
    assert counts.retried == kills == 4
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    for trial in counting.live_trials(study.get_trials()):
        report = replay(sqlite_store, study.study_name, trial.number)
        assert report.identical, (trial.number, report.steps)


def test_a_hung_worker_is_killed_and_its_trial_continues(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 1, base={"fault": "hang"}, pruner={"name": "none"}, retries={"timeout": 3})
    last = drain(supervisor_of(sqlite_store, study, tmp_path, 1, stall_timeout_s=2.0))[-1]
    assert (last.tally.complete, last.tally.retried) == (1, 1)
    (failed,) = study.get_trials(states=[TrialState.FAIL])
    assert failed.user_attrs[names.CAUSE] == Cause.TIMEOUT


def test_a_stopped_worker_counts_as_hung(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 1, base=slow_base(1600), pruner={"name": "none"})
    pool = supervisor_of(sqlite_store, study, tmp_path, 1, stall_timeout_s=2.0)
    stopped = False
    for snapshot in pool.run(interval=0.1):
        view = snapshot.workers[0]
        if not stopped and view.state == "training" and view.pid is not None and view.step is not None:
            os.kill(view.pid, signal.SIGSTOP)
            stopped = True
    counts = counting.tally(study.get_trials())
    assert (counts.complete, counts.retried) == (1, 1)
    same_curves(sqlite_store, study)


def test_a_stopped_worker_is_missed_without_any_clock_of_the_study(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_module, "LONGEST_PAUSE_S", 1.0)
    store = open_store(sqlite_store.address, heartbeat=1)
    study = begin(store, 1, base=slow_base(1600), pruner={"name": "none"})
    running = supervisor_of(store, study, tmp_path, 1, heartbeat=1)
    stopped = 0
    for snapshot in running.run(interval=0.1):
        view = snapshot.workers[0]
        if not stopped and view.state == "training" and view.pid is not None and view.step is not None:
            stopped = view.pid
            os.kill(stopped, signal.SIGSTOP)
    counts = counting.tally(study.get_trials())
    assert (counts.complete, counts.retried, counts.open) == (1, 1, 0)
    assert not psutil.pid_exists(stopped)  # it would have held the slot for ever
    same_curves(store, study)
    store.close()


def test_a_worker_stopped_within_a_write_does_not_hold_the_others_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_module, "LONGEST_PAUSE_S", 1.0)
    monkeypatch.setenv("DOUBLE_STORE", str(tmp_path / "studies.db"))
    store = open_store(str(tmp_path / "studies.db"), heartbeat=1)
    study = begin(store, 2, base={"fault": "lock"}, pruner={"name": "none"})
    last = drain(supervisor_of(store, study, tmp_path, 2, heartbeat=1))[-1]
    assert (last.tally.complete, last.tally.open, last.tally.fail) == (2, 0, 0)
    assert last.tally.retried >= 1
    same_curves(store, study)
    store.close()


def test_a_worker_stopped_with_nothing_to_do_does_not_hold_the_run_up(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_GRACE_S", 0.5)
    gate = tmp_path / "gate"
    monkeypatch.setenv("DOUBLE_GATE", str(gate))
    study = begin(sqlite_store, 1, base={"fault": "gate"}, pruner={"name": "none"})
    running = supervisor_of(sqlite_store, study, tmp_path, 2)
    stopped = 0
    for snapshot in running.run(interval=0.05):
        pids = {view.state: view.pid for view in snapshot.workers}
        if not stopped and "training" in pids and pids.get("idle") is not None:
            stopped = pids["idle"]
            os.kill(stopped, signal.SIGSTOP)
            gate.touch()
    assert stopped
    assert running.ending == "finished"
    assert not psutil.pid_exists(stopped)
    assert counting.tally(study.get_trials()).complete == 1


def test_memory_that_runs_out_costs_one_fresh_process_and_then_the_trial(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 1, base={"fault": "allocate"})
    last = drain(supervisor_of(sqlite_store, study, tmp_path, 1))[-1]
    assert (last.tally.fail, last.tally.retried, last.tally.open) == (1, 1, 0)
    assert last.workers[0].restarts in (1, 2)  # the pool may end before it counts the second
    assert {trial.user_attrs[names.CAUSE] for trial in study.get_trials()} == {Cause.OUT_OF_MEMORY}


def test_trials_that_kill_their_worker_end_as_lost(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 1, base={"fault": "die"}, retries={"lost_worker": 1})
    drain(supervisor_of(sqlite_store, study, tmp_path, 1))
    counts = counting.tally(study.get_trials())
    assert (counts.fail, counts.retried, counts.open) == (1, 1, 0)
