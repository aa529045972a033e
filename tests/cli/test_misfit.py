"""Commands say when the model does not fit the data, and what that usually means."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ris_hpo.physics.files import save_scenes
from ris_hpo.physics.scene import SceneSpec, simulate
from tests.cli.conftest import Cli


@pytest.fixture
def conjugated(tmp_path: Path) -> Path:
    scenes = simulate(SceneSpec(), 560, range(8), snr_db=torch.full((8,), 15.0))
    wrong = dataclasses.replace(scenes, bs_ris_channel=scenes.bs_ris_channel.conj().resolve_conj())
    save_scenes(tmp_path / "conjugated.npz", wrong)
    return tmp_path / "conjugated.npz"


def test_localize_and_evaluate_warn_of_a_misfit(cli: Cli, conjugated: Path) -> None:
    found = cli("localize", conjugated, "--estimator", "ml", "--out", "estimates.npz", "--json")
    assert found.code == 0
    assert found.json["scenes_that_do_not_fit"] == 8
    assert "warning: the model does not fit 8 of 8 scenes" in found.err
    assert "H or codes conjugated" in found.err
    with np.load("estimates.npz") as arrays:
        assert (arrays["residual"] > arrays["residual_range"][:, 1]).all()
        assert arrays["on_border"].shape == (8, 5)
    scored = cli("evaluate", "--estimates", "estimates.npz", "--scenes", conjugated, "--json")
    assert scored.json["scenes_that_do_not_fit"] == 8
    assert "does not fit" in scored.err


def test_right_data_are_not_warned_of(cli: Cli) -> None:
    assert cli("simulate", "--num-scenes", 6, "--out", "scenes.npz").code == 0
    found = cli("localize", "scenes.npz", "--out", "estimates.npz", "--json")
    assert found.json["scenes_that_do_not_fit"] == 0
    assert "warning" not in found.err
    scored = cli("evaluate", "--scenes", "scenes.npz", "--estimator", "music", "--json")
    assert scored.json["scenes_that_do_not_fit"] > 0  # what it finds is wrong, and so it explains little
    assert "or sources that the method missed" in scored.err


def test_the_network_path_says_how_well_it_fits(cli: Cli, conjugated: Path) -> None:
    told = cli("evaluate", "--scenes", conjugated, "--path", "network", "--json")
    assert told.json["scenes_that_do_not_fit"] == 8
    assert "does not fit 8 of 8" in told.err


def test_train_warns_of_own_data_that_do_not_fit(cli: Cli, conjugated: Path) -> None:
    small = ["network.width=16", "network.depth=1", "network.heads=2", "network.head_width=32"]
    small += ["network.residual_passes=0", "network.cell_width=0", "optimizer.batch_size=4", "budget.scenes=8"]
    small += ["budget.validate_every=8", "budget.pipeline_scenes=2"]
    settings = [word for pair in small for word in ("--set", pair)]
    outcome = cli("train", "--out", "run", "--scenes", conjugated, *settings)
    assert "warning: the model does not fit 8 of 8 scenes" in outcome.err
