"""Settings through the versions: fingerprints that last, defaults that are kept, stored trees that are migrated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, create_model

from ris_hpo import config as settings
from ris_hpo.config import SCHEMA, SCHEMA_KEY, Spec, defaults_of, fingerprint, migrated, stored_defaults
from ris_hpo.errors import CheckpointError, ConfigError, StudyError
from ris_hpo.learning.bundle import load_bundle
from ris_hpo.migrations import STEPS, Tree, has, move, take
from ris_hpo.programs.inference import RunConfig as InferenceRun
from ris_hpo.results.export import exported
from ris_hpo.results.replay import replay
from ris_hpo.search.files import load_study, parse_study
from ris_hpo.search.lifecycle import create_or_resume_study, fill_budget, get_study, stored_spec
from ris_hpo.search.spec import StudySpec
from ris_hpo.store.cache import Store
from ris_hpo.store.open import open_store
from ris_hpo.training.config import PhaseSpec, RunConfig
from ris_hpo.training.curriculum import with_curriculum
from ris_hpo.training.files import Exported, is_unchanged, load_config, load_scene, write_config
from ris_hpo.training.stability import OptimizerSpec
from ris_hpo.workers.worker import WorkerJob, run_worker
from tests import schema

LEGACY = Path(__file__).parent / "legacy" / "0.1.0"


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_the_kept_defaults_are_those_of_the_code() -> None:
    kept = json.loads(schema.FILE.read_text())
    changed = list(schema.changes(kept, schema.current()))
    assert not changed, f"raise the schema version: {changed} ('Changing a setting' in CONTRIBUTING.md)"
    assert kept == schema.current(), "a setting is new: python -m tests.schema adds it"


def test_a_default_that_changed_is_noticed() -> None:
    kept = json.loads(schema.FILE.read_text())
    now = schema.current()
    now["training"]["optimizer"]["ema_decay"] = 0.9
    del now["training"]["phases[]"]["patience"]
    now["training"]["optimizer"]["new"] = 1
    assert list(schema.changes(kept, now)) == [
        "training.optimizer.ema_decay was 0.995 and is 0.9",
        "training.phases[].patience went",
    ]


def test_no_default_is_a_filled_mapping() -> None:
    """A fingerprint compares mappings key by key, so that one without a default's key would look like the default."""

    def mappings(spec: type[Spec]) -> Iterator[tuple[str, Any]]:
        for name, field in spec.model_fields.items():
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            if isinstance(default, Spec):
                yield from mappings(type(default))
            elif isinstance(default, dict):
                yield f"{spec.__name__}.{name}", default

    found = [pair for kind in schema.KINDS for pair in mappings(kind)]
    assert found
    assert all(default == {} for _, default in found)


@pytest.mark.parametrize("version", range(SCHEMA))
@pytest.mark.parametrize("kind", [RunConfig, InferenceRun])
def test_an_old_tree_means_the_same_with_its_defaults_left_out(kind: type[Spec], version: int) -> None:
    assert kind.settings is not None
    whole = {name: value for name, value in stored_defaults(version, kind.settings).items() if not name.endswith("[]")}
    states = {SCHEMA_KEY: version}
    assert kind.from_stored(states, "test") == kind.from_stored(states | whole, "test")


# -- fingerprints ----------------------------------------------------------------------------------------------------


def grown(spec: type[Any], **fields: Any) -> type[Any]:
    return create_model(spec.__name__, __base__=spec, **fields)


def test_a_new_option_leaves_fingerprints_as_they_are() -> None:
    optimizer = grown(OptimizerSpec, momentum=(float, 0.9))
    phase = grown(PhaseSpec, cooldown=(int, 0))
    later = grown(RunConfig, optimizer=(optimizer, optimizer()), phases=(list[phase], Field(default_factory=list)))
    for config in (RunConfig(), RunConfig().replaced({"optimizer.clip": 2.0}), with_curriculum(RunConfig())):
        same = later.from_stored(config.stored(), "test")
        assert same.fingerprint() == config.fingerprint()
        other = same.replaced({"optimizer.momentum": 0.5})
        assert other.fingerprint() != config.fingerprint()
    phases = with_curriculum(RunConfig()).model_dump(mode="json")["phases"]
    phases[0]["cooldown"] = 3
    assert later.parse({"phases": phases}).fingerprint() != with_curriculum(RunConfig()).fingerprint()


def test_a_fingerprint_changes_with_every_setting() -> None:
    config = RunConfig()
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"optimizer.ema_decay": 0.9},
        {"optimizer.clip": 2.0},
        {"scene.channel_error_db": [-30.0, -5.0]},
        {"budget.scenes": 6145},
        {"network.noise_known": False},
    ]
    found = [config.replaced(change).fingerprint() for change in changes]
    assert len(set(found)) == len(changes)
    assert all(each.startswith(f"{SCHEMA}-") for each in found)
    assert config.replaced({"optimizer.clip": 2}).fingerprint() == found[3]  # a number is what it is, however typed


