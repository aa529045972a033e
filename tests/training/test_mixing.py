"""Own scenes mixed with simulated ones, in an order that depends on the position alone; files that settings name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from ris_hpo.errors import ConfigError
from ris_hpo.learning.network import Network
from ris_hpo.physics.files import save_scenes
from ris_hpo.physics.scene import Scenes, simulate
from ris_hpo.search.files import load_study, with_own_scenes
from ris_hpo.training import checkpoint
from ris_hpo.training.checkpoint import LAST
from ris_hpo.training.config import RunConfig
from ris_hpo.training.data import OwnScenes, RunData
from ris_hpo.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(RunConfig().scene, 78, range(20))


def data_of(config: RunConfig, scenes: Scenes | None) -> RunData:
    torch.manual_seed(0)
    own = None if scenes is None else OwnScenes.divide(config, scenes)
    return RunData(config, Network(config.network), CPU, own)


def noise(data: RunData, start: int, size: int) -> list[float]:
    """What tells the scenes of a batch apart, to the digits that do not depend on the batch."""
    found, features = data.batch(start, size)
    assert len(found) == len(features.maps) == size
    return rounded(found)


def rounded(scenes: Scenes) -> list[float]:
    return [float(f"{value:.4g}") for value in scenes.noise_power.tolist()]


def test_simulated_scenes_have_their_share_whatever_the_batch(tiny: RunConfig, scenes: Scenes) -> None:
    data = data_of(tiny.replaced({"data.simulated_share": 0.25}), scenes)
    assert data.own is not None
    own = set(rounded(data.own.training))
    whole = noise(data, 0, 64)
    assert sum(value not in own for value in whole) == 16
    assert Counter(noise(data, 0, 24) + noise(data, 24, 40)) == Counter(whole)
    assert {value: count for value, count in Counter(whole).items() if value in own} == dict.fromkeys(own, 3)


def test_training_begins_on_simulated_scenes_and_goes_on_with_own_ones(tiny: RunConfig, scenes: Scenes) -> None:
    data = data_of(tiny.replaced({"data.simulated_first": 0.25}), scenes)  # 24 of 96
    assert data.own is not None
    own = set(rounded(data.own.training))
    assert not own & set(noise(data, 0, 24))
    assert sorted(noise(data, 24, 16)) == sorted(own)  # one epoch
    assert len(set(noise(data, 16, 16)) - own) == 8


def test_only_what_can_be_mixed_is(tiny: RunConfig, scenes: Scenes) -> None:
    with pytest.raises(ConfigError, match=r"for training on your own scenes"):
        data_of(tiny.replaced({"data.simulated_share": 0.5}), None)
    with pytest.raises(ConfigError, match=r"16 snapshots and 16 antennas, simulated ones 4 and 16"):
        data_of(tiny.replaced({"data.simulated_share": 0.5, "scene.num_snapshots": 4}), scenes)


def test_files_that_settings_name_are_trained_on_and_known_again(
    tiny: RunConfig, scenes: Scenes, tmp_path: Path
) -> None:
    save_scenes(tmp_path / "own.npz", scenes)
    config = tiny.replaced({"data.scenes": str(tmp_path / "own.npz"), "budget.scenes": 32})
    trainer = Trainer(config, tmp_path / "run")
    for _ in trainer.run():
        pass
    mark = trainer.data.fingerprint
    assert checkpoint.read(tmp_path / "run" / LAST)[1]["data"] == mark
    assert Trainer(config, tmp_path / "run").finished
    Trainer(config.replaced({"data.scenes_fingerprint": mark}), tmp_path / "same")
    with pytest.raises(ConfigError, match=rf"fingerprint {mark}, expected 0123"):
        Trainer(config.replaced({"data.scenes_fingerprint": "0123"}), tmp_path / "other")


def test_a_study_states_whose_scenes_it_is_about(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study("smoke")
    assert with_own_scenes(study) == study
    save_scenes(tmp_path / "own.npz", scenes)
    monkeypatch.chdir(tmp_path)
    found = with_own_scenes(study.with_base({"data.scenes": "own.npz"}))
    assert found.base["data.scenes"] == str(tmp_path / "own.npz")
    config = found.config({})
    assert len(config.data.scenes_fingerprint) == 16
    assert with_own_scenes(found).base == found.base
    save_scenes(tmp_path / "own.npz", scenes[:19])
    with pytest.raises(ConfigError, match=r"another file, or a changed one"):
        with_own_scenes(found)
