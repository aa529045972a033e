"""Taking a configuration home: the file, its provenance, and the trial's own curve again, digit for digit."""

import dataclasses
import json
import tomllib

import optuna
import pytest
import torch

from ris_hpo.errors import CheckpointError, ConfigError, OutputError, StudyError
from ris_hpo.report.trial_figures import TrialFigures
from ris_hpo.results.export import exported, package, replay_config
from ris_hpo.scoring.k_loc import WORST_K_LOC, finite_score
from ris_hpo.search.files import load_study
from ris_hpo.store import attributes as names
from ris_hpo.training.files import is_unchanged, load_config, write_config
from ris_hpo.training.trainer import Trainer

SMALL = {"budget.scenes": 48, "budget.validate_every": 16, "budget.validation_scenes": 12, "budget.pipeline_scenes": 4}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Five random trials of the smoke space, trained for real; the second one is pruned after two reports."""
    folder = tmp_path_factory.mktemp("searched")
    spec = load_study("smoke").with_base(SMALL)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.set_user_attr(names.SPACE_FINGERPRINT, spec.space_fingerprint())
    study.set_user_attr(names.VERSIONS, {"torch": str(torch.__version__)})
    for number in range(5):
        trial = study.ask()
        config = spec.config(spec.suggest(trial), number)
        trial.set_user_attr(names.CONFIG_FINGERPRINT, config.fingerprint())
        trial.set_user_attr(names.THREADS, torch.get_num_threads())
        trainer = Trainer(config, folder / str(number))
        figures = TrialFigures(study, trial, folder / str(number), folder / "artifacts")
        figures.begin(config)
        for validation in trainer.run():
            trial.report(finite_score(validation.network.k_loc), validation.scenes_seen)
            figures.follow(trainer.history)
            if number == 1 and len(trainer.history) == 2:
                break
        if not trainer.finished:
            figures.conclude(trainer.history, None)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        conclusion = trainer.conclude()
        figures.conclude(trainer.history, conclusion)
        trial.set_user_attr(names.COMPONENTS, conclusion.network.as_dict())
        trial.set_user_attr(names.PIPELINE, conclusion.pipeline.as_dict())
        trial.set_user_attr(names.FLOOR, conclusion.floor.k_loc)
        study.tell(trial, finite_score(conclusion.network.k_loc))
    return study, spec, folder


@pytest.mark.parametrize("number", range(5))
def test_export_then_replay_is_identical(searched, tmp_path, number):
    study, spec, _ = searched
    write_config(exported(study, spec, number), tmp_path / "trial.toml")
    found = load_config(tmp_path / "trial.toml")
    assert found.config.fingerprint() == study.trials[number].user_attrs[names.CONFIG_FINGERPRINT]
    seen = []
    report = replay_config(found, tmp_path / "again", progress=lambda scenes, k_loc: seen.append(scenes))
    assert report.identical
    assert report.max_difference == 0
    assert {step.step: step.replayed for step in report.steps} == study.trials[number].intermediate_values
    assert seen == sorted(study.trials[number].intermediate_values)


@pytest.mark.parametrize("form", ["toml", "json"])
def test_both_forms_round_trip_with_provenance(searched, tmp_path, form):
    study, spec, _ = searched
    found = exported(study, spec)
    assert found.provenance.trial == study.best_trial.number
    assert found.provenance.k_loc == study.best_value
    write_config(found, tmp_path / f"best.{form}")
    assert load_config(tmp_path / f"best.{form}") == found
    assert is_unchanged(found)
    text = (tmp_path / f"best.{form}").read_text()
    tree = tomllib.loads(text) if form == "toml" else json.loads(text)
    assert tree["provenance"]["network"]["k_loc"] == study.best_value
    write_config(found, tmp_path / "other.txt", form=form)
    assert (tmp_path / "other.txt").read_text() == text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_difference_is_told_and_a_changed_file_is_refused(searched, tmp_path):
    study, spec, _ = searched
    found = exported(study, spec, 0)
    curve = [(step, value + 1e-9) for step, value in found.provenance.curve]
    other = found.replaced({"provenance.curve": curve})
    report = replay_config(other, tmp_path / "a")
    assert not report.identical
    assert 0 < report.max_difference < 1e-8
    with pytest.raises(CheckpointError, match="already there"):
        replay_config(found, tmp_path / "a")
    changed = found.replaced({"config.optimizer.learning_rate": 1e-3})
    with pytest.raises(ConfigError, match="changed after its export"):
        replay_config(changed, tmp_path / "b")
    with pytest.raises(ConfigError, match="no curve to compare"):
        replay_config(found.replaced({"provenance": None}), tmp_path / "b")
    stopped = replay_config(found, tmp_path / "c", stop=lambda: True)
    assert stopped.stopped
    assert not stopped.identical


def test_what_cannot_be_exported(searched, tmp_path):
    study, spec, _ = searched
    with pytest.raises(StudyError, match="has no trial 77: it has 5"):
        exported(study, spec, 77)
    with pytest.raises(StudyError, match="no completed trial yet"):
        exported(optuna.create_study(), spec)
    with pytest.raises(StudyError, match="use the version that ran it"):
        exported(study, spec.with_base({"budget.validation_scenes": 13}), 0)
    waiting = optuna.create_study()
    waiting.enqueue_trial({})
    with pytest.raises(StudyError, match="never got its parameters"):
        exported(waiting, spec, 0)
    with pytest.raises(OutputError, match="cannot be written"):
        write_config(exported(study, spec), tmp_path / "no" / "best.toml")


def test_a_package_gives_the_sources_of_localize(searched, tmp_path):
    from ris_hpo.learning.bundle import load_bundle
    from ris_hpo.learning.inference import localize
    from ris_hpo.physics.scene import simulate
    from ris_hpo.training.trainer import load_network

    _, _, folder = searched
    told = package(folder / "0", tmp_path / "bundle")
    network, config = load_network(folder / "0")
    assert told["config_fingerprint"] == config.fingerprint()
    scenes = simulate(config.scene, 9, range(6))
    expected = localize(network, scenes, config.inference)
    found = load_bundle(tmp_path / "bundle").localize(scenes)
    for field in dataclasses.fields(expected):
        there, here = getattr(expected, field.name), getattr(found, field.name)
        assert here is there is None or torch.equal(there, here)
    with pytest.raises(OutputError, match="already there"):
        package(folder / "0", tmp_path / "bundle")
    with pytest.raises(CheckpointError):
        package(tmp_path / "nothing", tmp_path / "other")


def test_figures_of_a_trial(searched):
    study, _, folder = searched
    by_trial = []
    for trial in study.trials:
        metas = optuna.artifacts.get_all_artifact_meta(trial, storage=study._storage)
        by_trial.append({meta.filename: meta for meta in metas})
        for meta in metas:
            text = (folder / "artifacts" / meta.artifact_id).read_text()
            assert len(text) < 200_000
            if meta.filename.endswith(".svg"):
                assert meta.mimetype == "image/svg+xml"
                assert text.startswith("<svg")
            if meta.filename.endswith(".jsonl"):
                assert meta.mimetype == "application/jsonl"
                assert {"start", "step", "validation"} <= {json.loads(line)["event"] for line in text.splitlines()}
    assert set(by_trial[1]) == {"config.toml", "curve.svg", "telemetry.jsonl"}  # pruned
    whole = {"config.toml", "counts.svg", "curve.svg", "errors.svg", "scene.svg", "telemetry.jsonl"}
    assert set(by_trial[0]) == whole
    config = (folder / "artifacts" / by_trial[0]["config.toml"].artifact_id).read_text()
    assert tomllib.loads(config)["budget"]["scenes"] == SMALL["budget.scenes"]
    assert (folder / "0" / "telemetry.jsonl").exists()  # the trainer's own is left alone
    assert not (folder / "0" / "curve.svg").exists()


def test_fresh_score_is_repeatable_resumable_and_on_scenes_of_its_own(searched, tmp_path, monkeypatch):
    from ris_hpo.errors import TrainingDivergedError
    from ris_hpo.learning.inference import localize
    from ris_hpo.physics.scene import simulate
    from ris_hpo.results.winner import FRESH_FAMILY, FRESH_SHARE, fresh_score
    from ris_hpo.scoring.metrics import score
    from ris_hpo.training import checkpoint
    from ris_hpo.training.finished import load_network

    _, spec, _ = searched
    config = spec.config({}).replaced({"seed": 77})
    value = fresh_score(config, tmp_path / "a")
    assert fresh_score(config, tmp_path / "b") == value
    assert fresh_score(config, tmp_path / "a") == value  # finished already: scored again, not trained again
    network, _ = load_network(tmp_path / "a")
    scenes = simulate(config.scene, FRESH_FAMILY + 77, range(FRESH_SHARE * config.budget.pipeline_scenes))
    assert value == score(localize(network, scenes, config.inference), scenes.require_truth()).k_loc

    evidence = config.replaced({"network.count_head": "evidence", "budget.calibration_scenes": 64})
    value = fresh_score(evidence, tmp_path / "d")
    network, _ = load_network(tmp_path / "d")
    assert value == score(localize(network, scenes, config.inference), scenes.require_truth()).k_loc
    raw = checkpoint.read_network(tmp_path / "d" / checkpoint.BEST)[0]
    fitted = raw.heads["mixing"].weight
    assert (fitted != 0).any()  # what is scored is what a user gets, count included

    def diverge(trainer, *_):
        raise TrainingDivergedError("loss.count is not finite")
        yield

    monkeypatch.setattr(Trainer, "run", diverge)
    assert fresh_score(config, tmp_path / "c") == WORST_K_LOC


def test_an_inference_study_exports_the_network_with_its_settings(searched, tmp_path):
    from ris_hpo.results.winner import fresh_score
    from ris_hpo.training.trainer import load_network

    _, _, folder = searched
    small = {"checkpoint": str(folder / "0"), "budget.scenes": 4, "budget.validate_every": 2}
    spec = load_study("inference").with_base(small)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    config = spec.config(spec.suggest(trial), trial.number)
    trial.set_user_attr(names.CONFIG_FINGERPRINT, config.fingerprint())
    study.tell(trial, 2.0)
    found = exported(study, spec)
    _, trained = load_network(folder / "0")
    assert found.config == trained.replaced({"inference": config.inference.model_dump(mode="json")})
    assert found.config.inference != trained.inference
    write_config(found, tmp_path / "tuned.toml")
    assert load_config(tmp_path / "tuned.toml") == found
    with pytest.raises(ConfigError, match="no curve to compare"):
        replay_config(found, tmp_path / "again")
    values = {seed: fresh_score(config.replaced({"seed": seed}), tmp_path / str(seed)) for seed in (1, 2)}
    assert fresh_score(config.replaced({"seed": 1}), tmp_path / "1") == values[1] != values[2]
