"""Position estimates and their covariances from the likelihood around a fit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_hpo.errors import NumericalError
from ris_hpo.estimators.box import limits, polar_slopes, to_polar
from ris_hpo.estimators.fit import Fit
from ris_hpo.estimators.observation import Observation
from ris_hpo.physics.array import position_jacobian
from ris_hpo.physics.cholesky import inverse_information
from ris_hpo.physics.grid import Region

_RANGE_POINTS = 128  # of the grid on which the moments of the range are summed


class Moments(NamedTuple):
    """What the likelihood says of k positions in each of B scenes.

    Attributes:
        position: (azimuth, elevation, range), float64 [B, k, 3] in rad, rad, m.
        covariance: of the Cartesian position, float64 [B, k, 3, 3] in m^2.
        beyond: how many standard deviations the best position without the region's limits lies outside them, along the
            worst of the three box coordinates, float64 [B, k]; negative inside.
    """

    position: Tensor
    covariance: Tensor
    beyond: Tensor


def position_moments(observation: Observation, fit: Fit, region: Region, *, mean: bool = False) -> Moments:
    """Position estimates, their covariances, and how far beyond the region the snapshots would have them.

    The likelihood is close to Gaussian in the box coordinates but not in range, and the box cuts it off. So the
    posterior of 1/r is the Gaussian of the Fisher matrix around the unconstrained Newton point, times a prior uniform
    in r on the box; its moments in r are taken on a grid, and the angles follow by regression on 1/r. Where the data
    determine the range sharply this is the inverse Fisher matrix.

    Args:
        observation: B scenes.
        fit: k sources in each.
        region: allowed positions.
        mean: estimate the range by the posterior's mean instead of its mode; the covariance is about the estimate.

    Raises:
        NumericalError: a position, power or snapshot that is not finite.
    """
    k = fit.u.shape[1]
    x = torch.cat([fit.u.flatten(1), fit.log_power], dim=-1)
    _, gradient, information = fit.evaluated(observation)
    low, high = limits(region, fit.u.device)
    precision = 12 / (high - low).clamp(min=1e-6).square()
    precision[2] = 1e-9  # the range's prior enters below
    prior = torch.cat([precision.repeat(k), torch.full_like(x[0, :k], 0.1)])
    # rounding may take more than the data gave: a diagonal entry is never less than the prior's
    diagonal = (information.diagonal(dim1=-2, dim2=-1) + prior).maximum(prior)
    information = information.diagonal_scatter(diagonal, dim1=-2, dim2=-1)
    try:
        covariance, _ = inverse_information(information, "information on the positions", ridged=True)
    except NumericalError:  # single precision cannot tell two strong sources at almost one place apart
        if observation.sensing.dtype == torch.complex128:
            raise
        return position_moments(observation.double(), fit.plain(), region, mean=mean)
    newton = x - (covariance @ gradient.unsqueeze(-1)).squeeze(-1)
    centre = newton[:, : 3 * k].unflatten(-1, (k, 3))[..., 2]
    blocks = torch.stack([covariance[:, 3 * i : 3 * i + 3, 3 * i : 3 * i + 3] for i in range(k)], dim=1)

    r_low, r_high = region.range_m
    r = r_low + (r_high - r_low) * (torch.arange(_RANGE_POINTS, dtype=x.dtype, device=x.device) + 0.5) / _RANGE_POINTS
    variance = blocks[..., 2, 2]
    # never narrower than the grid can carry: the Gaussian's own moments are used there instead
    log_weight = -0.5 * (1 / r - centre.unsqueeze(-1)).square() / variance.unsqueeze(-1)
    weight = torch.softmax(log_weight, dim=-1)
    mode_r = 1 / fit.u[..., 2]
    sharp = variance.sqrt() * mode_r.square() < 4 * (r_high - r_low) / _RANGE_POINTS
    mean_r = torch.where(sharp, mode_r, weight @ r)
    about = mean_r if mean else mode_r
    spread_r = weight @ r.square() - 2 * about * (weight @ r) + about.square()
    spread_r = torch.where(sharp, variance * mode_r.pow(4), spread_r.clamp(min=0))
    mean_rho, mean_square = weight @ (1 / r), weight @ (1 / r).square()
    spread_rho = torch.where(sharp, variance, (mean_square - mean_rho.square()).clamp(min=0))
    both = torch.where(sharp, -variance * mode_r.square(), 1 - mean_rho * (weight @ r))
    slope = blocks[..., :2, 2] / variance.unsqueeze(-1)
    angles = blocks[..., :2, :2] + slope.unsqueeze(-1) * slope.unsqueeze(-2) * (spread_rho - variance)[..., None, None]
    coupled = (slope * both.unsqueeze(-1)).unsqueeze(-1)
    joint = torch.cat(
        [torch.cat([angles, coupled], dim=-1), torch.cat([coupled.mT, spread_r[..., None, None]], dim=-1)], dim=-2
    )
    azimuth, elevation, _ = to_polar(fit.u)
    slopes = polar_slopes(fit.u)
    diagonal = torch.stack([slopes[..., 0], slopes[..., 1], torch.ones_like(about)], dim=-1)
    jacobian = position_jacobian(azimuth, elevation, about) * diagonal.unsqueeze(-2)
    places = newton[:, : 3 * k].unflatten(-1, (k, 3))
    sigma = blocks.diagonal(dim1=-2, dim2=-1).sqrt()
    beyond = (torch.maximum(places - high, low - places) / sigma).amax(-1)
    return Moments(torch.stack([azimuth, elevation, about], dim=-1), jacobian @ joint @ jacobian.mT, beyond)
