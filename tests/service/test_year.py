"""A year of a team in one test: everything that is done to studies, and in the end the books agree."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from ris_hpo.atomic import make_folder
from ris_hpo.results.compare import compare_studies
from ris_hpo.results.replay import replay
from ris_hpo.search import counting
from ris_hpo.search.amend import enqueue, invalidate, retry
from ris_hpo.search.archive import archive_study, copy_study, restore_study
from ris_hpo.search.disk import removable, remove
from ris_hpo.search.lifecycle import fill_budget, get_study, status, stored_spec
from ris_hpo.search.spec import KeepSpec
from ris_hpo.search.upkeep import delete_study, list_entries, rename_study
from ris_hpo.store import attributes as names
from ris_hpo.store import folders
from ris_hpo.store.cache import Store
from ris_hpo.store.open import backup, open_store
from ris_hpo.trials.context import Report
from ris_hpo.workers.lost import LostTrials
from ris_hpo.workers.worker import job_for, run_worker
from tests.postgres import Postgres

from .pools import begin

OLD = Path(__file__).parents[1] / "legacy" / "0.1.0" / "storage"


def work(store: Store, name: str, **limits: Any) -> None:
    run_worker(job_for(store, get_study(store, name)), **limits)


def killed_while_it_works(address: str, name: str, reports: int) -> None:
    """A worker that dies by kill -9 after so many reports."""
    child = os.fork()
    if child == 0:
        seen: list[object] = []

        def count(event: object) -> None:
            seen.extend([event] if isinstance(event, Report) else [])
            if len(seen) == reports:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            store = open_store(address)
            run_worker(job_for(store, get_study(store, name)), notify=count)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def with_picture(store: Store, name: str, storage: Path) -> None:
    folder = folders.study_folder(store, name)
    (folder / "page").mkdir()
    picture = folder / "page" / "cost.svg"
    picture.write_text(f"<svg>{name}</svg>")
    kept = upload_artifact(
        artifact_store=FileSystemArtifactStore(make_folder(storage / "artifacts")),
        file_path=str(picture),
        study_or_trial=get_study(store, name),
    )
    (folder / "page" / folders.ARTIFACTS).write_text(f"{kept}\n")


def books(store: Store, storage: Path) -> dict[str, Any]:
    """What a store says of its studies, after their files were found to agree with it."""
    said: dict[str, Any] = {}
    for entry in list_entries(store):
        study, folder = get_study(store, entry.study), folders.find_folder(store, entry.study)
        trials = study.get_trials()
        begun = {str(trial.number) for trial in trials if trial.intermediate_values}
        if folder is not None:
            numbered = {path.name for path in folder.iterdir() if path.name.isdigit()}
            assert numbered <= {str(trial.number) for trial in trials}, entry.study
            assert entry.study == "old" or begun <= numbered, entry.study
        study_id = store.get_study_id_from_name(entry.study)
        named = json.dumps([store.get_study_system_attrs(study_id), *(trial.system_attrs for trial in trials)])
        said[entry.study] = {
            "trials": entry.trials,
            "seconds": counting.device_seconds(trials),
            "artifacts": sorted(path.name for path in (storage / "artifacts").iterdir() if path.name in named),
        }
        assert entry.trials.asked_for == len(counting.live_trials(trials))
    return said


@pytest.mark.postgres
def test_a_year_in_an_hour(tmp_path: Path, storage: Path, postgres: Postgres) -> None:
    address, server = f"sqlite:///{tmp_path / 'team.db'}", postgres.url()
    store = open_store(address)

    # winter: a study is made, its worker is killed, the next one goes on; a colleague's configuration is tried
    begin(store, 4, name="winter", pruner={"name": "none"}, budget={"n_trials": 4})
    with_picture(store, "winter", storage)
    store.close()
    killed_while_it_works(address, "winter", 11)
    store = open_store(address)
    winter = get_study(store, "winter")
    study_id = store.get_study_id_from_name("winter")
    assert LostTrials(store, study_id, stored_spec(winter).retries).recover() == [1]
    enqueue(store, "winter", [{"shape.x": 0.35, "shape.y": 4, "shape.kind": "fancy", "shape.depth": 1}])
    work(store, "winter", stop=lambda: status(store, "winter").trials.ended == 3)
    assert status(store, "winter").trials.retried == 1

    # spring: the last trial is lost for good, and tried again; a backup; another study; an old one of version 0.1.0
    store.claim(study_id, "nobody")
    (running,) = status(store, "winter").running
    store.retire(study_id, running.number, None, {names.CAUSE: "timeout"}, lambda trial: None)
    assert [each.number for each in retry(store, "winter", causes=["timeout"])] == [running.number]
    backup(address, tmp_path / "spring.db")
    work(store, "winter")
    begin(store, 3, name="summer", study={"seed": 8}, pruner={"name": "none"})
    work(store, "summer")
    shutil.copy(OLD / "studies.db", tmp_path / "old.db")
    old = open_store(f"sqlite:///{tmp_path / 'old.db'}")
    before = status(old, "smoke").as_dict()
    copy_study(old, "smoke", store, new="old")
    assert status(store, "old").as_dict() == {**before, "study": "old"}
    assert replay(store, "old", 1).older
    old.close()

    # autumn: one trial turns out to be wrong; the study goes into an archive, and comes back
    stands = status(store, "winter")
    best = stands.best
    assert best is not None
    invalidate(store, "winter", [best.number], "wrong scenes")
    archived = books(store, storage)["winter"]
    archive_study(store, "winter", tmp_path / "winter.zip")
    delete_study(store, "winter")
    assert "winter" not in books(store, storage)
    assert not any("winter" in path.read_text() for path in (storage / "artifacts").iterdir())
    restore_study(store, tmp_path / "winter.zip")
    assert books(store, storage)["winter"] == archived

    # the store moves to a server, the studies go on there, and are compared
    central = open_store(server)
    for name in ("winter", "summer", "old"):
        copy_study(store, name, central)
        moved = {**books(store, storage)[name], "artifacts": None}
        assert {**books(central, storage)[name], "artifacts": None} == moved
        delete_study(store, name)
    assert list_entries(store) == []
    rename_study(central, "winter", "winter-2")
    fill_budget(central, get_study(central, "winter-2"), 5)
    work(central, "winter-2")
    counts = status(central, "winter-2").trials
    assert (counts.complete, counts.invalidated, counts.open, counts.asked_for) == (4, 1, 0, 5)
    found = compare_studies(get_study(central, "winter-2"), get_study(central, "summer"), tmp_path / "runs", seeds=3)
    assert (found.unpaired, found.seeds) == (None, 3)

    # at the end the disk is cleaned, and nothing is left that belongs to nobody
    said = books(central, storage)
    freed = removable(central, ["winter-2", "summer"], KeepSpec(checkpoints="best", best=1))
    assert remove(freed) == sum(each.bytes for each in freed) > 0
    assert books(central, storage) == said
    assert removable(central, ["winter-2", "summer"], KeepSpec(checkpoints="best", best=1)) == []
    for name in ("winter-2", "summer"):
        folder = folders.find_folder(central, name)
        assert folder is not None
        assert len(list(folder.rglob("checkpoint.json"))) == 1
        study = get_study(central, name)
        for trial in counting.live_trials(study.get_trials()):
            assert replay(central, name, trial.number).identical
    held = [each for entry in said.values() for each in entry["artifacts"]]
    assert sorted(path.name for path in (storage / "artifacts").iterdir()) == sorted(held)
    roots = {path.name for path in (storage / "trials").iterdir() if path.is_dir()}
    assert roots == {path.name for path in (folders.find_folder(central, name) for name in said) if path}
    spring = open_store(f"sqlite:///{tmp_path / 'spring.db'}", create=False)
    assert status(spring, "winter").trials.waiting == 1
    for each in (spring, central, store):
        each.close()
