"""Inference settings of schema 0 that replaced those of the likelihood: read under the one name that is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from ris_hpo.config import SCHEMA_KEY
from ris_hpo.errors import ConfigError, SpaceError
from ris_hpo.learning.inference import InferenceSpec
from ris_hpo.programs.inference import RunConfig as InferenceRun
from ris_hpo.search.files import load_study
from ris_hpo.search.lifecycle import create_or_resume_study, stored_spec
from ris_hpo.search.spec import StudySpec
from ris_hpo.store.open import open_store
from ris_hpo.training.config import RunConfig
from ris_hpo.training.files import is_unchanged, load_config

KEPT = Path(__file__).parents[2] / "studies" / "results" / "wide" / "best.toml"
OLD = {
    "refinement_steps": 7,
    "count_weight": 2.5,
    "channel_error_db": -10.0,
    "likelihood": {"search": {"final_steps": 12}, "evidence": {"prior_weight": 3.0}, "channel_error_db": -20.0},
}


@pytest.mark.parametrize("kind", [RunConfig, InferenceRun])
def test_the_values_that_took_effect_are_kept(kind):
    likelihood = kind.from_stored({"inference": OLD}, "test").inference.likelihood
    assert (likelihood.search.final_steps, likelihood.evidence.prior_weight) == (7, 2.5)
    assert likelihood.channel_error_db == -10


def test_a_tree_that_left_them_out_has_the_defaults_of_its_version():
    given = {"inference": {"likelihood": {"search": {"final_steps": 12}, "channel_error_db": -20.0}}}
    found = RunConfig.from_stored(given, "test").inference
    assert found == RunConfig().inference
    assert found.likelihood.channel_error_db is None  # it had no effect then, and must not get one now
    assert (found.likelihood.search.final_steps, found.likelihood.evidence.prior_weight) == (10, 1.0)


def test_the_kept_winner_of_wide_is_unchanged():
    found = load_config(KEPT)
    likelihood = found.config.inference.likelihood
    assert likelihood.search.final_steps == 14
    assert likelihood.evidence.prior_weight == pytest.approx(0.39975, rel=1e-4)
    assert found.provenance is not None
    recorded = found.provenance.config_fingerprint
    assert is_unchanged(found) or RunConfig.is_fingerprint_of(recorded, found.config.stored(), "test")


@pytest.mark.parametrize("name", ["refinement_steps", "count_weight", "channel_error_db"])
def test_an_old_name_is_answered_with_the_new_one(name, tmp_path):
    file = tmp_path / "old.toml"
    file.write_text(f"[inference]\n{name} = 1\n")
    for attempt in (
        lambda: load_config(file),
        lambda: RunConfig().replaced({f"inference.{name}": 1}),
        lambda: InferenceSpec.parse({name: 1}),
    ):
        with pytest.raises(ConfigError, match=r"it is called 'inference\.likelihood\.[a-z_.]*' now"):
            attempt()


def test_an_old_study_is_joined_under_the_new_names(tmp_path):
    """The old names stay in the study, whose trials have them; a file with the new ones means the same space."""
    today = load_study("inference")
    old_names = {
        "inference.likelihood.search.final_steps": "inference.refinement_steps",
        "inference.likelihood.evidence.prior_weight": "inference.count_weight",
    }
    tree = today.model_dump(mode="json", exclude={"base_schema"})
    tree["space"] = {old_names.get(path, path): value for path, value in tree["space"].items()}
    old = StudySpec.from_stored({SCHEMA_KEY: 0, **tree}, "test")
    assert set(old_names.values()) <= set(old.space)
    config = old.config({"inference.refinement_steps": 3, "inference.count_weight": 0.5})
    assert config.inference.likelihood.search.final_steps == 3
    store = open_store(f"sqlite:///{tmp_path}/studies.db")
    try:
        create_or_resume_study(store, old)
        joined = create_or_resume_study(store, today)
        assert set(old_names.values()) <= set(stored_spec(joined).space)
        narrower = today.replaced({"space": {**tree["space"], "inference.count_weight": {"low": 0.0, "high": 7.0}}})
        with pytest.raises(SpaceError, match="differs"):
            create_or_resume_study(store, narrower)
    finally:
        store.close()
