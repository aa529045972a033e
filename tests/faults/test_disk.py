"""A disk that is full or read-only: one line, nothing half written, and what was acknowledged is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy
import torch
from optuna.study import Study
from optuna.trial import TrialState

from ris_hpo.cli import execute
from ris_hpo.errors import OutputError, StoreError, StudyError, WorkerError
from ris_hpo.physics.files import save_scenes
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.report.html import write_report
from ris_hpo.results.replay import replay
from ris_hpo.search import counting
from ris_hpo.search.files import parse_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, get_study
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.training import checkpoint
from ris_hpo.training.config import RunConfig
from ris_hpo.training.files import Exported, write_config
from ris_hpo.trials.context import Report
from ris_hpo.trials.run import UnfitHostError
from ris_hpo.workers import pool
from ris_hpo.workers.events import Event
from ris_hpo.workers.supervisor import Supervisor
from ris_hpo.workers.worker import WorkerJob, run_worker
from tests.service.conftest import id_of
from tests.service.pools import begin, same_curves, slow_base, supervisor_of
from tests.training.conftest import TINY

from .conftest import Disk


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "ballast")


# -- full ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(disk: Disk) -> None:
    path = disk.folder / "run" / checkpoint.LAST
    checkpoint.write(path, {"x": torch.ones(50_000)}, {"scenes_seen": 1})
    disk.fill()
    with pytest.raises(OutputError, match=r"last.safetensors: cannot be written .*No space left"):
        checkpoint.write(path, {"x": torch.zeros(50_000)}, {"scenes_seen": 2})
    tensors, state = checkpoint.read(path)
    assert state == {"scenes_seen": 1}
    assert torch.equal(tensors["x"], torch.ones(50_000))
    assert names_in(disk.folder) == ["run", "run/last.safetensors"]


@pytest.mark.parametrize("kind", ["scenes", "configuration", "report"])
def test_an_output_that_does_not_fit_is_one_line_and_leaves_nothing(kind: str, disk: Disk, sqlite_store: Store) -> None:
    outputs: dict[str, Callable[[], object]] = {
        "scenes": lambda: save_scenes(disk.folder / "s.npz", simulate(SceneSpec(), 0, range(1))),
        "configuration": lambda: write_config(Exported(config=RunConfig()), disk.folder / "best.toml"),
        "report": lambda: write_report(tiny_study(sqlite_store), disk.folder / "report.html"),
    }
    disk.fill()
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\)"):
        outputs[kind]()
    assert names_in(disk.folder) == []


def tiny_study(store: Store) -> Study:
    """A study that trains the real thing, at the size of a test."""
    tree = {
        "base": dict(TINY),
        "space": {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "pruner": {"name": "none"},
    }
    study = create_or_resume_study(store, parse_study(tree, name="tiny", source="test"), score_version=1)
    fill_budget(store, study, 1)
    return study


def test_a_real_trial_outlives_a_full_disk(disk: Disk, sqlite_store: Store, tmp_path: Path) -> None:
    study = tiny_study(sqlite_store)
    job = WorkerJob(
        sqlite_store.address, "tiny", threads=1, directory=str(disk.folder), artifacts=str(disk.folder / "artifacts")
    )
    reported: list[int] = []

    def fill_up(event: Event) -> None:
        if isinstance(event, Report):
            reported.append(event.step)
            disk.fill()

    with pytest.raises(UnfitHostError, match=r"trial 0 was put back: OutputError: .*cannot be written .*No space left"):
        run_worker(job, notify=fill_up)
    assert reported == [32]
    (trial,) = study.get_trials()
    assert trial.state == TrialState.WAITING
    assert list(trial.intermediate_values) == [32]  # acknowledged, and there
    disk.empty()
    assert run_worker(job).ended == 1
    (trial,) = study.get_trials()
    assert trial.state == TrialState.COMPLETE
    assert sorted(trial.intermediate_values) == [32, 64, 96]
    assert not [name for name in names_in(disk.folder) if "damaged" in name or "/." in name]
    assert replay(sqlite_store, "tiny", 0).identical


def fill_once_running(running: Supervisor, disk: Disk) -> None:
    """Run a pool and fill the disk after the first report of its first trial."""
    full = False
    for snapshot in running.run(interval=0.02):
        if snapshot.workers[0].step is not None and not full:
            disk.fill()
            full = True


def test_workers_on_a_full_disk_give_up_and_lose_nothing(
    disk: Disk, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_FAILURES", 2)
    study = begin(sqlite_store, 3, base=slow_base(), pruner={"name": "none"})
    with pytest.raises(WorkerError, match=r"gave up after 2 failures .*trial 0 was put back: OSError: .*No space left"):
        fill_once_running(supervisor_of(sqlite_store, study, disk.folder, 1), disk)
    counts = counting.tally(study.get_trials())
    assert (counts.waiting, counts.running, counts.fail) == (3, 0, 0)
    assert 100 in study.get_trials()[0].intermediate_values
    disk.empty()
    for _ in supervisor_of(sqlite_store, study, disk.folder, 1).run():
        pass
    assert counting.tally(study.get_trials()).complete == 3
    same_curves(sqlite_store, study)


def test_a_store_on_a_full_disk_keeps_every_acknowledged_report(disk: Disk, tmp_path: Path) -> None:
    store = open_store(str(disk.folder / "studies.db"))
    study = begin(store, 3, base=slow_base(), pruner={"name": "none"})
    with pytest.raises(StoreError, match="the store refused: database or disk is full") as caught:
        fill_once_running(supervisor_of(store, study, tmp_path, 1), disk)
    assert "\n" not in str(caught.value)
    disk.empty()
    store.close()
    again = open_store(str(disk.folder / "studies.db"))
    study = get_study(again, study.study_name)
    assert 100 in study.get_trials()[0].intermediate_values
    for _ in supervisor_of(again, study, tmp_path, 1).run():
        pass
    counts = counting.tally(study.get_trials())
    assert (counts.complete, counts.open, counts.fail) == (3, 0, 0)
    same_curves(again, study)
    again.close()


# -- read-only -------------------------------------------------------------------------------------------------------


def test_a_store_on_a_read_only_disk_is_one_line(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    path = disk.folder / "studies.db"
    open_store(str(path)).close()
    before = path.read_bytes()
    disk.remount("ro")
    with pytest.raises(StoreError, match=r"studies.db: not usable as a store \(.*Read-only file system"):
        open_store(str(path))
    assert execute(["status", "--storage", f"sqlite:///{path}"]) == StudyError.exit_code  # it is read, and holds none
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_bytes() == before


def test_a_store_that_turns_read_only_says_so_and_goes_on_later(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, 2, pruner={"name": "none"})
    engine = sqlite_store.tickets.engine

    def refuse_writes(connection: sqlalchemy.engine.interfaces.DBAPIConnection, record: object) -> None:
        connection.cursor().execute("PRAGMA query_only=ON")

    sqlalchemy.event.listen(engine, "connect", refuse_writes)
    engine.dispose()
    with pytest.raises(StoreError, match="the store refused: attempt to write a readonly database"):
        sqlite_store.claim(id_of(sqlite_store, study), "here:1:0:0")
    sqlalchemy.event.remove(engine, "connect", refuse_writes)
    engine.dispose()
    assert counting.tally(study.get_trials()).waiting == 2
    assert sqlite_store.claim(id_of(sqlite_store, study), "here:1:0:0") is not None
