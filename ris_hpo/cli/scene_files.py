"""Scene files as the commands read them: part by part, with a line on each thing that is assumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ris_hpo.cli import display
from ris_hpo.errors import SceneFileError

if TYPE_CHECKING:
    from ris_hpo.physics.array import Geometry
    from ris_hpo.physics.files import SceneFile
    from ris_hpo.physics.grid import Region
    from ris_hpo.physics.scene import Scenes, SceneSpec

PART = 512
"""Scenes in memory at once."""


@dataclass
class OwnScenes:
    """An open scene file.

    Attributes:
        file: as it was opened.
        region: what ``--surface`` or the method says of where sources are; coordinates that it fixes are known.
        estimates_noise: where the file has no noise power, estimate it.
    """

    file: SceneFile
    region: SceneSpec | Region | None
    estimates_noise: bool = True
    _told: bool = False

    def __len__(self) -> int:
        return len(self.file)

    def require_truth(self) -> None:
        """Refuse a file without truth before any work.

        Raises:
            ConfigError: the file has none.
        """
        if not self.file.has_truth:
            self.file.read(0, 1).known_truth()

    def parts(self, size: int = PART) -> Iterator[Scenes]:
        """The scenes, ``size`` at once.

        Raises:
            SceneFileError: values that do not fit, or no noise power where it cannot be estimated.
        """
        for start in range(0, len(self), size):
            yield self.read(start, start + size)

    def read(self, start: int = 0, stop: int | None = None) -> Scenes:
        """Scenes ``start`` .. ``stop``, all by default; see :meth:`parts`."""
        scenes = self.file.read(start, stop)
        if self.region is not None:
            scenes = scenes.knowing(self.region)
        if self.file.has_noise_power or not self.estimates_noise:
            return scenes
        from dataclasses import replace

        from ris_hpo.estimators.noise import LEAST_ANTENNAS, estimated_noise_power

        if self.file.sizes["M"] < LEAST_ANTENNAS:
            raise SceneFileError(
                f"{self.file.path}: array 'noise_power' is missing, and takes {LEAST_ANTENNAS} antennas to estimate; "
                "write it into the file"
            )
        noise = estimated_noise_power(scenes)
        if not self._told:
            self._told = True
            below = float((scenes.y.abs().square().mean((1, 2)) / noise).median().log10()) * 10
            display.print_note(
                f"{self.file.path} has no noise power; it is estimated from what the sources found leave, in the "
                f"median {below:.1f} dB below the received power"
            )
        return replace(scenes, noise_power=noise)


@dataclass(frozen=True)
class DrawnScenes:
    """Simulated scenes, with the interface of :class:`OwnScenes`."""

    scenes: Scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def require_truth(self) -> None:
        """Do nothing: drawn scenes have one."""

    def parts(self, size: int = PART) -> Iterator[Scenes]:
        """The scenes, ``size`` at once."""
        for start in range(0, len(self), size):
            yield self.scenes[start : start + size]


@contextmanager
def opened(
    path: Path,
    surface: str | None,
    geometry: Geometry | None = None,
    owner: str = "the default",
    *,
    region: SceneSpec | Region | None = None,
    truth: bool = True,
    estimates_noise: bool = True,
) -> Iterator[OwnScenes]:
    """Open a scene file; where neither it nor ``--surface`` states the surface, say which one is assumed.

    Args:
        path: the scene file.
        surface: value of ``--surface``.
        geometry: the surface to assume; None for the default one.
        owner: whose surface that is, for the message.
        region: where sources are, unless ``--surface`` says.
        truth: whether to read the truth.
        estimates_noise: whether to estimate a noise power that is missing.

    Raises:
        SceneFileError: a file that does not fit, or that states another surface than ``--surface``.
    """
    from ris_hpo.physics.files import open_scenes
    from ris_hpo.physics.surfaces import load_surface

    scene = None if surface is None else load_surface(surface)
    stated = None if scene is None else scene.geometry
    with open_scenes(path, stated or geometry, truth=truth) as file:
        if stated is not None and file.geometry != stated:
            raise SceneFileError(f"{path}: states {file.geometry}, --surface {surface} states {stated}; leave one out")
        if not file.states_surface and stated is None:
            display.print_note(
                f"{path} does not say its surface; assumed is that of {owner}: {file.geometry}; state it by --surface"
            )
        yield OwnScenes(file, region if scene is None else scene, estimates_noise)


def read_scenes(
    path: Path, surface: str | None, geometry: Geometry | None = None, owner: str = "the default"
) -> Scenes:
    """All scenes of a file; see :func:`opened`."""
    with opened(path, surface, geometry, owner) as own:
        return own.read()
