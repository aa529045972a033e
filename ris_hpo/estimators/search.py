"""Greedy search for sources among atoms: orthogonal least squares on y with a refinement after every step.

An atom x_l = T_l a is judged against the present model R_l = I + G_l diag(p) G_l^H by the likelihood it would gain with
power q,

    gain(q) = sum_l [ q beta_l / (1 + q alpha_l) - log(1 + q alpha_l) ],  alpha_l = x_l^H R_l^-1 x_l,
    beta_l = |x_l^H R_l^-1 y_l|^2,

at the best of a few q, or, with the present sources' symbols free, by the classical sum_l beta_l / alpha_l with R_l^-1
replaced by P_perp(G_l). The first weighs snapshots by how well the atom is seen in them, which matters at low SNR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.estimators.box import box_steering
from ris_hpo.estimators.cost import LOG_POWER_LIMITS, power_statistics, removal_cost
from ris_hpo.estimators.fit import Fit, deterministic_fit, joint_fit, stochastic_fit
from ris_hpo.estimators.observation import Observation
from ris_hpo.physics.cholesky import cholesky
from ris_hpo.physics.grid import Region

_REPAIR = 8.0  # nats
_SHARES = (0.06, 0.3)  # powers that an atom is tried with, as shares of what a single source would have


class SearchSpec(Spec):
    """How much work the search may do."""

    objective: Literal["stochastic", "deterministic"] = Field(
        "stochastic", description="symbols averaged over as Gaussian, or estimated by least squares"
    )
    greedy_steps: int = Field(4, ge=0, le=100, description="refinement steps after each source that is added")
    power_steps: int = Field(
        4,
        ge=0,
        le=100,
        description="steps of the powers alone before positions move as well; 0: every fit goes on from the one "
        "before, an added source at the power that explains its own part",
    )
    final_steps: int = Field(12, ge=0, le=200, description="refinement steps of the chosen order, at most")
    final_tolerance: float = Field(1e-5, gt=0, le=1, description="nats; a scene whose last step gained less is done")
    extra_order: int = Field(
        1, ge=0, le=3, description="orders that are searched beyond the most sources, then reduced"
    )
    residual_maxima: int = Field(
        0, ge=0, le=256, description="extra orders choose among so many maxima of the residual's spectrum instead"
    )
    every_order: bool = Field(
        True,
        description="search orders below the lowest that can be the answer as thoroughly as the others: an answer "
        "falls back on one where two of its sources coincide",
    )
    backward: bool = Field(True, description="orders are improved from the next higher one, without one of its sources")
    sweeps: int = Field(
        0, ge=0, le=5, description="times that each source is moved to the best candidate, others fixed"
    )
    sweep_atoms: int = Field(256, ge=1, description="candidates that a sweep tries")


@dataclass(frozen=True, slots=True)
class Atoms:
    """Candidate positions as the receiver sees them.

    Attributes:
        u: float64 [B, C, 3] box coordinates.
        seen: complex64 [B, L, M, C] = T_l a.
        energy: float32 [B, L, C] = |T_l a|^2.
    """

    u: Tensor
    seen: Tensor
    energy: Tensor

    @staticmethod
    def of(observation: Observation, u: Tensor, response: Tensor | None = None) -> Atoms:
        """Atoms at u, [C, 3] for all scenes or [B, C, 3]; their array responses may be given where they are at hand."""
        sensing, shape = observation.sensing.to(torch.complex64), observation.y.shape
        if response is None:
            response = box_steering(observation.geometry, u).to(torch.complex64)
        if u.dim() == 2:  # one product for the whole batch
            seen = (sensing.flatten(0, 1) @ response.mT).view(*shape, -1)
            u = u.expand(len(observation), -1, -1)
        else:
            seen = torch.bmm(sensing, response.mT).unflatten(1, shape[1:])
        return Atoms(u, seen, _energy(seen))

    def chosen(self, index: Tensor) -> Atoms:
        """Some atoms of every scene: index [B, C']."""
        _, snapshots, antennas = self.seen.shape[:3]
        u = self.u.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))
        wide = index[:, None, None].expand(-1, snapshots, antennas, -1)
        energy = self.energy.gather(2, index[:, None].expand(-1, snapshots, -1))
        return Atoms(u, self.seen.gather(3, wide), energy)

    def __getitem__(self, index: Tensor | slice) -> Atoms:
        return Atoms(self.u[index], self.seen[index], self.energy[index])


def gains(observation: Observation, atoms: Atoms, fit: Fit | None, spec: SearchSpec) -> Tensor:
    """Likelihood gain of every atom beside the sources of ``fit``, float32 [B, C], in nats."""
    return _gains(observation, atoms, *_visibility(observation, atoms, fit, spec), spec)


