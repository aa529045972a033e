"""The one builder of predicted and effective covariance: loss, validation and inference use it alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.estimators.covariance import least_squares_covariance
from ris_hpo.learning.network import Outputs
from ris_hpo.physics.scene import Scenes


class HybridSpec(Spec):
    """How much of the sample covariance and of the identity goes into R_eff."""

    beta: float = Field(0.0, ge=0, le=0.9, description="share of the sample covariance at the end of the ramp")
    beta_ramp: float = Field(0.0, ge=0, le=1, description="share of the budget over which beta rises from 0")
    beta_jitter: float = Field(0.0, ge=0, le=0.2, description="half width of beta's uniform jitter in training")
    shrinkage: float = Field(0.02, ge=0, lt=1, description="share of the identity at 0 dB, falling with the SNR")
    sharpening: int = Field(
        0, ge=0, le=50, description="inference alone: Levenberg-Marquardt steps on the slots before they span R_pred"
    )


class Covariances(NamedTuple):
    """Hermitian covariances [B, N, N] complex64 of trace N: R_pred, and R_eff that loss and localizers use."""

    predicted: Tensor
    effective: Tensor


def covariances(outputs: Outputs, scenes: Scenes, spec: HybridSpec, beta: float | None = None) -> Covariances:
    """R_pred = F F^H + sigma^2 I, scaled to trace N, and R_eff = (1 - a) [(1 - beta) R_pred + beta R_samp] + a I.

    R_samp is the least-squares sample covariance; no gradient flows through it. The share of the identity falls with
    the SNR: a = s / (s + (1 - s) snr), s = ``shrinkage``.

    Args:
        outputs: what the network said.
        scenes: what was received, for R_samp and the SNR.
        spec: the mixture.
        beta: the ramped and jittered value in training; None takes the spec's.
    """
    beta = spec.beta if beta is None else beta
    factor, elements = outputs.factor, outputs.factor.shape[1]
    trace = torch.view_as_real(factor).square().sum((1, 2, 3)) + elements * outputs.noise_level
    scale = elements / trace.clamp(min=1e-12)
    predicted = _plus_identity((factor * scale[:, None, None]) @ factor.mH, scale * outputs.noise_level)
    effective = predicted
    if beta > 0:
        with torch.no_grad():
            sample = least_squares_covariance(scenes)
        effective = (1 - beta) * effective + beta * sample
    if spec.shrinkage > 0:
        snr = 10 ** (_snr_db(scenes) / 10)
        share = spec.shrinkage / (spec.shrinkage + (1 - spec.shrinkage) * snr)
        effective = _plus_identity(effective * (1 - share)[:, None, None], share)
    return Covariances(predicted, effective)


def _snr_db(scenes: Scenes) -> Tensor:
    """Received over noise power, less one, in dB [B]; within -10..40 dB."""
    received = scenes.y.detach().abs().square().mean((1, 2)) / scenes.noise_power.clamp(min=1e-38)
    return 10 * (received - 1).clamp(min=0.1, max=1e4).log10()


def _plus_identity(matrix: Tensor, amount: Tensor) -> Tensor:
    """Add amount times I, touching the diagonal alone."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) + amount.unsqueeze(-1)
    return matrix.diagonal_scatter(diagonal, dim1=-2, dim2=-1)
