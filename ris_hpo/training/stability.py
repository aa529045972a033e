"""Precision, the gate in front of the optimiser, the learning rate, and averaged weights.

Everything the gate decides stays on the device, so that no step waits for a value: the fused optimiser skips by
``found_inf``, counters and the learning rate are tensors, and the learning rate is a function of the steps *taken*, so
that it does not move when a step is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ris_hpo.config import Spec
from ris_hpo.errors import ConfigError
from ris_hpo.learning.network import Network

SMALLEST_NORM = 1e-12  # a step on a smaller total gradient norm is no step


class OptimizerSpec(Spec):
    """AdamW with a learning rate for the backbone and one for the heads, its schedule, and averaged weights."""

    learning_rate: float = Field(2e-3, gt=0, le=1, description="of the backbone, at its highest")
    head_multiplier: float = Field(1.0, gt=0, le=100, description="learning rate of the heads over the backbone's")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="of AdamW, per step and unit of learning rate")
    decay: Literal["matrices", "all"] = Field(
        "matrices", description="what is decayed: matrices and kernels, or biases and gains of norms as well"
    )
    batch_size: int = Field(32, ge=1, le=65536, description="scenes in one forward pass")
    accumulate: int = Field(1, ge=1, le=1024, description="forward passes in one step")
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine",
        description="after the warm-up: cosine falls over the whole run; wsd stays, and falls in a branch toward each "
        "of budget.rungs and toward the end",
    )
    decay_share: float = Field(0.2, gt=0, lt=1, description="wsd: share of the scenes up to a rung in which it falls")
    warmup: float = Field(
        0.05,
        ge=0,
        le=0.9,
        description="share of the planned steps, with wsd up to the first rung, in which the rate rises",
    )
    warmup_floor: float = Field(0.05, gt=0, le=1, description="share of the highest rate that it rises from")
    final_rate: float = Field(0.02, ge=0, le=1, description="share of the highest rate where it has fallen")
    clip: float = Field(1.0, gt=0, description="longer gradients, over all parameters, are scaled to this norm")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the learned part; auto is bf16 where the device computes it natively, else fp32"
    )
    ema_decay: float = Field(0.995, ge=0, lt=1, description="share of averaged weights kept in a step; 0: no average")
    swa_start: float = Field(
        1.0, ge=0, le=1, description="share of the run after which weights are averaged evenly; 1 averages none"
    )
    skips_allowed: int = Field(20, ge=1, description="skipped steps in a row after which training has diverged")

    @model_validator(mode="after")
    def _check(self) -> OptimizerSpec:
        if self.swa_start < 1 and self.ema_decay > 0:
            raise ValueError("choose one of ema_decay > 0 and swa_start < 1")
        if self.schedule == "wsd" and self.swa_start < 1:
            raise ValueError("swa_start is a share of a planned run; with schedule 'wsd' use ema_decay")
        return self

    @property
    def scenes_per_step(self) -> int:
        """Scenes in a whole step, all its forward passes together."""
        return self.batch_size * self.accumulate


def resolved_precision(spec: OptimizerSpec, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The precision that ``auto`` means on a device."""
    if spec.precision != "auto":
        return spec.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return "bf16" if native else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Mixed precision for the learned part; covariances and decompositions leave it by themselves."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


class StepGate(nn.Module):
    """The optimiser with its learning rate and loss scale; takes a step only on a gradient that is fit for one.

    The order of a step: unscale once -> clip -> step if the total norm is finite and above 1e-12, else count a skip by
    cause -> loss scale update. NaN gradients are never turned into numbers. The counters are buffers.
    """

    steps_taken: Tensor
    skipped_not_finite: Tensor
    skipped_vanishing: Tensor
    skipped_in_a_row: Tensor
    since_overflow: Tensor
    scale: Tensor
    gradient_norms: Tensor

    def __init__(
        self,
        network: Network,
        spec: OptimizerSpec,
        planned_steps: int,
        weights: Iterable[nn.Parameter] = (),
        *,
        warm_over: int | None = None,
    ) -> None:
        """Group the network's parameters; learned loss ``weights`` go with the heads.

        Args:
            network: what is trained.
            spec: of the optimiser.
            planned_steps: of the whole run.
            weights: learned loss weights.
            warm_over: steps of which ``spec.warmup`` is a share; those of the whole run by default.

        Raises:
            ConfigError: no parameter is trained.
        """
        super().__init__()
        self.spec = spec
        self.total_steps = max(1, planned_steps)
        self._warm = max(1.0, spec.warmup * (warm_over or self.total_steps))  # stays where an extension moves the end
        groups = []
        for name, candidates, multiplier in (
            ("backbone", [*network.backbone.parameters()], 1.0),
            ("heads", [*network.heads.parameters(), *weights], spec.head_multiplier),
        ):
            parameters = [p for p in candidates if p.requires_grad]
            matrices = [p for p in parameters if p.dim() >= 2 or spec.decay == "all"]
            others = [p for p in parameters if p.dim() < 2 and spec.decay != "all"]
            for chosen, decay in ((matrices, spec.weight_decay), (others, 0.0)):
                if chosen:
                    rate = torch.tensor(spec.learning_rate * multiplier, device=chosen[0].device)
                    own = {"name": name, "lr": rate, "multiplier": multiplier, "weight_decay": decay}
                    groups.append({"params": chosen, **own})
        if not groups:
            raise ConfigError("no parameter is trained: every group is frozen")
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        for name in ("steps_taken", "skipped_not_finite", "skipped_vanishing", "skipped_in_a_row", "since_overflow"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.tensor(2.0**14 if spec.precision == "fp16" else 1.0))
        self.register_buffer("gradient_norms", torch.zeros(len(self.rates())))

    def extend(self, planned_steps: int) -> None:
        """Move the end of the learning rate's fall; the warm-up stays as it was planned."""
        self.total_steps = max(1, planned_steps)

    def rate(self, left: float = 1.0) -> Tensor:
        """Learning rate over its highest value: a line up from the floor; then a cosine, by the steps taken.

        Args:
            left: ``wsd`` only: share of the branch that is left, by which the rate falls along a line.
        """
        spec, taken = self.spec, self.steps_taken.float()
        warm = self._warm
        rising = spec.warmup_floor + (1 - spec.warmup_floor) * (taken + 1) / warm
        progress = ((taken - warm) / max(1.0, self.total_steps - warm)).clamp(0, 1)
        fallen = (
            0.5 * (1 + torch.cos(math.pi * progress)) if spec.schedule == "cosine" else torch.full_like(taken, left)
        )
        return torch.where(taken + 1 < warm, rising, spec.final_rate + (1 - spec.final_rate) * fallen)

    def counts(self) -> tuple[int, int]:
        """Steps taken and steps skipped so far."""
        return int(self.steps_taken), int(self.skipped_not_finite) + int(self.skipped_vanishing)

    def rates(self) -> dict[str, Tensor]:
        """Learning rate of each group at the last step."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def norms(self) -> dict[str, Tensor]:
        """Gradient norm of each group at the last step, before clipping."""
        return dict(zip(self.rates(), self.gradient_norms, strict=True))

    def step(self, backbone_scale: float = 1.0, left: float = 1.0) -> Tensor:
        """Take a step, or skip it.

        Args:
            backbone_scale: factor on the backbone's rate (a phase may slow it).
            left: see ``rate``.

        Returns:
            bool tensor: whether the step was taken.
        """
        inverse = 1.0 / self.scale
        norms = []
        for gradients in self._gradients().values():
            if self.spec.precision == "fp16":
                torch._foreach_mul_(gradients, inverse)
            norms.append(torch.stack(torch._foreach_norm(gradients)).norm() if gradients else inverse * 0)
        self.gradient_norms.copy_(torch.stack(norms))
        total = self.gradient_norms.norm()
        finite = torch.isfinite(total)
        fit: Tensor = finite & (total > SMALLEST_NORM)

        clip = (self.spec.clip / total.clamp(min=self.spec.clip)).nan_to_num(1.0)
        rate = self.rate(left)
        for gradients in self._gradients().values():
            if gradients:
                torch._foreach_mul_(gradients, clip)
        for group in self.optimizer.param_groups:
            slowed = backbone_scale if group["name"] == "backbone" else 1.0
            group["lr"].copy_(rate * (self.spec.learning_rate * group["multiplier"] * slowed))
        self.optimizer.found_inf = (~fit).float()  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()  # type: ignore[no-untyped-call, unused-ignore]

        self.steps_taken += fit
        self.skipped_not_finite += ~finite
        self.skipped_vanishing += finite & ~fit
        self.skipped_in_a_row.copy_(torch.where(fit, 0, self.skipped_in_a_row + 1))
        if self.spec.precision == "fp16":
            self._rescale(finite)
        return fit

    def _gradients(self) -> dict[str, list[Tensor]]:
        """The gradients that there are, of the backbone and of the heads."""
        found: dict[str, list[Tensor]] = {}
        for group in self.optimizer.param_groups:
            found.setdefault(group["name"], []).extend(p.grad for p in group["params"] if p.grad is not None)
        return found

    def _rescale(self, finite: Tensor) -> None:
        """Halve the loss scale after an overflow, double it after 1000 steps without one."""
        self.since_overflow.copy_(torch.where(finite, self.since_overflow + 1, 0))
        grown = torch.where(self.since_overflow >= 1000, self.scale * 2, self.scale)
        self.since_overflow.copy_(torch.where(self.since_overflow >= 1000, 0, self.since_overflow))
        self.scale.copy_(torch.where(finite, grown, self.scale / 2).clamp(1.0, 2.0**24))


class AveragedWeights(nn.Module):
    """Exponential or even (SWA) average of the weights, over the steps that were taken.

    EMA: average += (1 - min(decay, (1 + n) / (10 + n))) (weights - average) after n steps. The network has no batch
    statistics, so that averaged weights need no second pass over data.
    """

    count: Tensor

    def __init__(self, network: Network, spec: OptimizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.average = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(p.detach().clone(), False) for name, p in network.named_parameters()}
        )
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def enabled(self) -> bool:
        """Whether evaluation uses averaged weights."""
        return self.spec.ema_decay > 0 or self.spec.swa_start < 1

    @torch.no_grad()
    def update(self, network: Network, taken: Tensor, progress: float) -> None:
        """Move toward the network if the step was ``taken``; ``progress`` is the share of the run that is done."""
        even = self.spec.swa_start < 1 and progress >= self.spec.swa_start
        if not even and self.spec.ema_decay == 0:
            return
        self.count += taken
        count = self.count.float()
        share = 1 / count.clamp(min=1) if even else 1 - torch.minimum(
            torch.full_like(count, self.spec.ema_decay), (1 + count) / (10 + count)
        )  # fmt: skip
        weight = torch.where(taken, share, torch.zeros_like(share))
        own = dict(network.named_parameters())
        averages = [self.average[name.replace(".", "/")] for name in own]
        step = torch._foreach_sub([p.detach() for p in own.values()], averages)
        torch._foreach_mul_(step, weight)
        torch._foreach_add_(averages, step)

    def state(self, network: Network) -> dict[str, Tensor]:
        """The weights that evaluation should use: averaged ones once there are any, else the network's own."""
        own = {name: p.detach() for name, p in network.named_parameters()}
        if not self.enabled or int(self.count) == 0:
            return own
        return {name: self.average[name.replace(".", "/")].detach() for name in own}


def movement(before: Iterable[Tensor], after: Iterable[Tensor]) -> Tensor:
    """||theta_after - theta_before|| over all parameters, float64."""
    squares = [(b - a).double().square().sum() for a, b in zip(before, after, strict=True)]
    return torch.stack(squares).sum().sqrt()


class Swapped:
    """Context in which a network holds other weights and is in evaluation mode."""

    def __init__(self, network: Network, weights: dict[str, Tensor]) -> None:
        self.network, self.weights = network, weights

    def __enter__(self) -> Network:
        self._own = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        self._was_training = self.network.training
        self._put(self.weights)
        self.network.eval()
        return self.network

    def __exit__(self, *_: object) -> None:
        self._put(self._own)
        self.network.train(self._was_training)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.copy_(weights[name])
