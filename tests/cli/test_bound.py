"""The command ``bound`` and the rows of ``evaluate --csv``."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from ris_hpo import load_scenes, source_bounds
from ris_hpo.physics.bounds import deterministic_crb
from tests.cli.conftest import Cli


def test_bounds_of_a_file_are_those_of_each_source(cli: Cli) -> None:
    assert cli("simulate", "--num-scenes", 3, "--out", "s.npz").code == 0
    found = cli("bound", "s.npz", "--out", "b.csv", "--json")
    assert found.code == 0
    scenes = load_scenes("s.npz")
    assert scenes.truth is not None
    rows = found.json["sources"]
    assert len(rows) == int(scenes.truth.num_sources.sum())
    with Path("b.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    variance = deterministic_crb(scenes)
    for row, line in zip(rows, lines, strict=True):
        expected = variance[row["scene"], row["source"], 2, 2].item() ** 0.5
        assert row["std_range_m"] == pytest.approx(expected, rel=1e-6)
        assert float(line["std_range_m"]) == pytest.approx(expected, rel=1e-6)
    stochastic = source_bounds(scenes, "stochastic")
    other = cli("bound", "s.npz", "--kind", "stochastic", "--json").json["sources"][0]
    assert other["std_position_m"] == pytest.approx(stochastic.position_m[0, 0].item(), rel=1e-6)


def test_bounds_of_drawn_scenes_fall_with_snr_and_leave_out_what_is_known(cli: Cli) -> None:
    draw = ["bound", "--counts", "1", "--snr-db", "0,20", "--per-cell", 1, "--json"]
    quiet, loud = cli(*draw, "--set", "elevation_deg=[5.0, 5.0]").json["sources"]
    assert loud["std_azimuth_deg"] == pytest.approx(quiet["std_azimuth_deg"] / 10, rel=0.9)
    assert loud["std_elevation_deg"] == 0
    assert "median over sources" in cli(*draw[:-1]).out


def test_evaluate_writes_every_row_as_csv(cli: Cli) -> None:
    cells = ["--snr-db", "10,20", "--counts", "1,2", "--per-cell", 1]
    assert cli("evaluate", "--estimator", "spectrum-maxima", *cells, "--csv", "rows.csv").code == 0
    with Path("rows.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows if row["group"] == "by_cell"] == [
        "K = 1, 10 dB",
        "K = 1, 20 dB",
        "K = 2, 10 dB",
        "K = 2, 20 dB",
    ]
    assert {"by_range", "by_azimuth", "by_snr", "by_count", "overall"} < {row["group"] for row in rows}
    assert all(row["floor_success"] for row in rows)


def test_a_row_of_elements_is_scored_without_its_elevation(cli: Cli) -> None:
    assert cli("simulate", "--surface", "linear-64", "--num-scenes", 4, "--snr-db", 20, "--out", "s.npz").code == 0
    with np.load("s.npz") as arrays:
        plain = {name: arrays[name] for name in arrays.files if name != "given"}
    np.savez("plain.npz", **plain)  # a file of one's own
    for name in ("s.npz", "plain.npz"):
        found = cli("evaluate", "--estimator", "spectrum-maxima", "--surface", "linear-64", "--scenes", name, "--json")
        overall = found.json["overall"]
        assert overall["floor"]["rmse_elevation_deg"] == 0
        assert overall["scores"]["rmse_elevation_deg"] == 0
        assert overall["floor"]["success"] > 0.5
