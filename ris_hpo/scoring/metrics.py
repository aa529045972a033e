"""Scores of estimated sources against the truth, and the floor that the Cramer-Rao bound sets for each.

    k_loc = (1 - K_acc) + RMSE_az / 5 deg + RMSE_el / 5 deg + RMSE_r / 1 m - success          (lower is better, -1..7)

RMSEs run over the max(K, K^) slots of every scene with errors capped at 10 deg, 10 deg and 2 m; a missed source or a
ghost counts as a capped error, so the composite is bounded and no scene is ever dropped.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ris_hpo.errors import ConfigError, NumericalError
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import TOLERANCE, Sources
from ris_hpo.scoring.matching import match

CAP = (math.radians(10), math.radians(10), 2.0)
GOSPA_CUTOFF_M = 2.0


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures over a set of scenes; angles in degrees, lengths in metres.

    ``k_acc``, ``k_under``, ``k_over`` sum to 1. ``success`` is the share of scenes with K^ = K and every source within
    5 deg, 5 deg and 1 m. ``rmspe_m`` and the medians run over matched pairs, uncapped; without any pair they are
    infinite (``null`` in JSON). ``gospa_m`` has p = 2, alpha = 2 and a cut-off of 2 m (Rahmathullah,
    Garcia-Fernandez and Svensson, "Generalized optimal sub-pattern assignment metric", FUSION 2017).
    """

    k_loc: float
    k_acc: float
    k_under: float
    k_over: float
    precision: float
    recall: float
    f1: float
    success: float
    rmse_azimuth_deg: float
    rmse_elevation_deg: float
    rmse_range_m: float
    rmspe_m: float
    gospa_m: float
    median_azimuth_deg: float
    median_elevation_deg: float
    median_range_m: float
    num_scenes: int

    def as_dict(self) -> dict[str, float | None]:
        """Name to figure, fit for JSON: None where infinite."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scores:
        """Inverse of :meth:`as_dict`."""
        finite: dict[str, Any] = {name: math.inf if value is None else value for name, value in values.items()}
        return cls(**finite)


@dataclass(frozen=True, slots=True)
class SceneErrors:
    """Per-scene errors from which every score is a sum; index it to score a subset.

    Attributes:
        error: [B, W, 3] absolute error in azimuth (rad), elevation (rad), range (m); meaningless where not paired.
        distance: [B, W] m.
        paired: [B, W] bool.
        num_true: [B] int64.
        num_estimated: [B] int64.
    """

    error: Tensor
    distance: Tensor
    paired: Tensor
    num_true: Tensor
    num_estimated: Tensor

    def __getitem__(self, index: Any) -> SceneErrors:
        return SceneErrors(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def __len__(self) -> int:
        return len(self.num_true)

    def hits(self) -> Tensor:
        """[B, W] bool: paired and within 5 deg, 5 deg, 1 m."""
        return self.paired & (self.error < self.error.new_tensor(TOLERANCE)).all(-1)

    def success(self) -> Tensor:
        """[B] bool: right count and every source within the tolerance."""
        return (self.num_true == self.num_estimated) & (self.hits().sum(-1) == self.num_true)

    def scores(self) -> Scores:
        """Pool the scenes into one set of figures."""
        cap = self.error.new_tensor(CAP)
        capped = torch.minimum(self.error, cap).square() * self.paired.unsqueeze(-1)
        slots = torch.maximum(self.num_true, self.num_estimated)
        unpaired = (slots - self.paired.sum(-1)).sum()
        mean_square = (capped.sum((0, 1)) + unpaired * cap.square()) / slots.sum().clamp(min=1)
        rmse_az, rmse_el, rmse_r = mean_square.sqrt().tolist()
        rmse_az, rmse_el = math.degrees(rmse_az), math.degrees(rmse_el)

        right = (self.num_true == self.num_estimated).double().mean().item()
        under = (self.num_estimated < self.num_true).double().mean().item()
        success = self.success().double().mean().item()
        hits = self.hits().sum().item()
        precision = hits / max(1, int(self.num_estimated.sum().item()))
        recall = hits / max(1, int(self.num_true.sum().item()))
        gospa = (
            self.distance.clamp(max=GOSPA_CUTOFF_M).square().mul(self.paired).sum(-1)
            + GOSPA_CUTOFF_M**2 / 2 * (self.num_true + self.num_estimated - 2 * self.paired.sum(-1))
        ).sqrt()
        pairs = self.error[self.paired]
        medians = pairs.median(0).values.tolist() if len(pairs) else [math.inf] * 3
        rmspe = self.distance[self.paired].square().mean().sqrt().item() if len(pairs) else math.inf
        k_loc = (1 - right) + rmse_az / 5 + rmse_el / 5 + rmse_r - success
        return Scores(
            k_loc=k_loc,
            k_acc=right,
            k_under=under,
            k_over=max(0.0, 1 - right - under),
            precision=precision,
            recall=recall,
            f1=2 * hits / max(1, int((self.num_true + self.num_estimated).sum().item())),
            success=success,
            rmse_azimuth_deg=rmse_az,
            rmse_elevation_deg=rmse_el,
            rmse_range_m=rmse_r,
            rmspe_m=rmspe,
            gospa_m=gospa.double().mean().item(),
            median_azimuth_deg=math.degrees(medians[0]),
            median_elevation_deg=math.degrees(medians[1]),
            median_range_m=medians[2],
            num_scenes=len(self),
        )


def scene_errors(estimate: Sources, truth: Sources) -> SceneErrors:
    """Match and measure.

    Raises:
        ConfigError: no scene, or not as many estimates as true ones.
        NumericalError: an estimate that is not finite.
    """
    if len(estimate) != len(truth) or len(truth) == 0:
        raise ConfigError(f"estimates of {len(estimate)} scenes beside the truth of {len(truth)}; cannot score them")
    for name in ("azimuth", "elevation", "range_m"):
        if not torch.isfinite(getattr(estimate, name)[estimate.mask]).all():
            raise NumericalError(f"estimated {name} is not finite; cannot score it")
    matched, truth, paired = match(estimate.detach(), truth)
    return _errors(matched, truth, paired)


def score(estimate: Sources, truth: Sources) -> Scores:
    """Scores of an estimate, [B] scenes pooled."""
    return scene_errors(estimate, truth).scores()


def floor_errors(scenes: Scenes, draws: int = 8, seed: int = 0) -> SceneErrors:
    """What the deterministic Cramer-Rao bound leaves possible on these very scenes, K being known.

    Errors in (az, el, r) are drawn from N(0, CRB) of every scene ``draws`` times, antithetically paired, and measured
    like an estimate's. A direction in which the scene carries no information gives a capped error.

    Returns:
        SceneErrors [draws * B], draws outermost.
    """
    truth = scenes.require_truth()
    covariance = deterministic_crb(scenes)
    variance, axes = torch.linalg.eigh(covariance)  # 3 x 3 per source
    root = axes * variance.clamp(min=0, max=1e12).sqrt().unsqueeze(-2)
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(-(-draws // 2), *truth.mask.shape, 3, generator=generator, dtype=torch.float64)
    normal = torch.cat([half, -half])[:draws].to(root.device)
    error = torch.einsum("bkij,dbkj->dbki", root, normal).flatten(0, 1)
    repeated = truth.to(torch.float64)[torch.arange(len(truth)).repeat(draws)]
    drawn = dataclasses.replace(
        repeated,
        azimuth=repeated.azimuth + error[..., 0],
        elevation=repeated.elevation + error[..., 1],
        range_m=repeated.range_m + error[..., 2],
    )
    return _errors(drawn, repeated, repeated.mask)


def floor_scores(scenes: Scenes, draws: int = 8) -> Scores:
    """Scores at the floor: the mark beside every result."""
    return floor_errors(scenes, draws).scores()


def _errors(matched: Sources, truth: Sources, paired: Tensor) -> SceneErrors:
    error = torch.stack(
        [
            (matched.azimuth - truth.azimuth).abs(),
            (matched.elevation - truth.elevation).abs(),
            (matched.range_m - truth.range_m).abs(),
        ],
        dim=-1,
    ).double()
    distance = (matched.positions() - truth.positions()).norm(dim=-1).double()
    return SceneErrors(error, distance, paired, truth.num_sources, matched.num_sources)