def test_a_default_of_this_code_alone_does_not_move_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the kept defaults, not with those of the code at hand, which may have been edited."""
    edited = grown(OptimizerSpec, ema_decay=(float, 0.9))
    later = grown(RunConfig, optimizer=(edited, edited()))
    assert later().fingerprint() == RunConfig().replaced({"optimizer.ema_decay": 0.9}).fingerprint()
    assert later.parse({"optimizer": {"ema_decay": 0.995}}).fingerprint() == RunConfig().fingerprint()


# -- migrations ------------------------------------------------------------------------------------------------------


@pytest.fixture
def next_version(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The next schema version: ``optimizer.clip`` is called ``optimizer.limit``, ``ema_decay`` has another default."""

    def step(kind: str, tree: Tree) -> None:
        if kind == "training":
            move(tree, "optimizer.clip", "optimizer.limit")

    defaults = json.loads(json.dumps(stored_defaults(SCHEMA, "training")))
    defaults["optimizer"]["limit"] = defaults["optimizer"].pop("clip")
    defaults["optimizer"]["ema_decay"] = 0.9
    kept = settings.stored_defaults
    monkeypatch.setattr(settings, "STEPS", (*STEPS, step))
    monkeypatch.setattr(settings, "SCHEMA", SCHEMA + 1)
    monkeypatch.setattr(settings, "stored_defaults", lambda n, kind: defaults if n == SCHEMA + 1 else kept(n, kind))
    renamed = create_model(
        "Renamed",
        __base__=Spec,
        limit=(float, 1.0),
        ema_decay=(float, 0.9),
        **{
            name: (field.annotation, field)
            for name, field in OptimizerSpec.model_fields.items()
            if name not in ("clip", "ema_decay")
        },
    )
    later: type[Any] = grown(RunConfig, optimizer=(renamed, renamed()))
    return later


@pytest.mark.parametrize("version", [0, SCHEMA])
def test_an_older_tree_keeps_its_defaults_and_finds_its_renamed_keys(next_version: type[Any], version: int) -> None:
    found = next_version.from_stored({SCHEMA_KEY: version, "optimizer": {"clip": 2.0}}, "test")
    assert (found.optimizer.limit, found.optimizer.ema_decay) == (2.0, 0.995)
    assert next_version().optimizer.ema_decay == 0.9
    assert found.stored()[SCHEMA_KEY] == SCHEMA + 1
    assert next_version.from_stored(found.stored(), "test") == found


def test_a_fingerprint_is_checked_under_the_version_that_recorded_it(next_version: type[Any]) -> None:
    trees = {n: settings.filled({"optimizer": {"clip": 2.0}}, stored_defaults(n, "training")) for n in (0, 1)}
    by_version = {0: fingerprint(trees[0]), 1: f"1-{fingerprint({'optimizer': {'clip': 2}})}"}
    for version, recorded in by_version.items():
        stored = {SCHEMA_KEY: version, **trees[version]}
        assert next_version.is_fingerprint_of(recorded, stored, "test")
        stored["optimizer"] = {**stored["optimizer"], "clip": 2.5}
        assert not next_version.is_fingerprint_of(recorded, stored, "test")
    old = {SCHEMA_KEY: 0, **trees[0]}  # made by version 0, run again by version 1
    again = f"1-{fingerprint({'optimizer': {'clip': 2, 'decay': 'all'}})}"  # what version 0 did is no default any more
    assert next_version.is_fingerprint_of(again, old, "test")
    assert not next_version.is_fingerprint_of("no-fingerprint", old, "test")
    current = next_version.from_stored(old, "test")
    assert next_version.is_fingerprint_of(current.fingerprint(), old, "test")


def test_whole_numbers_in_an_old_tree_are_as_validation_made_them() -> None:
    """What version 0 fingerprinted had been validated; a study's base has numbers as they were typed."""
    floats: Tree = {"optimizer": {"clip": 2.0}, "scene": {"range_m": [1.0, 8.0], "channel_error_db": [-30.0, -5.0]}}
    validated = settings.filled(floats, stored_defaults(0, "training"))
    typed: Tree = {"optimizer": {"clip": 2}, "scene": {"range_m": [1, 8], "channel_error_db": [-30, -5]}}
    assert RunConfig.is_fingerprint_of(fingerprint(validated), typed, "test")
    assert not RunConfig.is_fingerprint_of(fingerprint(validated), {**typed, "seed": 1}, "test")
    phases = {"phases": with_curriculum(RunConfig()).model_dump(mode="json")["phases"]}
    recorded = fingerprint(settings.filled(phases, stored_defaults(0, "training")))
    assert RunConfig.is_fingerprint_of(recorded, phases, "test")


