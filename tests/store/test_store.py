"""The store: Optuna's own contract on both back-ends, ours on top, and what is refused."""

from __future__ import annotations

import gc
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from ris_hpo.search.lifecycle import status
from ris_hpo.search.status import study_status
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.open import open_store


@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestOptunaContract(StorageTestCase):
    """Optuna's suite, on SQLite and PostgreSQL through our factory."""

    @pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
    def storage(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
        if request.param == "sqlite":
            opened = open_store(str(tmp_path / "studies.db"))
            yield opened
            opened.close()
            return
        opened = open_store(request.getfixturevalue("postgres").shared_url())  # emptied, which is faster than made anew
        yield opened
        with opened.tickets.engine.begin() as connection:
            connection.exec_driver_sql("TRUNCATE studies, trials RESTART IDENTITY CASCADE")
        opened.close()

    def test_pickle_storage(self, storage: Store) -> None:
        super().test_pickle_storage(storage)
        with warnings.catch_warnings():  # the copy is dropped with its connection open
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


def new_study(store: Store, tickets: int = 0) -> int:
    study_id = store.create_new_study([optuna.study.StudyDirection.MINIMIZE], "unit")
    store.fill(study_id, lambda present: [ticket() for _ in range(tickets)])
    return study_id


def test_claims_come_in_order_and_end(store: Store) -> None:
    study_id = new_study(store, 3)
    assert [store.claim(study_id, f"here:1:0:{i}") for i in range(4)] == [0, 1, 2, None]
    trials = store.get_all_trials(study_id)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert all(trial.state == TrialState.RUNNING for trial in trials)
    assert trials[1].user_attrs[names.OWNER] == "here:1:0:1"


def test_a_repeated_claim_is_the_same_claim(store: Store) -> None:
    study_id = new_study(store, 2)
    first = store.claim(study_id, "here:1:0:0")
    assert store.claim(study_id, "here:1:0:0") == first
    assert store.claim(study_id, "here:1:0:1") != first


def test_fill_counts_what_is_there(store: Store) -> None:
    study_id = new_study(store, 2)
    assert store.fill(study_id, lambda present: [ticket() for _ in range(5 - len(present))]) == 3
    assert store.fill(study_id, lambda present: [ticket() for _ in range(5 - len(present))]) == 0
    assert [trial.number for trial in store.get_all_trials(study_id)] == list(range(5))


def test_release_asks_for_the_owner(store: Store) -> None:
    study_id = new_study(store, 1)
    number = store.claim(study_id, "here:1:0:0")
    assert number is not None
    assert not store.release(study_id, number, "there:2:0:0", {})
    assert store.release(study_id, number, "here:1:0:0", {names.PREEMPTIONS: 1})
    (trial,) = store.get_all_trials(study_id)
    assert trial.state == TrialState.WAITING
    assert trial.user_attrs == {names.OWNER: None, names.RELEASED_BY: "here:1:0:0", names.PREEMPTIONS: 1}
    assert store.claim(study_id, "there:2:0:0") == number


def test_retire_fences_the_late_owner(store: Store) -> None:
    study_id = new_study(store, 1)
    number = store.claim(study_id, "here:1:0:0")
    assert number is not None
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, number)
    successor = ticket({"shape.x": 0.25}, {names.PREDECESSOR: 0})
    assert store.retire(study_id, number, "here:1:0:0", {names.CAUSE: "lost_worker"}, lambda trial: successor)
    assert not store.retire(study_id, number, None, {names.CAUSE: "timeout"}, lambda trial: successor)
    failed, queued = store.get_all_trials(study_id)
    assert (failed.state, failed.user_attrs[names.CAUSE]) == (TrialState.FAIL, "lost_worker")
    assert (queued.state, queued.number, queued.user_attrs[names.PREDECESSOR]) == (TrialState.WAITING, 1, 0)
    with pytest.raises(UpdateFinishedTrialError):
        store.set_trial_intermediate_value(trial_id, 5, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        store.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    with pytest.raises(UpdateFinishedTrialError):
        store.mark(study_id, number, {names.SECONDS: 1.0})


def test_withdraw_leaves_claimed_tickets_alone(store: Store) -> None:
    study_id = new_study(store, 2)
    claimed = store.claim(study_id, "here:1:0:0")
    store.withdraw(study_id, [trial.number for trial in store.get_all_trials(study_id)])
    states = {trial.number: trial.state for trial in store.get_all_trials(study_id)}
    assert states.pop(claimed) == TrialState.RUNNING
    assert list(states.values()) == [TrialState.FAIL]


# -- lost acknowledgements ---------------------------------------------------------------------------------------------


def lose_an_answer(monkeypatch: pytest.MonkeyPatch, store: Store, name: str) -> list[Any]:
    """Let a call do its work and then look as if the connection had gone before the answer came, once."""
    real, answers = getattr(store.tickets, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        answers.append(real(*args, **kwargs))
        if len(answers) == 1:
            raise OperationalError("COMMIT", None, ConnectionError("server closed"), connection_invalidated=True)
        return answers[-1]

    monkeypatch.setattr(store.tickets, name, call)
    return answers


def test_a_claim_that_was_not_acknowledged_is_made_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study_id = new_study(store, 3)
    answers = lose_an_answer(monkeypatch, store, "claim")
    assert store.claim(study_id, "here:1:0:0") == 0
    assert len(answers) == 2
    assert [trial.state.name for trial in store.get_all_trials(study_id)] == ["RUNNING", "WAITING", "WAITING"]


def test_tickets_that_were_not_acknowledged_are_made_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study_id = new_study(store)
    lose_an_answer(monkeypatch, store, "fill")
    store.fill(study_id, lambda present: [ticket() for _ in range(4 - len(present))])
    assert len(store.get_all_trials(study_id)) == 4


def test_a_release_that_was_not_acknowledged_is_a_release(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study_id = new_study(store, 1)
    assert store.claim(study_id, "here:1:0:0") == 0
    lose_an_answer(monkeypatch, store, "release")
    assert store.release(study_id, 0, "here:1:0:0", {names.PREEMPTIONS: 1})
    assert not store.release(study_id, 0, "there:2:0:0", {})
    assert store.claim(study_id, "there:2:0:0") == 0
    assert store.release(study_id, 0, "here:1:0:0", {names.PREEMPTIONS: 1})  # asked later still
    assert store.get_all_trials(study_id)[0].state == TrialState.RUNNING  # and the next owner keeps it


def test_a_failure_that_was_not_acknowledged_has_one_successor(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study_id = new_study(store, 1)
    assert store.claim(study_id, "here:1:0:0") == 0
    lose_an_answer(monkeypatch, store, "retire")
    assert store.retire(study_id, 0, "here:1:0:0", {names.CAUSE: "out_of_memory"}, lambda trial: ticket())
    assert not store.retire(study_id, 0, "here:1:0:0", {names.CAUSE: "bug"}, lambda trial: ticket())
    assert not store.retire(study_id, 0, "there:2:0:0", {names.CAUSE: "out_of_memory"}, lambda trial: ticket())
    assert [trial.state.name for trial in store.get_all_trials(study_id)] == ["FAIL", "WAITING"]


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED])
def test_an_end_that_was_not_acknowledged_is_an_end(
    state: TrialState, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_id = new_study(store, 1)
    assert store.claim(study_id, "here:1:0:0") == 0
    study = optuna.load_study(study_name="unit", storage=store)
    answers = lose_an_answer(monkeypatch, store, "set_trial_state_values")
    study.tell(0, 1.5 if state == TrialState.COMPLETE else None, state=state)
    assert len(answers) == 2
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, 0)
    values = [1.5] if state == TrialState.COMPLETE else None
    assert (store.get_trial(trial_id).state, store.get_trial(trial_id).values) == (state, values)
    other = open_store(store.address)
    with pytest.raises(UpdateFinishedTrialError):
        other.set_trial_state_values(trial_id, state, values)  # who did not claim it
    with pytest.raises(UpdateFinishedTrialError):
        store.set_trial_state_values(trial_id, TrialState.COMPLETE, [2.0])
    other.close()


# -- several processes -------------------------------------------------------------------------------------------------


def _fill_and_claim(address: str, study_id: int, results: multiprocessing.Queue[tuple[int, list[int]]]) -> None:
    store = open_store(address)
    added = store.fill(study_id, lambda present: [ticket() for _ in range(60 - len(present))])
    mine: list[int] = []
    while (number := store.claim(study_id, f"here:{os.getpid()}:0:{len(mine)}")) is not None:
        mine.append(number)
    results.put((added, mine))


def test_processes_never_claim_the_same_ticket_nor_overfill(url: str) -> None:
    store = open_store(url)
    study_id = new_study(store)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[int, list[int]]] = context.Queue()
    crew = [context.Process(target=_fill_and_claim, args=(url, study_id, results)) for _ in range(3)]
    for process in crew:
        process.start()
    found = [results.get(timeout=60) for _ in crew]
    for process in crew:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert sorted(added for added, _ in found) == [0, 0, 60]
    taken = [number for _, mine in found for number in mine]
    assert len(taken) == len(set(taken)) == 60
    store.close()


def test_the_outline_of_a_study_gives_the_same_status_as_its_whole_trials(store: Store) -> None:
    study = optuna.create_study(storage=store, study_name="outlined")
    study_id = store.get_study_id_from_name("outlined")
    scores = [3.0, 1.0, float("inf"), float("-inf")]
    for score in scores:
        trial = study.ask({"x": FloatDistribution(0, 1)})
        trial.report(score, 5)
        for key, value in ((names.SECONDS, 7.5), (names.FLOOR, 0.5), (names.COMPONENTS, {"k_loc": 1.0})):
            trial.set_user_attr(key, value)
        study.tell(trial, score)
    store.change_attribute(study_id, names.INVALID, lambda old: {"3": {"reason": "by hand", "time": "now"}})
    store.fill(study_id, lambda present: [ticket() for _ in range(5)])
    running, failed, paused = (store.claim(study_id, f"node:b:1:{place}:1.0:1") for place in range(3))
    for number in (running, failed):
        trial_id = store.get_trial_id_from_study_id_trial_number(study_id, number)
        store.set_trial_intermediate_value(trial_id, 40, 2.5)
    store.retire(study_id, failed, None, {names.CAUSE: "timeout", names.SECONDS: 3.0}, lambda trial: ticket())
    store.release(study_id, paused, "node:b:1:2:1.0:1", {names.PAUSED: 0, names.RUNGS: [2.0], names.SECONDS: 1.0})
    fresh = open_store(store.address, create=False)
    light = fresh.outline(study_id)
    assert fresh._studies == {}  # nothing whole was read
    assert [trial.values for trial in light[:2]] == [[3.0], [1.0]]
    assert light[1].params == {}
    assert light[running].intermediate_values == {40: 2.5}
    outlined = status(fresh, "outlined")
    whole = study_status("outlined", fresh.get_all_trials(study_id))
    assert outlined == whole
    assert outlined.best.params
    assert outlined.trials.paused == outlined.trials.running == outlined.trials.invalidated == 1
    assert [trial.last_step for trial in outlined.failed] == [40]
    assert len(fresh.outline(study_id)[1].params) == 1  # what is known whole stays whole
    fresh.close()


def test_a_large_study_is_not_read_again_for_a_few_trials(sqlite_store: Store, monkeypatch) -> None:
    study_id = sqlite_store.create_new_study([optuna.study.StudyDirection.MINIMIZE], "large")
    sqlite_store.fill(study_id, lambda present: [ticket() for _ in range(120)])
    assert len(sqlite_store.get_all_trials(study_id)) == 120
    for place in range(20):  # more than are read one by one in a small study
        number = sqlite_store.claim(study_id, f"node:b:1:{place}:1.0:1")
        trial_id = sqlite_store.get_trial_id_from_study_id_trial_number(study_id, number)
        sqlite_store.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(place)])
    monkeypatch.setattr(sqlite_store.tickets, "get_all_trials", lambda *_, **__: pytest.fail("all of it was read"))
    seen = sqlite_store.get_all_trials(study_id)
    assert [trial.value for trial in seen[:20]] == [float(place) for place in range(20)]
