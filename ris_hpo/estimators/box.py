"""Positions in the coordinates that the estimators move them in.

Positions are carried in the *box coordinates* u = (sin az, sin el, 1/r), in which the allowed region is an exact box
and the array's resolution is nearly uniform; v = cos el sin az follows from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ris_hpo.physics.array import Cosines, Geometry, cosine_steering, cosine_steering_jacobian
from ris_hpo.physics.grid import Grid, Region, local_maxima, resolution

COINCIDING = 0.995
"""Correlation |a_i^H a_j| of two array responses above which they are taken for one source: 1/20 of a beam width."""


def limits(region: Region, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lowest and highest u = (sin az, sin el, 1/r) of a region, each float64 [3]."""
    rows = [
        [math.sin(math.radians(value)) for value in region.azimuth_deg],
        [math.sin(math.radians(value)) for value in region.elevation_deg],
        [1 / region.range_m[1], 1 / region.range_m[0]],
    ]
    bounds = torch.tensor(rows, dtype=torch.float64, device=device)
    return bounds[:, 0], bounds[:, 1]


def strides(geometry: Geometry, angle: float, depth: float, device: torch.device) -> Tensor:
    """Largest moves of a step in u, float64 [3]: ``angle`` beam widths in the angles, ``depth`` depths of focus in 1/r.

    At most 1, for an axis of which the surface sees nothing. Rounded, so that a surface as large as the default one has
    the same to the last digit.
    """
    beam_v, beam_w, focus = resolution(geometry)
    shares = (angle * beam_v, angle * beam_w, depth * focus)
    return torch.tensor([round(min(share, 1.0), 12) for share in shares], dtype=torch.float64, device=device)


def clipped(u: Tensor, region: Region) -> Tensor:
    """Box coordinates [..., 3] moved to the nearest point of the region."""
    low, high = limits(region, u.device)
    return torch.minimum(torch.maximum(u, low), high)


def to_cosine_coordinates(u: Tensor) -> Cosines:
    """Box coordinates [..., 3] to (v, w, rho)."""
    t, w, rho = u.unbind(-1)
    return Cosines(t * torch.sqrt((1 - w * w).clamp(min=1e-12)), w, rho)


def to_box_coordinates(azimuth: Tensor, elevation: Tensor, range_m: Tensor) -> Tensor:
    """(az, el, r) to float64 [..., 3]."""
    angles = azimuth.double(), elevation.double()
    return torch.stack([angles[0].sin(), angles[1].sin(), 1 / range_m.double().clamp(min=1e-6)], dim=-1)


def from_cosine_coordinates(cosines: Cosines) -> Tensor:
    """(v, w, rho) to box coordinates float64 [..., 3]."""
    v, w, rho = (value.double() for value in cosines)
    return torch.stack([v / torch.sqrt((1 - w * w).clamp(min=1e-12)), w, rho], dim=-1)


def to_polar(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [..., 3] = (sin az, sin el, 1/r) to azimuth and elevation in rad and range in m, each [...]."""
    t, w, rho = u.unbind(-1)
    return torch.asin(t.clamp(-1, 1)), torch.asin(w.clamp(-1, 1)), 1 / rho


def polar_slopes(u: Tensor) -> Tensor:
    """Diagonal of d(az, el, r) / du, [..., 3]."""
    t, w, rho = u.unbind(-1)
    floor = 1e-12
    return torch.stack(
        [(1 - t * t).clamp(min=floor).rsqrt(), (1 - w * w).clamp(min=floor).rsqrt(), -rho.pow(-2)], dim=-1
    )


def box_steering(geometry: Geometry, u: Tensor) -> Tensor:
    """Array response complex128 [..., N]."""
    return cosine_steering(geometry, to_cosine_coordinates(u))


def box_steering_jacobian(geometry: Geometry, u: Tensor) -> tuple[Tensor, Tensor]:
    """Array response [..., N] and its derivatives [..., 3, N] along the box coordinates."""
    cosines = to_cosine_coordinates(u)
    a, da = cosine_steering_jacobian(geometry, cosines)
    t, w, _ = u.unbind(-1)
    cos_el = torch.sqrt((1 - w * w).clamp(min=1e-12))
    along_v, along_w, along_rho = da.unbind(-2)
    along_w = along_w - along_v * (t * w / cos_el).unsqueeze(-1)
    return a, torch.stack([along_v * cos_el.unsqueeze(-1), along_w, along_rho], dim=-2)


def coinciding(geometry: Geometry, u: Tensor) -> Tensor:
    """Which of the sources at u, float64 [B, k, 3], coincide with an earlier one: bool [B, k]."""
    return (correlations(geometry, u) > COINCIDING).tril(-1).any(-1)


def correlations(geometry: Geometry, u: Tensor) -> Tensor:
    """|a_i^H a_j| of the array responses at u, float64 [B, k, 3]: float64 [B, k, k]."""
    a = box_steering(geometry, u)
    return (a.conj() @ a.mT).abs()


@dataclass(frozen=True, slots=True)
class GridPoints:
    """The cells of a grid that meet its region, as candidate positions.

    The grid is uniform in (v, w, 1/r), where the sector's azimuth limits are curved: a cell beyond them by more than
    half its width is left out, any other is moved to the edge.

    Attributes:
        u: box coordinates, float64 [G', 3].
        valid: which of the grid's G cells these are, bool [G].
        shape: (planes along 1/r, cells along v, cells along w), with G their product.
    """

    u: Tensor
    valid: Tensor
    shape: tuple[int, int, int]

    @staticmethod
    def of(grid: Grid, device: torch.device) -> GridPoints:
        """The candidate positions of a grid."""
        cells = grid.cells(device)
        u = clipped(from_cosine_coordinates(cells), grid.region)
        valid = (to_cosine_coordinates(u).v - cells.v.double()).abs() <= 0.5 * grid.spacing()[0] + 1e-9
        return GridPoints(u[valid], valid, grid.shape)

    def __len__(self) -> int:
        return len(self.u)

    def volume(self, values: Tensor) -> Tensor:
        """Values [B, G'] of the points on the whole grid, [B, *shape]; minus infinity where there is no point."""
        whole = values.new_full((len(values), len(self.valid)), -torch.inf)
        whole[:, self.valid] = values
        volume: Tensor = whole.unflatten(-1, self.shape)
        return volume

    def numbers(self, cells: Tensor) -> Tensor:
        """Which points cells of the flattened grid are, int64 of the cells' shape; 0 for a cell that is none."""
        return (self.valid.cumsum(0) - 1)[cells].clamp(min=0)

    def maxima(self, values: Tensor, count: int) -> Tensor:
        """Numbers [B, count] of the highest local maxima of values [B, G'], best first; see :func:`local_maxima`."""
        return self.numbers(local_maxima(self.volume(values), count))
