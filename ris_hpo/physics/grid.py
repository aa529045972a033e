"""The one grid of candidate positions, uniform in cosine coordinates (v, w, rho)."""

from __future__ import annotations

import functools
import math

import torch
from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.physics.array import Cosines, Geometry, cosine_steering


class Region(Spec):
    """Where sources may be: the sector that is searched, and the box that estimates are kept in."""

    azimuth_deg: tuple[float, float] = (-60.0, 60.0)
    elevation_deg: tuple[float, float] = (-30.0, 30.0)
    range_m: tuple[float, float] = (0.5, 10.0)

    def bounds(self) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """(low, high) of v = cos el sin az, w = sin el and rho = 1/r over the sector."""
        v = [math.sin(math.radians(a)) for a in self.azimuth_deg]
        w = [math.sin(math.radians(e)) for e in self.elevation_deg]
        if v[0] > 0 or v[1] < 0:  # the sector's edge nearest boresight is seen at the largest elevation
            narrow = math.cos(math.radians(max(abs(e) for e in self.elevation_deg)))
            v = [v[0] * narrow if v[0] > 0 else v[0], v[1] * narrow if v[1] < 0 else v[1]]
        return (v[0], v[1]), (w[0], w[1]), (1 / self.range_m[1], 1 / self.range_m[0])


class GridSpec(Spec):
    """Number of cells along v, w and rho."""

    num_v: int = Field(33, ge=3, le=257)
    num_w: int = Field(17, ge=3, le=257)
    num_rho: int = Field(8, ge=1, le=64)
    region: Region = Region()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(planes along rho, cells along v, cells along w): the layout of every map."""
        return self.num_rho, self.num_v, self.num_w

    def axes(self, device: torch.device | None = None) -> Cosines:
        """Cell centres along each axis: v [num_v], w [num_w], rho [num_rho], float32."""
        counts = (self.num_v, self.num_w, self.num_rho)
        lines = []
        for (low, high), count in zip(self.region.bounds(), counts, strict=True):
            lines.append(torch.linspace(low, high, count, device=device, dtype=torch.float32))
        return Cosines(*lines)

    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring cells along v, w and rho."""
        counts = (self.num_v, self.num_w, self.num_rho)
        return tuple((hi - lo) / max(1, n - 1) for (lo, hi), n in zip(self.region.bounds(), counts, strict=True))  # type: ignore[return-value]

    def cells(self, device: torch.device | None = None) -> Cosines:
        """Coordinates of all cells, each [G], flattened from ``shape`` (w fastest)."""
        v, w, rho = self.axes(device)
        rho_map, v_map, w_map = torch.meshgrid(rho, v, w, indexing="ij")
        return Cosines(v_map.reshape(-1), w_map.reshape(-1), rho_map.reshape(-1))


@functools.lru_cache(maxsize=8)
def dictionary(geometry: Geometry, grid: GridSpec, device: torch.device) -> Tensor:
    """Array responses of all cells, complex64 [N, G]; kept per (geometry, grid, device)."""
    cells = Cosines(*(axis.double() for axis in grid.cells(device)))
    return cosine_steering(geometry, cells).to(torch.complex64).mT.contiguous()


@functools.lru_cache(maxsize=8)
def real_dictionary(geometry: Geometry, grid: GridSpec, device: torch.device) -> Tensor:
    """The same for real arithmetic, float32 [2N, 2G]: [Re z, Im z] times it is [Re z^H a, Im z^H a]."""
    atoms = dictionary(geometry, grid, device)
    top, bottom = torch.cat([atoms.real, atoms.imag], 1), torch.cat([atoms.imag, -atoms.real], 1)
    return torch.cat([top, bottom]).contiguous()
