"""The one builder of predicted and effective covariance: loss, validation and inference use it alike."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ris_hpo.config import Spec
from ris_hpo.estimators.covariance import effective_covariance, least_squares_covariance, trace_normalised
from ris_hpo.learning.network import Outputs
from ris_hpo.physics.scene import Scenes


class HybridSpec(Spec):
    """How much of the sample covariance and of the identity goes into R_eff."""

    beta: float = Field(0.0, ge=0, le=0.9, description="share of the sample covariance at the end of the ramp")
    beta_ramp: float = Field(0.0, ge=0, le=1, description="share of the budget over which beta rises from 0")
    beta_jitter: float = Field(0.0, ge=0, le=0.2, description="half width of beta's uniform jitter in training")
    shrinkage: float = Field(0.02, ge=0, lt=1, description="share of the identity at 0 dB, falling with the SNR")
    sample: Literal["least_squares"] = "least_squares"


class Covariances(NamedTuple):
    """Trace-N covariances [B, N, N] complex64: R_pred, and R_eff that the loss and the localizers use."""

    predicted: Tensor
    effective: Tensor


def covariances(outputs: Outputs, scenes: Scenes, spec: HybridSpec, beta: float | None = None) -> Covariances:
    """R_pred = F F^H + sigma^2 I and R_eff = (1-a)[(1-beta) R_pred + beta R_samp] + a I.

    The gradient flows through R_pred and never through R_samp.

    Args:
        outputs: what the network said.
        scenes: what was received, for R_samp and the SNR.
        spec: the mixture.
        beta: the ramped and jittered value in training; None takes the spec's.
    """
    beta = spec.beta if beta is None else beta
    identity = torch.eye(outputs.factor.shape[1], dtype=outputs.factor.dtype, device=outputs.factor.device)
    raw = outputs.factor @ outputs.factor.mH + outputs.noise_level[:, None, None] * identity
    predicted = trace_normalised(raw)
    if beta == 0 and spec.shrinkage == 0:
        return Covariances(predicted, predicted)
    sample = None
    if beta > 0:
        with torch.no_grad():
            sample = least_squares_covariance(scenes)
    received = scenes.y.detach().abs().square().mean((1, 2)) / scenes.noise_power.clamp(min=1e-30)
    snr_db = 10 * (received - 1).clamp(min=0.1, max=1e4).log10()
    effective = effective_covariance(predicted, sample, beta, shrinkage=spec.shrinkage, snr_db=snr_db)
    return Covariances(predicted, effective)
