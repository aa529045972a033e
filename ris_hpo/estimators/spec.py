"""Settings of the likelihood estimators: what is searched, how, and how the answer is chosen and reported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ris_hpo.config import Spec
from ris_hpo.estimators.counting import EvidenceSpec
from ris_hpo.estimators.search import SearchSpec
from ris_hpo.physics.grid import GridSpec


class LikelihoodSpec(Spec):
    """Settings of ``ml`` and of the search among candidates."""

    grid: GridSpec = GridSpec()
    search: SearchSpec = SearchSpec()
    evidence: EvidenceSpec = EvidenceSpec()
    num_sources: tuple[int, int] = Field((0, 5), description="fewest and most sources that can be the answer")
    max_sources: int = Field(5, ge=1, le=8, description="slots of the answer")
    range_estimate: Literal["mean", "mode"] = Field(
        "mean", description="range that is reported: mean of its posterior within the region, or the most likely one"
    )
    channel_error_db: float | None = Field(None, ge=-100, le=20, description="stated error of the known channel")
    double: bool = Field(True, description="products with the sensing matrices in complex128 for the chosen order")
    single: bool = Field(
        False,
        description="all that depends on the snapshots in complex64, not products with the sensing matrices alone",
    )
    batch: int = Field(16, ge=1, le=4096, description="scenes at once; more need more memory")

    @model_validator(mode="after")
    def _check(self) -> LikelihoodSpec:
        low, high = self.num_sources
        if not 0 <= low <= high <= self.max_sources:
            raise ValueError(f"num_sources: {self.num_sources} must lie within 0..max_sources={self.max_sources}")
        return self
