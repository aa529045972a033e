"""What learns: the network, the balance of its losses, the gate before the optimiser, and the averaged weights.

One step, in this order: for every micro-batch forward -> loss terms -> backward; then unscale once -> clip -> gate ->
step -> loss scale -> learning rate (a function of the steps taken) -> movement -> averages. Its figures, the finite
check of every term among them, are read from the device at once at its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ris_hpo.errors import TrainingDivergedError
from ris_hpo.learning.hybrid import covariances
from ris_hpo.learning.losses import TERMS, LossSpec, loss_terms
from ris_hpo.learning.network import Network, Outputs
from ris_hpo.training.balance import Balance
from ris_hpo.training.config import PhaseSpec, RunConfig
from ris_hpo.training.data import MicroBatch
from ris_hpo.training.phases import PhasePlan
from ris_hpo.training.stability import AveragedWeights, StepGate, Swapped, autocast, movement, resolved_precision


@dataclass(frozen=True)
class _Place:
    """Where in the run a step is taken: phase, its loss weights, share of it that is done, scenes of the whole run."""

    phase: PhaseSpec
    loss: LossSpec
    progress: float
    total: int


class Learner:
    """A network with everything that a step moves; made from the configuration's seed.

    Args:
        config: of the run.
        device: where it is trained.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.precision = resolved_precision(config.optimizer, device)
        torch.manual_seed(config.seed)
        self.network = Network(config.network).to(device)
        self.balance = Balance(config.balance, TERMS).to(device)
        learned = [p for p in self.balance.parameters() if p.requires_grad]
        plan, spec = config.plan(), config.optimizer
        ends = config.branch_ends()
        warm_over = dataclasses.replace(plan, budget=ends[0]).steps(spec.scenes_per_step) if ends else None
        steps = plan.steps(spec.scenes_per_step)
        self.gate = StepGate(self.network, spec, steps, learned, warm_over=warm_over).to(device)
        self.averaged = AveragedWeights(self.network, spec).to(device)
        self._losses = [config.phase_loss(phase) for phase in plan.phases]

    def step(
        self, batches: Iterable[MicroBatch], plan: PhasePlan, first: int, last: int, left: float = 1.0
    ) -> dict[str, Any]:
        """Take one step, or skip it where the gradient is not fit for one.

        Args:
            batches: their shares add up to 1; drawn one at a time, so that one is in memory at once.
            plan: of the run.
            first: scenes seen before the step.
            last: scenes seen after it.
            left: share of a decaying branch that is left, see ``StepGate.rate``.

        Returns:
            Figures by name: ``loss``, ``taken``, ``movement``, ``scale``, ``rate_*`` and ``gradient_norm_*`` by group,
            ``raw_*`` and ``weighted_*`` by loss term, means over the step's scenes.

        Raises:
            TrainingDivergedError: a loss term depends on no parameter.
        """
        index = plan.index(first)
        place = _Place(plan.phases[index], self._losses[index], plan.progress(first), plan.total)
        self.network.train()
        self.gate.optimizer.zero_grad(set_to_none=True)
        raw: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        for batch in batches:
            terms = self._terms(batch, place)
            parts = self._backward(terms, batch.share, place)
            for sums, values in ((raw, terms), (weighted, parts)):
                for name, value in values.items():  # a term that is not finite stays so in its sum
                    sums[name] = sums.get(name, 0) + batch.share * value.detach()
        taken, moved = self._move(place.phase.backbone_rate, last / plan.total, left)
        return self._read(raw, weighted, taken, moved)

    def extend(self, plan: PhasePlan) -> None:
        """Let the learning rate fall until the end of an extended plan."""
        self.gate.extend(plan.steps(self.config.optimizer.scenes_per_step))

    def evaluation_weights(self) -> Swapped:
        """Context in which the network holds the averaged weights and is in evaluation mode."""
        return Swapped(self.network, self.averaged.state(self.network))

    def best_weights(self) -> dict[str, Tensor]:
        """The network's state with the averaged weights in it."""
        return self.network.state_dict() | self.averaged.state(self.network)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, random state included."""
        tensors: dict[str, Tensor] = {}
        for prefix, part in self._parts().items():
            tensors |= {f"{prefix}.{name}": value for name, value in part.state_dict().items()}
        for index, slot in self.gate.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slot.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up a :meth:`state`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        for prefix, module in self._parts().items():
            module.load_state_dict(part(f"{prefix}."))
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

    def _parts(self) -> dict[str, torch.nn.Module]:
        return {"network": self.network, "gate": self.gate, "averaged": self.averaged, "balance": self.balance}

    def _terms(self, batch: MicroBatch, place: _Place) -> dict[str, Tensor]:
        """Forward pass and raw loss terms."""
        with autocast(self.precision, self.device):
            outputs: Outputs = self.network(*batch.features)
        beta = self._beta(batch.scenes_seen, place)
        mixed = covariances(outputs, batch.scenes, self.config.inference.hybrid, beta)
        terms = loss_terms(
            place.loss,
            self.network,
            outputs,
            mixed,
            batch.scenes,
            may_be_empty=self.config.scene.num_sources[0] == 0,
        )
        detached = [name for name, value in terms.items() if not value.requires_grad]
        if detached:
            raise TrainingDivergedError(f"loss term '{detached[0]}' depends on no parameter: it was detached")
        return terms

    def _beta(self, scenes_seen: int, place: _Place) -> float:
        """Share of the sample covariance in R_eff: ramped over the run, jittered, within 0..0.9."""
        hybrid = self.config.inference.hybrid
        beta = hybrid.beta if place.phase.beta is None else place.phase.beta
        if beta == 0:
            return 0.0
        ramp = hybrid.beta_ramp * place.total
        beta *= min(1.0, scenes_seen / ramp) if ramp > 0 else 1.0
        if hybrid.beta_jitter:
            beta += hybrid.beta_jitter * (2 * float(torch.rand(())) - 1)
        return min(max(beta, 0.0), 0.9)

    def _backward(self, terms: dict[str, Tensor], share: float, place: _Place) -> dict[str, Tensor]:
        """Add a micro-batch's gradient; returns its weighted terms."""
        weighted = self.balance.weighted(terms, place.loss, place.phase, place.progress)
        total = torch.stack(list(weighted.values())).sum()
        loss = (total + self.balance.regulariser(terms)) * share
        self.balance.follow_gradients(terms, place.loss, self.network.backbone.last_shared_weight, share)
        (loss * self.gate.scale).backward()
        return weighted

    def _move(self, backbone_rate: float, spent: float, left: float) -> tuple[Tensor, Tensor]:
        """Take the optimiser's step with ``spent`` of the run behind it; returns whether, and how far it moved."""
        before = [p.detach().clone() for p in self.network.parameters()]
        taken = self.gate.step(backbone_rate, left)
        moved = movement(before, (p.detach() for p in self.network.parameters()))
        self.balance.move()
        self.averaged.update(self.network, taken, spent)
        return taken, moved

    def _read(
        self, raw: dict[str, Tensor], weighted: dict[str, Tensor], taken: Tensor, moved: Tensor
    ) -> dict[str, Any]:
        """Figures of a step, the only time that it waits for the device of itself."""
        loss = torch.stack(list(weighted.values())).sum()
        figures = {"loss": loss, "taken": taken, "movement": moved, "scale": self.gate.scale}
        figures |= {f"rate_{name}": rate for name, rate in self.gate.rates().items()}
        figures |= {f"gradient_norm_{name}": norm for name, norm in self.gate.norms().items()}
        figures |= {f"raw_{name}": value for name, value in raw.items()}
        figures |= {f"weighted_{name}": value for name, value in weighted.items()}
        values = torch.stack([value.double() for value in figures.values()]).tolist()
        read: dict[str, Any] = dict(zip(figures, values, strict=True))
        return read | {"taken": bool(read["taken"])}
