"""Methods that the commands ``evaluate`` and ``localize`` choose from: trained networks and classical estimators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ris_hpo
from ris_hpo.cli import display, options
from ris_hpo.config import suggestion
from ris_hpo.errors import CheckpointError, ConfigError
from ris_hpo.process import keep_freed_memory

if TYPE_CHECKING:
    from torch import Tensor

    from ris_hpo.cli.scene_files import DrawnScenes, OwnScenes
    from ris_hpo.learning.inference import Path as PathName
    from ris_hpo.physics.array import Geometry
    from ris_hpo.physics.grid import GridSpec
    from ris_hpo.physics.scene import Scenes, SceneSpec
    from ris_hpo.physics.sources import Sources
    from ris_hpo.training.config import RunConfig


def run_config(path: Path | None, surface: str | None = None) -> RunConfig:
    """The run configuration of a file, exported or written by hand, with ``--surface``; the defaults without one.

    Raises:
        ConfigError: no such file, not TOML, an unknown key or a value out of bounds.
    """
    from ris_hpo.training.config import RunConfig
    from ris_hpo.training.files import load_config

    found = RunConfig() if path is None else load_config(path).config
    return options.with_surface(found, surface)


@dataclass(frozen=True)
class Method:
    """A function from scenes to sources, with what the commands need to know of it.

    Attributes:
        name: as tables show it.
        localize: (scenes, known counts [B] or None) to sources.
        chunk: scenes in one call; the progress display advances after each.
        geometry: the surface it was made for; None for any.
        scene: the kind of scenes it was trained on, or the default kind.
        grid: that its likelihood searches.
        noise_known: whether it takes the noise power.
        needs_truth: one of its settings makes the truth an input.
    """

    name: str
    localize: Callable[[Scenes, Tensor | None], Sources]
    chunk: int
    geometry: Geometry | None
    scene: SceneSpec
    grid: GridSpec
    noise_known: bool = True
    needs_truth: bool = False


def choose(
    checkpoint: Path | None,
    weights: str | None,
    estimator: str | None,
    pairs: Sequence[str] | None,
    device: str,
    path: PathName = "pipeline",
    surface: str | None = None,
) -> Method:
    """The method that ``--checkpoint``, ``--weights`` or ``--estimator`` names, with ``--set`` applied.

    Raises:
        UsageError: more than one was given.
        ConfigError: an unknown estimator or setting.
        CheckpointError: no checkpoint there, or a damaged one.
    """
    if sum(choice is not None for choice in (checkpoint, weights, estimator)) > 1:
        raise options.UsageError("--checkpoint, --weights and --estimator exclude each other")
    if estimator is None:
        if checkpoint is not None:
            return _learned(checkpoint, str(checkpoint), pairs, device, path)
        shipped = weights or "default"
        return _learned(shipped_weights(shipped), f"weights '{shipped}'", pairs, device, path)
    if path != "pipeline":
        raise options.UsageError(f"the {path} path is a network's; --estimator has one path only")
    return _classical(estimator, pairs, surface)


def _classical(name: str, pairs: Sequence[str] | None, surface: str | None) -> Method:
    from typing import get_args

    from ris_hpo.estimators.estimate import EstimatorName, EstimatorSpec, estimate
    from ris_hpo.physics.scene import SECTOR, SceneSpec

    known = list(get_args(EstimatorName))
    if name not in known:
        raise ConfigError(f"unknown estimator '{name}'{suggestion(name, known)}")
    scene = options.with_surface(SceneSpec(), surface, "")
    follow: dict[str, Any] = {f"likelihood.grid.region.{axis}": getattr(scene, axis) for axis in SECTOR}
    follow |= {"likelihood.max_sources": scene.max_sources, "likelihood.num_sources": (0, scene.max_sources)}
    spec = options.changed(EstimatorSpec().replaced(follow), pairs)
    chosen: Any = name

    def located(scenes: Scenes, counts: Tensor | None) -> Sources:
        return estimate(chosen, scenes, spec, counts)

    return Method(name, located, 64, None, scene, spec.likelihood.grid, needs_truth=spec.covariance == "truth")


class Located:
    """The sources of scenes, found part by part as they are iterated over, with progress.

    Args:
        method: finds them.
        scenes: a file, or drawn scenes.
        num_sources: value of ``--num-sources``.
        device: where the scenes go.
    """

    def __init__(self, method: Method, scenes: OwnScenes | DrawnScenes, num_sources: str | None, device: str) -> None:
        self.seconds = 0.0
        self._method, self._scenes, self._count, self._device = method, scenes, num_sources, device
        self._found: list[Sources] = []

    def __iter__(self) -> Iterator[tuple[Sources, Scenes]]:
        from ris_hpo.physics.sources import Sources

        keep_freed_memory()
        method, done, warned = self._method, 0, False
        with display.progress(len(self._scenes), "scenes") as advance:
            for part in self._scenes.parts():
                for words in () if warned else method.grid.coarseness(part.geometry):
                    display.print_note(f"warning: the grid's {words}; sources may be missed")
                known, parts, warned = known_counts(self._count, part), [], True
                for first in range(0, len(part), method.chunk):
                    chosen = slice(first, first + method.chunk)
                    few = None if known is None else known[chosen].to(self._device)
                    began = time.perf_counter()
                    parts.append(method.localize(part[chosen].to(self._device), few).to("cpu"))
                    self.seconds += time.perf_counter() - began
                    done += len(parts[-1])
                    advance(done, "")
                self._found.append(Sources.cat(parts))
                yield self._found[-1], part

    def sources(self) -> Sources:
        """The sources of all scenes that were iterated over."""
        from ris_hpo.physics.sources import Sources

        return Sources.cat(self._found)


def shipped_weights(name: str) -> Path:
    """The weights file of a network that ships with the package.

    Raises:
        CheckpointError: there is none of that name.
    """
    folder = Path(ris_hpo.__file__).parent / "weights"
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        known = sorted(each.stem for each in folder.glob("*.safetensors"))
        hint = suggestion(name, known) if known else "; name a --checkpoint or an --estimator"
        raise CheckpointError(f"no weights '{name}' ship with this version{hint}")
    return file


def _learned(checkpoint: Path, name: str, pairs: Sequence[str] | None, device: str, path: PathName) -> Method:
    from typing import cast

    from ris_hpo.learning.bundle import is_bundle, load_bundle
    from ris_hpo.learning.inference import explained, find_sources, predict
    from ris_hpo.learning.network import Network
    from ris_hpo.training.finished import load_network

    if is_bundle(checkpoint):
        bundle = load_bundle(checkpoint, device=device, form="weights")  # its exported program is code
        network, inference, scene = cast(Network, bundle), bundle.inference, bundle.scene
    else:
        network, config = load_network(checkpoint, device)
        inference, scene = config.inference, config.scene
    spec = options.changed(inference.of(path), pairs)

    def located(scenes: Scenes, counts: Tensor | None) -> Sources:
        outputs = predict(network, scenes)
        found = find_sources(network, scenes, spec, path, num_sources=counts, outputs=outputs)
        return explained(network, scenes, outputs, found) if path == "network" else found

    return Method(
        f"{name} ({path})", located, 512, scene.geometry, scene, spec.likelihood.grid, network.spec.noise_known
    )


def recorded_of_fast(checkpoint: Path | None, weights: str | None) -> str:
    """One line on how good and how fast the fast path is with a network, as its file records it."""
    from ris_hpo.training import checkpoint as stored

    file = shipped_weights(weights or "default") if checkpoint is None else checkpoint
    figures: dict[str, Any] = {}
    if file.is_file():
        figures = stored.read(file)[1].get("provenance", {}).get("paths", {})
    if not figures:
        return "fast path: not measured for this network; 'ris-hpo evaluate --path fast' does"
    fast, thorough = figures["fast"], figures["pipeline"]
    rate = fast["scenes_per_second"] / thorough["scenes_per_second"]
    return (
        f"fast path: k_loc {fast['k_loc']:.2f} where the thorough path has {thorough['k_loc']:.2f}, at {rate:.1f} "
        f"times its rate ({figures['scenes']:,} scenes, as recorded with the weights)"
    )


def known_counts(text: str | None, scenes: Scenes) -> Tensor | None:
    """``--num-sources`` as counts [B]: the truth's, one number for all, or None.

    Raises:
        UsageError: neither ``truth`` nor a whole number from 1.
        ConfigError: ``truth`` for scenes without it.
    """
    import torch

    if text is None:
        return None
    if text == "truth":
        return scenes.known_truth().num_sources
    if not text.isdigit() or int(text) < 1:
        raise options.UsageError(f"--num-sources {text}: expected 'truth' or a whole number from 1")
    return torch.full((len(scenes),), int(text))
