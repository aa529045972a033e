"""The local pool with real processes: exact budgets, clocks, crash loops, stop rules; faults are in tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from ris_hpo.errors import StudyError, WorkerError
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import fill_budget
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store

from .conftest import IMPORTABLE
from .pools import begin, drain, slow_base, supervisor_of


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", IMPORTABLE)
    monkeypatch.setenv("DOUBLE_JOURNAL", str(tmp_path / "journal"))


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.system), 3])
def test_the_budget_is_exact(workers: int, store: Store, tmp_path: Path) -> None:
    study = begin(store, 13)
    pool = supervisor_of(store, study, tmp_path, workers)
    last = drain(pool)[-1]
    assert pool.ending == "finished"
    assert (last.tally.ended, last.tally.open, last.n_trials) == (13, 0, 13)
    assert sum(view.ended for view in last.workers) == 13
    assert all(view.state == "gone" for view in last.workers)
    trials = study.get_trials()
    assert len(trials) == 13
    assert len({tuple(sorted(trial.params.items())) for trial in trials}) == 13
    assert drain(supervisor_of(store, study, tmp_path, workers))[-1].tally.ended == 13
    assert len(study.get_trials()) == 13


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(3))
@pytest.mark.parametrize("workers", [1, 4, 8])
def test_the_budget_is_exact_again_and_again(workers: int, repetition: int, store: Store, tmp_path: Path) -> None:
    study = begin(store, 25, study={"seed": repetition})
    for _ in range(2):
        last = drain(supervisor_of(store, study, tmp_path, workers))[-1]
        assert (last.tally.ended, last.tally.open, len(study.get_trials())) == (25, 0, 25)
        assert fill_budget(store, study, 25) == 0


@pytest.mark.slow
def test_sixteen_processes_on_one_sqlite_file(sqlite_store: Store, tmp_path: Path) -> None:
    base = {"budget": {"scenes": 2000, "validate_every": 100}}
    study = begin(sqlite_store, 800, base=base, pruner={"name": "none"}, sampler={"name": "random"})
    last = drain(supervisor_of(sqlite_store, study, tmp_path, 16))[-1]
    assert (last.tally.complete, last.tally.open, last.tally.retried) == (800, 0, 0)
    assert sum(view.restarts for view in last.workers) == 0
    assert all(len(trial.intermediate_values) == 20 for trial in study.get_trials())


def test_snapshots_tell_what_workers_do(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 3, base=slow_base(), pruner={"name": "none"})
    snapshots = drain(supervisor_of(sqlite_store, study, tmp_path, 1))
    views = [snapshot.workers[0] for snapshot in snapshots if snapshot.workers[0].score is not None]
    assert views
    view = views[-1]
    assert view.floor == 1.0
    assert view.trial is not None
    assert view.step is not None
    assert view.steps_per_second is not None
    assert max(each.memory_bytes or 0 for each in views) > 1e7  # none of one that is just leaving
    assert snapshots[-1].best is not None
    for snapshot in snapshots:
        assert snapshot.tally.ended + snapshot.tally.open == 3


def test_a_trial_has_a_wall_clock(sqlite_store: Store, tmp_path: Path) -> None:
    base = slow_base(100_000, 0.05)
    study = begin(sqlite_store, 1, base=base, pruner={"name": "none"}, retries={"timeout": 0})
    last = drain(supervisor_of(sqlite_store, study, tmp_path, 1, trial_timeout_s=1.5))[-1]
    assert (last.tally.fail, last.tally.open) == (1, 0)
    (trial,) = study.get_trials()
    assert trial.user_attrs[names.CAUSE] == Cause.TIMEOUT
    assert trial.user_attrs[names.LAST_STEP] >= 100


def test_workers_that_die_at_once_break_the_loop(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 4)
    pool = supervisor_of(sqlite_store, study, tmp_path, 1, environment={"PYTHONHOME": "/nowhere"})
    with pytest.raises(WorkerError, match=r"gave up after 5 failures in a row.*exit code 1"):
        drain(pool)
    assert counting.tally(study.get_trials()).waiting == 4


def test_a_program_that_workers_cannot_import_ends_the_run(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 4)
    pool = supervisor_of(sqlite_store, study, tmp_path, 1, environment={"PYTHONPATH": ""})
    with pytest.raises(StudyError, match="program 'double:PROGRAM' cannot be imported"):
        drain(pool)
    assert counting.tally(study.get_trials()).waiting == 4


def test_repeated_bugs_stop_the_study(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 12, base={"fault": "bug"})
    with pytest.raises(WorkerError, match=r"3 trials failed with a bug.*a bug on order"):
        drain(supervisor_of(sqlite_store, study, tmp_path, 1))
    counts = counting.tally(study.get_trials())
    assert (counts.fail, counts.waiting, counts.running) == (3, 9, 0)


def test_a_target_stops_the_pool_and_leaves_the_rest_waiting(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 40, base=slow_base(800, 0.02), stop={"target": 3.0})
    pool = supervisor_of(sqlite_store, study, tmp_path, 2)
    last = drain(pool)[-1]
    assert pool.ending == "target"
    assert last.tally.running == 0
    assert last.tally.ended + last.tally.waiting == 40
    assert last.tally.waiting > 0
    again = supervisor_of(sqlite_store, study, tmp_path, 2)
    assert drain(again)[-1].tally.ended == last.tally.ended
    assert again.ending == "target"
