"""The tables of ``evaluate``: all scenes, then rows per SNR, number of sources, range and azimuth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ris_hpo.cli import display

if TYPE_CHECKING:
    from ris_hpo.scoring.evaluate import Evaluation, Row

_NAMES = {
    "k_loc": "k_loc",
    "k_acc": "right count (K_acc)",
    "k_under": "too few (under)",
    "k_over": "too many (over)",
    "f1": "F1 at 5 deg, 5 deg, 1 m",
    "success": "success",
    "rmse_azimuth_deg": "RMSE azimuth, deg",
    "rmse_elevation_deg": "RMSE elevation, deg",
    "rmse_range_m": "RMSE range, m",
    "rmspe_m": "RMSPE, m",
    "gospa_m": "GOSPA, m",
}
_COUNT_COLUMNS = ("k_acc", "k_under", "k_over", "f1", "success")
_ERROR_COLUMNS = ("rmse_azimuth_deg", "rmse_elevation_deg", "rmse_range_m", "rmspe_m", "gospa_m")
_SOURCE_COLUMNS = ("recall", "rmse_azimuth_deg", "rmse_elevation_deg", "rmse_range_m")
_ALONE = ("k_acc", "k_under", "k_over")  # shown without a floor, which assumes a known count: 1, 0, 0


def show(evaluation: Evaluation, name: str, rate: float | None) -> None:
    """Print the tables on stdout."""
    overall = evaluation.overall
    speed = "" if rate is None else f", {rate:.1f} scenes/s"
    rows: list[tuple[object, ...]] = []
    for key, label in _NAMES.items():
        share = None if key in ("k_under", "k_over") else overall.efficiency(key)
        floor = None if overall.floor is None else getattr(overall.floor, key)
        rows.append((label, getattr(overall.scores, key), floor, share))
    display.table(f"{name}: {overall.scores.num_scenes} scenes{speed}", ["", "value", "floor", "efficiency"], rows)
    if overall.floor is None:
        display.print_note("the truth is not complete: no floor, and none of the figures that need the rest of it")
    for title, group in (("SNR", evaluation.by_snr), ("sources", evaluation.by_count)):
        if group:
            counting = ["k_loc", "efficiency", "K_acc", "under", "over", "F1", "success"]
            counts = [(*_leading(row), *_cells(row, _COUNT_COLUMNS)) for row in group]
            display.table(f"\nby {title}: value (floor)", [title, *counting], counts)
            errors = [(row.label, *_cells(row, _ERROR_COLUMNS)) for row in group]
            columns = ["RMSE azimuth, deg", "elevation, deg", "range, m", "RMSPE, m", "GOSPA, m"]
            display.table("", [title, *columns], errors)
    for title, group in (("range", evaluation.by_range), ("azimuth", evaluation.by_azimuth)):
        if group:
            found = [(row.label, row.scores.num_scenes, *_cells(row, _SOURCE_COLUMNS)) for row in group]
            columns = ["sources", "found", "RMSE azimuth, deg", "elevation, deg", "range, m"]
            display.table(f"\nby {title} of the true sources: value (floor)", [title, *columns], found)


def _leading(row: Row) -> tuple[object, ...]:
    share = row.efficiency()
    return (row.label, *_cells(row, ("k_loc",)), None if share is None else f"{share:.2f}")


def _cells(row: Row, keys: Sequence[str]) -> list[str]:
    found = []
    for key in keys:
        value = getattr(row.scores, key)
        alone = key in _ALONE or row.floor is None
        text = "-" if math.isnan(value) else f"{value:.2f}"
        found.append(text if alone else f"{text} ({getattr(row.floor, key):.2f})")
    return found
