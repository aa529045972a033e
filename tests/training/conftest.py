from __future__ import annotations

import pytest

from ris_hpo.training.config import RunConfig

TINY = {
    "network.width": 16,
    "network.depth": 1,
    "network.heads": 2,
    "network.head_width": 16,
    "network.residual_passes": 0,
    "network.grid.num_v": 17,
    "network.grid.num_w": 9,
    "network.grid.num_rho": 3,
    "network.candidates": 16,
    "network.covariance_atoms": 8,
    "optimizer.batch_size": 8,
    "budget.scenes": 96,
    "budget.validate_every": 32,
    "budget.validation_scenes": 32,
    "budget.pipeline_scenes": 0,
}


@pytest.fixture
def tiny() -> RunConfig:
    return RunConfig().replaced(TINY)
