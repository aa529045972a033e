"""The reference estimator, the search among candidates and the source count."""

import dataclasses

import pytest
import torch

from ris_hpo.errors import ConfigError, NumericalError
from ris_hpo.estimators import EstimatorSpec, LikelihoodSpec, deterministic_ml, estimate, ols, spectrum_maxima
from ris_hpo.estimators.box import GridPoints, limits, to_cosine_coordinates
from ris_hpo.estimators.counting import EvidenceSpec, log_position_prior, posterior_of_orders
from ris_hpo.estimators.fit import stochastic_fit
from ris_hpo.estimators.observation import Observation
from ris_hpo.estimators.search import Atoms, SearchSpec, gains
from ris_hpo.physics.array import Cosines, Geometry, to_cosines
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.grid import GridSpec, Region
from ris_hpo.physics.scene import Scenes, SceneSpec, grid_of_cells, simulate
from ris_hpo.physics.sources import Sources
from tests.estimators.conftest import COARSE, SMALL
from tests.estimators.test_fit import KINDS, degenerate

FAST = LikelihoodSpec(grid=COARSE)


def nearest_error(found: Sources, truth: Sources) -> torch.Tensor:
    """Distance in m from each true source to the nearest estimate, [n]."""
    distance = torch.cdist(truth.positions(), found.positions())
    return distance.masked_fill(~found.mask.unsqueeze(1), torch.inf).amin(-1)[truth.mask]


def test_blind_search_finds_count_and_sources_at_high_snr(loud):
    found = deterministic_ml(loud)
    assert (found.num_sources == loud.truth.num_sources).double().mean().item() >= 0.9
    error = nearest_error(found, loud.truth)
    assert error.median().item() < 0.1
    assert (error < 1).double().mean().item() >= 0.9


def test_known_count_is_kept_and_efficient_where_the_bound_is_small(loud):
    truth = loud.truth
    found = deterministic_ml(loud, LikelihoodSpec(range_estimate="mode"), truth.num_sources)
    assert torch.equal(found.num_sources, truth.num_sources)
    assert ((found.existence == 1) == found.mask).all()
    single = truth.num_sources == 1
    sigma = deterministic_crb(loud)[single, 0].diagonal(dim1=-2, dim2=-1).sqrt()
    polar = torch.stack([found.azimuth, found.elevation, found.range_m], -1)[single, 0]
    true = torch.stack([truth.azimuth, truth.elevation, truth.range_m], -1)[single, 0]
    normalised = ((polar - true).double() / sigma).square()
    # 24 squared normals: mean 1, standard error .29
    assert normalised.mean().item() == pytest.approx(1, abs=0.9)


@pytest.mark.slow
def test_normalised_errors_average_one_and_covariances_are_calibrated():
    scenes = grid_of_cells(SceneSpec(), 504, [15.0], [1], 300)
    found = deterministic_ml(scenes, LikelihoodSpec(range_estimate="mode"), 1)
    truth = scenes.truth
    error = (found.positions() - truth.positions())[:, :1].double()
    nees = torch.einsum("bki,bkij,bkj->bk", error, torch.linalg.inv(found.covariance_m2[:, :1].double()), error)
    assert nees[nees < 40].mean().item() == pytest.approx(3, abs=5 * (6 / 300) ** 0.5)
    sigma = deterministic_crb(scenes)[:, 0].diagonal(dim1=-2, dim2=-1)
    ratio = (found.azimuth - truth.azimuth)[:, 0].double().square() / sigma[:, 0]
    assert ratio[ratio < 30].mean().item() == pytest.approx(1, abs=5 * (2 / 300) ** 0.5)


def test_the_result_does_not_depend_on_the_batch(mixed):
    whole = deterministic_ml(mixed, FAST.replaced({"batch": 10}), mixed.truth.num_sources)
    parts = deterministic_ml(mixed, FAST.replaced({"batch": 3}), mixed.truth.num_sources)
    mask = mixed.truth.mask
    close = (whole.azimuth - parts.azimuth).abs()[mask] < 5e-3
    # rounding may send a hard scene to another local optimum, a few may not agree
    assert close.double().mean().item() > 0.9


