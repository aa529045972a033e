"""The noise power where it is not known, from what fitted sources leave of the snapshots."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ris_hpo.errors import ConfigError
from ris_hpo.estimators.estimate import EstimatorSpec, estimate
from ris_hpo.physics.scene import Scenes

LEAST_ANTENNAS = 3
_PROVISIONAL = 0.1  # of the received power, for the first fit


def estimated_noise_power(scenes: Scenes, spec: EstimatorSpec | None = None) -> Tensor:
    """Noise power of every scene from the residual of two fits, float32 [B]; the scenes' own is not looked at.

    The first fit has as many sources as there can be, but less than antennas, so that none is left in its residual;
    that is somewhat too low, since the superfluous ones fit noise. The second, at that level, finds the count.

    Args:
        scenes: what was received.
        spec: settings of ``spectrum-maxima``, which makes the fits.

    Raises:
        ConfigError: fewer than three antennas, where sources and noise are not told apart.
    """
    antennas = scenes.y.shape[2]
    if antennas < LEAST_ANTENNAS:
        raise ConfigError(f"the noise power cannot be estimated with {antennas} antennas; {LEAST_ANTENNAS} are needed")
    spec = spec or EstimatorSpec()
    noise = (_PROVISIONAL * scenes.y.abs().square().mean((1, 2))).clamp(min=1e-37)
    for count in (min(spec.likelihood.max_sources, antennas - 2), None):
        found = estimate("spectrum-maxima", dataclasses.replace(scenes, noise_power=noise), spec, count)
        assert found.residual is not None
        noise = (noise * found.residual).float()
    return noise
