"""Settings of scenes, network and inference together: the surface is stated once, in ``scene``.

Surface, region and K_max of the scenes are those of the network and of the likelihood as well, and their grids follow.
A value that follows is neither stored nor shown; stating it again is allowed, and another region may be stated where it
holds all that is drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from ris_hpo.config import Spec, filled
from ris_hpo.learning.inference import InferenceSpec
from ris_hpo.learning.network import NetworkSpec
from ris_hpo.migrations import Tree, has, put, take, value_at
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.scene import SECTOR, SceneSpec

_REGIONS: Final = ("network.grid.region", "inference.likelihood.grid.region")
_SOURCES: Final[dict[str, str]] = {
    **{f"network.geometry.{name}": f"geometry.{name}" for name in Geometry.model_fields},
    **{f"{region}.{name}": name for region, name in itertools.product(_REGIONS, SECTOR)},
    "network.max_sources": "max_sources",
    "inference.likelihood.max_sources": "max_sources",
}
"""Keys that follow, with the key of ``scene`` whose value they have."""
_COUNTS: Final = "inference.likelihood.num_sources"


class NetworkSettings(Spec):
    """What the scenes of a network are like, what the network is, and how its outputs become sources."""

    follows: ClassVar[frozenset[str]] = frozenset({*_SOURCES, _COUNTS})

    scene: SceneSpec = SceneSpec()
    network: NetworkSpec = NetworkSpec()
    inference: InferenceSpec = InferenceSpec()

    @model_validator(mode="before")
    @classmethod
    def _follow_the_scene(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        parts = {name: _stated(name, tree[name]) for name in ("scene", "network", "inference") if name in tree}
        scene = parts.get("scene", {})
        if not isinstance(scene, Mapping):
            return tree
        scene = filled(scene, SceneSpec().model_dump(mode="json"))
        return filled({**tree, **parts}, _following(scene))

    @model_serializer(mode="wrap")
    def _without_what_follows(self, handler: SerializerFunctionWrapHandler) -> Tree:
        tree: Tree = handler(self)
        followed = _following(tree["scene"]) if "scene" in tree else {}
        for path in self.follows if followed else ():
            if has(tree, path) and _plain(value_at(tree, path)) == _plain(value_at(followed, path)):
                take(tree, path)
        return tree

    def coarse_grids(self) -> list[str]:
        """One line for each grid that is stated too coarse for the surface; see :meth:`GridSpec.coarseness`."""
        grids = {"network.grid": self.network.grid, "inference.likelihood.grid": self.inference.likelihood.grid}
        found = {owner: grid.coarseness(self.scene.geometry) for owner, grid in grids.items()}
        return [f"{owner}: {'; '.join(words)}; sources may be missed" for owner, words in found.items() if words]

    @model_validator(mode="after")
    def _same_surface(self) -> NetworkSettings:
        if self.network.geometry != self.scene.geometry:
            raise ValueError("network.geometry must equal scene.geometry; state scene.geometry alone")
        if self.network.max_sources != self.scene.max_sources:
            raise ValueError(
                f"network.max_sources {self.network.max_sources} must equal scene.max_sources "
                f"{self.scene.max_sources}; state scene.max_sources alone"
            )
        grids = {"network.grid": self.network.grid, "inference.likelihood.grid": self.inference.likelihood.grid}
        for owner, name in itertools.product(grids, SECTOR):
            drawn, searched = getattr(self.scene, name), getattr(grids[owner].region, name)
            if drawn[0] < searched[0] or drawn[1] > searched[1]:
                raise ValueError(
                    f"scene.{name} {drawn} reaches beyond {owner}.region.{name} {searched}, where nothing is found"
                )
        return self


def _following(scene: Mapping[str, Any]) -> Tree:
    """Values that follow from a whole scene table, as a tree beside it."""
    tree: Tree = {}
    for path, source in _SOURCES.items():
        put(tree, path, value_at(dict(scene), source))
    put(tree, _COUNTS, [0, scene["max_sources"]])
    return tree


def _stated(name: str, part: Any) -> Any:
    """A part of the settings as a table; of a specification, less what would follow and was not set in it."""
    if not isinstance(part, Spec):
        return part
    tree = part.model_dump()
    for path in NetworkSettings.follows:
        head, *keys = path.split(".")
        owner, is_set = part, True
        for key in keys if head == name else ():
            is_set &= key in owner.model_fields_set
            owner = getattr(owner, key)
        if head == name and not is_set:
            take(tree, ".".join(keys))
    return tree


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
