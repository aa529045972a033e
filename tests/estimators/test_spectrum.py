"""MUSIC, MVDR and modified MUSIC: exact on true covariances, at a loss on what snapshots give."""

import dataclasses

import pytest
import torch

from ris_hpo.errors import ConfigError, NumericalError
from ris_hpo.estimators import EstimatorSpec, estimate
from ris_hpo.estimators.box import GridPoints, box_steering, to_box_coordinates
from ris_hpo.estimators.covariance import (
    aic_order,
    count_from_snapshots,
    least_squares_covariance,
    least_squares_snapshots,
    mdl_order,
    received_covariance,
    signal_subspace,
    sorte_order,
    source_covariance,
    trace_normalised,
)
from ris_hpo.estimators.spectrum import (
    localize_covariance,
    music_form,
    music_spectrum,
    mvdr_form,
    mvdr_spectrum,
)
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.grid import Grid
from ris_hpo.physics.scene import Scenes, SceneSpec, grid_of_cells, simulate
from tests.estimators.conftest import COARSE

METHODS = ("music", "mvdr", "modified-music")


def f1(found, truth) -> float:
    """F1 at 5 degrees, 5 degrees and 1 m, each true source taking the nearest estimate."""
    distance = torch.cdist(truth.positions(), found.positions()).masked_fill(~found.mask.unsqueeze(1), torch.inf)
    index = distance.argmin(-1)
    hit = truth.mask
    for name, tolerance in (("azimuth", 0.08727), ("elevation", 0.08727), ("range_m", 1.0)):
        hit = hit & ((getattr(found, name).gather(1, index) - getattr(truth, name)).abs() < tolerance)
    return 2 * hit.sum().item() / (truth.mask.sum() + found.mask.sum()).item()


@pytest.fixture(scope="module")
def separated() -> Scenes:
    """Default scenes of one to three sources, at least a beam width apart in direction cosines."""
    scenes = simulate(SceneSpec(num_sources=(1, 3)), 601, range(40))
    truth = scenes.truth
    direction = torch.stack([truth.elevation.cos() * truth.azimuth.sin(), truth.elevation.sin()], -1)
    pair = truth.mask.unsqueeze(-1) & truth.mask.unsqueeze(-2) & ~torch.eye(5, dtype=torch.bool)
    return scenes[((torch.cdist(direction, direction) > 2 / 12) | ~pair).all(-1).all(-1)]


@pytest.mark.parametrize("method", METHODS)
def test_the_true_covariance_gives_the_sources(separated, method):
    found = estimate(method, separated, EstimatorSpec(covariance="truth"), separated.truth.num_sources)
    assert f1(found, separated.truth) >= 0.95


@pytest.mark.parametrize("method", METHODS)
def test_least_squares_covariances_do_not(separated, method):
    several = separated[separated.truth.num_sources >= 2]
    found = estimate(method, several, EstimatorSpec(covariance="least-squares"), several.truth.num_sources)
    assert f1(found, several.truth) < 0.7


def test_the_least_squares_subspace_hardly_overlaps(separated):
    truth = separated.truth
    three = truth.num_sources == 3
    basis, _ = signal_subspace(least_squares_covariance(separated[three]), 3)
    exact, _ = signal_subspace(source_covariance(separated.geometry, truth[three]), 3)
    overlap = (basis.mH @ exact).abs().square().sum((1, 2)) / 3
    assert overlap.mean().item() < 0.5


def test_refined_covariances_bring_music_back(loud):
    spec = EstimatorSpec(covariance="refined", count="evidence")
    found = estimate("music", loud, spec)
    assert f1(found, loud.truth) > 0.8


def test_spectra_peak_at_the_sources(separated):
    one = separated[separated.truth.num_sources == 1][:3]
    covariance = source_covariance(one.geometry, one.truth)
    here = to_box_coordinates(one.truth.azimuth[:, 0], one.truth.elevation[:, 0], one.truth.range_m[:, 0])
    points = GridPoints.of(COARSE.on(one.geometry), one.device).u
    for i in range(len(one)):
        for spectrum in (
            lambda u, i=i: music_spectrum(one.geometry, covariance[i : i + 1], 1, u),
            lambda u, i=i: mvdr_spectrum(one.geometry, covariance[i : i + 1], u),
        ):
            assert spectrum(here[i : i + 1]).item() > spectrum(points).max().item()


def test_quadratic_forms_have_exact_gradients(separated):
    covariance = source_covariance(separated.geometry, separated.truth)[:2]
    u = torch.tensor([[0.2, -0.1, 0.5], [-0.4, 0.2, 1.0]], dtype=torch.float64)
    for form in (music_form(separated.geometry, covariance, 2), mvdr_form(separated.geometry, covariance)):
        value, gradient, hessian = form.evaluated(u)
        direct = form.of_steering(box_steering(separated.geometry, u.unsqueeze(1)))[:, 0]
        torch.testing.assert_close(value, direct)
        unit = torch.eye(3, dtype=torch.float64) * 1e-6
        numeric = torch.stack([(form.evaluated(u + e)[0] - form.evaluated(u - e)[0]) / 2e-6 for e in unit], -1)
        torch.testing.assert_close(gradient, numeric, rtol=1e-4, atol=1e-6 * numeric.abs().max().item())
        assert torch.linalg.eigvalsh(hessian).min().item() > -1e-8


def test_modified_music_resolves_grating_lobes_at_quarter_and_half_wavelength():
    for spacing in (0.25, 0.5):
        spec = SceneSpec(geometry=Geometry(spacing_wavelengths=spacing), num_sources=(1, 1), azimuth_deg=(-55.0, 55.0))
        scenes = simulate(spec, 7, range(12))
        found = estimate("modified-music", scenes, EstimatorSpec(covariance="truth"), 1)
        assert f1(found, scenes.truth) >= 0.9


