"""Levenberg-Marquardt minimisation within a box, for a whole batch of scenes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from ris_hpo.estimators.cost import Evaluation


class Selectable(Protocol):
    """Data of a batch that can be narrowed to some of its scenes."""

    def __getitem__(self, index: Tensor) -> Self: ...


Data = TypeVar("Data", bound=Selectable)


def descend(
    data: Data,
    objective: Callable[[Data, Tensor], Evaluation],
    x: Tensor,
    low: Tensor,
    high: Tensor,
    stride: Tensor,
    steps: int,
    tolerance: float,
    start: Evaluation | None = None,
) -> tuple[Tensor, Evaluation]:
    """Levenberg-Marquardt within a box; every scene has its own damping and leaves the batch when it has converged.

    Args:
        data: what the objective needs of each scene.
        objective: (data, x) -> cost [B], gradient [B, P], positive semi-definite Hessian [B, P, P].
        x: float64 [B, P] start, inside the box.
        low: [P] lower limits.
        high: [P] upper limits.
        stride: [P] largest move of one step.
        steps: at most so many evaluations after the first.
        tolerance: a scene is done when an accepted step gains less than this.
        start: the objective at x, where it is known already.

    Returns:
        x [B, P] and the objective there; the cost never rises.
    """
    active = torch.arange(len(x), device=x.device)
    cost, gradient, hessian = objective(data, x) if start is None else start
    best = tuple(value.clone() for value in (x, cost, gradient, hessian))
    damping = torch.full_like(cost, 1e-3)
    done = torch.zeros_like(active, dtype=torch.bool)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        # a coordinate at its limit with the descent pointing outward stays where it is
        held = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
        free = (~held).to(x.dtype)
        matrix = hessian * free.unsqueeze(-1) * free.unsqueeze(-2)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        floor = 1e-9 * diagonal.amax(-1, keepdim=True) + 1e-12
        scale = (diagonal + floor).rsqrt()
        scaled = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2) + (damping[:, None, None] + 1e-10) * eye
        factor, _ = torch.linalg.cholesky_ex(scaled + (1 - free).unsqueeze(-1) * eye)
        move = torch.cholesky_solve((-gradient * free * scale).unsqueeze(-1), factor).squeeze(-1) * scale
        move = torch.nan_to_num(move, nan=0.0)  # a failed factor counts as a rejected step and raises the damping
        move = move * (stride / move.abs().clamp(min=1e-300)).amin(-1, keepdim=True).clamp(max=1)
        trial = torch.minimum(torch.maximum(x + move, low), high)
        trial_cost, trial_gradient, trial_hessian = objective(data, trial)
        better = trial_cost < cost
        gain = cost - trial_cost
        done = done | (better & (gain < tolerance)) | (~better & ((damping > 1e4) | (gain > -1e-9 * (1 + cost.abs()))))
        damping = torch.where(better, (damping * 0.15).clamp(min=1e-7), damping * 8 + 1e-4)
        x = torch.where(better.unsqueeze(-1), trial, x)
        cost = torch.where(better, trial_cost, cost)
        gradient = torch.where(better.unsqueeze(-1), trial_gradient, gradient)
        hessian = torch.where(better[:, None, None], trial_hessian, hessian)
        for kept, value in zip(best, (x, cost, gradient, hessian), strict=True):
            kept[active] = value
        running = torch.nonzero(~done).squeeze(-1)
        if len(running) == 0:
            break
        if len(running) <= 0.75 * len(done):  # narrowing copies the sensing matrices, so not for every scene that ends
            data, active, x, cost = data[running], active[running], x[running], cost[running]
            gradient, hessian, damping, done = gradient[running], hessian[running], damping[running], done[running]
    return best[0], (best[1], best[2], best[3])
