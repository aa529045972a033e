"""A study and its files: no other study's checkpoints, and one line when the study goes while it is in use."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import optuna
import pytest

from ris_hpo.errors import StudyGoneError
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.folders import find_folder
from ris_hpo.store.open import open_store
from ris_hpo.trials.context import Report
from ris_hpo.workers import worker
from ris_hpo.workers.events import Event, Left, Note, Reason
from ris_hpo.workers.worker import WorkerReport, job_for, run_worker

from .conftest import IMPORTABLE, id_of
from .pools import begin, slow_base, supervisor_of, table


def work(store: Store, **options: Any) -> WorkerReport:
    """As a worker of this machine does, in the study's own folder."""
    study = begin(store, options.pop("n_trials"), **options.pop("changes", {}))
    return run_worker(job_for(store, study), **options)


def delete_elsewhere(store: Store) -> None:
    """As the dashboard or Optuna's command line does, in another process."""
    other = open_store(store.address)
    other.tickets.delete_study(other.get_study_id_from_name("unit"))
    other.close()


def test_two_stores_side_by_side_score_as_they_do_alone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [{"study": {"seed": seed}, "pruner": {"name": "none"}, "base": slow_base(400, 0)} for seed in (1, 2)]
    alone = []
    for each in changes:
        monkeypatch.setenv("RIS_HPO_STORAGE_DIR", str(tmp_path / f"alone{len(alone)}"))
        single = open_store(str(tmp_path / f"alone{len(alone)}.db"))
        work(single, n_trials=2, changes=each)
        alone.append(table(single))
        single.close()
    monkeypatch.setenv("RIS_HPO_STORAGE_DIR", str(tmp_path / "shared"))
    other = open_store(str(tmp_path / "other.db"))
    asked = iter([False] * 4 + [True] * 99)
    assert work(store, n_trials=2, changes=changes[0], stop=lambda: next(asked)).requeued == 1
    work(other, n_trials=2, changes=changes[1])
    work(store, n_trials=2, changes=changes[0])
    assert [table(store), table(other)] == alone
    assert sorted(path.name for path in (tmp_path / "shared" / "trials").iterdir()) == [".lock", "unit", "unit-2"]
    other.close()


def test_a_study_made_anew_is_trained_anew(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOUBLE_JOURNAL", str(tmp_path / "journal"))
    changes = {"pruner": {"name": "none"}}
    work(store, n_trials=1, changes=changes)
    first = (tmp_path / "journal").read_text()
    delete_elsewhere(store)
    again = open_store(store.address)
    work(again, n_trials=1, changes=changes)
    assert (tmp_path / "journal").read_text() == first + first
    again.close()


def test_a_study_deleted_under_its_worker_is_one_line_and_no_bug(store: Store, storage: Path) -> None:
    def notify(event: Event) -> None:
        if isinstance(event, Report) and event.step == 300:
            delete_elsewhere(store)

    with pytest.raises(StudyGoneError, match="deleted or renamed while it was in use") as caught:
        work(store, n_trials=2, notify=notify)
    assert "\n" not in str(caught.value)
    begin(store, 1)
    assert [trial.state.name for trial in store.get_all_trials(store.get_study_id_from_name("unit"))] == ["WAITING"]


def test_a_study_deleted_under_its_run_ends_the_run(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", IMPORTABLE)
    study = begin(store, 4, base=slow_base(pause_s=2.0), pruner={"name": "none"})
    supervisor = supervisor_of(store, study, tmp_path, 1)

    def run() -> None:
        for snapshot in supervisor.run(interval=0.1):
            if snapshot.tally.running and store.get_all_studies():
                delete_elsewhere(store)

    with pytest.raises(StudyGoneError, match="deleted or renamed while it was in use"):
        run()
    assert "Traceback" not in (tmp_path / "trials" / "worker-0.log").read_text()


def test_a_renamed_study_goes_on_from_its_checkpoints(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOUBLE_JOURNAL", str(tmp_path / "journal"))
    asked = iter([False] * 5 + [True] * 99)
    work(store, n_trials=1, stop=lambda: next(asked))
    half = (tmp_path / "journal").read_text().splitlines()
    assert 0 < len(half) < 8
    optuna.copy_study(from_study_name="unit", from_storage=store, to_storage=store, to_study_name="new")
    store.delete_study(store.get_study_id_from_name("unit"))
    study = optuna.load_study(study_name="new", storage=store)
    run_worker(job_for(store, study))
    whole = (tmp_path / "journal").read_text().splitlines()
    assert len(whole) == 8
    assert whole[: len(half)] == half
    folder = find_folder(store, "new")
    assert folder is not None
    assert folder.name == "unit"
    assert study.user_attrs[names.IDENTITY] == store.identity(id_of(store, study))


def test_what_a_worker_waits_for_reaches_its_supervisor(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*arguments: Any, **options: Any) -> WorkerReport:
        logging.getLogger("ris_hpo.store.retry").warning("too many connections; trying again")
        return WorkerReport(0, 0, Reason.DONE)

    monkeypatch.setattr(worker, "run_worker", waits)
    events: list[Event] = []
    job = job_for(sqlite_store, begin(sqlite_store, 1))
    for _ in range(2):  # nothing is left behind by the first
        worker.work(job, lambda: False, events.append)
    assert events == [Note("too many connections; trying again"), Left(Reason.DONE)] * 2
