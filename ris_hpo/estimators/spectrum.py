"""MUSIC and MVDR: two functionals of a covariance on one grid, with one peak search and one local refinement.

On any covariance [B, N, N] of the aperture:

    MUSIC  1 / || (I - U U^H) a ||^2      U the signal subspace (orthogonal iteration, never a full eigendecomposition)
    MVDR   1 / (a^H R^-1 a)               R loaded with a small multiple of the identity

Both are the reciprocal of a quadratic form a^H Q a, so that peaks are local minima of it: first angles, on the largest
value over range, then range at those angles, then all three by damped Gauss-Newton steps inside the box.

They find the sources on the true covariance, and fail on what can be measured here (``least_squares_covariance`` says
why).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ris_hpo.errors import ConfigError, NumericalError
from ris_hpo.estimators.box import (
    GridPoints,
    box_steering,
    box_steering_jacobian,
    clipped,
    coinciding,
    limits,
    strides,
    to_polar,
)
from ris_hpo.estimators.cost import Evaluation
from ris_hpo.estimators.covariance import signal_subspace, trace_normalised
from ris_hpo.estimators.descent import descend
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.cholesky import cholesky
from ris_hpo.physics.grid import Grid, GridSpec, Region, local_maxima
from ris_hpo.physics.sources import Sources

_LOADING = 1e-3  # of the mean diagonal, for MVDR
_SPARE = 4  # further peaks that are looked at where two of the first have become one
_STRIDE = (0.3, 0.648)  # largest move of a step, in beam widths and depths of focus


@dataclass(frozen=True, slots=True)
class QuadraticForm:
    """q(u) = a^H Q a for every scene, Q = diagonal I - F^H F with F [B, P, N] (MUSIC) or F^H F alone (MVDR)."""

    geometry: Geometry
    factor: Tensor
    complement: bool

    def __getitem__(self, index: Tensor) -> QuadraticForm:
        return QuadraticForm(self.geometry, self.factor[index], self.complement)

    def of_steering(self, a: Tensor) -> Tensor:
        """Q for array responses a, [G, N] for all scenes or [B, G, N]: float64 [B, G]."""
        inside = (self.factor @ a.mT).abs().square().sum(-2)
        return (a.abs().square().sum(-1) - inside).clamp(min=0) if self.complement else inside

    def evaluated(self, x: Tensor) -> Evaluation:
        """Q with gradient and Gauss-Newton Hessian at one position a scene, x [B, 3]."""
        a, da = box_steering_jacobian(self.geometry, x)
        columns = torch.cat([a.unsqueeze(-2), da], dim=-2).mT
        seen = self.factor @ columns
        gram = (seen.mH @ seen).real
        if self.complement:
            gram = (columns.mH @ columns).real - gram
        return gram[:, 0, 0], gram[:, 1:, 0] * 2, gram[:, 1:, 1:] * 2


def music_form(geometry: Geometry, covariance: Tensor, num_sources: int) -> QuadraticForm:
    """Noise-subspace form of a covariance [B, N, N] with ``num_sources`` signals, at most N - 1 of them."""
    basis, _ = signal_subspace(covariance, min(num_sources, max(1, covariance.shape[-1] - 1)))
    return QuadraticForm(geometry, basis.mH, True)


def mvdr_form(geometry: Geometry, covariance: Tensor) -> QuadraticForm:
    """Inverse form of a covariance [B, N, N], loaded with 1e-3 of its mean diagonal.

    Raises:
        NumericalError: a covariance that is not positive semi-definite.
    """
    matrix = trace_normalised(covariance.to(torch.complex128))
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor = cholesky(matrix + _LOADING * eye, "covariance")
    whitening = torch.linalg.solve_triangular(factor, eye.expand_as(matrix), upper=False)
    return QuadraticForm(geometry, whitening, False)


def music_spectrum(geometry: Geometry, covariance: Tensor, num_sources: int, u: Tensor) -> Tensor:
    """1 / ||(I - U U^H) a||^2 at box coordinates u [G, 3]: float64 [B, G], at most 1e12."""
    form = music_form(geometry, covariance, num_sources)
    return form.of_steering(box_steering(geometry, u)).clamp(min=1e-12).reciprocal()


def mvdr_spectrum(geometry: Geometry, covariance: Tensor, u: Tensor) -> Tensor:
    """1 / (a^H R^-1 a) at box coordinates u [G, 3]: float64 [B, G]."""
    return mvdr_form(geometry, covariance).of_steering(box_steering(geometry, u)).clamp(min=1e-12).reciprocal()


def localize_covariance(
    geometry: Geometry,
    covariance: Tensor,
    method: Literal["music", "mvdr", "modified-music"],
    num_sources: Tensor,
    *,
    max_sources: int = 5,
    grid: Grid | None = None,
    refinement_steps: int = 25,
) -> Sources:
    """Sources from a covariance of the aperture.

    Args:
        geometry: the surface.
        covariance: complex [B, N, N].
        method: which functional; ``modified-music`` finds angles from the anti-diagonal (see ``anti_diagonal_angles``).
        num_sources: [B], 0..max_sources.
        max_sources: padded width of the result.
        grid: coarse grid, and the region of allowed positions.
        refinement_steps: Gauss-Newton steps after the grid; 0 for the grid alone.

    Returns:
        Sources [B, max_sources], by falling spectrum, no two of them at one place where there are more peaks, with
        powers fitted to the covariance by least squares, in its units.

    Raises:
        ConfigError: a count outside 0..max_sources or a covariance of another shape.
        NumericalError: the covariance is not finite.
    """
    grid = grid or GridSpec().on(geometry)
    n = geometry.num_elements
    if covariance.shape[-2:] != (n, n):
        raise ConfigError(f"covariance has shape {tuple(covariance.shape)}, expected [B, {n}, {n}]")
    if not bool(torch.view_as_real(covariance.to(torch.complex64)).isfinite().all()):
        raise NumericalError("covariance: not finite")
    if method == "modified-music" and geometry.positions_m is not None:
        raise ConfigError("modified-music needs rows and columns of elements; this surface lists its positions")
    if bool(((num_sources < 0) | (num_sources > max_sources)).any()):
        raise ConfigError(f"num_sources must lie within 0..{max_sources}")
    batch, device = len(covariance), covariance.device
    polar = torch.zeros(batch, max_sources, 3, dtype=torch.float64, device=device)
    polar[..., 2] = 1
    power = torch.zeros(batch, max_sources, dtype=torch.float64, device=device)
    for k in sorted(set(num_sources.tolist()) - {0}):
        rows = torch.nonzero(num_sources == k).squeeze(-1)
        whole = covariance[rows].to(torch.complex128)
        part = trace_normalised(whole)
        form = mvdr_form(geometry, part) if method == "mvdr" else music_form(geometry, part, k)
        u = _peaks(method, part, form, (k, k), grid, refinement_steps)
        again = coinciding(geometry, u).any(-1)
        if bool(again.any()):
            more = _peaks(method, part[again], form[again], (k, k + _SPARE), grid, refinement_steps)
            last = coinciding(geometry, more).to(torch.int8).argsort(dim=-1, stable=True)[:, :k]
            u[again] = more.gather(1, last.unsqueeze(-1).expand(-1, -1, 3))
        polar[rows, :k] = torch.stack(to_polar(u), dim=-1)
        power[rows, :k] = _fitted_powers(geometry, whole, u)
    mask = torch.arange(max_sources, device=device) < num_sources.to(device).unsqueeze(-1)
    azimuth, elevation, range_m = (value.float() for value in polar.unbind(-1))
    return Sources(azimuth, elevation, range_m, power.float(), mask)


def _peaks(
    method: str, covariance: Tensor, form: QuadraticForm, counts: tuple[int, int], grid: Grid, steps: int
) -> Tensor:
    """Refined peaks u [B, counts[1], 3] of the form of ``counts[0]`` signals."""
    region = grid.region
    if method == "modified-music":
        u = anti_diagonal_angles(covariance, form, counts, region)
    else:
        u = peak_angles(form, counts[1], grid)
    u = with_best_range(form, u, region)
    return refined_peaks(form, u, region, steps) if steps else clipped(u, region)


def peak_angles(form: QuadraticForm, k: int, grid: Grid) -> Tensor:
    """The k highest local maxima over angle of the spectrum's largest value over range: u [B, k, 3]."""
    points = GridPoints.of(grid, form.factor.device)
    single = QuadraticForm(form.geometry, form.factor.to(torch.complex64), form.complement)  # ranks peaks only
    volume = points.volume(-single.of_steering(box_steering(form.geometry, points.u).to(torch.complex64)).double())
    best, plane = volume.max(1)
    index = _at_least(local_maxima(best, k), k)
    cell = plane.flatten(1).gather(1, index) * best[0].numel() + index
    return points.u[points.numbers(cell)]


