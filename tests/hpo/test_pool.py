"""The local pool with real processes: exact budgets, kill -9, hangs, crash loops, signals to the supervisor."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from ris_hpo.errors import WorkerError
from ris_hpo.hpo import attributes as names
from ris_hpo.hpo import budget
from ris_hpo.hpo.attributes import Cause
from ris_hpo.hpo.objective import Program
from ris_hpo.hpo.pool import LocalPool, PoolSnapshot
from ris_hpo.hpo.replay import replay
from ris_hpo.hpo.space import load_study
from ris_hpo.hpo.store import Store, open_store
from ris_hpo.hpo.study import create_or_resume_study, fill_budget

from .conftest import DOUBLE, HERE, make_spec, study_tree


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("DOUBLE_JOURNAL", str(tmp_path / "journal"))


def begin(store: Store, program: Program, n_trials: int, name: str = "unit", **changes: Any) -> Study:
    study = create_or_resume_study(store, make_spec(name, **changes), score_version=1)
    fill_budget(store, study, n_trials, program=program)
    return study


def pool_of(store: Store, study: Study, folder: Path, workers: int, **options: Any) -> LocalPool:
    options.setdefault("directory", folder / "trials")
    return LocalPool(store, study, workers=workers, gpus=[], threads=1, program=DOUBLE, **options)


def drain(pool: LocalPool, interval: float = 0.1) -> list[PoolSnapshot]:
    return list(pool.run(interval=interval))


def slow_base(scenes: int = 800, pause_s: float = 0.03, **more: Any) -> dict[str, Any]:
    return {"budget": {"scenes": scenes, "validate_every": 100}, "pause_s": pause_s, **more}


def same_curves(store: Store, study: Study, program: Program) -> None:
    """Every trial that ended has, step by step, the curve it has when nothing disturbs it."""
    for trial in budget.live_trials(study.get_trials()):
        report = replay(store, study.study_name, trial.number, program=program)
        assert report.identical, (trial.number, report.steps)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_budget_is_exact(workers: int, store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(store, program, 13)
    pool = pool_of(store, study, tmp_path, workers)
    last = drain(pool)[-1]
    assert pool.ending == "finished"
    assert (last.tally.ended, last.tally.open, last.n_trials) == (13, 0, 13)
    assert sum(view.ended for view in last.workers) == 13
    assert all(view.state == "gone" for view in last.workers)
    trials = study.get_trials()
    assert len(trials) == 13
    assert len({tuple(sorted(trial.params.items())) for trial in trials}) == 13
    assert drain(pool_of(store, study, tmp_path, workers))[-1].tally.ended == 13
    assert len(study.get_trials()) == 13


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(3))
@pytest.mark.parametrize("workers", [1, 4, 8])
def test_the_budget_is_exact_again_and_again(
    workers: int, repetition: int, store: Store, program: Program, tmp_path: Path
) -> None:
    study = begin(store, program, 25, study={"seed": repetition})
    for _ in range(2):
        last = drain(pool_of(store, study, tmp_path, workers))[-1]
        assert (last.tally.ended, last.tally.open, len(study.get_trials())) == (25, 0, 25)
        assert fill_budget(store, study, 25, program=program) == 0


@pytest.mark.slow
def test_sixteen_processes_on_one_sqlite_file(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    base = {"budget": {"scenes": 2000, "validate_every": 100}}
    study = begin(sqlite_store, program, 800, base=base, pruner={"name": "none"}, sampler={"name": "random"})
    last = drain(pool_of(sqlite_store, study, tmp_path, 16))[-1]
    assert (last.tally.complete, last.tally.open, last.tally.retried) == (800, 0, 0)
    assert sum(view.restarts for view in last.workers) == 0
    assert all(len(trial.intermediate_values) == 20 for trial in study.get_trials())


def test_snapshots_tell_what_workers_do(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, program, 3, base=slow_base(), pruner={"name": "none"})
    snapshots = drain(pool_of(sqlite_store, study, tmp_path, 1))
    views = [snapshot.workers[0] for snapshot in snapshots if snapshot.workers[0].k_loc is not None]
    assert views
    view = views[-1]
    assert view.floor == 1.0
    assert view.trial is not None
    assert view.step is not None
    assert view.scenes_per_second is not None
    assert view.memory_bytes is not None
    assert view.memory_bytes > 1e7
    assert snapshots[-1].best is not None
    for snapshot in snapshots:
        assert snapshot.tally.ended + snapshot.tally.open == 3


def kill_some(pool: LocalPool, kills: int, generator: random.Random, journal: Path) -> int:
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


def check_campaign(store: Store, study: Study, program: Program, n_trials: int, kills: int, journal: Path) -> None:
    trials = study.get_trials()
    counts = budget.tally(trials)
    final = [trial for trial in budget.live_trials(trials) if trial.state == TrialState.FAIL]
    assert final == [], [trial.user_attrs for trial in final]
    assert (counts.ended, counts.open) == (n_trials, 0)
    assert len(trials) == n_trials + counts.retried
    lost = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert all(trial.user_attrs[names.CAUSE] == Cause.LOST_WORKER for trial in lost)
    assert 0 < len(lost) <= kills
    # none runs twice: a validation is computed once per line, but for the one a kill may have caught half-way
    ran = Counter(tuple(line.split()[1:3]) for line in journal.read_text().splitlines())
    assert sum(count - 1 for count in ran.values()) <= kills
    same_curves(store, study, program)


def test_killed_workers_lose_nothing(store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(store, program, 8, base=slow_base(1600, 0.06), pruner={"name": "median", "startup": 3})
    done = kill_some(pool_of(store, study, tmp_path, 2), 3, random.Random(5), tmp_path / "journal")
    assert done == 3
    check_campaign(store, study, program, 8, done, tmp_path / "journal")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_campaign_of_kills(seed: int, store: Store, program: Program, tmp_path: Path) -> None:
    pruner = {"name": "median", "startup": 10}
    study = begin(store, program, 40, base=slow_base(1600, 0.12), pruner=pruner, retries={"lost_worker": 10})
    done = kill_some(pool_of(store, study, tmp_path, 4), 15, random.Random(seed), tmp_path / "journal")
    assert done >= 10
    check_campaign(store, study, program, 40, done, tmp_path / "journal")


@pytest.mark.slow
def test_killed_workers_of_the_real_trainer(sqlite_store: Store, tmp_path: Path) -> None:
    spec = load_study("smoke").replaced({"pruner.name": "none"}).with_base({"budget.scenes": 256})
    study = create_or_resume_study(sqlite_store, spec)
    fill_budget(sqlite_store, study, 4)
    folders = {"directory": tmp_path / "trials", "artifacts": tmp_path / "artifacts"}
    pool = LocalPool(sqlite_store, study, workers=1, gpus=[], threads=1, **folders)
    kills, killed_at = 0, None
    for snapshot in pool.run(interval=0.05):
        view = snapshot.workers[0]
        here = (view.trial, view.step)
        if kills < 4 and view.pid is not None and view.step is not None and view.step >= 64 and here != killed_at:
            os.kill(view.pid, signal.SIGKILL)
            kills, killed_at = kills + 1, here
    counts = budget.tally(study.get_trials())
    assert (counts.complete, counts.open, counts.fail) == (4, 0, 0)
    assert counts.retried == kills == 4
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    for trial in budget.live_trials(study.get_trials()):
        report = replay(sqlite_store, study.study_name, trial.number)
        assert report.identical, (trial.number, report.steps)


def test_a_hung_worker_is_killed_and_its_trial_continues(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, program, 2, base={"fault": "hang"}, pruner={"name": "none"}, retries={"timeout": 3})
    last = drain(pool_of(sqlite_store, study, tmp_path, 1, stall_timeout_s=2.0))[-1]
    assert (last.tally.complete, last.tally.retried) == (2, 2)
    causes = [trial.user_attrs[names.CAUSE] for trial in study.get_trials(states=[TrialState.FAIL])]
    assert causes == [Cause.TIMEOUT] * 2


def test_a_stopped_worker_counts_as_hung(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, program, 2, base=slow_base(1600), pruner={"name": "none"})
    pool = pool_of(sqlite_store, study, tmp_path, 1, stall_timeout_s=2.0)
    stopped = False
    for snapshot in pool.run(interval=0.1):
        view = snapshot.workers[0]
        if not stopped and view.state == "training" and view.pid is not None and view.step is not None:
            os.kill(view.pid, signal.SIGSTOP)
            stopped = True
    counts = budget.tally(study.get_trials())
    assert (counts.complete, counts.retried) == (2, 1)
    same_curves(sqlite_store, study, program)


def test_a_trial_has_a_wall_clock(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    base = slow_base(100_000, 0.05)
    study = begin(sqlite_store, program, 1, base=base, pruner={"name": "none"}, retries={"timeout": 0})
    last = drain(pool_of(sqlite_store, study, tmp_path, 1, trial_timeout_s=1.5))[-1]
    assert (last.tally.fail, last.tally.open) == (1, 0)
    (trial,) = study.get_trials()
    assert trial.user_attrs[names.CAUSE] == Cause.TIMEOUT
    assert trial.user_attrs[names.LAST_STEP] >= 100


def test_workers_that_die_at_once_break_the_loop(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, program, 4)
    pool = LocalPool(sqlite_store, study, workers=1, gpus=[], program="no_such_module", directory=tmp_path / "trials")
    with pytest.raises(WorkerError, match=r"died 5 times in a row.*No module named 'no_such_module'"):
        drain(pool)
    assert budget.tally(study.get_trials()).waiting == 4


def test_trials_that_kill_their_worker_end_as_lost(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, program, 1, base={"fault": "die"}, retries={"lost_worker": 1})
    drain(pool_of(sqlite_store, study, tmp_path, 1))
    counts = budget.tally(study.get_trials())
    assert (counts.fail, counts.retried, counts.open) == (1, 1, 0)


def test_repeated_bugs_stop_the_study(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, program, 12, base={"fault": "bug"})
    with pytest.raises(WorkerError, match=r"3 trials failed with a bug.*a bug on order"):
        drain(pool_of(sqlite_store, study, tmp_path, 1))
    counts = budget.tally(study.get_trials())
    assert (counts.fail, counts.waiting, counts.running) == (3, 9, 0)


def test_a_target_stops_the_pool_and_leaves_the_rest_waiting(
    sqlite_store: Store, program: Program, tmp_path: Path
) -> None:
    study = begin(sqlite_store, program, 40, base=slow_base(800, 0.02), stop={"target": 3.0})
    pool = pool_of(sqlite_store, study, tmp_path, 2)
    last = drain(pool)[-1]
    assert pool.ending == "target"
    assert last.tally.running == 0
    assert last.tally.ended + last.tally.waiting == 40
    assert last.tally.waiting > 0
    again = pool_of(sqlite_store, study, tmp_path, 2)
    assert drain(again)[-1].tally.ended == last.tally.ended
    assert again.ending == "target"


# -- signals to the supervisor ---------------------------------------------------------------------------------------


class Driver:
    """The supervisor in its own process."""

    def __init__(self, url: str, folder: Path, n_trials: int, workers: int, **changes: Any) -> None:
        options = {
            "url": url,
            "directory": str(folder / "trials"),
            "n_trials": n_trials,
            "workers": workers,
            "name": "unit",
            "tree": study_tree(**changes),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "drive.py"), json.dumps(options)], stdout=subprocess.PIPE, text=True
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def when_running(self) -> list[int]:
        """Wait until a trial runs; return the workers' pids."""
        for line in self.lines():
            if line.get("tally", {}).get("running"):
                return [pid for pid in line["pids"] if pid is not None]
        return []  # it ended before anything ran

    def finish(self, timeout: float = 60) -> int:
        assert self.process.stdout is not None
        self.process.stdout.read()
        self.process.stdout.close()
        return self.process.wait(timeout)


