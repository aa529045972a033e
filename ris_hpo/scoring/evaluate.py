"""Scores of an estimate as a table: all scenes, per SNR and per number of sources, each row with its floor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources
from ris_hpo.scoring.k_loc import efficiency
from ris_hpo.scoring.metrics import SceneErrors, Scores, floor_errors, scene_errors

HIGHER_IS_BETTER = ("k_acc", "precision", "recall", "f1", "success")
SNR_BINS_DB = (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0)


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
        confusion: [K_max + 1, K_max + 1] scenes with true count (row) and estimated count (column).
        errors: per scene, to be grouped in other ways.
        floor: likewise, ``draws`` times the scenes; None where the truth is not complete.
    """

    overall: Row
    by_snr: list[Row]
    by_count: list[Row]
    confusion: Tensor
    errors: SceneErrors
    floor: SceneErrors | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "overall": self.overall.as_dict(),
            "by_snr": [row.as_dict() for row in self.by_snr],
            "by_count": [row.as_dict() for row in self.by_count],
            "confusion": self.confusion.tolist(),
        }


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
    truth = scenes.known_truth()
    errors = scene_errors(estimate, truth)
    floor = None if scenes.truth is None else floor_errors(scenes, draws)

    def row(label: str, chosen: Tensor) -> Row:
        bound = None if floor is None else floor[chosen.repeat(len(floor) // len(errors))].scores()
        return Row(label, errors[chosen].scores(), bound)

    everything = torch.ones(len(errors), dtype=torch.bool, device=errors.num_true.device)
    by_snr = [] if scenes.snr_db is None else [row(label, mask) for label, mask in _snr_groups(scenes.snr_db).items()]
    counts = sorted(set(errors.num_true.tolist()))
    by_count = [row(f"K = {k}", errors.num_true == k) for k in counts]
    size = 1 + max(truth.max_sources, int(errors.num_estimated.max()))
    pairs = errors.num_true * size + errors.num_estimated
    confusion = torch.bincount(pairs, minlength=size * size).view(size, size)
    return Evaluation(row("all", everything), by_snr, by_count, confusion, errors, floor)


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
