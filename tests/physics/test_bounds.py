"""Cramer-Rao bounds: golden values, finite differences, scaling laws, singular cases."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ris_hpo.errors import NumericalError
from ris_hpo.physics.array import Geometry, steering
from ris_hpo.physics.bounds import (
    deterministic_covariance,
    deterministic_crb,
    deterministic_information,
    position_covariance,
    stochastic_covariance,
    stochastic_crb,
    stochastic_information,
)
from ris_hpo.physics.scene import Scenes, SceneSpec, simulate
from ris_hpo.physics.sources import Sources
from tests.properties import examples

SMALL = SceneSpec(geometry=Geometry(num_horizontal=6, num_vertical=5), num_antennas=6, num_snapshots=5)
SENSORS, SNAPSHOTS = 10, 100


def linear_array(power: Tensor, symbols: Tensor | None) -> Scenes:
    """Ten half-wavelength sensors, three far-field sources at -60, -7.5 and 45 degrees, noise power 1."""
    geometry = Geometry(num_horizontal=SENSORS, num_vertical=1, wavelength_m=1.0, wave="planar")
    azimuth = torch.linspace(-math.pi / 3, math.pi / 4, 3, dtype=torch.float64)[None]
    zero = torch.zeros_like(azimuth)
    truth = Sources(azimuth, zero, zero + 1, power[None] * SENSORS, torch.ones(1, 3, dtype=torch.bool))
    identity = torch.eye(SENSORS, dtype=torch.complex64)[None]
    codes = torch.ones(1, SNAPSHOTS, SENSORS, dtype=torch.complex64)
    y = torch.zeros(1, SNAPSHOTS, SENSORS, dtype=torch.complex64)
    return Scenes(geometry, y, identity, codes, torch.ones(1), truth, None, symbols)


def test_deterministic_bound_agrees_with_published_linear_array():
    """Golden values of doatools' test suite (crb_det_farfield_1d), whose sensors start at the origin."""
    p = torch.tensor(
        [[10.0, 1.0 + 0.3j, 0.5 - 0.1j], [1.0 - 0.3j, 11.0, 0.9 - 0.2j], [0.5 + 0.1j, 0.9 + 0.2j, 9.0]],
        dtype=torch.complex128,
    )
    generator = torch.Generator().manual_seed(0)
    unitary = torch.linalg.qr(torch.randn(SNAPSHOTS, 3, dtype=torch.complex128, generator=generator)).Q
    symbols = (torch.linalg.cholesky(p) @ unitary.mH * math.sqrt(SNAPSHOTS)).mT  # sample covariance exactly p
    scenes = linear_array(p.diagonal().real, None)
    centre = math.pi * (SENSORS - 1) / 2 * scenes.truth.azimuth.sin()  # phase of the centre against the first sensor
    symbols = symbols * math.sqrt(SENSORS) * torch.exp(1j * centre)
    found = deterministic_covariance(dataclasses.replace(scenes, symbols=symbols[None]))[0, ::3, ::3]
    expected = torch.tensor(
        [
            [2.636339e-06, -2.947961e-08, -2.894480e-08],
            [-2.947961e-08, 5.868361e-07, -1.254243e-08],
            [-2.894480e-08, -1.254243e-08, 1.495266e-06],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_stochastic_bound_agrees_with_published_linear_array():
    """Golden values of doatools' test suite (crb_stouc_farfield_1d): uncorrelated sources, unknown powers and noise."""
    found = stochastic_covariance(linear_array(torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64), None))
    expected = torch.tensor(
        [
            [1.3757938e-05, -3.7302575e-09, 4.3845873e-08],
            [-3.7302575e-09, 2.2173076e-06, 5.0642214e-09],
            [4.3845873e-08, 5.0642214e-09, 1.4740719e-05],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found[0, ::3, ::3], expected, rtol=1e-5, atol=0)


def received(scenes: Scenes, theta: Tensor) -> Tensor:
    """G [L, M, K] of one scene at theta [K, 3]."""
    a = steering(scenes.geometry, theta[:, 0], theta[:, 1], theta[:, 2])
    return scenes.sensing_matrices()[0].to(torch.complex128) @ a.mT


def parameters(scenes: Scenes) -> Tensor:
    truth = scenes.truth
    k = int(truth.num_sources[0])
    return torch.stack([truth.azimuth[0, :k], truth.elevation[0, :k], truth.range_m[0, :k]], -1).double()


def one_scene(count: int) -> Scenes:
    return simulate(SMALL, 4, range(1), num_sources=torch.tensor([count]), snr_db=torch.tensor([10.0]))


def test_deterministic_information_agrees_with_finite_differences():
    """The whole Fisher matrix of positions and complex symbols, differentiated numerically, symbols then eliminated."""
    scenes, count = one_scene(2), 2
    theta, s = parameters(scenes), scenes.symbols[0, :, :count].to(torch.complex128)
    step = 1e-6

    def mean(theta: Tensor, s: Tensor) -> Tensor:
        return torch.einsum("lmk,lk->lm", received(scenes, theta), s).flatten()

    columns = []
    for i in range(theta.numel()):
        delta = torch.zeros(theta.numel(), dtype=torch.float64)
        delta[i] = step
        delta = delta.view_as(theta)
        columns.append((mean(theta + delta, s) - mean(theta - delta, s)) / (2 * step))
    for i in range(s.numel()):
        unit = torch.zeros(s.numel(), dtype=torch.complex128)
        unit[i] = 1
        columns += [mean(theta, unit.view_as(s)), mean(theta, 1j * unit.view_as(s))]
    slopes = torch.stack(columns, -1)
    whole = 2 * (slopes.mH @ slopes).real / scenes.noise_power.double()
    n = theta.numel()
    schur = whole[:n, :n] - whole[:n, n:] @ torch.linalg.solve(whole[n:, n:], whole[n:, :n])
    found = deterministic_information(scenes)[0, :n, :n]
    torch.testing.assert_close(found, schur, rtol=1e-4, atol=1e-5 * schur.abs().max().item())


def test_stochastic_information_agrees_with_finite_differences():
    scenes, count = one_scene(2), 2
    theta, power = parameters(scenes), scenes.truth.power[0, :count].double()
    noise = scenes.noise_power.double()

    def covariance(x: Tensor) -> Tensor:
        g = received(scenes, x[: 3 * count].view(count, 3))
        eye = torch.eye(g.shape[1], dtype=g.dtype)
        return (g * x[3 * count : -1]) @ g.mH + x[-1] * eye

    x = torch.cat([theta.flatten(), power, noise])
    inverse = torch.linalg.inv(covariance(x))
    slopes = []
    for i in range(len(x)):
        delta = torch.zeros_like(x)
        delta[i] = 1e-6
        slopes.append(inverse @ ((covariance(x + delta) - covariance(x - delta)) / 2e-6))
    expected = torch.stack(
        [torch.stack([(a @ b).diagonal(dim1=-2, dim2=-1).sum().real for b in slopes]) for a in slopes]
    )
    k_max = scenes.truth.max_sources
    keep = torch.tensor([*range(3 * count), *range(3 * k_max, 3 * k_max + count), 4 * k_max])
    found = stochastic_information(scenes)[0][keep][:, keep]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def repeated(scenes: Scenes, times: int) -> Scenes:
    return Scenes(
        scenes.geometry,
        scenes.y.repeat(1, times, 1),
        scenes.bs_ris_channel,
        scenes.ris_codes.repeat(1, times, 1),
        scenes.noise_power,
        scenes.truth,
        scenes.snr_db,
        scenes.symbols.repeat(1, times, 1),
    )


@pytest.mark.parametrize("bound", [deterministic_crb, stochastic_crb])
def test_bounds_fall_as_one_over_snapshots(bound):
    scenes = simulate(SMALL, 4, range(8), num_sources=torch.full((8,), 2))
    torch.testing.assert_close(bound(repeated(scenes, 4)) * 4, bound(scenes), rtol=1e-6, atol=0)


@examples(20)
@given(st.floats(-20, 20), st.integers(0, 100))
def test_deterministic_bound_falls_as_one_over_snr(gain_db, index):
    scenes = simulate(SMALL, 4, range(index, index + 1), num_sources=torch.tensor([2]))
    gain = 10 ** (gain_db / 10)
    louder = dataclasses.replace(scenes, noise_power=scenes.noise_power.double() / gain)
    torch.testing.assert_close(deterministic_crb(louder) * gain, deterministic_crb(scenes), rtol=1e-6, atol=0)


def test_stochastic_bound_approaches_the_deterministic_one_at_high_snr():
    spec = SMALL.replaced({"num_snapshots": 400, "num_antennas": 8})
    scenes = simulate(spec, 4, range(4), num_sources=torch.full((4,), 2), snr_db=torch.full((4,), 40.0))
    ratio = stochastic_crb(scenes)[scenes.truth.mask] / deterministic_crb(scenes)[scenes.truth.mask]
    # sample powers of 400 symbols differ from the true ones by 7 %
    assert (ratio.diagonal(dim1=-2, dim2=-1) - 1).abs().max().item() < 0.3


def test_bounds_do_not_depend_on_order_or_batch():
    scenes = simulate(SMALL, 4, range(6), num_sources=torch.full((6,), 3))
    whole = deterministic_crb(scenes)
    torch.testing.assert_close(whole[2:3], deterministic_crb(scenes[2:3]), rtol=1e-9, atol=0)
    order = torch.tensor([2, 0, 1, 3, 4]).expand(6, -1)
    turned = dataclasses.replace(scenes, truth=scenes.truth.take(order), symbols=scenes.symbols[..., order[0]])
    torch.testing.assert_close(deterministic_crb(turned)[:, :3], whole[:, order[0, :3]], rtol=1e-6, atol=0)
    assert (whole[:, 3:] == 0).all()


def test_a_source_more_never_lowers_the_bound():
    scenes = simulate(SMALL, 4, range(10), num_sources=torch.full((10,), 2))
    mask = scenes.truth.mask & (torch.arange(5) < 1)
    alone = dataclasses.replace(scenes, truth=dataclasses.replace(scenes.truth, mask=mask))
    both, single = deterministic_crb(scenes)[:, 0], deterministic_crb(alone)[:, 0]
    assert torch.linalg.eigvalsh(both - single).min().item() > -1e-9 * both.abs().max().item()


def test_the_true_channel_counts():
    scenes = simulate(SMALL.replaced({"channel_error_db": (-5.0, -5.0)}), 4, range(3))
    exact = dataclasses.replace(scenes, bs_ris_channel=scenes.true_channel, true_channel=None)
    torch.testing.assert_close(deterministic_crb(scenes), deterministic_crb(exact))


def test_unknown_symbols_are_estimated():
    scenes = simulate(SMALL, 4, range(3), num_sources=torch.tensor([1, 1, 2]), snr_db=torch.full((3,), 40.0))
    guessed = deterministic_crb(dataclasses.replace(scenes, symbols=None))
    torch.testing.assert_close(guessed, deterministic_crb(scenes), rtol=0.1, atol=1e-9)


def test_position_form_has_the_same_range_variance_along_the_line_of_sight():
    scenes = simulate(SMALL, 4, range(3))
    polar = deterministic_crb(scenes)
    cartesian = position_covariance(scenes.truth, polar)
    unit = torch.nn.functional.normalize(scenes.truth.positions().double(), dim=-1)
    along = torch.einsum("bki,bkij,bkj->bk", unit, cartesian, unit)
    torch.testing.assert_close(along[scenes.truth.mask], polar[..., 2, 2][scenes.truth.mask], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bound", [deterministic_crb, stochastic_crb])
def test_missing_information_is_finite_and_large(bound):
    scenes = simulate(SMALL, 4, range(2), num_sources=torch.full((2,), 2))
    twice = scenes.truth.take(torch.zeros(2, 5, dtype=torch.long))
    twice = dataclasses.replace(twice, mask=scenes.truth.mask)
    equal = bound(dataclasses.replace(scenes, truth=twice))
    assert torch.isfinite(equal).all()
    assert equal[:, :2].diagonal(dim1=-2, dim2=-1).max().item() > 1
    silent = dataclasses.replace(
        scenes, truth=dataclasses.replace(scenes.truth, power=scenes.truth.power * 0), symbols=scenes.symbols * 0
    )
    assert torch.isfinite(bound(silent)).all()
    planar = dataclasses.replace(scenes, geometry=SMALL.geometry.replaced({"wave": "planar"}))
    variance = bound(planar)[:, :2].diagonal(dim1=-2, dim2=-1)
    assert torch.isfinite(variance).all()
    assert variance[..., 2].min().item() > 1e6


def test_more_sources_than_antennas_and_one_snapshot_are_finite():
    spec = SMALL.replaced({"num_antennas": 2, "num_snapshots": 1})
    scenes = simulate(spec, 1, range(4), num_sources=torch.full((4,), 5))
    assert torch.isfinite(deterministic_crb(scenes)).all()
    assert torch.isfinite(stochastic_crb(scenes)).all()


def test_what_is_not_finite_is_a_named_error():
    scenes = simulate(SMALL, 1, range(1))
    nowhere = dataclasses.replace(scenes.truth, azimuth=scenes.truth.azimuth * torch.nan)
    for bound in (deterministic_crb, stochastic_crb):
        with pytest.raises(NumericalError, match="not finite; a position, power or noise power is out of bounds"):
            bound(dataclasses.replace(scenes, truth=nowhere, symbols=None))
        for noise in (0.0, -1.0, torch.nan):
            with pytest.raises(NumericalError, match="noise power must be positive"):
                bound(dataclasses.replace(scenes, noise_power=torch.full((1,), noise)))


def test_a_coordinate_that_is_known_is_no_parameter_of_the_bound():
    """A row of elements with elevation known: the whole Fisher matrix of (azimuth, range) and symbols, in numpy."""
    elevation_deg = 10.0
    spec = SceneSpec(
        geometry=Geometry(num_horizontal=16, num_vertical=1),
        num_antennas=6,
        num_snapshots=5,
        elevation_deg=(elevation_deg, elevation_deg),
        range_m=(0.5, 2.0),
    )
    scenes = simulate(spec, 11, range(1), num_sources=torch.tensor([2]), snr_db=torch.tensor([15.0]))
    truth, elevation = scenes.truth, math.radians(elevation_deg)
    assert truth.given.tolist() == [[False, True, False]]
    channel, codes = (value[0].numpy().astype(complex) for value in (scenes.bs_ris_channel, scenes.ris_codes))
    place = np.stack([np.zeros(16), (np.arange(16) - 7.5) * 0.15, np.zeros(16)], -1)
    theta = np.array([[truth.azimuth[0, k].item(), truth.range_m[0, k].item()] for k in range(2)])

    def seen(theta):
        columns = []
        for azimuth, r in theta:
            cos_el = math.cos(elevation)
            at = r * np.array([cos_el * math.cos(azimuth), cos_el * math.sin(azimuth), math.sin(elevation)])
            distance = np.linalg.norm(place - at, axis=-1)
            columns.append(np.exp(-2j * np.pi * (distance - r) / 0.3) / 4)
        return np.stack([channel @ (code[:, None] * np.stack(columns, -1)) for code in codes])  # [L, M, K]

    symbols, step, slopes = scenes.symbols[0, :, :2].numpy().astype(complex), 1e-6, []
    for i in range(4):
        moved = np.zeros(4)
        moved[i] = step
        moved = moved.reshape(2, 2)
        change = (seen(theta + moved) - seen(theta - moved)) / (2 * step)
        slopes.append(np.einsum("lmk,lk->lm", change, symbols).ravel())
    for snapshot in range(5):
        for k in range(2):
            unit = np.zeros((5, 2), complex)
            unit[snapshot, k] = 1
            slopes += [factor * np.einsum("lmk,lk->lm", seen(theta), unit).ravel() for factor in (1, 1j)]
    slopes = np.stack(slopes, -1)
    whole = 2 * (slopes.conj().T @ slopes).real / scenes.noise_power.item()
    expected = np.linalg.inv(whole)[:4, :4]
    found = deterministic_covariance(scenes)[0, :6, :6]
    both = found[[0, 2, 3, 5]][:, [0, 2, 3, 5]].numpy()
    np.testing.assert_allclose(both, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())
    for bound in (deterministic_crb, stochastic_crb):
        blocks = bound(scenes)[0, :2]
        assert (blocks[:, 1] == 0).all()
        assert (blocks[:, 0, 0] > 0).all()
