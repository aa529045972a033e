r"""Deterministic and stochastic likelihood of source positions, minimised for a whole batch of scenes at once.

With whitened snapshots (noise power 1), G_l = T_l A(u) and u the box coordinates of k sources:

*Deterministic* (symbols free): c(u) = sum_l || P_perp(G_l) y_l ||^2, variable projection with Kaufman's Jacobian
-P_perp D_ki s_k (Kaufman, "A variable projection method for solving separable nonlinear least squares problems", BIT
15, 1975): Hessian 2 Re sum_l E_l^H P_perp E_l with E_l = D_l s_l, gradient -2 Re sum_l E_l^H r_l.

*Stochastic* (symbols CN(0, p_k)): c(u, log p) = sum_l [ log det R_l + y_l^H R_l^-1 y_l ], R_l = I + G_l diag(p) G_l^H,
minimised by damped Fisher scoring. All solves are of size k, by R_l^-1 = I - V_l^H V_l with
V_l = chol(I + P^1/2 G^H G P^1/2)^-1 P^1/2 G_l^H; no eigendecomposition anywhere. Both costs are in nats.

Products with the sensing matrices, and the Gram matrices of what they give, run in the observation's precision;
everything of the size of k in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ris_hpo.estimators.observation import (
    Observation,
    as_sources,
    box_steering,
    clipped,
    limits,
    polar_slopes,
    require_candidates,
    to_box_coordinates,
    to_polar,
)
from ris_hpo.physics.array import position_jacobian
from ris_hpo.physics.grid import Region
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

# powers relative to the noise: below the first a source is not seen by anything, above the second nothing is noise
LOG_POWER_LIMITS = (-12.0, 28.0)
# largest move of a step in (sin az, sin el, 1/r, log p): half a beam width, a fifth of the range axis, one e-fold and a
# half
_STRIDE = (0.08, 0.08, 0.4, 1.5)
_CHUNK = 32
_POWER_STEPS = 4  # Fisher steps of the powers alone before positions move too
_RANGE_POINTS = 128

Evaluation = tuple[Tensor, Tensor, Tensor]


class Selectable(Protocol):
    """Data of a batch that can be narrowed to some of its scenes."""

    def __getitem__(self, index: Tensor) -> Self: ...


Data = TypeVar("Data", bound=Selectable)


class Fit(NamedTuple):
    """Sources of one order k in every scene.

    Attributes:
        u: float64 [B, k, 3] box coordinates.
        log_power: float64 [B, k], whitened.
        nll: float64 [B], stochastic negative log-likelihood in nats.
    """

    u: Tensor
    log_power: Tensor
    nll: Tensor

    def take(self, better: Tensor, other: Fit) -> Fit:
        """This fit where ``better`` [B], the other elsewhere."""
        pick = better[:, None, None]
        return Fit(
            torch.where(pick, self.u, other.u),
            torch.where(pick[..., 0], self.log_power, other.log_power),
            torch.where(better, self.nll, other.nll),
        )


def refine(
    scenes: Scenes,
    init: Sources,
    steps: int = 10,
    *,
    region: Region | None = None,
    double: bool = True,
    covariance: bool = False,
    channel_error_db: float | None = None,
) -> Sources:
    """Refine given sources by Levenberg-Marquardt on the deterministic likelihood.

    Args:
        scenes: what was received.
        init: where to start; its mask says how many sources each scene has.
        steps: at most so many; a scene that has converged stops earlier. 0 returns the start, clipped to the box.
        region: allowed positions (default: those of the default scenes).
        double: compute products in complex128 (else complex64, twice as fast).
        covariance: also report the position covariance.
        channel_error_db: stated error of the known channel.

    Returns:
        Sources with the mask and existence of ``init``, and powers from the stochastic likelihood.

    Raises:
        ConfigError: starts of another batch size.
        NumericalError: scenes or starts that are not finite.
    """
    require_candidates(scenes, init.azimuth, init.elevation, init.range_m)
    region = region or Region()
    dtype = torch.complex128 if double else torch.complex64
    result = Sources(*(value.clone() for value in (init.azimuth, init.elevation, init.range_m, init.power, init.mask)))
    result = result.to(torch.float32)
    blocks = torch.zeros(*init.mask.shape, 3, 3, device=init.mask.device) if covariance else None
    count = init.num_sources
    for k in sorted(set(count.tolist()) - {0}):
        rows = torch.nonzero(count == k).squeeze(-1)
        for part in rows.split(_CHUNK):
            observation = Observation.of(scenes[part], channel_error_db=channel_error_db, dtype=dtype)
            slots = torch.argsort(init.mask[part].to(torch.int8), dim=-1, descending=True, stable=True)[:, :k]
            start = init[part].take(slots)
            u = to_box_coordinates(start.azimuth, start.elevation, start.range_m)
            u = deterministic_fit(observation, u, region, steps)
            fit = stochastic_fit(observation, u, None, region, 6, positions=False)
            found = as_sources(observation, u, fit.log_power.exp(), torch.ones_like(slots, dtype=torch.bool))
            where = (part.unsqueeze(-1), slots)
            result.azimuth[where], result.elevation[where] = found.azimuth, found.elevation
            result.range_m[where], result.power[where] = found.range_m, found.power
            if blocks is not None:
                blocks[where] = position_moments(observation, fit, region)[1].float()
    return Sources(result.azimuth, result.elevation, result.range_m, result.power, init.mask, init.existence, blocks)


def deterministic_fit(
    observation: Observation, u: Tensor, region: Region, steps: int, tolerance: float = 1e-3
) -> Tensor:
    """Variable projection from u [B, k, 3]; a scene stops when a step gains less than ``tolerance`` nats."""
    k = u.shape[1]
    low, high = (limit.repeat(k) for limit in limits(region, u.device))
    stride = torch.tensor(_STRIDE[:3], dtype=u.dtype, device=u.device).repeat(k)
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
) -> Fit:
    """Fisher scoring on the stochastic likelihood.

    Args:
        observation: B scenes.
        u: [B, k, 3] start.
        log_power: [B, k] start, or None to start at the least-squares symbols' power.
        region: allowed positions.
        steps: at most so many.
        tolerance: a scene stops when a step gains less, in nats.
        positions: move positions too, or powers alone (no product with the sensing matrices then).
    """
    k = u.shape[1]
    u = clipped(u, region)
    statistics = power_statistics(observation, u)
    if log_power is None:
        log_power = least_squares_log_power(statistics)
    stride = torch.tensor(_STRIDE, dtype=u.dtype, device=u.device)
    power_low, power_high = (torch.full_like(log_power[0], limit) for limit in LOG_POWER_LIMITS)
    log_power = log_power.clamp(*LOG_POWER_LIMITS)
    moves = positions and steps > 0  # then the powers are only a start
    most, enough = (_POWER_STEPS, 10 * tolerance) if moves else (12, tolerance)
    spread = stride[3:].expand(k)
    powers, nll = descend(statistics, power_cost, log_power, power_low, power_high, spread, most, enough)
    if not moves:
        return Fit(u, powers, nll)
    low, high = (
        torch.cat([limit.repeat(k), bound])
        for limit, bound in zip(limits(region, u.device), (power_low, power_high), strict=True)
    )
    strides = torch.cat([stride[:3].repeat(k), stride[3:].expand(k)])
    start = torch.cat([u.flatten(1), powers], dim=-1)
    x, nll = descend(observation, stochastic_cost, start, low, high, strides, steps, tolerance)
    return Fit(x[:, : 3 * k].unflatten(-1, (k, 3)), x[:, 3 * k :], nll)


def descend(
    data: Data,
    objective: Callable[[Data, Tensor], Evaluation],
    x: Tensor,
    low: Tensor,
    high: Tensor,
    stride: Tensor,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Levenberg-Marquardt within a box; every scene has its own damping and leaves the batch when it has converged.

    Args:
        data: what the objective needs of each scene.
        objective: (data, x) -> cost [B], gradient [B, P], positive semi-definite Hessian [B, P, P].
        x: float64 [B, P] start, inside the box.
        low: [P] lower limits.
        high: [P] upper limits.
        stride: [P] largest move of one step.
        steps: at most so many evaluations after the first.
        tolerance: a scene is done when an accepted step gains less than this.

    Returns:
        x [B, P] and cost [B]; the cost never rises.
    """
    best, best_cost = x.clone(), x.new_empty(len(x))
    active = torch.arange(len(x), device=x.device)
    cost, gradient, hessian = objective(data, x)
    best_cost.copy_(cost)
    damping = torch.full_like(cost, 1e-3)
    done = torch.zeros_like(active, dtype=torch.bool)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        # a coordinate at its limit with the descent pointing outward stays where it is
        held = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
        free = (~held).to(x.dtype)
        matrix = hessian * free.unsqueeze(-1) * free.unsqueeze(-2)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        floor = 1e-9 * diagonal.amax(-1, keepdim=True) + 1e-12
        scale = (diagonal + floor).rsqrt()
        scaled = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2) + (damping[:, None, None] + 1e-10) * eye
        factor, _ = torch.linalg.cholesky_ex(scaled + (1 - free).unsqueeze(-1) * eye)
        move = torch.cholesky_solve((-gradient * free * scale).unsqueeze(-1), factor).squeeze(-1) * scale
        move = torch.nan_to_num(move, nan=0.0)  # a failed factor counts as a rejected step and raises the damping
        move = move * (stride / move.abs().clamp(min=1e-300)).amin(-1, keepdim=True).clamp(max=1)
        trial = torch.minimum(torch.maximum(x + move, low), high)
        trial_cost, trial_gradient, trial_hessian = objective(data, trial)
        better = trial_cost < cost
        gain = cost - trial_cost
        done = done | (better & (gain < tolerance)) | (~better & ((damping > 1e4) | (gain > -1e-9 * (1 + cost.abs()))))
        damping = torch.where(better, (damping * 0.15).clamp(min=1e-7), damping * 8 + 1e-4)
        x = torch.where(better.unsqueeze(-1), trial, x)
        cost = torch.where(better, trial_cost, cost)
        gradient = torch.where(better.unsqueeze(-1), trial_gradient, gradient)
        hessian = torch.where(better[:, None, None], trial_hessian, hessian)
        best[active], best_cost[active] = x, cost
        running = torch.nonzero(~done).squeeze(-1)
        if len(running) == 0:
            break
        if len(running) <= 0.75 * len(done):  # narrowing copies the sensing matrices, so not for every scene that ends
            data, active, x, cost = data[running], active[running], x[running], cost[running]
            gradient, hessian, damping, done = gradient[running], hessian[running], damping[running], done[running]
    return best, best_cost


