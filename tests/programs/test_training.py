"""The training program on what it is given: what it reports, records and returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ris_hpo.errors import GateError
from ris_hpo.programs.program import RequeuedError, TrialContext
from ris_hpo.programs.training import follow
from ris_hpo.scoring.metrics import Scores
from ris_hpo.training.results import Validation


def scores(k_loc: float) -> Scores:
    names = [field.name for field in dataclasses.fields(Scores)]
    return Scores(**{**dict.fromkeys(names, 0.5), "k_loc": k_loc, "num_scenes": 8})


class Conclusion:
    network, floor = scores(2.0), scores(1.0)
    pipeline, fast, pipeline_floor = (
        scores(1.7),
        scores(1.9),
        scores(0.4),
    )  # on fewer scenes, which have a floor of their own
    parameters: ClassVar = {"body": 900, "heads": 100}


class Run:
    """Four validations; one that is resumed has two of them already."""

    def __init__(self, seen: int = 0, gate: bool = False) -> None:
        self.history = [self.validation(100 * (each + 1)) for each in range(seen)]
        self.scenes_seen = 100 * seen
        self.finished = False
        self.gate = gate
        self.last_validation = 300  # extended when that is reached

    def validation(self, scenes: int) -> Validation:
        return Validation(scenes, scores(3 - scenes / 400), scores(1.0), 0.0, 0.0)

    def run(self, stop: Callable[[], bool]) -> Iterator[Validation]:
        while self.scenes_seen < 400:
            if stop():
                return
            if self.gate and self.scenes_seen == 200:
                raise GateError("phase 'warm' did not pass its gate")
            self.scenes_seen += 100
            self.history.append(self.validation(self.scenes_seen))
            self.last_validation = 300 if self.scenes_seen < 300 else 400
            yield self.history[-1]
        self.finished = True

    def conclude(self) -> Any:
        return Conclusion()


class Watched(TrialContext):
    """Notes what it is shown, prunes at one step, stops after one."""

    prune_at = stop_at = 10_000
    concluded = False

    def __init__(self, directory: Path) -> None:
        super().__init__({}, directory)
        self.shown: list[set[str]] = []
        self.last_steps: list[int] = []

    def replan(self, last_step: int) -> None:
        self.last_steps.append(last_step)

    def report(self, step: int, score: float, **metrics: float) -> bool:
        super().report(step, score, **metrics)
        return step == self.prune_at

    def should_stop(self) -> bool:
        return max(self.scores, default=0) >= self.stop_at

    def concluding(self) -> None:
        self.concluded = True

    def show(self, **objects: Any) -> None:
        self.shown.append(set(objects))


@pytest.mark.parametrize("objective", ["network", "pipeline"])
def test_value_floor_and_efficiency_are_of_the_same_scenes(objective: Any, tmp_path: Path) -> None:
    trial = Watched(tmp_path)
    value = follow(trial, Run(), objective)
    assert value == (2.0 if objective == "network" else 1.7)
    assert trial.recorded["floor"] == (1.0 if objective == "network" else 0.4)
    assert trial.recorded["efficiency"] == pytest.approx((7 - value) / (7 - trial.recorded["floor"]))
    assert trial.recorded["pipeline_floor"] == 0.4
    assert (trial.recorded["components"]["k_loc"], trial.recorded["pipeline"]["k_loc"]) == (2.0, 1.7)
    assert trial.recorded["parameters"] == 1000
    assert trial.scores == {100: 2.75, 200: 2.5, 300: 2.25, 400: 2.0}
    assert trial.metrics == {"floor": 1.0}
    assert trial.concluded
    assert trial.shown == [{"history"}] * 4 + [{"history", "conclusion"}]


def test_the_fast_objective_is_reported_recorded_and_returned(tmp_path: Path) -> None:
    class Fast(Run):
        def validation(self, scenes: int) -> Validation:
            quick = scores(2.5 if scenes == 200 else 2.6)
            return dataclasses.replace(super().validation(scenes), fast=quick, fast_floor=scores(0.4))

    trial = Watched(tmp_path / "whole")
    assert follow(trial, Fast(), "fast") == 1.9
    assert trial.scores == {100: 2.6, 200: 2.5, 300: 2.6, 400: 2.6}
    assert trial.metrics == {"floor": 0.4}
    assert (trial.recorded["components"]["k_loc"], trial.recorded["floor"]) == (1.9, 0.4)
    pruned = Watched(tmp_path / "pruned")
    pruned.prune_at = 300
    assert follow(pruned, Fast(), "fast") is None
    assert pruned.recorded == {"components": scores(2.5).as_dict()}


def test_a_resumed_run_reports_again_what_it_did_before(tmp_path: Path) -> None:
    trial = Watched(tmp_path)
    follow(trial, Run(seen=2), "network")
    assert list(trial.scores) == [100, 200, 300, 400]
    assert trial.shown == [{"history"}] * 3 + [{"history", "conclusion"}]  # what was drawn before is not drawn again


def test_the_last_step_follows_the_run(tmp_path: Path) -> None:
    trial = Watched(tmp_path)
    follow(trial, Run(), "network")
    assert trial.last_steps == [300, 300, 400, 400]  # stated before the report of 300, on which a pruner is asked


def test_a_pruned_run_records_its_best_validation(tmp_path: Path) -> None:
    trial = Watched(tmp_path)
    trial.prune_at = 300
    assert follow(trial, Run(), "network") is None
    assert trial.recorded == {"components": scores(2.25).as_dict()}
    assert not trial.concluded


def test_a_stopped_run_is_put_back(tmp_path: Path) -> None:
    trial = Watched(tmp_path)
    trial.stop_at = 200
    with pytest.raises(RequeuedError):
        follow(trial, Run(), "network")
    assert list(trial.scores) == [100, 200]


def test_a_failed_gate_ends_with_the_score_so_far(tmp_path: Path) -> None:
    trial = Watched(tmp_path)
    assert follow(trial, Run(gate=True), "network") == 2.0
    assert trial.recorded["gate"] == "phase 'warm' did not pass its gate"
    assert list(trial.scores) == [100, 200]
