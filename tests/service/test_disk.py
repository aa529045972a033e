"""Files that go when nobody needs them, and a run that pauses before the disk is full."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import FrozenTrial, TrialState, create_trial

from ris_hpo.search import disk
from ris_hpo.search.disk import kept_numbers, removable, remove, shortage
from ris_hpo.search.spec import KeepSpec
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.folders import find_folder, study_folder
from ris_hpo.store.open import open_store
from ris_hpo.workers import supervisor as supervisors
from ris_hpo.workers.worker import job_for, run_worker

from .conftest import IMPORTABLE
from .pools import begin, same_curves, slow_base, supervisor_of


def trial(number: int, state: TrialState, value: float | None = None, step: int = 0, **marks: Any) -> FrozenTrial:
    made = create_trial(state=state, value=value, user_attrs=marks, intermediate_values={step: 1.0} if step else {})
    made.number = number
    return made


TRIALS = [
    trial(0, TrialState.COMPLETE, 3.0, 800),
    trial(1, TrialState.PRUNED, step=100),
    trial(2, TrialState.COMPLETE, 1.0, 800),
    trial(3, TrialState.FAIL, step=300, cause="lost_worker"),
    trial(4, TrialState.RUNNING, step=400, predecessor=3, lineage=3),
    trial(5, TrialState.COMPLETE, 2.0, 800, diverged="loss is not finite"),
    trial(6, TrialState.FAIL, step=200, cause="bug"),
    trial(7, TrialState.WAITING, paused=0),
]


@pytest.mark.parametrize(
    ("rule", "best", "kept"),
    [
        ("all", 1, {0, 1, 2, 3, 4, 5, 6, 7}),
        ("best", 1, {2, 3, 4, 7}),
        ("best", 5, {0, 2, 3, 4, 7}),
        ("last_rung", 1, {0, 2, 5, 3, 4, 7}),
        ("none", 1, {3, 4, 7}),
    ],
)
def test_whose_checkpoints_stay(rule: Any, best: int, kept: set[int]) -> None:
    assert kept_numbers(TRIALS, KeepSpec(checkpoints=rule, best=best)) == kept


def test_the_best_are_the_highest_where_higher_is_better() -> None:
    assert kept_numbers(TRIALS[:3], KeepSpec(checkpoints="best", best=1), "maximize") == {0}


def test_the_limits_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    (tmp_path / "big").write_bytes(bytes(3000))
    assert shortage(tmp_path, KeepSpec()) is None
    assert shortage(tmp_path / "on another machine", KeepSpec(quota_gb=1e-6, free_gb=1e9)) is None
    assert shortage(tmp_path, KeepSpec(quota_gb=3e-6)) is None
    assert "has 3.00 kB, keep.quota_gb allows 2e-06 GB" in str(shortage(tmp_path, KeepSpec(quota_gb=2e-6)))
    usage = namedtuple("usage", "total used free")(10**10, 0, 2 * 10**9)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    assert shortage(tmp_path, KeepSpec(free_gb=2)) is None
    assert "has 2.00 GB free, keep.free_gb asks for 2.5 GB" in str(shortage(tmp_path, KeepSpec(free_gb=2.5)))


def test_a_run_removes_checkpoints_pauses_and_goes_on(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisors, "_DISK_INTERVAL_S", 0.0)
    monkeypatch.setenv("PYTHONPATH", IMPORTABLE)
    study = begin(
        sqlite_store,
        3,
        base=slow_base(pause_s=0.05),
        pruner={"name": "none"},
        keep={"checkpoints": "best", "best": 1, "quota_gb": 1.0},
    )
    run = supervisor_of(sqlite_store, study, tmp_path, 1)
    ballast = tmp_path / "trials" / "ballast"
    paused: list[str] = []
    messages: list[str] = []
    for snapshot in run.run(interval=0.05):
        messages += snapshot.messages
        if not paused and any(each.step for each in snapshot.workers) and not ballast.exists():
            with ballast.open("wb") as file:
                file.truncate(10**9 + 1)
        if snapshot.paused is not None:
            paused.append(snapshot.paused)
            if all(each.state == "paused" and each.pid is None for each in snapshot.workers):
                assert snapshot.tally.running == 0
                ballast.unlink(missing_ok=True)
    assert "keep.quota_gb allows 1 GB" in paused[0]
    assert [message.split(":")[0] for message in messages if "room" in message] == ["paused", "there is room again"]
    assert run.ending == "finished"
    trials = study.get_trials()
    assert sum(trial.user_attrs.get(names.PREEMPTIONS, 0) for trial in trials) == 1
    same_curves(sqlite_store, study)
    best = min(trials, key=lambda trial: trial.values[0]).number
    left = [path.parent.name for path in (tmp_path / "trials").glob("*/checkpoint.json")]
    assert left == [str(best)]
    assert len(list((tmp_path / "trials").glob("*/reports.jsonl"))) == 3


def test_what_nobody_owns_is_found_and_removed(sqlite_store: Store, tmp_path: Path, storage: Path) -> None:
    study = begin(sqlite_store, 2, pruner={"name": "none"})
    run_worker(job_for(sqlite_store, study))
    folder = find_folder(sqlite_store, "unit")
    assert folder is not None
    artifacts = storage / "artifacts"
    (tmp_path / "picture.svg").write_text("<svg/>")
    owned = upload_artifact(
        artifact_store=FileSystemArtifactStore(artifacts), file_path=str(tmp_path / "picture.svg"), study_or_trial=study
    )
    assert removable(sqlite_store, ["unit"]) == []
    orphan, fresh = artifacts / str(uuid.uuid4()), artifacts / str(uuid.uuid4())
    gone, partial = folder.parent / "gone", folder.parent / ".partial-999999999-ab"
    for path in (orphan, fresh):
        path.write_text("<svg/>")
    for each in (gone, partial, folder.parent / ".removed-old-7"):
        each.mkdir()
        (each / "file").write_bytes(bytes(100))
    marker = json.loads((folder / ".study.json").read_text())
    (gone / ".study.json").write_text(json.dumps({**marker, "identity": "gone"}))
    an_age_ago = time.time() - 7200
    for path in (orphan, partial, artifacts / owned):
        os.utime(path, (an_age_ago, an_age_ago))
    found = removable(sqlite_store, ["unit"], KeepSpec(checkpoints="none"))
    assert {each.path.name for each in found} == {"checkpoint.json", "gone", ".partial-999999999-ab", ".removed-old-7",
                                                  orphan.name}  # fmt: skip
    assert len(found) == 6
    freed = sum(each.bytes for each in found)
    assert remove(found) == freed
    assert remove(found) == 0
    assert removable(sqlite_store, ["unit"], KeepSpec(checkpoints="none")) == []
    assert {path.name for path in artifacts.iterdir()} == {owned, fresh.name}
    same_curves(sqlite_store, study)


def test_artifacts_stay_where_another_store_may_own_them(sqlite_store: Store, tmp_path: Path, storage: Path) -> None:
    other = open_store(f"sqlite:///{tmp_path / 'other.db'}")
    begin(other, 1, name="theirs")
    study_folder(other, "theirs")
    other.close()
    begin(sqlite_store, 1)
    (storage / "artifacts").mkdir()
    orphan = storage / "artifacts" / str(uuid.uuid4())
    orphan.write_text("<svg/>")
    os.utime(orphan, (0, 0))
    assert removable(sqlite_store, ["unit"]) == []
