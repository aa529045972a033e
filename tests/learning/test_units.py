"""A trained network gives the same sources whatever the units of H and y."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ris_hpo
from ris_hpo.learning.inference import localize, network_sources, predict
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.training.trainer import load_network
from tests.estimators.test_units import in_units, same_sources
from tests.properties import examples

decades = st.floats(-6, 6)


@pytest.mark.parametrize("name", ["default", "imperfect"])
def test_shipped_networks_give_the_same_sources_in_any_units(name):
    network, config = load_network(Path(ris_hpo.__file__).parent / "weights" / f"{name}.safetensors", "cpu")
    scenes = simulate(SceneSpec(), 511, range(3), num_sources=torch.tensor([1, 2, 2]), snr_db=torch.full((3,), 20.0))
    expected = localize(network, scenes, config.inference)
    slots = network_sources(predict(network, scenes), config.inference)

    @examples(4)
    @given(decades, decades)
    def holds(received, channel):
        other = in_units(scenes, 10**received, 10**channel)
        unit = 10 ** (2 * (received - channel))
        same_sources(localize(network, other, config.inference), expected, unit, 1e-2)
        same_sources(network_sources(predict(network, other), config.inference), slots, 1.0, 1e-3)

    holds()
