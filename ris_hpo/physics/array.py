"""The surface and its array response: the one copy of geometry, steering and Jacobian.

Axes: the surface lies in the y-z plane, centred at the origin, boresight +x. Element (i_h, i_v) stands at
y = (i_h - (N_H - 1)/2) d, z = (i_v - (N_V - 1)/2) d and has the flat index n = i_v N_H + i_h (horizontal fastest).

A source at azimuth az (from +x toward +y), elevation el (from the x-y plane toward +z) and range r from the centre has
the *cosine coordinates* (v, w, rho) = (cos el sin az, sin el, 1/r). With p_n = (0, y_n, z_n), P_n = |p_n|^2 and
q_n = y_n v + z_n w, the exact path difference is

    delta_n = d_n - r = (rho P_n - 2 q_n) / (1 + D_n),      D_n = d_n / r = sqrt(1 - 2 rho q_n + rho^2 P_n),

which is free of cancellation and becomes the planar -q_n at rho = 0. From 2 delta + rho delta^2 = rho P - 2 q:

    d delta / d q = -1 / D,        d delta / d rho = (P - delta^2) / (2 D).

The array response is a_n = exp(-j 2 pi delta_n / lambda) / sqrt(N), of unit norm.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec

WaveModel = Literal["exact", "fresnel", "paraxial", "planar"]
"""Path difference delta: exact; to second order in rho, rho (P - q^2) / 2 - q (fresnel); the usual Fresnel formula,
which drops q^2 and so holds near boresight alone, rho P / 2 - q (paraxial); -q (planar)."""


class Geometry(Spec):
    """A planar surface, uniform or with its elements listed, and the wave model used for it."""

    num_horizontal: int = Field(12, ge=1, le=256, description="elements in a row, along y")
    num_vertical: int = Field(12, ge=1, le=256, description="elements in a column, along z")
    wavelength_m: float = Field(0.3, gt=0, description="wavelength of the carrier")
    spacing_wavelengths: float = Field(0.5, gt=0, description="distance of neighbouring elements")
    wave: WaveModel = Field(
        "exact", description="path differences: exact, an approximation by Fresnel, or of plane waves"
    )
    positions_m: tuple[tuple[float, float], ...] | None = Field(
        None, min_length=1, description="(y, z) of each element instead of rows, columns and spacing"
    )

    def __str__(self) -> str:
        if self.positions_m is not None:
            return f"{self.num_elements} listed elements, wavelength {self.wavelength_m:g} m, {self.wave} wave"
        spacing = f"{self.spacing_wavelengths:g} wavelengths apart, wavelength {self.wavelength_m:g} m"
        return f"{self.num_horizontal} x {self.num_vertical} elements, {spacing}, {self.wave} wave"

    @property
    def num_elements(self) -> int:
        """N = N_H N_V, or as many as are listed."""
        return self.num_horizontal * self.num_vertical if self.positions_m is None else len(self.positions_m)

    def element_positions(self, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
        """Positions [N, 2] of the elements on the (y, z) axes, in metres."""
        if self.positions_m is not None:
            return _listed(self.positions_m, device, dtype)
        d = self.spacing_wavelengths * self.wavelength_m
        y = (torch.arange(self.num_horizontal, device=device, dtype=dtype) - (self.num_horizontal - 1) / 2) * d
        z = (torch.arange(self.num_vertical, device=device, dtype=dtype) - (self.num_vertical - 1) / 2) * d
        return torch.stack([y.repeat(self.num_vertical), z.repeat_interleave(self.num_horizontal)], dim=-1)


@functools.lru_cache(maxsize=16)
def _listed(positions: tuple[tuple[float, float], ...], device: torch.device | None, dtype: torch.dtype) -> Tensor:
    return torch.tensor(positions, device=device, dtype=dtype)


def require_sector(
    azimuth_deg: tuple[float, float], elevation_deg: tuple[float, float], range_m: tuple[float, float]
) -> None:
    """Refuse a sector of positions that does not lie in front of the surface.

    Raises:
        ValueError: an interval upside down, an angle not within -90..90 degrees, a range that is not positive.
    """
    for name, (low, high) in (("azimuth_deg", azimuth_deg), ("elevation_deg", elevation_deg), ("range_m", range_m)):
        if low > high:
            raise ValueError(f"{name}: lower bound {low} is above upper bound {high}")
        if name != "range_m" and not -90 < low <= high < 90:
            raise ValueError(f"{name}: ({low}, {high}) must lie within -90..90, in front of the surface")
    if range_m[0] <= 0:
        raise ValueError(f"range_m: lower bound {range_m[0]} must be positive")


class Cosines(NamedTuple):
    """Cosine coordinates: v = cos el sin az, w = sin el, rho = 1/r in 1/m; tensors of one shape."""

    v: Tensor
    w: Tensor
    rho: Tensor


def to_cosines(azimuth: Tensor, elevation: Tensor, range_m: Tensor) -> Cosines:
    """(az, el, r) in radians and metres to cosine coordinates."""
    return Cosines(torch.cos(elevation) * torch.sin(azimuth), torch.sin(elevation), 1 / range_m)


def from_cosines(cosines: Cosines) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine coordinates to (azimuth, elevation, range_m) in front of the surface; v, w clipped to the unit disc."""
    w = cosines.w.clamp(-1, 1)
    elevation = torch.asin(w)
    limit = torch.cos(elevation).clamp(min=torch.finfo(w.dtype).tiny)
    azimuth = torch.asin((cosines.v / limit).clamp(-1, 1))
    return azimuth, elevation, 1 / cosines.rho


