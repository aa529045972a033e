"""The one type for a set of sources, padded to K slots: true, from a network or from a classical estimator."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = (math.radians(5), math.radians(5), 1.0)
"""Errors in (azimuth, elevation, range) below which a source counts as found, in rad, rad, m."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Up to K sources in each of B scenes, padded to K = K_max.

    Attributes:
        azimuth: [B, K] rad, from +x toward +y.
        elevation: [B, K] rad, from the x-y plane toward +z.
        range_m: [B, K] m, from the surface's centre.
        power: [B, K] linear.
        mask: [B, K] bool, True where there is a source. Values elsewhere are finite and without meaning.
        existence: [B, K], where the method gives one: of `ml` and `localize` p(at least k + 1 sources | y) for slot k,
            of the network alone the probability that slot k holds a source.
        covariance_m2: [B, K, 3, 3] covariance of the Cartesian position in m^2, where the method gives one.
        on_border: [B, K] bool, True where the snapshots say that the source lies beyond the searched region.
        residual: [B] what the sources leave of the snapshots over what noise alone would leave, 1 on average where the
            model is right (:mod:`ris_hpo.estimators.goodness`).
        residual_range: [B, 2] where the residual lies when the model is right.
        given: of a truth, [B, 3] bool: which of azimuth, elevation and range are known beforehand (the elevation in
            front of a row of elements, say); bounds and scores leave them out.
    """

    azimuth: Tensor
    elevation: Tensor
    range_m: Tensor
    power: Tensor
    mask: Tensor
    existence: Tensor | None = None
    covariance_m2: Tensor | None = None
    on_border: Tensor | None = None
    residual: Tensor | None = None
    residual_range: Tensor | None = None
    given: Tensor | None = None

    def __len__(self) -> int:
        return self.mask.shape[0]

    def __getitem__(self, index: Any) -> Sources:
        """Select scenes by slice, boolean mask or index tensor."""
        return self._map(lambda value: value[index])

    @property
    def num_sources(self) -> Tensor:
        """[B] int64."""
        return self.mask.sum(-1)

    @property
    def fits(self) -> Tensor | None:
        """[B] bool: the residual lies in its range and no source on the border; None where the method does not say."""
        if self.residual is None or self.residual_range is None or self.on_border is None:
            return None
        low, high = self.residual_range.unbind(-1)
        return (self.residual >= low) & (self.residual <= high) & ~(self.on_border & self.mask).any(-1)

    @property
    def max_sources(self) -> int:
        """K, the padded width."""
        return self.mask.shape[-1]

    def positions(self) -> Tensor:
        """Cartesian positions [B, K, 3] in m: r (cos el cos az, cos el sin az, sin el)."""
        cos_el = self.elevation.cos()
        unit = [cos_el * self.azimuth.cos(), cos_el * self.azimuth.sin(), self.elevation.sin()]
        return self.range_m.unsqueeze(-1) * torch.stack(unit, dim=-1)

    def to(self, target: torch.device | torch.dtype | str) -> Sources:
        """Move to a device, or convert the real fields to a floating dtype."""
        if isinstance(target, torch.dtype):
            return self._map(lambda value: value if value.dtype == torch.bool else value.to(target))
        return self._map(lambda value: value.to(target))

    def detach(self) -> Sources:
        """The same sources without gradient."""
        return self._map(lambda value: value.detach())

    def take(self, order: Tensor) -> Sources:
        """Reorder or choose slots within each scene: order [B, K'] of slot indices."""

        def gather(value: Tensor) -> Tensor:
            index = order.reshape(order.shape + (1,) * (value.dim() - 2)).expand(*order.shape, *value.shape[2:])
            return value.gather(1, index)

        return self._map(gather, slots_only=True)

    def padded(self, max_sources: int) -> Sources:
        """The same sources with the padded width raised to ``max_sources``."""
        missing = max_sources - self.max_sources
        if missing <= 0:
            return self

        def pad(value: Tensor) -> Tensor:
            fill = torch.zeros if value.dtype == torch.bool or value is self.existence else torch.ones
            tail = (value.shape[0], missing, *value.shape[2:])
            return torch.cat([value, fill(tail, dtype=value.dtype, device=value.device)], dim=1)

        return self._map(pad, slots_only=True)

    @staticmethod
    def cat(parts: list[Sources]) -> Sources:
        """Join batches; an optional field is kept where every part has it."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(Sources):
            values = [getattr(part, field.name) for part in parts]
            fields[field.name] = None if any(value is None for value in values) else torch.cat(values)
        return Sources(**fields)

    def _map(self, function: Any, *, slots_only: bool = False) -> Sources:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = _OF_A_SCENE if slots_only else ()
        return Sources(**{k: v if v is None or k in kept else function(v) for k, v in values.items()})


_OF_A_SCENE = ("residual", "residual_range", "given")  # fields without an axis of slots
