"""Numbers that version 0.1.0 computed, recorded before the network was divided into modules.

A change of a state's name, of the order in which parameters are drawn, or of any step from a scene to its sources
shows here. The figures are rounded: another processor's products differ in the last digits.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ris_hpo
from ris_hpo.learning.inference import localize, network_sources, predict
from ris_hpo.learning.network import Network, NetworkSpec
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.training.finished import load_network

RECORDED = json.loads((Path(__file__).parent / "data" / "recorded.json").read_text())


def summary(value: torch.Tensor) -> list[float]:
    """Mean, root mean square, first and last number."""
    flat = (torch.view_as_real(value) if value.is_complex() else value).double().flatten()
    return [float(x) for x in (flat.mean(), flat.square().mean().sqrt(), flat[0], flat[-1])]


@pytest.mark.parametrize("name", RECORDED["forms"])
def test_forms_have_the_same_state_and_give_the_same_outputs(name):
    recorded = RECORDED["forms"][name]
    torch.manual_seed(0)
    network = Network(NetworkSpec.parse(recorded["spec"])).eval()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == recorded["state"]
    outputs = predict(network, simulate(SceneSpec(), 4, range(4)))
    found = {field: summary(value) for field, value in outputs._asdict().items() if value is not None}
    assert found.keys() == recorded["outputs"].keys()
    for field, figures in recorded["outputs"].items():
        assert found[field] == pytest.approx(figures, rel=1e-4, abs=1e-5), field


@pytest.mark.parametrize("name", RECORDED["weights"])
def test_shipped_weights_find_the_same_sources(name):
    file = Path(ris_hpo.__file__).parent / "weights" / f"{name}.safetensors"
    network, config = load_network(file)
    scenes = simulate(SceneSpec(channel_error_db=(-15.0, -15.0)), 77, range(6))
    sharpened = {"localizer": "music", "hybrid.sharpening": 3, "hybrid.beta": 0.2}
    paths = {
        "pipeline": localize(network, scenes, config.inference),
        "network": network_sources(predict(network, scenes), config.inference),
        "music": localize(network, scenes, config.inference.replaced(sharpened)),
    }
    for path, found in paths.items():
        recorded = RECORDED["weights"][name][path]
        assert found.num_sources.tolist() == [len(scene) for scene in recorded["azimuth"]], path
        for field in ("azimuth", "elevation", "range_m"):
            values = getattr(found, field)
            for scene, expected in enumerate(recorded[field]):
                assert values[scene][found.mask[scene]].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4), field
        if "existence" in recorded:
            assert torch.allclose(found.existence, torch.tensor(recorded["existence"]), atol=1e-3), path
