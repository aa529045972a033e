"""How one trial runs and ends: what it reports, what its end costs, and what must not change its end."""

from __future__ import annotations

import errno
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from optuna.pruners import BasePruner
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ris_hpo.errors import StoreError
from ris_hpo.programs.program import REPORTS, Program, TrialContext
from ris_hpo.scoring.k_loc import WORST_K_LOC
from ris_hpo.search import counting
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, status, stored_spec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.trials import context as context_module
from ris_hpo.trials import heartbeat as heartbeat_module
from ris_hpo.trials.context import Report, Scoring, Started, TrialEnvironment
from ris_hpo.trials.journal import Journal
from ris_hpo.trials.run import Outcome, UnfitHostError, run_trial

from . import double
from .conftest import elsewhere, id_of, make_spec


def begin(store: Store, n_trials: int = 1, **changes: Any) -> Study:
    study = create_or_resume_study(store, make_spec(**changes), score_version=1)
    fill_budget(store, study, n_trials)
    return study


def attempt(store: Store, study: Study, program: Program, folder: Path, pid: int = 1, **options: Any) -> Outcome:
    """Claim the next trial as another machine's process, and run it here."""
    owner = elsewhere(pid)
    number = store.claim(id_of(store, study), str(owner))
    assert number is not None
    environment = TrialEnvironment(
        store, id_of(store, study), stored_spec(study), program, lambda number: folder / str(number), **options
    )
    return run_trial(environment, number, owner)


def declare_lost(store: Store, study: Study, trial: FrozenTrial) -> None:
    retries = stored_spec(study).retries
    assert counting.fail_trial(store, id_of(store, study), trial, Cause.LOST_WORKER, "gone", retries)


# -- reports ---------------------------------------------------------------------------------------------------------


def test_a_trial_tells_each_step_of_its_way(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, pruner={"name": "none"})
    told: list[object] = []
    outcome = attempt(sqlite_store, study, program, tmp_path, notify=told.append)
    assert told[0] == Started(0, 0.0)
    assert [event.step for event in told[1:-1] if isinstance(event, Report)] == list(range(100, 900, 100))
    assert told[-1] == Scoring(0)  # before the end is scored, since that may take longer than any validation
    (trial,) = study.get_trials()
    assert outcome == Outcome("complete", 0, value=trial.value)
    assert trial.user_attrs[names.HOST] == "elsewhere"  # the owner's word, not this machine's


class Verdicts(BasePruner):
    """Prunes at the given steps, and notes at which it was asked."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.asked: list[int | None] = []

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        self.asked.append(trial.last_step)
        return trial.last_step in self.steps


@pytest.mark.parametrize(
    ("verdicts", "state", "last"),
    [((100, 200), "complete", 800), ((300,), "pruned", 300), ((500,), "pruned", 500), ((800,), "complete", 800)],
)
def test_a_verdict_on_a_step_that_was_trained_past_is_not_obeyed(
    verdicts: tuple[int, ...],
    state: str,
    last: int,
    sqlite_store: Store,
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = begin(sqlite_store)

    class KilledError(BaseException):
        pass

    def killed(event: object) -> None:
        if isinstance(event, Report) and event.step == 300:
            raise KilledError

    monkeypatch.setattr(context_module, "build_pruner", lambda *args, **options: Verdicts())
    with pytest.raises(KilledError):
        attempt(sqlite_store, study, program, tmp_path, notify=killed)
    (lost,) = study.get_trials(states=[TrialState.RUNNING])
    declare_lost(sqlite_store, study, lost)

    pruner = Verdicts(*verdicts)
    monkeypatch.setattr(context_module, "build_pruner", lambda *args, **options: pruner)
    outcome = attempt(sqlite_store, study, program, tmp_path, pid=2)
    assert (outcome.state, outcome.number) == (state, 1)
    assert pruner.asked == list(range(100, last + 100, 100))  # of its history too: that enters it in the competition
    assert max(study.get_trials()[1].intermediate_values) == last


@pytest.mark.parametrize(
    ("last", "verdict", "state"), [(3, 3, "complete"), (4, 3, "pruned"), (4, 4, "complete"), (2, 2, "complete")]
)
def test_a_verdict_is_not_obeyed_at_the_last_step_whatever_was_planned(
    last: int, verdict: int, state: str, sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three reports are planned; training is extended to a fourth, or ends at the second."""

    def train(trial: TrialContext) -> float | None:
        trial.plan(1, 3)
        for step in range(1, last + 1):
            trial.replan(last)
            if trial.report(step, 2.5):
                return None
        return 2.5

    built: list[dict[str, Any]] = []

    def build(*args: Any, **options: Any) -> Verdicts:
        built.append(options)
        return Verdicts(verdict)

    monkeypatch.setattr(context_module, "build_pruner", build)
    study = begin(sqlite_store)
    assert attempt(sqlite_store, study, Program(train, double.RunConfig), tmp_path).state == state
    assert built == [{"first_step": 1, "last_step": 3}]  # the rungs are those of all trials


