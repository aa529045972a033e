"""The only assignment between estimated and true sources: minimum total distance over all permutations.

With K <= 6 an exhaustive search is exact, batched and fast (720 permutations at most).
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from ris_hpo.physics.sources import Sources

_UNPAIRED = 1e6  # metres; above any real total, so that as many real pairs as possible are formed


@functools.cache
def _permutations(width: int) -> Tensor:
    return torch.tensor(list(itertools.permutations(range(width))))


def minimum_cost_assignment(cost: Tensor) -> Tensor:
    """Permutation of least total cost for each scene.

    Args:
        cost: [B, W, W], row = true slot, column = estimated slot, W <= 6.

    Returns:
        [B, W] int64: the estimated slot given to each true slot; ties go to the first permutation.
    """
    width = cost.shape[-1]
    permutations = _permutations(width).to(cost.device)
    rows = torch.arange(width, device=cost.device)
    totals = cost[:, rows, permutations].sum(-1)
    return permutations[totals.argmin(-1)]


def match(estimate: Sources, truth: Sources) -> tuple[Sources, Sources, Tensor]:
    """Pair estimates with truth by minimum total 3-D distance, as many pairs as both sides allow.

    Returns:
        (estimate reordered, truth, paired): both padded to one width W, slot i against slot i, and paired [B, W] bool
        where both sides hold a source.
    """
    width = max(estimate.max_sources, truth.max_sources)
    estimate, truth = estimate.padded(width), truth.padded(width)
    distance = (truth.positions().unsqueeze(2) - estimate.positions().unsqueeze(1)).norm(dim=-1)
    both = truth.mask.unsqueeze(2) & estimate.mask.unsqueeze(1)
    neither = ~truth.mask.unsqueeze(2) & ~estimate.mask.unsqueeze(1)
    cost = torch.where(both, distance, _UNPAIRED).masked_fill(neither, 0.0)
    order = minimum_cost_assignment(cost.detach())
    estimate = estimate.take(order)
    return estimate, truth, estimate.mask & truth.mask