def _at_least(index: Tensor, count: int) -> Tensor:
    """Indices [B, n] with the first repeated where there are fewer than ``count``, [B, count]."""
    return torch.cat([index, index[:, :1].expand(-1, count - index.shape[1])], dim=1)


def with_best_range(form: QuadraticForm, u: Tensor, region: Region, count: int = 64) -> Tensor:
    """The same angles with the best of ``count`` ranges uniform in 1/r, u [B, k, 3]."""
    low, high = limits(region, u.device)
    step = (torch.arange(count, dtype=u.dtype, device=u.device) + 0.5) / count
    rho = low[2] + (high[2] - low[2]) * step
    line = torch.cat([u[..., None, :2].expand(-1, -1, count, -1), rho[:, None].expand(*u.shape[:2], -1, 1)], -1)
    values = form.of_steering(box_steering(form.geometry, line.flatten(1, 2))).unflatten(-1, (u.shape[1], count))
    return torch.cat([u[..., :2], rho[values.argmin(-1)].unsqueeze(-1)], dim=-1)


def refined_peaks(form: QuadraticForm, u: Tensor, region: Region, steps: int) -> Tensor:
    """Each of the peaks u [B, k, 3] moved to the local minimum of its quadratic form."""
    low, high = limits(region, u.device)
    stride = strides(form.geometry, *_STRIDE, u.device)
    start = clipped(u, region)
    peaks = []
    for i in range(u.shape[1]):
        peaks.append(descend(form, QuadraticForm.evaluated, start[:, i], low, high, stride, steps, 1e-10)[0])
    return torch.stack(peaks, dim=1)


