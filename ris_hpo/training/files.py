"""Run configurations as files, with their provenance: the study and trial they come from, and its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from ris_hpo.atomic import write_text
from ris_hpo.config import SCHEMA, SCHEMA_KEY, AnySettings, Spec, migrated, read_toml, to_toml
from ris_hpo.errors import ConfigError, reading
from ris_hpo.physics.scene import SceneSpec
from ris_hpo.training.config import RunConfig

FORMAT: Final = 1


PROVENANCE: Final = "provenance"


class Provenance(Spec):
    """Where a configuration came from and what it scored there; ``k_loc`` and the curve are those of ``objective``.

    Of a trial of a program of one's own it has ``program``, ``metric`` and ``score``, and the curve is of these.
    """

    format: int = FORMAT
    program: str | None = None
    metric: str | None = None
    score: float | None = None
    study: str
    trial: int
    state: str
    exported: str
    origin: str | None = None
    objective: str = "network"
    config_fingerprint: str
    space_fingerprint: str | None = None
    score_version: int | None = None
    proof: str | None = None
    device: str | None = None
    threads: int | None = Field(None, ge=1)
    host: str | None = None
    scenes: int | None = None
    seconds: float | None = None
    k_loc: float | None = None
    floor: float | None = None
    efficiency: float | None = None
    network: dict[str, float] = Field(default_factory=dict)
    pipeline: dict[str, float] = Field(default_factory=dict)
    pipeline_floor: float | None = None
    winner: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    curve: list[tuple[int, float]] = Field(default_factory=list)


class Exported(Spec):
    """A configuration file as read.

    Attributes:
        config: the settings.
        provenance: where they came from; None for a file written by hand.
        older: whether an export was written in an earlier schema version.
    """

    config: RunConfig
    provenance: Provenance | None = None
    older: bool = False


class ExportedSettings(Spec):
    """Settings of a trial of a program of one's own."""

    config: AnySettings
    provenance: Provenance


def write_config(found: Exported | ExportedSettings, out: Path, *, form: Literal["toml", "json"] | None = None) -> None:
    """Write a configuration file, whole or not at all; the form follows the suffix unless given.

    Raises:
        OutputError: the folder is missing or not writable.
    """
    tree = found.config.stored()
    if found.provenance is not None:
        tree[PROVENANCE] = found.provenance.model_dump(mode="json", exclude_none=True)
    if (form or out.suffix.removeprefix(".")) == "json":
        text = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    else:
        text = _heading(found) + to_toml(tree)
    write_text(out, text)


def load_config(path: Path) -> Exported:
    """Read a configuration file, exported or written by hand, TOML or (by its suffix) JSON.

    A file that states no schema version was exported before there were any, or is by hand and in this version's keys.

    Raises:
        ConfigError: missing, malformed, an unknown key, a value out of bounds, or provenance of another configuration.
    """
    tree = _read_json(path) if path.suffix == ".json" else read_toml(path)
    origin = tree.pop(PROVENANCE, None)
    if isinstance(origin, Mapping) and "program" in origin:
        raise ConfigError(f"{path}: settings of the program '{origin['program']}', not of a network's training")
    config = RunConfig.parse(_current(tree, origin is not None, path), source=str(path))
    if origin is None:
        return Exported(config=config)
    provenance = Provenance.parse(origin, source=f"{path}: {PROVENANCE}")
    if RunConfig.is_fingerprint_of(provenance.config_fingerprint, tree, str(path)):  # an older version's, perhaps
        provenance = provenance.replaced({"config_fingerprint": config.fingerprint()})
    return Exported(config=config, provenance=provenance, older=tree.get(SCHEMA_KEY, 0) < SCHEMA)


def load_scene(path: Path) -> SceneSpec:
    """Read the scene table of a configuration file, TOML; the defaults where it has none.

    Raises:
        ConfigError: as ``load_config``.
    """
    tree = read_toml(path)
    exported = tree.pop(PROVENANCE, None) is not None
    return SceneSpec.parse(_current(tree, exported, path).get("scene", {}), source=f"{path}: scene")


def _current(tree: Mapping[str, Any], exported: bool, path: Path) -> Mapping[str, Any]:
    return migrated(tree, RunConfig.settings, str(path)) if exported or SCHEMA_KEY in tree else tree


def is_unchanged(found: Exported) -> bool:
    """Say whether a configuration is still the one that was exported."""
    return found.provenance is not None and found.provenance.config_fingerprint == found.config.fingerprint()


def _heading(found: Exported | ExportedSettings) -> str:
    origin = found.provenance
    if origin is None:
        return ""
    lines = [f"Trial {origin.trial} of study '{origin.study}'"]
    if origin.k_loc is not None:
        lines[0] += f": k_loc {origin.k_loc:.4f} on the {origin.objective} path"
    if origin.score is not None:
        lines[0] += f": {origin.metric} {origin.score:.4f}"
    if origin.floor is not None:
        lines[0] += f", floor {origin.floor:.4f}"
    if origin.program is not None:
        lines += [f"Settings of {origin.program}"]
    else:
        train = "ris-hpo train --config THIS --out"
        lines += [f"{train} runs/best", f"{train} runs/again --replay"]
    return "".join(f"# {line}\n" for line in lines) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with reading(path, ConfigError):
            tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree
