"""Waves and arrays other than the default ones: the likelihood finds the sources once they are named."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import ris_hpo
from ris_hpo.errors import ConfigError
from ris_hpo.estimators import EstimatorSpec, LikelihoodSpec, deterministic_ml, estimate
from ris_hpo.estimators.goodness import misfit
from ris_hpo.learning.inference import InferenceSpec, localize
from ris_hpo.learning.network import Network
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.files import load_scenes, save_scenes
from ris_hpo.physics.grid import GridSpec, Region
from ris_hpo.physics.scene import Scenes, SceneSpec, simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.metrics import score
from ris_hpo.training.finished import load_network
from tests.estimators.conftest import COARSE

PLACES = ((0.5, 0.2, 1.2), (-0.6, -0.1, 0.8), (0.1, 0.3, 2.0))


def by_the_usual_formula(wave: str) -> Scenes:
    """One source at 20 dB, simulated in numpy with delta = |p|^2 / (2 r) - p.u; the file names ``wave``."""
    rng = np.random.default_rng(61)
    index, batch, m, snapshots = np.arange(64), len(PLACES), 8, 12
    place = np.stack([0 * index, (index % 8 - 3.5) * 0.15, (index // 8 - 3.5) * 0.15], -1)

    def normal(*shape):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / 2**0.5

    y, h, c = (
        np.zeros((batch, snapshots, m), complex),
        normal(batch, m, 64),
        np.exp(2j * np.pi * rng.random((batch, 12, 64))),
    )
    for b, (az, el, r) in enumerate(PLACES):
        direction = np.array([np.cos(el) * np.cos(az), np.cos(el) * np.sin(az), np.sin(el)])
        a = np.exp(-2j * np.pi * ((place**2).sum(-1) / (2 * r) - place @ direction) / 0.3) / 8
        y[b] = (c[b] * a) @ h[b].T * normal(snapshots, 1)
    noise = (np.abs(y) ** 2).mean((1, 2)) / 100
    y = y + normal(*y.shape) * noise[:, None, None] ** 0.5
    azimuth, elevation, range_m = (
        torch.tensor(value, dtype=torch.float32)[:, None] for value in zip(*PLACES, strict=True)
    )
    truth = Sources(azimuth, elevation, range_m, torch.ones_like(range_m), torch.ones_like(range_m, dtype=torch.bool))
    known = (torch.from_numpy(value).to(torch.complex64) for value in (y, h, c))
    geometry = Geometry(num_horizontal=8, num_vertical=8, wave=wave)
    return Scenes(geometry, *known, torch.from_numpy(noise).float(), truth)


def test_data_of_the_usual_fresnel_formula_are_met_by_naming_it():
    spec = LikelihoodSpec(grid=COARSE)
    scenes = by_the_usual_formula("paraxial")
    found = deterministic_ml(scenes, spec)
    assert score(found, scenes.truth).success == 1
    assert misfit(found) is None
    assert misfit(deterministic_ml(by_the_usual_formula("fresnel"), spec)) is not None


def test_a_row_of_elements_finds_azimuth_and_range_with_its_elevation_known():
    spec = SceneSpec().replaced(
        {
            "geometry.num_horizontal": 32,
            "geometry.num_vertical": 1,
            "elevation_deg": (10.0, 10.0),
            "range_m": (0.5, 3.0),
            "num_sources": (1, 2),
        }
    )
    scenes = simulate(spec, 62, range(10), snr_db=torch.full((10,), 20.0))
    region = Region(elevation_deg=(10.0, 10.0), range_m=(0.5, 3.0))
    found = deterministic_ml(scenes, LikelihoodSpec(grid=GridSpec(num_v=65, num_w=3, num_rho=8, region=region)))
    assert score(found, scenes.require_truth()).success >= 0.9
    assert (found.elevation[found.mask].rad2deg() - 10).abs().max().item() < 1e-3
    assert misfit(found) is None


def test_listed_elements_find_sources_on_a_grid_of_their_own(tmp_path):
    """80 elements on two rings, with a gap that rows and columns do not have; through a file that lists them."""
    rings = [(r * np.cos(t), r * np.sin(t)) for r in (0.35, 0.6) for t in 2 * np.pi * np.arange(40) / 40]
    spec = SceneSpec(geometry=Geometry(positions_m=rings), num_sources=(1, 2), range_m=(0.5, 3.0))
    save_scenes(tmp_path / "rings.npz", simulate(spec, 63, range(10), snr_db=torch.full((10,), 20.0)))
    scenes = load_scenes(tmp_path / "rings.npz")
    found = deterministic_ml(scenes, LikelihoodSpec(grid=GridSpec(region=Region(range_m=(0.5, 3.0)))))
    assert score(found, scenes.require_truth()).success >= 0.9
    assert misfit(found) is None
    with pytest.raises(ConfigError, match="needs rows and columns"):
        estimate("modified-music", scenes, EstimatorSpec(), 1)
    with pytest.raises(ConfigError, match="'dft'"):
        spec.replaced({"codes": "dft"})


def test_eight_sources_are_drawn_and_answered():
    spec = SceneSpec(max_sources=8, num_sources=(0, 8), min_separation_deg=12.0, range_m=(0.5, 4.0), num_snapshots=32)
    count = torch.tensor([6, 8])
    scenes = simulate(spec, 72, range(2), num_sources=count, snr_db=torch.full((2,), 25.0))
    found = deterministic_ml(scenes, LikelihoodSpec(max_sources=8, num_sources=(0, 8)))
    assert found.num_sources.tolist() == [6, 8]
    assert score(found, scenes.truth).success == 1
    assert simulate(spec, 73, range(60)).truth.num_sources.unique().tolist() == list(range(9))


def shipped() -> tuple[Network, InferenceSpec]:
    network, config = load_network(Path(ris_hpo.__file__).parent / "weights" / "default.safetensors")
    return network, config.inference


def test_a_channel_of_its_own_in_every_snapshot(tmp_path):
    """The model equation in numpy; then bound, likelihood and the network that ships use each snapshot's own H."""
    spec = SceneSpec(channel="per_snapshot", num_sources=(1, 2), channel_error_db=None)
    scenes = simulate(spec, 64, range(8), snr_db=torch.full((8,), 20.0))
    assert scenes.bs_ris_channel.shape == (8, 16, 16, 144)
    truth, place = scenes.truth, Geometry().element_positions().numpy()
    h, c, s = (value[0].numpy() for value in (scenes.bs_ris_channel, scenes.ris_codes, scenes.symbols))
    clean = np.zeros((16, 16), complex)
    for k in range(int(truth.num_sources[0])):
        az, el, r = (float(value[0, k]) for value in (truth.azimuth, truth.elevation, truth.range_m))
        at = r * np.array([np.cos(el) * np.cos(az), np.cos(el) * np.sin(az), np.sin(el)])
        distance = np.linalg.norm(np.concatenate([np.zeros((144, 1)), place], 1) - at, axis=1)
        a = np.exp(-2j * np.pi * (distance - r) / 0.3) / 12
        clean += np.stack([h[snapshot] @ (c[snapshot] * a) * s[snapshot, k] for snapshot in range(16)])
    noise = np.mean(np.abs(scenes.y[0].numpy() - clean) ** 2) / float(scenes.noise_power[0])
    assert 0.7 < noise < 1.3

    save_scenes(tmp_path / "moving.npz", scenes)
    scenes = load_scenes(tmp_path / "moving.npz")
    network, inference = shipped()
    for found in (deterministic_ml(scenes), localize(network, scenes, inference)):
        assert score(found, scenes.require_truth()).success >= 0.85
        assert misfit(found) is None
    constant = dataclasses.replace(scenes, bs_ris_channel=scenes.bs_ris_channel[:, 0])
    repeated = dataclasses.replace(
        scenes, bs_ris_channel=scenes.bs_ris_channel[:, :1].expand(-1, 16, -1, -1).contiguous()
    )
    torch.testing.assert_close(deterministic_crb(constant), deterministic_crb(repeated), rtol=1e-6, atol=1e-15)
    for one, other in zip(network.features(constant), network.features(repeated), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="one channel for all snapshots"):
        deterministic_ml(scenes, LikelihoodSpec(channel_error_db=-10.0))
