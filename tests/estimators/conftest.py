"""Small scenes shared by the estimators' tests."""

import pytest
import torch

from ris_hpo.physics.array import Geometry
from ris_hpo.physics.grid import GridSpec
from ris_hpo.physics.scene import Scenes, SceneSpec, grid_of_cells, simulate

SMALL = SceneSpec(geometry=Geometry(num_horizontal=8, num_vertical=8), num_antennas=8, num_snapshots=12)
COARSE = GridSpec(num_v=21, num_w=11, num_rho=5)


@pytest.fixture(scope="session")
def loud() -> Scenes:
    """Default scenes at 20 dB with one, two and three sources, 8 of each."""
    return grid_of_cells(SceneSpec(), 501, [20.0], [1, 2, 3], 8)


@pytest.fixture(scope="session")
def mixed() -> Scenes:
    """Small scenes of every count at 15 dB."""
    return simulate(SMALL, 502, range(10), snr_db=torch.full((10,), 15.0))