def test_a_program_that_plans_nothing_is_pruned_all_the_same(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(trial: TrialContext) -> float | None:
        return None if any(trial.report(step, 2.5) for step in (1, 2, 3)) else 2.5

    built: list[dict[str, Any]] = []

    def build(*args: Any, **options: Any) -> Verdicts:
        built.append(options)
        return Verdicts(2)

    monkeypatch.setattr(context_module, "build_pruner", build)
    study = begin(sqlite_store)
    assert attempt(sqlite_store, study, Program(train, double.RunConfig), tmp_path).state == "pruned"
    assert list(study.get_trials()[0].intermediate_values) == [1, 2]
    assert built == [{"first_step": 1, "last_step": None}]


# -- what a trial scores ---------------------------------------------------------------------------------------------


def test_a_diverged_trial_is_no_cheap_one(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    sampler = {"name": "nsga2", "population": 4}
    study = begin(sqlite_store, base={"fault": "diverge"}, sampler=sampler, pruner={"name": "none"})
    attempt(sqlite_store, study, program, tmp_path)
    assert study.get_trials()[0].values == [WORST_K_LOC, math.inf]  # with cost 0 it would be among the best


@pytest.mark.parametrize(("returned", "value"), [(1.25, 1.25), (None, 2.5)])
def test_the_score_is_what_the_program_returns_or_else_its_last_report(
    returned: float | None, value: float, sqlite_store: Store, tmp_path: Path
) -> None:
    def train(trial: TrialContext) -> float | None:
        trial.report(1, 3.5)
        trial.report(2, 2.5)
        return returned

    study = begin(sqlite_store, pruner={"name": "none"})
    assert attempt(sqlite_store, study, Program(train, double.RunConfig), tmp_path).value == value
    assert study.get_trials()[0].value == value


def test_a_program_that_reports_nothing_is_not_pruned(sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store)
    outcome = attempt(sqlite_store, study, Program(lambda trial: 1.25, double.RunConfig), tmp_path)
    assert outcome == Outcome("complete", 0, value=1.25)


# -- figures ---------------------------------------------------------------------------------------------------------


class BrokenFigures:
    """Figures of which one call fails."""

    def __init__(self, broken: str, error: BaseException) -> None:
        self.broken, self.error = broken, error
        self.calls: list[str] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.broken:
            raise self.error

    def made(self, trial: Any, directory: Path) -> BrokenFigures:
        self._called("made")
        return self

    def begin(self, config: Any) -> None:
        self._called("begin")

    def show(self, objects: Any) -> None:
        self._called("show")


@pytest.mark.parametrize("broken", ["made", "begin", "show"])
@pytest.mark.parametrize("error", [ZeroDivisionError("no axis"), MemoryError(), OSError(errno.ENOSPC, "disk full")])
def test_a_drawing_error_never_fails_a_trial(
    broken: str,
    error: Exception,
    sqlite_store: Store,
    program: Program,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    study = begin(sqlite_store, base={"budget": {"scenes": 300}}, pruner={"name": "none"})
    figures = BrokenFigures(broken, error)
    assert attempt(sqlite_store, study, program, tmp_path, figures=figures.made).state == "complete"
    assert figures.calls[-1] == broken  # nothing is drawn after it
    assert figures.calls.count(broken) == 1
    assert f"trial 0 goes on without figures: {type(error).__name__}" in caplog.text


def test_an_error_of_the_store_while_drawing_is_the_trials_own(
    sqlite_store: Store, program: Program, tmp_path: Path
) -> None:
    study = begin(sqlite_store)
    figures = BrokenFigures("show", StoreError("the store has not answered"))
    with pytest.raises(StoreError):
        attempt(sqlite_store, study, program, tmp_path, figures=figures.made)
    assert study.get_trials()[0].state == TrialState.RUNNING  # for whoever finds it


# -- the end in the store --------------------------------------------------------------------------------------------


def lose_acknowledgement(monkeypatch: pytest.MonkeyPatch, store: Store, name: str) -> list[str]:
    """Let the next call of a store's transaction commit, and then fail as if the server had gone before it said so."""
    whole: Callable[..., Any] = getattr(store.tickets, name)
    lost: list[str] = []

    def once(*args: Any, **options: Any) -> Any:
        result = whole(*args, **options)
        if not lost:
            lost.append(name)
            raise sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("gone"), connection_invalidated=True)
        return result

    monkeypatch.setattr(store.tickets, name, once)
    return lost


@pytest.mark.parametrize(
    ("call", "changes", "options", "expected"),
    [
        ("set_trial_state_values", {}, {}, "complete"),
        ("set_trial_state_values", {"base": {"fault": "diverge"}}, {}, "complete"),
        ("release", {}, {"stop": lambda: True}, "requeued"),
        ("retire", {"base": {"fault": "bug"}}, {}, "failed"),
        ("retire", {"base": {"fault": "memory"}}, {}, "failed"),
    ],
)
def test_an_end_whose_acknowledgement_is_lost_is_the_owners(
    call: str,
    changes: dict[str, Any],
    options: dict[str, Any],
    expected: str,
    sqlite_store: Store,
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = begin(sqlite_store, pruner={"name": "none"}, **changes)
    claimed = sqlite_store.claim(id_of(sqlite_store, study), str(elsewhere()))
    assert claimed is not None
    lost = lose_acknowledgement(monkeypatch, sqlite_store, call)
    environment = TrialEnvironment(
        sqlite_store,
        id_of(sqlite_store, study),
        stored_spec(study),
        program,
        lambda number: tmp_path / str(number),
        **options,
    )
    assert run_trial(environment, claimed, elsewhere()).state == expected
    assert lost == [call]
    trials = study.get_trials()
    assert len(trials) == (2 if changes.get("base") == {"fault": "memory"} else 1)  # one successor, not two
    assert trials[0].state.name.lower() == {"requeued": "waiting", "failed": "fail"}.get(expected, expected)


@pytest.mark.parametrize("fault", ["none", "bug", "diverge"])
def test_an_end_of_a_trial_that_was_declared_lost_is_not(
    fault: str, sqlite_store: Store, program: Program, tmp_path: Path
) -> None:
    study = begin(sqlite_store, base={"fault": fault}, pruner={"name": "none"})

    def declared_lost(event: object) -> None:
        if isinstance(event, Scoring if fault == "none" else Started):
            (running,) = study.get_trials(states=[TrialState.RUNNING])
            declare_lost(sqlite_store, study, running)

    outcome = attempt(sqlite_store, study, program, tmp_path, notify=declared_lost)
    assert (outcome.state, outcome.cause) == ("fenced", None)
    assert study.get_trials()[0].user_attrs[names.CAUSE] == Cause.LOST_WORKER


@pytest.mark.parametrize("loaded", [True, False])
def test_the_threads_of_a_trial_are_torchs_or_one(
    loaded: bool, sqlite_store: Store, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = SimpleNamespace(get_num_threads=lambda: 3)
    monkeypatch.setitem(sys.modules, "torch", torch if loaded else None)
    study = begin(sqlite_store, base={"budget": {"scenes": 100}})
    attempt(sqlite_store, study, program, tmp_path)
    assert study.get_trials()[0].user_attrs[names.THREADS] == (3 if loaded else 1)


@pytest.mark.parametrize(("platform", "peak"), [("linux", 3072), ("darwin", 3)])
def test_the_peak_of_memory_is_in_bytes(
    platform: str, peak: int, sqlite_store: Store, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system says 3, which are kibibytes on Linux."""
    monkeypatch.setattr(context_module, "sys", SimpleNamespace(platform=platform, modules={}))
    monkeypatch.setattr(context_module.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3))
    study = begin(sqlite_store, base={"budget": {"scenes": 100}})
    told: list[object] = []
    attempt(sqlite_store, study, program, tmp_path, notify=told.append)
    assert study.get_trials()[0].user_attrs[names.PEAK_MEMORY] == peak
    assert [event.memory_bytes for event in told if isinstance(event, Report)] == [peak]


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the worker, moved by hand."""
    from ris_hpo.trials import record

    now = [0.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("fault", ["none", "bug", "memory", "diverge", "disk", "stop"])
def test_the_time_of_every_end_counts(
    fault: str, hours: list[float], sqlite_store: Store, program: Program, tmp_path: Path, monkeypatch: Any
) -> None:
    study = begin(sqlite_store, base={"fault": fault}, pruner={"name": "none"})
    hours[0] = 50.0

    def later(event: object) -> None:
        if isinstance(event, Report | Started):
            hours[0] += 360.0
        if fault == "disk" and isinstance(event, Report):
            raise OSError(errno.ENOSPC, "No space left on device")

    def stop() -> bool:
        return fault == "stop" and hours[0] > 2000

    try:
        attempt(sqlite_store, study, program, tmp_path, notify=later, stop=stop)
    except UnfitHostError:
        assert fault == "disk"
    expected = {"none": 9, "stop": 6, "disk": 2}.get(fault, 1) * 0.1
    assert status(sqlite_store, "unit").device_hours == pytest.approx(expected)
    # a stop half-way is counted, and nothing else
    assert study.get_trials()[0].user_attrs.get(names.PREEMPTIONS, 0) == (fault == "stop")


def test_a_heartbeat_says_what_the_trial_has_cost_until_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker that is killed spent is known up to its last beat, by its own clock."""
    store = open_store(str(tmp_path / "studies.db"), heartbeat=10)
    study = begin(store, 2)
    for pid in (1, 2):
        store.claim(id_of(store, study), str(elsewhere(pid)))
    spent = iter([10.5, 20.5, 30.5])
    beats: list[float | None] = []
    away = [StoreError("the store has not answered"), None, None, None]  # a store that comes back finds it beating
    record = store.record_heartbeat

    def recorded(trial_id: int) -> None:
        if beats and (error := away.pop(0)) is not None:
            raise error
        record(trial_id)

    monkeypatch.setattr(store, "record_heartbeat", recorded)

    class Event:
        """Lets four beats pass, of which the first finds the store away, and ends the trial before the last."""

        def wait(self, seconds: float) -> bool:
            assert seconds == 10
            beats.append(study.get_trials()[0].user_attrs.get(names.SECONDS))
            if len(beats) == 4:
                (trial, _) = store.get_all_trials(id_of(store, study))
                declare_lost(store, study, trial)
            return False

        def set(self) -> None:
            pass

    monkeypatch.setattr(heartbeat_module, "threading", SimpleNamespace(Event=Event, Thread=threading.Thread))
    with heartbeat_module.heartbeat(store, id_of(store, study), 0, lambda: next(spent)):
        for thread in threading.enumerate():
            if thread.name == "heartbeat of trial 0":
                thread.join(60)
    assert beats == [None, None, 10.5, 20.5]
    found = status(store, "unit")
    assert found.device_hours == pytest.approx(20.5 / 3600)
    assert (found.failed[0].cause, found.failed[0].seconds) == ("lost_worker", 20.5)
    store.close()


# -- status ----------------------------------------------------------------------------------------------------------


def test_status_lists_each_failed_trial_with_its_cause(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, 3, base={"fault": "memory"}, retries={"out_of_memory": 1})
    for pid in (1, 2):
        attempt(sqlite_store, study, program, tmp_path, pid=pid, device="cuda:3")
    sqlite_store.claim(id_of(sqlite_store, study), str(elsewhere(7)))
    lost = study.get_trials(states=[TrialState.RUNNING])[0]
    declare_lost(sqlite_store, study, lost)
    fill_budget(sqlite_store, study, 2)  # withdraws what still waits: no failure
    sqlite_store.claim(id_of(sqlite_store, study), str(elsewhere(8)))
    found = status(sqlite_store, "unit").as_dict()
    rows = [(row["number"], row["cause"], row["host"], row["device"], row["retried"]) for row in found["failed"]]
    assert rows == [
        (0, "out_of_memory", "elsewhere", "cuda:3", True),
        (1, "lost_worker", "elsewhere", None, True),
        (3, "out_of_memory", "elsewhere", "cuda:3", False),
    ]
    assert found["failed"][0]["error"] == "MemoryError: no memory on order"
    assert {row["last_step"] for row in found["failed"]} == {None}
    assert found["causes"] == {"out_of_memory": 2, "lost_worker": 1}
    assert [(row["host"], row["pid"]) for row in found["running"]] == [("elsewhere", 8)]


# -- directories -----------------------------------------------------------------------------------------------------


def test_what_copies_and_damages_leave_behind_is_removed_at_the_end(
    sqlite_store: Store, program: Program, tmp_path: Path
) -> None:
    study = begin(sqlite_store, 2, pruner={"name": "none"})
    sqlite_store.claim(id_of(sqlite_store, study), str(elsewhere()))
    (lost,) = study.get_trials(states=[TrialState.RUNNING])
    declare_lost(sqlite_store, study, lost)
    for name in ("0.partial-77", "0.damaged-77-1", "2.partial-78", "1.damaged-9", "20.partial-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text("{}")
    outcome = attempt(sqlite_store, study, program, tmp_path)
    assert (outcome.state, outcome.number) == ("complete", 2)
    # its own and its predecessor's; others may be in use
    assert sorted(path.name for path in tmp_path.glob("[0-9]*.*-*")) == ["1.damaged-9", "20.partial-1"]


def test_a_trial_that_goes_on_keeps_what_was_set_aside(sqlite_store: Store, program: Program, tmp_path: Path) -> None:
    study = begin(sqlite_store, pruner={"name": "none"})
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "checkpoint.json").write_text("{")
    reports = 0

    def count(event: object) -> None:
        nonlocal reports
        reports += isinstance(event, Report)

    assert attempt(sqlite_store, study, program, tmp_path, notify=count, stop=lambda: reports > 1).state == "requeued"
    (aside,) = tmp_path.glob("0.damaged-*")
    assert (aside / "checkpoint.json").read_text() == "{"
    assert attempt(sqlite_store, study, program, tmp_path).state == "complete"
    assert not aside.exists()


def test_leftovers_that_cannot_be_removed_change_no_end(
    sqlite_store: Store, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = begin(sqlite_store, pruner={"name": "none"})
    (tmp_path / "0.damaged-77").mkdir()

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.rmdir", refuse)
    assert attempt(sqlite_store, study, program, tmp_path).state == "complete"
    assert (tmp_path / "0.damaged-77").exists()


@pytest.mark.parametrize(
    "line", ['{"step": 100, "sc', "17", "null", '{"step": 100}', '{"step": 100, "score": null}', "\0"]
)
def test_a_report_that_is_not_whole_is_passed_over(line: str, tmp_path: Path) -> None:
    (tmp_path / REPORTS).write_text(f'{line}\n{{"step": 200, "score": 2.5}}\n')
    journal = Journal(tmp_path)
    assert list(journal.before(1000)) == [(200, 2.5)]
    journal.append(100, 3.5)  # trained again, and reported again
    assert list(Journal(tmp_path).before(1000)) == [(100, 3.5), (200, 2.5)]
