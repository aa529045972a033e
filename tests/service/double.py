"""A training program without a network: deterministic curves, real checkpoints, faults on order.

It is a program like that of any user, so that the service's mechanics are tested in milliseconds. Every validation that
it computes is noted in ``$DOUBLE_JOURNAL``, which shows what ran twice.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from ris_hpo.config import Spec
from ris_hpo.errors import CheckpointError, TrainingDivergedError
from ris_hpo.programs.program import Program, TrialContext


class Budget(Spec):
    scenes: int = Field(default=800, ge=1)
    validate_every: int = Field(default=100, ge=1)


class Shape(Spec):
    x: float = Field(default=0.5, ge=0, le=1)
    y: int = Field(default=3, ge=1, le=9)
    kind: str = Field(default="plain", pattern="plain|fancy")
    depth: int = Field(default=2, ge=1, le=4)


class RunConfig(Spec):
    budget: Budget = Budget()
    shape: Shape = Shape()
    fault: str = "none"
    pause_s: float = 0.0
    seed: int = 0


FLOOR = 1.0


def train(trial: TrialContext) -> float | None:
    config = RunConfig.parse(trial.config)
    trial.plan(config.budget.validate_every, config.budget.scenes)
    run = Trainer(config, trial.directory)
    for step, score in itertools.chain(list(run.history), run.run(trial.should_stop)):
        if trial.report(step, score, floor=FLOOR):
            return None
        trial.show(history=run.history)
    if not run.finished:
        trial.requeue()
    trial.concluding()
    best = min(score for _, score in run.history)
    trial.record(parameters=1000 * config.shape.depth, pipeline={"k_loc": best - 0.3})
    return best


class Trainer:
    def __init__(self, config: RunConfig, directory: Path) -> None:
        self.config = config
        self.directory = directory
        self.history: list[tuple[int, float]] = []
        self.finished = False
        self.scenes_seen = 0
        self.level = 7.0
        self.generator = random.Random(config.seed)
        checkpoint = directory / "checkpoint.json"
        if checkpoint.exists():
            try:
                self._restore(json.loads(checkpoint.read_text()))
            except json.JSONDecodeError as error:
                raise CheckpointError(f"{checkpoint}: damaged ({error})") from None

    def run(self, stop: Callable[[], bool]) -> Iterator[tuple[int, float]]:
        budget = self.config.budget
        while self.scenes_seen < budget.scenes:
            deadline = time.monotonic() + self.config.pause_s
            while True:
                if stop():
                    self._save()
                    return
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.002)
            self._fault()
            self.scenes_seen += budget.validate_every
            shape = self.config.shape
            goal = 1.2 + 4 * (shape.x - 0.3) ** 2 + 0.05 * abs(shape.y - 4) + 0.1 * (shape.kind == "plain")
            goal += 0.02 * shape.depth if shape.kind == "fancy" else 0.0
            self.level += (goal - self.level) * 0.35
            value = self.level + 0.02 * self.generator.random()
            self.history.append((self.scenes_seen, value))
            self._save()
            journal = os.environ.get("DOUBLE_JOURNAL")
            if journal:
                line = f"{self.directory.parent.name} {self.config.seed} {self.scenes_seen} {os.getpid()}\n"
                with open(journal, "a") as file:
                    file.write(line)
            yield self.history[-1]
        self.finished = True

    def _fault(self) -> None:
        if "DOUBLE_FULL_DISK" in os.environ:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        match self.config.fault:
            case "bug":
                raise ZeroDivisionError("a bug on order")
            case "memory":
                raise MemoryError("no memory on order")
            case "allocate":
                bytearray(1 << 62)  # more than any address space, whatever the kernel promises
            case "diverge":
                raise TrainingDivergedError("loss is not finite: covariance")
            case "nan" if self.scenes_seen >= 200:
                self.level = math.nan
            case "die":
                os._exit(9)
            case "lock" if not os.path.exists(os.environ["DOUBLE_STORE"] + ".stopped"):
                Path(os.environ["DOUBLE_STORE"] + ".stopped").touch()
                store = sqlite3.connect(os.environ["DOUBLE_STORE"])
                store.execute("BEGIN IMMEDIATE")  # stopped half-way through a write
                os.kill(os.getpid(), signal.SIGSTOP)
            case "gate":
                while not os.path.exists(os.environ["DOUBLE_GATE"]):
                    time.sleep(0.01)
            case "hang" if self.scenes_seen >= 200 and not self._has_hung():
                (self.directory / "hung").touch()
                time.sleep(3600)

    def _has_hung(self) -> bool:
        return "DOUBLE_STEADY" in os.environ or (self.directory / "hung").exists()

    def _save(self) -> None:
        state = {
            "scenes_seen": self.scenes_seen,
            "level": self.level,
            "generator": self.generator.getstate(),
            "history": self.history,
        }
        partial = self.directory / f"partial-{os.getpid()}"
        partial.write_text(json.dumps(state))
        os.replace(partial, self.directory / "checkpoint.json")

    def _restore(self, state: dict[str, Any]) -> None:
        self.scenes_seen, self.level = state["scenes_seen"], state["level"]
        version, internal, gauss = state["generator"]
        self.generator.setstate((version, tuple(internal), gauss))
        self.history = [(step, value) for step, value in state["history"]]


PROGRAM = Program(train, RunConfig)
