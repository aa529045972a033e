r"""Cramer-Rao bounds of the source positions, deterministic and stochastic.

With T_l = H diag(c_l) (the true channel; likewise the true noise power), g_k,l = T_l a_k, d_ki,l = T_l da_k / dtheta_i
and theta = (az, el, r):

*Deterministic*: the symbols are unknown constants. Eliminating them (Stoica and Nehorai, "MUSIC, maximum likelihood,
and Cramer-Rao bound", IEEE Trans. ASSP 37(5), 1989) leaves, for a manifold that changes with every snapshot,

    F_(ki)(k'i') = (2 / sigma^2) sum_l Re[ (d_ki,l s_k,l)^H P_perp(G_l) (d_k'i',l s_k',l) ].

*Stochastic*: y_l ~ CN(0, R_l), R_l = sum_k p_k g_k,l g_k,l^H + sigma^2 I with uncorrelated sources of unknown power and
unknown noise power; F_ab = sum_l tr(R_l^-1 dR_l/da R_l^-1 dR_l/db) (Slepian-Bangs).

A coordinate that is known beforehand (``Sources.given``) is no parameter: its rows and columns are zero.

Information that is missing altogether (two equal sources, a source without power, range under a planar wave) gives a
very large finite variance, never NaN: the information matrix is scaled to a unit diagonal and repaired as
:func:`ris_hpo.physics.cholesky.cholesky` says. With K >= M the symbols take up everything and the deterministic bound
is of that kind too.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ris_hpo.errors import NumericalError
from ris_hpo.physics.array import position_jacobian, steering_jacobian
from ris_hpo.physics.cholesky import cholesky, inverse_information
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

_CHUNK = 64


class SourceBounds(NamedTuple):
    """Least standard deviations of an unbiased estimate of every source, float64 [B, K]; NaN beyond the mask.

    Attributes:
        azimuth: rad; 0 where it is known beforehand, likewise the next two.
        elevation: rad.
        range_m: m.
        position_m: root of the trace of the position's covariance.
    """

    azimuth: Tensor
    elevation: Tensor
    range_m: Tensor
    position_m: Tensor


def source_bounds(scenes: Scenes, kind: Literal["deterministic", "stochastic"] = "deterministic") -> SourceBounds:
    """Cramer-Rao bounds per source.

    Args:
        scenes: with truth.
        kind: ``deterministic``: the symbols that were sent are unknown constants; ``stochastic``: they are random, and
            their powers and the noise power unknown.

    Raises:
        ConfigError: the scenes carry no truth.
        NumericalError: a position, power or noise power that is not finite, or a noise power that is not positive.
    """
    truth = scenes.require_truth()
    covariance = (deterministic_crb if kind == "deterministic" else stochastic_crb)(scenes)
    place = position_covariance(truth, covariance).diagonal(dim1=-2, dim2=-1).sum(-1)
    variances = (*covariance.diagonal(dim1=-2, dim2=-1).unbind(-1), place)
    return SourceBounds(*(each.clamp(min=0).sqrt().masked_fill(~truth.mask, torch.nan) for each in variances))


def deterministic_crb(scenes: Scenes) -> Tensor:
    """Marginal bound of every source.

    Args:
        scenes: with truth. Symbols are those sent, or, where unknown, their least-squares estimate at the truth.

    Returns:
        float64 [B, K, 3, 3] covariance of (azimuth, elevation, range) in (rad, rad, m); zero beyond the mask.

    Raises:
        ConfigError: the scenes carry no truth.
        NumericalError: a position, power or noise power that is not finite, or a noise power that is not positive.
    """
    return source_blocks(deterministic_covariance(scenes))


def stochastic_crb(scenes: Scenes) -> Tensor:
    """Marginal bound of every source under random symbols, powers and noise power unknown.

    Args:
        scenes: with truth; ``truth.power`` holds the powers.

    Returns:
        float64 [B, K, 3, 3] covariance of (azimuth, elevation, range) in (rad, rad, m); zero beyond the mask.

    Raises:
        ConfigError: the scenes carry no truth.
        NumericalError: a position, power or noise power that is not finite, or a noise power that is not positive.
    """
    return source_blocks(stochastic_covariance(scenes))


def deterministic_covariance(scenes: Scenes) -> Tensor:
    """The whole deterministic bound, float64 [B, 3K, 3K], source-major; rows and columns beyond the mask are zero."""
    unknown = unknown_coordinates(scenes.require_truth())
    return masked_inverse(deterministic_information(scenes), unknown, "deterministic information")


def stochastic_covariance(scenes: Scenes) -> Tensor:
    """Stochastic Cramer-Rao bound of the positions, powers and noise power unknown, float64 [B, 3K, 3K].

    Rows and columns are (azimuth in rad, elevation in rad, range in m) of source 1, of source 2, and so on; those of
    absent sources are zero.

    Raises:
        ConfigError: the scenes have no complete truth.
        NumericalError: the information is not finite.
    """
    mask = scenes.require_truth().mask
    always = torch.ones_like(mask[:, :1])
    unknown = torch.cat([unknown_coordinates(scenes.require_truth()), mask, always], dim=-1)
    width = 3 * mask.shape[-1]
    return masked_inverse(stochastic_information(scenes), unknown, "stochastic information")[:, :width, :width]


def unknown_coordinates(truth: Sources) -> Tensor:
    """Which of (az, el, r) of every source are to be estimated, bool [B, 3K], source-major."""
    mask = truth.mask.unsqueeze(-1).expand(-1, -1, 3)
    return (mask if truth.given is None else mask & ~truth.given.unsqueeze(1)).flatten(1)


def source_blocks(covariance: Tensor) -> Tensor:
    """[B, 3K, 3K] to the K diagonal blocks [B, K, 3, 3]."""
    width = covariance.shape[-1] // 3
    blocks = covariance.unflatten(-1, (width, 3)).unflatten(-3, (width, 3))
    return torch.diagonal(blocks, dim1=-4, dim2=-2).movedim(-1, -3)


def position_covariance(sources: Sources, covariance: Tensor) -> Tensor:
    """[B, K, 3, 3] covariance of (az, el, r) to that of (x, y, z) in m^2."""
    angles = (sources.azimuth, sources.elevation, sources.range_m)
    jacobian = position_jacobian(*(value.to(covariance.dtype) for value in angles))
    return jacobian @ covariance @ jacobian.mT


def deterministic_information(scenes: Scenes) -> Tensor:
    """F of the positions, symbols eliminated, float64 [B, 3K, 3K], source-major; zero beyond the mask."""
    return torch.cat([_deterministic_information(scenes[i : i + _CHUNK]) for i in range(0, len(scenes), _CHUNK)])


def stochastic_information(scenes: Scenes) -> Tensor:
    """F of (positions, powers, noise power), float64 [B, 4K + 1, 4K + 1]; zero beyond the mask."""
    return torch.cat([_stochastic_information(scenes[i : i + _CHUNK]) for i in range(0, len(scenes), _CHUNK)])


def masked_inverse(information: Tensor, mask: Tensor, name: str) -> Tensor:
    """Inverse of the masked part of an information matrix, zero elsewhere.

    Args:
        information: [B, P, P], symmetric.
        mask: [B, P] bool, parameters that exist.
        name: what it is, for the log and the error.

    Raises:
        NumericalError: an entry is not finite, or the matrix is indefinite.
    """
    keep = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).to(information.dtype)
    alone = torch.diag_embed((~mask).to(information.dtype))
    covariance: Tensor = inverse_information(information * keep + alone, name)[0] * keep
    return covariance


def _received(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """G [B, L, M, K], D [B, L, M, 3K] in complex128, zero beyond the mask, and the noise power [B]."""
    truth = scenes.require_truth()
    angles = (truth.azimuth.double(), truth.elevation.double(), truth.range_m.double())
    a, da = steering_jacobian(scenes.geometry, *angles)
    present = truth.mask.to(a.dtype)
    atoms = torch.cat([a * present[..., None], (da * present[..., None, None]).flatten(1, 2)], dim=1)
    channel = scenes.bs_ris_channel if scenes.true_channel is None else scenes.true_channel
    sensing = dataclasses.replace(scenes, bs_ris_channel=channel).sensing_matrices().to(a.dtype)
    seen = torch.bmm(sensing.flatten(1, 2), atoms.mT).unflatten(1, sensing.shape[1:3])
    k = truth.max_sources
    noise = (scenes.noise_power if scenes.true_noise_power is None else scenes.true_noise_power).double()
    if not bool((noise > 0).all()):
        raise NumericalError("the bound of scenes without noise is zero: every noise power must be positive")
    return seen[..., :k], seen[..., k:], noise


def _signal_basis(g: Tensor, mask: Tensor) -> Tensor:
    """Orthonormal basis Q [B, L, M, min(M, K)] of the columns of G that exist, zero columns for the others.

    Householder QR keeps I - Q Q^H a projector to rounding even where columns coincide, which a Gram matrix does not.
    """
    order = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True)
    packed = g.gather(-1, order[:, None, None, :].expand(g.shape))
    basis = torch.linalg.qr(packed).Q
    column = torch.arange(basis.shape[-1], device=g.device)
    present = (column < mask.sum(-1, keepdim=True)).to(g.dtype)
    result: Tensor = basis * present[:, None, None, :]
    return result


def _deterministic_information(scenes: Scenes) -> Tensor:
    truth = scenes.require_truth()
    g, d, noise = _received(scenes)
    basis = _signal_basis(g, truth.mask)
    if scenes.symbols is not None:
        symbols = scenes.symbols.to(g.dtype)
    else:
        gram = g.mH @ g
        level = gram.diagonal(dim1=-2, dim2=-1).real.amax((-1, -2))[:, None, None]
        ridge = torch.where(truth.mask.unsqueeze(1), 1e-12 * level, level).clamp(min=1e-300)
        factor = cholesky(gram + torch.diag_embed(ridge.expand(gram.shape[:-1])), "Gram matrix of the sources")
        symbols = torch.cholesky_solve(g.mH @ scenes.y.to(g.dtype).unsqueeze(-1), factor).squeeze(-1)
    weighted = d * symbols.repeat_interleave(3, dim=-1).unsqueeze(2)
    outside = (weighted - basis @ (basis.mH @ weighted)).flatten(1, 2)
    information: Tensor = (outside.mH @ outside).real * 2 / noise[:, None, None]
    return information


def _stochastic_information(scenes: Scenes) -> Tensor:
    truth = scenes.require_truth()
    g, d, noise = _received(scenes)
    k = truth.max_sources
    power = truth.power.double() * truth.mask
    seen = torch.cat([g, d], dim=-1)
    eye = torch.eye(g.shape[2], dtype=g.dtype, device=g.device)
    covariance = (g * power[:, None, None]) @ g.mH + noise[:, None, None, None] * eye
    factor = cholesky(covariance, "covariance of the snapshots")
    solved = torch.cholesky_solve(seen, factor)
    inverse = torch.cholesky_inverse(factor)
    one = seen.mH @ solved  # W^H R^-1 W
    two = solved.mH @ solved  # W^H R^-2 W
    gg, gd, dd = one[..., :k, :k], one[..., :k, k:], one[..., k:, k:]
    owner = torch.arange(3 * k, device=g.device) // 3
    p = power[:, owner]
    gd_all = gd[..., owner, :]  # g_k(a)^H R^-1 d_b
    # tr(R^-1 dR_a R^-1 dR_b) with dR_a = p_a (d_a g_a^H + g_a d_a^H), written with the inner products above
    cross = gd_all * gd_all.mT + gg[..., owner, :][..., owner] * dd.mT
    positions = 2 * cross.real.sum(1) * p[:, :, None] * p[:, None, :]
    mixed = 2 * (gd.mT * gg[..., owner, :]).real.sum(1) * p[:, :, None]
    powers = gg.abs().square().sum(1)
    two_gd = torch.diagonal(two[..., owner, k:], dim1=-2, dim2=-1)
    positions_noise = 2 * two_gd.real.sum(1) * p
    powers_noise = torch.diagonal(two[..., :k, :k], dim1=-2, dim2=-1).real.sum(1)
    noise_noise = inverse.abs().square().sum((1, 2, 3))
    top = torch.cat([positions, mixed, positions_noise.unsqueeze(-1)], dim=-1)
    middle = torch.cat([mixed.mT, powers, powers_noise.unsqueeze(-1)], dim=-1)
    last = torch.cat([positions_noise, powers_noise, noise_noise.unsqueeze(-1)], dim=-1).unsqueeze(-2)
    return torch.cat([top, middle, last], dim=-2)