def anti_diagonal_angles(covariance: Tensor, form: QuadraticForm, counts: tuple[int, int], region: Region) -> Tensor:
    """Angles from the covariance's anti-diagonal, u [B, counts[1], 3] with 1/r in the middle of the box.

    The product a_n a_-n^* of an element and its mirror image about the centre loses the wavefront's curvature (all even
    terms in 1/r) and keeps twice its slope: exp(j 2 pi 2 q_n / lambda). The anti-diagonal of R is therefore one
    snapshot of a far-field array of twice the spacing with as many plane waves as sources; smoothing over sub-arrays
    restores the rank, and MUSIC finds the angles (after Ramezani, Kosasih and Bjornson, "An efficient modified MUSIC
    algorithm for RIS-assisted near-field localization", arXiv 2409.14152). At half-wavelength spacing the doubled array
    has grating lobes, v and v +- 1; the full-aperture form, at its best range, tells which of them is meant.
    """
    geometry = form.geometry
    rows, columns = geometry.num_vertical, geometry.num_horizontal
    mirrored = covariance.flip(-1).diagonal(dim1=-2, dim2=-1).unflatten(-1, (rows, columns))
    height, width = max(1, -(-2 * rows // 3)), max(1, -(-2 * columns // 3))
    windows = mirrored.unfold(1, height, 1).unfold(2, width, 1).flatten(1, 2).flatten(2)
    backward = windows.flip(-1).conj()
    stacked = torch.cat([windows, backward], dim=1)
    smoothed = stacked.mT @ stacked.conj()
    virtual = geometry.replaced(
        {
            "num_horizontal": width,
            "num_vertical": height,
            "spacing_wavelengths": 2 * geometry.spacing_wavelengths,
            "wave": "planar",
        }
    )
    signals, k = counts
    angles = music_form(virtual, smoothed, signals)
    # one period of the doubled array at three points a beam, then each peak in all the periods that meet the box
    period = 1 / (2 * geometry.spacing_wavelengths)
    count = 6 * max(width, height)
    axis = (torch.arange(count, dtype=torch.float64, device=covariance.device) + 0.5) / count * period - period / 2
    low, high = limits(region, covariance.device)
    middle_of_w = ((low[1] + high[1]) / 2).unsqueeze(0)  # a single row of elements does not see elevation
    middle_of_v = ((low[0] + high[0]) / 2).unsqueeze(0)
    w, v = torch.meshgrid(axis if rows > 1 else middle_of_w, axis if columns > 1 else middle_of_v, indexing="ij")
    shape = v.shape
    flat = torch.stack([v, w], dim=-1).flatten(0, 1)
    values = angles.of_steering(box_steering(virtual, _box_of_direction(flat, 1.0))).unflatten(-1, shape)
    peak = flat[_at_least(local_maxima(-values, k, periodic=True), k)]

    shifts = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, device=covariance.device) * period
    shift_w, shift_v = torch.meshgrid(shifts, shifts, indexing="ij")
    images = peak.unsqueeze(-2) + torch.stack([shift_v, shift_w], dim=-1).flatten(0, 1)
    visible = images.square().sum(-1) < 0.999
    middle = float((low[2] + high[2]) / 2)
    u = _box_of_direction(images * visible.unsqueeze(-1), middle)
    inside = visible & ((u >= low - 0.03) & (u <= high + 0.03))[..., :2].all(-1)
    flat_u = with_best_range(form, u.flatten(1, 2), region, 12)
    cost = form.of_steering(box_steering(geometry, flat_u)).unflatten(-1, (k, -1))
    best = cost.masked_fill(~inside, torch.inf).argmin(-1)
    result: Tensor = flat_u.unflatten(1, (k, -1)).gather(2, best[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)
    return result


def _box_of_direction(direction: Tensor, rho: float) -> Tensor:
    """(v, w) [..., 2] to box coordinates [..., 3]."""
    v, w = direction.unbind(-1)
    t = v / torch.sqrt((1 - w * w).clamp(min=1e-12))
    return torch.stack([t, w, torch.full_like(v, rho)], dim=-1)


def _fitted_powers(geometry: Geometry, covariance: Tensor, u: Tensor) -> Tensor:
    """Real part of the diagonal of A^+ R A^+^H, not negative, [B, k]."""
    a = box_steering(geometry, u).mT
    inverse = torch.cholesky_solve(a.mH, cholesky(a.mH @ a, "Gram matrix of the sources", ridged=True))
    return (inverse @ covariance @ inverse.mH).diagonal(dim1=-2, dim2=-1).real.clamp(min=0)
