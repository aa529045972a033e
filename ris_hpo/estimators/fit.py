"""Fits of a given number of sources to a batch of scenes, by the deterministic or the stochastic likelihood."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ris_hpo.estimators.box import clipped, limits, strides
from ris_hpo.estimators.cost import (
    LOG_POWER_LIMITS,
    Evaluation,
    PowerStatistics,
    deterministic_cost,
    least_squares_log_power,
    power_cost,
    power_statistics,
    stochastic_cost,
)
from ris_hpo.estimators.descent import descend
from ris_hpo.estimators.observation import Observation
from ris_hpo.physics.grid import Region

_STRIDE = (0.48, 0.864)  # largest move of a step: half a beam width, and somewhat less than a depth of focus
_POWER_STRIDE = 1.5  # largest move of a step in log p: one e-fold and a half


class Fit(NamedTuple):
    """k sources fitted to every scene of a batch.

    Attributes:
        u: box coordinates, float64 [B, k, 3].
        log_power: log of the powers relative to the noise, float64 [B, k].
        nll: stochastic negative log-likelihood in nats, float64 [B].
        gradient, information: its gradient [B, 4k] along (u, log_power) and Fisher matrix [B, 4k, 4k], float64, where
            the fit's last step computed them.
    """

    u: Tensor
    log_power: Tensor
    nll: Tensor
    gradient: Tensor | None = None
    information: Tensor | None = None

    def rows(self, index: Tensor) -> Fit:
        """The fits of some scenes, index [B'] of their numbers."""
        return Fit(*(None if value is None else value[index] for value in self))  # type: ignore[arg-type]

    def put(self, index: Tensor, part: Fit) -> Fit:
        """This fit with that of some scenes in place of its own."""
        pairs = zip(self, part, strict=True)
        both = (None if old is None or new is None else old.index_put((index,), new) for old, new in pairs)
        return Fit(*both)  # type: ignore[arg-type]

    def plain(self) -> Fit:
        """The fit without what its last step computed, for another precision."""
        return Fit(self.u, self.log_power, self.nll)

    @property
    def evaluation(self) -> Evaluation | None:
        """Nll, gradient and Fisher matrix, where the fit has them."""
        if self.gradient is None or self.information is None:
            return None
        return self.nll, self.gradient, self.information

    def evaluated(self, observation: Observation) -> Evaluation:
        """Nll, gradient and Fisher matrix, computed unless the fit has them."""
        if self.evaluation is not None:
            return self.evaluation
        return stochastic_cost(observation, torch.cat([self.u.flatten(1), self.log_power], dim=-1))

    def take(self, better: Tensor, other: Fit) -> Fit:
        """This fit where ``better`` bool [B], the other elsewhere."""
        both = (
            None if one is None or two is None else torch.where(better.view(-1, *(1,) * (one.dim() - 1)), one, two)
            for one, two in zip(self, other, strict=True)
        )
        return Fit(*both)  # type: ignore[arg-type]


def deterministic_fit(
    observation: Observation, u: Tensor, region: Region, steps: int, tolerance: float = 1e-3
) -> Tensor:
    """Positions that minimise the deterministic cost, by Levenberg-Marquardt on the variable projection.

    Args:
        observation: B scenes.
        u: start, float64 [B, k, 3].
        region: allowed positions.
        steps: at most so many.
        tolerance: a scene stops when a step gains less, in nats.

    Returns:
        u, float64 [B, k, 3].

    Raises:
        NumericalError: a position or snapshot that is not finite.
    """
    k = u.shape[1]
    low, high = (limit.repeat(k) for limit in limits(region, u.device))
    stride = strides(observation.geometry, *_STRIDE, u.device).repeat(k)
    start = clipped(u, region).flatten(1)
    x, _ = descend(observation, deterministic_cost, start, low, high, stride, steps, tolerance)
    result: Tensor = x.unflatten(-1, (k, 3))
    return result


def stochastic_fit(
    observation: Observation,
    u: Tensor,
    log_power: Tensor | None,
    region: Region,
    steps: int,
    tolerance: float = 1e-3,
    *,
    positions: bool = True,
    power_steps: int = 4,
) -> Fit:
    """Positions and powers that minimise the stochastic cost, by damped Fisher scoring.

    Args:
        observation: B scenes.
        u: start, float64 [B, k, 3].
        log_power: start, float64 [B, k], or None to start at the least-squares symbols' power.
        region: allowed positions.
        steps: at most so many.
        tolerance: a scene stops when a step gains less, in nats.
        positions: move positions too, or powers alone (no product with the sensing matrices then).
        power_steps: of the powers alone, at most, before positions move too.

    Raises:
        NumericalError: a position, power or snapshot that is not finite.
    """
    u = clipped(u, region)
    statistics = power_statistics(observation, u)
    if log_power is None:
        log_power = least_squares_log_power(statistics)
    moves = positions and steps > 0  # then the powers are only a start
    most, enough = (power_steps, 10 * tolerance) if moves else (12, tolerance)
    powers, nll = fitted_powers(statistics, log_power, most, enough)
    if not moves:
        return Fit(u, powers, nll)
    return joint_fit(observation, u, powers, region, steps, tolerance)


def joint_fit(
    observation: Observation,
    u: Tensor,
    log_power: Tensor,
    region: Region,
    steps: int,
    tolerance: float,
    start: Evaluation | None = None,
) -> Fit:
    """Positions and powers moved together from where they are; arguments as of :func:`stochastic_fit`.

    ``start`` is the stochastic cost there, where it is known.
    """
    k = u.shape[1]
    low, high = (
        torch.cat([limit.repeat(k), torch.full_like(log_power[0], bound)])
        for limit, bound in zip(limits(region, u.device), LOG_POWER_LIMITS, strict=True)
    )
    stride = strides(observation.geometry, *_STRIDE, u.device).repeat(k)
    stride = torch.cat([stride, torch.full_like(log_power[0], _POWER_STRIDE)])
    x = torch.cat([clipped(u, region).flatten(1), log_power.clamp(*LOG_POWER_LIMITS)], dim=-1)
    x, found = descend(observation, stochastic_cost, x, low, high, stride, steps, tolerance, start)
    return Fit(x[:, : 3 * k].unflatten(-1, (k, 3)), x[:, 3 * k :], *found)


def fitted_powers(
    statistics: PowerStatistics, log_power: Tensor, steps: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Powers that minimise the stochastic cost at fixed positions.

    Args:
        statistics: of B scenes.
        log_power: start, float64 [B, k].
        steps: at most so many.
        tolerance: a scene stops when a step gains less, in nats.

    Returns:
        log p [B, k] within ``LOG_POWER_LIMITS``, and the cost [B] in nats.
    """
    low, high = (torch.full_like(log_power[0], limit) for limit in LOG_POWER_LIMITS)
    stride = torch.full_like(low, _POWER_STRIDE)
    start = log_power.clamp(*LOG_POWER_LIMITS)
    x, (nll, _, _) = descend(statistics, power_cost, start, low, high, stride, steps, tolerance)
    return x, nll
