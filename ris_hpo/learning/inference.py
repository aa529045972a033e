"""From a scene to sources: three paths, for validation, evaluation and use alike.

``network``: sources from the network's outputs alone; y is not used again. Searches compare trials on this path.
``pipeline``: what the command ``localize`` does. Proposals of the network -> orthogonal least squares among them with
Levenberg-Marquardt refinement -> count from evidence and count head -> sources with existence and position covariance.
``fast``: the same with the settings :data:`FAST`, as ``localize --fast`` does.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, assert_never

import torch
from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.estimators.channel import split_channel
from ris_hpo.estimators.counting import CountWeights, EvidenceSpec
from ris_hpo.estimators.maximum_likelihood import ols
from ris_hpo.estimators.observation import require_finite
from ris_hpo.estimators.refinement import refine, with_goodness_of_fit
from ris_hpo.estimators.search import SearchSpec
from ris_hpo.estimators.spec import LikelihoodSpec
from ris_hpo.estimators.spectrum import localize_covariance
from ris_hpo.learning.hybrid import HybridSpec, covariances
from ris_hpo.learning.network import Network, Outputs, count_weights, slot_geometry
from ris_hpo.physics.array import Cosines, steering
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

Path = Literal["network", "fast", "pipeline"]
"""Ways from a scene to sources."""

FAST: Final[dict[str, object]] = {
    "localizer": "polish",
    "likelihood.single": True,
    "likelihood.double": False,
    "likelihood.search.greedy_steps": 1,
    "likelihood.search.power_steps": 0,
    "likelihood.search.every_order": False,
    "likelihood.search.final_steps": 3,
    "likelihood.search.final_tolerance": 1e-2,
    "likelihood.evidence.least_prior": 0.03,
    "second_search": True,
}
"""Settings of the fast path, each measured (benchmarks/LOG.md): one refinement step a source that is added instead of
two, three last steps instead of ten, counts that the count head gives less than .03 left out, and single precision
throughout. The others are the network's own."""

_SECOND: Final[dict[str, object]] = {
    "search.greedy_steps": 2,
    "search.residual_maxima": 16,
    "search.every_order": True,
    "search.final_steps": 10,
    "evidence.least_prior": 1e-3,
}
"""Settings of the second search: what the fast path leaves out of the first."""

_EXPLAINING = 10  # steps of slots or peaks before their residual is taken: cells are coarser than the snapshots


class InferenceSpec(Spec):
    """Settings of the way from outputs to sources."""

    localizer: Literal["polish", "music", "mvdr"] = Field(
        "polish",
        description="refine proposals on the snapshots (polish), or take peaks of a spectrum of R_eff (music, mvdr)",
    )
    proposals: int = Field(64, ge=5, le=512, description="proposals searched by polish")
    count_confidence: float = Field(
        0.0, ge=0, le=1, description="below it the network path counts existing slots instead of trusting the head"
    )
    covariance_scale: float = Field(
        1.0, gt=0, le=100, description="what the position covariances of polish are multiplied with"
    )
    second_search: bool = Field(
        False, description="search scenes again, thoroughly, where the sources found leave more than noise (polish)"
    )
    likelihood: LikelihoodSpec = Field(
        LikelihoodSpec(
            double=False,
            batch=64,
            search=SearchSpec(greedy_steps=2, final_steps=10, final_tolerance=1e-3, residual_maxima=16),
            evidence=EvidenceSpec(prior_weight=1.0, success_weight=2.0, least_prior=1e-3),
        ),
        description="search, refinement and evidence of polish; the count head is the prior that evidence weighs",
    )
    hybrid: HybridSpec = Field(HybridSpec(), description="R_eff, for music, mvdr and the loss")

    def of(self, path: Path) -> InferenceSpec:
        """The settings of a path: for ``fast`` these with :data:`FAST` in place of what it names."""
        return self.replaced(FAST) if path == "fast" else self


@torch.no_grad()
def predict(network: Network, scenes: Scenes, batch: int = 64) -> Outputs:
    """Outputs of the network in evaluation mode, without the dense cell maps.

    Raises:
        ConfigError: there is no scene, or scenes of another surface.
        NumericalError: scenes that are not finite.
    """
    require_finite(scenes, noise_known=network.spec.noise_known)
    was_training = network.training
    network.eval()
    try:
        parts = []
        for start in range(0, len(scenes), batch):
            part = network(*network.features(scenes[start : start + batch]))
            parts.append(part._replace(cell_logit=None, cell_power=None, cell_offset=None))
    finally:
        network.train(was_training)
    return Outputs(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True)))  # type: ignore[arg-type]


def network_sources(outputs: Outputs, spec: InferenceSpec, num_sources: Tensor | None = None) -> Sources:
    """The ``network`` path: the best K^ slots.

    K^ is the count head's mode where its probability reaches ``count_confidence``; elsewhere the number of slots that
    probably exist, at least one.
    """
    slots = outputs.log_count.shape[1] - 1
    probability, counted = outputs.log_count.exp().max(-1)
    existence = torch.sigmoid(outputs.existence[:, :slots])
    by_slots = existence.sum(-1).round().long().clamp(1, slots)
    if num_sources is None:
        num_sources = torch.where(probability >= spec.count_confidence, counted, by_slots)
    mask = torch.arange(slots, device=counted.device) < num_sources.unsqueeze(-1)
    azimuth, elevation, range_m = slot_geometry(outputs, slots)
    return Sources(azimuth, elevation, range_m, outputs.power[:, :slots], mask, existence)


