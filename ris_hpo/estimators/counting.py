r"""How many sources: evidence of every order from the fits found.

``laplace``: -log p(y | k) = nll_k - log prior(u, p) - log k! - (P/2) log 2 pi + (1/2) log det F, with F the Fisher
matrix of the 4k parameters plus the precision of their prior, the prior uniform over the box in (azimuth, elevation,
range) and the powers log-uniform: one common level, each within +-``power_spread_db`` of it (with a soft edge), or,
without that, each for itself. A source whose position is barely told by the data costs less than one that is sharp, and
one that would be far weaker than the others costs more. Nothing in it is tuned to scenes except ``penalty``.

``penalty``: nll_k + gamma k, the classical form.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.errors import NumericalError
from ris_hpo.estimators.box import limits, polar_slopes
from ris_hpo.estimators.fit import Fit
from ris_hpo.estimators.observation import Observation
from ris_hpo.physics.cholesky import inverse_information
from ris_hpo.physics.grid import Region
from ris_hpo.physics.sources import TOLERANCE

_LEAST_GAIN = 2.0  # nats a source, below which an order explains nothing
_EDGE = 0.4  # softness of the edge of the power prior, in nepers of power
_LEVEL = 8.0  # width of the common level's log-uniform prior: 35 dB
_WIDE = math.log(100.0)  # width of an independent power's prior: 20 dB
_UNTOLD = 2.0  # nats a source with an independent power costs more: measured, see the log of figures


class EvidenceSpec(Spec):
    """How orders are compared.

    The chosen order minimises score_k - prior_weight * log p(k). The posterior divides these by ``temperature``: the
    evidence knows one mode of each order only and is too sure of itself below 5 dB, where 3 is the calibrated value.
    """

    kind: Literal["laplace", "penalty"] = Field(
        "laplace",
        description="evidence of an order: Laplace's approximation, or its likelihood with a penalty for each source",
    )
    gamma: float = Field(8.5, ge=0, le=200, description="nats for each source; kind = penalty alone")
    penalty: float = Field(0.0, ge=-20, le=200, description="further nats for each source; kind = laplace alone")
    power_spread_db: float | None = Field(
        3.0, gt=0, le=60, description="source powers lie within +- this of a common level; unset: each has any power"
    )
    prior_weight: float = Field(3.0, ge=0, le=1000, description="weight of the log prior of a count over its evidence")
    temperature: float = Field(
        3.0, gt=0, le=100, description="the scores are divided by it in the posterior of the count"
    )
    success_weight: float = Field(
        0.0, ge=0, le=100, description="0: the most probable count; else the chance of a success counts so much more"
    )
    least_prior: float = Field(1e-4, ge=1e-30, lt=1, description="counts that the prior gives less are not tried")


def order_scores(
    observation: Observation,
    orders: list[Fit],
    region: Region,
    spec: EvidenceSpec,
    *,
    lowest: int = 1,
    noise_known: bool = True,
) -> tuple[Tensor, Tensor]:
    """Negative log-evidence of orders 0..len(orders), and the chance that each, if right, has every source in place.

    Args:
        observation: B scenes.
        orders: fits of 1, 2, ... sources.
        region: allowed positions.
        spec: how orders are compared.
        lowest: of the orders of sources that can be the answer; lower ones get infinity and 0.
        noise_known: the noise power is known; else order 0 takes the received power for the noise's, see ``null_nll``.

    Returns:
        scores and chances, float64 [B, K + 1] each; constants common to all orders are left out of the scores.
    """
    null = null_nll(observation)
    columns, chances = [null_nll(observation, noise_known=noise_known)], [torch.ones_like(null)]
    for fit in orders:
        k = fit.u.shape[1]
        if k < lowest:
            columns.append(torch.full_like(null, torch.inf))
            chances.append(torch.zeros_like(null))
            continue
        try:
            covariance, log_det = inverse_information(_precision(observation, fit, region), "information on an order")
        except NumericalError:  # as for the moments of positions
            precise = _precision(observation.double(), fit.plain(), region)
            covariance, log_det = inverse_information(precise, "information on an order")
        if spec.kind == "penalty":
            columns.append(fit.nll + spec.gamma * k)
        else:
            score = fit.nll + _occam_factor(fit, log_det, region, spec) + spec.penalty * k
            # Laplace's formula counts k! separate modes, which a flat likelihood does not have
            explains = fit.nll < null - _LEAST_GAIN * k
            columns.append(torch.where(explains, score, null + k))
        chances.append(_in_place(fit, covariance))
    return torch.stack(columns, dim=-1), torch.stack(chances, dim=-1)


def null_nll(observation: Observation, *, noise_known: bool = True) -> Tensor:
    """Negative log-likelihood without a source, float64 [B] in nats: E = sum_l |y_l|^2 / noise power.

    Where the noise power is an estimate that other sources may have lowered or raised, order 0 has its own: the best
    one, E / (L M) times the estimate, which leaves L M (1 + log(E / (L M))).
    """
    energy = observation.y.abs().square().sum((1, 2)).double()
    if noise_known:
        return energy
    size = observation.y[0].numel()
    return size * (1 + (energy / size).clamp(min=1e-30).log())


def _precision(observation: Observation, fit: Fit, region: Region) -> Tensor:
    """Fisher matrix of (u, log p) plus the precision of their prior, float64 [B, 4k, 4k]."""
    k = fit.u.shape[1]
    _, _, information = fit.evaluated(observation)
    low, high = limits(region, fit.u.device)
    width = (high - low).clamp(min=1e-6)
    prior = torch.cat([(12 / width.square()).repeat(k), torch.full_like(fit.u[0, :, 0], 12 / _WIDE**2)])
    return information + torch.diag_embed(prior)


def _occam_factor(fit: Fit, log_det: Tensor, region: Region, spec: EvidenceSpec) -> Tensor:
    """What the order's freedom costs beside its nll, float64 [B]."""
    k = fit.u.shape[1]
    log_prior = log_position_prior(fit.u, region).sum(-1) + _log_power_prior(fit.log_power, spec) + math.lgamma(k + 1)
    cost: Tensor = log_det * 0.5 - 2 * k * math.log(2 * math.pi) - log_prior
    return cost


