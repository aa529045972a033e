"""The one grid of candidate positions, uniform in cosine coordinates (v, w, rho)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.physics.array import Cosines, Geometry, cosine_steering, require_sector


class Region(Spec):
    """Where sources may be: the sector that is searched, and the box that estimates are kept in."""

    azimuth_deg: tuple[float, float] = Field((-60.0, 60.0), description="lowest and highest, from +x toward +y")
    elevation_deg: tuple[float, float] = Field((-30.0, 30.0), description="lowest and highest, from x-y toward +z")
    range_m: tuple[float, float] = Field((0.5, 10.0), description="nearest and farthest, from the surface's centre")

    @model_validator(mode="after")
    def _check(self) -> Region:
        require_sector(self.azimuth_deg, self.elevation_deg, self.range_m)
        return self

    def bounds(self) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """(low, high) of v = cos el sin az, w = sin el and rho = 1/r over the sector."""
        v = [math.sin(math.radians(a)) for a in self.azimuth_deg]
        w = [math.sin(math.radians(e)) for e in self.elevation_deg]
        if v[0] > 0 or v[1] < 0:  # the sector's edge nearest boresight is seen at the largest elevation
            narrow = math.cos(math.radians(max(abs(e) for e in self.elevation_deg)))
            v = [v[0] * narrow if v[0] > 0 else v[0], v[1] * narrow if v[1] < 0 else v[1]]
        return (v[0], v[1]), (w[0], w[1]), (1 / self.range_m[1], 1 / self.range_m[0])


_KEPT_BYTES, _CHUNK_BYTES = 1 << 30, 1 << 27
"""Largest dictionary that is kept, and memory of one product with it."""
_CELL_WIDTH, _CELL_DEPTH = 0.375, 0.6
"""Largest distance between cells, in beam widths and in depths of focus."""


def resolution(geometry: Geometry) -> tuple[float, float, float]:
    """Beam widths along v and w, and depth of focus along rho = 1/r [1/m]; infinite where a surface sees nothing.

    A row of n elements d apart resolves lambda / (n d) in the cosine. Its focus at boresight falls to half power at
    5 lambda / D^2 in 1/r to either side, D the diagonal, which is 10 / d_F for the Fraunhofer distance
    d_F = 2 D^2 / lambda (Bjornson, Demir and Sanguinetti, "A primer on near-field beamforming for arrays and
    reconfigurable intelligent surfaces", Asilomar 2021, for a square). Listed elements are as long as a uniform row of
    the same standard deviation, sqrt(12) of it, or as far as they reach where that is more.
    """
    if geometry.positions_m is None:
        counts = (geometry.num_horizontal, geometry.num_vertical)
        lengths = [count * geometry.spacing_wavelengths if count > 1 else 0.0 for count in counts]  # in wavelengths
    else:
        place = geometry.element_positions() / geometry.wavelength_m
        reach, spread = place.amax(0) - place.amin(0), math.sqrt(12) * place.std(0, correction=0)
        lengths = reach.maximum(spread).tolist()
    beams = [1 / length if length else math.inf for length in lengths]
    squared = sum(length**2 for length in lengths)
    depth = 10 / (squared * geometry.wavelength_m) if squared else math.inf
    return beams[0], beams[1], depth


class GridSpec(Spec):
    """Number of cells along v, w and rho: as stated, or as many as the surface and the region need."""

    num_v: int | None = Field(None, ge=3, le=1025, description="cells along v = cos el sin az; none: enough")
    num_w: int | None = Field(None, ge=3, le=1025, description="cells along w = sin el; none: enough")
    num_rho: int | None = Field(None, ge=1, le=256, description="cells along rho = 1 / range; none: enough")
    region: Region = Region()

    def on(self, geometry: Geometry) -> Grid:
        """The cells for a surface.

        Unless stated there are at least 2.67 cells per beam width in v and in w, 8 i + 1 of them, so that one lies in
        the middle and maps can be halved; and at least 1.67 per depth of focus in 1/r. The default surface and region
        have 33 x 17 x 8. A coordinate of which little can be seen has 3 (1/r: 2), one that is known has 1.
        """
        counts = []
        for stated, (low, high), width, axis in zip(
            (self.num_v, self.num_w, self.num_rho),
            self.region.bounds(),
            resolution(geometry),
            ("v", "w", "rho"),
            strict=True,
        ):
            cells = (high - low) / (width * (_CELL_DEPTH if axis == "rho" else _CELL_WIDTH)) - 1e-6
            if stated is not None:
                counts.append(stated)
            elif low == high:
                counts.append(1)
            elif axis == "rho":
                counts.append(1 + max(1, math.ceil(cells)))
            else:
                counts.append(1 + 8 * math.ceil(cells / 8) if cells > 2 else 3)
        num_v, num_w, num_rho = counts
        return Grid(num_v, num_w, num_rho, self.region)

    def coarseness(self, geometry: Geometry) -> list[str]:
        """Words on each axis whose cells are too far apart: over half a beam width, or over a depth of focus."""
        names = {"num_v": (0.5, "beam widths"), "num_w": (0.5, "beam widths"), "num_rho": (1.0, "depths of focus")}
        found = []
        for (name, (most, unit)), step, width in zip(
            names.items(), self.on(geometry).spacing(), resolution(geometry), strict=True
        ):
            if step > most * width * 1.001:
                found.append(f"{name} = {getattr(self, name)} puts cells {step / width:.2g} {unit} apart")
        return found


class Grid(NamedTuple):
    """A grid of cells: how many along v, w and rho, and over which region."""

    num_v: int
    num_w: int
    num_rho: int
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


def responses(geometry: Geometry, cells: Cosines) -> Tensor:
    """Array responses of cells, complex64 [..., N], computed in double precision."""
    return cosine_steering(geometry, Cosines(*(axis.double() for axis in cells))).to(torch.complex64)


@functools.lru_cache(maxsize=2)
def dictionary(geometry: Geometry, grid: Grid, device: torch.device) -> Tensor:
    """Array responses of all cells, complex64 [N, G]; kept per (geometry, grid, device)."""
    return _responses_of_planes(geometry, grid.cells(device), grid.num_rho)


class Mirrored(NamedTuple):
    """The dictionary of a grid symmetric in v and w, a quarter of its size in each direction.

    A centred array sees (v, w) as its mirror image sees (-v, w): delta(-v, w; -y, z) = delta(v, w; y, z), and alike in
    w and z. So z^H a splits into four products, of the parts of z that are even or odd in y and in z, over a quarter of
    the elements and a quarter of the cells; sums and differences of the four give all cells. Exact, 3.7 times fewer
    operations.

    Attributes:
        atoms: float32 [4, 2N/4, 2G'] for (even, even), (odd, even), (even, odd), (odd, odd) parts in (y, z), in real
            arithmetic: [Re z, Im z] times it is [Re z^H a, Im z^H a].
        cell: int64 [G], place of every cell among the four quadrants' cells.
    """

    atoms: Tensor
    cell: Tensor


def is_symmetric(geometry: Geometry, grid: Grid) -> bool:
    """Whether the mirror symmetries hold: rows and columns, even numbers of elements, and bounds symmetric about 0."""
    if geometry.positions_m is not None:
        return False
    even = geometry.num_horizontal % 2 == 0 and geometry.num_vertical % 2 == 0
    return even and all(math.isclose(low, -high) for low, high in grid.region.bounds()[:2])


def mirrored_dictionary(geometry: Geometry, grid: Grid, axes: Cosines) -> Mirrored:
    """The quarter-size dictionary of a grid's cells at some of its planes; only where :func:`is_symmetric`."""
    middle_v, middle_w = grid.num_v // 2, grid.num_w // 2
    planes, device = len(axes.rho), axes.rho.device
    rho, v_map, w_map = torch.meshgrid(axes.rho, axes.v[middle_v:], axes.w[middle_w:], indexing="ij")
    quarter = Cosines(v_map.reshape(-1), w_map.reshape(-1), rho.reshape(-1))
    atoms = _responses_of_planes(geometry, quarter, planes)
    parts = []
    for part in mirror_parts(atoms.unflatten(0, (geometry.num_vertical, geometry.num_horizontal)), 0):
        parts.append(torch.cat([torch.cat([part.real, part.imag], -1), torch.cat([part.imag, -part.real], -1)], 0))
    # distance of every cell from the middle; an even axis has no cell of its own there
    v, w = torch.arange(grid.num_v, device=device), torch.arange(grid.num_w, device=device)
    far_v = torch.where(v >= middle_v, v - middle_v, grid.num_v - 1 - v - middle_v)
    far_w = torch.where(w >= middle_w, w - middle_w, grid.num_w - 1 - w - middle_w)
    half_v, half_w = grid.num_v - middle_v, grid.num_w - middle_w
    plane = torch.arange(planes, device=device)[:, None, None]
    place = (plane * half_v + far_v[:, None]) * half_w + far_w
    quadrant = (v < middle_v).long()[:, None] + 2 * (w < middle_w).long()
    cell = quadrant * (planes * half_v * half_w) + place
    return Mirrored(torch.stack(parts).contiguous(), cell.flatten())


@functools.lru_cache(maxsize=2)
def _kept_mirrored(geometry: Geometry, grid: Grid, device: torch.device) -> Mirrored:
    return mirrored_dictionary(geometry, grid, grid.axes(device))


def _responses_of_planes(geometry: Geometry, cells: Cosines, planes: int) -> Tensor:
    """Array responses [N, G] of cells whose planes are computed one by one, which bounds the memory."""
    if 64 * len(cells.v) * geometry.num_elements < _CHUNK_BYTES:
        return responses(geometry, cells).mT.contiguous()
    whole = torch.empty(geometry.num_elements, len(cells.v), dtype=torch.complex64, device=cells.v.device)
    for place in torch.arange(len(cells.v)).chunk(planes):
        part = slice(int(place[0]), int(place[-1]) + 1)
        whole[:, part] = responses(geometry, Cosines(*(axis[part] for axis in cells))).mT
    return whole


def mirror_parts(value: Tensor, start: int) -> list[Tensor]:
    """Parts of [.., N_V, N_H, ..] even and odd in y and z, each [.., N/4, ..]; ``start`` is the place of N_V."""
    upper, lower = value.chunk(2, start)[1], value.chunk(2, start)[0].flip(start)
    parts = []
    for sign_z in (1, -1):
        rows = upper + sign_z * lower
        right, left = rows.chunk(2, start + 1)[1], rows.chunk(2, start + 1)[0].flip(start + 1)
        parts += [(right + sign_y * left).flatten(start, start + 1) / 2 for sign_y in (1, -1)]
    return parts


def spectrum(geometry: Geometry, z: Tensor, grid: Grid) -> Tensor:
    """sum_l |a_g^H z_l|^2, float32 [B, num_rho, num_v, num_w], for z [B, L, N].

    The dictionary is kept from call to call, or, where it is too large for that, computed plane by plane.
    """
    mirrored = is_symmetric(geometry, grid)
    size = math.prod(grid.shape) * geometry.num_elements * (4 if mirrored else 8)
    if size <= _KEPT_BYTES:
        if mirrored:
            found = [_mirrored_spectrum(geometry, z, _kept_mirrored(geometry, grid, z.device))]
        else:
            found = [_plain_spectrum(z, dictionary(geometry, grid, z.device))]
        return found[0].view(-1, *grid.shape)
    axes, found = grid.axes(z.device), []
    for plane in axes.rho.split(1):
        if mirrored:
            part = mirrored_dictionary(geometry, grid, axes._replace(rho=plane))
            found.append(_mirrored_spectrum(geometry, z, part))
        else:
            v_map, w_map = torch.meshgrid(axes.v, axes.w, indexing="ij")
            flat = Cosines(v_map.reshape(-1), w_map.reshape(-1), plane.expand(v_map.numel()))
            found.append(_plain_spectrum(z, responses(geometry, flat).mT))
    return torch.stack(found, 1).view(-1, *grid.shape)


def _pieces(z: Tensor, cells: int) -> Iterator[tuple[Tensor, ...]]:
    """Scenes of z [B, L, ..] a few at a time, each group in pieces of its snapshots."""
    chunk = 256 if z.is_cuda else 8  # on a CPU, 8 scenes at a time stay in cache
    most = max(1, _CHUNK_BYTES // (8 * cells))
    for part in z.split(max(1, min(chunk, most // z.shape[1]))):
        yield part.split(most, dim=1)


def _plain_spectrum(z: Tensor, atoms: Tensor) -> Tensor:
    """The spectrum at G cells, float32 [B, G], by their dictionary [N, G]."""
    found: list[Tensor] = []
    for pieces in _pieces(z, atoms.shape[1]):
        parts = [torch.view_as_real(piece.conj() @ atoms).square().sum((1, 3)) for piece in pieces]
        found.append(sum(parts[1:], parts[0]))
    return torch.cat(found)


def _mirrored_spectrum(geometry: Geometry, z: Tensor, mirrored: Mirrored) -> Tensor:
    """The spectrum at G cells, float32 [B, G], by their quarter-size dictionary."""
    rows = (geometry.num_vertical, geometry.num_horizontal)
    found: list[Tensor] = []
    for pieces in _pieces(z, len(mirrored.cell)):
        parts = []
        for piece in pieces:
            split = torch.stack(mirror_parts(piece.unflatten(-1, rows), 2)).flatten(1, 2)
            products = torch.bmm(torch.cat([split.real, split.imag], -1), mirrored.atoms).unflatten(1, piece.shape[:2])
            even, odd_y, odd_z, both = products
            right, left = even + odd_y, even.sub_(odd_y)  # in place: new memory costs more than the sums
            upper, lower = odd_z + both, odd_z.sub_(both)
            corners = (right + upper, left + lower, right.sub_(upper), left.sub_(lower))
            squares = torch.stack([corner.square_().sum(1) for corner in corners], 1)
            half = squares.shape[-1] // 2
            parts.append((squares[..., :half] + squares[..., half:]).flatten(1))
        found.append(sum(parts[1:], parts[0]))
    return torch.cat(found)[:, mirrored.cell]


def local_maxima(values: Tensor, count: int, *, periodic: bool = False) -> Tensor:
    """The highest local maxima of maps: points no lower than any of their 8 neighbours in a plane, or 26 in a volume.

    Args:
        values: real [B, V, W], or [B, P, V, W] with a third axis; minus infinity where there is no point.
        count: how many.
        periodic: the axes of a plane wrap around.

    Returns:
        int64 [B, count] places in the flattened map, highest first; where there are fewer maxima, the highest other
        points follow. No more than the map has points.
    """
    padded = F.pad(values.unsqueeze(1), (1, 1, 1, 1), mode="circular").squeeze(1) if periodic else values
    highest = F.max_pool2d(padded, 3, stride=1, padding=0 if periodic else 1)
    if values.dim() == 4:
        highest = over_planes(highest, torch.maximum)
    flat, peak = values.flatten(1), (values >= highest).flatten(1)
    top = flat.amax(-1, keepdim=True)
    span = top - torch.where(flat.isinf(), top, flat).amin(-1, keepdim=True)
    result: Tensor = (flat + peak * (2 * span + 1)).topk(min(count, flat.shape[1]), dim=-1).indices
    return result


def over_planes(maps: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine every plane of [B, P, V, W] with its two neighbours; two 2-D pools and this are a fast 3-D pool."""
    if maps.shape[1] == 1:
        return maps
    pairs = combine(maps[:, :-1], maps[:, 1:])
    inner = combine(pairs[:, :-1], maps[:, 2:])
    return torch.cat([pairs[:, :1], inner, pairs[:, -1:]], 1)
