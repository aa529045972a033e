"""All studies at a glance, another name, removal: on SQLite and PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from ris_hpo.errors import StudyError
from ris_hpo.results.replay import replay
from ris_hpo.search.lifecycle import create_or_resume_study
from ris_hpo.search.upkeep import delete_study, list_entries, rename_study
from ris_hpo.store.cache import Store
from ris_hpo.store.folders import find_folder, study_folder
from ris_hpo.store.owner import this_process, this_user
from ris_hpo.workers.worker import job_for, run_worker

from .conftest import elsewhere, id_of, make_spec
from .pools import begin


def ended(store: Store, n_trials: int = 2) -> Path:
    """A study of trials that have run, and its folder."""
    study = begin(store, n_trials, pruner={"name": "none"})
    run_worker(job_for(store, study))
    folder = find_folder(store, "unit")
    assert folder is not None
    return folder


def test_the_list_tells_where_each_study_stands(store: Store) -> None:
    folder = ended(store)
    begin(store, 3, name="later")
    first, second = list_entries(store)
    assert (first.study, first.state, first.trials.complete, first.hosts) == ("unit", "ended", 2, [this_process().host])
    assert first.owner == this_user()
    assert first.best == min(trial.values[0] for trial in store.get_all_trials(store.get_study_id_from_name("unit")))
    assert first.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) > 0
    assert first.last_activity is not None
    (folder / "link").symlink_to(folder / ".study.json")  # its bytes are counted where they lie
    assert list_entries(store)[0].bytes == first.bytes
    assert (second.study, second.state, second.trials.waiting, second.best) == ("later", "waiting", 3, None)
    assert second.last_activity is second.bytes is None
    store.claim(store.get_study_id_from_name("later"), str(elsewhere()))
    create_or_resume_study(store, make_spec("none"))
    states = {entry.study: entry.state for entry in list_entries(store)}
    assert states == {"unit": "ended", "later": "running", "none": "empty"}


def test_a_renamed_study_keeps_trials_folder_and_curves(store: Store) -> None:
    folder = ended(store)
    before = store.get_all_trials(store.get_study_id_from_name("unit"))
    rename_study(store, "unit", "other")
    assert store.get_all_trials(store.get_study_id_from_name("other")) == before
    assert find_folder(store, "other") == folder
    assert replay(store, "other", 1).identical
    with pytest.raises(StudyError, match="no study 'unit'"):
        rename_study(store, "unit", "third")
    begin(store, 1)
    with pytest.raises(StudyError, match="there is a study 'unit' already"):
        rename_study(store, "other", "unit")
    with pytest.raises(StudyError, match="a name has letters"):
        rename_study(store, "other", "../unit")
    assert find_folder(store, "other") == folder


def test_a_removed_study_takes_its_folder_and_no_other(store: Store) -> None:
    folder = ended(store)
    other = begin(store, 1, name="other")
    kept = study_folder(store, "other")
    delete_study(store, "unit")
    assert not folder.exists()
    assert kept.exists()
    assert [summary.study_name for summary in store.get_all_studies()] == [other.study_name]


@pytest.mark.parametrize("what", [delete_study, lambda *args, **force: rename_study(*args, "new", **force)])
def test_a_study_that_runs_is_left_alone(store: Store, what) -> None:
    study = begin(store, 2)
    number = store.claim(id_of(store, study), str(elsewhere(pid=7)))
    with pytest.raises(
        StudyError, match=f"trial {number} of study 'unit' is running: process 7 on elsewhere; .*--force"
    ):
        what(store, "unit")
    what(store, "unit", force=True)


def test_a_process_of_this_machine_is_never_taken_for_lost_while_it_lives(store: Store) -> None:
    from ris_hpo.store.owner import Owner

    study = begin(store, 1)
    store.claim(id_of(store, study), str(Owner(this_process(), 0)))
    with pytest.raises(StudyError, match="stop it first"):
        delete_study(store, "unit", force=True)
