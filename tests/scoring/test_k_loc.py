"""The facts of the score that need no torch, by hand."""

import math

import pytest

from ris_hpo.scoring.k_loc import WORST_K_LOC, efficiency, finite_score


def test_the_worst_score_is_that_of_misses_alone():
    assert WORST_K_LOC == 1 + 10 / 5 + 10 / 5 + 2 / 1 - 0


@pytest.mark.parametrize(("value", "expected"), [(WORST_K_LOC, 0.0), (1.0, 1.0), (4.0, 0.5), (-0.2, 1.2)])
def test_efficiency_is_the_share_of_the_way_to_the_floor(value, expected):
    assert efficiency(value, floor=1.0) == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_counts_as_the_worst(value):
    assert finite_score(value) == WORST_K_LOC
    assert finite_score(2.5) == 2.5
