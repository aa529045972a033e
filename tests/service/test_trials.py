"""Trials and studies in one process, with the test double: tables that repeat, causes, stops, lineage, fences."""

from __future__ import annotations

import errno
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from ris_hpo.errors import SpaceError, StudyError, WorkerError
from ris_hpo.programs.program import Program
from ris_hpo.results.replay import replay
from ris_hpo.scoring.k_loc import WORST_K_LOC
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import as_made, create_or_resume_study, fill_budget, get_study, status, stored_spec
from ris_hpo.search.spec import RetrySpec, StopSpec, StudySpec, derived_seed
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.store.owner import Owner, this_process
from ris_hpo.store.tickets import TicketStorage
from ris_hpo.trials.context import Report, TrialEnvironment
from ris_hpo.trials.run import run_trial
from ris_hpo.workers import lost as lost_module
from ris_hpo.workers.events import Reason
from ris_hpo.workers.lost import LostTrials
from ris_hpo.workers.worker import WorkerJob, WorkerReport, run_worker

from .conftest import elsewhere, id_of, make_spec


def begin(store: Store, spec: StudySpec, n_trials: int, **options: Any) -> Study:
    study = create_or_resume_study(store, spec, score_version=1, **options)
    fill_budget(store, study, n_trials)
    return study


def work(
    store: Store, study: Study, folder: Path, stop: Callable[[], bool] = lambda: False, max_trials: int | None = None
) -> WorkerReport:
    job = WorkerJob(store.address, study.study_name, str(folder / "trials"), max_trials=max_trials)
    return run_worker(job, stop=stop)


def table(store: Store, study: Study) -> list[tuple[Any, ...]]:
    """What must not depend on stops and restarts."""
    return [
        (trial.number, trial.state.name, trial.values, trial.params, trial.intermediate_values)
        for trial in store.get_all_trials(id_of(store, study))
    ]


