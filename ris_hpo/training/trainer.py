"""The run of one configuration: steps, validations, phases and checkpoints.

Validation and the scores at the end use the averaged weights and the same inference path as evaluation and use.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_hpo.atomic import make_folder
from ris_hpo.errors import CheckpointError, GateError, TrainingDivergedError
from ris_hpo.learning.network import Network
from ris_hpo.physics.device import find_device
from ris_hpo.physics.scene import Scenes
from ris_hpo.scoring.k_loc import SCORE_VERSION
from ris_hpo.scoring.metrics import Scores, floor_scores, score
from ris_hpo.training import checkpoint, telemetry
from ris_hpo.training.branches import Branches
from ris_hpo.training.checkpoint import BEST, LAST, refuse_another_run
from ris_hpo.training.config import RunConfig
from ris_hpo.training.data import OwnScenes, RunData
from ris_hpo.training.finished import finish, load_network
from ris_hpo.training.learner import Learner
from ris_hpo.training.phases import PhaseEnd
from ris_hpo.training.results import Conclusion, Validation, concluded, diagnosed, found_by, found_fast
from ris_hpo.training.telemetry import Telemetry

__all__ = ["RunConfig", "Trainer", "load_network"]


class Trainer:
    """Trains one configuration in one directory; continues from its checkpoint as if it had never stopped.

    Args:
        config: everything the run depends on, but for a user's own scenes.
        directory: gets ``last.safetensors`` (whole state), ``best.safetensors`` (weights by ``k_loc``), telemetry.
        device: "cpu" or "cuda[:i]".
        resume: continue from ``last.safetensors`` where there is one; False refuses a directory that has one.
        scenes: train on these instead of simulated ones or ``data.scenes``; part of them is held out to validate and
            calibrate on.
        validation: validate on these; only with ``scenes``.
        fast: score the fast path at every validation, and choose the best weights by it.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another configuration or other scenes.
        ConfigError: scenes that cannot be trained on.
        DeviceError: the device is not there.
        OutputError: the directory cannot be made.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        *,
        device: str = "cpu",
        resume: bool = True,
        scenes: Scenes | None = None,
        validation: Scenes | None = None,
        fast: bool = False,
    ) -> None:
        self._fast = fast
        self.device = find_device(device)
        self.config = config
        self.directory = Path(directory)
        self.history: list[Validation] = []
        self.best: Validation | None = None
        self.initial: Validation | None = None
        self.failure: str | None = None
        self.scenes_seen, self.seconds, self.finished = 0, 0.0, False
        self.plan = config.plan()
        self._baseline: Scores | None = None
        self._loss_sum, self._loss_count, self._telemetry_offset = 0.0, 0, 0
        self._first_bad_term: str | None = None

        own = OwnScenes.of(config, scenes, validation)
        self.learner = Learner(config, self.device)
        self._branches = Branches(config)
        self.data = RunData(config, self.learner.network, self.device, own)
        last = self.directory / LAST
        if last.exists():
            if not resume:
                raise CheckpointError(f"{last}: already there; choose an empty directory or resume")
            tensors, state = checkpoint.read(last)
            with checkpoint.restoring(last):
                self._restore(tensors, state)
        make_folder(self.directory)

    @property
    def network(self) -> Network:
        """The network in training."""
        return self.learner.network

    @property
    def last_validation(self) -> int:
        """Scenes seen at the last validation, as far as is known: a phase may still be extended, or the run end."""
        return self.scenes_seen if self.finished or self.failure is not None else self.plan.total

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Validation]:
        """Train to the end, yielding after each validation, when its checkpoint is on disk.

        Args:
            stop: asked before every step; once true, the state is saved and the generator returns, ``finished`` False.

        Raises:
            TrainingDivergedError: a non-finite loss or gradients again and again, with the first failing term's name.
            GateError: a phase's gate failed after its extensions; raised again whenever the run is resumed.
        """
        with Telemetry(self.directory, self._telemetry_offset) as log:
            if self.initial is None:
                self._begin(log)
            while not self.finished:
                if self.failure is not None:
                    raise GateError(self.failure)
                if stop():
                    self._save(log)
                    return
                validated = self.history[-1].scenes_seen if self.history else 0
                validation = self.plan.next_validation(self.scenes_seen)
                self._step(self._branches.next_stop(self.scenes_seen, validated, validation, self.learner), log)
                if self.scenes_seen == validation > validated:  # not where a branch has been before the trunk
                    yield self._check(log)

    def validate(self) -> Validation:
        """Network-path scores of the evaluation weights on the validation set."""
        frozen, began = self.data.frozen(), time.monotonic()
        with self.learner.evaluation_weights() as network:
            scores = score(found_by(network, frozen, self.config.inference), frozen.scenes.require_truth())
            found = found_fast(network, frozen, self.config) if self._fast else None
        quick = None if found is None else score(found[0], found[1].require_truth())
        floor = None if found is None else floor_scores(found[1])
        loss = self._loss_sum / self._loss_count if self._loss_count else 0.0
        seconds = time.monotonic() - began
        return Validation(self.scenes_seen, scores, frozen.floor, loss, seconds, fast=quick, fast_floor=floor)

    def finished_network(self) -> Network:
        """The best weights as a user gets them, what is fitted after training included.

        Raises:
            CheckpointError: there are no best weights yet.
        """
        return finish(self.directory, self.device, self.data.calibration)

    def conclude(self) -> Conclusion:
        """Score the finished network on both paths.

        Raises:
            CheckpointError: there are no best weights yet.
        """
        return concluded(self.finished_network(), self.data.frozen(), self.config, fast=self._fast)

    def diagnosis(self) -> str:
        """One line on whether the run learned, and if not, why; and which phases an early end left out."""
        missing = self.plan.not_begun(self.scenes_seen) if self.finished else ()
        return diagnosed(self.learner.gate.counts(), self.initial, self.best, self._first_bad_term, missing)

    # -- between validations -----------------------------------------------------------------------------------------

    def _begin(self, log: Telemetry) -> None:
        run = {"config": self.config.fingerprint(), "device": str(self.device), "precision": self.learner.precision}
        log.write(telemetry.START, 0, **run, **self.network.parameter_counts())
        self.initial = self.validate()
        self._baseline = self.initial.network
        log.write(telemetry.VALIDATION, 0, **_flat(self.initial))
        self._save(log)

    def _step(self, boundary: int, log: Telemetry) -> None:
        """Train on the scenes of one step, none beyond ``boundary``, and record its figures."""
        began, first = time.monotonic(), self.scenes_seen
        self.scenes_seen = min(first + self.config.optimizer.scenes_per_step, boundary)
        batches, left = self.data.micro_batches(first, self.scenes_seen), self._branches.fall(self.scenes_seen)
        figures = self.learner.step(batches, self.plan, first, self.scenes_seen, left)
        if math.isfinite(figures["loss"]):
            self._loss_sum += figures["loss"]
            self._loss_count += 1
        self._first_bad_term = self._first_bad_term or _bad_term(figures)
        log.write(
            telemetry.STEP,
            self.scenes_seen,
            scenes_per_second=(self.scenes_seen - first) / max(time.monotonic() - began, 1e-9),
            memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            **figures,
        )
        self.seconds += time.monotonic() - began
        if not figures["taken"]:
            self._refuse_divergence(log)

    def _refuse_divergence(self, log: Telemetry) -> None:
        row = int(self.learner.gate.skipped_in_a_row)
        if row < self.config.optimizer.skips_allowed:
            return
        message = f"training diverged after {self.scenes_seen} scenes: {row} steps in a row skipped; {self.diagnosis()}"
        log.write(telemetry.END, self.scenes_seen, diagnosis=message)
        raise TrainingDivergedError(message)

    # -- at a validation ---------------------------------------------------------------------------------------------

    def _check(self, log: Telemetry) -> Validation:
        """Validate, keep the best weights, judge the phase or the branch that ends here, and save."""
        validation = self.validate()
        assert self._baseline is not None
        end = self.plan.end_of_phase(self.scenes_seen, self._baseline, validation.network)
        if end is not None:
            validation = dataclasses.replace(validation, verdicts=end.verdicts)
        self.history.append(validation)
        log.write(telemetry.VALIDATION, self.scenes_seen, **_flat(validation))
        self._loss_sum, self._loss_count = 0.0, 0
        if self.best is None or validation.searched[0].k_loc < self.best.searched[0].k_loc:
            self.best = validation
            self._save_best()
        if end is not None and self.config.phases:
            self._turn(end, validation, log)
        if self.failure is None:
            is_flat = _is_flat(self.history, self.best, self.config.budget.patience)
            self.finished = self.scenes_seen >= self.plan.total or (is_flat and self.plan.may_stop(self.scenes_seen))
        if self.finished or self.failure is not None:
            log.write(telemetry.END, self.scenes_seen, diagnosis=self.failure or self.diagnosis())
        else:
            self.scenes_seen = self._branches.rejoin(self.scenes_seen, self.learner)
        self._save(log)
        return validation

    def _turn(self, end: PhaseEnd, validation: Validation, log: Telemetry) -> None:
        """Go on as the end of a phase says: to the next one, longer in this one, or no further."""
        for verdict in end.verdicts:
            values = {**dataclasses.asdict(verdict), "passed": verdict.passed}
            log.write(telemetry.GATE, self.scenes_seen, **values)
        if end.outcome == "failed":
            self.failure = end.failure()
        elif end.outcome == "extended":
            self.plan = end.plan
            self.learner.extend(self.plan)
        else:
            log.write(telemetry.PHASE, self.scenes_seen, phase=end.phase, extensions=end.extensions)
            self._baseline = validation.network

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, log: Telemetry) -> None:
        self._telemetry_offset = log.offset()
        state = self._origin() | {
            "precision": self.learner.precision,
            "finished": self.finished,
            "failure": self.failure,
            "extensions": list(self.plan.extensions),
            "phase_baseline": self._baseline.as_dict() if self._baseline else None,
            "history": [validation.as_dict() for validation in self.history],
            "initial": self.initial.as_dict() if self.initial else None,
            "seconds": self.seconds,
            "loss": [self._loss_sum, self._loss_count],
            "first_bad_term": self._first_bad_term,
            "telemetry_offset": self._telemetry_offset,
            "trunk": self._branches.start,
        }
        checkpoint.write(self.directory / LAST, self.learner.state() | self._branches.state(), state)

    def _save_best(self) -> None:
        assert self.best is not None
        state = self._origin() | {"validation": self.best.as_dict()}
        checkpoint.write(self.directory / BEST, self.learner.best_weights(), state)

    def _origin(self) -> dict[str, Any]:
        """What every checkpoint says of where it comes from."""
        return {
            "config": self.config.stored(),
            "fingerprint": self.config.fingerprint(),
            "data": self.data.fingerprint,
            "score_version": SCORE_VERSION,
            "torch": torch.__version__,
            "scenes_seen": self.scenes_seen,
        }

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        refuse_another_run(self.directory / LAST, state, self.config, self.data.fingerprint)
        self.learner.restore(tensors)
        self._branches.restore(tensors, state.get("trunk"))  # earlier versions had none
        self.scenes_seen, self.finished, self.failure = state["scenes_seen"], state["finished"], state["failure"]
        self.plan = dataclasses.replace(self.plan, extensions=tuple(state["extensions"]))
        self.learner.extend(self.plan)
        baseline = state["phase_baseline"]
        self._baseline = Scores.from_dict(baseline) if baseline else None
        self.history = [Validation.from_dict(values) for values in state["history"]]
        self.best = min(self.history, key=lambda validation: validation.searched[0].k_loc, default=None)
        self.initial = Validation.from_dict(state["initial"]) if state["initial"] else None
        self._loss_sum, self._loss_count = state["loss"]
        self.seconds, self._telemetry_offset = state["seconds"], state["telemetry_offset"]
        self._first_bad_term = state["first_bad_term"]


def _bad_term(figures: dict[str, Any]) -> str | None:
    """The first loss term of a step that is not finite."""
    bad = (name for name, value in figures.items() if name.startswith("raw_") and not math.isfinite(value))
    return next((name.removeprefix("raw_") for name in bad), None)


def _flat(validation: Validation) -> dict[str, Any]:
    figures: dict[str, Any] = dict(validation.network.as_dict())
    return figures | {"floor_k_loc": validation.floor.k_loc, "loss": validation.loss, "seconds": validation.seconds}


def _is_flat(history: Sequence[Validation], best: Validation | None, patience: int) -> bool:
    """Whether the last ``patience`` validations brought no better ``k_loc``; never with 0."""
    if patience == 0 or best is None:
        return False
    return sum(validation.scenes_seen > best.scenes_seen for validation in history) >= patience
