"""The units of H and y change nothing but the units of the powers."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo.estimators import EstimatorSpec, LikelihoodSpec, deterministic_ml, estimate
from ris_hpo.estimators.estimate import EstimatorName
from ris_hpo.physics.bounds import deterministic_crb, stochastic_crb
from ris_hpo.physics.scene import Scenes, simulate
from ris_hpo.physics.sources import Sources
from tests.estimators.conftest import COARSE, SMALL
from tests.properties import examples

decades = st.floats(-6, 6)
COUNTS = torch.tensor([1, 2, 3])


def in_units(scenes: Scenes, received: float, channel: float) -> Scenes:
    """The same scenes with y (and its noise) and H in other units."""
    return dataclasses.replace(
        scenes,
        y=scenes.y * received,
        noise_power=scenes.noise_power * received**2,
        bs_ris_channel=scenes.bs_ris_channel * channel,
    )


def same_sources(found: Sources, expected: Sources, power_unit: float, atol: float) -> None:
    assert torch.equal(found.mask, expected.mask)
    mask = expected.mask
    for name in ("azimuth", "elevation"):
        torch.testing.assert_close(getattr(found, name)[mask], getattr(expected, name)[mask], atol=atol, rtol=0)
    torch.testing.assert_close(1 / found.range_m[mask], 1 / expected.range_m[mask], atol=5 * atol, rtol=0)
    torch.testing.assert_close(found.power[mask], expected.power[mask] * power_unit, atol=0, rtol=0.05)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(SMALL, 510, range(3), num_sources=COUNTS, snr_db=torch.full((3,), 20.0))


@pytest.fixture(scope="module")
def expected(scenes) -> dict[str, Sources]:
    return {name: located(name, scenes) for name in ("ml", "music", "mvdr")}


def located(name: EstimatorName, scenes: Scenes) -> Sources:
    spec = EstimatorSpec(likelihood=LikelihoodSpec(grid=COARSE))
    return estimate(name, scenes, spec, None if name == "ml" else COUNTS)


@examples(5)
@given(decades, decades)
def test_estimators_give_the_same_sources_in_any_units(scenes, expected, received, channel):
    other = in_units(scenes, 10**received, 10**channel)
    unit = 10 ** (2 * (received - channel))
    for name, sources in expected.items():
        same_sources(located(name, other), sources, unit, 1e-2)  # a flat one ends within 1e-5 nats of its minimum


def test_powers_are_those_that_were_sent(scenes, expected):
    """A power in the scenes' units: for ml and for music on the true covariance, not for the poor least squares."""
    truth = scenes.truth
    one = expected["ml"].power[0, 0] / truth.power[0, 0]
    assert 0.5 < one.item() < 2
    spec = EstimatorSpec(likelihood=LikelihoodSpec(grid=COARSE), covariance="truth")
    found = estimate("music", in_units(scenes, 1e3, 1e-4), spec, COUNTS)
    sums = [(each.power * each.mask).sum(-1) for each in (found, truth)]
    torch.testing.assert_close(sums[0], sums[1], rtol=0.05, atol=0)


def test_powers_of_two_change_no_bit(scenes, expected):
    found = located("ml", in_units(scenes, 2.0**20, 2.0**-17))
    for name in ("azimuth", "elevation", "range_m", "existence", "covariance_m2"):
        assert torch.equal(getattr(found, name), getattr(expected["ml"], name)), name
    torch.testing.assert_close(found.power, expected["ml"].power * 2.0**74)


def test_a_scene_of_other_units_does_not_change_its_neighbours(scenes, expected):
    factor = torch.tensor([1e-5, 1.0, 1e5])
    mixed = dataclasses.replace(scenes, bs_ris_channel=scenes.bs_ris_channel * factor[:, None, None])
    found = deterministic_ml(mixed, LikelihoodSpec(grid=COARSE))
    assert torch.equal(found.mask, expected["ml"].mask)
    torch.testing.assert_close(found.azimuth, expected["ml"].azimuth, atol=2e-3, rtol=0)


@examples(10)
@given(decades, decades)
def test_bounds_are_the_same_in_any_units(scenes, received, channel):
    other = in_units(scenes, 10**received, 10**channel)
    factor = 10 ** (received - channel)
    power = dataclasses.replace(scenes.truth, power=scenes.truth.power * factor**2)
    other = dataclasses.replace(other, truth=power, symbols=scenes.symbols * factor)
    for bound in (deterministic_crb, stochastic_crb):
        torch.testing.assert_close(bound(other), bound(scenes), rtol=1e-4, atol=1e-12)
