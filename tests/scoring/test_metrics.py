from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_hpo.errors import ConfigError, NumericalError
from ris_hpo.physics.scene import SceneSpec, grid_of_cells, simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.evaluate import evaluate
from ris_hpo.scoring.k_loc import WORST_K_LOC
from ris_hpo.scoring.matching import match, minimum_cost_assignment
from ris_hpo.scoring.metrics import Scores, floor_scores, score
from tests.properties import examples


def sources(azimuth_deg, range_m, mask) -> Sources:
    azimuth = torch.tensor(azimuth_deg, dtype=torch.float32).deg2rad()
    return Sources(
        azimuth,
        torch.zeros_like(azimuth),
        torch.tensor(range_m, dtype=torch.float32),
        torch.ones_like(azimuth),
        torch.tensor(mask),
    )


@examples(50)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_assignment_is_the_exhaustive_minimum(width, seed):
    cost = torch.rand(1, width, width, generator=torch.Generator().manual_seed(seed))
    found = minimum_cost_assignment(cost)[0].tolist()
    totals = {p: sum(cost[0, i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(width))}
    assert sum(cost[0, i, j].item() for i, j in enumerate(found)) == pytest.approx(min(totals.values()), abs=1e-5)


def test_as_many_pairs_as_both_sides_allow():
    truth = sources([[0, 10, 0]], [[2, 2, 2]], [[True, True, False]])
    estimate = sources([[50, 11, 1]], [[2, 2, 2]], [[False, True, True]])
    _, _, paired = match(estimate, truth)
    assert paired.sum() == 2


def test_perfect_estimate_scores_best():
    truth = simulate(SceneSpec(), 5, range(64)).require_truth()
    shuffled = truth.take(torch.tensor([[4, 2, 0, 1, 3]]).expand(64, -1))
    scores = score(shuffled, truth)
    assert (scores.k_acc, scores.success, scores.f1, scores.k_loc) == (1, 1, 1, -1)
    assert scores.rmse_azimuth_deg == scores.gospa_m == 0


def test_known_composite():
    truth = sources([[0.0, 20.0]], [[2.0, 3.0]], [[True, True]])
    estimate = sources([[3.0, 0.0]], [[2.5, 1.0]], [[True, False]])  # one found with 3 deg and 0.5 m, one missed
    scores = score(estimate, truth)
    rmse_az, rmse_r = math.sqrt((3**2 + 10**2) / 2), math.sqrt((0.5**2 + 2**2) / 2)
    assert scores.rmse_azimuth_deg == pytest.approx(rmse_az, rel=1e-5)
    assert scores.rmse_elevation_deg == pytest.approx(math.sqrt(100 / 2), rel=1e-5)
    assert scores.rmse_range_m == pytest.approx(rmse_r, rel=1e-5)
    assert (scores.k_acc, scores.k_under, scores.k_over, scores.success) == (0, 1, 0, 0)
    assert scores.k_loc == pytest.approx(1 + rmse_az / 5 + math.sqrt(50) / 5 + rmse_r, rel=1e-5)
    assert (scores.precision, scores.recall) == (1, 0.5)


def test_nothing_found_is_the_worst_score_and_json_has_null():
    truth = sources([[0.0, 20.0]], [[2.0, 3.0]], [[True, True]])
    scores = score(sources([[0.0, 0.0]], [[1.0, 1.0]], [[False, False]]), truth)
    assert scores.k_loc == pytest.approx(WORST_K_LOC)
    assert scores.as_dict()["rmspe_m"] is None
    assert Scores.from_dict(scores.as_dict()) == scores


@examples(30)
@given(st.integers(0, 2**31))
def test_composite_is_bounded_for_any_estimate(seed):
    truth = simulate(SceneSpec(), 9, range(8)).require_truth()
    estimate = simulate(SceneSpec(), seed, range(8)).require_truth()
    assert -1 <= score(estimate, truth).k_loc <= 7


def test_estimate_that_is_not_finite_is_named():
    truth = sources([[0.0]], [[2.0]], [[True]])
    with pytest.raises(NumericalError, match="range_m is not finite"):
        score(sources([[0.0]], [[float("nan")]], [[True]]), truth)


def test_estimates_of_other_scenes_are_refused():
    truth = simulate(SceneSpec(), 9, range(3)).require_truth()
    for estimate, scenes in ((truth[:1], truth), (truth, truth[:1]), (truth[:0], truth[:0])):
        with pytest.raises(ConfigError, match="beside the truth of"):
            score(estimate, scenes)


def test_scenes_without_a_source_have_a_table():
    scenes = simulate(SceneSpec(), 9, range(3))
    nobody = dataclasses.replace(scenes.truth, mask=torch.zeros_like(scenes.truth.mask))
    table = evaluate(scenes.truth, dataclasses.replace(scenes, truth=nobody)).as_dict()
    json.dumps(table, allow_nan=False)
    assert table["overall"]["efficiency"]["rmspe_m"] is None


def test_floor_reproduces_the_published_success():
    """Success that the bound allows at 15..20 dB, K = 1..5, over many scenes: 1.0 .96 .87 .76 .60."""
    published = {1: 1.0, 2: 0.96, 3: 0.87, 4: 0.76, 5: 0.60}
    spec = SceneSpec(snr_db=(15, 20))
    for k, expected in published.items():
        scenes = simulate(spec, 31, range(300), num_sources=torch.full((300,), k))
        assert floor_scores(scenes).success == pytest.approx(expected, abs=0.05), k


def test_floor_falls_with_snr():
    scenes = [grid_of_cells(SceneSpec(), 3, [snr], [2], 64) for snr in (0.0, 10.0, 20.0)]
    floors = [floor_scores(s).k_loc for s in scenes]
    assert floors[0] > floors[1] > floors[2]
