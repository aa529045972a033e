"""Samplers by trial, and pruners that count every line of trials once."""

from __future__ import annotations

import math
from typing import Any, get_args

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from ris_hpo.scoring.k_loc import WORST_K_LOC, finite_score
from ris_hpo.search.files import parse_study
from ris_hpo.search.pruners import StudyPruner, build_pruner
from ris_hpo.search.samplers import build_sampler
from ris_hpo.search.spec import PrunerSpec, SamplerSpec, derived_seed

from .conftest import make_spec, study_tree

SAMPLERS = get_args(SamplerSpec.model_fields["name"].annotation)
PRUNERS = get_args(PrunerSpec.model_fields["name"].annotation)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_within_the_space(name: str) -> None:
    spec = make_spec(sampler={"name": name, "startup": 2}, pruner={"name": "none"})
    directions = spec.directions
    study = optuna.create_study(directions=directions)
    points = set()
    for number in range(5):
        study.sampler = build_sampler(spec, number)
        trial = study.ask()
        params = spec.suggest(trial)
        assert all(spec.space[path].contains(value) for path, value in params.items())
        points.add(tuple(sorted(params.items())))
        study.tell(trial, [float(params["shape.x"])] * len(directions))
    assert len(points) == 5


@pytest.mark.parametrize("name", ["random", "tpe", "qmc"])
def test_a_draw_is_a_function_of_the_trials_number(name: str) -> None:
    spec = make_spec(sampler={"name": name})

    def draw(root: int) -> dict[str, Any]:
        study = optuna.create_study(sampler=build_sampler(spec, root))
        return spec.suggest(study.ask())

    assert draw(4) == draw(4)
    assert len({tuple(draw(root).items()) for root in range(40)}) == 40


def test_qmc_covers_the_line_evenly() -> None:
    spec = make_spec(sampler={"name": "qmc"})
    values = []
    for root in range(64):
        study = optuna.create_study(sampler=build_sampler(spec, root))
        values.append(float(spec.suggest(study.ask())["shape.x"]))
    eighths = [sum(index / 8 <= value < (index + 1) / 8 for value in values) for index in range(8)]
    assert eighths == [8] * 8  # random points would scatter by +-3


@pytest.mark.filterwarnings("ignore:QMCSampler is experimental")
def test_qmc_draws_what_optunas_own_does() -> None:
    space = {
        "shape.x": {"low": 0.125, "high": 1.0, "log": True},
        "pause_s": {"low": 0.0, "high": 1.0, "step": 0.25},
        "shape.y": {"low": 1, "high": 9, "log": True},
        "shape.depth": {"low": 1, "high": 4},
        "shape.kind": {"choices": ["plain", "fancy"]},
    }
    spec = parse_study({**study_tree(sampler={"name": "qmc"}), "space": space}, name="unit", source="test")
    theirs = optuna.create_study(
        sampler=optuna.samplers.QMCSampler(scramble=True, seed=derived_seed(spec.seed, 0, "qmc"))
    )
    for root in range(-1, 20):
        trial = theirs.ask()
        params = spec.suggest(trial)
        if root >= 0:  # its first trial is drawn without the sequence
            study = optuna.create_study(sampler=build_sampler(spec, root))
            assert spec.suggest(study.ask()) == pytest.approx(params)
        theirs.tell(trial, 1.0)


def curve(study: optuna.Study, values: list[float], state: TrialState = TrialState.COMPLETE, **marks: Any) -> None:
    study.add_trial(
        create_trial(
            state=state,
            value=values[-1] if state == TrialState.COMPLETE else None,
            intermediate_values={100 * (index + 1): value for index, value in enumerate(values)},
            system_attrs={f"completed_rung_{rung}": values[min(3**rung, len(values)) - 1] for rung in range(2)},
            user_attrs=marks,
        )
    )


