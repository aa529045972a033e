"""The standard phases and their gates, as data; phase 0 is the proof (:mod:`ris_hpo.training.proof`)."""

from __future__ import annotations

from ris_hpo.training.config import GateSpec, PhaseSpec, RunConfig

_TOLERATED = [
    GateSpec(metric="rmse_azimuth_deg", direction="down", margin=-0.3),
    GateSpec(metric="rmse_elevation_deg", direction="down", margin=-0.3),
    GateSpec(metric="rmse_range_m", direction="down", margin=-0.06),
]
"""RMSEs may rise by two standard deviations of their scatter on 512 validation scenes."""


def standard_phases() -> list[PhaseSpec]:
    """Hybrid covariance, then the count, then the structure terms one at a time; each with its gates."""
    phases = [
        PhaseSpec(
            name="hybrid covariance",
            share=0.4,
            beta=0.2,
            gates=[
                GateSpec(metric="k_acc", direction="up"),
                GateSpec(metric="rmse_azimuth_deg", direction="down"),
                GateSpec(metric="rmse_elevation_deg", direction="down"),
                GateSpec(metric="rmse_range_m", direction="down"),
            ],
        ),
        PhaseSpec(
            name="count",
            share=0.2,
            loss={"count": 1.0},
            backbone_rate=0.3,
            gates=[
                GateSpec(metric="k_acc", direction="up", margin=-0.02),
                GateSpec(metric="k_under", direction="down", margin=-0.03),
                *_TOLERATED,
            ],
        ),
    ]
    kept = [
        GateSpec(metric="k_acc", direction="up", margin=-0.03),
        GateSpec(metric="success", direction="up", margin=-0.03),
    ]
    for term in ("subspace_alignment", "orthogonality", "gap", "peak_contrast"):
        phases.append(PhaseSpec(name=f"structure: {term}", share=0.1, ramp=[term], ramp_share=0.05, gates=kept))
    return phases


def with_curriculum(config: RunConfig) -> RunConfig:
    """The configuration with the standard phases; one that has phases of its own is returned as it is."""
    if config.phases:
        return config
    phases = [phase.model_dump(mode="json") for phase in standard_phases()]
    return config.replaced({"phases": phases})
