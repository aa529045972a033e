"""Surfaces as small TOML files: elements, wavelength, region of the sources, antennas, snapshots.

A file has the keys of ``SceneSpec`` at its top, so that it is the ``scene`` table of a run configuration; at least its
``geometry`` table must be complete. Those that ship are in ``studies/surfaces/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ris_hpo.config import read_toml, suggestion
from ris_hpo.errors import ConfigError
from ris_hpo.physics.array import Geometry
from ris_hpo.physics.scene import SceneSpec
from ris_hpo.process import study_directories

_LISTED = ("positions_m", "wavelength_m")
_STATED = ("num_horizontal", "num_vertical", "wavelength_m", "spacing_wavelengths")


def list_surfaces() -> dict[str, Path]:
    """Return the known surfaces by name: those of ``./studies/surfaces`` first, then those that come with ris-hpo."""
    found: dict[str, Path] = {}
    for directory in study_directories():
        for path in sorted((directory / "surfaces").glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def surface_changes(name_or_path: str | Path, prefix: str = "") -> dict[str, Any]:
    """Read a surface as changes of settings by dotted key.

    Args:
        name_or_path: a name (``mmwave-32x32``) or a file (``my/surface.toml``).
        prefix: put before each key, such as ``scene.``.

    Raises:
        ConfigError: an unknown name, a file that is missing or not TOML, a surface that is not completely stated, an
            unknown key or a value out of bounds.
    """
    text = str(name_or_path)
    path = Path(text)
    if not text.endswith(".toml") and "/" not in text:
        known = list_surfaces()
        if text not in known:
            raise ConfigError(f"unknown surface '{text}'{suggestion(text, list(known))}")
        path = known[text]
    tree = read_toml(path)
    geometry = tree.pop("geometry", {})
    stated = _LISTED if isinstance(geometry, dict) and "positions_m" in geometry else _STATED
    missing = [name for name in stated if not isinstance(geometry, dict) or name not in geometry]
    if missing:
        raise ConfigError(f"{path}: a surface must state geometry.{', geometry.'.join(missing)}")
    SceneSpec.parse({**tree, "geometry": geometry}, str(path))
    elements = {f"geometry.{name}": value for name, value in {**Geometry().model_dump(), **geometry}.items()}
    return {f"{prefix}{name}": value for name, value in {**tree, **elements}.items()}


def load_surface(name_or_path: str | Path) -> SceneSpec:
    """Read a surface as the distribution of its scenes; see :func:`surface_changes`.

    Raises:
        ConfigError: as :func:`surface_changes`.
    """
    return SceneSpec().replaced(surface_changes(name_or_path))