class CountedStop:
    """True from the n-th question on."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_study_ends_with_exactly_its_trials_and_once(store: Store, tmp_path: Path) -> None:
    study = begin(store, make_spec(), 12)
    report = work(store, study, tmp_path)
    assert (report.ended, report.reason) == (12, "done")
    counts = counting.tally(study.get_trials())
    assert counts.ended == 12
    assert counts.open == 0
    assert counts.pruned >= 4
    assert fill_budget(store, study, 12) == 0
    assert work(store, study, tmp_path).ended == 0
    assert fill_budget(store, study, 14) == 2
    assert work(store, study, tmp_path).ended == 2
    assert len(study.get_trials()) == 14


def test_the_base_configuration_is_first(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 1)
    work(sqlite_store, study, tmp_path)
    (trial,) = study.get_trials()
    assert trial.params == {"shape.x": 0.5, "shape.y": 3, "shape.kind": "plain"}
    assert trial.user_attrs[names.ORIGIN] == "base"


@pytest.mark.parametrize(
    "sampler", ["tpe", "random", "qmc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gp", "cmaes"))]
)
def test_one_worker_repeats_bit_for_bit(sampler: str, tmp_path: Path) -> None:
    tables = []
    for run in ("a", "b"):
        store = open_store(str(tmp_path / f"{run}.db"))
        study = begin(store, make_spec(sampler={"name": sampler, "startup": 3}), 9)
        work(store, study, tmp_path / run)
        tables.append(table(store, study))
        store.close()
    assert tables[0] == tables[1]
    points = {tuple(sorted(params.items())) for *_, params, _ in tables[0]}
    assert len(points) == 9


@pytest.mark.parametrize(
    "pruner", ["asha", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hyperband", "median"))]
)
def test_an_interrupted_study_has_the_undisturbed_table(pruner: str, tmp_path: Path) -> None:
    spec = make_spec(sampler={"name": "tpe", "startup": 3}, pruner={"name": pruner, "startup": 2})
    tables = []
    for run in ("whole", "broken"):
        store = open_store(str(tmp_path / f"{run}.db"))
        study = begin(store, spec, 8)
        if run == "broken":
            requeued = 0
            for questions in range(1, 160, 13):
                requeued += work(store, study, tmp_path / run, stop=CountedStop(questions)).requeued
            assert requeued >= 2
        work(store, study, tmp_path / run)
        tables.append(table(store, study))
        store.close()
    assert tables[0] == tables[1]
    assert any(state == "PRUNED" for _, state, *_ in tables[0])


def test_a_lost_trial_continues_from_its_checkpoint(store: Store, program: Program, tmp_path: Path) -> None:
    undisturbed = begin(store, make_spec("whole"), 6)
    work(store, undisturbed, tmp_path / "whole")
    study = begin(store, make_spec("broken"), 6)

    # a worker that dies in its third validation of trial 0: the checkpoint is there, the last report is not
    spec = stored_spec(study)
    owner = elsewhere()
    number = store.claim(id_of(store, study), str(owner))
    assert number is not None

    class KilledError(BaseException):
        pass

    def killed(event: object) -> None:
        if isinstance(event, Report) and event.step == 300:
            raise KilledError

    trials, study_id = tmp_path / "broken", id_of(store, study)
    environment = TrialEnvironment(store, study_id, spec, program, lambda number: trials / str(number), notify=killed)
    with pytest.raises(KilledError):
        run_trial(environment, number, owner)
    (running,) = study.get_trials(states=[TrialState.RUNNING])
    assert max(running.intermediate_values) == 300
    assert counting.fail_trial(store, study_id, running, Cause.LOST_WORKER, "gone", spec.retries, owner=str(owner))

    job = WorkerJob(store.address, "broken", directory=str(tmp_path / "broken"))
    run_worker(job)
    trials = study.get_trials()
    assert [trial.number for trial in trials if trial.state == TrialState.FAIL] == [0]
    successor = trials[-1]
    assert successor.number == 6
    assert successor.user_attrs[names.LINEAGE] == 0
    assert successor.user_attrs[names.RETRIES] == {"lost_worker": 1}
    counts = counting.tally(trials)
    assert (counts.ended, counts.open, counts.retried) == (6, 0, 1)
    whole = {trial.number: trial for trial in undisturbed.get_trials()}
    assert successor.params == whole[0].params
    assert successor.intermediate_values == whole[0].intermediate_values
    assert successor.value == whole[0].value


def test_rungs_of_a_retried_trial_count_once(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 3)
    work(sqlite_store, study, tmp_path, max_trials=1)
    trials = sqlite_store.get_all_trials(id_of(sqlite_store, study))
    rungs = [key for trial in trials for key in trial.system_attrs if key.startswith("completed_rung")]
    assert rungs
    successor = counting.successor_of(trials[0], Cause.LOST_WORKER, make_spec().retries)
    assert successor is not None
    assert successor.system_attrs == {}
    assert successor.intermediate_values == {}
    assert successor.params == trials[0].params


def test_a_trial_lost_before_its_parameters_draws_the_same_ones(sqlite_store: Store, tmp_path: Path) -> None:
    undisturbed = begin(sqlite_store, make_spec("whole"), 4)
    work(sqlite_store, undisturbed, tmp_path / "whole")
    study = begin(sqlite_store, make_spec("broken"), 4)
    for _ in range(2):  # trial 0 (the base configuration) and trial 1 (the sampler's) die with nothing done
        sqlite_store.claim(id_of(sqlite_store, study), str(elsewhere()))
        (running,) = study.get_trials(states=[TrialState.RUNNING])
        counting.fail_trial(
            sqlite_store, id_of(sqlite_store, study), running, Cause.LOST_WORKER, "gone", make_spec().retries
        )
    work(sqlite_store, study, tmp_path / "broken")
    whole = {trial.number: trial.params for trial in undisturbed.get_trials()}
    by_root = {
        trial.user_attrs.get(names.LINEAGE, trial.number): trial.params
        for trial in counting.live_trials(study.get_trials())
    }
    assert by_root == whole


def test_a_successor_that_is_lost_at_once_hands_everything_on(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(pruner={"name": "none"}), 3)
    assert work(sqlite_store, study, tmp_path, stop=CountedStop(14)).requeued == 1
    (begun,) = [trial for trial in study.get_trials() if trial.params and trial.state == TrialState.WAITING]
    for _ in range(3):  # claimed, lost before anything else, three times over
        sqlite_store.claim(id_of(sqlite_store, study), str(elsewhere()))
        (running,) = study.get_trials(states=[TrialState.RUNNING])
        assert running.params == begun.params
        counting.fail_trial(
            sqlite_store, id_of(sqlite_store, study), running, Cause.LOST_WORKER, "gone", make_spec().retries
        )
    work(sqlite_store, study, tmp_path)
    last = study.get_trials()[-1]
    assert (last.state, last.params) == (TrialState.COMPLETE, begun.params)
    assert last.user_attrs[names.LINEAGE] == begun.number
    assert replay(sqlite_store, "unit", last.number).identical


def test_a_line_ends_when_its_retries_are_spent(store: Store, tmp_path: Path) -> None:
    study = begin(store, make_spec(retries={"lost_worker": 2}), 1)
    for _ in range(3):
        store.claim(id_of(store, study), str(elsewhere()))
        (running,) = study.get_trials(states=[TrialState.RUNNING])
        counting.fail_trial(store, id_of(store, study), running, Cause.LOST_WORKER, "gone", stored_spec(study).retries)
    counts = counting.tally(study.get_trials())
    assert (counts.fail, counts.retried, counts.open) == (1, 2, 0)
    assert work(store, study, tmp_path).ended == 0


@pytest.mark.parametrize(
    ("cause", "inherited", "times", "left"),
    [
        (Cause.LOST_WORKER, 0, 1, 1),  # it made progress: the count starts anew
        (Cause.LOST_WORKER, 300, 0, 1),
        (Cause.LOST_WORKER, 300, 1, None),  # it got no further than the one before
        (Cause.OUT_OF_MEMORY, 0, 0, 1),
        (Cause.OUT_OF_MEMORY, 0, 1, None),  # progress is no excuse
        (Cause.BUG, 0, 0, None),
    ],
)
def test_progress_forgives_losses_alone(cause: Cause, inherited: int, times: int, left: int | None) -> None:
    retries = RetrySpec(lost_worker=1, out_of_memory=1)
    marks = {names.INHERITED_STEP: inherited, names.RETRIES: {cause.value: times}, names.LINEAGE: 4}
    trial = create_trial(state=TrialState.FAIL, intermediate_values={100: 2.0, 300: 1.0}, user_attrs=marks)
    successor = counting.successor_of(trial, cause, retries)
    assert (None if successor is None else successor.user_attrs[names.RETRIES][cause.value]) == left
    if successor is not None:
        assert (successor.user_attrs[names.INHERITED_STEP], successor.user_attrs[names.LINEAGE]) == (300, 4)


def test_a_late_owner_is_fenced_off(store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(store, make_spec(), 1)
    spec = stored_spec(study)
    study_id = id_of(store, study)
    late = elsewhere()
    number = store.claim(study_id, str(late))
    assert number is not None

    def declared_lost(event: object) -> None:
        if isinstance(event, Report) and event.step == 300:
            counting.fail_trial(store, study_id, study.get_trials()[number], Cause.LOST_WORKER, "silent", spec.retries)

    environment = TrialEnvironment(
        store, study_id, spec, program, lambda number: tmp_path / str(number), notify=declared_lost
    )
    outcome = run_trial(environment, number, late)
    assert outcome.state == "fenced"
    work(store, study, tmp_path)
    failed, successor = study.get_trials()
    assert failed.state == TrialState.FAIL
    assert max(failed.intermediate_values) == 300
    assert successor.state == TrialState.COMPLETE
    assert len(successor.intermediate_values) == 8


def test_a_worker_that_waits_does_not_lock_the_store(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(sqlite_store, make_spec(), 1)
    sqlite_store.claim(id_of(sqlite_store, study), str(elsewhere()))  # it runs somewhere, and may come back
    claims: list[tuple[object, ...]] = []
    monkeypatch.setattr(TicketStorage, "claim", lambda self, *claim: claims.append(claim))
    assert work(sqlite_store, study, tmp_path, stop=CountedStop(4)).reason is Reason.STOPPED
    assert claims == []


# -- causes ----------------------------------------------------------------------------------------------------------


def test_divergence_is_a_complete_trial_at_the_worst_score(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(base={"fault": "diverge"}), 2)
    work(sqlite_store, study, tmp_path)
    for trial in study.get_trials():
        assert (trial.state, trial.value) == (TrialState.COMPLETE, WORST_K_LOC)
        assert "covariance" in trial.user_attrs[names.DIVERGED]
    assert counting.best_trial(study.get_trials()) is None
    assert status(sqlite_store, "unit").best is None


@pytest.mark.parametrize(
    ("fault", "cause"), [("none", None), ("diverge", None), ("memory", Cause.OUT_OF_MEMORY), ("bug", Cause.BUG)]
)
def test_seconds_before_a_trial_was_put_back_count(
    fault: str, cause: Cause | None, sqlite_store: Store, tmp_path: Path
) -> None:
    study = begin(sqlite_store, make_spec(base={"fault": fault}), 1)
    (waiting,) = study.get_trials()
    sqlite_store.mark(id_of(sqlite_store, study), waiting.number, {names.SECONDS: 1000.0})
    work(sqlite_store, study, tmp_path)
    trial = study.get_trials()[0]
    assert trial.user_attrs.get(names.CAUSE) == cause
    assert 1000 < trial.user_attrs[names.SECONDS] < 1300


def test_a_score_that_is_not_finite_counts_as_the_worst(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(base={"fault": "nan"}, pruner={"name": "none"}), 1)
    work(sqlite_store, study, tmp_path)
    (trial,) = study.get_trials()
    values = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    assert values[-1] == WORST_K_LOC
    assert all(math.isfinite(value) for value in values)


def test_out_of_memory_is_retried_once_in_a_fresh_process(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(base={"fault": "memory"}), 1)
    assert work(sqlite_store, study, tmp_path).reason == "out_of_memory"
    assert work(sqlite_store, study, tmp_path).reason == "out_of_memory"
    assert work(sqlite_store, study, tmp_path).reason == "done"
    trials = study.get_trials()
    assert [trial.user_attrs[names.CAUSE] for trial in trials] == ["out_of_memory", "out_of_memory"]
    assert counting.tally(trials).fail == 1


def test_a_damaged_checkpoint_leads_to_the_same_curve_from_the_start(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 1)
    assert work(sqlite_store, study, tmp_path, stop=CountedStop(8)).requeued == 1
    checkpoint = tmp_path / "trials" / "0" / "checkpoint.json"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-40])
    work(sqlite_store, study, tmp_path)
    (trial,) = study.get_trials()
    assert trial.state == TrialState.COMPLETE
    assert replay(sqlite_store, "unit", 0).identical
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["0"]  # what was damaged is cleaned up by then


def test_a_full_disk_puts_the_trial_back(
    sqlite_store: Store, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(sqlite_store, make_spec(), 2)

    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["double"].Trainer, "_save", full)
        with pytest.raises(WorkerError, match=r"trial 0 was put back: OSError: .*No space left"):
            work(sqlite_store, study, tmp_path)
    assert counting.tally(study.get_trials()).waiting == 2
    work(sqlite_store, study, tmp_path)
    assert counting.tally(study.get_trials()).ended == 2


def test_a_bug_is_written_down_and_ends_the_worker(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(base={"fault": "bug"}), 10)
    report = work(sqlite_store, study, tmp_path)
    assert (report.reason, report.error) == (Reason.BUG, "ZeroDivisionError: a bug on order")
    (trial,) = study.get_trials(states=[TrialState.FAIL])
    assert trial.user_attrs[names.CAUSE] == Cause.BUG
    assert trial.user_attrs[names.ERROR] == "ZeroDivisionError: a bug on order"
    assert "double.py" in trial.user_attrs[names.TRACEBACK]
    assert counting.tally(study.get_trials()).waiting == 9  # and no successor: it would only fail again


# -- budgets, forks, warm starts -------------------------------------------------------------------------------------


def test_a_smaller_budget_withdraws_waiting_tickets(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 10)
    work(sqlite_store, study, tmp_path, max_trials=2)
    assert fill_budget(sqlite_store, study, 4) == 0
    work(sqlite_store, study, tmp_path)
    counts = counting.tally(study.get_trials())
    assert (counts.ended, counts.open, counts.fail) == (4, 0, 0)
    assert fill_budget(sqlite_store, study, 5) == 1
    work(sqlite_store, study, tmp_path)
    assert counting.tally(study.get_trials()).ended == 5


def test_another_space_is_refused_and_a_fork_offered(sqlite_store: Store, tmp_path: Path) -> None:
    first = begin(sqlite_store, make_spec(), 6)
    work(sqlite_store, first, tmp_path)
    other = make_spec(space={"shape.y": {"low": 1, "high": 5}})
    with pytest.raises(SpaceError, match=r"'space.shape.y' differs.*--fork unit-2"):
        create_or_resume_study(sqlite_store, other, score_version=1)
    with pytest.raises(SpaceError, match="version 1 of k_loc, this program has 2"):
        create_or_resume_study(sqlite_store, make_spec(), score_version=2)
    fork = begin(sqlite_store, other, 8, fork="unit-2")
    origins = [trial.user_attrs.get(names.ORIGIN) for trial in fork.get_trials()]
    assert origins[0] == "base"
    assert origins[1].startswith("warm-start unit#")
    assert fork.user_attrs[names.FORKED_FROM] == "unit"
    work(sqlite_store, fork, tmp_path / "fork")
    assert counting.tally(fork.get_trials()).ended == 8
    with pytest.raises(StudyError, match="exists already"):
        create_or_resume_study(sqlite_store, other, score_version=1, fork="unit-2")


def test_a_worker_refuses_a_study_of_another_score(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 2)
    study.set_user_attr(names.SCORE_VERSION, 99)
    with pytest.raises(SpaceError, match="version 99 of k_loc"):
        work(sqlite_store, study, tmp_path)
    assert counting.tally(study.get_trials()).waiting == 2


def test_base_values_that_options_named_are_remembered(sqlite_store: Store) -> None:
    named = {"shape.y": 5, "budget.scenes": 400}
    study = create_or_resume_study(sqlite_store, make_spec().with_base(named), score_version=1, named=list(named))
    plain = make_spec()
    assert as_made(sqlite_store, "unit", plain, []).base == {**plain.base, **named}
    assert as_made(sqlite_store, "unit", plain.with_base({"shape.y": 4}), ["shape.y"]).base["shape.y"] == 4
    assert as_made(sqlite_store, "other", plain, []) == plain
    again = create_or_resume_study(sqlite_store, as_made(sqlite_store, "unit", plain, []), score_version=1)
    assert id_of(sqlite_store, again) == id_of(sqlite_store, study)


def test_a_study_keeps_what_it_was_made_with(sqlite_store: Store) -> None:
    notes: list[str] = []
    first = begin(sqlite_store, make_spec(study={"seed": 5}, stop={"target": 1.5}), 2)
    other = make_spec(study={"seed": 6}, sampler={"name": "random"}, pruner={"reduction": 4})
    study = create_or_resume_study(sqlite_store, other, score_version=1, note=notes.append)
    assert stored_spec(study) == stored_spec(first)
    assert names.CHANGES not in study.user_attrs
    assert notes == [
        "study 'unit' keeps what it was made with: seed 5 (the file has 6), "
        'sampler.name "tpe" (the file has "random"), '
        "pruner.reduction 3 (the file has 4), stop.target 1.5 (the file has null)"
    ]


def test_a_resume_changes_what_is_named_and_records_it(sqlite_store: Store) -> None:
    begin(sqlite_store, make_spec(), 2)
    notes: list[str] = []
    named = {"sampler.name": "random", "stop.target": 1.5, "seed": 7}  # 7 is the seed that it has
    for _ in range(2):  # a second time there is nothing left to change
        study = create_or_resume_study(sqlite_store, make_spec(), changes=named, score_version=1, note=notes.append)
        spec = stored_spec(study)
        assert (spec.sampler.name, spec.stop.target, spec.sampler.startup) == ("random", 1.5, 5)
    recorded = [(change["key"], change["old"], change["new"]) for change in study.user_attrs[names.CHANGES]]
    assert recorded == [("sampler.name", "tpe", "random"), ("stop.target", None, 1.5)]
    assert all(change["time"] for change in study.user_attrs[names.CHANGES])
    changed = [sentence for sentence in notes if "from now on" in sentence]
    assert changed == [
        "study 'unit': sampler.name was 'tpe', is 'random' from now on",
        "study 'unit': stop.target was None, is 1.5 from now on",
    ]


def test_a_resume_takes_the_file_when_asked_to(sqlite_store: Store) -> None:
    begin(sqlite_store, make_spec(), 2)
    edited = make_spec(
        study={"seed": 6},
        sampler={"startup": 9},
        pruner={"warmup_scenes": 50},
        budget={"trial_timeout_s": 5.0, "n_trials": 9},
    )
    study = create_or_resume_study(sqlite_store, edited, update=True, score_version=1)
    spec = stored_spec(study)
    assert (spec.sampler.startup, spec.pruner.warmup_scenes, spec.budget.trial_timeout_s) == (9, 50, 5.0)
    assert (spec.seed, spec.budget.n_trials) == (7, 20)  # these have options of their own


def test_a_sampler_with_another_number_of_objectives_is_refused(sqlite_store: Store) -> None:
    study = begin(sqlite_store, make_spec(), 2)
    before = study.user_attrs
    with pytest.raises(SpaceError, match=r"minimises k_loc, the sampler nsga2 k_loc and parameters; add --fork"):
        create_or_resume_study(
            sqlite_store, make_spec(), changes={"sampler.name": "nsga2", "pruner.name": "none"}, score_version=1
        )
    assert get_study(sqlite_store, "unit").user_attrs == before


def test_joining_withdraws_nothing(sqlite_store: Store) -> None:
    spec = make_spec(budget={"n_trials": 4})
    study = create_or_resume_study(sqlite_store, spec, changes={"budget.n_trials": 8}, score_version=1)
    assert fill_budget(sqlite_store, study, 8) == 8
    joined = create_or_resume_study(sqlite_store, spec, score_version=1)
    assert fill_budget(sqlite_store, joined) == 0
    assert counting.tally(joined.get_trials()).waiting == 8
    # one that read the smaller total before it was raised
    assert counting.fill(sqlite_store, sqlite_store.get_study_id_from_name("unit"), 4, list, withdraw=False) == 0
    assert counting.tally(joined.get_trials()).waiting == 8


def test_a_trial_keeps_its_seed_when_the_study_gets_another(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 3)
    work(sqlite_store, study, tmp_path, max_trials=1)
    work(sqlite_store, study, tmp_path, stop=CountedStop(4))  # the second one goes back half-way
    create_or_resume_study(sqlite_store, make_spec(), changes={"seed": 8}, score_version=1)
    study = get_study(sqlite_store, "unit")
    halfway = study.get_trials()[1]
    assert halfway.state == TrialState.WAITING
    assert halfway.intermediate_values
    work(sqlite_store, study, tmp_path)
    seeds = [trial.user_attrs[names.SEED] for trial in study.get_trials()]
    assert seeds == [derived_seed(7, 0, "run"), derived_seed(7, 1, "run"), derived_seed(8, 2, "run")]
    for number in range(3):
        report = replay(sqlite_store, "unit", number)
        assert report.identical
        assert report.fingerprint_agrees


def test_a_base_that_a_new_default_would_change_is_refused(
    sqlite_store: Store, program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As after an upgrade: the study goes on as it was made, and a file that would mean something else is not taken."""
    study = begin(sqlite_store, make_spec(), 2)
    fields = program.config.model_fields
    shape = fields["shape"].default.replaced({"depth": 3})
    monkeypatch.setattr(fields["shape"], "default", shape)
    program.config.model_rebuild(force=True)
    try:
        assert program.config().shape.depth == 3
        with pytest.raises(
            SpaceError, match=r"made with shape.depth = 2, the default of this version is 3; .*--set shape"
        ):
            create_or_resume_study(sqlite_store, make_spec(), score_version=1)
        create_or_resume_study(sqlite_store, make_spec(base={"shape": {"depth": 2}}), score_version=1)
        work(sqlite_store, study, tmp_path)
        spec = stored_spec(study)
        base: Any = spec.config({})
        assert base.shape.depth == 2
    finally:
        monkeypatch.undo()
        program.config.model_rebuild(force=True)
    for trial in study.get_trials():
        assert spec.ran(trial.user_attrs[names.CONFIG_FINGERPRINT], trial.params, trial.number)


