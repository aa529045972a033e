r"""Negative log-likelihoods of source positions and powers, with gradient and Gauss-Newton or Fisher matrix.

With whitened snapshots (noise power 1), G_l = T_l A(u) and u the box coordinates of k sources:

*Deterministic* (symbols free): c(u) = sum_l || P_perp(G_l) y_l ||^2, variable projection with Kaufman's Jacobian
-P_perp D_ki s_k (Kaufman, "A variable projection method for solving separable nonlinear least squares problems", BIT
15, 1975): Hessian 2 Re sum_l E_l^H P_perp E_l with E_l = D_l s_l, gradient -2 Re sum_l E_l^H r_l.

*Stochastic* (symbols CN(0, p_k)): c(u, log p) = sum_l [ log det R_l + y_l^H R_l^-1 y_l ], R_l = I + G_l diag(p) G_l^H.
All solves are of size k, by R_l^-1 = I - V_l^H V_l with V_l = chol(I + P^1/2 G^H G P^1/2)^-1 P^1/2 G_l^H; no
eigendecomposition anywhere. The Fisher matrix is F_ab = sum_l tr(R_l^-1 dR_l/da R_l^-1 dR_l/db) (Slepian-Bangs).

Both are in nats, less the constants that all orders share. Products with the sensing matrices, and the Gram matrices of
what they give, run in the precision of the sensing matrices; everything of the size of k in that of the snapshots.
Results are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ris_hpo.estimators.observation import Observation
from ris_hpo.physics.cholesky import cholesky

LOG_POWER_LIMITS = (-12.0, 28.0)
"""Limits of a power's logarithm relative to the noise: below the first the data show nothing of a source, above the
second nothing of the noise."""

Evaluation = tuple[Tensor, Tensor, Tensor]
"""Cost [B], gradient [B, P] and positive semi-definite Hessian [B, P, P] at a point x [B, P]."""


def deterministic_cost(observation: Observation, x: Tensor) -> Evaluation:
    """Variable projection: c(u) = sum_l || P_perp(G_l) y_l ||^2 with gradient and Kaufman's Hessian.

    Args:
        observation: B scenes.
        x: u of k sources, float64 [B, 3k], source by source.

    Returns:
        cost [B] in nats, gradient [B, 3k], Hessian [B, 3k, 3k].

    Raises:
        NumericalError: a position or snapshot that is not finite.
    """
    k = x.shape[1] // 3
    g, d = (part.to(observation.y.dtype) for part in observation.linearised(x.unflatten(-1, (k, 3))))
    y = observation.y.unsqueeze(-1)
    factor = cholesky(g.mH @ g, "Gram matrix of the sources", ridged=True)
    symbols = torch.cholesky_solve(g.mH @ y, factor)
    residual = y - g @ symbols
    weighted = d * symbols.squeeze(-1).repeat_interleave(3, dim=-1).unsqueeze(2)
    inside = torch.linalg.solve_triangular(factor, g.mH @ weighted, upper=False).flatten(1, 2)
    whole = weighted.flatten(1, 2)
    hessian = 2 * (whole.mH @ whole - inside.mH @ inside).real
    gradient = -2 * (whole.mH @ residual.flatten(1, 2)).real.squeeze(-1)
    return residual.abs().square().sum((1, 2, 3)).double(), gradient.double(), hessian.double()


def stochastic_cost(observation: Observation, x: Tensor) -> Evaluation:
    """Stochastic c(u, log p) = sum_l [log det R_l + y_l^H R_l^-1 y_l] with gradient and Fisher matrix.

    Args:
        observation: B scenes.
        x: u of k sources, source by source, then their log p: float64 [B, 4k].

    Returns:
        cost [B] in nats, gradient [B, 4k], Fisher matrix [B, 4k, 4k].

    Raises:
        NumericalError: a position, power or snapshot that is not finite.
    """
    k = x.shape[1] // 4
    power = x[:, 3 * k :].exp().to(observation.y.real.dtype)
    g, d = observation.linearised(x[:, : 3 * k].unflatten(-1, (k, 3)))
    seen = torch.cat([g, d, observation.y.unsqueeze(-1).to(g.dtype)], dim=-1)
    gram = (seen.mH @ seen).to(observation.y.dtype)
    root = power.sqrt()[:, None, :]
    top = gram[..., :k, :] * root.unsqueeze(-1)
    factor = cholesky(_plus_identity(top[..., :k] * root.unsqueeze(-2)), _SIGNAL)
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
    gradient = torch.cat([gradient_u, gradient_p], dim=-1)
    return cost.double(), gradient.double(), torch.cat([upper, lower], dim=-2).double()


@dataclass(frozen=True, slots=True)
class PowerStatistics:
    """All that the likelihood of powers depends on, positions being fixed.

    Attributes:
        gram: G_l^H G_l, complex128 [B, L, k, k].
        matched: G_l^H y_l, complex128 [B, L, k].
        energy: sum_l |y_l|^2, float64 [B].
    """

    gram: Tensor
    matched: Tensor
    energy: Tensor

    def __getitem__(self, index: Tensor) -> PowerStatistics:
        return PowerStatistics(self.gram[index], self.matched[index], self.energy[index])


def power_statistics(observation: Observation, u: Tensor) -> PowerStatistics:
    """Statistics for the powers of sources at u, float64 [B, k, 3]."""
    g = observation.see_sources(u)
    matched = (g.mH @ observation.y.unsqueeze(-1).to(g.dtype)).squeeze(-1)
    precision = observation.y.dtype
    return PowerStatistics((g.mH @ g).to(precision), matched.to(precision), observation.y.abs().square().sum((1, 2)))


def power_cost(statistics: PowerStatistics, log_power: Tensor) -> Evaluation:
    """Stochastic cost along log p alone, with gradient and Fisher matrix; no product with the sensing matrices.

    Args:
        statistics: of B scenes.
        log_power: float64 [B, k].

    Returns:
        cost [B] in nats, gradient [B, k], Fisher matrix [B, k, k].

    Raises:
        NumericalError: a power or snapshot that is not finite.
    """
    k = log_power.shape[1]
    power = log_power.exp().to(statistics.energy.dtype)
    root = power.sqrt()[:, None, :, None]
    stacked = torch.cat([statistics.gram, statistics.matched.unsqueeze(-1)], dim=-1)
    top = stacked * root
    factor = cholesky(_plus_identity(top[..., :k] * root.mT), _SIGNAL)
    inside = torch.linalg.solve_triangular(factor, top, upper=False)
    solved = stacked - inside[..., :k].mH @ inside
    gg, seen = solved[..., :k], solved[..., k]
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).real.log().sum((1, 2))
    cost = log_det + statistics.energy - inside[..., k].abs().square().sum((1, 2))
    gradient = power * (gg.diagonal(dim1=-2, dim2=-1).real - seen.abs().square()).sum(1)
    information = gg.abs().square().sum(1) * power.unsqueeze(-1) * power.unsqueeze(-2)
    return cost.double(), gradient.double(), information.double()


def removal_cost(statistics: PowerStatistics, log_power: Tensor) -> Tensor:
    """Nll that each source's removal costs, the other powers as they are, float64 [B, k].

    With M_l = I + P^1/2 G_l^H G_l P^1/2 and t_l = M_l^-1 P^1/2 G_l^H y_l, by the update of an inverse of rank one:
    sum_l [ log (M_l^-1)_kk + |t_kl|^2 / (M_l^-1)_kk ].
    """
    root = (0.5 * log_power).exp().to(statistics.energy.dtype)[:, None, :, None]
    factor = cholesky(_plus_identity(statistics.gram * root * root.mT), _SIGNAL)
    share = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1).real
    symbols = torch.cholesky_solve(statistics.matched.unsqueeze(-1) * root, factor).squeeze(-1)
    return (share.log() + symbols.abs().square() / share).sum(1).double()


def least_squares_log_power(statistics: PowerStatistics) -> Tensor:
    """Log of mean_l |s_kl|^2 less its noise part, never under a tenth of the whole, float64 [B, k].

    s_l = (G_l^H G_l)^-1 G_l^H y_l are the least-squares symbols; their noise part is the diagonal of (G_l^H G_l)^-1.
    """
    factor = cholesky(statistics.gram, "Gram matrix of the sources", ridged=True)
    symbols = torch.cholesky_solve(statistics.matched.unsqueeze(-1), factor).squeeze(-1)
    whole = symbols.abs().square().mean(1)
    noise = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1).real.mean(1)
    return torch.maximum(whole - noise, 0.1 * whole).clamp(min=1e-30).log().clamp(*LOG_POWER_LIMITS).double()


_SIGNAL = "I + P^1/2 G^H G P^1/2"


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