def _visibility(observation: Observation, atoms: Atoms, fit: Fit | None, spec: SearchSpec) -> tuple[Tensor, Tensor]:
    """Alpha and beta of every atom beside the sources of ``fit``, float32 [B, L, C] each: see the module."""
    y = observation.y
    rows, alpha = y.unsqueeze(-2).conj(), atoms.energy  # rows: conj of R^-1 y and of the projector's rows, [B, L, *, M]
    if fit is not None and fit.u.shape[1]:
        g = observation.see_sources(fit.u).to(y.dtype)
        gram = g.mH @ g
        if spec.objective == "stochastic":
            root = (0.5 * fit.log_power).exp().to(y.real.dtype)[:, None, :, None]
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            factor = cholesky(eye + gram * root * root.mT, "I + P^1/2 G^H G P^1/2")
            basis = torch.linalg.solve_triangular(factor, g.mH * root, upper=False)
        else:
            factor = cholesky(gram, "Gram matrix of the sources", ridged=True)
            basis = torch.linalg.solve_triangular(factor, g.mH, upper=False)
        residual = y - (basis.mH @ (basis @ y.unsqueeze(-1))).squeeze(-1)
        rows = torch.cat([residual.unsqueeze(-2).conj(), basis], dim=-2)
    products = rows.to(torch.complex64) @ atoms.seen
    beta = _energy(products[..., :1, :])
    if products.shape[-2] > 1:
        alpha = (alpha - _energy(products[..., 1:, :])).clamp_(min=0)
    return alpha, beta


def _gains(observation: Observation, atoms: Atoms, alpha: Tensor, beta: Tensor, spec: SearchSpec) -> Tensor:
    y = observation.y
    if spec.objective == "deterministic":
        return (beta / (alpha + 1e-2 * atoms.energy + 1e-30)).sum(1)
    excess = (y.abs().square().mean((1, 2)) - 1).clamp(min=0.02)
    level = (excess / atoms.energy.mean((1, 2)) * y.shape[-1]).float()  # power of one source that explained it all
    best = torch.full_like(atoms.energy[:, 0], -torch.inf)
    for share in _SHARES:
        q = (share * level)[:, None, None]
        scaled = q * alpha + 1
        best = torch.maximum(best, (q * beta / scaled).sum(1) - _log_product(scaled))
    return best


def _energy(values: Tensor) -> Tensor:
    """Sum of |values|^2 over the last but one axis: complex [..., M, C] to real [..., C], the long axis innermost."""
    pairs = torch.view_as_real(values).flatten(-2).square().sum(-2)
    return pairs[..., 0::2] + pairs[..., 1::2]


def _log_product(values: Tensor) -> Tensor:
    """Sum of log over axis 1, [B, L, C] to [B, C], with one logarithm for every four factors (each below 1e9)."""
    whole = values.shape[1] // 4 * 4
    four = values[:, 0:whole:4] * values[:, 1:whole:4] * values[:, 2:whole:4] * values[:, 3:whole:4]
    return four.log().sum(1) + values[:, whole:].log().sum(1)


def search_orders(
    observation: Observation,
    atoms: Atoms,
    orders_needed: tuple[int, int],
    region: Region,
    spec: SearchSpec,
    look_again: Callable[[Fit], Atoms] | None,
    first_look: int,
) -> list[Fit]:
    """Best fits found of orders 1..highest + ``extra_order`` (index 0 is order 1), all scenes at every order.

    Args:
        observation: what was received.
        atoms: candidates.
        orders_needed: lowest and highest order that can be the answer; lower ones are only passed through.
        region: allowed positions.
        spec: how much work.
        look_again: other candidates beside a fit: what the candidates missed comes in there, and on the way back the
            source that is missed least goes; None for the same candidates at every order.
        first_look: order from which on there are other candidates.
    """
    orders: list[Fit] = []
    fit: Fit | None = None
    least, most = orders_needed
    max_order = most + spec.extra_order
    for order in range(1, max_order + 1):
        offered = look_again(fit) if fit is not None and look_again is not None and order >= first_look else atoms
        steps = spec.greedy_steps if order >= least else min(spec.greedy_steps, 1)
        fit = extended(observation, offered, fit, region, spec, steps)
        orders.append(fit)
    if spec.backward:
        for k in range(max_order - 1, least - 1, -1):
            orders[k - 1] = improved_from_above(observation, orders[k], orders[k - 1], region, spec)
    return orders


