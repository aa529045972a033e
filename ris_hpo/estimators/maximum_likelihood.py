"""The reference estimator ``ml`` and the same machinery among given candidates.

Every order is fitted by orthogonal least squares over atoms with refinement after every step, then once more from the
order above by dropping what is missed least (which repairs most of greed's mistakes); orders are weighed by evidence;
the chosen one is refined in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ris_hpo.estimators.answer import answer
from ris_hpo.estimators.box import GridPoints, box_steering, clipped, from_cosine_coordinates, to_cosine_coordinates
from ris_hpo.estimators.counting import CountWeights, chosen_order, order_scores, posterior_of_orders
from ris_hpo.estimators.fit import Fit
from ris_hpo.estimators.observation import Observation, known_count, require_candidates, require_finite
from ris_hpo.estimators.search import (
    Atoms,
    gains,
    search_orders,
    swept,
)
from ris_hpo.estimators.spec import LikelihoodSpec
from ris_hpo.physics.array import Cosines
from ris_hpo.physics.cholesky import cholesky
from ris_hpo.physics.grid import spectrum
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

_SEEN_BYTES = 1 << 26
"""Of all cells as the receiver sees them, a scene: beyond that the search looks at maxima of spectra alone."""
_BATCH_BYTES = 1 << 29
_MAXIMA = 256  # of the spectrum of what each order leaves


def deterministic_ml(
    scenes: Scenes, spec: LikelihoodSpec | None = None, num_sources: Tensor | int | None = None
) -> Sources:
    """Sources by maximum likelihood over the whole box, no start needed.

    Every order adds the best cell of the grid. Where all cells as the receiver sees them, [L, M, G], take over 64 MiB a
    scene, it adds the best of the 256 highest maxima of the whitened spectrum of what the order below leaves.

    Args:
        scenes: what was received.
        spec: settings.
        num_sources: the count where it is known, [B] or one for all; None to find it by evidence.

    Returns:
        Sources [B, max_sources], most significant first, with existence p(K >= slot | y) and position covariance.

    Raises:
        ConfigError: no scene, or a count outside 0..max_sources.
        NumericalError: scenes that are not finite.
    """
    spec = spec or LikelihoodSpec()
    points = GridPoints.of(spec.grid.on(scenes.geometry), scenes.device)
    if _is_large(scenes, len(points)):
        require_finite(scenes)

        def maxima(seen: Observation, _: Tensor) -> Atoms:
            return residual_maxima(seen, None, spec, _MAXIMA)

        return _in_batches(scenes, spec, num_sources, None, None, maxima, _MAXIMA, anew=True)
    response = box_steering(scenes.geometry, points.u).to(torch.complex64)

    def all_cells(seen: Observation, _: Tensor) -> Atoms:
        return Atoms.of(seen, points.u, response)

    return _in_batches(scenes, spec, num_sources, None, None, all_cells, len(points))


def ols(
    scenes: Scenes,
    candidates: Cosines,
    spec: LikelihoodSpec | None = None,
    *,
    num_sources: Tensor | int | None = None,
    log_prior: Tensor | None = None,
    weights: CountWeights | None = None,
    noise_known: bool = True,
) -> Sources:
    """The same search among candidates [B, C] alone: proposals of a network or maxima of a spectrum.

    Args:
        scenes: what was received.
        candidates: cosine coordinates [B, C]; those outside the box are moved to its face.
        spec: settings.
        num_sources: the count where it is known.
        log_prior: [B, max_sources + 1] log p(k) added to the evidence with ``evidence.prior_weight``.
        weights: learned weights of every scene in place of the settings' own.
        noise_known: False where the noise power is an estimate; without a source it is then the received power.

    Raises:
        ConfigError: no scene, a count outside 0..max_sources, or candidates of another batch size.
        NumericalError: scenes or candidates that are not finite.
    """
    spec = spec or LikelihoodSpec()
    require_candidates(scenes, *candidates)
    u = clipped(from_cosine_coordinates(candidates), spec.grid.region)

    def atoms_of(observation: Observation, rows: Tensor) -> Atoms:
        return Atoms.of(observation, u[rows])

    count = u.shape[1]
    return _in_batches(scenes, spec, num_sources, log_prior, weights, atoms_of, count, noise_known=noise_known)


def spectrum_maxima(scenes: Scenes, count: int, spec: LikelihoodSpec | None = None) -> Cosines:
    """The ``count`` highest local maxima of the plain whitened spectrum on the grid, cosine coordinates [B, count].

    The spectrum is the likelihood gain of a single source, or, where that takes too much memory, of back-projections.
    Where it has fewer maxima the highest other points follow.

    Raises:
        ConfigError: no scene.
        NumericalError: scenes that are not finite.
    """
    require_finite(scenes)
    spec = spec or LikelihoodSpec()
    points = GridPoints.of(spec.grid.on(scenes.geometry), scenes.device)
    large = _is_large(scenes, len(points))
    response = None if large else box_steering(scenes.geometry, points.u).to(torch.complex64)
    count = min(count, len(points))
    chosen = []
    for start in range(0, len(scenes), _batch(scenes, spec, count if large else len(points))):
        part = scenes[start : start + _batch(scenes, spec, count if large else len(points))]
        observation = Observation.of(part, channel_error_db=spec.channel_error_db)
        if large:
            chosen.append(residual_maxima(observation, None, spec, count).u)
        else:
            power = gains(observation, Atoms.of(observation, points.u, response), None, spec.search)
            chosen.append(points.u[points.maxima(power, count)])
    return to_cosine_coordinates(torch.cat(chosen))


def residual_maxima(observation: Observation, fit: Fit | None, spec: LikelihoodSpec, count: int) -> Atoms:
    """Atoms at the ``count`` highest local maxima of the whitened spectrum of what a fit leaves, P_perp(G_l) y_l.

    One product with the dictionary instead of one with every atom's snapshots: cheap enough for a second look.
    """
    snapshots, antennas = observation.y.shape[1:]
    y = observation.y.unsqueeze(-1).to(observation.sensing.dtype)
    residual = y
    if fit is not None:
        g = observation.see(box_steering(observation.geometry, fit.u))
        factor = cholesky(g.mH @ g, "Gram matrix of the sources", ridged=True)
        basis = torch.linalg.solve_triangular(factor, g.mH, upper=False)
        residual = y - basis.mH @ (basis @ y)
    rows = observation.sensing.unflatten(1, (snapshots, antennas))
    gram = rows[:, 0] @ rows[:, 0].mH  # H H^H, since codes have unit modulus
    level = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1).clamp(min=1e-30)
    excess = (observation.y.abs().square().mean((1, 2)) - 1).clamp(min=0.1).to(level.dtype)
    eye = torch.eye(antennas, dtype=gram.dtype, device=gram.device)
    factor = cholesky(gram + (level / excess)[:, None, None] * eye, "H H^H + I / snr")
    white = torch.cholesky_solve(residual.squeeze(-1).mT, factor).mT
    z = (rows.mH @ white.unsqueeze(-1)).squeeze(-1)
    grid = spec.grid.on(observation.geometry)
    points = GridPoints.of(grid, z.device)
    power = spectrum(observation.geometry, z.to(torch.complex64), grid).flatten(1)[:, points.valid]
    chosen = points.maxima(power, min(count, len(points)))
    return Atoms.of(observation, points.u[chosen])


def order_evidence(
    scenes: Scenes, candidates: Cosines, spec: LikelihoodSpec, log_prior: Tensor | None = None
) -> Tensor:
    """What :func:`ols` weighs: negative log-evidence of 0..max_sources sources, float64 [B, max_sources + 1].

    Orders that ``log_prior`` makes implausible are not tried and have infinity.

    Raises:
        ConfigError: no scene, or candidates of another batch size.
        NumericalError: scenes or candidates that are not finite.
    """
    require_finite(scenes)
    require_candidates(scenes, *candidates)
    u = clipped(from_cosine_coordinates(candidates), spec.grid.region)
    needed = _orders_needed(scenes, spec, None, log_prior)
    result = torch.full((len(scenes), spec.max_sources + 1), torch.inf, dtype=torch.float64, device=scenes.device)
    for rows, few, most in _alike(*needed, spec, _batch(scenes, spec, u.shape[1])):
        observation = _observed(scenes[rows], spec)
        orders = _all_orders(observation, Atoms.of(observation, u[rows]), spec, (few, most))
        allowed = _allowed(needed[0][rows], needed[1][rows], spec)[:, : most + 1]
        scores, _ = order_scores(observation, orders, spec.grid.region, spec.evidence, lowest=few)
        result[rows, : most + 1] = scores.masked_fill(~allowed, torch.inf)
    return result


def _in_batches(
    scenes: Scenes,
    spec: LikelihoodSpec,
    num_sources: Tensor | int | None,
    log_prior: Tensor | None,
    weights: CountWeights | None,
    atoms_of: Callable[[Observation, Tensor], Atoms],
    num_atoms: int,
    *,
    noise_known: bool = True,
    anew: bool = False,
) -> Sources:
    """Estimate in batches; what is found for a scene does not depend on the others of its batch.

    With ``anew`` each order looks for atoms again, in what the one below leaves.
    """
    require_finite(scenes)
    count = None if num_sources is None else known_count(scenes, num_sources, spec.max_sources)
    lowest, highest = _orders_needed(scenes, spec, count, log_prior)
    order, parts = [], []
    for rows, few, most in _alike(lowest, highest, spec, _batch(scenes, spec, num_atoms)):
        observation = _observed(scenes[rows], spec)
        atoms = atoms_of(observation, rows)
        orders = _all_orders(observation, atoms, spec, (few, most), anew=anew)
        if count is None:
            scores, chances = order_scores(
                observation, orders, spec.grid.region, spec.evidence, lowest=few, noise_known=noise_known
            )
            allowed = _allowed(lowest[rows], highest[rows], spec)[:, : most + 1]
            prior = None if log_prior is None else log_prior[rows]
            mixing = None if weights is None else CountWeights(*(value[rows] for value in weights))
            log_posterior = posterior_of_orders(scores, spec.evidence, prior, allowed, mixing)
            chosen = chosen_order(log_posterior, chances, spec.evidence)
            at_least = log_posterior.exp().flip(-1).cumsum(-1).flip(-1).clamp(0, 1)
        else:
            chosen = count[rows]
            at_least = (torch.arange(most + 1, device=chosen.device) <= chosen.unsqueeze(-1)).double()
        known = {"count_known": count is not None, "noise_known": noise_known}
        parts.append(answer(observation, atoms, orders, chosen, at_least, spec, **known))
        order.append(rows)
    return Sources.cat(parts)[torch.argsort(torch.cat(order))]


def _observed(scenes: Scenes, spec: LikelihoodSpec) -> Observation:
    algebra = torch.complex64 if spec.single else torch.complex128
    return Observation.of(scenes, channel_error_db=spec.channel_error_db, algebra=algebra)


def _is_large(scenes: Scenes, cells: int) -> bool:
    """Whether all cells as the receiver sees them take more memory than a search should."""
    return 8 * scenes.y.shape[1] * scenes.y.shape[2] * cells > _SEEN_BYTES


def _batch(scenes: Scenes, spec: LikelihoodSpec, num_atoms: int) -> int:
    """Scenes at once: ``spec.batch``, or as many as memory allows for atoms and sensing matrices."""
    size = scenes.y[0].numel() * (8 * num_atoms + 24 * scenes.geometry.num_elements)
    return max(1, min(spec.batch, _BATCH_BYTES // size))


def _alike(lowest: Tensor, highest: Tensor, spec: LikelihoodSpec, batch: int) -> Iterator[tuple[Tensor, int, int]]:
    """Rows of scenes that need the same orders, so that none is fitted in vain, and the lowest and highest of these."""
    if spec.search.every_order:
        lowest = torch.ones_like(lowest)
    for least, most in torch.stack([lowest, highest], -1).unique(dim=0).tolist():
        for rows in torch.nonzero((lowest == least) & (highest == most)).squeeze(-1).split(batch):
            yield rows, least, most


def _allowed(lowest: Tensor, highest: Tensor, spec: LikelihoodSpec) -> Tensor:
    """Counts that can be the answer, bool [B, max_sources + 1]: the orders needed, and 0 if the settings allow it."""
    order = torch.arange(spec.max_sources + 1, device=lowest.device)
    allowed = (order >= lowest.unsqueeze(-1)) & (order <= highest.clamp(max=spec.num_sources[1]).unsqueeze(-1))
    return allowed | ((order == 0) & (spec.num_sources[0] == 0))


def _orders_needed(
    scenes: Scenes, spec: LikelihoodSpec, count: Tensor | None, log_prior: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Lowest and highest order of every scene [B] that can be the answer; at least one source is always tried."""
    if count is not None:
        return count.clamp(min=1), count.clamp(min=1)
    least, most = max(spec.num_sources[0], 1), max(spec.num_sources[1], 1)
    order = torch.arange(least, most + 1, device=scenes.device)
    plausible = torch.ones(len(scenes), len(order), dtype=torch.bool, device=scenes.device)
    if log_prior is not None:
        plausible = log_prior[:, least : most + 1] >= math.log(spec.evidence.least_prior)
    lowest = torch.where(plausible, order, most).amin(-1)
    return lowest, torch.where(plausible, order, least).amax(-1).maximum(lowest)


def _all_orders(
    observation: Observation, atoms: Atoms, spec: LikelihoodSpec, needed: tuple[int, int], *, anew: bool = False
) -> list[Fit]:
    """Fits of orders 1..highest (index 0 is order 1); ``needed``: the lowest and highest that can be the answer."""
    region, highest = spec.grid.region, needed[1]
    count = max(spec.search.residual_maxima, _MAXIMA if anew else 0)
    look_again = None if count == 0 else lambda fit: residual_maxima(observation, fit, spec, count)
    first = 2 if anew else highest + 1
    orders = search_orders(observation, atoms, needed, region, spec.search, look_again, first)[:highest]
    if spec.search.sweeps:
        strongest = gains(observation, atoms, None, spec.search)
        few = atoms.chosen(strongest.topk(min(spec.search.sweep_atoms, strongest.shape[-1]), dim=-1).indices)
        for _ in range(spec.search.sweeps):
            orders = [swept(observation, few, fit, region, spec.search, spec.search.greedy_steps) for fit in orders]
    return orders
