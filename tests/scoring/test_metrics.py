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
from ris_hpo.physics.scene import Scenes, SceneSpec, grid_of_cells, simulate
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring import metrics
from ris_hpo.scoring.evaluate import Row, evaluate
from ris_hpo.scoring.k_loc import WORST_K_LOC
from ris_hpo.scoring.metrics import Scores, floor_errors, floor_scores, scene_errors, score
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


def test_a_coordinate_that_is_known_beforehand_is_left_out():
    truth = sources([[0.0, 20.0]], [[2.0, 3.0]], [[True, True]])
    truth = dataclasses.replace(truth, given=torch.tensor([[False, True, False]]))
    estimate = sources([[3.0, 0.0]], [[2.5, 1.0]], [[True, False]])
    estimate = dataclasses.replace(estimate, elevation=torch.full((1, 2), 0.3))
    scores = score(estimate, truth)
    rmse_az, rmse_r = math.sqrt((3**2 + 10**2) / 2), math.sqrt((0.5**2 + 2**2) / 2)
    assert scores.rmse_elevation_deg == 0
    assert scores.k_loc == pytest.approx(1 + rmse_az / 5 + rmse_r, rel=1e-5)
    assert scores.recall == 0.5  # within the tolerances of what is not known


def test_the_floor_of_a_row_of_elements_does_not_count_a_known_elevation():
    row = SceneSpec().replaced(
        {"geometry.num_horizontal": 32, "geometry.num_vertical": 1, "range_m": (0.5, 3.0), "num_sources": (1, 1)}
    )
    loud = torch.full((20,), 20.0)
    known = floor_scores(simulate(row.replaced({"elevation_deg": (0.0, 0.0)}), 77, range(20), snr_db=loud))
    unknown = floor_scores(simulate(row, 77, range(20), snr_db=loud))
    assert known.success > 0.95
    assert known.rmse_elevation_deg == 0
    assert unknown.rmse_elevation_deg > 4  # a row does not see it


def at(azimuth_deg, elevation_deg, range_m) -> Sources:
    """Scenes of sources that are all present; ranges may be rows of different length."""
    azimuth, elevation = (torch.tensor(value, dtype=torch.float32).deg2rad() for value in (azimuth_deg, elevation_deg))
    far = torch.tensor(range_m, dtype=torch.float32)
    return Sources(azimuth, elevation, far, torch.ones_like(far), torch.ones_like(far, dtype=torch.bool))


def test_gospa_has_an_assignment_of_its_own():
    """On a ray: 1.5 + 1.5 m is the least total, 0.2 and a pair beyond the cut-off the least GOSPA: .04 + 4 < 4.5."""
    truth, estimate = at([[0, 0]], [[0, 0]], [[5.0, 6.7]]), at([[0, 0]], [[0, 0]], [[3.5, 5.2]])
    errors = scene_errors(estimate, truth)
    assert errors.distance[0].tolist() == pytest.approx([1.5, 1.5], abs=1e-5)
    assert errors.scores().gospa_m == pytest.approx(math.sqrt(0.2**2 + 2.0**2), rel=1e-5)


@pytest.mark.parametrize(
    ("truth", "estimate", "squared"),
    [
        ([5.0], [5.5], 0.25),
        ([5.0], [9.0], 4.0),  # beyond the cut-off: as a missed source and a ghost
        ([5.0, 8.0], [5.0], 2.0),  # one missed: c^2 / 2
        ([5.0], [5.0, 8.0, 9.0], 4.0),  # two ghosts
        ([5.0, 8.0], [5.5], 2.25),
    ],
)
def test_gospa_by_hand(truth, estimate, squared):
    found = score(*(at([[0.0] * len(r)], [[0.0] * len(r)], [r]) for r in (estimate, truth)))
    assert found.gospa_m == pytest.approx(math.sqrt(squared), rel=1e-5)


def test_gospa_is_the_mean_of_the_scenes():
    found = score(at([[0], [0]], [[0], [0]], [[5.0], [5.5]]), at([[0], [0]], [[0], [0]], [[5.0], [5.0]]))
    assert found.gospa_m == pytest.approx(0.25)


