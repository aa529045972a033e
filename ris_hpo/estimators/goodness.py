"""Does the model fit: what the sources found leave of the snapshots, against what noise alone would leave.

With k < M sources whose symbols are free, the residual sum_l || P_perp(G_l) y_l ||^2 / noise power has a Gamma
distribution of scale 1 and shape D = L (M - k) - 3 k / 2, half the real degrees of freedom: complex snapshots less k
complex symbols each, less three coordinates a source. Data of another convention (H or codes conjugated, elements in
another order, the other sign of the exponent), noise that is stated too low, another wave or a source outside the
region leave more.

A source that is too weak to be detected leaves more as well, at most about L x with x the root of
L (x - log(1 + x)) = 12 nats: what L snapshots of a source with x times the noise after combining add to the likelihood.
The range allows for one of these where the answer has fewer sources than it could have, and for one source more than
there are, which takes away no more than it needs to be detected.
"""

from __future__ import annotations

import functools
import math

import torch
from scipy.stats import binom, gamma
from torch import Tensor

from ris_hpo.estimators.observation import Observation
from ris_hpo.physics.cholesky import cholesky
from ris_hpo.physics.sources import Sources

BEYOND_BORDER = 3.5
"""Standard deviations by which the best position must lie beyond the region for a source to be on its border."""

_BY_CHANCE = 5e-4  # share of scenes that do not fit though the model is right (measured: 1 of 4,800)
_TAIL = 1e-4  # chance that noise alone leaves more than the upper end of the range, or less than the lower
_NOISE_ESTIMATE = 1.6  # factor within which a network's estimate of the noise power is right
_POOR_OPTIMUM = 1.1  # factor that a fit which stopped short of the best positions may leave more
_DETECTION = 12.0  # nats by which a source must raise the likelihood to be detected


def residual_power(observation: Observation, u: Tensor) -> Tensor:
    """Residual power over noise power, 1 on average where the model is right, float64 [B].

    Args:
        observation: B scenes.
        u: fitted positions in box coordinates, float64 [B, k, 3].

    Returns:
        sum_l || P_perp(G_l) y_l ||^2 / D; 1 where nothing is left to compare, D <= 0.
    """
    _, snapshots, antennas = observation.y.shape
    k = u.shape[1]
    freedom = degrees_of_freedom(snapshots, antennas, k)
    if freedom <= 0:
        return torch.ones_like(observation.power_unit)
    y = observation.y.unsqueeze(-1)
    if k:
        g = observation.see_sources(u).to(observation.y.dtype)
        factor = cholesky(g.mH @ g, "Gram matrix of the sources", ridged=True)
        y = y - g @ torch.cholesky_solve(g.mH @ y, factor)
    return y.abs().square().sum((1, 2, 3)).double() / freedom


def degrees_of_freedom(snapshots: int, antennas: int, count: int) -> float:
    """D = L (M - k) - 3 k / 2."""
    return snapshots * (antennas - count) - 1.5 * count


@functools.lru_cache(maxsize=256)  # the quantiles take a millisecond, and each batch asks for the same
def residual_range(
    snapshots: int, antennas: int, count: int, max_sources: int, *, noise_known: bool = True
) -> tuple[float, float]:
    """Where the residual power lies when the model is right, all but once in 5,000 scenes; (0, inf) for D <= 0.

    Args:
        snapshots: L.
        antennas: M.
        count: sources in the answer.
        max_sources: sources that the answer could have had.
        noise_known: False where the noise power is an estimate, right to a factor of 1.6.
    """
    freedom = degrees_of_freedom(snapshots, antennas, count)
    if freedom <= 0:
        return 0.0, math.inf
    missed = _undetected(snapshots) if count < max_sources else 0.0
    low, high = gamma.ppf([_TAIL, 1 - _TAIL], freedom)
    slack = 1.0 if noise_known else _NOISE_ESTIMATE
    return max(0.0, float(low) - _DETECTION) / freedom / slack, _POOR_OPTIMUM * (float(high) + missed) / freedom * slack


def misfit(sources: Sources) -> str | None:
    """One line on how many scenes the model does not fit, and what that usually means.

    None where no more do not fit than chance explains (none of 20 scenes, three of 1,000), or the method does not say.

    Args:
        sources: with ``residual``, ``residual_range`` and ``on_border``.
    """
    fits = sources.fits
    if fits is None or sources.residual is None or sources.residual_range is None or sources.on_border is None:
        return None
    wrong = int((~fits).sum())
    if wrong <= binom.ppf(0.99, len(fits), _BY_CHANCE):
        return None
    low, high = sources.residual_range.unbind(-1)
    above, below = sources.residual > high, sources.residual < low
    border = (sources.on_border & sources.mask).any(-1)
    parts = []
    if bool(above.any()):
        median = float(sources.residual[above].median())
        parts.append(
            f"{int(above.sum())} leave a residual above its expected range (median {median:.3g} times the noise): H or "
            "codes conjugated, elements in another order, exp(+j) for exp(-j), a noise power stated too low, another "
            "wave, a source outside the searched region, or sources that the method missed"
        )
    if bool(border.any()):
        parts.append(
            f"{int(border.sum())} have a source on the border of the searched region, which then lies outside it or is "
            "received by another wave"
        )
    if bool(below.any()):
        parts.append(f"{int(below.sum())} leave a residual below its expected range: a noise power stated too high")
    return f"the model does not fit {wrong} of {len(fits)} scenes; {'; '.join(parts)}"


def _undetected(snapshots: int) -> float:
    """L x with L (x - log(1 + x)) = ``_DETECTION``, by Newton's method."""
    target, x = _DETECTION / snapshots, 1.0
    for _ in range(50):
        x = max(1e-12, x - (x - math.log1p(x) - target) * (1 + x) / x)
    return snapshots * x
