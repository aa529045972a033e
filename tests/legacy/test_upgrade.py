"""Stores of earlier versions under the present code, as docs/how-to/upgrade.md says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ris_hpo.errors import SpaceError
from ris_hpo.process import STORAGE_VARIABLE
from ris_hpo.results.export import exported
from ris_hpo.results.replay import replay
from ris_hpo.search.archive import archive_study, restore_study
from ris_hpo.search.lifecycle import check_code, get_study, status, stored_spec
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.workers.events import Reason
from ris_hpo.workers.worker import job_for, run_worker, work

FILES = Path(__file__).parent
STUDIES = {"0.1.0": "smoke", "schema-1": "tiny"}


@pytest.fixture(params=STUDIES)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A copy of a store that an earlier version wrote, with the files beside it."""
    shutil.copytree(FILES / version / "storage", tmp_path / "storage")
    monkeypatch.setenv(STORAGE_VARIABLE, str(tmp_path / "storage"))
    opened = open_store(f"sqlite:///{tmp_path}/storage/studies.db", create=False)
    yield opened
    opened.close()


def test_a_study_of_an_earlier_version_is_read_exported_and_packed(store: Store, version: str, tmp_path: Path) -> None:
    name = STUDIES[version]
    study = get_study(store, name)
    spec = stored_spec(study)
    assert spec.base_schema == list(STUDIES).index(version)
    check_code(study, spec)
    before = status(store, name)
    assert before.best is not None
    assert exported(study, spec).config == spec.config(
        before.best.params, seed=study.get_trials()[before.best.number].user_attrs[names.SEED]
    )
    archive_study(store, name, tmp_path / "study.zip")
    restore_study(store, tmp_path / "study.zip", name="restored")
    assert status(store, "restored").as_dict() == {**before.as_dict(), "study": "restored"}
    assert replay(store, "restored", before.best.number).fingerprint_agrees


@pytest.mark.parametrize("version", ["schema-1"], indirect=True)
def test_an_unfinished_study_goes_on_from_the_checkpoints_of_the_earlier_version(store: Store) -> None:
    study = get_study(store, "tiny")
    waiting = study.get_trials()[2]
    assert list(waiting.intermediate_values) == [32]
    run_worker(job_for(store, study))
    trials = study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert list(trials[2].intermediate_values) == [32, 64, 96]
    assert trials[2].intermediate_values[32] == waiting.intermediate_values[32]
    assert trials[2].user_attrs[names.PREEMPTIONS] == 1
    assert names.CODE in trials[2].user_attrs
    assert names.CODE not in trials[0].user_attrs
    assert status(store, "tiny").trials.ended == 3


@pytest.mark.parametrize("version", ["schema-1"], indirect=True)
def test_a_worker_that_would_configure_trials_otherwise_refuses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study = get_study(store, "tiny")
    real = StudySpec.config

    def with_another_default(self: StudySpec, *arguments: object, **keywords: object) -> object:
        return real(self, *arguments, **keywords).replaced({"optimizer.batch_size": 16})  # type: ignore[arg-type]

    monkeypatch.setattr(StudySpec, "config", with_another_default)
    monkeypatch.setattr(
        StudySpec, "ran", lambda self, recorded, *more, **named: self.config(*more, **named).fingerprint() == recorded
    )
    with pytest.raises(SpaceError, match=r"trial 0 of study 'tiny' ran configuration .*, this program builds .*--fork"):
        run_worker(job_for(store, study))
    left = work(job_for(store, study), lambda: False, lambda event: None)
    assert left.reason is Reason.REFUSED
    assert study.get_trials()[2].state.name == "WAITING"