def test_medians_and_rmspe_of_two_pairs_by_hand():
    """Errors 2 and 6 deg, 0 and 1 deg, 0.1 and 0.5 m; the median of two is their mean."""
    truth = at([[0.0, 30.0]], [[0.0, 0.0]], [[2.0, 6.0]])
    found = score(at([[2.0, 36.0]], [[0.0, 1.0]], [[2.1, 5.5]]), truth)
    assert found.median_azimuth_deg == pytest.approx(4, rel=1e-4)
    assert found.median_elevation_deg == pytest.approx(0.5, rel=1e-4)
    assert found.median_range_m == pytest.approx(0.3, rel=1e-4)

    def place(azimuth, elevation, r):
        azimuth, elevation = math.radians(azimuth), math.radians(elevation)
        return (
            r * math.cos(elevation) * math.cos(azimuth),
            r * math.cos(elevation) * math.sin(azimuth),
            (r * math.sin(elevation)),
        )

    squares = [
        math.dist(place(0, 0, 2), place(2, 0, 2.1)) ** 2,
        math.dist(place(30, 0, 6), place(36, 1, 5.5)) ** 2,
    ]
    assert found.rmspe_m == pytest.approx(math.sqrt(sum(squares) / 2), rel=1e-4)
    assert (found.success, found.k_acc) == (0, 1)  # 6 deg is no hit
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)


def test_errors_are_capped_one_by_one():
    """9 and 40 deg of azimuth, 1.5 and 7 m of range: 40 deg counts as 10, 7 m as 2; each unpaired slot as its cap."""
    truth = at([[0.0, 30.0]], [[0.0, 0.0]], [[2.0, 3.0]])
    found = score(at([[9.0, 70.0, 0.0]], [[0.0, 0.0, 0.0]], [[3.5, 10.0, 40.0]]), truth)
    assert found.rmse_azimuth_deg == pytest.approx(math.sqrt((9**2 + 10**2 + 10**2) / 3), rel=1e-5)
    assert found.rmse_elevation_deg == pytest.approx(math.sqrt(100 / 3), rel=1e-4)
    assert found.rmse_range_m == pytest.approx(math.sqrt((1.5**2 + 2**2 + 2**2) / 3), rel=1e-5)
    assert (found.k_acc, found.k_under, found.k_over) == (0, 0, 1)


@pytest.mark.parametrize(
    ("error", "hit"), [((4.9, 4.9, 0.99), 1), ((5.1, 0, 0), 0), ((0, 5.1, 0), 0), ((0, 0, 1.01), 0), ((0, 0, 1), 0)]
)
def test_a_hit_needs_all_three_tolerances(error, hit):
    found = score(at([[error[0]]], [[error[1]]], [[3.0 + error[2]]]), at([[0.0]], [[0.0]], [[3.0]]))
    assert (found.success, found.f1, found.precision, found.recall) == (hit,) * 4


def test_success_needs_the_count_and_the_places():
    truth = at([[0.0, 30.0], [0.0, 30.0]], [[0.0, 0.0], [0.0, 0.0]], [[2.0, 3.0], [2.0, 3.0]])
    right = at([[0.0, 30.0, 9.0], [0.0, 30.0, 9.0]], [[0.0] * 3] * 2, [[2.0, 3.0, 1.0]] * 2)
    right.mask[0, 2] = False
    found = score(right, truth)  # the second scene has a ghost
    assert (found.success, found.k_acc, found.k_over) == (0.5, 0.5, 0.5)
    assert (found.precision, found.recall, found.f1) == (pytest.approx(4 / 5), 1, pytest.approx(8 / 9))


def test_azimuth_errors_go_the_short_way_round():
    found = score(at([[179.0]], [[0.0]], [[3.0]]), at([[-179.0]], [[0.0]], [[3.0]]))
    assert found.rmse_azimuth_deg == pytest.approx(2, rel=1e-4)


def without(truth: Sources, *names: str) -> Sources:
    """A truth that lacks coordinates."""
    nan = torch.full_like(truth.range_m, torch.nan)
    return dataclasses.replace(truth, **{name: torch.where(truth.mask, nan, 1.0) for name in names})


def test_a_truth_without_range_scores_counts_and_angles():
    """Pairs by angle: 1 and 2 deg, where range would have paired the other way."""
    truth = at([[0.0, 20.0]], [[0.0, 0.0]], [[2.0, 9.0]])
    estimate = at([[22.0, 1.0]], [[0.0, 0.0]], [[2.0, 9.0]])
    found = score(estimate, without(truth, "range_m"))
    assert found.rmse_azimuth_deg == pytest.approx(math.sqrt((1 + 4) / 2), rel=1e-4)
    assert (found.rmse_elevation_deg, found.k_acc, found.success, found.f1) == (0, 1, 1, 1)
    values = found.as_dict()
    unknown = {"k_loc", "rmse_range_m", "median_range_m", "rmspe_m", "gospa_m"}
    assert {name for name, value in values.items() if value is None} == unknown
    assert found.median_azimuth_deg == pytest.approx(1.5, rel=1e-4)


def test_counts_alone_score_counts_alone():
    truth = simulate(SceneSpec(), 5, range(16)).require_truth()
    found = score(truth, without(truth, "azimuth", "elevation", "range_m")).as_dict()
    known = {name: value for name, value in found.items() if value is not None}
    assert known == {"k_acc": 1, "k_under": 0, "k_over": 0, "num_scenes": 16}


