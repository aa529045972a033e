"""Promotion: trials paused at rungs and taken up again; the rule, exact lines and curves, deaths, two workers."""

from __future__ import annotations

import itertools
import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from ris_hpo.errors import ConfigError, SpaceError
from ris_hpo.programs.program import Program, TrialContext, load_program
from ris_hpo.report.collect import collect
from ris_hpo.results.replay import replay
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, stored_spec, top_up
from ris_hpo.search.rungs import as_samplers_see, next_promotion
from ris_hpo.search.spec import PrunerSpec, StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store, ticket
from ris_hpo.store.open import open_store
from ris_hpo.store.owner import Owner
from ris_hpo.store.standings import Standing
from ris_hpo.trials.context import TrialEnvironment
from ris_hpo.trials.run import Outcome, run_trial
from tests.properties import examples

from . import double
from .conftest import DOUBLE, IMPORTABLE, elsewhere, id_of, make_spec
from .pools import same_curves, slow_base, supervisor_of
from .test_trials import CountedStop, begin, work

LAST = 1600
RUNGS = [400, 800]


def halving(name: str = "unit", **changes: Any) -> StudySpec:
    settings: dict[str, Any] = {
        "base": {"budget": {"scenes": LAST, "validate_every": 400}},
        "pruner": {"name": "promotion", "first_scenes": 400, "reduction": 2},
        "sampler": {"name": "random"},
    }
    return make_spec(name, **{**settings, **changes})


def undisturbed(spec: StudySpec, trial: FrozenTrial, folder: Path) -> dict[int, float]:
    """The curve of a line that runs from its first step to its last without a pause."""
    root = counting.lineage_root(trial)
    config = spec.config(trial.params, root)
    context = TrialContext(config.model_dump(mode="json"), folder, seed=spec.trial_seed(root))
    load_program(DOUBLE).train(context)
    return context.scores


def whole_lines(store: Store, study: Study) -> dict[int, list[FrozenTrial]]:
    lines: dict[int, list[FrozenTrial]] = {}
    for trial in store.get_all_trials(id_of(store, study)):
        lines.setdefault(counting.lineage_root(trial), []).append(trial)
    return lines


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "report", "last", "reduction", "steps"),
    [
        (2048, 1024, 131_072, 4, [2048, 8192, 32_768]),
        (None, 1024, 6144, 3, [2048]),
        (100, 50, 1000, 3, [112, 334]),  # rounded up: a rung is the first report at or above its step
        (7, 1, None, 3, [7, 21, 63]),
        (100, 100, 100, 2, []),
        (1, 2, 8, 2, [2, 4]),  # none before the first report
    ],
)
def test_rungs_divide_the_length_of_a_trial(
    first: int | None, report: int, last: int | None, reduction: int, steps: list[int]
) -> None:
    pruner = PrunerSpec(name="promotion", first_scenes=first, reduction=reduction)
    assert pruner.rung_steps(report, last, 3) == steps


@dataclass
class Model:
    """Lines as promotion sees them, moved by events in any order; scores are drawn when a rung is reached."""

    spec: StudySpec
    rungs: int
    trials: list[Standing]

    @classmethod
    def of(cls, lines: int, rungs: int, reduction: int) -> Model:
        spec = halving(pruner={"name": "promotion", "reduction": reduction})
        return cls(spec, rungs, [Standing(number, TrialState.WAITING, {}) for number in range(lines)])

    def put(self, number: int, state: TrialState, **marks: Any) -> None:
        self.trials[number] = Standing(number, state, {**self.trials[number].user_attrs, **marks})

    def running(self) -> list[int]:
        return [trial.number for trial in self.trials if trial.state == TrialState.RUNNING]

    def claim(self) -> int | None:
        chosen = next_promotion(self.trials, self.spec)
        if chosen is None:
            waiting = [t.number for t in self.trials if t.state == TrialState.WAITING and not counting.is_paused(t)]
            chosen = min(waiting, default=None)
        if chosen is not None:
            self.put(chosen, TrialState.RUNNING, paused=None)
        return chosen

    def arrive(self, number: int, score: float) -> None:
        reached = [*self.trials[number].user_attrs.get(names.RUNGS, []), score]
        if len(reached) > self.rungs:
            self.put(number, TrialState.COMPLETE)
        else:
            self.put(number, TrialState.WAITING, rungs=reached, paused=len(reached) - 1)

    def die(self, number: int) -> None:
        marks = {**self.trials[number].user_attrs, names.PREDECESSOR: number}
        self.put(number, TrialState.FAIL, cause=Cause.LOST_WORKER.value)
        self.trials.append(Standing(len(self.trials), TrialState.WAITING, marks))

    def rung_of(self, number: int) -> int:
        return len(self.trials[number].user_attrs.get(names.RUNGS, [])) - 1


