"""How loss terms are weighed against each other: fixed, by learned uncertainty, or by gradient norms; and ramps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ris_hpo.learning.losses import LossSpec
from ris_hpo.training.config import BalanceSpec, PhaseSpec

ANCHORS = ("covariance", "covariance_pred")  # the covariance terms keep their weight; the others move around them
WEIGHT_BOUNDS = (0.05, 20.0)  # of gradnorm


class Balance(nn.Module):
    """Weights of the loss terms during training, on top of their fixed ones w_i.

    ``uncertainty``: sum_i exp(-s_i) w_i L_i + s_i with learned s_i, 0 for the anchors (Kendall, Gal and Cipolla,
    "Multi-task learning using uncertainty to weigh losses", CVPR 2018).

    ``gradnorm``: weights g_i on w_i L_i, moved once a step so that the gradient norms G_i = g_i w_i |dL_i / dW| at the
    shared layer W approach mean(G) r_i^alpha, with the relative loss r_i = (L_i / L_i(0)) / mean (Chen et al.,
    "GradNorm", ICML 2018): g_i is multiplied with exp(+-rate) towards its target. The anchors keep g = 1.
    """

    log_variance: nn.Parameter
    task_weight: Tensor
    first_loss: Tensor
    movable: Tensor

    def __init__(self, spec: BalanceSpec, terms: Sequence[str]) -> None:
        """Start with equal weights for ``terms``, the names of all loss terms in a fixed order."""
        super().__init__()
        self.spec = spec
        self.terms = list(terms)
        self.log_variance = nn.Parameter(torch.zeros(len(terms)), requires_grad=spec.kind == "uncertainty")
        self.register_buffer("task_weight", torch.ones(len(terms)))
        self.register_buffer("first_loss", torch.zeros(len(terms)))
        movable = torch.tensor([name not in ANCHORS for name in terms])
        self.register_buffer("movable", movable.float(), persistent=False)
        self._norms: dict[str, Tensor] = {}
        self._losses: dict[str, Tensor] = {}

    def weighted(
        self, values: dict[str, Tensor], loss: LossSpec, phase: PhaseSpec, progress: float
    ) -> dict[str, Tensor]:
        """Return each term with its weight; their sum plus :meth:`regulariser` is the loss.

        A ramped term is scaled so that it contributes ``progress * ramp_share`` of the total.

        Args:
            values: scalar loss terms by name.
            loss: their fixed weights.
            phase: names the ramped terms and their share.
            progress: share of the phase that is done.
        """
        weighted = {name: self._factor(name) * (getattr(loss, name) * value) for name, value in values.items()}
        ramped = [name for name in values if name in phase.ramp]
        if ramped:
            steady = torch.stack([weighted[n].detach() for n in values if n not in ramped]).sum().clamp(min=1e-12)
            share = phase.ramp_share / (1 - phase.ramp_share * len(ramped))
            for name in ramped:
                scale = progress * share * steady / values[name].detach().abs().clamp(min=1e-12)
                weighted[name] = scale * values[name]
        return weighted

    def regulariser(self, values: dict[str, Tensor]) -> Tensor:
        """Sum of s_i over the terms at work, which keeps them from running away; 0 for the other kinds."""
        if self.spec.kind != "uncertainty":
            return self.log_variance.detach().sum() * 0
        return (self.log_variance * self.movable)[self._places(values)].sum()

    def follow_gradients(self, values: dict[str, Tensor], loss: LossSpec, shared: Tensor, share: float) -> None:
        """Note a micro-batch's losses and gradient norms for gradnorm; the graph is kept for backward.

        Args:
            values: scalar loss terms by name.
            loss: their fixed weights.
            shared: weight of the last layer that all terms depend on.
            share: of the step's scenes.
        """
        if self.spec.kind != "gradnorm":
            return
        for name, value in values.items():
            gradient = torch.autograd.grad(value, shared, retain_graph=True, allow_unused=True)[0]
            norm = value.detach() * 0 if gradient is None else gradient.norm()
            self._norms[name] = self._norms.get(name, 0) + share * getattr(loss, name) * norm.detach()
            self._losses[name] = self._losses.get(name, 0) + share * value.detach()

    def move(self) -> None:
        """Move gradnorm's weights by the gradient norms and losses since the last call; nothing for other kinds."""
        if not self._norms:
            return
        places = self._places(self._norms)
        norm = torch.stack(list(self._norms.values())) * self.task_weight[places]
        current = torch.stack(list(self._losses.values()))
        self._norms, self._losses = {}, {}
        fresh = (self.first_loss[places] == 0) & current.isfinite()
        self.first_loss[places] = torch.where(fresh, current, self.first_loss[places])
        pace = current / self.first_loss[places].clamp(min=1e-12)
        target = norm.mean() * (pace / pace.mean().clamp(min=1e-12)) ** self.spec.asymmetry
        pull = torch.sign(target - norm) * self.spec.rate * self.movable[places]
        moved = (self.task_weight[places] * torch.exp(pull)).clamp(*WEIGHT_BOUNDS)
        self.task_weight[places] = torch.where(torch.isfinite(moved), moved, self.task_weight[places])

    def _factor(self, name: str) -> Tensor | float:
        place = self.terms.index(name)
        if self.spec.kind == "uncertainty":
            return torch.exp(-self.log_variance[place] * self.movable[place])
        return self.task_weight[place] if self.spec.kind == "gradnorm" else 1.0

    def _places(self, values: dict[str, Tensor]) -> Tensor:
        return torch.tensor([self.terms.index(name) for name in values], device=self.task_weight.device)