def test_orthogonal_iteration_agrees_with_the_eigendecomposition(separated):
    covariance = source_covariance(separated.geometry, separated.truth)[:3].to(torch.complex128)
    noisy = trace_normalised(covariance) + 0.01 * torch.eye(144)
    basis, values = signal_subspace(noisy, 2)
    exact, vectors = torch.linalg.eigh(noisy)
    torch.testing.assert_close(values, exact[:, [-1, -2]], rtol=1e-6, atol=1e-9)
    leading = vectors[..., -1:]
    inside = (basis.mH @ leading).abs().square().sum((1, 2))
    torch.testing.assert_close(inside, torch.ones_like(inside), atol=1e-6, rtol=0)
    assert not basis.requires_grad


def test_source_covariance_is_the_label(loud):
    covariance = source_covariance(loud.geometry, loud.truth)
    torch.testing.assert_close(
        covariance.diagonal(dim1=-2, dim2=-1).real.sum(-1), torch.full((len(loud),), 144.0), rtol=1e-5, atol=0
    )
    rank = torch.linalg.matrix_rank(covariance.to(torch.complex128), rtol=1e-5)
    assert torch.equal(rank, loud.truth.num_sources)
    nothing = dataclasses.replace(loud.truth, mask=torch.zeros_like(loud.truth.mask))
    assert (source_covariance(loud.geometry, nothing) == 0).all()


def test_least_squares_snapshots_explain_the_data(loud):
    snapshots = least_squares_snapshots(loud)
    again = torch.einsum("blmn,bln->blm", loud.sensing_matrices(), snapshots)
    assert ((again - loud.y).abs().square().sum() / loud.y.abs().square().sum()).item() < 1e-3


@pytest.mark.parametrize("order", [0, 1, 3])
def test_criteria_find_the_order_of_a_stationary_covariance(order):
    values = torch.ones(12)
    values[:order] = 100.0
    noise = 1 + 0.02 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    values = (values * noise).unsqueeze(0)
    assert mdl_order(values, 500, 5).item() == order
    assert aic_order(values, 500, 5).item() == order
    if order:
        assert sorte_order(values, 5).item() == order


def test_criteria_are_at_chance_on_received_covariances():
    """What makes them fail is the model, not the sample size: signatures change with every snapshot."""
    scenes = grid_of_cells(SceneSpec(), 603, [20.0], [1, 2, 3, 4, 5], 20)
    for criterion in ("mdl", "aic", "sorte"):
        right = count_from_snapshots(scenes, criterion, 5) == scenes.truth.num_sources
        assert right.double().mean().item() < 0.45, criterion
    assert received_covariance(scenes).shape == (100, 16, 16)


def test_criteria_bear_degenerate_eigenvalues():
    for values in (torch.zeros(1, 4), torch.ones(1, 1), torch.tensor([[5.0, 0.0]])):
        for order in (mdl_order(values, 1, 5), aic_order(values, 10, 5), sorte_order(values, 5)):
            assert 0 <= order.item() <= 5


def test_odd_covariances_are_finite_or_refused():
    geometry = Geometry(num_horizontal=4, num_vertical=4)
    grid = Grid(num_v=5, num_w=5, num_rho=2)
    count = torch.tensor([3])
    for matrix in (torch.zeros(1, 16, 16), torch.eye(16)[None], torch.ones(1, 16, 16)):
        for method in METHODS:
            found = localize_covariance(geometry, matrix.to(torch.complex64), method, count, grid=grid)
            assert torch.isfinite(found.positions()).all(), method
    for method in METHODS:
        with pytest.raises(NumericalError, match="not finite"):
            localize_covariance(geometry, torch.full((1, 16, 16), torch.nan, dtype=torch.complex64), method, count)
    indefinite = torch.diag(torch.linspace(-1, 5, 16)).to(torch.complex64)[None]
    with pytest.raises(NumericalError, match="positive semi-definite"):
        localize_covariance(geometry, indefinite, "mvdr", count)
    with pytest.raises(ConfigError, match="expected"):
        localize_covariance(geometry, torch.eye(9, dtype=torch.complex64)[None], "music", count)
    with pytest.raises(ConfigError, match="num_sources"):
        localize_covariance(geometry, torch.eye(16, dtype=torch.complex64)[None], "music", count + 9)


def test_a_single_element_and_mixed_precision_work(mixed):
    spec = SceneSpec(geometry=Geometry(num_horizontal=1, num_vertical=1), num_antennas=4, num_snapshots=4)
    lone = simulate(spec, 8, range(2))
    fine = dataclasses.replace(mixed, y=mixed.y.to(torch.complex128))
    for method in METHODS:
        assert torch.isfinite(estimate(method, lone).positions()).all()
        here, there = estimate(method, mixed, None, 1), estimate(method, fine, None, 1)
        torch.testing.assert_close(here.azimuth, there.azimuth, atol=1e-3, rtol=0)


def test_a_single_row_of_elements_works():
    geometry = Geometry(num_horizontal=16, num_vertical=1)
    spec = SceneSpec(geometry=geometry, num_sources=(1, 1), elevation_deg=(0.0, 0.0), num_antennas=4)
    scenes = simulate(spec, 8, range(4))
    spectrum = EstimatorSpec(covariance="truth").replaced(
        {"likelihood.grid.num_w": 3, "likelihood.grid.region.elevation_deg": (0.0, 0.0)}
    )
    for method in METHODS:
        found = estimate(method, scenes, spectrum, 1)
        assert (found.azimuth - scenes.truth.azimuth)[:, 0].abs().median().item() < 0.05
