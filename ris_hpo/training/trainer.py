"""The training loop.

One step, in this order: forward -> loss terms -> finite check by term -> backward (for every micro-batch) -> unscale
once -> clip -> gate -> step -> loss scale -> learning rate (a function of the steps taken) -> movement -> averages.
All its figures, the finite check's among them, are read from the device at once at its end. Validation uses the same
inference path as evaluation and use, with the averaged weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_hpo.atomic import make_folder
from ris_hpo.errors import CheckpointError, ConfigError, GateError, TrainingDivergedError
from ris_hpo.learning.calibration import fit_count_mixing
from ris_hpo.learning.features import Features
from ris_hpo.learning.hybrid import covariances
from ris_hpo.learning.inference import localize, network_sources
from ris_hpo.learning.losses import TERMS, LossSpec, label_factor, loss_terms, nmse
from ris_hpo.learning.network import Network, Outputs
from ris_hpo.physics.device import find_device
from ris_hpo.physics.scene import Scenes, simulate
from ris_hpo.scoring.k_loc import SCORE_VERSION
from ris_hpo.scoring.metrics import Scores, floor_scores, score
from ris_hpo.training import checkpoint, telemetry
from ris_hpo.training.balance import Balance
from ris_hpo.training.checkpoint import BEST, LAST, load_network
from ris_hpo.training.config import CALIBRATION_SEED, PhaseSpec, RunConfig
from ris_hpo.training.results import Conclusion, Findings, Validation
from ris_hpo.training.stability import AveragedWeights, StepGate, Swapped, autocast, movement, resolved_precision
from ris_hpo.training.telemetry import Telemetry

__all__ = ["RunConfig", "Trainer", "load_network"]

TRAINING_FAMILY = 1 << 40  # training seeds are this far from those of validation and test scenes
CACHE_BYTES = 4 << 30  # a fixed set of scenes whose features fit in here is kept on the device


class Trainer:
    """Trains one configuration in one directory; continues from its checkpoint as if nothing had happened.

    Args:
        config: everything the run depends on.
        directory: gets ``last.safetensors`` (whole state), ``best.safetensors`` (weights by ``k_loc``), telemetry.
        device: "cpu" or "cuda[:i]".
        resume: continue from ``last.safetensors`` where there is one; False refuses a directory that has one.
        scenes: train on these instead of simulated ones.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another configuration.
        ConfigError: there is no scene among ``scenes``, or no truth with them.
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
    ) -> None:
        self.device = find_device(device)
        self.config = config
        self.directory = Path(directory)
        self.history: list[Validation] = []
        self.best: Validation | None = None
        self.initial: Validation | None = None
        self.scenes_seen = 0
        self.finished = False
        self.phase_index = 0
        self.phase_start = 0
        self.phase_extensions = 0
        self.phase_baseline: Scores | None = None
        self.seconds = 0.0
        self._loss_sum, self._loss_count = 0.0, 0
        self._telemetry_offset = 0
        self._first_bad_term: str | None = None

        self.precision = resolved_precision(config.optimizer, self.device)
        torch.manual_seed(config.seed)
        self.network = Network(config.network).to(self.device)
        self.balance = Balance(config.balance, list(TERMS)).to(self.device)
        learned = [p for p in self.balance.parameters() if p.requires_grad]
        self.gate = StepGate(self.network, config.optimizer, self._planned_steps(), learned).to(self.device)
        self.averaged = AveragedWeights(self.network, config.optimizer).to(self.device)
        self._dataset = self._make_dataset(scenes)
        self._features: Features | None = None
        self._order, self._order_epoch = torch.empty(0, dtype=torch.int64), -1
        self._validation: tuple[Scenes, list[Features], Scores] | None = None

        last = self.directory / LAST
        if last.exists():
            if not resume:
                raise CheckpointError(f"{last}: already there; choose an empty directory or resume")
            with checkpoint.restoring(last):
                self._restore(*checkpoint.read(last))
        make_folder(self.directory)

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Validation]:
        """Train to the end, yielding after each validation, its checkpoint on disk by then.

        Args:
            stop: asked before every step; once true, the state is saved and the generator returns, ``finished`` False.

        Raises:
            TrainingDivergedError: a non-finite loss or gradients again and again, with the first failing term's name.
            GateError: a phase's gate failed after its extensions.
        """
        budget = self.config.budget
        with Telemetry(self.directory, self._telemetry_offset) as log:
            if self.scenes_seen == 0 and self.initial is None:
                counts = self.network.parameter_counts()
                log.write(
                    telemetry.START,
                    0,
                    config=self.config.fingerprint(),
                    device=str(self.device),
                    precision=self.precision,
                    **counts,
                )
                self.initial = self.validate()
                self.phase_baseline = self.initial.network
                log.write(telemetry.VALIDATION, 0, **_flat(self.initial))
                self._save(log)
            while not self.finished:
                if stop():
                    self._save(log)
                    return
                began = time.monotonic()
                self._step(log)
                self.seconds += time.monotonic() - began
                if self.scenes_seen % budget.validate_every and self.scenes_seen < self._total_scenes():
                    continue
                validation = self.validate()
                self.history.append(validation)
                log.write(telemetry.VALIDATION, self.scenes_seen, **_flat(validation))
                self._loss_sum, self._loss_count = 0.0, 0
                if self.best is None or validation.network.k_loc < self.best.network.k_loc:
                    self.best = validation
                    self._save_best()
                self._turn_phase(validation, log)
                self.finished = self.scenes_seen >= self._total_scenes() or self._flat_for(budget.patience)
                if self.finished:
                    log.write(telemetry.END, self.scenes_seen, diagnosis=self.diagnosis())
                self._save(log)
                yield validation

    def validate(self) -> Validation:
        """Network-path scores of the evaluation weights on the frozen set."""
        scenes, features, floor = self._frozen()
        began = time.monotonic()
        with self.evaluation_weights() as network, torch.no_grad():
            parts = [network_sources(network(*part), self.config.inference) for part in features]
            found = parts[0].cat(parts)
        loss = self._loss_sum / self._loss_count if self._loss_count else 0.0
        return Validation(self.scenes_seen, score(found, scenes.require_truth()), floor, loss, time.monotonic() - began)

    def conclude(self) -> Conclusion:
        """Score the best weights on both paths; the count head ``evidence`` is fitted first.

        Raises:
            CheckpointError: there are no best weights yet.
        """
        network = self._calibrated()
        scenes, features, floor = self._frozen()
        inference = self.config.inference
        with torch.no_grad():
            parts = [network_sources(network(*part), inference) for part in features]
        found = parts[0].cat(parts)
        scores, counts = score(found, scenes.require_truth()), network.parameter_counts()
        count = min(self.config.budget.pipeline_scenes, len(scenes))
        if count == 0:
            return Conclusion(scores, floor, scores, floor, counts, Findings(scenes, found, found[:0]))
        few = scenes[:count]
        refined = localize(network, few, inference)
        pipeline, findings = score(refined, few.require_truth()), Findings(scenes, found, refined)
        return Conclusion(scores, floor, pipeline, floor_scores(few), counts, findings)

    def _calibrated(self) -> Network:
        """The best weights; what is fitted to them is written into their file, once."""
        network, config = load_network(self.directory, device=str(self.device))
        if config.network.count_head != "evidence":
            return network
        tensors, state = checkpoint.read(self.directory / BEST)
        if "count_mixing_nats" not in state:
            count = range(config.budget.calibration_scenes)
            scenes = simulate(config.scene, CALIBRATION_SEED, count, device=self.device)
            nats = fit_count_mixing(network, scenes, config.inference)
            buffers = dict(network.named_buffers())
            fitted = {name: buffers.get(name, tensor) for name, tensor in tensors.items()}
            checkpoint.write(self.directory / BEST, fitted, {**state, "count_mixing_nats": nats})
        return network

    @torch.no_grad()
    def covariance_nmse(self) -> float:
        """Mean NMSE of R_pred on the frozen set with the evaluation weights; what phase 0 is judged by."""
        scenes, features, _ = self._frozen()
        geometry, total = self.config.scene.geometry, 0.0
        with self.evaluation_weights() as network:
            for start, part in zip(range(0, len(scenes), 64), features, strict=True):
                few = scenes[start : start + 64]
                label = label_factor(few.require_truth(), geometry)
                predicted = covariances(network(*part), few, self.config.inference.hybrid, 0.0).predicted
                total += float(nmse(predicted, label @ label.mH).sum())
        return total / len(scenes)

    def evaluation_weights(self) -> Swapped:
        """Context in which the network holds the averaged weights and is in evaluation mode."""
        return Swapped(self.network, self.averaged.state(self.network))

    def diagnosis(self) -> str:
        """One line on whether the run learned, and if not, why."""
        gate = self.gate
        taken = int(gate.steps_taken)
        not_finite, vanishing = int(gate.skipped_not_finite), int(gate.skipped_vanishing)
        total = taken + not_finite + vanishing
        cause = f", first non-finite term: {self._first_bad_term}" if self._first_bad_term else ""
        if taken == 0:
            return f"no step was taken: {total - taken} of {total} skipped{cause}"
        if self.initial is not None and self.best is not None:
            gained = self.initial.network.k_loc - self.best.network.k_loc
            if gained <= 0:
                return (
                    f"k_loc never fell below its start ({self.initial.network.k_loc:.3f}); {taken} steps taken{cause}"
                )
            skipped = f", {total - taken} of {total} steps skipped{cause}" if total > taken else ""
            return f"k_loc fell by {gained:.3f} in {taken} steps{skipped}"
        return f"{taken} of {total} steps taken{cause}"

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self, log: Telemetry) -> None:
        spec, phase, loss_spec = self.config.optimizer, self._phase(), self._loss()
        boundary = self._next_boundary()
        began, first = time.monotonic(), self.scenes_seen
        micro = min(spec.batch_size, boundary - self.scenes_seen)
        passes = min(spec.accumulate, math.ceil((boundary - self.scenes_seen) / micro))
        self.network.train()
        self.gate.optimizer.zero_grad(set_to_none=True)
        progress = self._phase_progress()
        sums: dict[str, Tensor] = {}
        weighted_sums: Tensor | None = None
        total_scenes = min(micro * passes, boundary - first)
        for _ in range(passes):
            size = min(micro, boundary - self.scenes_seen)
            scenes, features = self._batch(self.scenes_seen, size)
            terms = self._terms(scenes, features, loss_spec, phase)
            detached = [name for name, value in terms.items() if not value.requires_grad]
            if detached:
                raise TrainingDivergedError(f"loss term '{detached[0]}' depends on no parameter: it was detached")
            weighted = self.balance.weighted(terms, loss_spec, phase, progress)
            share = size / total_scenes
            for name, value in terms.items():  # a term that is not finite stays so in its sum
                sums[name] = sums.get(name, torch.zeros_like(value.detach())) + share * value.detach()
            loss = (weighted.sum() + self.balance.regulariser(terms)) * share
            self.balance.follow_gradients(terms, loss_spec, self._shared_parameter())
            (loss * self.gate.scale).backward()
            part = share * weighted.detach()
            weighted_sums = part if weighted_sums is None else weighted_sums + part
            self.scenes_seen += size
        assert weighted_sums is not None
        before = [p.detach().clone() for p in self.network.parameters()]
        taken = self.gate.step(phase.backbone_rate if phase else 1.0)
        moved = movement(before, (p.detach() for p in self.network.parameters()))
        self.averaged.update(self.network, taken, self.scenes_seen / self._total_scenes())
        groups = {group["name"]: group["lr"] for group in self.gate.optimizer.param_groups}
        figures = {"loss": weighted_sums.sum(), "taken": taken, "movement": moved, "scale": self.gate.scale}
        figures |= {f"rate_{name}": rate for name, rate in groups.items()}
        figures |= {f"gradient_norm_{name}": norm for name, norm in zip(groups, self.gate.gradient_norms, strict=True)}
        figures |= {f"raw_{name}": value for name, value in sums.items()}
        figures |= {f"weighted_{name}": value for name, value in zip(sums, weighted_sums, strict=True)}
        # the only time that a step waits for the device of itself
        told: dict[str, Any] = dict(
            zip(figures, torch.stack([value.double() for value in figures.values()]).tolist(), strict=True)
        )
        told["taken"] = bool(told["taken"])
        if math.isfinite(told["loss"]):
            self._loss_sum += told["loss"]
            self._loss_count += 1
        if self._first_bad_term is None:
            self._first_bad_term = next((name for name in sums if not math.isfinite(told[f"raw_{name}"])), None)
        log.write(
            telemetry.STEP,
            self.scenes_seen,
            scenes_per_second=total_scenes / max(time.monotonic() - began, 1e-9),
            memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            **told,
        )
        if not told["taken"]:
            self._refuse_divergence(log)

    def _terms(self, scenes: Scenes, features: Features, loss: LossSpec, phase: PhaseSpec | None) -> dict[str, Tensor]:
        """Forward pass and raw loss terms."""
        with autocast(self.precision, self.device):
            outputs: Outputs = self.network(*features)
        mixed = covariances(outputs, scenes, self.config.inference.hybrid, self._beta(phase))
        return loss_terms(loss, self.network, outputs, mixed, scenes)

    def _beta(self, phase: PhaseSpec | None) -> float:
        hybrid = self.config.inference.hybrid
        beta = hybrid.beta if phase is None or phase.beta is None else phase.beta
        if beta == 0:
            return 0.0
        ramp = hybrid.beta_ramp * self._total_scenes()
        beta *= min(1.0, self.scenes_seen / ramp) if ramp > 0 else 1.0
        if hybrid.beta_jitter:
            beta += hybrid.beta_jitter * (2 * float(torch.rand(())) - 1)
        return min(max(beta, 0.0), 0.9)

    def _refuse_divergence(self, log: Telemetry) -> None:
        row = int(self.gate.skipped_in_a_row)
        if row < self.config.optimizer.skips_allowed:
            return
        message = f"training diverged after {self.scenes_seen} scenes: {row} steps in a row skipped; {self.diagnosis()}"
        log.write(telemetry.END, self.scenes_seen, diagnosis=message)
        raise TrainingDivergedError(message)

    def _shared_parameter(self) -> Tensor:
        return list(self.network.backbone.parameters())[-2]

    # -- data --------------------------------------------------------------------------------------------------------

    def _make_dataset(self, scenes: Scenes | None) -> Scenes | None:
        if scenes is not None:
            if len(scenes.require_truth()) == 0:
                raise ConfigError("no scenes to train on")
            return scenes.single().to(self.device)
        if self.config.budget.fixed_scenes:
            return self._simulated(0, self.config.budget.fixed_scenes)
        return None

    def _simulated(self, start: int, count: int) -> Scenes:
        return training_scenes(self.config, range(start, start + count), self.device)

    def _batch(self, start: int, size: int) -> tuple[Scenes, Features]:
        """Scenes ``start`` .. ``start + size`` of the run: drawn afresh, or from the fixed set in shuffled epochs."""
        if self._dataset is None:
            scenes = self._simulated(start, size)
            return scenes, self.network.features(scenes)
        count = len(self._dataset)
        order = []
        for position in range(start, start + size):
            epoch, place = divmod(position, count)
            order.append(int(self._shuffled(epoch)[place]))
        index = torch.tensor(order, device=self.device)
        scenes = self._dataset[index]
        if self._features is None:
            numbers = sum(field.numel() for field in self.network.features(scenes[:1]))
            if numbers * 4 * count >= CACHE_BYTES:
                return scenes, self.network.features(scenes)
            parts = [self.network.features(self._dataset[i : i + 64]) for i in range(0, count, 64)]
            self._features = Features(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        return scenes, Features(*(field[index] for field in self._features))

    def _shuffled(self, epoch: int) -> Tensor:
        if self._order_epoch != epoch:
            generator = torch.Generator().manual_seed(((self.config.seed << 20) + epoch) % (1 << 64))
            assert self._dataset is not None
            self._order, self._order_epoch = torch.randperm(len(self._dataset), generator=generator), epoch
        return self._order

    def _frozen(self) -> tuple[Scenes, list[Features], Scores]:
        """The validation set with its features and floor, made once."""
        if self._validation is None:
            budget = self.config.budget
            if budget.fixed_scenes and self._dataset is not None:
                scenes = self._dataset  # phase 0: train = validation
            else:
                count = range(budget.validation_scenes)
                scenes = simulate(self.config.scene, budget.validation_seed, count, device=self.device)
            features = [self.network.features(scenes[i : i + 64]) for i in range(0, len(scenes), 64)]
            self._validation = scenes, features, floor_scores(scenes)
        return self._validation

    # -- phases ------------------------------------------------------------------------------------------------------

    def _phase(self) -> PhaseSpec | None:
        return self.config.phases[self.phase_index] if self.config.phases else None

    def _loss(self) -> LossSpec:
        phase = self._phase()
        if phase is None:
            return self.config.loss
        ramped = dict.fromkeys(phase.ramp, 1.0)  # computed at all; the balance scales them
        return self.config.loss.replaced({**phase.loss, **ramped})

    def _phase_scenes(self) -> int:
        """Length of the current phase with its extensions, a whole number of validations."""
        phase, budget = self._phase(), self.config.budget
        if phase is None:
            return budget.scenes
        length = phase.share * budget.scenes * (1 + 0.25 * self.phase_extensions)
        return max(1, round(length / budget.validate_every)) * budget.validate_every

    def _phase_progress(self) -> float:
        return min(1.0, (self.scenes_seen - self.phase_start) / self._phase_scenes())

    def _total_scenes(self) -> int:
        if not self.config.phases:
            return self.config.budget.scenes
        every, budget = self.config.budget.validate_every, self.config.budget.scenes
        rest = sum(max(1, round(p.share * budget / every)) * every for p in self.config.phases[self.phase_index + 1 :])
        return self.phase_start + self._phase_scenes() + rest

    def _next_boundary(self) -> int:
        every = self.config.budget.validate_every
        return min((self.scenes_seen // every + 1) * every, self._total_scenes())

    def _planned_steps(self) -> int:
        budget, spec = self.config.budget, self.config.optimizer
        per_step = spec.batch_size * spec.accumulate
        whole, rest = divmod(budget.scenes, budget.validate_every)
        return whole * math.ceil(budget.validate_every / per_step) + math.ceil(rest / per_step)

    def _turn_phase(self, validation: Validation, log: Telemetry) -> None:
        phase = self._phase()
        if phase is None or self.scenes_seen < self.phase_start + self._phase_scenes():
            return
        assert self.phase_baseline is not None
        failed = []
        for gate in phase.gates:
            before = getattr(self.phase_baseline, gate.metric)
            after = getattr(validation.network, gate.metric)
            gained = after - before if gate.direction == "up" else before - after
            passed = gained >= gate.margin
            log.write(
                telemetry.GATE,
                self.scenes_seen,
                phase=phase.name,
                metric=gate.metric,
                direction=gate.direction,
                before=before,
                after=after,
                margin=gate.margin,
                passed=passed,
            )
            if not passed:
                failed.append(
                    f"{gate.metric} should go {gate.direction} by {gate.margin:g}: {before:.4f} -> {after:.4f}"
                )
        if failed and self.phase_extensions < phase.patience:
            self.phase_extensions += 1
            return
        if failed:
            self._save(log)
            raise GateError(f"phase '{phase.name}' failed its gate: {'; '.join(failed)}")
        log.write(telemetry.PHASE, self.scenes_seen, phase=phase.name, extensions=self.phase_extensions)
        if self.phase_index + 1 < len(self.config.phases):
            self.phase_start += self._phase_scenes()
            self.phase_index += 1
            self.phase_extensions = 0
            self.phase_baseline = validation.network

    def _flat_for(self, patience: int) -> bool:
        if patience == 0 or self.best is None:
            return False
        since = [v for v in self.history if v.scenes_seen > self.best.scenes_seen]
        return len(since) >= patience

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, log: Telemetry) -> None:
        self._telemetry_offset = log.offset()
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"gate.{name}": value for name, value in self.gate.state_dict().items()}
        tensors |= {f"averaged.{name}": value for name, value in self.averaged.state_dict().items()}
        tensors |= {f"balance.{name}": value for name, value in self.balance.state_dict().items()}
        for index, slot in self.gate.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slot.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        baseline = self.phase_baseline
        state = self._origin() | {
            "precision": self.precision,
            "finished": self.finished,
            "phase_index": self.phase_index,
            "phase_start": self.phase_start,
            "phase_extensions": self.phase_extensions,
            "phase_baseline": baseline.as_dict() if baseline else None,
            "history": [v.as_dict() for v in self.history],
            "initial": self.initial.as_dict() if self.initial else None,
            "seconds": self.seconds,
            "loss": [self._loss_sum, self._loss_count],
            "first_bad_term": self._first_bad_term,
            "telemetry_offset": self._telemetry_offset,
        }
        checkpoint.write(self.directory / LAST, tensors, state)

    def _save_best(self) -> None:
        assert self.best is not None
        state = self._origin() | {"validation": self.best.as_dict()}
        tensors = self.network.state_dict() | self.averaged.state(self.network)
        checkpoint.write(self.directory / BEST, tensors, state)

    def _origin(self) -> dict[str, Any]:
        """What every checkpoint says of where it comes from."""
        return {
            "config": self.config.stored(),
            "fingerprint": self.config.fingerprint(),
            "score_version": SCORE_VERSION,
            "torch": torch.__version__,
            "scenes_seen": self.scenes_seen,
        }

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        made_for = RunConfig.from_stored(state["config"], str(self.directory / LAST))
        if made_for != self.config:
            raise CheckpointError(
                f"{self.directory / LAST}: belongs to configuration {made_for.fingerprint()}, "
                f"not {self.config.fingerprint()}; use another directory"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        self.gate.load_state_dict(part("gate."))
        self.averaged.load_state_dict(part("averaged."))
        self.balance.load_state_dict(part("balance."))
        optimizer = self.gate.optimizer.state_dict()
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, field = name.split(".", 1)
            slots.setdefault(int(index), {})[field] = value
        optimizer["state"] = slots
        self.gate.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        for name in ("scenes_seen", "finished", "phase_index", "phase_start", "phase_extensions", "seconds"):
            setattr(self, name, state[name])
        self.phase_baseline = Scores.from_dict(state["phase_baseline"]) if state["phase_baseline"] else None
        self.history = [Validation.from_dict(values) for values in state["history"]]
        self.initial = Validation.from_dict(state["initial"]) if state["initial"] else None
        self._loss_sum, self._loss_count = state["loss"]
        self._first_bad_term = state["first_bad_term"]
        self._telemetry_offset = state["telemetry_offset"]
        self.best = min(self.history, key=lambda v: v.network.k_loc, default=None)


def training_scenes(config: RunConfig, index: range, device: torch.device | str = "cpu") -> Scenes:
    """Scenes of a run by their index; their seeds are far from those of validation and test scenes."""
    return simulate(config.scene, TRAINING_FAMILY + config.seed, index, device=device)


def _flat(validation: Validation) -> dict[str, Any]:
    figures: dict[str, Any] = dict(validation.network.as_dict())
    return figures | {"floor_k_loc": validation.floor.k_loc, "loss": validation.loss, "seconds": validation.seconds}