def find_sources(
    network: Network,
    scenes: Scenes,
    spec: InferenceSpec,
    path: Path,
    *,
    num_sources: Tensor | None = None,
    outputs: Outputs | None = None,
) -> Sources:
    """The sources that a path finds; arguments as of :func:`localize`, ``spec`` with the settings of that path."""
    if path == "network":
        return network_sources(predict(network, scenes) if outputs is None else outputs, spec, num_sources)
    if path == "fast" or path == "pipeline":
        return localize(network, scenes, spec, num_sources=num_sources, outputs=outputs)
    assert_never(path)


def localize(
    network: Network,
    scenes: Scenes,
    spec: InferenceSpec,
    *,
    num_sources: Tensor | None = None,
    outputs: Outputs | None = None,
) -> Sources:
    """The ``pipeline`` path.

    Args:
        network: trained.
        scenes: on the network's device.
        spec: settings.
        num_sources: [B] where the count is known.
        outputs: of this network on these scenes, if they have been computed already.

    Returns:
        Sources [B, K_max]; existence and position covariance with ``polish``.

    Raises:
        ConfigError: there is no scene, scenes of another surface, or a count outside 0..K_max.
        NumericalError: scenes that are not finite.
    """
    scenes, power_unit = scenes.in_unit_levels()
    outputs = predict(network, scenes) if outputs is None else outputs
    if spec.localizer != "polish":
        if spec.hybrid.sharpening:
            outputs = sharpened(network, scenes, outputs, spec, num_sources)
        effective = covariances(outputs, _with_estimates(network, scenes, outputs), spec.hybrid).effective
        counts = network_sources(outputs, spec, num_sources).num_sources
        form = network.spec
        found = localize_covariance(
            form.geometry, effective, spec.localizer, counts, max_sources=form.max_sources, grid=form.cells
        )
        return explained(network, scenes, outputs, found)
    observed, candidates, likelihood = refinement(network, scenes, spec, outputs)
    weights = None if outputs.count_mixing is None else count_weights(outputs.count_mixing)

    def searched(rows: Tensor, how: LikelihoodSpec) -> Sources:
        return ols(
            observed[rows],
            Cosines(*(axis[rows] for axis in candidates)),
            how,
            num_sources=None if num_sources is None else num_sources[rows],
            log_prior=outputs.log_count[rows],
            weights=None if weights is None else CountWeights(*(value[rows] for value in weights)),
            noise_known=network.spec.noise_known,
        )

    everything = torch.arange(len(scenes), device=scenes.device)
    found = searched(everything, likelihood)
    if spec.second_search:
        assert found.residual is not None
        assert found.residual_range is not None
        poor = torch.nonzero(found.residual > found.residual_range[:, 1]).squeeze(-1)
        if len(poor):
            again = searched(poor, likelihood.replaced(_SECOND))
            place = everything.index_put((poor,), len(scenes) + torch.arange(len(poor), device=poor.device))
            found = Sources.cat([found, again])[place]
    assert found.covariance_m2 is not None
    return dataclasses.replace(
        found,
        power=(found.power * power_unit.unsqueeze(-1)).float(),
        covariance_m2=spec.covariance_scale * found.covariance_m2,
    )


def explained(network: Network, scenes: Scenes, outputs: Outputs, found: Sources) -> Sources:
    """Sources that were found without a look at the snapshots, with what they leave of them after a few steps."""
    return with_goodness_of_fit(
        _with_estimates(network, scenes, outputs),
        found,
        region=network.spec.grid.region,
        steps=_EXPLAINING,
        noise_known=network.spec.noise_known,
    )


def sharpened(
    network: Network, scenes: Scenes, outputs: Outputs, spec: InferenceSpec, num_sources: Tensor | None = None
) -> Outputs:
    """Outputs whose factor is spanned by the slots after a few refinement steps on the snapshots.

    Beyond 4 m the grid's cells resolve range to a metre at best, where the snapshots allow half a metre.
    """
    slots = network_sources(outputs, spec, num_sources)
    moved = refine(
        _with_estimates(network, scenes, outputs),
        slots,
        spec.hybrid.sharpening,
        region=network.spec.grid.region,
        double=False,
    )
    share = moved.power * moved.mask
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    columns = steering(network.spec.geometry, moved.azimuth, moved.elevation, moved.range_m).mT
    return outputs._replace(factor=columns * share.sqrt().unsqueeze(1))


def refinement(
    network: Network, scenes: Scenes, spec: InferenceSpec, outputs: Outputs
) -> tuple[Scenes, Cosines, LikelihoodSpec]:
    """What ``polish`` searches: scenes with the network's noise power and channel, its proposals, and the settings."""
    likelihood, most = spec.likelihood, network.spec.max_sources
    if most < likelihood.max_sources:  # copied without validation, since this runs once a batch
        fewest, largest = likelihood.num_sources
        likelihood = likelihood.model_copy(
            update={"max_sources": most, "num_sources": (min(fewest, most), min(largest, most))}
        )
    return _with_estimates(network, scenes, outputs), outputs.cosines(spec.proposals), likelihood


def _with_estimates(network: Network, scenes: Scenes, outputs: Outputs) -> Scenes:
    """The scenes with the noise power and channel that the network estimates, if it is not given the noise power."""
    if network.spec.noise_known:
        return scenes
    received = scenes.y.abs().square().mean((1, 2))
    direct, scattered = split_channel(scenes.bs_ris_channel)
    channel = direct + outputs.channel_gain[:, None, None] * scattered
    noise = (outputs.disturbance * received).clamp(min=1e-30)  # positive even where y is 0
    return dataclasses.replace(scenes, bs_ris_channel=channel, noise_power=noise)
