"""Scores of estimated sources against the truth, and the floor that the Cramer-Rao bound sets for each.

    k_loc = (1 - K_acc) + RMSE_az / 5 deg + RMSE_el / 5 deg + RMSE_r / 1 m - success          (lower is better, -1..7)

RMSEs run over the max(K, K^) slots of every scene with errors capped at 10 deg, 10 deg and 2 m; a source that is missed
or estimated in excess counts as a capped error, so the composite is bounded and no scene is dropped.

A coordinate that is known beforehand (``Sources.given``) is left out: its errors are 0, of missed sources too, so that
the composite lies in -1..5.

A coordinate that the truth does not give is NaN there. Figures that need it are NaN (``null`` in JSON); the others are
computed from what is known, a hit being a pair within the tolerances of the known coordinates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ris_hpo.errors import ConfigError, NumericalError
from ris_hpo.physics.bounds import deterministic_crb
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import TOLERANCE, Sources
from ris_hpo.scoring.matching import assignment, distances, match

CAP = (math.radians(10), math.radians(10), 2.0)
GOSPA_CUTOFF_M = 2.0
COORDINATES = ("azimuth", "elevation", "range_m")


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures over a set of scenes; angles in degrees, lengths in metres.

    ``k_acc``, ``k_under``, ``k_over`` sum to 1. ``success`` is the share of scenes with K^ = K and every source within
    5 deg, 5 deg and 1 m. ``precision``, ``recall`` and ``f1`` count pairs within the same tolerances, over all scenes
    together. ``rmspe_m`` and the medians run over matched pairs, uncapped; without any pair they are infinite. All of
    these share the assignment of least total distance. ``gospa_m`` is the mean over scenes of the GOSPA metric with
    p = 2, alpha = 2 and a cut-off of 2 m, a minimum over assignments of its own (Rahmathullah, Garcia-Fernandez and
    Svensson, "Generalized optimal sub-pattern assignment metric", FUSION 2017).
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
        """Name to figure, fit for JSON: None where infinite or not known."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scores:
        """Inverse of :meth:`as_dict`, for scores against a complete truth."""
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
        gospa: [B] m.
        known: which of azimuth, elevation and range the truth gives.
        given: which of them are known beforehand and left out of all figures.
    """

    error: Tensor
    distance: Tensor
    paired: Tensor
    num_true: Tensor
    num_estimated: Tensor
    gospa: Tensor
    known: tuple[bool, bool, bool] = (True, True, True)
    given: tuple[bool, bool, bool] = (False, False, False)

    def __getitem__(self, index: Any) -> SceneErrors:
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("known", "given")]
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in names})

    def __len__(self) -> int:
        return len(self.num_true)

    @staticmethod
    def cat(parts: Sequence[SceneErrors], draws: int = 1) -> SceneErrors:
        """Join parts of one kind of truth, of whose scenes each has ``draws`` errors, draws outermost."""
        width = max(part.paired.shape[1] for part in parts)
        fields: dict[str, Any] = {}
        for name in (field.name for field in dataclasses.fields(SceneErrors) if field.name not in ("known", "given")):
            values = [getattr(part, name) for part in parts]
            if name in ("distance", "paired"):
                values = [F.pad(value, (0, width - value.shape[1])) for value in values]
            elif name == "error":
                values = [F.pad(value, (0, 0, 0, width - value.shape[1])) for value in values]
            fields[name] = torch.cat([value.unflatten(0, (draws, -1)) for value in values], 1).flatten(0, 1)
        return dataclasses.replace(parts[0], **fields)

    def hits(self) -> Tensor:
        """[B, W] bool: paired and within 5 deg, 5 deg, 1 m, as far as these are known."""
        known, given = (torch.tensor(each, device=self.error.device) for each in (self.known, self.given))
        return self.paired & ((self.error < self.error.new_tensor(TOLERANCE)) | ~known | given).all(-1)

    def success(self) -> Tensor:
        """[B] bool: right count and every source within the tolerance."""
        return (self.num_true == self.num_estimated) & (self.hits().sum(-1) == self.num_true)

    def of_sources(self, present: Tensor) -> SceneErrors:
        """Every true source as a scene of its own: found if it has a partner; sources in excess belong to none.

        Args:
            present: [B, W'] bool, slots that hold a true source.
        """
        present = F.pad(present, (0, self.paired.shape[1] - present.shape[1]))
        paired = self.paired[present].unsqueeze(-1)
        return dataclasses.replace(
            self,
            error=self.error[present].unsqueeze(1),
            distance=self.distance[present].unsqueeze(1),
            paired=paired,
            num_true=torch.ones_like(paired[:, 0], dtype=torch.long),
            num_estimated=paired[:, 0].long(),
            gospa=torch.full_like(self.distance[present], torch.nan),
        )

    def scores(self) -> Scores:
        """Pool the scenes into one set of figures."""
        cap = self.error.new_tensor(CAP) * ~torch.tensor(self.given, device=self.error.device)
        capped = torch.minimum(self.error, cap).square() * self.paired.unsqueeze(-1)
        slots = torch.maximum(self.num_true, self.num_estimated)
        unpaired = (slots - self.paired.sum(-1)).sum()
        mean_square = (capped.sum((0, 1)) + unpaired * cap.square()) / slots.sum().clamp(min=1)
        rmse_az, rmse_el, rmse_r = mean_square.sqrt().tolist()
        rmse_az, rmse_el = math.degrees(rmse_az), math.degrees(rmse_el)

        right = (self.num_true == self.num_estimated).double().mean().item()
        under = (self.num_estimated < self.num_true).double().mean().item()
        located, complete = any(self.known), all(self.known)
        success = self.success().double().mean().item() if located else math.nan
        hits = self.hits().sum().item() if located else math.nan
        pairs = self.error[self.paired]
        medians = pairs.quantile(0.5, dim=0).tolist() if len(pairs) else [math.inf] * 3
        rmspe = self.distance[self.paired].square().mean().sqrt().item() if len(pairs) else math.inf
        azimuth, elevation, range_m = (1.0 if known else math.nan for known in self.known)
        return Scores(
            k_loc=(1 - right) + rmse_az / 5 + rmse_el / 5 + rmse_r - success,
            k_acc=right,
            k_under=under,
            k_over=max(0.0, 1 - right - under),
            precision=hits / max(1, int(self.num_estimated.sum().item())),
            recall=hits / max(1, int(self.num_true.sum().item())),
            f1=2 * hits / max(1, int((self.num_true + self.num_estimated).sum().item())),
            success=success,
            rmse_azimuth_deg=rmse_az * azimuth,
            rmse_elevation_deg=rmse_el * elevation,
            rmse_range_m=rmse_r * range_m,
            rmspe_m=rmspe if complete else math.nan,
            gospa_m=self.gospa.mean().item() if complete else math.nan,
            median_azimuth_deg=math.degrees(medians[0]) * azimuth,
            median_elevation_deg=math.degrees(medians[1]) * elevation,
            median_range_m=medians[2] * range_m,
            num_scenes=len(self),
        )


def scene_errors(estimate: Sources, truth: Sources) -> SceneErrors:
    """Match and measure.

    Args:
        estimate: [B].
        truth: [B]; a coordinate that is NaN for a source is not known of any.

    Raises:
        ConfigError: no scene, or not as many estimates as true ones.
        NumericalError: an estimate that is not finite.
    """
    if len(estimate) != len(truth) or len(truth) == 0:
        raise ConfigError(f"estimates of {len(estimate)} scenes beside the truth of {len(truth)}; cannot score them")
    for name in COORDINATES:
        if not torch.isfinite(getattr(estimate, name)[estimate.mask]).all():
            raise NumericalError(f"estimated {name} is not finite; cannot score it")
    azimuth, elevation, range_m = (not bool(getattr(truth, n)[truth.mask].isnan().any()) for n in COORDINATES)
    known = (azimuth, elevation, range_m)
    if not all(known):
        return _partial_errors(estimate.detach(), truth, known)
    matched, truth, paired = match(estimate.detach(), truth)
    return SceneErrors(
        _coordinate_errors(matched, truth),
        (matched.positions() - truth.positions()).norm(dim=-1).double(),
        paired,
        truth.num_sources,
        matched.num_sources,
        _gospa(matched, truth),
        given=_given(truth),
    )


def score(estimate: Sources, truth: Sources) -> Scores:
    """Scores of an estimate, [B] scenes pooled."""
    return scene_errors(estimate, truth).scores()


def floor_errors(scenes: Scenes, draws: int = 8, seed: int = 0) -> SceneErrors:
    """Errors of an estimator that attains the deterministic Cramer-Rao bound on these scenes and knows K.

    Errors in (az, el, r) are drawn from N(0, CRB) of every scene ``draws`` times, every second one the negative of
    another. Each belongs to its own source: only GOSPA looks for another assignment, being a minimum over all. A
    direction in which the scene carries no information gives a capped error.

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
    distance = (drawn.positions() - repeated.positions()).norm(dim=-1)
    count = repeated.num_sources
    gospa = _gospa(drawn, repeated)
    return SceneErrors(error.abs(), distance, repeated.mask, count, count, gospa, given=_given(truth))


def floor_scores(scenes: Scenes, draws: int = 8) -> Scores:
    """Scores of :func:`floor_errors`, printed with every result."""
    return floor_errors(scenes, draws).scores()


def _coordinate_errors(estimate: Sources, truth: Sources) -> Tensor:
    """Absolute errors [..., 3] of slot against slot; azimuth the short way round."""
    azimuth, elevation, range_m = ((getattr(estimate, n) - getattr(truth, n)).abs() for n in COORDINATES)
    azimuth = torch.where(azimuth > math.pi, (2 * math.pi - azimuth).abs(), azimuth)
    return torch.stack([azimuth, elevation, range_m], dim=-1).double()


def _gospa(estimate: Sources, truth: Sources) -> Tensor:
    """GOSPA of every scene, float64 [B] in m: the least root of sum_pairs min(d, c)^2 + (c^2 / 2) * unpaired ones.

    A pair costs at most what its two members cost unpaired, so the minimum has as many pairs as both sides allow.
    """
    cost = distances(estimate, truth).clamp(max=GOSPA_CUTOFF_M).square()
    order = assignment(cost, truth.mask, estimate.mask)
    paired = truth.mask & estimate.mask.gather(1, order)
    total = (cost.gather(2, order.unsqueeze(-1)).squeeze(-1) * paired).sum(-1)
    unpaired = truth.num_sources + estimate.num_sources - 2 * paired.sum(-1)
    return (total + GOSPA_CUTOFF_M**2 / 2 * unpaired).sqrt()


def _partial_errors(estimate: Sources, truth: Sources, known: tuple[bool, bool, bool]) -> SceneErrors:
    """Errors where the truth lacks a coordinate: pairs by what is known, in tolerances; no pairs by counts alone."""
    width = max(estimate.max_sources, truth.max_sources)
    estimate, truth = estimate.padded(width), truth.padded(width)
    estimate_slots, truth_slots = (
        dataclasses.replace(each, **{name: getattr(each, name).unsqueeze(dim) for name in COORDINATES})
        for each, dim in ((estimate, 1), (truth, 2))
    )
    error = _coordinate_errors(estimate_slots, truth_slots)[..., list(known)]
    cost = (error / error.new_tensor(TOLERANCE)[list(known)]).square().sum(-1).sqrt()
    matched = estimate.take(assignment(cost, truth.mask, estimate.mask))
    paired = matched.mask & truth.mask & any(known)
    nothing = torch.full(truth.mask.shape, torch.nan, dtype=torch.float64, device=truth.mask.device)
    counts = truth.num_sources, matched.num_sources
    errors = _coordinate_errors(matched, truth)
    return SceneErrors(errors, nothing, paired, *counts, nothing[:, 0], known, _given(truth))


def _given(truth: Sources) -> tuple[bool, bool, bool]:
    """Which coordinates are known beforehand, of all scenes: one set of figures cannot mix both."""
    azimuth, elevation, range_m = (False,) * 3 if truth.given is None else truth.given.all(0).tolist()
    return azimuth, elevation, range_m
