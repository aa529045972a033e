"""A training program that only waits: what is left of a worker's time is the service's own."""

from __future__ import annotations

import os
import time

from pydantic import Field

from ris_hpo.config import Spec
from ris_hpo.programs.program import Program, TrialContext


class Budget(Spec):
    """As the real one's."""

    scenes: int = Field(default=10, ge=1)
    validate_every: int = Field(default=1, ge=1)


class Shape(Spec):
    """Four dimensions to search."""

    a: float = Field(default=0.5, ge=0, le=1)
    b: float = Field(default=0.5, ge=0, le=1)
    c: int = Field(default=3, ge=1, le=9)
    d: str = "x"


class RunConfig(Spec):
    """Seconds between two validations, and what is searched."""

    budget: Budget = Budget()
    shape: Shape = Shape()
    pause_s: float = 0.0
    seed: int = 0


def train(trial: TrialContext) -> float:
    """Wait ``pause_s`` before each report, and add up the seconds that the program was in charge."""
    config = RunConfig.parse(trial.config)
    budget = config.budget
    trial.plan(budget.validate_every, budget.scenes)
    seconds, value = 0.0, 7.0
    for step in range(budget.validate_every, budget.scenes + 1, budget.validate_every):
        began = time.perf_counter()
        if config.pause_s:
            time.sleep(config.pause_s)
        value = 5.0 / step + config.shape.a
        seconds += time.perf_counter() - began
        if trial.report(step, value, floor=1.0):
            return value
    journal = os.environ.get("IDLE_JOURNAL")
    if journal:
        with open(journal, "a") as file:
            file.write(f"{seconds}\n")
    return value


PROGRAM = Program(train, RunConfig)
