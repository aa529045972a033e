"""Inputs of the network: back-projections of the snapshots, their spectra on the grid, and spectra of the residual.

With H known in full, the compact sufficient forms of a scene are the back-projections

    z_l = diag(c_l)^* H^H W y_l            [L, N]

with W = I (matched) or W = (H H^H / h + I / snr)^-1 (whitened by the covariance that isotropic sources give the
snapshots; h is the mean eigenvalue of H H^H), and their spectra sum_l |a_g^H z_l|^2 on the grid. The product H c_l
alone is not enough, because it does not distinguish the elements. The matched spectrum, blurred by the line of sight,
adds nothing to the whitened one (measured: 14.14 against 14.15 nats a scene), so that only tokens contain it.

A *residual pass* takes the highest cell, projects its snapshots T_l a out of y_l (orthogonal matching pursuit, Pati,
Rezaiifar and Krishnaprasad, Asilomar 1993) and adds the spectrum of what is left. It shows weaker sources that the side
lobes of stronger ones cover; these lobes differ from scene to scene with H and the codes.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ris_hpo.estimators.channel import posterior_mean_channel, split_channel
from ris_hpo.physics.array import Cosines, Geometry
from ris_hpo.physics.grid import Grid, responses, spectrum
from ris_hpo.physics.scene import Scenes

_LOADINGS = (0.003, 5.0, 28)  # an estimate of 1 / snr averages over 28 values between these two
_CHANNEL_SHARE, _ERRORS = 0.5, (1e-3, 0.05)  # first guess of the channel's error: share of the noise, and limits
GAIN_EDGE = 0.01  # the gain is kept this far from 0 and 1 before its logit is taken
_SMALL = 1e-30


class Features(NamedTuple):
    """Input of the network; tensors only, so that the network part can be exported.

    Attributes:
        maps: float32 [B, (1 + passes) * num_rho, num_v, num_w], standardised log spectra (whitened, then after each
            residual pass); empty [B, 0] for the token front-end.
        relief: float32 [B, num_rho, num_v, num_w], the whitened log spectrum below its maximum (<= 0); empty likewise.
        tokens: float32 [B, L, 4N], real and imaginary parts of both back-projections, unit mean power per scene;
            empty [B, 0] for the spectral front-end.
        context: float32 [B, num_context]: log10 of the observed (or estimated) SNR and of L; for each spectrum its
            standard deviation and a quarter of its peak; for each residual pass the log of the energy it leaves over
            the energy before, and log(1 + energy left over energy of the first). Where the noise is not known also the
            log power of the channel's scattered part over its line of sight's, and last the logit of a first guess of
            the scattered part's gain.
    """

    maps: Tensor
    relief: Tensor
    tokens: Tensor
    context: Tensor


def num_context(passes: int | None, *, noise_known: bool) -> int:
    """Width of ``Features.context``: for the spectral front-end with so many passes, or (None) for the token one."""
    spectral = 0 if passes is None else 2 * (1 + passes) + 2 * passes
    return 2 + spectral + (0 if noise_known else 2)


def back_projection(channel: Tensor, codes: Tensor, y: Tensor) -> Tensor:
    """z_l = diag(c_l)^* H^H y_l, complex64 [B, L, N]; H [B, M, N], or [B, L, M, N] with one for each snapshot."""
    if channel.dim() == 4:
        return torch.einsum("blm,blmn->bln", y, channel.conj()) * codes.conj()
    return (y @ channel.conj()) * codes.conj()


def spectral_features(scenes: Scenes, grid: Grid, *, passes: int, noise_known: bool) -> Features:
    """Features of the spectral front-end; with ``noise_known`` False the noise power is not looked at."""
    scenes, _ = scenes.in_unit_levels()
    loading, context = _levels(scenes, noise_known)
    y, channel = whiten(scenes, loading)
    codes, geometry = scenes.ris_codes, scenes.geometry
    logs = [_log_spectrum(geometry, grid, back_projection(channel, codes, y))]
    residual, basis, energies = y, y.new_zeros(*y.shape, 0), [_energy(y)]
    cells = grid.cells(scenes.device)
    highest = logs[0].flatten(1).argmax(-1)
    for _ in range(passes):
        response = responses(geometry, Cosines(*(axis[highest] for axis in cells)))
        wave = codes * response.unsqueeze(1)
        # T_l a behind W^1/2, [B, L, M]
        column = wave @ channel.mT if channel.dim() == 3 else torch.einsum("blmn,bln->blm", channel, wave)
        column = column - (basis @ (basis.mH @ column.unsqueeze(-1))).squeeze(-1)
        column = column / column.abs().square().sum(-1, keepdim=True).clamp(min=_SMALL).sqrt()
        basis = torch.cat([basis, column.unsqueeze(-1)], -1)
        residual = residual - column * (column.conj() * residual).sum(-1, keepdim=True)
        energies.append(_energy(residual))
        logs.append(_log_spectrum(geometry, grid, back_projection(channel, codes, residual)))
        highest = logs[-1].flatten(1).argmax(-1)

    maps, levels = [], []
    for log in logs:
        spread = log.flatten(1).std(-1).clamp(min=1e-3)
        maps.append(log / spread[:, None, None, None])
        levels += [spread, maps[-1].flatten(1).amax(-1) / 4]
    for before, after in itertools.pairwise(energies):
        levels += [((after + _SMALL) / (before + _SMALL)).log(), (after / energies[0].clamp(min=_SMALL)).log1p()]
    relief = logs[0] - logs[0].flatten(1).amax(-1)[:, None, None, None]
    empty = scenes.y.new_zeros(len(scenes), 0, dtype=torch.float32)
    return Features(torch.cat(maps, 1), relief, empty, torch.stack([*context[:2], *levels, *context[2:]], -1).float())


def token_features(scenes: Scenes, *, noise_known: bool) -> Features:
    """Features of the token front-end: both back-projections of every snapshot, scaled to unit mean power."""
    scenes, _ = scenes.in_unit_levels()
    loading, context = _levels(scenes, noise_known)
    whitened_y, whitened_channel = whiten(scenes, loading)
    parts = []
    for channel, y in ((scenes.bs_ris_channel, scenes.y), (whitened_channel, whitened_y)):
        z = back_projection(channel, scenes.ris_codes, y)
        z = z / z.abs().square().mean((1, 2), keepdim=True).clamp(min=_SMALL).sqrt()
        parts += [z.real, z.imag]
    empty = scenes.y.new_zeros(len(scenes), 0, dtype=torch.float32)
    return Features(empty, empty, torch.cat(parts, -1), torch.stack(context, -1).float())


def estimated_loading(scenes: Scenes) -> Tensor:
    r"""1 / snr of every scene [B] from the snapshots alone, noise and channel error together.

    With isotropic sources y_l ~ CN(0, s (H H^H / h + c I)). In the eigenvectors of H H^H the likelihood of c, profiled
    over s, is -L M log sum_m q_m / (lambda_m + c) - L sum_m log(lambda_m + c) with q_m the mean power of y along the
    m-th; the result is the geometric posterior mean over a grid of c. Its logarithm is within 0.7 of the truth, and
    whitening by it serves a network as well as whitening by the truth (13.8 nats a scene both; a constant: 14.2-15.1).
    """
    gram, scale = _gram(scenes)
    values, vectors = torch.linalg.eigh(gram / scale[:, None, None])
    power = (scenes.y @ vectors.conj()).abs().square().mean(1)
    low, high, count = _LOADINGS
    loading = torch.logspace(math.log10(low), math.log10(high), count, device=power.device)
    spread = values.clamp(min=0).unsqueeze(-1) + loading
    snapshots, antennas = scenes.y.shape[1:]
    fit = (power.unsqueeze(-1) / spread).mean(1).clamp(min=_SMALL).log() * antennas + spread.log().sum(1)
    return (torch.softmax(-snapshots * fit, -1) @ loading.log()).exp()


def whiten(scenes: Scenes, loading: Tensor) -> tuple[Tensor, Tensor]:
    """Return L^-1 y as complex64 [B, L, M] and L^-1 H as [B, M, N], with L L^H = H H^H / h + loading I.

    h is the mean diagonal of H H^H, and ``loading`` [B] the inverse SNR.
    """
    channel = scenes.bs_ris_channel
    gram, scale = _gram(scenes)
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    # positive definite by its loading; the plain form would make a training step wait for the device
    loaded = loading.view(-1, *(1,) * (gram.dim() - 1)) * identity
    root, _ = torch.linalg.cholesky_ex(gram / scale[..., None, None] + loaded)
    if gram.dim() == 4:
        y = torch.linalg.solve_triangular(root, scenes.y.unsqueeze(-1), upper=False).squeeze(-1)
        return y, torch.linalg.solve_triangular(root, channel, upper=False)
    y = torch.linalg.solve_triangular(root, scenes.y.mT, upper=False).mT
    return y, torch.linalg.solve_triangular(root, channel, upper=False)


def _log_spectrum(geometry: Geometry, grid: Grid, z: Tensor) -> Tensor:
    power = spectrum(geometry, z, grid)
    return (power / power.mean((1, 2, 3), keepdim=True).clamp(min=_SMALL)).clamp(min=1e-4).log()


def noise_loading(scenes: Scenes, *, noise_known: bool) -> Tensor:
    """1 / snr of every scene [B], from the noise power, given or estimated."""
    if not noise_known:
        return estimated_loading(scenes)
    received = scenes.y.abs().square().mean((1, 2))
    return 1 / (received / scenes.noise_power.clamp(min=_SMALL) - 1).clamp(0.1, 1e4)


def _gram(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """H H^H [B, M, M] and its mean eigenvalue [B]; with an axis L more where the channel has it."""
    gram = scenes.bs_ris_channel @ scenes.bs_ris_channel.mH
    return gram, gram.diagonal(dim1=-2, dim2=-1).real.mean(-1).clamp(min=_SMALL)


def _levels(scenes: Scenes, noise_known: bool) -> tuple[Tensor, list[Tensor]]:
    """1 / snr of every scene [B], and the context that does not come from spectra.

    Where the noise is not known, the first guess of the scattered part's gain attributes half of it to the channel. The
    spectra are those of the channel as given: with the gain, even the true one, they detect no better.
    """
    loading = noise_loading(scenes, noise_known=noise_known)
    context = [-loading.log10(), torch.full_like(loading, scenes.y.shape[1]).log10()]
    if not noise_known:
        _, gain = posterior_mean_channel(scenes.bs_ris_channel, (_CHANNEL_SHARE * loading).clamp(*_ERRORS))
        direct, scattered = split_channel(scenes.bs_ris_channel)
        shares = (_energy(scattered) + _SMALL) / (_energy(direct) + _SMALL)
        context += [shares.log(), torch.logit(gain, eps=GAIN_EDGE)]
    return loading, context


def _energy(y: Tensor) -> Tensor:
    return y.abs().square().sum((1, 2))
