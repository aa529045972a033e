"""The assignment against exhaustive search, and what masks, padding and extreme distances must not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.matching import assignment, distances, match, minimum_cost_assignment
from tests.properties import examples


def total(cost: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return cost.gather(2, order.unsqueeze(-1)).squeeze(-1).sum(-1)


def on_a_ray(range_m: list[list[float]], mask: list[list[bool]] | None = None) -> Sources:
    """Sources at azimuth and elevation 0: distances are differences of range."""
    r = torch.tensor(range_m)
    here = torch.ones_like(r, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return Sources(torch.zeros_like(r), torch.zeros_like(r), r, torch.ones_like(r), here)


@examples(50)
@given(st.integers(1, 6), st.integers(0, 2**31))
def test_assignment_is_the_exhaustive_minimum(width, seed):
    cost = torch.rand(3, width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = minimum_cost_assignment(cost)
    assert torch.equal(order.sort(-1).values, torch.arange(width).expand(3, -1))
    rows, permutations = torch.arange(width), torch.tensor(list(itertools.permutations(range(width))))
    least = cost[:, rows, permutations].sum(-1).amin(-1)
    assert torch.allclose(total(cost, order), least, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [7, 8, 9, 12])
def test_wide_assignments_are_exact_too(width):
    cost = torch.rand(20, width, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    least = [scene[linear_sum_assignment(scene)].sum() for scene in cost.numpy()]
    found = total(cost, minimum_cost_assignment(cost))
    assert torch.allclose(found, torch.tensor(least, dtype=torch.float64), rtol=0, atol=1e-12)


def test_of_equal_totals_the_first_in_lexicographic_order_wins():
    assert minimum_cost_assignment(torch.ones(1, 4, 4)).tolist() == [[0, 1, 2, 3]]
    cost = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]])
    assert minimum_cost_assignment(cost).tolist() == [[1, 0, 2]]  # and not [2, 0, 1] or [1, 2, 0]


def test_unrelated_sets_have_their_least_total_distance():
    """A large constant in single precision for unpaired slots missed it in up to 8 % of these."""
    truth, estimate = (simulate(SceneSpec(), seed, range(1000)).require_truth() for seed in (1, 2))
    matched, padded, paired = match(estimate, truth)
    count = torch.minimum(truth.num_sources, estimate.num_sources)
    assert torch.equal(paired.sum(-1), count)
    found = ((matched.positions().double() - padded.positions().double()).norm(dim=-1) * paired).sum(-1)
    apart = distances(estimate, truth)
    least = []
    for scene, there, here in zip(apart, truth.mask, estimate.mask, strict=True):
        part = scene[there][:, here].numpy()
        least.append(part[linear_sum_assignment(part)].sum())
    assert torch.allclose(found, torch.tensor(least, dtype=torch.float64), rtol=0, atol=1e-9)


def test_as_many_pairs_as_both_sides_allow():
    truth = on_a_ray([[2.0, 3.0, 4.0]], [[True, True, False]])
    estimate = on_a_ray([[9.0, 30.0, 3.5]], [[False, True, True]])
    matched, _, paired = match(estimate, truth)
    assert paired.tolist() == [[True, True, False]]
    assert matched.range_m[0, :2].tolist() == [30.0, 3.5]  # 28 + 0.5 m; the other way 1.5 + 27 m


def test_a_distance_beyond_all_bounds_does_not_hide_a_small_one():
    truth = on_a_ray([[1.0, 2.0, 1e9]])
    estimate = on_a_ray([[2.001, 1.001, 5e8]])
    matched, _, _ = match(estimate, truth)
    assert matched.range_m[0].tolist() == pytest.approx([1.001, 2.001, 5e8])


def test_what_a_padded_slot_holds_is_not_looked_at():
    truth = on_a_ray([[1.0, float("nan"), 2.0]], [[True, False, True]])
    estimate = on_a_ray([[2.1, 1.1, -1e30]], [[True, True, False]])
    matched, _, paired = match(estimate, truth)
    assert matched.range_m[0][paired[0]].tolist() == pytest.approx([1.1, 2.1])


def test_sets_of_different_width_and_a_truth_of_twelve_slots():
    truth = on_a_ray([[4.0, 2.0, *[1.0] * 10]], [[True, True, *[False] * 10]])
    estimate = on_a_ray([[2.2, 4.4]])
    matched, padded, paired = match(estimate, truth)
    assert matched.max_sources == padded.max_sources == 12
    assert matched.range_m[0, :2].tolist() == pytest.approx([4.4, 2.2])
    assert int(paired.sum()) == 2


def test_nothing_on_one_side():
    nobody = on_a_ray([[1.0, 1.0]], [[False, False]])
    for estimate, truth in ((nobody, on_a_ray([[3.0]])), (on_a_ray([[3.0]]), nobody), (nobody, nobody)):
        assert not match(estimate, truth)[2].any()


def test_a_diverged_network_gets_some_permutation():
    """Losses look at positions before anything has checked them."""
    everywhere = torch.ones(2, 9, dtype=torch.bool)
    cost = torch.full((2, 9, 9), float("nan"))
    cost[1] = float("inf")
    for width in (3, 9):
        few = everywhere[:, :width]
        order = assignment(cost[:, :width, :width], few, few)
        assert torch.equal(order.sort(-1).values, torch.arange(width).expand(2, -1))
