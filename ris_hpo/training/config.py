"""The configuration of a run, composed of its parts' specifications; ``export`` writes it as it is."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pydantic import Field, model_validator

from ris_hpo.config import Spec, suggestion
from ris_hpo.learning.losses import TERMS, LossSpec
from ris_hpo.learning.settings import NetworkSettings
from ris_hpo.scoring.metrics import Scores
from ris_hpo.training.phases import PhasePlan
from ris_hpo.training.stability import OptimizerSpec

VALIDATION_SEED, CALIBRATION_SEED = 7_001, 7_002


class BudgetSpec(Spec):
    """How long to train and how often to validate; lengths are counted in scenes, whatever the batch size."""

    scenes: int = Field(6144, ge=1, description="scenes to train on, repeated ones counted each time")
    rungs: list[int] = Field(
        default_factory=list,
        description="scenes at which a study pauses the run, see pruner 'promotion'; it fills them in",
    )
    validate_every: int = Field(1024, ge=1, description="scenes between validations")
    validation_scenes: int = Field(
        512, ge=1, description="scenes of the validation set; at most this many of one's own"
    )
    pipeline_scenes: int = Field(128, ge=0, description="scenes of the pipeline score at the end; 0 leaves it out")
    calibration_scenes: int = Field(512, ge=64, description="scenes that the count head 'evidence' is fitted on")
    validation_seed: int = Field(
        VALIDATION_SEED, ge=0, description="seed of the validation set, or of its draw from one's own scenes"
    )
    patience: int = Field(0, ge=0, description="validations without a better k_loc before stopping; 0 never stops")
    fixed_scenes: int = Field(
        0, ge=0, description="train and validate on so many simulated scenes, repeated; 0 draws new ones"
    )


class DataSpec(Spec):
    """One's own scenes: which files, and how simulated ones are mixed with them."""

    scenes: str | None = Field(None, description="scene file to train on; none: simulated scenes alone")
    validation: str | None = Field(None, description="scene file to validate on; none: part of data.scenes")
    scenes_fingerprint: str | None = Field(None, description="of these scenes; others are refused. 'run' states it")
    simulated_share: float = Field(0.0, ge=0, lt=1, description="share of simulated scenes beside one's own")
    simulated_first: float = Field(
        0.0, ge=0, lt=1, description="share of the budget, at its start, that is trained on simulated scenes alone"
    )
    num_snapshots: tuple[int, int] | None = Field(
        None, description="fewest and most snapshots in training, drawn for each batch; none: scene.num_snapshots"
    )

    @model_validator(mode="after")
    def _check(self) -> DataSpec:
        if self.num_snapshots is not None and not 1 <= self.num_snapshots[0] <= self.num_snapshots[1] <= 4096:
            raise ValueError(f"num_snapshots: {list(self.num_snapshots)} must be two numbers within 1..4096, in order")
        return self


class BalanceSpec(Spec):
    """How loss terms are weighed against each other, on top of their fixed weights."""

    kind: Literal["fixed", "uncertainty", "gradnorm"] = Field(
        "fixed", description="learned weights: none, by uncertainty, or by gradient norms at the last shared layer"
    )
    rate: float = Field(0.05, gt=0, le=1, description="step of gradnorm's weights, in logarithms")
    asymmetry: float = Field(1.0, ge=0, le=5, description="gradnorm's alpha: how much slow terms are favoured")


class GateSpec(Spec):
    """A condition on a phase: how a metric of the network path must change between its start and its end."""

    metric: str = Field(description="name of a score")
    direction: Literal["up", "down"] = Field(description="which way the metric should go")
    margin: float = Field(0.0, description="least change in that direction; negative allows that much in the other")

    @model_validator(mode="after")
    def _check(self) -> GateSpec:
        known = [field.name for field in dataclasses.fields(Scores)]
        if self.metric not in known:
            raise ValueError(f"unknown metric '{self.metric}'{suggestion(self.metric, known)}")
        return self


