"""One entry to all classical estimators."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec, suggestion
from ris_hpo.errors import ConfigError
from ris_hpo.estimators.covariance import (
    CountCriterion,
    count_from_snapshots,
    least_squares_snapshots,
    source_covariance,
    trace_normalised,
)
from ris_hpo.estimators.maximum_likelihood import deterministic_ml, ols, spectrum_maxima
from ris_hpo.estimators.observation import known_count, require_finite
from ris_hpo.estimators.refinement import with_goodness_of_fit
from ris_hpo.estimators.spec import LikelihoodSpec
from ris_hpo.estimators.spectrum import localize_covariance
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

_CHUNK = 64

EstimatorName = Literal["ml", "music", "mvdr", "modified-music", "spectrum-maxima"]


class EstimatorSpec(Spec):
    """Settings of every estimator.

    ``covariance`` says what music, mvdr and modified-music work on: ``least-squares`` is what the snapshots give (and
    where they fail), ``refined`` is built from the sources that ``spectrum-maxima`` finds, ``truth`` from the true
    sources. ``count`` is their source-count criterion: on the covariance of y, or the evidence of ``spectrum-maxima``.
    """

    likelihood: LikelihoodSpec = LikelihoodSpec()
    num_candidates: int = Field(64, ge=1, le=100_000, description="maxima that spectrum-maxima searches among")
    covariance: Literal["least-squares", "refined", "truth"] = Field(
        "least-squares", description="what music, mvdr and modified-music work on"
    )
    count: CountCriterion | Literal["evidence"] = Field("mdl", description="source-count criterion of these three")
    refinement_steps: int = Field(25, ge=0, le=200, description="Gauss-Newton steps of their peaks after the grid")


def estimate(
    name: EstimatorName, scenes: Scenes, spec: EstimatorSpec | None = None, num_sources: Tensor | int | None = None
) -> Sources:
    """Locate sources with the named estimator.

    Args:
        name: ``ml`` (full search), ``spectrum-maxima`` (the same among the maxima of one spectrum), ``music``, ``mvdr``
            or ``modified-music``.
        scenes: what was received.
        spec: settings.
        num_sources: the count where it is known, [B] or one for all.

    Returns:
        Sources [B, max_sources] on the scenes' device, powers in the units of |y|^2 / |H|^2.

    Raises:
        ConfigError: an unknown name, no scene, a count out of bounds, or ``covariance = "truth"`` without truth.
        NumericalError: scenes that are not finite.
    """
    spec = spec or EstimatorSpec()
    if name == "ml":
        return deterministic_ml(scenes, spec.likelihood, num_sources)
    if name == "spectrum-maxima":
        return _among_maxima(scenes, spec, num_sources)
    if name not in get_args(EstimatorName):
        raise ConfigError(f"unknown estimator '{name}'{suggestion(name, list(get_args(EstimatorName)))}")
    require_finite(scenes)
    count = None if num_sources is None else known_count(scenes, num_sources, spec.likelihood.max_sources)
    parts = []
    for start in range(0, len(scenes), _CHUNK):
        rows = slice(start, start + _CHUNK)
        parts.append(_from_covariance(name, scenes[rows], spec, None if count is None else count[rows]))
    return Sources.cat(parts)


def _from_covariance(
    method: Literal["music", "mvdr", "modified-music"], scenes: Scenes, spec: EstimatorSpec, count: Tensor | None
) -> Sources:
    settings = spec.likelihood
    scenes, power_unit = scenes.in_unit_levels()
    if spec.covariance == "refined" or (spec.count == "evidence" and count is None):
        found = _among_maxima(scenes, spec, count)
        count = found.num_sources
        covariance = source_covariance(scenes.geometry, found)
        total = (found.power * found.mask).sum(-1)
    if spec.covariance == "truth":
        truth = scenes.require_truth()
        covariance = source_covariance(scenes.geometry, truth)
        total = (truth.power * truth.mask).sum(-1) / power_unit
    elif spec.covariance == "least-squares":
        snapshots = least_squares_snapshots(scenes)
        covariance = trace_normalised(snapshots.mT @ snapshots.conj())
        total = snapshots.abs().square().sum(-1).mean(-1)
    if count is None:
        assert spec.count != "evidence"  # it has given the count above
        count = count_from_snapshots(scenes, spec.count, settings.max_sources)
    found = localize_covariance(
        scenes.geometry,
        covariance,
        method,
        count,
        max_sources=settings.max_sources,
        grid=settings.grid.on(scenes.geometry),
        refinement_steps=spec.refinement_steps,
    )
    scale = power_unit * total / scenes.geometry.num_elements  # the covariances above have trace N
    found = dataclasses.replace(found, power=(found.power * scale.unsqueeze(-1)).float())
    return with_goodness_of_fit(scenes, found, region=settings.grid.region, channel_error_db=settings.channel_error_db)


def _among_maxima(scenes: Scenes, spec: EstimatorSpec, num_sources: Tensor | int | None) -> Sources:
    candidates = spectrum_maxima(scenes, spec.num_candidates, spec.likelihood)
    return ols(scenes, candidates, spec.likelihood, num_sources=num_sources)