def deterministic_cost(observation: Observation, x: Tensor) -> Evaluation:
    """Variable projection: sum_l || P_perp(G_l) y_l ||^2 with gradient and Kaufman's Hessian at x [B, 3k]."""
    k = x.shape[1] // 3
    g, d = (part.to(torch.complex128) for part in observation.linearised(x.unflatten(-1, (k, 3))))
    y = observation.y.unsqueeze(-1)
    factor = ridged_cholesky(g.mH @ g)
    symbols = torch.cholesky_solve(g.mH @ y, factor)
    residual = y - g @ symbols
    weighted = d * symbols.squeeze(-1).repeat_interleave(3, dim=-1).unsqueeze(2)
    inside = torch.linalg.solve_triangular(factor, g.mH @ weighted, upper=False).flatten(1, 2)
    whole = weighted.flatten(1, 2)
    hessian = 2 * (whole.mH @ whole - inside.mH @ inside).real
    gradient = -2 * (whole.mH @ residual.flatten(1, 2)).real.squeeze(-1)
    return residual.abs().square().sum((1, 2, 3)), gradient, hessian


def stochastic_cost(observation: Observation, x: Tensor) -> Evaluation:
    """Stochastic negative log-likelihood with gradient and Fisher matrix at x = (u [B, 3k], log p [B, k])."""
    k = x.shape[1] // 4
    power = x[:, 3 * k :].exp()
    g, d = observation.linearised(x[:, : 3 * k].unflatten(-1, (k, 3)))
    seen = torch.cat([g, d, observation.y.unsqueeze(-1).to(g.dtype)], dim=-1)
    gram = (seen.mH @ seen).to(torch.complex128)
    root = power.sqrt()[:, None, :]
    top = gram[..., :k, :] * root.unsqueeze(-1)
    factor = repaired_cholesky(_plus_identity(top[..., :k] * root.unsqueeze(-2)))
    inside = torch.linalg.solve_triangular(factor, top, upper=False)
    solved = gram - inside.mH @ inside  # [G D y]^H R^-1 [G D y]
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).real.log().sum((1, 2))
    energy = observation.y.abs().square().sum((1, 2))
    cost = log_det + energy - inside[..., -1].abs().square().sum((1, 2))
    owner = torch.arange(3 * k, device=x.device) // 3
    p = power[:, owner]
    gg, gd, dd = solved[..., :k, :k], solved[..., :k, k:-1], solved[..., k:-1, k:-1]
    seen_g, seen_d = solved[..., :k, -1], solved[..., k:-1, -1]  # g^H R^-1 y, d^H R^-1 y
    own_gd = torch.gather(gd, -2, owner.expand(*gd.shape[:2], 1, -1)).squeeze(-2)
    gradient_u = 2 * p * (own_gd - seen_d.conj() * seen_g[..., owner]).real.sum(1)
    gradient_p = power * (gg.diagonal(dim1=-2, dim2=-1).real - seen_g.abs().square()).sum(1)
    gd_all, gg_all = gd[..., owner, :].to(g.dtype), gg[..., owner, :][..., owner].to(g.dtype)
    cross = (gd_all * gd_all.mT + gg_all * dd.mT.to(g.dtype)).real.sum(1)
    block_u = 2 * cross * p.unsqueeze(-1) * p.unsqueeze(-2)
    block_up = 2 * (gd.mT * gg[..., owner, :]).real.sum(1) * p.unsqueeze(-1) * power.unsqueeze(-2)
    block_p = gg.abs().square().sum(1) * power.unsqueeze(-1) * power.unsqueeze(-2)
    upper = torch.cat([block_u, block_up], dim=-1)
    lower = torch.cat([block_up.mT, block_p], dim=-1)
    return cost, torch.cat([gradient_u, gradient_p], dim=-1), torch.cat([upper, lower], dim=-2)


