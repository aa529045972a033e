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
        *parents, leaf = new.split(".")
        value = convert(take(tree, old))
        for part in parents:
            tree = tree.setdefault(part, {})
        tree[leaf] = value


def take(tree: Tree, path: str) -> Any:
    """Remove a dotted key and return its value; None where the tree has it not."""
    *parents, leaf = path.split(".")
    for part in parents:
        tree = tree.get(part, {})
    return tree.pop(leaf, None)


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


STEPS: Final[tuple[Callable[[str, Tree], None], ...]] = (_from_0,)
"""``STEPS[n]`` leads from version n to n + 1; its first argument says whose settings: training, inference or study."""
