"""From the fits of all orders to the sources that are reported.

The chosen order is refined to the end in double precision. No two sources of an answer coincide: where two fitted
responses are nearly one, the order has split one source in two, and the answer is the order below; likewise where they
are much alike and one of them lies on the border, since a source outside the region is often split so. Where the count
is known, the second of them is put where it raises the likelihood most apart from the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ris_hpo.estimators.box import COINCIDING, box_steering, coinciding, correlations, to_box_coordinates
from ris_hpo.estimators.fit import Fit, joint_fit, stochastic_fit
from ris_hpo.estimators.goodness import BEYOND_BORDER, residual_power, residual_range
from ris_hpo.estimators.moments import Moments, position_moments
from ris_hpo.estimators.observation import Observation
from ris_hpo.estimators.search import Atoms, gains, refined, removal_costs, without
from ris_hpo.estimators.spec import LikelihoodSpec
from ris_hpo.physics.sources import Sources

_BESIDE_BORDER = 0.9  # correlation of a source with one on the border above which the two are taken for one outside
_APART = 0.9  # correlation with the others below which a source is put that would coincide with one of them


def answer(
    observation: Observation,
    atoms: Atoms,
    orders: list[Fit],
    count: Tensor,
    at_least: Tensor,
    spec: LikelihoodSpec,
    *,
    count_known: bool,
    noise_known: bool,
) -> Sources:
    """The chosen order of every scene, refined, with moments and goodness of fit.

    Args:
        observation: B scenes.
        atoms: candidates among which the orders were searched.
        orders: fits of 1, 2, ... sources, at least up to the largest count.
        count: chosen number of sources, int64 [B].
        at_least: p(K >= k | y), float64 [B, >= max(count) + 1].
        spec: settings.
        count_known: the count was given, and is kept.
        noise_known: False where the noise power is an estimate, which widens the range of the residual.

    Returns:
        Sources [B, max_sources], most significant first: by what the likelihood would lose without them.

    Raises:
        NumericalError: a position, power or snapshot that is not finite.
    """
    batch, width, device = len(observation), spec.max_sources, count.device
    _, snapshots, antennas = observation.y.shape
    region, fewest = spec.grid.region, max(1, spec.num_sources[0])
    count = count.clone()
    polar = torch.zeros(batch, width, 3, dtype=torch.float64, device=device)
    polar[..., 2] = 1
    power = torch.zeros(batch, width, dtype=torch.float64, device=device)
    covariance = torch.zeros(batch, width, 3, 3, dtype=torch.float64, device=device)
    existence = torch.zeros(batch, width, dtype=torch.float64, device=device)
    on_border = torch.zeros(batch, width, dtype=torch.bool, device=device)
    residual = torch.zeros(batch, dtype=torch.float64, device=device)
    expected = torch.zeros(batch, 2, dtype=torch.float64, device=device)
    most = spec.num_sources[1]
    for k in range(int(count.max()), -1, -1):
        rows = torch.nonzero(count == k).squeeze(-1)
        part = observation[rows].double() if spec.double else observation[rows]
        fit = Fit(polar.new_zeros(len(rows), 0, 3), *polar.new_zeros(2, len(rows), 0))
        if k and len(rows):
            steps, tolerance = spec.search.final_steps, spec.search.final_tolerance
            start = orders[k - 1].rows(rows)
            if spec.search.power_steps == 0:  # powers and positions were refined together before
                known = None if spec.double else start.evaluation
                fit = joint_fit(part, start.u, start.log_power, region, steps, tolerance, known)
            else:
                fit = refined(part, start.u, start.log_power, region, spec.search, steps, tolerance)
            if count_known:
                fit = moved_apart(part, atoms, rows, fit, spec)
            moments = position_moments(part, fit, region, mean=spec.range_estimate == "mean")
            places = to_box_coordinates(*moments.position.unbind(-1))
            alike = (
                correlations(observation.geometry, fit.u).maximum(correlations(observation.geometry, places)).tril(-1)
            )
            split = (alike > COINCIDING).flatten(1).any(-1)
            beyond = moments.beyond > BEYOND_BORDER
            beside = (alike > _BESIDE_BORDER) & (beyond.unsqueeze(-1) | beyond.unsqueeze(-2))
            if k > fewest and not count_known:
                split = split | beside.flatten(1).any(-1)
                count[rows[split]] = k - 1
                rows, part, fit = rows[~split], part[~split], fit.rows(~split)
                moments = Moments(*(value[~split] for value in moments))
            elif bool(split.any()):  # the most likely ranges differ where their means do not
                modes = position_moments(part[split], fit.rows(split), region)
                moments = Moments(*(old.index_put((split,), new) for old, new in zip(moments, modes, strict=True)))
        expected[rows] = expected.new_tensor(residual_range(snapshots, antennas, k, most, noise_known=noise_known))
        residual[rows] = residual_power(part, fit.u)
        if k == 0 or len(rows) == 0:
            continue
        order = removal_costs(part, fit).argsort(dim=-1, descending=True)
        where = (rows.unsqueeze(-1), torch.arange(k, device=device))
        polar[where] = moments.position.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
        covariance[where] = moments.covariance.gather(1, order[..., None, None].expand(-1, -1, 3, 3))
        on_border[where] = moments.beyond.gather(1, order) > BEYOND_BORDER
        power[where] = (fit.log_power.exp() * part.power_unit.unsqueeze(-1)).gather(1, order)
        existence[where] = at_least[rows, 1 : k + 1]
    azimuth, elevation, range_m = (value.float() for value in polar.unbind(-1))
    mask = torch.arange(width, device=device) < count.unsqueeze(-1)
    return Sources(
        azimuth,
        elevation,
        range_m,
        power.float(),
        mask,
        existence.float(),
        covariance.float(),
        on_border,
        residual.float(),
        expected.float(),
    )


def moved_apart(observation: Observation, atoms: Atoms, scenes: Tensor, fit: Fit, spec: LikelihoodSpec) -> Fit:
    """The same number of sources, each that coincides with another moved to the best atom that does not.

    Where no atom lies apart (a single element, say) they stay as they are.

    Args:
        observation: B scenes.
        atoms: candidates of these scenes and perhaps others.
        scenes: int64 [B], which scenes of ``atoms`` these are.
        fit: k sources in each of the B scenes.
        spec: settings of the search.
    """
    for _ in range(fit.u.shape[1] - 1):
        again = coinciding(observation.geometry, fit.u)
        rows = torch.nonzero(again.any(-1)).squeeze(-1)
        if len(rows) == 0:
            break
        part, few = observation[rows], atoms[scenes[rows]]
        rest = without(fit.rows(rows), again[rows].int().argmax(-1))
        taken = box_steering(observation.geometry, rest.u).to(torch.complex64)
        offered = box_steering(observation.geometry, few.u).to(torch.complex64)
        near = ((offered.conj() @ taken.mT).abs() > _APART).any(-1)
        gain = gains(part, few, rest, spec.search).masked_fill(near, -torch.inf)
        best, index = gain.max(-1)
        added = few.u.gather(1, index[:, None, None].expand(-1, 1, 3))
        moved = stochastic_fit(part, torch.cat([rest.u, added], dim=1), None, spec.grid.region, 0, positions=False)
        free = best.isfinite()
        where = rows[free]
        fit = Fit(*(old.index_put((where,), new[free]) for old, new in zip(fit[:3], moved[:3], strict=True)))
    return fit