@dataclass(frozen=True, slots=True)
class PowerStatistics:
    """All that powers depend on: G^H G complex128 [B, L, k, k], G^H y [B, L, k] and |y|^2 summed, float64 [B]."""

    gram: Tensor
    matched: Tensor
    energy: Tensor

    def __getitem__(self, index: Tensor) -> PowerStatistics:
        return PowerStatistics(self.gram[index], self.matched[index], self.energy[index])

    def without(self, source: int) -> PowerStatistics:
        """The statistics of the other sources."""
        keep = [i for i in range(self.gram.shape[-1]) if i != source]
        return PowerStatistics(self.gram[..., keep, :][..., keep], self.matched[..., keep], self.energy)


def power_statistics(observation: Observation, u: Tensor) -> PowerStatistics:
    """Statistics for the powers of sources at u [B, k, 3]."""
    g = observation.see(box_steering(observation.geometry, u))
    matched = (g.mH @ observation.y.unsqueeze(-1).to(g.dtype)).squeeze(-1)
    return PowerStatistics(
        (g.mH @ g).to(torch.complex128), matched.to(torch.complex128), observation.y.abs().square().sum((1, 2))
    )


def power_cost(statistics: PowerStatistics, log_power: Tensor) -> Evaluation:
    """Stochastic negative log-likelihood with gradient and Fisher matrix along log p [B, k]."""
    k = log_power.shape[1]
    power = log_power.exp()
    root = power.sqrt()[:, None, :, None]
    stacked = torch.cat([statistics.gram, statistics.matched.unsqueeze(-1)], dim=-1)
    top = stacked * root
    factor = repaired_cholesky(_plus_identity(top[..., :k] * root.mT))
    inside = torch.linalg.solve_triangular(factor, top, upper=False)
    solved = stacked - inside[..., :k].mH @ inside
    gg, seen = solved[..., :k], solved[..., k]
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).real.log().sum((1, 2))
    cost = log_det + statistics.energy - inside[..., k].abs().square().sum((1, 2))
    gradient = power * (gg.diagonal(dim1=-2, dim2=-1).real - seen.abs().square()).sum(1)
    return cost, gradient, gg.abs().square().sum(1) * power.unsqueeze(-1) * power.unsqueeze(-2)