def test_existence_falls_with_the_slot_and_is_a_probability(mixed):
    found = deterministic_ml(mixed, FAST)
    existence = found.existence
    assert ((existence >= 0) & (existence <= 1)).all()
    assert (existence[:, 1:] <= existence[:, :-1] + 1e-6).all()
    assert (existence[~found.mask] == 0).all()
    assert torch.linalg.eigvalsh(found.covariance_m2[found.mask].double()).min().item() > 0


def test_candidates_at_the_truth_are_found_again(mixed):
    truth = mixed.truth
    generator = torch.Generator().manual_seed(1)
    far = torch.rand(3, len(mixed), 20, generator=generator)
    azimuth = torch.cat([truth.azimuth, 2 * far[0] - 1], -1)
    elevation = torch.cat([truth.elevation, far[1] - 0.5], -1)
    range_m = torch.cat([truth.range_m, 0.5 + 9 * far[2]], -1)
    found = ols(mixed, to_cosines(azimuth, elevation, range_m), FAST, num_sources=truth.num_sources)
    few = truth.num_sources <= 3
    unit = torch.nn.functional.normalize(truth.positions()[few], dim=-1)
    there = torch.nn.functional.normalize(found.positions()[few], dim=-1)
    angle = torch.cdist(unit, there).masked_fill(~found.mask[few].unsqueeze(1), torch.inf).amin(-1)
    assert angle[truth.mask[few]].median().item() < 0.03


def test_a_prior_on_the_count_moves_the_count(mixed):
    candidates = spectrum_maxima(mixed, 32, FAST)
    sure = torch.full((len(mixed), 6), -1e4)
    sure[:, 2] = 0
    assert ols(mixed, candidates, FAST, log_prior=sure).num_sources.tolist() == [2] * len(mixed)
    flat = ols(mixed, candidates, FAST, log_prior=torch.zeros(len(mixed), 6))
    assert torch.equal(flat.num_sources, ols(mixed, candidates, FAST).num_sources)


def test_counts_stay_within_what_is_allowed(mixed):
    spec = FAST.replaced({"num_sources": (2, 3)})
    found = deterministic_ml(mixed, spec)
    assert found.num_sources.min().item() >= 2
    assert found.num_sources.max().item() <= 3
    penal = FAST.replaced({"evidence.kind": "penalty", "evidence.gamma": 200.0})
    assert deterministic_ml(mixed, penal).num_sources.sum() < deterministic_ml(mixed, FAST).num_sources.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {"search.objective": "deterministic"},
        {"search.sweeps": 1, "search.sweep_atoms": 32},
        {"search.backward": False, "search.extra_order": 0},
        {"evidence.power_spread_db": None},
        {"range_estimate": "mode"},
        {"channel_error_db": -20.0},
    ],
)
def test_every_setting_runs_and_finds_strong_sources(loud, changes):
    spec = LikelihoodSpec(grid=COARSE).replaced(changes)
    some = loud[:4]
    found = deterministic_ml(some, spec)
    assert nearest_error(found, some.truth).median().item() < 0.5


def test_spectrum_maxima_are_local_maxima_inside_the_region(mixed):
    cosines = spectrum_maxima(mixed, 16, FAST)
    assert cosines.v.shape == (len(mixed), 16)
    points = GridPoints.of(COARSE.on(mixed.geometry), mixed.device)
    observation = Observation.of(mixed)
    spectrum = gains(observation, Atoms.of(observation, points.u), None, SearchSpec())
    index = points.maxima(spectrum, 16)
    torch.testing.assert_close(to_cosine_coordinates(points.u[index]).v, cosines.v)
    assert torch.equal(index[:, 0], spectrum.argmax(-1))
    low, high = limits(Region(), mixed.device)
    assert ((points.u >= low - 1e-9) & (points.u <= high + 1e-9)).all()


def test_gains_are_likelihood_differences(mixed):
    """The gain of an atom beside no source is the drop in nll at the tried power, so never above the best drop."""
    points = GridPoints.of(COARSE.on(mixed.geometry), mixed.device).u
    observation = Observation.of(mixed, dtype=torch.complex128)
    atoms = Atoms.of(observation, points)
    gain = gains(observation, atoms, None, SearchSpec())
    best = gain.argmax(-1)
    u = points[best].unsqueeze(1)
    null = observation.y.abs().square().sum((1, 2))
    fit = stochastic_fit(observation, u, None, Region(), 0, positions=False)
    drop = null - fit.nll
    assert (gain.amax(-1).double() <= drop + 1e-2 * drop.abs() + 1e-2).all()
    assert (gain.amax(-1).double() >= 0.5 * drop).all()


