"""The reference estimator ``ml`` and the same machinery among given candidates.

Every order is fitted by orthogonal least squares over atoms with refinement after every step, then once more from the
order above by dropping what is missed least (which repairs most of greed's mistakes); orders are weighed by evidence;
the chosen one is refined in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError
from ris_hpo.estimators.counting import EvidenceSpec, order_scores, posterior_of_orders
from ris_hpo.estimators.likelihood import Fit, position_moments
from ris_hpo.estimators.observation import (
    Observation,
    box_steering,
    clipped,
    from_cosine_coordinates,
    grid_points,
    require_finite,
    to_cosine_coordinates,
)
from ris_hpo.estimators.search import (
    Atoms,
    SearchSpec,
    gains,
    null_nll,
    refined,
    removal_costs,
    search_orders,
    swept,
)
from ris_hpo.physics.array import Cosines
from ris_hpo.physics.grid import GridSpec
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources


class LikelihoodSpec(Spec):
    """Settings of ``ml`` and of the search among candidates."""

    grid: GridSpec = GridSpec()
    search: SearchSpec = SearchSpec()
    evidence: EvidenceSpec = EvidenceSpec()
    num_sources: tuple[int, int] = (0, 5)
    max_sources: int = Field(5, ge=1, le=8)
    range_estimate: Literal["mean", "mode"] = "mean"
    channel_error_db: float | None = Field(None, ge=-100, le=20)
    batch: int = Field(16, ge=1, le=4096)

    @model_validator(mode="after")
    def _check(self) -> LikelihoodSpec:
        low, high = self.num_sources
        if not 0 <= low <= high <= self.max_sources:
            raise ValueError(f"num_sources: {self.num_sources} must lie within 0..max_sources={self.max_sources}")
        return self


def deterministic_ml(
    scenes: Scenes, spec: LikelihoodSpec | None = None, num_sources: Tensor | int | None = None
) -> Sources:
    """Sources by maximum likelihood over the whole box, no start needed.

    Args:
        scenes: what was received.
        spec: settings.
        num_sources: the count where it is known, [B] or one for all; None to find it by evidence.

    Returns:
        Sources [B, max_sources], most significant first, with existence p(K >= slot | y) and position covariance.

    Raises:
        ConfigError: a count outside 0..max_sources.
        NumericalError: scenes that are not finite.
    """
    spec = spec or LikelihoodSpec()
    points, _ = grid_points(spec.grid, scenes.device)
    response = box_steering(scenes.geometry, points).to(torch.complex64)
    return _in_batches(scenes, spec, num_sources, None, lambda seen, _: Atoms.of(seen, points, response))


def ols(
    scenes: Scenes,
    candidates: Cosines,
    spec: LikelihoodSpec | None = None,
    *,
    num_sources: Tensor | int | None = None,
    log_prior: Tensor | None = None,
) -> Sources:
    """The same search among candidates [B, C] alone: proposals of a network or maxima of a spectrum.

    Args:
        scenes: what was received.
        candidates: cosine coordinates [B, C]; those outside the box are moved to its face.
        spec: settings.
        num_sources: the count where it is known.
        log_prior: [B, max_sources + 1] log p(k) added to the evidence with ``evidence.prior_weight``.

    Raises:
        ConfigError: a count outside 0..max_sources, or candidates of another batch size.
        NumericalError: scenes that are not finite.
    """
    spec = spec or LikelihoodSpec()
    if candidates.v.shape[0] != len(scenes):
        raise ConfigError(f"candidates for {candidates.v.shape[0]} scenes beside {len(scenes)} scenes")
    u = clipped(from_cosine_coordinates(candidates), spec.grid.region)
    return _in_batches(scenes, spec, num_sources, log_prior, lambda observation, rows: Atoms.of(observation, u[rows]))


def spectrum_maxima(scenes: Scenes, count: int, spec: LikelihoodSpec | None = None) -> Cosines:
    """The ``count`` highest local maxima of the plain whitened spectrum on the grid, cosine coordinates [B, count].

    The spectrum is the likelihood gain of a single source. Where it has fewer maxima the highest other points follow.
    """
    require_finite(scenes)
    spec = spec or LikelihoodSpec()
    points, valid = grid_points(spec.grid, scenes.device)
    response = box_steering(scenes.geometry, points).to(torch.complex64)
    count = min(count, len(points))
    chosen = []
    for start in range(0, len(scenes), spec.batch):
        part = scenes[start : start + spec.batch]
        observation = Observation.of(part, channel_error_db=spec.channel_error_db)
        spectrum = gains(observation, Atoms.of(observation, points, response), None, spec.search)
        chosen.append(local_maxima(spectrum, spec.grid, valid, count))
    return to_cosine_coordinates(points[torch.cat(chosen)])


def local_maxima(spectrum: Tensor, grid: GridSpec, valid: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the highest points no lower than their 26 neighbours, best first; then other points."""
    full = spectrum.new_full((len(spectrum), len(valid)), -torch.inf)
    full[:, valid] = spectrum
    volume = full.unflatten(-1, grid.shape).unsqueeze(1)
    highest = torch.nn.functional.max_pool3d(volume, 3, stride=1, padding=1)
    peak = (volume >= highest).flatten(1)[:, valid]
    span = (spectrum.amax(-1, keepdim=True) - spectrum.amin(-1, keepdim=True)).clamp(min=1e-6)
    result: Tensor = (spectrum + peak * 2 * span).topk(count, dim=-1).indices
    return result


