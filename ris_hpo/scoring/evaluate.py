"""Scores of an estimate as a table: all scenes, per SNR, number of sources, range and azimuth, each with its floor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ris_hpo.errors import ConfigError
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.k_loc import efficiency
from ris_hpo.scoring.metrics import SceneErrors, Scores, floor_errors, scene_errors

HIGHER_IS_BETTER = ("k_acc", "precision", "recall", "f1", "success")
SNR_BINS_DB = (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0)
RANGE_BINS_M = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, math.inf)
AZIMUTH_BINS_DEG = tuple(float(edge) for edge in range(-90, 91, 15))


@dataclass(frozen=True, slots=True)
class Row:
    """Scores of one group of scenes and the floor on the same scenes; no floor where the truth is not complete."""

    label: str
    scores: Scores
    floor: Scores | None

    def efficiency(self, name: str = "k_loc") -> float | None:
        """How near the floor a figure is: 1 at the floor.

        Higher-is-better figures: value / floor. Errors: floor / value. k_loc: (7 - value) / (7 - floor), the share of
        the way from the worst score to the floor. None where that says nothing (0 / 0, no source, no floor).
        """
        if self.floor is None:
            return None
        value, floor = getattr(self.scores, name), getattr(self.floor, name)
        if name == "k_loc":
            return efficiency(value, floor)
        above, below = (value, floor) if name in HIGHER_IS_BETTER else (floor, value)
        return float(above / below) if below > 0 and math.isfinite(above) else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("k_loc", "success", "rmse_azimuth_deg", "rmse_elevation_deg", "rmse_range_m", "rmspe_m", "gospa_m")
        efficiency = {name: self.efficiency(name) for name in names}
        return {
            "label": self.label,
            "scores": self.scores.as_dict(),
            "floor": None if self.floor is None else self.floor.as_dict(),
            "efficiency": efficiency,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An estimator's table.

    Attributes:
        overall: all scenes.
        by_snr: one row per SNR value, or per 5 dB bin where SNRs are spread; empty when the SNR is not known.
        by_count: one row per true number of sources.
        by_cell: one row per true number of sources and SNR.
        by_range: one row per interval of range, of true sources instead of scenes: K_acc is the share with a partner.
        by_azimuth: likewise per 15 degrees of azimuth.
        confusion: [K_max + 1, K_max + 1] scenes with true count (row) and estimated count (column).
        errors: per scene, to be grouped in other ways.
        floor: likewise, ``draws`` times the scenes; None where the truth is not complete.
    """

    overall: Row
    by_snr: list[Row]
    by_count: list[Row]
    by_cell: list[Row]
    by_range: list[Row]
    by_azimuth: list[Row]
    confusion: Tensor
    errors: SceneErrors
    floor: SceneErrors | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "overall": self.overall.as_dict(),
            **{name: [row.as_dict() for row in rows] for name, rows in self.groups().items()},
            "confusion": self.confusion.tolist(),
        }

    def groups(self) -> dict[str, list[Row]]:
        """The rows beside ``overall``."""
        return {name: getattr(self, name) for name in ("by_snr", "by_count", "by_cell", "by_range", "by_azimuth")}

    def flat(self) -> Iterator[dict[str, Any]]:
        """One flat record a row, for CSV: group, label, each figure, its floor as ``floor_*``, efficiency of k_loc."""
        for group, rows in {"overall": [self.overall], **self.groups()}.items():
            for row in rows:
                floor = {} if row.floor is None else row.floor.as_dict()
                figures = {name: value for name, value in row.scores.as_dict().items() if name != "num_scenes"}
                bounds = {f"floor_{name}": floor.get(name) for name in figures}
                head = {"group": group, "label": row.label, "number": row.scores.num_scenes}
                yield {**head, **figures, **bounds, "efficiency": row.efficiency()}


def evaluate(estimate: Sources, scenes: Scenes, *, draws: int = 8) -> Evaluation:
    """Score an estimate on its scenes.

    Args:
        estimate: [B].
        scenes: with truth, complete or in part.
        draws: draws from the Cramer-Rao bound per scene for the floor.

    Raises:
        ConfigError: scenes without truth, none at all, or not as many as estimates.
        NumericalError: an estimate that is not finite.
    """
    return evaluate_parts([(estimate, scenes)], draws=draws)


