from __future__ import annotations

import pytest
import torch

from ris_hpo.errors import ConfigError
from ris_hpo.learning.hybrid import HybridSpec, covariances
from ris_hpo.learning.inference import InferenceSpec, localize, network_sources, predict
from ris_hpo.learning.metrics import score
from ris_hpo.learning.network import Network, NetworkSpec, large
from ris_hpo.physics.scene import SceneSpec, grid_of_cells, simulate

SMALL = {"width": 16, "depth": 2, "heads": 2}
FORMS = [
    NetworkSpec(**SMALL),
    NetworkSpec(**SMALL, residual_passes=0, count_head="ordinal"),
    NetworkSpec(**SMALL, covariance_head="factor"),
    NetworkSpec(**SMALL, covariance_head="factor", factor_basis="free"),
    NetworkSpec(**SMALL, front_end="tokens"),
    NetworkSpec(**SMALL, front_end="tokens", covariance_head="factor", factor_basis="free"),
]


def form(spec: NetworkSpec) -> str:
    return f"{spec.front_end}-{spec.covariance_head}-{spec.factor_basis}-{spec.count_head}"


@pytest.fixture(scope="module")
def scenes():
    return simulate(SceneSpec(), 4, range(12))


@pytest.mark.parametrize("spec", FORMS, ids=form)
def test_outputs_are_well_formed(spec, scenes):
    torch.manual_seed(0)
    network = Network(spec)
    outputs = predict(network, scenes)
    assert torch.allclose(outputs.log_count.exp().sum(-1), torch.ones(12), atol=1e-5)
    assert (outputs.existence[:, :-1] >= outputs.existence[:, 1:] - 30).all()
    for value, (low, high) in zip(outputs.cosines, spec.grid.region.bounds(), strict=True):
        assert (value >= low - 1e-6).all()
        assert (value <= high + 1e-6).all()
    mixed = covariances(outputs, scenes, HybridSpec(beta=0.2))
    for matrix in mixed:
        assert torch.allclose(matrix, matrix.mH, atol=1e-5)
        assert torch.allclose(matrix.diagonal(dim1=-2, dim2=-1).real.sum(-1), torch.tensor(144.0), rtol=1e-4)
        assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-3


@pytest.mark.parametrize("spec", FORMS, ids=form)
def test_a_scene_does_not_depend_on_its_batch(spec, scenes):
    torch.manual_seed(0)
    network = Network(spec)
    together, alone = predict(network, scenes), predict(network, scenes[3:4])
    assert torch.allclose(together.log_count[3:4], alone.log_count, atol=1e-4)
    assert torch.allclose(together.v[3:4, :5], alone.v[:, :5], atol=1e-4)


def test_untrained_proposals_are_the_spectrum_maxima_and_polish_makes_them_a_localizer():
    """One source at 10 dB: the pipeline works before any training, which is why searches look at the network path."""
    scenes = grid_of_cells(SceneSpec(), 8, [10.0], [1], 32)
    torch.manual_seed(0)
    network = Network(NetworkSpec(**SMALL, residual_passes=0))
    known = torch.ones(32, dtype=torch.long)
    refined = localize(network, scenes, InferenceSpec(), num_sources=known)
    plain = network_sources(predict(network, scenes), InferenceSpec(), known)
    assert score(refined, scenes.truth).success >= 0.9
    assert score(plain, scenes.truth).success < score(refined, scenes.truth).success


@pytest.mark.parametrize("localizer", ["music", "mvdr"])
def test_covariance_localizers_run_on_the_effective_covariance(localizer, scenes):
    torch.manual_seed(0)
    network = Network(NetworkSpec(**SMALL))
    found = localize(network, scenes, InferenceSpec(localizer=localizer), num_sources=scenes.truth.num_sources)
    assert torch.equal(found.num_sources, scenes.truth.num_sources)


def test_noise_power_can_be_hidden(scenes):
    network = Network(NetworkSpec(**SMALL, noise_known=False))
    doubled = type(scenes)(scenes.geometry, scenes.y, scenes.bs_ris_channel, scenes.ris_codes, 2 * scenes.noise_power)
    assert torch.equal(network.features(scenes).maps, network.features(doubled).maps)
    assert torch.equal(network.features(scenes).context, network.features(doubled).context)


def test_large_is_the_published_size():
    counts = Network(large()).parameter_counts()
    assert sum(counts.values()) == pytest.approx(16.3e6, rel=0.03)
    assert counts["backbone"] == pytest.approx(6.7e6, rel=0.05)
    assert counts["heads"] == pytest.approx(9.7e6, rel=0.05)


@pytest.mark.parametrize(
    "change", [{"heads": 5}, {"front_end": "tokens", "covariance_head": "factor"}, {"width": -1}, {"wdith": 32}]
)
def test_impossible_forms_are_refused(change):
    with pytest.raises(ConfigError):
        NetworkSpec.parse({**SMALL, **change})
