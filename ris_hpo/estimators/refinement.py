"""What can be said of sources that are given: their refinement on the snapshots, and their likelihood."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ris_hpo.estimators.box import to_box_coordinates
from ris_hpo.estimators.cost import least_squares_log_power, power_statistics
from ris_hpo.estimators.fit import deterministic_fit, fitted_powers, stochastic_fit
from ris_hpo.estimators.goodness import BEYOND_BORDER, residual_power, residual_range
from ris_hpo.estimators.moments import position_moments
from ris_hpo.estimators.observation import Observation, as_sources, require_candidates
from ris_hpo.physics.grid import Region
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

_CHUNK = 32


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
        Sources [B, K] with the mask and existence of ``init``, and powers from the stochastic likelihood.

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
                blocks[where] = position_moments(observation, fit, region).covariance.float()
    return Sources(result.azimuth, result.elevation, result.range_m, result.power, init.mask, init.existence, blocks)


def with_goodness_of_fit(
    scenes: Scenes,
    sources: Sources,
    *,
    region: Region | None = None,
    steps: int = 5,
    channel_error_db: float | None = None,
    noise_known: bool = True,
) -> Sources:
    """Given sources (a truth, say) with what they leave of the snapshots, see :mod:`ris_hpo.estimators.goodness`.

    Args:
        scenes: what was received.
        sources: positions; the mask says how many sources each scene has.
        region: allowed positions (default: those of the default scenes).
        steps: Levenberg-Marquardt steps that the positions may take first, so that rounded coordinates do not count.
        channel_error_db: stated error of the known channel.
        noise_known: False where the noise power is an estimate, which widens the range of the residual.

    Returns:
        The same sources with ``residual``, ``residual_range`` and ``on_border``.

    Raises:
        ConfigError: sources of another batch size.
        NumericalError: scenes or sources that are not finite.
    """
    require_candidates(scenes, sources.azimuth, sources.elevation, sources.range_m)
    region = region or Region()
    batch, width = sources.mask.shape
    on_border = torch.zeros_like(sources.mask)
    residual = torch.ones(batch, dtype=torch.float64, device=scenes.device)
    expected = torch.zeros(batch, 2, dtype=torch.float64, device=scenes.device)
    snapshots, antennas = scenes.y.shape[1:]
    count = sources.num_sources
    for k in sorted(set(count.tolist())):
        expected[count == k] = expected.new_tensor(
            residual_range(snapshots, antennas, k, width, noise_known=noise_known)
        )
        for part in torch.nonzero(count == k).squeeze(-1).split(_CHUNK):
            observation = Observation.of(scenes[part], channel_error_db=channel_error_db)
            slots = torch.argsort(sources.mask[part].to(torch.int8), dim=-1, descending=True, stable=True)[:, :k]
            given = sources[part].take(slots)
            u = to_box_coordinates(given.azimuth, given.elevation, given.range_m)
            if k:
                u = deterministic_fit(observation, u, region, steps)
                fit = stochastic_fit(observation, u, None, region, 0, positions=False)
                beyond = position_moments(observation, fit, region).beyond
                on_border[part.unsqueeze(-1), slots] = beyond > BEYOND_BORDER
            residual[part] = residual_power(observation, u)
    return dataclasses.replace(sources, on_border=on_border, residual=residual.float(), residual_range=expected.float())


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
            nll[part] = fitted_powers(statistics, least_squares_log_power(statistics), 25, 1e-6)[1]
    return nll