def test_unknown_studies_are_named_with_a_suggestion(sqlite_store: Store) -> None:
    with pytest.raises(StudyError, match="the store has none yet"):
        get_study(sqlite_store, "wide")
    begin(sqlite_store, make_spec("wide"), 1)
    with pytest.raises(StudyError, match="did you mean 'wide'"):
        get_study(sqlite_store, "wyde")
    with pytest.raises(StudyError, match="no study 'none' to start from"):
        create_or_resume_study(sqlite_store, make_spec("other"), score_version=1, warm_start="none")
    with pytest.raises(StudyError, match="not above 0"):
        fill_budget(sqlite_store, get_study(sqlite_store, "wide"), 0)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (StopSpec(target=3.0), "target"),
        (StopSpec(patience=2), "patience"),
        (StopSpec(gpu_hours=1e-9), "gpu_hours"),
        (StopSpec(timeout_s=3), "timeout"),
    ],
)
def test_stop_rules(rules: StopSpec, reason: str, sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 30)
    ended = 0
    while (found := counting.stop_reason(rules, study.get_trials(), seconds=ended)) is None:
        work(sqlite_store, study, tmp_path, max_trials=1)
        ended += 1
    assert found == reason
    assert 0 < ended < 30
    scores = [trial.value for trial in study.get_trials() if trial.state == TrialState.COMPLETE]
    match reason:
        case "target":
            assert min(scores) == scores[-1] <= 3.0
        case "patience":
            assert study.best_trial.number == ended - 3
        case "timeout":
            assert ended == 3


