"""The program of ``inference`` studies: settings of the localizer on a trained network, no training.

It looks like a trainer: every validation adds a stretch of the frozen scenes and reports ``k_loc`` of the pipeline over
all scenes so far, so that a poor setting is pruned after a few. The network stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pydantic import Field, model_validator

from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError
from ris_hpo.learning.inference import InferenceSpec, localize, network_sources, predict
from ris_hpo.physics.scene import simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.programs.program import Program, TrialContext
from ris_hpo.programs.training import Objective, follow
from ris_hpo.scoring.metrics import floor_scores, score
from ris_hpo.training.config import VALIDATION_SEED
from ris_hpo.training.finished import load_network
from ris_hpo.training.results import Conclusion, Findings, Validation


class InferenceBudget(Spec):
    """How many scenes a setting is scored on, and how often it is reported."""

    scenes: int = Field(512, ge=1, description="scenes that a setting is scored on")
    validate_every: int = Field(64, ge=1, description="scenes between two reports")

    @model_validator(mode="after")
    def _check(self) -> InferenceBudget:
        if self.validate_every > self.scenes:
            raise ValueError(f"budget.validate_every {self.validate_every} is above budget.scenes {self.scenes}")
        return self


class RunConfig(Spec):
    """What an inference trial depends on: whose network, which settings, which scenes."""

    settings = "inference"

    checkpoint: str = Field("runs/best", description="folder of the trained network")
    seed: int = Field(0, ge=0, lt=2**63, description="not used: nothing here is random")
    scene_seed: int = Field(VALIDATION_SEED, ge=0, description="the frozen set, common to all trials")
    inference: InferenceSpec = InferenceSpec()
    budget: InferenceBudget = InferenceBudget()


class Trainer:
    """Scores one setting; the scenes are those the network was trained for.

    A trial takes seconds, so that one that is taken up again starts over.

    Args:
        config: everything the score depends on.
        directory: made, and left empty.
        device: "cpu" or "cuda[:i]".
        resume: of no consequence here.

    Raises:
        ConfigError: no network in ``checkpoint``.
    """

    def __init__(self, config: RunConfig, directory: Path, *, device: str = "cpu", resume: bool = True) -> None:
        if not Path(config.checkpoint).exists():
            raise ConfigError(
                f"{config.checkpoint}: no trained network there; name one with --set checkpoint=FOLDER or in [base]"
            )
        self.config = config
        self.device = device
        self.network, self.run_config = load_network(Path(config.checkpoint), device=device)
        self.history: list[Validation] = []
        self.finished = False
        self.scenes_seen = 0
        self._found: list[Sources] = []
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def last_validation(self) -> int:
        """Scenes scored at the last report."""
        return self.config.budget.scenes

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Validation]:
        """Score stretch by stretch, yielding after each.

        Args:
            stop: asked before every stretch.
        """
        budget = self.config.budget
        while self.scenes_seen < budget.scenes:
            if stop():
                return
            began = time.monotonic()
            end = min(self.scenes_seen + budget.validate_every, budget.scenes)
            scenes = simulate(
                self.run_config.scene, self.config.scene_seed, range(self.scenes_seen, end), device=self.device
            )
            self._found.append(localize(self.network, scenes, self.config.inference))
            self.scenes_seen = end
            so_far = simulate(self.run_config.scene, self.config.scene_seed, range(end), device=self.device)
            found = self._found[0].cat(self._found)
            scores = score(found, so_far.require_truth())
            seconds = time.monotonic() - began
            self.history.append(Validation(end, scores, floor_scores(so_far), 0.0, seconds))
            yield self.history[-1]
        self.finished = True

    def conclude(self) -> Conclusion:
        """Return the pipeline's score on all scenes, under both names: it is what an inference study is about."""
        scenes = simulate(self.run_config.scene, self.config.scene_seed, range(self.scenes_seen), device=self.device)
        last = self.history[-1]
        found = self._found[0].cat(self._found)
        plain = network_sources(predict(self.network, scenes), self.config.inference)
        counts = self.network.parameter_counts()
        return Conclusion(last.network, last.floor, last.network, last.floor, counts, Findings(scenes, plain, found))


def tune(trial: TrialContext, *, objective: Objective) -> float | None:
    """Score one setting of the localizer; see ``ris_hpo.programs.training.train``."""
    config = RunConfig.parse(trial.config)
    trial.plan(config.budget.validate_every, config.budget.scenes)
    return follow(trial, Trainer(config, trial.directory, device=trial.device), objective)


NETWORK = Program(partial(tune, objective="network"), RunConfig)
PIPELINE = Program(partial(tune, objective="pipeline"), RunConfig)
