"""Study files: what is accepted, what is refused and how, and the way from parameters to a configuration."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo.config import to_toml
from ris_hpo.errors import ConfigError, SpaceError
from ris_hpo.programs import training
from ris_hpo.programs.program import load_program
from ris_hpo.results.doctor import examine
from ris_hpo.search import files
from ris_hpo.search.dimension import Dimension
from ris_hpo.search.files import checked, list_studies, load_study, parse_study
from ris_hpo.search.spec import derived_seed
from tests.properties import examples

from .conftest import make_spec, study_tree


def refused(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(SpaceError) as caught:
        parse_study(tree, name="unit", source="unit.toml")
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spaces": {}}, "unknown table 'spaces'; did you mean 'space'?"),
        ({"study": {"sed": 1}}, "unknown key 'study.sed'; did you mean 'seed'?"),
        ({"sampler": {"name": "tpee"}}, "sampler.name"),
        ({"sampler": {"start": 1}}, "unknown key 'sampler.start'; did you mean 'startup'?"),
        ({"pruner": {"reduction": 1}}, "pruner.reduction"),
        ({"budget": {"n_trials": 0}}, "budget.n_trials"),
        ({"budget": {"n_trials": -3}}, "budget.n_trials"),
        ({"space": {"shape.x": {"low": 1.0, "high": 0.0}}}, "low 1.0 is not below high 0.0"),
        ({"space": {"shape.x": {"low": 0.0, "high": 1.0, "log": True}}}, "log needs low above 0"),
        ({"space": {"shape.x": {"low": 0.1}}}, "needs low and high, or choices"),
        ({"space": {"shape.x": {"low": 0.0, "high": 1.0, "step": 0.3}}}, "step 0.3 must divide 0.0..1.0"),
        ({"space": {"shape.x": {"low": 0.0, "high": 1.0, "step": 0.0000005}}}, "into 1,000,000 at most"),
        ({"space": {"shape.x": {"choices": [1]}}}, "two different values"),
        ({"space": {"shape.x": {"choices": [1, 2], "low": 0}}}, "choices exclude"),
        ({"space": {"shape.x": {"low": 0, "high": 2, "setp": 1}}}, "did you mean 'step'?"),
        ({"space": {"shape.x": 3}}, "needs low and high, or choices (found 3)"),
        (
            {"space": {"shape.depth": {"low": 1, "high": 4, "when": {"shape.kynd": ["fancy"]}}}},
            "did you mean 'shape.kind'?",
        ),
        ({"space": {"shape.depth": {"low": 1, "high": 4, "when": {"shape.kind": ["odd"]}}}}, "not in its range"),
        (
            {"space": {"shape.depth": {"low": 1, "high": 4, "when": {"shape.kind": []}}}},
            "'when' lists no value for 'shape.kind'",
        ),
        ({"base": {"shape": {"y": 99}}}, "base value 99 of 'shape.y' lies outside its range"),
        ({"sampler": {"name": "nsga2"}}, "no pruner works with two"),
        ({"study": {"seed": -1}}, "seed: input should be"),
        ({"study": {"seed": 2**32}}, "seed: input should be"),
        ({"retries": {"lost_worker": -1}}, "retries.lost_worker"),
        ({"retries": {"out_of_memory": -1}}, "retries.out_of_memory"),
        ({"retries": {"timeout": -1}}, "retries.timeout"),
        ({"retries": {"bugs": 0}}, "retries.bugs"),
        ({"sampler": {"startup": 0}}, "sampler.startup"),
        ({"sampler": {"population": 1}}, "sampler.population"),
        ({"pruner": {"first_scenes": 0}}, "pruner.first_scenes"),
        ({"pruner": {"startup": -1}}, "pruner.startup"),
        ({"pruner": {"warmup_scenes": -1}}, "pruner.warmup_scenes"),
        ({"pruner": {"patience": -1}}, "pruner.patience"),
        ({"pruner": {"p_threshold": 0.0}}, "pruner.p_threshold"),
        ({"pruner": {"p_threshold": 1.0}}, "pruner.p_threshold"),
        ({"budget": {"epoch_scenes": 0}}, "budget.epoch_scenes"),
        ({"budget": {"trial_timeout_s": 0.0}}, "budget.trial_timeout_s"),
        ({"budget": {"stall_timeout_s": 0.0}}, "budget.stall_timeout_s"),
        ({"stop": {"timeout_s": 0.0}}, "stop.timeout_s"),
        ({"stop": {"gpu_hours": 0.0}}, "stop.gpu_hours"),
        ({"stop": {"patience": 0}}, "stop.patience"),
        ({"base": 3}, "'base' must be a table"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    refused(study_tree(**changes), words)


def test_a_study_of_settings_has_no_objective_that_fixes_them() -> None:
    tree = {
        "study": {"kind": "inference", "objective": "fast"},
        "space": {"inference.proposals": {"low": 5, "high": 9}},
    }
    refused(tree, "an inference study draws the settings that 'fast' fixes")
    trained = parse_study(tree | {"study": {"objective": "fast"}}, name="quick", source="quick.toml")
    assert load_program(trained.program_name()) is training.FAST


def test_the_least_of_everything_is_accepted() -> None:
    spec = make_spec(
        study={"seed": 2**32 - 1},
        retries={"lost_worker": 0, "out_of_memory": 0, "timeout": 0, "bugs": 1},
        sampler={"startup": 1, "population": 2},
        pruner={
            "first_scenes": 1,
            "reduction": 2,
            "startup": 0,
            "warmup_scenes": 0,
            "patience": 0,
            "p_threshold": 1e-9,
        },
        budget={"n_trials": 1, "epoch_scenes": 1, "trial_timeout_s": 1e-9, "stall_timeout_s": 1e-9},
        stop={"timeout_s": 1e-9, "gpu_hours": 1e-9, "patience": 1},
    )
    assert (spec.seed, spec.retries.bugs, spec.stop.patience) == (2**32 - 1, 1, 1)
    finest = {"low": 0.0, "high": 1.0, "step": 0.000001}
    assert make_spec(space={"shape.x": finest}).space["shape.x"].contains(0.123456)


def test_an_empty_space_is_refused() -> None:
    tree = study_tree()
    tree["space"] = {}
    refused(tree, "space")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {"shape.z": {"low": 0.0, "high": 1.0}}}, "did you mean 'shape.x'|unknown key 'shape.z'"),
        ({"base": {"budget": {"scene": 5}}}, "did you mean 'budget.scenes'"),
        ({"space": {"shape.x": {"low": 0.0, "high": 2.0}}}, "shape.x"),
        ({"space": {"shape.x": {"low": 0.6, "high": 0.9}}}, "base value 0.5 of 'shape.x' lies outside its range"),
        ({"space": {"shape.depth": {"low": 1, "high": 7, "when": {"shape.kind": ["fancy"]}}}}, "shape.depth"),
    ],
)
def test_the_run_configuration_has_the_last_word(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        checked(parse_study(study_tree(**changes), name="unit", source="unit.toml"))


def test_a_number_typed_whole_is_a_number() -> None:
    """The key's own type decides: of a key with decimals, 0 is 0.0 and 0..1 a range with everything between."""
    tree = study_tree(base={"shape": {"x": 0}})
    tree["space"] = {
        "shape.x": {"choices": [0, 0.1, 1]},
        "shape.y": {"choices": [1, 3], "when": {"shape.x": [0, 1]}},
    }
    spec = checked(parse_study(tree, name="unit", source="test"))
    assert spec.space["shape.x"].choices == [0.0, 0.1, 1.0]
    assert [type(choice) for choice in spec.space["shape.x"].choices or []] == [float, float, float]
    assert [type(choice) for choice in spec.space["shape.y"].choices or []] == [int, int]
    assert spec.base_params() == {"shape.x": 0.0, "shape.y": 3}
    assert spec.space["shape.y"].active({"shape.x": 1.0})
    tree["space"] = {"shape.x": {"low": 0, "high": 1}}
    spec = checked(parse_study(tree, name="unit", source="test"))
    assert not spec.space["shape.x"].is_integer
    assert 0 < spec.space["shape.x"].draw(random.Random(1)) < 1


