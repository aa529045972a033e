"""What the likelihood works on: snapshots in units of the noise, stacked sensing matrices; checks of the input."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ris_hpo.errors import ConfigError, NumericalError
from ris_hpo.estimators.box import box_steering, box_steering_jacobian, to_polar
from ris_hpo.estimators.channel import posterior_mean_channel
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.scene import Scenes
from ris_hpo.physics.sources import Sources

_LARGEST = 1e15  # amplitudes whose summed squares single precision holds
_LEAST_NOISE = 1e-6  # of the received power: below it the rounding of single-precision products is taken for sources


@dataclass(frozen=True, slots=True)
class Observation:
    """Snapshots in units of the noise's standard deviation, and what they were sensed with.

    Attributes:
        geometry: the surface.
        sensing: [B, L M, N] rows of T_l = H diag(c_l), in the precision that products are computed in.
        y: [B, L, M] snapshots divided by the noise's standard deviation, in the precision of what is of the sources'
            size: complex128, or complex64 where speed counts more than the last digits.
        power_unit: float64 [B], what a power in these units is to be multiplied with to be in the scenes' units.
    """

    geometry: Geometry
    sensing: Tensor
    y: Tensor
    power_unit: Tensor

    def __len__(self) -> int:
        return self.y.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Observation:
        return Observation(self.geometry, self.sensing[index], self.y[index], self.power_unit[index])

    @staticmethod
    def of(
        scenes: Scenes,
        *,
        channel_error_db: float | None = None,
        dtype: torch.dtype = torch.complex64,
        algebra: torch.dtype = torch.complex128,
    ) -> Observation:
        """Whiten scenes: y divided by the noise's standard deviation, H scaled to mean square 1 / M per entry.

        The noise power is taken as at least 1e-6 (-60 dB) of the received power, since products in single precision
        show no less.

        Args:
            scenes: what was received.
            channel_error_db: power of the error of the known channel relative to the channel. The channel's posterior
                mean takes the known one's place (:mod:`ris_hpo.estimators.channel`), and what is left of the error adds
                to the noise: (H_true - H^) diag(c) A s is white to first order.
            dtype: precision of the sensing matrices.
            algebra: precision of the snapshots, and so of all that is of the sources' size.

        Raises:
            ConfigError: a channel error for a channel that changes with the snapshot.
            NumericalError: y, channel, codes or noise power are not finite, or the noise power is not positive.
        """
        require_finite(scenes)
        scenes, power_unit = scenes.in_unit_levels()
        y = scenes.y.to(torch.complex128)
        received = y.abs().square().mean((1, 2))
        noise = scenes.noise_power.double().maximum(_LEAST_NOISE * received)
        if channel_error_db is not None:
            if scenes.bs_ris_channel.dim() == 4:
                raise ConfigError("channel_error_db needs one channel for all snapshots of a scene")
            error = torch.full_like(scenes.noise_power, 10 ** (channel_error_db / 10))
            channel, gain = posterior_mean_channel(scenes.bs_ris_channel, error)
            noise = noise + (error * gain).double() * (received - noise).clamp(min=0)
            scenes = dataclasses.replace(scenes, bs_ris_channel=channel)
        sensing = scenes.sensing_matrices().flatten(1, 2).to(dtype)
        white = (y * noise.rsqrt()[:, None, None]).to(algebra)
        return Observation(scenes.geometry, sensing, white, noise * power_unit)

    def double(self) -> Observation:
        """The same with products in complex128."""
        precise = (self.sensing.to(torch.complex128), self.y.to(torch.complex128))
        return Observation(self.geometry, *precise, self.power_unit)

    def see(self, vectors: Tensor) -> Tensor:
        """T_l x for vectors [B, C, N]: [B, L, M, C] in the sensing matrices' precision."""
        result: Tensor = torch.bmm(self.sensing, vectors.to(self.sensing.dtype).mT).unflatten(1, self.y.shape[1:])
        return result

    def see_sources(self, u: Tensor) -> Tensor:
        """T_l a of sources at u [B, k, 3]: [B, L, M, k] in the sensing matrices' precision."""
        return self.see(box_steering(self.geometry, u.to(self.y.real.dtype)))

    def linearised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """G [B, L, M, k] and D [B, L, M, 3k] = dG/du in the sensing matrices' precision at u [B, k, 3]."""
        a, da = box_steering_jacobian(self.geometry, u.to(self.y.real.dtype))
        seen = self.see(torch.cat([a, da.flatten(1, 2)], dim=1))
        k = u.shape[1]
        return seen[..., :k], seen[..., k:]


def as_sources(observation: Observation, u: Tensor, power: Tensor, mask: Tensor) -> Sources:
    """Box coordinates [B, K, 3] and whitened powers [B, K] as float32 sources; unused slots hold harmless values."""
    azimuth, elevation, range_m = to_polar(u)
    unused = ~mask
    return Sources(
        azimuth.masked_fill(unused, 0).float(),
        elevation.masked_fill(unused, 0).float(),
        range_m.masked_fill(unused, 1).float(),
        (power * observation.power_unit.unsqueeze(-1)).masked_fill(unused, 0).float(),
        mask,
    )


def known_count(scenes: Scenes, num_sources: Tensor | int, max_sources: int) -> Tensor:
    """A count that is known, int64 [B].

    Raises:
        ConfigError: not whole numbers, not one for all or one a scene, or outside 0..max_sources.
    """
    count = torch.as_tensor(num_sources, device=scenes.device)
    if count.is_floating_point() or count.shape not in ((), (1,), (len(scenes),)):
        raise ConfigError(
            f"num_sources has shape {tuple(count.shape)} and {count.dtype}; expected a whole number, or one for each "
            f"of {len(scenes)} scenes"
        )
    if bool(((count < 0) | (count > max_sources)).any()):
        raise ConfigError(f"num_sources must lie within 0..{max_sources}")
    return count.long().expand(len(scenes))


def require_candidates(scenes: Scenes, *coordinates: Tensor) -> None:
    """Check where a search starts: coordinates [B, C] each.

    Raises:
        ConfigError: of another batch size.
        NumericalError: not finite.
    """
    if len(coordinates[0]) != len(scenes):
        raise ConfigError(f"candidates for {len(coordinates[0])} scenes beside {len(scenes)} scenes")
    if not all(bool(value.isfinite().all()) for value in coordinates):
        raise NumericalError("candidates: not finite")


def require_finite(scenes: Scenes, *, noise_known: bool = True) -> None:
    """Check the receiver's data; the noise power only where it is ``noise_known``.

    Raises:
        ConfigError: there is no scene.
        NumericalError: y, channel, codes or noise power are not finite, or the noise power is not positive; amplitudes
            of which single precision does not hold the squares.
    """
    if len(scenes) == 0:
        raise ConfigError("no scenes to estimate from")
    noise = scenes.noise_power if noise_known else torch.ones_like(scenes.noise_power)
    checks = [
        torch.view_as_real(value).isfinite().all() for value in (scenes.y, scenes.bs_ris_channel, scenes.ris_codes)
    ]
    largest = torch.stack([scenes.y.abs().amax(), scenes.bs_ris_channel.abs().amax() * scenes.ris_codes.abs().amax()])
    checks += [(noise > 0).all(), noise.isfinite().all(), (largest < _LARGEST).all()]
    if not bool(torch.stack(checks).all()):
        raise NumericalError(
            "scenes: y, channel, codes and noise power must be finite, the noise power positive, and neither y nor "
            f"channel times codes above {_LARGEST:g}"
        )
