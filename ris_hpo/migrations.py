"""How a stored tree of settings goes from each schema version to the next: one function per version left behind.

A function gets the whole tree, with the defaults of its own version filled in, and changes it in place. So a default
that changed needs no line here: the tree states the old one. A key that was renamed, removed or converted does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

Tree = dict[str, Any]


def move(tree: Tree, old: str, new: str, convert: Callable[[Any], Any] = lambda value: value) -> None:
    """Rename a dotted key, where the tree has it; tables that are missing on the way are made.

    Args:
        tree: changed in place.
        old: for example ``"optimizer.rate"``.
        new: for example ``"optimizer.learning_rate"``.
        convert: turns the old value into the new one.
    """
    if has(tree, old):
        put(tree, new, convert(take(tree, old)))


def put(tree: Tree, path: str, value: Any) -> None:
    """Set a dotted key; tables that are missing on the way are made."""
    *parents, leaf = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[leaf] = value


def take(tree: Tree, path: str) -> Any:
    """Remove a dotted key, and tables that it leaves empty; return its value, None where the tree has it not."""
    *parents, leaf = path.split(".")
    tables = [tree]
    for part in parents:
        tables.append(tables[-1].get(part, {}))
    value = tables[-1].pop(leaf, None)
    for table, part in zip(reversed(tables[:-1]), reversed(parents), strict=True):
        if table.get(part) == {}:
            del table[part]
    return value


def value_at(tree: Tree, path: str) -> Any:
    """Return the value of a dotted key, None where the tree has it not."""
    for part in path.split("."):
        tree = tree.get(part, {}) if isinstance(tree, dict) else {}
    return None if tree == {} else tree


def has(tree: Tree, path: str) -> bool:
    """Say whether a tree has a dotted key."""
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


RENAMED: Final = {
    "inference.refinement_steps": "inference.likelihood.search.final_steps",
    "inference.count_weight": "inference.likelihood.evidence.prior_weight",
    "inference.channel_error_db": "inference.likelihood.channel_error_db",
}
"""Settings of trainings and of inference that had another name in schema 0."""


def _from_0(settings: str, tree: Tree) -> None:
    """Schema 0 did not state its version; its files are those of release 0.1.0.

    Three inference settings replaced those of the likelihood that do the same; now there are the likelihood's alone.
    And its networks could not answer that there is no source: 1 was the least that was searched.
    Weight decay acted on biases and on the gains of norms as well.
    """
    if settings != "study":
        for old, new in RENAMED.items():
            move(tree, old, new)
        path = "inference.likelihood.num_sources"
        move(tree, path, path, lambda counts: [0, *counts[1:]] if counts[0] == 1 else counts)
    if settings == "training" and has(tree, "optimizer.weight_decay"):
        tree["optimizer"]["decay"] = "all"


_COUNTS = ("num_v", "num_w", "num_rho")
_REGION_1 = {"azimuth_deg": [-60.0, 60.0], "elevation_deg": [-30.0, 30.0], "range_m": [0.5, 10.0]}
_ELEMENTS_1 = {"num_horizontal": 12, "num_vertical": 12, "wavelength_m": 0.3, "spacing_wavelengths": 0.5}


def _from_1(settings: str, tree: Tree) -> None:
    """In schema 1 each grid had 33 x 17 x 8 cells unless stated; now the cells follow the surface and the region.

    Where they come out as the same, they are no longer stated; a network of another surface keeps the cells that it was
    trained on. Its surface, region and largest count stood beside those of the scene, and may still do so.
    """
    if settings == "study":
        return
    elements = {name: value_at(tree, f"scene.geometry.{name}") for name in _ELEMENTS_1}
    for grid in ("network.grid", "inference.likelihood.grid"):
        cells = [value_at(tree, f"{grid}.{name}") for name in _COUNTS]
        region = {name: [float(x) for x in value_at(tree, f"{grid}.region.{name}") or ()] for name in _REGION_1}
        usual = settings == "inference" or elements == _ELEMENTS_1
        if cells == [33, 17, 8] and region == _REGION_1 and usual:
            for name in _COUNTS:
                take(tree, f"{grid}.{name}")


STEPS: Final[tuple[Callable[[str, Tree], None], ...]] = (_from_0, _from_1)
"""``STEPS[n]`` leads from version n to n + 1; its first argument says whose settings: training, inference or study."""