def test_a_whole_number_of_a_range_of_whole_numbers_is_one_of_them_however_it_is_typed() -> None:
    """A program that takes any settings says nothing of their types."""
    base = {"shape.x": 1.0, "shape.y": 4.0, "shape.kind": "plain"}
    params = make_spec(study={"program": "double:train"}, base=base).base_params()
    assert [(name, type(value)) for name, value in params.items()] == [
        ("shape.x", float), ("shape.y", int), ("shape.kind", str),
    ]  # fmt: skip
    with pytest.raises(SpaceError, match=r"base value 4\.5 of 'shape\.y' lies outside its range"):
        make_spec(study={"program": "double:train"}, base={**base, "shape.y": 4.5})


def test_true_is_no_number() -> None:
    dimension = Dimension(choices=[0, 1])
    assert dimension.contains(1.0)
    assert not dimension.contains(True)
    assert Dimension(choices=[True, 1]).contains(True)
    assert not Dimension(choices=[True, False], when={"a": [True]}).active({"a": 1})


def test_nested_and_dotted_tables_mean_the_same() -> None:
    nested = study_tree()
    nested["space"] = {"shape": {"x": {"low": 0.0, "high": 1.0}}}
    dotted = study_tree()
    dotted["space"] = {"shape.x": {"low": 0.0, "high": 1.0}}
    one, other = (parse_study(tree, name="unit", source="test") for tree in (nested, dotted))
    assert one == other
    assert one.space_fingerprint() == other.space_fingerprint()


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(study_tree()))
    spec = load_study(path)
    assert spec.name == "mine"
    assert spec == spec.parse(spec.model_dump(mode="json"))
    path.write_text("[study\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_study(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_study(tmp_path / "none.toml")


def test_names_are_looked_up_with_a_suggestion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"wide", "narrow", "smoke"} <= set(list_studies())
    with pytest.raises(SpaceError, match=r"unknown space 'wyde'; did you mean 'wide'\?"):
        load_study("wyde")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "wide.toml").write_text("")
    assert list_studies()["wide"] == Path("studies/wide.toml")  # the folder at hand comes first


