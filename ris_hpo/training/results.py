"""What a run reports: validations, and at its end the scores of both paths with the sources that were found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ris_hpo.learning.inference import InferenceSpec, find_sources, localize, network_sources
from ris_hpo.learning.network import Network
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.metrics import Scores, floor_scores, score
from ris_hpo.training.config import RunConfig
from ris_hpo.training.data import Frozen
from ris_hpo.training.phases import Verdict

_SCORES = ("network", "floor", "fast", "fast_floor")


@dataclass(frozen=True, slots=True)
class Validation:
    """Scores on the validation set.

    Attributes:
        scenes_seen: scenes trained on so far.
        network: scores of the network's own path.
        floor: what the Cramer-Rao bound allows on the same scenes.
        loss: mean training loss since the validation before.
        seconds: that the validation took.
        verdicts: of the gates, where a phase ends here.
        fast: scores of the fast path on the first ``budget.pipeline_scenes`` scenes, where that path is searched.
        fast_floor: likewise, on the same scenes.
    """

    scenes_seen: int
    network: Scores
    floor: Scores
    loss: float
    seconds: float
    verdicts: tuple[Verdict, ...] = ()
    fast: Scores | None = None
    fast_floor: Scores | None = None

    @property
    def searched(self) -> tuple[Scores, Scores]:
        """Scores by which weights are chosen and trials pruned, with their floor: of ``fast`` where there is one."""
        if self.fast is None or self.fast_floor is None:
            return self.network, self.floor
        return self.fast, self.fast_floor

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        verdicts = [verdict.as_dict() for verdict in self.verdicts]
        given = {name: getattr(self, name) for name in _SCORES}
        scores = {name: None if value is None else value.as_dict() for name, value in given.items()}
        return dataclasses.asdict(self) | scores | {"verdicts": verdicts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Validation:
        """Inverse of :meth:`as_dict`."""
        scores = {name: Scores.from_dict(values[name]) for name in _SCORES if values.get(name) is not None}
        verdicts = tuple(Verdict.from_dict(verdict) for verdict in values["verdicts"])
        return cls(**(values | scores | {"verdicts": verdicts}))


@dataclass(frozen=True, slots=True)
class Findings:
    """The sources found in each validation scene; a trial's figures are drawn from them.

    ``network`` covers all scenes, ``pipeline`` the first ``len(pipeline)`` of them.
    """

    scenes: Scenes
    network: Sources
    pipeline: Sources


@dataclass(frozen=True, slots=True)
class Conclusion:
    """Scores of the best weights on both paths, each with the floor on the scenes it was scored on.

    ``pipeline`` is scored on the first ``budget.pipeline_scenes`` validation scenes; with 0 it repeats ``network``.
    ``fast`` is scored on the same scenes as ``pipeline``, where the fast path is searched.
    ``parameters`` counts those of the backbone and of the heads.
    """

    network: Scores
    floor: Scores
    pipeline: Scores
    pipeline_floor: Scores
    parameters: dict[str, int]
    findings: Findings
    fast: Scores | None = None


@torch.no_grad()
def found_by(network: Network, frozen: Frozen, inference: InferenceSpec) -> Sources:
    """Sources of the validation scenes on the network's own path."""
    parts = [network_sources(network(*part), inference) for part in frozen.features]
    return Sources.cat(parts)


def found_fast(network: Network, frozen: Frozen, config: RunConfig) -> tuple[Sources, Scenes]:
    """Sources of the first ``budget.pipeline_scenes`` validation scenes (all where that is 0) on the fast path."""
    few = frozen.scenes[: config.budget.pipeline_scenes or None]
    return find_sources(network, few, config.inference.of("fast"), "fast"), few


def concluded(network: Network, frozen: Frozen, config: RunConfig, *, fast: bool = False) -> Conclusion:
    """Score a finished network on the network's own path and the pipeline; with ``fast`` on the fast path as well."""
    scenes, truth, counts = frozen.scenes, frozen.scenes.require_truth(), network.parameter_counts()
    found = found_by(network, frozen, config.inference)
    scores, few = score(found, truth), scenes[: config.budget.pipeline_scenes]
    quick = None
    if fast:
        located, among = found_fast(network, frozen, config)
        quick = score(located, among.require_truth())
    if len(few) == 0:
        return Conclusion(scores, frozen.floor, scores, frozen.floor, counts, Findings(scenes, found, found[:0]), quick)
    refined = localize(network, few, config.inference)
    pipeline, findings = score(refined, few.require_truth()), Findings(scenes, found, refined)
    return Conclusion(scores, frozen.floor, pipeline, floor_scores(few), counts, findings, quick)


def diagnosed(
    steps: tuple[int, int],
    initial: Validation | None,
    best: Validation | None,
    bad_term: str | None,
    not_run: tuple[str, ...],
) -> str:
    """One line on whether a run learned, and if not, why.

    Args:
        steps: taken and skipped.
        initial: the validation before training.
        best: the best one.
        bad_term: the first loss term that was not finite.
        not_run: phases that an early end left out.
    """
    taken, skipped = steps
    total = taken + skipped
    cause = f", first non-finite term: {bad_term}" if bad_term else ""
    rest = f"; stopped early, phases not run: {', '.join(not_run)}" if not_run else ""
    if taken == 0:
        return f"no step was taken: {skipped} of {total} skipped{cause}"
    if initial is None or best is None:
        return f"{taken} of {total} steps taken{cause}"
    start = initial.network.k_loc
    gained = start - best.network.k_loc
    if gained <= 0:
        return f"k_loc never fell below its start ({start:.3f}); {taken} steps taken{cause}{rest}"
    some = f", {skipped} of {total} steps skipped{cause}" if skipped else ""
    return f"k_loc fell by {gained:.3f} in {taken} steps{some}{rest}"
