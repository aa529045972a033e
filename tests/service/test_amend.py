"""Own configurations, another try for failed trials, and scores that do not count: on SQLite and PostgreSQL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from ris_hpo.errors import ConfigError, SpaceError, StudyError
from ris_hpo.report.collect import collect
from ris_hpo.report.html import as_html
from ris_hpo.results.export import exported
from ris_hpo.results.replay import replay
from ris_hpo.results.winner import as_attribute, judge
from ris_hpo.search.amend import enqueue, invalidate, read_configurations, reinstate, retry
from ris_hpo.search.counting import ranked, tally
from ris_hpo.search.lifecycle import fill_budget, get_study, status, stored_spec
from ris_hpo.search.pruners import build_pruner
from ris_hpo.search.rungs import as_samplers_see, next_promotion
from ris_hpo.store import attributes as names
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.workers.worker import job_for, run_worker

from .conftest import elsewhere, id_of
from .pools import begin

OWN = {"shape.x": 0.25, "shape.y": 2, "shape.kind": "plain"}


def run(store: Store, n_trials: int = 4, **changes: Any) -> optuna.Study:
    """A study of trials that have run."""
    study = begin(store, n_trials, **{"pruner": {"name": "none"}, **changes})
    run_worker(job_for(store, study))
    return study


# -- enqueue -----------------------------------------------------------------------------------------------------------


def test_an_own_configuration_takes_the_place_of_a_waiting_trial(store: Store) -> None:
    study = begin(store, 4, pruner={"name": "none"})
    study.get_trials()  # this process has seen the waiting ones
    found = enqueue(store, "unit", [OWN, {"shape.y": 9.0}])
    assert (found.numbers, found.n_trials) == ([1, 2], 4)  # the base configuration is trial 0
    run_worker(job_for(store, study))
    trials = study.get_trials()
    assert tally(trials).complete == len(trials) == 4
    assert trials[1].params == OWN
    assert trials[2].params["shape.y"] == 9
    assert set(trials[2].params) > {"shape.x", "shape.kind"}  # the sampler's
    assert trials[1].user_attrs[names.ORIGIN].startswith("enqueued 20")
    assert replay(store, "unit", 1).identical


def test_where_none_waits_the_study_grows_and_keeps_what_was_asked_for(store: Store) -> None:
    study = run(store, 2, budget={"n_trials": 2})
    found = enqueue(store, "unit", [OWN])
    assert (found.numbers, found.n_trials) == ([2], 3)
    assert stored_spec(study).budget.n_trials == 3
    assert study.user_attrs[names.CHANGES][-1]["key"] == "budget.n_trials"
    assert fill_budget(store, study) == 0
    assert tally(study.get_trials()).waiting == 1


def test_fewer_trials_withdraw_those_of_the_sampler_first(store: Store) -> None:
    study = run(store, 1)
    enqueue(store, "unit", [OWN])
    fill_budget(store, study, 4)
    fill_budget(store, study, 2)
    waiting = study.get_trials(states=[TrialState.WAITING])
    assert [trial.system_attrs["fixed_params"] for trial in waiting] == [OWN]


def test_what_a_study_has_already_is_left_out_unless_asked_for_again(store: Store) -> None:
    begin(store, 3)
    enqueue(store, "unit", [OWN])
    found = enqueue(store, "unit", [OWN, {**OWN, "shape.y": 3}])
    assert (found.repeated, found.numbers) == ([1], [2])
    assert enqueue(store, "unit", [OWN], again=True, dry_run=True).n_trials == 4
    assert tally(get_study(store, "unit").get_trials()).waiting == 3
    assert enqueue(store, "unit", [OWN], again=True).numbers == [3]


def test_a_lost_acknowledgement_queues_nothing_twice(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(sqlite_store, 1)
    real, calls = sqlite_store.tickets.enqueue, []

    def twice(study_id: int, tickets: Any) -> None:
        real(study_id, tickets)
        calls.append(real(study_id, tickets))

    monkeypatch.setattr(sqlite_store.tickets, "enqueue", twice)
    assert enqueue(sqlite_store, "unit", [OWN, {**OWN, "shape.y": 3}]).numbers == [1, 2]
    assert len(calls) == 1
    assert len(get_study(sqlite_store, "unit").get_trials()) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape.z": 1}, r"configuration 2: 'shape.z' is not searched by study 'unit'; did you mean 'shape.\w'"),
        ({"shape.x": 1.5}, r"'shape.x' = 1.5 lies outside its range, 0.0 .. 1.0"),
        ({"shape.y": 2.5}, "'shape.y' = 2.5 lies outside its range"),
        ({"shape.kind": "odd"}, "outside its range, plain | fancy"),
        ({"shape.depth": 2}, "'shape.depth' is searched only where 'shape.kind' is fancy"),
        ({}, "sets nothing"),
    ],
)
def test_all_are_checked_before_one_is_queued(sqlite_store: Store, wrong: dict[str, Any], message: str) -> None:
    study = begin(sqlite_store, 3)
    with pytest.raises(SpaceError, match=message):
        enqueue(sqlite_store, "unit", [OWN, wrong])
    assert all("fixed_params" not in trial.system_attrs for trial in study.get_trials()[1:])


def test_a_configuration_that_the_program_refuses_is_refused(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ris_hpo.search.spec import StudySpec

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError("width and depth do not fit")

    begin(sqlite_store, 2)
    monkeypatch.setattr(StudySpec, "config", refuse)
    with pytest.raises(ConfigError, match="configuration 1: width and depth do not fit"):
        enqueue(sqlite_store, "unit", [OWN])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.json", '[{"shape.x": 0.25, "shape": {"y": 2}}, {"shape.kind": "fancy"}]'),
        ("own.toml", '[[trial]]\nshape.x = 0.25\nshape.y = 2\n[[trial]]\n"shape.kind" = "fancy"\n'),
        ("own.csv", "shape.x,shape.y,shape.kind\n0.25,2,\n,,fancy\n"),
    ],
)
def test_a_file_of_configurations(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_configurations(tmp_path / name) == [{"shape.x": 0.25, "shape.y": 2}, {"shape.kind": "fancy"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.txt", ""), ("own.json", "{"), ("own.json", "[1]"), ("own.json", "[]"), ("own.json", "3"),
        ("own.toml", "trial = 3"), ("own.toml", "[[trials]]\n"), ("own.csv", "a,b\n1\n"), ("own.csv", "a\n1,2\n"),
        ("own.csv", ""), ("own.csv", "a,a\n1,2\n"), ("none.csv", None), ("own.csv", b"\xff\xfe\x00"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_configurations_is_one_line(tmp_path: Path, name: str, text: str | bytes | None) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=name):
        read_configurations(tmp_path / name)


# -- retry -------------------------------------------------------------------------------------------------------------


def test_failed_trials_run_again_and_the_budget_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study = run(store, 2, base={"fault": "memory"}, retries={"out_of_memory": 0})
    run_worker(job_for(store, study))  # a worker leaves after a trial that ran out of memory
    assert tally(study.get_trials()).fail == 2
    assert [each.number for each in retry(store, "unit", every=True, dry_run=True)] == [0, 1]
    assert tally(study.get_trials()).waiting == 0
    (again,) = retry(store, "unit", numbers=[1])
    assert (again.number, again.cause) == (1, "out_of_memory")
    with pytest.raises(StudyError, match="trial 1 of study 'unit' is continued by a later trial already"):
        retry(store, "unit", numbers=[1])
    assert [each.number for each in retry(store, "unit", causes=["out_of_memory"])] == [0]
    counts = tally(study.get_trials())
    assert (counts.waiting, counts.retried, counts.ended + counts.open) == (2, 2, 2)
    assert fill_budget(store, study, 2) == 0
    first, second, third, fourth = study.get_trials()
    assert (third.params, fourth.params) == (second.params, first.params)
    assert fourth.user_attrs[names.LINEAGE] == 0


def test_a_retried_trial_has_the_curve_that_it_would_have_had(store: Store) -> None:
    study = begin(store, 1, pruner={"name": "none"})
    number = store.claim(id_of(store, study), str(elsewhere()))
    store.retire(id_of(store, study), 0, None, {names.CAUSE: "bug"}, lambda trial: None)
    assert number == 0
    (again,) = retry(store, "unit", causes=["bug"])
    assert again.last_step is None
    run_worker(job_for(store, study))
    assert tally(study.get_trials()).complete == 1
    assert replay(store, "unit", 1).identical


def test_only_failed_trials_are_tried_again(sqlite_store: Store) -> None:
    run(sqlite_store, 1)
    with pytest.raises(StudyError, match="trial 0 of study 'unit' is complete; only failed ones"):
        retry(sqlite_store, "unit", numbers=[0])
    with pytest.raises(StudyError, match="has no trial 5"):
        retry(sqlite_store, "unit", numbers=[5])
    with pytest.raises(StudyError, match="no trial fails by 'timeouts'; did you mean 'timeout'"):
        retry(sqlite_store, "unit", causes=["timeouts"])
    assert retry(sqlite_store, "unit", every=True) == []


# -- invalidate --------------------------------------------------------------------------------------------------------


def test_an_invalidated_trial_is_out_of_every_ranking_and_comes_back(store: Store, url: str) -> None:
    study = run(store, 5)
    best = ranked(study.get_trials())[0]
    spec = stored_spec(study)
    verdict = judge([f"trial {best.number}"], [[2.0, 2.1], [1.0, 1.2]])
    study.set_user_attr(names.WINNER, as_attribute(verdict, {}))
    assert collect(study, with_importances=False).winner is not None
    other = open_store(url)  # a process that has read all trials before
    seen = get_study(other, "unit")
    assert seen.best_trial.number == best.number

    invalidate(other, "unit", [best.number], "wrong\nscenes")
    fresh = open_store(url)
    for each in (study, seen, get_study(fresh, "unit")):
        shown = each.get_trials()[best.number]
        assert (shown.state, shown.values, shown.params) == (TrialState.FAIL, None, best.params)
        assert shown.intermediate_values == best.intermediate_values
        assert best.number not in [trial.number for trial in ranked(each.get_trials())]
        assert each.best_trial.number != best.number
        report = collect(each, with_importances=False)
        assert report.best is not None
        assert report.best.number != best.number
        assert best.number not in report.comparison.values
        assert report.winner is None
        assert (report.trials[best.number].state, report.trials[best.number].error) == ("invalidated", "wrong scenes")
    stands = status(store, "unit")
    assert (stands.trials.complete, stands.trials.invalidated, stands.trials.ended) == (4, 1, 5)
    (entry,) = stands.invalidated
    assert (entry.number, entry.reason, entry.state, entry.score) == (
        best.number, "wrong scenes", "complete", best.values[0],
    )  # fmt: skip
    assert stands.failed == []
    if store.is_sqlite:
        assert "wrong scenes" in as_html(report)
    assert fill_budget(store, study, 5) == 0
    with pytest.raises(StudyError, match="was invalidated"):
        exported(study, spec, best.number)
    assert exported(study, spec).provenance.winner is None  # type: ignore[union-attr]
    assert replay(store, "unit", best.number).identical  # it can still be looked into

    reinstate(store, "unit", [best.number])
    for each in (study, seen):
        assert each.get_trials()[best.number] == best
        assert each.best_trial.number == best.number
    assert collect(study, with_importances=False).winner is not None
    other.close()
    fresh.close()


def test_the_pruner_does_not_compare_with_an_invalidated_trial(store: Store) -> None:
    """A median over one trial prunes what is worse than it; without that trial there is nothing to compare with."""
    study = run(store, 1)
    spec = stored_spec(study).replaced({"pruner": {"name": "median", "startup": 1}})
    trial = study.ask()
    trial.report(9.0, 100)
    pruner = build_pruner(spec, store, first_step=100, last_step=800)
    frozen = store.get_trial(trial._trial_id)
    assert pruner.prune(study, frozen)
    invalidate(store, "unit", [0], "wrong scenes")
    assert not pruner.prune(study, frozen)


def test_an_invalidated_trial_has_reached_no_rung(store: Store) -> None:
    """Of three lines at the rung the best goes on; without the invalid one there are two, and none of them does."""
    study = begin(store, 4, pruner={"name": "promotion"})
    study_id, spec = id_of(store, study), stored_spec(study)
    for number in range(3):
        store.claim(study_id, str(elsewhere()))
        marks = {names.RUNGS: [1.0 + number]}
        if number < 2:
            store.release(study_id, number, None, {**marks, names.PAUSED: 0})
        else:
            store.mark(study_id, number, marks)
            study.tell(number, 5.0)
    ends: list[int | None] = []

    def chosen(standings: Any) -> int | None:
        ends.append(next_promotion(standings, spec))
        return None

    store.claim(study_id, "first", chosen)
    assert next_promotion(study.get_trials(), spec) == 0
    invalidate(store, "unit", [2], "wrong scenes")
    store.claim(study_id, "second", chosen)
    assert next_promotion(study.get_trials(), spec) is None
    assert ends == [0, None]
    assert as_samplers_see(study.get_trials())[2].state is TrialState.FAIL


def test_only_a_trial_with_a_score_is_invalidated_and_with_a_reason(sqlite_store: Store) -> None:
    study = run(sqlite_store, 1)
    fill_budget(sqlite_store, study, 2)
    with pytest.raises(StudyError, match="trial 1 of study 'unit' is waiting; only complete and pruned"):
        invalidate(sqlite_store, "unit", [0, 1], "why")
    with pytest.raises(StudyError, match="say why"):
        invalidate(sqlite_store, "unit", [0], " \n")
    with pytest.raises(StudyError, match="is complete; only invalidated ones come back"):
        reinstate(sqlite_store, "unit", [0])
    assert names.INVALID not in study.user_attrs
    invalidate(sqlite_store, "unit", [0], "why")
    with pytest.raises(StudyError, match="is invalidated; only failed ones"):
        retry(sqlite_store, "unit", numbers=[0])
    assert json.loads(json.dumps(study.user_attrs[names.INVALID]))["0"]["reason"] == "why"
