"""Does the model fit: right data pass, data of another convention do not, and no source is split in two."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from ris_hpo.estimators import EstimatorSpec, LikelihoodSpec, deterministic_ml, estimate
from ris_hpo.estimators.box import coinciding, to_box_coordinates
from ris_hpo.estimators.goodness import misfit, residual_power, residual_range
from ris_hpo.estimators.observation import Observation
from ris_hpo.estimators.refinement import with_goodness_of_fit
from ris_hpo.physics.array import Geometry, steering
from ris_hpo.physics.files import load_estimates, save_estimates
from ris_hpo.physics.scene import Scenes, SceneSpec, simulate
from ris_hpo.physics.sources import Sources
from tests.estimators.conftest import COARSE, SMALL

FAST = LikelihoodSpec(grid=COARSE)
COUNT, SNR_DB = 12, 12.0


def drawn(seed: int, **changes: object) -> Scenes:
    spec = SMALL.replaced({"num_sources": (1, 3), **changes})
    return simulate(spec, seed, range(COUNT), snr_db=torch.full((COUNT,), SNR_DB))


def conjugated_channel() -> Scenes:
    scenes = drawn(540)
    return dataclasses.replace(scenes, bs_ris_channel=scenes.bs_ris_channel.conj().resolve_conj())


def conjugated_codes() -> Scenes:
    scenes = drawn(541)
    return dataclasses.replace(scenes, ris_codes=scenes.ris_codes.conj().resolve_conj())


def vertical_first() -> Scenes:
    scenes = drawn(542)
    order = torch.arange(64).view(8, 8).T.flatten()
    changed = {name: getattr(scenes, name)[..., order] for name in ("bs_ris_channel", "ris_codes")}
    return dataclasses.replace(scenes, **changed)


def other_sign() -> Scenes:
    scenes = drawn(543)
    truth, symbols = scenes.truth, scenes.symbols
    a = steering(scenes.geometry, truth.azimuth, truth.elevation, truth.range_m)
    waves = [torch.einsum("bkn,blk->bln", each, symbols) * scenes.ris_codes for each in (a, a.conj())]
    right, wrong = (torch.einsum("bmn,bln->blm", scenes.bs_ris_channel, wave) for wave in waves)
    return dataclasses.replace(scenes, y=scenes.y - right + wrong)


def understated_noise() -> Scenes:
    scenes = drawn(544)
    return dataclasses.replace(scenes, noise_power=scenes.noise_power / 2)


def outside_the_region() -> Scenes:
    return drawn(545, azimuth_deg=(65.0, 80.0))


def farther_than_the_region() -> Scenes:
    spec = SceneSpec(num_sources=(1, 1), range_m=(13.0, 20.0))
    return simulate(spec, 546, range(COUNT), snr_db=torch.full((COUNT,), 20.0))


def another_wave() -> Scenes:
    scenes = drawn(547, **{"geometry.wave": "planar", "range_m": (0.5, 3.0)})
    return dataclasses.replace(scenes, geometry=SMALL.geometry)


WRONG = [
    conjugated_channel,
    conjugated_codes,
    vertical_first,
    other_sign,
    understated_noise,
    outside_the_region,
    farther_than_the_region,
    another_wave,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_data_of_another_convention_do_not_fit(wrong: Callable[[], Scenes]):
    scenes = wrong()
    line = misfit(deterministic_ml(scenes, FAST if scenes.geometry == SMALL.geometry else LikelihoodSpec()))
    assert line is not None
    assert f"of {COUNT} scenes" in line


def test_right_data_fit():
    scenes = simulate(SMALL.replaced({"num_sources": (1, 3)}), 548, range(60))
    found = deterministic_ml(scenes, FAST)
    assert found.fits.all()
    assert misfit(found) is None
    at_truth = with_goodness_of_fit(scenes, scenes.truth)
    assert at_truth.fits.all()
    assert at_truth.residual.mean().item() == pytest.approx(1, abs=0.05)


def test_the_residual_has_the_mean_and_spread_of_noise():
    """Gamma of shape D = L (M - k) at the true positions: mean 1, standard deviation D^-1/2."""
    scenes = simulate(SMALL, 549, range(400), num_sources=torch.full((400,), 2))
    truth = scenes.truth
    u = to_box_coordinates(truth.azimuth, truth.elevation, truth.range_m)[:, :2]
    left = residual_power(Observation.of(scenes), u)
    shape = 12 * (8 - 2)
    left = left * (shape - 3) / shape  # no coordinate was fitted
    assert left.mean().item() == pytest.approx(1, abs=4 / (shape * 400) ** 0.5)
    assert left.std().item() == pytest.approx(shape**-0.5, rel=0.15)
    low, high = residual_range(12, 8, 2, 2)
    assert ((left > low) & (left < high)).all()


def test_a_few_of_many_scenes_are_chance():
    one = deterministic_ml(drawn(540)[:1], FAST)
    many = Sources.cat([one] * 1000)
    residual = many.residual.clone()
    residual[:3] = 2 * one.residual_range[0, 1]
    assert misfit(dataclasses.replace(many, residual=residual)) is None
    residual[3] = residual[0]
    assert misfit(dataclasses.replace(many, residual=residual)).startswith("the model does not fit 4 of 1000 scenes")
    assert misfit(dataclasses.replace(many, residual=residual)[:20]) is not None


def test_overstated_noise_is_told_from_understated():
    scenes = drawn(550)
    loud = dataclasses.replace(scenes, noise_power=scenes.noise_power * 2)
    assert "stated too high" in misfit(deterministic_ml(loud, FAST))
    assert "stated too low" in misfit(deterministic_ml(understated_noise(), FAST))


def test_nothing_is_said_where_snapshots_leave_nothing():
    assert residual_range(16, 1, 1, 5) == (0.0, float("inf"))
    one = simulate(SMALL.replaced({"num_antennas": 1}), 551, range(3), num_sources=torch.ones(3, dtype=torch.long))
    found = deterministic_ml(one, FAST, 1)
    assert (found.residual == 1).all()
    assert found.fits[~found.on_border.any(-1)].all()


def test_a_source_beyond_the_region_is_on_the_border_and_not_split():
    scenes = farther_than_the_region()
    found = deterministic_ml(scenes)
    assert (found.num_sources == 1).double().mean().item() >= 0.9
    assert found.on_border.any(-1).double().mean().item() >= 0.9
    assert "border of the searched region" in misfit(found)


def correlated(found: Sources, geometry: Geometry) -> torch.Tensor:
    a = steering(geometry, found.azimuth.double(), found.elevation.double(), found.range_m.double())
    pairs = found.mask.unsqueeze(-1) & found.mask.unsqueeze(-2) & ~torch.eye(found.max_sources, dtype=torch.bool)
    return (a.conj() @ a.mT).abs()[pairs]


@pytest.mark.parametrize("name", ["ml", "spectrum-maxima", "music", "mvdr", "modified-music"])
def test_no_two_sources_of_an_answer_coincide(name):
    """Five are asked for where there is one: the others must be somewhere else."""
    one = torch.ones(12, dtype=torch.long)
    scenes = simulate(SMALL, 552, range(12), num_sources=one, snr_db=torch.full((12,), 20.0))
    spec = EstimatorSpec(likelihood=FAST, covariance="truth", num_candidates=64)
    found = estimate(name, scenes, spec, 5)
    assert (found.num_sources == 5).all()
    assert correlated(found, scenes.geometry).max().item() < 0.997


def test_coinciding_is_with_an_earlier_one():
    u = torch.tensor([[[0.1, 0.0, 0.2], [0.5, 0.0, 0.2], [0.1, 0.0, 0.2], [0.5, 0.0, 0.21]]], dtype=torch.float64)
    assert coinciding(Geometry(), u).tolist() == [[False, False, True, True]]


def test_goodness_is_kept_in_files_and_by_selections(tmp_path):
    found = deterministic_ml(understated_noise(), FAST)
    save_estimates(tmp_path / "estimates.npz", found)
    read = load_estimates(tmp_path / "estimates.npz")
    assert torch.equal(read.fits, found.fits)
    assert torch.equal(read.on_border, found.on_border & found.mask)
    torch.testing.assert_close(read.residual_range, found.residual_range)
    swapped = found.take(torch.tensor([[1, 0, 2, 3, 4]]).expand(COUNT, -1)).padded(7)[:3]
    assert torch.equal(swapped.residual, found.residual[:3])
    assert torch.equal(swapped.fits, found.fits[:3])
    assert Sources.cat([found, found]).residual_range.shape == (2 * COUNT, 2)
    plain = dataclasses.replace(found, residual=None)
    assert plain.fits is None
    assert misfit(plain) is None
