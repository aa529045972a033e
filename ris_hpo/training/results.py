"""What a run reports: a validation, and at its end what was found on the frozen scenes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.metrics import Scores


@dataclass(frozen=True, slots=True)
class Validation:
    """Scores on the frozen set after ``scenes_seen`` scenes."""

    scenes_seen: int
    network: Scores
    floor: Scores
    loss: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"network": self.network.as_dict(), "floor": self.floor.as_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Validation:
        """Inverse of :meth:`as_dict`."""
        scores = {name: Scores.from_dict(values[name]) for name in ("network", "floor")}
        return cls(**(values | scores))


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found on the frozen scenes, scene by scene; the figures beside a trial are drawn from it.

    ``pipeline`` covers the first ``len(pipeline)`` of the scenes.
    """

    scenes: Scenes
    network: Sources
    pipeline: Sources


@dataclass(frozen=True, slots=True)
class Conclusion:
    """Both paths' scores of the best weights, each beside the floor on its own scenes.

    ``pipeline`` is scored on the first ``budget.pipeline_scenes`` of the frozen set; with 0 it is the network path's.
    """

    network: Scores
    floor: Scores
    pipeline: Scores
    pipeline_floor: Scores
    parameters: dict[str, int]
    findings: Findings
