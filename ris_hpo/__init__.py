"""Train, search and certify networks that localise near-field sources through a reconfigurable intelligent surface.

The public names, loaded when first used, so that ``import ris_hpo`` costs nothing:

>>> from ris_hpo import SceneSpec, estimate, score, simulate
>>> scenes = simulate(SceneSpec(), seed=1, index=range(100))
>>> found = estimate("ml", scenes)
>>> score(found, scenes.require_truth()).k_loc
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ris_hpo.api.study import Study as Study
    from ris_hpo.estimators.estimate import estimate as estimate
    from ris_hpo.learning.inference import localize as localize
    from ris_hpo.physics.bounds import source_bounds as source_bounds
    from ris_hpo.physics.files import load_scenes as load_scenes
    from ris_hpo.physics.files import save_scenes as save_scenes
    from ris_hpo.physics.scene import Scenes as Scenes
    from ris_hpo.physics.scene import SceneSpec as SceneSpec
    from ris_hpo.physics.scene import simulate as simulate
    from ris_hpo.physics.sources import Sources as Sources
    from ris_hpo.programs.program import TrialContext as TrialContext
    from ris_hpo.scoring.metrics import score as score
    from ris_hpo.training.config import RunConfig as RunConfig
    from ris_hpo.training.finished import load_network as load_network
    from ris_hpo.training.trainer import Trainer as Trainer

_HOME = {
    "RunConfig": "training.config",
    "SceneSpec": "physics.scene",
    "Scenes": "physics.scene",
    "Sources": "physics.sources",
    "Study": "api.study",
    "Trainer": "training.trainer",
    "TrialContext": "programs.program",
    "estimate": "estimators.estimate",
    "load_network": "training.finished",
    "load_scenes": "physics.files",
    "localize": "learning.inference",
    "save_scenes": "physics.files",
    "score": "scoring.metrics",
    "simulate": "physics.scene",
    "source_bounds": "physics.bounds",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ris_hpo' has no attribute '{name}'")
    return getattr(import_module(f"ris_hpo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