def test_the_position_prior_integrates_to_one():
    region = Region()
    low, high = limits(region, torch.device("cpu"))
    axes = [torch.linspace(0, 1, 801, dtype=torch.float64)[:-1] + 1 / 1600] * 3
    volume = (high - low).prod()
    logs = []
    for i in range(3):
        u = ((low + high) / 2).expand(800, 3).clone()
        u[:, i] = low[i] + (high[i] - low[i]) * axes[i]
        logs.append(log_position_prior(u, region))
    centre = log_position_prior(((low + high) / 2).unsqueeze(0), region)
    # the density factorises, so the integral is the product of three one-dimensional means
    total = sum((log - centre).exp().mean().log() for log in logs) + centre + volume.log()
    assert total.item() == pytest.approx(0, abs=1e-3)


def test_the_posterior_of_orders_obeys_prior_and_limits():
    scores = torch.tensor([[5.0, 0.0, 1.0]], dtype=torch.float64)
    spec = EvidenceSpec(temperature=1.0, prior_weight=1.0)
    counts = torch.tensor([[0, 1, 2]])
    free = posterior_of_orders(scores, spec, None, counts >= 0)
    torch.testing.assert_close(free.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(free[0, 1] - free[0, 2], torch.tensor(1.0, dtype=torch.float64))
    assert posterior_of_orders(scores, spec, None, counts == 2).argmax(-1).item() == 2
    prior = torch.tensor([[-9.0, -9.0, 0.0, 0.0]])
    assert posterior_of_orders(scores, spec, prior, counts >= 1).argmax(-1).item() == 2


@pytest.mark.parametrize("every_order", [True, False])
def test_orders_that_other_scenes_of_the_batch_need_change_nothing(mixed, every_order):
    """Scenes of which a prior rules out other counts than of their neighbours."""
    spec = FAST.replaced({"search.every_order": every_order, "evidence.least_prior": 0.1, "search.extra_order": 0})
    candidates = to_cosines(mixed.truth.azimuth, mixed.truth.elevation, mixed.truth.range_m.nan_to_num(1.0))
    count = mixed.truth.num_sources.unsqueeze(-1)
    order = torch.arange(6)
    prior = torch.where((order == count) | (order == count - 1), 0.5, 1e-6).log()
    whole = ols(mixed, candidates, spec, log_prior=prior)
    for scene in range(3):
        one = slice(scene, scene + 1)
        alone = ols(mixed[one], Cosines(*(axis[one] for axis in candidates)), spec, log_prior=prior[one])
        torch.testing.assert_close(whole[one].positions(), alone.positions(), atol=1e-3, rtol=0)
        torch.testing.assert_close(whole.existence[one], alone.existence, atol=1e-4, rtol=0)


def test_a_scene_does_not_depend_on_the_others_of_its_batch():
    scenes = simulate(SceneSpec(), 12, range(8))
    candidates = spectrum_maxima(scenes, 32)
    prior = torch.log_softmax(3 * torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), -1)
    together = ols(scenes, candidates, log_prior=prior)
    for i in (0, 5):
        few = Cosines(*(value[i : i + 1] for value in candidates))
        alone = ols(scenes[i : i + 1], few, log_prior=prior[i : i + 1])
        assert torch.equal(together.mask[i : i + 1], alone.mask)
        torch.testing.assert_close(together.azimuth[i : i + 1], alone.azimuth, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_singular_cases_are_finite(kind):
    scenes, _ = degenerate(kind)
    for count in (None, 5, 0):
        found = deterministic_ml(scenes, FAST, count)
        for name in ("azimuth", "elevation", "range_m", "power", "existence", "covariance_m2"):
            assert torch.isfinite(getattr(found, name)).all(), (count, name)
    if kind == "zero y":
        assert deterministic_ml(scenes, FAST).num_sources.tolist() == [0, 0, 0]


@pytest.mark.parametrize("snr_db", [60.0, 90.0, 150.0])
def test_data_without_noise_hold_no_sources_of_rounding(snr_db):
    scenes = grid_of_cells(SMALL, 505, [snr_db], [1, 2], 3)
    found = deterministic_ml(scenes, FAST)
    assert torch.equal(found.num_sources, scenes.truth.num_sources)
    assert nearest_error(found, scenes.truth).max().item() < 0.1


def test_one_antenna_has_no_scattered_part():
    """A channel of one row is of rank one: its stated error has nothing left to shrink."""
    scenes = simulate(SMALL.replaced({"num_antennas": 1}), 3, range(3))
    found = deterministic_ml(scenes, FAST.replaced({"channel_error_db": -10}))
    assert torch.isfinite(found.range_m).all()


def test_a_dead_channel_does_not_take_its_batch_along(mixed):
    alive = torch.arange(len(mixed)) > 0
    dead = dataclasses.replace(mixed, bs_ris_channel=mixed.bs_ris_channel * alive[:, None, None])
    spec = FAST.replaced({"search.residual_maxima": 8})
    assert torch.isfinite(deterministic_ml(dead, spec).range_m).all()


def test_none_is_found_where_none_is_allowed(mixed):
    assert not deterministic_ml(mixed, FAST.replaced({"num_sources": [0, 0]})).mask.any()


def test_what_cannot_be_asked_is_refused(mixed):
    for count in (6, -1, 1.5, torch.tensor([1, 2]), torch.ones(len(mixed))):
        for name in ("ml", "music"):
            with pytest.raises(ConfigError, match="num_sources"):
                estimate(name, mixed, EstimatorSpec(likelihood=FAST), count)
    with pytest.raises(ConfigError, match="candidates for 3 scenes beside 10"):
        ols(mixed, to_cosines(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3, 4)), FAST)
    with pytest.raises(NumericalError, match="candidates: not finite"):
        ols(mixed, to_cosines(torch.full((10, 4), torch.nan), torch.zeros(10, 4), torch.ones(10, 4)), FAST)
    with pytest.raises(ConfigError, match="no scenes"):
        deterministic_ml(mixed[:0], FAST)
    with pytest.raises(ConfigError, match="unknown estimator 'mussic'; did you mean 'music'"):
        estimate("mussic", mixed)
    with pytest.raises(NumericalError, match="must be finite"):
        deterministic_ml(dataclasses.replace(mixed, y=mixed.y * torch.nan), FAST)
    with pytest.raises(ConfigError, match="max_sources"):
        LikelihoodSpec.parse({"max_sources": 2})
    for name in ("music", "mvdr", "modified-music", "spectrum-maxima"):
        with pytest.raises(NumericalError, match="must be finite"):
            estimate(name, dataclasses.replace(mixed, y=mixed.y * torch.nan), EstimatorSpec(likelihood=FAST))
        with pytest.raises(ConfigError, match="no scenes"):
            estimate(name, mixed[:0], EstimatorSpec(likelihood=FAST))