def _in_batches(
    scenes: Scenes,
    spec: LikelihoodSpec,
    num_sources: Tensor | int | None,
    log_prior: Tensor | None,
    atoms_of: Callable[[Observation, slice], Atoms],
) -> Sources:
    count = None if num_sources is None else _checked_count(scenes, spec, num_sources)
    require_finite(scenes)
    parts = []
    for start in range(0, len(scenes), spec.batch):
        rows = slice(start, start + spec.batch)
        observation = Observation.of(scenes[rows], channel_error_db=spec.channel_error_db)
        given = None if count is None else count[rows]
        prior = None if log_prior is None else log_prior[rows]
        parts.append(_estimated(observation, atoms_of(observation, rows), spec, given, prior))
    return Sources.cat(parts)


def _checked_count(scenes: Scenes, spec: LikelihoodSpec, num_sources: Tensor | int) -> Tensor:
    count = torch.as_tensor(num_sources, device=scenes.device).expand(len(scenes))
    if bool(((count < 0) | (count > spec.max_sources)).any()):
        raise ConfigError(f"num_sources must lie within 0..{spec.max_sources}")
    return count


def _estimated(
    observation: Observation, atoms: Atoms, spec: LikelihoodSpec, count: Tensor | None, log_prior: Tensor | None
) -> Sources:
    """One batch: all orders, their evidence, the chosen order refined."""
    highest = spec.max_sources if count is None else max(int(count.max()), 1)
    orders = search_orders(observation, atoms, highest + spec.search.extra_order, spec.grid.region, spec.search)
    orders = orders[:highest]
    if spec.search.sweeps:
        strongest = gains(observation, atoms, None, spec.search)
        few = atoms.chosen(strongest.topk(min(spec.search.sweep_atoms, strongest.shape[-1]), dim=-1).indices)
        for _ in range(spec.search.sweeps):
            orders = [
                swept(observation, few, fit, spec.grid.region, spec.search, spec.search.greedy_steps) for fit in orders
            ]
    if count is None:
        scores = order_scores(observation, null_nll(observation), orders, spec.grid.region, spec.evidence)
        log_posterior = posterior_of_orders(scores, spec.evidence, log_prior, spec.num_sources)
        count = log_posterior.argmax(-1)
        at_least = log_posterior.exp().flip(-1).cumsum(-1).flip(-1).clamp(0, 1)
    else:
        at_least = (torch.arange(highest + 1, device=count.device) <= count.unsqueeze(-1)).double()
    return _chosen(observation, orders, count, at_least, spec)


def _chosen(
    observation: Observation, orders: list[Fit], count: Tensor, at_least: Tensor, spec: LikelihoodSpec
) -> Sources:
    """The chosen order of every scene, refined in float64, with moments; sources by falling significance."""
    batch, width, device = len(observation), spec.max_sources, count.device
    mask = torch.arange(width, device=device) < count.unsqueeze(-1)
    polar = torch.zeros(batch, width, 3, dtype=torch.float64, device=device)
    polar[..., 2] = 1
    power = torch.zeros(batch, width, dtype=torch.float64, device=device)
    covariance = torch.zeros(batch, width, 3, 3, dtype=torch.float64, device=device)
    existence = torch.zeros(batch, width, dtype=torch.float64, device=device)
    for k in sorted(set(count.tolist()) - {0}):
        rows = torch.nonzero(count == k).squeeze(-1)
        part = observation[rows].double()
        fit = Fit(*(value[rows] for value in orders[k - 1]))
        fit = refined(part, fit.u, fit.log_power, spec.grid.region, spec.search, spec.search.final_steps, 1e-5)
        order = removal_costs(part, fit).argsort(dim=-1, descending=True)
        moments = position_moments(part, fit, spec.grid.region, mean=spec.range_estimate == "mean")
        where = (rows.unsqueeze(-1), torch.arange(k, device=device))
        polar[where] = moments[0].gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
        covariance[where] = moments[1].gather(1, order[..., None, None].expand(-1, -1, 3, 3))
        power[where] = (fit.log_power.exp() * part.noise_power.unsqueeze(-1)).gather(1, order)
        existence[where] = at_least[rows, 1 : k + 1]
    azimuth, elevation, range_m = (value.float() for value in polar.unbind(-1))
    return Sources(azimuth, elevation, range_m, power.float(), mask, existence.float(), covariance.float())