def evaluate_parts(parts: Iterable[tuple[Sources, Scenes]], *, draws: int = 8) -> Evaluation:
    """Score estimates of scenes that come part by part; only errors and truth of a part are kept.

    Args:
        parts: estimates with their scenes; the floor's draws are those of the part.
        draws: as :func:`evaluate`.

    Raises:
        ConfigError: scenes without truth, none at all, or not as many as estimates.
        NumericalError: an estimate that is not finite.
    """
    truths, found, floors, levels = [], [], [], []
    for number, (estimate, scenes) in enumerate(parts):
        truths.append(scenes.known_truth())
        found.append(scene_errors(estimate, truths[-1]))
        levels.append(scenes.snr_db)
        if scenes.truth is not None:
            floors.append(floor_errors(scenes, draws, seed=number))
    if not truths:
        raise ConfigError("no scenes to score")
    truth, errors = Sources.cat(truths), SceneErrors.cat(found)
    floor = SceneErrors.cat(floors, draws) if len(floors) == len(truths) else None
    known_levels = [level for level in levels if level is not None]
    snr_db = torch.cat(known_levels) if len(known_levels) == len(levels) else None

    def row(label: str, chosen: Tensor) -> Row:
        bound = None if floor is None else floor[chosen.repeat(len(floor) // len(errors))].scores()
        return Row(label, errors[chosen].scores(), bound)

    everything = torch.ones(len(errors), dtype=torch.bool, device=errors.num_true.device)
    snr = {} if snr_db is None else _snr_groups(snr_db)
    by_snr = [row(label, mask) for label, mask in snr.items()]
    counts = {f"K = {k}": errors.num_true == k for k in sorted(set(errors.num_true.tolist()))}
    by_count = [row(label, mask) for label, mask in counts.items()]
    cells = {f"{k}, {level}": few & mask for k, few in counts.items() for level, mask in snr.items()}
    by_cell = [row(label, mask) for label, mask in cells.items() if bool(mask.any())]

    sources = errors.of_sources(truth.mask)
    bounds = None if floor is None else floor.of_sources(truth.mask.repeat(len(floor) // len(errors), 1))

    def by_source(value: Tensor, edges: tuple[float, ...], unit: str) -> list[Row]:
        rows = []
        for low, high in itertools.pairwise(edges):
            chosen = (value >= low) & (value < high)
            if bool(chosen.any()):
                least = None if bounds is None else bounds[chosen.repeat(len(bounds) // len(sources))].scores()
                label = f"{low:g}..{high:g} {unit}" if high < math.inf else f"from {low:g} {unit}"
                rows.append(Row(label, sources[chosen].scores(), least))
        return rows

    by_range = by_source(truth.range_m[truth.mask], RANGE_BINS_M, "m")
    by_azimuth = by_source(truth.azimuth[truth.mask].rad2deg(), AZIMUTH_BINS_DEG, "deg")
    size = 1 + max(truth.max_sources, int(errors.num_estimated.max()))
    pairs = errors.num_true * size + errors.num_estimated
    confusion = torch.bincount(pairs, minlength=size * size).view(size, size)
    groups = (by_snr, by_count, by_cell, by_range, by_azimuth)
    return Evaluation(row("all", everything), *groups, confusion, errors, floor)


def _snr_groups(snr_db: Tensor) -> Mapping[str, Tensor]:
    """One group per value if there are at most 12, else 5 dB bins; the outer bins include all values beyond them."""
    values = snr_db.unique()
    if len(values) <= 12:
        return {f"{float(value):g} dB": snr_db == value for value in values}
    groups = {}
    for low, high in itertools.pairwise(SNR_BINS_DB):
        lowest = low if low > SNR_BINS_DB[0] else -torch.inf
        highest = high if high < SNR_BINS_DB[-1] else torch.inf
        mask = (snr_db >= lowest) & (snr_db < highest)
        if bool(mask.any()):
            groups[f"{low:g}..{high:g} dB"] = mask
    return groups
