from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ris_hpo.errors import CheckpointError, ConfigError, NumericalError
from ris_hpo.estimators.maximum_likelihood import ols
from ris_hpo.learning.hybrid import HybridSpec, covariances
from ris_hpo.learning.inference import InferenceSpec, localize, network_sources, predict
from ris_hpo.learning.losses import cell_targets
from ris_hpo.learning.network import Network, NetworkSpec, large
from ris_hpo.learning.settings import NetworkSettings
from ris_hpo.learning.weights import load_weights
from ris_hpo.physics.array import Cosines, Geometry, to_cosines
from ris_hpo.physics.grid import GridSpec
from ris_hpo.physics.scene import SceneSpec, grid_of_cells, simulate
from ris_hpo.scoring.metrics import score

SMALL = {"width": 16, "depth": 2, "heads": 2, "cell_width": 16}
FORMS = [
    NetworkSpec(**SMALL),
    NetworkSpec(**SMALL, residual_passes=0, count_head="ordinal"),
    NetworkSpec(**SMALL, covariance_head="factor", count_head="evidence", noise_known=False),
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
    for value, (low, high) in zip(outputs.cosines(), spec.grid.region.bounds(), strict=True):
        assert (value >= low - 1e-6).all()
        assert (value <= high + 1e-6).all()
    both = covariances(outputs, scenes, HybridSpec(beta=0.2))
    for matrix in both:
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


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("localizer", ["polish", "music"])
def test_fewer_sources_than_the_settings_allow(most, localizer):
    """The network's own K_max bounds the refinement, whose settings allow five."""
    scenes = simulate(SceneSpec(max_sources=most, num_sources=(1, most)), 4, range(4))
    network = Network(NetworkSpec(**SMALL, max_sources=most, count_head="evidence"))
    found = localize(network, scenes, InferenceSpec(localizer=localizer))
    assert found.mask.shape == (4, most)


@pytest.mark.parametrize("spec", [FORMS[0], FORMS[2], FORMS[4]], ids=form)
def test_scenes_in_double_precision_are_the_same_scenes(spec, scenes):
    torch.manual_seed(0)
    network = Network(spec)
    double = dataclasses.replace(scenes, y=scenes.y.to(torch.complex128), noise_power=scenes.noise_power.double())
    assert torch.equal(predict(network, scenes).v, predict(network, double).v)
    assert localize(network, double, InferenceSpec()).range_m.isfinite().all()


@pytest.mark.parametrize("spec", [FORMS[0], FORMS[2], FORMS[4]], ids=form)
def test_what_a_network_cannot_use_is_refused_in_a_line(spec, scenes):
    network, geometry = Network(spec), Geometry(wavelength_m=0.2)
    with pytest.raises(ConfigError, match="no scenes"):
        localize(network, scenes[:0], InferenceSpec())
    with pytest.raises(ConfigError, match=r"wavelength_m is 0\.2, not 0\.3"):
        localize(network, dataclasses.replace(scenes, geometry=geometry), InferenceSpec())
    with pytest.raises(NumericalError, match="must be finite"):
        localize(network, dataclasses.replace(scenes, y=scenes.y * torch.nan), InferenceSpec())


def test_a_silent_scene_does_not_take_its_batch_along(scenes):
    network = Network(FORMS[2])
    loud = torch.arange(len(scenes)) > 0
    hidden = dataclasses.replace(scenes, y=scenes.y * loud[:, None, None], noise_power=scenes.noise_power * torch.nan)
    assert localize(network, hidden, InferenceSpec()).range_m.isfinite().all()


def test_the_smallest_grid_has_fewer_cells_than_candidates(scenes):
    network = Network(NetworkSpec(**SMALL, grid=GridSpec(num_v=3, num_w=3, num_rho=1)))
    assert predict(network, scenes).v.shape == (12, 9)


def test_a_second_look_finds_what_the_proposals_missed():
    """Candidates near one of two sources only: the other one comes in from the residual."""
    scenes = grid_of_cells(SceneSpec(power_spread_db=0), 9, [20.0], [2], 24)
    truth = to_cosines(*(getattr(scenes.truth, name)[:, :1] for name in ("azimuth", "elevation", "range_m")))
    candidates = Cosines(*(value.expand(-1, 5) for value in truth))
    found = {}
    for maxima in (0, 16):
        spec = InferenceSpec().replaced({"likelihood.search.residual_maxima": maxima}).likelihood
        found[maxima] = score(ols(scenes, candidates, spec, num_sources=2), scenes.truth).success
    assert found[16] > found[0] + 0.5


def test_noise_power_can_be_hidden(scenes):
    network = Network(NetworkSpec(**SMALL, noise_known=False))
    doubled = type(scenes)(scenes.geometry, scenes.y, scenes.bs_ris_channel, scenes.ris_codes, 2 * scenes.noise_power)
    assert torch.equal(network.features(scenes).maps, network.features(doubled).maps)
    assert torch.equal(network.features(scenes).context, network.features(doubled).context)


def test_weights_of_another_network_are_refused_by_the_first_that_does_not_fit():
    network = Network(NetworkSpec(**SMALL))
    own = network.state_dict()
    first, second = list(own)[:2]
    missing = {name: value for name, value in own.items() if name != first}
    with pytest.raises(CheckpointError, match=f"file: '{first}' has nothing, expected"):
        load_weights(network, missing, "file")
    reshaped = own | {second: torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=rf"file: '{second}' has \(3, 3\), expected"):
        load_weights(network, reshaped, "file")
    doubled = {name: 2 * value for name, value in own.items()} | {"optimizer.step": torch.zeros(1)}
    load_weights(network, doubled, "file")  # what is no weight is passed over
    assert torch.equal(network.state_dict()[first], doubled[first])


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("owner", ["network.grid", "inference.likelihood.grid"])
def test_a_region_that_is_stated_holds_all_that_is_drawn(owner, end):
    limits = [3.0, 9.0]
    scene = {"scene.range_m": limits}
    wider, narrower = list(limits), list(limits)
    wider[end] += (-1, 1)[end]
    narrower[end] -= (-1, 1)[end]
    region = getattr(NetworkSettings().replaced(scene | {f"{owner}.region.range_m": wider}), owner.split(".")[0])
    assert wider == list((region.grid if owner == "network.grid" else region.likelihood.grid).region.range_m)
    with pytest.raises(ConfigError, match=rf"scene.range_m \(3.0, 9.0\) reaches beyond {owner}.region.range_m"):
        NetworkSettings().replaced(scene | {f"{owner}.region.range_m": narrower})


def test_large_is_the_published_size():
    counts = Network(large()).parameter_counts()
    assert sum(counts.values()) == pytest.approx(16.3e6, rel=0.03)
    assert counts["backbone"] == pytest.approx(6.7e6, rel=0.05)
    assert counts["heads"] == pytest.approx(9.7e6, rel=0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 5},
        {"front_end": "tokens", "covariance_head": "factor"},
        {"grid": {"region": {"range_m": (2, 1)}}},
        {"width": -1},
        {"wdith": 32},
    ],
)
def test_impossible_forms_are_refused(change):
    with pytest.raises(ConfigError):
        NetworkSpec.parse({**SMALL, **change})


def test_a_row_of_elements_with_its_elevation_known_has_one_cell_in_it():
    changes = {"geometry.num_horizontal": 16, "geometry.num_vertical": 1, "elevation_deg": (10.0, 10.0)}
    scene = SceneSpec().replaced(changes)
    grid = GridSpec().replaced({"region.elevation_deg": (10.0, 10.0)})
    network = Network(NetworkSpec(**SMALL, geometry=scene.geometry, grid=grid))
    assert network.spec.cells.num_w == 1
    scenes = simulate(scene, 5, range(4))
    outputs = network(*network.features(scenes))
    assert (outputs.w - math.sin(math.radians(10))).abs().max() < 1e-6
    index, offsets = cell_targets(scenes.truth, network.spec.cells)
    assert offsets[:, 1].abs().max() < 1e-5
    assert (index % network.spec.cells.num_w == 0).all()
    assert index.max() < math.prod(network.spec.cells.shape)