def test_an_incomplete_truth_has_a_table_without_a_floor():
    scenes = simulate(SceneSpec(), 5, range(16))
    partial = dataclasses.replace(scenes, truth=None, partial_truth=without(scenes.truth, "range_m"))
    table = evaluate(scenes.truth, partial).as_dict()
    json.dumps(table, allow_nan=False)
    assert table["overall"]["floor"] is None
    assert table["overall"]["efficiency"]["success"] is None
    assert table["overall"]["scores"]["success"] == 1
    assert sum(row["scores"]["num_scenes"] for row in table["by_count"]) == 16
    with pytest.raises(ConfigError, match="lacks range_m"):
        floor_scores(partial)


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


def test_floor_errors_are_drawn_from_the_bound(monkeypatch):
    """A bound of 1 deg, 2 deg, 0.3 m with correlated angles: moments of the draws, in pairs of opposite sign."""
    scenes = simulate(SceneSpec(), 3, range(2), num_sources=torch.tensor([5, 5]))
    one, two, far = math.radians(1), math.radians(2), 0.3
    bound = torch.tensor([[one**2, 0.5 * one * two, 0], [0.5 * one * two, two**2, 0], [0, 0, far**2]]).double()
    monkeypatch.setattr(metrics, "deterministic_crb", lambda _: bound.expand(2, 5, 3, 3))
    found = floor_errors(scenes, draws=2000)
    assert len(found) == 4000
    root = found.error.square().mean((0, 1)).sqrt()
    assert torch.allclose(root, torch.tensor([one, two, far]).double(), rtol=0.03)
    assert torch.equal(found.error[:2000], found.error[2000:])  # opposite errors are of one size
    product = (found.error[..., 0] * found.error[..., 1]).mean() / (one * two)
    assert float(product) == pytest.approx(0.7180, rel=0.03)  # E|xy| at correlation 1/2: (sqrt 3 + pi / 6) / pi
    assert len(floor_errors(scenes, draws=3)) == 6
    assert found.scores().k_acc == 1


@pytest.mark.parametrize("coordinate", range(3))
def test_a_floor_error_in_one_coordinate_moves_the_source_that_far(coordinate, monkeypatch):
    scenes = simulate(SceneSpec(), 3, range(4), num_sources=torch.ones(4, dtype=torch.int64))
    truth = scenes.require_truth()
    bound = torch.zeros(4, truth.max_sources, 3, 3, dtype=torch.float64)
    bound[..., coordinate, coordinate] = 0.02**2
    monkeypatch.setattr(metrics, "deterministic_crb", lambda _: bound)
    found = floor_errors(scenes, draws=3)
    error, distance = found.error[:, 0, coordinate], found.distance[:, 0]
    away, elevation = (value[:, 0].double().repeat(3) for value in (truth.range_m, truth.elevation))
    chord = 2 * away * (error / 2).sin()  # an angle moves it on a circle about the surface
    expected = (chord * elevation.cos(), chord, error)[coordinate]
    assert torch.equal(found.error[:, 0].count_nonzero(-1), torch.ones(12, dtype=torch.int64))
    assert torch.allclose(distance, expected, rtol=1e-4)
    assert torch.allclose(found.gospa, expected, rtol=1e-4)


def test_the_floor_is_that_of_the_true_noise_power():
    """The receiver believes in up to 10 dB more or less; what physics allows does not follow."""
    told, wrong = SceneSpec(), SceneSpec(noise_power_error_db=10)
    scenes, misled = (simulate(spec, 6, range(32)) for spec in (told, wrong))
    assert scenes.true_noise_power is None
    assert torch.equal(misled.true_noise_power, scenes.noise_power)
    assert not torch.allclose(misled.noise_power, scenes.noise_power, rtol=0.1)
    assert floor_scores(misled) == floor_scores(scenes)
    part = misled[4:8]
    assert floor_scores(part) == floor_scores(scenes[4:8])
    assert floor_scores(Scenes.cat([misled[:4], part])) == floor_scores(scenes[:8])


@pytest.mark.parametrize(
    ("name", "value", "floor", "expected"),
    [
        ("k_loc", 3.0, 1.0, 4 / 6),
        ("success", 0.3, 0.6, 0.5),
        ("rmse_range_m", 1.0, 0.25, 0.25),
        ("rmspe_m", 0.0, 0.0, None),
        ("rmspe_m", math.inf, 1.0, 0.0),
        ("success", 0.2, 0.0, None),
    ],
)
def test_efficiency_is_1_at_the_floor(name, value, floor, expected):
    scores = score(at([[0.0]], [[0.0]], [[3.0]]), at([[0.0]], [[0.0]], [[3.0]]))
    at_floor = Row("", dataclasses.replace(scores, **{name: floor}), dataclasses.replace(scores, **{name: floor}))
    if floor:
        assert at_floor.efficiency(name) == 1
    row = Row("", dataclasses.replace(scores, **{name: value}), dataclasses.replace(scores, **{name: floor}))
    assert row.efficiency(name) == (None if expected is None else pytest.approx(expected))