def ended_at(minute: int, state: TrialState, value: float | None = None) -> FrozenTrial:
    trial = create_trial(state=state, value=value)
    trial.datetime_complete = None if state == TrialState.RUNNING else datetime(2026, 3, 1, 12, minute)
    return trial


@pytest.mark.parametrize(
    ("rules", "direction", "reason"),
    [
        (StopSpec(patience=3), "minimize", "patience"),
        (StopSpec(patience=4), "minimize", None),
        (StopSpec(patience=1), "maximize", "patience"),
        (StopSpec(patience=2), "maximize", None),
        (StopSpec(target=1.0), "minimize", "target"),
        (StopSpec(target=0.9), "minimize", None),
        (StopSpec(target=4.0), "maximize", "target"),
        (StopSpec(target=4.1), "maximize", None),
    ],
)
def test_stop_rules_by_hand(rules: StopSpec, direction: Any, reason: str | None) -> None:
    """Of five that ended well the second is the least and the fourth the greatest; trials that failed do not count."""
    complete, pruned = TrialState.COMPLETE, TrialState.PRUNED
    trials = [
        ended_at(1, complete, 2.0), ended_at(2, complete, 1.0), ended_at(3, pruned), ended_at(4, complete, 4.0),
        ended_at(5, complete, 3.0), ended_at(6, TrialState.FAIL), ended_at(7, TrialState.RUNNING),
    ]  # fmt: skip
    assert counting.stop_reason(rules, trials, 0.0, direction) == reason