def _in_place(fit: Fit, covariance: Tensor) -> Tensor:
    """Chance that every source lies within the tolerances of a success, by the marginal spreads of Laplace's fit."""
    k = fit.u.shape[1]
    variance = covariance.diagonal(dim1=-2, dim2=-1)[:, : 3 * k].unflatten(-1, (k, 3))
    spread = variance.clamp(min=1e-30).sqrt() * polar_slopes(fit.u).abs()
    tolerance = torch.tensor(TOLERANCE, dtype=spread.dtype, device=spread.device)
    return torch.erf(tolerance / (spread * math.sqrt(2))).prod(-1).prod(-1)


def log_position_prior(u: Tensor, region: Region) -> Tensor:
    """Log density in box coordinates of a source uniform in (azimuth, elevation, range), [..., 3] to [...]."""
    spans = [math.radians(max(region.azimuth_deg[1] - region.azimuth_deg[0], 0.01))]
    spans.append(math.radians(max(region.elevation_deg[1] - region.elevation_deg[0], 0.01)))
    spans.append(max(region.range_m[1] - region.range_m[0], 0.001))
    t, w, rho = u.unbind(-1)
    slopes = -0.5 * (1 - t * t).clamp(min=1e-9).log() - 0.5 * (1 - w * w).clamp(min=1e-9).log() - 2 * rho.log()
    return slopes - sum(math.log(span) for span in spans)


def chosen_order(log_posterior: Tensor, chances: Tensor, spec: EvidenceSpec) -> Tensor:
    """The count that is reported, int64 [B]: it maximises p(k | y) (1 + success_weight * chance_k)."""
    return (log_posterior + torch.log1p(spec.success_weight * chances)).argmax(-1)