def test_where_studies_were_looked_for_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As for a package that is installed without its source tree, and used in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "study_directories", lambda: [Path("studies"), tmp_path / "beside" / "studies"])
    for look in (list_studies, lambda: load_study("smoke")):
        with pytest.raises(SpaceError) as caught:
            look()
        for told in (str(tmp_path / "studies"), str(tmp_path / "beside" / "studies"), "the path of a study file"):
            assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    (finding,) = (each for each in examine() if each.name == "study files")
    assert not finding.ok
    assert finding.advice == str(caught.value)


def test_conditional_dimensions_follow_their_parents() -> None:
    spec = make_spec()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    kinds = set()
    for _ in range(20):
        params = spec.suggest(study.ask())
        kinds.add(params["shape.kind"])
        assert ("shape.depth" in params) == (params["shape.kind"] == "fancy")
        config: Any = spec.config(params, 3)
        assert config.shape.x == params["shape.x"]
        assert config.shape.depth == params.get("shape.depth", 2)
    assert kinds == {"plain", "fancy"}


def test_seeds_come_from_study_and_line_unless_the_base_fixes_one() -> None:
    spec = make_spec()
    seeds = [spec.config({}, number).seed for number in range(50)]
    assert len(set(seeds)) == 50
    assert spec.config({}, 3).seed == seeds[3]
    assert make_spec(study={"seed": 8}).config({}, 3).seed != seeds[3]
    assert make_spec(base={"seed": 5}).config({}, 3).seed == 5
    assert derived_seed(1, 2, "run") != derived_seed(1, 2, "sampler")


def test_the_fingerprint_follows_what_makes_trials_comparable() -> None:
    reference = make_spec().space_fingerprint()
    same = [
        {"study": {"seed": 9}},
        {"sampler": {"name": "random"}},
        {"pruner": {"name": "none"}},
        {"budget": {"n_trials": 3}},
    ]
    assert all(make_spec(**change).space_fingerprint() == reference for change in same)
    other = [
        {"space": {"shape.x": {"low": 0.0, "high": 0.9}}},
        {"base": {"budget": {"scenes": 900, "validate_every": 100}}},
        {"study": {"objective": "pipeline"}},
        {"sampler": {"name": "nsga2"}, "pruner": {"name": "none"}},
    ]
    found = {make_spec(**change).space_fingerprint() for change in other}
    assert len(found) == len(other)
    assert reference not in found


def test_epochs_are_scenes() -> None:
    spec = make_spec(budget={"epoch_scenes": 500}).with_epochs(3)
    assert spec.base["budget.scenes"] == 1500
    with pytest.raises(ConfigError, match="not above 0"):
        spec.with_epochs(0)


numbers = st.floats(-1e6, 1e6, allow_nan=False) | st.integers(-1000, 1000)


@examples(200)
@given(
    table=st.fixed_dictionaries(
        {},
        optional={
            "low": numbers,
            "high": numbers,
            "step": numbers,
            "log": st.booleans(),
            "choices": st.lists(st.one_of(st.booleans(), numbers, st.text(max_size=3)), max_size=4),
        },
    ),
    seed=st.integers(0, 2**32),
)
def test_any_dimension_is_refused_or_draws_what_it_contains(table: dict[str, Any], seed: int) -> None:
    try:
        dimension = Dimension.parse(table)
    except ConfigError:
        return
    distribution = dimension.distribution()
    generator = random.Random(seed)
    for value in (*dimension.edges(), *(dimension.draw(generator) for _ in range(5))):
        assert dimension.contains(value)
        assert distribution._contains(distribution.to_internal_repr(value))