def least_squares_log_power(statistics: PowerStatistics) -> Tensor:
    """Log of mean_l |s_kl|^2 less its noise part, never under a tenth of the whole, [B, k]."""
    factor = ridged_cholesky(statistics.gram)
    symbols = torch.cholesky_solve(statistics.matched.unsqueeze(-1), factor).squeeze(-1)
    whole = symbols.abs().square().mean(1)
    noise = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1).real.mean(1)
    return torch.maximum(whole - noise, 0.1 * whole).clamp(min=1e-30).log().clamp(*LOG_POWER_LIMITS)


def evidence(scenes: Scenes, candidates: Sources, *, channel_error_db: float | None = None) -> Tensor:
    """Stochastic negative log-likelihood of given sources at their best powers, in nats.

    Args:
        scenes: what was received.
        candidates: positions; the mask says which count.
        channel_error_db: stated error of the known channel.

    Returns:
        float64 [B]; without a source it is the whitened energy of y. Constants common to all orders are left out.

    Raises:
        ConfigError: candidates of another batch size.
        NumericalError: scenes or candidates that are not finite.
    """
    require_candidates(scenes, candidates.azimuth, candidates.elevation, candidates.range_m)
    nll = torch.empty(len(scenes), dtype=torch.float64, device=scenes.device)
    count = candidates.num_sources
    for k in sorted(set(count.tolist())):
        rows = torch.nonzero(count == k).squeeze(-1)
        for part in rows.split(_CHUNK):
            observation = Observation.of(scenes[part], channel_error_db=channel_error_db)
            if k == 0:
                nll[part] = observation.y.abs().square().sum((1, 2))
                continue
            slots = torch.argsort(candidates.mask[part].to(torch.int8), dim=-1, descending=True, stable=True)[:, :k]
            given = candidates[part].take(slots)
            u = to_box_coordinates(given.azimuth, given.elevation, given.range_m)
            statistics = power_statistics(observation, u)
            start = least_squares_log_power(statistics)
            low, high = (torch.full_like(start[0], limit) for limit in LOG_POWER_LIMITS)
            stride = torch.full_like(low, _STRIDE[3])
            nll[part] = descend(statistics, power_cost, start, low, high, stride, 25, 1e-6)[1]
    return nll


