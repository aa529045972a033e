"""Array response against brute force, limits, derivatives and symmetries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo.physics.array import (
    Cosines,
    Geometry,
    cosine_jacobian,
    cosine_steering,
    from_cosines,
    path_difference,
    position_jacobian,
    steering,
    steering_jacobian,
    to_cosines,
)
from ris_hpo.physics.grid import GridSpec
from ris_hpo.physics.sources import Sources
from tests.properties import examples

angles = st.floats(-1.0, 1.0)
ranges = st.floats(0.3, 50.0)
sizes = st.integers(1, 13)


def tensors(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def source_position(azimuth: torch.Tensor, elevation: torch.Tensor, range_m: torch.Tensor) -> torch.Tensor:
    unit = [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()]
    return range_m * torch.stack(unit)


@examples(60)
@given(angles, angles, ranges, sizes, sizes)
def test_exact_response_is_the_brute_force_distance(azimuth, elevation, range_m, horizontal, vertical):
    geometry = Geometry(num_horizontal=horizontal, num_vertical=vertical)
    az, el, r = tensors(azimuth, elevation, range_m)
    place = geometry.element_positions()
    elements = torch.stack([torch.zeros(len(place), dtype=torch.float64), place[:, 0], place[:, 1]], -1)
    distance = (source_position(az, el, r) - elements).norm(dim=-1)
    expected = torch.exp(-2j * math.pi * (distance - r) / geometry.wavelength_m) / math.sqrt(geometry.num_elements)
    torch.testing.assert_close(steering(geometry, az, el, r), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("horizontal", "vertical"), [(12, 12), (5, 4), (1, 7), (8, 1)])
def test_the_surface_is_centred_with_horizontal_fastest(horizontal, vertical):
    geometry = Geometry(num_horizontal=horizontal, num_vertical=vertical)
    place = geometry.element_positions()
    torch.testing.assert_close(place.sum(0), torch.zeros(2, dtype=torch.float64))
    spacing = geometry.spacing_wavelengths * geometry.wavelength_m
    if horizontal > 1:
        torch.testing.assert_close(place[1] - place[0], torch.tensor([spacing, 0.0], dtype=torch.float64))
    if vertical > 1:
        expected = torch.tensor([0.0, spacing], dtype=torch.float64)
        torch.testing.assert_close(place[horizontal] - place[0], expected)


@examples(40)
@given(angles, angles)
def test_far_away_every_wave_model_is_planar(azimuth, elevation):
    az, el, r = tensors(azimuth, elevation, 1e7)
    planar = steering(Geometry(wave="planar"), az, el, r)
    for wave in ("exact", "fresnel", "paraxial"):
        torch.testing.assert_close(steering(Geometry(wave=wave), az, el, r), planar, atol=2e-6, rtol=0)


def test_planar_ignores_range_and_fresnel_is_second_order():
    geometry = Geometry(wave="planar")
    az, el = tensors(0.3, -0.2)
    near, far = steering(geometry, az, el, tensors(0.5)[0]), steering(geometry, az, el, tensors(9.0)[0])
    torch.testing.assert_close(near, far)
    errors = []
    for r in (4.0, 8.0):
        exact = path_difference(Geometry(), to_cosines(az, el, tensors(r)[0]))
        fresnel = path_difference(Geometry(wave="fresnel"), to_cosines(az, el, tensors(r)[0]))
        errors.append((exact - fresnel).abs().max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)  # what is left falls as 1/r^2


def test_the_usual_fresnel_formula_is_the_paraxial_wave():
    """|p|^2 / (2 r) - p.u with 3-D positions; its correlation with the exact wave at 60 deg and 0.5 m is poor."""
    geometry = Geometry(wave="paraxial")
    az, el, r = tensors(0.7, -0.3, 1.3)
    d, index = 0.15, torch.arange(144).double()
    place = torch.stack([0 * index, (index % 12 - 5.5) * d, ((index / 12).floor() - 5.5) * d], -1)
    direction = source_position(az, el, torch.ones(()).double())
    delta = place.square().sum(-1) / (2 * r) - place @ direction
    expected = torch.exp(-2j * math.pi * delta / 0.3) / 12
    torch.testing.assert_close(steering(geometry, az, el, r), expected, atol=1e-12, rtol=0)
    near = [steering(Geometry(wave=wave), *tensors(0.0, 0.0, 5.0)) for wave in ("exact", "paraxial")]
    far_out = [steering(Geometry(wave=wave), *tensors(1.0, 0.3, 0.5)) for wave in ("exact", "paraxial")]
    assert (near[0].conj() @ near[1]).abs() > 0.99
    assert (far_out[0].conj() @ far_out[1]).abs() < 0.5


@pytest.mark.parametrize("wave", ["exact", "fresnel", "paraxial", "planar"])
def test_jacobian_agrees_with_autograd(wave):
    geometry = Geometry(num_horizontal=4, num_vertical=3, wave=wave)
    point = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)

    def parts(p: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(steering(geometry, p[0], p[1], p[2]))

    automatic = torch.view_as_complex(torch.autograd.functional.jacobian(parts, point).movedim(-1, 0).contiguous())
    a, da = steering_jacobian(geometry, *point)
    torch.testing.assert_close(a, steering(geometry, *point))
    torch.testing.assert_close(da, automatic, atol=1e-9, rtol=1e-9)


def test_coordinate_jacobians_agree_with_autograd():
    point = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)
    automatic = torch.autograd.functional.jacobian(lambda p: torch.stack(list(to_cosines(*p))), point)
    torch.testing.assert_close(cosine_jacobian(*point), automatic)
    automatic = torch.autograd.functional.jacobian(lambda p: source_position(*p), point)
    torch.testing.assert_close(position_jacobian(*point), automatic)


@examples(60)
@given(angles, angles, ranges)
def test_cosine_coordinates_round_trip(azimuth, elevation, range_m):
    values = tensors(azimuth, elevation, range_m)
    for back, value in zip(from_cosines(to_cosines(*values)), values, strict=True):
        torch.testing.assert_close(back, value, atol=1e-7, rtol=1e-9)


@examples(40)
@given(angles, angles, ranges)
def test_mirroring_the_source_mirrors_the_response(azimuth, elevation, range_m):
    geometry = Geometry(num_horizontal=5, num_vertical=4)
    az, el, r = tensors(azimuth, elevation, range_m)
    a = steering(geometry, az, el, r).reshape(4, 5)
    torch.testing.assert_close(steering(geometry, -az, el, r).reshape(4, 5), a.flip(1), atol=1e-10, rtol=0)
    torch.testing.assert_close(steering(geometry, az, -el, r).reshape(4, 5), a.flip(0), atol=1e-10, rtol=0)
    assert a.abs().square().sum().item() == pytest.approx(1)


@examples(40)
@given(angles, angles, ranges, st.floats(0.1, 10.0))
def test_only_lengths_in_wavelengths_matter(azimuth, elevation, range_m, scale):
    az, el, r = tensors(azimuth, elevation, range_m)
    a = steering(Geometry(), az, el, r)
    scaled = steering(Geometry(wavelength_m=0.3 * scale), az, el, r * scale)
    torch.testing.assert_close(scaled, a, atol=1e-8, rtol=0)


def test_single_precision_is_within_tolerance_of_double():
    geometry = Geometry()
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(3, 200, generator=generator, dtype=torch.float64)
    az, el, r = 2 * u[0] - 1, u[1] - 0.5, 0.5 + 9.5 * u[2]
    single = steering(geometry, az.float(), el.float(), r.float())
    double = steering(geometry, az, el, r)
    assert single.dtype == torch.complex64
    # phases reach 40 rad at the corners, and float32 inputs are rounded: 2e-5 rad, divided by sqrt(N)
    assert (single - double).abs().max().item() < 5e-6


def test_positions_and_selection_of_sources():
    one = torch.ones(2, 3)
    sources = Sources(0.2 * one, 0.1 * one, 2 * one, one, torch.tensor([[True, False, True], [False, False, True]]))
    torch.testing.assert_close(sources.positions().norm(dim=-1), 2 * one)
    assert sources.num_sources.tolist() == [2, 1]
    assert sources.take(torch.tensor([[2, 0, 1], [2, 0, 1]])).mask.tolist() == [
        [True, True, False],
        [True, False, False],
    ]
    assert sources.padded(5).mask.shape == (2, 5)
    assert len(Sources.cat([sources, sources[:1]])) == 3


def test_cosine_steering_at_zero_curvature_is_planar():
    zero = torch.zeros(1, dtype=torch.float64)
    flat = Cosines(zero + 0.3, zero + 0.1, zero)
    torch.testing.assert_close(cosine_steering(Geometry(), flat), cosine_steering(Geometry(wave="planar"), flat))


def test_listed_elements_see_what_their_distances_say():
    ring = [(0.4 * math.cos(t), 0.7 * math.sin(t)) for t in range(9)]
    geometry = Geometry(positions_m=ring, wavelength_m=0.2)
    az, el, r = tensors(0.5, -0.2, 1.4)
    at = source_position(az, el, r).tolist()
    distance = torch.tensor([math.dist(at, (0.0, *place)) for place in ring], dtype=torch.float64)
    expected = torch.exp(-2j * math.pi * (distance - r) / 0.2) / 3
    torch.testing.assert_close(steering(geometry, az, el, r), expected, atol=1e-12, rtol=0)
    listed = Geometry(positions_m=Geometry().element_positions().tolist())
    torch.testing.assert_close(steering(listed, az, el, r), steering(Geometry(), az, el, r))
    assert GridSpec().on(listed) == GridSpec().on(Geometry())
    assert "9 listed elements" in str(geometry)