class PhaseSpec(Spec):
    """A part of the budget with its own loss weights, beta and learning rate of the backbone."""

    name: str = Field(description="as messages show it")
    share: float = Field(gt=0, le=1, description="share of the budget, rounded to whole validations, at least one")
    loss: dict[str, float] = Field(default_factory=dict, description="loss weights other than the run's")
    ramp: list[str] = Field(default_factory=list, description="terms whose weight rises from 0 over the phase")
    ramp_share: float = Field(
        0.1, ge=0.05, le=0.15, description="share of the loss that each ramped term has at the phase's end"
    )
    beta: float | None = Field(None, ge=0, le=0.9, description="inference.hybrid.beta in this phase")
    backbone_rate: float = Field(1.0, ge=0, le=1, description="factor on the backbone's learning rate; 0 freezes it")
    gates: list[GateSpec] = Field(default_factory=list, description="conditions at the phase's end")
    patience: int = Field(
        2, ge=0, description="extensions, by a quarter and at least one validation, before a failed gate ends the run"
    )

    @model_validator(mode="after")
    def _check(self) -> PhaseSpec:
        unknown = [name for name in self.loss if name not in LossSpec.model_fields]
        unknown += [name for name in self.ramp if name not in TERMS]
        if unknown:
            raise ValueError(f"phase '{self.name}': unknown loss term '{unknown[0]}'; known: {', '.join(TERMS)}")
        if len(self.ramp) * self.ramp_share >= 1:
            raise ValueError(f"phase '{self.name}': {len(self.ramp)} terms cannot each be {self.ramp_share} of all")
        return self


class RunConfig(NetworkSettings):
    """Everything a run depends on; two runs with one fingerprint and one thread count are bit-identical on a CPU."""

    settings = "training"

    seed: int = Field(0, ge=0, lt=2**63, description="of the weights and of the training scenes")
    loss: LossSpec = LossSpec()
    balance: BalanceSpec = BalanceSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    budget: BudgetSpec = BudgetSpec()
    data: DataSpec = DataSpec()
    phases: list[PhaseSpec] = Field(default_factory=list, description="of the curriculum; none is one plain run")

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.budget.validate_every > self.budget.scenes:
            raise ValueError(
                f"budget.validate_every {self.budget.validate_every} is above budget.scenes {self.budget.scenes}"
            )
        rungs = self.budget.rungs
        if rungs != sorted(set(rungs)) or any(not 0 < rung < self.budget.scenes for rung in rungs):
            raise ValueError(f"budget.rungs {rungs} must rise, within budget.scenes {self.budget.scenes}")
        if self.optimizer.schedule == "wsd" and self.phases:
            raise ValueError("schedule 'wsd' is for runs without phases")
        if self.phases and abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            raise ValueError("the shares of the phases must add up to 1")
        if self.scene.num_sources[1] == 0:
            raise ValueError(f"scene.num_sources {self.scene.num_sources}: training needs scenes with sources")
        validations = math.ceil(self.budget.scenes / self.budget.validate_every)
        if len(self.phases) > validations:
            raise ValueError(
                f"{len(self.phases)} phases need a validation each, but budget.scenes {self.budget.scenes} and "
                f"budget.validate_every {self.budget.validate_every} give {validations}; lower budget.validate_every"
            )
        for phase in self.plan().phases:
            active = self.loss.replaced(phase.loss).active(noise_known=self.network.noise_known)
            if not set(active) - set(phase.ramp):
                where = f" beside the ramped ones in phase '{phase.name}'" if self.phases else ""
                raise ValueError(f"no loss term has a weight{where}")
        return self

    def plan(self) -> PhasePlan:
        """Boundaries of the phases; a run without phases is one phase with the run's own settings."""
        phases = self.phases or [PhaseSpec(name="", share=1)]
        return PhasePlan.begin(phases, self.budget.scenes, self.budget.validate_every)

    def branch_ends(self) -> tuple[int, ...]:
        """Scenes at which decayed branches of ``wsd`` end: the validations at or above each rung, and the end."""
        if self.optimizer.schedule != "wsd":
            return ()
        every, total = self.budget.validate_every, self.budget.scenes
        return (*sorted({min(-(-rung // every) * every, total) for rung in self.budget.rungs} - {total}), total)

    def phase_loss(self, phase: PhaseSpec) -> LossSpec:
        """Loss weights in a phase; a ramped term has 1 here, so that it is computed, and is scaled by the balance."""
        return self.loss.replaced({**phase.loss, **dict.fromkeys(phase.ramp, 1.0)})