def is_pruned(study: optuna.Study, pruner: StudyPruner, values: list[float]) -> bool:
    trial = study.ask()
    for index, value in enumerate(values):
        trial.report(value, 100 * (index + 1))
    return pruner.prune(study, study.get_trials()[trial.number])


@pytest.fixture
def storage() -> InMemoryStorage:
    return InMemoryStorage()


@pytest.fixture
def study(storage: InMemoryStorage) -> optuna.Study:
    return optuna.create_study(storage=storage)


def pruner_of(storage: InMemoryStorage, **pruner: Any) -> StudyPruner:
    made = build_pruner(make_spec(pruner=pruner), storage, first_step=100, last_step=900)
    assert isinstance(made, StudyPruner)
    return made


@pytest.mark.parametrize("name", [name for name in PRUNERS if name not in ("none", "promotion")])
def test_every_pruner_prunes_the_bad_and_spares_the_good(
    name: str, storage: InMemoryStorage, study: optuna.Study
) -> None:
    good = [5.0, 4.0, 3.5, 3.2, 3.0, 2.9, 2.8, 2.7, 2.6]
    for shift in range(6):
        curve(study, [value + 0.01 * shift for value in good])
    pruner = pruner_of(storage, name=name, startup=2, p_threshold=0.3)
    assert is_pruned(study, pruner, [value + 2 for value in good])
    assert not is_pruned(study, pruner, [value - 1 for value in good[:3]])


def test_none_never_prunes(storage: InMemoryStorage, study: optuna.Study) -> None:
    for _ in range(6):
        curve(study, [1.0, 1.0])
    assert not is_pruned(study, pruner_of(storage, name="none"), [7.0, 7.0, 7.0])


def test_warm_up_shields_the_start(storage: InMemoryStorage, study: optuna.Study) -> None:
    for _ in range(6):
        curve(study, [3.0, 2.0, 1.0])
    assert is_pruned(study, pruner_of(storage, name="asha"), [6.0])
    assert not is_pruned(study, pruner_of(storage, name="asha", warmup_scenes=200), [6.0])
    assert is_pruned(study, pruner_of(storage, name="asha", warmup_scenes=200), [6.0, 6.0, 6.0])


def test_patience_lets_a_trial_live_while_it_improves(storage: InMemoryStorage, study: optuna.Study) -> None:
    for _ in range(6):
        curve(study, [3.0, 2.0, 1.0])
    pruner = pruner_of(storage, name="median", patience=2, startup=2)
    assert not is_pruned(study, pruner, [6.0, 5.0, 4.0])
    assert is_pruned(study, pruner, [6.0, 6.0, 6.0])


def test_retried_trials_are_out_of_the_competition(storage: InMemoryStorage, study: optuna.Study) -> None:
    curve(study, [2.0, 1.5, 1.0], TrialState.FAIL, cause="lost_worker")
    assert not is_pruned(study, pruner_of(storage, name="asha"), [3.0])  # alone: the failed trial's rung does not count
    curve(study, [2.0, 1.5, 1.0])
    assert is_pruned(study, pruner_of(storage, name="asha"), [3.1])


def test_hyperband_has_brackets_by_line(storage: InMemoryStorage) -> None:
    pruner = pruner_of(storage, name="hyperband")
    brackets = [pruner.bracket(root) for root in range(400)]
    shares = [brackets.count(index) / 400 for index in range(3)]
    assert set(brackets) == {0, 1, 2}
    assert shares[0] > shares[1] > 0.1
    assert shares[2] > 0.1
    for name in sorted({*PRUNERS} - {"hyperband"}):
        assert {pruner_of(storage, name=name).bracket(root) for root in range(20)} == {0}
    for first in (900, 1000):  # no rung lies before the end
        late = pruner_of(storage, name="hyperband", first_scenes=first)
        assert {late.bracket(root) for root in range(20)} == {0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_rule_for_what_is_not_finite(value: float) -> None:
    assert finite_score(value) == WORST_K_LOC
    assert finite_score(1.5) == 1.5
