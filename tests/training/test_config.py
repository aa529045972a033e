"""A run configuration as it is written: whatever a file leaves out stays as its owner has it."""

from pathlib import Path
from typing import Literal

import pytest

from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError
from ris_hpo.training.config import BalanceSpec, BudgetSpec, DataSpec, PhaseSpec, RunConfig
from ris_hpo.training.files import Exported, Provenance, is_unchanged, load_config, write_config
from ris_hpo.training.stability import OptimizerSpec

LITTLE = 1e-9
LIMITS: list[tuple[Spec, dict[str, tuple[list[float], list[float]]]]] = [  # accepted, refused
    (RunConfig(), {"seed": ([0, 2**63 - 1], [-1, 2**63])}),
    (
        BudgetSpec(),
        {
            **dict.fromkeys(("scenes", "validate_every", "validation_scenes"), ([1], [0])),
            **dict.fromkeys(("pipeline_scenes", "validation_seed", "patience", "fixed_scenes"), ([0], [-1])),
            "calibration_scenes": ([64], [63]),
        },
    ),
    (DataSpec(), dict.fromkeys(("simulated_share", "simulated_first"), ([0, 1 - LITTLE], [-LITTLE, 1]))),
    (BalanceSpec(), {"rate": ([LITTLE, 1], [0, 1 + LITTLE]), "asymmetry": ([0, 5], [-LITTLE, 5 + LITTLE])}),
    (
        PhaseSpec(name="a", share=0.5),
        {
            "share": ([LITTLE, 1], [0, 1 + LITTLE]),
            "ramp_share": ([0.05, 0.15], [0.05 - LITTLE, 0.15 + LITTLE]),
            "beta": ([0, 0.9], [-LITTLE, 0.9 + LITTLE]),
            "backbone_rate": ([0, 1], [-LITTLE, 1 + LITTLE]),
            "patience": ([0], [-1]),
        },
    ),
    (
        OptimizerSpec(ema_decay=0),
        {
            "learning_rate": ([LITTLE, 1], [0, 1 + LITTLE]),
            "head_multiplier": ([LITTLE, 100], [0, 100 + LITTLE]),
            "weight_decay": ([0, 1], [-LITTLE, 1 + LITTLE]),
            "batch_size": ([1, 65536], [0, 65537]),
            "accumulate": ([1, 1024], [0, 1025]),
            "warmup": ([0, 0.9], [-LITTLE, 0.9 + LITTLE]),
            "warmup_floor": ([LITTLE, 1], [0, 1 + LITTLE]),
            "final_rate": ([0, 1], [-LITTLE, 1 + LITTLE]),
            "clip": ([LITTLE], [0]),
            "ema_decay": ([0, 1 - LITTLE], [-LITTLE, 1]),
            "swa_start": ([0, 1], [-LITTLE, 1 + LITTLE]),
            "skips_allowed": ([1], [0]),
        },
    ),
]


@pytest.mark.parametrize(("spec", "limits"), LIMITS, ids=lambda each: type(each).__name__)
def test_a_setting_is_accepted_up_to_its_limits_and_refused_beyond(
    spec: Spec, limits: dict[str, tuple[list[float], list[float]]]
) -> None:
    for name, (accepted, refused) in limits.items():
        for value in accepted:
            assert getattr(spec.replaced({name: value}), name) == value
        for value in refused:
            with pytest.raises(ConfigError, match=name):
                spec.replaced({name: value})


def test_a_table_with_one_key_leaves_its_neighbours_alone() -> None:
    """`inference.likelihood` has defaults of its own, which a plain LikelihoodSpec has not."""
    written = RunConfig.parse({"inference": {"likelihood": {"search": {"greedy_steps": 7}}}})
    assert written == RunConfig().replaced({"inference.likelihood.search.greedy_steps": 7})
    assert written.inference.likelihood.batch == RunConfig().inference.likelihood.batch


def test_what_is_written_in_full_comes_back() -> None:
    changed = RunConfig().replaced({"inference.likelihood.double": True, "inference.likelihood.batch": 16})
    assert RunConfig.parse(changed.model_dump(mode="json")) == changed


@pytest.mark.parametrize("form", ["toml", "json"])
def test_a_file_in_either_form_is_read_by_its_suffix(form: Literal["toml", "json"], tmp_path: Path) -> None:
    config = RunConfig().replaced({"optimizer.clip": 2.0, "scene.range_m": [2.0, 7.0]})
    origin = Provenance(
        study="wide", trial=3, state="complete", exported="2026-11-28", config_fingerprint=config.fingerprint()
    )
    file = tmp_path / f"run.{form}"
    for provenance in (None, origin):
        write_config(Exported(config=config, provenance=provenance), file)
        found = load_config(file)
        assert (found.config, found.provenance, found.older) == (config, provenance, False)
        assert is_unchanged(found) == (provenance is not None)
    other = {"toml": "json", "json": "toml"}[form]
    file.rename(tmp_path / f"run.{other}")
    with pytest.raises(ConfigError, match=f"run.{other}: not valid {other.upper()}"):
        load_config(tmp_path / f"run.{other}")
    edited = RunConfig().replaced({"optimizer.clip": 3.0})
    assert not is_unchanged(Exported(config=edited, provenance=origin))


def test_hand_written_and_broken_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain.toml"
    plain.write_text("seed = 3\n[budget]\nscenes = 2048\n")
    found = load_config(plain)
    assert (found.config.seed, found.config.budget.scenes, found.provenance) == (3, 2048, None)
    for name, text, message in (
        ("a.toml", "[budgt]\nscenes = 1\n", "did you mean 'budget'"),
        ("b.toml", "seed = [", "not valid TOML"),
        ("c.json", "{", "not valid JSON"),
        ("d.json", "[]", "expected a JSON object"),
        ("e.toml", "[provenance]\ntrial = 1\n", "provenance"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / name)
    for name in ("missing.toml", "missing.json"):
        with pytest.raises(ConfigError, match="no such file"):
            load_config(tmp_path / name)