def table(store: Store) -> list[tuple[Any, ...]]:
    study_id = store.get_study_id_from_name("unit")
    return [
        (trial.number, trial.state.name, trial.values, trial.params, trial.intermediate_values)
        for trial in store.get_all_trials(study_id)
    ]


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT,)])
def test_a_stopped_supervisor_resumes_to_the_same_table(
    signals: tuple[signal.Signals, ...], program: Program, tmp_path: Path
) -> None:
    generator = random.Random(int(signals[0]))
    changes = {"base": slow_base(800, 0.06)}
    whole = Driver(f"sqlite:///{tmp_path}/whole.db", tmp_path / "whole", 6, 1, **changes)
    broken = f"sqlite:///{tmp_path}/broken.db"
    for _ in range(2):
        driver = Driver(broken, tmp_path / "broken", 6, 1, **changes)
        driver.when_running()
        time.sleep(0.4 * generator.random())
        for number in signals:
            driver.process.send_signal(number)
        began = time.monotonic()
        assert driver.finish() == 0
        assert time.monotonic() - began < 10
    assert Driver(broken, tmp_path / "broken", 6, 1, **changes).finish() == 0
    assert whole.finish() == 0
    first, second = open_store(f"sqlite:///{tmp_path}/whole.db"), open_store(broken)
    assert table(first) == table(second)
    assert any("preemptions" in trial.user_attrs for trial in second.get_all_trials(1))
    first.close()
    second.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_stops_at_random_moments(seed: int, program: Program, tmp_path: Path) -> None:
    generator = random.Random(seed)
    changes = {"base": slow_base(800, 0.1), "pruner": {"name": "median", "startup": 3}}
    workers = 1 + 2 * (seed % 2)
    whole = Driver(f"sqlite:///{tmp_path}/whole.db", tmp_path / "whole", 10, 1, **changes)
    broken = f"sqlite:///{tmp_path}/broken.db"
    for _ in range(5):
        driver = Driver(broken, tmp_path / "broken", 10, workers, **changes)
        driver.when_running()
        time.sleep(2.0 * generator.random())
        driver.process.send_signal(generator.choice([signal.SIGTERM, signal.SIGINT]))
        began = time.monotonic()
        driver.finish()
        assert time.monotonic() - began < 10
    assert Driver(broken, tmp_path / "broken", 10, workers, **changes).finish() == 0
    assert whole.finish() == 0
    first, second = open_store(f"sqlite:///{tmp_path}/whole.db"), open_store(broken)
    if workers == 1:
        assert table(first) == table(second)
    counts = budget.tally(second.get_all_trials(1))
    assert (counts.ended, counts.open) == (10, 0)
    first.close()
    second.close()


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    driver = Driver(f"sqlite:///{tmp_path}/a.db", tmp_path, 4, 1, base=slow_base(80_000, 0.02, fault="hang"))
    pids = driver.when_running()
    time.sleep(0.5)  # the trial hangs now, where no question is asked
    driver.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    began = time.monotonic()
    driver.process.send_signal(signal.SIGTERM)
    assert driver.finish() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 2
    for pid in pids:  # a worker that hangs outlives it until someone ends it
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_supervisor_leaves_no_worker_and_no_loss(program: Program, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    driver = Driver(url, tmp_path, 4, 2, base=slow_base(1600, 0.03))
    pids = driver.when_running()
    driver.process.kill()
    driver.finish()
    deadline = time.monotonic() + 8
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    store = open_store(url)
    assert budget.tally(store.get_all_trials(1)).running == 0  # checkpointed and put back, not abandoned
    assert Driver(url, tmp_path, 4, 2, base=slow_base(1600, 0.03)).finish() == 0
    counts = budget.tally(store.get_all_trials(1))
    assert (counts.ended, counts.open) == (4, 0)
    store.close()


def test_two_supervisors_share_one_budget(program: Program, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    pair = [Driver(url, tmp_path, 10, 1) for _ in range(2)]
    assert [driver.finish() for driver in pair] == [0, 0]
    store = open_store(url)
    counts = budget.tally(store.get_all_trials(1))
    assert (counts.ended, counts.open, counts.retried) == (10, 0, 0)
    store.close()
