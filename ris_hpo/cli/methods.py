"""What finds sources on the command line: a trained network, or a classical estimator, behind one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ris_hpo.cli import options
from ris_hpo.config import read_toml
from ris_hpo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ris_hpo.physics.array import Geometry
    from ris_hpo.physics.scene import Scenes, SceneSpec
    from ris_hpo.physics.sources import Sources
    from ris_hpo.training.config import RunConfig


def run_config(path: Path | None) -> RunConfig:
    """The run configuration of a TOML file; the defaults without one.

    Raises:
        ConfigError: no such file, not TOML, an unknown key or a value out of bounds.
    """
    from ris_hpo.training.config import RunConfig

    if path is None:
        return RunConfig()
    tree = read_toml(path)
    tree.pop("provenance", None)  # what export adds for the reader
    return RunConfig.parse(tree, source=str(path))


@dataclass(frozen=True)
class Method:
    """A way from scenes to sources.

    Attributes:
        name: as tables show it.
        localize: (scenes, known counts [B] or None) to sources.
        chunk: scenes in one call, small enough that progress is seen.
        geometry: the surface it was made for; None where any will do.
        scene: the kind of scenes it was trained on, or the default kind.
    """

    name: str
    localize: Callable[[Scenes, Tensor | None], Sources]
    chunk: int
    geometry: Geometry | None
    scene: SceneSpec


def choose(checkpoint: Path | None, estimator: str | None, pairs: Sequence[str] | None, device: str) -> Method:
    """The method that ``--checkpoint`` or ``--estimator`` names, with ``--set`` applied.

    Raises:
        BadParameter: both were given.
        ConfigError: an unknown estimator or setting.
        CheckpointError: no checkpoint there, or a damaged one.
    """
    if checkpoint is not None and estimator is not None:
        raise typer.BadParameter("--checkpoint and --estimator exclude each other")
    return _classical(estimator, pairs) if estimator is not None else _learned(checkpoint, pairs, device)


def _classical(name: str, pairs: Sequence[str] | None) -> Method:
    from typing import get_args

    from ris_hpo.config import suggestion
    from ris_hpo.estimators.estimate import EstimatorName, EstimatorSpec, estimate
    from ris_hpo.physics.scene import SceneSpec

    known = list(get_args(EstimatorName))
    if name not in known:
        raise ConfigError(f"unknown estimator '{name}'{suggestion(name, known)}")
    spec = options.changed(EstimatorSpec(), pairs)
    chosen: Any = name
    return Method(name, lambda scenes, counts: estimate(chosen, scenes, spec, counts), 64, None, SceneSpec())


def _learned(checkpoint: Path | None, pairs: Sequence[str] | None, device: str) -> Method:
    from ris_hpo.learning.inference import localize
    from ris_hpo.training.trainer import load_network

    if checkpoint is None:
        raise typer.BadParameter("name a --checkpoint or an --estimator")
    network, config = load_network(checkpoint, device)
    spec = options.changed(config.inference, pairs)
    return Method(
        f"network {checkpoint}",
        lambda scenes, counts: localize(network, scenes, spec, num_sources=counts),
        256,
        config.scene.geometry,
        config.scene,
    )


def known_counts(text: str | None, scenes: Scenes) -> Tensor | None:
    """``--num-sources`` as counts [B]: the truth's, one number for all, or None.

    Raises:
        BadParameter: neither ``truth`` nor a whole number from 1.
        ConfigError: ``truth`` for scenes without it.
    """
    import torch

    if text is None:
        return None
    if text == "truth":
        return scenes.require_truth().num_sources
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"--num-sources {text}: expected 'truth' or a whole number from 1")
    return torch.full((len(scenes),), int(text))
