"""Counted operations of training on one scene, for studies whose trials get equal compute."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ris_hpo.learning.network import Network, NetworkSpec
from ris_hpo.physics.scene import SceneSpec, simulate
from ris_hpo.training.config import RunConfig

_BACKWARD = 2  # over forward: gradients by inputs and by weights
_COMPLEX = 4  # real products in a complex one, which the counter takes for one


def operations_per_scene(config: RunConfig) -> float:
    """Return the floating-point operations of features, forward and backward pass on one scene of a configuration.

    Matrix products and convolutions are counted as they are run on one scene, which is the same on every machine; what
    is elementwise, the optimiser and the simulation are not. A multiplication with its addition is two operations.
    """
    return _counted(config.scene.model_dump_json(), config.network.model_dump_json())


@lru_cache(maxsize=512)
def _counted(scene: str, settings: str) -> float:
    with torch.random.fork_rng(devices=[]):
        network = Network(NetworkSpec.model_validate_json(settings))
    scenes = simulate(SceneSpec.model_validate_json(scene), 0, range(1))
    with torch.no_grad(), FlopCounterMode(display=False) as of_features:
        features = network.features(scenes)
    with torch.no_grad(), FlopCounterMode(display=False) as of_network:
        network(*features)
    return float(_COMPLEX * of_features.get_total_flops() + (1 + _BACKWARD) * of_network.get_total_flops())
