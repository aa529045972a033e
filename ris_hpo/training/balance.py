"""Weighing loss terms against each other: fixed, by learned uncertainty, or by gradient norms; and ramps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ris_hpo.learning.losses import LossSpec
from ris_hpo.training.config import BalanceSpec, PhaseSpec

ANCHORS = ("covariance", "covariance_pred")  # the covariance term keeps its weight; the others move around it


class Balance(nn.Module):
    """Weights of the loss terms during training.

    ``uncertainty``: exp(-s_i) L_i + s_i with learned s_i (Kendall, Gal and Cipolla, CVPR 2018), s = 0 for the anchor.
    ``gradnorm``: weights follow the gradients' norms on the last shared layer, pulled together by relative training
    rate (Chen et al., ICML 2018); the anchor's weight is kept.
    """

    task_weight: Tensor
    first_loss: Tensor
    movable: Tensor

    def __init__(self, spec: BalanceSpec, terms: list[str]) -> None:
        super().__init__()
        self.spec = spec
        self.terms = terms
        self.log_variance = nn.Parameter(torch.zeros(len(terms)), requires_grad=spec.kind == "uncertainty")
        self.register_buffer("task_weight", torch.ones(len(terms)))
        self.register_buffer("first_loss", torch.zeros(len(terms)))
        movable = torch.tensor([name not in ANCHORS for name in terms])
        self.register_buffer("movable", movable.float(), persistent=False)

    def weighted(self, values: dict[str, Tensor], loss: LossSpec, phase: PhaseSpec | None, progress: float) -> Tensor:
        """Weighted terms stacked in the order of ``values``; their sum (plus :meth:`regulariser`) is the loss.

        A ramped term is scaled so that it contributes ``ramp_share`` of the total at the phase's end.
        """
        names = list(values)
        weighted = {name: getattr(loss, name) * values[name] for name in names}
        if self.spec.kind != "fixed":
            for name in names:
                place = self.terms.index(name)
                if self.spec.kind == "uncertainty":
                    factor = torch.exp(-self.log_variance[place] * self.movable[place])
                else:
                    factor = self.task_weight[place].clone()  # moved in place before backward
                weighted[name] = factor * weighted[name]
        ramped = [name for name in names if phase is not None and name in phase.ramp]
        if ramped and phase is not None:
            steady = torch.stack([weighted[n].detach() for n in names if n not in ramped]).sum().clamp(min=1e-12)
            share = phase.ramp_share / (1 - phase.ramp_share * len(ramped))
            for name in ramped:
                scale = progress * share * steady / values[name].detach().abs().clamp(min=1e-12)
                weighted[name] = scale * values[name]
        return torch.stack([weighted[name] for name in names])

    def regulariser(self, values: dict[str, Tensor]) -> Tensor:
        """Sum of s_i over the terms at work, which keeps them from running away; 0 for the other kinds."""
        if self.spec.kind != "uncertainty":
            return self.log_variance.detach().sum() * 0
        places = [self.terms.index(name) for name in values]
        return (self.log_variance * self.movable)[places].sum()

    def follow_gradients(self, values: dict[str, Tensor], loss: LossSpec, shared: Tensor) -> None:
        """One step of gradnorm on the gradients of the weighted terms at ``shared``; keeps the graph for backward."""
        if self.spec.kind != "gradnorm":
            return
        order = [self.terms.index(name) for name in values]
        places = torch.tensor(order, device=shared.device)
        norms = []
        for place, (name, value) in zip(order, values.items(), strict=True):
            gradient = torch.autograd.grad(value, shared, retain_graph=True, allow_unused=True)[0]
            size = value.detach() * 0 if gradient is None else gradient.norm()
            norms.append(size * getattr(loss, name) * self.task_weight[place])
        norm = torch.stack(norms).detach()
        current = torch.stack([value.detach() for value in values.values()])
        fresh = (self.first_loss[places] == 0) & current.isfinite()
        self.first_loss[places] = torch.where(fresh, current, self.first_loss[places])
        pace = current / self.first_loss[places].clamp(min=1e-12)
        target = norm.mean() * (pace / pace.mean().clamp(min=1e-12)) ** self.spec.asymmetry
        pull = torch.sign(target - norm) * self.spec.rate * self.movable[places]
        moved = (self.task_weight[places] * torch.exp(pull)).clamp(0.05, 20.0)
        self.task_weight[places] = torch.where(torch.isfinite(moved), moved, self.task_weight[places])
