"""The only assignment between estimated and true sources: as many pairs as both sides allow, at least total cost.

Up to 8 slots the minimum is found for all scenes at once, without waiting for the device, by dynamic programming over
subsets: with best(S) the least cost of giving the columns S to the last |S| rows,

    best(S) = min over j in S of cost(W - |S|, j) + best(S without j),

W 2^(W-1) sums a scene where W! permutations would be tried. More slots are left to ``scipy`` (R. Jonker and
A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems", Computing 38,
1987), scene by scene. Both are exact in float64.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from ris_hpo.physics.sources import Sources

_WIDEST_AT_ONCE = 8
_CHUNK = 8192  # scenes at once, which bounds the memory


@functools.cache
def _subsets(width: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For every size s = 1..width, the subsets of s columns: their columns [C, s], and the subset that each leaves.

    Entry (c, o) of the second is the position, among the subsets of size s - 1, of subset c without its o-th column.
    """
    layers = []
    position: dict[tuple[int, ...], int] = {(): 0}
    for size in range(1, width + 1):
        subsets = list(itertools.combinations(range(width), size))
        rest = [[position[each[:o] + each[o + 1 :]] for o in range(size)] for each in subsets]
        layers.append((torch.tensor(subsets, device=device), torch.tensor(rest, device=device)))
        position = {each: index for index, each in enumerate(subsets)}
    return layers


def minimum_cost_assignment(cost: Tensor) -> Tensor:
    """Permutation of least total cost for each scene.

    Args:
        cost: [B, W, W], finite; row = true slot, column = estimated slot.

    Returns:
        [B, W] int64: the estimated slot given to each true slot. Of equal totals the first in lexicographic order wins
        up to 8 slots.
    """
    width = cost.shape[-1]
    if width > _WIDEST_AT_ONCE:
        from scipy.optimize import linear_sum_assignment

        columns = [linear_sum_assignment(scene)[1] for scene in cost.double().cpu().numpy()]
        return torch.from_numpy(np.array(columns, dtype=np.int64).reshape(-1, width)).to(cost.device)
    return torch.cat([_least_of_all(part.double()) for part in cost.split(_CHUNK)])


def _least_of_all(cost: Tensor) -> Tensor:
    """The dynamic program; row s - 1 from the end meets the subsets of size s."""
    width = cost.shape[-1]
    layers = _subsets(width, cost.device)
    best, choices = cost.new_zeros(len(cost), 1), []
    for size, (columns, rest) in enumerate(layers, start=1):
        totals = cost[:, width - size, columns] + best[:, rest]
        choices.append(totals.argmin(-1))
        best = totals.gather(-1, choices[-1].unsqueeze(-1)).squeeze(-1)
    subset, order = torch.zeros_like(choices[-1]), []
    for (columns, rest), choice in zip(reversed(layers), reversed(choices), strict=True):
        option = choice.gather(-1, subset)
        order.append(columns[subset, option])
        subset = rest[subset, option]
    return torch.cat(order, -1)


def assignment(cost: Tensor, truth: Tensor, estimate: Tensor) -> Tensor:
    """As many pairs of present slots as there can be, at least total cost, [B, W] int64 as above.

    Args:
        cost: [B, W, W] >= 0, row = true slot, column = estimated slot; what it says of absent slots is not looked at.
        truth: [B, W] bool, true slots that hold a source.
        estimate: [B, W] bool, likewise.
    """
    both = truth.unsqueeze(2) & estimate.unsqueeze(1)
    alone = truth.unsqueeze(2) ^ estimate.unsqueeze(1)
    paired = cost.detach().double().nan_to_num(posinf=1e30).where(both, 0)  # a diverging network's may be anything
    # more than all pairs of the scene together can cost, and no more: large constants would swallow small differences
    unpaired = 1 + paired.amax((1, 2), keepdim=True) * cost.shape[-1]
    return minimum_cost_assignment(torch.where(alone, unpaired, paired))


def match(estimate: Sources, truth: Sources) -> tuple[Sources, Sources, Tensor]:
    """Pair estimates with truth by minimum total 3-D distance, as many pairs as both sides allow.

    Returns:
        (estimate reordered, truth, paired): both padded to one width W, slot i against slot i, and paired [B, W] bool
        where both sides hold a source.
    """
    width = max(estimate.max_sources, truth.max_sources)
    estimate, truth = estimate.padded(width), truth.padded(width)
    estimate = estimate.take(assignment(distances(estimate, truth), truth.mask, estimate.mask))
    return estimate, truth, estimate.mask & truth.mask


def distances(estimate: Sources, truth: Sources) -> Tensor:
    """3-D distances in m [B, W, W] of every true slot (row) to every estimated one (column)."""
    true, estimated = truth.positions().double(), estimate.positions().double()
    result: Tensor = (true.unsqueeze(2) - estimated.unsqueeze(1)).norm(dim=-1)
    return result
