"""Form and size of a network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ris_hpo.config import Spec
from ris_hpo.learning.features import num_context
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.grid import Grid, GridSpec


class NetworkSpec(Spec):
    """Form and size of a network."""

    front_end: Literal["spectra", "tokens"] = Field(
        "spectra",
        description="what the network reads: spectra on the grid (convolutions), or back-projected snapshots as tokens "
        "(transformer)",
    )
    covariance_head: Literal["structured", "factor"] = Field(
        "structured",
        description="R_pred from the predicted geometry (structured), or from a predicted factor F F^H (factor)",
    )
    factor_basis: Literal["atoms", "free"] = Field(
        "atoms",
        description="columns of F: combinations of steering vectors (atoms), or any vectors (free); head 'factor' only",
    )
    count_head: Literal["cross_entropy", "ordinal", "evidence"] = Field(
        "cross_entropy",
        description="one logit per count (cross_entropy), one per step from count to count (ordinal), or cross_entropy "
        "whose result is combined with the refined evidence by weights fitted after training (evidence)",
    )
    width: int = Field(64, ge=8, le=1024, description="channels of the coarse maps, or of a token")
    depth: int = Field(4, ge=1, le=24, description="residual blocks, or transformer layers")
    heads: int = Field(4, ge=1, le=32, description="attention heads; divides width")
    head_width: int = Field(
        128, ge=8, le=4096, description="hidden width of the count head (128 at most) and of the free factor"
    )
    dropout: float = Field(0.0, ge=0, lt=0.9, description="share of activations set to zero in training")
    candidates: int = Field(64, ge=5, le=512, description="proposals handed to the refinement")
    max_sources: int = Field(5, ge=1, le=8, description="K_max: slots, and the largest count; that of the scenes")
    covariance_atoms: int = Field(16, ge=5, le=512, description="proposals that span the structured covariance")
    cell_width: int = Field(
        96,
        ge=0,
        le=512,
        description="hidden width of the head for cells, which reads the input maps again; 0: linear in the body's map",
    )
    residual_passes: int = Field(4, ge=0, le=5, description="spectra of the residual beside the first spectrum")
    noise_known: bool = Field(
        True, description="the network is given the noise power; false: it estimates noise and channel error together"
    )
    geometry: Geometry = Field(Geometry(), description="the surface, that of the scenes")
    grid: GridSpec = Field(GridSpec(), description="cells in (v, w, rho) that spectra and proposals stand on")

    @model_validator(mode="after")
    def _check(self) -> NetworkSpec:
        for name in ("candidates", "covariance_atoms"):
            if self.front_end == "spectra" and getattr(self, name) < self.max_sources:
                raise ValueError(f"{name} {getattr(self, name)} must not be below max_sources {self.max_sources}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.front_end == "tokens" and self.covariance_head == "factor" and self.factor_basis == "atoms":
            raise ValueError("factor_basis 'atoms' needs the front_end 'spectra'; with tokens use 'free'")
        return self

    @property
    def cells(self) -> Grid:
        """The grid's cells for the network's surface."""
        return self.grid.on(self.geometry)

    @property
    def fine_width(self) -> int:
        """Channels of the spectral body's map at the grid's own resolution."""
        return max(16, self.width // 2)

    @property
    def num_planes(self) -> int:
        """Planes of the input maps: one per range cell, for the first spectrum and for that of every residual pass."""
        return (1 + self.residual_passes) * self.cells.num_rho

    @property
    def num_context(self) -> int:
        """Width of ``Features.context``."""
        return num_context(self.residual_passes if self.front_end == "spectra" else None, noise_known=self.noise_known)


def large() -> NetworkSpec:
    """The form with 16.3M parameters: a transformer over snapshot tokens with a free factor."""
    return NetworkSpec(
        front_end="tokens", covariance_head="factor", factor_basis="free", width=256, depth=8, heads=8, head_width=2368
    )
