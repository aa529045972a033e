"""The reference beside a study's scores: the ``ml`` estimator and the floor on its frozen scenes.

It takes up to a second a scene, once: the result is cached by all it depends on, so that all studies with the same
scenes share it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import optuna

from ris_hpo.atomic import make_folder, write_text
from ris_hpo.config import fingerprint
from ris_hpo.errors import StudyError
from ris_hpo.estimators.estimate import EstimatorName, EstimatorSpec, estimate
from ris_hpo.physics.scene import simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.k_loc import SCORE_VERSION
from ris_hpo.scoring.metrics import Scores, floor_scores, score
from ris_hpo.search.spec import StudySpec
from ris_hpo.store import attributes as names
from ris_hpo.training.config import RunConfig

ESTIMATOR: Final[EstimatorName] = "ml"
CHUNK: Final = 16


@dataclass(frozen=True, slots=True)
class Reference:
    """Scores of the estimator and of the floor on the first ``scenes`` of the frozen set."""

    ml: Scores
    floor: Scores
    scenes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON and for the study's attributes."""
        return {
            "ml": self.ml.as_dict(),
            "floor": self.floor.as_dict(),
            "scenes": self.scenes,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Reference:
        """Inverse of :meth:`as_dict`."""
        return cls(Scores.from_dict(tree["ml"]), Scores.from_dict(tree["floor"]), tree["scenes"], tree["seconds"])


def measure(
    config: RunConfig, directory: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Reference:
    """Score the estimator on the frozen scenes that a run's pipeline is scored on.

    Args:
        config: a run configuration, of which the scenes, the validation seed and the counts are used.
        directory: where results are cached.
        progress: called with (scenes done, scenes in all).
    """
    budget = config.budget
    count = min(budget.pipeline_scenes or budget.validation_scenes, budget.validation_scenes)
    specs = [config.scene.model_dump(mode="json"), EstimatorSpec().model_dump(mode="json")]
    key = fingerprint([*specs, budget.validation_seed, count, SCORE_VERSION, ESTIMATOR])
    file = directory / f"{key}.json"
    if file.is_file():
        return Reference.from_dict(json.loads(file.read_text(encoding="utf-8")))
    begun = time.monotonic()
    scenes = simulate(config.scene, budget.validation_seed, range(count))
    parts = []
    for start in range(0, count, CHUNK):
        progress(start, count)
        parts.append(estimate(ESTIMATOR, scenes[start : start + CHUNK]))
    progress(count, count)
    found = Sources.cat(parts)
    seconds = round(time.monotonic() - begun, 2)
    made = Reference(score(found, scenes.require_truth()), floor_scores(scenes), count, seconds)
    write_text(make_folder(directory) / file.name, json.dumps(made.as_dict()))
    return made


def attach(
    study: optuna.Study,
    spec: StudySpec,
    directory: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """Put the reference into a study's attributes, where report, note and curves read it; measured only once.

    Raises:
        StudyError: the study tunes a trained network, and its scenes are those of that network.
    """
    known = study.user_attrs.get(names.REFERENCE)
    if known is not None:
        return Reference.from_dict(known)
    if not spec.trains_networks:
        raise StudyError(
            f"study '{study.study_name}' tunes a trained network; 'ris-hpo evaluate --estimator ml' gives its reference"
        )
    made = measure(spec.config({}), directory, progress=progress)
    study.set_user_attr(names.REFERENCE, made.as_dict())
    return made