@examples(60)
@given(st.data())
def test_any_order_of_events_promotes_the_best_of_each_rung(data: st.DataObject) -> None:
    lines, reduction = data.draw(st.integers(1, 9), "lines"), data.draw(st.integers(2, 4), "reduction")
    model = Model.of(lines, rungs=3, reduction=reduction)
    workers, deaths = data.draw(st.integers(1, 3), "workers"), data.draw(st.integers(0, 4), "deaths")
    for _ in itertools.count():
        running = model.running()
        if len(running) < workers:
            before = list(model.trials)
            number = model.claim()
            if number is not None and counting.is_paused(before[number]):
                rung = model.rung_of(number)
                live = counting.live_trials(before)
                reached = [t for t in live if len(t.user_attrs.get(names.RUNGS, [])) > rung]
                own = before[number].user_attrs[names.RUNGS][rung]
                better = [t for t in reached if t.user_attrs[names.RUNGS][rung] < own]
                resting = all(t.state.is_finished() or counting.is_paused(t) for t in live)
                assert len(better) < len(reached) // reduction or resting
            if number is not None:
                continue
        if not running:
            break
        number = data.draw(st.sampled_from(running), "which")
        if deaths and data.draw(st.booleans(), "dies"):
            deaths -= 1
            model.die(number)
        else:
            model.arrive(number, data.draw(st.floats(0, 7), "score"))
    live = counting.live_trials(model.trials)
    assert len(live) == lines
    assert all(trial.state == TrialState.COMPLETE or counting.is_paused(trial) for trial in live)
    assert any(trial.state == TrialState.COMPLETE for trial in live)
    for rung in range(3):
        reached = sorted(
            (t.user_attrs[names.RUNGS][rung], t.number) for t in live if len(t.user_attrs.get(names.RUNGS, [])) > rung
        )
        for _, number in reached[: len(reached) // reduction]:  # the best of each rung are gone from it
            assert model.trials[number].user_attrs[names.PAUSED] != rung


def test_a_better_score_may_be_the_higher_one() -> None:
    model = Model.of(2, rungs=1, reduction=2)
    model.spec = model.spec.replaced({"direction": "maximize"})
    for number, score in ((0, 1.0), (1, 2.0)):
        model.put(number, TrialState.RUNNING)
        model.arrive(number, score)
    assert next_promotion(model.trials, model.spec) == 1


# -- one worker --------------------------------------------------------------------------------------------------------


def test_lines_pause_go_on_and_give_the_curves_of_runs_without_a_pause(store: Store, tmp_path: Path) -> None:
    spec = halving()
    study = begin(store, spec, 6)
    assert work(store, study, tmp_path).reason == "done"
    trials = study.get_trials()
    assert len(trials) == 6  # a promoted trial is the same trial in every view
    counts = counting.tally(trials)
    assert (counts.open, counts.at_rest, counts.asked_for) == (0, 6, 6)
    lengths = [max(trial.intermediate_values) for trial in trials]
    assert set(lengths) == {*RUNGS, LAST}
    assert (lengths.count(400), lengths.count(LAST)) == (counts.paused - lengths.count(800), counts.complete)
    for trial in trials:
        whole = undisturbed(spec, trial, tmp_path / f"whole-{trial.number}")
        assert trial.intermediate_values == {step: whole[step] for step in trial.intermediate_values}
        assert trial.user_attrs[names.RUNGS] == [whole[step] for step in RUNGS if step in trial.intermediate_values]
        promotions = {400: 0, 800: 1, LAST: 2}[max(trial.intermediate_values)]
        assert len(trial.user_attrs.get(names.PROMOTED_AT, [])) == promotions
    by_score = sorted(trials, key=lambda trial: trial.intermediate_values[400])
    assert all(max(trial.intermediate_values) > 400 for trial in by_score[:3])


def test_no_step_is_trained_twice(sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOUBLE_JOURNAL", str(tmp_path / "journal"))
    study = begin(sqlite_store, halving(), 6)
    work(sqlite_store, study, tmp_path)
    steps = [tuple(line.split()[1:3]) for line in (tmp_path / "journal").read_text().splitlines()]
    assert len(steps) == len(set(steps)) == sum(len(trial.intermediate_values) for trial in study.get_trials())


def test_a_study_goes_on_the_next_day_with_more_trials(sqlite_store: Store, tmp_path: Path) -> None:
    spec = halving(pruner={"name": "promotion", "reduction": 4})
    study = begin(sqlite_store, spec, 3)
    work(sqlite_store, study, tmp_path)
    states = [trial.state for trial in study.get_trials()]
    assert states.count(TrialState.COMPLETE) == 1  # no rung has four lines, and a study ends with a result
    assert work(sqlite_store, study, tmp_path).ended == 0  # at rest: without more trials nothing is promoted
    again = open_store(sqlite_store.address)
    resumed = create_or_resume_study(again, spec, score_version=1)
    poor = {"shape.x": 1.0, "shape.y": 9, "shape.kind": "plain"}  # five of which let the second best of before go on
    again.fill(id_of(again, resumed), lambda present: [ticket(poor) for _ in range(5)])
    work(again, resumed, tmp_path)
    trials = resumed.get_trials()
    assert len(trials) == counting.tally(trials).at_rest == 8
    assert [trial.state for trial in trials[:3]].count(TrialState.COMPLETE) == 2
    for trial in trials[:3]:
        whole = undisturbed(spec, trial, tmp_path / f"whole-{trial.number}")
        assert trial.intermediate_values == {step: whole[step] for step in trial.intermediate_values}
    again.close()


def test_fewer_trials_withdraw_no_paused_one(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, halving(), 4)
    work(sqlite_store, study, tmp_path, max_trials=2)
    fill_budget(sqlite_store, study, 2)
    counts = counting.tally(study.get_trials())
    assert (counts.asked_for, counts.waiting) == (2, 0)
    assert counts.paused >= 1


def test_lines_replay_digit_for_digit(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, halving(), 4)
    work(sqlite_store, study, tmp_path)
    for trial in study.get_trials():
        assert replay(sqlite_store, "unit", trial.number).identical


def test_a_stop_half_way_changes_nothing(tmp_path: Path) -> None:
    tables = []
    for run in ("whole", "broken"):
        store = open_store(str(tmp_path / f"{run}.db"))
        study = begin(store, halving(), 6)
        questions = 3
        while run == "broken" and work(store, study, tmp_path / run, CountedStop(questions)).reason == "stopped":
            questions += 3
        work(store, study, tmp_path / run)
        tables.append([(t.number, t.state, t.params, t.intermediate_values, t.values) for t in study.get_trials()])
        store.close()
    assert tables[0] == tables[1]


def test_a_program_without_a_plan_has_rungs_too(sqlite_store: Store, tmp_path: Path) -> None:
    spec = halving(study={"program": f"{__name__}:endless"}, base={}, pruner={"name": "promotion", "first_scenes": 2})
    study = begin(sqlite_store, spec, 3)
    work(sqlite_store, study, tmp_path)
    assert sorted(max(trial.intermediate_values) for trial in study.get_trials()) == [2, 2, 12]


def endless(trial: TrialContext) -> float | None:
    saved = trial.saved("step.json")
    step = 0 if saved is None else json.loads(saved.read_text())
    while step < 12:
        step += 1
        is_over = trial.report(step, trial.config["shape"]["x"] / step)
        with trial.saving("step.json") as path:
            path.write_text(json.dumps(step))
        if is_over:
            return None
    return None


@pytest.mark.parametrize(("last", "paused_at"), [(12, [1, 3]), (3, [1])])
def test_rungs_stay_where_they_were_planned(
    last: int, paused_at: list[int], sqlite_store: Store, tmp_path: Path
) -> None:
    """Nine steps are planned, with rungs at 1 and 3. Were there twelve, they would be at 1, 2 and 4."""

    def train(trial: TrialContext) -> float | None:
        saved = trial.saved("step.json")
        for step in range(1 if saved is None else json.loads(saved.read_text()) + 1, last + 1):
            trial.plan(1, 9)
            trial.replan(last)
            is_over = trial.report(step, 1.0)
            with trial.saving("step.json") as path:
                path.write_text(json.dumps(step))
            if is_over:
                return None
        return None

    spec = halving(pruner={"name": "promotion", "first_scenes": 1, "reduction": 3})
    study = begin(sqlite_store, spec, 1)
    study_id, steps = id_of(sqlite_store, study), []
    environment = TrialEnvironment(
        sqlite_store, study_id, spec, Program(train, double.RunConfig), lambda number: tmp_path / str(number)
    )
    while sqlite_store.claim(study_id, str(elsewhere()), lambda trials: next_promotion(trials, spec)) is not None:
        run_trial(environment, 0, elsewhere())
        steps.append(max(study.get_trials()[0].intermediate_values))
    assert steps == [*paused_at, last]  # and complete at the end as it turned out
    assert study.get_trials()[0].state == TrialState.COMPLETE


SCALED = Program(
    double.train,
    double.RunConfig,
    length="budget.scenes",
    interval="budget.validate_every",
    cost=lambda config: float(config.shape.depth),
)


def test_trials_of_equal_compute_have_their_rungs_at_the_same_reports(sqlite_store: Store, tmp_path: Path) -> None:
    changes = {"study": {"program": f"{__name__}:SCALED"}, "pruner": {"name": "promotion", "reduction": 2}}
    spec = halving(budget={"equal": "compute"}, **changes)
    lengths = {
        depth: spec.config({"shape.kind": "fancy", "shape.depth": depth}).budget.model_dump() for depth in (1, 2, 3, 4)
    }
    assert {depth: (each["validate_every"], each["scenes"]) for depth, each in lengths.items()} == {
        1: (800, 3200),
        2: (400, 1600),  # the base's cost
        3: (267, 1068),
        4: (200, 800),
    }
    study = create_or_resume_study(sqlite_store, spec, score_version=1)
    tickets = [ticket({"shape.x": 0.3, "shape.y": 4, "shape.kind": "fancy", "shape.depth": d}) for d in (1, 2, 3, 4)]
    sqlite_store.fill(id_of(sqlite_store, study), lambda present: tickets)
    work(sqlite_store, study, tmp_path)
    for trial in study.get_trials():
        depth = trial.params["shape.depth"]
        reports = sorted(trial.intermediate_values)
        assert reports == [lengths[depth]["validate_every"] * n for n in (1, 2, 3, 4)][: len(reports)]
        assert len(reports) in (1, 2, 4)  # paused after one report or two, or complete
    assert any(len(trial.intermediate_values) == 4 for trial in study.get_trials())


def test_equal_compute_asks_for_a_count() -> None:
    with pytest.raises(ConfigError, match="states its length, interval and cost"):
        halving(budget={"equal": "compute"}, pruner={"name": "promotion"}).config({})
    with pytest.raises(SpaceError, match=r"leave pruner\.first_scenes out"):
        halving(budget={"equal": "compute"})


# -- what others see ---------------------------------------------------------------------------------------------------


def test_samplers_learn_from_rungs(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, halving(), 6)
    work(sqlite_store, study, tmp_path)
    stored = study.get_trials()
    shown = as_samplers_see(stored)
    assert [trial.state for trial in stored] != [trial.state for trial in shown]
    for trial, seen in zip(stored, shown, strict=True):
        if counting.is_paused(trial):
            rung = trial.user_attrs[names.PAUSED]
            score = trial.user_attrs[names.RUNGS][rung]
            assert (seen.state, seen.intermediate_values) == (TrialState.PRUNED, {rung: score})
            assert trial.state == TrialState.WAITING  # the stored one is left alone
        else:
            assert seen is trial


def test_a_model_is_fitted_from_trials_at_rungs(sqlite_store: Store, tmp_path: Path) -> None:
    tables = []
    for name, startup in (("modelled", 2), ("drawn", 100)):
        study = begin(sqlite_store, halving(name, sampler={"name": "tpe", "startup": startup}), 5)
        work(sqlite_store, study, tmp_path / name, max_trials=5)
        trials = study.get_trials()
        assert counting.tally(trials).complete < 2  # so few alone would leave the draws random
        tables.append([trial.params for trial in trials])
    assert tables[0][:2] == tables[1][:2]
    assert tables[0][3] != tables[1][3]


def test_the_report_has_paused_trials(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, halving(), 6)
    work(sqlite_store, study, tmp_path)
    report = collect(study, with_importances=False)
    assert [trial.state for trial in report.trials].count("paused") == report.counts["paused"] > 0
    compared = report.comparison
    assert (compared.step, len(compared.values), compared.paused) == (400, 6, report.counts["paused"])


def test_rungs_of_a_study_do_not_change(sqlite_store: Store) -> None:
    begin(sqlite_store, halving(), 2)
    with pytest.raises(SpaceError, match=r"rungs with promotion from 400 by 2.*, and cannot go on with no rungs"):
        create_or_resume_study(sqlite_store, halving(), changes={"pruner.name": "asha"}, score_version=1)
    with pytest.raises(SpaceError, match="by 3"):
        create_or_resume_study(sqlite_store, halving(), changes={"pruner.reduction": 3}, score_version=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": {"name": "gp"}}, "gp learns from completed trials alone"),
        ({"pruner": {"name": "promotion", "patience": 2}}, "promotion pauses them"),
    ],
)
def test_what_does_not_go_with_promotion_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        halving(**changes)


# -- deaths and several workers, on a store ----------------------------------------------------------------------------


class Killed(BaseException):
    """The worker is gone: nothing of it runs any more, and its trial is left as it is."""


def attempt(store: Store, study: Study, folder: Path, claim: int, lives: int | None = None) -> Outcome | None:
    """One worker: claim a trial and run it, or die before the n-th step or pause. None: no trial, or dead."""
    spec, study_id = stored_spec(study), id_of(store, study)
    owner = elsewhere(claim=claim)
    number = store.claim(study_id, str(owner), lambda trials: next_promotion(trials, spec))
    if number is None:
        return None
    left = itertools.count(-1 if lives is None else lives, -1)

    def live(*_: Any) -> bool:
        if next(left) == 0:
            raise Killed
        return False

    def release(*arguments: Any) -> bool:
        return live() or Store.release(store, *arguments)

    directory = lambda each: folder / str(each)  # noqa: E731
    environment = TrialEnvironment(store, study_id, spec, load_program(DOUBLE), directory, stop=live)
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(store, "release", release)
        return run_trial(environment, number, owner)
    return None


@examples(4)
@given(deaths=st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=6), late=st.booleans())
def test_deaths_cost_neither_lines_nor_digits(
    deaths: list[int | None], late: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Workers die at any step, before or after any rung; successors go on. Two supervisors may find the same death."""
    folder = tmp_path_factory.mktemp("promotion")
    store = open_store(str(folder / "studies.db"))
    spec = halving(retries={"lost_worker": 9})
    study = begin(store, spec, 4)
    study_id = id_of(store, study)
    plan = itertools.chain(deaths, itertools.repeat(None))
    for claim, lives in enumerate(plan):
        trials = store.get_all_trials(study_id)
        if counting.tally(trials).open == 0 and next_promotion(trials, spec) is None:
            break
        attempt(store, study, folder / "trials", claim, lives)
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            owner = trial.user_attrs[names.OWNER]
            found = [
                counting.fail_trial(store, study_id, trial, Cause.LOST_WORKER, "gone", spec.retries, owner=owner)
                for _ in range(2)
            ]
            assert found[0]
            if late:  # what a worker that was only silent would still do
                assert not store.release(study_id, trial.number, owner + "0", {names.PAUSED: 0})
    lines = whole_lines(store, study)
    assert len(lines) == 4
    counts = counting.tally(study.get_trials())
    assert (counts.asked_for, counts.open, counts.fail) == (4, 0, 0)
    assert counts.complete >= 1
    for root, line in lines.items():
        whole = undisturbed(spec, line[0], folder / f"whole-{root}")
        for trial in line:
            assert trial.intermediate_values == {step: whole[step] for step in trial.intermediate_values}
        last = line[-1]
        assert list(last.intermediate_values) == sorted(whole)[: len(last.intermediate_values)]  # and no gap
        expected = [whole[step] for step in RUNGS if step <= max(last.intermediate_values)]
        assert last.user_attrs[names.RUNGS] == expected
    store.close()


def test_two_workers_promote_a_trial_once(store: Store, tmp_path: Path) -> None:
    """Each sees the same trial at the top of its rung; the second gets another one, or a new one."""
    spec = halving()
    study = begin(store, spec, 4)
    study_id = id_of(store, study)
    for claim in range(2):
        attempt(store, study, tmp_path / "trials", claim)
    other = open_store(store.address)
    numbers = [
        each.claim(study_id, str(elsewhere(pid, 7)), lambda trials: next_promotion(trials, spec))
        for pid, each in ((1, store), (2, other), (1, store))
    ]
    assert numbers[0] in (0, 1)  # the better of two
    assert numbers[1] == 2
    assert numbers[2] == numbers[0]  # the claim of before, repeated
    other.close()


@pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.slow])], indirect=True
)
def test_a_promoted_trial_outlives_kill_9(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", IMPORTABLE)
    base = slow_base(LAST, pause_s=0.1)
    study = begin(store, halving(base={**base, "budget": {"scenes": LAST, "validate_every": 400}}), 4)
    supervisor, killed = supervisor_of(store, study, tmp_path, workers=2), None
    for _ in supervisor.run(interval=0.05):
        running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        promoted = next((trial for trial in running if trial.user_attrs.get(names.RUNGS)), None)
        owner = None if promoted is None else Owner.parse(promoted.user_attrs.get(names.OWNER))
        if killed is None and owner is not None:
            killed = promoted
            os.kill(owner.process.pid, signal.SIGKILL)
    assert supervisor.ending == "finished"
    assert killed is not None
    trials = study.get_trials()
    counts = counting.tally(trials)
    assert (counts.asked_for, counts.open, counts.fail, counts.retried) == (4, 0, 0, 1)
    successor = next(trial for trial in trials if trial.user_attrs.get(names.PREDECESSOR) == killed.number)
    handed_on = killed.user_attrs[names.RUNGS]
    assert successor.user_attrs[names.RUNGS][: len(handed_on)] == handed_on
    same_curves(store, study)


# -- hours -------------------------------------------------------------------------------------------------------------


def test_hours_are_core_hours_and_gpu_hours() -> None:
    marks = [
        {names.SECONDS: 1800.0, names.THREADS: 4, names.DEVICE: "cpu"},
        {names.SECONDS: 3600.0, names.THREADS: 8, names.DEVICE: "cuda:0"},
        {names.SECONDS: 900.0},
        {},
    ]
    assert counting.spent_hours([create_trial(state=TrialState.FAIL, user_attrs=each) for each in marks]) == 3.25


def test_a_budget_of_hours_is_topped_up_and_ends(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", IMPORTABLE)
    spec = halving(budget={"hours": 3.0 / 3600}, base=slow_base(LAST, pause_s=0.2))
    study = create_or_resume_study(sqlite_store, spec, score_version=1)
    assert fill_budget(sqlite_store, study) == 1
    assert fill_budget(sqlite_store, study) == 0
    supervisor = supervisor_of(sqlite_store, study, tmp_path, workers=2, heartbeat=1)
    list(supervisor.run(interval=0.1))
    assert supervisor.ending == "hours"
    trials = study.get_trials()
    assert counting.spent_hours(trials) >= 3.0 / 3600
    assert not any(map(counting.is_untouched, trials))  # those that nobody had begun are gone
    counts = counting.tally(trials)
    assert counts.running == 0
    assert counts.waiting + counts.at_rest >= 2
    before = len(trials)
    again = supervisor_of(sqlite_store, study, tmp_path, workers=1)
    list(again.run())
    assert (again.ending, len(study.get_trials())) == ("hours", before)


def test_a_finite_space_is_topped_up_to_its_end(sqlite_store: Store) -> None:
    space = {"shape.y": {"low": 1, "high": 3}}
    spec = halving(budget={"hours": 1.0}).replaced({"space": space})
    study = create_or_resume_study(sqlite_store, spec, score_version=1)
    study_id = id_of(sqlite_store, study)
    fill_budget(sqlite_store, study)
    assert [top_up(sqlite_store, study_id, spec, 2), top_up(sqlite_store, study_id, spec, 9)] == [1, 1]
    assert top_up(sqlite_store, study_id, spec, 9) == 0