class CountWeights(NamedTuple):
    """How a scene weighs evidence against a prior: -e t log(1 + d_k / t) + p log p(k) + bias_k, d_k = score_k - min.

    The saturation t keeps a misfit of the model, which grows with the SNR, from shouting the prior down.

    Attributes:
        evidence: e, float64 [B].
        saturation: t in nats, float64 [B].
        prior: p, float64 [B].
        bias: float64 [B, K + 1].
    """

    evidence: Tensor
    saturation: Tensor
    prior: Tensor
    bias: Tensor


def posterior_of_orders(
    scores: Tensor,
    spec: EvidenceSpec,
    log_prior: Tensor | None,
    allowed: Tensor,
    weights: CountWeights | None = None,
) -> Tensor:
    """Log p(k | y), float64 [B, K + 1].

    Without ``log_prior`` all counts are equally likely before. With it, how many sources there are is decided by prior
    and evidence, but whether there is any by the evidence alone, none and some being equally likely before: a prior
    from elsewhere (a network's count head) may never have seen a scene without a source.

    Args:
        scores: negative log-evidence [B, K + 1].
        spec: weight of the prior and temperature.
        log_prior: [B, >= K + 1] log p(k) from elsewhere, or None for uniform.
        allowed: counts that can be the answer, bool [B, K + 1]; at least one in every scene.
        weights: in place of the spec's weight and temperature; needs ``log_prior``.
    """
    evidence = (-scores / spec.temperature).masked_fill(~allowed, -torch.inf)
    if log_prior is None:
        return torch.log_softmax(evidence, dim=-1)
    prior = log_prior[:, 1 : scores.shape[1]].to(scores).clamp(min=-1e6)
    if weights is not None:
        without_none = weights._replace(bias=weights.bias[:, 1:])
        logits = mixed(scores[:, 1:].masked_fill(~allowed[:, 1:], torch.inf), prior, without_none)
    else:
        logits = (spec.prior_weight * prior / spec.temperature + evidence[:, 1:]).masked_fill(
            ~allowed[:, 1:], -torch.inf
        )
    some = evidence[:, 1:].logsumexp(-1) - allowed[:, 1:].sum(-1).clamp(min=1).log()
    any_source = torch.stack([evidence[:, 0], some], dim=-1).log_softmax(-1)
    found = any_source[:, 1:].isfinite()
    how_many = torch.log_softmax(torch.where(found, logits, torch.zeros_like(logits)), dim=-1)
    several = torch.where(found, any_source[:, 1:] + how_many, -torch.inf)
    return torch.cat([any_source[:, :1], several], dim=-1)


def mixed(scores: Tensor, log_prior: Tensor, weights: CountWeights) -> Tensor:
    """Unnormalised log-posterior by :class:`CountWeights`, differentiable in them; infinite scores give -infinity."""
    untried = scores.isinf()
    behind = scores - scores.amin(-1, keepdim=True)
    behind = behind.masked_fill(untried, 0)  # no infinity may meet a gradient
    evidence, saturation, prior = (value.unsqueeze(-1) for value in weights[:3])
    bias = weights.bias[:, : scores.shape[1]]
    logits = prior * log_prior - evidence * saturation * torch.log1p(behind / saturation) + bias
    return logits.masked_fill(untried, -torch.inf)


def _log_power_prior(log_power: Tensor, spec: EvidenceSpec) -> Tensor:
    k = log_power.shape[-1]
    if spec.power_spread_db is None:
        return log_power.new_full(log_power.shape[:-1], -k * (_WIDE + _UNTOLD))
    width = 2 * spec.power_spread_db * math.log(10) / 10
    beyond = (log_power.amax(-1, keepdim=True) - log_power - width).clamp(min=0)
    return -(k - 1) * math.log(width) - math.log(_LEVEL) - 0.5 * (beyond / _EDGE).square().sum(-1)