def position_moments(
    observation: Observation, fit: Fit, region: Region, *, mean: bool = False
) -> tuple[Tensor, Tensor]:
    """Position estimate and its covariance.

    The likelihood is close to Gaussian in the box coordinates but not in range, and the box cuts it off. So the
    posterior of 1/r is the Gaussian of the Fisher matrix around the unconstrained Newton point, times a prior uniform
    in r on the box; its moments in r are taken on a grid, and the angles follow by regression on 1/r. Where the data
    tell the range sharply this is the inverse Fisher matrix.

    Args:
        observation: B scenes.
        fit: k sources in each.
        region: allowed positions.
        mean: estimate the range by the posterior's mean instead of its mode; the covariance is about the estimate.

    Returns:
        (azimuth, elevation, range) float64 [B, k, 3] and the Cartesian covariance float64 [B, k, 3, 3] in m^2.
    """
    k = fit.u.shape[1]
    x = torch.cat([fit.u.flatten(1), fit.log_power], dim=-1)
    _, gradient, information = stochastic_cost(observation, x)
    low, high = limits(region, fit.u.device)
    precision = 12 / (high - low).clamp(min=1e-6).square()
    precision[2] = 1e-9  # the range's prior enters below
    prior = torch.cat([precision.repeat(k), torch.full_like(x[0, :k], 0.1)])
    information = information + torch.diag_embed(prior)
    scale = information.diagonal(dim1=-2, dim2=-1).maximum(prior).rsqrt()  # rounding may take more than the data gave
    scaled = information * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    eye = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    factor, failed = torch.linalg.cholesky_ex(scaled + 1e-10 * eye)
    if bool((failed > 0).any()):  # coinciding sources: only their sum is told
        factor = torch.where((failed > 0)[:, None, None], torch.linalg.cholesky_ex(scaled + 1e-4 * eye)[0], factor)
    covariance = torch.cholesky_inverse(factor) * scale.unsqueeze(-1) * scale.unsqueeze(-2)
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
    return torch.stack([azimuth, elevation, about], dim=-1), jacobian @ joint @ jacobian.mT


def ridged_cholesky(gram: Tensor) -> Tensor:
    """Cholesky factor of G^H G [..., k, k] with a relative ridge of 1e-12, which only coinciding sources notice."""
    level = gram.diagonal(dim1=-2, dim2=-1).real.amax(-1)
    ridge = (1e-12 * level + 1e-200).unsqueeze(-1).expand(gram.shape[:-1])
    return repaired_cholesky(gram + torch.diag_embed(ridge).to(gram.dtype))


def repaired_cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor; a matrix that rounding made indefinite gets a relative ridge of 1e-5."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool((failed > 0).any()):
        ridge = 1e-5 * matrix.diagonal(dim1=-2, dim2=-1).real.amax(-1, keepdim=True).expand(matrix.shape[:-1]) + 1e-30
        ridged = torch.linalg.cholesky_ex(matrix + torch.diag_embed(ridge).to(matrix.dtype))[0]
        factor = torch.where((failed > 0)[..., None, None], ridged, factor)
    result: Tensor = factor
    return result


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