def test_moving_and_taking_keys() -> None:
    tree: Tree = {"a": {"b": 1, "c": 2}, "d": 3}
    move(tree, "a.b", "e.f.g", lambda value: 10 * value)
    move(tree, "a.missing", "d")
    assert tree == {"a": {"c": 2}, "d": 3, "e": {"f": {"g": 10}}}
    assert (take(tree, "a.c"), take(tree, "x.y")) == (2, None)
    assert has(tree, "e.f")
    assert not has(tree, "d.f")


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (SCHEMA + 1, "use a newer ris-hpo"),
        (-1, "must be a whole number"),
        ("1", "must be a whole number"),
        (True, "must"),
    ],
)
def test_another_version_is_refused_in_one_line(stated: Any, words: str, tmp_path: Path) -> None:
    tree = {SCHEMA_KEY: stated}
    with pytest.raises(ConfigError, match=words) as caught:
        migrated(tree, "training", "file")
    assert "\n" not in str(caught.value)
    for kind in (RunConfig, InferenceRun, StudySpec):
        with pytest.raises(ConfigError, match=words):
            kind.from_stored(tree, "file")
    (tmp_path / "a.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "a.json")
    with pytest.raises(ConfigError, match=words):
        parse_study({SCHEMA_KEY: stated, "space": {"seed": {"low": 0, "high": 1}}}, name="unit", source="file")
    shutil.copytree(LEGACY / "bundle", tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps({**manifest, **tree}))
    with pytest.raises(CheckpointError, match=words):
        load_bundle(tmp_path / "bundle")


# -- files and studies of version 0 ----------------------------------------------------------------------------------


@pytest.fixture
def old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    shutil.copytree(LEGACY, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    opened = open_store(f"sqlite:///{tmp_path}/storage/studies.db", create=False)
    yield opened
    opened.close()


def test_an_old_trial_is_exported(old_store: Store, tmp_path: Path) -> None:
    study = get_study(old_store, "smoke")
    found = exported(study, stored_spec(study), 3)
    assert found.config == load_config(LEGACY / "best.toml").config
    write_config(found, tmp_path / "again.toml")
    assert load_config(tmp_path / "again.toml") == found
    assert is_unchanged(found)
    with pytest.raises(StudyError, match="use the version that ran it"):
        exported(study, stored_spec(study).with_base({"budget.validation_scenes": 33}), 3)


def test_an_old_study_is_resumed_and_its_trials_repeat(old_store: Store, tmp_path: Path) -> None:
    spec = load_study("smoke").with_base({"optimizer.decay": "all"})  # which was the default then
    study = create_or_resume_study(old_store, spec, changes={"budget.n_trials": 5})
    fill_budget(old_store, study, 5)
    folder = str(tmp_path / "storage" / "trials" / "smoke")
    report = run_worker(WorkerJob(old_store.address, "smoke", directory=folder, artifacts=str(tmp_path / "artifacts")))
    assert report.reason == "done"
    study = get_study(old_store, "smoke")
    spec = stored_spec(study)
    assert spec.base_schema == 0
    prints = [str(trial.user_attrs["config_fingerprint"]) for trial in study.get_trials() if trial.state.name != "FAIL"]
    assert {"-" in each for each in prints} == {True, False}
    for trial in study.get_trials():
        if trial.state.name == "COMPLETE":
            assert is_unchanged(exported(study, spec, trial.number))
    newest = study.get_trials()[-1].number
    repeated = replay(old_store, "smoke", newest)
    assert repeated.identical
    assert repeated.fingerprint_agrees


def test_an_old_export_that_was_edited_is_told(tmp_path: Path) -> None:
    text = (LEGACY / "best.toml").read_text()
    (tmp_path / "edited.toml").write_text(text.replace("ema_decay = 0.995", "ema_decay = 0.99"))
    found = load_config(tmp_path / "edited.toml")
    assert found.config.optimizer.ema_decay == 0.99
    assert not is_unchanged(found)


def test_a_configuration_file_states_its_version(tmp_path: Path) -> None:
    config = with_curriculum(RunConfig()).replaced({"scene.snr_db": [0.0, 10.0]})
    for name in ("a.toml", "a.json"):
        write_config(Exported(config=config), tmp_path / name)
        assert f"{SCHEMA_KEY}" in (tmp_path / name).read_text()
        assert load_config(tmp_path / name).config == config
    assert load_scene(tmp_path / "a.toml") == config.scene
    assert load_scene(LEGACY / "best.toml") == load_config(LEGACY / "best.toml").config.scene


def test_defaults_of_a_specification() -> None:
    class Inner(Spec):
        a: int
        b: float = 2

    class Outer(Spec):
        one: Inner = Inner(a=1)
        many: list[Inner] = Field(default_factory=list)
        perhaps: Inner | None = None
        named: dict[str, Inner] = Field(default_factory=dict)

    assert defaults_of(Outer) == {
        "one": {"a": 1, "b": 2.0},
        "many": [],
        "many[]": {"b": 2.0},
        "perhaps": None,
        "perhaps[]": {"b": 2.0},
        "named": {},
    }
