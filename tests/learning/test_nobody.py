"""The networks that ship report no source where there is none, although none of them was trained on such scenes."""

from pathlib import Path

import pytest
import torch

import ris_hpo
from ris_hpo.learning.inference import localize
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.training.finished import load_network


@pytest.mark.parametrize("name", ["default", "imperfect"])
def test_shipped_networks_report_none_in_noise(name):
    network, config = load_network(Path(ris_hpo.__file__).parent / "weights" / f"{name}.safetensors")
    assert config.inference.likelihood.num_sources == (0, 5)  # old files say 1..5, and are read so
    noise = simulate(SceneSpec(), 530, range(40), num_sources=torch.zeros(40, dtype=torch.long))
    found = localize(network, noise, config.inference)
    assert (found.num_sources == 0).double().mean().item() >= 0.95
    weak = simulate(SceneSpec(), 531, range(20), snr_db=torch.full((20,), -2.0))
    found = localize(network, weak, config.inference)
    assert (found.num_sources >= 1).all()
