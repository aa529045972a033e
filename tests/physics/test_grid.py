"""Local maxima on maps, against a search point by point."""

import itertools

import pytest
import torch

from ris_hpo.physics.grid import local_maxima


def brute_force(values: torch.Tensor, periodic: bool) -> list[int]:
    """Places of the local maxima of one map, highest first."""
    found = []
    for place in itertools.product(*(range(size) for size in values.shape)):
        higher = False
        for step in itertools.product((-1, 0, 1), repeat=values.dim()):
            near = [i + d for i, d in zip(place, step, strict=True)]
            if periodic:
                near = [i % size for i, size in zip(near, values.shape, strict=True)]
            inside = all(0 <= i < size for i, size in zip(near, values.shape, strict=True))
            higher = higher or (inside and bool(values[tuple(near)] > values[place]))
        if not higher:
            found.append(place)
    found.sort(key=lambda place: -float(values[place]))
    strides = [values.stride(axis) for axis in range(values.dim())]
    return [sum(i * stride for i, stride in zip(place, strides, strict=True)) for place in found]


@pytest.mark.parametrize(
    ("shape", "periodic"), [((5, 6), False), ((5, 6), True), ((4, 5, 6), False), ((1, 5, 6), False), ((3, 4, 1), False)]
)
def test_local_maxima_are_the_points_without_a_higher_neighbour(shape, periodic):
    values = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    for one in values:
        expected = brute_force(one, periodic)
        found = local_maxima(one.unsqueeze(0), len(expected), periodic=periodic)
        assert found[0].tolist() == expected


def test_other_points_follow_the_maxima_highest_first():
    values = torch.tensor([[[0.0, 3.0, 2.0, 9.0, 8.0]]])
    assert local_maxima(values, 9)[0].tolist() == [3, 1, 4, 2, 0]


def test_points_that_are_left_out_come_last():
    values = torch.tensor([[[1.0, -torch.inf, -torch.inf, 5.0, 4.0]]])
    assert local_maxima(values, 3)[0].tolist() == [3, 0, 4]
    assert local_maxima(torch.zeros(1, 2, 2), 4)[0].sort().values.tolist() == [0, 1, 2, 3]