def test_the_entry_reaches_every_estimator(mixed: Scenes):
    spec = EstimatorSpec(likelihood=FAST, num_candidates=24)
    for name in ("ml", "music", "mvdr", "modified-music", "spectrum-maxima"):
        blind, told = estimate(name, mixed, spec), estimate(name, mixed, spec, mixed.truth.num_sources)
        assert torch.equal(told.num_sources, mixed.truth.num_sources), name
        assert blind.mask.shape == (len(mixed), 5)
        assert torch.isfinite(blind.range_m).all()
    assert SMALL.geometry.num_elements == 64
    assert GridSpec().on(Geometry()).shape == (8, 33, 17)


def test_what_is_too_large_for_every_cell_is_searched_among_maxima(monkeypatch: pytest.MonkeyPatch):
    from ris_hpo.estimators import maximum_likelihood as module

    scenes = grid_of_cells(SMALL, 11, [15.0], [1, 2], 5)
    every = deterministic_ml(scenes, FAST)
    monkeypatch.setattr(module, "_SEEN_BYTES", 0)
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)  # and one scene at once
    few = deterministic_ml(scenes, FAST)
    same = every.num_sources == few.num_sources
    assert float(same.float().mean()) >= 0.9
    torch.testing.assert_close(few.azimuth[same], every.azimuth[same], atol=0.02, rtol=0)
