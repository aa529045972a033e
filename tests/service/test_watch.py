"""A study that somebody else runs, seen from its store alone."""

from __future__ import annotations

from ris_hpo.search.counting import tally
from ris_hpo.store.cache import Store
from ris_hpo.workers.watch import watched
from ris_hpo.workers.worker import job_for, run_worker

from .conftest import elsewhere, id_of
from .pools import begin


def test_a_study_is_followed_until_it_has_ended(sqlite_store: Store) -> None:
    study = begin(sqlite_store, 3, pruner={"name": "none"})
    study_id = id_of(sqlite_store, study)
    sqlite_store.claim(study_id, str(elsewhere(pid=42)))
    sqlite_store.mark(study_id, 0, {"device": "cuda:1", "seconds": 4.0})
    sqlite_store.set_trial_intermediate_value(
        sqlite_store.get_trial_id_from_study_id_trial_number(study_id, 0), 200, 3.5
    )
    looks = []

    def pause(seconds: float) -> None:
        assert seconds == 0.5
        looks.append(seconds)
        if len(looks) == 1:
            run_worker(job_for(sqlite_store, study, heartbeat=None), stop=lambda: tally(study.get_trials()).ended == 2)
        else:
            sqlite_store.release(study_id, 0, None, {})
            run_worker(job_for(sqlite_store, study))

    first, second, third = watched(sqlite_store, "unit", 0.5, pause)
    (worker,) = first.workers
    assert (worker.device, worker.pid, worker.trial, worker.step, worker.score) == ("cuda:1@elsewhere", 42, 0, 200, 3.5)
    assert worker.steps_per_second == 50
    assert (first.n_trials, first.tally.running, first.messages, first.seconds > 0) == (3, 1, [], True)
    assert [message.partition(":")[0] for message in second.messages] == ["trial 1", "trial 2"]
    assert second.best is not None
    assert (third.tally.ended, third.tally.open, third.workers) == (3, 0, [])
    assert third.messages[0].startswith("trial 0: complete, k_loc ")