@pytest.mark.parametrize("name", ["../up", "/tmp/x", "a/b", "..", ".hidden", "two words", "x" * 65, "line\n"])
def test_a_name_that_leads_elsewhere_is_refused(name: str, sqlite_store: Store) -> None:
    with pytest.raises(StudyError, match="folders are called by it"):
        create_or_resume_study(sqlite_store, make_spec(), name=name, score_version=1)
    sqlite_store.create_new_study([optuna.study.StudyDirection.MINIMIZE], name)  # made by somebody else
    with pytest.raises(StudyError, match="folders are called by it"):
        stored_spec(get_study(sqlite_store, name))


def test_two_objectives_under_nsga2(sqlite_store: Store, tmp_path: Path) -> None:
    spec = make_spec(sampler={"name": "nsga2", "population": 4}, pruner={"name": "none"})
    study = begin(sqlite_store, spec, 6)
    work(sqlite_store, study, tmp_path)
    trials = study.get_trials()
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert all(trial.values[1] == 1000 * trial.params.get("shape.depth", 2) for trial in trials)
    assert all(len(trial.intermediate_values) == 8 for trial in trials)
    assert study.metric_names == ["k_loc", "parameters"]


# -- lost trials, replay ---------------------------------------------------------------------------------------------


def test_lost_trials_are_found_by_owner_and_by_heartbeat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study = begin(store, make_spec(), 4)
    study_id = id_of(store, study)
    here = this_process()
    store.claim(study_id, str(Owner(here, 0)))  # this process: alive
    store.claim(study_id, str(Owner(replace(here, start=f"{here.start}1"), 0)))  # its number was used before: gone
    silent = store.claim(study_id, str(elsewhere()))  # another host, no heartbeat yet
    store.claim(study_id, str(elsewhere(2)))
    clock, silents = [1000.0], dict.fromkeys([silent])
    monkeypatch.setattr(lost_module.time, "monotonic", lambda: clock[0])
    beats = lambda self, study_id: {**dict.fromkeys(range(4), clock[0]), **silents}  # noqa: E731
    monkeypatch.setattr(type(store), "heartbeats", beats)
    lost = LostTrials(store, study_id, make_spec().retries)
    assert lost.recover() == [1]
    clock[0] += 3600  # this process slept, or the server was away: an hour of silence that nobody could have broken
    assert lost.recover() == []
    clock[0] += 10
    assert lost.recover() == []
    silents[silent] = 7.0  # a beat at last; how old it is by any clock says nothing
    clock[0] += 10
    assert lost.recover() == []
    for found in ([], [], [2]):
        clock[0] += 10
        assert lost.recover() == found
    assert [trial.user_attrs.get(names.PREDECESSOR) for trial in store.get_all_trials(study_id)][4:] == [1, 2]


