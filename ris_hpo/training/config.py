"""The configuration of a run: what the parts' specifications add up to, and the very thing that ``export`` writes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from pydantic import Field, model_validator

from ris_hpo.config import Spec, suggestion
from ris_hpo.learning.inference import InferenceSpec
from ris_hpo.learning.losses import TERMS, LossSpec
from ris_hpo.learning.network import NetworkSpec
from ris_hpo.physics.scene import SceneSpec
from ris_hpo.scoring.metrics import Scores
from ris_hpo.training.stability import OptimizerSpec

VALIDATION_SEED, CALIBRATION_SEED = 7_001, 7_002


class BudgetSpec(Spec):
    """How long to train and how often to look; counted in scenes, so that batch sizes and phases compare."""

    scenes: int = Field(6144, ge=1, description="scenes seen in all")
    validate_every: int = Field(1024, ge=1, description="scenes between validations")
    validation_scenes: int = Field(512, ge=1)
    pipeline_scenes: int = Field(128, ge=0, description="scenes of the pipeline score at the end; 0 leaves it out")
    calibration_scenes: int = Field(512, ge=64, description="scenes that the count head 'evidence' is fitted on")
    validation_seed: int = Field(VALIDATION_SEED, ge=0, description="the frozen set, common to all trials")
    patience: int = Field(0, ge=0, description="validations without a better k_loc before stopping; 0 never stops")
    fixed_scenes: int = Field(0, ge=0, description="train on so many scenes over and over; 0 draws new ones for ever")


class BalanceSpec(Spec):
    """How loss terms are weighed against each other, beyond their fixed weights."""

    kind: Literal["fixed", "uncertainty", "gradnorm"] = "fixed"
    rate: float = Field(0.05, gt=0, le=1, description="step of gradnorm's weights")
    asymmetry: float = Field(1.0, ge=0, le=5, description="gradnorm's alpha")


class GateSpec(Spec):
    """Evidence that a phase must show: a metric of the network path against its value at the phase's start."""

    metric: str
    direction: Literal["up", "down"]
    margin: float = Field(
        0.0, description="change that is asked for; negative tolerates so much of a turn for the worse"
    )

    @model_validator(mode="after")
    def _check(self) -> GateSpec:
        known = [field.name for field in dataclasses.fields(Scores)]
        if self.metric not in known:
            raise ValueError(f"unknown metric '{self.metric}'{suggestion(self.metric, known)}")
        return self


class PhaseSpec(Spec):
    """A stretch of the budget with its own loss, covariance and speed of the backbone."""

    name: str
    share: float = Field(gt=0, le=1, description="share of the budget")
    loss: dict[str, float] = Field(default_factory=dict, description="weights other than the run's")
    ramp: list[str] = Field(default_factory=list, description="terms whose weight rises from 0 over the phase")
    ramp_share: float = Field(
        0.1, ge=0.05, le=0.15, description="share of the total that each ramped term is scaled to"
    )
    beta: float | None = Field(None, ge=0, le=0.9)
    backbone_rate: float = Field(1.0, ge=0, le=1, description="factor on the backbone's rate; 0 freezes it")
    gates: list[GateSpec] = Field(default_factory=list)
    patience: int = Field(2, ge=0, description="extensions by a quarter of the phase before a gate is failed")

    @model_validator(mode="after")
    def _check(self) -> PhaseSpec:
        unknown = [name for name in self.loss if name not in LossSpec.model_fields]
        unknown += [name for name in self.ramp if name not in TERMS]
        if unknown:
            raise ValueError(f"phase '{self.name}': unknown loss term '{unknown[0]}'; known: {', '.join(TERMS)}")
        if len(self.ramp) * self.ramp_share >= 1:
            raise ValueError(f"phase '{self.name}': {len(self.ramp)} terms cannot each be {self.ramp_share} of all")
        return self


class RunConfig(Spec):
    """Everything a run depends on; two runs with one fingerprint and one thread count are bit-identical on a CPU."""

    settings = "training"

    seed: int = Field(0, ge=0, lt=2**63)
    scene: SceneSpec = SceneSpec()
    network: NetworkSpec = NetworkSpec()
    loss: LossSpec = LossSpec()
    balance: BalanceSpec = BalanceSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    inference: InferenceSpec = InferenceSpec()
    budget: BudgetSpec = BudgetSpec()
    phases: list[PhaseSpec] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.network.geometry != self.scene.geometry:
            raise ValueError("network.geometry must equal scene.geometry")
        if self.network.max_sources != self.scene.max_sources:
            raise ValueError(
                f"network.max_sources {self.network.max_sources} must equal scene.max_sources {self.scene.max_sources}"
            )
        grids = {"network.grid": self.network.grid, "inference.likelihood.grid": self.inference.likelihood.grid}
        for owner, name in itertools.product(grids, ("azimuth_deg", "elevation_deg", "range_m")):
            drawn, searched = getattr(self.scene, name), getattr(grids[owner].region, name)
            if drawn[0] < searched[0] or drawn[1] > searched[1]:
                raise ValueError(
                    f"scene.{name} {drawn} reaches beyond {owner}.region.{name} {searched}, where nothing is found"
                )
        if self.budget.validate_every > self.budget.scenes:
            raise ValueError(
                f"budget.validate_every {self.budget.validate_every} is above budget.scenes {self.budget.scenes}"
            )
        if self.phases and abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise ValueError("the shares of the phases must add up to 1")
        for phase in self.phases or [PhaseSpec(name="", share=1)]:
            steady = self.loss.replaced(phase.loss).active(noise_known=self.network.noise_known)
            if not set(steady) - set(phase.ramp):
                where = f" beside the ramped ones in phase '{phase.name}'" if self.phases else ""
                raise ValueError(f"no loss term has a weight{where}")
        return self