def extended(
    observation: Observation, atoms: Atoms, fit: Fit | None, region: Region, spec: SearchSpec, steps: int
) -> Fit:
    """Add the best atom and refine everything."""
    alpha, beta = _visibility(observation, atoms, fit, spec)
    index = _gains(observation, atoms, alpha, beta, spec).argmax(-1)
    added = atoms.u.gather(1, index[:, None, None].expand(-1, 1, 3))
    u = added if fit is None else torch.cat([fit.u, added], dim=1)
    log_power = None if fit is None else fit.log_power
    if spec.power_steps == 0:
        here = index[:, None, None].expand(-1, alpha.shape[1], 1)
        new = _log_power_of(alpha.gather(2, here).squeeze(-1), beta.gather(2, here).squeeze(-1))
        log_power = new if log_power is None else torch.cat([log_power, new], dim=-1)
    return refined(observation, u, log_power, region, spec, steps)


def _log_power_of(alpha: Tensor, beta: Tensor) -> Tensor:
    """Log of an atom's power from alpha and beta [B, L] at it, float64 [B, 1]: E beta_l = alpha_l + q alpha_l^2."""
    whole, squared = beta.sum(-1, keepdim=True), alpha.square().sum(-1, keepdim=True).clamp(min=1e-30)
    power = (whole - alpha.sum(-1, keepdim=True)).maximum(0.1 * whole) / squared
    return power.double().clamp(min=1e-30).log().clamp(*LOG_POWER_LIMITS)


def refined(
    observation: Observation,
    u: Tensor,
    log_power: Tensor | None,
    region: Region,
    spec: SearchSpec,
    steps: int,
    tolerance: float = 1e-2,
) -> Fit:
    """Refine the positions of k sources in every scene to the next local optimum of the objective.

    Args:
        observation: B scenes.
        u: float64 [B, k, 3] = (sin az, sin el, 1/r in 1/m), where the descent starts.
        log_power: [B, j <= k], log powers at which the first j sources start; the others start at their mean. None for
            the least-squares powers.
        region: allowed positions.
        spec: objective and its settings.
        steps: most iterations.
        tolerance: change of the objective in nats below which a scene is done.
    """
    if spec.objective == "deterministic":
        u = deterministic_fit(observation, u, region, steps, tolerance)
        return stochastic_fit(observation, u, None, region, 0, tolerance, positions=False)
    if log_power is not None and log_power.shape[1] < u.shape[1]:
        level = log_power.mean(-1, keepdim=True)
        log_power = torch.cat([log_power, level.expand(-1, u.shape[1] - log_power.shape[1])], dim=-1)
    if spec.power_steps == 0 and log_power is not None:
        return joint_fit(observation, u, log_power, region, steps, tolerance)
    return stochastic_fit(observation, u, log_power, region, steps, tolerance, power_steps=spec.power_steps)


def removal_costs(observation: Observation, fit: Fit) -> Tensor:
    """Nll that each source's removal would cost with the other powers as they are, float64 [B, k]."""
    statistics = power_statistics(observation, fit.u)
    return removal_cost(statistics, fit.log_power)


def without(fit: Fit, source: Tensor) -> Fit:
    """The fit less one source a scene (source [B]); its nll is not yet that of the rest."""
    k = fit.u.shape[1]
    kept = torch.arange(k - 1, device=source.device).expand(len(source), -1)
    kept = kept + (kept >= source.unsqueeze(-1)).long()
    return Fit(fit.u.gather(1, kept.unsqueeze(-1).expand(-1, -1, 3)), fit.log_power.gather(1, kept), fit.nll)


def improved_from_above(observation: Observation, above: Fit, fit: Fit, region: Region, spec: SearchSpec) -> Fit:
    """Drop the source that the order above misses least, refine the rest, and take it where it beats ``fit``.

    Only scenes where that can win are refined: moving the others rarely makes up for more than ``_REPAIR`` nats.
    """
    cost, source = removal_costs(observation, above).min(-1)
    rest = without(above, source)
    rows = torch.nonzero(above.nll + cost < fit.nll + _REPAIR).squeeze(-1)
    if len(rows) == 0:
        return fit
    part = observation if len(rows) == len(observation) else observation[rows]
    tried = refined(part, rest.u[rows], rest.log_power[rows], region, spec, spec.greedy_steps)
    old = fit.rows(rows)
    return fit.put(rows, tried.take(tried.nll < old.nll, old))


def swept(observation: Observation, atoms: Atoms, fit: Fit, region: Region, spec: SearchSpec, steps: int) -> Fit:
    """One alternating-projection sweep: take each source out, search again, refine, keep what is better."""
    for _ in range(fit.u.shape[1]):
        rest = without(fit, torch.zeros(len(observation), dtype=torch.long, device=fit.u.device))
        candidate = extended(observation, atoms, rest if rest.u.shape[1] else None, region, spec, steps)
        rolled = Fit(fit.u.roll(-1, 1), fit.log_power.roll(-1, 1), fit.nll)
        fit = candidate.take(candidate.nll < fit.nll - 1e-6, rolled)
    return fit