def test_replay_compares_step_by_step(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 5)
    work(sqlite_store, study, tmp_path)
    pruned = next(trial for trial in study.get_trials() if trial.state == TrialState.PRUNED)
    for number in (0, pruned.number):
        report = replay(sqlite_store, "unit", number)
        assert report.identical
        assert report.fingerprint_agrees
        assert len(report.steps) == len(study.get_trials()[number].intermediate_values)
    with pytest.raises(StudyError, match="has no trial 99"):
        replay(sqlite_store, "unit", 99)


def test_status_is_one_summary(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, make_spec(), 6)
    work(sqlite_store, study, tmp_path, max_trials=5)
    found = status(sqlite_store, "unit").as_dict()
    states = Counter(trial.state.name.lower() for trial in study.get_trials())
    assert found["study"] == "unit"
    assert {key: found["trials"][key] for key in ("complete", "pruned", "fail", "running", "waiting")} == {
        key: states.get(key, 0) for key in ("complete", "pruned", "fail", "running", "waiting")
    }
    best: FrozenTrial = study.best_trial
    assert (found["best"]["number"], found["best"]["k_loc"], found["best"]["floor"]) == (best.number, best.value, 1.0)
    assert found["best"]["pipeline_k_loc"] == pytest.approx(best.value - 0.3)