def test_rows_of_a_table_hold_their_own_scenes():
    """Truth of 1 and 2 sources at 0 and 12 dB; the estimate is right at 12 dB and empty at 0 dB."""
    scenes = grid_of_cells(SceneSpec(), 3, [0.0, 12.0], [1, 2], 4)
    estimate = dataclasses.replace(scenes.truth, mask=scenes.truth.mask & (scenes.snr_db > 5).unsqueeze(-1))
    table = evaluate(estimate, scenes)
    assert [(row.label, row.scores.success, row.scores.num_scenes) for row in table.by_snr] == [
        ("0 dB", 0, 8),
        ("12 dB", 1, 8),
    ]
    assert [(row.label, row.scores.k_acc) for row in table.by_count] == [("K = 1", 0.5), ("K = 2", 0.5)]
    assert table.by_snr[0].floor.k_loc > table.by_snr[1].floor.k_loc
    expected = torch.zeros(6, 6, dtype=torch.int64)
    expected[1, 0] = expected[1, 1] = expected[2, 0] = expected[2, 2] = 4
    assert torch.equal(table.confusion, expected)


def test_rows_by_range_and_azimuth_hold_sources_and_cells_hold_scenes():
    """Two sources a scene, at (-20 deg, 1.5 m) and (50 deg, 5 m); the second is 0.5 m off, or missed at 12 dB."""
    two = torch.tensor([2, 2])
    scenes = simulate(SceneSpec(), 4, range(2), num_sources=two, snr_db=torch.tensor([0.0, 12.0]))
    azimuth, far = torch.tensor([[-20.0, 50, 0, 0, 0]] * 2).deg2rad(), torch.tensor([[1.5, 5.0, 1, 1, 1]] * 2)
    truth = dataclasses.replace(scenes.truth, azimuth=azimuth, range_m=far)
    scenes = dataclasses.replace(scenes, truth=truth)
    mask = truth.mask.clone()
    mask[1, 1] = False
    table = evaluate(dataclasses.replace(truth, range_m=far + torch.tensor([0, 0.5, 0, 0, 0]), mask=mask), scenes)
    rows = {row.label: row.scores for row in (*table.by_range, *table.by_azimuth)}
    assert list(rows) == ["1..2 m", "4..6 m", "-30..-15 deg", "45..60 deg"]
    assert (rows["1..2 m"].recall, rows["4..6 m"].recall, rows["1..2 m"].num_scenes) == (1, 0.5, 2)
    assert rows["1..2 m"].rmse_range_m == 0
    assert rows["45..60 deg"].rmse_range_m == pytest.approx(((0.5**2 + 2**2) / 2) ** 0.5, rel=1e-5)
    assert [row.label for row in table.by_cell] == ["K = 2, 0 dB", "K = 2, 12 dB"]
    assert [row.scores.k_acc for row in table.by_cell] == [1, 0]
    assert table.by_range[0].floor.rmse_range_m < table.by_range[1].floor.rmse_range_m
    flat = list(table.flat())
    assert [row["group"] for row in flat].count("by_range") == 2
    assert flat[0]["k_loc"] == table.overall.scores.k_loc
    assert flat[0]["floor_k_loc"] == table.overall.floor.k_loc
    assert len({tuple(row) for row in flat}) == 1


def test_spread_snrs_are_put_into_bins_of_5_db():
    spec = SceneSpec(snr_db=(-8, 23))
    scenes = simulate(spec, 3, range(200))
    table = evaluate(scenes.truth, scenes)
    assert [row.label for row in table.by_snr] == [f"{low}..{low + 5} dB" for low in range(-5, 20, 5)]
    counts = [row.scores.num_scenes for row in table.by_snr]
    edges = itertools.pairwise([-99, 0, 5, 10, 15, 99])
    inside = [int(((scenes.snr_db >= low) & (scenes.snr_db < high)).sum()) for low, high in edges]
    assert counts == inside


def test_floor_falls_with_snr():
    scenes = [grid_of_cells(SceneSpec(), 3, [snr], [2], 64) for snr in (0.0, 10.0, 20.0)]
    floors = [floor_scores(s).k_loc for s in scenes]
    assert floors[0] > floors[1] > floors[2]
