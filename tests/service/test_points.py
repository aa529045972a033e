"""Which points are tried: constraints, finite spaces without repetition, grids, draws near the base and the best."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from ris_hpo.errors import SpaceError, StudyError
from ris_hpo.search import counting
from ris_hpo.search.constraints import Constraint
from ris_hpo.search.dimension import Dimension
from ris_hpo.search.files import checked
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget
from ris_hpo.search.points import Points
from ris_hpo.search.samplers import build_sampler
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.store.attributes import Cause
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from tests.properties import examples

from .conftest import elsewhere, id_of, make_spec
from .test_trials import begin, work

FEW = {"shape.y": {"low": 1, "high": 3}, "shape.kind": {"choices": ["plain", "fancy"]}}


def spec_of(space: dict[str, Any], sampler: str = "random", **study: Any) -> StudySpec:
    tree = make_spec(study={"program": "double:PROGRAM", "worst": 7.0, **study}).model_dump(mode="json")
    return StudySpec.parse(
        {**tree, "space": space, "sampler": {"name": sampler, "startup": 2}, "pruner": {"name": "none"}}
        | {"base": {"budget.scenes": 100, "budget.validate_every": 100}},
        "test",
    )


# -- constraints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a.b * 2 <= c", True),
        ("a.b % 2 == 0 and c != 7", False),
        ("not (a.b > 3 or d in ['x', 'y'])", False),
        ("1 < a.b < 4", True),
        ("max(a.b, c) - abs(-1) == 6", True),
        ("-a.b ** 2 == -9", True),
        ("d not in ('y', 'z')", True),
    ],
)
def test_constraints_are_read_as_python_reads_them(text: str, holds: bool) -> None:
    constraint = Constraint(text)
    assert constraint.holds({"a.b": 3, "c": 7, "d": "x"}) is holds
    assert constraint.keys <= {"a.b", "c", "d"}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "a.b()",
        "(lambda: 1)()",
        "[x for x in y]",
        "a[0]",
        "f'{a}'",
        "min(a, key=b)",
        "1j < a",
        "",
        "a =",
    ],
)
def test_a_constraint_is_no_program(text: str) -> None:
    with pytest.raises(SpaceError, match="constraint"):
        Constraint(text)


@pytest.mark.parametrize(
    ("text", "message"), [("a < 'x'", "not supported"), ("1 / (a - a) > 0", "zero"), ("a ** a ** a > 1", "power")]
)
def test_what_cannot_be_computed_is_said(text: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Constraint(text).holds({"a": 99})


def test_constraints_hold_for_every_trial(sqlite_store: Store, tmp_path: Path) -> None:
    space = {"shape.x": {"low": 0.0, "high": 1.0}, "shape.y": {"low": 1, "high": 9}}
    spec = spec_of(space, "tpe", constraints=["shape.y >= 8 * shape.x - 1", "shape.depth == 2"])
    study = begin(sqlite_store, spec, 8)
    work(sqlite_store, study, tmp_path)
    params = [trial.params for trial in study.get_trials()]
    assert len(params) == 8
    assert all(each["shape.y"] >= 8 * each["shape.x"] - 1 for each in params)
    tight = {trial["shape.x"] for trial in params}
    assert len(tight) == 8


def test_constraints_are_checked_when_a_study_is_read(sqlite_store: Store) -> None:
    with pytest.raises(SpaceError, match=r"names unknown 'shape\.z'"):
        checked(spec_of(FEW, constraints=["shape.z > 1"]))
    with pytest.raises(SpaceError, match="base configuration does not meet"):
        checked(spec_of(FEW, constraints=["shape.y < 3"]))
    begin(sqlite_store, spec_of(FEW), 2)
    with pytest.raises(SpaceError, match="another constraints"):
        create_or_resume_study(sqlite_store, spec_of(FEW, constraints=["shape.y < 9"]), name="unit", score_version=1)


# -- finite spaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid", "brute_force"])
def test_a_finite_space_is_used_up_without_repetition(sampler: str, sqlite_store: Store, tmp_path: Path) -> None:
    study = begin(sqlite_store, spec_of(FEW, sampler), 6)
    work(sqlite_store, study, tmp_path)
    points = [(trial.params["shape.y"], trial.params["shape.kind"]) for trial in study.get_trials()]
    assert points[0] == (3, "plain")  # the base
    assert sorted(points) == [(y, kind) for y in (1, 2, 3) for kind in ("fancy", "plain")]
    with pytest.raises(StudyError, match="has 6 points, and none is tried twice; found a budget of 7"):
        fill_budget(sqlite_store, study, 7)


def test_two_workers_never_get_one_point(store: Store) -> None:
    study = begin(store, spec_of(FEW), 3)
    study_id, other = id_of(store, study), open_store(store.address)

    def first(taken: Collection[str]) -> str:
        return next(text for text in ("a", "b") if text not in taken)

    one, two = (each.claim(study_id, str(elsewhere(pid))) for pid, each in ((1, store), (2, other)))
    assert one is not None
    assert two is not None
    assert [store.reserve(study_id, one, first), other.reserve(study_id, two, first)] == ["a", "b"]
    assert store.reserve(study_id, one, first) == "a"  # repeated after a lost acknowledgement
    other.close()


def test_a_point_stays_with_its_line(sqlite_store: Store, tmp_path: Path) -> None:
    spec = spec_of(FEW)
    study = begin(sqlite_store, spec, 6)
    study_id = id_of(sqlite_store, study)
    for claim in (0, 1):  # the base, and one that chose a point and was lost
        number = sqlite_store.claim(study_id, str(elsewhere(claim=claim)))
    chosen = json.dumps({"shape.kind": "fancy", "shape.y": 1})
    assert number is not None
    sqlite_store.reserve(study_id, number, lambda taken: chosen)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        counting.fail_trial(sqlite_store, study_id, trial, Cause.LOST_WORKER, "gone", spec.retries)
    work(sqlite_store, study, tmp_path)
    live = counting.live_trials(study.get_trials())
    assert len({json.dumps(trial.params, sort_keys=True) for trial in live}) == len(live) == 6
    (successor,) = (trial for trial in live if trial.user_attrs.get(names.LINEAGE) == number)
    assert successor.params == json.loads(chosen)


def test_conditions_and_constraints_count_points_once() -> None:
    space = {**FEW, "shape.depth": {"low": 1, "high": 4, "when": {"shape.kind": ["fancy"]}}}
    points = Points(spec_of(space, constraints=["shape.y != 2"]))
    every = list(points)
    assert points.count(99) == len(every) == 2 + 2 * 4
    assert all(("shape.depth" in point) == (point["shape.kind"] == "fancy") for point in every)
    assert points.count(3) == 3


def test_a_grid_takes_levels_of_ranges() -> None:
    space = {"shape.x": {"low": 0.25, "high": 0.75}, "shape.y": {"low": 1, "high": 9}}
    spec = spec_of(space, "grid").replaced({"sampler": {"name": "grid", "levels": 3}})
    assert [tuple(point.values()) for point in Points(spec)] == [(x, y) for x in (0.25, 0.5, 0.75) for y in (1, 5, 9)]
    with pytest.raises(SpaceError, match=r"brute_force needs a finite space, and 'shape\.x' has no steps"):
        Points(spec.replaced({"sampler.name": "brute_force"}))


@pytest.mark.parametrize(
    ("dimension", "levels", "values"),
    [
        ({"low": 1, "high": 100, "log": True}, 3, [1, 10, 100]),
        ({"low": 1, "high": 3, "log": True}, None, [1, 2, 3]),
        ({"low": 0.01, "high": 1.0, "log": True}, 3, [0.01, 0.1, 1.0]),
        ({"low": 0.0, "high": 1.0, "step": 0.5}, None, [0.0, 0.5, 1.0]),
        ({"low": 0, "high": 30, "step": 10}, 9, [0, 10, 20, 30]),
        ({"low": 1, "high": 2}, 5, [1, 2]),
        ({"choices": ["a", "b", "c"]}, 2, ["a", "b", "c"]),
        ({"low": 0.0, "high": 1.0}, None, None),
        ({"low": 0, "high": 2**31}, None, None),
    ],
)
def test_values_of_a_dimension(dimension: dict[str, Any], levels: int | None, values: list[Any] | None) -> None:
    found = Dimension.parse(dimension, "test").values(levels)
    assert found == (values if values is None else pytest.approx(values) if isinstance(values[0], float) else values)


# -- near the base, near the best --------------------------------------------------------------------------------------


@examples(40)
@given(
    low=st.integers(1, 50), length=st.integers(1, 50), log=st.booleans(), whole=st.booleans(), seed=st.integers(0, 99)
)
def test_a_near_value_is_one_of_the_dimension(low: int, length: int, log: bool, whole: bool, seed: int) -> None:
    kind = int if whole else float
    dimension = Dimension(low=kind(low), high=kind(low + length), log=log)
    generator = random.Random(seed)
    centre = dimension.draw(generator)
    value = dimension.near(centre, generator)
    assert dimension.contains(value)
    assert isinstance(value, kind)


def test_near_values_are_near() -> None:
    generator, dimension = random.Random(0), Dimension(low=1e-5, high=1e-1, log=True)
    near = sorted(float(dimension.near(1e-3, generator)) for _ in range(400))
    assert 5e-4 < near[200] < 2e-3
    assert sum(1e-4 < value < 1e-2 for value in near) > 250  # one standard deviation: a quarter of the range
    choices = Dimension(choices=["a", "b", "c", "d"])
    drawn = [choices.near("b", generator) for _ in range(400)]
    assert 220 < drawn.count("b") < 290
    assert set(drawn) == {"a", "b", "c", "d"}


def test_a_share_of_the_trials_is_drawn_near_the_base_and_later_near_the_best(sqlite_store: Store) -> None:
    spec = spec_of({"shape.x": {"low": 0.0, "high": 1.0}}, "random").replaced(
        {"sampler.prior": 0.4, "sampler.startup": 30, "base": {"shape.x": 0.1}}
    )
    study = begin(sqlite_store, spec, 1)
    study.ask()
    trial = study.get_trials()[-1]

    def draws(numbers: range) -> list[tuple[bool, float]]:
        found = []
        for seed in range(10):
            for number in numbers:
                sampler = build_sampler(spec.replaced({"seed": seed}), number)
                distribution = spec.space["shape.x"].distribution()
                value = sampler.sample_independent(study, trial, "shape.x", distribution)
                found.append((type(sampler).__name__ == "_NearSampler", value))
        return found

    later = [is_near for is_near, _ in draws(range(270, 300))]
    assert 8 < sum(later) < 36  # a sixth of the share of before
    before = draws(range(30))
    near = sorted(value for is_near, value in before if is_near)
    assert 95 < len(near) < 145
    assert near[len(near) // 2] < 0.35
    distributions = {"shape.x": spec.space["shape.x"].distribution()}
    for index in range(60):
        x = 0.9 if index % 10 == 0 else 0.3
        study.add_trial(create_trial(params={"shape.x": x}, distributions=distributions, value=abs(x - 0.9)))
    after = sorted(value for is_near, value in draws(range(30)) if is_near)
    assert after[len(after) // 2] > 0.6


def test_draws_near_the_base_repeat(tmp_path: Path) -> None:
    spec = spec_of({"shape.x": {"low": 0.0, "high": 1.0}}, "tpe").replaced({"sampler.prior": 0.5})
    tables = []
    for run in ("a", "b"):
        store = open_store(str(tmp_path / f"{run}.db"))
        study = begin(store, spec, 6)
        work(store, study, tmp_path / run)
        tables.append([trial.params for trial in study.get_trials()])
        store.close()
    assert tables[0] == tables[1]