def path_difference(geometry: Geometry, cosines: Cosines) -> Tensor:
    """delta_n = d_n - r in metres, [..., N], under the geometry's wave model."""
    return _path_difference(geometry, cosines)[0]


def steering(geometry: Geometry, azimuth: Tensor, elevation: Tensor, range_m: Tensor) -> Tensor:
    """Array response a, unit norm.

    Args:
        geometry: the surface.
        azimuth: radians, any shape [...].
        elevation: radians, same shape.
        range_m: metres from the surface's centre, same shape.

    Returns:
        Complex tensor [..., N] of the inputs' precision.
    """
    return cosine_steering(geometry, to_cosines(azimuth, elevation, range_m))


def cosine_steering(geometry: Geometry, cosines: Cosines) -> Tensor:
    """Array response [..., N] at cosine coordinates."""
    return _response(geometry, path_difference(geometry, cosines))


def cosine_steering_jacobian(geometry: Geometry, cosines: Cosines) -> tuple[Tensor, Tensor]:
    """Array response and its derivatives along (v, w, rho).

    Returns:
        a [..., N] and da [..., 3, N].
    """
    delta, slope_q, slope_rho, positions = _path_difference(geometry, cosines)
    a = _response(geometry, delta)
    y, z = positions.unbind(-1)
    slopes = torch.stack([slope_q * y, slope_q * z, slope_rho], dim=-2)
    wavenumber = 2 * math.pi / geometry.wavelength_m
    return a, (-1j * wavenumber) * slopes * a.unsqueeze(-2)


def steering_jacobian(geometry: Geometry, azimuth: Tensor, elevation: Tensor, range_m: Tensor) -> tuple[Tensor, Tensor]:
    """Array response and its derivatives along (azimuth [1/rad], elevation [1/rad], range [1/m]).

    Returns:
        a [..., N] and da [..., 3, N].
    """
    a, d_cosines = cosine_steering_jacobian(geometry, to_cosines(azimuth, elevation, range_m))
    chain = cosine_jacobian(azimuth, elevation, range_m)
    return a, torch.einsum("...cs,...cn->...sn", chain.to(d_cosines.dtype), d_cosines)


def cosine_jacobian(azimuth: Tensor, elevation: Tensor, range_m: Tensor) -> Tensor:
    """d(v, w, rho) / d(az, el, r), [..., 3, 3], row = cosine coordinate."""
    zero = torch.zeros_like(azimuth)
    sin_az, cos_az, sin_el, cos_el = azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos()
    rows = [cos_el * cos_az, -sin_el * sin_az, zero, zero, cos_el, zero, zero, zero, -range_m.pow(-2)]
    result: Tensor = torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
    return result


def position_jacobian(azimuth: Tensor, elevation: Tensor, range_m: Tensor) -> Tensor:
    """d(x, y, z) / d(az, el, r), [..., 3, 3], row = Cartesian coordinate, in m/rad, m/rad and 1."""
    sin_az, cos_az, sin_el, cos_el = azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos()
    r, zero = range_m, torch.zeros_like(range_m)
    rows = [
        -r * cos_el * sin_az, -r * sin_el * cos_az, cos_el * cos_az,
        r * cos_el * cos_az, -r * sin_el * sin_az, cos_el * sin_az,
        zero, r * cos_el, sin_el,
    ]  # fmt: skip
    result: Tensor = torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
    return result


def _path_difference(geometry: Geometry, cosines: Cosines) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta, d delta/d q, d delta/d rho, each [..., N], and the element positions [N, 2]."""
    positions = geometry.element_positions(cosines.v.device, cosines.v.dtype)
    y, z = positions.unbind(-1)
    squared = y * y + z * z
    q = cosines.v.unsqueeze(-1) * y + cosines.w.unsqueeze(-1) * z
    rho = cosines.rho.unsqueeze(-1)
    if geometry.wave == "planar":
        return -q, -torch.ones_like(q), torch.zeros_like(q), positions
    if geometry.wave == "paraxial":
        curvature = (squared / 2).expand_as(q)
        return rho * curvature - q, -torch.ones_like(q), curvature, positions
    if geometry.wave == "fresnel":
        curvature = (squared - q * q) / 2
        return rho * curvature - q, -1 - rho * q, curvature, positions
    ratio = torch.sqrt((1 - 2 * rho * q + rho * rho * squared).clamp(min=1e-12))
    delta = (rho * squared - 2 * q) / (1 + ratio)
    return delta, -1 / ratio, (squared - delta * delta) / (2 * ratio), positions


def _response(geometry: Geometry, delta: Tensor) -> Tensor:
    phase = (-2 * math.pi / geometry.wavelength_m) * delta
    magnitude = 1 / math.sqrt(geometry.num_elements)
    # cos and sin are vectorised on a CPU, torch.polar is not: three times as fast
    return torch.complex(phase.cos() * magnitude, phase.sin() * magnitude)
