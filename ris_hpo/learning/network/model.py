"""The network as a whole: a body, its heads, and what they say of a batch of scenes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_hpo.errors import ConfigError
from ris_hpo.learning.features import Features, spectral_features, token_features
from ris_hpo.learning.network.bodies import SpectralBody, TokenBody
from ris_hpo.learning.network.heads import AtomFactor, CellHead, CountHead, CountMixing, FreeFactor, Proposals, SlotHead
from ris_hpo.learning.network.spec import NetworkSpec
from ris_hpo.physics.array import Cosines, cosine_steering, from_cosines
from ris_hpo.physics.scene import Scenes


class Outputs(NamedTuple):
    """What the network says of a batch of scenes.

    Attributes:
        existence: [B, C] logit that there is a source near the proposal; proposals are ranked, best first, and the
            first K_max are the slots.
        v, w, rho: [B, C] cosine coordinates.
        power: [B, C] positive, relative to the scene's total.
        log_count: [B, K_max + 1] log-probabilities of the number of sources.
        factor: complex64 [B, N, Q], F with R_pred = F F^H + sigma^2 I.
        noise_level: [B] sigma^2, relative.
        disturbance: [B] share of the received power that is noise, or error of the known channel.
        channel_gain: [B] what the scattered part of the known channel is to be multiplied with; 1 if it is exact.
        count_mixing: [B, K_max + 4] raw output of :class:`CountMixing`; None for the other count heads.
        cell_logit, cell_power: [B, P, V, W]; cell_offset: [B, 3, P, V, W] in cells; None for the token front-end.
    """

    existence: Tensor
    v: Tensor
    w: Tensor
    rho: Tensor
    power: Tensor
    log_count: Tensor
    factor: Tensor
    noise_level: Tensor
    disturbance: Tensor
    channel_gain: Tensor
    count_mixing: Tensor | None = None
    cell_logit: Tensor | None = None
    cell_power: Tensor | None = None
    cell_offset: Tensor | None = None

    def cosines(self, most: int | None = None) -> Cosines:
        """Coordinates of the first ``most`` proposals, or of all."""
        return Cosines(self.v[:, :most], self.w[:, :most], self.rho[:, :most])


class Network(nn.Module):
    """Features to :class:`Outputs`; ``backbone`` and ``heads`` are the two groups of parameters.

    Args:
        spec: form and size; parameters are drawn from torch's global generator.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = SpectralBody(spec) if spec.front_end == "spectra" else TokenBody(spec)
        proposals = CellHead(spec) if spec.front_end == "spectra" else SlotHead(spec)
        heads: dict[str, nn.Module] = {"proposals": proposals, "count": CountHead(spec)}
        if spec.covariance_head == "factor":
            heads["factor"] = FreeFactor(spec) if spec.factor_basis == "free" else AtomFactor(spec)
        heads["noise"] = nn.Linear(spec.width, 1)
        if not spec.noise_known:  # a correction of what the features estimate
            heads["disturbance"] = nn.Linear(spec.width, 2)
        if spec.count_head == "evidence":
            heads["mixing"] = CountMixing(spec)
        self.heads = nn.ModuleDict(heads)
        nn.init.zeros_(self.heads["noise"].weight)  # type: ignore[arg-type]
        nn.init.constant_(self.heads["noise"].bias, -4.0)  # type: ignore[arg-type]
        if "disturbance" in heads:
            nn.init.zeros_(self.heads["disturbance"].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.heads["disturbance"].bias)  # type: ignore[arg-type]

    def features(self, scenes: Scenes) -> Features:
        """Fixed part of the front-end; no parameters, no gradient.

        Raises:
            ConfigError: scenes of another surface, or a channel per snapshot where the noise power is not given.
        """
        for (name, found), (_, expected) in zip(scenes.geometry, self.spec.geometry, strict=True):
            if found != expected:
                raise ConfigError(f"scenes of another surface than the network's: {name} is {found}, not {expected}")
        if scenes.bs_ris_channel.dim() == 4 and not self.spec.noise_known:
            raise ConfigError("a network without the noise power needs one channel for all snapshots of a scene")
        scenes = scenes.single()
        with torch.no_grad():
            if self.spec.front_end == "spectra":
                passes = self.spec.residual_passes
                return spectral_features(scenes, self.spec.cells, passes=passes, noise_known=self.spec.noise_known)
            return token_features(scenes, noise_known=self.spec.noise_known)

    def forward(self, maps: Tensor, relief: Tensor, tokens: Tensor, context: Tensor) -> Outputs:
        """Learned part; arguments are the fields of :class:`Features`."""
        features = Features(maps, relief, tokens, context)
        hidden, pooled = self.backbone(features)
        with torch.autocast(maps.device.type, enabled=False):  # geometry, covariance and counts stay in fp32
            hidden, pooled = hidden.float(), pooled.float()
            proposals: Proposals = self.heads["proposals"](hidden, features)
            count = self.heads["count"](pooled, proposals.existence, context)
            noise_level = F.softplus(self.heads["noise"](pooled)).squeeze(-1)
            disturbance = -math.log(10) * context[:, 0]  # its logit, by the SNR that the features know or estimate
            gain = torch.ones_like(disturbance)
            if "disturbance" in self.heads:
                correction = self.heads["disturbance"](pooled)
                disturbance = disturbance + correction[:, 0]
                gain = torch.sigmoid(context[:, -1] + correction[:, 1])
            mixing = self.heads["mixing"](context) if "mixing" in self.heads else None
            factor = self._factor(pooled, proposals)
        cells = (proposals.cell_logit, proposals.cell_power, proposals.cell_offset)
        geometry = (proposals.existence, proposals.v, proposals.w, proposals.rho, proposals.power)
        return Outputs(*geometry, count, factor, noise_level, torch.sigmoid(disturbance), gain, mixing, *cells)

    def parameter_counts(self) -> dict[str, int]:
        """Number of parameters in the backbone and in the heads."""
        return {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("backbone", self.backbone), ("heads", self.heads))
        }

    def _factor(self, pooled: Tensor, proposals: Proposals) -> Tensor:
        """F [B, N, Q]: free, or the proposals' steering vectors times sqrt(existence * power), mixed or as they are."""
        if "factor" in self.heads and self.spec.factor_basis == "free":
            free: Tensor = self.heads["factor"](pooled)
            return free
        span = self.spec.covariance_atoms
        amplitude = (torch.sigmoid(proposals.existence) * proposals.power).clamp(min=1e-12).sqrt()
        coordinates = Cosines(proposals.v[:, :span], proposals.w[:, :span], proposals.rho[:, :span])
        atoms = cosine_steering(self.spec.geometry, coordinates).mT
        factor = atoms * amplitude[:, None, :span]
        if "factor" in self.heads:
            factor = factor @ self.heads["factor"](proposals.state[:, :span]).to(factor.dtype)
        return factor


def slot_geometry(outputs: Outputs, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """(azimuth, elevation, range_m) [B, slots] of the first proposals, differentiable."""
    return from_cosines(outputs.cosines(slots))
